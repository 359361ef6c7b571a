//! One rank's part of a checkpoint: which tensors, in which layout, read from where.
//!
//! A part is a safetensors file: length of the header, header as JSON padded to 8, the tensors' bytes. It is laid out once; each save
//! only reads the tensors again. The tensors' bytes depend on nothing of job, attempt, time or place; only which part holds a tensor
//! depends on the world size.

use everlit_worker::checkpoint::CheckpointError;

use super::super::sharing::share_out;
use super::super::state::State;
use super::super::tensors::bytes;

/// Bytes that are copied and summed at once: they stay in a core's cache in between.
const BLOCK_BYTES: usize = 256 * 1024;

/// Memory of a tensor, by address: the copying thread has no tensors.
#[derive(Debug, Clone, Copy)]
struct Source {
    address: usize,
    bytes: usize,
}

/// A rank's share of the state, laid out.
#[derive(Debug)]
pub struct Part {
    name: Option<String>,
    header: Vec<u8>,
    sources: Vec<Source>,
}

impl Part {
    /// The share of `rank`. The state must outlive every [`Part::copy`].
    pub fn new(state: &State, rank: u32, world: u32) -> Result<Self, CheckpointError> {
        let named = state.named();
        let sizes: Vec<u64> = named.iter().map(|(_, tensor)| tensor.numel() as u64 * 4).collect();
        let owners = share_out(&sizes, world);
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        let mut sources = Vec::new();
        let mut offset = 0;
        for ((name, tensor), _) in named.iter().zip(owners).filter(|(_, owner)| *owner == rank) {
            let own = bytes(tensor);
            let end = offset + own.len();
            header.insert(name.clone(), serde_json::json!({"dtype": "F32", "shape": tensor.size(), "data_offsets": [offset, end]}));
            sources.push(Source { address: own.as_ptr() as usize, bytes: own.len() });
            offset = end;
        }
        let mut text = serde_json::to_vec(&header).map_err(|error| CheckpointError::Refused(error.to_string()))?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        let name = (!sources.is_empty()).then(|| format!("part-{rank:05}-of-{world:05}.safetensors"));
        Ok(Self { name, header, sources })
    }

    /// The file's name; `None` when there are fewer tensors than ranks.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Bytes of the file; 0 without a tensor.
    pub fn bytes(&self) -> usize {
        if self.name.is_none() { 0 } else { self.header.len() + self.sources.iter().map(|source| source.bytes).sum::<usize>() }
    }

    /// Copies everything into `target`, which has [`Part::bytes`], and answers its CRC-32.
    ///
    /// # Safety
    /// Nobody writes to the state's tensors meanwhile, and the state lives.
    pub unsafe fn copy(&self, target: &mut [u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        if self.name.is_none() {
            return hasher.finalize();
        }
        let (head, mut rest) = target.split_at_mut(self.header.len());
        head.copy_from_slice(&self.header);
        hasher.update(head);
        for source in &self.sources {
            let (own, after) = rest.split_at_mut(source.bytes);
            // SAFETY: the memory of a live tensor that nobody writes to, by the caller.
            let from = unsafe { std::slice::from_raw_parts(source.address as *const u8, source.bytes) };
            for (to, from) in own.chunks_mut(BLOCK_BYTES).zip(from.chunks(BLOCK_BYTES)) {
                to.copy_from_slice(from);
                hasher.update(to);
            }
            rest = after;
        }
        hasher.finalize()
    }
}
