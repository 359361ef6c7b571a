//! Recovery in place: another process takes a lost rank's place under a new generation, and the others go on.
//!
//! A process is known by its seat, which is never used twice in an attempt; which rank has which seat is the engine's to say, and is
//! durable before any agent hears of it. The recovery is over when every rank has done a step in the new membership, and is given up for
//! the next rung when anything else fails meanwhile or it takes too long. The trap: what a process says whose seat was given away is news
//! of nobody; its end must still be forgotten, or its agent would tell of it for ever.

use everlit_api::agent::{Exited, ToAgent};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::status::JobState;
use everlit_api::time::Timestamp;

use super::blame::may_be_the_machine;
use super::gang::Broken;
use super::ladder::{Rung, decide_rung};
use super::ledger::Activity;
use super::limits::REGROUP_MAX_MS;
use super::restart::{Decision, Failure, decide_restart};
use super::state::{Facts, Gang, Regroup, Role, Spare};
use super::timers::Timer;
use super::{Engine, Turn};

impl Engine {
    /// What a process of the current attempt is; `None` when the news is of another attempt.
    pub(super) fn role(&mut self, incarnation: Incarnation) -> Option<Role> {
        let job = self.current(incarnation.job, incarnation.attempt)?;
        job.gang.as_ref().map(|gang| gang.role(incarnation.rank))
    }

    /// A rank failed in a gang that was not ending: the cheapest rung that holds.
    pub(super) fn on_rank_broken(&mut self, turn: &mut Turn, id: JobId, rank: u32, broken: Broken) {
        let Some(job) = self.jobs.get(&id) else { return };
        match decide_rung(job, rank, broken.cause) {
            Rung::Gang(why) => self.fail_gang(turn, id, Some(rank), broken, Some(why)),
            Rung::InPlace => self.recover_in_place(turn, id, rank, broken),
        }
    }

    fn recover_in_place(&mut self, turn: &mut Turn, id: JobId, rank: u32, broken: Broken) {
        let load = self.load_of(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let exit = job.ranks.get(rank).and_then(|own| own.exit.clone());
        let failure = Failure { cause: broken.cause, code: exit.as_ref().and_then(|exit| exit.code), new_step: true, at: turn.now };
        let mut budget = job.budget.clone();
        if let Decision::GiveUp { reason } = decide_restart(&job.spec.restart, &mut budget, job.seed, failure) {
            // The gang is ended and judged as ever; the budget says there what it said here.
            return self.fail_gang(turn, id, Some(rank), broken, Some(reason));
        }
        job.budget = budget;
        job.book.reclaim_undetected(turn.now, broken.unseen_ms);
        job.book.turn(turn.now, Activity::Restoring);
        let Some(gang) = job.gang.as_mut() else { return };
        let former = Incarnation { job: id, attempt: gang.attempt, rank: gang.seat(rank) };
        let spare = gang.replace(rank, job.spec.world_size);
        gang.generation += 1;
        gang.floor = gang.floor.max(job.progress.reached);
        gang.regroup = Some(Regroup { rank, since: turn.now, cause: broken.cause });
        let (generation, attempt) = (gang.generation, gang.attempt);
        turn.ordered.insert(Incarnation { rank: gang.seat(rank), ..former });
        job.ranks.replace(rank, spare.as_ref().and_then(|spare| spare.pid));
        job.rates.clear();
        let with = if spare.is_some() { "a spare" } else { "a new process" };
        job.state = JobState::Recovering;
        job.reason = format!("{}; recovering in place with {with}", broken.reason);
        let mut facts = Facts::from([
            ("attempt", attempt.into()),
            ("generation", generation.into()),
            ("rank", rank.into()),
            ("cause", serde_json::json!(broken.cause)),
            ("spare", spare.is_some().into()),
            ("counted", job.budget.counted.into()),
        ]);
        facts.extend(exit.as_ref().map(|exit| ("exit", serde_json::json!(exit))));
        facts.extend((!broken.stacks.is_empty()).then(|| ("stacks", serde_json::json!(broken.stacks))));
        facts.extend(load);
        turn.event(Some(id), "rank_replaced", job.reason.clone(), facts);
        turn.touched.insert(id);
        self.timers.set(Timer::Regroup(id), Timestamp(turn.now.0 + REGROUP_MAX_MS));
        if may_be_the_machine(broken.cause, exit.as_ref()) {
            self.blame(turn, id, rank, broken.cause);
        }
        self.tell_gang(turn, id, None);
        if exit.is_some() {
            self.forget(turn, id, former);
        }
    }

    /// An end that nothing hangs on any more is on record, or needs no record.
    fn forget(&self, turn: &mut Turn, id: JobId, incarnation: Incarnation) {
        let Some(gang) = self.jobs.get(&id).and_then(|job| job.gang.as_ref()) else { return };
        for share in &gang.placement {
            turn.tell(&share.node, ToAgent::Forget { incarnations: vec![incarnation] });
        }
    }

    /// The end of a process that is no member: a spare, or one whose place another has.
    pub(super) fn on_outsider_exited(&mut self, turn: &mut Turn, exited: &Exited) {
        let id = exited.incarnation.job;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let through = job.ranks.all_ended();
        if let Some(gang) = &mut job.gang {
            let before = gang.spares.len();
            gang.spares.retain(|spare| spare.seat != exited.incarnation.rank);
            if gang.spares.len() < before && gang.ending.is_none() && !through {
                let facts = Facts::from([("attempt", gang.attempt.into()), ("exit", serde_json::json!(exited.exit))]);
                let reason = format!("a spare ended with {}; it is replaced after the next recovery", exited.exit.describe());
                turn.event(Some(id), "spare_lost", reason, facts);
            }
            turn.touched.insert(id);
        }
        self.forget(turn, id, exited.incarnation);
        self.end_attempt_when_over(turn, id);
    }

    /// Reserves a seat for each spare that is missing.
    pub(super) fn fill_spares(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let wanted = job.spec.restart.spares as usize;
        let Some(gang) = job.gang.as_mut() else { return };
        if wanted > 0 && gang.placement.iter().any(|share| !share.gpus.is_empty()) {
            let reason = "spares are left out: ranks on GPUs do not recover in place";
            turn.event(Some(id), "spares_off", reason, Facts::from([("attempt", gang.attempt.into())]));
            return;
        }
        while gang.spares.len() < wanted {
            let seat = gang.take_seat(job.spec.world_size);
            gang.spares.push(Spare { seat, pid: None, phase: None, beat_at: None });
        }
    }

    /// Every rank has done a step in the new membership: the recovery is over.
    pub(super) fn settle_regroup(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut().filter(|gang| gang.ending.is_none()) else { return };
        let done = |own: &super::state::Rank| own.stepped_in == Some(gang.generation);
        if gang.regroup.is_none() || !job.ranks.list().iter().all(done) {
            return;
        }
        let Some(Regroup { rank, since, .. }) = gang.regroup.take() else { return };
        let (attempt, generation) = (gang.attempt, gang.generation);
        self.timers.clear(&Timer::Regroup(id));
        job.state = JobState::Running;
        job.reason = format!("attempt {attempt} runs");
        job.book.turn(turn.now, Activity::Training);
        job.advance(turn.now);
        let took_ms = turn.now.since_ms(since);
        let facts = Facts::from([
            ("attempt", attempt.into()),
            ("generation", generation.into()),
            ("rank", rank.into()),
            ("took_ms", took_ms.into()),
            ("step", job.progress.step.into()),
        ]);
        turn.event(
            Some(id),
            "recovered_in_place",
            format!("rank {rank} has a new process; all ranks step again after {took_ms} ms"),
            facts,
        );
        turn.touched.insert(id);
        if job.spec.restart.spares > 0 {
            self.fill_spares(turn, id);
            self.tell_gang(turn, id, None);
        }
    }

    pub(super) fn on_regroup_due(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(regroup) = job.gang.as_mut().and_then(|gang| gang.regroup.take()) else { return };
        let reason = format!("the recovery in place of rank {} did not end within {} min", regroup.rank, REGROUP_MAX_MS / 60_000);
        let broken = Broken::new(regroup.cause, reason, 0, true);
        self.fail_gang(turn, id, None, broken, Some("a rung that fails leads to the next".into()));
    }
}

impl Gang {
    fn take_seat(&mut self, world_size: u32) -> u32 {
        let seat = self.next_seat.max(world_size);
        self.next_seat = seat + 1;
        seat
    }

    /// Gives a rank's place to a spare that lives, or to a process that is yet to start; answers the spare.
    fn replace(&mut self, rank: u32, world_size: u32) -> Option<Spare> {
        if self.seats.is_empty() {
            self.seats = (0..world_size).collect();
        }
        let spare = self.spares.iter().position(|spare| spare.pid.is_some()).map(|index| self.spares.remove(index));
        let seat = spare.as_ref().map_or_else(|| self.take_seat(world_size), |spare| spare.seat);
        if let Some(own) = self.seats.get_mut(rank as usize) {
            *own = seat;
        }
        spare
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_is_never_given_twice_and_a_living_spare_comes_first() {
        let spare = |seat, pid| Spare { seat, pid, phase: None, beat_at: None };
        let mut gang: Gang = serde_json::from_value(serde_json::json!({
            "attempt": 1, "generation": 0, "placement": [{"node": "n1", "first_rank": 0, "count": 2}], "port": 1, "placed_at": "2026-01-01T00:00:00Z", "running_at": null,
            "resumed_step": null, "floor": 0, "ending": null,
        }))
        .expect("a row of before there were seats");
        assert_eq!((gang.role(1), gang.seat(1)), (Role::Rank(1), 1));
        assert_eq!(gang.take_seat(2), 2);
        gang.spares = vec![spare(2, None), spare(3, Some(7))];
        gang.next_seat = 4;
        assert_eq!(gang.replace(1, 2).map(|spare| spare.seat), Some(3));
        assert_eq!((gang.role(1), gang.role(3), gang.role(2), gang.role(0)), (Role::Former, Role::Rank(1), Role::Spare, Role::Rank(0)));
        assert_eq!(gang.replace(0, 2), None);
        assert_eq!((gang.seats.clone(), gang.next_seat), (vec![4, 3], 5));
    }
}
