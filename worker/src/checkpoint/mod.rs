//! Checkpoints on a file system: drafts, commits, verification, the choice of the newest good one, and pruning.
//!
//! Layout of a job's folder: `step-000000000100/{*.safetensors, MANIFEST.json}`, drafts beside it as
//! `.draft-step-000000000100-a<attempt>`, `quarantine/`, `FENCE` (the lowest attempt that may commit), `LATEST` (a hint
//! for people, never read) and `.lock`. A step folder appears by one rename of a draft whose files and manifest are on
//! the disk already, so a crash at any point leaves a whole checkpoint of that step or none.
//!
//! Pure files: no libtorch, no async runtime. Agent and training program share it, and a program that is not ours can
//! write the same layout. The trap: folders without `MANIFEST.json` are not checkpoints and nobody here touches them.

use std::io;
use std::path::{Path, PathBuf};

mod choose;
mod commit;
mod copy;
mod fence;
pub mod snapshot;
mod verify;

pub use choose::{Chosen, Quarantined, newest_verified, prune, quarantine};
pub use commit::{begin, commit, describe_file, sweep_drafts};
pub use copy::{Copy, CopyError, manifest_bytes, open_file, open_named, put_aside};
pub use everlit_api::manifest::{MANIFEST_NAME, folder_step, hex_sha256, step_folder};
pub use fence::{fence, raise_fence};
pub use verify::{Damage, read_file, read_manifest, stream_file, verify};

/// Where damaged checkpoints go.
pub const QUARANTINE: &str = "quarantine";
/// The file inside a quarantined folder that says why it is there.
pub const REASON_NAME: &str = "REASON";

/// Why a checkpoint operation did not happen.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The attempt is older than the fence: its rank must end, nothing it wrote counts.
    #[error("attempt {attempt} is fenced off: attempt {fence} may commit now")]
    Fenced {
        /// Who asked.
        attempt: u32,
        /// The lowest attempt that may commit.
        fence: u32,
    },
    /// What is to be committed contradicts itself or its files; asking again does not help.
    #[error("checkpoint refused: {0}")]
    Refused(String),
    /// Another process holds the folder's lock for too long; ask again later.
    #[error("`{0}` is locked by another process")]
    Busy(PathBuf),
    /// The file system refused; nothing is known about the checkpoint. Ask again later.
    #[error("could not {action} `{path}`: {source}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl CheckpointError {
    /// Whether the same call may work later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Busy(_) | Self::Io { .. })
    }
}

pub(crate) fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CheckpointError + 'a {
    move |source| CheckpointError::Io { action, path: path.to_path_buf(), source }
}

/// A committed checkpoint, unverified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Updates done, from the folder's name.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
}

/// The draft's name; attempt 0 marks what is being removed. Each membership has drafts of its own: who is left of one before may still
/// write to those.
pub fn draft_folder(step: u64, attempt: u32, generation: u32) -> String {
    let membership = if generation == 0 { String::new() } else { format!("g{generation}") };
    format!(".draft-{}-a{attempt}{membership}", step_folder(step))
}

/// Attempt and membership of a draft's name, if it is one.
pub(crate) fn draft_owner(name: &str) -> Option<(u32, u32)> {
    let (step, owner) = name.strip_prefix(".draft-")?.rsplit_once("-a")?;
    folder_step(step)?;
    let (attempt, generation) = owner.split_once('g').unwrap_or((owner, "0"));
    Some((attempt.parse().ok()?, generation.parse().ok()?))
}

/// All committed checkpoints in `dir`, newest first, unverified. A missing folder has none.
pub fn list(dir: &Path) -> Result<Vec<Found>, CheckpointError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("list", dir))?;
        let Some(step) = entry.file_name().to_str().and_then(folder_step) else { continue };
        let path = entry.path();
        match path.join(MANIFEST_NAME).symlink_metadata() {
            Ok(_) => found.push(Found { step, path }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(io_error("look at", &path)(error)),
        }
    }
    found.sort_by_key(|found| std::cmp::Reverse(found.step));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_name_their_owner() {
        assert_eq!(draft_owner(&draft_folder(100, 7, 0)), Some((7, 0)));
        assert_eq!(draft_owner(&draft_folder(100, 7, 12)), Some((7, 12)));
        assert_eq!(draft_owner(".draft-step-100-a7"), None);
        assert_eq!(draft_owner("step-000000000100"), None);
    }
}
