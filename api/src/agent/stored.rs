//! Checkpoints and logs in a store: what the agents and the coordinator say about them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::JobId;
use crate::store::{Lineage, Place, Trouble};

/// A node is to put a checkpoint in a store. A newer order for a job stands in place of the one before, and holds until it is done.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadOrder {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub step: u64,
    /// The job's folder in the store.
    pub to: Place,
    /// The job's `env` and `secrets`: what reaches and opens the store is among them.
    pub env: BTreeMap<String, String>,
    /// What its attempts have left behind.
    pub lineage: Lineage,
    /// Checkpoints kept there.
    pub keep: u32,
}

// Orders are logged, and secrets are not.
impl fmt::Debug for UploadOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UploadOrder").field("job", &self.job).field("step", &self.step).field("to", &self.to).finish_non_exhaustive()
    }
}

/// A checkpoint is in its store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Uploaded {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub step: u64,
    /// Bytes that were sent: less than its files have, where some were there.
    pub bytes: u64,
    /// What it took.
    pub took_ms: u64,
    /// Steps that are kept there now.
    pub kept: Vec<u64>,
}

/// A node is to put what its log of a job has, and the store has not, in the store: an attempt is over there. It is said again until it is done.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveOrder {
    /// Whose.
    pub job: JobId,
    /// The attempt that is over.
    pub attempt: u32,
    /// The job's folder in the store.
    pub to: Place,
    /// The job's `env` and `secrets`: what reaches and opens the store is among them.
    pub env: BTreeMap<String, String>,
}

// Orders are logged, and secrets are not.
impl fmt::Debug for ArchiveOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArchiveOrder").field("job", &self.job).field("attempt", &self.attempt).field("to", &self.to).finish_non_exhaustive()
    }
}

/// All that a node had of a job's log up to an attempt's end is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archived {
    /// Whose.
    pub job: JobId,
    /// Of this attempt and all before it.
    pub attempt: u32,
    /// Bytes that were sent now.
    pub bytes: u64,
    /// What it took.
    pub took_ms: u64,
}

/// A store did not do what it was asked for. It is asked again, unless the order is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreFault {
    /// For which job.
    pub job: JobId,
    /// For the checkpoint of this step; null while one is looked for, and for a log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// What kind of fault it is.
    pub trouble: Trouble,
    /// For people.
    pub reason: String,
}

/// A store has checkpoints of the job: they are fetched where nothing newer is nearer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The job's folder in the store.
    pub place: Place,
    /// The newest that is to be taken.
    pub step: u64,
    /// No connected node has one as new: without it the attempt must not start.
    pub required: bool,
}
