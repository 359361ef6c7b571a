//! A lost rank's place is given to another process: who gets it, when that is over, and when the gang is started again instead.

use everlit_api::rank::Verdict;
use everlit_api::status::JobState;
use expect_test::expect;

use super::super::limits::REGROUP_MAX_MS;
use super::*;

pub(super) fn trains(world_size: u32, spares: u32) -> JobSpec {
    let mut spec = JobSpec::default_for(world_size);
    spec.worker.as_mut().expect("built in").device = everlit_api::job::Device::Cpu;
    spec.restart.backoff.jitter = 0.0;
    spec.restart.spares = spares;
    spec
}

/// Every seat has done `step` in a membership.
pub(super) fn steps(scene: &mut Scene, ms: u64, generation: u32, seats: &[u32], step: u64) {
    let beats = seats.iter().map(|seat| Beat { in_place: Some(true), generation, ..beat(rank(1, 1, *seat), step) });
    scene.at(ms, Event::RanksBeat(beats.collect()));
}

pub(super) fn starts(scene: &mut Scene, ms: u64, seat: u32) {
    scene.at(ms, Event::RankStarted(Started { incarnation: rank(1, 1, seat), pid: 1_000 + seat, at: Timestamp(ms) }));
}

/// Two ranks that did seven steps, and so many spares.
fn running(spares: u32) -> Scene {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, trains(2, spares));
    scene.start_all(10, 1, 1, 2);
    (2..2 + spares).for_each(|seat| starts(&mut scene, 20, seat));
    steps(&mut scene, 900, 0, &[0, 1], 7);
    scene.take();
    scene
}

#[test]
fn a_killed_rank_s_place_goes_to_a_new_process_and_the_others_go_on() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    let summary = scene.summary(1);
    assert_eq!((summary.state, summary.attempt, summary.generation, summary.restarts), (JobState::Recovering, 1, 1, 1));
    assert_eq!((summary.ranks[0].pid, summary.ranks[1].pid), (Some(100), None));
    starts(&mut scene, 1_050, 2);
    assert_eq!(scene.summary(1).ranks[1].pid, Some(1_002));
    // The survivor alone is not enough, nor is what it did in the membership before.
    steps(&mut scene, 1_100, 0, &[0], 8);
    steps(&mut scene, 1_500, 1, &[0], 8);
    assert_eq!(scene.summary(1).state, JobState::Recovering);
    steps(&mut scene, 1_700, 1, &[2], 8);
    assert_eq!((scene.summary(1).state, scene.summary(1).step, scene.summary(1).lost_steps), (JobState::Running, Some(8), 0));
    scene.expect(expect![[r#"
        1000 job 1: rank_replaced: rank 1 ended with signal 9 (SIGKILL); recovering in place with a new process
        1000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
        1000   n1 <- forget 1.1.1
        1700 job 1: recovered_in_place: rank 1 has a new process; all ranks step again after 700 ms
    "#]]);
}

#[test]
fn a_spare_takes_the_place_at_once_and_another_spare_is_started_when_that_is_over() {
    let mut scene = running(1);
    assert_eq!(scene.summary(1).spares.len(), 1);
    scene.exits(1_000, rank(1, 1, 0), killed(999));
    assert_eq!((scene.summary(1).ranks[0].pid, scene.summary(1).spares.len()), (Some(1_002), 0));
    steps(&mut scene, 1_200, 1, &[2, 1], 8);
    scene.expect(expect![[r#"
        1000 job 1: rank_replaced: rank 0 ended with signal 9 (SIGKILL); recovering in place with a spare
        1000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [2, 1]
        1000   n1 <- forget 1.1.0
        1200 job 1: recovered_in_place: rank 0 has a new process; all ranks step again after 200 ms
        1200   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [2, 1] spares [3]
    "#]]);
    // When all is done the new spare is told to go, and the job ends when it has gone.
    starts(&mut scene, 1_300, 3);
    scene.exits(5_000, rank(1, 1, 2), exit(0, 5_000)).exits(5_000, rank(1, 1, 1), exit(0, 5_000));
    scene.exits(5_010, rank(1, 1, 3), killed(5_010));
    scene.expect(expect![[r#"
        5000   n1 <- stop job 1 attempt 1 grace 0s
        5010 job 1: job_final: every rank exited 0
        5010   n1 <- forget 1.1.3
        5010   n1 <- forget 1.1.2 1.1.1
        5010   n1 <- job 1 ended
        5010   final job 1 succeeded
    "#]]);
}

#[test]
fn a_rank_that_hangs_is_replaced_and_its_end_is_nobody_s_failure() {
    let mut scene = running(0);
    scene.at(3_000, Event::RankJudged { incarnation: rank(1, 1, 1), verdict: Verdict::Stuck, age_ms: 2_000, stacks: Vec::new() });
    scene.exits(3_010, rank(1, 1, 1), killed(3_010));
    starts(&mut scene, 3_100, 2);
    steps(&mut scene, 3_500, 1, &[0, 2], 8);
    assert_eq!(scene.summary(1).ledger.undetected, 2.0);
    scene.expect(expect![[r#"
        3000 job 1: rank_replaced: rank 1 is stuck after step 7: neither a step nor a new phase for 2000 ms (heartbeat.progress_timeout); recovering in place with a new process
        3000 job 1: node_blamed: the failure of rank 1 may be the machine's: 1 on n1 in 24 h, one may be chance
        3000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
        3010   n1 <- forget 1.1.1
        3500 job 1: recovered_in_place: rank 1 has a new process; all ranks step again after 500 ms
    "#]]);
}

#[test]
fn what_fails_during_a_recovery_leads_to_the_next_rung() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    scene.exits(1_100, rank(1, 1, 0), killed(1_099));
    starts(&mut scene, 1_150, 2);
    scene.exits(1_200, rank(1, 1, 2), exit(1, 1_200));
    scene.expect(expect![[r#"
        1000 job 1: rank_replaced: rank 1 ended with signal 9 (SIGKILL); recovering in place with a new process
        1000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
        1000   n1 <- forget 1.1.1
        1100 job 1: gang_failed: rank 0 ended with signal 9 (SIGKILL)
        1100   n1 <- stop job 1 attempt 1 grace 30s
        1200 job 1: restart_scheduled: attempt 2 in 500 ms: restart 2 of 50
        1200   n1 <- forget 1.1.0 1.1.2
    "#]]);
    assert_eq!((scene.summary(1).restarts, scene.summary(1).state), (2, JobState::Recovering));
}

#[test]
fn a_recovery_that_does_not_end_is_given_up() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    starts(&mut scene, 1_050, 2);
    scene.take();
    scene.at(1_000 + REGROUP_MAX_MS, Event::Woke);
    scene.expect(expect![[r#"
        301000 job 1: gang_failed: the recovery in place of rank 1 did not end within 5 min
        301000   n1 <- stop job 1 attempt 1 grace 0s
    "#]]);
}

#[test]
fn a_budget_that_is_used_up_ends_the_job_in_place_too() {
    let mut scene = Scene::with_node();
    let mut spec = trains(2, 0);
    spec.restart.max_restarts = 0;
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, 2);
    steps(&mut scene, 900, 0, &[0, 1], 7);
    scene.take();
    scene.exits(1_000, rank(1, 1, 1), killed(999)).exits(1_010, rank(1, 1, 0), exit(143, 1_010));
    scene.expect(expect![[r#"
        1000 job 1: gang_failed: rank 1 ended with signal 9 (SIGKILL)
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1010 job 1: job_final: rank 1 ended with signal 9 (SIGKILL); all 0 restarts are used (restart.max_restarts)
        1010   n1 <- forget 1.1.0 1.1.1
        1010   n1 <- job 1 ended
        1010   final job 1 failed
    "#]]);
}

#[test]
fn a_coordinator_that_dies_in_a_recovery_says_it_again_and_sees_it_through() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    scene.take();
    scene.restart_coordinator(1_100);
    // The agent never heard of it: the end is told again and forgotten, the membership is said again.
    let mut ended = alive(rank(1, 1, 1), 101);
    (ended.pid, ended.exit) = (None, Some(killed(999)));
    scene.at(1_200, hello("n1", vec![alive(rank(1, 1, 0), 100), ended]));
    scene.expect(expect![[r#"
        1200   n1 <- forget 1.1.1
        1200   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
    "#]]);
    starts(&mut scene, 1_300, 2);
    scene.restart_coordinator(1_400);
    scene.at(1_500, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(1, 1, 2), 1_002)]));
    steps(&mut scene, 1_600, 1, &[0, 2], 8);
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.expect(expect![[r#"
        1500   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
        1600 job 1: recovered_in_place: rank 1 has a new process; all ranks step again after 600 ms
    "#]]);
}

#[test]
fn a_user_s_stop_ends_a_recovery_and_every_process_of_it() {
    let mut scene = running(1);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    scene.take();
    scene.at(1_100, Event::StopRequested { job: job(1), force: true, delete: false });
    scene.exits(1_110, rank(1, 1, 0), killed(1_110)).exits(1_110, rank(1, 1, 2), killed(1_110));
    scene.expect(expect![[r#"
        1100 job 1: stop_requested: a user asked for it
        1100   n1 <- stop job 1 attempt 1 grace 0s
        1110 job 1: job_final: stopped by a user
        1110   n1 <- forget 1.1.0 1.1.2
        1110   n1 <- job 1 ended
        1110   final job 1 stopped
    "#]]);
}

#[test]
fn a_node_that_reboots_in_a_recovery_leaves_nothing_awaited() {
    for min_world_size in [None, Some(1)] {
        let mut scene = Scene::with_node();
        scene.submit(0, 1, JobSpec { min_world_size, ..trains(3, 0) });
        scene.start_all(10, 1, 1, 3);
        steps(&mut scene, 900, 0, &[0, 1, 2], 7);
        scene.exits(1_000, rank(1, 1, 0), killed(999));
        assert_eq!(scene.summary(1).state, JobState::Recovering);
        scene.at(2_000, Event::NodeUnlinked { node: node("n1") });
        scene.at(3_000, hello("n1", Vec::new()));
        scene.at(10_000, Event::Woke);
        let told = scene.take();
        assert_eq!(scene.summary(1).attempt, 2, "{min_world_size:?}: {told}");
    }
}

#[test]
fn a_spare_of_a_whole_gang_that_is_lost_is_replaced_after_the_next_recovery_alone() {
    let mut scene = running(1);
    scene.exits(1_000, rank(1, 1, 2), killed(999));
    scene.at(400_000, Event::Woke);
    scene.expect(expect![[r#"
        1000 job 1: spare_lost: a spare ended with signal 9 (SIGKILL); it is replaced after the next recovery
        1000   n1 <- forget 1.1.2
    "#]]);
}

#[test]
fn a_gang_that_fails_twice_without_a_new_step_between_is_started_again() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    starts(&mut scene, 1_050, 2);
    // The step in flight was lost: they have done it once more.
    steps(&mut scene, 1_100, 1, &[0, 2], 7);
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.take();
    scene.exits(2_000, rank(1, 1, 2), killed(1_999));
    scene.expect(expect![[r#"
        2000 job 1: gang_failed: rank 1 ended with signal 9 (SIGKILL)
        2000   n1 <- stop job 1 attempt 1 grace 30s
    "#]]);
}

#[test]
fn a_process_that_was_just_ordered_is_awaited_though_its_node_did_not_name_it() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, trains(3, 0));
    scene.start_all(10, 1, 1, 3);
    steps(&mut scene, 900, 0, &[0, 1, 2], 7);
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    let ended = |seat| RankReport { pid: None, exit: Some(killed(1_050)), ..alive(rank(1, 1, seat), 1) };
    scene.at(1_100, hello("n1", vec![ended(0), ended(1), alive(rank(1, 1, 2), 102)]));
    let told = scene.take();
    assert!(told.contains("membership 1 [3, 1, 2]") && told.contains("gang_failed"), "{told}");
    scene.exits(1_200, rank(1, 1, 2), killed(1_199));
    assert_eq!(scene.take(), "", "seat 3 may be starting");
    scene.exits(1_210, rank(1, 1, 3), killed(1_209));
    assert!(scene.take().contains("restart_scheduled"));
}

#[test]
fn a_recovery_that_began_under_another_coordinator_is_given_up_in_time_too() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    scene.restart_coordinator(1_100);
    scene.at(1_200, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(1, 1, 2), 1_002)]));
    scene.at(1_000 + REGROUP_MAX_MS - 1, Event::Woke);
    scene.take();
    scene.at(1_000 + REGROUP_MAX_MS, Event::Woke);
    assert!(scene.take().contains("gang_failed: the recovery in place of rank 1 did not end within 5 min"));
}

#[test]
fn a_recovery_that_was_over_before_a_restart_is_not_given_up_for_a_clock_that_was_set() {
    let mut scene = running(0);
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    let later = 1_000 + 2 * REGROUP_MAX_MS;
    scene.restart_coordinator(later);
    scene.at(later, Event::Woke);
    scene.at(later + 100, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(1, 1, 2), 1_002)]));
    assert!(!scene.take().contains("gang_failed"));
    let waits = 3 * scene.engine.config.node_timeout_ms;
    scene.at(later + waits - 1, Event::Woke);
    assert!(!scene.take().contains("gang_failed"));
    scene.at(later + waits, Event::Woke);
    assert!(scene.take().contains("gang_failed"), "that long, and no longer");
}
