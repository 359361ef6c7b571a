//! Saves: told to the ranks that can, and what is said of those that failed or are damaged.

use everlit_api::manifest::SaveError;

use super::*;

fn news(spec: &GangSpec, step: u64, verified: bool) -> Event {
    let kept = vec![step];
    let created_at = Timestamp(1);
    let (job, attempt) = (spec.job, spec.attempt);
    Event::CheckpointSeen(Box::new(CheckpointNews { job, attempt, step, bytes: 1, created_at, verified, path: "/c".into(), kept }))
}

#[test]
fn a_save_is_signalled_to_those_ranks_alone_that_say_they_can() {
    let mut s = scene(3);
    s.running();
    let save = Event::SaveOrdered { job: s.spec.job, attempt: 1 };
    s.at(1, save.clone(), expect![""]);
    for rank in 0..2 {
        let beat = Beat { incarnation: Some(s.own(rank)), heartbeat: true, saves_on_signal: true, ..Beat::default() };
        s.engine.handle(2, Event::HeartbeatRead { incarnation: s.own(rank), seq: 1, beat: Box::new(beat), save_error: None });
    }
    s.engine.handle(2, s.beat(2, 1));
    s.at(3, Event::SaveOrdered { job: s.spec.job, attempt: 2 }, expect![""]);
    s.at(
        4,
        save.clone(),
        expect![[r#"
            notify a1 r0 10
            notify a1 r1 10
        "#]],
    );
    // The newest heartbeat counts.
    s.engine.handle(5, s.beat(1, 2));
    s.engine.handle(6, s.ended(0, 1));
    s.at(7, save.clone(), expect![""]);
    s.engine.handle(8, s.stop(5_000));
    s.at(9, save, expect![""]);
}

#[test]
fn a_failed_save_is_said_once_per_step_also_to_a_coordinator_that_comes_later() {
    let mut s = scene(1);
    s.running();
    let failed = |s: &Scene, seq, step| {
        let beat = Beat { incarnation: Some(s.own(0)), heartbeat: true, ..Beat::default() };
        let save_error = Some(SaveError { step, reason: "disk full".into() });
        Event::HeartbeatRead { incarnation: s.own(0), seq, beat: Box::new(beat), save_error }
    };
    s.at(
        10,
        failed(&s, 1, 50),
        expect![[r#"
            say SaveFailed { incarnation: Incarnation { job: JobId(1208925819614629174706178), attempt: 1, rank: 0 }, error: SaveError { step: 50, reason: "disk full" } }
        "#]],
    );
    s.at(11, failed(&s, 2, 50), expect![""]);
    s.at(12, Event::Unlinked, expect![""]);
    s.at(13, failed(&s, 3, 100), expect![""]);
    s.at(14, failed(&s, 4, 100), expect![""]);
    s.at(
        15,
        Event::Linked,
        expect![[r#"
            say resumed a1 Some(50)
            say SaveFailed { incarnation: Incarnation { job: JobId(1208925819614629174706178), attempt: 1, rank: 0 }, error: SaveError { step: 100, reason: "disk full" } }
        "#]],
    );
}

#[test]
fn a_damaged_checkpoint_is_said_also_to_a_coordinator_that_comes_later() {
    let mut s = scene(1);
    s.running();
    let damaged = |s: &Scene, step| Event::CheckpointQuarantined { job: s.spec.job, step, reason: "chunk 0 differs".into() };
    s.at(
        1,
        damaged(&s, 50),
        expect![[r#"
            say Quarantined { job: JobId(1208925819614629174706178), step: 50, reason: "chunk 0 differs" }
        "#]],
    );
    s.at(2, Event::Unlinked, expect![""]);
    s.at(3, damaged(&s, 100), expect![""]);
    s.at(
        4,
        Event::Linked,
        expect![[r#"
            say resumed a1 Some(50)
            say Quarantined { job: JobId(1208925819614629174706178), step: 100, reason: "chunk 0 differs" }
        "#]],
    );
}

#[test]
fn a_snapshot_is_freed_once_when_a_later_checkpoint_was_read_back() {
    let mut s = scene(1);
    s.spec.attempt = 2;
    s.engine.handle(0, Event::GangOrdered(Box::new(s.spec.clone())));
    let Event::GangPrepared { resumed, at } = s.prepared() else { panic!() };
    s.engine.handle(0, Event::GangPrepared { resumed: Resumed { from_memory: true, ..resumed }, at });
    let spec = s.spec.clone();
    let quiet = |s: &mut Scene, at, event| {
        let actions = s.engine.handle(at, event);
        assert!(actions.iter().all(|action| matches!(action, Action::Say(_))), "{actions:?}");
    };
    quiet(&mut s, 1, news(&spec, 49, true));
    quiet(&mut s, 2, news(&spec, 60, false));
    let actions = s.engine.handle(3, news(&s.spec, 60, true));
    assert_eq!(actions[1..], [Action::FreeSnapshots { job: s.spec.job, committed: 60, attempt: 2 }]);
    quiet(&mut s, 4, news(&spec, 70, true));
}
