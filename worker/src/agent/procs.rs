//! What `/proc` tells about a rank and everything under its shim.
//!
//! All of it is in the shim's session (the rank and what it starts), unless it made a session of its own; such a process is still known by the
//! heartbeat path in its environment, which no other rank has. A pid alone is never trusted: it may be another process by now.

use std::path::Path;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::folders::HEARTBEAT_NAME;

/// Rounds of killing: what is killed may have started something meanwhile.
const ROUNDS_MAX: usize = 20;

/// Fields of `/proc/PID/stat` that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    pid: i32,
    session: i32,
    cpu_ticks: u64,
    zombie: bool,
}

fn parse_stat(pid: i32, text: &str) -> Option<Stat> {
    // The name in parentheses may contain anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    // Own time, and that of children which ended and were waited for.
    let cpu_ticks = number(11)? + number(12)? + number(13)? + number(14)?;
    Some(Stat { pid, session: fields.get(3)?.parse().ok()?, cpu_ticks, zombie: matches!(fields[0], "Z" | "X") })
}

fn all() -> impl Iterator<Item = Stat> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        parse_stat(pid, &std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    })
}

/// User and system time of everything in a shim's session, except the shim itself, in milliseconds.
pub(super) fn session_cpu_ms(shim: i32) -> u64 {
    // SAFETY: asks for a constant of the system.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    let ticks: u64 = all().filter(|stat| stat.session == shim && stat.pid != shim).map(|stat| stat.cpu_ticks).sum();
    ticks * 1000 / per_second
}

/// Kills what a rank left behind when its shim is dead. `shim`: its session, when the machine has not been restarted since.
pub(super) fn kill_leftovers(run_folder: &Path, shim: Option<i32>) {
    let mark = format!("EVERLIT_HEARTBEAT_FILE={}", run_folder.join(HEARTBEAT_NAME).display());
    for _ in 0..ROUNDS_MAX {
        let mut any = false;
        for stat in all().filter(|stat| !stat.zombie) {
            let marked = || {
                let environ = std::fs::read(format!("/proc/{}/environ", stat.pid)).unwrap_or_default();
                environ.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
            };
            if shim == Some(stat.session) || marked() {
                any = true;
                let _ = kill(Pid::from_raw(stat.pid), Signal::SIGKILL);
            }
        }
        if !any {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Processes that the kernel has killed for want of memory since the machine started, in groups of processes (cgroups) too.
pub(super) fn killed_for_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// Resident bytes of this process.
pub(super) fn own_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: asks for a constant of the system.
    pages * u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Milliseconds that a small file takes to be written and renamed, as a heartbeat is.
pub(super) fn probe(folder: &std::path::Path) -> Option<u64> {
    let begun = std::time::Instant::now();
    let (draft, place) = (folder.join("probe.tmp"), folder.join("probe"));
    std::fs::write(&draft, "{}").and_then(|()| std::fs::rename(&draft, &place)).ok()?;
    u64::try_from(begun.elapsed().as_millis()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let text = "42 (a) R (b) S 1 40 39 0 -1 4194560 1 2 3 4 10 20 3 4 20 0 1 0 555 1 1";
        assert_eq!(parse_stat(42, text), Some(Stat { pid: 42, session: 39, cpu_ticks: 37, zombie: false }));
        assert_eq!(parse_stat(42, "42 (x"), None);
    }

    #[test]
    fn own_memory_is_more_than_nothing() {
        assert!(own_memory() > 100_000);
    }
}
