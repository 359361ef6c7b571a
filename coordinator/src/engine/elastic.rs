//! Elastic gangs (`min_world_size`): with fewer ranks than asked for when they begin where there is no room for all, and more when there is.
//!
//! Places come first and processes follow: a gang takes what has become free on its node once no job waits for it, a process is started
//! like a spare for each place that is empty, and joins as the last rank when it is ready and all others have stepped. Nothing is taken
//! from a gang again to make room. The trap: a gang on GPUs recovers nothing in place, so it gets its new places at its next attempt.

use everlit_api::ids::JobId;
use everlit_api::rank::Cause;
use everlit_api::status::{JobState, PlacedRanks};
use everlit_api::time::Timestamp;

use super::ledger::Activity;
use super::limits::{GROW_RETRY_MIN_MS, REGROUP_MAX_MS};
use super::placement::Need;
use super::state::{Change, Facts, Job, Regroup};
use super::timers::Timer;
use super::{Engine, Turn};

impl Engine {
    /// A process that waits for it joins a gang that has fewer ranks than places.
    pub(super) fn grow(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut().filter(|gang| gang.size() < gang.placed() && gang.ending.is_none() && gang.regroup.is_none())
        else {
            return;
        };
        let steps = |own: &super::state::Rank| own.pid.is_some() && own.in_place == Some(true) && own.stepped_in == Some(gang.generation);
        let ready = gang.spares.iter().position(|spare| spare.pid.is_some() && spare.is_ready);
        let Some(index) = ready.filter(|_| job.ranks.list().iter().all(steps)) else { return };
        let spare = gang.spares.remove(index);
        let rank = gang.size();
        gang.seats.push(spare.seat);
        gang.generation += 1;
        // Should it not come to that, it never started.
        gang.regroup = Some(Regroup { rank, since: turn.now, cause: Cause::NoStart, change: Change::Grown });
        job.ranks.join(spare.pid);
        job.rates.clear();
        job.book.turn(turn.now, Activity::Restoring);
        let facts = Facts::from([
            ("attempt", gang.attempt.into()),
            ("generation", gang.generation.into()),
            ("rank", rank.into()),
            ("world_size", gang.size().into()),
        ]);
        turn.event(Some(id), "gang_growing", format!("a process that was ready joins as rank {rank}"), facts);
        turn.touched.insert(id);
        self.timers.set(Timer::Regroup(id), Timestamp(turn.now.0 + REGROUP_MAX_MS));
        self.tell_gang(turn, id, None);
    }

    pub(super) fn grow_later(&mut self, turn: &Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let wait_ms = job.spec.restart.backoff.max.0.max(GROW_RETRY_MIN_MS);
        self.timers.set(Timer::Grow(id), Timestamp(turn.now.0 + wait_ms));
    }

    pub(super) fn on_grow_due(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id).filter(|job| job.retry_at.is_none() && !job.ranks.all_ended()) else { return };
        // A membership that is under way is followed by this anyway.
        if job.gang.as_ref().is_some_and(|gang| gang.ending.is_none() && gang.regroup.is_none() && gang.size() < gang.placed()) {
            self.fill_spares(turn, id);
            turn.touched.insert(id);
            self.tell_gang(turn, id, None);
        }
    }

    /// Nobody waits for what is free: gangs that began with fewer ranks take it, the oldest job first.
    pub(super) fn take_free_places(&mut self, turn: &mut Turn) {
        if self.queue.head().is_some() {
            return;
        }
        for id in self.short.clone() {
            let Some(job) = self.jobs.get(&id).filter(|job| job.may_take_places()) else { continue };
            let Some((share, more)) = self.room_beside(job) else { continue };
            let need = Need { spares: 0, ..job.need() };
            if let Some(node) = self.nodes.get_mut(&share) {
                node.take(&need.taken(more, &[]));
            }
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let whole = job.spec.world_size;
            let Some(gang) = job.gang.as_mut() else { continue };
            gang.begin_seats();
            gang.placement.iter_mut().for_each(|share| share.count += more);
            let placed = gang.placed();
            let facts = Facts::from([("attempt", gang.attempt.into()), ("places", placed.into()), ("world_size", whole.into())]);
            turn.event(Some(id), "places_added", format!("there is room for {placed} of {whole} ranks now"), facts);
            turn.touched.insert(id);
            if placed == whole {
                self.short.remove(&id);
            }
            self.fill_spares(turn, id);
            self.tell_gang(turn, id, None);
        }
    }

    /// How many ranks more its own node holds.
    fn room_beside(&self, job: &Job) -> Option<(everlit_api::ids::NodeId, u32)> {
        let share = job.gang.as_ref()?.placement.first()?;
        let node = self.nodes.get(&share.node).filter(|node| node.is_open())?;
        let need = job.need();
        let more = (1..=job.spec.world_size - share.count).rev().find(|more| node.has_room_beside(share.count, *more, &need))?;
        Some((share.node.clone(), more))
    }

    /// The same places, and those beside them that are free: for a gang that has given its own back.
    pub(super) fn places_again(&self, job: &Job, placement: Vec<PlacedRanks>) -> Vec<PlacedRanks> {
        let [share] = placement.as_slice() else { return placement };
        let short = share.count < job.spec.world_size && self.queue.head().is_none();
        let Some(node) = self.nodes.get(&share.node).filter(|_| short) else { return placement };
        match node.most(&Need { least: share.count, ..job.need() }) {
            Some((count, gpus)) => vec![PlacedRanks { count, gpus, ..share.clone() }],
            None => placement,
        }
    }
}

impl Job {
    /// It runs with fewer ranks than were asked for, and can take others in as it is.
    fn may_take_places(&self) -> bool {
        let whole = self.spec.world_size;
        let takes = |gang: &super::state::Gang| {
            let alone = gang.placement.len() == 1 && gang.placement.iter().all(|share| share.gpus.is_empty());
            alone && gang.placed() < whole && gang.ending.is_none() && gang.regroup.is_none()
        };
        self.state == JobState::Running && self.retry_at.is_none() && !self.ranks.some_succeeded() && self.gang.as_ref().is_some_and(takes)
    }
}
