//! Copies of checkpoints between nodes, as files that appear on another disk after a while, if both nodes are there and the source has it still.

use everlit_api::agent::copies::{CopyOrder, Source};
use everlit_api::agent::{FromAgent, GangSpec};
use everlit_api::ids::JobId;
use everlit_worker::agent::engine::Event;

use crate::check::Seen;
use crate::faults::Fault;
use crate::node::SimNode;
use crate::world::{Happening, World};

const KEEP: usize = 3;

impl World {
    /// A node that gives the step of a job now, and which attempt has written it.
    fn giver(&self, to: usize, job: JobId, step: u64, sources: &[Source]) -> Option<(usize, u32)> {
        let gives = |node: &SimNode| {
            let (by, damaged) = node.checkpoints.get(&job)?.steps.get(&step)?;
            (!damaged && !node.partitioned && node.agent.is_some()).then_some(*by)
        };
        let named = |source: &Source| self.nodes.iter().position(|node| node.id == source.node);
        let found = sources.iter().filter_map(named).filter(|from| *from != to);
        found.filter_map(|from| Some((from, gives(&self.nodes[from])?))).next().filter(|_| !self.nodes[to].partitioned)
    }

    fn take_copy(&mut self, node: usize, from: usize, job: JobId, step: u64, by: u32) {
        let kept = self.nodes[node].checkpoints.entry(job).or_default();
        kept.steps.insert(step, (by, false));
        while kept.steps.len() > KEEP {
            kept.steps.pop_first();
        }
        self.saw(&Seen::Copied { node, from, job, step });
    }

    /// The end of a copy that was ordered.
    pub fn copy(&mut self, node: usize, life: u64, order: &CopyOrder) {
        if self.nodes[node].life != life {
            return;
        }
        let (job, step) = (order.job, order.step);
        let fence = self.nodes[node].checkpoints.get(&job).map_or(0, |kept| kept.fence);
        let fits = !self.nodes[node].disk_full && fence <= order.attempt;
        match self.giver(node, job, step, &order.sources).filter(|_| fits) {
            Some((from, by)) => {
                self.take_copy(node, from, job, step, by);
                self.faults.fired(Fault::CheckpointCopied);
                if let Some(news) = self.news_of(node, job, true) {
                    self.soon(1, 20, Happening::AgentFact { node, life, event: Box::new(Event::CheckpointSeen(Box::new(news))) });
                }
            }
            None => self.send_to_coordinator(node, FromAgent::CopyFailed { job, step, reason: "it can not be had".into() }),
        }
    }

    /// What others have more, before a gang starts here. Answers why it can not start.
    pub fn fetch(&mut self, node: usize, spec: &GangSpec) -> Option<String> {
        let fetch = spec.fetch.as_ref()?;
        let here = self.nodes[node].checkpoints.get(&spec.job).and_then(|kept| kept.steps.last_key_value()).map(|(step, _)| *step);
        if here.is_some_and(|here| here >= fetch.step) {
            return None;
        }
        match self.giver(node, spec.job, fetch.step, &fetch.sources) {
            Some((from, by)) => {
                self.take_copy(node, from, spec.job, fetch.step, by);
                self.faults.fired(Fault::CheckpointFetched);
                None
            }
            None => fetch.required.then(|| format!("the checkpoint of step {} could not be fetched", fetch.step)),
        }
    }

    /// What was committed too late goes.
    pub fn put_aside(&mut self, node: usize, job: JobId, attempt: u32, beyond: Option<u64>) {
        let Some(kept) = self.nodes[node].checkpoints.get_mut(&job) else { return };
        let late = |step: &u64, by: u32| by <= attempt && beyond.is_none_or(|beyond| *step > beyond);
        let gone: Vec<u64> = kept.steps.iter().filter(|(step, (by, _))| late(step, *by)).map(|(step, _)| *step).collect();
        kept.steps.retain(|step, _| !gone.contains(step));
        if !gone.is_empty() {
            self.faults.fired(Fault::CheckpointLate);
        }
        self.tell_agent(node, Event::CheckpointsGone(job));
        for step in gone {
            self.tell_agent(node, Event::CheckpointQuarantined { job, step, reason: "too late".into() });
        }
        if let Some(news) = self.news_of(node, job, true) {
            self.tell_agent(node, Event::CheckpointSeen(Box::new(news)));
        }
    }
}
