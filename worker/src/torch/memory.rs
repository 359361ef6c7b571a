//! How much memory a rank may use: the machine's or its control group's, whichever is less, or its GPU's; shared by the ranks there.

use std::fs;

use everlit_api::job::WorkerSpec;
use everlit_api::model::{MemoryEstimate, ModelSizes};

use tch::Device;

use super::environment::Environment;
use super::{TrainError, device};

/// Part of what is free that a batch may fill: the estimate is not exact, and the system needs some.
const USABLE: f64 = 0.8;

/// Bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// That there are.
    pub total: u64,
    /// That are free now.
    pub free: u64,
}

impl Memory {
    /// Of this machine or control group; `None` when the system does not say.
    pub fn read() -> Option<Self> {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let kib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let machine = Self { total: kib("MemTotal")? << 10, free: kib("MemAvailable")? << 10 };
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let groups = [
            ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        ];
        Some(groups.iter().fold(machine, |least, (limit, used)| match number(limit) {
            Some(limit) => Self { total: least.total.min(limit), free: least.free.min(limit.saturating_sub(number(used).unwrap_or(0))) },
            None => least,
        }))
    }
}

/// What a rank needs, and what there is of it where it runs.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Of one rank.
    pub estimate: MemoryEstimate,
    /// Where it computes: the machine's, or its GPU's.
    pub memory: Option<Memory>,
    /// Ranks that share it.
    sharing: u32,
    /// On a GPU, snapshots take none of that memory.
    on_gpu: bool,
}

impl Room {
    /// For a rank of this job on `device`.
    pub fn of(sizes: &ModelSizes, worker: &WorkerSpec, environment: &Environment, device: Device) -> Result<Self, TrainError> {
        let estimate = MemoryEstimate::of(sizes, worker, environment.world);
        let (memory, sharing) = match device.is_cuda() {
            true => (Some(device::memory()?), environment.local_world.div_ceil(device::count().max(1))),
            false => (Memory::read(), environment.local_world),
        };
        Ok(Self { estimate, memory, sharing: sharing.max(1), on_gpu: device.is_cuda() })
    }

    /// What counts where the rank computes.
    fn computing(&self) -> MemoryEstimate {
        MemoryEstimate { snapshot_bytes: if self.on_gpu { 0 } else { self.estimate.snapshot_bytes }, ..self.estimate }
    }

    /// Samples of a rank's forward pass that fit, as a power of two; 0 when not even one does, `None` when nobody knows.
    pub fn samples(&self) -> Option<u64> {
        let own = self.memory?.free as f64 * USABLE / f64::from(self.sharing);
        let fit = self.computing().samples_in(own as u64);
        Some(if fit == 0 { 0 } else { 1 << fit.ilog2() })
    }

    /// Refuses a model that can not fit, with the numbers.
    pub fn check(&self) -> Result<(), TrainError> {
        let (estimate, needed) = (self.computing(), self.computing().total(1));
        let Some(memory) = self.memory.filter(|memory| needed.saturating_mul(self.sharing.into()) > memory.total) else { return Ok(()) };
        let (place, sharing) = (if self.on_gpu { "its GPU" } else { "the node" }, self.sharing);
        Err(TrainError::Config(format!(
            "the model does not fit: a rank needs {:.1} GiB (state {:.1}, snapshots {:.1}, one sample {:.1}), {sharing} ranks share {place} and it has {:.1} GiB: choose a smaller model, activation_checkpointing, or more memory",
            gib(needed),
            gib(estimate.state_bytes),
            gib(estimate.snapshot_bytes),
            gib(estimate.sample_bytes),
            gib(memory.total),
        )))
    }
}

/// Bytes as GiB.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_a_power_of_two_of_a_rank_s_share() {
        let estimate = MemoryEstimate { state_bytes: 1000, snapshot_bytes: 400, sample_bytes: 100 };
        let room = |free, sharing, on_gpu| Room { estimate, memory: Some(Memory { total: free, free }), sharing, on_gpu };
        let fit = |free, sharing| room(free, sharing, false).samples().unwrap();
        assert_eq!([fit(1400, 1), fit(2400, 1), fit(4800, 2), fit(100_000, 1)], [0, 4, 4, 512]);
        assert_eq!(room(2000, 1, true).samples(), Some(4), "snapshots are not on the GPU");
        assert!(room(1499, 1, false).check().is_err() && room(1499, 1, true).check().is_ok());
        assert!(room(2199, 2, true).check().unwrap_err().to_string().contains("2 ranks share its GPU"));
        let own = Memory::read().unwrap();
        assert!(own.free <= own.total && own.total > 1 << 28);
    }
}
