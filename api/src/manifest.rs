//! `MANIFEST.json` of a checkpoint and the heartbeat file: the two files that programs which are not ours may write too.
//!
//! Format 1 is fixed (CONTRACT sections 3 and 4). A reader ignores fields it does not know and refuses a format it does not know.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time::Timestamp;

/// The manifest format that this build writes and reads.
pub const MANIFEST_FORMAT: u32 = 1;
/// Bytes per checksummed chunk of a checkpoint's file.
pub const CHUNK_BYTES: u64 = 4 * 1024 * 1024;
/// A manifest larger than this is refused unread: 1 TB of 4 MiB chunks stays below it.
pub const MANIFEST_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// A heartbeat file larger than this is ignored and counted.
pub const HEARTBEAT_BYTES_MAX: u64 = 4096;

/// What a checkpoint is and what it must contain, byte for byte. Its presence under the final name is the commit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// The job that wrote it; empty when a program ran alone.
    #[serde(default)]
    pub job_id: String,
    /// The attempt that wrote it, from 1: the fencing token.
    pub attempt: u32,
    /// The membership of the process group that wrote it, from 0.
    #[serde(default)]
    pub generation: u32,
    /// Optimizer updates done.
    pub step: u64,
    /// Whole passes over the data done.
    #[serde(default)]
    pub epoch: u64,
    /// Ranks that wrote it.
    #[serde(default)]
    pub world_size: u32,
    /// Samples per update over all ranks.
    #[serde(default)]
    pub global_batch: u64,
    /// Samples consumed by the job so far.
    #[serde(default)]
    pub samples: u64,
    /// Seed of every random number: numbers are a pure function of (seed, step, rank).
    #[serde(default)]
    pub seed: u64,
    /// Where in which data.
    #[serde(default)]
    pub data: DataPosition,
    /// What the tensors belong to; null for programs that are not ours.
    #[serde(default)]
    pub model: Option<ModelDescription>,
    /// When it was committed.
    pub created_at: Timestamp,
    /// Every file, in name order.
    pub files: Vec<ManifestFile>,
    /// Hex sha256 of the manifest's own bytes with these 64 digits as zeros, so that no bit of it can change unseen. The built-in program
    /// always writes it; it may be missing where `model` is null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_sha256: Option<String>,
}

/// Where in which data a checkpoint was taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataPosition {
    /// Hex sha256 over the ordered list of shards (name and bytes); empty when unknown.
    #[serde(default)]
    pub listing_sha256: String,
    /// Samples consumed in the current epoch, over all ranks.
    #[serde(default)]
    pub cursor: u64,
}

/// Model family and its full configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelDescription {
    /// `llama` or `mlp`.
    pub family: String,
    /// Sizes, as the family names them.
    pub config: serde_json::Value,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// A plain file name: no separators, no leading dot.
    pub name: String,
    /// Exact length.
    pub bytes: u64,
    /// Length of a chunk; the last may be shorter.
    pub chunk_bytes: u64,
    /// Hex sha256 per chunk, in order; one (of nothing) for an empty file.
    pub sha256: Vec<String>,
}

/// What a rank is doing, as it says itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Starting: libraries, process group.
    Init,
    /// Loading data or a checkpoint.
    Load,
    /// Training steps.
    Train,
    /// Writing a checkpoint.
    Checkpoint,
    /// An evaluation pass.
    Evaluate,
    /// Answering requests.
    Serve,
}

/// `HEARTBEAT`: one object of at most 4 KiB, replaced by rename.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Grows with every write of this incarnation.
    pub seq: u64,
    /// The writer's process id.
    #[serde(default)]
    pub pid: u32,
    /// The writer's rank.
    #[serde(default)]
    pub rank: u32,
    /// The writer's seat, when it is not its rank: a process that took a lost rank's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<u32>,
    /// The writer's attempt; a foreign one is ignored and counted.
    #[serde(default)]
    pub attempt: u32,
    /// The membership of the process group, from 0.
    #[serde(default)]
    pub generation: u32,
    /// What it is doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Optimizer updates done, over all attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Updates to do in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<u64>,
    /// Samples consumed by the job so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<u64>,
    /// Training loss of the last step; null when it is not a finite number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Anything else that is a number, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// The program saves when it gets SIGUSR1, and goes on; without this the signal is never sent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saves_on_signal: bool,
    /// Whether the program can go on with other ranks in place of lost ones, without being started again; null before it has tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<bool>,
    /// The newest save that failed while training went on; null after one that worked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_error: Option<SaveError>,
    /// For people only; age is never judged by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
}

/// A save that failed while training went on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveError {
    /// The step that was to be saved.
    pub step: u64,
    /// Why, for people; at most 512 characters.
    pub reason: String,
}
