//! Writing a checkpoint: a draft folder, the description of its files, and the commit.
//!
//! The commit makes everything durable under the draft's name first (each file, then the manifest, then the folder),
//! and only then, under the lock and with the fence checked, renames. A step that is committed again (re-executed by a
//! later attempt) is *exchanged* with the old one in one system call and the old one removed afterwards, so a reader
//! finds one of the two whole. Where the file system can not exchange, a verified old one is kept: the same step of the
//! same job is as good, and no moment exists in which neither is there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use everlit_api::manifest::{
    CHUNK_BYTES, MANIFEST_BYTES_MAX, MANIFEST_FORMAT, Manifest, ManifestFile, NO_SHA256, chunks, hex_sha256, is_plain_name,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use rayon::prelude::*;

use super::fence::{self, Locked};
use super::verify::{hash_chunk, open_regular, read_manifest, verify};
use super::{CheckpointError, MANIFEST_NAME, draft_folder, draft_owner, io_error, step_folder};

/// Makes the draft folder of a step, or empties what this membership left under that name; what those before it in the attempt left
/// goes. One rank calls it, before any writes. Refused when a later attempt is fenced in.
pub fn begin(dir: &Path, step: u64, attempt: u32, generation: u32) -> Result<PathBuf, CheckpointError> {
    fence::make_dir(dir)?;
    fence::check(dir, attempt)?;
    if generation > 0 {
        sweep(dir, |own, before| own == attempt && before < generation)?;
    }
    let draft = dir.join(draft_folder(step, attempt, generation));
    remove_tree(&draft)?;
    fs::create_dir(&draft).map_err(io_error("create", &draft))?;
    Ok(draft)
}

/// Reads a file once, hashing its chunks in parallel with bounded memory, and answers its line of the manifest.
pub fn describe_file(path: &Path) -> Result<ManifestFile, CheckpointError> {
    let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_plain_name(name));
    let Some(name) = name else {
        return Err(CheckpointError::Refused(format!("`{}` has no plain file name", path.display())));
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let refused = |why: &dyn std::fmt::Display| CheckpointError::Refused(format!("`{}`: {why}", path.display()));
    let (file, bytes) = open_regular(folder, name).map_err(|damage| refused(&damage))?;
    let sha256: Result<Vec<String>, io::Error> = (0..chunks(bytes, CHUNK_BYTES))
        .into_par_iter()
        .map(|chunk| hash_chunk(&file, chunk * CHUNK_BYTES, CHUNK_BYTES.min(bytes - chunk * CHUNK_BYTES)))
        .collect();
    let sha256 = sha256.map_err(io_error("read", path))?;
    if file.metadata().map_err(io_error("look at", path))?.len() != bytes {
        return Err(refused(&"it changed while it was read"));
    }
    Ok(ManifestFile { name: name.into(), bytes, chunk_bytes: CHUNK_BYTES, sha256 })
}

/// Commits `draft`, a folder directly in `dir` that holds exactly the manifest's files (others are ignored), and answers
/// the final path. Asking again after a lost answer is no error. `manifest.attempt` is the fencing token. A program that
/// is not ours may have put its files under the final name already: then the manifest alone makes it a checkpoint.
pub fn commit(dir: &Path, draft: &Path, manifest: &Manifest) -> Result<PathBuf, CheckpointError> {
    let place = dir.join(step_folder(manifest.step));
    if !draft.exists() && committed_by_us(&place, manifest) {
        return Ok(place);
    }
    check_draft(dir, draft, manifest)?;
    manifest.files.par_iter().try_for_each(|file| {
        let path = draft.join(&file.name);
        File::open(&path).and_then(|open| open.sync_all()).map_err(io_error("sync", &path))
    })?;
    let in_place = draft == place;
    if !in_place {
        write_manifest(draft, manifest)?;
        fence::sync_dir(draft)?;
    }
    let held = fence::lock(dir)?;
    fence::check(dir, manifest.attempt)?;
    fence::raise_locked(dir, manifest.attempt, &held)?;
    if in_place {
        fence::replace_file(&place, MANIFEST_NAME, &manifest_text(manifest)?)?;
    } else {
        place_locked(draft, &place, manifest, &held)?;
    }
    fence::sync_dir(dir)?;
    // For people only, so its failure is nobody's.
    let _ = fence::replace_file(dir, "LATEST", format!("{}\n", step_folder(manifest.step)).as_bytes());
    drop(held);
    if !in_place {
        // After an exchange the old checkpoint lies under the draft's name; a failure here is left to `sweep_drafts`.
        let _ = fs::remove_dir_all(draft);
    }
    Ok(place)
}

fn committed_by_us(place: &Path, manifest: &Manifest) -> bool {
    read_manifest(place).is_ok_and(|old| old.attempt == manifest.attempt && old.files == manifest.files)
}

/// Everything that can be told before anything is changed.
fn check_draft(dir: &Path, draft: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let refused = |why: String| Err(CheckpointError::Refused(why));
    if manifest.format != MANIFEST_FORMAT {
        return refused(format!("format {} is not {MANIFEST_FORMAT}", manifest.format));
    }
    if let Err(why) = manifest.check_files() {
        return refused(why);
    }
    if !manifest.files.is_sorted_by(|a, b| a.name < b.name) {
        return refused("the files are not in name order".into());
    }
    if draft.parent() != Some(dir) {
        return refused(format!("`{}` is not in `{}`", draft.display(), dir.display()));
    }
    fence::check(dir, manifest.attempt)?;
    check_draft_files(draft, manifest)
}

/// Whether each file is there, and as long as the manifest says.
pub(super) fn check_draft_files(draft: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let refused = |why: String| Err(CheckpointError::Refused(why));
    for file in &manifest.files {
        match open_regular(draft, &file.name) {
            Ok((_, found)) if found == file.bytes => {}
            Ok((_, found)) => return refused(format!("{} has {found} bytes, not {}", file.name, file.bytes)),
            Err(damage) => return refused(damage.to_string()),
        }
    }
    Ok(())
}

/// The manifest's bytes, its own checksum among them.
pub(super) fn manifest_text(manifest: &Manifest) -> Result<Vec<u8>, CheckpointError> {
    let refused = |error: serde_json::Error| CheckpointError::Refused(error.to_string());
    let unsigned = Manifest { manifest_sha256: Some(NO_SHA256.into()), ..manifest.clone() };
    let sum = hex_sha256(&serde_json::to_vec_pretty(&unsigned).map_err(refused)?);
    let text = serde_json::to_vec_pretty(&Manifest { manifest_sha256: Some(sum), ..unsigned }).map_err(refused)?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(CheckpointError::Refused(format!("the manifest would have {} bytes", text.len())));
    }
    Ok(text)
}

fn write_manifest(draft: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let path = draft.join(MANIFEST_NAME);
    let text = manifest_text(manifest)?;
    let write = || {
        // Only ever a regular file of our own, whatever lies there.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).custom_flags(nix::libc::O_NOFOLLOW).open(&path)?;
        file.write_all(&text)?;
        file.sync_all()
    };
    write().map_err(io_error("write", &path))
}

/// The one moment: the draft gets the final name, under the lock.
pub(super) fn place_locked(draft: &Path, place: &Path, manifest: &Manifest, _held: &Locked) -> Result<(), CheckpointError> {
    match place.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return fs::rename(draft, place).map_err(io_error("commit", place));
        }
        Err(error) => return Err(io_error("look at", place)(error)),
        Ok(_) => {}
    }
    if let Ok(old) = read_manifest(place)
        && old.attempt > manifest.attempt
    {
        return Err(CheckpointError::Fenced { attempt: manifest.attempt, fence: old.attempt });
    }
    match renameat2(AT_FDCWD, draft, AT_FDCWD, place, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => match verify(place) {
            Ok(_) => Ok(()),
            Err(damage) if damage.is_transient() => Err(CheckpointError::Refused(damage.to_string())),
            Err(_) => {
                remove_tree(place)?;
                fs::rename(draft, place).map_err(io_error("commit", place))
            }
        },
        Err(error) => Err(io_error("commit", place)(error.into())),
    }
}

/// Removes the drafts of attempts below `below_attempt`, and what an interrupted removal left; answers how many.
pub fn sweep_drafts(dir: &Path, below_attempt: u32) -> Result<usize, CheckpointError> {
    sweep(dir, |attempt, _| attempt < below_attempt)
}

/// Removes what an interrupted removal of checkpoints left: nobody else has drafts of attempt 0.
pub(super) fn sweep_graves(dir: &Path) -> Result<usize, CheckpointError> {
    sweep(dir, |attempt, _| attempt == 0)
}

fn sweep(dir: &Path, old: impl Fn(u32, u32) -> bool) -> Result<usize, CheckpointError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(io_error("list", dir)(error)),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.map_err(io_error("list", dir))?;
        if entry.file_name().to_str().and_then(draft_owner).is_some_and(|(attempt, generation)| old(attempt, generation)) {
            remove_tree(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Removes a folder, a file or a link with that name; none is no error.
pub(super) fn remove_tree(path: &Path) -> Result<(), CheckpointError> {
    let removed = match path.symlink_metadata() {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}
