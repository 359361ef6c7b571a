//! Why a job is where it is, and what would happen to one that is not submitted yet: sentences made from the same choice that decides.

use std::collections::BTreeMap;

use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::status::{Explanation, JobState, PlacementPlan};
use everlit_api::time::Timestamp;

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

    /// What would happen to a job that is submitted now: the look at the queue as it would be with it.
    pub fn plan(&self, spec: &JobSpec, now: Timestamp) -> PlacementPlan {
        let (nodes, need) = (&self.nodes, Need::of(spec));
        let waiting = self.pass.head.as_ref().and_then(|head| Some((head, self.jobs.get(&head.job)?.spec.priority)));
        let behind = waiting.filter(|(_, priority)| spec.priority <= *priority).map(|(head, _)| head);
        let board = behind.map_or_else(|| Some(Board::before_head(nodes)), |head| head.beside(nodes, &need, now));
        let goes = board.and_then(|board| board.choose(&need, None));
        let waits = match self.queue.depth() {
            1 => "1 job waits before it".to_string(),
            depth => format!("{depth} jobs wait before it"),
        };
        let (fits_now, fits_ever, reason, placement) = match (goes, plan_gang(nodes, &need)) {
            (Some(placement), fit) => {
                let before = behind.is_some_and(|head| head.is_after(&need, now)) && !matches!(fit, Placement::Now(_));
                let why = if before { ": its time_limit ends before those have that the first in the queue waits for" } else { "" };
                (true, true, format!("it would start at once{why}"), placement)
            }
            (None, Placement::Never(why)) => (false, false, why, Vec::new()),
            (None, Placement::Now(placement)) => (false, true, format!("there is room, but {waits}"), placement),
            (None, Placement::Later(why)) => match self.plan_preemption(None, spec.priority, &need).filter(|_| behind.is_none()) {
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
