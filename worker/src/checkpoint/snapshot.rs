//! Snapshots in shared memory: what each rank copied of its share of the state, outliving the rank.
//!
//! A job's folder on a memory file system holds, per attempt and rank, two slots `a<attempt>-r<rank>-s<0|1>` (the bytes of that
//! rank's part of a checkpoint) and for each whole slot a note beside it (`….json`: the manifest without files, length, CRC-32). The note
//! is removed before a slot is written and put there by rename after it, so a rank killed in the middle of a copy leaves the other slot.
//! When every rank of an attempt has a whole slot of one step, that step can be linked into a checkpoint folder (hard links, no copy) and
//! resumed from, or persisted. The ranks write; the agent takes and frees: nothing here is freed by the process that wrote it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use everlit_api::manifest::Manifest;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::commit::{manifest_text, remove_tree};
use super::{CheckpointError, MANIFEST_NAME, begin, commit, describe_file, fence, io_error, step_folder};

/// A note larger than this is ignored.
const NOTE_BYTES_MAX: u64 = 1 << 20;
const RESUME_PREFIX: &str = "resume-a";

/// What makes a slot whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Which rank's share.
    pub rank: u32,
    /// The part's file name in a checkpoint; null when the rank has no tensor.
    pub name: Option<String>,
    /// Bytes of the part.
    pub bytes: u64,
    /// CRC-32 of them.
    pub crc32: u32,
    /// Step, attempt, world size and the rest; its list of files is empty.
    pub manifest: Manifest,
}

/// Where a slot's bytes are.
pub fn slot_path(dir: &Path, attempt: u32, rank: u32, slot: usize) -> PathBuf {
    dir.join(format!("a{attempt}-r{rank}-s{slot}"))
}

fn note_path(slot: &Path) -> PathBuf {
    slot.with_extension("json")
}

/// Attempt and rank of a slot's or note's name.
fn parse_name(name: &str) -> Option<(u32, u32)> {
    let stem = name.split('.').next()?;
    let (attempt, rest) = stem.strip_prefix('a')?.split_once("-r")?;
    let (rank, slot) = rest.split_once("-s")?;
    matches!(slot, "0" | "1").then_some((attempt.parse().ok()?, rank.parse().ok()?))
}

/// The slot is about to be overwritten.
pub fn unseal(slot: &Path) -> io::Result<()> {
    match fs::remove_file(note_path(slot)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The slot holds what the note says.
pub fn seal(slot: &Path, note: &Note) -> io::Result<()> {
    let draft = slot.with_extension("tmp");
    fs::write(&draft, serde_json::to_vec(note)?)?;
    fs::rename(&draft, note_path(slot))
}

/// One step that every rank of an attempt has whole.
#[derive(Debug)]
pub struct Whole {
    dir: PathBuf,
    /// In rank order.
    parts: Vec<(PathBuf, Note)>,
}

/// The newest step that every rank of one attempt has whole; every byte was read and its checksum compared.
pub fn newest_whole(dir: &Path) -> io::Result<Option<Whole>> {
    let mut steps: BTreeMap<(u64, u32), BTreeMap<u32, (PathBuf, Note)>> = BTreeMap::new();
    for name in names(dir)? {
        let Some(stem) = name.strip_suffix(".json").filter(|stem| parse_name(stem).is_some()) else { continue };
        let slot = dir.join(stem);
        let Some(note) = read_note(&slot) else { continue };
        if parse_name(stem) == Some((note.manifest.attempt, note.rank)) {
            steps.entry((note.manifest.step, note.manifest.attempt)).or_default().insert(note.rank, (slot, note));
        }
    }
    for (_, ranks) in steps.into_iter().rev() {
        let parts: Vec<(PathBuf, Note)> = ranks.into_values().collect();
        let world = parts.first().map_or(0, |(_, note)| note.manifest.world_size);
        let complete = parts.len() == world as usize
            && parts.iter().zip(0..world).all(|((_, note), rank)| note.rank == rank && note.manifest.world_size == world);
        if complete && parts.par_iter().all(|(slot, note)| is_intact(slot, note)) {
            return Ok(Some(Whole { dir: dir.to_path_buf(), parts }));
        }
    }
    Ok(None)
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.filter_map(|entry| entry.map(|entry| entry.file_name().into_string().ok()).transpose()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn read_note(slot: &Path) -> Option<Note> {
    let path = note_path(slot);
    let about = path.symlink_metadata().ok()?;
    if !about.is_file() || about.len() > NOTE_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Whether a slot's bytes are those that its note was written for.
fn is_intact(slot: &Path, note: &Note) -> bool {
    if note.name.is_none() {
        return note.bytes == 0;
    }
    let read = || -> io::Result<bool> {
        let mut file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(slot)?;
        Ok(file.metadata()?.len() == note.bytes && crc32_of(&mut file)? == note.crc32)
    };
    read().unwrap_or(false)
}

fn crc32_of(file: &mut File) -> io::Result<u32> {
    use std::io::Read;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

impl Whole {
    /// Updates done.
    pub fn step(&self) -> u64 {
        self.manifest().step
    }

    /// The attempt that copied it.
    pub fn attempt(&self) -> u32 {
        self.manifest().attempt
    }

    /// What rank 0 said of it; without files.
    pub fn manifest(&self) -> &Manifest {
        &self.parts[0].1.manifest
    }

    fn named(&self) -> impl Iterator<Item = (&PathBuf, &String)> {
        self.parts.iter().filter_map(|(slot, note)| Some((slot, note.name.as_ref()?)))
    }

    /// Makes a checkpoint folder of hard links for `attempt` to resume from, and frees every slot that is not part of it. The slots stay
    /// notes and all, so that the same step can be taken again if that attempt saves nothing either.
    pub fn link(&self, attempt: u32) -> Result<(PathBuf, Manifest), CheckpointError> {
        let outer = self.dir.join(format!("{RESUME_PREFIX}{attempt}"));
        remove_tree(&outer)?;
        let folder = outer.join(step_folder(self.step()));
        fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
        for (slot, name) in self.named() {
            fs::hard_link(slot, folder.join(name)).map_err(io_error("link", slot))?;
        }
        let manifest = self.described(&folder)?;
        fence::replace_file(&folder, MANIFEST_NAME, &manifest_text(&manifest)?)?;
        let kept: Vec<&PathBuf> = self.parts.iter().map(|(slot, _)| slot).collect();
        remove_where(&self.dir, |path, name| parse_name(name).is_some() && !kept.iter().any(|slot| path.with_extension("") == **slot));
        let own = outer.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        remove_where(&self.dir, |_, name| name.starts_with(RESUME_PREFIX) && name != own);
        Ok((folder, manifest))
    }

    /// Commits it to a job's checkpoints in the name of `attempt`, which is the fencing token.
    pub fn persist(&self, checkpoints: &Path, attempt: u32) -> Result<PathBuf, CheckpointError> {
        let draft = begin(checkpoints, self.step(), attempt, 0)?;
        for (slot, name) in self.named() {
            fs::copy(slot, draft.join(name)).map_err(io_error("copy", slot))?;
        }
        let mut manifest = self.described(&draft)?;
        manifest.attempt = attempt;
        commit(checkpoints, &draft, &manifest)
    }

    fn described(&self, folder: &Path) -> Result<Manifest, CheckpointError> {
        let mut manifest = self.manifest().clone();
        let mut names: Vec<&String> = self.named().map(|(_, name)| name).collect();
        names.sort();
        manifest.files = names.into_iter().map(|name| describe_file(&folder.join(name))).collect::<Result<_, _>>()?;
        Ok(manifest)
    }
}

/// Frees what a commit of `committed_step` makes superfluous: linked folders up to that step, and slots of attempts before
/// `newest_attempt`.
pub fn free_older(dir: &Path, committed_step: u64, newest_attempt: u32) {
    remove_where(dir, |path, name| {
        if name.starts_with(RESUME_PREFIX) {
            let steps = names(path).unwrap_or_default();
            return steps.iter().filter_map(|name| super::folder_step(name)).all(|step| step <= committed_step);
        }
        parse_name(name).is_some_and(|(attempt, _)| attempt < newest_attempt)
    });
}

/// Frees everything of a job.
pub fn free(dir: &Path) {
    // What stays is found again at the agent's next start.
    let _ = remove_tree(dir);
}

/// Removes entries; one that stays is only memory, and is found again.
fn remove_where(dir: &Path, chosen: impl Fn(&Path, &str) -> bool) {
    for name in names(dir).unwrap_or_default() {
        let path = dir.join(&name);
        if chosen(&path, &name) {
            let _ = remove_tree(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::manifest::MANIFEST_FORMAT;
    use everlit_api::time::Timestamp;

    use super::*;
    use crate::checkpoint::{Damage, raise_fence, verify};

    fn manifest(attempt: u32, step: u64, world_size: u32) -> Manifest {
        Manifest {
            format: MANIFEST_FORMAT,
            job_id: "job".into(),
            attempt,
            generation: 0,
            step,
            epoch: 0,
            world_size,
            global_batch: 8,
            samples: step * 8,
            seed: 1,
            data: Default::default(),
            model: None,
            created_at: Timestamp::now(),
            files: Vec::new(),
            manifest_sha256: None,
        }
    }

    fn fill(dir: &Path, attempt: u32, rank: u32, slot: usize, step: u64) -> PathBuf {
        let path = slot_path(dir, attempt, rank, slot);
        let bytes = format!("state of rank {rank} at {step}").into_bytes();
        unseal(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        let name = Some(format!("part-{rank:05}-of-00002.safetensors"));
        let note = Note { rank, name, bytes: bytes.len() as u64, crc32: crc32fast::hash(&bytes), manifest: manifest(attempt, step, 2) };
        seal(&path, &note).unwrap();
        path
    }

    fn step_of(dir: &Path) -> Option<u64> {
        newest_whole(dir).unwrap().map(|whole| whole.step())
    }

    #[test]
    fn the_newest_step_that_all_ranks_have_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(step_of(&dir.path().join("none")), None);
        fill(dir.path(), 1, 0, 0, 10);
        assert_eq!(step_of(dir.path()), None, "rank 1 has none");
        fill(dir.path(), 1, 1, 0, 10);
        fill(dir.path(), 1, 0, 1, 20);
        assert_eq!(step_of(dir.path()), Some(10), "rank 1 was killed before its copy of 20 was whole");
        let second = fill(dir.path(), 1, 1, 1, 20);
        assert_eq!(step_of(dir.path()), Some(20));
        fs::write(&second, "state of rank 1 at 2x").unwrap();
        assert_eq!(step_of(dir.path()), Some(10), "its checksum differs");
        fill(dir.path(), 2, 1, 0, 10);
        assert_eq!(newest_whole(dir.path()).unwrap().unwrap().attempt(), 1, "attempts do not mix");
    }

    #[test]
    fn a_linked_step_is_a_checkpoint_and_frees_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        for (rank, slot, step) in [(0, 0, 10), (1, 0, 10), (0, 1, 20), (1, 1, 20)] {
            fill(dir.path(), 1, rank, slot, step);
        }
        let (path, linked) = newest_whole(dir.path()).unwrap().unwrap().link(2).unwrap();
        assert_eq!(verify(&path).unwrap(), linked);
        assert_eq!((linked.step, linked.attempt, linked.files.len()), (20, 1, 2));
        assert!(!slot_path(dir.path(), 1, 0, 0).exists(), "step 10 is freed");
        let (again, _) = newest_whole(dir.path()).unwrap().unwrap().link(3).unwrap();
        assert!(!path.exists() && verify(&again).is_ok(), "it can be taken again");
        fill(dir.path(), 3, 0, 0, 30);
        free_older(dir.path(), 19, 1);
        assert!(verify(&again).is_ok(), "nothing newer is committed");
        free_older(dir.path(), 20, 3);
        let left = names(dir.path()).unwrap();
        assert!(left.iter().all(|name| name.starts_with("a3-")) && !left.is_empty(), "{left:?}");
        free(dir.path());
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_persisted_step_is_fenced_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = tempfile::tempdir().unwrap();
        for rank in 0..2 {
            fill(dir.path(), 1, rank, 0, 10);
        }
        raise_fence(checkpoints.path(), 3).unwrap();
        let whole = newest_whole(dir.path()).unwrap().unwrap();
        assert!(matches!(whole.persist(checkpoints.path(), 2), Err(CheckpointError::Fenced { .. })));
        let path = whole.persist(checkpoints.path(), 3).unwrap();
        assert_eq!(
            verify(&path).map(|manifest| (manifest.step, manifest.attempt)).map_err(|damage: Damage| damage.to_string()),
            Ok((10, 3))
        );
    }
}
