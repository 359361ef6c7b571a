//! Sizes of the built-in models, and what they need: parameters, memory, arithmetic. No libtorch.
//!
//! The program that trains, the agent that starts it and the coordinator that places it share these numbers. Memory figures are
//! estimates of one rank's own resident bytes, on the safe side: gradients and activations are counted as if all were there at once. A
//! test of the worker compares them with a real run.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::{ModelSpec, Precision, WorkerSpec};

/// Byte values: what every built-in model reads and predicts.
pub const VOCABULARY: u64 = 256;
/// Models that the built-in program knows by name.
pub const MODEL_PRESETS: [&str; 8] = ["llama-1m", "llama-10m", "llama-30m", "llama-124m", "llama-350m", "llama-1b", "mlp-10k", "mlp-500k"];
/// Bytes per parameter of what a checkpoint holds: the weight and AdamW's two moments, all float32.
pub const STATE_BYTES: u64 = 12;
/// A worker before it has a model, without the pages of libtorch that all ranks share.
const BASE_BYTES: u64 = 96 << 20;

/// A decoder transformer over bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LlamaSizes {
    /// Features of the residual stream.
    pub dim: u64,
    /// Layers.
    pub layers: u64,
    /// Query heads; `dim / heads` is even.
    pub heads: u64,
    /// Key and value heads; they divide `heads`.
    pub kv_heads: u64,
    /// Inner features of the feed-forward part.
    pub hidden: u64,
}

/// A small classifier: the next byte from the previous eight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpSizes {
    /// Bytes that it looks back.
    pub context: u64,
    /// Features per byte.
    pub embedding: u64,
    /// Inner features.
    pub hidden: u64,
}

/// A model's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelSizes {
    /// `llama`.
    Llama(LlamaSizes),
    /// `mlp`.
    Mlp(MlpSizes),
}

impl LlamaSizes {
    /// The sizes in order, each with its largest value; the least is 1.
    pub const MOST: [(&'static str, u64); 5] =
        [("dim", 65_536), ("layers", 1_024), ("heads", 4_096), ("kv_heads", 4_096), ("hidden", 1 << 20)];

    /// What contradicts itself or can not be, as (field, detail).
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        let values = [self.dim, self.layers, self.heads, self.kv_heads, self.hidden];
        for ((name, most), value) in Self::MOST.into_iter().zip(values) {
            if value == 0 || value > most {
                faults.push((name, format!("must be from 1 to {most}")));
            }
        }
        if !faults.is_empty() {
            return faults;
        }
        if !self.dim.is_multiple_of(self.heads) || !(self.dim / self.heads).is_multiple_of(2) {
            faults.push(("heads", format!("must divide dim ({}) into heads of an even number of features", self.dim)));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            faults.push(("kv_heads", format!("must divide heads ({})", self.heads)));
        }
        faults
    }

    /// Features of one head.
    pub fn head(&self) -> u64 {
        self.dim / self.heads
    }

    /// Features of all key heads.
    pub fn kv_dim(&self) -> u64 {
        self.kv_heads * self.head()
    }

    fn per_layer(&self) -> u64 {
        let attention = self.dim * (self.dim + 2 * self.kv_dim()) + self.dim * self.dim;
        attention + 3 * self.dim * self.hidden + 2 * self.dim
    }

    fn parameters(&self) -> u64 {
        2 * VOCABULARY * self.dim + self.layers * self.per_layer() + self.dim
    }
}

impl MlpSizes {
    fn parameters(&self) -> u64 {
        VOCABULARY * self.embedding + (self.context * self.embedding + 1) * self.hidden + (self.hidden + 1) * VOCABULARY
    }
}

impl ModelSizes {
    /// Of a preset, or of sizes in full; `None`: there is no such preset.
    pub fn of(model: &ModelSpec) -> Option<Self> {
        let name = match model {
            ModelSpec::Sizes(sizes) => return Some(Self::Llama(*sizes)),
            ModelSpec::Preset(name) => name.as_str(),
        };
        let llama = |dim, layers, heads, kv_heads, hidden| Some(Self::Llama(LlamaSizes { dim, layers, heads, kv_heads, hidden }));
        let mlp = |embedding, hidden| Some(Self::Mlp(MlpSizes { context: 8, embedding, hidden }));
        match name {
            "llama-1m" => llama(128, 4, 4, 2, 448),
            "llama-10m" => llama(384, 6, 6, 2, 1024),
            "llama-30m" => llama(512, 10, 8, 4, 1408),
            "llama-124m" => llama(768, 19, 12, 6, 2048),
            "llama-350m" => llama(1024, 30, 16, 8, 2816),
            "llama-1b" => llama(2048, 22, 32, 8, 5632),
            "mlp-10k" => mlp(8, 24),
            "mlp-500k" => mlp(32, 960),
            _ => None,
        }
    }

    /// Trained numbers.
    pub fn parameters(&self) -> u64 {
        match self {
            Self::Llama(sizes) => sizes.parameters(),
            Self::Mlp(sizes) => sizes.parameters(),
        }
    }

    /// Tokens of a sample that are predicted.
    pub fn tokens(&self, sequence_length: u32) -> u64 {
        match self {
            Self::Llama(_) => u64::from(sequence_length),
            Self::Mlp(_) => 1,
        }
    }

    /// Floating-point operations of training on one sample: two per parameter and token forward, four backward, and attention's
    /// two products of (tokens x tokens), as PaLM (Chowdhery et al. 2022, appendix B) counts. What is computed twice is counted once.
    pub fn flops_per_sample(&self, sequence_length: u32) -> f64 {
        match self {
            Self::Llama(sizes) => {
                let tokens = f64::from(sequence_length);
                let matrices = (sizes.parameters() - VOCABULARY * sizes.dim) as f64;
                tokens * (6.0 * matrices + 12.0 * (sizes.layers * sizes.dim) as f64 * tokens)
            }
            Self::Mlp(sizes) => 6.0 * (sizes.parameters() - VOCABULARY * sizes.embedding) as f64,
        }
    }

    /// Bytes that one sample's activations hold until the backward pass, and that its largest moment adds.
    fn activation_bytes(&self, sequence_length: u32, precision: Precision, recomputed: bool) -> u64 {
        match self {
            Self::Llama(sizes) => {
                let per_token = match precision {
                    // What the fused parts keep: both norms' inputs and answers, projection, mixed values, gate and up, their product.
                    Precision::Float32 => (6 * sizes.dim + 2 * sizes.kv_dim() + 3 * sizes.hidden) * 4,
                    Precision::Bfloat16 => (11 * sizes.dim + 6 * sizes.kv_dim() + 5 * sizes.hidden) * 2,
                };
                let (kept, once) = if recomputed { (4 * sizes.dim, per_token) } else { (per_token, 0) };
                // Logits, their softmax and its gradient stay float32; so does the embedded input.
                u64::from(sequence_length) * (sizes.layers * kept + once + (3 * VOCABULARY + 4 * sizes.dim) * 4)
            }
            Self::Mlp(sizes) => (3 * VOCABULARY + 4 * sizes.hidden + 3 * sizes.context * sizes.embedding) * 4,
        }
    }
}

/// What one rank of a training run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryEstimate {
    /// Weights, gradients, AdamW's moments and the program itself.
    pub state_bytes: u64,
    /// This rank's two snapshots, in shared memory.
    pub snapshot_bytes: u64,
    /// Per sample of a forward pass.
    pub sample_bytes: u64,
}

impl MemoryEstimate {
    /// For the sizes and a world size.
    pub fn of(sizes: &ModelSizes, worker: &WorkerSpec, world_size: u32) -> Self {
        let parameters = sizes.parameters();
        let cast = if worker.precision == Precision::Bfloat16 { 2 * parameters } else { 0 };
        Self {
            state_bytes: BASE_BYTES + (STATE_BYTES + 4) * parameters + cast,
            snapshot_bytes: (2 * STATE_BYTES * parameters).div_ceil(u64::from(world_size.max(1))),
            sample_bytes: sizes.activation_bytes(worker.sequence_length, worker.precision, worker.activation_checkpointing).max(1),
        }
    }

    /// With so many samples in a forward pass.
    pub fn total(&self, samples: u64) -> u64 {
        self.state_bytes.saturating_add(self.snapshot_bytes).saturating_add(self.sample_bytes.saturating_mul(samples))
    }

    /// Samples in a forward pass that fit in `bytes`.
    pub fn samples_in(&self, bytes: u64) -> u64 {
        bytes.saturating_sub(self.total(0)) / self.sample_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_about_the_size_of_its_name() {
        for (preset, least, most) in [
            ("llama-1m", 0.9e6, 1.1e6),
            ("llama-10m", 9e6, 11e6),
            ("llama-30m", 28e6, 32e6),
            ("llama-124m", 120e6, 128e6),
            ("llama-350m", 340e6, 360e6),
            ("llama-1b", 0.98e9, 1.02e9),
            ("mlp-10k", 9.5e3, 10.5e3),
            ("mlp-500k", 480e3, 520e3),
        ] {
            assert!(MODEL_PRESETS.contains(&preset));
            let sizes = ModelSizes::of(&ModelSpec::Preset(preset.into())).unwrap();
            assert!((least..=most).contains(&(sizes.parameters() as f64)), "{preset} has {}", sizes.parameters());
            if let ModelSizes::Llama(llama) = sizes {
                assert_eq!(llama.faults(), []);
            }
        }
        assert_eq!(ModelSizes::of(&ModelSpec::Preset("gpt-9".into())), None);
    }

    #[test]
    fn sizes_that_can_not_be_are_named() {
        let bad = LlamaSizes { dim: 130, layers: 0, heads: 4, kv_heads: 3, hidden: 8 };
        assert_eq!(bad.faults(), [("layers", "must be from 1 to 1024".to_string())]);
        let names: Vec<&str> = LlamaSizes { layers: 1, ..bad }.faults().iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["heads", "kv_heads"]);
    }

    #[test]
    fn an_estimate_counts_state_snapshots_and_samples() {
        let mut worker = WorkerSpec::for_world(2);
        worker.model = ModelSpec::Preset("llama-124m".into());
        let sizes = ModelSizes::of(&worker.model).unwrap();
        let estimate = MemoryEstimate::of(&sizes, &worker, 2);
        assert_eq!(estimate.snapshot_bytes, 12 * sizes.parameters());
        assert!(estimate.state_bytes > 16 * sizes.parameters());
        assert_eq!(estimate.samples_in(estimate.total(5)), 5);
        assert_eq!(estimate.samples_in(0), 0);
        worker.activation_checkpointing = true;
        assert!(MemoryEstimate::of(&sizes, &worker, 2).sample_bytes * 3 < estimate.sample_bytes);
    }
}
