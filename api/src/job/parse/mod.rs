//! The one door for a job from outside: a walk of our own over the JSON that names every fault at once (serde stops at the first).
//!
//! A field that this build can not honour is refused as `not_supported`, never accepted and ignored; a value that asks for nothing
//! (`spares: 0`) passes. `null` means "not given". The trap: a new field of [`JobSpec`] must be read here, or the round-trip test fails.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{CheckpointPolicy, DataSpec, JobKind, JobSpec, Priority, WORLD_SIZE_MAX, WorkerSpec};
use crate::ids::JobId;
use crate::time::Millis;

mod environment;
mod policies;
mod reader;
#[cfg(test)]
mod tests;
mod values;

use reader::Reader;
use values::{choice, duration, integer, path};

/// Faults named at most; a body with more of them is told so.
const FAULTS_MAX: usize = 100;
/// Characters of a path at most.
const PATH_BYTES_MAX: usize = 4096;
/// Arguments of a command at most.
const ARGS_MAX: usize = 4096;
/// Bytes of one argument or variable at most: what Linux takes (`MAX_ARG_STRLEN`).
const ARG_BYTES_MAX: usize = 128 * 1024 - 1;
const LABELS_MAX: usize = 64;
const LABEL_KEY_CHARS_MAX: usize = 63;
const LABEL_VALUE_CHARS_MAX: usize = 256;
const SHARDS_MAX: usize = 65_536;
const STEPS_MAX: u64 = 1_000_000_000_000;
const BATCH_MAX: u64 = 1_000_000_000;
const DAY: Millis = Millis::secs(86_400);
const CENTURY: Millis = Millis::secs(36_500 * 86_400);

/// One fault of a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// JSON pointer (RFC 6901) to the value.
    pub pointer: String,
    /// What is wrong and what would be right.
    pub detail: String,
    /// Whether it is wrong or only not built.
    #[serde(skip, default)]
    pub kind: FaultKind,
}

/// Whether a value is wrong or only not built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FaultKind {
    /// Wrong whatever is built.
    #[default]
    Invalid,
    /// Right, but this build can not do it.
    NotSupported,
}

/// Reads a job, fills in every default, and names all faults at once.
pub fn parse(body: &Value) -> Result<JobSpec, Vec<Fault>> {
    let Some(map) = body.as_object() else {
        let detail = format!("must be an object like {{\"world_size\": 4}}, not {}", values::what(body));
        return Err(vec![Fault { pointer: String::new(), detail, kind: FaultKind::Invalid }]);
    };
    let mut faults = Vec::new();
    let spec = job(Reader::new(map, "", &mut faults));
    if faults.is_empty() { Ok(spec) } else { Err(faults) }
}

fn job(mut top: Reader<'_, '_>) -> JobSpec {
    let world_size = top.read_or("world_size", 1, |v| integer(v, 1, u64::from(WORLD_SIZE_MAX))) as u32;
    elastic(&mut top, world_size);
    let name = top.read("name", values::name);
    let labels = top.map("labels", LABELS_MAX, values::label_key, values::label_value);
    let kind = kind(&mut top);
    let priority = top.read_or("priority", Priority::Normal, |v| {
        choice(v, &[("low", Priority::Low), ("normal", Priority::Normal), ("high", Priority::High), ("critical", Priority::Critical)])
    });
    let resume_from = top.read("resume_from", resume_from);
    let command = environment::command(&mut top);
    let worker = worker(&mut top, world_size, command.is_some());
    let (env, secrets) = environment::variables(&mut top);
    let workdir = top.read("workdir", path);
    let log_metrics = policies::log_metrics(&mut top);
    let resources = top.object("resources", policies::resources);
    let restart = top.object("restart", policies::restart);
    let heartbeat = top.object("heartbeat", policies::heartbeat);
    let checkpoint = top.object("checkpoint", checkpoint);
    let data = top.object("data", |data| DataSpec { shards: data.list("shards", SHARDS_MAX, path).unwrap_or_default() });
    let stop_grace = top.read_or("stop_grace", super::default_stop_grace(), |v| duration(v, Millis(0), DAY));
    let time_limit = top.read("time_limit", |v| duration(v, Millis::secs(1), CENTURY));
    top.not_built("image", |_| false, "containers are not built: give a command that is installed on the nodes");
    for field in ["replicas", "engine", "model", "port", "health", "autoscale"] {
        top.not_built(field, |_| false, "belongs to kind serve, which is not built");
    }
    top.not_built("log_policies", |v| v.as_array().is_some_and(Vec::is_empty), "policies over log lines are not built");
    top.finish();
    JobSpec {
        name,
        labels,
        kind,
        priority,
        world_size,
        resume_from,
        worker,
        command: command.unwrap_or_default(),
        env,
        secrets,
        workdir,
        log_metrics,
        resources,
        restart,
        heartbeat,
        checkpoint,
        data,
        stop_grace,
        time_limit,
    }
}

fn elastic(top: &mut Reader<'_, '_>, world_size: u32) {
    if let Some(least) = top.read("min_world_size", |v| integer(v, 1, u64::from(WORLD_SIZE_MAX))) {
        if least > u64::from(world_size) {
            top.fault("min_world_size", format!("is more than world_size ({world_size})"));
        } else if least < u64::from(world_size) {
            top.refuse("min_world_size", format!("elastic jobs are not built: leave it out or set it to world_size ({world_size})"));
        }
    }
}

fn kind(top: &mut Reader<'_, '_>) -> JobKind {
    match top.get("kind").map(|v| v.as_str().unwrap_or_default()) {
        None | Some("train") => {}
        Some(other @ ("serve" | "evaluate" | "preprocess")) => top.refuse("kind", format!("kind {other} is not built: only \"train\" is")),
        Some(_) => top.fault("kind", "must be \"train\"".into()),
    }
    JobKind::Train
}

fn resume_from(value: &Value) -> Result<String, String> {
    let text = values::text(value, PATH_BYTES_MAX)?;
    if text.parse::<JobId>().is_ok() {
        return Ok(text.into());
    }
    path(value).map_err(|_| "must be a job id (26 lower-case characters) or an absolute path without `..`".into())
}

fn worker(top: &mut Reader<'_, '_>, world_size: u32, has_command: bool) -> Option<WorkerSpec> {
    if has_command && top.get("worker").is_some() {
        top.fault("worker", "command and worker exclude each other: give the one that shall run".into());
    }
    let defaults = WorkerSpec::for_world(world_size);
    let spec = top.object("worker", |worker| {
        let steps = worker.read_or("steps", defaults.steps, |v| integer(v, 1, STEPS_MAX));
        WorkerSpec {
            model: worker.read_or("model", defaults.model, values::model),
            data: worker.read("data", path),
            steps,
            batch_size: batch_size(worker, world_size, defaults.batch_size),
            sequence_length: worker.read_or("sequence_length", u64::from(defaults.sequence_length), |v| integer(v, 8, 8192)) as u32,
            learning_rate: worker.read_or("learning_rate", defaults.learning_rate, |v| values::number(v, f64::MIN_POSITIVE, 1e6)),
            seed: worker.read_or("seed", defaults.seed, |v| integer(v, 0, u64::MAX)),
            device: worker.read_or("device", defaults.device, values::device),
            deterministic: worker.read_or("deterministic", defaults.deterministic, values::boolean),
        }
    });
    (!has_command).then_some(spec)
}

fn batch_size(worker: &mut Reader<'_, '_>, world_size: u32, default: u64) -> u64 {
    if worker.get("batch_size").and_then(Value::as_str) == Some("auto") {
        worker.refuse("batch_size", "choosing a batch size is not built: give a number".into());
        return default;
    }
    let size = worker.read_or("batch_size", default, |v| integer(v, 1, BATCH_MAX));
    if size < u64::from(world_size) {
        worker.fault("batch_size", format!("is over all ranks, so it must be at least world_size ({world_size})"));
    }
    size
}

fn checkpoint(fields: &mut Reader<'_, '_>) -> CheckpointPolicy {
    let defaults = CheckpointPolicy::default();
    fields.not_built("every", |_| false, "checkpoints by time are not built: use checkpoint.every_steps");
    fields.not_built("to", |_| false, "checkpoints go to the node's data folder; object storage is not built");
    CheckpointPolicy {
        every_steps: fields.read_or("every_steps", defaults.every_steps, |v| integer(v, 1, STEPS_MAX)),
        keep: fields.read_or("keep", u64::from(defaults.keep), |v| integer(v, 1, 1000)) as u32,
    }
}
