//! A closed set of timers and when each is due. The engine asks to be woken and never sleeps.
//!
//! A timer is set or not; setting it again moves it. Handlers must still check the state: a timer only says that time has passed.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::{JobId, NodeId};
use everlit_api::time::Timestamp;

/// What may become due.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// The backoff before the next attempt is over.
    Retry(JobId),
    /// The backoff of a rank that is restarted alone is over.
    RankRetry(JobId, u32),
    /// A recovery in place takes too long.
    Regroup(JobId),
    /// A smaller gang tries again to get back to its size.
    Grow(JobId),
    /// A checkpoint may be copied.
    Copies(JobId),
    /// One rank is done and the others should be by now.
    Straggler(JobId),
    /// The job's `time_limit`.
    TimeLimit(JobId),
    /// A node has not been heard of for the node timeout.
    NodeLost(NodeId),
    /// The oldest failure that is held against a node is forgotten.
    Blames(NodeId),
    /// Check every table.
    CheckAll,
}

/// All timers that are set.
#[derive(Debug, Default)]
pub struct Timers {
    due: BTreeSet<(Timestamp, Timer)>,
    by_timer: BTreeMap<Timer, Timestamp>,
}

impl Timers {
    /// Sets or moves a timer.
    pub fn set(&mut self, timer: Timer, at: Timestamp) {
        self.clear(&timer);
        self.due.insert((at, timer.clone()));
        self.by_timer.insert(timer, at);
    }

    /// Takes a timer back.
    pub fn clear(&mut self, timer: &Timer) {
        if let Some(at) = self.by_timer.remove(timer) {
            self.due.remove(&(at, timer.clone()));
        }
    }

    /// Takes back all that concern a job.
    pub fn clear_job(&mut self, job: JobId) {
        let all =
            [Timer::Retry(job), Timer::Regroup(job), Timer::Grow(job), Timer::Copies(job), Timer::Straggler(job), Timer::TimeLimit(job)];
        for timer in all {
            self.clear(&timer);
        }
        self.clear_ranks(job);
    }

    /// Takes back all that concern single ranks of a job.
    pub fn clear_ranks(&mut self, job: JobId) {
        let of_ranks = self.by_timer.range(Timer::RankRetry(job, 0)..=Timer::RankRetry(job, u32::MAX));
        let of_ranks: Vec<Timer> = of_ranks.map(|(timer, _)| timer.clone()).collect();
        of_ranks.iter().for_each(|timer| self.clear(timer));
    }

    /// Whether it is set.
    pub fn is_set(&self, timer: &Timer) -> bool {
        self.by_timer.contains_key(timer)
    }

    /// When it is due, if it is set.
    pub fn due_at(&self, timer: &Timer) -> Option<Timestamp> {
        self.by_timer.get(timer).copied()
    }

    /// When the engine wants to be woken.
    pub fn next(&self) -> Option<Timestamp> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Takes the first timer that is due.
    pub fn pop_due(&mut self, now: Timestamp) -> Option<Timer> {
        let (at, _) = self.due.first()?;
        if *at > now {
            return None;
        }
        let (_, timer) = self.due.pop_first()?;
        self.by_timer.remove(&timer);
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_due_once_and_can_be_moved() {
        let job = JobId::from_u128(1);
        let mut timers = Timers::default();
        timers.set(Timer::Retry(job), Timestamp(10));
        timers.set(Timer::Retry(job), Timestamp(30));
        timers.set(Timer::CheckAll, Timestamp(20));
        assert_eq!(timers.next(), Some(Timestamp(20)));
        assert_eq!(timers.pop_due(Timestamp(19)), None);
        assert_eq!(timers.pop_due(Timestamp(40)), Some(Timer::CheckAll));
        assert_eq!(timers.pop_due(Timestamp(40)), Some(Timer::Retry(job)));
        assert_eq!(timers.pop_due(Timestamp(40)), None);
        assert_eq!(timers.next(), None);
    }
}
