//! What a user is shown of jobs and nodes, number by number, and what the next coordinator makes of rows.

use everlit_api::status::{JobState, NodeLoad, PlacedRanks};
use everlit_api::time::Millis;

use super::in_place::trains;
use super::*;

fn near(value: Option<f64>, expected: f64) -> bool {
    value.is_some_and(|value| (value - expected).abs() < 1e-9)
}

#[test]
fn a_summary_s_numbers_are_those_of_the_job_at_this_moment() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, trains(1, 1));
    scene.start_all(10, 1, 1, 1);
    scene.at(20, Event::RankStarted(Started { incarnation: rank(1, 1, 1), pid: 55, at: Timestamp(20) }));
    let before = scene.summary(1);
    assert_eq!((before.step, before.progress, before.eta_seconds), (None, None, None));
    for (ms, step) in [(1_000, 10), (2_000, 20), (3_000, 25)] {
        scene.at(ms, Event::RanksBeat(vec![Beat { samples: Some(step * 4), ..beat(rank(1, 1, 0), step) }]));
    }
    scene.at(3_500, Event::RanksBeat(vec![Beat { step: None, ..beat(rank(1, 1, 1), 0) }]));
    scene.at(3_600, Event::CheckpointSeen { node: node("n1"), news: CheckpointNews { created_at: Timestamp(2_500), ..saved(1, 1, 20) } });
    scene.now = Timestamp(5_000);
    let now = scene.summary(1);
    assert!(near(now.steps_per_second, 7.5) && near(now.samples_per_second, 30.0), "{now:?}");
    assert!(near(now.progress, 0.25) && near(now.eta_seconds, 10.0), "{now:?}");
    assert!(near(now.ranks[0].heartbeat_age_seconds, 2.0) && near(now.spares[0].heartbeat_age_seconds, 1.5), "{now:?}");
    assert!(near(now.last_checkpoint.map(|c| c.age_seconds), 2.5));
    // Nobody knows when one without steps to do is done, nor one that stands still.
    scene.at(6_000, Event::RanksBeat(vec![Beat { total_steps: Some(0), ..beat(rank(1, 1, 0), 26) }]));
    assert_eq!(scene.summary(1).progress, None);
    scene.take();
}

#[test]
fn a_final_job_shows_how_far_it_came_and_no_speed() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    for (ms, step) in [(1_000, 10), (2_000, 20)] {
        scene.at(ms, Event::RanksBeat(vec![beat(rank(1, 1, 0), step)]));
    }
    let mut own = scene.engine.jobs[&job(1)].clone();
    assert!(own.summary(Timestamp(2_500), String::new()).steps_per_second.is_some());
    (own.state, own.progress.step, own.finished_at) = (JobState::Failed, None, Some(Timestamp(2_500)));
    let last = own.summary(Timestamp(9_000), String::new());
    assert_eq!((last.step, last.steps_per_second), (Some(20), None));
    own.progress.reached = 0;
    assert_eq!(own.summary(Timestamp(9_000), String::new()).step, None);
    scene.take();
}

#[test]
fn a_node_shows_what_is_reserved_and_how_old_its_report_is() {
    let mut scene = Scene::with_node();
    let mut spec = command(3);
    spec.resources.cpus = 0.5;
    spec.resources.memory = 1 << 20;
    scene.submit(0, 1, spec.clone()).submit(0, 2, JobSpec { world_size: 1, ..spec });
    scene.at(1_000, Event::NodeReported { node: node("n1"), load: NodeLoad::default() });
    let view = scene.engine.nodes()[&node("n1")].view(&node("n1"), Timestamp(3_500));
    assert_eq!((view.ranks, view.cpus_reserved, view.memory_reserved, view.report_age_seconds), (4, 2.0, 4 << 20, Some(2.5)));
    scene.take();
}

#[test]
fn a_job_that_is_over_is_waited_for_no_more() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, JobSpec { time_limit: Some(Millis(50_000)), ..command(1) });
    scene.start_all(10, 1, 1, 1).exits(1_000, rank(1, 1, 0), exit(0, 1_000));
    assert!(scene.engine.next_deadline().is_none_or(|at| at.0 != 50_000));
    scene.take();
    scene.at(60_000, Event::Woke);
    assert_eq!(scene.take(), "");
}

#[test]
fn a_row_of_a_later_build_is_refused_and_one_of_an_earlier_is_read() {
    let mut scene = Scene::new();
    scene.submit(5, 1, command(1));
    scene.take();
    let row = scene.rows[&job(1)].clone();
    let with_version = |version: u64| {
        let mut body: serde_json::Value = serde_json::from_str(&row.body).unwrap();
        body["version"] = version.into();
        Engine::load(Config::default(), Timestamp(9), &[StoredJob { body: body.to_string(), ..row.clone() }], &[]).map(drop)
    };
    let own = u64::from(super::super::state::ROW_VERSION);
    assert!(with_version(own + 1).unwrap_err().contains("was written by a later everlit"));
    assert_eq!([with_version(own), with_version(own.saturating_sub(1))], [Ok(()), Ok(())]);
}

#[test]
fn the_next_coordinator_knows_cordons_limits_and_ports() {
    let mut scene = Scene::new();
    scene.engine = Engine::new(Config { ports: (5, 7), ..Config::default() });
    scene.at(0, hello("n1", vec![]));
    scene.submit(0, 1, JobSpec { time_limit: Some(Millis(50_000)), ..command(1) });
    scene.submit(0, 2, command(1));
    scene.start_all(100, 1, 1, 1);
    scene.take();
    let rows: Vec<StoredJob> = scene.rows.values().cloned().collect();
    let cordoned = |id: &str, cordoned| StoredNode { id: node(id), cordoned, blames: None };
    let config = Config { ports: (5, 7), node_timeout_ms: 700, ..Config::default() };
    let engine = Engine::load(config.clone(), Timestamp(1_000), &rows, &[cordoned("n2", true), cordoned("n3", false)]).unwrap();
    assert!(engine.nodes()[&node("n2")].cordoned && !engine.nodes().contains_key(&node("n3")));
    assert_eq!(engine.next_deadline(), Some(Timestamp(1_700)), "by then a node's agent is back or lost");
    assert_eq!(engine.next_port, 7);
    scene.engine = engine;
    // From when it first ran, not from now.
    scene.at(50_099, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(2, 1, 0), 100)]));
    scene.take();
    scene.at(50_100, Event::Woke);
    assert!(scene.take().contains("50100 job 1: time_limit_reached"));
}

#[test]
fn a_rank_s_node_is_the_one_whose_share_it_is_in() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.take();
    let mut own = scene.engine.jobs[&job(1)].clone();
    let share = |name: &str, first_rank, count| PlacedRanks { node: node(name), first_rank, count, gpus: Vec::new() };
    own.gang.as_mut().unwrap().placement = vec![share("a", 0, 2), share("b", 2, 3)];
    let name = |rank| own.node_of(rank).map(|node| node.0.as_str());
    assert_eq!([0, 1, 2, 4, 5].map(name), [Some("a"), Some("a"), Some("b"), Some("b"), None]);
}

#[test]
fn ranks_are_told_whether_they_may_become_fewer() {
    let elastic = |least| {
        let mut scene = Scene::with_node();
        scene.submit(0, 1, JobSpec { min_world_size: least, ..trains(3, 0) });
        scene.take();
        let frames = scene.engine.jobs[&job(1)].start_frames(0);
        matches!(frames.as_slice(), [(_, ToAgent::StartGang(gang))] if gang.elastic)
    };
    assert_eq!([elastic(None), elastic(Some(3)), elastic(Some(2))], [false, false, true]);
}
