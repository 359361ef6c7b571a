//! Clocks of nodes that are hours off: no figure of the coordinator follows them.

use everlit_api::agent::FromAgent;
use everlit_api::gpu::GpuError;
use everlit_api::status::NodeLoad;

use super::*;

const HOUR: u64 = 3_600_000;
const BEGIN: u64 = 100 * HOUR;

fn said(frame: FromAgent) -> Event {
    Event::of_frame(node("n1"), frame).expect("it concerns the engine")
}

/// A gang that has run for an hour, its node heard of a moment ago.
fn an_hour_in() -> (Scene, u64) {
    let mut scene = Scene::new();
    scene.at(BEGIN, said_hello("n1", vec![]));
    scene.submit(BEGIN, 1, command(1));
    scene.start_all(BEGIN, 1, 1, 1);
    let now = BEGIN + HOUR;
    scene.at(now - 500, said(FromAgent::Report(NodeLoad::default())));
    scene.take();
    (scene, now)
}

fn said_hello(name: &str, ranks: Vec<RankReport>) -> Event {
    let Event::NodeLinked { hello } = hello(name, ranks) else { unreachable!("a hello") };
    said(FromAgent::Hello(*hello))
}

fn ends(told: u64) -> Event {
    said(FromAgent::Exited(Exited { incarnation: rank(1, 1, 0), exit: exit(1, told), lost: false }))
}

#[test]
fn an_exit_by_a_clock_that_is_hours_off_is_booked_as_if_it_were_right() {
    for told in [0, BEGIN - 5 * HOUR, BEGIN + HOUR / 2, BEGIN + 9 * HOUR, u64::MAX / 4] {
        let (mut scene, now) = an_hour_in();
        scene.at(now, ends(told));
        let summary = scene.summary(1);
        assert_eq!((summary.ledger.undetected, summary.ledger.training), (0.0, 3_600.0), "told {told}");
        assert_eq!(summary.ranks[0].exit.as_ref().map(|exit| exit.at), Some(Timestamp(now)), "told {told}");
        // The wait is the one that it always is.
        assert_eq!(scene.engine.next_deadline(), Some(Timestamp(now + 500)), "told {told}");
        scene.take();
    }
    // What can be right is believed: nobody saw it for a second.
    let (mut scene, now) = an_hour_in();
    scene.at(now, ends(now - 1_000));
    assert_eq!(scene.summary(1).ledger.undetected, 1.0);
    scene.take();
}

#[test]
fn what_happened_while_nobody_was_linked_counts_from_when_the_node_was_last_heard_of() {
    for (told, undetected) in [(BEGIN + HOUR + 60_000, 240.0), (BEGIN + HOUR / 2, 0.0), (BEGIN + 9 * HOUR, 0.0)] {
        let (mut scene, now) = an_hour_in();
        scene.at(now, Event::NodeUnlinked { node: node("n1") });
        let ended = RankReport { exit: Some(exit(1, told)), pid: None, ..alive(rank(1, 1, 0), 1) };
        scene.at(now + 300_000, said_hello("n1", vec![ended]));
        assert_eq!(scene.summary(1).ledger.undetected, undetected, "told {told}");
        scene.take();
    }
}

#[test]
fn an_error_of_a_gpu_stays_as_far_from_its_rank_s_end_as_it_was() {
    let (mut scene, now) = an_hour_in();
    let error = GpuError { at: Timestamp(4_000), gpu: 0, uuid: "GPU-1".into(), xid: 79 };
    let exit = RankExit { gpu_error: Some(error), ..exit(1, 5_000) };
    scene.at(now, said(FromAgent::Exited(Exited { incarnation: rank(1, 1, 0), exit, lost: false })));
    let exit = scene.summary(1).ranks[0].exit.clone().expect("it ended");
    assert_eq!((exit.at, exit.gpu_error.map(|error| error.at)), (Timestamp(now), Some(Timestamp(now - 1_000))));
    scene.take();
}

#[test]
fn checkpoints_and_beats_have_ages_that_can_be() {
    let at = |created: u64| {
        let (mut scene, now) = an_hour_in();
        scene.at(now, said(FromAgent::Checkpoint(CheckpointNews { created_at: Timestamp(created), ..saved(1, 1, 5) })));
        scene.take();
        scene.summary(1).last_checkpoint.expect("told").age_seconds
    };
    assert_eq!([at(0), at(BEGIN + HOUR / 2), at(BEGIN + 9 * HOUR), at(BEGIN + HOUR - 2_000)], [0.0, 0.0, 0.0, 2.0]);
    let (mut scene, now) = an_hour_in();
    let metrics = (0..1_000).map(|n| (format!("m{n:04}"), 1.0)).collect();
    let strange = Beat { age_ms: u64::MAX, metrics, step: Some(u64::MAX), samples: Some(u64::MAX), ..beat(rank(1, 1, 0), 1) };
    scene.at(now, said(FromAgent::Beats { beats: vec![strange.clone()] }));
    scene.at(now + 2_000, said(FromAgent::Beats { beats: vec![Beat { age_ms: 0, step: Some(3), ..strange }] }));
    let summary = scene.summary(1);
    assert_eq!(summary.ranks[0].heartbeat_age_seconds, Some(0.0));
    assert!(summary.eta_seconds.is_none_or(|eta| eta.is_finite() && eta >= 0.0), "{:?}", summary.eta_seconds);
    assert!((0.0..=1.0).contains(&summary.progress.expect("it tells steps")), "{:?}", summary.progress);
    let job = scene.engine.job(job(1)).expect("active");
    assert!(job.series.points().iter().all(|point| point.metrics.len() == 32 && point.time >= Timestamp(BEGIN)));
    assert_eq!(job.progress.metrics.len(), 32);
    scene.take();
}
