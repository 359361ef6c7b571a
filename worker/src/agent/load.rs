//! What the node has and how busy it is, from `/proc`, the control group and the file system.
//!
//! A control group's limit counts when it is lower than the machine's, in both versions of the hierarchy. Numbers that can not be read are
//! zero: a node without them still works.

use std::fs::read_to_string;
use std::path::Path;

use everlit_api::status::{Capacity, NodeLoad};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

use super::gpu::Gpus;
use super::limits::{SLOTS_MIN, SLOTS_PER_CPU};
use super::procs::own_memory;

/// The kernel's boot id.
pub(super) fn boot_id() -> String {
    read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

/// What the node has.
pub(super) fn capacity(gpus: &Gpus, slots: Option<u32>) -> Capacity {
    let cpus = cpus();
    let default = SLOTS_MIN.max(SLOTS_PER_CPU.saturating_mul(cpus.ceil() as u32));
    Capacity { cpus, memory: memory().0, gpus: gpus.infos(), slots: slots.unwrap_or(default) }
}

/// CPUs that this process may use.
fn cpus() -> f64 {
    let allowed =
        sched_getaffinity(Pid::from_raw(0)).map_or(1, |set| (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).count());
    let quota = || {
        let text = group_file("cpu.max").unwrap_or_default();
        let (quota, period) = text.trim().split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
    };
    let older = || {
        let number = |name: &str| read_to_string(format!("/sys/fs/cgroup/cpu/cpu.cfs_{name}_us")).ok()?.trim().parse::<f64>().ok();
        Some(number("quota").filter(|quota| *quota > 0.0)? / number("period")?)
    };
    let quota = quota().or_else(older).filter(|quota| *quota > 0.0).unwrap_or(f64::INFINITY);
    (allowed as f64).min(quota)
}

/// A file of this process's own control group (version 2), or of the root one, as inside a container.
fn group_file(name: &str) -> Option<String> {
    let own = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let root = Path::new("/sys/fs/cgroup");
    read_to_string(root.join(path.trim_start_matches('/')).join(name)).or_else(|_| read_to_string(root.join(name))).ok()
}

/// Bytes in all and in use.
fn memory() -> (u64, u64) {
    let text = read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let total = field("MemTotal");
    let used = total.saturating_sub(field("MemAvailable"));
    let number = |text: Option<String>| text?.trim().parse::<u64>().ok();
    let old = |name: &str| read_to_string(format!("/sys/fs/cgroup/memory/memory.{name}_in_bytes")).ok();
    let limit = number(group_file("memory.max")).or_else(|| number(old("limit")));
    match limit.filter(|limit| *limit < total) {
        Some(limit) => (limit, number(group_file("memory.current")).or_else(|| number(old("usage"))).unwrap_or(used).min(limit)),
        None => (total, used),
    }
}

/// Measures load from one report to the next.
#[derive(Debug, Default)]
pub(super) struct LoadMeter {
    busy: u64,
    total: u64,
}

impl LoadMeter {
    /// What the node does, since the last call.
    pub(super) fn read(&mut self, data_folder: &Path, gpus: &Gpus) -> NodeLoad {
        let (busy, total, cpus) = cpu_times(&read_to_string("/proc/stat").unwrap_or_default());
        let (busy_before, total_before) = (std::mem::replace(&mut self.busy, busy), std::mem::replace(&mut self.total, total));
        let passed = total.saturating_sub(total_before);
        let share = if passed == 0 { 0.0 } else { busy.saturating_sub(busy_before) as f64 / passed as f64 };
        let disk_free = disk_free(data_folder).unwrap_or(0);
        NodeLoad { cpus: share * cpus as f64, memory: memory().1, disk_free, gpus: gpus.loads(), agent_memory: own_memory() }
    }
}

/// Busy and all ticks so far, and the number of CPUs.
fn cpu_times(stat: &str) -> (u64, u64, usize) {
    let mut lines = stat.lines().filter(|line| line.starts_with("cpu"));
    let all: Vec<u64> = lines.next().unwrap_or_default().split_ascii_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    // Guest time is in user time already.
    let total: u64 = all.iter().take(8).sum();
    let idle: u64 = all.iter().skip(3).take(2).sum();
    (total - idle, total, lines.count())
}

/// The interface that has an address.
pub(super) fn interface_of(address: std::net::IpAddr) -> Option<String> {
    let mut all = nix::ifaddrs::getifaddrs().ok()?;
    let found = all.find(|one| {
        let own = one.address.as_ref();
        let v4 = own.and_then(|own| own.as_sockaddr_in()).map(|own| std::net::IpAddr::V4(own.ip()));
        v4.or_else(|| own.and_then(|own| own.as_sockaddr_in6()).map(|own| std::net::IpAddr::V6(own.ip()))) == Some(address)
    });
    found.map(|one| one.interface_name)
}

/// Bytes that a folder's file system has left; `None` when it can not be asked.
pub(super) fn disk_free(folder: &Path) -> Option<u64> {
    statvfs(folder).ok().map(|about| about.blocks_available() * about.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_are_read() {
        assert_eq!(cpu_times("cpu  10 0 5 80 5 0 0 0 0 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n"), (15, 100, 2));
        assert_eq!(cpu_times(""), (0, 0, 0));
    }

    #[test]
    fn this_machine_has_something() {
        let capacity = capacity(&Gpus::none(), None);
        assert!(capacity.cpus > 0.0 && capacity.memory > 1 << 20 && capacity.slots >= SLOTS_MIN);
        let load = LoadMeter::default().read(Path::new("/"), &Gpus::none());
        assert!(load.memory > 0 && load.disk_free > 0 && load.cpus <= capacity.cpus * 1024.0);
        assert!(!boot_id().is_empty());
    }
}
