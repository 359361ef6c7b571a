//! Ranks that are restarted alone (`restart.scope: rank`): what their nodes forget, and what comes while the attempt ends or moves.

use everlit_api::job::RestartScope;
use everlit_api::status::JobState;
use everlit_api::time::Millis;
use expect_test::expect;

use super::*;

fn alone(world_size: u32) -> JobSpec {
    let mut spec = command(world_size);
    spec.restart.scope = RestartScope::Rank;
    spec
}

/// All ranks of a first attempt run.
fn running(spec: JobSpec) -> Scene {
    let world = spec.world_size;
    let mut scene = Scene::with_node();
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, world);
    scene.take();
    scene
}

fn starts(scene: &mut Scene, ms: u64, seat: u32) {
    scene.at(ms, Event::RankStarted(Started { incarnation: rank(1, 1, seat), pid: 1_000 + seat, at: Timestamp(ms) }));
}

#[test]
fn ranks_that_were_never_started_are_started_by_the_next_coordinator() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, alone(2));
    scene.take();
    scene.restart_coordinator(100);
    scene.at(200, hello("n1", vec![]));
    scene.expect(expect![[r#"
        200   n1 <- start job 1 attempt 1 ranks 0+2 port 29500
    "#]]);
}

#[test]
fn a_node_that_has_lost_all_ranks_of_an_attempt_and_knows_another_job_s_ends_the_attempt() {
    let mut scene = running(alone(2));
    scene.submit(20, 2, command(1)).start_all(30, 2, 1, 1).at(40, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    scene.at(50, hello("n1", vec![alive(rank(2, 1, 0), 200)]));
    let told = scene.take();
    assert!(told.contains("50 job 1: gang_failed: its node does not know it any more"), "{told}");
}

#[test]
fn a_rank_that_was_restarted_and_that_its_node_does_not_know_any_more_is_lost() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 1), exit(1, 1_000)).at(1_500, Event::Woke);
    starts(&mut scene, 1_600, 2);
    scene.at(2_000, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    scene.at(2_100, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    let told = scene.take();
    assert!(told.contains("rank_failed: rank 1: its node does not know it any more; only this rank starts again"), "{told}");
}

#[test]
fn a_rank_that_was_just_restarted_is_awaited_by_an_attempt_that_ends() {
    let mut spec = alone(3);
    spec.restart.max_restarts = 1;
    let mut scene = running(spec);
    scene.at(1_000, Event::NodeUnlinked { node: node("n1") });
    scene.take();
    // Both ended long ago: the first is started again at once, and nothing is left for the second.
    let ended = |seat| RankReport { pid: None, exit: Some(exit(1, 1_100)), ..alive(rank(1, 1, seat), 1) };
    scene.at(9_000, hello("n1", vec![ended(0), ended(1), alive(rank(1, 1, 2), 102)]));
    let told = scene.take();
    assert!(told.contains("membership 1 [3, 1, 2]") && told.contains("gang_failed"), "{told}");
    scene.exits(9_100, rank(1, 1, 2), exit(143, 9_100));
    assert_eq!(scene.take(), "", "seat 3 may be starting");
    scene.exits(9_200, rank(1, 1, 3), exit(143, 9_200));
    assert!(scene.take().contains("final job 1 failed"));
}

#[test]
fn a_wait_of_one_rank_ends_with_its_attempt() {
    let mut spec = alone(2);
    spec.restart.backoff.initial = Millis::secs(60);
    let mut scene = running(spec);
    scene.at(100, hello("n2", vec![])).exits(1_000, rank(1, 1, 1), exit(1, 1_000)).at(2_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(12_000, Event::Woke).start_all(12_100, 1, 2, 2);
    assert_eq!((scene.summary(1).state, scene.summary(1).attempt), (JobState::Running, 2));
    scene.take();
    scene.at(61_000, Event::Woke);
    assert_eq!(scene.take(), "");
}

#[test]
fn a_rank_that_starts_late_does_not_make_a_job_run_that_is_being_stopped() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 1), exit(1, 1_000)).at(1_500, Event::Woke);
    scene.at(1_600, Event::StopRequested { job: job(1), force: false, delete: false });
    starts(&mut scene, 1_610, 2);
    assert_eq!(scene.summary(1).state, JobState::Stopping);
    scene.take();
}

#[test]
fn a_job_says_what_it_recovers_from_until_one_of_its_ranks_runs_again() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 0), exit(1, 1_000)).exits(1_000, rank(1, 1, 1), exit(1, 1_000));
    let why = "rank 1 ended with exit code 1: last words 1; only this rank starts again";
    assert_eq!((scene.summary(1).state, scene.summary(1).reason.as_deref()), (JobState::Recovering, Some(why)));
    scene.at(1_500, Event::Woke);
    assert_eq!(scene.summary(1).reason.as_deref(), Some(why), "the new processes are on their way");
    starts(&mut scene, 1_600, 2);
    assert_eq!((scene.summary(1).state, scene.summary(1).reason.as_deref()), (JobState::Running, Some("attempt 1 runs")));
    scene.take();
}
