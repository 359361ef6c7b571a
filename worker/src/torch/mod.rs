//! The built-in training program: data-parallel training on libtorch, one process per rank.
//!
//! Only this folder sees tch, and it is a module of `bin/everlit-worker.rs` alone, so that no other program loads libtorch.
//! Below it stand `checkpoint` (files) and `cpp/` (the C++ face of c10d). Everything random is a pure function of the seed
//! and a position, and every sum has one order, so that on a CPU a run that was killed and resumed ends with the bits of
//! an undisturbed one.

pub mod c10d;
pub mod check;
pub mod data;
pub mod device;
pub mod disk;
pub mod environment;
pub mod feed;
pub mod heartbeat;
pub mod kernels;
pub mod load;
pub mod loader;
pub mod memory;
pub mod model;
pub mod order;
pub mod parts;
pub mod random;
pub mod ranks;
pub mod rendezvous;
pub mod save;
pub mod sharing;
pub mod signals;
pub mod state;
pub mod tensors;
pub mod train;

/// Exit code of a bad configuration or bad data: starting again does not help.
pub const EXIT_CONFIG: i32 = 78;
/// Exit code after SIGTERM, as a shell reports it.
pub const EXIT_TERMINATED: i32 = 143;

/// Why a rank ended without finishing; each variant is one exit code.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TrainError {
    /// What was asked for can never work: exit code 78.
    #[error("{0}")]
    Config(String),
    /// Another rank is gone or does not answer: exit code 1, the group is started again.
    #[error("peer lost: {0}")]
    PeerLost(String),
    /// Anything else: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// SIGTERM: exit code 143. The text says whether the state was saved.
    #[error("{0}")]
    Terminated(String),
}

impl TrainError {
    pub(crate) fn failed(why: impl ToString) -> Self {
        Self::Failed(why.to_string())
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Config(_) => EXIT_CONFIG,
            Self::PeerLost(_) | Self::Failed(_) => 1,
            Self::Terminated(_) => EXIT_TERMINATED,
        }
    }
}

impl From<c10d::CollectiveError> for TrainError {
    fn from(error: c10d::CollectiveError) -> Self {
        if error.is_peer_lost() { Self::PeerLost(error.0) } else { Self::Failed(error.0) }
    }
}

impl From<tch::TchError> for TrainError {
    fn from(error: tch::TchError) -> Self {
        c10d::CollectiveError::from_message(&error.to_string()).into()
    }
}
