//! The flags of `everlit simulate`, and the question that they make. What is not given comes from a measured job (`--from-job`), else from
//! the defaults, which are assumptions of ours (docs/simulate.md).

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use everlit_api::job::{Backoff, RestartPolicy};
use everlit_api::time::Millis;

use super::measure::Measured;
use crate::cli::Fail;
use crate::simulate::kinds::{self, Kind};
use crate::simulate::scenario::{Costs, Every, Policy, Recovery, Scenario, hang_ms};
use crate::simulate::study::{Question, RUNS_MAX};
use crate::simulate::traffic::{Control, Decisions};

/// `everlit simulate`.
#[derive(Debug, Args)]
#[command(
    after_help = "Times are like 500ms, 10s, 2m, 1h, 54d. docs/simulate.md tells what is modelled, what is assumed, and where rates are from."
)]
pub struct SimulateArgs {
    /// Nodes of the gang
    #[arg(long, default_value_t = 2_048, help_heading = "Cluster")]
    nodes: u32,
    /// GPUs of each node
    #[arg(long, default_value_t = 8, help_heading = "Cluster")]
    gpus_per_node: u32,
    /// Ranks of the job, a multiple of the nodes [default: one for each GPU]
    #[arg(long, help_heading = "Cluster")]
    workers: Option<u32>,
    /// Wall time
    #[arg(long, default_value = "54d", value_name = "TIME", help_heading = "Cluster")]
    duration: Millis,
    /// Failure rates by kind: published ones, or none to begin with
    #[arg(long, value_enum, default_value_t = Preset::Llama3, help_heading = "Failures")]
    failures: Preset,
    /// Failures of one kind per thousand nodes and day; may be repeated
    #[arg(long, value_name = "KIND=RATE", help_heading = "Failures")]
    failure: Vec<KindRate>,
    /// Scale all failures so that the gang has one each TIME; planned stops stay as they are
    #[arg(long, value_name = "TIME", help_heading = "Failures")]
    mtbf: Option<Millis>,
    /// Measure the costs of steps, saves and restarts from this job: an id, a name, or `last`
    #[arg(long, value_name = "JOB", help_heading = "Costs")]
    pub(super) from_job: Option<String>,
    #[command(flatten)]
    costs: CostArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    control: ControlArgs,
    /// Runs, each with faults of its own
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=i64::from(RUNS_MAX)), help_heading = "Study")]
    runs: u32,
    /// Of the first run; the same seed gives the same answer
    #[arg(long, default_value_t = 1, help_heading = "Study")]
    seed: u64,
    /// Write charts as SVG
    #[arg(long, value_name = "FILE", help_heading = "Study")]
    pub(super) svg: Option<PathBuf>,
    /// The same as `--output json`
    #[arg(long, help_heading = "Study")]
    pub(super) json: bool,
}

/// Where failure rates begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// Table 5 of "The Llama 3 Herd of Models": 419 unplanned interruptions and 47 planned ones in 54 days on 16,384 GPUs.
    Llama3,
    /// Nothing fails but what `--failure` says.
    None,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Costs")]
struct CostArgs {
    /// One training step [default: 6s]
    #[arg(long, value_name = "TIME")]
    step_time: Option<Millis>,
    /// Steps are blocked so long by a save [default: 1s]
    #[arg(long, value_name = "TIME")]
    save_stall: Option<Millis>,
    /// From there to the commit on storage that outlives a node [default: 20s]
    #[arg(long, value_name = "TIME")]
    save_time: Option<Millis>,
    /// From the order to stop to the last rank's end [default: 5s]
    #[arg(long, value_name = "TIME")]
    stop_time: Option<Millis>,
    /// From the order to start to a process group [default: 2m]
    #[arg(long, value_name = "TIME")]
    start_time: Option<Millis>,
    /// Loading a checkpoint from storage [default: 1m]
    #[arg(long, value_name = "TIME")]
    load_time: Option<Millis>,
    /// Loading a snapshot from the node's own memory [default: 10s]
    #[arg(long, value_name = "TIME")]
    load_snapshot_time: Option<Millis>,
    /// Recovery in place, until the next step [default: 20s]
    #[arg(long, value_name = "TIME")]
    in_place_time: Option<Millis>,
    /// How often recovery in place works, 0 to 1 [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    in_place_success: Option<f64>,
    /// From a process' end until its agent knows [default: 1s]
    #[arg(long, value_name = "TIME")]
    seen_exit: Option<Millis>,
    /// From a standstill until an agent is sure [default: six steps, at least 2s]
    #[arg(long, value_name = "TIME")]
    seen_hang: Option<Millis>,
    /// From wrong numbers until somebody sees them [default: 30m]
    #[arg(long, value_name = "TIME")]
    seen_corruption: Option<Millis>,
    /// A broken machine is away so long on average [default: 1d]
    #[arg(long, value_name = "TIME")]
    repair_time: Option<Millis>,
    /// Bringing a spare node into a gang that restarts [default: 1m]
    #[arg(long, value_name = "TIME")]
    spare_time: Option<Millis>,
    /// What is done during a planned stop [default: 5m]
    #[arg(long, value_name = "TIME")]
    planned_time: Option<Millis>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Policy")]
struct PolicyArgs {
    /// The cheapest rung that is tried first
    #[arg(long, value_enum, default_value_t = Rung::Snapshot)]
    recovery: Rung,
    /// Time between saves, or `auto`: by Young and Daly from the cost of a save and the failures so far
    #[arg(long, default_value = "auto", value_name = "TIME|auto")]
    checkpoint_every: EveryArg,
    /// Spare nodes beside those of the gang, or `auto`: enough at 99 of 100 moments
    #[arg(long, default_value = "auto", value_name = "N|auto")]
    spares: SparesArg,
    /// Counted restarts [default: 50]
    #[arg(long, value_name = "N")]
    max_restarts: Option<u32>,
    /// Failures in a row without a new step [default: 5]
    #[arg(long, value_name = "N")]
    max_start_failures: Option<u32>,
    /// First wait before a restart [default: 500ms]
    #[arg(long, value_name = "TIME")]
    backoff_initial: Option<Millis>,
    /// Longest wait before a restart [default: 30s]
    #[arg(long, value_name = "TIME")]
    backoff_max: Option<Millis>,
    /// Committed progress over this time forgives counted restarts [default: 10m]
    #[arg(long, value_name = "TIME")]
    heal_after: Option<Millis>,
    /// A planned stop has so long to save [default: 30s]
    #[arg(long, value_name = "TIME")]
    stop_grace: Option<Millis>,
    /// Another policy to compare: what differs, like `recovery=in-place,every=5m,spares=4,decisions=local,max-restarts=9`; may be repeated
    #[arg(long, value_name = "KEY=VALUE,…")]
    policy: Vec<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Control")]
struct ControlArgs {
    /// Who decides: `mixed` is what everlit does
    #[arg(long, value_enum, default_value_t = Who::Mixed)]
    decisions: Who,
    /// One way between two machines [default: 1ms]
    #[arg(long, value_name = "TIME")]
    latency: Option<Millis>,
    /// The coordinator's work for one message, in microseconds [default: 20]
    #[arg(long, value_name = "MICROSECONDS")]
    message_cost: Option<f64>,
    /// Between two heartbeats of a rank [default: 2s]
    #[arg(long, value_name = "TIME")]
    heartbeat_every: Option<Millis>,
}

/// A rung of the recovery ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rung {
    /// The gang restarts from the newest checkpoint.
    Checkpoint,
    /// The gang restarts from the newest snapshot in memory, where every node still has its part.
    Snapshot,
    /// Survivors keep what they have (a model of ours: the engine does not do it yet).
    InPlace,
}

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Who {
    /// Every heartbeat goes to the coordinator, which judges and orders.
    Central,
    /// Agents judge, the coordinator orders.
    Mixed,
    /// Agents judge, tell each other and stop; the coordinator orders the start.
    Local,
}

impl From<Rung> for Recovery {
    fn from(rung: Rung) -> Self {
        match rung {
            Rung::Checkpoint => Self::Checkpoint,
            Rung::Snapshot => Self::Snapshot,
            Rung::InPlace => Self::InPlace,
        }
    }
}

impl From<Who> for Decisions {
    fn from(who: Who) -> Self {
        match who {
            Who::Central => Self::Central,
            Who::Mixed => Self::Mixed,
            Who::Local => Self::Local,
        }
    }
}

#[derive(Debug, Clone)]
struct KindRate(String, f64);

impl FromStr for KindRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rate) = text.split_once('=').ok_or("write KIND=RATE, like faulty_gpu=1.5")?;
        let rate: f64 = rate.parse().map_err(|_| format!("`{rate}` is not a number"))?;
        if rate.is_finite() && rate >= 0.0 { Ok(Self(name.into(), rate)) } else { Err("a rate is a number from 0 on".into()) }
    }
}

#[derive(Debug, Clone, Copy)]
struct EveryArg(Every);

impl FromStr for EveryArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self(Every::Auto));
        }
        let Millis(ms) = text.parse().map_err(|_| "write a time like 10m, or auto".to_string())?;
        Ok(Self(Every::Ms(ms)))
    }
}

#[derive(Debug, Clone, Copy)]
struct SparesArg(Option<u32>);

impl FromStr for SparesArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self(None));
        }
        text.parse().map(|count| Self(Some(count))).map_err(|_| "write a number of nodes, or auto".into())
    }
}

impl SimulateArgs {
    /// The question, complete and sound.
    pub(super) fn question(&self, measured: Option<&Measured>) -> Result<Question, Fail> {
        let workers = match self.workers {
            Some(workers) => workers,
            None => self.nodes.checked_mul(self.gpus_per_node).ok_or_else(|| usage("these are more GPUs than can be counted"))?,
        };
        let control = &self.control;
        let defaults = Control::default();
        let mut scenario = Scenario {
            nodes: self.nodes,
            gpus_per_node: self.gpus_per_node,
            workers,
            duration_ms: self.duration.0,
            kinds: self.kinds()?,
            costs: self.costs.over(measured.map_or_else(Costs::default, |measured| measured.costs.clone())),
            policy: self.policy.policy(),
            control: Control {
                decisions: control.decisions.into(),
                latency_ms: control.latency.map_or(defaults.latency_ms, |time| time.0),
                message_us: control.message_cost.unwrap_or(defaults.message_us),
                heartbeat_ms: control.heartbeat_every.map_or(defaults.heartbeat_ms, |time| time.0),
            },
        };
        scenario.check().map_err(usage)?;
        if self.policy.spares.0.is_none() {
            scenario.policy.spares = scenario.enough_spares();
        }
        let rungs = Recovery::ALL.into_iter().filter(|recovery| *recovery != scenario.policy.recovery);
        let mut compare: Vec<(String, Scenario)> = rungs
            .map(|recovery| {
                let mut other = scenario.clone();
                other.policy.recovery = recovery;
                (recovery.as_str().to_string(), other)
            })
            .collect();
        for text in &self.policy.policy {
            compare.push((text.clone(), changed(&scenario, text)?));
        }
        Ok(Question { scenario, compare, runs: self.runs, seed: self.seed })
    }

    fn kinds(&self) -> Result<Vec<Kind>, Fail> {
        let mut kinds = match self.failures {
            Preset::Llama3 => kinds::llama3(),
            Preset::None => kinds::none(),
        };
        for KindRate(name, rate) in &self.failure {
            let known: Vec<&str> = kinds.iter().map(|kind| kind.name.as_str()).collect();
            let unknown = format!("--failure {name}: known kinds are {}", known.join(", "));
            let kind = kinds.iter_mut().find(|kind| kind.name == *name).ok_or_else(|| usage(unknown))?;
            kind.per_thousand_node_days = *rate;
        }
        if let Some(Millis(mean_ms)) = self.mtbf {
            if mean_ms == 0 {
                return Err(usage("--mtbf must be more than nothing"));
            }
            if kinds::failures_per_day(&kinds, self.nodes) <= 0.0 {
                return Err(usage("--mtbf scales failures, and nothing fails here: give --failure, or --failures llama3"));
            }
            kinds::scale_to(&mut kinds, self.nodes, mean_ms);
        }
        Ok(kinds)
    }
}

fn usage(text: impl Into<String>) -> Fail {
    Fail::Usage(text.into())
}

impl CostArgs {
    fn over(&self, mut costs: Costs) -> Costs {
        let given = [
            (self.step_time, &mut costs.step_ms),
            (self.save_stall, &mut costs.save_stall_ms),
            (self.save_time, &mut costs.save_ms),
            (self.stop_time, &mut costs.stop_ms),
            (self.start_time, &mut costs.start_ms),
            (self.load_time, &mut costs.load_ms),
            (self.load_snapshot_time, &mut costs.load_snapshot_ms),
            (self.in_place_time, &mut costs.in_place_ms),
            (self.seen_exit, &mut costs.seen_exit_ms),
            (self.seen_corruption, &mut costs.seen_corruption_ms),
            (self.repair_time, &mut costs.repair_ms),
            (self.spare_time, &mut costs.spare_ms),
            (self.planned_time, &mut costs.planned_ms),
        ];
        for (time, cost) in given {
            if let Some(Millis(ms)) = time {
                *cost = ms;
            }
        }
        costs.in_place_success = self.in_place_success.unwrap_or(costs.in_place_success);
        costs.seen_hang_ms = self.seen_hang.map_or(hang_ms(costs.step_ms), |time| time.0);
        costs
    }
}

impl PolicyArgs {
    fn policy(&self) -> Policy {
        let defaults = RestartPolicy::default();
        let backoff = Backoff {
            initial: self.backoff_initial.unwrap_or(defaults.backoff.initial),
            max: self.backoff_max.unwrap_or(defaults.backoff.max),
            ..defaults.backoff
        };
        let restart = RestartPolicy {
            max_restarts: self.max_restarts.unwrap_or(defaults.max_restarts),
            max_start_failures: self.max_start_failures.unwrap_or(defaults.max_start_failures),
            heal_after: self.heal_after.unwrap_or(defaults.heal_after),
            backoff,
            ..defaults
        };
        Policy {
            recovery: self.recovery.into(),
            every: self.checkpoint_every.0,
            spares: self.spares.0.unwrap_or(0),
            restart,
            stop_grace: self.stop_grace.unwrap_or(everlit_api::job::default_stop_grace()),
        }
    }
}

/// The same cluster under a policy that differs in what the text says.
fn changed(scenario: &Scenario, text: &str) -> Result<Scenario, Fail> {
    let mut other = scenario.clone();
    for part in text.split(',') {
        let wrong = |why: &str| usage(format!("--policy {part}: {why}"));
        let (key, value) = part.split_once('=').ok_or_else(|| wrong("write KEY=VALUE"))?;
        let policy = &mut other.policy;
        match key {
            "recovery" => policy.recovery = Rung::from_str(value, false).map_err(|_| wrong("checkpoint, snapshot or in-place"))?.into(),
            "every" => policy.every = value.parse::<EveryArg>().map_err(|why| wrong(&why))?.0,
            "spares" => policy.spares = value.parse().map_err(|_| wrong("write a number of nodes"))?,
            "max-restarts" => policy.restart.max_restarts = value.parse().map_err(|_| wrong("write a number"))?,
            "heal-after" => policy.restart.heal_after = value.parse().map_err(|_| wrong("write a time like 10m"))?,
            "stop-grace" => policy.stop_grace = value.parse().map_err(|_| wrong("write a time like 10m"))?,
            "decisions" => other.control.decisions = Who::from_str(value, false).map_err(|_| wrong("central, mixed or local"))?.into(),
            _ => return Err(wrong("known are recovery, every, spares, max-restarts, heal-after, stop-grace, decisions")),
        }
    }
    other.check().map_err(|why| usage(format!("--policy {text}: {why}")))?;
    Ok(other)
}
