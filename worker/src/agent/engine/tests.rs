//! Scenarios: a time, an event, the whole list of actions.

mod gpus;
mod in_time;
mod membership;
mod orders;
mod saves;
mod stuck;

use expect_test::{Expect, expect};

use super::*;
use crate::agent::environment::tests::spec as gang_spec;
use everlit_api::agent::Beat;

struct Scene {
    engine: Engine,
    spec: GangSpec,
    now: u64,
}

fn scene(world_size: u32) -> Scene {
    let mut scene = Scene { engine: Engine::new(0, 60_000), spec: gang_spec(world_size), now: 0 };
    scene.at(0, Event::Linked, expect![""]);
    scene
}

/// One line per action, short enough to read.
fn show(action: &Action) -> String {
    let text = match action {
        Action::Say(FromAgent::Started(started)) => format!("say started r{} pid {}", started.incarnation.rank, started.pid),
        Action::Say(FromAgent::Exited(exited)) => {
            let gpu = exited.exit.gpu_error.as_ref().map(|error| format!(" gpu {} xid {}", error.gpu, error.xid)).unwrap_or_default();
            format!("say exited r{} {} lost {}{gpu}", exited.incarnation.rank, exited.exit.describe(), exited.lost)
        }
        Action::Say(FromAgent::Beats { beats }) => {
            let one = |beat: &Beat| format!(" r{} step {:?} age {}", beat.incarnation.map_or(99, |own| own.rank), beat.step, beat.age_ms);
            format!("say beats{}", beats.iter().map(one).collect::<String>())
        }
        Action::Say(FromAgent::Judged { incarnation, verdict, age_ms, .. }) => {
            format!("say judged r{} {verdict:?} age {age_ms}", incarnation.rank)
        }
        Action::Say(FromAgent::Resumed(resumed)) => format!("say resumed a{} {:?}", resumed.attempt, resumed.step),
        Action::Say(FromAgent::StartFailed { attempt, reason, permanent, .. }) => {
            format!("say start failed a{attempt} {reason} {permanent}")
        }
        Action::Say(FromAgent::GpuFailed { error }) => format!("say gpu {} xid {}", error.gpu, error.xid),
        Action::Say(other) => format!("say {other:?}"),
        Action::Prepare(spec) => format!("prepare a{} env {}", spec.attempt, spec.env.len()),
        Action::Spawn { attempt, .. } => format!("spawn a{attempt}"),
        Action::Regroup { spec, fresh, .. } => {
            format!("regroup a{} g{} env {} fresh {fresh:?}", spec.attempt, spec.generation, spec.env.len())
        }
        Action::Signal { incarnation, signal } => format!("signal a{} r{} {signal}", incarnation.attempt, incarnation.rank),
        Action::Notify { incarnation, signal } => format!("notify a{} r{} {signal}", incarnation.attempt, incarnation.rank),
        Action::FreeSnapshots { committed, attempt, .. } => format!("free snapshots up to step {committed} and before a{attempt}"),
        Action::MarkDrained(incarnation) => format!("mark drained r{}", incarnation.rank),
        Action::ReadCpu(incarnation) => format!("read cpu r{}", incarnation.rank),
        Action::LeaveOut(incarnation) => format!("leave out a{} r{}", incarnation.attempt, incarnation.rank),
        Action::Probe(_) => "probe the disk".into(),
        Action::RemoveRuns(incarnations) => {
            format!("remove runs {}", incarnations.iter().map(|own| format!("r{}", own.rank)).collect::<Vec<_>>().join(" "))
        }
        Action::RetireJob(_) => "retire job".into(),
        Action::RemoveJob(_) => "remove job".into(),
        Action::Exit(reason) => format!("exit: {reason}"),
    };
    text + "\n"
}

impl Scene {
    fn own(&self, rank: u32) -> Incarnation {
        Incarnation { job: self.spec.job, attempt: self.spec.attempt, rank }
    }

    #[track_caller]
    fn at(&mut self, now: u64, event: Event, expected: Expect) {
        assert!(now >= self.now, "time goes on");
        self.now = now;
        let actions = self.engine.handle(now, event);
        expected.assert_eq(&actions.iter().map(show).collect::<String>());
        assert!(self.engine.next_deadline().is_none_or(|at| at > now), "woken again at once: {:?}", self.engine.next_deadline());
    }

    /// Wakes the engine whenever it asks, up to `until`; every action with its time.
    #[track_caller]
    fn pass(&mut self, until: u64, expected: Expect) {
        let mut out = String::new();
        for _ in 0..1000 {
            let Some(at) = self.engine.next_deadline().filter(|at| *at <= until) else { break };
            self.now = at.max(self.now);
            let mut actions: std::collections::VecDeque<_> = self.engine.handle(self.now, Event::DeadlinePassed).into();
            while let Some(action) = actions.pop_front() {
                out.push_str(&format!("{}: {}", self.now, show(&action)));
                if let Action::ReadCpu(incarnation) = action {
                    actions.extend(self.engine.handle(self.now, Event::CpuRead { incarnation, cpu_ms: 7 }));
                }
                if let Action::Probe(_) = action {
                    actions.extend(self.engine.handle(self.now, Event::Probed { took_ms: Some(1) }));
                }
            }
        }
        self.now = until;
        expected.assert_eq(&out);
    }

    fn running(&mut self) {
        let order = Event::GangOrdered(Box::new(self.spec.clone()));
        self.engine.handle(self.now, order);
        self.engine.handle(self.now, self.prepared());
        for rank in 0..self.spec.count {
            let incarnation = self.own(rank);
            self.engine.handle(self.now, Event::RankStarted { incarnation, pid: 100 + rank, at: Timestamp(1) });
        }
    }

    fn prepared(&self) -> Event {
        let resumed = Resumed { step: Some(50), ..Resumed::from_nothing(self.spec.job, self.spec.attempt) };
        Event::GangPrepared { resumed, at: Timestamp(1) }
    }

    fn stop(&self, grace: u64) -> Event {
        Event::StopOrdered { job: self.spec.job, attempt: self.spec.attempt, grace: Millis(grace) }
    }

    fn ended(&self, rank: u32, code: i32) -> Event {
        let exit = RankExit {
            code: Some(code),
            signal: None,
            error: None,
            at: Timestamp(2),
            tail: Vec::new(),
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        };
        Event::RankEnded { incarnation: self.own(rank), exit, lost: false }
    }

    fn beat(&self, rank: u32, seq: u64) -> Event {
        let beat = Beat { incarnation: Some(self.own(rank)), heartbeat: true, step: Some(seq), ..Beat::default() };
        Event::HeartbeatRead { incarnation: self.own(rank), seq, beat: Box::new(beat), save_error: None }
    }
}

#[test]
fn a_gang_from_order_to_forgotten() {
    let mut s = scene(2);
    s.spec.env.insert("SECRET".into(), "x".into());
    s.at(10, Event::GangOrdered(Box::new(s.spec.clone())), expect!["prepare a1 env 1\n"]);
    assert_eq!(s.engine.spec(s.spec.job, 1).map(|spec| spec.env.len()), Some(0));
    s.at(
        20,
        s.prepared(),
        expect![[r#"
        say resumed a1 Some(50)
        spawn a1
    "#]],
    );
    let incarnation = s.own(0);
    s.at(30, Event::RankStarted { incarnation, pid: 7, at: Timestamp(1) }, expect!["say started r0 pid 7\n"]);
    let incarnation = s.own(1);
    s.at(31, Event::RankStarted { incarnation, pid: 8, at: Timestamp(1) }, expect!["say started r1 pid 8\n"]);
    s.at(40, s.ended(0, 0), expect!["say exited r0 exit code 0 lost false\n"]);
    s.at(41, Event::ForgetOrdered(vec![s.own(0), s.own(1)]), expect!["remove runs r0\n"]);
    s.at(42, s.ended(1, 1), expect!["say exited r1 exit code 1 lost false\n"]);
    s.at(43, s.ended(1, 1), expect![""]);
    s.at(44, Event::ForgetOrdered(vec![s.own(1)]), expect!["remove runs r1\n"]);
    s.at(
        45,
        Event::GangOrdered(Box::new(s.spec.clone())),
        expect![[r#"
        say start failed a1 attempt 1 was started here before false
    "#]],
    );
    s.at(46, Event::JobEnded(s.spec.job), expect!["retire job\n"]);
    s.at(47, Event::RemoveOrdered(s.spec.job), expect!["remove job\n"]);
    assert_eq!(s.engine.hello(50), (vec![], vec![], false));
    s.pass(500_000, expect![""]);
}

#[test]
fn orders_of_known_attempts_are_ignored_and_of_older_ones_answered() {
    let mut s = scene(1);
    s.spec.attempt = 2;
    s.running();
    s.at(5, Event::GangOrdered(Box::new(s.spec.clone())), expect![""]);
    s.at(
        6,
        Event::GangOrdered(Box::new(gang_spec(1))),
        expect![[r#"
        say start failed a1 attempt 2 was started here before false
    "#]],
    );
    let mut newer = s.spec.clone();
    newer.attempt = 3;
    s.at(
        7,
        Event::GangOrdered(Box::new(newer)),
        expect![[r#"
        prepare a3 env 0
        signal a2 r0 9
    "#]],
    );
    s.at(8, Event::RemoveOrdered(s.spec.job), expect![""]);
}

#[test]
fn a_job_that_is_to_go_goes_when_its_last_rank_has_ended() {
    let mut s = scene(1);
    s.running();
    s.at(5, Event::RemoveOrdered(s.spec.job), expect![""]);
    s.at(6, Event::JobEnded(s.spec.job), expect![""]);
    s.at(7, s.ended(0, 0), expect!["say exited r0 exit code 0 lost false\nremove job\n"]);
    s.pass(500_000, expect![""]);
}

#[test]
fn a_stop_waits_out_its_grace_and_the_shorter_one_holds() {
    let mut s = scene(2);
    s.running();
    s.at(
        100,
        s.stop(5_000),
        expect![[r#"
        signal a1 r0 15
        signal a1 r1 15
    "#]],
    );
    s.at(200, s.ended(0, 0), expect!["say exited r0 exit code 0 lost false\n"]);
    s.at(300, s.stop(1_000), expect![""]);
    s.at(400, s.stop(9_000), expect![""]);
    s.pass(10_000, expect!["1300: signal a1 r1 9\n"]);
}

#[test]
fn a_stop_without_grace_kills_at_once_and_spares_other_attempts() {
    let mut s = scene(1);
    s.running();
    s.at(1, Event::StopOrdered { job: s.spec.job, attempt: 2, grace: Millis(0) }, expect![""]);
    s.at(2, s.stop(0), expect!["signal a1 r0 9\n"]);
    s.at(3, s.stop(0), expect![""]);
}

#[test]
fn a_gang_stopped_while_it_is_prepared_is_never_started() {
    let mut s = scene(2);
    s.at(1, Event::GangOrdered(Box::new(s.spec.clone())), expect!["prepare a1 env 0\n"]);
    s.at(2, s.stop(100), expect![""]);
    s.at(
        3,
        s.prepared(),
        expect![[r#"
        say resumed a1 Some(50)
        say exited r0 stopped before it was started lost true
        say exited r1 stopped before it was started lost true
    "#]],
    );
}

#[test]
fn a_rank_that_starts_after_the_stop_is_stopped() {
    let mut s = scene(1);
    s.at(1, Event::GangOrdered(Box::new(s.spec.clone())), expect!["prepare a1 env 0\n"]);
    s.at(
        2,
        s.prepared(),
        expect![[r#"
        say resumed a1 Some(50)
        spawn a1
    "#]],
    );
    s.at(3, s.stop(100), expect![""]);
    let incarnation = s.own(0);
    s.at(
        50,
        Event::RankStarted { incarnation, pid: 7, at: Timestamp(1) },
        expect![[r#"
        say started r0 pid 7
        signal a1 r0 15
    "#]],
    );
    s.pass(1_000, expect!["103: signal a1 r0 9\n"]);
}

#[test]
fn who_lives_and_the_newest_order_of_a_job_are_known() {
    let mut s = scene(2);
    let job = s.spec.job;
    assert_eq!((s.engine.living().count(), s.engine.newest_spec(job).is_some()), (0, false));
    s.running();
    assert_eq!((s.engine.living().count(), s.engine.newest_spec(job).map(|spec| spec.attempt)), (2, Some(s.spec.attempt)));
    s.engine.handle(1_000, s.ended(0, 0));
    assert_eq!(s.engine.living().map(|(own, _)| own.rank).collect::<Vec<_>>(), [1]);
}

#[test]
fn news_are_sent_together_and_only_when_new() {
    let mut s = scene(2);
    s.running();
    s.at(1_000, s.beat(0, 1), expect!["say beats r0 step Some(1) age 0\n"]);
    s.at(1_010, s.beat(0, 2), expect![""]);
    s.at(1_020, s.beat(0, 3), expect![""]);
    s.at(1_030, s.beat(1, 5), expect![""]);
    s.at(1_031, s.beat(1, 5), expect![""]);
    s.at(1_032, s.beat(1, 4), expect![""]);
    s.pass(2_000, expect!["1050: say beats r0 step Some(3) age 30 r1 step Some(5) age 20\n"]);
    s.at(2_001, s.beat(0, 9), expect!["say beats r0 step Some(9) age 0\n"]);
    s.at(2_002, s.beat(0, 10), expect![""]);
    s.at(
        2_003,
        s.ended(0, 0),
        expect![[r#"
        say beats r0 step Some(10) age 1
        say exited r0 exit code 0 lost false
    "#]],
    );
    s.pass(3_000, expect![""]);
}

#[test]
fn a_rank_whose_heartbeats_stop_is_silent_once() {
    let mut s = scene(1);
    s.running();
    s.at(4_000, s.beat(0, 1), expect!["say beats r0 step Some(1) age 0\n"]);
    s.at(9_000, s.beat(0, 2), expect!["say beats r0 step Some(2) age 0\n"]);
    s.pass(
        18_999,
        expect![[r#"
        15500: probe the disk
        16500: probe the disk
        17500: probe the disk
        18500: probe the disk
    "#]],
    );
    s.pass(
        40_000,
        expect![[r#"
            19500: probe the disk
            20500: probe the disk
            21500: probe the disk
            22500: probe the disk
            23000: say judged r0 Silent age 10000
        "#]],
    );
    s.at(41_000, Event::Unlinked, expect![""]);
    s.at(
        42_000,
        Event::Linked,
        expect![[r#"
            say resumed a1 Some(50)
            say judged r0 Silent age 29000
        "#]],
    );
}

#[test]
fn a_rank_without_any_sign_has_not_started() {
    let mut s = scene(2);
    s.running();
    s.at(119_000, Event::RankOutput(s.own(0)), expect![""]);
    s.pass(
        200_000,
        expect![[r#"
        120000: say judged r1 NoStart age 120000
        179000: read cpu r0
    "#]],
    );
}

#[test]
fn a_required_heartbeat_is_not_replaced_by_output() {
    let mut s = scene(1);
    s.spec.heartbeat.required = true;
    s.running();
    s.at(1_000, Event::RankOutput(s.own(0)), expect![""]);
    s.pass(130_000, expect!["120000: say judged r0 NoStart age 120000\n"]);
}

#[test]
fn a_rank_without_output_and_cpu_time_is_idle() {
    let mut s = scene(1);
    s.spec.heartbeat.idle_timeout = Some(Millis(1_000));
    s.running();
    s.at(100, Event::RankOutput(s.own(0)), expect![""]);
    s.pass(
        500,
        expect![[r#"
        300: read cpu r0
        500: read cpu r0
    "#]],
    );
    // 30 ms in 200: it works.
    s.at(700, Event::CpuRead { incarnation: s.own(0), cpu_ms: 37 }, expect![""]);
    s.pass(
        5_000,
        expect![[r#"
        900: read cpu r0
        1100: read cpu r0
        1300: read cpu r0
        1500: read cpu r0
        1700: read cpu r0
        1700: say judged r0 Idle age 1000
    "#]],
    );
}

#[test]
fn a_lone_rank_may_be_idle_for_ever() {
    let mut s = scene(1);
    s.running();
    s.at(100, Event::RankOutput(s.own(0)), expect![""]);
    s.pass(100_000_000, expect![""]);
}

#[test]
fn time_without_an_agent_is_nobodys_silence() {
    let mut s = scene(1);
    let found = Event::GangFound { spec: Box::new(s.spec.clone()), resumed: None, ranks: vec![0], unstarted: vec![] };
    s.at(1_000_000, found, expect![""]);
    let incarnation = s.own(0);
    s.at(1_000_001, Event::RankStarted { incarnation, pid: 7, at: Timestamp(1) }, expect!["say started r0 pid 7\n"]);
    s.at(1_000_002, s.beat(0, 900), expect!["say beats r0 step Some(900) age 0\n"]);
    s.pass(
        1_010_001,
        expect![[r#"
        1002502: probe the disk
        1003502: probe the disk
        1004502: probe the disk
        1005502: probe the disk
        1006502: probe the disk
        1007502: probe the disk
        1008502: probe the disk
        1009502: probe the disk
    "#]],
    );
    s.pass(
        1_020_000,
        expect![[r#"
            1010002: say judged r0 Silent age 10000
        "#]],
    );
}

#[test]
fn stale_news_are_dropped() {
    let mut s = scene(1);
    s.running();
    let stale = Incarnation { attempt: 7, ..s.own(0) };
    s.at(1, Event::RankStarted { incarnation: stale, pid: 1, at: Timestamp(1) }, expect![""]);
    s.at(2, Event::RankOutput(stale), expect![""]);
    s.at(3, Event::RankOutput(Incarnation { rank: 5, ..s.own(0) }), expect![""]);
    let Event::RankEnded { exit, .. } = s.ended(0, 0) else { panic!() };
    s.at(4, Event::RankEnded { incarnation: stale, exit, lost: false }, expect![""]);
}

#[test]
fn a_drain_leaves_the_stopping_to_the_coordinator_for_a_while() {
    let mut s = scene(1);
    s.running();
    s.at(1_000, Event::EndAsked, expect!["say Draining\n"]);
    let mut other = gang_spec(1);
    other.job = JobId::from_parts(9, 9);
    s.at(1_001, Event::GangOrdered(Box::new(other)), expect!["say start failed a1 the agent is ending false\n"]);
    s.at(1_002, s.stop(5_000), expect!["signal a1 r0 15\n"]);
    s.at(1_500, s.ended(0, 0), expect!["say exited r0 exit code 0 lost false\n"]);
    s.at(
        1_600,
        Event::ForgetOrdered(vec![s.own(0)]),
        expect![[r#"
        remove runs r0
        exit: ended as asked, no rank is left
    "#]],
    );
}

#[test]
fn a_drain_without_a_coordinator_stops_by_itself_and_the_ends_are_free() {
    let mut s = scene(1);
    s.running();
    s.at(1, Event::Unlinked, expect![""]);
    s.at(
        1_000,
        Event::EndAsked,
        expect![[r#"
        mark drained r0
        signal a1 r0 15
    "#]],
    );
    s.pass(31_000, expect!["31000: signal a1 r0 9\n"]);
    s.at(
        31_001,
        s.ended(0, 0),
        expect![[r#"
        say exited r0 exit code 0 lost true
        exit: ended as asked, no rank is left
    "#]],
    );
    let (ranks, ..) = s.engine.hello(31_002);
    assert_eq!(ranks[0].exit.as_ref().and_then(|exit| exit.error.as_deref()), Some("stopped because its agent was told to end"));
}

#[test]
fn a_coordinator_that_does_not_answer_a_drain_is_not_waited_for() {
    let mut s = scene(1);
    s.running();
    s.at(1_000, Event::EndAsked, expect!["say Draining\n"]);
    s.pass(
        5_000,
        expect![[r#"
        4000: mark drained r0
        4000: signal a1 r0 15
    "#]],
    );
    s.at(5_000, s.ended(0, 143), expect!["say exited r0 exit code 143 lost true\n"]);
    s.pass(7_000, expect!["6000: exit: ended as asked, no rank is left\n"]);
}

#[test]
fn asked_twice_it_ends_at_once_and_leaves_its_ranks() {
    let mut s = scene(1);
    s.running();
    s.at(1, Event::EndAsked, expect!["say Draining\n"]);
    s.at(2, Event::EndAsked, expect!["exit: asked twice: ranks are left running\n"]);
}

#[test]
fn it_lingers_only_with_nobody_to_care_for() {
    let mut s = scene(1);
    s.running();
    s.at(1_000, Event::Unlinked, expect![""]);
    s.pass(900_000, expect!["120000: say judged r0 NoStart age 120000\n"]);
    s.at(900_000, s.ended(0, 0), expect!["say exited r0 exit code 0 lost false\n"]);
    s.pass(959_999, expect![""]);
    s.at(960_000, Event::DeadlinePassed, expect!["exit: neither a coordinator nor ranks for too long\n"]);
}

#[test]
fn a_refusal_is_said_again_until_the_job_ends() {
    let mut s = scene(1);
    s.at(1, Event::GangOrdered(Box::new(s.spec.clone())), expect!["prepare a1 env 0\n"]);
    let (job, attempt) = (s.spec.job, 1);
    let refused = Event::GangRefused { job, attempt, reason: "no disk".into(), permanent: false };
    s.at(2, refused, expect!["say start failed a1 no disk false\n"]);
    s.at(3, Event::GangOrdered(Box::new(s.spec.clone())), expect!["say start failed a1 no disk false\n"]);
    s.at(4, Event::Unlinked, expect![""]);
    s.at(5, Event::Linked, expect!["say start failed a1 no disk false\n"]);
    s.at(6, Event::JobEnded(job), expect!["retire job\n"]);
    s.at(7, Event::Linked, expect![""]);
}

#[test]
fn progress_from_output_is_merged_until_heartbeats_come() {
    let mut s = scene(1);
    s.running();
    let read = |s: &Scene, step: Option<u64>, loss: Option<f64>| {
        let beat = Beat { incarnation: Some(s.own(0)), step, loss, ..Beat::default() };
        Event::ProgressRead { incarnation: s.own(0), beat: Box::new(beat) }
    };
    s.at(1_000, read(&s, Some(5), None), expect!["say beats r0 step Some(5) age 0\n"]);
    s.at(2_000, read(&s, None, Some(1.5)), expect!["say beats r0 step Some(5) age 0\n"]);
    s.at(3_000, s.beat(0, 7), expect!["say beats r0 step Some(7) age 0\n"]);
    s.at(4_000, read(&s, Some(99), None), expect![""]);
}

#[test]
fn a_shutdown_waits_for_the_last_rank() {
    let mut s = scene(1);
    s.running();
    s.at(1, Event::ShutdownOrdered, expect![""]);
    s.pass(60_000, expect![""]);
    s.at(60_000, s.ended(0, 0), expect!["say exited r0 exit code 0 lost false\n"]);
    s.pass(62_000, expect!["61000: exit: ended as asked, no rank is left\n"]);
}
