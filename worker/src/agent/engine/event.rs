//! What can happen to the agent's engine and what it can want: two closed enums.
//!
//! An [`Event`] is a past fact that the driver saw; an [`Action`] is a wish that the driver carries out. Log streams are not here: they
//! decide nothing.

use everlit_api::agent::{Beat, CheckpointNews, FromAgent, GangSpec, Resumed};
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::manifest::SaveError;
use everlit_api::rank::RankExit;
use everlit_api::time::{Millis, Timestamp};

/// A past fact.
#[derive(Debug, Clone)]
pub enum Event {
    /// The coordinator is connected and waits for a hello.
    Linked,
    /// It is no longer connected.
    Unlinked,
    /// The coordinator wants a gang.
    GangOrdered(Box<GangSpec>),
    /// The coordinator wants an attempt stopped.
    StopOrdered {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// From SIGTERM to SIGKILL.
        grace: Millis,
    },
    /// The coordinator wants an attempt saved now.
    SaveOrdered {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
    },
    /// These ends are on record.
    ForgetOrdered(Vec<Incarnation>),
    /// A job's files are to go.
    RemoveOrdered(JobId),
    /// A job is final.
    JobEnded(JobId),
    /// The coordinator wants this agent to end once no rank is left.
    ShutdownOrdered,
    /// A gang's folders are there and its start is decided.
    GangPrepared {
        /// What was decided.
        resumed: Resumed,
        /// When.
        at: Timestamp,
    },
    /// A gang can not be started.
    GangRefused {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// Why.
        reason: String,
        /// Another try can not succeed.
        permanent: bool,
    },
    /// An agent before this one had started a gang, of which these ranks are not forgotten.
    GangFound {
        /// As it was ordered, without environment.
        spec: Box<GangSpec>,
        /// As it was decided.
        resumed: Option<Resumed>,
        /// Their numbers.
        ranks: Vec<u32>,
        /// Those of them that it did not come to start.
        unstarted: Vec<u32>,
    },
    /// A rank's process lives.
    RankStarted {
        /// Which.
        incarnation: Incarnation,
        /// Its process id.
        pid: u32,
        /// When.
        at: Timestamp,
    },
    /// A rank wrote something.
    RankOutput(Incarnation),
    /// A rank is no more.
    RankEnded {
        /// Which.
        incarnation: Incarnation,
        /// How.
        exit: RankExit,
        /// Nobody saw how.
        lost: bool,
    },
    /// A rank's heartbeat file was read and found good.
    HeartbeatRead {
        /// Which.
        incarnation: Incarnation,
        /// Its sequence number.
        seq: u64,
        /// What it says.
        beat: Box<Beat>,
        /// The newest save that failed.
        save_error: Option<SaveError>,
    },
    /// A rank's output told something.
    ProgressRead {
        /// Which.
        incarnation: Incarnation,
        /// What; fields that are not there did not change.
        beat: Box<Beat>,
    },
    /// CPU time of a rank and everything under its shim.
    CpuRead {
        /// Which.
        incarnation: Incarnation,
        /// User and system time so far.
        cpu_ms: u64,
    },
    /// The disk that heartbeats are written to was tried.
    Probed {
        /// A small file was written and renamed in so many milliseconds; `None`: it could not be.
        took_ms: Option<u64>,
    },
    /// A checkpoint was committed, or read back.
    CheckpointSeen(Box<CheckpointNews>),
    /// What was known of a job's checkpoints does not hold any more; what is left is told after this.
    CheckpointsGone(JobId),
    /// A checkpoint was damaged when it was read back, and was moved away.
    CheckpointQuarantined {
        /// Whose.
        job: JobId,
        /// Its step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Ranks of a gang stand still for data that a store does not give, or do not any more.
    DataAwaited {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
        /// Whether they do.
        waiting: bool,
    },
    /// A GPU of this node had an error.
    GpuFailed(GpuError),
    /// A job's files are gone.
    JobRemoved(JobId),
    /// Somebody asked this agent to end (SIGTERM, SIGINT).
    EndAsked,
    /// The time of `next_deadline` has come.
    DeadlinePassed,
}

/// A wish.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell the coordinator, if it is connected.
    Say(FromAgent),
    /// Decide where a gang starts and make its folders; answer `GangPrepared` or `GangRefused`.
    Prepare(Box<GangSpec>),
    /// Bring a membership about: tell the ranks that live, and start those that were never started.
    Regroup {
        /// The gang as it is now.
        spec: Box<GangSpec>,
        /// What the attempt began from.
        resumed: Resumed,
        /// Seats to start.
        fresh: Vec<u32>,
    },
    /// Start the ranks of a prepared gang.
    Spawn {
        /// Which job.
        job: JobId,
        /// Which attempt.
        attempt: u32,
    },
    /// Send a signal to a rank's process group.
    Signal {
        /// Which.
        incarnation: Incarnation,
        /// Signal number.
        signal: i32,
    },
    /// Send a signal to a rank's own process and to nothing that it started.
    Notify {
        /// Which.
        incarnation: Incarnation,
        /// Signal number.
        signal: i32,
    },
    /// Snapshots in shared memory that a commit made superfluous may go.
    FreeSnapshots {
        /// Whose.
        job: JobId,
        /// Step of the commit.
        committed: u64,
        /// The newest attempt, whose snapshots stay.
        attempt: u32,
    },
    /// Write down that this rank ends because the agent does.
    MarkDrained(Incarnation),
    /// Read a rank's CPU time; answer `CpuRead`.
    ReadCpu(Incarnation),
    /// It is not started any more: answer `RankEnded`, lost.
    LeaveOut(Incarnation),
    /// Write and rename a small file where this rank writes its heartbeats; answer `Probed`.
    Probe(Incarnation),
    /// The run folders of these are not needed any more.
    RemoveRuns(Vec<Incarnation>),
    /// Remember on disk that a job is final.
    RetireJob(JobId),
    /// Remove a job's files; answer `JobRemoved`.
    RemoveJob(JobId),
    /// End this program.
    Exit(&'static str),
}
