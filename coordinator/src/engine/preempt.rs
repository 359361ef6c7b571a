//! Whom a job of higher priority may have stopped, and that they are: they save first, and it costs them nothing.
//!
//! Only gangs of strictly lower priority, and only if all of them together would make room. Of those the fewest that do: of the lowest
//! priority, then the youngest jobs first. They go back in the queue at their old age, and resume from what they saved. Rejected: searching all sets
//! for the smallest (their number doubles with each gang); what is tried is every single one, every node for itself, and leaving out whom it
//! does without. A job is not preempted by the same one again before that one has run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::Priority;
use everlit_api::rank::Cause;

use super::limits::{PREEMPTED_MAX, PREEMPTING_MAX};
use super::placement::{NOTHING, Need, Taken};
use super::room::Held;
use super::state::{Ending, Facts, Job, Then};
use super::{Engine, Turn};

/// A gang that may be stopped, the first to be stopped first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: Priority,
    youngest: Reverse<JobId>,
}

impl Candidate {
    fn id(&self) -> JobId {
        self.youngest.0
    }
}

/// How much a set of them costs: less is better.
fn cost(set: &[Candidate]) -> (Option<Priority>, usize, Vec<Candidate>) {
    (set.iter().map(|own| own.priority).max(), set.len(), set.to_vec())
}

/// The first few that suffice without those that it does without; or one alone.
fn fewest(candidates: &[Candidate], suffices: impl Fn(&[Candidate]) -> bool) -> Option<Vec<Candidate>> {
    if !suffices(candidates) {
        return None;
    }
    // More of them never leave less room.
    let (mut few, mut enough) = (0, candidates.len());
    while few < enough {
        let middle = usize::midpoint(few, enough);
        if suffices(&candidates[..middle]) {
            enough = middle;
        } else {
            few = middle + 1;
        }
    }
    let mut set = candidates[..enough].to_vec();
    // Whom it would be worst to stop is tried first.
    for index in (0..set.len()).rev() {
        let mut without = set.clone();
        without.remove(index);
        if suffices(&without) {
            set = without;
        }
    }
    let highest = set.last().map(|own| own.priority);
    let alone = candidates.iter().filter(|own| Some(own.priority) <= highest).find(|own| suffices(std::slice::from_ref(own)));
    Some(alone.filter(|_| set.len() > 1).map_or(set, |own| vec![own.clone()]))
}

impl Engine {
    /// Has others stopped for a job, if that makes room for it.
    pub(super) fn preempt(&mut self, turn: &mut Turn, id: JobId, need: &Need) -> bool {
        let Some(job) = self.jobs.get(&id) else { return false };
        let (priority, attempt, home) = (job.spec.priority, job.attempt, job.home(&self.nodes));
        let Some(victims) = self.plan_preemption(Some((id, attempt)), priority, need) else { return false };
        let gone = self.held_by(self.leaving().chain(victims.iter().copied()));
        let Some(place) = self.board_without(&gone).choose(need, home.as_ref()) else { return false };
        self.promise(id, need, place, &gone);
        let names: Vec<String> = victims.iter().map(ToString::to_string).collect();
        let reason = format!("{} of lower priority save and stop, and leave it their places: {}", count(victims.len()), names.join(", "));
        turn.event(Some(id), "preempting", reason, Facts::from([("victims", serde_json::json!(victims))]));
        for victim in victims {
            self.stop_for(turn, victim, id, priority, attempt);
        }
        true
    }

    fn stop_for(&mut self, turn: &mut Turn, victim: JobId, by: JobId, priority: Priority, attempt: u32) {
        let Some(job) = self.jobs.get_mut(&victim) else { return };
        if job.preempted.len() >= PREEMPTED_MAX {
            job.preempted.remove(0);
        }
        job.preempted.push((by, attempt));
        let word = serde_json::to_value(priority).unwrap_or_default();
        let reason = format!("job {by} of priority {} takes its places", word.as_str().unwrap_or_default());
        let facts = Facts::from([("attempt", job.attempt.into()), ("by", by.to_string().into()), ("priority", word)]);
        turn.event(Some(victim), "job_preempted", reason.clone(), facts);
        turn.touched.insert(victim);
        if job.retry_at.is_some() {
            // Nothing of it runs.
            return self.requeue(turn, victim, &reason);
        }
        let grace = job.spec.stop_grace;
        self.end_gang(
            turn,
            victim,
            Ending { then: Then::Requeue, at: turn.now, rank: None, cause: Some(Cause::Preempted), reason, deadline: None },
            grace,
        );
    }

    /// Who is to be stopped; `None` when that would not help, or is not needed. `by`: for whom, with its attempts so far.
    pub(super) fn plan_preemption(&self, by: Option<(JobId, u32)>, priority: Priority, need: &Need) -> Option<Vec<JobId>> {
        let candidate = |other: &JobId| self.candidate(by, priority, self.jobs.get(other)?);
        let mut candidates: Vec<Candidate> = self.placed.iter().filter_map(candidate).collect();
        if candidates.is_empty() || self.pass.promises.len() >= PREEMPTING_MAX {
            return None;
        }
        candidates.sort_unstable();
        let leaving = self.held_by(self.leaving());
        if self.board_without(&leaving).choose(need, None).is_some() {
            return None;
        }
        let gone = |set: &[Candidate]| self.held_by(self.leaving().chain(set.iter().map(Candidate::id)));
        let place = self.board_without(&gone(&candidates)).choose(need, None)?;
        let on_one = self.on_one_node(need, &candidates, &leaving);
        let set = on_one.or_else(|| {
            let nodes: BTreeSet<&NodeId> = place.iter().map(|share| &share.node).collect();
            candidates.retain(|own| self.nodes_of(own.id()).any(|node| nodes.contains(node)));
            fewest(&candidates, |set| self.board_without(&gone(set)).choose(need, None).is_some())
        })?;
        Some(set.iter().map(Candidate::id).collect())
    }

    fn candidate(&self, by: Option<(JobId, u32)>, priority: Priority, other: &Job) -> Option<Candidate> {
        let gang = other.gang.as_ref().filter(|gang| !gang.is_leaving())?;
        let reached = gang.placement.iter().all(|share| self.nodes.get(&share.node).is_some_and(|node| node.linked));
        let again = by.is_some_and(|by| other.preempted.contains(&by));
        let may = other.spec.priority < priority && reached && !again;
        may.then_some(Candidate { priority: other.spec.priority, youngest: Reverse(other.id) })
    }

    fn nodes_of(&self, id: JobId) -> impl Iterator<Item = &NodeId> {
        let gang = self.jobs.get(&id).and_then(|job| job.gang.as_ref());
        gang.into_iter().flat_map(|gang| gang.placement.iter().map(|share| &share.node))
    }

    /// The cheapest set that makes room for the whole gang on one node.
    fn on_one_node(&self, need: &Need, candidates: &[Candidate], leaving: &BTreeMap<NodeId, Taken>) -> Option<Vec<Candidate>> {
        let mut by_node: BTreeMap<&NodeId, Vec<(&Candidate, Taken)>> = BTreeMap::new();
        for own in candidates {
            let Some(job) = self.jobs.get(&own.id()) else { continue };
            for (node, taken) in job.held() {
                by_node.entry(node).or_default().push((own, taken));
            }
        }
        let of_node = |(name, held): (&NodeId, Vec<(&Candidate, Taken)>)| {
            let node = self.nodes.get(name).filter(|node| node.is_open() && node.admits(name, need).is_ok())?;
            let mut base = node.taken.clone();
            leaving.get(name).into_iter().for_each(|gone| base.remove(gone));
            let promised = self.pass.promised.get(name).unwrap_or(&NOTHING);
            let own: Vec<Candidate> = held.iter().map(|(own, _)| (*own).clone()).collect();
            fewest(&own, |set| {
                let mut taken = base.clone();
                held.iter().filter(|(own, _)| set.contains(own)).for_each(|(_, gone)| taken.remove(gone));
                node.has_room(need, &Held { taken: &taken, promised, ..Held::NONE })
            })
        };
        by_node.into_iter().filter_map(of_node).min_by_key(|set| cost(set))
    }
}

pub(super) fn count(jobs: usize) -> String {
    if jobs == 1 { "1 job".into() } else { format!("{jobs} jobs") }
}
