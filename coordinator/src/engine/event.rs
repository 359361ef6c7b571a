//! What may happen to the engine: past facts and wishes, each with all that is needed to judge it.

use std::sync::Arc;

use everlit_api::agent::stored::{Archived, StoreFault, Uploaded};
use everlit_api::agent::{Beat, CheckpointNews, Exited, FromAgent, GpuHolder, Hello, Resumed, Started};
use everlit_api::data::{DataTurn, Listed};
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::manifest::SaveError;
use everlit_api::rank::{Stacks, Verdict};
use everlit_api::status::{CheckpointView, NodeLoad};
use everlit_api::store::Trouble;
use everlit_api::time::Millis;

/// One fact or wish.
#[derive(Debug, Clone)]
pub enum Event {
    /// A user submitted a job; the door has checked it.
    JobSubmitted {
        /// Fresh, larger than every id before.
        id: JobId,
        /// Complete.
        spec: Arc<JobSpec>,
        /// For everything random about this job.
        seed: u64,
        /// Whose token it was submitted with.
        user: Option<String>,
        /// Checkpoints of the job that it begins from, if it names one; newest first.
        origin: Vec<CheckpointView>,
    },
    /// A user wants it stopped; `force` skips the grace.
    StopRequested {
        /// Which.
        job: JobId,
        /// Kill at once.
        force: bool,
        /// Remove it once it is final.
        delete: bool,
    },
    /// A user wants the gang restarted.
    RestartRequested {
        /// Which.
        job: JobId,
    },
    /// A user wants it saved now; the sender has checked that somebody can.
    SaveRequested {
        /// Which.
        job: JobId,
    },
    /// An agent connected and said everything that it has.
    NodeLinked {
        /// What it said.
        hello: Box<Hello>,
    },
    /// The connection of a node's agent ended.
    NodeUnlinked {
        /// Which.
        node: NodeId,
    },
    /// An agent's regular report.
    NodeReported {
        /// Which.
        node: NodeId,
        /// What it does right now.
        load: NodeLoad,
    },
    /// No new ranks there, or again.
    CordonRequested {
        /// Which.
        node: NodeId,
        /// Take no new ranks.
        cordoned: bool,
    },
    /// A node is to be emptied: its jobs are saved and go back in the queue.
    NodeDraining {
        /// Which.
        node: NodeId,
        /// It stays cordoned afterwards (a user's wish, not an agent that ends).
        cordon: bool,
        /// What lives so long after is killed, whatever its grace.
        deadline: Option<Millis>,
    },
    /// A node is to be forgotten; while it holds places only when it is `force`d, and what ran there is lost then.
    NodeExpelled {
        /// Which.
        node: NodeId,
        /// Also while ranks are placed there.
        force: bool,
    },
    /// A rank's process lives.
    RankStarted(Started),
    /// A rank ended.
    RankExited(Exited),
    /// Newest progress of ranks.
    RanksBeat(Vec<Beat>),
    /// An agent judged a living rank.
    RankJudged {
        /// Which.
        incarnation: Incarnation,
        /// What.
        verdict: Verdict,
        /// Time without a sign of life.
        age_ms: u64,
        /// What ranks were doing then.
        stacks: Vec<Stacks>,
    },
    /// An agent decided what an attempt starts from.
    AttemptResumed {
        /// Where.
        node: NodeId,
        /// What.
        resumed: Resumed,
    },
    /// A checkpoint was committed or read back.
    CheckpointSeen {
        /// Where.
        node: NodeId,
        /// What.
        news: CheckpointNews,
    },
    /// A checkpoint did not verify when it was read back; its node has moved it away.
    CheckpointQuarantined {
        /// Where.
        node: NodeId,
        /// Whose.
        job: JobId,
        /// Its step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A node could not make a copy that it was told to make.
    CopyFailed {
        /// Which node.
        node: NodeId,
        /// Whose checkpoint.
        job: JobId,
        /// Its step.
        step: u64,
        /// Why.
        reason: String,
    },
    /// A node has put a checkpoint in its job's store.
    Uploaded {
        /// Which node.
        node: NodeId,
        /// What.
        done: Uploaded,
    },
    /// A node has put its log of a job in the job's store.
    LogsArchived {
        /// Which node.
        node: NodeId,
        /// What.
        done: Archived,
    },
    /// A post-mortem is in its job's store, or is not.
    PostmortemKept {
        /// Whose.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// Where it is, or what the store's fault was.
        outcome: Result<String, (Trouble, String)>,
    },
    /// A store did not do what a node asked of it.
    StoreFault {
        /// Which node.
        node: NodeId,
        /// What.
        fault: StoreFault,
    },
    /// A node has listed a job's data in a store.
    DataListed {
        /// Which node.
        node: NodeId,
        /// What.
        listed: Listed,
    },
    /// A node reads a job's shards elsewhere now.
    DataTurned {
        /// Which node.
        node: NodeId,
        /// What.
        news: DataTurn,
    },
    /// A rank could not save and trains on.
    SaveFailed {
        /// Which.
        incarnation: Incarnation,
        /// What it says.
        error: SaveError,
    },
    /// A node could not start its share of a gang.
    StartFailed {
        /// Which node.
        node: NodeId,
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// Why.
        reason: String,
        /// Another try of the same can not succeed.
        permanent: bool,
    },
    /// A GPU had an error.
    GpuFailed {
        /// Of which node.
        node: NodeId,
        /// What.
        error: GpuError,
    },
    /// A gang was started although memory of its GPUs is held by others.
    GpuHeld {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// By whom.
        holders: Vec<GpuHolder>,
    },
    /// What a node's agent says; what is not its to say is passed over.
    Said {
        /// Whose agent.
        node: NodeId,
        /// What.
        event: Box<Self>,
    },
    /// Time has passed.
    Woke,
}

impl Event {
    /// What a frame of a node's agent is to the engine; `None` for what only concerns files and readers.
    pub fn of_frame(node: NodeId, frame: FromAgent) -> Option<Self> {
        let event = match frame {
            FromAgent::Hello(hello) => Self::NodeLinked { hello: Box::new(hello) },
            FromAgent::Report(load) => Self::NodeReported { node: node.clone(), load },
            FromAgent::Started(started) => Self::RankStarted(started),
            FromAgent::Exited(exited) => Self::RankExited(exited),
            FromAgent::Beats { beats } => Self::RanksBeat(beats),
            FromAgent::Judged { incarnation, verdict, age_ms, stacks } => Self::RankJudged { incarnation, verdict, age_ms, stacks },
            FromAgent::Resumed(resumed) => Self::AttemptResumed { node: node.clone(), resumed },
            FromAgent::Checkpoint(news) => Self::CheckpointSeen { node: node.clone(), news },
            FromAgent::Quarantined { job, step, reason } => Self::CheckpointQuarantined { node: node.clone(), job, step, reason },
            FromAgent::CopyFailed { job, step, reason } => Self::CopyFailed { node: node.clone(), job, step, reason },
            FromAgent::Uploaded(done) => Self::Uploaded { node: node.clone(), done },
            FromAgent::LogsArchived(done) => Self::LogsArchived { node: node.clone(), done },
            FromAgent::StoreFault(fault) => Self::StoreFault { node: node.clone(), fault },
            FromAgent::DataListed(listed) => Self::DataListed { node: node.clone(), listed },
            FromAgent::DataTurned(news) => Self::DataTurned { node: node.clone(), news },
            FromAgent::SaveFailed { incarnation, error } => Self::SaveFailed { incarnation, error },
            FromAgent::StartFailed { job, attempt, reason, permanent } => {
                Self::StartFailed { node: node.clone(), job, attempt, reason, permanent }
            }
            FromAgent::GpuFailed { error } => Self::GpuFailed { node: node.clone(), error },
            FromAgent::GpuHeld { job, attempt, holders } => Self::GpuHeld { job, attempt, holders },
            FromAgent::Draining => Self::NodeDraining { node: node.clone(), cordon: false, deadline: None },
            FromAgent::Removed { .. } | FromAgent::LogClosed { .. } => return None,
        };
        Some(Self::Said { node, event: Box::new(event) })
    }
}
