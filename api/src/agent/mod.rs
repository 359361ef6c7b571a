//! What an agent and a coordinator say to each other: JSON text frames over one WebSocket, and binary frames for log bytes.
//!
//! The agent dials `GET /agent/link` with `Authorization: Bearer <token>`. Every frame is about facts or wishes that can be said twice:
//! the agent ignores what it has done already, the coordinator ignores what it knows already. After every connect the agent says
//! [`FromAgent::Hello`] with all that it has; an exit is repeated there until [`ToAgent::Forget`] says that it is durable.
//! Unknown fields are ignored, so a frame may grow; a frame that changes its meaning needs a new [`PROTOCOL`]. Large frames
//! may be packed ([`pack`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::copies::{CopyDoor, CopyOrder};
use self::stored::{ArchiveOrder, Archived, StoreFault, UploadOrder, Uploaded};
use crate::data::{DataTurn, Listed};
use crate::gpu::GpuError;
use crate::ids::{Incarnation, JobId, NodeId};
use crate::manifest::{Phase, SaveError};
use crate::rank::{RankExit, Stacks, Verdict};
use crate::status::{Capacity, NodeLoad, Taint};
use crate::time::{Millis, Timestamp};

pub mod copies;
mod gang;
pub mod log;
pub mod pack;
pub mod stored;

pub use gang::{GangSpec, MEMBERS_NAME, Members, Program, ResumeFrom};

/// Version of the frames.
pub const PROTOCOL: u32 = 1;
/// Bytes of one frame at most, either way, packed or not.
pub const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of log that may be under way per stream before the coordinator gives credit.
pub const LOG_CREDIT_BYTES: u64 = 1024 * 1024;
/// Bytes of log in one binary frame at most.
pub const LOG_FRAME_BYTES_MAX: usize = 256 * 1024;

/// From an agent to its coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromAgent {
    /// First frame of every connection: who it is and everything that it has.
    Hello(Hello),
    /// Load, once per report interval.
    Report(NodeLoad),
    /// A rank's process lives.
    Started(Started),
    /// A rank ended; repeated in every `Hello` until forgotten.
    Exited(Exited),
    /// Newest progress of ranks, coalesced.
    Beats {
        /// One per rank with news.
        beats: Vec<Beat>,
    },
    /// A living rank is judged.
    Judged {
        /// Which.
        incarnation: Incarnation,
        /// What.
        verdict: Verdict,
        /// Time without a sign of life.
        age_ms: u64,
        /// What it and the ranks beside it were doing, taken before anything is done about it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        stacks: Vec<Stacks>,
    },
    /// Which checkpoint an attempt starts from, decided once per attempt before its ranks start.
    Resumed(Resumed),
    /// A checkpoint was committed (`verified: false`), then read back (`verified: true`).
    Checkpoint(CheckpointNews),
    /// A checkpoint did not verify when it was read back after its commit, and was moved away.
    Quarantined {
        /// Whose.
        job: JobId,
        /// Its step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint could not be fetched from any node that has it.
    CopyFailed {
        /// Whose.
        job: JobId,
        /// Its step.
        step: u64,
        /// Why, for people.
        reason: String,
    },
    /// A checkpoint is in its store.
    Uploaded(Uploaded),
    /// A log is in its store.
    LogsArchived(Archived),
    /// A store did not do what it was asked for.
    StoreFault(StoreFault),
    /// A job's data shards in a store were listed, for the first time.
    DataListed(Listed),
    /// Where a job's data shards are read has changed.
    DataTurned(DataTurn),
    /// A rank could not save and trains on; said once per failed step.
    SaveFailed {
        /// Which rank.
        incarnation: Incarnation,
        /// What.
        error: SaveError,
    },
    /// The gang could not be started here at all (no such folder, disk full, program missing from the agent's machine).
    StartFailed {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// Why, for people.
        reason: String,
        /// Another try of the same can not succeed.
        permanent: bool,
    },
    /// A GPU had an error; said once, as soon as somebody hears it.
    GpuFailed {
        /// What.
        error: GpuError,
    },
    /// Memory of a gang's GPUs was still held by processes that are not ours, or do not end, and the gang is started all the same.
    GpuHeld {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// By whom.
        holders: Vec<GpuHolder>,
    },
    /// A job's files are gone.
    Removed {
        /// Which job.
        job: JobId,
    },
    /// A log stream ended: everything was sent (not `follow`), it was closed, or it can not be read.
    LogClosed {
        /// The coordinator's number for it.
        stream: u64,
        /// Why, when it is an error.
        error: Option<String>,
    },
    /// The agent was told to end (SIGTERM): stop its ranks with their grace, put their jobs back in the queue.
    Draining,
}

/// Who an agent is and everything that it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The node's name.
    pub node: NodeId,
    /// The kernel's boot id: another one means that no rank of before is alive.
    pub boot_id: String,
    /// Version of the agent's program.
    pub version: String,
    /// The agent's process id.
    pub pid: u32,
    /// What the node has.
    pub capacity: Capacity,
    /// Every rank that it knows and has not been told to forget.
    pub ranks: Vec<RankReport>,
    /// Newest checkpoint of every job that it keeps files of and that is not forgotten.
    pub checkpoints: Vec<CheckpointNews>,
    /// The agent is draining.
    pub draining: bool,
    /// Where ranks of other nodes reach this one; without it the node takes no part in gangs of several nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Where other nodes fetch checkpoints from it; without it the node neither gives nor takes copies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<CopyDoor>,
    /// What kind of node it is, for `node_selector`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What it is kept free of: jobs without a toleration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<Taint>,
}

/// One rank as its agent sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankReport {
    /// Which.
    pub incarnation: Incarnation,
    /// The rank's own process id, once started.
    pub pid: Option<u32>,
    /// When its process started.
    pub started_at: Option<Timestamp>,
    /// The newest membership of its gang that its agent was told.
    #[serde(default)]
    pub generation: u32,
    /// How it ended, when it has.
    pub exit: Option<RankExit>,
    /// It ended without an exit record.
    pub lost: bool,
    /// Newest progress.
    pub beat: Option<Beat>,
}

/// A rank's process lives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// Which.
    pub incarnation: Incarnation,
    /// The rank's own process id.
    pub pid: u32,
    /// When.
    pub at: Timestamp,
}

/// A rank ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exited {
    /// Which.
    pub incarnation: Incarnation,
    /// How.
    pub exit: RankExit,
    /// There is no exit record: the shim died, or the rank never ran.
    pub lost: bool,
}

/// Newest progress of one rank, from its heartbeat file or its output.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// Which; null only in `default()`.
    pub incarnation: Option<Incarnation>,
    /// From the heartbeat file (and not from output).
    pub heartbeat: bool,
    /// Membership of the process group.
    pub generation: u32,
    /// What it says it does.
    pub phase: Option<Phase>,
    /// Updates done.
    pub step: Option<u64>,
    /// Updates to do.
    pub total_steps: Option<u64>,
    /// Samples consumed by the job.
    pub samples: Option<u64>,
    /// Training loss.
    pub loss: Option<f64>,
    /// Anything else, by name; at most 32.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// The program saves when told to.
    #[serde(default)]
    pub saves_on_signal: bool,
    /// Whether the program can go on with other ranks in place of lost ones, without being started again; null before it has tried.
    #[serde(default)]
    pub in_place: Option<bool>,
    /// Milliseconds since the agent saw it, by its monotonic clock, when this frame was made.
    pub age_ms: u64,
}

/// Which checkpoint an attempt starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resumed {
    /// Which job.
    pub job: JobId,
    /// Which attempt.
    pub attempt: u32,
    /// The verified checkpoint; null for a fresh start.
    pub step: Option<u64>,
    /// Its folder.
    pub path: Option<String>,
    /// It is a snapshot in shared memory, newer than every checkpoint on disk.
    #[serde(default)]
    pub from_memory: bool,
    /// The node that it was fetched from for this start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetched_from: Option<NodeId>,
    /// The store that it was fetched from for this start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetched_from_store: Option<String>,
    /// What did not verify and was put aside, with the reason.
    pub quarantined: Vec<(u64, String)>,
}

impl Resumed {
    /// A fresh start.
    pub fn from_nothing(job: JobId, attempt: u32) -> Self {
        Self {
            job,
            attempt,
            step: None,
            path: None,
            from_memory: false,
            fetched_from: None,
            fetched_from_store: None,
            quarantined: Vec::new(),
        }
    }
}

/// A process that holds memory of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuHolder {
    /// Index as the driver counts.
    pub gpu: u32,
    /// The process.
    pub pid: u32,
    /// Its program's name; empty when it can not be read.
    pub name: String,
}

/// A committed checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointNews {
    /// Which job.
    pub job: JobId,
    /// The attempt that wrote it.
    pub attempt: u32,
    /// Updates done.
    pub step: u64,
    /// Sum of its files.
    pub bytes: u64,
    /// When it was committed.
    pub created_at: Timestamp,
    /// Read back and found whole.
    pub verified: bool,
    /// Its folder.
    pub path: String,
    /// Steps of every checkpoint that is kept, newest first.
    pub kept: Vec<u64>,
}

/// From a coordinator to an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToAgent {
    /// Answer to `Hello`.
    Welcome {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Time between reports.
        report_interval: Millis,
        /// A link that is silent for so long is over, at both ends.
        #[serde(default)]
        silence_max: Option<Millis>,
    },
    /// This link is not taken, or not any more; it ends.
    Refused {
        /// Why, and what to do.
        reason: String,
        /// Nothing that runs there is wanted any more, and dialling again is of no use.
        expelled: bool,
    },
    /// Run these ranks; refused when a later attempt is known. Of an attempt that is known only news count: with a later generation, ranks
    /// that are not members any more are killed, new ones are started, and the others are told who is with them; seats of spares that were
    /// never started are started.
    StartGang(Box<GangSpec>),
    /// Stop every rank of the attempt: SIGTERM to each group, SIGKILL after the grace (at once when it is zero).
    StopGang {
        /// Which job.
        job: JobId,
        /// Which attempt; a rank of another one is not touched.
        attempt: u32,
        /// From SIGTERM to SIGKILL.
        grace: Millis,
    },
    /// Tell the ranks of the attempt that can to save now and go on (SIGUSR1).
    SaveNow {
        /// Which job.
        job: JobId,
        /// Which attempt; a rank of another one is not touched.
        attempt: u32,
    },
    /// These ends are durable: say them no more. Run folders may go.
    Forget {
        /// Which.
        incarnations: Vec<Incarnation>,
    },
    /// Fetch a checkpoint from another node and keep it.
    CopyCheckpoint(CopyOrder),
    /// Put a checkpoint in a store.
    Upload(UploadOrder),
    /// Put a log in a store.
    ArchiveLogs(ArchiveOrder),
    /// Put aside what attempts up to this one have committed beyond a step: it was committed when a later attempt had begun elsewhere.
    PutAside {
        /// Whose.
        job: JobId,
        /// The last attempt that it is about.
        attempt: u32,
        /// What is newer than this goes; null: all.
        beyond: Option<u64>,
    },
    /// Remove everything that is kept of a job (no rank of it lives).
    RemoveJob {
        /// Which job.
        job: JobId,
    },
    /// The job is final: stop what serves only running ranks, keep logs and checkpoints.
    JobEnded {
        /// Which job.
        job: JobId,
    },
    /// Send a job's log as binary frames ([`LogFrame`]).
    OpenLog {
        /// The coordinator's number for it.
        stream: u64,
        /// Which job.
        job: JobId,
        /// Where to begin.
        from: log::LogStart,
        /// Go on as lines come; else close at the end.
        follow: bool,
    },
    /// The reader took this many bytes.
    LogCredit {
        /// Which stream.
        stream: u64,
        /// Bytes taken.
        bytes: u64,
    },
    /// Send no more of it.
    CloseLog {
        /// Which stream.
        stream: u64,
    },
    /// End once no rank is left.
    Shutdown,
}

/// Header of a binary frame from the agent: bytes of a job's log, whole records, exactly as they stand in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogFrame {
    /// The coordinator's number for the stream.
    pub stream: u64,
    /// The segment that the bytes are from.
    pub segment: u64,
    /// Offset of the first byte in the segment.
    pub offset: u64,
    /// Bytes of older log that are gone before this frame (bounds, a torn record).
    pub skipped: u64,
    /// The job's log had no more at the time: the reader is caught up.
    pub caught_up: bool,
}

impl LogFrame {
    /// Bytes of the encoded header.
    pub const BYTES: usize = 33;

    /// The header in front of `records`.
    pub fn encode(&self, records: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES + records.len());
        for number in [self.stream, self.segment, self.offset, self.skipped] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(u8::from(self.caught_up));
        out.extend_from_slice(records);
        out
    }

    /// The header of a frame; the records are what follows it. `None` when it is too short.
    pub fn decode(frame: &[u8]) -> Option<Self> {
        let header = frame.get(..Self::BYTES)?;
        let number = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        Some(Self { stream: number(0)?, segment: number(8)?, offset: number(16)?, skipped: number(24)?, caught_up: header[32] != 0 })
    }
}
