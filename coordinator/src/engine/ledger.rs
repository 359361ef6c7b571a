//! Where a job's time went: one activity at a time, so the parts sum to wall time by construction (INV-11).
//!
//! Kept in milliseconds of the engine's clock. What happens between two records is lost at a crash and then counts to the activity of the
//! last record; the sum stays exact. Rejected: summing per-rank times, which never adds up to a wall clock.

use everlit_api::status::Ledger;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

/// What the job as a whole is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Waiting for a place.
    #[default]
    Queued,
    /// From a place to the first step of the first attempt.
    Starting,
    /// From a later place to the first step after it.
    Restoring,
    /// Steps done for the first time (or a program that does not tell).
    Training,
    /// Steps executed again.
    Repeated,
    /// Blocked by a save.
    Checkpointing,
    /// A fault that nobody had seen yet.
    Undetected,
    /// Waiting before a restart.
    Backoff,
    /// From a stop to the last rank's end.
    Stopping,
}

/// A job's book of time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Book {
    /// What it is doing.
    pub activity: Activity,
    since: Timestamp,
    opened: Timestamp,
    spent_ms: [u64; 9],
}

impl Book {
    /// Opened at submission, queued.
    pub fn open(now: Timestamp) -> Self {
        Self { activity: Activity::Queued, since: now, opened: now, spent_ms: [0; 9] }
    }

    /// From now on it does `next`.
    pub fn turn(&mut self, now: Timestamp, next: Activity) {
        if self.activity != next {
            self.settle(now);
            self.activity = next;
        }
    }

    /// The last `ms` of what it seemed to be doing were a fault that nobody had seen.
    pub fn reclaim_undetected(&mut self, now: Timestamp, ms: u64) {
        let span = now.since_ms(self.since);
        let lost = ms.min(span);
        self.spent_ms[self.activity as usize] += span - lost;
        self.spent_ms[Activity::Undetected as usize] += lost;
        self.since = now.max(self.since);
    }

    /// Closed: nothing is added any more.
    pub fn settle(&mut self, now: Timestamp) {
        self.spent_ms[self.activity as usize] += now.since_ms(self.since);
        self.since = now.max(self.since);
    }

    /// Everything up to `now`, in seconds.
    pub fn totals(&self, now: Timestamp) -> Ledger {
        let mut book = self.clone();
        book.settle(now);
        let seconds = |activity: Activity| book.spent_ms[activity as usize] as f64 / 1_000.0;
        Ledger {
            queued: seconds(Activity::Queued),
            starting: seconds(Activity::Starting),
            restoring: seconds(Activity::Restoring),
            training: seconds(Activity::Training),
            repeated: seconds(Activity::Repeated),
            checkpointing: seconds(Activity::Checkpointing),
            undetected: seconds(Activity::Undetected),
            backoff: seconds(Activity::Backoff),
            stopping: seconds(Activity::Stopping),
        }
    }

    /// Time in which ranks did steps, up to the last settlement.
    pub fn running_ms(&self) -> u64 {
        let running = [Activity::Training, Activity::Repeated, Activity::Checkpointing, Activity::Undetected];
        running.into_iter().map(|activity| self.spent_ms[activity as usize]).sum()
    }

    /// Training over wall time without queued; `None` before it was placed.
    pub fn goodput(&self, now: Timestamp) -> Option<f64> {
        let mut book = self.clone();
        book.settle(now);
        let all: u64 = book.spent_ms.iter().sum();
        let busy = all - book.spent_ms[Activity::Queued as usize];
        (busy > 0).then(|| book.spent_ms[Activity::Training as usize] as f64 / busy as f64)
    }

    /// INV-11: the parts sum to the time from opening to the last settlement.
    pub fn is_balanced(&self) -> bool {
        self.spent_ms.iter().sum::<u64>() == self.since.since_ms(self.opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_sum_to_wall_time_whatever_happens() {
        let mut book = Book::open(Timestamp(1_000));
        book.turn(Timestamp(2_000), Activity::Starting);
        book.turn(Timestamp(2_500), Activity::Training);
        // A clock that went back adds nothing and loses nothing.
        book.turn(Timestamp(2_400), Activity::Checkpointing);
        book.turn(Timestamp(4_000), Activity::Training);
        book.reclaim_undetected(Timestamp(6_000), 500);
        book.turn(Timestamp(6_000), Activity::Backoff);
        assert!(book.is_balanced());
        let ledger = book.totals(Timestamp(7_000));
        assert_eq!((ledger.queued, ledger.starting, ledger.training), (1.0, 0.5, 1.5));
        assert_eq!((ledger.checkpointing, ledger.undetected, ledger.backoff), (1.5, 0.5, 1.0));
        let goodput = book.goodput(Timestamp(7_000)).expect("placed");
        assert!((goodput - 1.5 / 5.0).abs() < 1e-9);
        assert_eq!(book.running_ms(), 3_500);
    }

    #[test]
    fn more_undetected_time_than_there_was_is_cut_to_what_there_was() {
        let mut book = Book::open(Timestamp(0));
        book.turn(Timestamp(100), Activity::Training);
        book.reclaim_undetected(Timestamp(300), 9_999);
        assert!(book.is_balanced());
        assert_eq!(book.totals(Timestamp(300)).undetected, 0.2);
    }

    #[test]
    fn before_it_was_placed_a_job_has_no_goodput_and_parts_that_do_not_sum_are_seen() {
        let mut book = Book::open(Timestamp(1_000));
        assert_eq!(book.goodput(Timestamp(5_000)), None);
        book.turn(Timestamp(5_000), Activity::Starting);
        assert_eq!(book.goodput(Timestamp(6_000)), Some(0.0));
        assert!(book.is_balanced());
        book.spent_ms[0] += 1;
        assert!(!book.is_balanced());
    }
}
