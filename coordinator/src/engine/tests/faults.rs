//! Ranks fail: who is named, what is restarted when, and when it is given up.

use everlit_api::agent::Exited;
use everlit_api::job::FailureAction;
use everlit_api::rank::Cause;
use everlit_api::status::JobState;
use expect_test::expect;

use super::*;

#[test]
fn a_killed_rank_restarts_the_gang_after_the_backoff_on_its_own_places() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    assert_eq!(scene.summary(1).state, JobState::Recovering);
    // The places are kept: nobody else gets in between.
    scene.submit(1_001, 2, command(7));
    scene.exits(1_050, rank(1, 1, 0), exit(1, 1_049));
    assert_eq!(scene.summary(2).state, JobState::Queued);
    scene.at(1_499, Event::Woke).at(1_500, Event::Woke);
    scene.start_all(1_510, 1, 2, 2);
    scene.expect(expect![[r#"
        1000 job 1: gang_failed: rank 1 ended with signal 9 (SIGKILL)
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1001 job 2: job_submitted: accepted
        1050 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        1050   n1 <- forget 1.1.0 1.1.1
        1500 job 1: attempt_placed: attempt 2 is starting on n1
        1500   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
        1510 job 1: attempt_resumed: attempt 2 begins anew: there is no checkpoint
        1510 job 1: job_running: all 2 ranks of attempt 2 run
    "#]]);
}

#[test]
fn the_first_to_fail_is_named_by_the_kernel_s_order_not_by_the_news_order() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(10, 1, 1, 2);
    scene.take();
    scene.exits(1_000, rank(1, 1, 0), exit(1, 998)).exits(1_001, rank(1, 1, 1), killed(990));
    let attempts = scene.take();
    assert!(attempts.contains("gang_failed: rank 0 ended with exit code 1: last words 1"), "{attempts}");
    scene.at(2_000, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.take();
}

#[test]
fn what_restart_on_says_is_done_and_no_more() {
    use everlit_api::job::FailureAction;
    use everlit_api::rank::{Cause, Verdict};
    let mut scene = Scene::with_node();
    let mut spec = command(2);
    spec.restart.on = [(Cause::Idle, FailureAction::Alert), (Cause::Signal, FailureAction::Fail)].into();
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, 2);
    scene.take();
    scene.at(500, Event::RankJudged { incarnation: rank(1, 1, 1), verdict: Verdict::Idle, age_ms: 400, stacks: Vec::new() });
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.exits(1_000, rank(1, 1, 1), killed(999)).exits(1_010, rank(1, 1, 0), exit(1, 1_010));
    scene.expect(expect![[r#"
        500 job 1: rank_alert: rank 1 is idle: neither output nor CPU time for 400 ms (heartbeat.idle_timeout); nothing is done about it (restart.on)
        1000 job 1: gang_failed: rank 1 ended with signal 9 (SIGKILL)
        1000   n1 <- stop job 1 attempt 1 grace 30s
        1010 job 1: job_final: rank 1 ended with signal 9 (SIGKILL); restart.on says that this fails the job
        1010   n1 <- forget 1.1.0 1.1.1
        1010   n1 <- job 1 ended
        1010   final job 1 failed
    "#]]);
}

#[test]
fn a_crash_loop_waits_longer_each_time_and_fails_with_the_rank_s_last_words() {
    let mut scene = Scene::with_node();
    let mut spec = command(1);
    spec.restart.max_start_failures = 4;
    scene.submit(0, 1, spec);
    let mut now = 0;
    for attempt in 1..=4 {
        scene.start_all(now, 1, attempt, 1);
        scene.exits(now, rank(1, attempt, 0), exit(3, now));
        now = scene.engine.next_deadline().map_or(now, |at| at.0);
        if attempt < 4 {
            scene.at(now, Event::Woke);
        }
    }
    scene.expect(expect![[r#"
        0 job 1: job_submitted: accepted
        0 job 1: attempt_placed: attempt 1 is starting on n1
        0   n1 <- start job 1 attempt 1 ranks 0+1 port 29500
        0 job 1: job_running: all 1 ranks of attempt 1 run
        0 job 1: gang_failed: rank 0 ended with exit code 3: last words 3
        0 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        0   n1 <- forget 1.1.0
        500 job 1: attempt_placed: attempt 2 is starting on n1
        500   n1 <- start job 1 attempt 2 ranks 0+1 port 29501
        500 job 1: attempt_resumed: attempt 2 begins anew: there is no checkpoint
        500 job 1: job_running: all 1 ranks of attempt 2 run
        500 job 1: gang_failed: rank 0 ended with exit code 3: last words 3
        500 job 1: restart_scheduled: attempt 3 in 1000 ms: restart 2 of 50
        500   n1 <- forget 1.2.0
        1500 job 1: attempt_placed: attempt 3 is starting on n1
        1500   n1 <- start job 1 attempt 3 ranks 0+1 port 29502
        1500 job 1: attempt_resumed: attempt 3 begins anew: there is no checkpoint
        1500 job 1: job_running: all 1 ranks of attempt 3 run
        1500 job 1: gang_failed: rank 0 ended with exit code 3: last words 3
        1500 job 1: restart_scheduled: attempt 4 in 2000 ms: restart 3 of 50
        1500   n1 <- forget 1.3.0
        3500 job 1: attempt_placed: attempt 4 is starting on n1
        3500   n1 <- start job 1 attempt 4 ranks 0+1 port 29503
        3500 job 1: attempt_resumed: attempt 4 begins anew: there is no checkpoint
        3500 job 1: job_running: all 1 ranks of attempt 4 run
        3500 job 1: gang_failed: rank 0 ended with exit code 3: last words 3
        3500 job 1: job_final: rank 0 ended with exit code 3: last words 3; it failed 4 times in a row without a new step (restart.max_start_failures)
        3500   n1 <- forget 1.4.0
        3500   n1 <- job 1 ended
        3500   final job 1 failed
    "#]]);
}

#[test]
fn a_missing_program_is_not_tried_again() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1)).submit(0, 2, command(3));
    scene.start_all(1, 1, 1, 1);
    scene.exits(2, rank(1, 1, 0), exit(127, 2));
    scene.at(
        3,
        Event::StartFailed { node: node("n1"), job: job(2), attempt: 1, reason: "everlit-worker is not built".into(), permanent: true },
    );
    scene.expect(expect![[r#"
        0 job 1: job_submitted: accepted
        0 job 1: attempt_placed: attempt 1 is starting on n1
        0   n1 <- start job 1 attempt 1 ranks 0+1 port 29500
        0 job 2: job_submitted: accepted
        0 job 2: attempt_placed: attempt 1 is starting on n1
        0   n1 <- start job 2 attempt 1 ranks 0+3 port 29501
        1 job 1: job_running: all 1 ranks of attempt 1 run
        2 job 1: gang_failed: rank 0 ended with exit code 127: last words 127
        2 job 1: job_final: rank 0 ended with exit code 127: last words 127; it can not be started, and trying again would not help
        2   n1 <- forget 1.1.0
        2   n1 <- job 1 ended
        2   final job 1 failed
        3 job 2: gang_failed: everlit-worker is not built
        3 job 2: job_final: everlit-worker is not built; it can not be started, and trying again would not help
        3   n1 <- forget 2.1.0 2.1.1 2.1.2
        3   n1 <- job 2 ended
        3   final job 2 failed
    "#]]);
}

#[test]
fn a_lost_shim_is_free() {
    let mut scene = Scene::with_node();
    let mut spec = command(1);
    spec.restart.max_restarts = 0;
    scene.submit(0, 1, spec);
    scene.start_all(1, 1, 1, 1);
    scene.take();
    let lost = RankExit {
        code: None,
        signal: None,
        error: Some("its shim was killed".into()),
        at: Timestamp(50),
        tail: vec![],
        message: None,
        matched: None,
        out_of_memory: false,
        gpu_error: None,
    };
    scene.at(50, Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit: lost, lost: true }));
    scene.expect(expect![[r#"
        50 job 1: gang_failed: rank 0: its shim was killed
        50 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        50   n1 <- forget 1.1.0
    "#]]);
    assert_eq!(scene.summary(1).restarts, 1);
}

#[test]
fn ranks_that_finish_wait_five_minutes_for_the_others() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(1, 1, 1, 2);
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000));
    scene.take();
    scene.at(300_999, Event::Woke);
    scene.expect(expect![[""]]);
    scene.at(301_000, Event::Woke);
    scene.expect(expect![[r#"
        301000 job 1: gang_failed: some ranks exited 0 and 1 others did not within 5 minutes
        301000   n1 <- stop job 1 attempt 1 grace 30s
    "#]]);
}

#[test]
fn the_wait_for_the_others_begins_with_the_first_that_is_done_and_ends_with_a_stop() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(3));
    scene.start_all(1, 1, 1, 3);
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000)).exits(2_000, rank(1, 1, 1), exit(0, 2_000)).at(301_000, Event::Woke);
    assert!(scene.take().contains("301000 job 1: gang_failed: some ranks exited 0 and 1 others did not"));

    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(1, 1, 1, 2);
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000));
    scene.at(300_000, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.take();
    scene.at(301_000, Event::Woke);
    assert_eq!(scene.take(), "");

    // Ranks that are restarted alone end when they do.
    let mut scene = Scene::with_node();
    let mut spec = command(2);
    spec.restart.scope = everlit_api::job::RestartScope::Rank;
    scene.submit(0, 1, spec);
    scene.start_all(1, 1, 1, 2);
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000));
    scene.take();
    scene.at(301_000, Event::Woke);
    assert_eq!(scene.take(), "");
}

#[test]
fn a_rank_that_the_kernel_killed_for_memory_says_so_and_is_told_of_as_such() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(1, 1, 1, 1);
    scene.exits(1_000, rank(1, 1, 0), RankExit { out_of_memory: true, ..killed(1_000) });
    assert!(scene.take().contains("gang_failed: rank 0 was killed by the kernel for want of memory (SIGKILL)"));
    let mut spec = command(1);
    spec.restart.on.insert(Cause::OutOfMemory, FailureAction::Fail);
    scene.submit(2_000, 2, spec);
    scene.start_all(2_001, 2, 1, 1);
    scene.exits(3_000, rank(2, 1, 0), RankExit { out_of_memory: true, ..killed(3_000) });
    assert!(scene.take().contains("final job 2 failed"));
}

#[test]
fn a_stop_in_the_wait_before_a_restart_is_final_at_once() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(1, 1, 1, 1);
    scene.exits(10, rank(1, 1, 0), exit(1, 10));
    scene.take();
    scene.at(20, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.expect(expect![[r#"
        20 job 1: stop_requested: a user asked for it
        20 job 1: job_final: stopped by a user
        20   n1 <- job 1 ended
        20   final job 1 stopped
    "#]]);
    assert!(scene.engine.node_is_empty(&node("n1")));
}

#[test]
fn a_stop_while_the_gang_is_failing_wins() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(1, 1, 1, 2);
    scene.exits(10, rank(1, 1, 0), exit(1, 10));
    scene.at(11, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.take();
    scene.exits(12, rank(1, 1, 1), exit(1, 12));
    scene.expect(expect![[r#"
        12 job 1: job_final: stopped by a user
        12   n1 <- forget 1.1.0 1.1.1
        12   n1 <- job 1 ended
        12   final job 1 stopped
    "#]]);
}

#[test]
fn a_refused_start_ends_a_job_that_is_being_stopped() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.at(1, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.take();
    scene.at(2, Event::StartFailed { node: node("n1"), job: job(1), attempt: 1, reason: "the disk is full".into(), permanent: false });
    scene.expect(expect![[r#"
        2 job 1: job_final: stopped by a user
        2   n1 <- forget 1.1.0 1.1.1
        2   n1 <- job 1 ended
        2   final job 1 stopped
    "#]]);
    assert!(scene.engine.node_is_empty(&node("n1")));
}

#[test]
fn a_shim_that_died_first_is_named_and_free_though_its_news_came_last() {
    let mut scene = Scene::with_node();
    let mut spec = command(2);
    spec.restart.max_restarts = 1;
    scene.submit(0, 1, spec);
    scene.start_all(1, 1, 1, 2);
    scene.exits(52, rank(1, 1, 0), exit(1, 51));
    scene.take();
    let lost = RankExit {
        code: None,
        signal: None,
        error: Some("its shim was killed".into()),
        at: Timestamp(50),
        tail: vec![],
        message: None,
        matched: None,
        out_of_memory: false,
        gpu_error: None,
    };
    scene.at(53, Event::RankExited(Exited { incarnation: rank(1, 1, 1), exit: lost, lost: true }));
    scene.expect(expect![[r#"
        53 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        53   n1 <- forget 1.1.0 1.1.1
    "#]]);
}

#[test]
fn a_drained_rank_that_exits_0_has_not_succeeded() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(1, 1, 1, 1);
    scene.take();
    scene.at(50, Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit: exit(0, 50), lost: true }));
    assert_eq!(scene.summary(1).state, JobState::Recovering);
    scene.take();
}

#[test]
fn steps_told_before_the_resume_is_known_are_not_counted_as_repeated() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.start_all(1, 1, 1, 1);
    scene.at(10, Event::RanksBeat(vec![beat(rank(1, 1, 0), 520)]));
    scene.exits(20, rank(1, 1, 0), killed(20));
    scene.at(520, Event::Woke);
    scene.at(600, Event::RanksBeat(vec![beat(rank(1, 2, 0), 510)]));
    scene.at(610, Event::AttemptResumed { node: node("n1"), resumed: Resumed { step: Some(500), ..Resumed::from_nothing(job(1), 2) } });
    assert_eq!((scene.summary(1).step, scene.summary(1).lost_steps), (Some(510), 10));
    scene.take();
}
