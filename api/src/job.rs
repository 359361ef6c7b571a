//! The job as submitted, with every default filled in. [`parse`] is the one door: it reads JSON and names all faults at once.
//!
//! Field names and defaults are CONTRACT section 5. What is not built yet has no field here and is refused by `parse` with `not_supported`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::JobId;
pub use crate::model::MODEL_PRESETS;
use crate::rank::Cause;
use crate::store::Place;
use crate::time::Millis;

mod inherit;
mod parse;
mod policy;
mod worker;
pub use inherit::{inherit, resumes};
pub use parse::{Fault, FaultKind, INPUT, OUTPUT, parse, size};
pub use policy::{LogAction, LogPolicy};
pub use worker::{Auto, BatchSize, Device, EvaluationSpec, ModelSpec, OnNan, Precision, WorkerSpec};

/// Ranks of one job at most.
pub const WORLD_SIZE_MAX: u32 = 65_536;
/// Characters of a job's name at most.
pub const NAME_CHARS_MAX: usize = 128;
/// Bytes of a request body at most.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;

/// Whether this is how a package is named: the 64 lower-case hexadecimal digits of a sha256.
pub fn is_package(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// What a user submitted, complete: everything that decides how the job runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobSpec {
    /// For people; several jobs may share one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// For filters.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What kind of work.
    #[serde(default)]
    pub kind: JobKind,
    /// Order in the queue: higher first, then older first.
    #[serde(default)]
    pub priority: Priority,
    /// Ranks.
    pub world_size: u32,
    /// When lower than `world_size`: the gang goes on with so many ranks at least while a lost one's successor starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_world_size: Option<u32>,
    /// A job id or a checkpoint's path to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_from: Option<String>,
    /// The built-in program's settings; null when `command` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerSpec>,
    /// Program and arguments of each rank; empty when the built-in program runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Added to each rank's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Added to each rank's environment and never shown again. In answers the values are `"***"`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, String>,
    /// Folder that each rank starts in: one of the node, or with `package` one in that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// A packed folder that was uploaded (`PUT /packages/{package}`), by its sha256: each node unpacks it once for the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// How to read progress from the output of a program without heartbeats; empty means the defaults.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_metrics: Vec<LogMetric>,
    /// What follows a failure when the failed rank's last output has a line that matches; the first in the list counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_policies: Vec<LogPolicy>,
    /// What each rank reserves.
    #[serde(default)]
    pub resources: Resources,
    /// Only nodes that have all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that do not keep it off.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// What happens when a rank fails.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// When a rank counts as silent.
    #[serde(default)]
    pub heartbeat: HeartbeatPolicy,
    /// When state is saved and how much is kept.
    #[serde(default)]
    pub checkpoint: CheckpointPolicy,
    /// Where logs and post-mortems go when an attempt ends.
    #[serde(default)]
    pub logs: LogArchive,
    /// Data shards, assigned round-robin to the ranks.
    #[serde(default)]
    pub data: DataSpec,
    /// From SIGTERM to SIGKILL at a stop.
    #[serde(default = "default_stop_grace")]
    pub stop_grace: Millis,
    /// Time in `starting`, `running` and `recovering` after which the job fails; null for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit: Option<Millis>,
}

/// CONTRACT: 30 s.
pub fn default_stop_grace() -> Millis {
    Millis::secs(30)
}

/// What kind of work a job is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// A gang that runs to its end.
    #[default]
    Train,
    /// The built-in program measures a checkpoint (`resume_from`) on held-out text and ends.
    Evaluate,
    /// Independent ranks over the shards of `data.shards`: each shard gives one output in `data.to`.
    Preprocess,
}

/// Order in the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// After everything else.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Before normal.
    High,
    /// Before everything else.
    Critical,
}

/// A pattern that reads one number from a line of output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogMetric {
    /// A regular expression; its first capture group (or one named `value`) is the number.
    pub pattern: String,
    /// Where it goes: `step`, `total_steps`, `loss`, `samples`, or any name for a metric.
    pub field: String,
}

/// What each rank reserves. Nothing by default: a node then takes a bounded number of ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// CPUs, fractions allowed.
    #[serde(default)]
    pub cpus: f64,
    /// Bytes of memory.
    #[serde(default)]
    pub memory: u64,
    /// Whole GPUs.
    #[serde(default)]
    pub gpus: u32,
    /// Bytes of GPU memory: without `gpus` a part of one GPU, which others may share; with it what each GPU must have.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gpu_memory: u64,
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// A taint that does not keep the job off.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// The taint's value; null for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

/// What happens when a rank fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct RestartPolicy {
    /// Counted restarts in the job's life.
    pub max_restarts: u32,
    /// Consecutive failures without a new step.
    pub max_start_failures: u32,
    /// Wait before a restart.
    pub backoff: Backoff,
    /// How much is restarted.
    pub scope: RestartScope,
    /// Started ranks that wait to take a lost one's place, 0 to 64; only of the built-in training program.
    pub spares: u32,
    /// Committed progress over this time forgives counted restarts.
    pub heal_after: Millis,
    /// Exit codes that end the job at once.
    pub no_retry_exit_codes: Vec<i32>,
    /// What is done about a failure, by its cause; `restart` where nothing is said.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub on: BTreeMap<Cause, FailureAction>,
}

/// What is done about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureAction {
    /// The cheapest rung of recovery that holds, as the budget allows.
    Restart,
    /// The job fails.
    Fail,
    /// An event tells of it, with the ranks' stacks, and nothing is done; only for what is concluded of ranks that live.
    Alert,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            max_restarts: 50,
            max_start_failures: 5,
            backoff: Backoff::default(),
            scope: RestartScope::Auto,
            spares: 0,
            heal_after: Millis::secs(600),
            no_retry_exit_codes: vec![78],
            on: BTreeMap::new(),
        }
    }
}

/// Exponential backoff: `initial · factor^n`, at most `max`, spread by ± `jitter`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Backoff {
    /// First wait.
    pub initial: Millis,
    /// Growth per consecutive failure without a new step.
    pub factor: f64,
    /// Longest wait before jitter.
    pub max: Millis,
    /// Fraction of the wait, 0 to 1.
    pub jitter: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial: Millis(500), factor: 2.0, max: Millis::secs(30), jitter: 0.2 }
    }
}

/// How much is restarted when a rank fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartScope {
    /// The cheapest rung that holds: in place where the built-in program trains, else the gang.
    #[default]
    Auto,
    /// All ranks, from the newest snapshot or verified checkpoint.
    Gang,
    /// The rank that failed, and no other, for a command whose ranks do not need each other.
    Rank,
    /// As `auto`, and refused for what can not recover in place.
    InPlace,
}

/// When a rank counts as silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct HeartbeatPolicy {
    /// Longest time without a new `seq`.
    pub timeout: Millis,
    /// Longest time from start to the first heartbeat or line of output.
    pub startup_timeout: Millis,
    /// Longest time without output and CPU time for programs without heartbeats; null: 5 min for gangs, none for one rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Millis>,
    /// Longest time without a new step or phase; null: learned from the job so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_timeout: Option<Millis>,
    /// The program must write heartbeats: output alone is no sign of life.
    pub required: bool,
}

impl Default for HeartbeatPolicy {
    fn default() -> Self {
        Self { timeout: Millis::secs(10), startup_timeout: Millis::secs(120), idle_timeout: None, progress_timeout: None, required: false }
    }
}

/// When state is saved and how much is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CheckpointPolicy {
    /// Steps between checkpoints of the built-in program; 0: by time only.
    pub every_steps: u64,
    /// Time between them, or `"auto"`: from the measured cost of saving and the job's failure rate (Young and Daly). Whichever comes first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<CheckpointInterval>,
    /// Checkpoints kept, the newest verified always among them.
    pub keep: u32,
    /// Other nodes that are to have the newest verified one, too (0 to 4).
    pub copies: u32,
    /// A store that gets each newest verified one, in a folder of the job: `s3://bucket/prefix`, `gs://…`, `az://…`, or a folder that the
    /// nodes share, which must exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub to: Option<Place>,
    /// Checkpoints kept in the store.
    pub keep_stored: u32,
}

impl Default for CheckpointPolicy {
    fn default() -> Self {
        Self { every_steps: 50, every: None, keep: 3, copies: 1, to: None, keep_stored: 3 }
    }
}

/// Where logs and post-mortems go when an attempt ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LogArchive {
    /// A store that gets them, in a folder of the job; `checkpoint.to` where this is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub to: Option<Place>,
}

/// Time between checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum CheckpointInterval {
    /// Chosen while the job runs.
    Auto(Auto),
    /// So long.
    Time(Millis),
}

/// Data shards, assigned round-robin to the ranks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DataSpec {
    /// In order: paths of files on the nodes, or what a store has: an object (`s3://bucket/a.txt`), everything below a prefix
    /// (`s3://bucket/text/`), or what matches in one (`s3://bucket/text/*.txt`). A store is listed once, when the job first starts, and what
    /// was listed is what is read for as long as it lives.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<String>,
    /// A command asks for shards of a store as it goes (`EVERLIT_SHARD_FEED`); else they are all on the node before it starts. The built-in
    /// program always asks as it goes.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// Absolute path of a folder of the nodes that has the same files under the same names: read while the store can not be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Kind preprocess: where outputs go, each named after its shard, as `<to>/<job id>/shards/<number>-<name>…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub to: Option<Place>,
}

impl DataSpec {
    /// The shards' sources, when they are in a store.
    pub fn sources(&self) -> Option<Vec<crate::data::ShardSource>> {
        if !self.is_stored() {
            return None;
        }
        self.shards.iter().map(|shard| shard.parse().ok()).collect()
    }

    /// Whether the shards are in a store, and not files of the nodes.
    pub fn is_stored(&self) -> bool {
        self.shards.first().is_some_and(|shard| Place::is_url(shard))
    }
}

impl Default for JobSpec {
    fn default() -> Self {
        Self::default_for(1)
    }
}

impl JobSpec {
    /// The folder of this job in the store that has its logs and post-mortems, if it has one.
    pub fn archive(&self, id: JobId) -> Option<Place> {
        Some(self.logs.to.as_ref().or(self.checkpoint.to.as_ref())?.join(&id.to_string()))
    }

    /// What its processes are given, secrets too: what reaches and opens its stores is among them.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut all = self.env.clone();
        all.extend(self.secrets.clone());
        all
    }

    /// `{"world_size": N}` and nothing else.
    pub fn default_for(world_size: u32) -> Self {
        Self {
            name: None,
            labels: BTreeMap::new(),
            kind: JobKind::Train,
            priority: Priority::Normal,
            world_size,
            min_world_size: None,
            resume_from: None,
            worker: Some(WorkerSpec::for_world(world_size)),
            command: Vec::new(),
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            workdir: None,
            package: None,
            log_metrics: Vec::new(),
            log_policies: Vec::new(),
            resources: Resources::default(),
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            restart: RestartPolicy::default(),
            heartbeat: HeartbeatPolicy::default(),
            checkpoint: CheckpointPolicy::default(),
            logs: LogArchive::default(),
            data: DataSpec::default(),
            stop_grace: default_stop_grace(),
            time_limit: None,
        }
    }

    /// Ranks that it goes on with at least.
    pub fn least_world_size(&self) -> u32 {
        self.min_world_size.unwrap_or(self.world_size).min(self.world_size)
    }

    /// The same with every secret's value hidden, as answers show it.
    pub fn redacted(&self) -> Self {
        let mut shown = self.clone();
        for value in shown.secrets.values_mut() {
            *value = "***".into();
        }
        shown
    }
}
