//! Kinds of failures: how often each comes, what it takes with it, how it is seen. The counts of the preset are published; what a kind
//! takes and how it is seen is our reading of its name, stated in docs/simulate.md.

use serde::Serialize;

/// One kind of failure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kind {
    /// For people and flags.
    pub name: String,
    /// Failures per thousand nodes and day.
    pub per_thousand_node_days: f64,
    /// What it takes with it.
    pub takes: Takes,
    /// How it is seen.
    pub seen: Seen,
}

/// What a failure takes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Takes {
    /// Processes: the machine is good for the next attempt.
    Processes,
    /// A part of a machine: its ranks end with an error, and it must be replaced.
    Part,
    /// A whole machine: its ranks are lost (which costs no budget), and it must be replaced.
    Machine,
    /// Nothing: a planned stop, with time to save.
    Nothing,
}

impl Takes {
    /// A machine is out of use until it is repaired, and what it held in memory is gone.
    pub fn needs_a_node(self) -> bool {
        matches!(self, Self::Part | Self::Machine)
    }
}

/// How a failure is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// A process ends.
    Exit,
    /// The gang stands still.
    Hang,
    /// Numbers are wrong for a while; whatever was computed since is lost.
    Corruption,
    /// It is announced.
    Announced,
}

/// GPUs, GPUs per machine and days of the published run.
const LLAMA3: (f64, f64, f64) = (16_384.0, 8.0, 54.0);

/// Table 5 of "The Llama 3 Herd of Models" (arXiv 2407.21783): 419 unplanned interruptions, and the 47 planned ones.
const LLAMA3_COUNTS: [(&str, f64, Takes, Seen); 19] = [
    ("faulty_gpu", 148.0, Takes::Part, Seen::Exit),
    ("gpu_hbm3_memory", 72.0, Takes::Part, Seen::Exit),
    ("software_bug", 54.0, Takes::Processes, Seen::Exit),
    ("network_switch_cable", 35.0, Takes::Processes, Seen::Hang),
    ("host_maintenance", 32.0, Takes::Machine, Seen::Exit),
    ("gpu_sram_memory", 19.0, Takes::Part, Seen::Exit),
    ("gpu_system_processor", 17.0, Takes::Part, Seen::Exit),
    ("nic", 7.0, Takes::Part, Seen::Hang),
    ("nccl_watchdog_timeout", 7.0, Takes::Processes, Seen::Hang),
    ("silent_data_corruption", 6.0, Takes::Part, Seen::Corruption),
    ("gpu_thermal_interface", 6.0, Takes::Part, Seen::Exit),
    ("ssd", 3.0, Takes::Machine, Seen::Exit),
    ("power_supply", 3.0, Takes::Machine, Seen::Exit),
    ("server_chassis", 2.0, Takes::Machine, Seen::Exit),
    ("io_expansion_board", 2.0, Takes::Machine, Seen::Exit),
    ("dependency", 2.0, Takes::Processes, Seen::Exit),
    ("cpu", 2.0, Takes::Machine, Seen::Exit),
    ("system_memory", 2.0, Takes::Machine, Seen::Exit),
    ("planned", 47.0, Takes::Nothing, Seen::Announced),
];

/// The published rates, per machine and day.
pub fn llama3() -> Vec<Kind> {
    let (gpus, per_machine, days) = LLAMA3;
    let thousand_node_days = gpus / per_machine * days / 1_000.0;
    let kind = |(name, count, takes, seen): (&str, f64, Takes, Seen)| Kind {
        name: name.into(),
        per_thousand_node_days: count / thousand_node_days,
        takes,
        seen,
    };
    LLAMA3_COUNTS.map(kind).into()
}

/// The same kinds, none of which ever comes.
pub fn none() -> Vec<Kind> {
    llama3().into_iter().map(|kind| Kind { per_thousand_node_days: 0.0, ..kind }).collect()
}

impl Kind {
    /// It is a failure, and no planned stop.
    pub fn is_failure(&self) -> bool {
        self.seen != Seen::Announced
    }
}

/// Failures of all nodes per day, planned stops not counted.
pub fn failures_per_day(kinds: &[Kind], nodes: u32) -> f64 {
    kinds.iter().filter(|kind| kind.is_failure()).map(|kind| kind.per_thousand_node_days).sum::<f64>() * f64::from(nodes) / 1_000.0
}

/// Scales every failure (planned stops stay) so that one of them comes each `mean_ms` on all nodes together.
pub fn scale_to(kinds: &mut [Kind], nodes: u32, mean_ms: u64) {
    let now = failures_per_day(kinds, nodes);
    if now > 0.0 && mean_ms > 0 {
        let factor = super::DAY_MS as f64 / mean_ms as f64 / now;
        for kind in kinds.iter_mut().filter(|kind| kind.is_failure()) {
            kind.per_thousand_node_days *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_is_the_published_table() {
        let counts = || LLAMA3_COUNTS.iter().filter(|(.., seen)| *seen != Seen::Announced);
        assert_eq!(counts().map(|(_, count, ..)| count).sum::<f64>(), 419.0);
        assert!((failures_per_day(&llama3(), 2_048) * 54.0 - 419.0).abs() < 1e-6);
        // "About 78 %" of them were hardware: everything but software, dependencies, maintenance and what nobody could name.
        let soft = ["software_bug", "dependency", "host_maintenance", "nccl_watchdog_timeout"];
        let hardware: f64 = counts().filter(|(name, ..)| !soft.contains(name)).map(|(_, count, ..)| count).sum();
        assert!((hardware / 419.0 - 0.78).abs() < 0.015, "{hardware}");
    }

    #[test]
    fn a_mean_time_scales_failures_and_leaves_plans_alone() {
        let mut kinds = llama3();
        scale_to(&mut kinds, 128, 3_600_000);
        assert!((failures_per_day(&kinds, 128) - 24.0).abs() < 1e-9);
        assert_eq!(kinds.last(), llama3().last());
        let mut still = none();
        scale_to(&mut still, 128, 3_600_000);
        assert_eq!(failures_per_day(&still, 128), 0.0);
    }
}
