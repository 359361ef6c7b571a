//! One rank as the engine sees it, and when a living one is judged.
//!
//! Ages are by the agent's monotonic clock and start anew when a rank is adopted: time in which no agent looked is nobody's silence. Which
//! rule holds depends on what the rank has shown so far: heartbeats, output only, or nothing (CONTRACT section 3).

use everlit_api::agent::{Beat, RankReport};
use everlit_api::ids::Incarnation;
use everlit_api::job::HeartbeatPolicy;
use everlit_api::manifest::{Phase, SaveError};
use everlit_api::rank::{RankExit, Verdict};
use everlit_api::time::Timestamp;

use crate::agent::limits::{GANG_IDLE_MS, IDLE_CPU_PART, IDLE_LOOKS, SETTLED_STEPS};

use super::pace::Pace;

/// One rank.
#[derive(Debug, Clone, Default)]
pub(super) struct Rank {
    pub(super) pid: Option<u32>,
    pub(super) started_at: Option<Timestamp>,
    pub(super) end: Option<(RankExit, bool)>,
    /// When its process and its end were heard of.
    pub(super) begun_at: u64,
    pub(super) ended_at: u64,
    pub(super) beat: Option<(u64, Beat)>,
    pub(super) judged: Option<Verdict>,
    /// Its start was ordered, by this agent or by one before it.
    pub(super) spawned: bool,
    /// SIGTERM or SIGKILL was sent.
    pub(super) termed: bool,
    pub(super) killed: bool,
    /// It is stopped because this agent ends.
    pub(super) drained: bool,
    /// Step of the newest save that failed, and what is not said of it yet.
    save_failed: Option<u64>,
    unsaid: Option<SaveError>,
    since: u64,
    /// When its step or phase was last new, and how many steps were.
    progress_at: u64,
    steps: u32,
    /// It was seen to come from its start into its first step.
    warming: bool,
    seq: Option<(u64, u64)>,
    output: Option<u64>,
    active: u64,
    cpu: Option<(u64, u64)>,
}

/// What the clock says about a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// It is judged; the second is its age in milliseconds.
    Judged(Verdict, u64),
    /// Its CPU time is to be read.
    ReadCpu,
    /// Nothing before this time.
    At(u64),
    /// Nothing as things are.
    Never,
}

impl Rank {
    pub(super) fn is_alive(&self) -> bool {
        self.pid.is_some() && self.end.is_none()
    }

    /// It lives, or its start was ordered and nothing was heard of it yet.
    pub(super) fn may_live(&self) -> bool {
        (self.spawned || self.pid.is_some()) && self.end.is_none()
    }

    /// Its start was not ordered yet.
    pub(super) fn is_unstarted(&self) -> bool {
        !self.spawned && self.end.is_none()
    }

    pub(super) fn on_started(&mut self, now: u64, pid: u32, at: Timestamp) {
        self.pid = Some(pid);
        self.started_at = Some(at);
        self.begun_at = now;
        self.since = now;
        self.active = now;
        self.progress_at = now;
    }

    pub(super) fn on_output(&mut self, now: u64) {
        self.output = Some(now);
        self.active = now;
    }

    /// `false` when it is not news.
    pub(super) fn on_heartbeat(&mut self, now: u64, seq: u64, beat: Beat, pace: &mut Pace) -> bool {
        if self.seq.is_some_and(|(last, _)| seq <= last) {
            return false;
        }
        self.note_progress(now, &beat, pace);
        self.seq = Some((seq, now));
        self.beat = Some((now, beat));
        true
    }

    /// A new step or phase: what it took is learned. The first beat after an adoption only begins.
    fn note_progress(&mut self, now: u64, beat: &Beat, pace: &mut Pace) {
        let took = now.saturating_sub(self.progress_at);
        let before = self.beat.as_ref().map(|(_, before)| (before.phase, before.step));
        let Some((phase, step)) = before else {
            self.progress_at = now;
            return;
        };
        if (phase, step) == (beat.phase, beat.step) {
            return;
        }
        self.progress_at = now;
        if phase != beat.phase {
            phase.into_iter().for_each(|phase| pace.note_phase(phase, took));
            self.warming |= self.is_new() && matches!(phase, Some(Phase::Init | Phase::Load)) && beat.phase == Some(Phase::Train);
        } else if step.is_some() {
            if self.warming && self.is_new() {
                pace.note_first_step(took);
            }
            self.steps = self.steps.saturating_add(1);
            // The step after a pause in another phase is as long as the pause.
            if self.steps > 1 {
                pace.note_step(took);
            }
        }
    }

    /// When it is past what its gang's pace allows; `None` for one that is not judged so.
    pub(super) fn stuck_at(&self, policy: &HeartbeatPolicy, pace: &Pace, ours: bool) -> Option<u64> {
        if !self.is_alive() || self.judged.is_some() || self.killed || self.termed {
            return None;
        }
        // Output tells of steps, but says nothing while there are none.
        let judged = self.seq.is_some() || (policy.progress_timeout.is_some() && self.beat.is_some());
        let phase = self.beat.as_ref().and_then(|(_, beat)| beat.phase);
        judged.then(|| self.progress_at.saturating_add(pace.deadline_ms(policy, phase, !self.is_new(), ours)))
    }

    /// It has not done its first steps yet, or not before this agent's eyes.
    pub(super) fn is_new(&self) -> bool {
        self.steps < SETTLED_STEPS
    }

    /// Time without a heartbeat and time without a step, of one that is in the midst of its steps.
    pub(super) fn quiet(&self, now: u64) -> Option<(u64, u64)> {
        let steps = self.is_alive() && !self.is_new() && !self.killed && !self.termed;
        // A program of before it said this beats once a second.
        let trains = self.beat.as_ref().is_some_and(|(_, beat)| beat.phase == Some(Phase::Train) && beat.in_place.is_some());
        let (_, at) = self.seq.filter(|_| steps && trains)?;
        Some((now.saturating_sub(at), now.saturating_sub(self.progress_at)))
    }

    /// When it is doubtful whether its heartbeats go on.
    pub(super) fn suspect_at(&self, late_ms: u64) -> Option<u64> {
        let looked_at = self.is_alive() && self.judged.is_none() && !self.killed && !self.termed;
        self.seq.filter(|_| looked_at).map(|(_, at)| at.saturating_add(late_ms))
    }

    /// Its heartbeats stopped so long ago at least.
    pub(super) fn is_silent(&self, now: u64, quiet_ms: u64) -> bool {
        self.seq.is_some_and(|(_, at)| now.saturating_sub(at) > quiet_ms)
    }

    /// Who is to blame when several are stuck: whose heartbeats stopped, the longest first; else who is furthest behind; else who is new.
    pub(super) fn blame(&self, now: u64, quiet_ms: u64) -> (std::cmp::Reverse<u64>, u64, std::cmp::Reverse<bool>) {
        let silence = self.seq.map_or(0, |(_, at)| now.saturating_sub(at));
        let quiet = if silence > quiet_ms { silence } else { 0 };
        let step = self.beat.as_ref().and_then(|(_, beat)| beat.step).unwrap_or(0);
        (std::cmp::Reverse(quiet), step, std::cmp::Reverse(self.is_new()))
    }

    /// Time in which the agent did not look is nobody's standstill and nobody's silence.
    pub(super) fn forgive(&mut self, ms: u64) {
        let own = [&mut self.progress_at, &mut self.since, &mut self.active];
        let beats = self.seq.iter_mut().chain(&mut self.cpu).map(|(_, at)| at);
        own.into_iter().chain(beats).for_each(|at| *at = at.saturating_add(ms));
    }

    /// What is known of it says nothing: its time begins now.
    pub(super) fn absolve(&mut self, now: u64) {
        let own = [&mut self.progress_at, &mut self.since, &mut self.active];
        let beats = self.seq.iter_mut().chain(&mut self.cpu).map(|(_, at)| at);
        own.into_iter().chain(beats).for_each(|at| *at = now.max(*at));
    }

    /// Its newest heartbeat says that it saves on a signal.
    pub(super) fn saves_on_signal(&self) -> bool {
        self.beat.as_ref().is_some_and(|(_, beat)| beat.saves_on_signal)
    }

    /// A heartbeat repeats a failed save until one works; it is news once per step.
    pub(super) fn note_save_error(&mut self, error: SaveError) {
        if self.save_failed.replace(error.step) != Some(error.step) {
            self.unsaid = Some(error);
        }
    }

    pub(super) fn take_save_error(&mut self) -> Option<SaveError> {
        self.unsaid.take()
    }

    /// Adds what output told, unless the rank writes heartbeats.
    pub(super) fn on_progress(&mut self, now: u64, news: Beat) -> bool {
        if self.seq.is_some() {
            return false;
        }
        let mut beat = self.beat.take().map(|(_, beat)| beat).unwrap_or_default();
        if news.step.is_some() && news.step != beat.step {
            self.progress_at = now;
        }
        beat.incarnation = news.incarnation;
        beat.step = news.step.or(beat.step);
        beat.total_steps = news.total_steps.or(beat.total_steps);
        beat.samples = news.samples.or(beat.samples);
        beat.loss = news.loss.or(beat.loss);
        beat.metrics.extend(news.metrics);
        while beat.metrics.len() > crate::agent::limits::METRICS_MAX {
            beat.metrics.pop_last();
        }
        self.beat = Some((now, beat));
        true
    }

    pub(super) fn on_cpu(&mut self, now: u64, cpu_ms: u64) {
        if let Some((before, at)) = self.cpu {
            let used = cpu_ms.saturating_sub(before) as f64;
            if used > now.saturating_sub(at) as f64 * IDLE_CPU_PART {
                self.active = now;
            }
        }
        self.cpu = Some((cpu_ms, now));
    }

    /// The newest progress with its age.
    pub(super) fn beat_at(&self, now: u64) -> Option<Beat> {
        self.beat.as_ref().map(|(at, beat)| Beat { age_ms: now.saturating_sub(*at), ..beat.clone() })
    }

    pub(super) fn report(&self, now: u64, incarnation: Incarnation, generation: u32) -> RankReport {
        let (exit, lost) = self.end.clone().map_or((None, false), |(exit, lost)| (Some(exit), lost));
        RankReport { incarnation, pid: self.pid, started_at: self.started_at, generation, exit, lost, beat: self.beat_at(now) }
    }

    /// How long ago the sign of life was that a verdict speaks of.
    pub(super) fn age(&self, now: u64, verdict: Verdict) -> u64 {
        let since = match verdict {
            Verdict::Silent => self.seq.map_or(self.since, |(_, at)| at),
            Verdict::NoStart => self.since,
            Verdict::Idle => self.active,
            Verdict::Stuck => self.progress_at,
        };
        now.saturating_sub(since)
    }

    /// What the rules say now. A rank is judged once.
    pub(super) fn look(&self, now: u64, policy: &HeartbeatPolicy, world_size: u32) -> Look {
        if !self.is_alive() || self.judged.is_some() || self.killed || self.termed {
            return Look::Never;
        }
        let judge = |at: u64, verdict: Verdict| if now >= at { Look::Judged(verdict, self.age(now, verdict)) } else { Look::At(at) };
        if let Some((_, at)) = self.seq {
            return judge(at.saturating_add(policy.timeout.0), Verdict::Silent);
        }
        if self.output.is_none() || policy.required {
            return judge(self.since.saturating_add(policy.startup_timeout.0), Verdict::NoStart);
        }
        let default = (world_size > 1).then_some(GANG_IDLE_MS);
        let Some(timeout) = policy.idle_timeout.map(|timeout| timeout.0).or(default) else { return Look::Never };
        // CPU time is read only of a rank that has been quiet for a while, and once more before it is judged.
        let every = (timeout / IDLE_LOOKS).max(1);
        let last = self.cpu.map_or(0, |(_, at)| at).max(self.active);
        if now >= last + every {
            Look::ReadCpu
        } else if now >= self.active + timeout {
            Look::Judged(Verdict::Idle, self.age(now, Verdict::Idle))
        } else {
            Look::At((last + every).min(self.active + timeout))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::engine::no_exit;

    fn beat(phase: Phase, step: u64) -> Beat {
        Beat { phase: Some(phase), step: Some(step), in_place: Some(true), ..Beat::default() }
    }

    /// It did so many steps, one each 100 ms.
    fn stepping(steps: u64, pace: &mut Pace) -> Rank {
        let mut rank = Rank::default();
        rank.on_started(0, 5, Timestamp(0));
        for step in 0..=steps {
            rank.on_heartbeat(step * 100, step, beat(Phase::Train, step), pace);
        }
        rank
    }

    #[test]
    fn a_rank_may_live_from_its_order_or_its_process_until_its_end() {
        let mut rank = Rank::default();
        assert!(!rank.may_live() && rank.is_unstarted());
        rank.spawned = true;
        assert!(rank.may_live() && !rank.is_unstarted());
        let adopted = Rank { pid: Some(5), ..Rank::default() };
        assert!(adopted.may_live());
        rank.end = Some((no_exit("gone", Timestamp(1)), true));
        assert!(!rank.may_live() && !Rank { pid: Some(5), ..rank }.may_live());
    }

    #[test]
    fn the_first_step_after_a_pause_teaches_no_pace() {
        let mut pace = Pace::default();
        let policy = HeartbeatPolicy::default();
        // The first of these takes as long as the start did.
        let mut rank = Rank::default();
        rank.on_started(0, 5, Timestamp(0));
        for (seq, ms) in [0, 5_000, 5_100, 5_200, 5_300, 5_400, 5_500, 5_600, 5_700, 5_800, 5_900, 6_000].into_iter().enumerate() {
            rank.on_heartbeat(ms, seq as u64, beat(Phase::Train, seq as u64), &mut pace);
        }
        (0..100).for_each(|_| pace.note_step(100));
        let paced = pace.deadline_ms(&policy, Some(Phase::Train), true, true);
        let mut other = Pace::default();
        (0..100).for_each(|_| other.note_step(100));
        assert_eq!(paced, other.deadline_ms(&policy, Some(Phase::Train), true, true));
    }

    #[test]
    fn a_rank_is_quiet_only_while_it_trains_lives_and_was_not_told_to_end() {
        let mut pace = Pace::default();
        let well = stepping(u64::from(SETTLED_STEPS) + 2, &mut pace);
        let last = (u64::from(SETTLED_STEPS) + 2) * 100;
        assert_eq!(well.quiet(last + 30), Some((30, 30)));
        let without = |change: fn(&mut Rank)| {
            let mut rank = well.clone();
            change(&mut rank);
            (rank.quiet(last + 30), rank.stuck_at(&HeartbeatPolicy::default(), &pace, true), rank.suspect_at(50))
        };
        for change in [|rank: &mut Rank| rank.killed = true, |rank: &mut Rank| rank.termed = true, |rank: &mut Rank| rank.pid = None] {
            assert_eq!(without(change), (None, None, None));
        }
        assert_eq!(stepping(1, &mut Pace::default()).quiet(500), None, "it has just begun");
        let mut other = well.clone();
        other.on_heartbeat(last + 10, 99, beat(Phase::Checkpoint, 99), &mut pace);
        assert_eq!(other.quiet(last + 30), None, "it saves");
        let mut older = well.clone();
        older.on_heartbeat(last + 10, 99, Beat { in_place: None, ..beat(Phase::Train, 99) }, &mut pace);
        assert_eq!(older.quiet(last + 30), None, "it beats once a second");
        assert_eq!((well.is_silent(last + 250, 250), well.is_silent(last + 251, 250)), (false, true));
        assert_eq!((well.blame(last + 250, 250).0.0, well.blame(last + 251, 250).0.0), (0, 251));
    }

    #[test]
    fn a_rank_that_only_writes_is_judged_by_a_time_that_is_given_and_by_new_steps_alone() {
        let policy = HeartbeatPolicy { progress_timeout: Some(everlit_api::time::Millis(1_000)), ..HeartbeatPolicy::default() };
        let mut rank = Rank::default();
        rank.on_started(0, 5, Timestamp(0));
        let pace = Pace::default();
        let told = |step| Beat { step, ..Beat::default() };
        assert!(rank.on_progress(100, told(Some(1))));
        assert_eq!(rank.stuck_at(&HeartbeatPolicy::default(), &pace, false), None);
        assert_eq!(rank.stuck_at(&policy, &pace, false), Some(1_100));
        assert!(rank.on_progress(200, told(None)) && rank.on_progress(300, told(Some(1))));
        assert_eq!(rank.stuck_at(&policy, &pace, false), Some(1_100), "nothing new");
        assert!(rank.on_progress(400, told(Some(2))));
        assert_eq!(rank.stuck_at(&policy, &pace, false), Some(1_400));
        // At most so many numbers, and all of those.
        let most = crate::agent::limits::METRICS_MAX;
        let metrics = |count: usize| (0..count).map(|n| (format!("m{n:05}"), 1.0)).collect();
        assert!(rank.on_progress(500, Beat { metrics: metrics(most), ..Beat::default() }));
        assert_eq!(rank.beat.as_ref().map(|(_, beat)| beat.metrics.len()), Some(most));
        assert!(rank.on_progress(500, Beat { metrics: metrics(most + 3), ..Beat::default() }));
        assert_eq!(rank.beat.as_ref().map(|(_, beat)| beat.metrics.len()), Some(most));
    }
}
