//! Taking over a checkpoint from another node: its manifest, then its files one by one, checked as they come, then the commit.
//!
//! A copy keeps the manifest of who wrote it, bytes and attempt. It lies under a draft's name until all of it is there and durable, and what a
//! broken transfer left is gone on with. It may come late, so it is fenced: a folder in which a later attempt than the order's has begun
//! takes no copy. It never replaces what a later attempt has committed for the same step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use everlit_api::join::to_hex;
use everlit_api::manifest::{Manifest, ManifestFile};
use sha2::{Digest, Sha256};

use super::commit::{check_draft_files, place_locked, remove_tree};
use super::verify::{Damage, open_regular, parse_manifest, read_manifest, verify_file};
use super::{CheckpointError, MANIFEST_NAME, draft_folder, draft_owner, fence, io_error, step_folder};

/// Drafts of copies have this in place of a membership: no gang ever has so many.
const COPY: u32 = u32::MAX;

/// A copy that is being made.
#[derive(Debug)]
pub struct Copy {
    dir: PathBuf,
    draft: PathBuf,
    attempt: u32,
    manifest: Manifest,
}

/// Why a file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// What came is not what the manifest says.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// The other side broke off.
    #[error("{file} broke off: {source}")]
    Broken {
        /// Which file.
        file: String,
        /// How.
        source: io::Error,
    },
    /// It can not be written here.
    #[error(transparent)]
    Here(#[from] CheckpointError),
}

impl Copy {
    /// Begins with the manifest's bytes, which must be those of `step`. `attempt`: the newest that the order knew of.
    pub fn begin(dir: &Path, step: u64, attempt: u32, manifest_text: &[u8]) -> Result<Self, CopyError> {
        let manifest = parse_manifest(manifest_text)?;
        if manifest.step != step || manifest.attempt > attempt {
            let why = format!("it is of step {} and attempt {}", manifest.step, manifest.attempt);
            return Err(Damage::BadManifest(why).into());
        }
        fence::make_dir(dir)?;
        fence::check(dir, attempt)?;
        let draft = dir.join(draft_folder(step, attempt, COPY));
        if fs::read(draft.join(MANIFEST_NAME)).ok().as_deref() != Some(manifest_text) {
            remove_drafts(dir)?;
            fs::create_dir(&draft).map_err(io_error("create", &draft))?;
            let place = draft.join(MANIFEST_NAME);
            let written = create(&place).and_then(|mut file| file.write_all(manifest_text).and_then(|()| file.sync_all()));
            written.map_err(io_error("write", &place))?;
        }
        Ok(Self { dir: dir.to_path_buf(), draft, attempt, manifest })
    }

    /// What it is a copy of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether a file is there already, whole, from a transfer that broke off.
    pub fn has(&self, file: &ManifestFile) -> bool {
        verify_file(&self.draft, file).is_ok()
    }

    /// Bytes of a file that a transfer that broke off has brought, right or not.
    pub fn bytes_there(&self, file: &ManifestFile) -> u64 {
        fs::metadata(self.draft.join(&file.name)).map_or(0, |about| about.len())
    }

    /// Takes a file as it comes. The first chunk that is not what the manifest says ends it; no more is taken than it says.
    pub fn take(&self, file: &ManifestFile, from: &mut dyn Read) -> Result<(), CopyError> {
        let path = self.draft.join(&file.name);
        remove_tree(&path)?;
        let mut to = create(&path).map_err(io_error("create", &path))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut offset = 0;
        for (chunk, wanted) in file.sha256.iter().enumerate() {
            let mut left = file.chunk_bytes.min(file.bytes - offset);
            let mut hasher = Sha256::new();
            while left > 0 {
                let part = buffer.len().min(usize::try_from(left).unwrap_or(buffer.len()));
                let read = from.read(&mut buffer[..part]).map_err(|source| CopyError::Broken { file: file.name.clone(), source })?;
                if read == 0 {
                    return Err(Damage::Length { file: file.name.clone(), expected: file.bytes, found: offset }.into());
                }
                hasher.update(&buffer[..read]);
                to.write_all(&buffer[..read]).map_err(io_error("write", &path))?;
                left -= read as u64;
                offset += read as u64;
            }
            if !to_hex(&hasher.finalize()).eq_ignore_ascii_case(wanted) {
                let offset = chunk as u64 * file.chunk_bytes;
                return Err(Damage::Content { file: file.name.clone(), chunk, offset }.into());
            }
        }
        to.sync_all().map_err(io_error("sync", &path))?;
        Ok(())
    }

    /// What is there of it goes.
    pub fn abandon(&self) {
        // A failure here is left to the next copy.
        let _ = remove_tree(&self.draft);
    }

    /// All files are there: it becomes a checkpoint of this folder.
    pub fn commit(self) -> Result<PathBuf, CheckpointError> {
        check_draft_files(&self.draft, &self.manifest)?;
        fence::sync_dir(&self.draft)?;
        let place = self.dir.join(step_folder(self.manifest.step));
        let held = fence::lock(&self.dir)?;
        fence::check(&self.dir, self.attempt)?;
        place_locked(&self.draft, &place, &self.manifest, &held)?;
        fence::sync_dir(&self.dir)?;
        drop(held);
        // What was there before lies under the draft's name now; a failure here is left to the next copy.
        let _ = fs::remove_dir_all(&self.draft);
        Ok(place)
    }
}

const BUFFER_BYTES: usize = 256 * 1024;

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).custom_flags(nix::libc::O_NOFOLLOW).open(path)
}

/// Removes what copies before this one left.
fn remove_drafts(dir: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        if entry.file_name().to_str().and_then(draft_owner).is_some_and(|(_, membership)| membership == COPY) {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// A checkpoint for those who fetch it: the manifest's bytes, as they were written.
pub fn manifest_bytes(path: &Path) -> Result<Vec<u8>, Damage> {
    let manifest = read_manifest(path)?;
    let (mut file, bytes) = open_regular(path, MANIFEST_NAME)?;
    let mut text = Vec::new();
    let unreadable = |source| Damage::Unreadable { file: MANIFEST_NAME.into(), source };
    (&mut file).take(bytes).read_to_end(&mut text).map_err(unreadable)?;
    // What was checked is what is given: it may be exchanged in between.
    if parse_manifest(&text)? == manifest { Ok(text) } else { Err(Damage::BadManifest("it changed while it was read".into())) }
}

/// A file of a checkpoint for those who fetch it, by its place in the manifest, and its length.
pub fn open_file(path: &Path, index: usize) -> Result<(File, u64), Damage> {
    let manifest = read_manifest(path)?;
    let named = manifest.files.get(index).ok_or_else(|| Damage::Missing(format!("file {index}")))?;
    open_named(path, named).map(|file| (file, named.bytes))
}

/// A file of a checkpoint, which has the length that its manifest says.
pub fn open_named(path: &Path, named: &ManifestFile) -> Result<File, Damage> {
    let (file, found) = open_regular(path, &named.name)?;
    if found == named.bytes { Ok(file) } else { Err(Damage::Length { file: named.name.clone(), expected: named.bytes, found }) }
}

/// Puts aside what attempts up to `attempt` have committed beyond a step; answers what was. The newest first.
pub fn put_aside(dir: &Path, attempt: u32, beyond: Option<u64>, reason: &str) -> Result<Vec<super::Quarantined>, CheckpointError> {
    let mut done = Vec::new();
    for found in super::list(dir)? {
        let late = beyond.is_none_or(|beyond| found.step > beyond) && read_manifest(&found.path).is_ok_and(|own| own.attempt <= attempt);
        if late {
            done.extend(super::quarantine(dir, found.step, reason)?);
        }
    }
    Ok(done)
}
