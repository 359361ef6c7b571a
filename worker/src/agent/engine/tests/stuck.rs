//! A gang that makes no progress: found by its own pace, and the right rank is blamed.

use everlit_api::job::WorkerSpec;
use everlit_api::manifest::Phase;

use super::*;
use crate::agent::limits::WELL_BEFORE_STUCK_MS;

/// Two ranks of the built-in program that did `steps` steps of 100 ms.
fn stepping(steps: u64) -> Scene {
    let mut s = scene(2);
    s.spec.program = everlit_api::agent::Program::Worker { worker: Box::new(WorkerSpec::for_world(2)), evaluate: false };
    s.running();
    for step in 0..=steps {
        for rank in 0..2 {
            s.engine.handle(s.now, told(&s, rank, 1 + step, Phase::Train, step));
        }
        s.now += 100;
    }
    s
}

fn told(s: &Scene, rank: u32, seq: u64, phase: Phase, step: u64) -> Event {
    let incarnation = s.own(rank);
    let beat = Beat { incarnation: Some(incarnation), heartbeat: true, phase: Some(phase), step: Some(step), ..Beat::default() };
    Event::HeartbeatRead { incarnation, seq, beat: Box::new(beat), save_error: None }
}

/// The engine's time has come, and the disk is well.
fn woken(s: &mut Scene) -> Vec<Action> {
    let mut actions = s.engine.handle(s.now, Event::DeadlinePassed);
    if actions.iter().any(|action| matches!(action, Action::Probe(_))) {
        actions.extend(s.engine.handle(s.now, Event::Probed { took_ms: Some(1) }));
    }
    actions
}

#[test]
fn a_disk_that_stands_still_or_is_full_is_no_rank_s_silence() {
    for took_ms in [None, Some(4_000)] {
        let mut s = stepping(40);
        let begun = s.now;
        let probed = |s: &mut Scene| s.engine.handle(s.now, Event::DeadlinePassed).iter().any(|action| matches!(action, Action::Probe(_)));
        while !probed(&mut s) {
            s.now += 50;
            assert!(s.now < begun + 20_000, "nobody asked after the disk");
        }
        let said = s.engine.handle(s.now, Event::Probed { took_ms });
        let asked = s.now;
        // All begins anew: nobody is judged before another deadline has passed.
        assert!(!said.iter().any(|action| matches!(action, Action::Say(FromAgent::Judged { .. }))), "{said:?}");
        while !probed(&mut s) {
            s.now += 50;
        }
        assert!(s.now - asked + 100 >= asked - begun, "{} after {}", s.now - asked, asked - begun);
        // Well at last, and still nobody beats: who may only not have run since is given time for it.
        s.engine.handle(s.now, Event::Probed { took_ms: Some(1) });
        let well = s.now;
        while !woken(&mut s).iter().any(|action| matches!(action, Action::Say(FromAgent::Judged { .. }))) {
            s.now += 50;
            assert!(s.now < well + 20_000, "nobody is judged");
        }
        assert!(s.now >= well + WELL_BEFORE_STUCK_MS, "{}", s.now - well);
    }
}

#[test]
fn a_disk_that_stood_still_until_just_before_the_verdict_is_known_by_then() {
    let mut s = stepping(40);
    let (begun, mut asked) = (s.now, None);
    // Asked early, the disk answers when it goes on, a moment before the heartbeats would be too late.
    while s.now < begun + 12_000 {
        s.now += 50;
        let mut said = s.engine.handle(s.now, Event::DeadlinePassed);
        if said.iter().any(|action| matches!(action, Action::Probe(_))) {
            asked = asked.or(Some(s.now));
        }
        if s.now == begun + 9_900 {
            let took = s.now - asked.expect("the disk was asked after");
            assert!(took > 7_000, "{took}");
            said.extend(s.engine.handle(s.now, Event::Probed { took_ms: Some(took) }));
        }
        assert!(!said.iter().any(|action| matches!(action, Action::Say(FromAgent::Judged { .. }))), "{said:?}");
    }
}

#[test]
fn what_the_disk_said_long_ago_says_nothing_of_now() {
    let mut s = stepping(40);
    // Well before all were quiet, and asked after again as soon as they are.
    s.engine.handle(s.now, Event::Probed { took_ms: Some(1) });
    let mut asked = false;
    while let Some(at) = s.engine.next_deadline().filter(|at| *at < 4_000 + 2_590) {
        s.now = at;
        asked |= s.engine.handle(s.now, Event::DeadlinePassed).iter().any(|action| matches!(action, Action::Probe(_)));
    }
    assert!(asked, "nobody asked after the disk");
    // It answers a moment before they are late: until then it may have stood still.
    s.now = 4_000 + 2_590;
    let answered = s.now;
    s.engine.handle(s.now, Event::Probed { took_ms: Some(1) });
    let until = s.now + 5_000;
    assert_eq!(
        judged(&mut s, &[], Phase::Train, 40, until),
        [format!("{} r0 Stuck {}", answered + WELL_BEFORE_STUCK_MS, 2_590 + WELL_BEFORE_STUCK_MS)]
    );
}

#[test]
fn an_order_for_another_gang_forgives_nobody() {
    let mut s = stepping(40);
    let soon = s.now + 1_000;
    assert!(judged(&mut s, &[], Phase::Train, 40, soon).is_empty());
    let other = GangSpec { job: everlit_api::ids::JobId::from_u128(77), ..s.spec.clone() };
    s.engine.handle(s.now, Event::GangOrdered(Box::new(other)));
    let until = s.now + 5_000;
    assert_eq!(judged(&mut s, &[], Phase::Train, 40, until), ["6600 r0 Stuck 2600"]);
}

#[test]
fn an_agent_that_slept_for_longer_than_the_heartbeat_timeout_blames_nobody() {
    let mut s = stepping(40);
    s.engine.handle(s.now, Event::DeadlinePassed);
    s.now += 12_500;
    for _ in 0..3 {
        let said = woken(&mut s);
        assert!(!said.iter().any(|action| matches!(action, Action::Say(FromAgent::Judged { .. }))), "{said:?}");
        s.now += 100;
    }
}

/// Who was judged, and when; these ranks beat on every second with the same step.
fn judged(s: &mut Scene, beating: &[u32], phase: Phase, step: u64, until: u64) -> Vec<String> {
    let beating: Vec<(u32, u64)> = beating.iter().map(|rank| (*rank, step)).collect();
    judged_at(s, &beating, phase, until)
}

/// The same, each with a step of its own.
fn judged_at(s: &mut Scene, beating: &[(u32, u64)], phase: Phase, until: u64) -> Vec<String> {
    let mut found = Vec::new();
    let mut seq = 10_000 + s.now;
    let mut next_beat = s.now;
    while s.now < until {
        let wake = s.engine.next_deadline().unwrap_or(u64::MAX).max(s.now);
        s.now = wake.min(next_beat).min(until);
        let mut actions = Vec::new();
        if s.now == next_beat {
            seq += 1;
            for (rank, step) in beating {
                actions.extend(s.engine.handle(s.now, told(s, *rank, seq, phase, *step)));
            }
            next_beat += 1_000;
        }
        if actions.iter().any(|action| matches!(action, Action::Probe(_))) {
            actions.extend(s.engine.handle(s.now, Event::Probed { took_ms: Some(1) }));
        }
        actions.extend(woken(s));
        for action in actions {
            if let Action::Say(FromAgent::Judged { incarnation, verdict, age_ms, .. }) = action {
                found.push(format!("{} r{} {verdict:?} {age_ms}", s.now, incarnation.rank));
            }
        }
    }
    found
}

/// A heartbeat as the built-in program writes it four times a second.
fn lively(s: &Scene, rank: u32, seq: u64, step: u64) -> Event {
    let Event::HeartbeatRead { incarnation, mut beat, .. } = told(s, rank, seq, Phase::Train, step) else { unreachable!() };
    beat.in_place = Some(true);
    Event::HeartbeatRead { incarnation, seq, beat, save_error: None }
}

/// Two ranks that did 40 steps of `step_ms`; then `beating` beat on each `every` milliseconds and nobody steps. Who was judged, when and how old
/// its last step was, within `for_ms`; the time is from the last step.
fn standing_still(step_ms: u64, beating: &[u32], every: u64, for_ms: u64) -> Vec<(u32, u64, u64)> {
    let mut s = stepping(0);
    for step in 1..=40 {
        (0..2).for_each(|rank| drop(s.engine.handle(s.now, lively(&s, rank, 1 + step, step))));
        s.now += step_ms;
    }
    s.now -= step_ms;
    let from = s.now;
    let mut found = Vec::new();
    let mut next_beat = from + every;
    while s.now < from + for_ms {
        s.now = s.engine.next_deadline().unwrap_or(u64::MAX).max(s.now).min(next_beat);
        let mut actions = Vec::new();
        if s.now == next_beat {
            beating.iter().for_each(|rank| actions.extend(s.engine.handle(s.now, lively(&s, *rank, s.now, 40))));
            next_beat += every;
        }
        if actions.iter().any(|action| matches!(action, Action::Probe(_))) {
            actions.extend(s.engine.handle(s.now, Event::Probed { took_ms: Some(1) }));
        }
        actions.extend(woken(&mut s));
        let judged = actions.into_iter().filter_map(|action| match action {
            Action::Say(FromAgent::Judged { incarnation, age_ms, .. }) => Some((incarnation.rank, s.now - from, age_ms)),
            _ => None,
        });
        found.extend(judged);
    }
    found
}

#[test]
fn a_rank_without_any_sign_of_life_is_found_early_when_another_lives() {
    // Half a second and four steps, and not only at the next heartbeat of the other.
    assert_eq!(standing_still(200, &[0], 230, 2_000), [(1, 1_300, 1_300)]);
    // Steps are short: it is quiet for long enough to be doubted, and the disk well for long enough since.
    assert_eq!(standing_still(100, &[0], 230, 2_000), [(1, 1_000, 1_000)]);
    assert_eq!(standing_still(10, &[0], 230, 2_000), [(1, 1_000, 1_000)]);
}

#[test]
fn when_all_are_quiet_at_once_nobody_is_blamed_early() {
    assert_eq!(standing_still(100, &[], 230, 2_000), []);
    assert_eq!(standing_still(100, &[], 230, 4_000), [(0, 2_600, 2_600)]);
}

#[test]
fn a_disk_that_stood_still_until_just_now_is_no_script_s_silence() {
    let mut s = scene(1);
    s.running();
    s.engine.handle(0, s.beat(0, 1));
    let due = s.spec.heartbeat.timeout.0;
    while let Some(at) = s.engine.next_deadline().filter(|at| *at < due - 300) {
        s.now = at;
        s.engine.handle(s.now, Event::DeadlinePassed);
    }
    s.now = due - 300;
    s.engine.handle(s.now, Event::Probed { took_ms: Some(1) });
    assert_eq!(judged(&mut s, &[], Phase::Train, 1, due + 5_000), [format!("{} r0 Silent {}", due + 700, due + 700)]);
}

#[test]
fn a_stopped_rank_is_blamed_for_the_standstill_of_both() {
    let mut s = stepping(100);
    assert_eq!(judged(&mut s, &[0], Phase::Train, 100, 9_000 + 9_000), ["12600 r1 Stuck 2600"]);
}

#[test]
fn when_all_beat_on_who_is_behind_is_blamed() {
    let mut s = stepping(100);
    assert_eq!(judged_at(&mut s, &[(0, 101), (1, 100)], Phase::Train, 18_000), ["12600 r1 Stuck 2600"]);
}

#[test]
fn a_newcomer_whose_heartbeats_stopped_is_blamed_though_its_own_deadline_is_later() {
    let mut s = stepping(100);
    let exit = no_exit("killed", Timestamp(9));
    s.engine.handle(s.now, Event::RankEnded { incarnation: s.own(1), exit, lost: false });
    let spec = GangSpec { generation: 1, seats: vec![0, 2], ..s.spec.clone() };
    s.engine.handle(s.now, Event::GangOrdered(Box::new(spec)));
    s.engine.handle(s.now, Event::RankStarted { incarnation: s.own(2), pid: 102, at: Timestamp(9) });
    for rank in [0, 2] {
        s.engine.handle(s.now, told(&s, rank, 1_000, Phase::Train, 101));
    }
    let until = s.now + 6_000;
    assert_eq!(judged(&mut s, &[0], Phase::Train, 101, until), ["12700 r2 Stuck 2600"]);
}

/// Two ranks that trained, of which one was replaced: the new one loaded, and is in its first step, which the other waits for.
fn joined() -> Scene {
    let mut s = stepping(100);
    let exit = no_exit("killed", Timestamp(9));
    s.engine.handle(s.now, Event::RankEnded { incarnation: s.own(1), exit, lost: false });
    s.engine.handle(s.now, Event::GangOrdered(Box::new(GangSpec { generation: 1, seats: vec![0, 2], ..s.spec.clone() })));
    s.engine.handle(s.now, Event::RankStarted { incarnation: s.own(2), pid: 102, at: Timestamp(9) });
    s.engine.handle(s.now, told(&s, 2, 1_000, Phase::Load, 100));
    for rank in [0, 2] {
        s.engine.handle(s.now, told(&s, rank, 1_001, Phase::Train, 101));
    }
    s
}

#[test]
fn a_newcomer_has_the_time_of_a_first_step_and_nobody_who_waits_for_it_is_blamed() {
    // Nothing is known of first steps.
    let mut s = joined();
    let until = s.now + 31 * 60_000;
    let found = judged(&mut s, &[0, 2], Phase::Train, 101, until);
    assert!(matches!(&found[..], [one] if one.contains("r2 Stuck 1800")), "{found:?}");
    // A first step was seen to take three seconds.
    let mut s = joined();
    let until = s.now + 3_000;
    assert!(judged(&mut s, &[0, 2], Phase::Train, 101, until).is_empty());
    let until = s.now + 3 * 60_000;
    let found = judged(&mut s, &[0, 2], Phase::Train, 102, until);
    assert!(matches!(&found[..], [one] if one.contains("r2 Stuck 1500")), "{found:?}");
}

#[test]
fn who_stops_while_a_newcomer_is_in_its_first_step_is_found_by_its_silence() {
    for (beating, stopped) in [(2, 0), (0, 2)] {
        let mut s = joined();
        let until = s.now + 9_000;
        let found = judged(&mut s, &[beating], Phase::Train, 101, until);
        assert!(matches!(&found[..], [one] if one.contains(&format!("r{stopped} Stuck"))), "{found:?}");
    }
}

#[test]
fn a_slow_first_step_a_save_and_an_evaluation_are_no_standstill() {
    let mut s = stepping(1);
    let (until, step) = (s.now + 20 * 60_000, 1);
    assert!(judged(&mut s, &[0, 1], Phase::Train, step, until).is_empty(), "nothing is learned yet");
    for phase in [Phase::Checkpoint, Phase::Evaluate, Phase::Load] {
        let mut s = stepping(1_000);
        let until = s.now + 20 * 60_000;
        assert!(judged(&mut s, &[0, 1], phase, 1_000, until).is_empty(), "{phase:?}");
    }
}

#[test]
fn a_time_that_is_given_holds_in_every_phase() {
    let mut s = scene(1);
    s.spec.heartbeat.progress_timeout = Some(Millis(60_000));
    s.running();
    s.engine.handle(0, told(&s, 0, 1, Phase::Load, 0));
    assert_eq!(judged(&mut s, &[0], Phase::Load, 0, 100_000), ["60000 r0 Stuck 60000"]);
}

#[test]
fn when_the_agent_was_asleep_nobody_is_stuck() {
    let mut s = stepping(100);
    s.now += 60_000;
    let actions = s.engine.handle(s.now, Event::DeadlinePassed);
    assert!(!actions.iter().any(|action| matches!(action, Action::Say(FromAgent::Judged { verdict: Verdict::Stuck, .. }))), "{actions:?}");
}

#[test]
fn what_was_learned_holds_for_the_next_attempt_once_it_steps() {
    let mut s = stepping(100);
    s.spec.attempt = 2;
    s.running();
    let begun = s.now;
    for step in 100..105 {
        for rank in 0..2 {
            s.engine.handle(s.now, told(&s, rank, 1 + step, Phase::Train, step));
        }
        s.now += 100;
    }
    let until = s.now + 9_000;
    let found = judged(&mut s, &[1], Phase::Train, 104, until);
    assert!(matches!(&found[..], [one] if one.contains("r0 Stuck 26")), "{found:?} from {begun}");
}

#[test]
fn a_rank_that_was_judged_is_not_judged_again_for_a_membership_in_which_it_stays() {
    let mut s = scene(2);
    s.running();
    s.engine.handle(0, s.beat(0, 1));
    assert_eq!(judged(&mut s, &[], Phase::Train, 1, 11_000), ["10000 r0 Silent 10000"]);
    s.engine.handle(s.now, s.ended(1, 1));
    s.engine.handle(s.now, Event::GangOrdered(Box::new(GangSpec { generation: 1, seats: vec![0, 2], ..s.spec.clone() })));
    let said = s.engine.handle(s.now, Event::Probed { took_ms: Some(1) });
    assert!(!said.iter().any(|action| matches!(action, Action::Say(FromAgent::Judged { .. }))), "{said:?}");
    assert!(judged(&mut s, &[], Phase::Train, 1, 30_000).is_empty());
}
