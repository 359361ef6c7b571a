//! The one door for a job from outside: a walk of our own over the JSON that names every fault at once (serde stops at the first).
//!
//! A field that this build can not honour is refused as `not_supported`, never accepted and ignored; a value that asks for nothing
//! (`spares: 0`) passes. `null` means "not given". The trap: a new field of [`JobSpec`] must be read here, or the round-trip test fails.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Auto, CheckpointInterval, CheckpointPolicy, DataSpec, JobKind, JobSpec, LogArchive, Priority, RestartScope, WORLD_SIZE_MAX};
use crate::data::{SHARDS_MAX, ShardSource};
use crate::ids::JobId;
use crate::store::Place;
use crate::time::Millis;

mod environment;
mod nodes;
mod policies;
mod reader;
#[cfg(test)]
mod tests;
mod values;
mod worker;

use reader::Reader;
use values::{boolean, choice, duration, integer, path};

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
const TOLERATIONS_MAX: usize = 64;
const STEPS_MAX: u64 = 1_000_000_000_000;
/// Copies of a checkpoint at most: each is on a node of its own.
const COPIES_MAX: u64 = 4;
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
    let name = top.read("name", values::name);
    let labels = top.map("labels", LABELS_MAX, values::label_key, values::label_value);
    let kind = kind(&mut top);
    let priority = top.read_or("priority", Priority::Normal, |v| {
        choice(v, &[("low", Priority::Low), ("normal", Priority::Normal), ("high", Priority::High), ("critical", Priority::Critical)])
    });
    let resume_from = top.read("resume_from", resume_from);
    let command = environment::command(&mut top);
    let worker = worker::worker(&mut top, world_size, command.is_some());
    if kind == JobKind::Evaluate {
        evaluate(&mut top);
    }
    if kind == JobKind::Preprocess {
        preprocess(&mut top, command.as_deref());
    }
    let (env, secrets) = environment::variables(&mut top);
    let package = top.read("package", values::package);
    if package.is_some() && command.is_none() {
        top.fault("package", "goes with a command: the built-in program has no use for a folder".into());
    }
    let is_packed = top.get("package").is_some();
    let workdir = top.read("workdir", if is_packed { values::path_within } else { path });
    let log_metrics = policies::log_metrics(&mut top);
    let log_policies = policies::log_policies(&mut top);
    let resources = top.object("resources", policies::resources);
    let (node_selector, tolerations) = nodes::nodes(&mut top);
    let in_place = kind == JobKind::Train && command.is_none() && world_size > 1;
    let mut restart = top.object("restart", |fields| policies::restart(fields, in_place, command.is_some()));
    if kind == JobKind::Preprocess && restart.scope == RestartScope::Auto {
        restart.scope = RestartScope::Rank;
    }
    let min_world_size = elastic(&mut top, world_size, in_place && restart.scope != RestartScope::Gang);
    let heartbeat = top.object("heartbeat", policies::heartbeat);
    let checkpoint = top.object("checkpoint", checkpoint);
    let logs = top.object("logs", |fields| LogArchive { to: fields.read("to", place) });
    let data = top.object("data", |fields| data(fields, kind, command.as_deref()));
    let stop_grace = top.read_or("stop_grace", super::default_stop_grace(), |v| duration(v, Millis(0), DAY));
    let time_limit = top.read("time_limit", |v| duration(v, Millis::secs(1), CENTURY));
    top.not_built("image", |_| false, "containers are not built: give a command that is installed on the nodes");
    for field in ["replicas", "engine", "model", "port", "health", "autoscale"] {
        top.not_built(field, |_| false, "belongs to kind serve, which is not built");
    }
    top.finish();
    JobSpec {
        name,
        labels,
        kind,
        priority,
        world_size,
        min_world_size,
        resume_from,
        worker,
        command: command.unwrap_or_default(),
        env,
        secrets,
        workdir,
        package,
        log_metrics,
        log_policies,
        resources,
        node_selector,
        tolerations,
        restart,
        heartbeat,
        checkpoint,
        logs,
        data,
        stop_grace,
        time_limit,
    }
}

/// `in_place`: its ranks can go on without a lost one.
fn elastic(top: &mut Reader<'_, '_>, world_size: u32, in_place: bool) -> Option<u32> {
    let least = top.read("min_world_size", |v| integer(v, 1, u64::from(WORLD_SIZE_MAX)))? as u32;
    if least > world_size {
        top.fault("min_world_size", format!("is more than world_size ({world_size})"));
    } else if least < world_size && !in_place {
        top.fault(
            "min_world_size",
            format!("below world_size ({world_size}) needs the built-in training program, which goes on without a lost rank, and a restart.scope other than \"gang\""),
        );
    }
    (least < world_size).then_some(least)
}

fn kind(top: &mut Reader<'_, '_>) -> JobKind {
    match top.get("kind").map(|v| v.as_str().unwrap_or_default()) {
        None | Some("train") => {}
        Some("evaluate") => return JobKind::Evaluate,
        Some("preprocess") => return JobKind::Preprocess,
        Some("serve") => {
            top.refuse("kind", "kind serve is not built: only \"train\", \"evaluate\" and \"preprocess\" are".into());
        }
        Some(_) => top.fault("kind", "must be \"train\", \"evaluate\" or \"preprocess\"".into()),
    }
    JobKind::Train
}

/// Bytes, from a text like "2Gi".
pub fn size(text: &str) -> Result<u64, String> {
    values::size(&Value::from(text))
}

/// What is measured must be named, and only the built-in program measures.
fn evaluate(top: &mut Reader<'_, '_>) {
    if top.get("command").is_some() {
        top.fault("command", "kind evaluate runs the built-in program: leave command out, or make it kind train".into());
    }
    if top.get("resume_from").is_none() {
        top.fault("resume_from", "kind evaluate needs it: the id of the job, or the path of the checkpoint, that is to be measured".into());
    }
}

/// In a command that is run for each shard: where it reads, and where it writes.
pub const INPUT: &str = "{input}";
/// See [`INPUT`].
pub const OUTPUT: &str = "{output}";

/// What runs for each shard, from where and to where must all be said.
fn preprocess(top: &mut Reader<'_, '_>, command: Option<&[String]>) {
    let has = |word: &str| command.is_some_and(|command| command.iter().any(|argument| argument.contains(word)));
    if command.is_none() {
        let why = format!(
            "kind preprocess needs it: a program for each shard, with {INPUT} and {OUTPUT}, or one that goes through EVERLIT_DATA_SHARDS"
        );
        top.fault("command", why);
    } else if has(INPUT) != has(OUTPUT) {
        let (one, other) = if has(INPUT) { (INPUT, OUTPUT) } else { (OUTPUT, INPUT) };
        top.fault("command", format!("has {one} and no {other}: a program that runs for each shard needs both"));
    }
    if top.get("resume_from").is_some() {
        top.fault("resume_from", "kind preprocess has no checkpoints, and never does again what is in data.to: leave it out".into());
    }
    for (field, words) in [
        ("shards", "what is to be read, in a store, like [\"s3://bucket/text/\"]"),
        ("to", "where outputs go, like \"s3://bucket/tokens\""),
    ] {
        if top.get("data").is_none_or(|data| data.get(field).is_none_or(Value::is_null)) {
            top.fault_in("data", field, format!("kind preprocess needs it: {words}"));
        }
    }
}

fn resume_from(value: &Value) -> Result<String, String> {
    let text = values::text(value, PATH_BYTES_MAX)?;
    if text.parse::<JobId>().is_ok() {
        return Ok(text.into());
    }
    if Place::is_url(text) {
        return text.parse::<Place>().map(|place| place.to_string());
    }
    path(value).map_err(|_| "must be a job id (26 lower-case characters), an absolute path without `..`, or a place in a store".into())
}

/// No command: the built-in program reads it.
fn data(fields: &mut Reader<'_, '_>, kind: JobKind, command: Option<&[String]>) -> DataSpec {
    let ours = command.is_none();
    let shards = fields.list("shards", SHARDS_MAX, shard).unwrap_or_default();
    let is_stored = shards.first().is_some_and(|shard| Place::is_url(shard));
    if shards.iter().any(|shard| Place::is_url(shard) != is_stored) {
        fields.fault("shards", "must be all files of the nodes, or all in stores (file:///folder/ reads a shared folder as one)".into());
    } else if kind == JobKind::Preprocess && !is_stored && !shards.is_empty() {
        fields.fault("shards", "kind preprocess reads from stores, which may be a shared folder like \"file:///mnt/text/\"".into());
    }
    let stream = fields.read("stream", boolean);
    if !is_stored && stream == Some(true) {
        fields.fault("stream", "is for shards in a store: files of the nodes are there already".into());
    }
    let each = kind == JobKind::Preprocess && command.is_some_and(|command| command.iter().any(|argument| argument.contains(INPUT)));
    if is_stored && stream == Some(false) {
        if ours {
            fields.fault("stream", "the built-in program always asks for shards as it goes: leave it out".into());
        } else if each {
            fields.fault("stream", format!("a command with {INPUT} has its shards one by one: leave it out"));
        }
    }
    let fallback = fields.read("fallback", path);
    if !is_stored && fallback.is_some() {
        fields.fault("fallback", "is for shards in a store: leave it out, or give data.shards like \"s3://bucket/text/\"".into());
    }
    let to = fields.read("to", place);
    if to.is_some() && kind != JobKind::Preprocess {
        fields.fault("to", "is for kind preprocess: leave it out".into());
    }
    DataSpec { shards, stream: is_stored && stream.unwrap_or(ours || each), fallback, to }
}

fn shard(value: &Value) -> Result<String, String> {
    let text = values::text(value, PATH_BYTES_MAX)?;
    if Place::is_url(text) {
        return text.parse::<ShardSource>().map(|source| source.to_string());
    }
    path(value).map_err(|why| format!("{why}, or be in a store, like \"s3://bucket/text/\" or \"s3://bucket/text/*.txt\""))
}

fn place(value: &Value) -> Result<Place, String> {
    values::text(value, PATH_BYTES_MAX)?.parse()
}

fn checkpoint(fields: &mut Reader<'_, '_>) -> CheckpointPolicy {
    let defaults = CheckpointPolicy::default();
    let to = fields.read("to", place);
    // What a job shows of itself is taken again.
    if fields.get("to").is_none() && fields.get("keep_stored").is_some_and(|keep| *keep != defaults.keep_stored) {
        fields.fault("keep_stored", "is for checkpoint.to: give that too, or leave this out".into());
    }
    let every = fields.read("every", |v| match v.as_str() {
        Some("auto") => Ok(CheckpointInterval::Auto(Auto::Auto)),
        _ => duration(v, Millis::secs(1), DAY).map(CheckpointInterval::Time).map_err(|why| format!("{why}, or \"auto\"")),
    });
    let by_time = fields.get("every").is_some();
    let every_steps = fields.read("every_steps", |v| integer(v, 0, STEPS_MAX));
    if every_steps == Some(0) && !by_time {
        fields.fault("every_steps", "0 means by time only: give checkpoint.every too, or a number of steps".into());
    }
    CheckpointPolicy {
        every_steps: every_steps.unwrap_or(if by_time { 0 } else { defaults.every_steps }),
        every,
        keep: fields.read_or("keep", u64::from(defaults.keep), |v| integer(v, 1, 1000)) as u32,
        copies: fields.read_or("copies", u64::from(defaults.copies), |v| integer(v, 0, COPIES_MAX)) as u32,
        keep_stored: fields.read_or("keep_stored", u64::from(defaults.keep_stored), |v| integer(v, 1, 1000)) as u32,
        to,
    }
}
