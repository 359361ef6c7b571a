//! Where simulated time went: the parts of a job's ledger and one more for a job that was given up. Each millisecond is spent once, so the
//! parts sum to the duration by construction.
//!
//! The engine keeps a book of its own while it is driven. This one knows what no coordinator can: when a fault really came, and recovery in
//! place, which the engine does not see yet. A test holds the two against each other.

use serde::Serialize;

use crate::engine::ledger::Activity;

/// Milliseconds by part, in the words of the ledger of `everlit get`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Steps done for the first time.
    pub training: u64,
    /// Steps executed again.
    pub repeated: u64,
    /// Steps blocked by a save.
    pub checkpointing: u64,
    /// From the last step before a fault to the fault being seen.
    pub undetected: u64,
    /// From a fault being seen to the first step after it, without the waits below; recovery in place too.
    pub restoring: u64,
    /// Waiting before a restart.
    pub backoff: u64,
    /// Waiting for a node.
    pub queued: u64,
    /// From submission to the first step.
    pub starting: u64,
    /// After the budget was used up: the job has failed.
    pub given_up: u64,
}

impl Account {
    /// So much time for that.
    pub(super) fn spend(&mut self, activity: Activity, ms: u64) {
        let part = match activity {
            Activity::Training => &mut self.training,
            Activity::Repeated => &mut self.repeated,
            Activity::Checkpointing => &mut self.checkpointing,
            Activity::Undetected => &mut self.undetected,
            Activity::Restoring | Activity::Stopping => &mut self.restoring,
            Activity::Backoff => &mut self.backoff,
            Activity::Queued => &mut self.queued,
            Activity::Starting => &mut self.starting,
        };
        *part += ms;
    }

    /// Every part with its name, as they are shown.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("training", self.training),
            ("repeated", self.repeated),
            ("checkpointing", self.checkpointing),
            ("undetected", self.undetected),
            ("restoring", self.restoring),
            ("backoff", self.backoff),
            ("queued", self.queued),
            ("starting", self.starting),
            ("given_up", self.given_up),
        ]
    }

    /// All parts.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, ms)| ms).sum()
    }

    /// Time in which ranks did steps, as the engine counts it for the mean time between failures.
    pub(super) fn running_ms(&self) -> u64 {
        self.training + self.repeated + self.checkpointing + self.undetected
    }

    /// Training over all time, waiting for nodes included.
    pub fn goodput(&self) -> f64 {
        if self.total() == 0 { 0.0 } else { self.training as f64 / self.total() as f64 }
    }

    /// The sum of two.
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            training: self.training + other.training,
            repeated: self.repeated + other.repeated,
            checkpointing: self.checkpointing + other.checkpointing,
            undetected: self.undetected + other.undetected,
            restoring: self.restoring + other.restoring,
            backoff: self.backoff + other.backoff,
            queued: self.queued + other.queued,
            starting: self.starting + other.starting,
            given_up: self.given_up + other.given_up,
        }
    }
}
