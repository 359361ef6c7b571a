//! What an order of a gang changes of what is there already, and what is asked again.

use super::*;
use everlit_api::ids::JobId;

#[test]
fn a_later_attempt_takes_the_place_of_those_that_were_refused_and_of_nothing_else() {
    let mut s = scene(1);
    let refused = |job: JobId, attempt| Event::GangRefused { job, attempt, reason: "no disk".into(), permanent: false };
    let (job, other) = (s.spec.job, JobId::from_u128(99));
    for (job, attempt) in [(job, 1), (other, 1), (job, 3)] {
        s.engine.handle(1, Event::GangOrdered(Box::new(GangSpec { job, attempt, ..s.spec.clone() })));
        if attempt == 1 {
            s.engine.handle(2, refused(job, attempt));
        }
    }
    s.engine.handle(3, refused(job, 3));
    s.engine.handle(4, Event::GangOrdered(Box::new(GangSpec { job, attempt: 4, ..s.spec.clone() })));
    let known: Vec<bool> = [(job, 1), (job, 3), (job, 4), (other, 1)].map(|(job, attempt)| s.engine.spec(job, attempt).is_some()).into();
    assert_eq!(known, [false, false, true, true]);
    // One that runs still has ranks to end.
    s.engine.handle(5, Event::GangPrepared { resumed: Resumed::from_nothing(job, 4), at: Timestamp(1) });
    s.engine.handle(6, Event::GangOrdered(Box::new(GangSpec { job, attempt: 5, ..s.spec.clone() })));
    assert!(s.engine.spec(job, 4).is_some());
}

#[test]
fn cpu_time_that_nobody_told_is_asked_for_again() {
    let mut s = scene(1);
    s.spec.heartbeat.idle_timeout = Some(Millis(10_000));
    s.running();
    let own = s.own(0);
    s.engine.handle(100, Event::RankOutput(own));
    let asks = |s: &mut Scene, now| s.engine.handle(now, Event::DeadlinePassed).contains(&Action::ReadCpu(own));
    let mut asked = Vec::new();
    while asked.len() < 3 {
        let now = s.engine.next_deadline().expect("a rank lives");
        if asks(&mut s, now) {
            asked.push(now);
        }
    }
    assert_eq!(asked, [2_100, 2_150, 2_200]);
}

#[test]
fn an_agent_that_its_coordinator_left_without_ranks_ends_itself_after_its_linger() {
    let mut s = scene(1);
    s.pass(70_000, expect![""]);
    s.at(70_000, Event::Unlinked, expect![""]);
    assert_eq!(s.engine.next_deadline(), Some(130_000));
    s.pass(
        130_000,
        expect![[r#"
        130000: exit: neither a coordinator nor ranks for too long
    "#]],
    );
}

#[test]
fn a_rank_that_was_killed_is_not_judged_for_the_time_that_its_death_takes() {
    let mut s = scene(1);
    s.running();
    s.engine.handle(0, s.beat(0, 1));
    s.at(
        100,
        s.stop(0),
        expect![[r#"
        signal a1 r0 9
        say beats r0 step Some(1) age 100
    "#]],
    );
    s.pass(60_000, expect![""]);
}

#[test]
fn ranks_that_nobody_orders_again_are_given_up_a_minute_after_they_were_found() {
    let mut s = scene(2);
    let found = Event::GangFound { spec: Box::new(s.spec.clone()), resumed: None, ranks: vec![0, 1], unstarted: vec![0, 1] };
    s.at(7_000, found, expect![""]);
    s.pass(66_999, expect![""]);
    s.pass(
        67_000,
        expect![[r#"
        67000: leave out a1 r0
        67000: leave out a1 r1
    "#]],
    );
}

#[test]
fn a_rank_that_starts_after_its_gang_was_stopped_is_killed_in_time() {
    let mut s = scene(1);
    s.engine.handle(0, Event::GangOrdered(Box::new(s.spec.clone())));
    s.engine.handle(1, s.prepared());
    s.engine.handle(10, s.stop(5_000));
    // Somebody looks while no rank lives: nothing of that stop is due then.
    let other = GangSpec { job: JobId::from_u128(99), ..s.spec.clone() };
    s.engine.handle(20, Event::GangOrdered(Box::new(other)));
    s.at(
        30,
        Event::RankStarted { incarnation: s.own(0), pid: 7, at: Timestamp(1) },
        expect![[r#"
        say started r0 pid 7
        signal a1 r0 15
    "#]],
    );
    s.pass(
        5_010,
        expect![[r#"
        5010: signal a1 r0 9
    "#]],
    );
}
