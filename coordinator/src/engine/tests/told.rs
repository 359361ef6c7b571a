//! What the engine answers and records: checkpoints, plans, counts, frames, and where a job's time is booked.

use everlit_api::agent::FromAgent;
use everlit_api::job::RestartScope;
use everlit_api::manifest::Phase;
use everlit_api::rank::{Stacks, Verdict};
use everlit_api::status::JobState;
use expect_test::expect;

use super::super::command::{EventRow, Record};
use super::super::limits::CHECK_ALL_MS;
use super::super::state::ROW_VERSION;
use super::*;

fn seen(scene: &mut Scene, ms: u64, news: CheckpointNews) -> usize {
    scene.now = Timestamp(ms);
    let step = scene.engine.handle(scene.now, Event::CheckpointSeen { node: node("n1"), news });
    let rows = step.record.jobs.len();
    scene.note(step);
    rows
}

fn listed(scene: &Scene) -> Vec<(u64, u32, bool)> {
    let job = scene.engine.job(job(1)).expect("active");
    job.checkpoints.iter().map(|c| (c.step, c.attempt, c.verified)).collect()
}

#[test]
fn checkpoints_are_listed_newest_first_as_the_node_keeps_them_and_what_is_new_is_recorded() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    assert_eq!(seen(&mut scene, 20, saved(1, 1, 5)), 1);
    assert_eq!(seen(&mut scene, 30, CheckpointNews { verified: true, ..saved(1, 1, 5) }), 1);
    // Heard before: nothing to record, and what was verified stays so.
    assert_eq!(seen(&mut scene, 40, saved(1, 1, 5)), 0);
    assert_eq!(seen(&mut scene, 50, CheckpointNews { verified: true, ..saved(1, 1, 5) }), 0);
    assert_eq!(listed(&scene), [(5, 1, true)]);
    assert_eq!(seen(&mut scene, 60, CheckpointNews { kept: vec![9, 5], ..saved(1, 1, 9) }), 1);
    assert_eq!(listed(&scene), [(9, 1, false), (5, 1, true)]);
    // The node dropped step 5; a later attempt saved step 9 again, and nobody has read that back.
    assert_eq!(seen(&mut scene, 70, CheckpointNews { kept: vec![9], verified: true, ..saved(1, 1, 9) }), 1);
    assert_eq!(listed(&scene), [(9, 1, true)]);
    scene.exits(80, rank(1, 1, 0), killed(80)).at(1_000, Event::Woke);
    assert_eq!(seen(&mut scene, 1_100, saved(1, 2, 9)), 1);
    assert_eq!(listed(&scene), [(9, 2, false)]);
    let told = scene.take();
    assert_eq!(told.matches("checkpoint_committed").count(), 3, "{told}");
    assert_eq!(seen(&mut scene, 1_200, saved(7, 1, 5)), 0, "of a job that is not active");
}

#[test]
fn a_plan_says_whether_it_would_start_now_wait_or_never_start() {
    let mut scene = Scene::with_node();
    let plan = |scene: &Scene, world| {
        let plan = scene.engine.plan(&command(world), scene.now);
        format!("{} {} {} {}\n", plan.fits_now, plan.fits_ever, plan.placement.len(), plan.reason)
    };
    let mut told = plan(&scene, 2) + &plan(&scene, 9);
    scene.submit(0, 1, command(6));
    scene.submit(1, 2, command(7));
    scene.submit(2, 3, command(4));
    told += &(plan(&scene, 1) + &plan(&scene, 2) + &plan(&scene, 3));
    assert_eq!(scene.engine.queue_depth(), 2);
    let counts = scene.engine.counts();
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [(JobState::Queued, 2), (JobState::Starting, 1)]);
    expect![[r#"
        true true 1 it would start at once
        false false 0 no node can ever hold it: n1 can never hold it: needs 9 ranks, has places for 8
        true true 1 it would start at once
        false true 0 n1 keeps room for jobs before it (needs 2 ranks, has free places for 1)
        false true 0 n1 needs 3 ranks, has free places for 1
    "#]]
    .assert_eq(&told);
    scene.take();
}

#[test]
fn a_record_with_anything_in_it_is_not_empty() {
    let event = EventRow { job: None, time: Timestamp(0), event: "x", reason: String::new(), data: serde_json::Value::Null };
    assert!(Record::default().is_empty());
    let mut scene = Scene::with_node();
    let step = scene
        .engine
        .handle(Timestamp(1), Event::JobSubmitted { id: job(1), spec: Arc::new(command(1)), seed: 1, user: None, origin: Vec::new() });
    scene.take();
    let Record { jobs, attempts, .. } = step.record;
    let some = [
        Record { jobs, ..Record::default() },
        Record { events: vec![event], ..Record::default() },
        Record { attempts, ..Record::default() },
        Record { cordons: vec![(node("n1"), true)], ..Record::default() },
        Record { blames: vec![(node("n1"), Default::default())], ..Record::default() },
    ];
    assert!(some.iter().all(|record| !record.is_empty()), "{some:?}");
}

#[test]
fn every_frame_that_concerns_the_engine_is_an_event() {
    let of = |frame| match Event::of_frame(node("n1"), frame) {
        Some(Event::Said { node: by, event }) => {
            assert_eq!(by, node("n1"), "it stands with what it says");
            Some(*event)
        }
        Some(other) => panic!("said by nobody: {other:?}"),
        None => None,
    };
    assert!(matches!(of(FromAgent::Draining), Some(Event::NodeDraining { cordon: false, .. })));
    assert!(matches!(of(FromAgent::Beats { beats: Vec::new() }), Some(Event::RanksBeat(_))));
    assert!(matches!(of(FromAgent::Checkpoint(saved(1, 1, 5))), Some(Event::CheckpointSeen { .. })));
    assert!(of(FromAgent::Removed { job: job(1) }).is_none());
}

fn booked(scene: &Scene) -> String {
    let ledger = scene.summary(1).ledger;
    format!("{} repeated {} training {} checkpointing {}\n", scene.now.0, ledger.repeated, ledger.training, ledger.checkpointing)
}

/// A step of both ranks, and whether it was worth a row.
fn both(scene: &mut Scene, ms: u64, attempt: u32, steps: [u64; 2], phase: Phase) -> bool {
    scene.now = Timestamp(ms);
    let of = |r: u32| Beat { phase: Some(phase), ..beat(rank(1, attempt, r), steps[r as usize]) };
    let step = scene.engine.handle(scene.now, Event::RanksBeat(vec![of(0), of(1)]));
    let rows = !step.record.jobs.is_empty();
    scene.note(step);
    rows
}

#[test]
fn steps_done_before_are_repeated_saves_are_booked_and_only_turns_are_recorded() {
    let mut scene = Scene::with_node();
    let mut spec = JobSpec::default_for(2);
    spec.worker.as_mut().expect("built in").device = everlit_api::job::Device::Cpu;
    spec.restart.backoff.jitter = 0.0;
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, 2);
    let mut told = String::new();
    assert!(both(&mut scene, 1_000, 1, [1, 1], Phase::Train), "the first step is a turn");
    assert!(!both(&mut scene, 2_000, 1, [2, 2], Phase::Train));
    assert!(!both(&mut scene, 3_000, 1, [2, 2], Phase::Checkpoint), "a save is none");
    assert!(!both(&mut scene, 4_000, 1, [4, 3], Phase::Train));
    told += &booked(&scene);
    scene.exits(5_000, rank(1, 1, 0), killed(5_000)).exits(5_000, rank(1, 1, 1), killed(5_000));
    scene.at(5_500, Event::Woke);
    scene.start_all(5_600, 1, 2, 2);
    assert!(both(&mut scene, 6_000, 2, [1, 1], Phase::Train), "repeating begins");
    assert!(!both(&mut scene, 7_000, 2, [3, 3], Phase::Train), "up to the slowest rank's step of before");
    assert!(both(&mut scene, 8_000, 2, [4, 4], Phase::Train), "and ends");
    assert!(!both(&mut scene, 9_000, 2, [5, 5], Phase::Train));
    told += &booked(&scene);
    expect![[r#"
        4000 repeated 0 training 2 checkpointing 1
        9000 repeated 2 training 4 checkpointing 1
    "#]]
    .assert_eq(&told);
    scene.take();
}

#[test]
fn everything_is_checked_each_minute() {
    let mut scene = Scene::with_node();
    scene.restart_coordinator(100);
    let first = Timestamp(100 + CHECK_ALL_MS);
    scene.at(200, hello("n1", vec![]));
    assert_eq!(scene.engine.next_deadline(), Some(first));
    scene.at(first.0, Event::Woke);
    assert_eq!(scene.engine.next_deadline(), Some(Timestamp(first.0 + CHECK_ALL_MS)));
    scene.take();
}

#[test]
fn only_a_job_s_first_row_has_its_settings() {
    let mut scene = Scene::new();
    let mut with_settings = |event| {
        let step = scene.engine.handle(Timestamp(5), event);
        step.record.jobs.iter().map(|row| row.spec.is_some()).collect::<Vec<_>>()
    };
    assert_eq!(
        with_settings(Event::JobSubmitted { id: job(1), spec: Arc::new(command(1)), seed: 1, user: None, origin: Vec::new() }),
        [true]
    );
    // In the same millisecond.
    assert_eq!(with_settings(Event::StopRequested { job: job(1), force: false, delete: false }), [false]);
}

#[test]
fn that_a_rank_can_not_go_on_in_place_is_told_once() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    let mut told = |ms: u64, in_place| {
        scene.at(ms, Event::RanksBeat(vec![Beat { in_place, ..beat(rank(1, 1, 0), ms) }]));
        scene.take().matches("in_place_off").count()
    };
    assert_eq!([told(20, None), told(30, Some(true)), told(40, Some(false)), told(50, Some(false))], [0, 0, 1, 0]);
}

/// What is said with an event of this name, which comes of another one.
fn facts(scene: &mut Scene, ms: u64, event: Event, name: &str) -> serde_json::Value {
    scene.now = Timestamp(ms);
    let step = scene.engine.handle(scene.now, event);
    let found = step.record.events.iter().find(|row| row.event == name).map(|row| row.data.clone());
    scene.note(step);
    found.unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn a_failure_is_told_with_the_ranks_stacks_and_what_their_node_did() {
    let mut scene = Scene::with_node();
    let load = everlit_api::status::NodeLoad { cpus: 1.5, memory: 5, disk_free: 7, gpus: Vec::new(), agent_memory: 0 };
    scene.at(1, Event::NodeReported { node: node("n1"), load });
    scene.submit(2, 1, command(2)).start_all(10, 1, 1, 2);
    let stacks = vec![Stacks { rank: 1, pid: 101, text: "waits in futex".into() }];
    let judged = Event::RankJudged { incarnation: rank(1, 1, 1), verdict: Verdict::Stuck, age_ms: 100, stacks };
    let told = facts(&mut scene, 1_000, judged, "gang_failed");
    assert_eq!(told["stacks"][0]["text"], "waits in futex");
    assert_eq!(told["nodes"]["n1"]["memory"], 5);
    scene.exits(1_100, rank(1, 1, 0), killed(1_100)).exits(1_100, rank(1, 1, 1), killed(1_100)).at(2_000, Event::Woke);
    scene.start_all(2_100, 1, 2, 2);
    let told = facts(
        &mut scene,
        3_000,
        Event::RankExited(Exited { incarnation: rank(1, 2, 0), exit: exit(1, 3_000), lost: false }),
        "gang_failed",
    );
    assert_eq!(told.get("stacks"), None, "none were taken");
    scene.take();
}

#[test]
fn a_rank_s_replacement_is_told_with_stacks_too_where_some_were_taken() {
    for (scope, event) in [(RestartScope::Auto, "rank_replaced"), (RestartScope::Rank, "rank_failed")] {
        let mut scene = Scene::with_node();
        let mut spec = if scope == RestartScope::Rank { command(2) } else { super::in_place::trains(2, 0) };
        spec.restart.scope = scope;
        scene.submit(0, 1, spec);
        scene.start_all(10, 1, 1, 2);
        super::in_place::steps(&mut scene, 900, 0, &[0, 1], 7);
        let stacks = vec![Stacks { rank: 1, pid: 101, text: "waits in futex".into() }];
        let judged = Event::RankJudged { incarnation: rank(1, 1, 1), verdict: Verdict::Stuck, age_ms: 100, stacks };
        assert_eq!(facts(&mut scene, 1_000, judged, event)["stacks"][0]["pid"], 101);
        scene.exits(1_010, rank(1, 1, 1), killed(1_010)).at(1_400, Event::Woke);
        super::in_place::starts(&mut scene, 1_400, 2);
        super::in_place::steps(&mut scene, 1_500, 1, &[0, 2], 8);
        let ended = Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit: killed(2_000), lost: false });
        assert_eq!(facts(&mut scene, 2_000, ended, event).get("stacks"), None, "none were taken");
        scene.take();
    }
}

#[test]
fn files_of_a_job_go_when_it_is_final_and_not_before() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1)).start_all(10, 1, 1, 1);
    let mut deletes = |ms: u64, event: Event| {
        scene.now = Timestamp(ms);
        let step = scene.engine.handle(scene.now, event);
        let deletes = step.record.jobs.iter().map(|row| row.delete).collect::<Vec<_>>();
        scene.note(step);
        deletes
    };
    assert_eq!(deletes(100, Event::StopRequested { job: job(1), force: false, delete: true }), [false]);
    let ended = Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit: killed(200), lost: false });
    assert_eq!(deletes(200, ended), [true]);
    scene.take();
}

#[test]
fn a_node_with_a_gang_is_not_empty() {
    let mut scene = Scene::with_node();
    assert!(scene.engine.node_is_empty(&node("n1")) && scene.engine.node_is_empty(&node("nobody")));
    scene.submit(0, 1, command(1));
    assert!(!scene.engine.node_is_empty(&node("n1")));
    scene.take();
}

#[test]
fn a_table_that_contradicts_another_is_seen() {
    let spoiled = |spoil: fn(&mut Engine)| {
        let mut scene = Scene::with_node();
        scene.submit(0, 1, command(2)).submit(0, 2, command(1)).submit(0, 3, command(7)).submit(0, 4, command(7));
        scene.take();
        spoil(&mut scene.engine);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scene.engine.check_all())).is_err()
    };
    assert!(!spoiled(|_| {}));
    assert!(spoiled(|engine| engine.nodes.get_mut(&node("n1")).unwrap().taken.ranks += 1));
    assert!(spoiled(|engine| engine.jobs.get_mut(&job(1)).unwrap().state = JobState::Queued));
    assert!(spoiled(|engine| engine.jobs.get_mut(&job(2)).unwrap().gang.as_mut().unwrap().attempt += 1));
}

#[test]
fn who_is_dead_or_told_to_end_is_not_judged() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.take();
    let judged = |scene: &mut Scene, ms: u64| {
        scene.at(ms, Event::RankJudged { incarnation: rank(1, 1, 1), verdict: Verdict::Silent, age_ms: 100, stacks: Vec::new() });
        scene.take()
    };
    assert_eq!(judged(&mut scene, 5), "", "it has not begun");
    scene.start_all(10, 1, 1, 2).at(20, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.take();
    assert_eq!(judged(&mut scene, 30), "", "it is told to end");
}

#[test]
fn a_new_job_is_what_was_submitted_and_waits() {
    let mut scene = Scene::new();
    scene.at(5, Event::JobSubmitted { id: job(1), spec: Arc::new(command(3)), seed: 7, user: None, origin: Vec::new() });
    let own = &scene.engine.jobs[&job(1)];
    assert_eq!((own.version, own.seed, own.state), (ROW_VERSION, 7, JobState::Queued));
    assert_eq!((own.reason.as_str(), own.submitted_at, own.series_kept_at), ("waiting for a place", Timestamp(5), Timestamp(5)));
    scene.now = Timestamp(1_005);
    assert_eq!(scene.summary(1).ledger.queued, 1.0);
    scene.take();
}

#[test]
fn time_before_the_first_attempt_runs_is_starting_and_after_it_restoring() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.now = Timestamp(1_000);
    assert_eq!((scene.summary(1).ledger.starting, scene.summary(1).ledger.restoring), (1.0, 0.0));
    scene.start_all(1_000, 1, 1, 1).exits(2_000, rank(1, 1, 0), killed(2_000)).at(2_500, Event::Woke).at(4_500, Event::Woke);
    assert_eq!(scene.summary(1).ledger.restoring, 2.0);
    scene.take();
}

#[test]
fn ports_are_leased_in_turn_and_shared_when_there_are_none_left() {
    let mut scene = Scene::new();
    scene.engine = Engine::new(Config { ports: (5, 7), ..Config::default() });
    scene.at(0, hello("n1", vec![]));
    let port = |scene: &mut Scene, n: u128| {
        scene.submit(1, n, command(1));
        scene.engine.jobs[&job(n)].gang.as_ref().map(|gang| gang.port)
    };
    assert_eq!([1, 2, 3, 4, 5].map(|n| port(&mut scene, n)), [5, 6, 7, 5, 6].map(Some));
    // Who shared a port gives it back for both.
    scene.at(1, Event::StopRequested { job: job(2), force: true, delete: false }).exits(1, rank(2, 1, 0), killed(1));
    assert_eq!([6, 7].map(|n| port(&mut scene, n)), [6, 7].map(Some));
    scene.take();
}

#[test]
fn speed_is_that_of_new_steps_alone() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    for (ms, step) in [(1_000, 1), (2_000, 2), (3_000, 3)] {
        scene.at(ms, Event::RanksBeat(vec![beat(rank(1, 1, 0), step)]));
    }
    for ms in [4_000, 5_000, 6_000] {
        scene.at(ms, Event::RanksBeat(vec![beat(rank(1, 1, 0), 3)]));
    }
    assert_eq!(scene.summary(1).steps_per_second, Some(1.0));
    scene.take();
}

#[test]
fn what_ranks_do_while_they_come_together_again_is_no_training() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, super::in_place::trains(2, 0));
    scene.start_all(0, 1, 1, 2);
    super::in_place::steps(&mut scene, 1_000, 0, &[0, 1], 7);
    scene.exits(2_000, rank(1, 1, 1), killed(2_000));
    super::in_place::steps(&mut scene, 2_100, 0, &[0], 8);
    scene.at(3_000, Event::Woke);
    assert_eq!((scene.summary(1).ledger.training, scene.summary(1).ledger.restoring), (1.0, 1.0));
    scene.take();
}

#[test]
fn a_step_0_that_a_program_prints_is_no_repeated_one() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(0, 1, 1, 1).exits(1_000, rank(1, 1, 0), exit(1, 1_000)).at(1_500, Event::Woke).start_all(1_500, 1, 2, 1);
    scene.at(2_000, Event::RanksBeat(vec![Beat { heartbeat: false, ..beat(rank(1, 2, 0), 0) }])).at(3_000, Event::Woke);
    assert_eq!((scene.summary(1).ledger.training, scene.summary(1).ledger.repeated), (2.5, 0.0));
    scene.take();
}

#[test]
fn a_user_s_restart_ends_a_wait_at_once_and_changes_nothing_for_a_gang_that_ends() {
    let mut scene = Scene::with_node();
    let mut spec = command(2);
    spec.restart.backoff.initial = everlit_api::time::Millis(10_000);
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, 2).exits(1_000, rank(1, 1, 0), exit(1, 1_000));
    scene.take();
    scene.at(1_100, Event::RestartRequested { job: job(1) });
    assert_eq!(scene.take(), "1100 job 1: restart_requested: a user asked for it\n");
    scene.exits(1_200, rank(1, 1, 1), exit(1, 1_200));
    assert!(scene.take().contains("restart 1 of 50"), "the failure counts");
    scene.at(1_300, Event::RestartRequested { job: job(1) });
    assert!(scene.take().contains("attempt 2 is starting on n1"));
}
