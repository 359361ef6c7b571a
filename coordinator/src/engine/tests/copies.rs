//! Copies of checkpoints on other nodes: who makes them, who fetches from them, and what comes too late.

use everlit_api::agent::{CheckpointNews, Resumed};
use everlit_api::status::JobState;
use expect_test::expect;

use super::*;

fn verified(job_n: u128, attempt: u32, step: u64) -> CheckpointNews {
    CheckpointNews { verified: true, ..saved(job_n, attempt, step) }
}

fn seen(name: &str, news: CheckpointNews) -> Event {
    Event::CheckpointSeen { node: node(name), news }
}

/// A job of one rank runs on n1, and all nodes reach each other.
fn running(names: &[&str]) -> Scene {
    let mut scene = Scene::new();
    scene.at(0, reachable("n1", vec![])).submit(0, 1, command(1)).start_all(10, 1, 1, 1);
    for name in names {
        scene.at(20, reachable(name, vec![]));
    }
    scene.take();
    scene
}

fn where_is(scene: &Scene, step: u64) -> Vec<String> {
    let job = scene.engine.job(job(1)).expect("active");
    job.checkpoints.iter().filter(|own| own.step == step).flat_map(|own| own.nodes().map(|node| node.0.clone())).collect()
}

#[test]
fn a_verified_checkpoint_is_copied_to_one_other_node_and_the_next_after_a_rest() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", saved(1, 1, 50)));
    scene.expect(expect![[r#"
        1000 job 1: checkpoint_committed: step 50 is saved
    "#]]);
    scene.at(1_100, seen("n1", verified(1, 1, 50)));
    scene.expect(expect![[r#"
        1100   n2 <- copy step 50 of job 1 from n1
    "#]]);
    // One at a time; then as long a rest as it took.
    scene.at(1_500, seen("n1", CheckpointNews { kept: vec![60, 50], ..verified(1, 1, 60) }));
    scene.expect(expect![""]);
    scene.at(4_100, seen("n2", CheckpointNews { kept: vec![50], ..verified(1, 1, 50) }));
    assert_eq!(where_is(&scene, 50), ["n1", "n2"]);
    scene.at(7_099, Event::Woke);
    scene.expect(expect![""]);
    scene.at(7_100, Event::Woke);
    scene.expect(expect![[r#"
        7100   n2 <- copy step 60 of job 1 from n1
    "#]]);
}

#[test]
fn a_job_says_how_many_copies_it_wants_and_none_is_none() {
    let mut scene = Scene::new();
    scene.at(0, reachable("n1", vec![])).at(0, reachable("n2", vec![])).at(0, reachable("n3", vec![]));
    let with = |copies| {
        let mut spec = command(1);
        spec.checkpoint.copies = copies;
        spec.node_selector = [("here".to_string(), "1".to_string())].into();
        spec
    };
    scene.take();
    scene.submit(0, 1, with(2)).submit(0, 2, with(0));
    let Event::NodeLinked { mut hello } = reachable("n0", vec![]) else { unreachable!() };
    hello.labels = [("here".to_string(), "1".to_string())].into();
    scene.at(5, Event::NodeLinked { hello });
    scene.take();
    scene.at(10, seen("n0", verified(1, 1, 5))).at(10, seen("n0", verified(2, 1, 5)));
    scene.take_from("10   ");
    let first = scene.take();
    let to = if first.contains("n2 <- copy step 5 of job 1") { ["n2", "n3"] } else { ["n3", "n2"] };
    assert_eq!(first.lines().filter(|line| line.contains("copy")).count(), 1, "{first}");
    scene.at(20, seen(to[0], verified(1, 1, 5))).at(2_000, Event::Woke);
    let second = scene.take();
    assert!(second.contains(&format!("{} <- copy step 5 of job 1 from n0, {}", to[1], to[0])), "{second}");
    scene.at(2_010, seen(to[1], verified(1, 1, 5))).at(60_000, Event::Woke);
    scene.expect(expect![""]);
}

#[test]
fn a_copy_that_fails_is_said_once_and_tried_on_another_node() {
    let mut scene = running(&["n2", "n3"]);
    scene.at(1_000, seen("n1", verified(1, 1, 50)));
    scene.take_from("1000   ");
    let first = if scene.take().contains("n2 <-") { "n2" } else { "n3" };
    let other = if first == "n2" { "n3" } else { "n2" };
    let failed = |name: &str| Event::CopyFailed { node: node(name), job: job(1), step: 50, reason: "disk full".into() };
    scene.at(1_200, failed(other)).at(1_300, failed(first));
    let said = scene.take();
    assert_eq!(said, format!("1300 job 1: checkpoint_copy_failed: {first} could not copy the checkpoint of step 50: disk full\n"));
    scene.at(6_300, Event::Woke);
    assert_eq!(scene.take(), format!("6300   {other} <- copy step 50 of job 1 from n1\n"));
    // Its link ends: nobody waits for it.
    scene.at(6_400, Event::NodeUnlinked { node: node(other) }).at(11_400, Event::Woke);
    let said = scene.take();
    assert!(said.ends_with(&format!("11400   {first} <- copy step 50 of job 1 from n1\n")), "{said}");
}

#[test]
fn copies_that_no_node_can_make_are_tried_ever_more_seldom_and_told_of_no_more_often() {
    let mut scene = running(&["n2", "n3"]);
    scene.at(1_000, seen("n1", verified(1, 1, 50)));
    let (mut now, mut tried, mut told) = (1_000, 1, 0);
    let mut to = if scene.take().contains("n2 <-") { "n2" } else { "n3" };
    while now < 24 * 3_600_000 {
        scene.at(now + 10, Event::CopyFailed { node: node(to), job: job(1), step: 50, reason: "closed".into() });
        now = scene.engine.next_deadline().expect("it is tried again").0.max(now + 11);
        scene.at(now, Event::Woke);
        let said = scene.take();
        told += said.matches("checkpoint_copy_failed").count();
        if said.contains("<- copy") {
            (to, tried) = (if said.contains("n2 <-") { "n2" } else { "n3" }, tried + 1);
        }
    }
    assert!((100..=160).contains(&tried) && (100..=160).contains(&told), "in a day tried {tried} times, told {told} times");
}

#[test]
fn a_lost_node_s_job_goes_on_from_the_copy_and_what_the_node_commits_after_that_is_put_aside() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", verified(1, 1, 50))).at(1_100, seen("n2", verified(1, 1, 50)));
    scene.at(2_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(9_900, Event::NodeReported { node: node("n2"), load: Default::default() }).take();
    scene.at(10_000, Event::Woke);
    scene.expect(expect![[r#"
        10000 node_lost: n1 was not heard of for 10 s
        10000 job 1: gang_failed: n1 was lost
        10000 job 1: job_queued: waiting for a place: n1 was lost
        10000 job 1: attempt_placed: attempt 2 is starting on n2
        10000   n1 <- forget 1.1.0
        10000   n2 <- start job 1 attempt 2 ranks 0+1 port 29501
    "#]]);
    let Event::NodeLinked { mut hello } = reachable("n1", vec![alive(rank(1, 1, 0), 100)]) else { unreachable!() };
    hello.checkpoints = vec![CheckpointNews { kept: vec![90, 70, 50], ..verified(1, 1, 90) }];
    scene.at(13_000, Event::NodeLinked { hello });
    scene.expect(expect![[r#"
        13000 node_ready: n1 is back
        13000   n1 <- stop job 1 attempt 1 grace 0s
        13000   n1 <- put aside attempt 1 of job 1 beyond Some(50)
    "#]]);
    assert_eq!((where_is(&scene, 90), where_is(&scene, 50)), (vec![], vec!["n1".to_string(), "n2".into()]));
    scene.at(13_100, seen("n1", verified(1, 1, 50)));
    scene.expect(expect![""]);
}

#[test]
fn a_gang_that_moves_fetches_what_its_new_node_does_not_have() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", verified(1, 1, 50)));
    scene.take();
    scene.at(2_000, Event::NodeDraining { node: node("n1"), cordon: true, deadline: None });
    scene.exits(2_100, rank(1, 1, 0), exit(143, 2_100));
    scene.take_from("2100 job 1: attempt_placed");
    scene.expect(expect![[r#"
        2100 job 1: attempt_placed: attempt 2 is starting on n2
        2100   n1 <- forget 1.1.0
        2100   n2 <- start job 1 attempt 2 ranks 0+1 port 29501 fetch 50 from n1
    "#]]);
    let resumed =
        Resumed { step: Some(50), path: Some("/c/50".into()), fetched_from: Some(node("n1")), ..Resumed::from_nothing(job(1), 2) };
    scene.at(2_500, Event::AttemptResumed { node: node("n2"), resumed });
    scene.expect(expect![[r#"
        2500 job 1: attempt_resumed: attempt 2 resumes from the checkpoint of step 50, fetched from n1
    "#]]);
}

#[test]
fn what_an_agent_that_was_away_has_saved_counts_before_its_gang_goes_elsewhere() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    // Its last rank has saved and ended meanwhile, and its agent ends, too.
    let ended = RankReport { exit: Some(killed(1_500)), pid: None, ..alive(rank(1, 1, 0), 100) };
    let Event::NodeLinked { mut hello } = reachable("n1", vec![ended]) else { unreachable!() };
    hello.checkpoints = vec![verified(1, 1, 90)];
    scene.at(2_000, Event::NodeLinked { hello }).take();
    scene.at(2_010, Event::NodeDraining { node: node("n1"), cordon: true, deadline: None });
    let told = scene.take();
    assert!(!told.contains("put aside") && told.contains("start job 1 attempt 2 ranks 0+1") && told.contains("fetch 90 from n1"), "{told}");
}

#[test]
fn parts_that_another_s_program_has_saved_on_several_nodes_are_not_taken_for_copies() {
    let mut scene = Scene::new();
    for name in ["n1", "n2", "n3"] {
        scene.at(0, reachable(name, vec![]));
    }
    scene.submit(0, 1, command(12)).take();
    let on: Vec<_> = scene.engine.job(job(1)).unwrap().gang.as_ref().unwrap().placement.iter().map(|share| share.node.0.clone()).collect();
    for name in &on {
        scene.at(1_000, seen(name, verified(1, 1, 50)));
    }
    assert_eq!((on.len(), scene.take().contains("copy step")), (2, false));
    scene.at(2_000, Event::NodeDraining { node: node("n1"), cordon: true, deadline: None });
    for r in 0..12 {
        scene.exits(2_100, rank(1, 1, r), exit(143, 2_100));
    }
    let told = scene.take();
    assert!(told.contains("start job 1 attempt 2") && !told.contains("fetch"), "{told}");
}

#[test]
fn what_can_not_be_fetched_three_times_gives_way_to_an_older_one_and_the_only_one_never_does() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", CheckpointNews { kept: vec![40], ..verified(1, 1, 40) }));
    scene.at(1_100, seen("n2", verified(1, 1, 40)));
    scene.at(1_200, seen("n1", CheckpointNews { kept: vec![50, 40], ..verified(1, 1, 50) }));
    scene.at(2_000, Event::NodeDraining { node: node("n1"), cordon: true, deadline: None });
    scene.exits(2_100, rank(1, 1, 0), exit(143, 2_100));
    let mut attempts = vec![scene.take()];
    let mut now = 3_000;
    for attempt in 2..=5 {
        let reason = "the checkpoint of step 50 could not be fetched".to_string();
        scene.at(now, Event::StartFailed { node: node("n2"), job: job(1), attempt, reason, permanent: false });
        now += 120_000;
        scene.at(now, Event::Woke);
        attempts.push(scene.take());
    }
    let asks = |text: &String| text.lines().find(|line| line.contains("<- start")).map(|line| line.contains("fetch 50 from n1"));
    let asked: Vec<_> = attempts.iter().map(asks).collect();
    assert_eq!(asked, [Some(true), Some(true), Some(true), Some(false), Some(false)], "{attempts:?}");
}

#[test]
fn a_checkpoint_that_nobody_can_give_is_named_when_an_attempt_begins_without_it() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1)).start_all(10, 1, 1, 1).at(20, reachable("n2", vec![]));
    scene.at(1_000, seen("n1", verified(1, 1, 50)));
    scene.at(2_000, Event::NodeDraining { node: node("n1"), cordon: true, deadline: None });
    scene.exits(2_100, rank(1, 1, 0), exit(143, 2_100));
    scene.take_from("2100 job 1: checkpoint_out");
    scene.expect(expect![[r#"
        2100 job 1: checkpoint_out_of_reach: the checkpoint of step 50 is on n1 and can not be fetched from there: the job begins anew
        2100   n1 <- forget 1.1.0
        2100   n2 <- start job 1 attempt 2 ranks 0+1 port 29501
    "#]]);
}

#[test]
fn the_last_checkpoint_of_a_job_that_ends_is_copied_and_its_copies_go_with_it() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", saved(1, 1, 100)));
    scene.take();
    scene.exits(1_100, rank(1, 1, 0), exit(0, 1_100));
    scene.expect(expect![[r#"
        1100 job 1: job_final: every rank exited 0
        1100   n1 <- forget 1.1.0
        1100   n2 <- copy step 100 of job 1 from n1
        1100   n1 <- job 1 ended
        1100   n2 <- job 1 ended
        1100   final job 1 succeeded
    "#]]);
}

#[test]
fn copies_are_known_to_the_next_coordinator_and_go_on() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", verified(1, 1, 50)));
    scene.take();
    scene.restart_coordinator(5_000);
    assert_eq!(scene.summary(1).state, JobState::Running);
    let keepers = scene.engine.job(job(1)).unwrap().keepers();
    assert_eq!(keepers, [node("n1"), node("n2")]);
    scene.at(5_100, reachable("n1", vec![alive(rank(1, 1, 0), 100)])).at(5_100, reachable("n2", vec![]));
    scene.take();
    scene.at(10_100, Event::Woke);
    scene.expect(expect![[r#"
        10100   n2 <- copy step 50 of job 1 from n1
    "#]]);
}
