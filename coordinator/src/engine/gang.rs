//! A gang's life: its ranks start, report, fail; the gang ends as a whole and what follows is decided.
//!
//! The first failure decides the ending; later ones only follow from it. The places of a failed gang stay reserved while it waits.

use everlit_api::agent::{Exited, Started, ToAgent};
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::{FailureAction, LogAction, RestartScope};
use everlit_api::rank::{Cause, RankExit, RankState, Stacks, Verdict};
use everlit_api::status::JobState;
use everlit_api::time::{Millis, Timestamp};

use super::ledger::Activity;
use super::limits::{MUTE_PROGRESS_MS, STRAGGLER_WAIT_MS};
use super::restart::{Decision, Failure, decide_restart};
use super::state::{Ending, Facts, Job, Role, Then};
use super::timers::Timer;
use super::{Engine, Turn};

/// Exit codes by which a shell says that a program is missing or can not be run.
const CANNOT_START: [i32; 2] = [126, 127];

/// What broke a gang, or one rank of it.
#[derive(Debug)]
pub(super) struct Broken {
    /// For budgets.
    pub(super) cause: Cause,
    /// In one sentence.
    pub(super) reason: String,
    /// For so long nobody had seen it.
    pub(super) unseen_ms: u64,
    /// Its ranks are killed at once: one that hangs answers to nothing else.
    pub(super) kill: bool,
    /// What ranks were doing when it was seen.
    pub(super) stacks: Vec<Stacks>,
    /// What follows, should the gang end by it.
    pub(super) then: Then,
}

impl Broken {
    pub(super) fn new(cause: Cause, reason: String, unseen_ms: u64, kill: bool) -> Self {
        Self { cause, reason, unseen_ms, kill, stacks: Vec::new(), then: Then::Judge }
    }
}

impl Engine {
    /// The one fence: the job, if this is its current attempt.
    pub(super) fn current(&mut self, job: JobId, attempt: u32) -> Option<&mut Job> {
        let found = self.jobs.get_mut(&job).filter(|j| j.gang.as_ref().is_some_and(|g| g.attempt == attempt) && j.retry_at.is_none());
        if found.is_none() {
            self.stale += 1;
        }
        found
    }

    pub(super) fn on_rank_started(&mut self, turn: &mut Turn, started: &Started) {
        let Incarnation { job: id, attempt, rank: seat } = started.incarnation;
        let role = self.role(started.incarnation);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let rank = match role {
            Some(Role::Rank(rank)) => rank,
            Some(Role::Spare) => {
                let spares = job.gang.iter_mut().flat_map(|gang| &mut gang.spares);
                spares.filter(|spare| spare.seat == seat).for_each(|spare| spare.pid = Some(started.pid));
                return;
            }
            // What was replaced and lives is killed by the membership that its agent was told.
            Some(Role::Former) | None => return,
        };
        if !job.ranks.start(rank, started.pid) {
            return;
        }
        if job.gang.as_ref().is_some_and(|gang| gang.restarts.contains_key(&rank)) {
            job.note_lone_lives(turn.now);
            turn.touched.insert(id);
        }
        if !job.ranks.all_started() {
            return;
        }
        // Adoption is no change of state: a gang that ran before a restart of ours is not announced again.
        let Some(gang) = job.gang.as_mut().filter(|g| g.ending.is_none() && g.running_at.is_none()) else { return };
        gang.running_at = Some(turn.now);
        job.started_at.get_or_insert(turn.now);
        job.state = JobState::Running;
        job.reason = format!("attempt {attempt} runs");
        let tells_steps = job.spec.worker.is_some() || job.progress.last_step_at.is_some();
        if !tells_steps || job.is_evaluation() {
            // A program that is not ours may never tell of steps, and an evaluation does none: it counts as training from here.
            job.book.turn(turn.now, Activity::Training);
        }
        turn.event(Some(id), "job_running", format!("all {} ranks of attempt {attempt} run", job.ranks.list().len()), Facts::new());
        turn.touched.insert(id);
        if self.short.contains(&id) {
            self.take_free_places(turn);
        }
    }

    pub(super) fn on_rank_exited(&mut self, turn: &mut Turn, exited: Exited) {
        let id = exited.incarnation.job;
        let rank = match self.role(exited.incarnation) {
            Some(Role::Rank(rank)) => rank,
            Some(Role::Spare | Role::Former) => return self.on_outsider_exited(turn, &exited),
            None => return,
        };
        let exit = exited.exit;
        let node = self.jobs.get(&id).and_then(|job| job.node_of(rank)).cloned();
        if let (Some(node), Some(error)) = (node, exit.gpu_error.clone()) {
            self.on_gpu_failed(turn, &node, error);
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if !job.ranks.end(rank, exit.clone(), exited.lost) {
            job.ranks.note_gpu_error(rank, exit.gpu_error);
            return;
        }
        let ending = job.gang.as_ref().is_some_and(|g| g.ending.is_some());
        if !ending && exit.is_success() && !exited.lost {
            // Ranks that are restarted alone finish when they do.
            let together = job.spec.restart.scope != RestartScope::Rank;
            if together && !job.ranks.all_ended() && !self.timers.is_set(&Timer::Straggler(id)) {
                self.timers.set(Timer::Straggler(id), Timestamp(turn.now.0 + STRAGGLER_WAIT_MS));
            }
        } else if !ending {
            let unseen_ms = turn.now.since_ms(exit.at);
            let broken = Broken::new(cause_of(&exit, exited.lost), failure_sentence(rank, &exit), unseen_ms, false);
            self.on_rank_broken(turn, id, rank, broken);
        }
        self.end_attempt_when_over(turn, id);
    }

    /// The gang is broken: the others are stopped, and once all are gone the budget decides. `why`: not in place.
    pub(super) fn fail_gang(&mut self, turn: &mut Turn, id: JobId, rank: Option<u32>, broken: Broken, why: Option<String>) {
        let load = self.load_of(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Broken { cause, reason, unseen_ms, kill, stacks, then } = broken;
        job.book.reclaim_undetected(turn.now, unseen_ms);
        let mut facts = Facts::from([("attempt", job.attempt.into()), ("cause", serde_json::json!(cause))]);
        if let Some(rank) = rank {
            facts.insert("rank", rank.into());
            if let Some(exit) = job.ranks.get(rank).and_then(|r| r.exit.as_ref()) {
                facts.insert("exit", serde_json::json!(exit));
            }
        }
        facts.extend(why.map(|why| ("not_in_place", why.into())));
        facts.extend((!stacks.is_empty()).then(|| ("stacks", serde_json::json!(stacks))));
        facts.extend(load);
        turn.event(Some(id), "gang_failed", reason.clone(), facts);
        let grace = if kill { Millis(0) } else { job.spec.stop_grace };
        self.end_gang(turn, id, Ending { then, at: turn.now, rank, cause: Some(cause), reason, deadline: None }, grace);
    }

    /// Decides the ending and stops what lives. A stronger ending overrides a weaker one (the order of [`Then`]).
    pub(super) fn end_gang(&mut self, turn: &mut Turn, id: JobId, ending: Ending, grace: Millis) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = &mut job.gang else { return };
        if gang.ending.as_ref().is_some_and(|decided| decided.then >= ending.then) {
            return;
        }
        (job.state, job.reason) = match ending.then {
            Then::Judge => (JobState::Recovering, ending.reason.clone()),
            Then::Again => (JobState::Recovering, "restarting: a user asked for it".into()),
            Then::Requeue => (JobState::Stopping, format!("saving, then back in the queue: {}", ending.reason)),
            Then::Stop | Then::Fail => (JobState::Stopping, format!("stopping: {}", ending.reason)),
        };
        let activity = if job.state == JobState::Recovering { Activity::Restoring } else { Activity::Stopping };
        job.book.turn(turn.now, activity);
        let before = gang.ending.replace(ending).and_then(|before| before.deadline);
        if let (Some(ending), Some(at)) = (&mut gang.ending, before) {
            ending.limit(at);
        }
        gang.regroup = None;
        self.timers.clear(&Timer::Regroup(id));
        self.timers.clear_ranks(id);
        turn.touched.insert(id);
        self.stop_ranks(turn, id, grace);
        self.end_attempt_when_over(turn, id);
    }

    /// Tells every node of a gang to stop it, with this grace or what is left of it. That there is none is remembered: who is told later has none
    /// either.
    pub(super) fn stop_ranks(&mut self, turn: &mut Turn, id: JobId, grace: Millis) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = &mut job.gang else { return };
        if job.ranks.all_ended() && gang.spares.is_empty() {
            return;
        }
        job.ranks.mark_stopping();
        let mut grace = grace;
        if let Some(ending) = &mut gang.ending {
            if grace == Millis(0) && ending.deadline.is_none_or(|at| at > turn.now) {
                ending.limit(turn.now);
                turn.touched.insert(id);
            }
            let left = ending.deadline.map(|at| Millis(at.0.saturating_sub(turn.now.0)));
            grace = left.map_or(grace, |left| left.min(grace));
        }
        for share in &gang.placement {
            turn.tell(&share.node, ToAgent::StopGang { job: id, attempt: gang.attempt, grace });
        }
    }

    pub(super) fn end_attempt_when_over(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(gang) = job
            .gang
            .as_ref()
            .filter(|_| job.retry_at.is_none() && job.ranks.all_ended() && !job.state.is_final())
            .filter(|gang| !gang.awaits_rank())
        else {
            return;
        };
        if gang.spares.is_empty() {
            self.end_attempt(turn, id);
        } else {
            // They wait for nothing any more, and have nothing to save.
            self.stop_ranks(turn, id, Millis(0));
        }
    }

    /// Every rank has ended: say so, let the agents forget, and decide what follows.
    fn end_attempt(&mut self, turn: &mut Turn, id: JobId) {
        self.timers.clear(&Timer::Straggler(id));
        self.archive_logs(turn, id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        for share in &gang.placement {
            let incarnations = gang.incarnations(id, share).collect();
            turn.tell(&share.node, ToAgent::Forget { incarnations });
        }
        // By now the kernel's order is known: the first to fail is named, not the first that was heard of.
        if let Some(ending) = gang
            .ending
            .as_mut()
            .filter(|e| e.then == Then::Judge && matches!(e.cause, Some(Cause::Exit | Cause::Signal | Cause::OutOfMemory)))
            && let Some((rank, exit)) = job.ranks.first_failure()
        {
            ending.rank = Some(rank);
            let lost = job.ranks.get(rank).is_some_and(|r| r.state == RankState::Lost);
            ending.cause = Some(cause_of(exit, lost));
            ending.reason = failure_sentence(rank, exit);
        }
        if gang.ending.as_ref().is_some_and(|ending| ending.then == Then::Judge) {
            job.name_broken_gpu();
        }
        let ending = job.gang.as_ref().and_then(|gang| gang.ending.clone());
        let mut view = job.attempt_view(Some(turn.now));
        match ending {
            None => {
                turn.step.record.attempts.push((id, view));
                self.release(id);
                self.finish_job(turn, id, JobState::Succeeded, "every rank exited 0".into());
                self.schedule(turn);
            }
            Some(ending) if ending.then == Then::Judge => self.judge(turn, id, view, ending),
            Some(ending) => {
                view.reason = Some(ending.reason.clone());
                turn.step.record.attempts.push((id, view));
                match ending.then {
                    Then::Stop => self.end_for_good(turn, id, JobState::Stopped, ending.reason),
                    Then::Fail => self.end_for_good(turn, id, JobState::Failed, ending.reason),
                    Then::Again => self.bring_back(turn, id, 0),
                    Then::Requeue | Then::Judge => self.requeue(turn, id, &ending.reason),
                }
            }
        }
    }

    fn end_for_good(&mut self, turn: &mut Turn, id: JobId, state: JobState, reason: String) {
        self.release(id);
        self.finish_job(turn, id, state, reason);
        self.schedule(turn);
    }

    /// Budget and backoff decide.
    fn judge(&mut self, turn: &mut Turn, id: JobId, mut view: everlit_api::status::AttemptView, mut ending: Ending) {
        let action = self.heed_policies(turn, id, &mut view, &mut ending);
        if action == Some(LogAction::CancelRetries) {
            turn.step.record.attempts.push((id, view));
            return self.end_for_good(turn, id, JobState::Failed, ending.reason);
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = &job.gang else { return };
        let cause = ending.cause.unwrap_or(Cause::Exit);
        let code = ending.rank.and_then(|rank| job.ranks.get(rank)).and_then(|r| r.exit.as_ref()).and_then(|e| e.code);
        let mute = job.progress.last_step_at.is_none() && gang.running_at.is_some_and(|at| ending.at.since_ms(at) >= MUTE_PROGRESS_MS);
        let failure = Failure { cause, code, new_step: job.progress.reached > gang.floor || mute, at: ending.at };
        if !cause.is_free() {
            job.note_failed_resume();
        }
        match decide_restart(&job.spec.restart, &mut job.budget, job.seed, failure) {
            Decision::GiveUp { reason } => {
                turn.step.record.attempts.push((id, view));
                self.end_for_good(turn, id, JobState::Failed, format!("{}; {reason}", ending.reason));
            }
            Decision::Again { delay_ms, reason } => {
                view.backoff_ms = Some(delay_ms);
                turn.step.record.attempts.push((id, view));
                let facts = Facts::from([
                    ("attempt", (job.next_attempt()).into()),
                    ("delay_ms", delay_ms.into()),
                    ("counted", job.budget.counted.into()),
                    ("cause", serde_json::json!(cause)),
                ]);
                turn.event(Some(id), "restart_scheduled", format!("attempt {} in {delay_ms} ms: {reason}", job.next_attempt()), facts);
                let left = delay_ms.saturating_sub(turn.now.since_ms(ending.at));
                self.bring_back(turn, id, left);
            }
        }
    }

    /// A new attempt after `wait_ms`, on the same places.
    fn bring_back(&mut self, turn: &mut Turn, id: JobId, wait_ms: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let at = Timestamp(turn.now.0 + wait_ms);
        job.state = JobState::Recovering;
        job.retry_at = Some(at);
        job.book.turn(turn.now, Activity::Backoff);
        turn.touched.insert(id);
        if wait_ms == 0 {
            self.on_retry_due(turn, id);
        } else {
            self.timers.set(Timer::Retry(id), at);
        }
    }

    pub(super) fn on_rank_judged(&mut self, turn: &mut Turn, incarnation: Incarnation, verdict: Verdict, age_ms: u64, stacks: Vec<Stacks>) {
        let id = incarnation.job;
        let role = self.role(incarnation);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        // A spare that hangs is in nobody's way until it is needed, and then it is judged as a rank.
        let Some(Role::Rank(rank)) = role else { return };
        let alive = job.ranks.get(rank).is_some_and(|r| r.pid.is_some());
        if !alive || job.gang.as_ref().is_some_and(|g| g.ending.is_some()) {
            return;
        }
        let beat = &job.spec.heartbeat;
        let (cause, reason) = match verdict {
            Verdict::Silent => {
                (Cause::Silent, format!("rank {rank} is silent: no heartbeat for {age_ms} ms (heartbeat.timeout {})", beat.timeout))
            }
            Verdict::NoStart => (
                Cause::NoStart,
                format!(
                    "rank {rank} did not start: neither a heartbeat nor output for {age_ms} ms (heartbeat.startup_timeout {})",
                    beat.startup_timeout
                ),
            ),
            Verdict::Stuck => {
                let at =
                    job.ranks.get(rank).and_then(|r| r.step).map_or("before its first step".into(), |step| format!("after step {step}"));
                (
                    Cause::Stuck,
                    format!("rank {rank} is stuck {at}: neither a step nor a new phase for {age_ms} ms (heartbeat.progress_timeout)"),
                )
            }
            Verdict::Idle => {
                (Cause::Idle, format!("rank {rank} is idle: neither output nor CPU time for {age_ms} ms (heartbeat.idle_timeout)"))
            }
        };
        if job.spec.restart.on.get(&cause) == Some(&FailureAction::Alert) {
            let facts = Facts::from([
                ("attempt", job.attempt.into()),
                ("rank", rank.into()),
                ("cause", serde_json::json!(cause)),
                ("stacks", serde_json::json!(stacks)),
            ]);
            turn.event(Some(id), "rank_alert", format!("{reason}; nothing is done about it (restart.on)"), facts);
            return;
        }
        self.on_rank_broken(turn, id, rank, Broken { stacks, ..Broken::new(cause, reason, age_ms, true) });
    }

    /// What the nodes of a gang were doing, by name.
    pub(super) fn load_of(&self, id: JobId) -> Option<(&'static str, serde_json::Value)> {
        let gang = self.jobs.get(&id)?.gang.as_ref()?;
        let loads = gang.placement.iter().filter_map(|share| Some((share.node.0.clone(), &self.nodes.get(&share.node)?.load)));
        Some(("nodes", serde_json::json!(loads.collect::<std::collections::BTreeMap<_, _>>())))
    }

    pub(super) fn on_straggler_due(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        if job.ranks.some_succeeded() && job.gang.as_ref().is_some_and(|g| g.ending.is_none()) {
            let reason = format!("some ranks exited 0 and {} others did not within 5 minutes", job.ranks.alive());
            self.fail_gang(turn, id, None, Broken::new(Cause::Straggler, reason, 0, false), None);
        }
    }

    /// One node could not start its ranks; those of other nodes may live, and are stopped.
    pub(super) fn on_start_failed(&mut self, turn: &mut Turn, node: &NodeId, of: (JobId, u32), reason: String, permanent: bool) {
        let (id, attempt) = of;
        let fetch = self.jobs.get(&id).and_then(|job| self.fetch_for(job, &job.gang.as_ref()?.placement, node));
        let Some(job) = self.current(id, attempt) else { return };
        job.note_unfetched(fetch);
        let spread = job.gang.as_ref().is_some_and(super::state::Gang::is_spread);
        let reason = if spread { format!("{node}: {reason}") } else { reason };
        let ending = job.gang.as_ref().is_some_and(|g| g.ending.is_some());
        let exit = RankExit {
            code: None,
            signal: None,
            error: Some(reason.clone()),
            at: turn.now,
            tail: Vec::new(),
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        };
        for rank in 0..job.ranks.list().len() as u32 {
            if !spread || job.node_of(rank) == Some(node) {
                job.ranks.end(rank, exit.clone(), false);
            }
        }
        if let Some(gang) = &mut job.gang {
            gang.spares.clear();
        }
        if ending {
            return self.end_attempt_when_over(turn, id);
        }
        let cause = if permanent { Cause::CannotStart } else { Cause::Infrastructure };
        self.fail_gang(turn, id, None, Broken::new(cause, reason, 0, false), None);
    }
}

fn cause_of(exit: &RankExit, lost: bool) -> Cause {
    match (exit.code, exit.signal) {
        _ if lost => Cause::Infrastructure,
        _ if exit.gpu_error.as_ref().is_some_and(GpuError::is_hardware) => Cause::Gpu,
        _ if exit.out_of_memory => Cause::OutOfMemory,
        (Some(code), _) if CANNOT_START.contains(&code) => Cause::CannotStart,
        (Some(_), _) => Cause::Exit,
        (_, Some(_)) => Cause::Signal,
        _ => Cause::CannotStart,
    }
}

/// One sentence with the rank's own last words, and what its GPU had.
fn failure_sentence(rank: u32, exit: &RankExit) -> String {
    let gpu = exit.gpu_error.as_ref().map(|error| format!("; {}", error.describe(None))).unwrap_or_default();
    format!("{}{gpu}", plain_sentence(rank, exit))
}

/// The same without the GPU.
pub(super) fn plain_sentence(rank: u32, exit: &RankExit) -> String {
    let words = exit.message.as_ref().or(exit.tail.iter().rev().find(|line| !line.trim().is_empty()));
    match (words, &exit.error) {
        _ if exit.out_of_memory => format!("rank {rank} was killed by the kernel for want of memory (SIGKILL)"),
        (_, Some(error)) => format!("rank {rank}: {error}"),
        (Some(words), None) => {
            format!("rank {rank} ended with {}: {}", exit.describe(), words.trim().chars().take(500).collect::<String>())
        }
        (None, None) => format!("rank {rank} ended with {}", exit.describe()),
    }
}
