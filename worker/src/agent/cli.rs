//! The command line of `everlit-agent`: `run`, `join`, the probe `health`, and `checkpoint` for programs that are not ours.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use everlit_api::manifest::{MANIFEST_FORMAT, Manifest};
use everlit_api::ports::PortRange;
use everlit_api::status::Taint;
use everlit_api::time::{Millis, Timestamp};
use tracing_subscriber::EnvFilter;

use super::place::{self, FakeGpus};
use super::{begin, identity, preprocess, status};
use crate::checkpoint;

/// Supervises training processes on one node.
#[derive(Debug, Parser)]
#[command(name = "everlit-agent", version, about)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make this machine a node of a coordinator, with a token of `everlit node token create`, and run ranks for it.
    Join(JoinArgs),
    /// Run ranks for the coordinator that was joined; `everlit up` starts this on its own machine.
    Run(RunArgs),
    /// Exit 0 when the agent of this folder is alive and linked to its coordinator.
    Health {
        /// The agent's data folder [default: everlit-agent in the XDG data folder].
        #[arg(long, env = "EVERLIT_DATA_DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Print what the threads of processes are doing, without stopping them.
    Stacks {
        /// The processes.
        #[arg(required = true, num_args = 1..=64)]
        pids: Vec<u32>,
        /// A JSON object for each on a line of its own.
        #[arg(long)]
        json: bool,
    },
    /// Checkpoints of programs that are not ours.
    #[command(subcommand)]
    Checkpoint(CheckpointVerb),
    /// What a rank of a `kind: preprocess` job runs: a program for each of its shards, or one that goes through them, until all outputs are stored.
    #[command(hide = true)]
    Preprocess {
        /// The program and its arguments.
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
}

/// Settings of `run`.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// Folder for everything that this agent keeps; made if missing [default: everlit-agent in the XDG data folder].
    #[arg(long, env = "EVERLIT_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// File that says where the coordinator of this machine is (JSON: `url`, `token`); read before each try to connect.
    #[arg(long, env = "EVERLIT_COORDINATOR_FILE")]
    pub coordinator_file: Option<PathBuf>,
    /// The node's name [default: the host's name]; several agents on one machine take several.
    #[arg(long, env = "EVERLIT_NODE")]
    pub node: Option<String>,
    /// The address that ranks on other nodes reach this one by [default: the one that its coordinator sees].
    #[arg(long, env = "EVERLIT_ADDRESS", value_name = "IP")]
    pub address: Option<std::net::IpAddr>,
    /// Ports for a door where other nodes fetch checkpoints from this one: the first that is free.
    #[arg(long, env = "EVERLIT_COPY_PORTS", value_name = "FIRST-LAST", default_value = "29400-29499")]
    pub copy_ports: PortRange,
    /// Bytes a second that uploads of checkpoints (`checkpoint.to`) take together at most, like 100Mi [default: as many as go].
    #[arg(long, env = "EVERLIT_UPLOAD_RATE", value_name = "SIZE", value_parser = everlit_api::job::size)]
    pub upload_rate: Option<u64>,
    /// Bytes of data shards of stores (`data.shards`) that are kept for all jobs, like 200Gi; the least recently used go first.
    #[arg(long, env = "EVERLIT_DATA_CACHE", value_name = "SIZE", default_value = "50Gi", value_parser = everlit_api::job::size)]
    pub data_cache: u64,
    /// Ranks that this node takes at most [default: 16 per CPU, at least 64].
    #[arg(long, env = "EVERLIT_SLOTS")]
    pub slots: Option<u32>,
    /// A label of this node, `KEY=VALUE`, for jobs that ask for it (`node_selector`); several may be given.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = place::label)]
    pub labels: Vec<(String, String)>,
    /// A taint of this node, `KEY=VALUE` or `KEY`: only jobs that tolerate it have ranks here; several may be given.
    #[arg(long = "taint", value_name = "KEY=VALUE", value_parser = place::taint)]
    pub taints: Vec<Taint>,
    /// Claim so many GPUs that are not there, `N` or `N:80Gi`, for tests and demos of placement.
    #[arg(long, value_name = "N[:MEMORY]")]
    pub fake_gpus: Option<FakeGpus>,
    /// End after so long with neither a coordinator nor living ranks [default: 60s; a node that joined does not end].
    #[arg(long, env = "EVERLIT_LINGER")]
    pub linger: Option<Millis>,
    /// What to log (`warn`, `info`, `debug`, or a filter).
    #[arg(long, env = "EVERLIT_LOG", default_value = "info")]
    pub log: String,
}

/// Settings of `join`.
#[derive(Debug, Clone, clap::Args)]
struct JoinArgs {
    /// Where the coordinator is, like https://coordinator.example:8000.
    #[arg(env = "EVERLIT_URL")]
    url: String,
    /// File with the join token, `-` for standard input [default: the environment's EVERLIT_JOIN_TOKEN; never an argument, which every user could read].
    #[arg(long, env = "EVERLIT_JOIN_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Join, and end; `run` goes on from there.
    #[arg(long)]
    only: bool,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum CheckpointVerb {
    /// Make a folder of regular files a checkpoint: write its manifest and commit it as step-N beside it.
    Commit {
        /// The folder, directly in $EVERLIT_CHECKPOINT_DIR (or where the checkpoint shall be).
        dir: PathBuf,
        /// Updates done [default: the number at the end of the folder's name].
        #[arg(long)]
        step: Option<u64>,
    },
    /// Exit 0 when a checkpoint is whole, byte for byte.
    Verify {
        /// The checkpoint's folder.
        dir: PathBuf,
    },
}

/// The whole program.
pub fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Join(args) => join(&args),
        Verb::Run(args) => run(&args),
        Verb::Health { data_dir } => health(data_dir.as_ref()),
        Verb::Stacks { pids, json } => stacks(&pids, json),
        Verb::Checkpoint(CheckpointVerb::Commit { dir, step }) => commit(&dir, step),
        Verb::Checkpoint(CheckpointVerb::Verify { dir }) => verify(&dir),
        Verb::Preprocess { command } => return preprocess::run(&command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Expelled>() => ExitCode::from(EXPELLED),
        Err(error) => {
            eprintln!("everlit-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Bytes of a join token on standard input at most; a good one has far fewer.
const TOKEN_BYTES_MAX: u64 = 4096;
/// Exit code of an agent whose node was expelled: starting it again is of no use.
const EXPELLED: u8 = 3;

/// The node was expelled; its agent has said so.
#[derive(Debug, thiserror::Error)]
#[error("this node was expelled")]
struct Expelled;

fn data_dir(given: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    given.cloned().map_or_else(identity::default_dir, Ok)
}

fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let dir = data_dir(args.run.data_dir.as_ref())?;
    let token = match (&args.token_file, std::env::var("EVERLIT_JOIN_TOKEN")) {
        (Some(file), _) if file == Path::new("-") => Some(std::io::read_to_string(std::io::stdin().take(TOKEN_BYTES_MAX))?),
        (Some(file), _) => Some(std::fs::read_to_string(file).with_context(|| format!("could not read `{}`", file.display()))?),
        (None, found) => found.ok(),
    };
    // Nothing that is started from here on has it.
    // SAFETY: there is no other thread yet.
    unsafe { std::env::remove_var("EVERLIT_JOIN_TOKEN") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let own = runtime.block_on(super::join::join(&dir, &args.url, args.run.node.as_deref(), token.as_deref()))?;
    drop(runtime);
    println!("node {} of {} (data in {})", own.node, own.coordinator, dir.display());
    if args.only { Ok(()) } else { run(&RunArgs { coordinator_file: None, ..args.run.clone() }) }
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    // What a store's client tries again is told once it gives up; a filter of one's own may say otherwise.
    let filter = EnvFilter::try_new(format!("object_store=warn,{}", args.log)).context("--log")?;
    // A log that can not be written (its disk is full) is no reason to end.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    log.with_ansi(false).with_target(false).init();
    let end = begin::run(args, &data_dir(args.data_dir.as_ref())?)?;
    if end.expelled { Err(Expelled.into()) } else { Ok(()) }
}

fn health(given: Option<&PathBuf>) -> anyhow::Result<()> {
    let dir = data_dir(given)?;
    let status = status::ask(&dir).with_context(|| format!("no agent answers in `{}`", dir.display()))?;
    println!("{}", serde_json::to_string(&status)?);
    if status.linked { Ok(()) } else { bail!("the agent is not linked to a coordinator") }
}

fn stacks(pids: &[u32], json: bool) -> anyhow::Result<()> {
    if super::stacks::tell(pids, json)? { Ok(()) } else { bail!("not all of these processes are there") }
}

fn verify(dir: &Path) -> anyhow::Result<()> {
    let manifest = checkpoint::verify(dir)?;
    println!("step {} is whole: {} files", manifest.step, manifest.files.len());
    Ok(())
}

fn commit(dir: &Path, step: Option<u64>) -> anyhow::Result<()> {
    let dir = dir.canonicalize().with_context(|| format!("could not open `{}`", dir.display()))?;
    let parent = dir.parent().context("a file system's root can not be a checkpoint")?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let step = match step {
        Some(step) => step,
        None => trailing_number(&name).with_context(|| format!("`{name}` does not end in a number: say --step N"))?,
    };
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let attempt = match variable("EVERLIT_ATTEMPT") {
        Some(text) => text.parse().context("EVERLIT_ATTEMPT is not a number")?,
        None => 1,
    };
    let world_size = variable("WORLD_SIZE").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir)? {
        let entry = entry?;
        if entry.file_name() == checkpoint::MANIFEST_NAME {
            continue;
        }
        if !entry.file_type()?.is_file() {
            bail!("`{}` is not a regular file; a checkpoint holds nothing else", entry.path().display());
        }
        files.push(checkpoint::describe_file(&entry.path())?);
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        job_id: variable("EVERLIT_JOB_ID").unwrap_or_default(),
        attempt,
        generation: 0,
        step,
        epoch: 0,
        world_size,
        global_batch: 0,
        samples: 0,
        seed: 0,
        data: Default::default(),
        model: None,
        created_at: Timestamp::now(),
        files,
        manifest_sha256: None,
    };
    let path = checkpoint::commit(parent, &dir, &manifest)?;
    println!("{}", path.display());
    Ok(())
}

fn trailing_number(name: &str) -> Option<u64> {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name[name.len() - digits..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_is_the_number_at_the_end() {
        assert_eq!(trailing_number("checkpoint-1500"), Some(1500));
        assert_eq!(trailing_number("1500"), Some(1500));
        assert_eq!((trailing_number("final"), trailing_number("step-1.tmp")), (None, None));
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
