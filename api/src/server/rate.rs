//! How often somebody may ask: a bucket of requests each, which fills again with time.
//!
//! One bucket per token, or per address where there is none. The number of buckets is bounded: those that are full again are forgotten, for
//! a full one says nothing; where all are in use, whoever is new shares one.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Buckets at most.
const BUCKETS_MAX: usize = 10_000;

/// How often.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// At once, after a pause.
    pub burst: f64,
    /// For ever: so many per second.
    pub per_second: f64,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: f64,
}

/// Who asked how often.
#[derive(Debug)]
pub(super) struct Rates<K> {
    limit: Limit,
    begun: Instant,
    buckets: Mutex<Buckets<K>>,
}

#[derive(Debug)]
struct Buckets<K> {
    known: HashMap<K, Bucket>,
    /// Of those for whom there is no room.
    others: Bucket,
}

impl<K: Eq + Hash> Rates<K> {
    pub(super) fn new(limit: Limit) -> Self {
        let buckets = Mutex::new(Buckets { known: HashMap::new(), others: Bucket { left: limit.burst, at: 0.0 } });
        Self { limit, begun: Instant::now(), buckets }
    }

    /// Takes one; else the whole seconds to wait.
    pub(super) fn take(&self, who: K) -> Result<(), u64> {
        self.take_at(self.begun.elapsed().as_secs_f64(), who)
    }

    fn take_at(&self, now: f64, who: K) -> Result<(), u64> {
        let Limit { burst, per_second } = self.limit;
        let filled = |bucket: &Bucket| (bucket.left + (now - bucket.at) * per_second).min(burst);
        // It guards numbers only.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.known.len() >= BUCKETS_MAX && !buckets.known.contains_key(&who) {
            buckets.known.retain(|_, bucket| filled(bucket) < burst);
        }
        let Buckets { known, others } = &mut *buckets;
        let bucket = if known.len() < BUCKETS_MAX || known.contains_key(&who) {
            known.entry(who).or_insert(Bucket { left: burst, at: now })
        } else {
            others
        };
        *bucket = Bucket { left: filled(bucket), at: now };
        if bucket.left < 1.0 {
            return Err(((1.0 - bucket.left) / per_second).ceil() as u64);
        }
        bucket.left -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(burst: f64, per_second: f64) -> Rates<u32> {
        Rates::new(Limit { burst, per_second })
    }

    #[test]
    fn a_bucket_empties_tells_how_long_and_fills_again() {
        let rates = rates(3.0, 0.5);
        for _ in 0..3 {
            assert_eq!(rates.take_at(1.0, 7), Ok(()));
        }
        assert_eq!(rates.take_at(1.0, 7), Err(2));
        assert_eq!(rates.take_at(1.0, 8), Ok(()), "each has its own");
        assert_eq!(rates.take_at(2.5, 7), Err(1));
        assert_eq!(rates.take_at(3.0, 7), Ok(()));
        assert_eq!(rates.take_at(3.0, 7), Err(2));
        assert_eq!(rates.take_at(1_000.0, 7), Ok(()));
    }

    #[test]
    fn a_flood_of_callers_takes_a_bounded_room_and_shares_what_is_over() {
        let rates = rates(1.0, 1.0);
        for who in 0..BUCKETS_MAX as u32 {
            assert_eq!(rates.take_at(0.0, who), Ok(()));
        }
        assert_eq!(rates.take_at(0.1, 1_000_000), Ok(()));
        assert_eq!(rates.take_at(0.1, 1_000_001), Err(1), "one bucket for all who are new");
        assert_eq!(rates.take_at(0.1, 3), Err(1), "who is known has its own");
        // Later the old ones are full, and forgotten.
        assert_eq!(rates.take_at(5.0, 1_000_001), Ok(()));
        assert_eq!(rates.buckets.lock().expect("no panic").known.len(), 1);
    }
}
