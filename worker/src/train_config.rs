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
    /// Shards in a store, all of them in order, which are asked for as they are needed; then `shards` is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<StoredData>,
    /// Seconds between failures of this job on average, for `checkpoint.every: "auto"`; null when nothing is known.
    #[serde(default)]
    pub mean_seconds_between_failures: Option<f64>,
}

/// A job's data in a store, as its agent hands it out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredData {
    /// The folder where shards are asked for.
    pub feed: std::path::PathBuf,
    /// All of them, in order.
    pub shards: Vec<StoredShard>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredShard {
    /// Its name in the store.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}
