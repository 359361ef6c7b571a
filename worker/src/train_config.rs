//! The file that `everlit-worker train --config` reads, written by the agent for each attempt.
//!
//! Without libtorch on purpose: the agent shares it. What differs per rank (rank, world, folders) is in the environment.

use everlit_api::job::{CheckpointPolicy, WorkerSpec};
use serde::{Deserialize, Serialize};

/// Everything about a training run that is the same for all of its ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Model, data and hyperparameters.
    pub worker: WorkerSpec,
    /// When state is saved; `keep` is used only when no agent prunes.
    #[serde(default)]
    pub checkpoint: CheckpointPolicy,
    /// All of the job's data shards in order, over all ranks; empty: `worker.data` says where the text is.
    #[serde(default)]
    pub shards: Vec<String>,
    /// Seconds between failures of this job on average, for `checkpoint.every: "auto"`; null when nothing is known.
    #[serde(default)]
    pub mean_seconds_between_failures: Option<f64>,
}
