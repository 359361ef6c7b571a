//! Why a job is where it is, and what would happen to one that is not submitted yet: sentences made from the same choice that decides.

use std::collections::BTreeMap;

use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::status::{Explanation, JobState, PlacementPlan};

use super::Engine;
use super::limits::EXPLAINED_NODES_MAX;
use super::placement::{Board, Need, Placement, memory_estimate, plan_first, plan_gang};
use super::preempt::count;
use super::state::Job;

impl Engine {
    /// Why this job is not running, or that it is. `None` when it is not active.
    pub fn explain(&self, id: JobId) -> Option<Explanation> {
        let job = self.jobs.get(&id)?;
        let need = job.need();
        let queued = job.state == JobState::Queued;
        let position = queued.then(|| self.queue.position(id, job.spec.priority));
        let mut told = Explanation { state: job.state, reason: self.reason(job), position, ..Explanation::default() };
        let kept = self.kept_for(id);
        for (name, node) in self.nodes.iter().filter(|_| queued) {
            let own = kept.contains(&name);
            let why = node.explain(name, &need, self.nodes.len() > 1, own);
            let why = if own { format!("is kept for it: {why}") } else { why };
            if told.nodes.len() < EXPLAINED_NODES_MAX {
                told.nodes.insert(name.0.clone(), why);
            } else {
                let known = told.more_nodes.contains_key(&why) || told.more_nodes.len() < EXPLAINED_NODES_MAX;
                *told.more_nodes.entry(if known { why } else { "for other reasons".into() }).or_default() += 1;
            }
        }
        Some(told)
    }

    /// Nodes on which a job that waits will have ranks, as far as is known.
    fn kept_for(&self, id: JobId) -> Vec<&NodeId> {
        let head = self.pass.head.as_ref().filter(|head| head.job == id).map(|head| &head.shares);
        let shares = self.pass.promised_to(id).or(head);
        shares.into_iter().flatten().map(|share| &share.node).collect()
    }

    /// In one sentence, with what holds a queued job back right now.
    pub fn reason(&self, job: &Job) -> String {
        if job.state != JobState::Queued {
            return job.reason.clone();
        }
        let ahead = self.queue.position(job.id, job.spec.priority);
        if self.is_promised(job.id) {
            let nodes = self.kept_for(job.id).iter().map(|node| node.0.as_str()).collect::<Vec<_>>().join(", ");
            return format!("queued: jobs of lower priority save and stop for it on {nodes}");
        }
        let is_head = self.pass.head.as_ref().is_some_and(|head| head.job == job.id);
        let plan = if is_head { plan_first(&self.nodes, &job.need()) } else { plan_gang(&self.nodes, &job.need()) };
        match plan {
            Placement::Never(why) => format!("queued: {why}"),
            Placement::Later(why) if ahead == 0 => format!("queued: {why}"),
            Placement::Later(why) => format!("queued behind {ahead} jobs: {why}"),
            Placement::Now(_) => format!("queued behind {ahead} jobs"),
        }
    }

    /// What would happen to a job now.
    pub fn plan(&self, spec: &JobSpec) -> PlacementPlan {
        let need = Need::of(spec);
        let waiting = self.pass.head.as_ref().and_then(|head| Some((head, self.jobs.get(&head.job)?.spec.priority)));
        let comes_first = waiting.is_none_or(|(_, priority)| spec.priority > priority);
        let may_go = comes_first || waiting.is_some_and(|(head, _)| !head.shares.is_empty());
        let nodes = &self.nodes;
        let board = if comes_first { Board::before_head(nodes) } else { Board::now(nodes) };
        let now = board.choose(&need, None);
        let (fits_now, fits_ever, reason, placement) = match (now, plan_gang(nodes, &need)) {
            (Some(placement), _) if may_go => (true, true, "it would start at once".to_string(), placement),
            (Some(placement), _) => (false, true, format!("there is room, but {} jobs wait before it", self.queue.depth()), placement),
            (None, Placement::Never(why)) => (false, false, why, Vec::new()),
            (None, Placement::Now(_)) => (false, true, format!("{} jobs wait before it", self.queue.depth()), Vec::new()),
            (None, Placement::Later(why)) => match self.plan_preemption(None, spec.priority, &need).filter(|_| comes_first) {
                Some(victims) => {
                    let reason = format!("it would start once {} of lower priority have saved and stopped: {why}", count(victims.len()));
                    (false, true, reason, Vec::new())
                }
                None => (false, true, why, Vec::new()),
            },
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
