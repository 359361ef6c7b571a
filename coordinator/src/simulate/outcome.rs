//! What came of a run: where the time went, and what happened how often.

use everlit_api::status::Ledger;
use serde::Serialize;

use super::account::Account;

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Where the time went, in milliseconds.
    pub ledger_ms: Account,
    /// Steps whose work was kept at the end.
    pub steps: u64,
    /// What happened how often.
    pub counts: Counts,
    /// When and why the job was given up, if it was.
    pub gave_up: Option<GaveUp>,
    /// Events that the engine was given.
    #[serde(skip)]
    pub engine_events: u64,
    /// The engine's own book, when every step was told to it and the job was active to the end.
    #[serde(skip)]
    pub engine_ledger: Option<Ledger>,
}

/// What happened how often.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Failures that came, those that hit nothing included.
    pub failures: u64,
    /// Failures of processes while none ran.
    pub hit_nothing: u64,
    /// Planned stops.
    pub planned: u64,
    /// Recoveries in place that worked.
    pub in_place: u64,
    /// And that did not.
    pub in_place_failed: u64,
    /// Starts of the gang from a snapshot in memory.
    pub from_snapshot: u64,
    /// From a checkpoint.
    pub from_checkpoint: u64,
    /// Restarts from nothing: there was no checkpoint yet.
    pub from_nothing: u64,
    /// Times that the gang waited for a node.
    pub waits: u64,
    /// Checkpoints that were committed.
    pub checkpoints: u64,
}

/// The budget was used up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GaveUp {
    /// Milliseconds from the start.
    pub at_ms: u64,
    /// The engine's words.
    pub reason: String,
}

impl Counts {
    /// The sum of two.
    pub(super) fn plus(&self, other: &Self) -> Self {
        Self {
            failures: self.failures + other.failures,
            hit_nothing: self.hit_nothing + other.hit_nothing,
            planned: self.planned + other.planned,
            in_place: self.in_place + other.in_place,
            in_place_failed: self.in_place_failed + other.in_place_failed,
            from_snapshot: self.from_snapshot + other.from_snapshot,
            from_checkpoint: self.from_checkpoint + other.from_checkpoint,
            from_nothing: self.from_nothing + other.from_nothing,
            waits: self.waits + other.waits,
            checkpoints: self.checkpoints + other.checkpoints,
        }
    }
}
