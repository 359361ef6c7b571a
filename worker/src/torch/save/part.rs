//! One rank's part of a checkpoint: which tensors, in which layout, read from where.
//!
//! A part is a safetensors file: length of the header, header as JSON padded to 8, the tensors' bytes. It is laid out once; each save
//! only reads the tensors again. The tensors' bytes depend on nothing of job, attempt, time or place; only which part holds a tensor
//! depends on the world size.

use std::sync::Arc;

use everlit_worker::checkpoint::CheckpointError;
use tch::{Kind, Tensor};

use super::super::c10d::CollectiveError;
use super::super::device::{Pinned, Reader};
use super::super::sharing::share_out;
use super::super::state::State;
use super::slots::Slot;

/// Bytes that are copied and summed at once: they stay in a core's cache in between.
const BLOCK_BYTES: usize = 256 * 1024;

/// Memory of a tensor, by address (on a GPU, an address there): the copying thread has no tensors.
#[derive(Debug, Clone, Copy)]
struct Source {
    address: usize,
    bytes: usize,
}

impl Source {
    fn of(tensor: &Tensor) -> Self {
        assert!(tensor.kind() == Kind::Float && tensor.is_contiguous(), "state is contiguous float32");
        Self { address: tensor.data_ptr() as usize, bytes: tensor.numel() * 4 }
    }
}

/// A rank's share of the state, laid out.
#[derive(Debug)]
pub struct Part {
    /// When the state is on a GPU.
    reader: Option<Arc<Reader>>,
    name: Option<String>,
    header: Vec<u8>,
    sources: Vec<Source>,
}

impl Part {
    /// The share of `rank`. The state must outlive every [`Part::copy`].
    pub fn new(state: &State, rank: u32, world: u32) -> Result<Self, CheckpointError> {
        let named = state.named();
        let reader = named.first().map_or(Ok(None), |(_, tensor)| Reader::of(tensor)).map_err(refused)?;
        let sizes: Vec<u64> = named.iter().map(|(_, tensor)| tensor.numel() as u64 * 4).collect();
        let owners = share_out(&sizes, world);
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        let mut sources = Vec::new();
        let mut offset = 0;
        for ((name, tensor), _) in named.iter().zip(owners).filter(|(_, owner)| *owner == rank) {
            let own = Source::of(tensor);
            let end = offset + own.bytes;
            header.insert(name.clone(), serde_json::json!({"dtype": "F32", "shape": tensor.size(), "data_offsets": [offset, end]}));
            sources.push(own);
            offset = end;
        }
        let mut text = serde_json::to_vec(&header).map_err(refused)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        let name = (!sources.is_empty()).then(|| format!("part-{rank:05}-of-{world:05}.safetensors"));
        Ok(Self { reader, name, header, sources })
    }

    /// Whether the state is on a GPU.
    pub fn is_on_gpu(&self) -> bool {
        self.reader.is_some()
    }

    /// The file's name; `None` when there are fewer tensors than ranks.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Bytes of the file; 0 without a tensor.
    pub fn bytes(&self) -> usize {
        if self.name.is_none() { 0 } else { self.header.len() + self.sources.iter().map(|source| source.bytes).sum::<usize>() }
    }

    /// What the calling thread has queued on a GPU by now comes before the next copy.
    pub fn mark(&self) -> Result<(), CollectiveError> {
        self.reader.as_ref().map_or(Ok(()), |reader| reader.mark())
    }

    /// Makes the buffers fit for a GPU to write to, while the answer lives.
    pub fn pin(&self, slots: &[Slot]) -> Vec<Pinned> {
        let slots = if self.reader.is_some() { slots } else { &[] };
        // SAFETY: nobody else uses a slot before the first copy, and slots outlive the thread that copies.
        slots.iter().filter_map(|slot| unsafe { Pinned::new(slot.bytes_mut()) }).collect()
    }

    /// Copies everything into `target`, which has [`Part::bytes`], and answers its CRC-32. Calls `read` as soon as the state may change.
    ///
    /// # Safety
    /// Nobody writes to the state's tensors until `read` is called, and the state lives.
    pub unsafe fn copy(&self, target: &mut [u8], read: impl FnOnce()) -> Result<u32, CollectiveError> {
        let mut hasher = crc32fast::Hasher::new();
        if self.name.is_none() {
            read();
            return Ok(hasher.finalize());
        }
        let (head, rest) = target.split_at_mut(self.header.len());
        head.copy_from_slice(&self.header);
        hasher.update(head);
        // SAFETY: by the caller.
        unsafe {
            match &self.reader {
                None => {
                    self.copy_hashed(rest, &mut hasher);
                    read();
                }
                Some(reader) => {
                    reader.read(self.pieces(rest).map(|(source, piece)| (source.address, piece)))?;
                    read();
                    hasher.update(rest);
                }
            }
        }
        Ok(hasher.finalize())
    }

    /// Each source with its place in the target.
    fn pieces<'a>(&'a self, target: &'a mut [u8]) -> impl Iterator<Item = (&'a Source, &'a mut [u8])> {
        self.sources.iter().scan(target, |rest, source| {
            let (piece, after) = std::mem::take(rest).split_at_mut(source.bytes);
            *rest = after;
            Some((source, piece))
        })
    }

    /// Sums each block while it is still in a core's cache.
    ///
    /// # Safety
    /// As [`Part::copy`]; the state is in this machine's memory.
    unsafe fn copy_hashed(&self, target: &mut [u8], hasher: &mut crc32fast::Hasher) {
        for (source, piece) in self.pieces(target) {
            // SAFETY: the memory of a live tensor that nobody writes to, by the caller.
            let from = unsafe { std::slice::from_raw_parts(source.address as *const u8, source.bytes) };
            for (to, from) in piece.chunks_mut(BLOCK_BYTES).zip(from.chunks(BLOCK_BYTES)) {
                to.copy_from_slice(from);
                hasher.update(to);
            }
        }
    }
}

fn refused(why: impl ToString) -> CheckpointError {
    CheckpointError::Refused(why.to_string())
}
