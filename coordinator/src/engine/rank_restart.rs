//! Single ranks are restarted (`restart.scope: rank`): programs whose ranks need each other in no step lose nobody but the one that failed.
//!
//! The rank that failed gets another process in the same attempt after its own backoff, and the others hear nothing of it. What it may
//! still spend in a row is counted for each rank, what it costs in all for the job. A process that hangs is replaced at once: it has made
//! everybody wait long enough, and only a new membership has its agent kill it. The trap: an agent that knows nothing of the attempt any
//! more would start every rank of it, those that are done too, so what is left of the attempt ends then (`look_for_missing`).

use everlit_api::ids::{Incarnation, JobId};
use everlit_api::status::JobState;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::blame::may_be_the_machine;
use super::gang::Broken;
use super::ledger::Activity;
use super::limits::MUTE_PROGRESS_MS;
use super::restart::{Decision, Failure, decide_restart};
use super::state::{Budget, Facts, Gang, Job, Then};
use super::timers::Timer;
use super::{Engine, Turn};

/// A rank that was restarted alone, or waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRestart {
    /// Its next process starts then.
    pub retry_at: Option<Timestamp>,
    /// When its newest process was ordered.
    pub since: Timestamp,
    /// The highest step that any process of it told of.
    pub floor: u64,
    /// Counted failures in a row without a new step of its own.
    pub start_failures: u32,
    /// Failures of any cause in a row without a new step of its own.
    pub failures_in_a_row: u32,
}

impl Engine {
    /// A rank failed, and the others do not need it.
    pub(super) fn restart_rank(&mut self, turn: &mut Turn, id: JobId, rank: u32, broken: Broken) {
        let load = self.load_of(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        let exit = job.ranks.get(rank).and_then(|own| own.exit.clone());
        let step = job.ranks.get(rank).and_then(|own| own.step);
        let at = exit.as_ref().map_or(turn.now, |exit| exit.at);
        let own = gang.restart_of(rank);
        let new_step = step.map_or(at.since_ms(own.since) >= MUTE_PROGRESS_MS, |step| step > own.floor);
        own.floor = own.floor.max(step.unwrap_or(0));
        let failure = Failure { cause: broken.cause, code: exit.as_ref().and_then(|exit| exit.code), new_step, at };
        // What is in a row is the rank's, all else is the job's.
        let mut budget = Budget { start_failures: own.start_failures, failures_in_a_row: own.failures_in_a_row, ..job.budget.clone() };
        match decide_restart(&job.spec.restart, &mut budget, job.seed, failure) {
            Decision::GiveUp { reason } => {
                let broken = Broken { reason: format!("{}; {reason}", broken.reason), then: Then::Fail, ..broken };
                self.fail_gang(turn, id, Some(rank), broken, Some("its budget is used".into()));
            }
            Decision::Again { delay_ms, reason } => {
                (own.start_failures, own.failures_in_a_row) = (budget.start_failures, budget.failures_in_a_row);
                let delay_ms = if broken.kill { 0 } else { delay_ms.saturating_sub(turn.now.since_ms(at)) };
                own.retry_at = Some(Timestamp(turn.now.0 + delay_ms));
                let attempt = gang.attempt;
                let (start_failures, failures_in_a_row) = (job.budget.start_failures, job.budget.failures_in_a_row);
                job.budget = Budget { start_failures, failures_in_a_row, ..budget };
                job.reason = format!("{}; only this rank starts again", broken.reason);
                let mut facts = Facts::from([
                    ("attempt", attempt.into()),
                    ("rank", rank.into()),
                    ("cause", serde_json::json!(broken.cause)),
                    ("delay_ms", delay_ms.into()),
                    ("counted", job.budget.counted.into()),
                ]);
                facts.extend(exit.as_ref().map(|exit| ("exit", serde_json::json!(exit))));
                facts.extend((!broken.stacks.is_empty()).then(|| ("stacks", serde_json::json!(broken.stacks))));
                facts.extend(load);
                let reason = format!("{}; only this rank starts again, in {delay_ms} ms: {reason}", broken.reason);
                turn.event(Some(id), "rank_failed", reason, facts);
                if may_be_the_machine(broken.cause, exit.as_ref()) {
                    self.blame(turn, id, rank, broken.cause);
                }
                self.await_rank(turn, id, rank);
            }
        }
    }

    /// The wait of a rank begins, or is over at once.
    fn await_rank(&mut self, turn: &mut Turn, id: JobId, rank: u32) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        turn.touched.insert(id);
        job.note_lone_lives(turn.now);
        let Some(at) = job.gang.as_ref().and_then(|gang| gang.rank_retry_at(rank)) else { return };
        if at <= turn.now {
            self.on_rank_retry_due(turn, id, rank);
        } else {
            self.timers.set(Timer::RankRetry(id, rank), at);
        }
    }

    /// Another process takes the place of a rank that failed.
    pub(super) fn on_rank_retry_due(&mut self, turn: &mut Turn, id: JobId, rank: u32) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut().filter(|gang| gang.ending.is_none() && gang.rank_retry_at(rank).is_some()) else { return };
        let former = Incarnation { job: id, attempt: gang.attempt, rank: gang.seat(rank) };
        let seat = gang.replace_seat(rank);
        gang.generation += 1;
        let own = gang.restart_of(rank);
        (own.retry_at, own.since) = (None, turn.now);
        let facts = Facts::from([("attempt", gang.attempt.into()), ("rank", rank.into()), ("generation", gang.generation.into())]);
        let ended = job.ranks.get(rank).is_some_and(|own| own.exit.is_some());
        job.ranks.replace(rank, None);
        job.note_lone_lives(turn.now);
        turn.event(Some(id), "rank_restarted", format!("rank {rank} starts again, the others go on"), facts);
        turn.ordered.insert(Incarnation { rank: seat, ..former });
        turn.touched.insert(id);
        self.tell_gang(turn, id, None);
        if ended {
            self.forget(turn, id, former);
        }
    }
}

impl Gang {
    fn restart_of(&mut self, rank: u32) -> &mut RankRestart {
        let since = self.running_at.unwrap_or(self.placed_at);
        let fresh = RankRestart { retry_at: None, since, floor: 0, start_failures: 0, failures_in_a_row: 0 };
        self.restarts.entry(rank).or_insert(fresh)
    }

    /// When a rank that failed gets another process.
    pub(super) fn rank_retry_at(&self, rank: u32) -> Option<Timestamp> {
        self.restarts.get(&rank).and_then(|own| own.retry_at)
    }

    /// Some rank that failed is to get another process.
    pub(super) fn awaits_rank(&self) -> bool {
        self.ending.is_none() && self.restarts.values().any(|own| own.retry_at.is_some())
    }
}

impl Job {
    /// As long as one rank of those that need each other in nothing lives, the job runs.
    pub(super) fn note_lone_lives(&mut self, now: Timestamp) {
        let Some(gang) = self.gang.as_ref().filter(|gang| gang.ending.is_none() && !gang.restarts.is_empty()) else { return };
        let was = self.state;
        let activity = if self.ranks.alive() > 0 {
            self.state = JobState::Running;
            Activity::Training
        } else {
            self.state = JobState::Recovering;
            if gang.awaits_rank() { Activity::Backoff } else { Activity::Restoring }
        };
        if was != self.state || self.state == JobState::Recovering {
            self.book.turn(now, activity);
        }
        if was != JobState::Running && self.state == JobState::Running {
            self.reason = format!("attempt {} runs", self.attempt);
        }
    }
}
