//! What the agent decides: desired gangs against observed ranks. Pure: no I/O, no clock, no randomness; time is passed in.
//!
//! [`Engine::handle`] takes a fact and answers wishes; [`Engine::next_deadline`] says when it wants to be woken. Ranks are fenced by their
//! incarnation: news of one that is not known here are dropped in one place (`Engine::rank_mut`). The agent never stops a rank because
//! its coordinator is silent: it can not tell a dead one from a cut cable. The trap: what is said while no coordinator is connected is
//! lost, so everything that matters must be said again by [`Engine::hello`] or after it.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::agent::{CheckpointNews, Exited, FromAgent, GangSpec, RankReport, Resumed, Started};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::rank::{RankExit, Verdict};
use everlit_api::time::{Millis, Timestamp};

use super::limits::{BEATS_EVERY_MS, DRAIN_PATIENCE_MS, FORGET_PATIENCE_MS, ORDER_PATIENCE_MS};

mod event;
mod gpus;
mod membership;
mod pace;
mod rank;
mod saves;
#[cfg(test)]
mod tests;
mod wake;

pub use event::{Action, Event};
use rank::Rank;

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// One attempt of a job on this node.
#[derive(Debug, Clone)]
struct Gang {
    spec: GangSpec,
    stage: Stage,
    resumed: Option<Resumed>,
    /// When SIGKILL follows.
    kill_at: Option<u64>,
    ranks: BTreeMap<u32, Rank>,
    /// The snapshot that it resumed from is not needed any more.
    snapshot_freed: bool,
    /// A membership that holds once nobody lives who is not in it.
    membership: Option<Box<GangSpec>>,
    /// When it was found with ranks that the agent before this one did not come to start. The order has their environment, so it must come again.
    found_at: Option<u64>,
    /// Its ranks stand still for data: that is held against none of them.
    awaits_data: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Stage {
    Preparing,
    Running,
    Refused { reason: String, permanent: bool },
}

impl Gang {
    fn incarnation(&self, rank: u32) -> Incarnation {
        Incarnation { job: self.spec.job, attempt: self.spec.attempt, rank }
    }

    fn new(spec: GangSpec, stage: Stage, ranks: impl IntoIterator<Item = u32>) -> Self {
        let ranks = ranks.into_iter().map(|rank| (rank, Rank::default())).collect();
        Self {
            spec,
            stage,
            resumed: None,
            kill_at: None,
            ranks,
            snapshot_freed: false,
            membership: None,
            found_at: None,
            awaits_data: false,
        }
    }
}

/// The end of a rank that nobody saw.
pub fn no_exit(error: &str, at: Timestamp) -> RankExit {
    RankExit {
        code: None,
        signal: None,
        error: Some(error.into()),
        at,
        tail: Vec::new(),
        message: None,
        matched: None,
        out_of_memory: false,
        gpu_error: None,
    }
}

/// The end of a rank that this agent stopped because it was told to end itself, with nobody to ask: no fault of the rank's, so it is said
/// to be lost, which is free.
pub fn drained(exit: RankExit) -> RankExit {
    RankExit { error: Some("stopped because its agent was told to end".into()), ..exit }
}

/// Why and since when the agent is ending.
#[derive(Debug, Clone, Copy)]
struct Ending {
    since: u64,
    /// It was told to end itself, so it empties itself; else it only waits for its ranks.
    draining: bool,
    /// It has stopped its ranks on its own.
    stopped: bool,
}

/// What is known of the disk that heartbeats go through: one that is full or stands still keeps every rank's from being seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Disk {
    /// It was asked after, and has not answered yet.
    asked: bool,
    /// It was well from then to then, at each of several probes in a row.
    well: Option<(u64, u64)>,
}

/// The agent's decisions.
#[derive(Debug, Clone)]
pub struct Engine {
    gangs: BTreeMap<(JobId, u32), Gang>,
    /// The newest attempt ever ordered of a job that is not final.
    newest: BTreeMap<JobId, u32>,
    checkpoints: BTreeMap<JobId, CheckpointNews>,
    /// How fast each job goes.
    paces: BTreeMap<JobId, pace::Pace>,
    /// Jobs that are to go once none of their ranks lives; `true`: with their files.
    leaving: BTreeMap<JobId, bool>,
    /// Damaged checkpoints that no coordinator was told of.
    quarantined: Vec<(JobId, u64, String)>,
    gpu_errors: gpus::Errors,
    disk: Disk,
    linked: bool,
    ending: Option<Ending>,
    /// Since when there has been neither coordinator nor living rank.
    alone_since: Option<u64>,
    last_end: u64,
    linger_ms: u64,
    news: BTreeSet<Incarnation>,
    news_at: u64,
    wake_at: Option<u64>,
}

impl Engine {
    /// `linger_ms`: how long it stays with neither coordinator nor living ranks.
    pub fn new(now: u64, linger_ms: u64) -> Self {
        Self {
            gangs: BTreeMap::new(),
            newest: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            paces: BTreeMap::new(),
            leaving: BTreeMap::new(),
            quarantined: Vec::new(),
            gpu_errors: gpus::Errors::default(),
            disk: Disk::default(),
            linked: false,
            ending: None,
            alone_since: Some(now),
            last_end: now,
            linger_ms,
            news: BTreeSet::new(),
            news_at: 0,
            wake_at: Some(now + linger_ms),
        }
    }

    /// When to say [`Event::DeadlinePassed`], if nothing else happens.
    pub fn next_deadline(&self) -> Option<u64> {
        self.wake_at
    }

    /// Everything that a hello tells of ranks and checkpoints, and whether the agent is draining.
    pub fn hello(&self, now: u64) -> (Vec<RankReport>, Vec<CheckpointNews>, bool) {
        let report = |gang: &Gang| {
            gang.ranks.iter().map(|(rank, own)| own.report(now, gang.incarnation(*rank), gang.spec.generation)).collect::<Vec<_>>()
        };
        let running = self.gangs.values().filter(|gang| !matches!(gang.stage, Stage::Refused { .. }));
        (running.flat_map(report).collect(), self.checkpoints.values().cloned().collect(), self.is_draining())
    }

    /// Whether it keeps checkpoints of jobs that are not final.
    pub fn has_checkpoints(&self) -> bool {
        !self.checkpoints.is_empty()
    }

    /// Ranks whose process lives, with what their job says about them.
    pub fn living(&self) -> impl Iterator<Item = (Incarnation, &GangSpec)> {
        self.gangs.values().flat_map(|gang| {
            let alive = gang.ranks.iter().filter(|(_, own)| own.is_alive());
            alive.map(|(rank, _)| (gang.incarnation(*rank), &gang.spec))
        })
    }

    /// The order behind a rank that is not forgotten.
    pub fn spec(&self, job: JobId, attempt: u32) -> Option<&GangSpec> {
        self.gangs.get(&(job, attempt)).map(|gang| &gang.spec)
    }

    /// The order behind the newest attempt of a job, unless all of it is forgotten.
    pub fn newest_spec(&self, job: JobId) -> Option<&GangSpec> {
        self.gangs.range((job, 0)..=(job, u32::MAX)).next_back().map(|(_, gang)| &gang.spec)
    }

    /// Takes a fact, answers what to do about it, in order.
    pub fn handle(&mut self, now: u64, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Linked => self.on_linked(now, &mut out),
            Event::Unlinked => self.on_unlinked(now, &mut out),
            Event::GangOrdered(spec) => self.on_gang_ordered(now, *spec, &mut out),
            Event::StopOrdered { job, attempt, grace } => self.on_stop_ordered(now, job, attempt, grace, &mut out),
            Event::ForgetOrdered(incarnations) => self.on_forget_ordered(&incarnations, &mut out),
            Event::RemoveOrdered(job) => drop(self.leaving.insert(job, true)),
            Event::JobEnded(job) => drop(self.leaving.entry(job).or_insert(false)),
            Event::ShutdownOrdered => {
                self.ending.get_or_insert(Ending { since: now, draining: false, stopped: false });
            }
            Event::GangPrepared { resumed, at } => self.on_gang_prepared(now, resumed, at, &mut out),
            Event::GangRefused { job, attempt, reason, permanent } => {
                if let Some(gang) = self.gangs.get_mut(&(job, attempt)) {
                    gang.ranks.clear();
                    gang.stage = Stage::Refused { reason: reason.clone(), permanent };
                    out.push(Action::Say(FromAgent::StartFailed { job, attempt, reason, permanent }));
                }
            }
            Event::GangFound { spec, resumed, ranks, unstarted } => self.on_gang_found(now, *spec, resumed, ranks, &unstarted),
            Event::RankStarted { incarnation, pid, at } => self.on_rank_started(now, incarnation, pid, at, &mut out),
            Event::RankOutput(incarnation) => {
                if let Some(rank) = self.rank_mut(incarnation) {
                    rank.on_output(now);
                    self.look_soon(now, incarnation);
                }
            }
            Event::RankEnded { incarnation, exit, lost } => self.on_rank_ended(now, incarnation, exit, lost, &mut out),
            Event::SaveOrdered { job, attempt } => self.on_save_ordered(job, attempt, &mut out),
            Event::HeartbeatRead { incarnation, seq, beat, save_error } => {
                self.on_heartbeat(now, incarnation, seq, *beat, save_error, &mut out);
            }
            Event::ProgressRead { incarnation, beat } => {
                if self.rank_mut(incarnation).is_some_and(|rank| rank.on_progress(now, *beat)) {
                    self.on_news(now, incarnation);
                }
            }
            Event::CpuRead { incarnation, cpu_ms } => {
                if let Some(rank) = self.rank_mut(incarnation) {
                    rank.on_cpu(now, cpu_ms);
                    self.look_soon(now, incarnation);
                }
            }
            Event::Probed { took_ms } => self.on_probed(now, took_ms),
            Event::DataAwaited { job, attempt, waiting } => self.on_data_awaited(now, job, attempt, waiting),
            Event::CheckpointSeen(news) => self.on_checkpoint_seen(*news, &mut out),
            Event::CheckpointsGone(job) => drop(self.checkpoints.remove(&job)),
            Event::CheckpointQuarantined { job, step, reason } => self.on_checkpoint_quarantined(job, step, reason, &mut out),
            Event::GpuFailed(error) => self.on_gpu_failed(now, error, &mut out),
            Event::JobRemoved(job) => out.push(Action::Say(FromAgent::Removed { job })),
            Event::EndAsked => self.on_end_asked(now, &mut out),
            Event::DeadlinePassed => {}
        }
        self.let_go(&mut out);
        self.on_time(now, &mut out);
        out
    }

    fn is_draining(&self) -> bool {
        self.ending.is_some_and(|ending| ending.draining)
    }

    fn rank_mut(&mut self, incarnation: Incarnation) -> Option<&mut Rank> {
        self.gangs.get_mut(&(incarnation.job, incarnation.attempt))?.ranks.get_mut(&incarnation.rank)
    }

    fn on_linked(&mut self, now: u64, out: &mut Vec<Action>) {
        self.linked = true;
        for ((job, attempt), gang) in &self.gangs {
            out.extend(gang.resumed.clone().map(|resumed| Action::Say(FromAgent::Resumed(resumed))));
            if let Stage::Refused { reason, permanent } = &gang.stage {
                let (reason, permanent) = (reason.clone(), *permanent);
                out.push(Action::Say(FromAgent::StartFailed { job: *job, attempt: *attempt, reason, permanent }));
            }
            for (rank, own) in gang.ranks.iter().filter(|(_, own)| own.is_alive()) {
                let judged = |verdict| FromAgent::Judged {
                    incarnation: gang.incarnation(*rank),
                    verdict,
                    age_ms: own.age(now, verdict),
                    stacks: Vec::new(),
                };
                out.extend(own.judged.map(|verdict: Verdict| Action::Say(judged(verdict))));
            }
        }
        self.say_saves(out);
        self.say_gpu_errors(out);
    }

    fn on_unlinked(&mut self, now: u64, out: &mut Vec<Action>) {
        self.linked = false;
        if self.is_draining() {
            self.stop_everything(now, out);
        }
    }

    fn on_gang_ordered(&mut self, now: u64, spec: GangSpec, out: &mut Vec<Action>) {
        let (job, attempt) = (spec.job, spec.attempt);
        if let Some(gang) = self.gangs.get(&(job, attempt)) {
            if let Stage::Refused { reason, permanent } = &gang.stage {
                let (reason, permanent) = (reason.clone(), *permanent);
                out.push(Action::Say(FromAgent::StartFailed { job, attempt, reason, permanent }));
                return;
            }
            return self.on_membership_ordered(now, spec);
        }
        if let Some(newest) = self.newest.get(&job).copied().filter(|newest| attempt <= *newest) {
            // Late, and nobody waits for it; or from a coordinator whose disk has forgotten the later one, and it must try another number.
            let reason = format!("attempt {newest} was started here before");
            out.push(Action::Say(FromAgent::StartFailed { job, attempt, reason, permanent: false }));
            return;
        }
        if self.ending.is_some() {
            let reason = "the agent is ending".to_string();
            out.push(Action::Say(FromAgent::StartFailed { job, attempt, reason, permanent: false }));
            return;
        }
        self.newest.insert(job, attempt);
        // The coordinator stops the attempt before this one; should it ever not, two never live (INV-1).
        for (_, older) in self.gangs.range_mut((job, 0)..(job, attempt)) {
            older.kill_at = Some(0);
        }
        self.wake(0);
        self.gangs.retain(|(own, older), gang| *own != job || *older >= attempt || !matches!(gang.stage, Stage::Refused { .. }));
        let mut kept = spec.clone();
        kept.env.clear();
        let seats: Vec<u32> = spec.own_seats().map(|(_, seat)| seat).chain(spec.spares.iter().copied()).collect();
        self.gangs.insert((job, attempt), Gang::new(kept, Stage::Preparing, seats));
        out.push(Action::Prepare(Box::new(spec)));
    }

    fn on_gang_prepared(&mut self, now: u64, resumed: Resumed, at: Timestamp, out: &mut Vec<Action>) {
        let (job, attempt) = (resumed.job, resumed.attempt);
        let Some(gang) = self.gangs.get_mut(&(job, attempt)) else { return };
        gang.stage = Stage::Running;
        gang.resumed = Some(resumed.clone());
        out.push(Action::Say(FromAgent::Resumed(resumed)));
        if gang.kill_at.is_none() {
            gang.ranks.values_mut().for_each(|own| own.spawned = true);
            out.push(Action::Spawn { job, attempt });
            return;
        }
        let incarnations: Vec<_> = gang.ranks.keys().map(|rank| gang.incarnation(*rank)).collect();
        for incarnation in incarnations {
            self.on_rank_ended(now, incarnation, no_exit("stopped before it was started", at), true, out);
        }
    }

    fn on_gang_found(&mut self, now: u64, spec: GangSpec, resumed: Option<Resumed>, ranks: Vec<u32>, unstarted: &[u32]) {
        let newest = self.newest.entry(spec.job).or_default();
        *newest = spec.attempt.max(*newest);
        let mut gang = Gang::new(spec, Stage::Running, ranks);
        gang.resumed = resumed;
        gang.ranks.iter_mut().for_each(|(seat, own)| own.spawned = !unstarted.contains(seat));
        if !unstarted.is_empty() {
            gang.found_at = Some(now);
            self.wake(now + ORDER_PATIENCE_MS);
        }
        self.gangs.insert((gang.spec.job, gang.spec.attempt), gang);
    }

    fn on_rank_started(&mut self, now: u64, incarnation: Incarnation, pid: u32, at: Timestamp, out: &mut Vec<Action>) {
        let Some(rank) = self.rank_mut(incarnation) else { return };
        rank.on_started(now, pid, at);
        self.look_at_membership(now, incarnation);
        self.look_soon(now, incarnation);
        out.push(Action::Say(FromAgent::Started(Started { incarnation, pid, at })));
        self.term_stopped(now, out);
    }

    fn on_rank_ended(&mut self, now: u64, incarnation: Incarnation, exit: RankExit, lost: bool, out: &mut Vec<Action>) {
        let gpu_error = self.gpu_error_of(now, incarnation).filter(|_| !exit.is_success());
        let Some(rank) = self.rank_mut(incarnation).filter(|rank| rank.end.is_none()) else { return };
        let exit = RankExit { gpu_error, ..exit };
        rank.ended_at = now;
        let (exit, lost) = if rank.drained { (drained(exit), true) } else { (exit, lost) };
        rank.end = Some((exit.clone(), lost));
        self.last_end = now;
        self.look_at_membership(now, incarnation);
        // The last step before the end is worth as much as the end.
        self.say_news(now, out);
        out.push(Action::Say(FromAgent::Exited(Exited { incarnation, exit, lost })));
    }

    fn on_stop_ordered(&mut self, now: u64, job: JobId, attempt: u32, grace: Millis, out: &mut Vec<Action>) {
        let Some(gang) = self.gangs.get_mut(&(job, attempt)) else { return };
        let kill_at = now.saturating_add(grace.0);
        gang.kill_at = Some(gang.kill_at.map_or(kill_at, |before| before.min(kill_at)));
        self.wake(kill_at);
        self.term_stopped(now, out);
    }

    fn on_forget_ordered(&mut self, incarnations: &[Incarnation], out: &mut Vec<Action>) {
        let mut forgotten = Vec::new();
        for incarnation in incarnations {
            let key = (incarnation.job, incarnation.attempt);
            let Some(gang) = self.gangs.get_mut(&key) else { continue };
            if gang.ranks.get(&incarnation.rank).is_some_and(|rank| rank.end.is_some()) {
                gang.ranks.remove(&incarnation.rank);
                forgotten.push(*incarnation);
            }
            if gang.ranks.is_empty() && gang.stage == Stage::Running {
                self.gangs.remove(&key);
            }
        }
        if !forgotten.is_empty() {
            out.push(Action::RemoveRuns(forgotten));
        }
    }

    /// Jobs leave when none of their ranks lives: the coordinator has those stopped, and says only once that the job is over.
    fn let_go(&mut self, out: &mut Vec<Action>) {
        if self.leaving.is_empty() {
            return;
        }
        let quiet: Vec<JobId> = self.leaving.keys().filter(|job| !self.has_living(**job)).copied().collect();
        for job in quiet {
            let with_files = self.leaving.remove(&job).unwrap_or(false);
            self.drop_job(job);
            out.push(if with_files { Action::RemoveJob(job) } else { Action::RetireJob(job) });
        }
    }

    fn has_living(&self, job: JobId) -> bool {
        let mut own = self.gangs.range((job, 0)..=(job, u32::MAX));
        own.any(|(_, gang)| gang.stage == Stage::Preparing || gang.ranks.values().any(Rank::may_live))
    }

    fn drop_job(&mut self, job: JobId) {
        self.gangs.retain(|(own, _), _| *own != job);
        self.newest.remove(&job);
        self.checkpoints.remove(&job);
        self.paces.remove(&job);
    }

    fn on_end_asked(&mut self, now: u64, out: &mut Vec<Action>) {
        if self.is_draining() {
            out.push(Action::Exit("asked twice: ranks are left running"));
            return;
        }
        self.ending = Some(Ending { since: now, draining: true, stopped: false });
        if self.linked {
            out.push(Action::Say(FromAgent::Draining));
        } else {
            self.stop_everything(now, out);
        }
    }
}
