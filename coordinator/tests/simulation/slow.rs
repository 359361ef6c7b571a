//! Ranks that are slow for a while, and what heartbeats tell of the parts of a step.
//!
//! Steps come as they would without: only what a rank tells of them changes.

use std::collections::BTreeMap;

use everlit_api::ids::Incarnation;
use everlit_api::rank::{EXCHANGE_METRIC, StepPart};

use crate::faults::Fault;
use crate::jobs::{Kind, Script};
use crate::node::Run;
use crate::world::{Happening, World};

/// Between two ranks that get slow.
pub const SLOW_EVERY_MS: u64 = 20_000;
/// Ranks that do the same differ by so many hundredths at most.
const DIFFERENCE: u64 = 20;

/// What a rank says of its newest step; only ranks of one training wait for each other.
pub fn parts(run: &Run, own: Incarnation, script: &Script, now: u64) -> BTreeMap<String, f64> {
    if script.kind != Kind::Trains {
        return BTreeMap::new();
    }
    let step = script.step_ms as f64 / 1_000.0;
    let hundredths = 30 + (run.seq * 7 + u64::from(own.rank) * 3) % (30 * DIFFERENCE / 100);
    let compute = step * hundredths as f64 / 100.0;
    let data = if now < run.slow_until { step } else { 0.0 };
    let told = [(StepPart::Data.metric(), data), (StepPart::Compute.metric(), compute), (EXCHANGE_METRIC, step / 10.0)];
    told.map(|(name, seconds)| (name.to_string(), seconds)).into()
}

impl World {
    /// It breaks nothing, so it goes on after the healing, when attempts live for long.
    pub fn on_slow(&mut self) {
        if self.slow_one_down() {
            self.faults.fired(Fault::RankSlow);
        }
        self.after(SLOW_EVERY_MS, Happening::Slow);
    }

    /// It has others, and they are what it is held against.
    fn others_keep_up(&self, node: usize, own: Incarnation) -> bool {
        let node = &self.nodes[node];
        let members = node.members(own.job, own.attempt);
        members.len() > 1 && members.iter().all(|own| node.runs.get(own).is_some_and(|run| run.slow_until <= self.now))
    }

    /// Whether there was a rank whose others wait for it.
    pub fn slow_one_down(&mut self) -> bool {
        let scripts = &self.scripts;
        let trains = |own: &Incarnation| scripts[&own.job].kind == Kind::Trains;
        let all: Vec<(usize, Incarnation)> = self
            .nodes
            .iter()
            .enumerate()
            .flat_map(|(number, node)| node.living().filter(trains).map(move |own| (number, own)))
            .filter(|(number, own)| self.others_keep_up(*number, *own))
            .collect();
        let Some((node, own)) = self.slow_random.pick(&all) else { return false };
        let until = self.now + self.slow_random.between(20_000, 80_000);
        self.checkers.slow.slowed(own);
        self.nodes[node].runs.get_mut(&own).map(|run| run.slow_until = until).is_some()
    }
}
