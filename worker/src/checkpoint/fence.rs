//! The fence and the lock of a checkpoint folder: an attempt that was replaced can never commit again.
//!
//! `FENCE` holds the lowest attempt that may commit, as a decimal number. It is read and changed under an exclusive
//! lock on `.lock`, the same lock that a commit's rename happens under, so that no rename of an older attempt can
//! follow a raise. The kernel drops the lock with its holder; a holder that is stopped makes others answer `Busy`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::{CheckpointError, io_error};

const FENCE_NAME: &str = "FENCE";
const LOCK_NAME: &str = ".lock";
const LOCK_WAIT: Duration = Duration::from_secs(20);
const LOCK_POLL: Duration = Duration::from_millis(2);

/// Holds the folder's lock until it is dropped.
#[derive(Debug)]
pub(super) struct Locked {
    _lock: Flock<File>,
}

/// Takes the folder's lock, waiting at most 20 s.
pub(super) fn lock(dir: &Path) -> Result<Locked, CheckpointError> {
    let path = dir.join(LOCK_NAME);
    let open = || OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let mut file = open().map_err(io_error("open", &path))?;
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Locked { _lock: lock }),
            Err((back, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => file = back,
            Err((_, error)) => return Err(io_error("lock", &path)(error.into())),
        }
        if Instant::now() > deadline {
            return Err(CheckpointError::Busy(dir.to_path_buf()));
        }
        std::thread::sleep(LOCK_POLL);
    }
}

/// The lowest attempt that may commit; 0 when none was ever fenced.
pub fn fence(dir: &Path) -> Result<u32, CheckpointError> {
    let path = dir.join(FENCE_NAME);
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            let source = io::Error::new(io::ErrorKind::InvalidData, "not a decimal attempt");
            CheckpointError::Io { action: "read", path, source }
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(io_error("read", &path)(error)),
    }
}

/// From now on only `attempt` and later ones commit into `dir`, which is made if missing. Never lowers; durable.
pub fn raise_fence(dir: &Path, attempt: u32) -> Result<(), CheckpointError> {
    make_dir(dir)?;
    let held = lock(dir)?;
    raise_locked(dir, attempt, &held)
}

/// [`raise_fence`] for a caller that holds the lock.
pub(super) fn raise_locked(dir: &Path, attempt: u32, _held: &Locked) -> Result<(), CheckpointError> {
    if fence(dir)? >= attempt {
        return Ok(());
    }
    replace_file(dir, FENCE_NAME, format!("{attempt}\n").as_bytes())
}

/// Answers `Fenced` when `attempt` is below the fence.
pub(super) fn check(dir: &Path, attempt: u32) -> Result<(), CheckpointError> {
    let fence = fence(dir)?;
    if attempt < fence { Err(CheckpointError::Fenced { attempt, fence }) } else { Ok(()) }
}

/// Makes `dir` and its parents, and makes the new name durable.
pub(super) fn make_dir(dir: &Path) -> Result<(), CheckpointError> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => Ok(()),
    }
}

/// Makes the names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|open| open.sync_all()).map_err(io_error("sync", dir))
}

/// Replaces a small file as a whole: temporary name, fsync, rename, fsync of the folder.
pub(super) fn replace_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    let draft = dir.join(format!(".{name}.{}.tmp", std::process::id()));
    let target = dir.join(name);
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, &target)
    };
    write().map_err(io_error("write", &target))?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fence_rises_and_never_falls() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/er");
        assert_eq!(fence(&dir).unwrap(), 0);
        raise_fence(&dir, 3).unwrap();
        raise_fence(&dir, 2).unwrap();
        assert_eq!(fence(&dir).unwrap(), 3);
        assert!(matches!(check(&dir, 2), Err(CheckpointError::Fenced { attempt: 2, fence: 3 })));
        check(&dir, 3).unwrap();
    }

    #[test]
    fn a_fence_that_is_not_a_number_lets_nobody_in() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FENCE_NAME), "x").unwrap();
        assert!(check(dir.path(), u32::MAX).is_err());
        assert!(raise_fence(dir.path(), 9).is_err());
    }

    #[test]
    fn the_lock_excludes_a_second_holder_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let path = dir.path().to_path_buf();
        let second = std::thread::spawn(move || lock(&path).map(|_| Instant::now()));
        std::thread::sleep(Duration::from_millis(50));
        let released = Instant::now();
        drop(held);
        assert!(second.join().unwrap().unwrap() >= released);
    }
}
