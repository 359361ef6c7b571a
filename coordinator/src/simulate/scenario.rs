//! What is asked: a cluster, what fails in it, what recovery costs there, and the policy. Everything that decides a run is in here.

use everlit_api::job::RestartPolicy;
use everlit_api::time::Millis;
use serde::Serialize;

use super::kinds::{Kind, failures_per_day};
use super::traffic::Control;
use super::{DAY_MS, HOUR_MS};

/// Nodes at most.
pub const NODES_MAX: u32 = 1_000_000;
/// Longest time that is simulated.
pub const DURATION_MS_MAX: u64 = 3_660 * DAY_MS;
/// Faults of one run at most: more are a slip of the pen, and would take hours.
pub const FAULTS_MAX: f64 = 200_000.0;
/// Saves of one run at most.
pub const SAVES_MAX: u64 = 20_000_000;
/// The agent's rule: a gang stands still after so many of its longest newest steps, and at least two seconds.
const HANG_STEPS: u64 = 6;
const HANG_MS_MIN: u64 = 2_000;
/// The bounds of `checkpoint.every: "auto"`.
const AUTO_MS: (u64, u64) = (1_000, HOUR_MS);

/// One question.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scenario {
    /// Machines of the gang.
    pub nodes: u32,
    /// GPUs of each.
    pub gpus_per_node: u32,
    /// Ranks of the job, as many on each node.
    pub workers: u32,
    /// Wall time in milliseconds.
    pub duration_ms: u64,
    /// What fails.
    pub kinds: Vec<Kind>,
    /// What things cost.
    pub costs: Costs,
    /// What is done about it.
    pub policy: Policy,
    /// Who decides, over which wires.
    pub control: Control,
}

/// What things cost, in milliseconds unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Costs {
    /// One training step.
    pub step_ms: u64,
    /// Steps are blocked so long by a save.
    pub save_stall_ms: u64,
    /// From the end of that to the commit on storage that outlives a node.
    pub save_ms: u64,
    /// From the order to stop to the last rank's end.
    pub stop_ms: u64,
    /// From the order to start to a process group.
    pub start_ms: u64,
    /// Loading a checkpoint from storage.
    pub load_ms: u64,
    /// Loading a snapshot from the node's own memory.
    pub load_snapshot_ms: u64,
    /// Recovery in place, from the decision to the next step.
    pub in_place_ms: u64,
    /// How often recovery in place works, 0 to 1; else the gang is restarted after it was tried.
    pub in_place_success: f64,
    /// A process has ended: until its agent knows.
    pub seen_exit_ms: u64,
    /// The gang stands still: until an agent is sure.
    pub seen_hang_ms: u64,
    /// Numbers are wrong: until somebody sees it.
    pub seen_corruption_ms: u64,
    /// A machine is away so long on average (exponentially distributed).
    pub repair_ms: u64,
    /// Bringing a spare node into a gang that is restarted.
    pub spare_ms: u64,
    /// What is done during a planned stop.
    pub planned_ms: u64,
}

impl Default for Costs {
    fn default() -> Self {
        let step_ms = 6_000;
        Self {
            step_ms,
            save_stall_ms: 1_000,
            save_ms: 20_000,
            stop_ms: 5_000,
            start_ms: 120_000,
            load_ms: 60_000,
            load_snapshot_ms: 10_000,
            in_place_ms: 20_000,
            in_place_success: 0.9,
            seen_exit_ms: 1_000,
            seen_hang_ms: hang_ms(step_ms),
            seen_corruption_ms: 30 * 60_000,
            repair_ms: DAY_MS,
            spare_ms: 60_000,
            planned_ms: 5 * 60_000,
        }
    }
}

/// When an agent is sure that a gang with such steps stands still.
pub fn hang_ms(step_ms: u64) -> u64 {
    (HANG_STEPS * step_ms).max(HANG_MS_MIN)
}

/// What is done about failures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    /// The cheapest rung that is tried first; those below it follow when it fails.
    pub recovery: Recovery,
    /// Time between saves.
    pub every: Every,
    /// Spare nodes, beside those of the gang.
    pub spares: u32,
    /// The job's `restart`: budget and backoff, decided by the engine.
    pub restart: RestartPolicy,
    /// The job's `stop_grace`: a planned stop has so long to save.
    pub stop_grace: Millis,
}

/// Rungs of the recovery ladder, the dearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recovery {
    /// The gang restarts from the newest checkpoint on storage.
    Checkpoint,
    /// The gang restarts from the newest snapshot in memory, if every node still has its part.
    Snapshot,
    /// Survivors keep what they have; a new rank takes the state from one of them.
    InPlace,
}

impl Recovery {
    /// All, the dearest first.
    pub const ALL: [Self; 3] = [Self::Checkpoint, Self::Snapshot, Self::InPlace];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Snapshot => "snapshot",
            Self::InPlace => "in-place",
        }
    }
}

/// Time between saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Every {
    /// By Young and Daly, from the cost of a save and the failures so far, as the built-in program does.
    Auto,
    /// So many milliseconds.
    Ms(u64),
}

/// Daly's optimum (2006, equation 37), the higher terms of Young's sqrt(2 C M) (1974); the training program has the same.
pub fn daly_ms(cost_ms: u64, mean_ms: f64) -> u64 {
    let cost = cost_ms as f64;
    if cost >= 2.0 * mean_ms {
        return mean_ms as u64;
    }
    let ratio = cost / (2.0 * mean_ms);
    ((2.0 * cost * mean_ms).sqrt() * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - cost).max(0.0) as u64
}

impl Every {
    /// The interval, with what is known of failures now.
    pub(super) fn ms(self, cost_ms: u64, mean_ms: f64) -> u64 {
        match self {
            Self::Ms(ms) => ms,
            Self::Auto => daly_ms(cost_ms, mean_ms).clamp(AUTO_MS.0, AUTO_MS.1),
        }
    }
}

impl Scenario {
    /// Mean time between failures of the gang, planned stops not counted; `None` when nothing fails.
    pub fn mean_between_failures_ms(&self) -> Option<f64> {
        let per_day = failures_per_day(&self.kinds, self.nodes);
        (per_day > 0.0).then(|| DAY_MS as f64 / per_day)
    }

    /// Nodes in repair at one time: the mean.
    pub fn mean_in_repair(&self) -> f64 {
        let rate: f64 = self.kinds.iter().filter(|kind| kind.takes.needs_a_node()).map(|kind| kind.per_thousand_node_days).sum();
        rate * f64::from(self.nodes) / 1_000.0 * self.costs.repair_ms as f64 / DAY_MS as f64
    }

    /// The fewest spares that are enough at 99 of 100 moments: repairs under way are Poisson distributed.
    pub fn enough_spares(&self) -> u32 {
        let mean = self.mean_in_repair();
        // The normal limit, where the sum would run for long.
        if mean > 500.0 {
            return (mean + 2.33 * mean.sqrt()).ceil() as u32;
        }
        let (mut count, mut term) = (0u32, (-mean).exp());
        let mut sum = term;
        while sum < 0.99 {
            count += 1;
            term *= mean / f64::from(count);
            sum += term;
        }
        count
    }

    /// What is wrong with the question, in one sentence.
    pub fn check(&self) -> Result<(), String> {
        let costs = &self.costs;
        if self.nodes == 0 || self.nodes > NODES_MAX {
            return Err(format!("nodes must be 1 to {NODES_MAX}"));
        }
        if self.gpus_per_node == 0 {
            return Err("a node has at least one GPU".into());
        }
        if self.workers == 0 || !self.workers.is_multiple_of(self.nodes) {
            return Err(format!("workers must be a multiple of the {} nodes, not {}", self.nodes, self.workers));
        }
        if self.duration_ms == 0 || self.duration_ms > DURATION_MS_MAX {
            return Err(format!("the duration must be more than nothing and at most {} days", DURATION_MS_MAX / DAY_MS));
        }
        if costs.step_ms == 0 {
            return Err("a step takes time: the step time must not be 0".into());
        }
        if !(0.0..=1.0).contains(&costs.in_place_success) {
            return Err(format!("the success of recovery in place is a share from 0 to 1, not {}", costs.in_place_success));
        }
        if let Every::Ms(ms) = self.policy.every {
            if ms == 0 {
                return Err("the time between checkpoints must not be 0".into());
            }
            if self.duration_ms / ms.max(costs.step_ms) > SAVES_MAX {
                return Err(format!("these are more than {SAVES_MAX} checkpoints: save less often, or simulate less time"));
            }
        }
        if let Some(kind) = self.kinds.iter().find(|kind| !kind.per_thousand_node_days.is_finite() || kind.per_thousand_node_days < 0.0) {
            return Err(format!("the rate of {} must be a number from 0 on", kind.name));
        }
        let faults = self.kinds.iter().map(|kind| kind.per_thousand_node_days).sum::<f64>() * f64::from(self.nodes) / 1_000.0
            * self.duration_ms as f64
            / DAY_MS as f64;
        if faults > FAULTS_MAX {
            return Err(format!(
                "these rates make {faults:.0} failures, and at most {FAULTS_MAX} are simulated: fewer nodes, less time or lower rates"
            ));
        }
        self.control.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_interval_is_young_s_for_cheap_saves() {
        assert!((daly_ms(20, 3_600_000.0) as f64 - 12_000.0).abs() < 100.0);
        assert!((daly_ms(60_000, 3_600_000.0) as f64 - 617_300.0).abs() < 2_000.0);
        assert_eq!(daly_ms(HOUR_MS * 3, 3_600_000.0), 3_600_000);
        assert_eq!((Every::Auto.ms(0, 1e7), Every::Auto.ms(HOUR_MS, 1e12)), (1_000, HOUR_MS));
    }
}
