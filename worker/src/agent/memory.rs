//! Where ranks keep snapshots of their state in shared memory, and what becomes of them: resumed from, saved to disk, or freed. Blocks.
//!
//! A job's folder is `/dev/shm/everlit-<uid>/<agent>/<job>`, where `<agent>` tells the data folders of one user apart. Ranks write there
//! and may die at any time; only the agent frees. Shared memory is never needed: whatever fails here is logged and costs steps, no job. The
//! trap: it is memory, so a job that nobody runs any more must not keep its folder.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use everlit_api::agent::{GangSpec, Program};
use everlit_api::ids::JobId;
use everlit_api::manifest::Manifest;

use super::folders::Folders;
use super::start::newest_attempt;
use crate::checkpoint::{self, CheckpointError, hex_sha256, snapshot};

/// The memory file system that every Linux has; a container may have none, or a small one.
const SHARED_MEMORY: &str = "/dev/shm";
/// Characters of the data folder's hash in a name.
const HASH_CHARS: usize = 16;

/// All snapshots of one agent.
#[derive(Debug, Default)]
pub(super) struct Memory {
    root: Option<PathBuf>,
    /// A job's end, its removal and a resume from it may come at once, on different threads.
    ending: Mutex<()>,
}

impl Memory {
    /// Looks for shared memory; without it there are no snapshots, which is said once.
    pub(super) fn find(data: &Path) -> Self {
        Self::below(Path::new(SHARED_MEMORY), data)
    }

    fn below(shared: &Path, data: &Path) -> Self {
        let user = shared.join(format!("everlit-{}", nix::unistd::geteuid()));
        match make_own(&user) {
            Ok(()) => {
                let hash = hex_sha256(data.as_os_str().as_encoded_bytes());
                Self { root: Some(user.join(&hash[..HASH_CHARS])), ending: Mutex::default() }
            }
            Err(error) => {
                tracing::warn!(path = %user.display(), %error, "there is no shared memory: jobs resume from checkpoints on disk only");
                Self::default()
            }
        }
    }

    fn folder(&self, job: JobId) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join(job.to_string()))
    }

    /// Makes the folder that the ranks of a gang may use. `None`: they run without.
    pub(super) fn make(&self, spec: &GangSpec) -> Option<PathBuf> {
        let folder = self.folder(spec.job).filter(|_| keeps_snapshots(spec))?;
        match DirBuilder::new().mode(0o700).recursive(true).create(&folder) {
            Ok(()) => Some(folder),
            Err(error) => {
                tracing::warn!(job = %spec.job, %error, "there is no shared memory for snapshots");
                None
            }
        }
    }

    /// A snapshot of the whole gang that is newer than its newest checkpoint, made ready to resume from. What is no use is freed.
    pub(super) fn resume(&self, spec: &GangSpec, committed: Option<u64>) -> Option<(PathBuf, Manifest)> {
        let folder = self.folder(spec.job)?;
        if keeps_snapshots(spec) && spec.count == spec.world_size {
            match newer(&folder, spec.job, committed).and_then(|whole| whole.map(|whole| whole.link(spec.attempt)).transpose()) {
                Ok(Some(linked)) => return Some(linked),
                Ok(None) => {}
                Err(error) => tracing::warn!(job = %spec.job, %error, "a snapshot in shared memory can not be used"),
            }
        }
        self.free(spec.job);
        None
    }

    /// A commit made older snapshots superfluous.
    pub(super) fn free_older(&self, job: JobId, committed: u64, newest_attempt: u32) {
        if let Some(folder) = self.folder(job) {
            snapshot::free_older(&folder, committed, newest_attempt);
        }
    }

    /// The job is final: what only its snapshots hold goes to disk, and the memory is given back.
    pub(super) fn end(&self, folders: &Folders, job: JobId) {
        let Some(folder) = self.folder(job) else { return };
        let _one = self.one_at_a_time();
        if folder.symlink_metadata().is_err() {
            return;
        }
        match save(folders, job, &folder) {
            Ok(Some(path)) => tracing::info!(%job, path = %path.display(), "the last snapshot was saved"),
            Ok(None) => {}
            Err(error) => tracing::warn!(%job, %error, "the last snapshot could not be saved"),
        }
        self.free(job);
    }

    /// The job is removed.
    pub(super) fn remove(&self, job: JobId) {
        let _one = self.one_at_a_time();
        self.free(job);
    }

    /// At the agent's start: jobs that ended or were removed meanwhile.
    pub(super) fn free_unwanted(&self, folders: &Folders) {
        let Some(root) = &self.root else { return };
        for job in fs::read_dir(root).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
            if folders.ended(job).exists() {
                self.end(folders, job);
            } else if !folders.job(job).exists() {
                self.remove(job);
            }
        }
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        // It guards no data, so a thread that panicked left nothing half done in it.
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, job: JobId) {
        if let Some(folder) = self.folder(job) {
            snapshot::free(&folder);
        }
        if let Some(root) = &self.root {
            // Only when it was the last.
            let _ = fs::remove_dir(root);
        }
    }
}

/// Only the built-in program writes snapshots, and an evaluation has nothing to keep.
fn keeps_snapshots(spec: &GangSpec) -> bool {
    matches!(spec.program, Program::Worker { evaluate: false, .. })
}

/// A folder of this user's own: in a place where anybody may make one, the name alone is no proof.
fn make_own(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let about = path.symlink_metadata()?;
    if !about.is_dir() || about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        return Err(io::Error::other("it belongs to somebody else, or others may write to it"));
    }
    nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).map_err(io::Error::from)
}

/// The newest snapshot of a job, if it is beyond `committed`.
fn newer(folder: &Path, job: JobId, committed: Option<u64>) -> Result<Option<snapshot::Whole>, CheckpointError> {
    let whole = snapshot::newest_whole(folder).map_err(checkpoint::io_error("look through", folder))?;
    Ok(whole.filter(|whole| whole.manifest().job_id == job.to_string() && committed.is_none_or(|step| whole.step() > step)))
}

fn save(folders: &Folders, job: JobId, folder: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let dir = folders.checkpoints(job);
    let Some(attempt) = newest_attempt(&folders.attempts(job)).filter(|_| dir.exists()) else { return Ok(None) };
    let committed = checkpoint::newest_verified(&dir)?.checkpoint.map(|(_, manifest)| manifest.step);
    newer(folder, job, committed)?.map(|whole| whole.persist(&dir, attempt)).transpose()
}
