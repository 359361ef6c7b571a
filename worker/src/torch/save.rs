//! Checkpoints of a training state: each rank writes its share of the tensors, rank 0 commits, every rank can read all.
//!
//! Files are safetensors, written here: the usual writer renames before the data is on the disk. The bytes of the
//! tensors depend on nothing of job, attempt, time or place; only which file holds a tensor depends on the world size.
//! The ranks agree three times (folder there, parts written, committed), so that none goes on while another failed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use everlit_api::manifest::{Manifest, ManifestFile};
use safetensors::SafeTensors;
use tch::Tensor;

use super::TrainError;
use super::c10d::Group;
use super::sharing::share_out;
use super::state::State;
use super::tensors::{bytes, bytes_mut};
use everlit_worker::checkpoint::{self, CheckpointError};

/// The ranks that save together.
#[derive(Clone)]
pub struct Ranks {
    /// `None` for a single rank.
    pub group: Option<Arc<Group>>,
    /// This one.
    pub rank: u32,
    /// All of them.
    pub world: u32,
}

impl Ranks {
    /// Whether every rank says yes. All of them must ask.
    pub fn all(&self, yes: bool) -> Result<bool, TrainError> {
        let Some(group) = &self.group else { return Ok(yes) };
        let refusals = Tensor::from_slice(&[f32::from(u8::from(!yes))]);
        group.all_reduce(&refusals)?;
        Ok(refusals.double_value(&[0]) == 0.0)
    }
}

fn part_name(rank: u32, world: u32) -> String {
    format!("part-{rank:05}-of-{world:05}.safetensors")
}

fn note_name(rank: u32) -> String {
    format!(".part-{rank:05}.json")
}

/// Saves the state as one checkpoint in `dir`; `manifest` is complete but for its files.
pub fn save(dir: &Path, state: &State, mut manifest: Manifest, ranks: &Ranks) -> Result<PathBuf, TrainError> {
    let failed = |what: &str, own: Option<&CheckpointError>| match own {
        Some(error) => TrainError::Failed(format!("checkpoint of step {}: {error}", manifest.step)),
        None => TrainError::Failed(format!("checkpoint of step {}: {what} failed on another rank", manifest.step)),
    };
    let draft = dir.join(checkpoint::draft_folder(manifest.step, manifest.attempt));
    let begun = if ranks.rank == 0 { checkpoint::begin(dir, manifest.step, manifest.attempt).map(drop) } else { Ok(()) };
    if !ranks.all(begun.is_ok())? {
        return Err(failed("its start", begun.err().as_ref()));
    }
    let written = write_part(&draft, state, ranks);
    if !ranks.all(written.is_ok())? {
        return Err(failed("a part", written.err().as_ref()));
    }
    let committed = match ranks.rank {
        0 => collect_parts(&draft, ranks.world).and_then(|files| {
            manifest.files = files;
            checkpoint::commit(dir, &draft, &manifest).map(drop)
        }),
        _ => Ok(()),
    };
    if !ranks.all(committed.is_ok())? {
        let failed = |why: String| TrainError::Failed(format!("checkpoint of step {}: {why}", manifest.step));
        return Err(match committed {
            Err(error) => failed(error.to_string()),
            Ok(()) => failed("the commit failed on rank 0".into()),
        });
    }
    Ok(dir.join(checkpoint::step_folder(manifest.step)))
}

/// Writes this rank's tensors and a note about the file, both durable.
fn write_part(draft: &Path, state: &State, ranks: &Ranks) -> Result<(), CheckpointError> {
    let named = state.named();
    let sizes: Vec<u64> = named.iter().map(|(_, tensor)| tensor.numel() as u64 * 4).collect();
    let owners = share_out(&sizes, ranks.world);
    let own: Vec<&(String, &Tensor)> = named.iter().zip(owners).filter(|(_, owner)| *owner == ranks.rank).map(|(one, _)| one).collect();
    let description = if own.is_empty() {
        None
    } else {
        let path = draft.join(part_name(ranks.rank, ranks.world));
        let error = |source| CheckpointError::Io { action: "write", path: path.clone(), source };
        let file = write_tensors(&path, &own).map_err(error)?;
        // The disk writes while the chunks are hashed.
        let description = checkpoint::describe_file(&path)?;
        file.sync_all().map_err(error)?;
        Some(description)
    };
    let path = draft.join(note_name(ranks.rank));
    let note = serde_json::to_vec(&description).map_err(io::Error::from);
    note.and_then(|note| fs::write(&path, note)).map_err(|source| CheckpointError::Io { action: "write", path, source })
}

/// The safetensors layout: length of the header, header as JSON padded to 8, the tensors' bytes.
fn write_tensors(path: &Path, tensors: &[&(String, &Tensor)]) -> io::Result<File> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for (name, tensor) in tensors {
        let end = offset + tensor.numel() * 4;
        header.insert(name.clone(), serde_json::json!({"dtype": "F32", "shape": tensor.size(), "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path)?;
    let total = 8 + header.len() + offset;
    let all = i64::try_from(total).map_err(|_| io::ErrorKind::FileTooLarge)?;
    match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, all) {
        // Not every file system can; then writing alone finds out whether there is room.
        Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut written = 8 + header.len();
    for (_, tensor) in tensors {
        let content = bytes(tensor);
        file.write_all(content)?;
        start_writeback(&file, written, content.len());
        written += content.len();
    }
    Ok(file)
}

/// Asks the kernel to begin writing a range, so that the fsync at the end finds little to do.
fn start_writeback(file: &File, from: usize, bytes: usize) {
    let (Ok(from), Ok(bytes)) = (i64::try_from(from), i64::try_from(bytes)) else { return };
    // SAFETY: an open file and plain numbers. Only a hint: the fsync decides.
    unsafe { nix::libc::sync_file_range(file.as_raw_fd(), from, bytes, nix::libc::SYNC_FILE_RANGE_WRITE) };
}

/// Reads every rank's note and removes it: a commit holds tensors and the manifest only.
fn collect_parts(draft: &Path, world: u32) -> Result<Vec<ManifestFile>, CheckpointError> {
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

/// Fills the state from a checkpoint, verifying each file as it is read. On an error the state is not to be used.
pub fn load(path: &Path, manifest: &Manifest, state: &State) -> Result<(), TrainError> {
    let failed = |why: String| TrainError::Failed(format!("checkpoint `{}`: {why}", path.display()));
    let mut missing: std::collections::BTreeMap<String, &Tensor> = state.named().into_iter().collect();
    for file in &manifest.files {
        let content = checkpoint::read_file(path, file).map_err(|damage| failed(damage.to_string()))?;
        let tensors = SafeTensors::deserialize(&content).map_err(|error| failed(format!("{}: {error}", file.name)))?;
        for (name, view) in tensors.iter() {
            let Some(tensor) = missing.remove(name) else {
                return Err(failed(format!("{} has tensor `{name}`, which is not the model's or came twice", file.name)));
            };
            let shape: Vec<i64> = view.shape().iter().map(|&size| i64::try_from(size).unwrap_or(-1)).collect();
            if view.dtype() != safetensors::Dtype::F32 || shape != tensor.size() {
                return Err(failed(format!("tensor `{name}` has shape {shape:?}, the model's has {:?}", tensor.size())));
            }
            bytes_mut(tensor).copy_from_slice(view.data());
        }
    }
    match missing.keys().next() {
        Some(name) => Err(failed(format!("tensor `{name}` is missing"))),
        None => Ok(()),
    }
}

/// The hex sha256 over all tensors of a checkpoint in name order: name, kind, shape and bytes. The same for the same
/// state, however many ranks wrote it. The checkpoint is verified first.
pub fn checksum(path: &Path) -> Result<String, TrainError> {
    use sha2::{Digest, Sha256};
    let failed = |why: String| TrainError::Failed(format!("checkpoint `{}`: {why}", path.display()));
    let manifest = checkpoint::read_manifest(path).map_err(|damage| failed(damage.to_string()))?;
    let mut digests = std::collections::BTreeMap::new();
    for file in &manifest.files {
        let content = checkpoint::read_file(path, file).map_err(|damage| failed(damage.to_string()))?;
        let tensors = SafeTensors::deserialize(&content).map_err(|error| failed(format!("{}: {error}", file.name)))?;
        for (name, view) in tensors.iter() {
            let about = format!("{name}\0{:?}\0{:?}\0", view.dtype(), view.shape());
            digests.insert(name.to_string(), checkpoint::hex_sha256(&[about.as_bytes(), view.data()].concat()));
        }
    }
    let all = digests.values().fold(Sha256::new(), |hasher, digest| hasher.chain_update(digest));
    Ok(all.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
