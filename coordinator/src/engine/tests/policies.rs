//! What a rank wrote decides what follows, and nodes that are suspected are avoided where another has room.

use everlit_api::job::{LogAction, LogPolicy};
use everlit_api::rank::{LogMatch, Verdict};
use everlit_api::status::JobState;
use expect_test::expect;

use super::*;

const DAY_MS: u64 = 24 * 3_600 * 1_000;

fn with_policies(world: u32) -> JobSpec {
    let policy = |name: Option<&str>, pattern: &str, action| LogPolicy { name: name.map(Into::into), pattern: pattern.into(), action };
    let log_policies = vec![policy(Some("ecc"), "ECC", LogAction::ExcludeNode), policy(None, "out of range", LogAction::CancelRetries)];
    JobSpec { log_policies, ..command(world) }
}

fn wrote(policy: u32, line: &str, at: u64) -> RankExit {
    RankExit { matched: Some(LogMatch { policy, line: line.into() }), ..exit(1, at) }
}

/// A scene with two nodes; jobs go to the first while it is as full as the second.
fn two_nodes() -> Scene {
    let mut scene = Scene::with_node();
    scene.at(0, hello("n2", vec![]));
    scene.take();
    scene
}

/// The first rank of an attempt hangs, and is killed for it.
fn hangs(scene: &mut Scene, ms: u64, n: u128, attempt: u32) {
    scene.at(ms, Event::RankJudged { incarnation: rank(n, attempt, 0), verdict: Verdict::Stuck, age_ms: 100, stacks: Vec::new() });
    scene.exits(ms, rank(n, attempt, 0), killed(ms));
}

fn place(scene: &Scene, n: u128) -> Option<String> {
    scene.engine.job(job(n)).and_then(|job| job.node_of(0)).map(|node| node.0.clone())
}

#[test]
fn a_line_that_cancels_retries_fails_the_job_at_once_and_is_told() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, with_policies(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    // The others' line came later by the kernel's order: it may be only a consequence.
    scene.exits(1_000, rank(1, 1, 0), wrote(0, "uncorrectable ECC", 999)).exits(1_001, rank(1, 1, 1), wrote(1, "token out of range", 990));
    scene.expect(expect![[r#"
        1000 job 1: gang_failed: rank 0 ended with exit code 1: last words 1
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1001 job 1: log_policy_matched: rank 1 wrote "token out of range" (log policy `out of range`, cancel_retries: it is not tried again)
        1001 job 1: job_final: rank 1 ended with exit code 1: last words 1; rank 1 wrote "token out of range" (log policy `out of range`, cancel_retries: it is not tried again)
        1001   n1 <- forget 1.1.0 1.1.1
        1001   n1 <- job 1 ended
        1001   final job 1 failed
    "#]]);
}

#[test]
fn an_excluded_node_is_left_for_another_also_by_the_next_coordinator() {
    let mut scene = two_nodes();
    scene.submit(0, 1, with_policies(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    scene.exits(1_000, rank(1, 1, 0), wrote(0, "uncorrectable ECC", 999));
    scene.restart_coordinator(1_100);
    scene.at(1_200, hello("n1", vec![])).at(1_200, hello("n2", vec![])).at(1_500, Event::Woke);
    scene.expect(expect![[r#"
        1000 job 1: gang_failed: rank 0 ended with exit code 1: last words 1
        1000 job 1: log_policy_matched: rank 0 wrote "uncorrectable ECC" (log policy "ecc" `ECC`, exclude_node: the job is not placed on n1 again)
        1000 job 1: node_blamed: the failure of rank 0 may be the machine's: 1 on n1 in 24 h, one may be chance
        1000 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        1000   n1 <- forget 1.1.0
        1200 node_ready: n2 joined
        1500 job 1: job_queued: waiting for a place: n1 is excluded for it by its log_policies
        1500 job 1: attempt_placed: attempt 2 is starting on n2
        1500   n2 <- start job 1 attempt 2 ranks 0+1 port 29501
    "#]]);
    // What comes after it on its own way is kept from it, too.
    scene.start_all(1_600, 1, 2, 1);
    scene.at(1_700, Event::NodeDraining { node: node("n2"), cordon: true, deadline: None });
    scene.exits(1_800, rank(1, 2, 0), exit(143, 1_800));
    scene.take();
    assert_eq!(scene.summary(1).state, JobState::Queued);
}

#[test]
fn a_job_that_is_kept_from_every_node_waits_says_why_and_comes_back_by_a_user() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, with_policies(1)).submit(0, 2, command(8));
    scene.start_all(10, 1, 1, 1);
    scene.exits(1_000, rank(1, 1, 0), wrote(0, "uncorrectable ECC", 999)).at(1_500, Event::Woke);
    scene.take();
    let told = scene.engine.explain(job(1)).expect("active");
    expect![[r#"
        queued: no other node can hold it: n1 is excluded for this job by its log_policies, until a user restarts it
        {"n1": "is excluded for this job by its log_policies, until a user restarts it"}
    "#]]
    .assert_eq(&format!("{}\n{:?}\n", told.reason, told.nodes));
    // It holds nobody back, and a new node is taken at once.
    assert_eq!(place(&scene, 2).as_deref(), Some("n1"));
    scene.restart_coordinator(1_600);
    scene.at(1_650, hello("n1", vec![]));
    assert_eq!(scene.summary(1).state, JobState::Queued);
    scene.at(1_700, Event::StopRequested { job: job(2), force: true, delete: false }).start_all(1_710, 2, 1, 8);
    for r in 0..8 {
        scene.exits(1_720, rank(2, 1, r), killed(1_720));
    }
    scene.take();
    scene.at(1_800, Event::RestartRequested { job: job(1) });
    scene.expect(expect![[r#"
        1800 job 1: restart_requested: a user asked for it
        1800 job 1: nodes_readmitted: n1 may be used again: a user restarted the job
        1800 job 1: attempt_placed: attempt 2 is starting on n1
        1800   n1 <- start job 1 attempt 2 ranks 0+1 port 29502
    "#]]);
}

#[test]
fn a_node_with_repeated_failures_is_avoided_for_a_day_and_by_nobody_who_must_stay() {
    let mut scene = two_nodes();
    // With a step behind it, it stays with what it has on its node.
    scene.submit(0, 1, command(1));
    for (attempt, ms) in [(1, 1_000), (2, 10_000)] {
        scene.start_all(ms, 1, attempt, 1);
        scene.at(ms + 1, Event::RanksBeat(vec![beat(rank(1, attempt, 0), u64::from(attempt) * 5)]));
        hangs(&mut scene, ms + 10, 1, attempt);
        scene.at(ms + 5_000, Event::Woke);
    }
    scene.expect(expect![[r#"
        0 job 1: job_submitted: accepted
        0 job 1: attempt_placed: attempt 1 is starting on n1
        0   n1 <- start job 1 attempt 1 ranks 0+1 port 29500
        1000 job 1: job_running: all 1 ranks of attempt 1 run
        1010 job 1: gang_failed: rank 0 is stuck after step 5: neither a step nor a new phase for 100 ms (heartbeat.progress_timeout)
        1010   n1 <- stop job 1 attempt 1 grace 0s
        1010 job 1: node_blamed: the failure of rank 0 may be the machine's: 1 on n1 in 24 h, one may be chance
        1010 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        1010   n1 <- forget 1.1.0
        6000 job 1: attempt_placed: attempt 2 is starting on n1
        6000   n1 <- start job 1 attempt 2 ranks 0+1 port 29501
        10000 job 1: attempt_resumed: attempt 2 begins anew: there is no checkpoint
        10000 job 1: job_running: all 1 ranks of attempt 2 run
        10010 job 1: gang_failed: rank 0 is stuck after step 10: neither a step nor a new phase for 100 ms (heartbeat.progress_timeout)
        10010   n1 <- stop job 1 attempt 2 grace 0s
        10010 job 1: node_blamed: the failure of rank 0 may be the machine's: 2 on n1 in 24 h, it is avoided where another node has room
        10010 job 1: restart_scheduled: attempt 3 in 500 ms: restart 2 of 50
        10010   n1 <- forget 1.2.0
        15000 job 1: attempt_placed: attempt 3 is starting on n1
        15000   n1 <- start job 1 attempt 3 ranks 0+1 port 29502
    "#]]);
    assert_eq!(place(&scene, 1).as_deref(), Some("n1"));
    // A fresh one goes to the emptier node, which would else be the last choice.
    scene.submit(16_000, 2, command(2));
    assert_eq!(place(&scene, 2).as_deref(), Some("n2"));
    // Avoided is not forbidden.
    scene.submit(16_000, 3, command(7));
    assert_eq!(place(&scene, 3).as_deref(), Some("n1"));
    scene.submit(16_000, 4, command(8));
    expect![[r#"
        {"n1": "needs 8 ranks, has free places for 0", "n2": "is kept for it: needs 8 ranks, has free places for 6"}
    "#]]
    .assert_eq(&format!("{:?}\n", scene.engine.explain(job(4)).expect("active").nodes));
    let seen = scene.engine.nodes()[&node("n1")].view(&node("n1"), Timestamp(16_000));
    assert_eq!((seen.avoided, seen.blames.len(), seen.blames[0].job_id), (true, 2, job(1)));
    // It is the same for the next coordinator, and a day later forgotten, one by one.
    scene.restart_coordinator(17_000);
    let count = |scene: &Scene| scene.engine.nodes()[&node("n1")].blames.len();
    assert_eq!(count(&scene), 2);
    scene.at(1_010 + DAY_MS, Event::Woke);
    assert_eq!((count(&scene), scene.engine.nodes()[&node("n1")].avoided()), (1, 0));
    scene.at(10_010 + DAY_MS, Event::Woke);
    assert_eq!(count(&scene), 0);
    scene.take();
}

#[test]
fn a_user_who_uncordons_a_node_says_that_it_is_well() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    for attempt in 1..=2 {
        let ms = u64::from(attempt) * 10_000;
        scene.start_all(ms, 1, attempt, 1);
        hangs(&mut scene, ms + 10, 1, attempt);
        scene.at(ms + 5_000, Event::Woke);
    }
    // A lone node goes on as ever.
    assert_eq!((place(&scene, 1).as_deref(), scene.summary(1).attempt), (Some("n1"), 3));
    assert!(scene.engine.nodes()[&node("n1")].avoided() > 0);
    scene.at(26_000, Event::CordonRequested { node: node("n1"), cordoned: false });
    assert!(scene.engine.nodes()[&node("n1")].blames.is_empty());
    scene.take();
}

/// Ids of log lines count by it.
#[test]
fn the_order_of_a_job_s_nodes_stays_when_it_comes_back_to_one() {
    let mut scene = two_nodes();
    scene.submit(0, 1, command(1));
    for (attempt, ms, placed, closed) in [(1, 1_000, "n1", "n1"), (2, 10_000, "n2", "n2"), (3, 20_000, "n1", "n1")] {
        assert_eq!(place(&scene, 1).as_deref(), Some(placed));
        scene.start_all(ms, 1, attempt, 1);
        for name in ["n1", "n2"] {
            scene.at(ms + 5, Event::CordonRequested { node: node(name), cordoned: name == closed });
        }
        scene.exits(ms + 10, rank(1, attempt, 0), exit(1, ms));
        let own = scene.engine.job(job(1)).unwrap();
        assert_eq!(own.node_or_last_of(0), Some(&node(placed)), "where it ended, in no gang any more");
        assert_eq!(own.nodes, [node("n1"), node("n2")][..own.nodes.len()]);
        scene.at(ms + 9_000, Event::Woke);
    }
    scene.take();
}

#[test]
fn failures_that_follow_a_job_to_another_node_are_held_against_none() {
    let mut scene = two_nodes();
    scene.submit(0, 1, command(1));
    for (attempt, ms) in [(1, 1_000), (2, 10_000), (3, 20_000), (4, 30_000)] {
        scene.start_all(ms, 1, attempt, 1);
        hangs(&mut scene, ms + 10, 1, attempt);
        scene.at(ms + 9_000, Event::Woke);
    }
    let told = scene.take();
    let told: Vec<&str> = told.lines().filter(|line| line.contains("blame") || line.contains("attempt_placed")).collect();
    expect![[r#"
        0 job 1: attempt_placed: attempt 1 is starting on n1
        1010 job 1: node_blamed: the failure of rank 0 may be the machine's: 1 on n1 in 24 h, one may be chance
        10000 job 1: attempt_placed: attempt 2 is starting on n1
        10010 job 1: node_blamed: the failure of rank 0 may be the machine's: 2 on n1 in 24 h, it is avoided where another node has room
        19000 job 1: attempt_placed: attempt 3 is starting on n2
        20010 job 1: blame_withdrawn: its failures followed it from n1 to n2: they are held against no node
        29000 job 1: attempt_placed: attempt 4 is starting on n2
        39000 job 1: attempt_placed: attempt 5 is starting on n2
    "#]]
    .assert_eq(&(told.join("\n") + "\n"));
    assert!(scene.engine.nodes().values().all(|node| node.blames.is_empty()));
    scene.restart_coordinator(40_000);
    assert!(scene.engine.job(job(1)).is_some_and(|job| job.fails_anywhere));
}
