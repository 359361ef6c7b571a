//! A rank that holds the others up by its own part of the steps: when it is told of, when it is not, and when that is over.

use everlit_api::job::{JobKind, RestartScope};
use everlit_api::manifest::Phase;
use everlit_api::rank::{EXCHANGE_METRIC, StepPart};
use expect_test::expect;

use super::super::state::Job;
use super::*;

/// Seconds of a step: data, compute, update, exchange.
type Times = [f64; 4];

const USUAL: Times = [0.02, 0.1, 0.01, 0.05];
const SLOW_DATA: Times = [0.18, 0.1, 0.01, 0.0];

/// A running gang of the built-in program whose heartbeats come one by one.
struct Gang {
    scene: Scene,
    ms: u64,
    step: u64,
    attempt: u32,
    generation: u32,
    /// In rank order.
    seats: Vec<u32>,
}

fn work(times: Times) -> Beat {
    let names = StepPart::ALL.map(StepPart::metric).into_iter().chain([EXCHANGE_METRIC]);
    let metrics = names.zip(times).map(|(name, seconds)| (name.to_string(), seconds)).collect();
    Beat { phase: Some(Phase::Train), in_place: Some(true), metrics, ..Beat::default() }
}

impl Gang {
    fn new(world_size: u32) -> Self {
        let mut spec = JobSpec::default_for(world_size);
        spec.worker.as_mut().expect("built in").device = everlit_api::job::Device::Cpu;
        spec.restart.backoff.jitter = 0.0;
        let mut scene = Scene::with_node();
        scene.submit(0, 1, spec);
        scene.start_all(10, 1, 1, world_size);
        scene.take();
        Self { scene, ms: 1_000, step: 0, attempt: 1, generation: 0, seats: (0..world_size).collect() }
    }

    /// Steps of `every_ms` for so many seconds; what each rank tells of each.
    fn steps(&mut self, seconds: u64, every_ms: u64, tells: impl Fn(u32, u64) -> Beat) {
        let until = self.ms + seconds * 1_000;
        while self.ms < until {
            self.ms += every_ms;
            self.step += 1;
            let beats = self.seats.iter().zip(0..).map(|(seat, number)| {
                let own = beat(rank(1, self.attempt, *seat), self.step);
                let Beat { phase, in_place, metrics, .. } = tells(number, self.step);
                Beat { generation: self.generation, phase, in_place, metrics, ..own }
            });
            let beats = beats.collect();
            self.scene.at(self.ms, Event::RanksBeat(beats));
        }
    }

    /// Twice a second; rank 1 takes other times than the others.
    fn with_rank_1(&mut self, seconds: u64, times: Times) {
        self.steps(seconds, 500, |rank, _| work(if rank == 1 { times } else { USUAL }));
    }

    fn slow(&self) -> Vec<Option<StepPart>> {
        self.scene.summary(1).ranks.iter().map(|own| own.slow).collect()
    }
}

#[test]
fn a_slow_rank_is_told_of_once_with_its_part_and_once_when_it_keeps_up() {
    let mut gang = Gang::new(4);
    gang.with_rank_1(34, SLOW_DATA);
    assert_eq!(gang.slow(), [None; 4], "not before it has lasted");
    gang.with_rank_1(60, SLOW_DATA);
    assert_eq!(gang.slow(), [None, Some(StepPart::Data), None, None]);
    assert_eq!(gang.scene.engine.job(job(1)).map(Job::slow_ranks), Some(1));
    // Neither slow nor well: it stays what it is.
    gang.with_rank_1(90, [0.06, 0.1, 0.01, 0.0]);
    assert_eq!(gang.slow()[1], Some(StepPart::Data));
    gang.with_rank_1(60, USUAL);
    assert_eq!(gang.slow(), [None; 4]);
    assert_eq!(gang.scene.engine.job(job(1)).map(Job::slow_ranks), Some(0));
    gang.with_rank_1(90, [0.06, 0.1, 0.01, 0.0]);
    gang.scene.expect(expect![[r#"
        36000 job 1: rank_slow: rank 1 on n1 needs 2.2 times as long for its own part of a step as the others: data takes 180 ms, theirs 20 ms
        218000 job 1: rank_slow_over: rank 1 on n1 keeps up with the others again: 1.0 times as long for its own part of a step
    "#]]);
}

#[test]
fn facts_name_rank_node_part_and_ratio() {
    let mut gang = Gang::new(2);
    let mut told = Vec::new();
    for step in 1..=100 {
        let beats = [(0, USUAL), (1, SLOW_DATA)].map(|(number, times)| said(number, step, times));
        let now = Timestamp(1_000 + step * 500);
        told.extend(gang.scene.engine.handle(now, Event::RanksBeat(beats.into())).record.events);
    }
    let told: Vec<_> = told.into_iter().map(|event| (event.event, event.data)).collect();
    let facts = serde_json::json!({
        "attempt": 1, "generation": 0, "rank": 1, "node": "n1", "part": "data", "ratio": 2.23, "own_seconds": 0.18, "others_seconds": 0.02,
    });
    assert_eq!(told, [("rank_slow", facts)]);
}

fn said(number: u32, step: u64, times: Times) -> Beat {
    let Beat { phase, in_place, metrics, .. } = work(times);
    Beat { phase, in_place, metrics, ..beat(rank(1, 1, number), step) }
}

#[test]
fn ranks_that_are_all_slow_or_are_disturbed_by_turns_raise_nothing() {
    let mut gang = Gang::new(4);
    let slow = [0.2, 1.0, 0.1, 0.5];
    gang.steps(120, 500, |_, _| work(slow));
    // Another rank every ten seconds.
    gang.steps(240, 500, |rank, step| work(if step / 20 % 4 == u64::from(rank) { slow } else { USUAL }));
    // One long step of each five, always of the same rank; and one that takes minutes.
    gang.steps(120, 500, |rank, step| work(if rank == 2 && step % 5 == 0 { slow } else { USUAL }));
    gang.steps(60, 500, |rank, step| work(if rank == 2 && step % 200 == 0 { [0.0, 200.0, 0.0, 0.0] } else { USUAL }));
    // For 25 seconds, well, and again.
    for _ in 0..4 {
        gang.with_rank_1(25, slow);
        gang.with_rank_1(10, USUAL);
    }
    assert_eq!(gang.slow(), [None; 4]);
    gang.scene.expect(expect![[""]]);
}

#[test]
fn half_of_the_ranks_are_the_others_and_none_stands_out() {
    let mut gang = Gang::new(3);
    // Two share a processor.
    gang.steps(120, 500, |rank, _| work(if rank > 0 { [0.02, 0.2, 0.02, 0.0] } else { USUAL }));
    gang.scene.expect(expect![[""]]);
    // What waits for others is no part of a rank's own.
    gang.steps(120, 500, |rank, _| work(if rank == 1 { [0.02, 0.1, 0.01, 9.0] } else { USUAL }));
    // Twice as long, and nobody would notice: the step is made of the exchange.
    gang.steps(120, 500, |rank, _| work(if rank == 1 { [0.0, 0.01, 0.0, 0.4] } else { [0.0, 0.005, 0.0, 0.405] }));
    assert_eq!(gang.slow(), [None; 3]);
    gang.scene.expect(expect![[""]]);
}

#[test]
fn long_steps_need_as_many_of_them() {
    let mut gang = Gang::new(2);
    gang.steps(28 * 20, 20_000, |rank, _| work(if rank == 1 { [0.0, 20.0, 0.0, 0.0] } else { [0.0, 5.0, 0.0, 15.0] }));
    gang.scene.expect(expect![[""]]);
    gang.steps(4 * 20, 20_000, |rank, _| work(if rank == 1 { [0.0, 20.0, 0.0, 0.0] } else { [0.0, 5.0, 0.0, 15.0] }));
    gang.scene.expect(expect![[r#"
        601000 job 1: rank_slow: rank 1 on n1 needs 4.0 times as long for its own part of a step as the others: compute takes 20000 ms, theirs 5000 ms
    "#]]);
}

#[test]
fn a_rank_that_saves_or_evaluates_for_long_is_not_slow() {
    let mut gang = Gang::new(2);
    for phase in [Phase::Checkpoint, Phase::Evaluate, Phase::Load] {
        gang.steps(120, 500, |rank, _| Beat {
            phase: Some(if rank == 1 { phase } else { Phase::Train }),
            ..work(if rank == 1 { SLOW_DATA } else { USUAL })
        });
        // It says the same again, and has done no step.
        gang.steps(4, 500, |_, _| work(USUAL));
    }
    assert_eq!(gang.slow(), [None; 2]);
    gang.scene.expect(expect![[""]]);
}

#[test]
fn another_membership_and_another_attempt_begin_anew() {
    let mut gang = Gang::new(2);
    gang.with_rank_1(60, SLOW_DATA);
    assert_eq!(gang.slow(), [None, Some(StepPart::Data)]);
    gang.scene.exits(gang.ms, rank(1, 1, 1), killed(gang.ms));
    assert_eq!(gang.slow(), [None, None], "who has its place is another");
    let started = Started { incarnation: rank(1, 1, 2), pid: 1_002, at: Timestamp(gang.ms) };
    gang.scene.at(gang.ms, Event::RankStarted(started));
    (gang.generation, gang.seats) = (1, vec![0, 2]);
    gang.scene.take();
    gang.with_rank_1(30, SLOW_DATA);
    assert_eq!(gang.slow(), [None, None]);
    gang.with_rank_1(20, SLOW_DATA);
    assert_eq!(gang.slow(), [None, Some(StepPart::Data)]);
    gang.scene.at(gang.ms, Event::RestartRequested { job: job(1) });
    assert_eq!(gang.slow(), [None, None], "an attempt that ends holds nobody up");
    for seat in [0, 2] {
        gang.scene.exits(gang.ms, rank(1, 1, seat), exit(143, gang.ms));
    }
    gang.scene.start_all(gang.ms, 1, 2, 2);
    (gang.attempt, gang.generation, gang.seats) = (2, 0, vec![0, 1]);
    gang.with_rank_1(30, SLOW_DATA);
    assert_eq!(gang.slow(), [None, None]);
    gang.with_rank_1(20, SLOW_DATA);
    assert_eq!(gang.slow(), [None, Some(StepPart::Data)]);
    gang.scene.expect(expect![[r#"
        61500 job 1: recovered_in_place: rank 1 has a new process; all ranks step again after 500 ms
        98000 job 1: rank_slow: rank 1 on n1 needs 2.2 times as long for its own part of a step as the others: data takes 180 ms, theirs 20 ms
        111000 job 1: restart_requested: a user asked for it
        111000   n1 <- stop job 1 attempt 1 grace 30s
        111000 job 1: attempt_placed: attempt 2 is starting on n1
        111000   n1 <- forget 1.1.0 1.1.2
        111000   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
        111000 job 1: attempt_resumed: attempt 2 begins anew: there is no checkpoint
        111000 job 1: job_running: all 2 ranks of attempt 2 run
        147500 job 1: rank_slow: rank 1 on n1 needs 2.2 times as long for its own part of a step as the others: data takes 180 ms, theirs 20 ms
    "#]]);
}

#[test]
fn what_is_said_of_another_membership_counts_for_none() {
    let mut gang = Gang::new(2);
    gang.generation = 7;
    gang.with_rank_1(120, SLOW_DATA);
    gang.scene.expect(expect![[""]]);
}

#[test]
fn ranks_that_do_not_wait_for_each_other_are_not_compared() {
    let mut alone = command(2);
    alone.restart.scope = RestartScope::Rank;
    for spec in [JobSpec { kind: JobKind::Evaluate, ..command(2) }, alone] {
        are_not_compared(spec);
    }
}

fn are_not_compared(spec: JobSpec) {
    let mut gang = Gang::new(2);
    gang.scene.submit(gang.ms, 2, spec);
    gang.scene.start_all(gang.ms, 2, 1, 2);
    gang.scene.take();
    for step in 1..=240 {
        let beats =
            [(0, USUAL), (1, SLOW_DATA)].map(|(number, times)| Beat { incarnation: Some(rank(2, 1, number)), ..said(number, step, times) });
        gang.scene.at(gang.ms + step * 500, Event::RanksBeat(beats.into()));
    }
    gang.scene.expect(expect![[""]]);
}

#[test]
fn a_restarted_coordinator_sees_it_again() {
    let mut gang = Gang::new(2);
    gang.with_rank_1(60, SLOW_DATA);
    gang.scene.take();
    gang.scene.restart_coordinator(gang.ms);
    gang.scene.at(gang.ms, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(1, 1, 1), 101)]));
    assert_eq!(gang.slow(), [None, None]);
    gang.with_rank_1(60, SLOW_DATA);
    gang.scene.expect(expect![[r#"
        97500 job 1: rank_slow: rank 1 on n1 needs 2.2 times as long for its own part of a step as the others: data takes 180 ms, theirs 20 ms
    "#]]);
}

#[test]
fn times_that_no_step_takes_and_programs_that_tell_none_raise_nothing() {
    let mut gang = Gang::new(2);
    for times in [[-0.5, 2.0, 0.0, 0.0], [f64::NAN, 2.0, 0.0, 0.0], [1e300, 1e300, 0.0, 0.0], [0.0, 2.0, 0.0, -1.0]] {
        gang.steps(120, 500, |rank, _| work(if rank == 1 { times } else { USUAL }));
    }
    let mute = |rank: u32| if rank == 1 { work(SLOW_DATA) } else { Beat { metrics: Default::default(), ..work(USUAL) } };
    gang.steps(120, 500, |rank, _| mute(rank));
    gang.scene.expect(expect![[""]]);
}

#[test]
fn what_is_a_small_part_of_a_step_is_not_worth_a_word() {
    let mut gang = Gang::new(3);
    gang.steps(120, 500, |rank, _| work(if rank == 1 { [0.0, 0.03, 0.0, 0.27] } else { [0.0, 0.015, 0.0, 0.285] }));
    gang.scene.expect(expect![[""]]);
}
