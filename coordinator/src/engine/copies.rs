//! Copies of checkpoints on other nodes: which are wanted, who makes them, and from where a gang fetches what its nodes do not have.
//!
//! Of each job the newest verified checkpoint is copied, one at a time, and never for more than half of the time. A node that was told to
//! copy is remembered with the job: it has files of it. The trap: what an attempt commits after another has begun elsewhere is no checkpoint;
//! its node is told so as soon as it tells of it.

use everlit_api::agent::copies::{CopyOrder, Fetch, Source};
use everlit_api::agent::{CheckpointNews, ToAgent};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::status::{CheckpointView, PlacedRanks};
use everlit_api::time::Timestamp;

use super::limits::{COPY_LOOK_MS, COPY_REST_MIN_MS, COPY_WAIT_MAX_MS, FETCHES_MAX};
use super::placement::Node;
use super::state::{Facts, Job};
use super::timers::Timer;
use super::{Engine, Turn};

/// A job's copying as it goes: nothing of it outlives the coordinator.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Copying {
    /// Who makes a copy of which step, and since when.
    under_way: Option<(NodeId, u64, Timestamp)>,
    /// The next one begins no sooner.
    not_before: Timestamp,
    /// Who failed last: another one is better.
    failed: Option<NodeId>,
    /// How many have failed in a row, and when that was told.
    failures: u32,
    told_at: Option<Timestamp>,
    /// A step that could not be fetched for a start, and how often.
    unfetched: Option<(u64, u32)>,
}

impl Node {
    /// Its agent gives and takes copies now.
    fn copies(&self) -> bool {
        self.linked && self.copies && self.address.is_some() && !self.expelled
    }

    /// It may be told to keep one.
    fn takes_copies(&self) -> bool {
        self.copies() && self.is_open()
    }
}

impl Engine {
    /// Has the newest verified checkpoint of a job copied, if there are fewer copies than are wanted and somebody can make one.
    pub(super) fn copy_newest(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id).filter(|job| !job.state.is_final() && job.copying.under_way.is_none()) else { return };
        let Some(newest) = job.lacks_copies(|c| c.verified || self.is_leaving(c)) else { return };
        if turn.now < job.copying.not_before && !self.is_leaving(newest) {
            return self.timers.set(Timer::Copies(id), job.copying.not_before);
        }
        let Some((to, order)) = self.next_copies(job, |c| c.verified || self.is_leaving(c)) else { return };
        let Some(to) = to.into_iter().next() else { return };
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.copying.under_way = Some((to.clone(), order.step, turn.now));
        job.keep_on(&to);
        turn.touched.insert(id);
        turn.tell(&to, ToAgent::CopyCheckpoint(order));
    }

    /// A job ends: the copies of what it leaves are ordered, and nobody waits for them.
    pub(super) fn copy_last(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id).filter(|job| !job.delete_when_final) else { return };
        let Some((to, order)) = self.next_copies(job, |_| true) else { return };
        for node in to {
            if let Some(job) = self.jobs.get_mut(&id) {
                job.keep_on(&node);
            }
            turn.tell(&node, ToAgent::CopyCheckpoint(order.clone()));
        }
    }

    /// Who is to copy what of a job next: as many as copies are lacking, the best first.
    fn next_copies(&self, job: &Job, counts: impl Fn(&CheckpointView) -> bool) -> Option<(Vec<NodeId>, CopyOrder)> {
        let newest = job.lacks_copies(counts)?;
        let sources = self.sources(newest, None);
        if sources.is_empty() {
            return None;
        }
        let need = job.need();
        let able = self.nodes.iter().filter(|(name, node)| node.takes_copies() && !newest.nodes().any(|own| own == *name));
        // Where it could run, and where older ones are; who is chosen else is the same each time, and different for each job.
        let order = |(name, node): &(&NodeId, &Node)| {
            let failed = job.copying.failed.as_ref() == Some(*name);
            (failed, node.admits(name, &need).is_err(), node.avoided(), !job.copies_on.contains(name), weight(job.id, name))
        };
        let mut able: Vec<_> = able.collect();
        able.sort_by_cached_key(order);
        let lacking = (job.spec.checkpoint.copies as usize).saturating_sub(newest.also_on.len());
        let to = able.into_iter().take(lacking).map(|(name, _)| name.clone()).collect();
        let (step, bytes, keep) = (newest.step, newest.bytes, job.spec.checkpoint.keep);
        Some((to, CopyOrder { job: job.id, step, bytes, attempt: job.attempt, keep, sources }))
    }

    fn sources(&self, view: &CheckpointView, except: Option<&NodeId>) -> Vec<Source> {
        let gives = |name: &&NodeId| Some(*name) != except && self.nodes.get(*name).is_some_and(Node::copies);
        view.nodes().filter(gives).map(Source::named).collect()
    }

    /// All who have it are about to go.
    fn is_leaving(&self, view: &CheckpointView) -> bool {
        view.nodes().all(|name| self.nodes.get(name).is_some_and(|node| node.draining))
    }

    /// A node's agent ends: what only it has of jobs goes to another at once.
    pub(super) fn copy_from_leaving(&mut self, turn: &mut Turn, node: &NodeId) {
        let lonely =
            |job: &&Job| job.checkpoints.first().is_some_and(|newest| newest.nodes().any(|own| own == node) && self.is_leaving(newest));
        let jobs: Vec<JobId> = self.jobs.values().filter(lonely).map(|job| job.id).collect();
        jobs.into_iter().for_each(|id| self.copy_newest(turn, id));
    }

    /// A node told of checkpoints of a job: if it was to make a copy, that is done.
    pub(super) fn note_copied(&mut self, turn: &mut Turn, node: &NodeId, news: &CheckpointNews) {
        let Some(job) = self.jobs.get_mut(&news.job) else { return };
        if let Some((to, step, since)) = &job.copying.under_way
            && to == node
            && news.step >= *step
        {
            let took_ms = turn.now.since_ms(*since);
            let (not_before, told_at) = (Timestamp(turn.now.0 + took_ms.max(COPY_REST_MIN_MS)), job.copying.told_at);
            job.copying = Copying { not_before, told_at, ..Copying::default() };
        }
        self.copy_newest(turn, news.job);
    }

    pub(super) fn on_copy_failed(&mut self, turn: &mut Turn, node: &NodeId, id: JobId, step: u64, reason: &str) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.copying.under_way.as_ref().is_none_or(|(to, of, _)| to != node || *of != step) {
            return;
        }
        job.copying.under_way = None;
        // Where no node can, ports are closed or disks are full: that is asked ever more seldom, and told no more often.
        let wait_ms = (COPY_LOOK_MS << job.copying.failures.min(16)).min(COPY_WAIT_MAX_MS);
        job.copying.failures += 1;
        job.copying.failed = Some(node.clone());
        job.copying.not_before = Timestamp(turn.now.0 + wait_ms);
        self.timers.set(Timer::Copies(id), job.copying.not_before);
        if job.copying.told_at.is_none_or(|at| turn.now.since_ms(at) >= COPY_WAIT_MAX_MS) {
            job.copying.told_at = Some(turn.now);
            let facts = Facts::from([("step", step.into()), ("node", node.0.clone().into()), ("reason", reason.into())]);
            turn.event(Some(id), "checkpoint_copy_failed", format!("{node} could not copy the checkpoint of step {step}: {reason}"), facts);
            turn.touched.insert(id);
        }
    }

    /// Who was to make copies there is asked no more.
    pub(super) fn stop_copies_on(&mut self, node: &NodeId, now: Timestamp) {
        for (id, job) in &mut self.jobs {
            if job.copying.under_way.as_ref().is_some_and(|(to, ..)| to == node) {
                job.copying.under_way = None;
                self.timers.set(Timer::Copies(*id), Timestamp(now.0 + COPY_LOOK_MS));
            }
        }
    }

    /// A node came that may give or take copies: jobs that lack some are looked at soon, when others have come, too.
    pub(super) fn look_at_copies(&mut self, now: Timestamp) {
        for (id, job) in &self.jobs {
            let timer = Timer::Copies(*id);
            if job.copying.under_way.is_none() && job.lacks_copies(|c| c.verified).is_some() && !self.timers.is_set(&timer) {
                self.timers.set(timer, Timestamp(now.0 + COPY_LOOK_MS));
            }
        }
    }

    /// What a node of a gang is to fetch before its ranks start, if others have more than it may have.
    pub(super) fn fetch_for(&self, job: &Job, placement: &[PlacedRanks], node: &NodeId) -> Option<Fetch> {
        let of = job.begins_from().filter(|_| job.checkpoints.is_empty());
        let running = of.and_then(|of| self.jobs.get(&of));
        let views = match of {
            None => &job.checkpoints,
            Some(_) => running.map_or(&job.origin, |other| &other.checkpoints),
        };
        for view in views {
            let given_up = job.copying.unfetched.is_some_and(|(step, count)| step == view.step && count >= FETCHES_MAX);
            let rejected = of.is_none() && job.rejected_step() == Some(view.step);
            if rejected || (given_up && views.last().is_some_and(|oldest| oldest.step < view.step)) {
                continue;
            }
            if job.spec.worker.is_none() && view.nodes().filter(|own| !job.copies_on.contains(own)).count() > 1 {
                // What a program that is not ours has saved on several nodes need not be the same there.
                return None;
            }
            let among_them = view.nodes().any(|own| placement.iter().any(|share| share.node == *own));
            let sources = self.sources(view, Some(node));
            if !sources.is_empty() {
                return Some(Fetch { of, step: view.step, bytes: view.bytes, required: !among_them, sources });
            }
            if among_them {
                return None;
            }
        }
        None
    }

    /// A job is over: who begins from it is told what it has left.
    pub(super) fn hand_on(&mut self, id: JobId) {
        let Some(left) = self.jobs.get(&id).map(|job| job.checkpoints.clone()) else { return };
        for job in self.jobs.values_mut().filter(|job| !job.origin.is_empty() && job.begins_from() == Some(id)) {
            job.origin.clone_from(&left);
        }
    }

    /// Says so when a new attempt can not have its job's newest checkpoint.
    pub(super) fn tell_what_is_out_of_reach(&self, turn: &mut Turn, job: &Job, placement: &[PlacedRanks]) {
        let Some(newest) = job.checkpoints.first() else { return };
        let held = |view: &CheckpointView| view.nodes().any(|own| placement.iter().any(|share| share.node == *own));
        if held(newest) || newest.stored.is_some() || !self.sources(newest, None).is_empty() {
            return;
        }
        let next = job
            .checkpoints
            .iter()
            .find(|view| held(view) || view.stored.is_some() || !self.sources(view, None).is_empty())
            .map(|view| view.step);
        let then = next.map_or("begins anew".into(), |step| format!("goes on from step {step}"));
        let place = newest.nodes().map(|node| node.0.as_str()).collect::<Vec<_>>().join(", ");
        let facts = Facts::from([("step", newest.step.into()), ("nodes", place.clone().into())]);
        let reason = format!("the checkpoint of step {} is on {place} and can not be fetched from there: the job {then}", newest.step);
        turn.event(Some(job.id), "checkpoint_out_of_reach", reason, facts);
    }

    /// Whether it was committed after a later attempt had begun elsewhere. Then its node is told to put it aside.
    pub(super) fn is_late(&self, turn: &mut Turn, node: &NodeId, news: &CheckpointNews) -> bool {
        let Some(job) = self.jobs.get(&news.job).filter(|job| news.attempt < job.attempt) else { return false };
        let runs_there = job.gang.as_ref().is_some_and(|gang| gang.placement.iter().any(|share| share.node == *node));
        let known = job.checkpoints.iter().any(|own| own.step == news.step && own.attempt == news.attempt);
        let beyond = job.checkpoints.iter().filter(|own| own.attempt <= news.attempt).map(|own| own.step).max();
        if runs_there || known || beyond.is_some_and(|beyond| news.step <= beyond) {
            return false;
        }
        turn.tell(node, ToAgent::PutAside { job: news.job, attempt: news.attempt, beyond });
        true
    }
}

impl Job {
    /// The newest checkpoint that counts, when fewer nodes have it than are wanted.
    fn lacks_copies(&self, counts: impl Fn(&CheckpointView) -> bool) -> Option<&CheckpointView> {
        if self.gang.as_ref().map_or(&self.ran_on, |gang| &gang.placement).len() > 1 {
            // Each of its nodes saves for itself.
            return None;
        }
        let newest = self.checkpoints.iter().find(|view| counts(view))?;
        (newest.also_on.len() < self.spec.checkpoint.copies as usize).then_some(newest)
    }

    /// The job whose checkpoint it begins from.
    pub(super) fn begins_from(&self) -> Option<JobId> {
        self.spec.resume_from.as_ref()?.parse().ok()
    }

    /// A node will have files of it.
    fn keep_on(&mut self, node: &NodeId) {
        if !self.copies_on.contains(node) {
            self.copies_on.push(node.clone());
        }
    }

    /// Every node that has files of it: where its ranks were, and where copies are.
    pub fn keepers(&self) -> Vec<NodeId> {
        let mut all = self.nodes.clone();
        all.extend(self.copies_on.iter().filter(|node| !self.nodes.contains(node)).cloned());
        all
    }

    /// An attempt could not be started although all that it needed was a checkpoint from elsewhere.
    pub(super) fn note_unfetched(&mut self, fetch: Option<Fetch>) {
        if let Some(fetch) = fetch.filter(|fetch| fetch.required) {
            let before = self.copying.unfetched.filter(|(step, _)| *step == fetch.step).map_or(0, |(_, count)| count);
            self.copying.unfetched = Some((fetch.step, before + 1));
        }
    }
}

/// The same for a job and a node, ever; FNV-1a.
fn weight(job: JobId, node: &NodeId) -> u64 {
    let bytes = job.as_u128().to_le_bytes();
    bytes.iter().chain(node.0.as_bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
