//! Preparing a gang: decide where it starts, make its folders, write down the order, and make ready what each shim is told.
//!
//! All of it blocks and runs on a blocking thread. `gang.json` comes last and by rename: its presence says that every run folder was made and
//! that ranks may have been started, so a later agent can tell "never started" from "forgotten". It holds no environment: secrets stay in
//! memory. Nothing is synced: after a power cut no rank lives, and the order comes again.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use everlit_api::agent::{GangSpec, MEMBERS_NAME, Members, Program, Resumed};
use everlit_api::ids::Incarnation;
use everlit_api::job::WorkerSpec;
use everlit_api::time::Millis;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::environment::{self, Paths, Reach};
use super::folders::{ERROR_NAME, Folders, GANG_NAME, HEARTBEAT_NAME, SHARDS_NAME, WORKER_NAME, parse_attempt};
use super::late::Late;
use super::memory::Memory;
use super::resume::Asked;
use super::{logs, packages, resume, shim};
use crate::checkpoint;
use crate::rendezvous::Server;
use crate::shim::spec::Spec;
use crate::train_config::{StoredData, StoredShard, TrainConfig};

/// What all gangs on this node have in common.
#[derive(Debug)]
pub(super) struct Node {
    /// The data folder.
    pub folders: Folders,
    /// Snapshots in shared memory.
    pub memory: Memory,
    /// Where the programs are that stand beside this one.
    pub programs: PathBuf,
    /// The agent's variables that are passed on.
    pub env: BTreeMap<String, String>,
    /// GPUs are hidden from jobs that were granted none.
    pub has_gpus: bool,
    /// Soft limit of open files that ranks get back.
    pub open_files: Option<u64>,
    /// The kernel's boot id.
    pub boot_id: String,
    /// How other nodes reach it, once that is known.
    pub reach: Mutex<Option<Reach>>,
    /// Bytes of data shards of stores that are kept for all jobs.
    pub data_cache: u64,
    /// Checkpoints that came too late and are still to be put aside.
    pub late: Late,
}

impl Node {
    /// How other nodes reach it.
    pub(super) fn reach(&self) -> Option<Reach> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A gang that can be started at once.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Where it starts from.
    pub resumed: Resumed,
    /// Where ranks of several nodes meet, when it is this node that keeps that.
    pub meeting: Option<Server>,
    ranks: Vec<(Incarnation, PathBuf, Spec)>,
}

/// Why a gang can not be started here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// For people.
    pub reason: String,
    /// Another try of the same can not succeed.
    pub permanent: bool,
}

impl Refused {
    /// The same order will be refused again.
    pub(super) fn forever(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), permanent: true }
    }

    /// It may work later.
    pub(super) fn now(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), permanent: false }
    }
}

/// `gang.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct GangFile {
    /// The boot that it was started in.
    pub boot_id: String,
    /// The order, without environment.
    pub spec: GangSpec,
    /// Where it started from.
    pub resumed: Resumed,
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Refused {
    let text = format!("could not {what} `{}`", path.display());
    move |error| Refused::now(format!("{text}: {error}"))
}

fn make_folder(path: &Path) -> Result<bool, Refused> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(failed("make the folder", path)).map(|()| true)
        }
        Err(error) => Err(failed("make the folder", path)(error)),
    }
}

/// Writes a file so that a reader sees all of it or none.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Refused> {
    let draft = path.with_extension("tmp");
    fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, path)).map_err(failed("write", path))
}

/// Decides and makes everything up to the start. What may take long ends early once it is not wanted.
pub(super) fn prepare(node: &Node, spec: &GangSpec, asked: &Asked<'_>) -> Result<Prepared, Refused> {
    let folders = &node.folders;
    let attempts = folders.attempts(spec.job);
    let known = newest_attempt(&attempts);
    if known.is_some_and(|newest| newest > spec.attempt) {
        // Only a coordinator whose disk has lost writes orders it. The number after this one may be new.
        return Err(Refused::now(format!("a later attempt than {} was started here", spec.attempt)));
    }
    let attempt = folders.attempt(spec.job, spec.attempt);
    let argv = argv(node, spec, &attempt)?;
    if spec.group_world_size > 1 && node.reach().is_none() {
        return Err(Refused::now("this node has no address that others could reach: start its agent with --address"));
    }
    // What is ordered is not over: the mark is of a coordinator that has lost what it said was durable.
    match fs::remove_file(folders.ended(spec.job)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &folders.ended(spec.job))(error)),
        _ => {}
    }
    let checkpoints = folders.checkpoints(spec.job);
    make_folder(&folders.job(spec.job))?;
    packages::unpack_for(folders, spec)?;
    let fresh = make_folder(&checkpoints)?;
    let busy = |error: checkpoint::CheckpointError| Refused {
        reason: error.to_string(),
        permanent: !(error.is_transient() || matches!(error, checkpoint::CheckpointError::Fenced { .. })),
    };
    // In a folder that was not there before, nobody is to be fenced off and nothing is to be found.
    if !fresh || spec.attempt > 1 {
        checkpoint::raise_fence(&checkpoints, spec.attempt).map_err(busy)?;
        checkpoint::sweep_drafts(&checkpoints, spec.attempt).map_err(busy)?;
    }
    let put_aside = node.late.put_aside(folders, spec.job).map_err(busy)?;
    let mut resumed = resume::decide(node, spec, fresh, known, asked)?;
    resumed.quarantined.splice(0..0, put_aside.into_iter().map(|own| (own.step, own.reason)));
    let snapshots = node.memory.make(spec);
    let rendezvous = folders.rendezvous(spec.job, spec.attempt);
    DirBuilder::new().mode(0o700).recursive(true).create(&rendezvous).map_err(failed("make the folder", &rendezvous))?;
    let logs = folders.logs(spec.job);
    if make_folder(&logs)? && spec.attempt > 1 {
        logs::begin_life(&logs, spec.attempt).map_err(failed("begin the log in", &logs))?;
    }
    make_folder(&folders.runs(spec.job))?;
    if let Program::Worker { worker, .. } = &spec.program {
        write_settings(&attempt.join(WORKER_NAME), folders, spec, worker)?;
    }
    let from = resumed.path.as_deref();
    let seats = spec.own_seats().map(|(_, seat)| seat).chain(spec.spares.iter().copied());
    let ranks: Result<Vec<_>, _> = seats.map(|seat| prepare_rank(node, spec, seat, &argv, from, snapshots.as_deref())).collect();
    let ranks = ranks?;
    let meeting = open_meeting(spec)?;
    write_gang(node, spec, &resumed)?;
    remove_older_attempts(folders, spec, known);
    Ok(Prepared { resumed, meeting, ranks })
}

/// The first node of a gang on several keeps the place where the ranks of the built-in program meet.
fn open_meeting(spec: &GangSpec) -> Result<Option<Server>, Refused> {
    if spec.group_world_size <= 1 || spec.group_rank > 0 || !matches!(spec.program, Program::Worker { .. }) {
        return Ok(None);
    }
    let at = environment::server_address(spec);
    let address = at.parse().map_err(|_| Refused::forever(format!("`{at}` is no address to meet at")))?;
    // On the agent's own threads: this one may wait.
    let opened = Handle::current().block_on(Server::open(address, &spec.rendezvous_secret, spec.world_size));
    opened.map(Some).map_err(|error| Refused::now(format!("ranks can not meet at {at}: {error}")))
}

/// One process's run folder, and what its shim is told.
fn prepare_rank(
    node: &Node,
    spec: &GangSpec,
    seat: u32,
    argv: &[CString],
    from: Option<&str>,
    snapshots: Option<&Path>,
) -> Result<(Incarnation, PathBuf, Spec), Refused> {
    let folders = &node.folders;
    let incarnation = Incarnation { job: spec.job, attempt: spec.attempt, rank: seat };
    let rank = spec.rank_of(seat).unwrap_or(seat);
    let folder = folders.run(incarnation);
    make_folder(&folder)?;
    let shards = folder.join(SHARDS_NAME);
    fs::write(&shards, environment::shards_of(spec, rank, &folders.data(spec.job))).map_err(failed("write", &shards))?;
    let feed = spec.data.as_ref().map(|_| folders.data(spec.job));
    let paths = Paths {
        heartbeat: &folder.join(HEARTBEAT_NAME),
        error: &folder.join(ERROR_NAME),
        shards: &shards,
        feed: feed.as_deref(),
        checkpoints: &folders.checkpoints(spec.job),
        rendezvous: &folders.rendezvous(spec.job, spec.attempt),
        snapshots,
    };
    let env = environment::environment(spec, seat, paths, from, &node.env, node.has_gpus, node.reach().as_ref());
    let env: Result<Vec<CString>, Refused> = env.iter().map(|(name, value)| c_string(&format!("{name}={value}"), name)).collect();
    let shim = Spec {
        rank,
        attempt: spec.attempt,
        logs: folders.logs(spec.job),
        log_bytes_max: spec.log_bytes_max,
        workdir: packages::workdir(folders, spec),
        open_files: node.open_files,
        argv: argv.to_vec(),
        env: env?,
    };
    Ok((incarnation, folder, shim))
}

fn write_gang(node: &Node, spec: &GangSpec, resumed: &Resumed) -> Result<(), Refused> {
    let mut kept = spec.clone();
    kept.env.clear();
    kept.rendezvous_secret.clear();
    let file = GangFile { boot_id: node.boot_id.clone(), spec: kept, resumed: resumed.clone() };
    let text = serde_json::to_vec(&file).map_err(|error| Refused::forever(error.to_string()))?;
    write_whole(&node.folders.attempt(spec.job, spec.attempt).join(GANG_NAME), &text)
}

/// A running gang has other members: makes ready what starts, and tells who lives. `gang.json` is written before the ranks are told, so
/// that an agent after this one knows at least as much as they do.
pub(super) fn regroup(node: &Node, spec: &GangSpec, resumed: Resumed, fresh: &[u32]) -> Result<Prepared, Refused> {
    let folders = &node.folders;
    let argv = argv(node, spec, &folders.attempt(spec.job, spec.attempt))?;
    let snapshots = node.memory.make(spec);
    // Who joins others later has its state from them.
    let from = resumed.path.as_deref().filter(|_| spec.generation == 0);
    let ranks: Result<Vec<_>, _> = fresh.iter().map(|seat| prepare_rank(node, spec, *seat, &argv, from, snapshots.as_deref())).collect();
    let ranks = ranks?;
    // Two memberships may be brought about at once, on two threads: the later one stays.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _held = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let place = folders.rendezvous(spec.job, spec.attempt).join(MEMBERS_NAME);
    let known: Option<Members> = fs::read(&place).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if known.is_some_and(|known| known.generation > spec.generation) {
        return Ok(Prepared { resumed, meeting: None, ranks });
    }
    write_gang(node, spec, &resumed)?;
    let seats = (0..spec.world_size).map(|rank| spec.seat(rank)).collect();
    let members = serde_json::to_vec(&Members { generation: spec.generation, seats });
    let members = members.map_err(|error| Refused::forever(error.to_string()))?;
    write_whole(&place, &members)?;
    Ok(Prepared { resumed, meeting: None, ranks })
}

/// What the built-in program is told beyond its environment.
fn write_settings(path: &Path, folders: &Folders, spec: &GangSpec, worker: &WorkerSpec) -> Result<(), Refused> {
    let stored = spec.data.as_ref().and_then(|data| data.shards.as_ref()).map(|shards| StoredData {
        feed: folders.data(spec.job),
        shards: shards.iter().map(|shard| StoredShard { name: shard.name.clone(), bytes: shard.bytes }).collect(),
    });
    let config = TrainConfig {
        worker: worker.clone(),
        checkpoint: spec.checkpoint.clone(),
        shards: spec.shards.clone(),
        stored,
        mean_seconds_between_failures: spec.mean_time_between_failures.map(|Millis(ms)| ms as f64 / 1_000.0),
    };
    let text = serde_json::to_vec(&config).map_err(|error| Refused::forever(error.to_string()))?;
    write_whole(path, &text)
}

/// Program and arguments, and whether what this agent needs for them is there.
fn argv(node: &Node, spec: &GangSpec, attempt: &Path) -> Result<Vec<CString>, Refused> {
    let missing = |name: &str| format!("{name} is not built: run scripts/build.sh");
    if !node.programs.join("everlit-shim").exists() {
        return Err(Refused::forever(missing("everlit-shim")));
    }
    let argv = match &spec.program {
        Program::Command { argv } if spec.data.as_ref().is_some_and(|data| data.to.is_some()) => {
            let runner = node.programs.join("everlit-agent").display().to_string();
            [runner, "preprocess".into(), "--".into()].into_iter().chain(argv.iter().cloned()).collect()
        }
        Program::Command { argv } => argv.clone(),
        Program::Worker { evaluate, .. } => {
            let worker = node.programs.join("everlit-worker");
            if !worker.exists() {
                return Err(Refused::forever(missing("everlit-worker")));
            }
            let path = |path: &Path| path.display().to_string();
            let verb = if *evaluate { "evaluate" } else { "train" };
            vec![path(&worker), verb.into(), "--config".into(), path(&attempt.join(WORKER_NAME))]
        }
    };
    if argv.first().is_none_or(String::is_empty) {
        return Err(Refused::forever("the command is empty"));
    }
    argv.iter().map(|arg| c_string(arg, "the command")).collect()
}

fn c_string(text: &str, what: &str) -> Result<CString, Refused> {
    CString::new(text).map_err(|_| Refused::forever(format!("{what} contains a NUL character")))
}

/// The newest attempt that was ever prepared here.
pub(super) fn newest_attempt(attempts: &Path) -> Option<u32> {
    let entries = fs::read_dir(attempts).ok()?;
    entries.flatten().filter_map(|entry| parse_attempt(entry.file_name().to_str()?)).max()
}

/// What a later agent needs of an older attempt are only the ranks that are not forgotten.
fn remove_older_attempts(folders: &Folders, spec: &GangSpec, known: Option<u32>) {
    if known.is_none_or(|known| known == spec.attempt) {
        return;
    }
    let runs: Vec<String> = fs::read_dir(folders.runs(spec.job))
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    let Ok(entries) = fs::read_dir(folders.attempts(spec.job)) else { return };
    for older in entries.flatten().filter_map(|entry| parse_attempt(entry.file_name().to_str()?)).filter(|older| *older < spec.attempt) {
        if !runs.iter().any(|run| run.starts_with(&format!("a{older}-"))) {
            // A folder that stays is no harm.
            let _ = fs::remove_dir_all(folders.attempt(spec.job, older));
        }
    }
}

/// Starts every rank's shim; each answers for itself.
pub(super) fn spawn(node: &Node, prepared: Prepared) -> Vec<(Incarnation, io::Result<UnixStream>)> {
    let program = node.programs.join("everlit-shim");
    let start = |(incarnation, folder, spec): (Incarnation, PathBuf, Spec)| (incarnation, shim::start(&program, &folder, &spec));
    prepared.ranks.into_iter().map(start).collect()
}
