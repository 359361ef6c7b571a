//! Reading a checkpoint into a training state, verified piece by piece as it is read: no second copy of a file is held.
//!
//! Any rank can read all parts, however many ranks wrote them. What does not fit the model is named before anything is overwritten.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use everlit_api::manifest::{Manifest, ManifestFile};
use everlit_worker::checkpoint::{self, Damage};
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use tch::Tensor;

use super::TrainError;
use super::state::State;
use super::tensors::{assign, beside, bytes_mut};

/// A header larger than this is refused unread.
const HEADER_BYTES_MAX: u64 = 100 << 20;

/// Where the bytes of a file go.
struct Plan {
    /// Length field and header, as read for the plan; what is verified must be the same.
    head: Vec<u8>,
    /// Begin and end in the file, and the memory; in order, without overlap.
    tensors: Vec<(u64, u64, usize)>,
}

/// Fills the state from a checkpoint, verifying each byte. On an error the state is not to be used.
pub fn load(path: &Path, manifest: &Manifest, state: &State) -> Result<(), TrainError> {
    let failed = |why: String| TrainError::Failed(format!("checkpoint `{}`: {why}", path.display()));
    let named = state.named();
    // A GPU's tensors are read into the machine's memory first.
    let host: Vec<Tensor> = named.iter().map(|(_, tensor)| beside(tensor)).collect();
    let mut missing: BTreeMap<String, &Tensor> = named.iter().map(|(name, _)| name.clone()).zip(&host).collect();
    let mut plans = Vec::new();
    for file in manifest.files.iter().filter(|file| is_tensors(file)) {
        // Bytes that are not those that were committed explain everything else.
        let truth = |why: String| failed(checkpoint::verify(path).err().map_or(why, |damage| damage.to_string()));
        plans.push((file, plan(path, file, &mut missing).map_err(truth)?));
    }
    if let Some(name) = missing.keys().next() {
        return Err(failed(format!("tensor `{name}` is missing")));
    }
    for (file, plan) in &plans {
        let changed = AtomicBool::new(false);
        checkpoint::stream_file(path, file, &|offset, bytes| {
            if !plan.take(offset, bytes) {
                changed.store(true, Ordering::Relaxed);
            }
        })
        .map_err(|damage| failed(damage.to_string()))?;
        if changed.load(Ordering::Relaxed) {
            return Err(failed(format!("{} changed while it was read", file.name)));
        }
    }
    for ((_, tensor), host) in named.iter().zip(&host).filter(|((_, tensor), _)| tensor.device().is_cuda()) {
        assign(tensor, host);
    }
    Ok(())
}

/// Programs that are not ours keep more than tensors in a checkpoint.
fn is_tensors(file: &ManifestFile) -> bool {
    file.name.ends_with(".safetensors")
}

/// Reads a file's header and finds each of its tensors in the state, where it is then no longer missing.
fn plan(folder: &Path, file: &ManifestFile, missing: &mut BTreeMap<String, &Tensor>) -> Result<Plan, String> {
    let head = read_head(folder, file).map_err(|damage| damage.to_string())?;
    let metadata: Metadata = serde_json::from_slice(&head[8..]).map_err(|error| format!("{}: {error}", file.name))?;
    let start = head.len() as u64;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let Some(tensor) = missing.remove(&name) else {
            return Err(format!("{} has tensor `{name}`, which is not the model's or came twice", file.name));
        };
        let shape: Vec<i64> = info.shape.iter().map(|&size| i64::try_from(size).unwrap_or(-1)).collect();
        if info.dtype != Dtype::F32 || shape != tensor.size() {
            return Err(format!("tensor `{name}` is {:?} of shape {shape:?}, the model's is F32 of {:?}", info.dtype, tensor.size()));
        }
        let (from, to) = (start + info.data_offsets.0 as u64, start + info.data_offsets.1 as u64);
        let memory = bytes_mut(tensor);
        if to > file.bytes || to - from != memory.len() as u64 {
            return Err(format!("{}: the bytes of tensor `{name}` are not inside the file", file.name));
        }
        tensors.push((from, to, memory.as_mut_ptr() as usize));
    }
    tensors.sort_unstable();
    if tensors.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(format!("{}: tensors overlap", file.name));
    }
    Ok(Plan { head, tensors })
}

/// The length field and the header.
fn read_head(folder: &Path, file: &ManifestFile) -> Result<Vec<u8>, Damage> {
    let name = &file.name;
    let bad = |source| Damage::Unreadable { file: name.clone(), source };
    let path = folder.join(name);
    let mut open = File::open(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Damage::Missing(name.clone()),
        _ => bad(error),
    })?;
    let found = open.metadata().map_err(bad)?.len();
    if found != file.bytes {
        return Err(Damage::Length { file: name.clone(), expected: file.bytes, found });
    }
    let mut head = vec![0; 8];
    let short = |_| Damage::Length { file: name.clone(), expected: file.bytes, found };
    open.read_exact(&mut head).map_err(short)?;
    let length = head.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    if length > HEADER_BYTES_MAX || length.saturating_add(8) > file.bytes {
        // Not what was committed, or the chunk would say so.
        return Err(Damage::Content { file: name.clone(), chunk: 0, offset: 0 });
    }
    head.resize(8 + usize::try_from(length).unwrap_or(0), 0);
    open.read_exact(&mut head[8..]).map_err(short)?;
    Ok(head)
}

impl Plan {
    /// Puts a verified piece where it belongs. Whether its part of the header is the one that was planned with.
    fn take(&self, offset: u64, bytes: &[u8]) -> bool {
        let end = offset + bytes.len() as u64;
        let within = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
        if offset < self.head.len() as u64 {
            let stop = end.min(self.head.len() as u64);
            let (from, to) = (usize::try_from(offset).unwrap_or(0), usize::try_from(stop).unwrap_or(0));
            if self.head[from..to] != bytes[..within(stop)] {
                return false;
            }
        }
        let first = self.tensors.partition_point(|(_, to, _)| *to <= offset);
        for (from, to, memory) in self.tensors[first..].iter().take_while(|(from, ..)| *from < end) {
            let (start, stop) = ((*from).max(offset), (*to).min(end));
            let piece = &bytes[within(start)..within(stop)];
            let target = (memory + usize::try_from(start - from).unwrap_or(0)) as *mut u8;
            // SAFETY: inside a live tensor of that length (checked in `plan`); pieces do not overlap, so nobody else writes there.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), target, piece.len()) };
        }
        true
    }
}

/// The hex sha256 over all tensors of a checkpoint in name order: name, kind, shape and bytes. The same for the same
/// state, however many ranks wrote it. The checkpoint is verified first.
pub fn checksum(path: &Path) -> Result<String, TrainError> {
    use sha2::{Digest, Sha256};
    let failed = |why: String| TrainError::Failed(format!("checkpoint `{}`: {why}", path.display()));
    let manifest = checkpoint::read_manifest(path).map_err(|damage| failed(damage.to_string()))?;
    let mut digests = BTreeMap::new();
    for file in &manifest.files {
        let content = checkpoint::read_file(path, file).map_err(|damage| failed(damage.to_string()))?;
        if !is_tensors(file) {
            continue;
        }
        let tensors = SafeTensors::deserialize(&content).map_err(|error| failed(format!("{}: {error}", file.name)))?;
        for (name, view) in tensors.iter() {
            let about = format!("{name}\0{:?}\0{:?}\0", view.dtype(), view.shape());
            digests.insert(name.to_string(), checkpoint::hex_sha256(&[about.as_bytes(), view.data()].concat()));
        }
    }
    let all = digests.values().fold(Sha256::new(), |hasher, digest| hasher.chain_update(digest));
    Ok(all.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
