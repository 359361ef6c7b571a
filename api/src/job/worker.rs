//! The settings of the built-in program: what it trains, on what, and how.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::model::LlamaSizes;

/// The built-in program's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct WorkerSpec {
    /// A preset's name, like `llama-1m` or `mlp-10k`, or sizes in full.
    pub model: ModelSpec,
    /// A text file or a folder of `*.txt`; null for the sample text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Optimizer updates in all.
    pub steps: u64,
    /// Samples per update over all ranks, at least the world size; or `"auto"`: as many as fit in memory.
    pub batch_size: BatchSize,
    /// Samples per forward pass of one rank; more of them are accumulated. Null: all of a rank's samples at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<u64>,
    /// Bytes of text per sample.
    pub sequence_length: u32,
    /// AdamW's peak learning rate.
    pub learning_rate: f64,
    /// Updates over which the rate rises linearly; null: a tenth of `steps`, at most 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Where the cosine ends; null: a tenth of `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_learning_rate: Option<f64>,
    /// AdamW's decoupled decay of matrices; vectors (norms, biases) have none.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm, taken over all parameters; 0 leaves them as they are.
    pub max_grad_norm: f64,
    /// Share of activations dropped in training, from 0 to below 1.
    pub dropout: f64,
    /// What matrices are multiplied in; weights, sums and the optimizer stay in float32.
    pub precision: Precision,
    /// Keep only each layer's input and compute the layer again in the backward pass: less memory, about a third more time.
    pub activation_checkpointing: bool,
    /// What happens at a loss or gradient that is not finite.
    pub on_nan: OnNan,
    /// Passes over held-out text.
    pub evaluation: EvaluationSpec,
    /// Seed of every random number.
    pub seed: u64,
    /// Where tensors live.
    pub device: Device,
    /// Ask for the same bits on every run (always so on a CPU).
    pub deterministic: bool,
}

impl Default for WorkerSpec {
    fn default() -> Self {
        Self::for_world(1)
    }
}

impl WorkerSpec {
    /// The defaults for a job of `world_size` ranks: about 1M parameters, 2,000 steps.
    pub fn for_world(world_size: u32) -> Self {
        Self {
            model: ModelSpec::Preset("llama-1m".into()),
            data: None,
            steps: 2_000,
            batch_size: BatchSize::Samples(8 * u64::from(world_size)),
            micro_batch_size: None,
            sequence_length: 128,
            learning_rate: 3e-3,
            warmup_steps: None,
            min_learning_rate: None,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
            dropout: 0.0,
            precision: Precision::Float32,
            activation_checkpointing: false,
            on_nan: OnNan::Stop,
            evaluation: EvaluationSpec::default(),
            seed: 0,
            device: Device::Auto,
            deterministic: false,
        }
    }
}

/// Which model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum ModelSpec {
    /// One of [`MODEL_PRESETS`](crate::model::MODEL_PRESETS).
    Preset(String),
    /// A decoder transformer in full.
    Sizes(LlamaSizes),
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Auto {
    /// Chosen by everlit.
    #[serde(rename = "auto")]
    Auto,
}

/// Samples per update over all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum BatchSize {
    /// So many.
    Samples(u64),
    /// The largest power of two per rank that fits in its memory; a resumed job keeps what it began with.
    Auto(Auto),
}

/// What matrices are multiplied in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    Float32,
    /// 16-bit floats with float32's range.
    Bfloat16,
}

/// What happens at a loss or gradient that is not finite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNan {
    /// The job fails, with step and rank; it is not started again.
    #[default]
    Stop,
    /// That update is left out and counted in the metric `skipped_steps`.
    Skip,
}

/// Passes over held-out text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct EvaluationSpec {
    /// Updates between passes; 0: none. One more follows the last update.
    pub every_steps: u64,
    /// Samples per pass; 0: 256.
    pub samples: u64,
    /// A text file or a folder of `*.txt`; null: the last samples of the training text, which training then leaves out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

/// Where tensors live.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// A GPU each if every rank can have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU each.
    Cuda,
}
