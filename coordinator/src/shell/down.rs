//! `everlit down`: ends what runs on a data folder. A living coordinator is asked to drain (as by Ctrl-C); without one the agent is.
//!
//! Who is alive is told by the locks, never by a process id alone: a stale id may be anybody's.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::local::try_lock;

/// Longest wait for ranks that save.
const WAIT: Duration = Duration::from_secs(120);

/// Ends the coordinator, or the agent that was left without one.
pub fn down(dir: &Path) -> anyhow::Result<()> {
    let coordinator = dir.join("coordinator.lock");
    let agent = dir.join("agent").join("agent.lock");
    let mut ended = false;
    if is_held(&coordinator)? {
        let text = std::fs::read_to_string(dir.join("coordinator.json")).context("the coordinator's own file")?;
        let pid = serde_json::from_str::<serde_json::Value>(&text)?.get("pid").and_then(serde_json::Value::as_i64);
        end(pid, Signal::SIGINT, &coordinator, "the coordinator")?;
        ended = true;
    }
    if is_held(&agent)? {
        let pid = std::fs::read_to_string(&agent)?.trim().parse().ok();
        end(pid, Signal::SIGTERM, &agent, "this machine's agent")?;
        ended = true;
    }
    println!("{}", if ended { "ended: jobs were saved and wait for the next `everlit up`" } else { "nothing was running" });
    Ok(())
}

fn is_held(lock: &Path) -> anyhow::Result<bool> {
    Ok(lock.exists() && try_lock(lock).with_context(|| format!("{}", lock.display()))?.is_none())
}

fn end(pid: Option<i64>, signal: Signal, lock: &Path, who: &str) -> anyhow::Result<()> {
    let pid = pid.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 1);
    let Some(pid) = pid else { bail!("{who} runs, but its process id is not in its file: end it by hand") };
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{who} (process {pid}) can not be told to end"))?;
    let started = Instant::now();
    while is_held(lock)? {
        if started.elapsed() > WAIT {
            bail!("{who} (process {pid}) has not ended within {WAIT:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
