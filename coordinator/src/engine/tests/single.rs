//! Single ranks are restarted: who does, after how long, at whose cost, when the whole gang goes after all, and what their nodes forget.

use everlit_api::agent::Exited;
use everlit_api::job::{FailureAction, RestartScope};
use everlit_api::rank::{Cause, Verdict};
use everlit_api::status::JobState;
use everlit_api::time::Millis;
use expect_test::expect;

use super::*;

fn alone(world_size: u32) -> JobSpec {
    let mut spec = command(world_size);
    spec.restart.scope = RestartScope::Rank;
    spec
}

fn running(spec: JobSpec) -> Scene {
    let (mut scene, world) = (Scene::with_node(), spec.world_size);
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, world);
    scene.take();
    scene
}

fn starts(scene: &mut Scene, ms: u64, seat: u32) {
    scene.at(ms, Event::RankStarted(Started { incarnation: rank(1, 1, seat), pid: 500 + seat, at: Timestamp(ms) }));
}

#[test]
fn a_rank_that_fails_starts_again_after_its_backoff_and_the_others_hear_nothing() {
    let mut scene = running(alone(3));
    scene.exits(1_000, rank(1, 1, 1), exit(1, 999));
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts, scene.summary(1).attempt), (JobState::Running, 1, 1));
    scene.exits(1_100, rank(1, 1, 0), killed(1_100));
    scene.at(1_499, Event::Woke).at(1_600, Event::Woke);
    starts(&mut scene, 1_650, 3);
    starts(&mut scene, 1_660, 4);
    // The same rank again, without a step in between: its wait is longer. The other one's begins anew after a step.
    scene.exits(2_000, rank(1, 1, 3), exit(1, 2_000));
    scene.at(2_100, Event::RanksBeat(vec![beat(rank(1, 1, 4), 5)]));
    scene.exits(2_200, rank(1, 1, 4), exit(1, 2_200));
    scene.at(3_000, Event::Woke);
    starts(&mut scene, 3_010, 5);
    starts(&mut scene, 3_010, 6);
    for (ms, seat) in [(3_100, 2), (3_200, 5), (500_000, 6)] {
        scene.exits(ms, rank(1, 1, seat), exit(0, ms));
    }
    scene.expect(expect![[r#"
        1000 job 1: rank_failed: rank 1 ended with exit code 1: last words 1; only this rank starts again, in 499 ms: restart 1 of 50
        1100 job 1: rank_failed: rank 0 ended with signal 9 (SIGKILL); only this rank starts again, in 500 ms: restart 2 of 50
        1499 job 1: rank_restarted: rank 1 starts again, the others go on
        1499   n1 <- start job 1 attempt 1 ranks 0+3 port 29500 membership 1 [0, 3, 2]
        1499   n1 <- forget 1.1.1
        1600 job 1: rank_restarted: rank 0 starts again, the others go on
        1600   n1 <- start job 1 attempt 1 ranks 0+3 port 29500 membership 2 [4, 3, 2]
        1600   n1 <- forget 1.1.0
        2000 job 1: rank_failed: rank 1 ended with exit code 1: last words 1; only this rank starts again, in 1000 ms: restart 3 of 50
        2200 job 1: rank_failed: rank 0 ended with exit code 1: last words 1; only this rank starts again, in 500 ms: restart 4 of 50
        3000 job 1: rank_restarted: rank 0 starts again, the others go on
        3000 job 1: rank_restarted: rank 1 starts again, the others go on
        3000   n1 <- start job 1 attempt 1 ranks 0+3 port 29500 membership 3 [5, 3, 2]
        3000   n1 <- forget 1.1.4
        3000   n1 <- start job 1 attempt 1 ranks 0+3 port 29500 membership 4 [5, 6, 2]
        3000   n1 <- forget 1.1.3
        500000 job 1: job_final: every rank exited 0
        500000   n1 <- forget 1.1.5 1.1.6 1.1.2
        500000   n1 <- job 1 ended
        500000   final job 1 succeeded
    "#]]);
}

#[test]
fn a_rank_that_hangs_is_replaced_at_once_and_killed_by_the_membership() {
    let mut scene = running(alone(2));
    scene.at(9_000, Event::RankJudged { incarnation: rank(1, 1, 0), verdict: Verdict::Idle, age_ms: 8_000, stacks: Vec::new() });
    // Its end, and that of anybody else who was replaced, is nobody's failure.
    scene.exits(9_010, rank(1, 1, 0), killed(9_009));
    starts(&mut scene, 9_020, 2);
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts), (JobState::Running, 1));
    scene.expect(expect![[r#"
        9000 job 1: rank_failed: rank 0 is idle: neither output nor CPU time for 8000 ms (heartbeat.idle_timeout); only this rank starts again, in 0 ms: restart 1 of 50
        9000 job 1: rank_restarted: rank 0 starts again, the others go on
        9000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [2, 1]
        9010   n1 <- forget 1.1.0
    "#]]);
}

#[test]
fn a_rank_that_fails_again_and_again_fails_the_job_though_the_others_step_on() {
    let mut spec = alone(2);
    spec.restart.max_start_failures = 3;
    let mut scene = running(spec);
    let mut seat = 1;
    for turn in 0..3u64 {
        let at = 10_000 * (turn + 1);
        scene.at(at, Event::RanksBeat(vec![beat(rank(1, 1, 0), turn + 1)]));
        scene.exits(at + 1, rank(1, 1, seat), exit(1, at + 1));
        scene.at(at + 9_000, Event::Woke);
        seat = turn as u32 + 2;
        starts(&mut scene, at + 9_001, seat);
    }
    scene.take();
    assert_eq!(scene.summary(1).state, JobState::Stopping);
    scene.exits(40_000, rank(1, 1, 0), exit(143, 40_000));
    scene.expect(expect![[r#"
        40000 job 1: job_final: rank 1 ended with exit code 1: last words 1; it failed 3 times in a row without a new step (restart.max_start_failures)
        40000   n1 <- forget 1.1.0 1.1.3
        40000   n1 <- job 1 ended
        40000   final job 1 failed
    "#]]);
}

#[test]
fn nobody_lives_while_all_wait_and_a_stop_ends_the_waits() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 0), exit(1, 1_000));
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.exits(1_001, rank(1, 1, 1), exit(1, 1_001));
    assert_eq!(scene.summary(1).state, JobState::Recovering);
    let before = scene.summary(1).ledger;
    scene.at(1_501, Event::Woke);
    assert_eq!(scene.summary(1).state, JobState::Recovering);
    starts(&mut scene, 1_600, 2);
    assert_eq!(scene.summary(1).state, JobState::Running);
    let after = scene.summary(1).ledger;
    assert!(after.backoff > before.backoff && after.restoring > before.restoring, "{before:?} {after:?}");
    scene.exits(2_000, rank(1, 1, 2), exit(1, 2_000));
    scene.take();
    scene.at(2_001, Event::StopRequested { job: job(1), force: false, delete: false });
    // Who was ordered may have started; who waits never does.
    scene.exits(2_100, rank(1, 1, 3), killed(2_100));
    scene.expect(expect![[r#"
        2001 job 1: stop_requested: a user asked for it
        2001   n1 <- stop job 1 attempt 1 grace 30s
        2100 job 1: job_final: stopped by a user
        2100   n1 <- forget 1.1.2 1.1.3
        2100   n1 <- job 1 ended
        2100   final job 1 stopped
    "#]]);
}

#[test]
fn a_coordinator_that_dies_in_the_wait_waits_on_and_counts_nothing_twice() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 1), exit(1, 1_000));
    scene.take();
    scene.restart_coordinator(1_200);
    let ended = RankReport { exit: Some(exit(1, 1_000)), pid: None, ..alive(rank(1, 1, 1), 0) };
    scene.at(1_300, hello("n1", vec![alive(rank(1, 1, 0), 100), ended]));
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts), (JobState::Running, 1));
    scene.at(1_500, Event::Woke);
    // The order was lost with the connection: it is said again, and nothing is lost.
    scene.at(1_510, Event::NodeUnlinked { node: node("n1") });
    scene.at(1_600, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    starts(&mut scene, 1_700, 2);
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts), (JobState::Running, 1));
    scene.expect(expect![[r#"
        1500 job 1: rank_restarted: rank 1 starts again, the others go on
        1500   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
        1500   n1 <- forget 1.1.1
        1600   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
    "#]]);
}

#[test]
fn a_node_that_knows_nothing_of_it_any_more_starts_the_whole_gang() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000));
    scene.take();
    scene.at(2_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(3_000, hello("n1", Vec::new()));
    scene.at(3_500, Event::Woke);
    scene.expect(expect![[r#"
        3000 job 1: gang_failed: its node does not know it any more
        3000 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        3000   n1 <- stop job 1 attempt 1 grace 30s
        3000   n1 <- forget 1.1.0 1.1.1
        3500 job 1: attempt_placed: attempt 2 is starting on n1
        3500   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
    "#]]);
}

#[test]
fn what_would_end_its_successor_too_ends_the_gang() {
    type Change = fn(&mut JobSpec);
    let cases: [(&str, Change, RankExit); 4] = [
        ("a line", |_| (), RankExit { matched: Some(everlit_api::rank::LogMatch { policy: 0, line: "x".into() }), ..exit(1, 1_000) }),
        ("no program", |_| (), exit(127, 1_000)),
        ("on", |spec| spec.restart.on = [(Cause::Exit, FailureAction::Fail)].into(), exit(1, 1_000)),
        ("code", |_| (), exit(78, 1_000)),
    ];
    let mut told = String::new();
    for (name, change, exit) in cases {
        let policy = everlit_api::job::LogPolicy { name: None, pattern: "x".into(), action: everlit_api::job::LogAction::CancelRetries };
        let mut spec = JobSpec { log_policies: vec![policy], ..alone(2) };
        change(&mut spec);
        let mut scene = running(spec);
        scene.at(1_000, Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit, lost: false }));
        scene.exits(1_100, rank(1, 1, 1), killed(1_100));
        told += &format!("{name}:\n{}", scene.take());
    }
    expect![[r#"
        a line:
        1000 job 1: gang_failed: rank 0 ended with exit code 1: last words 1
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1100 job 1: log_policy_matched: rank 0 wrote "x" (log policy `x`, cancel_retries: it is not tried again)
        1100 job 1: job_final: rank 0 ended with exit code 1: last words 1; rank 0 wrote "x" (log policy `x`, cancel_retries: it is not tried again)
        1100   n1 <- forget 1.1.0 1.1.1
        1100   n1 <- job 1 ended
        1100   final job 1 failed
        no program:
        1000 job 1: gang_failed: rank 0 ended with exit code 127: last words 127
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1100 job 1: job_final: rank 0 ended with exit code 127: last words 127; it can not be started, and trying again would not help
        1100   n1 <- forget 1.1.0 1.1.1
        1100   n1 <- job 1 ended
        1100   final job 1 failed
        on:
        1000 job 1: gang_failed: rank 0 ended with exit code 1: last words 1; restart.on says that this fails the job
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1100 job 1: job_final: rank 0 ended with exit code 1: last words 1; restart.on says that this fails the job
        1100   n1 <- forget 1.1.0 1.1.1
        1100   n1 <- job 1 ended
        1100   final job 1 failed
        code:
        1000 job 1: gang_failed: rank 0 ended with exit code 78: last words 78; exit code 78 is in restart.no_retry_exit_codes
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1100 job 1: job_final: rank 0 ended with exit code 78: last words 78; exit code 78 is in restart.no_retry_exit_codes
        1100   n1 <- forget 1.1.0 1.1.1
        1100   n1 <- job 1 ended
        1100   final job 1 failed
    "#]].assert_eq(&told);
}

#[test]
fn a_step_that_was_done_before_is_no_progress_and_a_rank_s_failures_in_a_row_are_not_the_job_s() {
    let mut scene = running(alone(2));
    let mut delays = Vec::new();
    for (ms, seat) in [(1_000, 0), (3_000, 2), (5_000, 3)] {
        scene.at(ms - 100, Event::RanksBeat(vec![beat(rank(1, 1, seat), 5)]));
        scene.take();
        scene.exits(ms, rank(1, 1, seat), exit(1, ms));
        let told = scene.take();
        delays.push(told.split("starts again, in ").nth(1).and_then(|rest| rest.split(':').next()).unwrap_or_default().to_string());
        scene.at(ms + 999, Event::Woke);
        starts(&mut scene, ms + 999, seat.max(1) + 1);
    }
    scene.take();
    assert_eq!(delays, ["500 ms", "500 ms", "1000 ms"]);
    let budget = &scene.engine.jobs[&job(1)].budget;
    assert_eq!((budget.counted, budget.start_failures, budget.failures_in_a_row), (3, 0, 0));
}

#[test]
fn a_wait_of_a_gang_that_ends_comes_to_nothing() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 0), exit(1, 1_000));
    scene.at(1_100, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.take();
    scene.at(1_500, Event::Woke).at(3_000, Event::Woke);
    assert_eq!(scene.take(), "");
}

#[test]
fn time_in_which_no_rank_lives_is_a_wait_and_then_a_start() {
    let mut scene = running(alone(2));
    scene.exits(1_000, rank(1, 1, 0), exit(1, 1_000));
    assert!(scene.summary(1).reason.unwrap().contains("only this rank starts again"), "the other one runs on");
    scene.exits(1_100, rank(1, 1, 1), exit(1, 1_100));
    assert_eq!(scene.summary(1).state, JobState::Recovering);
    // Rank 0's wait is over first, and from then on somebody is on the way.
    scene.at(1_500, Event::Woke).at(1_600, Event::Woke);
    starts(&mut scene, 2_000, 2);
    let summary = scene.summary(1);
    assert_eq!((summary.state, summary.reason.as_deref()), (JobState::Running, Some("attempt 1 runs")));
    starts(&mut scene, 2_100, 3);
    scene.at(3_000, Event::Woke);
    let ledger = scene.summary(1).ledger;
    assert_eq!((ledger.backoff, ledger.restoring), (0.5, 0.4));
    scene.take();
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
