//! What the engine wants done, and what must be durable before.
//!
//! The write order is a type: whoever holds a [`Step`] makes `record` durable first and only then runs `commands`.

use std::sync::Arc;

use everlit_api::agent::ToAgent;
use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::status::{AttemptView, JobState};
use everlit_api::time::Timestamp;

use super::blame::Held;

/// The outcome of one event.
#[derive(Debug, Default)]
pub struct Step {
    /// Made durable first.
    pub record: Record,
    /// Run then, in this order.
    pub commands: Vec<Command>,
}

/// What must be durable.
#[derive(Debug, Default)]
pub struct Record {
    /// The newest state of every job that was touched.
    pub jobs: Vec<JobRow>,
    /// What happened, oldest first.
    pub events: Vec<EventRow>,
    /// Begun and ended attempts.
    pub attempts: Vec<(JobId, AttemptView)>,
    /// Nodes whose cordon changed.
    pub cordons: Vec<(NodeId, bool)>,
    /// Nodes of which something else is held against them or their GPUs now, with all of it.
    pub blames: Vec<(NodeId, Held)>,
    /// Nodes that were expelled.
    pub forgotten: Vec<NodeId>,
}

impl Record {
    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        let Self { jobs, events, attempts, cordons, blames, forgotten } = self;
        jobs.is_empty() && events.is_empty() && attempts.is_empty() && cordons.is_empty() && blames.is_empty() && forgotten.is_empty()
    }
}

/// A job as it is kept.
#[derive(Debug, Clone)]
pub struct JobRow {
    /// Which.
    pub id: JobId,
    /// For filters.
    pub state: JobState,
    /// For retention.
    pub finished_at: Option<Timestamp>,
    /// Only with the first row of a job.
    pub spec: Option<Arc<JobSpec>>,
    /// Whose it is, for filters; only with the first row of a job.
    pub user: Option<String>,
    /// The engine's own state, JSON with a version.
    pub body: String,
    /// The ranks' ends, JSON; only of a final job.
    pub ranks: Option<String>,
    /// The time series, JSON; only when it is due, and of a final job. Without it what was written before stays.
    pub series: Option<String>,
    /// What its data in a store was when it was listed, JSON; only with the row after that.
    pub listing: Option<String>,
    /// To be removed with all files now that it is final.
    pub delete: bool,
}

/// One entry of the durable sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRow {
    /// Which job, unless it concerns a node.
    pub job: Option<JobId>,
    /// When.
    pub time: Timestamp,
    /// A stable name.
    pub event: &'static str,
    /// Why, in one sentence.
    pub reason: String,
    /// Facts by name.
    pub data: serde_json::Value,
}

/// What is to be done once the record is durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Say this to a node's agent; dropped when it is not connected (said again after its next `Hello`).
    Tell {
        /// Which.
        node: NodeId,
        /// What.
        frame: ToAgent,
    },
    /// Put the post-mortem of an attempt in its job's store.
    KeepPostmortem {
        /// Whose.
        job: JobId,
        /// Which attempt.
        attempt: u32,
    },
    /// The job is final and no longer in the engine: readers find it in the store.
    Final {
        /// Which.
        job: JobId,
        /// How.
        state: JobState,
        /// Where it ever ran: to be told when its files may go.
        nodes: Vec<NodeId>,
        /// Remove it with all its files.
        delete: bool,
    },
}
