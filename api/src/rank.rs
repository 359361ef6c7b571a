//! One rank as everybody speaks of it: its state, its exit, and why an attempt ended.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::gpu::GpuError;
use crate::time::Timestamp;

/// Where a rank is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RankState {
    /// Not started in this attempt.
    Pending,
    /// Asked of the agent.
    Starting,
    /// Its process lives.
    Running,
    /// Told to stop.
    Stopping,
    /// Its process ended.
    Exited,
    /// Gone without an exit record: its shim or its node died.
    Lost,
}

/// How a process ended, as its parent saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RankExit {
    /// Exit code, null when a signal ended it or nobody saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// Signal number, null when it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// The shim saw no exit: it was killed itself, or the program could not be started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When the parent saw it (the kernel's order on one node).
    pub at: Timestamp,
    /// Last lines of output, at most 20 lines and 4 KiB.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tail: Vec<String>,
    /// The message of torchrun's error file, when the program wrote one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The first of the job's `log_policies` that its last output matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matched: Option<LogMatch>,
    /// The kernel killed a process for want of memory when this one ended by SIGKILL.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub out_of_memory: bool,
    /// An error of one of its GPUs shortly before its end, or in the moment after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_error: Option<GpuError>,
}

/// A line of output that one of the job's `log_policies` looks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogMatch {
    /// Which of them, from 0.
    pub policy: u32,
    /// The line, or the part of it around the match, at most 300 bytes.
    pub line: String,
}

/// What the threads of a living rank were doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stacks {
    /// The process's seat in its attempt: its rank, unless it took another one's place.
    pub rank: u32,
    /// Its process id.
    pub pid: u32,
    /// One line for the process, then for each thread a line (its name and state, what it waits for in the kernel, where in which library) and,
    /// where it waits, a line for each frame, the innermost first: the function, and in parentheses file and offset. At most 16 KiB.
    pub text: String,
}

impl RankExit {
    /// Exit code 0.
    pub fn is_success(&self) -> bool {
        self.code == Some(0)
    }

    /// Like `exit code 1`, `signal 9 (SIGKILL)` or the error.
    pub fn describe(&self) -> String {
        match (self.code, self.signal, &self.error) {
            (Some(code), _, _) => format!("exit code {code}"),
            (_, Some(signal), _) => format!("signal {signal} ({})", signal_name(signal)),
            (_, _, Some(error)) => error.clone(),
            _ => "an unknown end".into(),
        }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        15 => "SIGTERM",
        _ => "another signal",
    }
}

/// What made an attempt end, for budgets and for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A rank exited with a code other than 0.
    Exit,
    /// A signal that we did not send ended a rank.
    Signal,
    /// The kernel killed a rank for want of memory.
    OutOfMemory,
    /// No heartbeat within the timeout.
    Silent,
    /// Neither a heartbeat nor output after the start.
    NoStart,
    /// Neither a new step nor a new phase for too long.
    Stuck,
    /// No output and no CPU time.
    Idle,
    /// Some ranks finished and the others did not follow.
    Straggler,
    /// The program could not be started (126, 127, a missing folder).
    CannotStart,
    /// A shim or an agent was lost: not the program's fault, and free.
    Infrastructure,
    /// The node went away: free.
    NodeLost,
    /// The node was drained: free.
    Drain,
    /// A user asked for a restart: free.
    User,
    /// A job of higher priority took its places: free.
    Preempted,
    /// The hardware of a GPU failed: not the program's fault, and free; but each one without a new step counts against
    /// `max_start_failures`.
    Gpu,
}

impl Cause {
    /// Free causes count against no budget.
    pub fn is_free(self) -> bool {
        matches!(self, Self::Infrastructure | Self::NodeLost | Self::Drain | Self::User | Self::Preempted | Self::Gpu)
    }

    /// Whether many in a row without a new step end the job. With a broken GPU and no other to go to, it would else be tried for ever.
    pub fn is_start_failure(self) -> bool {
        !self.is_free() || self == Self::Gpu
    }
}

/// What an agent concludes about a living rank by its own monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// No new `seq` for `heartbeat.timeout`.
    Silent,
    /// Neither a heartbeat nor a line of output within `startup_timeout`.
    NoStart,
    /// No output and no CPU time for `idle_timeout`.
    Idle,
    /// Neither a new step nor a new phase within `progress_timeout`, or what was learned of the job.
    Stuck,
}

/// A part of a step that a rank works on by itself, while it waits for no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepPart {
    /// Waiting for its samples.
    Data,
    /// The forward and the backward pass.
    Compute,
    /// The gradient's norm and the optimizer.
    Update,
}

impl StepPart {
    /// In the order of a step.
    pub const ALL: [Self; 3] = [Self::Data, Self::Compute, Self::Update];

    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Compute => "compute",
            Self::Update => "update",
        }
    }

    /// The metric of a heartbeat that tells it: seconds of a step, the mean since the heartbeat before.
    pub fn metric(self) -> &'static str {
        match self {
            Self::Data => "data_seconds",
            Self::Compute => "compute_seconds",
            Self::Update => "update_seconds",
        }
    }
}

/// The metric that tells how long a step waited for the other ranks' gradients, in the same way.
pub const EXCHANGE_METRIC: &str = "exchange_seconds";
