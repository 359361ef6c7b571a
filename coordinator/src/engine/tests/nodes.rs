//! Nodes and coordinators go and come back: adoption, reconciliation, drain, loss.

use everlit_api::agent::Exited;
use everlit_api::status::JobState;
use everlit_api::time::Millis;
use expect_test::expect;

use super::*;

#[test]
fn a_restarted_coordinator_adopts_what_runs_and_nothing_is_signalled() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    scene.restart_coordinator(5_000);
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.at(5_100, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(1, 1, 1), 101)]));
    scene.expect(expect![""]);
    let summary = scene.summary(1);
    assert_eq!((summary.state, summary.attempt, summary.restarts), (JobState::Running, 1, 0));
    assert_eq!(summary.ranks[1].pid, Some(101));
}

#[test]
fn an_exit_that_happened_meanwhile_is_known_after_the_restart() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1)).submit(0, 2, command(1));
    scene.start_all(10, 1, 1, 1).start_all(10, 2, 1, 1);
    scene.take();
    scene.restart_coordinator(5_000);
    let ended = |n, exit| RankReport { exit: Some(exit), pid: None, ..alive(rank(n, 1, 0), 1) };
    scene.at(5_100, hello("n1", vec![ended(1, exit(0, 3_000)), ended(2, killed(4_000))]));
    scene.expect(expect![[r#"
        5100 job 1: job_final: every rank exited 0
        5100 job 2: gang_failed: rank 0 ended with signal 9 (SIGKILL)
        5100 job 2: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        5100   n1 <- forget 1.1.0
        5100   n1 <- job 1 ended
        5100   n1 <- forget 2.1.0
        5100   final job 1 succeeded
    "#]]);
    assert!((scene.summary(2).ledger.undetected - 1.1).abs() < 1e-9, "{:?}", scene.summary(2).ledger);
}

#[test]
fn a_gang_that_was_placed_but_never_started_is_started_by_the_next_coordinator() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.take();
    scene.restart_coordinator(100);
    scene.at(200, hello("n1", vec![]));
    scene.expect(expect![[r#"
        200   n1 <- start job 1 attempt 1 ranks 0+2 port 29500
    "#]]);
}

#[test]
fn what_an_agent_did_not_come_to_start_is_ordered_again_unless_the_attempt_ends() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.take();
    let unstarted = || RankReport { pid: None, started_at: None, ..alive(rank(1, 1, 1), 1) };
    scene.at(20, Event::NodeUnlinked { node: node("n1") });
    scene.at(30, hello("n1", vec![alive(rank(1, 1, 0), 100), unstarted()]));
    scene.expect(expect![[r#"
        30   n1 <- start job 1 attempt 1 ranks 0+2 port 29500
    "#]]);
    scene.exits(40, rank(1, 1, 0), killed(40));
    scene.take();
    scene.at(50, Event::NodeUnlinked { node: node("n1") });
    scene.at(60, hello("n1", vec![unstarted()]));
    scene.expect(expect![[r#"
        60   n1 <- stop job 1 attempt 1 grace 30s
    "#]]);
}

#[test]
fn ranks_that_their_node_does_not_know_any_more_are_lost_and_free() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    scene.at(20, Event::NodeUnlinked { node: node("n1") });
    scene.at(30, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    scene.expect(expect![[r#"
        30 job 1: gang_failed: rank 1: its node does not know it any more
        30   n1 <- stop job 1 attempt 1 grace 30s
    "#]]);
    scene.exits(40, rank(1, 1, 0), killed(40));
    scene.expect(expect![[r#"
        40 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        40   n1 <- forget 1.1.0 1.1.1
    "#]]);
}

#[test]
fn what_runs_and_is_not_wanted_is_stopped_and_what_ended_is_forgotten() {
    let mut scene = Scene::new();
    let ended = RankReport { exit: Some(exit(0, 1)), pid: None, ..alive(rank(8, 1, 0), 1) };
    scene.at(0, hello("n1", vec![alive(rank(7, 3, 0), 1), alive(rank(7, 3, 1), 2), ended]));
    scene.expect(expect![[r#"
        0 node_ready: n1 joined
        0   n1 <- stop job 7 attempt 3 grace 0s
        0   n1 <- forget 8.1.0
    "#]]);
}

#[test]
fn a_lone_node_s_silence_ends_nothing() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(11_000, Event::Woke);
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.at(60_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    scene.expect(expect![[r#"
        11000 node_lost: n1 was not heard of for 10 s
        60000 node_ready: n1 is back
    "#]]);
    assert_eq!(scene.summary(1).attempt, 1);
}

#[test]
fn a_lost_node_s_gang_moves_when_another_has_room_and_is_stopped_when_the_node_is_back() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.at(20, hello("n2", vec![]));
    scene.take();
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(11_000, Event::Woke).at(11_500, Event::Woke);
    scene.at(20_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    scene.expect(expect![[r#"
        11000 node_lost: n1 was not heard of for 10 s
        11000 job 1: gang_failed: n1 was lost
        11000 job 1: job_queued: waiting for a place: n1 was lost
        11000 job 1: attempt_placed: attempt 2 is starting on n2
        11000   n1 <- forget 1.1.0
        11000   n2 <- start job 1 attempt 2 ranks 0+1 port 29501
        20000 node_ready: n1 is back
        20000   n1 <- stop job 1 attempt 1 grace 0s
    "#]]);
}

#[test]
fn a_drain_saves_and_puts_jobs_back_in_the_queue_without_counting() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    scene.at(20, Event::NodeDraining { node: node("n1"), cordon: false, deadline: None });
    scene.at(25, Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit: exit(143, 25), lost: false }));
    scene.exits(26, rank(1, 1, 1), exit(143, 26));
    assert!(scene.engine.node_is_empty(&node("n1")));
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts), (JobState::Queued, 0));
    // The next agent of that node takes it up again.
    scene.at(30, Event::NodeUnlinked { node: node("n1") });
    scene.at(40, hello("n1", vec![]));
    scene.expect(expect![[r#"
        20   n1 <- stop job 1 attempt 1 grace 30s
        26 job 1: job_queued: waiting for a place: n1 is draining
        26   n1 <- forget 1.1.0 1.1.1
        40 job 1: attempt_placed: attempt 2 is starting on n1
        40   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
    "#]]);
}

fn draining(within_ms: u64) -> Event {
    Event::NodeDraining { node: node("n1"), cordon: true, deadline: Some(Millis(within_ms)) }
}

/// Its ranks live, and its agent was away or is a new one.
fn back(scene: &mut Scene, ms: u64) {
    scene.at(ms, Event::NodeReported { node: node("n1"), load: Default::default() });
    scene.at(ms, Event::NodeUnlinked { node: node("n1") });
    scene.at(ms, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
}

#[test]
fn of_a_drains_deadline_only_the_rest_is_left_after_a_reconnect_and_after_a_restart_of_the_coordinator() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, JobSpec { stop_grace: Millis::secs(30), ..command(1) });
    scene.start_all(10, 1, 1, 1);
    scene.take();
    scene.at(1_000, draining(40_000));
    back(&mut scene, 5_000);
    back(&mut scene, 21_000);
    scene.restart_coordinator(30_000);
    scene.at(31_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    // A later deadline gives nobody more time; an earlier one takes some, for good.
    scene.at(32_000, draining(60_000));
    scene.at(33_000, draining(2_000));
    scene.restart_coordinator(33_500);
    scene.at(34_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    back(&mut scene, 50_000);
    scene.expect(expect![[r#"
        1000 node_cordoned: n1 takes no new ranks: a user asked for it
        1000   n1 <- stop job 1 attempt 1 grace 30s
        5000   n1 <- stop job 1 attempt 1 grace 30s
        21000   n1 <- stop job 1 attempt 1 grace 20s
        31000   n1 <- stop job 1 attempt 1 grace 10s
        32000 node_cordoned: n1 takes no new ranks: a user asked for it
        32000   n1 <- stop job 1 attempt 1 grace 9s
        33000   n1 <- stop job 1 attempt 1 grace 2s
        34000   n1 <- stop job 1 attempt 1 grace 1s
        50000   n1 <- stop job 1 attempt 1 grace 0s
    "#]]);
}

#[test]
fn who_is_told_late_to_save_and_stop_has_its_whole_grace_and_who_was_to_be_killed_has_none() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    scene.at(20, Event::NodeUnlinked { node: node("n1") });
    scene.at(1_000, Event::NodeDraining { node: node("n1"), cordon: true, deadline: None });
    scene.restart_coordinator(2_000);
    scene.at(90_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    scene.at(91_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(92_000, Event::StopRequested { job: job(1), force: true, delete: false });
    scene.restart_coordinator(93_000);
    scene.at(94_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    scene.expect(expect![[r#"
        1000 node_cordoned: n1 takes no new ranks: a user asked for it
        1000   n1 <- stop job 1 attempt 1 grace 30s
        90000   n1 <- stop job 1 attempt 1 grace 30s
        92000 job 1: stop_requested: a user asked for it
        92000   n1 <- stop job 1 attempt 1 grace 0s
        94000   n1 <- stop job 1 attempt 1 grace 0s
    "#]]);
}

#[test]
fn a_cordoned_node_takes_no_new_ranks_until_it_is_uncordoned() {
    let mut scene = Scene::with_node();
    scene.at(1, Event::CordonRequested { node: node("n1"), cordoned: true });
    scene.submit(2, 1, command(1));
    assert_eq!(scene.summary(1).reason.as_deref(), Some("queued: n1 is cordoned"));
    scene.at(3, Event::CordonRequested { node: node("n1"), cordoned: false });
    scene.expect(expect![[r#"
        1 node_cordoned: n1 takes no new ranks: a user asked for it
        2 job 1: job_submitted: accepted
        3 node_uncordoned: n1 takes ranks again: a user asked for it
        3 job 1: attempt_placed: attempt 1 is starting on n1
        3   n1 <- start job 1 attempt 1 ranks 0+1 port 29500
    "#]]);
}

#[test]
fn a_wait_before_a_restart_survives_the_coordinator() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.exits(1_000, rank(1, 1, 0), exit(1, 1_000));
    scene.take();
    scene.restart_coordinator(1_100);
    scene.at(1_200, hello("n1", vec![]));
    assert_eq!(scene.engine.next_deadline(), Some(Timestamp(1_500)));
    scene.at(1_500, Event::Woke);
    scene.expect(expect![[r#"
        1500 job 1: attempt_placed: attempt 2 is starting on n1
        1500   n1 <- start job 1 attempt 2 ranks 0+1 port 29501
    "#]]);
    assert_eq!(scene.summary(1).restarts, 1);
}

#[test]
fn what_a_lying_disk_has_forgotten_is_learned_from_the_nodes_and_no_number_is_used_twice() {
    // An attempt of which nothing is on record: it is stopped, and the next one gets a number after it.
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.restart_coordinator(20);
    scene.at(30, hello("n1", vec![alive(rank(1, 4, 0), 400)]));
    scene.at(1_000, Event::Woke);
    // The attempt that is on record runs on another node, too.
    scene.at(2_000, hello("n2", vec![alive(rank(1, 5, 0), 500)]));
    scene.exits(2_010, rank(1, 5, 0), killed(2_009));
    scene.at(3_000, Event::Woke);
    // A membership of which nothing is on record.
    scene.at(4_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(4_100, hello("n1", vec![RankReport { generation: 2, ..alive(rank(1, 6, 0), 600) }]));
    scene.take_from("30 job 1");
    scene.expect(expect![[r#"
        30 job 1: attempt_unknown: n1 knows of attempt 4, and nothing is on record of it: the coordinator's disk has lost what it said was durable
        30 job 1: gang_failed: rank 0: its node does not know it any more
        30 job 1: restart_scheduled: attempt 5 in 500 ms: restart without cost to the budget
        30   n1 <- stop job 1 attempt 4 grace 0s
        30   n1 <- forget 1.1.0
        1000 job 1: attempt_placed: attempt 5 is starting on n1
        1000   n1 <- start job 1 attempt 5 ranks 0+1 port 29501
        2000 node_ready: n2 joined
        2000 job 1: gang_failed: its attempt runs on n2, too: the coordinator's disk has lost what it said was durable
        2000   n1 <- stop job 1 attempt 5 grace 0s
        2000   n2 <- stop job 1 attempt 5 grace 0s
        2010 job 1: restart_scheduled: attempt 6 in 1000 ms: restart without cost to the budget
        2010   n1 <- forget 1.5.0
        3000 job 1: attempt_placed: attempt 6 is starting on n1
        3000   n1 <- start job 1 attempt 6 ranks 0+1 port 29502
        4100 job 1: job_running: all 1 ranks of attempt 6 run
        4100 job 1: gang_failed: who is in it is not on record: the coordinator's disk has lost what it said was durable
        4100   n1 <- stop job 1 attempt 6 grace 0s
        4100   n1 <- stop job 1 attempt 6 grace 0s
    "#]]);
}

#[test]
fn checkpoints_of_jobs_that_are_over_need_not_be_kept() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    let Event::NodeLinked { mut hello } = hello("n1", vec![alive(rank(1, 1, 0), 100)]) else { unreachable!("a hello") };
    hello.checkpoints = vec![saved(1, 1, 5), saved(9, 1, 5)];
    scene.at(30, Event::NodeLinked { hello });
    scene.expect(expect![[r#"
        30 job 1: checkpoint_committed: step 5 is saved
        30   n1 <- job 9 ended
    "#]]);
}

#[test]
fn an_attempt_that_a_user_restarts_and_its_node_has_forgotten_makes_way_for_one_that_is_left_alone() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2).at(20, Event::RestartRequested { job: job(1) }).at(30, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    scene.at(40, hello("n1", vec![]));
    scene.expect(expect![[r#"
        40 job 1: attempt_placed: attempt 2 is starting on n1
        40   n1 <- forget 1.1.0 1.1.1
        40   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
    "#]]);
}

#[test]
fn the_loss_of_a_node_is_nothing_to_a_job_elsewhere() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2).at(20, hello("n2", vec![])).at(1_000, Event::NodeUnlinked { node: node("n2") });
    scene.take();
    scene.at(11_000, Event::Woke);
    scene.expect(expect![[r#"
        11000 node_lost: n2 was not heard of for 10 s
    "#]]);
    assert_eq!(scene.summary(1).reason.as_deref(), Some("attempt 1 runs"));
}

#[test]
fn a_job_that_a_user_stops_is_stopped_when_its_node_is_lost() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1).at(20, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    scene.at(11_000, Event::Woke);
    assert!(scene.take().contains("11000   final job 1 stopped"));
}

#[test]
fn a_gang_on_a_lost_node_says_what_it_waits_for_and_moves_when_it_is_looked_at_again() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1).at(1_000, Event::NodeUnlinked { node: node("n1") }).at(11_000, Event::Woke);
    let why = "n1 was not heard of for 10 s; its ranks may run on, and no other node has room";
    assert_eq!(scene.summary(1).reason.as_deref(), Some(why));
    scene.at(12_000, hello("n2", vec![])).at(20_999, Event::Woke);
    assert_eq!((scene.summary(1).attempt, scene.summary(1).restarts), (1, 0));
    scene.at(21_000, Event::Woke);
    assert_eq!((scene.summary(1).attempt, scene.summary(1).restarts), (2, 1));
    scene.take();
}

#[test]
fn an_expelled_node_is_forgotten_and_what_it_held_goes_on_elsewhere() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2)).submit(0, 2, command(1));
    scene.start_all(10, 1, 1, 2).start_all(10, 2, 1, 1);
    scene.exits(20, rank(2, 1, 0), killed(20));
    scene.take();
    scene.at(25, Event::NodeExpelled { node: node("n1"), force: false });
    scene.expect(expect![""]);
    scene.at(30, hello("n2", vec![]));
    scene.take();
    scene.at(40, Event::NodeExpelled { node: node("n1"), force: true });
    scene.expect(expect![[r#"
        40 node_expelled: n1 was expelled: a user asked for it
        40 job 1: gang_failed: n1 was expelled
        40 job 1: job_queued: waiting for a place: n1 was expelled
        40 job 1: attempt_placed: attempt 2 is starting on n2
        40 job 2: job_queued: waiting for a place: n1 was expelled
        40 job 2: attempt_placed: attempt 2 is starting on n2
        40   n1 <- forget 1.1.0 1.1.1
        40   n2 <- start job 1 attempt 2 ranks 0+2 port 29502
        40   n2 <- start job 2 attempt 2 ranks 0+1 port 29503
    "#]]);
    assert!(!scene.engine.nodes().contains_key(&node("n1")));
    let (one, two) = (scene.summary(1), scene.summary(2));
    assert_eq!((one.state, one.restarts, one.attempt), (JobState::Starting, 1, 2), "lost without cost, and placed again");
    assert_eq!((two.state, two.attempt), (JobState::Starting, 2), "its retry does not wait for a place that is gone");
    // Whatever comes late changes nothing, and under its name another may come.
    scene.at(50, Event::NodeUnlinked { node: node("n1") });
    scene.at(60, Event::NodeReported { node: node("n1"), load: Default::default() });
    scene.expect(expect![""]);
    scene.at(70, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    scene.expect(expect![[r#"
        70 node_ready: n1 joined
        70   n1 <- stop job 1 attempt 1 grace 0s
    "#]]);
    scene.at(80, Event::NodeExpelled { node: node("n3"), force: true });
    scene.expect(expect![""]);
}

#[test]
fn a_job_whose_checkpoints_are_on_a_lost_node_alone_waits_for_it_and_one_with_a_copy_moves() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1)).submit(0, 2, command(1));
    scene.start_all(10, 1, 1, 1).start_all(10, 2, 1, 1).at(20, hello("n2", vec![]));
    for (name, n) in [("n1", 1), ("n1", 2), ("n2", 2)] {
        scene.at(30, Event::CheckpointSeen { node: node(name), news: saved(n, 1, 5) });
    }
    assert_eq!(scene.engine.job(job(2)).unwrap().checkpoints[0].nodes().collect::<Vec<_>>(), [&node("n1"), &node("n2")]);
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(11_000, Event::Woke);
    scene.take();
    assert_eq!((scene.summary(1).attempt, scene.summary(2).attempt), (1, 2));
    let why = scene.summary(1).reason.unwrap();
    assert!(why.contains("the job's checkpoints are there alone"), "{why}");
    // What a node puts aside is gone there, and stays where it is elsewhere.
    scene.at(12_000, Event::CheckpointQuarantined { node: node("n1"), job: job(2), step: 5, reason: "x".into() });
    assert_eq!(scene.engine.job(job(2)).unwrap().checkpoints[0].nodes().collect::<Vec<_>>(), [&node("n2")]);
    scene.take();
}

#[test]
fn when_no_node_is_heard_of_any_more_none_is_lost() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(10, 1, 1, 1).at(20, hello("n2", vec![]));
    for name in ["n1", "n2"] {
        scene.at(1_000, Event::NodeReported { node: node(name), load: Default::default() });
    }
    scene.at(1_500, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    // The other's link is there, and as silent.
    scene.at(11_000, Event::Woke);
    scene.expect(expect![""]);
    scene.at(11_100, Event::NodeReported { node: node("n2"), load: Default::default() });
    scene.at(13_500, Event::Woke);
    assert!(scene.take().contains("node_lost: n1"), "now it is that node's fault");
}
