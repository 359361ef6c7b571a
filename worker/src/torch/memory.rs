//! How much memory a rank may use: the machine's or its control group's, whichever is less, shared by the ranks on the node.

use std::fs;

use everlit_api::job::WorkerSpec;
use everlit_api::model::{MemoryEstimate, ModelSizes};

use super::TrainError;
use super::environment::Environment;

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

/// Samples of a rank's forward pass that fit, as a power of two; 0 when not even one does.
pub fn samples_that_fit(estimate: &MemoryEstimate, memory: Memory, local_world: u32) -> u64 {
    let own = memory.free as f64 * USABLE / f64::from(local_world.max(1));
    let fit = estimate.samples_in(own as u64);
    if fit == 0 { 0 } else { 1 << fit.ilog2() }
}

/// Refuses a model that can not fit on this node, with the numbers.
pub fn check(sizes: &ModelSizes, worker: &WorkerSpec, environment: &Environment) -> Result<MemoryEstimate, TrainError> {
    let estimate = MemoryEstimate::of(sizes, worker, environment.world);
    let needed = estimate.total(1);
    let Some(memory) = Memory::read() else { return Ok(estimate) };
    if needed.saturating_mul(environment.local_world.into()) > memory.total {
        return Err(TrainError::Config(format!(
            "the model does not fit: a rank needs {:.1} GiB (state {:.1}, snapshots {:.1}, one sample {:.1}), {} ranks run here and the node has {:.1} GiB: choose a smaller model, activation_checkpointing, or more memory",
            gib(needed),
            gib(estimate.state_bytes),
            gib(estimate.snapshot_bytes),
            gib(estimate.sample_bytes),
            environment.local_world,
            gib(memory.total),
        )));
    }
    Ok(estimate)
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
        let estimate = MemoryEstimate { state_bytes: 1000, snapshot_bytes: 0, sample_bytes: 100 };
        let fit = |free, ranks| samples_that_fit(&estimate, Memory { total: free, free }, ranks);
        assert_eq!([fit(1000, 1), fit(2000, 1), fit(4000, 2), fit(100_000, 1)], [0, 4, 4, 512]);
        let own = Memory::read().unwrap();
        assert!(own.free <= own.total && own.total > 1 << 28);
    }
}
