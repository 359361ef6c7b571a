//! Logs in a job's store: who is told to put them there, until when, and what is told of it.

use everlit_api::agent::FromAgent;
use everlit_api::agent::stored::{Archived, StoreFault};
use everlit_api::store::Trouble;
use expect_test::expect;

use super::*;

fn archived(name: &str, attempt: u32) -> Event {
    Event::LogsArchived { node: node(name), done: Archived { job: job(1), attempt, bytes: 10, took_ms: 5 } }
}

/// A job with a place for its logs, of one rank, runs on n1.
fn running() -> Scene {
    let mut scene = Scene::with_node();
    let mut spec = command(1);
    spec.logs.to = Some("s3://logs".parse().expect("a place"));
    spec.secrets = [("AWS_SECRET_ACCESS_KEY".to_string(), "hidden".to_string())].into();
    scene.submit(0, 1, spec).start_all(10, 1, 1, 1).take();
    scene
}

#[test]
fn at_each_attempt_s_end_its_node_is_told_before_it_may_forget_the_ends() {
    let mut scene = running();
    scene.exits(1_000, rank(1, 1, 0), exit(7, 1_000));
    let told = scene.take();
    assert!(!told.contains("hidden"), "{told}");
    expect![[r#"
        1000 job 1: gang_failed: rank 0 ended with exit code 7: last words 7
        1000 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        1000   n1 <- ArchiveLogs(ArchiveOrder { job: JobId(1), attempt: 1, to: Place { scheme: S3, bucket: "logs", path: "00000000000000000000000001" }, .. })
        1000   keep the post-mortem of job 1 attempt 1
        1000   n1 <- forget 1.1.0
    "#]]
    .assert_eq(&told);
    scene.at(1_100, archived("n1", 1)).at(1_200, archived("n1", 1));
    scene.expect(expect![[r#"
        1100 job 1: logs_archived: the log of n1 up to the end of attempt 1 is in the job's store
    "#]]);
    assert_eq!(scene.engine.archived(), (1, 10), "what is said twice counts once");
}

#[test]
fn who_has_not_said_that_it_is_done_is_told_again_when_it_is_back_also_after_a_restart_of_the_coordinator() {
    let mut scene = running();
    scene.exits(1_000, rank(1, 1, 0), exit(7, 1_000)).take();
    let orders = |told: String| told.matches("<- ArchiveLogs(ArchiveOrder { job: JobId(1), attempt: 1").count();
    scene.at(1_100, hello("n1", vec![]));
    assert_eq!(orders(scene.take()), 1);
    scene.restart_coordinator(1_150);
    scene.at(1_200, hello("n1", vec![]));
    assert_eq!(orders(scene.take()), 1);
    scene.at(1_300, archived("n1", 1)).at(1_350, hello("n1", vec![]));
    assert_eq!(orders(scene.take()), 0);
}

#[test]
fn a_job_that_is_over_is_waited_for_and_its_faults_are_told_once() {
    let mut scene = running();
    scene.exits(1_000, rank(1, 1, 0), exit(0, 1_000)).take();
    let fault = |trouble| {
        let fault = StoreFault { job: job(1), step: None, trouble, reason: "it says no".into() };
        Event::StoreFault { node: node("n1"), fault }
    };
    scene.at(1_100, fault(Trouble::Denied)).at(1_200, fault(Trouble::Denied)).at(1_250, hello("n1", vec![]));
    scene.at(1_300, archived("n1", 1)).at(1_400, archived("n1", 1)).at(1_500, hello("n1", vec![]));
    scene.expect(expect![[r#"
        1100 job 1: store_failed: n1: it says no
        1250   n1 <- ArchiveLogs(ArchiveOrder { job: JobId(1), attempt: 1, to: Place { scheme: S3, bucket: "logs", path: "00000000000000000000000001" }, .. })
        1300 job 1: logs_archived: the log of n1 up to the end of attempt 1 is in the job's store
    "#]]);
}

#[test]
fn one_that_is_to_be_removed_and_one_without_a_store_archive_nothing_and_no_other_node_speaks_for_it() {
    let mut scene = running();
    scene.at(20, hello("n2", vec![])).take();
    let said = |frame| Event::of_frame(node("n2"), frame).expect("an event");
    scene.at(900, said(FromAgent::LogsArchived(Archived { job: job(1), attempt: 1, bytes: 1, took_ms: 1 })));
    scene.expect(expect![""]);
    assert_eq!(scene.engine.foreign_news(), 1);
    scene.at(1_000, Event::StopRequested { job: job(1), force: true, delete: true });
    scene.exits(1_100, rank(1, 1, 0), exit(0, 1_100));
    assert!(!scene.take().contains("ArchiveLogs"));
    let mut other = Scene::with_node();
    other.submit(0, 1, command(1)).start_all(10, 1, 1, 1).exits(1_000, rank(1, 1, 0), exit(7, 1_000));
    let told = other.take();
    assert!(!told.contains("ArchiveLogs") && !told.contains("post-mortem"), "{told}");
}
