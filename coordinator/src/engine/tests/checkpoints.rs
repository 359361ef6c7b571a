//! Saves and what is told of them: asked for, failed, damaged, resumed from memory; evaluations; the series that survives a restart.

use everlit_api::agent::Beat;
use everlit_api::agent::Program;
use everlit_api::job::{JobKind, JobSpec};
use everlit_api::manifest::{Phase, SaveError};
use everlit_api::status::{JobState, MetricPoint};
use everlit_api::time::Millis;
use expect_test::expect;

use super::super::CannotSave;
use super::*;

fn able(incarnation: Incarnation, step: u64) -> Beat {
    Beat { saves_on_signal: true, ..beat(incarnation, step) }
}

fn worker(world_size: u32) -> JobSpec {
    let mut spec = JobSpec::default_for(world_size);
    spec.restart.backoff.jitter = 0.0;
    spec
}

/// The order that a gang was last started with.
fn started(step: Step) -> Box<everlit_api::agent::GangSpec> {
    let order = step.commands.into_iter().find_map(|command| match command {
        Command::Tell { frame: ToAgent::StartGang(gang), .. } => Some(gang),
        _ => None,
    });
    order.expect("a start")
}

#[test]
fn a_save_is_asked_of_a_running_gang_that_can() {
    let mut scene = Scene::with_node();
    let ask = || Event::SaveRequested { job: job(1) };
    assert_eq!(scene.engine.can_save(job(1)), Err(CannotSave::NotActive));
    scene.submit(0, 1, worker(2));
    assert_eq!(scene.engine.can_save(job(1)), Err(CannotSave::NotRunning(JobState::Starting)));
    scene.start_all(10, 1, 1, 2);
    assert_eq!(scene.engine.can_save(job(1)), Err(CannotSave::NotHeard));
    scene.take();
    // What can not save is not told to, whoever asks.
    scene.at(11, ask());
    scene.expect(expect![""]);
    scene.at(20, Event::RanksBeat(vec![beat(rank(1, 1, 0), 1), beat(rank(1, 1, 1), 1)]));
    assert_eq!(scene.engine.can_save(job(1)), Err(CannotSave::NotSupported));
    scene.at(30, Event::RanksBeat(vec![able(rank(1, 1, 0), 2), able(rank(1, 1, 1), 2)]));
    assert_eq!(scene.engine.can_save(job(1)), Ok(()));
    scene.take();
    scene.at(40, ask());
    scene.expect(expect![[r#"
        40 job 1: checkpoint_requested: a user asked for it
        40   n1 <- SaveNow { job: JobId(1), attempt: 1 }
    "#]]);
    scene.exits(50, rank(1, 1, 1), killed(50));
    assert_eq!(scene.engine.can_save(job(1)), Err(CannotSave::NotRunning(JobState::Recovering)));
    scene.take();
    scene.submit(60, 2, command(1));
    scene.start_all(60, 2, 1, 1);
    assert_eq!(scene.engine.can_save(job(2)), Err(CannotSave::NotSupported));
    scene.take();
}

#[test]
fn a_failed_save_is_recorded_once_per_rank_and_step_and_ends_nothing() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, worker(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    let failed = |attempt, of, step| {
        let error = SaveError { step, reason: "no space left on device".into() };
        Event::SaveFailed { incarnation: rank(1, attempt, of), error }
    };
    scene.at(20, failed(1, 0, 50)).at(30, failed(1, 0, 50)).at(40, failed(1, 1, 50));
    // A save that fails again and again is recorded now and then.
    scene.at(10_019, failed(1, 0, 100)).at(10_020, failed(1, 0, 150)).at(60_000, failed(1, 0, 150)).at(60_000, failed(2, 0, 200));
    scene.expect(expect![[r#"
        20 job 1: checkpoint_failed: rank 0 could not save step 50 and trains on: no space left on device
        40 job 1: checkpoint_failed: rank 1 could not save step 50 and trains on: no space left on device
        10020 job 1: checkpoint_failed: rank 0 could not save step 150 and trains on: no space left on device
    "#]]);
    assert_eq!((scene.summary(1).state, scene.engine.stale_news()), (JobState::Running, 1));
}

#[test]
fn a_checkpoint_that_is_found_damaged_is_recorded_and_no_longer_listed() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, worker(1));
    scene.start_all(10, 1, 1, 1);
    scene.at(20, Event::CheckpointSeen { node: node("n1"), news: saved(1, 1, 50) });
    scene.take();
    scene.at(30, Event::CheckpointQuarantined { node: node("n1"), job: job(1), step: 50, reason: "w.safetensors: chunk 3 differs".into() });
    scene.at(31, Event::CheckpointQuarantined { node: node("n1"), job: job(9), step: 50, reason: "of a job that is gone".into() });
    scene.expect(expect![[r#"
        30 job 1: checkpoint_quarantined: checkpoint of step 50 was put aside: w.safetensors: chunk 3 differs
    "#]]);
    assert_eq!(scene.summary(1).last_checkpoint, None);
}

#[test]
fn a_resume_from_shared_memory_says_so_and_repeats_only_what_it_must() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, worker(1));
    scene.start_all(10, 1, 1, 1);
    scene.at(1_000, Event::RanksBeat(vec![beat(rank(1, 1, 0), 70)]));
    scene.exits(1_100, rank(1, 1, 0), killed(1_100));
    scene.at(1_600, Event::Woke);
    scene.take();
    let path = Some("/dev/shm/x".to_string());
    let resumed = Resumed { step: Some(69), path, from_memory: true, ..Resumed::from_nothing(job(1), 2) };
    scene.at(1_610, Event::AttemptResumed { node: node("n1"), resumed });
    scene.expect(expect![[r#"
        1610 job 1: attempt_resumed: attempt 2 resumed from step 69 from the snapshot in shared memory
    "#]]);
    scene.start_all(1_620, 1, 2, 1);
    scene.at(2_000, Event::RanksBeat(vec![beat(rank(1, 2, 0), 72)]));
    assert_eq!((scene.summary(1).step, scene.summary(1).lost_steps), (Some(72), 1));
    scene.take();
}

#[test]
fn an_evaluation_runs_to_its_end_and_shows_what_it_measured() {
    let mut scene = Scene::with_node();
    let spec = JobSpec { kind: JobKind::Evaluate, resume_from: Some("/c/50".into()), ..worker(1) };
    let mut other = Engine::new(Config::default());
    other.handle(Timestamp(0), hello("n1", vec![]));
    let step = other
        .handle(Timestamp(0), Event::JobSubmitted { id: job(1), spec: Arc::new(spec.clone()), seed: 1, user: None, origin: Vec::new() });
    assert!(matches!(&started(step).program, Program::Worker { evaluate: true, .. }));
    scene.submit(0, 1, spec);
    let resumed = Resumed { step: Some(50), ..Resumed::from_nothing(job(1), 1) };
    scene.at(5, Event::AttemptResumed { node: node("n1"), resumed });
    scene.at(10, Event::RankStarted(Started { incarnation: rank(1, 1, 0), pid: 7, at: Timestamp(10) }));
    let metrics = std::collections::BTreeMap::from([("evaluation_loss".to_string(), 2.5)]);
    let told = Beat { loss: Some(2.5), metrics, phase: Some(Phase::Evaluate), ..beat(rank(1, 1, 0), 50) };
    scene.at(1_010, Event::RanksBeat(vec![told]));
    let summary = scene.summary(1);
    assert_eq!((summary.step, summary.loss, summary.evaluation_loss), (Some(50), Some(2.5), Some(2.5)));
    assert!((summary.ledger.training - 1.0).abs() < 1e-9, "{:?}", summary.ledger);
    scene.exits(2_000, rank(1, 1, 0), exit(0, 2_000));
    assert!(scene.take().contains("job_final: every rank exited 0"));
}

#[test]
fn failures_and_calm_tell_a_gang_how_often_to_save() {
    let mut engine = Engine::new(Config::default());
    engine.handle(Timestamp(0), hello("n1", vec![]));
    let submitted = Event::JobSubmitted { id: job(1), spec: Arc::new(command(1)), seed: 1, user: None, origin: Vec::new() };
    assert_eq!(started(engine.handle(Timestamp(0), submitted)).mean_time_between_failures, Some(Millis::secs(4 * 3_600)));
    engine.handle(Timestamp(0), Event::RankStarted(Started { incarnation: rank(1, 1, 0), pid: 7, at: Timestamp(0) }));
    let hours = 3_600_000;
    let exited = Exited { incarnation: rank(1, 1, 0), exit: killed(2 * hours), lost: false };
    engine.handle(Timestamp(2 * hours), Event::RankExited(exited));
    let again = started(engine.handle(Timestamp(2 * hours + 500), Event::Woke));
    assert_eq!(again.mean_time_between_failures, Some(Millis::secs(3 * 3_600)));
}

fn series(scene: &Scene) -> Vec<MetricPoint> {
    scene.engine.job(job(1)).expect("active").series.points().to_vec()
}

#[test]
fn a_restart_of_the_coordinator_costs_the_series_a_minute_at_most() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, worker(1));
    scene.start_all(0, 1, 1, 1);
    for second in 1..=90 {
        let told = Beat { loss: Some(1.0 / second as f64), samples: Some(second * 8), ..beat(rank(1, 1, 0), second) };
        scene.at(second * 1_000, Event::RanksBeat(vec![told]));
    }
    scene.take();
    assert_eq!(series(&scene).len(), 90);
    scene.restart_coordinator(91_000);
    let kept = series(&scene);
    assert_eq!((kept.len(), kept.last().map(|p| (p.step, p.samples))), (60, Some((60, Some(480)))));
}

#[test]
fn the_newest_metrics_of_the_leading_rank_are_in_the_summary() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, worker(2));
    scene.start_all(0, 1, 1, 2);
    let told = |of, step, name: &str, value| Beat { metrics: [(name.to_string(), value)].into(), ..beat(rank(1, 1, of), step) };
    scene.at(100, Event::RanksBeat(vec![told(0, 1, "lr", 0.1), told(1, 1, "lr", 9.0)]));
    // An evaluation after a step is told with that step.
    scene.at(200, Event::RanksBeat(vec![told(0, 1, "evaluation_loss", 3.0)]));
    let summary = scene.summary(1);
    assert_eq!((summary.evaluation_loss, summary.metrics.len()), (Some(3.0), 1));
    assert_eq!(series(&scene)[0].metrics, [("evaluation_loss".to_string(), 3.0), ("lr".to_string(), 0.1)].into());
    scene.take();
}

/// A rank that ends without a step, in the attempt that began from `step`; the next attempt is placed.
fn fails_to_resume(scene: &mut Scene, attempt: u32, step: u64, from_memory: bool) -> Option<(Option<u64>, bool)> {
    let now = scene.engine.next_deadline().map_or(0, |at| at.0);
    scene.at(now, Event::Woke);
    let resumed = Resumed { step: Some(step), from_memory, ..Resumed::from_nothing(job(1), attempt) };
    scene.at(now, Event::AttemptResumed { node: node("n1"), resumed });
    scene.at(now, Event::RankStarted(Started { incarnation: rank(1, attempt, 0), pid: attempt, at: Timestamp(now) }));
    scene.exits(now, rank(1, attempt, 0), exit(1, now));
    scene.take();
    let own = scene.engine.job(job(1))?;
    let failed = own.failed_resumes?;
    assert_eq!(failed.step, step);
    Some((own.rejected_step(), failed.from_memory))
}

#[test]
fn a_checkpoint_that_fails_three_resumes_is_rejected_and_a_snapshot_after_one() {
    let mut scene = Scene::with_node();
    let mut spec = command(1);
    spec.restart.max_start_failures = 20;
    scene.submit(0, 1, spec);
    scene.start_all(0, 1, 1, 1);
    scene.at(10, Event::RanksBeat(vec![beat(rank(1, 1, 0), 60)]));
    scene.exits(20, rank(1, 1, 0), exit(1, 20));
    assert_eq!(fails_to_resume(&mut scene, 2, 55, true), Some((None, true)), "shared memory is left out the next time");
    assert_eq!(fails_to_resume(&mut scene, 3, 50, false), Some((None, false)));
    assert_eq!(fails_to_resume(&mut scene, 4, 50, false), Some((None, false)));
    assert_eq!(fails_to_resume(&mut scene, 5, 50, false), Some((Some(50), false)));
    // What an older one begins counts for itself.
    assert_eq!(fails_to_resume(&mut scene, 6, 40, false), Some((None, false)));
    scene.at(scene.now.0, Event::StopRequested { job: job(1), force: true, delete: false });
    scene.take();
}

#[test]
fn an_attempt_that_began_without_a_checkpoint_rejects_none() {
    let mut scene = Scene::with_node();
    let mut spec = command(1);
    spec.restart.max_start_failures = 20;
    scene.submit(0, 1, spec);
    for attempt in 1..=5 {
        let now = u64::from(attempt) * 100_000;
        scene.at(now, Event::Woke).start_all(now, 1, attempt, 1);
        scene.exits(now, rank(1, attempt, 0), exit(1, now));
    }
    assert_eq!(scene.engine.job(job(1)).and_then(|own| own.rejected_step()), None);
    scene.take();
}

/// Of each row that an event leads to: whether the series goes along.
fn with_series(scene: &mut Scene, ms: u64, event: Event) -> Vec<bool> {
    scene.now = Timestamp(ms);
    let step = scene.engine.handle(scene.now, event);
    let with = step.record.jobs.iter().map(|row| row.series.is_some()).collect();
    scene.note(step);
    with
}

#[test]
fn a_series_is_written_again_when_there_is_news_and_when_the_job_is_over() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, worker(1)).submit(0, 2, worker(1));
    scene.start_all(0, 1, 1, 1).start_all(0, 2, 1, 1);
    let told = |step| Event::RanksBeat(vec![Beat { loss: Some(1.0), ..beat(rank(1, 1, 0), step) }]);
    let ended = |n| Event::RankExited(Exited { incarnation: rank(n, 1, 0), exit: exit(0, 132_000), lost: false });
    assert_eq!(with_series(&mut scene, 60_000, told(1)), [true]);
    let news = Event::CheckpointSeen { node: node("n1"), news: saved(1, 1, 1) };
    assert_eq!(with_series(&mut scene, 130_000, news), [false], "it is as it was");
    assert_eq!(with_series(&mut scene, 130_100, told(2)), [true]);
    assert_eq!(with_series(&mut scene, 132_000, ended(1)), [true]);
    assert_eq!(with_series(&mut scene, 132_000, ended(2)), [false], "it never had a point");
    scene.take();
}
