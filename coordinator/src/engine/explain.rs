//! Why a job is where it is, and what would happen to one that is not submitted yet: sentences made from the same choice that decides.

use std::collections::BTreeMap;

use everlit_api::ids::JobId;
use everlit_api::job::JobSpec;
use everlit_api::status::{Explanation, JobState, PlacementPlan};

use super::Engine;
use super::placement::{Need, Placement, memory_estimate, plan_gang};
use super::state::Job;

impl Engine {
    /// Why this job is not running, or that it is. `None` when it is not active.
    pub fn explain(&self, id: JobId) -> Option<Explanation> {
        let job = self.jobs.get(&id)?;
        let need = job.need();
        let queued = job.state == JobState::Queued;
        let nodes = self.nodes.iter().filter(|_| queued).map(|(name, node)| (name.0.clone(), node.explain(name, &need)));
        let position = queued.then(|| self.queue.position(id, job.spec.priority));
        Some(Explanation { state: job.state, reason: self.reason(job), position, nodes: nodes.collect() })
    }

    /// In one sentence, with what holds a queued job back right now.
    pub fn reason(&self, job: &Job) -> String {
        if job.state != JobState::Queued {
            return job.reason.clone();
        }
        let ahead = self.queue.position(job.id, job.spec.priority);
        match plan_gang(&self.nodes, &job.need()) {
            Placement::Never(why) => format!("queued: {why}"),
            Placement::Later(why) if ahead == 0 => format!("queued: {why}"),
            Placement::Later(why) => format!("queued behind {ahead} jobs: {why}"),
            Placement::Now(_) => format!("queued behind {ahead} jobs"),
        }
    }

    /// What would happen to a job now.
    pub fn plan(&self, spec: &JobSpec) -> PlacementPlan {
        let need = Need::of(spec);
        let first = self.queue.head().is_none_or(|(_, head)| matches!(plan_gang(&self.nodes, &head), Placement::Now(_)));
        let (fits_now, fits_ever, reason, placement) = match plan_gang(&self.nodes, &need) {
            Placement::Now(placement) if first => (true, true, "it would start at once".to_string(), placement),
            Placement::Now(placement) => (false, true, format!("there is room, but {} jobs wait before it", self.queue.depth()), placement),
            Placement::Later(why) => (false, true, why, Vec::new()),
            Placement::Never(why) => (false, false, why, Vec::new()),
        };
        PlacementPlan { fits_now, fits_ever, reason, placement, memory_estimate: memory_estimate(spec), spec: spec.redacted() }
    }

    /// Active jobs by state.
    pub fn counts(&self) -> BTreeMap<JobState, u64> {
        let mut counts = BTreeMap::new();
        for job in self.jobs.values() {
            *counts.entry(job.state).or_default() += 1;
        }
        counts
    }
}
