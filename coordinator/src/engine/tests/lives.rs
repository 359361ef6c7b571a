//! Jobs without faults: placed, run, finished, stopped, restarted and removed by users.

use everlit_api::agent::Exited;
use everlit_api::rank::{RankState, Verdict};
use everlit_api::status::JobState;
use everlit_api::time::Millis;
use expect_test::expect;

use super::*;

#[test]
fn a_job_that_succeeds_is_final_and_leaves_nothing_behind() {
    let mut scene = Scene::with_node();
    scene.submit(10, 1, command(2));
    scene.start_all(20, 1, 1, 2);
    assert_eq!(scene.summary(1).state, JobState::Running);
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000)).exits(1_010, rank(1, 1, 1), exit(0, 1_010));
    scene.expect(expect![[r#"
        10 job 1: job_submitted: accepted
        10 job 1: attempt_placed: attempt 1 is starting on n1
        10   n1 <- start job 1 attempt 1 ranks 0+2 port 29500
        20 job 1: job_running: all 2 ranks of attempt 1 run
        1010 job 1: job_final: every rank exited 0
        1010   n1 <- forget 1.1.0 1.1.1
        1010   n1 <- job 1 ended
        1010   final job 1 succeeded
    "#]]);
    assert!(scene.engine.node_is_empty(&node("n1")));
    assert_eq!(scene.engine.jobs().count(), 0);
}

#[test]
fn jobs_wait_in_order_and_start_when_there_is_room() {
    let mut scene = Scene::with_node();
    scene.submit(1, 1, command(8)).submit(2, 2, command(4)).submit(3, 3, command(4));
    scene.take();
    assert_eq!(scene.summary(2).reason.as_deref(), Some("queued: n1 needs 4 ranks, has free places for 0"));
    assert!(scene.summary(3).reason.is_some_and(|why| why.starts_with("queued behind 1 jobs")));
    scene.start_all(4, 1, 1, 8);
    scene.take();
    for r in 0..8 {
        scene.exits(100, rank(1, 1, r), exit(0, 100));
    }
    scene.expect(expect![[r#"
        100 job 1: job_final: every rank exited 0
        100 job 2: attempt_placed: attempt 1 is starting on n1
        100 job 3: attempt_placed: attempt 1 is starting on n1
        100   n1 <- forget 1.1.0 1.1.1 1.1.2 1.1.3 1.1.4 1.1.5 1.1.6 1.1.7
        100   n1 <- job 1 ended
        100   n1 <- start job 2 attempt 1 ranks 0+4 port 29501
        100   n1 <- start job 3 attempt 1 ranks 0+4 port 29502
        100   final job 1 succeeded
    "#]]);
}

#[test]
fn what_never_fits_stays_queued_says_why_and_holds_back_nobody() {
    let mut scene = Scene::with_node();
    scene.submit(1, 1, command(9)).submit(2, 2, command(1));
    let why = scene.summary(1).reason.expect("a reason");
    assert_eq!(why, "queued: no node can ever hold it: n1 can never hold it: needs 9 ranks, has places for 8");
    assert_eq!(scene.summary(2).state, JobState::Starting);
    scene.take();
    // A larger node joins: it starts there.
    let Event::NodeLinked { mut hello } = hello("n2", vec![]) else { unreachable!() };
    hello.capacity.slots = 64;
    scene.at(3, Event::NodeLinked { hello });
    scene.expect(expect![[r#"
        3 node_ready: n2 joined
        3 job 1: attempt_placed: attempt 1 is starting on n2
        3   n2 <- start job 1 attempt 1 ranks 0+9 port 29501
    "#]]);
}

#[test]
fn a_stop_is_asked_once_forced_twice_and_ends_stopped() {
    let mut scene = Scene::with_node();
    scene.submit(1, 1, command(2));
    scene.start_all(2, 1, 1, 2);
    scene.take();
    let stop = |force| Event::StopRequested { job: job(1), force, delete: false };
    scene.at(10, stop(false)).at(11, stop(false)).at(12, stop(true));
    assert_eq!(scene.summary(1).ranks[0].state, RankState::Stopping);
    scene.exits(20, rank(1, 1, 0), killed(20)).exits(21, rank(1, 1, 1), exit(0, 21));
    scene.expect(expect![[r#"
        10 job 1: stop_requested: a user asked for it
        10   n1 <- stop job 1 attempt 1 grace 30s
        12   n1 <- stop job 1 attempt 1 grace 0s
        21 job 1: job_final: stopped by a user
        21   n1 <- forget 1.1.0 1.1.1
        21   n1 <- job 1 ended
        21   final job 1 stopped
    "#]]);
}

#[test]
fn a_queued_job_is_stopped_at_once_and_a_removed_one_is_marked() {
    let mut scene = Scene::new();
    scene.submit(1, 1, command(1)).submit(2, 2, command(1));
    scene.at(3, Event::StopRequested { job: job(1), force: false, delete: false });
    scene.at(4, Event::StopRequested { job: job(2), force: false, delete: true });
    scene.expect(expect![[r#"
        1 job 1: job_submitted: accepted
        2 job 2: job_submitted: accepted
        3 job 1: stop_requested: a user asked for it
        3 job 1: job_final: stopped by a user
        3   final job 1 stopped
        4 job 2: stop_requested: a user asked for it
        4 job 2: job_final: stopped by a user
        4   final job 2 stopped, delete
    "#]]);
}

#[test]
fn a_user_s_restart_is_free_and_at_once() {
    let mut scene = Scene::with_node();
    scene.submit(1, 1, command(1));
    scene.start_all(2, 1, 1, 1);
    scene.take();
    scene.at(10, Event::RestartRequested { job: job(1) });
    scene.exits(20, rank(1, 1, 0), exit(143, 20));
    scene.expect(expect![[r#"
        10 job 1: restart_requested: a user asked for it
        10   n1 <- stop job 1 attempt 1 grace 30s
        20 job 1: attempt_placed: attempt 2 is starting on n1
        20   n1 <- forget 1.1.0
        20   n1 <- start job 1 attempt 2 ranks 0+1 port 29501
    "#]]);
    assert_eq!(scene.summary(1).restarts, 0);
}

#[test]
fn a_time_limit_ends_it_as_failed() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, JobSpec { time_limit: Some(Millis::secs(5)), ..command(1) });
    scene.start_all(10, 1, 1, 1);
    scene.take();
    assert_eq!(scene.engine.next_deadline(), Some(Timestamp(5_000)));
    scene.at(5_000, Event::Woke);
    scene.exits(5_100, rank(1, 1, 0), exit(143, 5_100));
    scene.expect(expect![[r#"
        5000 job 1: time_limit_reached: ran for 5s (time_limit)
        5000   n1 <- stop job 1 attempt 1 grace 30s
        5100 job 1: job_final: its time limit of 5s was reached
        5100   n1 <- forget 1.1.0
        5100   n1 <- job 1 ended
        5100   final job 1 failed
    "#]]);
}

#[test]
fn steps_checkpoints_and_repeats_are_counted() {
    let mut scene = Scene::with_node();
    let mut spec = JobSpec::default_for(2);
    spec.restart.backoff.jitter = 0.0;
    scene.submit(0, 1, spec);
    scene.start_all(100, 1, 1, 2);
    let beats = |attempt, step| Event::RanksBeat(vec![beat(rank(1, attempt, 0), step), beat(rank(1, attempt, 1), step)]);
    scene.at(200, beats(1, 1)).at(1_200, beats(1, 11));
    scene.at(1_300, Event::CheckpointSeen { node: node("n1"), news: saved(1, 1, 10) });
    scene.at(2_200, beats(1, 21));
    assert_eq!((scene.summary(1).step, scene.summary(1).progress), (Some(21), Some(0.21)));
    scene.take();
    scene.exits(2_300, rank(1, 1, 1), killed(2_300)).exits(2_400, rank(1, 1, 0), exit(1, 2_400));
    scene.at(2_800, Event::Woke);
    scene.at(
        2_810,
        Event::AttemptResumed {
            node: node("n1"),
            resumed: Resumed { step: Some(10), path: Some("/c/10".into()), ..Resumed::from_nothing(job(1), 2) },
        },
    );
    scene.start_all(2_820, 1, 2, 2);
    // The step that was loaded is not a step done.
    scene.at(2_900, beats(2, 10));
    assert_eq!(scene.summary(1).step, None);
    scene.at(3_000, beats(2, 12)).at(4_000, beats(2, 22));
    let summary = scene.summary(1);
    assert_eq!((summary.step, summary.lost_steps, summary.restarts, summary.attempt), (Some(22), 11, 1, 2));
    let ledger = summary.ledger;
    let sum = ledger.starting + ledger.restoring + ledger.training + ledger.repeated + ledger.backoff;
    assert!((sum - 4.0).abs() < 1e-9, "{ledger:?}");
    assert!((ledger.repeated - 1.0).abs() < 1e-9 && (ledger.backoff - 0.4).abs() < 1e-9, "{ledger:?}");
    scene.expect(expect![[r#"
        2300 job 1: gang_failed: rank 1 ended with signal 9 (SIGKILL)
        2300   n1 <- stop job 1 attempt 1 grace 30s
        2400 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        2400   n1 <- forget 1.1.0 1.1.1
        2800 job 1: attempt_placed: attempt 2 is starting on n1
        2800   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
        2810 job 1: attempt_resumed: attempt 2 resumes from the checkpoint of step 10
        2820 job 1: job_running: all 2 ranks of attempt 2 run
    "#]]);
}

#[test]
fn a_silent_rank_ends_the_gang_and_stale_news_changes_nothing() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(2));
    scene.start_all(100, 1, 1, 2);
    scene.take();
    let judged = Event::RankJudged { incarnation: rank(1, 1, 1), verdict: Verdict::Silent, age_ms: 10_000, stacks: Vec::new() };
    scene.at(20_000, judged.clone());
    scene.exits(20_010, rank(1, 1, 0), killed(20_009)).exits(20_011, rank(1, 1, 1), killed(20_010));
    scene.at(20_500, Event::Woke);
    scene.expect(expect![[r#"
        20000 job 1: gang_failed: rank 1 is silent: no heartbeat for 10000 ms (heartbeat.timeout 10s)
        20000   n1 <- stop job 1 attempt 1 grace 0s
        20011 job 1: node_blamed: the failure of rank 1 may be the machine's: 1 on n1 in 24 h, one may be chance
        20011 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        20011   n1 <- forget 1.1.0 1.1.1
        20500 job 1: attempt_placed: attempt 2 is starting on n1
        20500   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
    "#]]);
    // The first attempt is over: nothing that is said about it counts.
    scene.at(20_600, judged);
    scene.at(20_600, Event::RankExited(Exited { incarnation: rank(1, 1, 0), exit: exit(0, 1), lost: false }));
    scene.at(20_600, Event::StartFailed { node: node("n1"), job: job(1), attempt: 1, reason: "late".into(), permanent: true });
    assert_eq!(scene.engine.stale_news(), 3);
    assert_eq!(scene.summary(1).attempt, 2);
}
