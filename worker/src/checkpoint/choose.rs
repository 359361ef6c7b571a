//! Which checkpoint to resume from, and which to throw away.
//!
//! A checkpoint is good when it verifies in full *now*; nothing is remembered. Damaged ones move to `quarantine/` with
//! the reason beside them; what could not be read for a passing reason stays where it is and the question is answered
//! with an error, to be asked again. Trap: a commit may exchange a folder while it is being read, which looks like
//! damage. So a folder is only moved when it still is the one (by inode) that was read, under the lock.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use everlit_api::manifest::Manifest;

use super::commit::{remove_tree, sweep_graves};
use super::verify::{Damage, verify};
use super::{CheckpointError, Found, QUARANTINE, REASON_NAME, draft_folder, fence, io_error, list, step_folder};

/// Looks at one folder that changes under us at most this often.
const LOOKS_MAX: usize = 8;
/// Quarantined folders of one step at most; then the names are taken again from the first.
const SAME_STEP_MAX: usize = 100;

/// The answer of [`newest_verified`].
#[derive(Debug)]
pub struct Chosen {
    /// The newest checkpoint that verifies in full, if there is any.
    pub checkpoint: Option<(PathBuf, Manifest)>,
    /// What was found damaged on the way and moved away, newest first.
    pub quarantined: Vec<Quarantined>,
}

/// A checkpoint that was moved away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// Its step.
    pub step: u64,
    /// Where it is now.
    pub path: PathBuf,
    /// Why, for people.
    pub reason: String,
}

enum Look {
    Good(Box<Manifest>),
    Gone,
    Damaged(Damage, u64),
}

/// Takes the newest checkpoint of `dir` that verifies in full and quarantines each damaged newer one.
pub fn newest_verified(dir: &Path) -> Result<Chosen, CheckpointError> {
    let mut quarantined = Vec::new();
    for found in list(dir)? {
        for look_number in 1.. {
            match look(&found.path)? {
                Look::Good(manifest) => {
                    return Ok(Chosen { checkpoint: Some((found.path, *manifest)), quarantined });
                }
                Look::Gone => break,
                Look::Damaged(damage, inode) => {
                    if let Some(moved) = move_away(dir, &found, &damage.to_string(), Some(inode))? {
                        quarantined.push(moved);
                        break;
                    }
                    if look_number >= LOOKS_MAX {
                        return Err(CheckpointError::Busy(found.path));
                    }
                }
            }
        }
    }
    Ok(Chosen { checkpoint: None, quarantined })
}

/// Moves a checkpoint away for a reason that its bytes do not show (it failed several resumes). `None`: it is not there.
pub fn quarantine(dir: &Path, step: u64, reason: &str) -> Result<Option<Quarantined>, CheckpointError> {
    let path = dir.join(step_folder(step));
    match path.symlink_metadata() {
        Ok(_) => move_away(dir, &Found { step, path }, reason, None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("look at", &path)(error)),
    }
}

/// Verifies a folder; a passing failure is an error.
fn look(path: &Path) -> Result<Look, CheckpointError> {
    let Some(inode) = inode(path)? else { return Ok(Look::Gone) };
    match verify(path) {
        Ok(manifest) => Ok(Look::Good(Box::new(manifest))),
        Err(Damage::Unreadable { file, source }) => Err(CheckpointError::Io { action: "verify", path: path.join(file), source }),
        Err(damage) => Ok(Look::Damaged(damage, inode)),
    }
}

fn inode(path: &Path) -> Result<Option<u64>, CheckpointError> {
    match path.symlink_metadata() {
        Ok(about) => Ok(Some(about.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("look at", path)(error)),
    }
}

/// Renames into the quarantine, unless the folder is no longer the one that was looked at.
fn move_away(dir: &Path, found: &Found, reason: &str, looked_at: Option<u64>) -> Result<Option<Quarantined>, CheckpointError> {
    let shelf = dir.join(QUARANTINE);
    fence::make_dir(&shelf)?;
    let held = fence::lock(dir)?;
    let now = inode(&found.path)?;
    if now.is_none() || looked_at.is_some_and(|inode| now != Some(inode)) {
        return Ok(None);
    }
    let name = step_folder(found.step);
    let names = (1..=SAME_STEP_MAX).map(|n| if n == 1 { name.clone() } else { format!("{name}-{n}") });
    let free = names.map(|name| shelf.join(name)).find(|path| path.symlink_metadata().is_err());
    let target = free.unwrap_or_else(|| shelf.join(&name));
    remove_tree(&target)?;
    fs::rename(&found.path, &target).map_err(io_error("quarantine", &found.path))?;
    fence::sync_dir(&shelf)?;
    fence::sync_dir(dir)?;
    drop(held);
    // Never through a link; a full disk may cost the note, the caller has the reason too.
    if target.symlink_metadata().is_ok_and(|about| about.is_dir()) {
        let _ = fence::replace_file(&target, REASON_NAME, format!("{reason}\n").as_bytes());
    }
    Ok(Some(Quarantined { step: found.step, path: target, reason: reason.to_string() }))
}

/// Removes all but the newest `keep` checkpoints, and never the newest that verifies; answers the removed steps.
/// When none verifies nothing is removed.
pub fn prune(dir: &Path, keep: u32) -> Result<Vec<u64>, CheckpointError> {
    let all = list(dir)?;
    let keep = usize::try_from(keep.max(1)).unwrap_or(usize::MAX);
    if all.len() <= keep {
        return Ok(Vec::new());
    }
    let mut good = None;
    for (index, found) in all.iter().enumerate() {
        if matches!(look(&found.path)?, Look::Good(_)) {
            good = Some(index);
            break;
        }
    }
    let Some(good) = good else { return Ok(Vec::new()) };
    // An attempt that never ends sweeps nothing else, however often its agent dies in here.
    sweep_graves(dir)?;
    let held = fence::lock(dir)?;
    let mut removed = Vec::new();
    for (index, found) in all.iter().enumerate().skip(keep) {
        if index == good {
            continue;
        }
        // Under a draft's name first: a half removed one must not look committed.
        let grave = dir.join(draft_folder(found.step, 0, 0));
        remove_tree(&grave)?;
        match fs::rename(&found.path, &grave) {
            Ok(()) => removed.push((found.step, grave)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("remove", &found.path)(error)),
        }
    }
    fence::sync_dir(dir)?;
    drop(held);
    for (_, grave) in &removed {
        remove_tree(grave)?;
    }
    Ok(removed.into_iter().map(|(step, _)| step).collect())
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use super::*;
    use crate::checkpoint::MANIFEST_NAME;

    #[test]
    fn a_look_without_file_descriptors_is_an_error_and_not_damage() {
        // In a process of its own, so that other tests keep their descriptors.
        const OWN: &str = "EVERLIT_TEST_NO_FILES";
        if std::env::var_os(OWN).is_none() {
            let name = "checkpoint::choose::tests::a_look_without_file_descriptors_is_an_error_and_not_damage";
            let run = std::process::Command::new(std::env::current_exe().unwrap()).args(["--exact", name]).env(OWN, "1").output();
            let run = run.unwrap();
            assert!(run.status.success() && String::from_utf8_lossy(&run.stdout).contains("1 passed"), "{run:?}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(step_folder(5));
        fs::create_dir(&path).unwrap();
        fs::write(path.join(MANIFEST_NAME), "damaged, but nobody can see it").unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
        let blind = look(&path);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert!(blind.is_err_and(|error| error.is_transient()));
        assert!(matches!(look(&path), Ok(Look::Damaged(..))));
    }
}
