//! A running gang gets other members: nobody starts beside who is replaced, and each start is ordered once.

use super::*;

const KILLED: &str = "signal 9";

fn regroup(s: &Scene, generation: u32, seats: &[u32], spares: &[u32]) -> Event {
    let env = [("TOKEN".to_string(), "secret".to_string())].into();
    Event::GangOrdered(Box::new(GangSpec { generation, seats: seats.into(), spares: spares.into(), env, ..s.spec.clone() }))
}

fn ended(s: &Scene, seat: u32) -> Event {
    let exit = RankExit { signal: Some(9), error: None, ..no_exit(KILLED, Timestamp(9)) };
    Event::RankEnded { incarnation: s.own(seat), exit, lost: false }
}

fn started(s: &Scene, seat: u32) -> Event {
    Event::RankStarted { incarnation: s.own(seat), pid: 100 + seat, at: Timestamp(9) }
}

#[test]
fn a_dead_rank_s_successor_starts_once_and_the_others_are_not_touched() {
    let mut s = scene(2);
    s.running();
    s.at(
        10,
        ended(&s, 1),
        expect![[r#"
        say exited r1 signal 9 (SIGKILL) lost false
    "#]],
    );
    s.at(
        20,
        regroup(&s, 1, &[0, 2], &[]),
        expect![[r#"
        regroup a1 g1 env 1 fresh [2]
    "#]],
    );
    // Said again, and said late: nothing new.
    s.at(21, regroup(&s, 1, &[0, 2], &[]), expect![[""]]);
    s.at(22, regroup(&s, 0, &[], &[]), expect![[""]]);
    s.at(
        30,
        started(&s, 2),
        expect![[r#"
        say started r2 pid 102
    "#]],
    );
    s.at(
        40,
        Event::ForgetOrdered(vec![s.own(1)]),
        expect![[r#"
        remove runs r1
    "#]],
    );
    s.at(
        50,
        Event::StopOrdered { job: s.spec.job, attempt: 1, grace: Millis(0) },
        expect![[r#"
        signal a1 r0 9
        signal a1 r2 9
    "#]],
    );
}

#[test]
fn who_hangs_is_killed_and_gone_before_its_successor_starts() {
    let mut s = scene(2);
    s.running();
    s.at(
        10,
        regroup(&s, 1, &[0, 2], &[]),
        expect![[r#"
        signal a1 r1 9
    "#]],
    );
    s.at(
        20,
        ended(&s, 1),
        expect![[r#"
        say exited r1 signal 9 (SIGKILL) lost false
        regroup a1 g1 env 1 fresh [2]
    "#]],
    );
}

#[test]
fn a_later_membership_replaces_one_that_never_held() {
    let mut s = scene(2);
    s.running();
    s.at(
        10,
        regroup(&s, 1, &[0, 2], &[]),
        expect![[r#"
        signal a1 r1 9
    "#]],
    );
    s.at(
        11,
        regroup(&s, 2, &[3, 2], &[]),
        expect![[r#"
        signal a1 r0 9
    "#]],
    );
    s.at(
        20,
        ended(&s, 1),
        expect![[r#"
        say exited r1 signal 9 (SIGKILL) lost false
    "#]],
    );
    s.at(
        21,
        ended(&s, 0),
        expect![[r#"
        say exited r0 signal 9 (SIGKILL) lost false
        regroup a1 g2 env 1 fresh [2, 3]
    "#]],
    );
}

#[test]
fn spares_start_with_the_gang_and_one_more_when_it_is_asked_for() {
    let mut s = scene(2);
    s.spec.spares = vec![2];
    s.running();
    s.at(
        5,
        started(&s, 2),
        expect![[r#"
        say started r2 pid 102
    "#]],
    );
    s.at(
        10,
        ended(&s, 0),
        expect![[r#"
        say exited r0 signal 9 (SIGKILL) lost false
    "#]],
    );
    s.at(
        20,
        regroup(&s, 1, &[2, 1], &[]),
        expect![[r#"
        regroup a1 g1 env 1 fresh []
    "#]],
    );
    s.at(
        30,
        regroup(&s, 1, &[2, 1], &[3]),
        expect![[r#"
        regroup a1 g1 env 1 fresh [3]
    "#]],
    );
}

#[test]
fn a_gang_that_is_stopped_or_an_agent_that_ends_starts_nobody() {
    let mut s = scene(2);
    s.running();
    s.at(
        10,
        Event::StopOrdered { job: s.spec.job, attempt: 1, grace: Millis(5_000) },
        expect![[r#"
        signal a1 r0 15
        signal a1 r1 15
    "#]],
    );
    s.at(
        11,
        ended(&s, 1),
        expect![[r#"
        say exited r1 signal 9 (SIGKILL) lost false
    "#]],
    );
    s.at(20, regroup(&s, 1, &[0, 2], &[]), expect![[""]]);
}

#[test]
fn an_agent_after_this_one_goes_on_with_the_membership_that_it_finds() {
    let mut s = scene(2);
    let spec = GangSpec { generation: 1, seats: vec![0, 2], ..s.spec.clone() };
    s.at(0, Event::GangFound { spec: Box::new(spec), resumed: None, ranks: vec![0, 1, 2], unstarted: vec![] }, expect![[""]]);
    s.at(
        1,
        started(&s, 0),
        expect![[r#"
        say started r0 pid 100
    "#]],
    );
    s.at(
        1,
        ended(&s, 1),
        expect![[r#"
        say exited r1 signal 9 (SIGKILL) lost false
    "#]],
    );
    s.at(
        1,
        started(&s, 2),
        expect![[r#"
        say started r2 pid 102
    "#]],
    );
    s.at(10, regroup(&s, 1, &[0, 2], &[]), expect![[""]]);
    s.at(
        20,
        regroup(&s, 2, &[3, 2], &[]),
        expect![[r#"
        signal a1 r0 9
    "#]],
    );
}

#[test]
fn who_was_to_join_a_gang_that_is_stopped_is_left_out_and_that_is_said() {
    let mut s = scene(2);
    s.running();
    s.at(
        10,
        regroup(&s, 1, &[0, 2], &[]),
        expect![[r#"
        signal a1 r1 9
    "#]],
    );
    // Before the hanging one is gone, and so before its successor was started.
    s.at(
        11,
        Event::StopOrdered { job: s.spec.job, attempt: 1, grace: Millis(0) },
        expect![[r#"
        leave out a1 r2
        signal a1 r0 9
    "#]],
    );
    let exit = no_exit("stopped before it was started", Timestamp(9));
    s.at(
        12,
        Event::RankEnded { incarnation: s.own(2), exit, lost: true },
        expect![[r#"
        say exited r2 stopped before it was started lost true
    "#]],
    );
    s.at(
        20,
        ended(&s, 1),
        expect![[r#"
        say exited r1 signal 9 (SIGKILL) lost false
    "#]],
    );
}

#[test]
fn a_smaller_membership_starts_only_who_is_to_join() {
    let mut s = scene(3);
    s.running();
    s.at(
        10,
        ended(&s, 0),
        expect![[r#"
        say exited r0 signal 9 (SIGKILL) lost false
    "#]],
    );
    let smaller = |s: &Scene, generation, seats: &[u32], spares: &[u32]| {
        let (world_size, count) = (seats.len() as u32, seats.len() as u32);
        let Event::GangOrdered(spec) = regroup(s, generation, seats, spares) else { unreachable!() };
        Event::GangOrdered(Box::new(GangSpec { world_size, count, ..*spec }))
    };
    s.at(
        20,
        smaller(&s, 1, &[2, 1], &[3]),
        expect![[r#"
        regroup a1 g1 env 1 fresh [3]
    "#]],
    );
    s.at(
        30,
        started(&s, 3),
        expect![[r#"
        say started r3 pid 103
    "#]],
    );
    s.at(
        40,
        smaller(&s, 2, &[2, 1, 3], &[]),
        expect![[r#"
        regroup a1 g2 env 1 fresh []
    "#]],
    );
}

/// An agent died between the first start of a gang and the second.
fn half_started() -> Scene {
    let mut s = scene(2);
    let found = Event::GangFound { spec: Box::new(s.spec.clone()), resumed: None, ranks: vec![0, 1], unstarted: vec![1] };
    s.at(0, found, expect![[""]]);
    let one = started(&s, 0);
    s.engine.handle(1, one);
    s.now = 1;
    s
}

#[test]
fn what_an_agent_did_not_come_to_start_starts_when_its_order_comes_again() {
    let mut s = half_started();
    let (ranks, ..) = s.engine.hello(1);
    assert!(ranks.iter().map(|own| (own.pid, own.exit.is_some())).eq([(Some(100), false), (None, false)]), "{ranks:?}");
    s.at(
        10,
        regroup(&s, 0, &[], &[]),
        expect![[r#"
        regroup a1 g0 env 1 fresh [1]
    "#]],
    );
    s.at(11, regroup(&s, 0, &[], &[]), expect![[""]]);
    s.at(
        12,
        started(&s, 1),
        expect![[r#"
        say started r1 pid 101
    "#]],
    );
    s.at(13, regroup(&s, 0, &[], &[]), expect![[""]]);
    // It is due no more.
    let left_out = |out: &[Action]| out.iter().any(|action| matches!(action, Action::LeaveOut(_)));
    assert!(!left_out(&s.engine.handle(70_000, Event::DeadlinePassed)));
}

#[test]
fn what_an_agent_did_not_come_to_start_ends_when_nobody_orders_it() {
    let mut s = half_started();
    let left_out = |out: &[Action]| out.iter().any(|action| matches!(action, Action::LeaveOut(own) if own.rank == 1));
    assert!(!left_out(&s.engine.handle(59_999, Event::DeadlinePassed)));
    assert!(left_out(&s.engine.handle(60_000, Event::DeadlinePassed)));
    assert!(!left_out(&s.engine.handle(60_001, Event::DeadlinePassed)));
}

#[test]
fn what_an_agent_did_not_come_to_start_never_starts_when_it_is_not_wanted_any_more() {
    let mut s = half_started();
    s.at(
        10,
        regroup(&s, 1, &[0, 2], &[]),
        expect![[r#"
        leave out a1 r1
        regroup a1 g1 env 1 fresh [2]
    "#]],
    );
    let mut s = half_started();
    s.at(
        10,
        Event::StopOrdered { job: s.spec.job, attempt: 1, grace: Millis(1_000) },
        expect![[r#"
        leave out a1 r1
        signal a1 r0 15
    "#]],
    );
    s.at(20, regroup(&s, 0, &[], &[]), expect![[""]]);
}
