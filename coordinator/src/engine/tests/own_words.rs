//! A node speaks only for itself: what it says of ranks and files of others is counted, and changes nothing.

use everlit_api::agent::{FromAgent, GpuHolder};
use everlit_api::manifest::SaveError;
use everlit_api::rank::Verdict;
use everlit_api::status::JobState;
use expect_test::expect;

use super::*;

fn with_address(name: &str, ranks: Vec<RankReport>) -> Event {
    let Event::NodeLinked { mut hello } = hello(name, ranks) else { unreachable!("a hello") };
    hello.address = Some(format!("{name}.example"));
    said(name, FromAgent::Hello(*hello))
}

fn said(name: &str, frame: FromAgent) -> Event {
    Event::of_frame(node(name), frame).expect("it concerns the engine")
}

fn resumed(attempt: u32, step: Option<u64>) -> FromAgent {
    FromAgent::Resumed(Resumed { step, ..Resumed::from_nothing(job(1), attempt) })
}

fn started(incarnation: Incarnation) -> FromAgent {
    FromAgent::Started(Started { incarnation, pid: 7, at: Timestamp(1) })
}

fn exited(incarnation: Incarnation, exit: RankExit) -> FromAgent {
    FromAgent::Exited(Exited { incarnation, exit, lost: false })
}

/// Ranks 0 to 7 on one node and the last on the other, and a third node that has none.
fn spread() -> Scene {
    let mut scene = Scene::new();
    for name in ["n1", "n2", "n3"] {
        scene.at(0, with_address(name, vec![]));
    }
    scene.submit(1, 1, command(9));
    scene.take_from("1   n1");
    scene.expect(expect![[r#"
        1   n1 <- start job 1 attempt 1 ranks 0+8 port 29500
        1   n3 <- start job 1 attempt 1 ranks 8+1 port 29500
    "#]]);
    scene
}

/// Everything that a frame can say of a rank or a job.
fn lies(of: u32) -> Vec<FromAgent> {
    let incarnation = rank(1, 1, of);
    vec![
        resumed(1, Some(90)),
        started(incarnation),
        FromAgent::Beats { beats: vec![beat(incarnation, 80)] },
        FromAgent::Judged { incarnation, verdict: Verdict::Stuck, age_ms: 1, stacks: vec![] },
        FromAgent::SaveFailed { incarnation, error: SaveError { step: 4, reason: "full".into() } },
        exited(incarnation, exit(1, 5)),
        FromAgent::StartFailed { job: job(1), attempt: 1, reason: "no".into(), permanent: true },
        FromAgent::GpuHeld { job: job(1), attempt: 1, holders: vec![GpuHolder { gpu: 0, pid: 1, name: "x".into() }] },
        FromAgent::Checkpoint(saved(1, 1, 70)),
        FromAgent::Quarantined { job: job(1), step: 5, reason: "torn".into() },
    ]
}

#[test]
fn a_node_outside_a_gang_has_no_say_in_it() {
    let mut scene = spread();
    let before = serde_json::to_string(&scene.summary(1)).expect("plain data");
    let lies = lies(0);
    let count = lies.len() as u64;
    for lie in lies {
        scene.at(2, said("n2", lie));
    }
    scene.expect(expect![""]);
    // One frame counts once, and of a frame of several ranks each.
    assert_eq!(scene.engine.foreign_news(), count);
    scene.at(2, said("n2", FromAgent::Beats { beats: vec![beat(rank(1, 1, 0), 5), beat(rank(1, 1, 8), 5)] }));
    assert_eq!(scene.engine.foreign_news(), count + 2);
    scene.now = Timestamp(1);
    assert_eq!(serde_json::to_string(&scene.summary(1)).expect("plain data"), before);
}

#[test]
fn a_node_of_a_gang_speaks_for_its_own_ranks_alone() {
    let mut scene = spread();
    for r in 0..8 {
        scene.at(2, said("n1", started(rank(1, 1, r))));
    }
    // The other's rank, from the wrong node, then from the right one.
    scene.at(3, said("n1", started(rank(1, 1, 8))));
    assert_eq!((scene.summary(1).state, scene.engine.foreign_news()), (JobState::Starting, 1));
    scene.at(4, said("n3", started(rank(1, 1, 8))));
    assert_eq!((scene.summary(1).state, scene.engine.foreign_news()), (JobState::Running, 1));
    scene.at(5, said("n3", exited(rank(1, 1, 0), exit(1, 5))));
    let mixed = FromAgent::Beats { beats: vec![beat(rank(1, 1, 0), 40), beat(rank(1, 1, 8), 41)] };
    scene.at(6, said("n3", mixed));
    let summary = scene.summary(1);
    assert_eq!((summary.ranks[0].step, summary.ranks[8].step), (None, Some(41)), "its own is heard");
    assert_eq!((summary.state, scene.engine.foreign_news()), (JobState::Running, 3));
    scene.expect(expect![[r#"
        4 job 1: job_running: all 9 ranks of attempt 1 run
    "#]]);
}

#[test]
fn a_hello_names_ranks_of_others_in_vain() {
    let mut scene = spread();
    for (name, r) in (0..8).map(|r| ("n1", r)).chain([("n3", 8)]) {
        scene.at(2, said(name, started(rank(1, 1, r))));
    }
    scene.take();
    // Linked before: what it says now can not be what a disk has lost.
    let ended = |r| RankReport { exit: Some(exit(1, 3)), pid: None, ..alive(rank(1, 1, r), 1) };
    scene.at(3, with_address("n2", vec![alive(rank(1, 1, 0), 1), ended(1)]));
    scene.at(3, with_address("n3", vec![alive(rank(1, 1, 8), 7), ended(3)]));
    let Event::Said { event, .. } = with_address("n2", vec![alive(rank(1, 40, 0), 1)]) else { unreachable!("said") };
    let Event::NodeLinked { mut hello } = *event else { unreachable!("a hello") };
    hello.checkpoints = vec![saved(1, 1, 70), saved(1, 30, 80)];
    scene.at(3, said("n2", FromAgent::Hello(*hello)));
    scene.expect(expect![[r#"
        3   n2 <- stop job 1 attempt 1 grace 0s
        3   n2 <- forget 1.1.1
        3   n2 <- stop job 1 attempt 40 grace 0s
    "#]]);
    let summary = scene.summary(1);
    assert_eq!((summary.state, summary.attempt, summary.last_checkpoint.is_none()), (JobState::Running, 1, true));
    assert_eq!(scene.engine.foreign_news(), 5);
    scene.exits(4, rank(1, 1, 0), exit(1, 4));
    for r in 1..9 {
        scene.exits(4, rank(1, 1, r), exit(1, 4));
    }
    scene.at(1_000, Event::Woke);
    scene.take();
    assert_eq!(scene.summary(1).attempt, 2, "no number was lost to what it said");
}

#[test]
fn what_a_disk_may_have_lost_is_believed_of_a_node_once_and_within_reason() {
    let mut scene = spread();
    scene.restart_coordinator(10);
    // Numbers end somewhere: no disk loses so many attempts.
    scene.at(11, with_address("n2", vec![alive(rank(1, u32::MAX, 0), 1)]));
    assert_eq!(scene.engine.foreign_news(), 1);
    // A rank of its own gang that is placed on another node: two of one rank may live.
    scene.at(12, with_address("n3", vec![alive(rank(1, 1, 8), 1), alive(rank(1, 1, 0), 2)]));
    scene.expect(expect![[r#"
        11 node_ready: n2 joined
        11   n2 <- stop job 1 attempt 4294967295 grace 0s
        12 job 1: gang_failed: its attempt runs on n3, too: the coordinator's disk has lost what it said was durable
        12   n1 <- stop job 1 attempt 1 grace 0s
        12   n3 <- stop job 1 attempt 1 grace 0s
        12   n1 <- stop job 1 attempt 1 grace 0s
        12   n3 <- stop job 1 attempt 1 grace 0s
    "#]]);
    // Checkpoints of which nothing is on record: their node is one of the job's from then on.
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1));
    scene.restart_coordinator(10);
    let Event::NodeLinked { mut hello } = hello("n2", vec![]) else { unreachable!("a hello") };
    hello.checkpoints = vec![saved(1, 3, 50)];
    scene.at(11, said("n2", FromAgent::Hello(*hello)));
    let verified = CheckpointNews { verified: true, ..saved(1, 3, 50) };
    scene.at(12, said("n2", FromAgent::Checkpoint(verified)));
    scene.take();
    assert_eq!(scene.summary(1).last_checkpoint.map(|at| (at.step, at.verified)), Some((50, true)));
    assert_eq!(scene.engine.foreign_news(), 0);
}

#[test]
fn spares_and_seats_that_moved_are_their_node_s() {
    let mut scene = Scene::with_node();
    let mut spec = command(2);
    spec.restart.spares = 1;
    scene.at(0, hello("n2", vec![]));
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, 2);
    scene.at(11, said("n2", started(rank(1, 1, 2))));
    assert_eq!((scene.engine.foreign_news(), scene.summary(1).spares[0].pid), (1, None));
    scene.at(12, said("n1", started(rank(1, 1, 2))));
    assert_eq!((scene.engine.foreign_news(), scene.summary(1).spares[0].pid), (1, Some(7)));
    // The end of what is no member any more is heard from its node, and forgotten; of another attempt nobody is asked.
    scene.at(13, said("n2", exited(rank(1, 9, 0), exit(0, 13))));
    assert_eq!((scene.engine.foreign_news(), scene.engine.stale_news()), (1, 1));
    scene.take();
}
