use std::time::Duration;

use serde_json::json;

use super::House;
use super::fake::{happening, id, record};
use crate::agent::log::Stream;
use crate::auth::{NewToken, Role};
use crate::client::{Client, Error, EventNews, ListRequest, LogNews, LogRequest};
use crate::control::{EventItem, LogItem};
use crate::ids::NodeId;
use crate::problem::Code;
use crate::request::PurgeRequest;
use crate::status::JobState;
use crate::time::Millis;

async fn served(house: &House) -> Client {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    tokio::spawn(axum::serve(listener, house.doors.clone()).into_future());
    Client::new(&url, Some(super::fake::full(super::fake::ADMIN)), None).expect("a client")
}

#[tokio::test]
async fn every_call_reaches_its_door_and_reads_its_answer() {
    let house = House::new();
    let client = served(&house).await;
    let job = client.submit(&json!({"world_size": 3}), None).await.expect("accepted");
    assert_eq!((job.job_id, house.asked().as_str()), (id(), "submit world 3 of ada"));
    client.submit(&json!({}), Some("key")).await.expect("accepted");
    assert!(house.asked().contains("key key"));
    assert_eq!(client.plan(&json!({"world_size": 2})).await.expect("a plan").spec.world_size, 2);
    house.asked();
    let labels = vec![("a".into(), "b c".into())];
    let list = ListRequest {
        limit: Some(9),
        after: Some("x&y".into()),
        states: vec![JobState::Running, JobState::Failed],
        name: Some("n m".into()),
        labels,
    };
    assert_eq!(client.jobs(&list).await.expect("a page").data.len(), 1);
    assert_eq!(
        house.asked(),
        r#"ListQuery { limit: 9, after: Some("x&y"), states: [Running, Failed], name: Some("n m"), labels: [("a", "b c")], user: None }"#
    );
    assert_eq!(client.summaries(&ListRequest::default()).await.expect("a page").data[0].step, Some(3));
    assert_eq!(client.summary(id()).await.expect("a summary").total_steps, Some(10));
    assert_eq!(client.job(id()).await.expect("a job").world_size, 2);
    house.asked();
    client.stop(id(), true).await.expect("stopped");
    client.checkpoint(id()).await.expect("told");
    client.delete(id(), true, false).await.expect("removed");
    assert_eq!(house.asked(), "stop force true\nsave\ndelete stop_first true force false");
    let purge = PurgeRequest { older_than: Millis::secs(60), states: vec![JobState::Failed], dry_run: true };
    assert_eq!(client.purge(&purge).await.expect("purged").removed, vec![id()]);
    assert_eq!(client.events(id(), 3, Some("2")).await.expect("a page").data[0].id, "4");
    assert_eq!(client.attempts(id()).await.expect("a page").data.len(), 5);
    assert_eq!(client.metrics(id(), 500).await.expect("a page").data.len(), 500);
    assert!(client.checkpoints(id()).await.expect("a page").data.is_empty());
    assert_eq!(client.explain(id()).await.expect("reasons").reason, "no node");
    assert_eq!(client.nodes().await.expect("a page").data.len(), 3);
    assert_eq!(client.node(&NodeId("a".into())).await.expect("a node").node.0, "a");
    house.asked();
    let odd = NodeId("my/node".into());
    client.cordon(&odd).await.expect("done");
    client.uncordon(&odd).await.expect("done");
    client.drain(&odd, None).await.expect("done");
    client.drain(&odd, Some(Millis::secs(300))).await.expect("done");
    assert_eq!(house.asked(), "cordon my/node true\ncordon my/node false\ndrain my/node\ndrain my/node within 5m");
    assert_eq!(client.status().await.expect("a status").version, "0.1.0");
    assert_eq!(client.version().await.expect("a version"), "0.1.0");
    assert!(client.prometheus().await.expect("text").contains("x 1"));
    client.health().await.expect("alive");
    assert_eq!(client.whoami().await.expect("somebody").user.as_deref(), Some("ada"));
    let wanted = NewToken { user: "eve".into(), role: Role::Viewer, ttl: Millis::secs(3_600) };
    house.asked();
    let made = client.create_token(&wanted).await.expect("made");
    assert_eq!((made.about.role, house.asked()), (Role::Viewer, format!("{wanted:?}")));
    let listed = client.tokens().await.expect("a page").data;
    assert_eq!(client.revoke_token(&listed[0].id).await.expect("revoked").id, listed[0].id);
    house.asked();
    assert!(client.audit(7, Some("a&b")).await.expect("a page").data.is_empty());
    assert_eq!(house.asked(), r#"audit before None of Some("a&b") limit 7"#);
    client.ready().await.expect("ready");
}

#[tokio::test]
async fn problems_are_decoded_with_every_fault() {
    let client = served(&House::new()).await;
    let error = client.submit(&json!({"world_size": 0, "nam": 1}), None).await.expect_err("faults");
    assert_eq!(error.problem().map(|problem| (problem.code, problem.errors.len())), Some((Code::Invalid, 2)));
    let text = error.to_string();
    assert!(text.contains("/world_size must be") && text.contains("/nam is not a known field"), "{text}");
    let conflict = client.restart(id()).await.expect_err("final");
    assert_eq!(conflict.problem().map(|problem| problem.code), Some(Code::Conflict));
}

#[tokio::test]
async fn nobody_listening_is_told_with_the_remedy() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let client = Client::new(&format!("http://{free}"), None, None).expect("a client");
    let error = client.status().await.expect_err("nobody");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&format!("http://{free}")) && text.contains("everlit up") && text.contains("EVERLIT_URL"), "{text}");
    for bad in ["", "here", "ftp://x"] {
        assert!(Client::new(bad, None, None).is_err(), "{bad}");
    }
    let no_ca = Client::new("https://127.0.0.1:1", None, Some(b"no PEM")).expect_err("no certificate").to_string();
    assert!(no_ca.contains("no certificate"), "{no_ca}");
}

#[tokio::test]
async fn a_followed_log_survives_a_broken_connection() {
    let house = House::new();
    let client = served(&house).await;
    // The first connection ends after two records without a word.
    *house.fake.log.lock().expect("lock") = vec![record(b"a\nb\n", 0, 0, Stream::Stdout, 0), record(b"c\n", 40, 0, Stream::Stderr, 1)];
    let mut stream = client.follow_logs(id(), &LogRequest { tail: Some(3), ..LogRequest::default() });
    let mut lines = Vec::new();
    for _ in 0..3 {
        let Some(LogNews::Line(line)) = stream.next().await.expect("news") else { panic!("a line") };
        lines.push(line.line);
    }
    assert!(house.asked().contains("tail: Some(3), after: None"));
    *house.fake.log.lock().expect("lock") = vec![
        record(b"d\n", 77, 0, Stream::Stdout, 0),
        LogItem::Gap { source: 0, bytes: 5, next: crate::agent::log::LogPosition { segment: 1, offset: 0, line: 0 } },
        LogItem::Missing { node: crate::ids::NodeId("n2".into()), reason: "it is away".into() },
        LogItem::End(JobState::Stopped),
    ];
    let next = tokio::time::timeout(Duration::from_secs(10), stream.next()).await.expect("comes back");
    let Ok(Some(LogNews::Line(line))) = next else { panic!("a line: {next:?}") };
    lines.push(line.line);
    assert_eq!(lines, ["a", "b", "c", "d"]);
    assert!(house.asked().contains("tail: None, after: Some(LogPlace([LogPosition { segment: 0, offset: 78, line: 0 }]))"));
    assert_eq!(stream.next().await.expect("news"), Some(LogNews::Gap(5)));
    let missing = LogNews::Missing { node: "n2".into(), reason: "it is away".into() };
    assert_eq!(stream.next().await.expect("news"), Some(missing));
    assert_eq!(stream.next().await.expect("news"), Some(LogNews::End(JobState::Stopped)));
    assert_eq!(stream.next().await.expect("news"), None);
}

#[tokio::test]
async fn followed_events_end_with_the_job_and_refusals_end_at_once() {
    let house = House::new();
    let client = served(&house).await;
    *house.fake.happenings.lock().expect("lock") = vec![happening(4), EventItem::End(JobState::Failed)];
    let mut stream = client.follow_events(Some(id()), None);
    assert!(matches!(stream.next().await, Ok(Some(EventNews::Event(event))) if event.event == "rank_exited"));
    assert_eq!(stream.next().await.expect("news"), Some(EventNews::End(JobState::Failed)));
    assert_eq!(stream.next().await.expect("news"), None);
    let unknown = crate::ids::JobId::from_parts(1, 1);
    let refused = client.follow_logs(unknown, &LogRequest::default()).next().await.expect_err("no such job");
    assert_eq!(refused.problem().map(|problem| problem.code), Some(Code::NotFound));
}

#[tokio::test]
async fn raw_logs_come_whole_or_as_an_error() {
    let house = House::new();
    let client = served(&house).await;
    *house.fake.log.lock().expect("lock") = vec![record(b"a\xff\n", 0, 0, Stream::Stdout, 0), LogItem::CaughtUp];
    let mut text = client.logs(id(), &LogRequest::default(), false).await.expect("a log");
    assert_eq!(text.chunk().await.expect("bytes").as_deref(), Some(b"a\xff\n".as_slice()));
    assert_eq!(text.chunk().await.expect("the end"), None);
    let lost = crate::problem::Problem::new(Code::NodeUnavailable, "away");
    *house.fake.log.lock().expect("lock") = vec![record(b"a\n", 0, 0, Stream::Stdout, 0), LogItem::Failed(lost)];
    let mut text = client.logs(id(), &LogRequest::default(), false).await.expect("a log");
    let mut cut_off = false;
    for _ in 0..2 {
        cut_off |= text.chunk().await.is_err();
    }
    assert!(cut_off);
}
