//! Recovery in place: another process takes a lost rank's place under a new generation, and the others go on.
//!
//! A process is known by its seat, which is never used twice in an attempt; which rank has which seat is the engine's to say, and is
//! durable before any agent hears of it. The recovery is over when every rank has done a step in the new membership, and is given up for
//! the next rung when anything else fails meanwhile or it takes too long. An elastic gang goes on without the lost rank at once, under the
//! numbers from 0 on (the last rank takes the lost one's), while its successor starts as a spare does, and joins when it is ready. The trap: what a process says whose seat was given away is news
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
use super::state::{Change, Facts, Gang, Regroup, Role, Spare};
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
        if job.gang.as_ref().is_some_and(|gang| gang.rank_retry_at(rank).is_some()) {
            // Decided before, and heard again.
            return;
        }
        match decide_rung(job, rank, broken.cause) {
            Rung::Gang(why) => self.fail_gang(turn, id, Some(rank), broken, Some(why)),
            Rung::InPlace => self.recover_in_place(turn, id, rank, broken),
            Rung::Rank => self.restart_rank(turn, id, rank, broken),
        }
    }

    fn recover_in_place(&mut self, turn: &mut Turn, id: JobId, rank: u32, broken: Broken) {
        let load = self.load_of(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let exit = job.ranks.get(rank).and_then(|own| own.exit.clone());
        let joining = job.gang.as_ref().is_some_and(|gang| gang.regroup.is_some());
        // Who never took part is no loss: trying again later is all that follows.
        if !joining {
            let failure = Failure { cause: broken.cause, code: exit.as_ref().and_then(|exit| exit.code), new_step: true, at: turn.now };
            let mut budget = job.budget.clone();
            if let Decision::GiveUp { reason } = decide_restart(&job.spec.restart, &mut budget, job.seed, failure) {
                // The gang is ended and judged as ever; the budget says there what it said here.
                return self.fail_gang(turn, id, Some(rank), broken, Some(reason));
            }
            job.budget = budget;
        }
        job.book.reclaim_undetected(turn.now, broken.unseen_ms);
        job.book.turn(turn.now, Activity::Restoring);
        let Some(gang) = job.gang.as_mut() else { return };
        let former = Incarnation { job: id, attempt: gang.attempt, rank: gang.seat(rank) };
        let (change, spare) = gang.go_on_without(rank, job.spec.least_world_size());
        gang.generation += 1;
        if !joining {
            gang.floor = gang.floor.max(job.progress.reached);
        }
        gang.regroup = Some(Regroup { rank, since: turn.now, cause: broken.cause, change });
        let (generation, attempt, size) = (gang.generation, gang.attempt, gang.size());
        let shrunk = change == Change::Shrunk;
        let how = if shrunk {
            job.ranks.remove(rank);
            format!("going on with {size} ranks until another can join")
        } else {
            turn.ordered.insert(Incarnation { rank: gang.seat(rank), ..former });
            job.ranks.replace(rank, spare.as_ref().and_then(|spare| spare.pid));
            format!("recovering in place with {}", if spare.is_some() { "a spare" } else { "a new process" })
        };
        job.rates.clear();
        job.state = JobState::Recovering;
        job.reason = format!("{}; {how}", broken.reason);
        let mut facts = Facts::from([
            ("attempt", attempt.into()),
            ("generation", generation.into()),
            ("rank", rank.into()),
            ("cause", serde_json::json!(broken.cause)),
            ("spare", spare.is_some().into()),
            ("world_size", size.into()),
            ("counted", job.budget.counted.into()),
        ]);
        facts.extend(exit.as_ref().map(|exit| ("exit", serde_json::json!(exit))));
        facts.extend((!broken.stacks.is_empty()).then(|| ("stacks", serde_json::json!(broken.stacks))));
        facts.extend(load);
        turn.event(Some(id), if shrunk { "gang_shrunk" } else { "rank_replaced" }, job.reason.clone(), facts);
        turn.touched.insert(id);
        self.timers.set(Timer::Regroup(id), Timestamp(turn.now.0 + REGROUP_MAX_MS));
        if joining {
            self.grow_later(turn, id);
        } else if shrunk {
            self.fill_spares(turn, id);
        }
        if may_be_the_machine(broken.cause, exit.as_ref()) {
            self.blame(turn, id, rank, broken.cause);
        }
        self.tell_gang(turn, id, None);
        if exit.is_some() {
            self.forget(turn, id, former);
        }
    }

    /// An end that nothing hangs on any more is on record, or needs no record.
    pub(super) fn forget(&self, turn: &mut Turn, id: JobId, incarnation: Incarnation) {
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
                let small = gang.size() < gang.placed();
                let then = if small { "another one starts later" } else { "it is replaced after the next recovery" };
                turn.event(Some(id), "spare_lost", format!("a spare ended with {}; {then}", exited.exit.describe()), facts);
                if small {
                    self.grow_later(turn, id);
                }
            }
            turn.touched.insert(id);
        }
        self.forget(turn, id, exited.incarnation);
        self.end_attempt_when_over(turn, id);
    }

    /// Reserves a seat for each spare that is missing, and for each rank that is to join.
    pub(super) fn fill_spares(&mut self, turn: &mut Turn, id: JobId) {
        let later = self.timers.is_set(&Timer::Grow(id));
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        let joining = if later { 0 } else { gang.placed() - gang.size() };
        let wanted = (job.spec.restart.spares + joining) as usize;
        let on_gpus = gang.placement.iter().any(|share| !share.gpus.is_empty());
        if wanted > 0 && (on_gpus || gang.is_spread()) {
            let which = if on_gpus { "on GPUs" } else { "on several nodes" };
            let reason = format!("spares are left out: ranks {which} do not recover in place");
            turn.event(Some(id), "spares_off", reason, Facts::from([("attempt", gang.attempt.into())]));
            return;
        }
        while gang.spares.len() < wanted {
            let seat = gang.take_seat(job.spec.world_size);
            gang.spares.push(Spare { seat, pid: None, phase: None, beat_at: None, is_ready: false });
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
        let Some(Regroup { rank, since, change, .. }) = gang.regroup.take() else { return };
        let (attempt, generation, size) = (gang.attempt, gang.generation, gang.size());
        let fills = size < gang.placed() || job.spec.restart.spares > 0;
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
            ("world_size", size.into()),
        ]);
        let (event, what) = match change {
            Change::Replaced => ("recovered_in_place", format!("rank {rank} has a new process")),
            Change::Shrunk => ("recovered_in_place", format!("{size} ranks go on without one")),
            Change::Grown => ("gang_grown", format!("rank {rank} has joined")),
        };
        turn.event(Some(id), event, format!("{what}; all ranks step again after {took_ms} ms"), facts);
        turn.touched.insert(id);
        if fills {
            self.fill_spares(turn, id);
            self.tell_gang(turn, id, None);
        }
        if self.short.contains(&id) {
            self.take_free_places(turn);
        }
    }

    pub(super) fn on_regroup_due(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(regroup) = job.gang.as_mut().and_then(|gang| gang.regroup.take()) else { return };
        let what = if regroup.change == Change::Grown { "joining" } else { "the recovery in place" };
        let reason = format!("{what} of rank {} did not end within {} min", regroup.rank, REGROUP_MAX_MS / 60_000);
        let broken = Broken::new(regroup.cause, reason, 0, true);
        self.fail_gang(turn, id, None, broken, Some("a rung that fails leads to the next".into()));
    }
}

impl Gang {
    /// From here on it is said which rank has which seat.
    pub(super) fn begin_seats(&mut self) {
        if self.seats.is_empty() {
            self.seats = (0..self.placed()).collect();
        }
    }

    fn take_seat(&mut self, world_size: u32) -> u32 {
        let seat = self.next_seat.max(world_size);
        self.next_seat = seat + 1;
        seat
    }

    /// Gives a rank's place to a spare that lives, to nobody while `least` are left, or to a process that is yet to start.
    fn go_on_without(&mut self, rank: u32, least: u32) -> (Change, Option<Spare>) {
        self.begin_seats();
        let can_shrink = self.size() > least;
        // Rather fewer ranks now than one that is not ready yet.
        let usable = |spare: &Spare| spare.pid.is_some() && (spare.is_ready || !can_shrink);
        let spare = self.spares.iter().position(usable).map(|index| self.spares.remove(index));
        if spare.is_none() && can_shrink {
            self.seats.swap_remove(rank as usize);
            return (Change::Shrunk, None);
        }
        let Some(spare) = spare else {
            self.replace_seat(rank);
            return (Change::Replaced, None);
        };
        if let Some(own) = self.seats.get_mut(rank as usize) {
            *own = spare.seat;
        }
        (Change::Replaced, Some(spare))
    }

    /// A seat that nobody had, for a process that is yet to start.
    pub(super) fn replace_seat(&mut self, rank: u32) -> u32 {
        self.begin_seats();
        let seat = self.take_seat(self.placed());
        if let Some(own) = self.seats.get_mut(rank as usize) {
            *own = seat;
        }
        seat
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_is_never_given_twice_and_a_living_spare_comes_first() {
        let spare = |seat, pid| Spare { seat, pid, phase: None, beat_at: None, is_ready: false };
        let mut gang: Gang = serde_json::from_value(serde_json::json!({
            "attempt": 1, "generation": 0, "placement": [{"node": "n1", "first_rank": 0, "count": 2}], "port": 1, "placed_at": "2026-01-01T00:00:00Z", "running_at": null,
            "resumed_step": null, "floor": 0, "ending": null,
        }))
        .expect("a row of before there were seats");
        assert_eq!((gang.role(1), gang.seat(1)), (Role::Rank(1), 1));
        assert_eq!(gang.take_seat(2), 2);
        gang.spares = vec![spare(2, None), spare(3, Some(7))];
        gang.next_seat = 4;
        assert_eq!(gang.go_on_without(1, 2).1.map(|spare| spare.seat), Some(3));
        assert_eq!((gang.role(1), gang.role(3), gang.role(2), gang.role(0)), (Role::Former, Role::Rank(1), Role::Spare, Role::Rank(0)));
        assert_eq!(gang.go_on_without(0, 2), (Change::Replaced, None));
        assert_eq!((gang.seats.clone(), gang.next_seat), (vec![4, 3], 5));
    }

    #[test]
    fn an_elastic_gang_shrinks_to_its_least_and_the_last_rank_takes_the_number() {
        let mut gang: Gang = serde_json::from_value(serde_json::json!({
            "attempt": 1, "generation": 0, "placement": [{"node": "n1", "first_rank": 0, "count": 4}], "port": 1, "placed_at": "2026-01-01T00:00:00Z", "running_at": null,
            "resumed_step": null, "floor": 0, "ending": null,
        }))
        .expect("a row");
        gang.spares = vec![Spare { seat: 4, pid: Some(9), phase: None, beat_at: None, is_ready: false }];
        gang.next_seat = 5;
        assert_eq!((gang.go_on_without(1, 2), gang.seats.clone()), ((Change::Shrunk, None), vec![0, 3, 2]), "the spare is not ready");
        assert_eq!((gang.go_on_without(2, 2), gang.seats.clone()), ((Change::Shrunk, None), vec![0, 3]));
        assert_eq!((gang.size(), gang.placed(), gang.role(1), gang.role(2)), (2, 4, Role::Former, Role::Former));
        assert_eq!(gang.go_on_without(0, 2).0, Change::Replaced, "never fewer than asked for");
        assert_eq!(gang.seats, [4, 3]);
    }
}
