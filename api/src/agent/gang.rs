//! The order for a gang: everything that a node needs to run its share of it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::copies::Fetch;
use super::stored::Stored;
use crate::data::GangData;
use crate::ids::JobId;
use crate::job::{CheckpointPolicy, HeartbeatPolicy, LogMetric, LogPolicy};
use crate::store::Place;
use crate::time::Millis;

/// Everything that an agent needs to run its share of a gang.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct GangSpec {
    /// Which job.
    pub job: JobId,
    /// From 1; the fencing token.
    pub attempt: u32,
    /// From 0.
    pub generation: u32,
    /// Seat of each rank of the whole gang, in rank order; empty: each rank has the seat of its own number.
    #[serde(default)]
    pub seats: Vec<u32>,
    /// Seats of the spares on this node: started ranks that wait.
    #[serde(default)]
    pub spares: Vec<u32>,
    /// Ranks may join or leave while the others go on.
    #[serde(default)]
    pub elastic: bool,
    /// Ranks of the whole gang.
    pub world_size: u32,
    /// The first rank here.
    pub first_rank: u32,
    /// How many, in a row.
    pub count: u32,
    /// Index of this node among the gang's nodes (`GROUP_RANK`).
    pub group_rank: u32,
    /// Nodes of the gang (`GROUP_WORLD_SIZE`).
    pub group_world_size: u32,
    /// Where rank 0 is reached.
    pub master_addr: String,
    /// Fresh for every attempt.
    pub master_port: u16,
    /// What opens the store that ranks of several nodes meet at; empty where all are on one. The coordinator's shell puts it in.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rendezvous_secret: String,
    /// Restarts so far (`TORCHELASTIC_RESTART_COUNT`).
    pub restarts: u32,
    /// `restart.max_restarts`.
    pub max_restarts: u32,
    /// Mean time between failures of the job as seen so far; null when nothing is known.
    #[serde(default)]
    pub mean_time_between_failures: Option<Millis>,
    /// Indexes of the GPUs granted here, in rank order; one that ranks share is there for each.
    pub gpus: Vec<u32>,
    /// Other jobs may have memory of these GPUs.
    #[serde(default)]
    pub shares_gpus: bool,
    /// What runs.
    pub program: Program,
    /// The job's `env` and `secrets`.
    pub env: BTreeMap<String, String>,
    /// Folder that each rank starts in, in the package if there is one; null for the agent's, or that of the package.
    pub workdir: Option<String>,
    /// The sha256 of a packed folder, which the agent gets at `GET /agent/packages/{package}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// Data shards of the job, in order, when they are files of the nodes.
    pub shards: Vec<String>,
    /// Its data shards in a store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<GangData>,
    /// Where to start from.
    pub resume_from: Option<ResumeFrom>,
    /// A checkpoint that is elsewhere and may be newer than what is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetch: Option<Fetch>,
    /// What a store has of the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Stored>,
    /// The checkpoint of this step failed too many resumes: it is put aside if there is an older good one.
    #[serde(default)]
    pub rejected_step: Option<u64>,
    /// The snapshot in shared memory failed a resume: the newest checkpoint is taken instead.
    #[serde(default)]
    pub skip_memory: bool,
    /// When state is saved and how much is kept.
    pub checkpoint: CheckpointPolicy,
    /// When a rank counts as silent.
    pub heartbeat: HeartbeatPolicy,
    /// How to read progress from output; empty means the defaults.
    pub log_metrics: Vec<LogMetric>,
    /// What to look for in the last output of a rank that failed.
    #[serde(default)]
    pub log_policies: Vec<LogPolicy>,
    /// Bytes of log kept for the job on this node.
    pub log_bytes_max: u64,
    /// From SIGTERM to SIGKILL when the agent itself is told to end and has no coordinator to ask.
    #[serde(default = "crate::job::default_stop_grace")]
    pub stop_grace: Millis,
}

// Orders are logged, and secrets are not.
impl fmt::Debug for GangSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (job, attempt, generation) = (self.job, self.attempt, self.generation);
        let ranks = self.first_rank..self.first_rank.saturating_add(self.count);
        let mut shown = f.debug_struct("GangSpec");
        shown.field("job", &job).field("attempt", &attempt).field("generation", &generation).field("ranks", &ranks);
        shown.field("seats", &self.seats).field("spares", &self.spares).field("gpus", &self.gpus).finish_non_exhaustive()
    }
}

impl GangSpec {
    /// The seat of a rank of the gang.
    pub fn seat(&self, rank: u32) -> u32 {
        self.seats.get(rank as usize).copied().unwrap_or(rank)
    }

    /// Ranks on this node with their seats.
    pub fn own_seats(&self) -> impl Iterator<Item = (u32, u32)> {
        (self.first_rank..self.first_rank.saturating_add(self.count)).map(|rank| (rank, self.seat(rank)))
    }

    /// The rank that a process of this node is now; `None` for a spare, and for one that is not wanted any more.
    pub fn rank_of(&self, seat: u32) -> Option<u32> {
        // Few ranks ever change their seat, and only those are looked for.
        if self.seat(seat) == seat && seat >= self.first_rank && seat - self.first_rank < self.count {
            return Some(seat);
        }
        if self.seats.is_empty() { None } else { self.own_seats().find(|(_, own)| *own == seat).map(|(rank, _)| rank) }
    }

    /// Whether a process of this node is wanted.
    pub fn wants(&self, seat: u32) -> bool {
        self.spares.contains(&seat) || self.rank_of(seat).is_some()
    }
}

/// Who is in a process group, told to the ranks of a node by a file in their rendezvous folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// Grows with every membership of the attempt.
    pub generation: u32,
    /// Seat of each rank, in rank order.
    pub seats: Vec<u32>,
}

/// Name of the file of [`Members`].
pub const MEMBERS_NAME: &str = "MEMBERS";

/// What runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "program", rename_all = "snake_case")]
pub enum Program {
    /// Any program and its arguments.
    Command {
        /// Never empty.
        argv: Vec<String>,
    },
    /// `everlit-worker` with these settings.
    Worker {
        /// The job's `worker`.
        worker: Box<crate::job::WorkerSpec>,
        /// `everlit-worker evaluate` instead of `train`.
        #[serde(default)]
        evaluate: bool,
    },
}

/// Where a job starts when it has no checkpoint of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResumeFrom {
    /// The newest verified checkpoint of another job on this node.
    Job(JobId),
    /// A checkpoint's folder, or a folder of checkpoints.
    Path(String),
    /// A checkpoint in a store, or a job's folder there.
    Store(Place),
}
