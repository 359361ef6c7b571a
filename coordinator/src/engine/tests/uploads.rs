//! Checkpoints in a job's store: who puts which there, what is told of it, and what a gang begins from.

use everlit_api::agent::stored::{StoreFault, Uploaded};
use everlit_api::agent::{CheckpointNews, FromAgent, Resumed};
use everlit_api::store::Trouble;
use expect_test::expect;

use super::*;

fn verified(attempt: u32, step: u64) -> CheckpointNews {
    CheckpointNews { verified: true, ..saved(1, attempt, step) }
}

fn seen(name: &str, news: CheckpointNews) -> Event {
    Event::CheckpointSeen { node: node(name), news }
}

fn uploaded(name: &str, step: u64, kept: &[u64]) -> Event {
    Event::Uploaded { node: node(name), done: Uploaded { job: job(1), step, bytes: 10, took_ms: 5, kept: kept.to_vec() } }
}

fn fault(name: &str, trouble: Trouble) -> Event {
    let fault = StoreFault { job: job(1), step: Some(50), trouble, reason: "it says no".into() };
    Event::StoreFault { node: node(name), fault }
}

/// A job with a store, of one rank, runs on n1; no node copies from another.
fn running(names: &[&str]) -> Scene {
    let mut scene = Scene::with_node();
    let mut spec = command(1);
    spec.checkpoint.to = Some("s3://runs".parse().expect("a place"));
    spec.secrets = [("AWS_SECRET_ACCESS_KEY".to_string(), "hidden".to_string())].into();
    scene.submit(0, 1, spec).start_all(10, 1, 1, 1);
    for name in names {
        scene.at(20, hello(name, vec![]));
    }
    scene.take();
    scene
}

#[test]
fn each_newest_verified_checkpoint_is_put_in_the_store_by_a_node_that_has_it() {
    let mut scene = running(&[]);
    scene.at(1_000, seen("n1", saved(1, 1, 50))).at(1_100, seen("n1", verified(1, 50))).at(1_150, seen("n1", verified(1, 50)));
    scene.expect(expect![[r#"
        1000 job 1: checkpoint_committed: step 50 is saved
        1100   n1 <- Upload(UploadOrder { job: JobId(1), step: 50, to: Place { scheme: S3, bucket: "runs", path: "00000000000000000000000001" }, .. })
    "#]]);
    // A newer one is ordered at once; the node takes it up when it can.
    scene.at(1_200, seen("n1", CheckpointNews { kept: vec![60, 50], ..verified(1, 60) }));
    scene.at(1_300, uploaded("n1", 50, &[50])).at(1_400, uploaded("n1", 60, &[60, 50]));
    scene.expect(expect![[r#"
        1200   n1 <- Upload(UploadOrder { job: JobId(1), step: 60, to: Place { scheme: S3, bucket: "runs", path: "00000000000000000000000001" }, .. })
        1300 job 1: checkpoint_stored: step 50 is in s3://runs/00000000000000000000000001
        1400 job 1: checkpoint_stored: step 60 is in s3://runs/00000000000000000000000001
    "#]]);
    let stored: Vec<_> = scene.engine.job(job(1)).expect("active").checkpoints.iter().map(|own| own.stored.clone()).collect();
    assert_eq!(stored, [60, 50].map(|step| Some(format!("s3://runs/{}/step-{step:012}", job(1)))));
    // What the node no longer has stays known, and what the store no longer has either goes.
    scene.at(2_000, seen("n1", CheckpointNews { kept: vec![70], ..verified(1, 70) }));
    let steps = |scene: &Scene| {
        scene.engine.job(job(1)).expect("active").checkpoints.iter().map(|own| (own.step, own.node.is_some())).collect::<Vec<_>>()
    };
    assert_eq!(steps(&scene), [(70, true), (60, false), (50, false)]);
    scene.at(2_100, uploaded("n1", 70, &[70, 60])).take();
    assert_eq!(steps(&scene), [(70, true), (60, false)]);
}

#[test]
fn an_order_holds_no_secret_in_print() {
    let mut scene = running(&[]);
    scene.at(1_000, seen("n1", verified(1, 50)));
    let told = scene.take();
    assert!(told.contains("UploadOrder") && !told.contains("hidden"), "{told}");
}

#[test]
fn a_node_that_is_back_or_another_that_has_it_goes_on() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", verified(1, 50)));
    scene.take();
    scene.at(2_000, Event::NodeUnlinked { node: node("n1") });
    scene.expect(expect![""]);
    scene.at(2_500, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    assert!(scene.take().contains("n1 <- Upload(UploadOrder"), "its agent may have forgotten");
    scene.at(2_600, Event::CheckpointSeen { node: node("n2"), news: verified(1, 50) });
    scene.take();
    scene.at(3_000, Event::NodeUnlinked { node: node("n1") });
    assert!(scene.take().contains("n2 <- Upload(UploadOrder"));
}

#[test]
fn faults_are_told_once_in_ten_minutes_and_counted_each_time() {
    let mut scene = running(&[]);
    scene.at(1_000, seen("n1", verified(1, 50))).take();
    scene.at(2_000, fault("n1", Trouble::Busy)).at(3_000, fault("n1", Trouble::Busy)).at(4_000, fault("n1", Trouble::Denied));
    scene.at(5_000, uploaded("n1", 50, &[50]));
    scene.at(6_000, fault("n1", Trouble::Denied));
    scene.expect(expect![[r#"
        2000 job 1: store_failed: n1: it says no
        4000 job 1: store_failed: n1: it says no
        5000 job 1: store_works_again: s3://runs/00000000000000000000000001 takes checkpoints again
        5000 job 1: checkpoint_stored: step 50 is in s3://runs/00000000000000000000000001
        6000 job 1: store_failed: n1: it says no
    "#]]);
    let (uploads, bytes, faults) = scene.engine.stores();
    assert_eq!((uploads, bytes), (1, 10));
    assert_eq!(faults.iter().map(|(trouble, count)| (trouble.name(), *count)).collect::<Vec<_>>(), [("denied", 2), ("busy", 2)]);
}

#[test]
fn a_gang_elsewhere_is_told_what_the_store_has() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", verified(1, 50))).at(1_100, uploaded("n1", 50, &[50]));
    scene.at(1_200, seen("n1", CheckpointNews { kept: vec![60, 50], ..verified(1, 60) }));
    scene.at(2_000, Event::NodeUnlinked { node: node("n1") });
    scene.at(9_900, Event::NodeReported { node: node("n2"), load: Default::default() }).take();
    scene.at(10_000, Event::Woke);
    scene.expect(expect![[r#"
        10000 node_lost: n1 was not heard of for 10 s
        10000 job 1: gang_failed: n1 was lost
        10000 job 1: job_queued: waiting for a place: n1 was lost
        10000 job 1: attempt_placed: attempt 2 is starting on n2
        10000 job 1: checkpoint_out_of_reach: the checkpoint of step 60 is on n1 and can not be fetched from there: the job goes on from step 50
        10000   n1 <- ArchiveLogs(ArchiveOrder { job: JobId(1), attempt: 1, to: Place { scheme: S3, bucket: "runs", path: "00000000000000000000000001" }, .. })
        10000   keep the post-mortem of job 1 attempt 1
        10000   n1 <- forget 1.1.0
        10000   n2 <- start job 1 attempt 2 ranks 0+1 port 29501 or 50 from s3://runs/00000000000000000000000001
    "#]]);
    let resumed = Resumed { step: Some(50), fetched_from_store: Some("s3://runs/x".into()), ..Resumed::from_nothing(job(1), 2) };
    scene.at(11_000, Event::AttemptResumed { node: node("n2"), resumed }).at(11_010, seen("n2", verified(1, 50)));
    scene.expect(expect![[r#"
        11000 job 1: attempt_resumed: attempt 2 resumes from the checkpoint of step 50, fetched from s3://runs/x
    "#]]);
    // What the lost node's attempt had done beyond that is left behind.
    let lineage = &scene.engine.job(job(1)).expect("active").lineage;
    assert!(lineage.counts(1, 50) && !lineage.counts(1, 60) && lineage.counts(2, 60));
}

#[test]
fn the_last_checkpoint_of_a_job_is_put_there_and_told_of_after_its_end() {
    let mut scene = running(&[]);
    scene.at(1_000, seen("n1", saved(1, 1, 100))).take();
    scene.exits(1_100, rank(1, 1, 0), exit(0, 1_100));
    scene.at(1_200, fault("n1", Trouble::Busy)).at(1_300, fault("n1", Trouble::Busy)).at(1_400, uploaded("n1", 100, &[100]));
    scene.at(1_500, uploaded("n1", 100, &[100]));
    scene.expect(expect![[r#"
        1100 job 1: job_final: every rank exited 0
        1100   n1 <- ArchiveLogs(ArchiveOrder { job: JobId(1), attempt: 1, to: Place { scheme: S3, bucket: "runs", path: "00000000000000000000000001" }, .. })
        1100   n1 <- forget 1.1.0
        1100   n1 <- Upload(UploadOrder { job: JobId(1), step: 100, to: Place { scheme: S3, bucket: "runs", path: "00000000000000000000000001" }, .. })
        1100   n1 <- job 1 ended
        1100   final job 1 succeeded
        1200 job 1: store_failed: n1: it says no
        1400 job 1: checkpoint_stored: step 100 is in the job's store
    "#]]);
}

#[test]
fn the_last_upload_of_a_job_that_is_over_is_ordered_again_from_a_node_that_is_back_until_it_is_done_or_given_up() {
    let ordered = |scene: &mut Scene| scene.take().matches("n1 <- Upload(UploadOrder").count();
    for (end, why) in [(uploaded("n1", 100, &[100]), "it is there"), (fault("n1", Trouble::Damaged), "it will never be there")] {
        let mut scene = running(&["n2"]);
        scene.at(1_000, seen("n1", saved(1, 1, 100)));
        scene.exits(1_100, rank(1, 1, 0), exit(0, 1_100));
        assert_eq!(ordered(&mut scene), 1);
        scene.at(1_200, fault("n1", Trouble::Busy)).at(2_000, Event::NodeUnlinked { node: node("n1") });
        assert_eq!(ordered(&mut scene), 0, "nobody is told who is not linked");
        scene.at(2_500, hello("n1", vec![]));
        assert_eq!(ordered(&mut scene), 1, "its agent is another and knows nothing of it");
        scene.at(2_600, hello("n2", vec![]));
        assert_eq!(ordered(&mut scene), 0, "it is not on that one");
        scene.at(3_000, end).at(3_100, hello("n1", vec![]));
        assert_eq!(ordered(&mut scene), 0, "{why}");
    }
}

#[test]
fn a_node_speaks_only_of_what_it_keeps() {
    let mut scene = running(&["n2"]);
    scene.at(1_000, seen("n1", verified(1, 50))).take();
    let said = |frame| Event::of_frame(node("n2"), frame).expect("an event");
    scene.at(1_100, said(FromAgent::Uploaded(Uploaded { job: job(1), step: 50, bytes: 1, took_ms: 1, kept: vec![50] })));
    let fault = StoreFault { job: job(1), step: None, trouble: Trouble::Full, reason: "no".into() };
    scene.at(1_200, said(FromAgent::StoreFault(fault)));
    scene.expect(expect![""]);
    assert_eq!(scene.engine.foreign_news(), 2);
}
