//! The agent's beginning and end: take the data folder, read what the node is, run the driver, and let the last work finish.
//!
//! Everything that needs no loop is here. The trap: ranks are started by posix_spawn from threads, so dispositions and limits must be set
//! before the runtime exists.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::cli::RunArgs;
use super::driver::{Driver, End, FLUSH_MAX};
use super::folders::Folders;
use super::identity::Identity;
use super::late::Late;
use super::limits::BLOCKING_THREADS;
use super::memory::Memory;
use super::start::Node;
use super::{environment, gpu, load, status};

/// Runs the agent to its end.
pub(super) fn run(args: &RunArgs, dir: &Path) -> anyhow::Result<End> {
    let folders = Folders::new(std::path::absolute(dir)?);
    for folder in [folders.jobs(), folders.trash()] {
        std::fs::create_dir_all(&folder).with_context(|| format!("could not make `{}`", folder.display()))?;
    }
    let lock = status::lock(&folders)?;
    let identity = if args.coordinator_file.is_some() { None } else { Identity::load(folders.root())? };
    // SAFETY: sets a disposition to a constant. Shims are never waited for, and the kernel reaps them then.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn)? };
    let gpus = args.fake_gpus.map_or_else(gpu::Gpus::find, gpu::Gpus::fake);
    let node = node(folders, !gpus.infos().is_empty(), args.data_cache)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(512 * 1024)
        .build()?;
    let end = runtime.block_on(async { Driver::new(args, identity, node, gpus, lock)?.run().await })?;
    tracing::info!(reason = end.reason, "ended");
    runtime.shutdown_timeout(FLUSH_MAX);
    Ok(end)
}

fn node(folders: Folders, has_gpus: bool, data_cache: u64) -> anyhow::Result<Node> {
    let programs = std::env::current_exe()?.parent().map(PathBuf::from).unwrap_or_default();
    let env = environment::PASSED.iter().filter_map(|name| Some(((*name).to_string(), std::env::var(name).ok()?)));
    let memory = Memory::find(folders.root());
    Ok(Node {
        folders,
        memory,
        programs,
        env: env.collect(),
        has_gpus,
        open_files: raise_open_files(),
        boot_id: load::boot_id(),
        reach: Mutex::default(),
        data_cache,
        late: Late::default(),
    })
}

/// Raises the agent's own limit of open files; answers what ranks get.
fn raise_open_files() -> Option<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok()?;
    Some(soft)
}
