//! Many runs for the figures that people want: what to expect, how policies compare, the best interval, spares worth having, who decides.
//!
//! Whatever is compared is run over the same faults. The first run of the policy itself drives the engine with every rank; all others let a few
//! ranks stand for the gang, which changes no decision (a test holds both to the same outcome).

use everlit_api::job::WORLD_SIZE_MAX;
use serde::Serialize;

use super::account::Account;
use super::outcome::{Counts, GaveUp, Outcome};
use super::scenario::{Every, Scenario, daly_ms};
use super::traffic::{Control, Decisions, Load};
use super::world::run;

/// Ranks that stand for a gang where only decisions matter.
pub const FEW_RANKS: u32 = 8;
/// Runs at most.
pub const RUNS_MAX: u32 = 1_000;
/// Intervals that are tried each way from Young and Daly's, each sqrt(2) times the one before.
const INTERVAL_STEPS: i32 = 6;
/// Intervals within so much of the best one are as good as it.
const AS_GOOD: f64 = 0.001;

/// What is to be found out.
#[derive(Debug, Clone)]
pub struct Question {
    /// The cluster and its policy.
    pub scenario: Scenario,
    /// Others to hold against it, each with a name.
    pub compare: Vec<(String, Scenario)>,
    /// Runs, each with a seed of its own.
    pub runs: u32,
    /// Of the first run; the others follow it.
    pub seed: u64,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was asked.
    pub scenario: Scenario,
    /// Of the first run.
    pub seed: u64,
    /// Between two failures of the gang, planned stops not counted; null when nothing fails.
    pub mean_between_failures_ms: Option<u64>,
    /// What to expect of the policy.
    pub expected: Row,
    /// Each run by itself.
    pub runs: Vec<Run>,
    /// Ranks in the engine and events that it was given in the first run.
    pub engine: EngineWork,
    /// Other policies over the same faults.
    pub policies: Vec<Row>,
    /// Time between checkpoints; null when nothing fails.
    pub intervals: Option<Intervals>,
    /// Spare nodes; null when no failure takes a node.
    pub spares: Option<Spares>,
    /// Who decides.
    pub decisions: Vec<Decided>,
}

/// A policy over all runs.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// For people.
    pub name: String,
    /// Training over all time: the mean of the runs.
    pub goodput: f64,
    /// The worst run.
    pub goodput_min: f64,
    /// The best run.
    pub goodput_max: f64,
    /// Where the time went, in milliseconds, summed over the runs.
    pub ledger_ms: Account,
    /// What happened how often, summed over the runs.
    pub counts: Counts,
    /// Runs in which the job was given up.
    pub gave_up: u32,
    /// The first of them.
    pub first_given_up: Option<GaveUp>,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// Its seed.
    pub seed: u64,
    /// Training over all time.
    pub goodput: f64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How the engine was driven.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct EngineWork {
    /// Ranks of its job.
    pub ranks: u32,
    /// Events that it was given.
    pub events: u64,
}

/// Goodput by the time between checkpoints.
#[derive(Debug, Clone, Serialize)]
pub struct Intervals {
    /// By interval.
    pub points: Vec<IntervalPoint>,
    /// The best of them, in milliseconds.
    pub best_ms: u64,
    /// The shortest that is as good within a thousandth.
    pub as_good_from_ms: u64,
    /// The longest.
    pub as_good_to_ms: u64,
    /// By the formula of Young and Daly from the cost of a save and the mean time between failures.
    pub young_daly_ms: u64,
}

/// One interval.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct IntervalPoint {
    /// Milliseconds.
    pub every_ms: u64,
    /// The mean of the runs.
    pub goodput: f64,
}

/// Goodput by spare nodes.
#[derive(Debug, Clone, Serialize)]
pub struct Spares {
    /// By number of spares.
    pub points: Vec<SparePoint>,
    /// What gives the most training for every node that is owned, spares included.
    pub worth: u32,
    /// Nodes in repair at one time, the mean.
    pub mean_in_repair: f64,
}

/// One number of spares.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SparePoint {
    /// Spare nodes.
    pub spares: u32,
    /// The mean of the runs.
    pub goodput: f64,
    /// Goodput over all nodes that are owned.
    pub per_owned_node: f64,
}

/// One way to decide.
#[derive(Debug, Clone, Serialize)]
pub struct Decided {
    /// Who decides.
    pub decisions: Decisions,
    /// What it costs.
    pub load: Load,
    /// The mean of the runs.
    pub goodput: f64,
}

/// Answers.
pub fn study(question: &Question) -> Report {
    let Question { scenario, runs, seed, .. } = question;
    let ranks = scenario.workers.min(WORLD_SIZE_MAX);
    let outcomes: Vec<Outcome> =
        seeds(*seed, *runs).map(|own| run(scenario, own, if own == *seed { ranks } else { few(scenario) })).collect();
    let events = outcomes.first().map_or(0, |outcome| outcome.engine_events);
    let name = format!("{}, as asked", scenario.policy.recovery.as_str());
    let expected = row(&name, &outcomes);
    let mean = |scenario: &Scenario| goodput(scenario, *seed, *runs);
    let decided = |decisions| {
        let scenario = Scenario { control: Control { decisions, ..scenario.control }, ..scenario.clone() };
        Decided { decisions, load: scenario.control.load(scenario.nodes, scenario.workers), goodput: mean(&scenario) }
    };
    Report {
        seed: *seed,
        mean_between_failures_ms: scenario.mean_between_failures_ms().map(|ms| ms as u64),
        expected,
        engine: EngineWork { ranks, events },
        policies: question.compare.iter().map(|(name, other)| row(name, &outcomes_of(other, *seed, *runs))).collect(),
        intervals: intervals(scenario, mean),
        spares: spares(scenario, mean),
        decisions: Decisions::ALL.into_iter().map(decided).collect(),
        runs: seeds(*seed, *runs)
            .zip(outcomes)
            .map(|(seed, outcome)| Run { seed, goodput: outcome.ledger_ms.goodput(), outcome })
            .collect(),
        scenario: scenario.clone(),
    }
}

fn seeds(first: u64, runs: u32) -> impl Iterator<Item = u64> {
    (0..u64::from(runs)).map(move |number| first.wrapping_add(number))
}

fn few(scenario: &Scenario) -> u32 {
    scenario.workers.min(FEW_RANKS)
}

fn outcomes_of(scenario: &Scenario, seed: u64, runs: u32) -> Vec<Outcome> {
    seeds(seed, runs).map(|own| run(scenario, own, few(scenario))).collect()
}

fn goodput(scenario: &Scenario, seed: u64, runs: u32) -> f64 {
    row("", &outcomes_of(scenario, seed, runs)).goodput
}

fn row(name: &str, outcomes: &[Outcome]) -> Row {
    let goodputs: Vec<f64> = outcomes.iter().map(|outcome| outcome.ledger_ms.goodput()).collect();
    let given_up = || outcomes.iter().filter_map(|outcome| outcome.gave_up.clone());
    Row {
        name: name.into(),
        goodput: goodputs.iter().sum::<f64>() / goodputs.len().max(1) as f64,
        goodput_min: goodputs.iter().copied().fold(f64::INFINITY, f64::min),
        goodput_max: goodputs.iter().copied().fold(0.0, f64::max),
        ledger_ms: outcomes.iter().fold(Account::default(), |sum, outcome| sum.plus(&outcome.ledger_ms)),
        counts: outcomes.iter().fold(Counts::default(), |sum, outcome| sum.plus(&outcome.counts)),
        gave_up: given_up().count() as u32,
        first_given_up: given_up().next(),
    }
}

/// The best interval: a grid around Young and Daly's, over the same faults.
pub fn intervals(scenario: &Scenario, goodput: impl Fn(&Scenario) -> f64) -> Option<Intervals> {
    let mean = scenario.mean_between_failures_ms()?;
    let step_ms = scenario.costs.step_ms;
    let young_daly_ms = daly_ms(scenario.costs.save_stall_ms, mean).max(step_ms);
    let longest = (scenario.duration_ms / 2).max(step_ms);
    let mut tried: Vec<u64> = (-INTERVAL_STEPS..=INTERVAL_STEPS)
        .map(|power| young_daly_ms as f64 * std::f64::consts::SQRT_2.powi(power))
        .map(|every| ((every / step_ms as f64).round() as u64 * step_ms).clamp(step_ms, longest))
        .collect();
    tried.dedup();
    let at = |every_ms: u64| {
        let mut scenario = scenario.clone();
        scenario.policy.every = Every::Ms(every_ms);
        IntervalPoint { every_ms, goodput: goodput(&scenario) }
    };
    let points: Vec<IntervalPoint> = tried.into_iter().map(at).collect();
    let best = points.iter().copied().reduce(|best, point| if point.goodput > best.goodput { point } else { best })?;
    let as_good = || points.iter().filter(|point| point.goodput >= best.goodput - AS_GOOD).map(|point| point.every_ms);
    Some(Intervals { best_ms: best.every_ms, as_good_from_ms: as_good().min()?, as_good_to_ms: as_good().max()?, young_daly_ms, points })
}

fn spares(scenario: &Scenario, goodput: impl Fn(&Scenario) -> f64) -> Option<Spares> {
    let enough = scenario.enough_spares();
    if scenario.mean_in_repair() <= 0.0 {
        return None;
    }
    // 0, 1, 2, 3, 4, 6, 8, 12, 16, …: to twice what is enough.
    let powers = (0..31).flat_map(|power| [1u32 << power, (1 << power) + (1 << power) / 2]);
    let mut tried: Vec<u32> = std::iter::once(0).chain(powers).take_while(|count| *count <= 2 * enough + 1).collect();
    tried.extend([enough, scenario.policy.spares]);
    tried.sort_unstable();
    tried.dedup();
    let at = |spares: u32| {
        let mut scenario = scenario.clone();
        scenario.policy.spares = spares;
        let goodput = goodput(&scenario);
        let share = f64::from(scenario.nodes) / (f64::from(scenario.nodes) + f64::from(spares));
        SparePoint { spares, goodput, per_owned_node: goodput * share }
    };
    let points: Vec<SparePoint> = tried.into_iter().map(at).collect();
    let worth = points.iter().copied().reduce(|best, point| if point.per_owned_node > best.per_owned_node { point } else { best })?;
    Some(Spares { worth: worth.spares, points, mean_in_repair: scenario.mean_in_repair() })
}
