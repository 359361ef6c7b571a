//! `MANIFEST.json` of a checkpoint and the heartbeat file: the two files that programs which are not ours may write too.
//!
//! Format 1 is fixed (CONTRACT sections 3 and 4). A reader ignores fields it does not know and refuses a format it does not know.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::join::to_hex;
use crate::time::Timestamp;

/// The manifest format that this build writes and reads.
pub const MANIFEST_FORMAT: u32 = 1;
/// The manifest's name; its presence under the final name is the commit.
pub const MANIFEST_NAME: &str = "MANIFEST.json";
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

/// Why a manifest is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// It is of a format that this build does not know.
    #[error("{MANIFEST_NAME} has format {0}, this build reads format {MANIFEST_FORMAT}")]
    UnknownFormat(u64),
    /// It can not be read as what it says it is.
    #[error("{MANIFEST_NAME} is not valid: {0}")]
    Bad(String),
}

/// Stands for the manifest's own checksum while that is computed.
pub const NO_SHA256: &str = "0000000000000000000000000000000000000000000000000000000000000000";

impl Manifest {
    /// Reads and checks one: format, its own checksum, names, and counts of chunks; not the files.
    pub fn parse(text: &[u8]) -> Result<Self, ManifestError> {
        // The format comes first: another format may have none of our fields.
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let bad = |error: serde_json::Error| ManifestError::Bad(error.to_string());
        let format: Format = serde_json::from_slice(text).map_err(bad)?;
        if format.format != u64::from(MANIFEST_FORMAT) {
            return Err(ManifestError::UnknownFormat(format.format));
        }
        let mut manifest: Self = serde_json::from_slice(text).map_err(bad)?;
        manifest.check_sum(text).map_err(ManifestError::Bad)?;
        // It is about these bytes only: a manifest in memory has none.
        manifest.manifest_sha256 = None;
        manifest.check_files().map_err(ManifestError::Bad)?;
        Ok(manifest)
    }

    /// Sum of its files; more than fits is as good as endless.
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }

    /// Whether the bytes are those that were written.
    fn check_sum(&self, text: &[u8]) -> Result<(), String> {
        let Some(sum) = &self.manifest_sha256 else {
            return if self.model.is_some() { Err("it has no checksum of its own".into()) } else { Ok(()) };
        };
        let at = text.windows(sum.len()).position(|part| part == sum.as_bytes()).filter(|_| sum.len() == NO_SHA256.len());
        let Some(at) = at else { return Err("its own checksum can not be read".into()) };
        let mut unsigned = text.to_vec();
        unsigned[at..at + sum.len()].copy_from_slice(NO_SHA256.as_bytes());
        if hex_sha256(&unsigned) == *sum { Ok(()) } else { Err("it has another sha256 than it says".into()) }
    }

    /// What must hold of the list of files, wherever it comes from.
    pub fn check_files(&self) -> Result<(), String> {
        if self.files.is_empty() {
            return Err("it names no file".into());
        }
        let mut names = BTreeSet::new();
        for file in &self.files {
            if !is_plain_name(&file.name) {
                return Err(format!("`{}` is not a plain file name", file.name.escape_debug()));
            }
            if !names.insert(&file.name) {
                return Err(format!("`{}` is named twice", file.name));
            }
            if file.chunk_bytes == 0 || file.sha256.len() as u64 != chunks(file.bytes, file.chunk_bytes) {
                return Err(format!("`{}` has a wrong number of chunks", file.name));
            }
        }
        Ok(())
    }
}

/// The folder's name for a step: twelve digits, so that names sort like steps.
pub fn step_folder(step: u64) -> String {
    format!("step-{step:012}")
}

/// The step of a folder's name, if it is one; each step has one spelling.
pub fn folder_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_folder(step) == name).then_some(step)
}

/// Whether a name stays inside its folder, and is not the manifest's or a hidden file's.
pub fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c != '/' && c != '\\' && !c.is_control();
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name != MANIFEST_NAME && name.chars().all(plain)
}

/// Chunks of a file; an empty file has one, of nothing.
pub fn chunks(bytes: u64, chunk_bytes: u64) -> u64 {
    bytes.div_ceil(chunk_bytes).max(1)
}

/// The hex sha256 of `bytes`.
pub fn hex_sha256(bytes: &[u8]) -> String {
    to_hex(&Sha256::digest(bytes))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_stay_in_their_folder() {
        for name in ["part-00000-of-00002.safetensors", "a", "ü.bin", "a b"] {
            assert!(is_plain_name(name), "{name}");
        }
        for name in ["", ".", "..", ".hidden", "a/b", "/etc/passwd", "../x", "a\\b", "a\0b", "a\nb", MANIFEST_NAME] {
            assert!(!is_plain_name(name), "{name:?}");
        }
        assert!(!is_plain_name(&"a".repeat(256)));
    }

    #[test]
    fn an_empty_file_has_one_chunk() {
        assert_eq!([chunks(0, 4), chunks(1, 4), chunks(4, 4), chunks(5, 4)], [1, 1, 1, 2]);
        assert_eq!(hex_sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn each_step_has_one_folder_name() {
        assert_eq!(step_folder(100), "step-000000000100");
        assert_eq!(folder_step("step-000000000100"), Some(100));
        assert_eq!(folder_step(&step_folder(u64::MAX)), Some(u64::MAX));
        for name in ["step-100", "step-", "step-+00000000100", "step-000000000100x", "STEP-000000000100", "quarantine"] {
            assert_eq!(folder_step(name), None, "{name}");
        }
    }
}
