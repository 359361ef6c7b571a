//! Slow ranks: whose own part of a step takes persistently longer than the others', which wait for it in every reduction.
//!
//! Whole steps say nothing: all ranks' take equally long. So heartbeats tell the parts of a step ([`StepPart`]), and compared is what a rank
//! did by itself, never what it waited for. A busy machine disturbs now this rank and now that one; one long step, or four, move no median of
//! nine, and a single look that finds a rank near the others begins its time anew. It is held against the slower half of the others, so that
//! ranks which share a processor do not stand out among each other. Rejected: a mean that decays, in which one long step rings on for minutes.
//! Nothing is done about a slow rank but to say so. The trap: what is known is of one membership and is on no disk.

use std::collections::VecDeque;

use everlit_api::agent::Beat;
use everlit_api::ids::JobId;
use everlit_api::job::{JobKind, RestartScope};
use everlit_api::manifest::Phase;
use everlit_api::rank::{EXCHANGE_METRIC, StepPart};
use everlit_api::time::Timestamp;

use super::limits::{
    SLOW_FACTOR, SLOW_FOR_MS, SLOW_LOOK_MS, SLOW_OVER_FACTOR, SLOW_RANKS_MAX, SLOW_SHARE_MIN, SLOW_STEPS_MIN, SLOW_WINDOW,
    STEP_SECONDS_MAX, STEP_SECONDS_MIN,
};
use super::state::{Facts, Gang, Job};
use super::{Engine, Turn};

const PARTS: usize = StepPart::ALL.len();

/// Where the time of a step went, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Work {
    /// In the order of [`StepPart::ALL`].
    parts: [f64; PARTS],
    exchange: f64,
}

impl Work {
    /// `None` of a program that does not tell, or tells what no step takes.
    fn of(beat: &Beat) -> Option<Self> {
        let told = |name: &str| beat.metrics.get(name).copied();
        let parts = StepPart::ALL.map(|part| told(part.metric()));
        let exchange = told(EXCHANGE_METRIC);
        let sound = parts.iter().chain([&exchange]).flatten().all(|seconds| (0.0..=STEP_SECONDS_MAX).contains(seconds));
        let some = parts.iter().any(Option::is_some);
        (some && sound).then(|| Self { parts: parts.map(Option::unwrap_or_default), exchange: exchange.unwrap_or_default() })
    }

    fn own(&self) -> f64 {
        self.parts.iter().sum()
    }
}

/// What is known of one rank.
#[derive(Debug, Clone, Default)]
struct Pace {
    /// Its process.
    seat: u32,
    /// Updates done by its newest heartbeat.
    step: Option<u64>,
    /// Heartbeats that told of a step more.
    told: u64,
    /// The newest of them.
    newest: VecDeque<Work>,
    /// While it is slow: what takes it longest beside the others.
    slow: Option<StepPart>,
    /// Since when, and since which told step, every look found it to be the other of slow and not slow.
    turning: Option<(Timestamp, u64)>,
}

impl Pace {
    fn is_settled(&self) -> bool {
        self.newest.len() == SLOW_WINDOW
    }

    /// The median of some figure of its newest steps.
    fn median(&self, figure: impl Fn(&Work) -> f64) -> f64 {
        let mut values = [0.0; SLOW_WINDOW];
        for (value, work) in values.iter_mut().zip(&self.newest) {
            *value = figure(work);
        }
        *values.select_nth_unstable_by(SLOW_WINDOW / 2, f64::total_cmp).1
    }

    /// Every look since `turning` said the same, for long enough. One that says otherwise begins anew.
    fn has_turned(&mut self, now: Timestamp, turns: bool) -> bool {
        if !turns {
            self.turning = None;
            return false;
        }
        let (since, from) = *self.turning.get_or_insert((now, self.told));
        now.since_ms(since) >= SLOW_FOR_MS && self.told - from >= SLOW_STEPS_MIN
    }
}

/// What is known of the ranks of one membership.
#[derive(Debug, Clone, Default)]
pub struct Slowness {
    /// Attempt and generation.
    membership: (u32, u32),
    ranks: Vec<Pace>,
    looked_at: Timestamp,
}

/// A rank became slow, or is slow no longer.
#[derive(Debug, PartialEq)]
struct Turned {
    rank: u32,
    began: bool,
    part: StepPart,
    /// Own part of a step, over the others'.
    ratio: f64,
    /// Seconds of a step that `part` takes it, and the others.
    takes: (f64, f64),
}

impl Slowness {
    fn note(&mut self, gang: &Gang, rank: u32, beat: &Beat) {
        let membership = (gang.attempt, gang.generation);
        if self.membership != membership {
            *self = Self { membership, ..Self::default() };
        }
        let Some(step) = beat.step else { return };
        let work = Work::of(beat);
        if self.ranks.is_empty() && work.is_some() {
            self.ranks = (0..gang.size()).map(|rank| Pace { seat: gang.seat(rank), ..Pace::default() }).collect();
        }
        let Some(pace) = self.ranks.get_mut(rank as usize) else { return };
        let seat = gang.seat(rank);
        let Some(work) = work.filter(|_| pace.seat == seat) else {
            // Of another process nothing is known yet, and nobody is held against a rank that tells no longer.
            *pace = Pace { seat, ..Pace::default() };
            return;
        };
        // The first heartbeat only says where it stands.
        if pace.step.replace(step).is_none_or(|before| step <= before) {
            return;
        }
        pace.told += 1;
        if pace.is_settled() {
            pace.newest.pop_front();
        }
        pace.newest.push_back(work);
    }

    /// Who turned, in rank order.
    fn look(&mut self, now: Timestamp) -> Vec<Turned> {
        if now.since_ms(self.looked_at) < SLOW_LOOK_MS {
            return Vec::new();
        }
        self.looked_at = now;
        let Some(others) = self.of_others(Work::own) else { return Vec::new() };
        let others = others.max(STEP_SECONDS_MIN);
        let mut slow = self.ranks.iter().filter(|pace| pace.slow.is_some()).count();
        let mut turned = Vec::new();
        for (rank, pace) in self.ranks.iter_mut().enumerate().filter(|(_, pace)| pace.is_settled()) {
            let own = pace.median(Work::own);
            let ratio = own / others;
            let began = pace.slow.is_none();
            let turns = if began {
                let step = own + pace.median(|work| work.exchange);
                slow < SLOW_RANKS_MAX && ratio > SLOW_FACTOR && own - others >= SLOW_SHARE_MIN * step
            } else {
                ratio < SLOW_OVER_FACTOR
            };
            if pace.has_turned(now, turns) {
                pace.turning = None;
                slow = if began { slow + 1 } else { slow - 1 };
                turned.push((rank, ratio));
            }
        }
        turned.into_iter().filter_map(|(rank, ratio)| self.turn(rank, ratio)).collect()
    }

    /// Makes a rank slow, or slow no longer, and says which part it is.
    fn turn(&mut self, rank: usize, ratio: f64) -> Option<Turned> {
        let takes = |index: usize| {
            let figure = |work: &Work| work.parts[index];
            Some((self.ranks.get(rank)?.median(figure), self.of_others(figure)?))
        };
        let before = self.ranks.get(rank)?.slow;
        let longer = |index: &usize| takes(*index).map_or(0.0, |(own, others)| own - others);
        let longest = || (0..PARTS).max_by(|a, b| longer(a).total_cmp(&longer(b)));
        let index = before.and_then(|part| StepPart::ALL.iter().position(|own| *own == part)).or_else(longest)?;
        let part = StepPart::ALL[index];
        let takes = takes(index)?;
        let pace = self.ranks.get_mut(rank)?;
        pace.slow = before.is_none().then_some(part);
        Some(Turned { rank: rank as u32, began: before.is_none(), part, ratio, takes })
    }

    /// What a rank that takes longest is held against: the median of all the others, the upper of the two where there are two.
    fn of_others(&self, figure: impl Fn(&Work) -> f64) -> Option<f64> {
        let mut all: Vec<f64> = self.ranks.iter().filter(|pace| pace.is_settled()).map(|pace| pace.median(&figure)).collect();
        if all.len() < 2 {
            return None;
        }
        // Without the longest, which sorts last, `others` are left.
        let others = all.len() - 1;
        Some(*all.select_nth_unstable_by(others / 2, f64::total_cmp).1)
    }
}

impl Job {
    /// A rank of the current membership says where its time went.
    pub(super) fn note_work(&mut self, rank: u32, beat: &Beat) {
        let Some(gang) = self.gang.as_ref().filter(|gang| gang.ending.is_none() && gang.regroup.is_none()) else { return };
        // Of a program that knows of memberships, what it says of an earlier one is past. Only ranks that train wait for each other.
        let past = self.spec.worker.is_some() && beat.generation != gang.generation;
        let waits = self.spec.kind == JobKind::Train && self.spec.restart.scope != RestartScope::Rank;
        if waits && beat.phase.is_none_or(|phase| phase == Phase::Train) && !past {
            self.slowness.note(gang, rank, beat);
        }
    }

    fn paces(&self) -> &[Pace] {
        let known = &self.slowness;
        let current = self.gang.as_ref().is_some_and(|gang| (gang.attempt, gang.generation) == known.membership && gang.ending.is_none());
        if current { &known.ranks } else { &[] }
    }

    /// What takes a slow rank longest; `None` of one that is not known to be slow.
    pub(super) fn slow_part(&self, rank: u32) -> Option<StepPart> {
        let seat = self.gang.as_ref()?.seat(rank);
        self.paces().get(rank as usize).filter(|pace| pace.seat == seat)?.slow
    }

    /// Ranks that are slow right now.
    pub fn slow_ranks(&self) -> u64 {
        (0..self.paces().len() as u32).filter(|rank| self.slow_part(*rank).is_some()).count() as u64
    }
}

impl Engine {
    /// Says who became slow, and who is slow no longer.
    pub(super) fn tell_slow(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.paces().is_empty()) else { return };
        for turned in job.slowness.look(turn.now) {
            let Turned { rank, began, part, ratio, takes: (own, others) } = turned;
            let node = job.node_of(rank).map(|node| node.0.clone()).unwrap_or_default();
            let (event, reason) = if began {
                let parts = format!("{} takes {}, theirs {}", part.name(), milliseconds(own), milliseconds(others));
                (
                    "rank_slow",
                    format!("rank {rank} on {node} needs {ratio:.1} times as long for its own part of a step as the others: {parts}"),
                )
            } else {
                let now = format!("{ratio:.1} times as long for its own part of a step");
                ("rank_slow_over", format!("rank {rank} on {node} keeps up with the others again: {now}"))
            };
            let (attempt, generation) = job.slowness.membership;
            let facts = Facts::from([
                ("attempt", attempt.into()),
                ("generation", generation.into()),
                ("rank", rank.into()),
                ("node", node.into()),
                ("part", serde_json::json!(part)),
                ("ratio", rounded(ratio, 100.0).into()),
                ("own_seconds", rounded(own, 1e6).into()),
                ("others_seconds", rounded(others, 1e6).into()),
            ]);
            turn.event(Some(id), event, reason, facts);
        }
    }
}

fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1_000.0;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.0} ms") }
}

fn rounded(value: f64, by: f64) -> f64 {
    (value * by).round() / by
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gang(ranks: u32) -> Gang {
        serde_json::from_value(serde_json::json!({
            "attempt": 1, "generation": 0, "placement": [{"node": "n1", "first_rank": 0, "count": ranks}], "port": 1,
            "placed_at": "2026-01-01T00:00:00Z", "running_at": null, "resumed_step": null, "floor": 0, "ending": null,
        }))
        .expect("a gang")
    }

    fn told(step: u64, seconds: f64) -> Beat {
        Beat { step: Some(step), metrics: [(StepPart::Compute.metric().to_string(), seconds)].into(), ..Beat::default() }
    }

    #[test]
    fn another_process_on_a_rank_s_place_begins_anew_in_the_same_membership_too() {
        let (mut gang, mut slowness) = (gang(2), Slowness::default());
        let mut named = Vec::new();
        for second in 1..=120 {
            if second % 30 == 0 {
                gang.seats = vec![0, second as u32];
            }
            slowness.note(&gang, 0, &told(second, 1.0));
            slowness.note(&gang, 1, &told(second, 2.0));
            named.extend(slowness.look(Timestamp(second * 1_000)));
        }
        assert_eq!(named, []);
    }

    #[test]
    fn a_heartbeat_between_two_steps_tells_of_none() {
        let (gang, mut slowness) = (gang(2), Slowness::default());
        let mut named = Vec::new();
        for second in 1..=200 {
            slowness.note(&gang, 0, &told(second / 10, 1.0));
            slowness.note(&gang, 1, &told(second / 10, 2.0));
            named.extend(slowness.look(Timestamp(second * 1_000)));
        }
        assert_eq!(named, []);
    }

    #[test]
    fn others_that_take_no_time_make_no_ratio_without_end() {
        let (gang, mut slowness) = (gang(2), Slowness::default());
        let mut named = Vec::new();
        for second in 1..=60 {
            slowness.note(&gang, 0, &told(second, 0.0));
            slowness.note(&gang, 1, &told(second, 2.0));
            named.extend(slowness.look(Timestamp(second * 1_000)));
        }
        assert!(named.len() == 1 && named[0].ratio.is_finite(), "{named:?}");
    }

    #[test]
    fn of_many_slow_ranks_some_are_named_and_the_others_when_those_keep_up() {
        let gang = gang(64);
        let mut slowness = Slowness::default();
        let mut named: Vec<(u32, bool)> = Vec::new();
        for second in 1..=150 {
            for rank in 0..64 {
                let seconds = if rank < 20 && (second < 60 || rank >= 16) { 2.0 } else { 1.0 };
                slowness.note(&gang, rank, &told(second, seconds));
            }
            named.extend(slowness.look(Timestamp(second * 1_000)).into_iter().map(|turned| (turned.rank, turned.began)));
        }
        let expected: Vec<(u32, bool)> =
            (0..16).map(|rank| (rank, true)).chain((0..16).map(|rank| (rank, false))).chain((16..20).map(|rank| (rank, true))).collect();
        assert_eq!(named, expected);
    }

    #[test]
    fn short_times_are_told_finer() {
        assert_eq!([0.0005, 0.009_99, 0.01, 1.5].map(milliseconds), ["0.50 ms", "9.99 ms", "10 ms", "1500 ms"]);
    }

    #[test]
    fn a_rank_that_told_nothing_once_is_known_by_what_it_tells_later() {
        let (gang, mut slowness) = (gang(2), Slowness::default());
        let mut named = Vec::new();
        for second in 1..=100 {
            slowness.note(&gang, 0, &told(second, 1.0));
            let own = if second == 20 { Beat { step: Some(second), ..Beat::default() } } else { told(second, 2.0) };
            slowness.note(&gang, 1, &own);
            named.extend(slowness.look(Timestamp(second * 1_000)).into_iter().map(|turned| (turned.rank, turned.began)));
        }
        assert_eq!(named, [(1, true)]);
    }

    #[test]
    fn where_many_are_slow_the_time_of_the_next_begins_when_one_that_was_named_keeps_up() {
        let gang = gang(64);
        let mut slowness = Slowness::default();
        let (mut over, mut next) = (Vec::new(), Vec::new());
        for second in 1..=150 {
            for rank in 0..64 {
                let seconds = if rank < 17 && (second < 60 || rank > 0) { 2.0 } else { 1.0 };
                slowness.note(&gang, rank, &told(second, seconds));
            }
            let named = slowness.look(Timestamp(second * 1_000));
            over.extend(named.iter().filter(|turned| !turned.began).map(|turned| (turned.rank, second)));
            next.extend(named.iter().filter(|turned| turned.rank == 16).map(|turned| (turned.began, second)));
        }
        let [(0, since)] = over[..] else { panic!("{over:?}") };
        assert_eq!(next, [(true, since + SLOW_FOR_MS / 1_000)]);
    }

    #[test]
    fn the_part_that_costs_the_most_time_is_named_and_named_again_when_it_is_over() {
        let (gang, mut slowness) = (gang(2), Slowness::default());
        let tells = |step, data: f64, compute: f64| {
            let metrics =
                [(StepPart::Data, data), (StepPart::Compute, compute)].map(|(part, seconds)| (part.metric().to_string(), seconds));
            Beat { step: Some(step), metrics: metrics.into(), ..Beat::default() }
        };
        let mut named = Vec::new();
        for second in 1..=150 {
            slowness.note(&gang, 0, &tells(second, 0.001, 0.1));
            // Ten times as long for its data, which is nothing beside what it computes.
            slowness.note(&gang, 1, &if second < 60 { tells(second, 0.01, 0.3) } else { tells(second, 0.001, 0.1) });
            named.extend(slowness.look(Timestamp(second * 1_000)).into_iter().map(|turned| (turned.began, turned.part)));
        }
        assert_eq!(named, [(true, StepPart::Compute), (false, StepPart::Compute)]);
    }
}
