//! What the engine does because time has passed: verdicts, SIGKILL after the grace, sending news together, ending.
//!
//! `wake_at` may be too early but never too late: signs of life only move deadlines back, so they need not touch it; whatever can move a
//! deadline forward says so with [`Engine::look_soon`]. One pass over everything finds the next time, so that beats cost no pass.

use everlit_api::agent::{FromAgent, Program};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::rank::Verdict;
use everlit_api::time::Millis;

use crate::agent::limits::{
    BEAT_EVERY_MS, EARLY_LOOK_MS, FRESH_MS, LATE_MS, PROBE_FRESH_MS, PROBE_RUN_MS, PROBE_SLOW_MS, QUIET_MS, STUCK_SPREAD_FLOOR_MS,
    SUSPECT_MS, WAKE_MAX_MS, WELL_BEFORE_SILENT_MS, WELL_BEFORE_STUCK_MS,
};

use super::pace::Pace;
use super::rank::{Look, Rank};
use super::{Action, BEATS_EVERY_MS, DRAIN_PATIENCE_MS, Disk, Engine, FORGET_PATIENCE_MS, Gang, SIGKILL, SIGTERM, Stage};

impl Engine {
    pub(super) fn wake(&mut self, at: u64) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }

    /// A rank's deadline may have moved forward.
    pub(super) fn look_soon(&mut self, now: u64, incarnation: Incarnation) {
        let Some(gang) = self.gangs.get(&(incarnation.job, incarnation.attempt)) else { return };
        let Some(rank) = gang.ranks.get(&incarnation.rank) else { return };
        let pace = self.paces.get(&incarnation.job);
        let stuck_at = pace.and_then(|pace| rank.stuck_at(&gang.spec.heartbeat, pace, is_ours(gang)));
        let early_at = pace.and_then(|pace| pace.early_deadline_ms(&gang.spec.heartbeat)).filter(|_| is_ours(gang)).map(|ms| now + ms);
        let stuck_at = stuck_at.into_iter().chain(early_at).min();
        let look = rank.look(now, &gang.spec.heartbeat, gang.spec.world_size);
        stuck_at.into_iter().for_each(|at| self.wake(at.max(now)));
        match look {
            Look::At(at) => self.wake(at),
            Look::Judged(..) | Look::ReadCpu => self.wake(now),
            Look::Never => {}
        }
        if let Some(at) = gang_kill_at(self, incarnation) {
            self.wake(at);
        }
    }

    pub(super) fn on_news(&mut self, now: u64, incarnation: Incarnation) {
        self.news.insert(incarnation);
        self.wake((self.news_at + BEATS_EVERY_MS).max(now));
    }

    /// Tells what is new of all ranks in one frame.
    pub(super) fn say_news(&mut self, now: u64, out: &mut Vec<Action>) {
        let news = std::mem::take(&mut self.news);
        let beats: Vec<_> = news.into_iter().filter_map(|incarnation| self.rank_mut(incarnation)?.beat_at(now)).collect();
        if !beats.is_empty() {
            self.news_at = now;
            out.push(Action::Say(FromAgent::Beats { beats }));
        }
    }

    /// SIGTERM to each living rank of a stopped gang that has not had it. Who was to join it and was not started yet never will be.
    pub(super) fn term_stopped(&mut self, now: u64, out: &mut Vec<Action>) {
        for gang in self.gangs.values_mut() {
            let Some(kill_at) = gang.kill_at else { continue };
            let (job, attempt) = (gang.spec.job, gang.spec.attempt);
            if gang.stage == Stage::Running {
                gang.leave_out(|_| true, out);
            }
            for (rank, own) in gang.ranks.iter_mut().filter(|(_, own)| own.is_alive() && !own.killed) {
                let incarnation = Incarnation { job, attempt, rank: *rank };
                if now >= kill_at {
                    own.killed = true;
                    out.push(Action::Signal { incarnation, signal: SIGKILL });
                } else if !own.termed {
                    own.termed = true;
                    out.push(Action::Signal { incarnation, signal: SIGTERM });
                }
            }
        }
    }

    /// Stops every rank with its job's own grace, because this agent ends.
    pub(super) fn stop_everything(&mut self, now: u64, out: &mut Vec<Action>) {
        let Some(ending) = self.ending.as_mut().filter(|ending| !ending.stopped) else { return };
        ending.stopped = true;
        let mut first = None;
        for gang in self.gangs.values_mut().filter(|gang| gang.kill_at.is_none()) {
            let Millis(grace) = gang.spec.stop_grace;
            let kill_at = now.saturating_add(grace);
            gang.kill_at = Some(kill_at);
            first = Some(first.map_or(kill_at, |before: u64| before.min(kill_at)));
            let (job, attempt) = (gang.spec.job, gang.spec.attempt);
            for (rank, own) in gang.ranks.iter_mut().filter(|(_, own)| own.end.is_none()) {
                own.drained = true;
                out.push(Action::MarkDrained(Incarnation { job, attempt, rank: *rank }));
            }
        }
        first.into_iter().for_each(|at| self.wake(at));
        self.term_stopped(now, out);
    }

    /// Runs after every event; does the full pass only when its time has come.
    pub(super) fn on_time(&mut self, now: u64, out: &mut Vec<Action>) {
        let alive = self.is_busy();
        if alive || self.linked {
            self.alone_since = None;
        } else if self.alone_since.is_none() {
            self.alone_since = Some(now);
            self.wake(now + self.linger_ms);
        }
        self.look_at_all(now, out);
        // Last: a pass over everything begins with no wish to be woken.
        if self.ending.is_some() {
            self.on_ending(now, alive, out);
        }
    }

    fn look_at_all(&mut self, now: u64, out: &mut Vec<Action>) {
        let Some(asked) = self.wake_at.filter(|at| *at <= now) else { return };
        // A wish to be woken at once is no appointment that was missed.
        let late = if asked > 0 { now - asked } else { 0 };
        self.wake_at = None;
        if late >= LATE_MS {
            self.gangs.values_mut().flat_map(|gang| gang.ranks.values_mut()).for_each(|rank| rank.forgive(late));
        }
        if self.gangs.values().any(|gang| gang.ranks.values().any(Rank::is_alive)) {
            self.wake(now + WAKE_MAX_MS);
        }
        if self.alone_since.is_some_and(|since| now >= since + self.linger_ms) {
            out.push(Action::Exit("neither a coordinator nor ranks for too long"));
        }
        if let Some(since) = self.alone_since {
            self.wake((since + self.linger_ms).max(now + 1));
        }
        if !self.news.is_empty() {
            let due = self.news_at + BEATS_EVERY_MS;
            if now >= due { self.say_news(now, out) } else { self.wake(due) }
        }
        self.term_stopped(now, out);
        self.settle_memberships(out);
        self.end_unstarted(now, out);
        self.look_at_ranks(now, out);
    }

    /// Time in which ranks stood still for data counts for none of them.
    pub(super) fn on_data_awaited(&mut self, now: u64, job: JobId, attempt: u32, waiting: bool) {
        let Some(gang) = self.gangs.get_mut(&(job, attempt)) else { return };
        gang.awaits_data = waiting;
        if !waiting {
            gang.ranks.values_mut().for_each(|rank| rank.absolve(now));
        }
        self.wake(now);
    }

    /// The disk answered: what it kept from being seen is held against nobody.
    pub(super) fn on_probed(&mut self, now: u64, took_ms: Option<u64>) {
        let is_well = took_ms.is_some_and(|took| took < PROBE_SLOW_MS);
        let since = self.disk.well.filter(|(_, newest)| now <= newest + PROBE_RUN_MS).map_or(now, |(since, _)| since);
        self.disk = Disk { asked: false, well: is_well.then_some((since, now)) };
        if !is_well {
            self.gangs.values_mut().flat_map(|gang| gang.ranks.values_mut()).for_each(|rank| rank.absolve(now));
        }
        self.wake(now);
    }

    fn look_at_ranks(&mut self, now: u64, out: &mut Vec<Action>) {
        let mut next: Option<u64> = None;
        // Heartbeats that do not come may be the disk's fault: that is found out before anybody is blamed, and from the first doubt on, or
        // a disk that stood still until just now would count as well.
        let disk = self.disk;
        let fresh = disk.well.filter(|(_, newest)| !disk.asked && now <= newest + PROBE_FRESH_MS);
        let well_ms = fresh.map(|(since, _)| now - since);
        let mut doubted = None;
        let mut at_latest = |at: u64| next = Some(next.map_or(at, |before: u64| before.min(at)));
        let unknown = Pace::default();
        for gang in self.gangs.values_mut() {
            let (job, attempt) = (gang.spec.job, gang.spec.attempt);
            let awaits_data = gang.awaits_data;
            let (stuck, next_stuck) = decide_stuck(now, gang, self.paces.get(&job).unwrap_or(&unknown));
            next_stuck.into_iter().for_each(&mut at_latest);
            let (early, next_early) = decide_stuck_early(now, gang, self.paces.get(&job).unwrap_or(&unknown));
            next_early.into_iter().for_each(&mut at_latest);
            let ours = is_ours(gang);
            if let Some((rank, own)) = stuck.or(early).and_then(|rank| Some((rank, gang.ranks.get_mut(&rank)?))) {
                let incarnation = Incarnation { job, attempt, rank };
                let needed = if own.is_silent(now, FRESH_MS) { WELL_BEFORE_STUCK_MS } else { 0 };
                match well_ms {
                    Some(well_ms) if well_ms >= needed => {
                        own.judged = Some(Verdict::Stuck);
                        let age_ms = own.age(now, Verdict::Stuck);
                        out.push(Action::Say(FromAgent::Judged { incarnation, verdict: Verdict::Stuck, age_ms, stacks: Vec::new() }));
                    }
                    Some(well_ms) => at_latest(now + needed - well_ms),
                    None => doubted = Some(incarnation),
                }
            }
            for (rank, own) in &mut gang.ranks {
                let incarnation = Incarnation { job, attempt, rank: *rank };
                match own.suspect_at(if ours { QUIET_MS } else { SUSPECT_MS }) {
                    Some(at) if now < at => at_latest(at),
                    Some(_) if fresh.is_none() => doubted = Some(incarnation),
                    _ => {}
                }
                if let Some(kill_at) = gang.kill_at.filter(|_| own.is_alive() && !own.killed) {
                    at_latest(kill_at);
                }
                match own.look(now, &gang.spec.heartbeat, gang.spec.world_size) {
                    Look::Judged(Verdict::Silent, _) if well_ms.is_none_or(|well_ms| well_ms < WELL_BEFORE_SILENT_MS) => {
                        doubted = doubted.or(well_ms.is_none().then_some(incarnation));
                        at_latest(now + WELL_BEFORE_SILENT_MS - well_ms.unwrap_or(0));
                    }
                    Look::Judged(Verdict::Idle, _) if awaits_data => at_latest(now + WAKE_MAX_MS),
                    Look::Judged(verdict, age_ms) => {
                        own.judged = Some(verdict);
                        out.push(Action::Say(FromAgent::Judged { incarnation, verdict, age_ms, stacks: Vec::new() }));
                    }
                    Look::ReadCpu => {
                        out.push(Action::ReadCpu(incarnation));
                        // Asked again should no answer come.
                        at_latest(now + BEATS_EVERY_MS);
                    }
                    Look::At(at) => at_latest(at),
                    Look::Never => {}
                }
            }
        }
        if let Some(incarnation) = doubted.filter(|_| !disk.asked) {
            self.disk.asked = true;
            out.push(Action::Probe(incarnation));
        }
        if let Some(at) = next {
            self.wake(at);
        }
    }

    fn on_ending(&mut self, now: u64, alive: bool, out: &mut Vec<Action>) {
        let Some(ending) = self.ending else { return };
        if alive {
            let patience = ending.since + DRAIN_PATIENCE_MS;
            if ending.draining && !ending.stopped && self.gangs.values().any(|gang| gang.kill_at.is_none()) {
                if now >= patience { self.stop_everything(now, out) } else { self.wake(patience) }
            }
            return;
        }
        let done_at = self.last_end.max(ending.since) + FORGET_PATIENCE_MS;
        let told = self.gangs.values().all(|gang| gang.ranks.is_empty());
        if told || !self.linked || now >= done_at {
            out.push(Action::Exit("ended as asked, no rank is left"));
        } else {
            self.wake(done_at);
        }
    }

    /// A rank lives or is about to.
    fn is_busy(&self) -> bool {
        let starting = |rank: &Rank| rank.end.is_none();
        self.gangs.values().any(|gang| !matches!(gang.stage, Stage::Refused { .. }) && gang.ranks.values().any(starting))
    }
}

/// The built-in program says all that it does.
fn is_ours(gang: &Gang) -> bool {
    matches!(gang.spec.program, Program::Worker { .. })
}

/// The rank to blame when one is past its deadline, and else when the next one will be. Ranks that stopped together are looked at together:
/// one of them stopped the others. One verdict ends the gang.
fn decide_stuck(now: u64, gang: &Gang, pace: &Pace) -> (Option<u32>, Option<u64>) {
    if gang.awaits_data {
        return (None, None);
    }
    let ours = is_ours(gang);
    // A spare waits; that is all it does.
    let members = || gang.ranks.iter().filter(|(seat, _)| gang.spec.rank_of(**seat).is_some());
    let due = || {
        let at = |own: &Rank| {
            let at = own.stuck_at(&gang.spec.heartbeat, pace, ours)?;
            let waits = gang.spec.group_world_size > 1 && !own.is_silent(now, BEAT_EVERY_MS);
            Some(if waits { at + STUCK_SPREAD_FLOOR_MS } else { at })
        };
        members().filter_map(move |(seat, own)| Some((seat, own, at(own)?)))
    };
    let Some(first) = due().map(|(.., at)| at).min() else { return (None, None) };
    if first > now || members().any(|(_, own)| own.judged == Some(Verdict::Stuck)) {
        return (None, (first > now).then_some(first));
    }
    // Whoever waits for a rank before its first steps waits as long as those may take; one that is silent takes none.
    let silent = || members().any(|(_, own)| own.stuck_at(&gang.spec.heartbeat, pace, ours).is_some() && own.is_silent(now, BEAT_EVERY_MS));
    let newest = due().filter(|(_, own, _)| own.is_new()).map(|(.., at)| at).min();
    if let Some(at) = newest.filter(|at| *at > now && !silent()) {
        return (None, Some(at.min(now + BEAT_EVERY_MS)));
    }
    // Beats come every other second, so those who stopped together are seen to stop within that. Who is new has a later deadline, and may
    // be the one that holds all up.
    let together = due().filter(|(_, own, at)| *at <= now + BEAT_EVERY_MS || own.is_silent(now, BEAT_EVERY_MS));
    let blamed = together.min_by_key(|(rank, own, _)| (own.blame(now, BEAT_EVERY_MS), **rank)).map(|(rank, ..)| *rank);
    (blamed, None)
}

/// The rank that gives no sign of life while its gang makes no step and others of it do; and else when to look again. Faster than a deadline
/// for a gang that lives and stands still, since here it is known who holds it up. All quiet at once is the machine's fault, not a rank's.
fn decide_stuck_early(now: u64, gang: &Gang, pace: &Pace) -> (Option<u32>, Option<u64>) {
    let Some(deadline) = pace.early_deadline_ms(&gang.spec.heartbeat).filter(|_| is_ours(gang)) else { return (None, None) };
    if gang.awaits_data {
        return (None, None);
    }
    let members = gang.ranks.iter().filter(|(seat, _)| gang.spec.rank_of(**seat).is_some());
    let mut quiets = Vec::new();
    for (seat, own) in members {
        let Some(quiet) = own.quiet(now).filter(|_| own.judged.is_none()) else { return (None, None) };
        quiets.push((*seat, quiet));
    }
    let Some(standstill) = quiets.iter().map(|(_, (_, standstill))| *standstill).min().filter(|_| quiets.len() > 1) else {
        return (None, None);
    };
    if standstill < deadline {
        return (None, Some(now + deadline - standstill));
    }
    let fresh = quiets.iter().any(|(_, (silence, _))| *silence < FRESH_MS);
    let blamed = quiets.iter().filter(|(_, (silence, _))| *silence >= QUIET_MS).max_by_key(|(_, (silence, _))| *silence);
    match blamed.filter(|_| fresh) {
        Some((seat, _)) => (Some(*seat), None),
        None => (None, Some(now + EARLY_LOOK_MS)),
    }
}

fn gang_kill_at(engine: &Engine, incarnation: Incarnation) -> Option<u64> {
    engine.gangs.get(&(incarnation.job, incarnation.attempt))?.kill_at
}
