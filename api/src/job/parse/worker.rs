//! The built-in program's settings: the model, the batch, the optimizer's schedule, evaluation.
//!
//! Ranges that depend on each other (`warmup_steps` and `steps`) are checked against the value that holds, given or default.

use serde_json::Value;

use super::reader::Reader;
use super::values::{self, boolean, choice, integer, number, path};
use super::{BATCH_MAX, STEPS_MAX};
use crate::job::{Auto, BatchSize, EvaluationSpec, MODEL_PRESETS, ModelSpec, OnNan, Precision, WorkerSpec};
use crate::model::LlamaSizes;

const LEARNING_RATE_MAX: f64 = 1e6;
const WEIGHT_DECAY_MAX: f64 = 10.0;
const GRAD_NORM_MAX: f64 = 1e6;
const DROPOUT_MAX: f64 = 0.95;

/// `worker`; `None` when a command runs instead.
pub(super) fn worker(top: &mut Reader<'_, '_>, world_size: u32, has_command: bool) -> Option<WorkerSpec> {
    if has_command && top.get("worker").is_some() {
        top.fault("worker", "command and worker exclude each other: give the one that shall run".into());
    }
    let spec = top.object("worker", |fields| settings(fields, WorkerSpec::for_world(world_size), world_size));
    (!has_command).then_some(spec)
}

fn settings(fields: &mut Reader<'_, '_>, defaults: WorkerSpec, world_size: u32) -> WorkerSpec {
    let steps = fields.read_or("steps", defaults.steps, |v| integer(v, 1, STEPS_MAX));
    let batch_size = batch_size(fields, world_size, defaults.batch_size);
    let batch_most = if let BatchSize::Samples(samples) = batch_size { samples.max(1) } else { BATCH_MAX };
    let learning_rate = fields.read_or("learning_rate", defaults.learning_rate, |v| number(v, f64::MIN_POSITIVE, LEARNING_RATE_MAX));
    WorkerSpec {
        model: model(fields, defaults.model),
        data: fields.read("data", path),
        steps,
        batch_size,
        micro_batch_size: fields.read("micro_batch_size", |v| integer(v, 1, batch_most)),
        sequence_length: fields.read_or("sequence_length", u64::from(defaults.sequence_length), |v| integer(v, 8, 8192)) as u32,
        learning_rate,
        warmup_steps: fields.read("warmup_steps", |v| integer(v, 0, steps)),
        min_learning_rate: fields.read("min_learning_rate", |v| number(v, 0.0, learning_rate)),
        weight_decay: fields.read_or("weight_decay", defaults.weight_decay, |v| number(v, 0.0, WEIGHT_DECAY_MAX)),
        max_grad_norm: fields.read_or("max_grad_norm", defaults.max_grad_norm, |v| number(v, 0.0, GRAD_NORM_MAX)),
        dropout: fields.read_or("dropout", defaults.dropout, |v| number(v, 0.0, DROPOUT_MAX)),
        precision: fields
            .read_or("precision", defaults.precision, |v| choice(v, &[("float32", Precision::Float32), ("bfloat16", Precision::Bfloat16)])),
        activation_checkpointing: fields.read_or("activation_checkpointing", defaults.activation_checkpointing, boolean),
        on_nan: fields.read_or("on_nan", defaults.on_nan, |v| choice(v, &[("stop", OnNan::Stop), ("skip", OnNan::Skip)])),
        evaluation: fields.object("evaluation", evaluation),
        seed: fields.read_or("seed", defaults.seed, |v| integer(v, 0, u64::MAX)),
        device: fields.read_or("device", defaults.device, values::device),
        deterministic: fields.read_or("deterministic", defaults.deterministic, boolean),
    }
}

fn model(fields: &mut Reader<'_, '_>, default: ModelSpec) -> ModelSpec {
    match fields.get("model") {
        None => default,
        Some(Value::Object(_)) => fields.object("model", sizes).map_or(default, ModelSpec::Sizes),
        Some(Value::String(name)) if MODEL_PRESETS.contains(&name.as_str()) => ModelSpec::Preset(name.clone()),
        Some(_) => {
            let names = MODEL_PRESETS.map(|name| format!("\"{name}\"")).join(", ");
            fields.fault(
                "model",
                format!(
                    "must be one of {names}, or sizes like {{\"dim\": 128, \"layers\": 4, \"heads\": 4, \"kv_heads\": 2, \"hidden\": 448}}"
                ),
            );
            default
        }
    }
}

/// Sizes in full; `None` when one is missing or wrong.
fn sizes(fields: &mut Reader<'_, '_>) -> Option<LlamaSizes> {
    let mut numbers = [None; 5];
    for ((name, most), number) in LlamaSizes::MOST.into_iter().zip(&mut numbers) {
        if fields.get(name).is_none() {
            fields.fault(name, format!("must be given, from 1 to {most}"));
        }
        *number = fields.read(name, |v| integer(v, 1, most));
    }
    let [dim, layers, heads, kv_heads, hidden] = numbers;
    let sizes = LlamaSizes { dim: dim?, layers: layers?, heads: heads?, kv_heads: kv_heads?, hidden: hidden? };
    let faults = sizes.faults();
    for (name, detail) in &faults {
        fields.fault(name, detail.clone());
    }
    faults.is_empty().then_some(sizes)
}

fn batch_size(fields: &mut Reader<'_, '_>, world_size: u32, default: BatchSize) -> BatchSize {
    let given = fields.read("batch_size", |v| match v.as_str() {
        Some("auto") => Ok(BatchSize::Auto(Auto::Auto)),
        Some(_) => Err(format!("must be a whole number from {world_size} to {BATCH_MAX}, or \"auto\"")),
        None => integer(v, 1, BATCH_MAX).map(BatchSize::Samples),
    });
    if let Some(BatchSize::Samples(samples)) = given
        && samples < u64::from(world_size)
    {
        fields.fault("batch_size", format!("is over all ranks, so it must be at least world_size ({world_size})"));
        return default;
    }
    given.unwrap_or(default)
}

fn evaluation(fields: &mut Reader<'_, '_>) -> EvaluationSpec {
    EvaluationSpec {
        every_steps: fields.read_or("every_steps", 0, |v| integer(v, 0, STEPS_MAX)),
        samples: fields.read_or("samples", 0, |v| integer(v, 0, BATCH_MAX)),
        data: fields.read("data", path),
    }
}
