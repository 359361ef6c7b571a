//! What everlit tells about jobs, nodes and itself: the answers of the REST API (CONTRACT section 6).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{JobId, NodeId};
use crate::job::{JobKind, JobSpec, Priority};
use crate::manifest::Phase;
use crate::rank::{Cause, RankExit, RankState, StepPart};
use crate::time::Timestamp;

mod blame;
mod node;
mod place;

pub use blame::{BlameView, GpuBlameView};
pub use node::{Capacity, GpuInfo, GpuLoad, NodeLoad, NodeState, NodeView};
pub use place::{Explanation, PlacedRanks, PlacementPlan, Taint};

/// A job's state; the last three are final and never change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for a place.
    #[default]
    Queued,
    /// Placed; not every rank runs yet.
    Starting,
    /// Every rank runs.
    Running,
    /// A rank failed; the gang is being brought back.
    Recovering,
    /// Told to stop; ranks may be saving.
    Stopping,
    /// Every rank exited 0.
    Succeeded,
    /// Given up, with a reason.
    Failed,
    /// Stopped by a user.
    Stopped,
}

impl JobState {
    /// Every state, in order.
    pub const ALL: [Self; 8] =
        [Self::Queued, Self::Starting, Self::Running, Self::Recovering, Self::Stopping, Self::Succeeded, Self::Failed, Self::Stopped];

    /// Succeeded, failed or stopped.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Stopped)
    }

    /// As it is written in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Recovering => "recovering",
            Self::Stopping => "stopping",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }

    /// Reads what [`Self::as_str`] wrote.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// `GET /jobs` and `GET /jobs/{id}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// The id.
    pub job_id: JobId,
    /// For people.
    pub name: Option<String>,
    /// What kind of work.
    pub kind: JobKind,
    /// Where it is.
    pub state: JobState,
    /// Whose token submitted it; null without one.
    #[serde(default)]
    pub user: Option<String>,
    /// Order in the queue.
    pub priority: Priority,
    /// For filters.
    pub labels: BTreeMap<String, String>,
    /// Ranks.
    pub world_size: u32,
    /// Current or last attempt; 0 before the first.
    pub attempt: u32,
    /// Counted and free restarts so far.
    pub restarts: u32,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// When its ranks first ran.
    pub started_at: Option<Timestamp>,
    /// When it became final.
    pub finished_at: Option<Timestamp>,
    /// Why it is where it is, in one sentence.
    pub reason: Option<String>,
    /// What was submitted, defaults filled in, secrets hidden; only in `GET /jobs/{id}` and `POST /jobs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<JobSpec>,
}

/// `GET /jobs/{id}/summary`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Summary {
    /// The id.
    pub job_id: JobId,
    /// For people.
    pub name: Option<String>,
    /// What kind of work.
    pub kind: JobKind,
    /// Where it is.
    pub state: JobState,
    /// Ranks.
    pub world_size: u32,
    /// Updates done by the slowest rank.
    pub step: Option<u64>,
    /// Updates to do.
    pub total_steps: Option<u64>,
    /// `step / total_steps`, 0 to 1.
    pub progress: Option<f64>,
    /// Over the last ten seconds or so.
    pub steps_per_second: Option<f64>,
    /// Over the last ten seconds or so.
    pub samples_per_second: Option<f64>,
    /// Training loss of the last step, from rank 0; of an evaluation what it measured.
    pub loss: Option<f64>,
    /// Loss on held-out text, the newest that the program told.
    #[serde(default)]
    pub evaluation_loss: Option<f64>,
    /// Newest named numbers, from rank 0.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Time left at this speed.
    pub eta_seconds: Option<f64>,
    /// Current or last attempt; 0 before the first.
    pub attempt: u32,
    /// Membership of the process group within the attempt.
    pub generation: u32,
    /// Restarts so far, counted and free.
    pub restarts: u32,
    /// Steps executed again.
    pub lost_steps: u64,
    /// Training over wall time without queued, 0 to 1.
    pub goodput: Option<f64>,
    /// Where the time went, in seconds; the parts sum to wall time.
    pub ledger: Ledger,
    /// The newest checkpoint.
    pub last_checkpoint: Option<LastCheckpoint>,
    /// In rank order; always there.
    pub ranks: Vec<RankView>,
    /// Started ranks that wait; their `rank` is their seat, which counts on from the world size.
    pub spares: Vec<RankView>,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// When its ranks first ran.
    pub started_at: Option<Timestamp>,
    /// When it became final.
    pub finished_at: Option<Timestamp>,
    /// Why it is where it is, in one sentence.
    pub reason: Option<String>,
}

/// Where a job's time went, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Ledger {
    /// Waiting for a place.
    pub queued: f64,
    /// From a place to the first step of the first attempt, or to running.
    pub starting: f64,
    /// From a restart to the first step after it.
    pub restoring: f64,
    /// Steps done for the first time.
    pub training: f64,
    /// Steps executed again.
    pub repeated: f64,
    /// Steps blocked by a save.
    pub checkpointing: f64,
    /// From the last sign of progress to the failure being seen.
    pub undetected: f64,
    /// Waiting before a restart.
    pub backoff: f64,
    /// From a stop to the last rank's end.
    pub stopping: f64,
}

/// The newest checkpoint of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LastCheckpoint {
    /// Updates done.
    pub step: u64,
    /// Since it was committed.
    pub age_seconds: f64,
    /// Read back and found whole since.
    pub verified: bool,
    /// Node and path.
    pub location: String,
}

/// One rank in a summary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RankView {
    /// From 0.
    pub rank: u32,
    /// Where it runs or ran.
    pub node: Option<NodeId>,
    /// The rank's own process id; null when not alive.
    pub pid: Option<u32>,
    /// Where it is in its life.
    pub state: RankState,
    /// What it says it does.
    pub phase: Option<Phase>,
    /// Updates done; null until this incarnation has done one.
    pub step: Option<u64>,
    /// The part of a step that takes it much longer than the others; null unless it holds them up.
    #[serde(default)]
    pub slow: Option<StepPart>,
    /// Age of the last heartbeat by the agent's clock.
    pub heartbeat_age_seconds: Option<f64>,
    /// How it ended.
    pub exit: Option<RankExit>,
}

/// One entry of the durable sequence of what happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventView {
    /// Position in the sequence, opaque.
    pub id: String,
    /// The job, unless it concerns a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<JobId>,
    /// When.
    pub time: Timestamp,
    /// A stable name like `rank_exited`.
    pub event: String,
    /// Why, in one sentence.
    pub reason: String,
    /// Facts by name.
    #[serde(default)]
    pub data: serde_json::Value,
}

/// One run of a gang.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AttemptView {
    /// From 1.
    pub attempt: u32,
    /// When it was placed.
    pub started_at: Timestamp,
    /// When its last rank ended.
    pub ended_at: Option<Timestamp>,
    /// Step of the checkpoint that it started from.
    pub resumed_from_step: Option<u64>,
    /// Highest step that it reached.
    pub reached_step: Option<u64>,
    /// Why it ended.
    pub cause: Option<Cause>,
    /// The rank that failed first.
    pub first_failed_rank: Option<u32>,
    /// In one sentence.
    pub reason: Option<String>,
    /// Wait before the next attempt.
    pub backoff_ms: Option<u64>,
}

/// Why an attempt ended as it did, or what it has been through so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Postmortem {
    /// Whose.
    pub job_id: JobId,
    /// From 1.
    pub attempt: u32,
    /// When it was placed.
    pub started_at: Timestamp,
    /// When its last rank ended.
    pub ended_at: Option<Timestamp>,
    /// Step of the checkpoint that it started from.
    pub resumed_from_step: Option<u64>,
    /// Highest step that it reached.
    pub reached_step: Option<u64>,
    /// Why it ended.
    pub cause: Option<Cause>,
    /// The rank that failed first, by the kernel's order.
    pub first_failed_rank: Option<u32>,
    /// In one sentence.
    pub reason: Option<String>,
    /// What followed its end, and why.
    pub decision: Option<String>,
    /// What failed, in the order in which it was seen.
    pub failures: Vec<FailureView>,
    /// What ranks wrote last.
    pub ranks: Vec<RankWords>,
    /// Why lines are missing, when some are.
    pub lines_missing: Option<String>,
}

/// One failure of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FailureView {
    /// When it was seen.
    pub time: Timestamp,
    /// Which rank.
    pub rank: Option<u32>,
    /// What kind.
    pub cause: Option<Cause>,
    /// In one sentence.
    pub reason: String,
    /// How the rank ended, unless it was killed for this.
    pub exit: Option<crate::rank::RankExit>,
    /// What ranks were doing before one that hung was killed.
    pub stacks: Vec<crate::rank::Stacks>,
    /// What the gang's nodes were doing, by name.
    pub nodes: BTreeMap<String, NodeLoad>,
    /// What was decided.
    pub decision: Option<String>,
    /// Until every rank stepped again, when that was seen, in milliseconds.
    pub recovered_ms: Option<u64>,
}

/// What a rank wrote last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RankWords {
    /// Which.
    pub rank: u32,
    /// At most 200 lines, the newest last.
    pub lines: Vec<String>,
}

/// One checkpoint of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointView {
    /// Updates done.
    pub step: u64,
    /// The attempt that wrote it.
    pub attempt: u32,
    /// Sum of its files.
    pub bytes: u64,
    /// When it was committed.
    pub created_at: Timestamp,
    /// Read back and found whole since.
    pub verified: bool,
    /// A node that has it; none when only its store does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Its folder there, or in the store.
    pub path: String,
    /// Where it is in the job's store (`checkpoint.to`), once it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    /// Other nodes that have it, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also_on: Vec<NodeId>,
}

impl CheckpointView {
    /// A node has it, or the store.
    pub fn is_somewhere(&self) -> bool {
        self.node.is_some() || self.stored.is_some()
    }

    /// Every node that has it.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.node.iter().chain(&self.also_on)
    }
}

/// `GET /status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatusView {
    /// Of the coordinator.
    pub version: String,
    /// Since its start.
    pub uptime_seconds: f64,
    /// This coordinator decides.
    pub leader: bool,
    /// Nodes by state.
    pub nodes: NodeCounts,
    /// Jobs by state.
    pub jobs: BTreeMap<String, u64>,
    /// Ranks alive.
    pub ranks: u64,
    /// GPUs of all nodes.
    pub gpus: GpuCounts,
    /// Jobs that wait for a place.
    pub queue_depth: u64,
    /// Serving jobs; all zero until they are built.
    pub serving: ServingCounts,
    /// How callers are known: `loopback` (programs on this machine need no token), `tokens`, or `anonymous` and the role of who shows none.
    pub auth: String,
}

/// Nodes by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeCounts {
    /// Connected.
    pub ready: u64,
    /// Not heard of.
    pub lost: u64,
}

/// GPUs of all nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GpuCounts {
    /// In ready nodes.
    pub total: u64,
    /// Granted to jobs.
    pub used: u64,
    /// Mean over all, 0 to 1.
    pub utilization: f64,
}

/// Serving jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServingCounts {
    /// Replicas that answer.
    pub active_replicas: u64,
    /// Requests answered.
    pub requests_total: u64,
    /// 0 to 1; null before the first request.
    pub cache_hit_rate: Option<f64>,
    /// Requests that wait.
    pub queue_depth: u64,
}

/// A page of a list, in the order of the list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The entries.
    pub data: Vec<T>,
    /// Cursor of the first entry.
    pub first_id: Option<String>,
    /// Cursor of the last entry: `?after=` goes on from there.
    pub last_id: Option<String>,
    /// There is more after it.
    pub has_more: bool,
}

/// One point of `GET /jobs/{id}/metrics`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricPoint {
    /// When the agent saw it.
    pub time: Timestamp,
    /// The attempt.
    pub attempt: u32,
    /// Updates done.
    pub step: u64,
    /// Samples consumed.
    #[serde(default)]
    pub samples: Option<u64>,
    /// Training loss.
    pub loss: Option<f64>,
    /// Anything else, by name.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}
