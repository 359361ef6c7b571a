//! One rank's part of a commit, from a buffer to the disk. Runs beside training.
//!
//! The ranks need no collective: rank 0 makes the draft folder, each rank writes its part and then a note about it, rank 0 waits for all
//! notes and commits. Whoever fails says so in the training loop's reduction, which cancels the others: nobody waits for ever.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use everlit_api::manifest::{CHUNK_BYTES, Manifest, ManifestFile};
use everlit_worker::checkpoint::{self, CheckpointError};

/// Other ranks' disks may be this much slower.
const PATIENCE: Duration = Duration::from_secs(900);
/// Threads that hash beside the writing.
const HASHERS: usize = 2;
const POLL: Duration = Duration::from_millis(2);

/// What a persisting rank is told.
#[derive(Debug, Clone)]
pub struct Target {
    /// The job's checkpoints.
    pub dir: PathBuf,
    /// This rank.
    pub rank: u32,
    /// All of them.
    pub world: u32,
}

/// How it ended, when it did not fail.
#[derive(Debug, PartialEq, Eq)]
pub enum Persisted {
    /// This rank's part is on the disk; on rank 0, committed.
    Done,
    /// Another rank failed.
    Cancelled,
}

fn note_name(rank: u32) -> String {
    format!(".part-{rank:05}.json")
}

/// Writes `content` as file `name` (none: this rank has no tensor) of the checkpoint that `manifest` describes but for its files.
pub fn persist(
    target: &Target,
    name: Option<&str>,
    content: &[u8],
    mut manifest: Manifest,
    cancelled: &dyn Fn() -> bool,
) -> Result<Persisted, CheckpointError> {
    let draft = target.dir.join(checkpoint::draft_folder(manifest.step, manifest.attempt, manifest.generation));
    if target.rank == 0 {
        checkpoint::begin(&target.dir, manifest.step, manifest.attempt, manifest.generation)?;
    } else if !wait_for(&draft, cancelled)? {
        return Ok(Persisted::Cancelled);
    }
    let result = (|| {
        write_part(&draft, name, content, target.rank)?;
        if target.rank > 0 {
            return Ok(Persisted::Done);
        }
        for rank in 0..target.world {
            if !wait_for(&draft.join(note_name(rank)), cancelled)? {
                return Ok(Persisted::Cancelled);
            }
        }
        manifest.files = collect(&draft, target.world)?;
        checkpoint::commit(&target.dir, &draft, &manifest)?;
        Ok(Persisted::Done)
    })();
    if target.rank == 0 && !matches!(result, Ok(Persisted::Done)) {
        // What another rank still puts there is swept before the next attempt.
        let _ = fs::remove_dir_all(&draft);
    }
    match result {
        // The folder was taken away under us.
        Err(_) if target.rank > 0 && cancelled() => Ok(Persisted::Cancelled),
        other => other,
    }
}

/// Whether the path came to be before the save was cancelled.
fn wait_for(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<bool, CheckpointError> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        if cancelled() {
            return Ok(false);
        }
        if Instant::now() >= deadline {
            return Err(CheckpointError::Io { action: "wait for", path: path.into(), source: io::ErrorKind::TimedOut.into() });
        }
        std::thread::sleep(POLL);
    }
    Ok(true)
}

fn write_part(draft: &Path, name: Option<&str>, content: &[u8], rank: u32) -> Result<(), CheckpointError> {
    let described = match name {
        None => None,
        Some(name) => {
            let path = draft.join(name);
            let written = write_durably(&path, content);
            let sha256 = written.map_err(|source| CheckpointError::Io { action: "write", path, source })?;
            Some(ManifestFile { name: name.into(), bytes: content.len() as u64, chunk_bytes: CHUNK_BYTES, sha256 })
        }
    };
    let path = draft.join(note_name(rank));
    // By rename: a note is there whole or not at all.
    let hidden = path.with_extension("tmp");
    let note = serde_json::to_vec(&described).map_err(io::Error::from);
    let put = note.and_then(|note| fs::write(&hidden, note)).and_then(|()| fs::rename(&hidden, &path));
    put.map_err(|source| CheckpointError::Io { action: "write", path, source })
}

/// Writes and syncs a new file; answers the sha256 of each chunk, computed beside the writing.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<Vec<String>> {
    let mut file = File::create(path)?;
    let length = i64::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, length) {
        // Not every file system can; then writing alone finds out whether there is room.
        Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS | nix::errno::Errno::EINVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let chunk_bytes = usize::try_from(CHUNK_BYTES).unwrap_or(usize::MAX);
    if content.is_empty() {
        return file.sync_all().map(|()| vec![checkpoint::hex_sha256(&[])]);
    }
    let chunks: Vec<&[u8]> = content.chunks(chunk_bytes).collect();
    std::thread::scope(|scope| {
        // One core's sha256 is slower than a good disk.
        let hashers: Vec<_> = chunks
            .chunks(chunks.len().div_ceil(HASHERS))
            .map(|part| scope.spawn(move || part.iter().map(|chunk| checkpoint::hex_sha256(chunk)).collect::<Vec<_>>()))
            .collect();
        let mut write = || -> io::Result<()> {
            for (number, chunk) in chunks.iter().enumerate() {
                file.write_all(chunk)?;
                start_writeback(&file, number * chunk_bytes, chunk.len());
            }
            file.sync_all()
        };
        let written = write();
        let hashes: Result<Vec<Vec<String>>, _> = hashers.into_iter().map(|hasher| hasher.join()).collect();
        written.and(hashes.map(|parts| parts.concat()).map_err(|_| io::Error::other("hashing panicked")))
    })
}

/// Asks the kernel to begin writing a range, so that the sync at the end finds little to do.
fn start_writeback(file: &File, from: usize, bytes: usize) {
    let (Ok(from), Ok(bytes)) = (i64::try_from(from), i64::try_from(bytes)) else { return };
    // SAFETY: an open file and plain numbers. Only a hint: the sync decides.
    unsafe { nix::libc::sync_file_range(file.as_raw_fd(), from, bytes, nix::libc::SYNC_FILE_RANGE_WRITE) };
}

/// Reads every rank's note and removes it: a commit holds tensors and the manifest only.
fn collect(draft: &Path, world: u32) -> Result<Vec<ManifestFile>, CheckpointError> {
    let mut files = Vec::new();
    for rank in 0..world {
        let path = draft.join(note_name(rank));
        let read = || -> io::Result<Option<ManifestFile>> {
            let note = serde_json::from_slice(&fs::read(&path)?)?;
            fs::remove_file(&path)?;
            Ok(note)
        };
        files.extend(read().map_err(|source| CheckpointError::Io { action: "read", path: path.clone(), source })?);
    }
    Ok(files)
}
