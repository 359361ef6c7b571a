use axum::body::Body;
use axum::http::StatusCode;
use expect_test::{Expect, expect};
use http_body_util::BodyExt;
use tower::ServiceExt;

use super::fake::{Fake, happening, id, record};
use super::{House, Policy, request, router};
use crate::agent::log::{FLAG_DROPPED, FLAG_PARTIAL, LogPosition, Stream};
use crate::control::{EventItem, LogItem};
use crate::ids::NodeId;
use crate::problem::{Code, Problem};
use crate::status::JobState;

fn script() -> Vec<LogItem> {
    vec![
        record(b"step=1 loss=2.5\nwith \"quotes\" \\ and\ttab\r\n\x1b[1mbold\x07\n", 0, 0, Stream::Stdout, 0),
        record(b"caf\xc3\xa9 \xff\xfe\nhalf of a", 100, FLAG_PARTIAL, Stream::Stderr, 1),
        record(b" line\n", 200, 0, Stream::Stderr, 1),
        record(b"4096", 300, FLAG_DROPPED, Stream::Stdout, 0),
        torn(b"half a li", 340, 0),
        torn(b"40", 380, FLAG_DROPPED),
        LogItem::Gap { source: 0, bytes: 77, next: LogPosition { segment: 2, offset: 0, line: 0 } },
        record(b"no end", 0, 0, Stream::Stdout, 0),
        LogItem::End(JobState::Succeeded),
    ]
}

/// What a full disk leaves: less than was to be written.
fn torn(data: &[u8], offset: u64, flags: u8) -> LogItem {
    let LogItem::Record { source, mut header, data, at, next } = record(data, offset, flags, Stream::Stdout, 0) else { unreachable!() };
    header.len += 10;
    LogItem::Record { source, header, data, at, next }
}

async fn stream(items: Vec<LogItem>, query: &str, last_event_id: Option<&str>) -> (String, String) {
    let house = House::new();
    *house.fake.log.lock().expect("lock") = items;
    let mut ask = request("GET", &format!("/jobs/{}/logs/stream{query}", id()));
    if let Some(id) = last_event_id {
        ask = ask.header("last-event-id", id);
    }
    let reply = house.send(ask.body(Body::empty()).expect("request")).await;
    assert_eq!((reply.status, reply.header("content-type")), (StatusCode::OK, "text/event-stream; charset=utf-8"));
    (reply.text(), house.asked())
}

fn check(actual: &str, expected: Expect) {
    expected.assert_eq(actual);
}

#[tokio::test]
async fn a_log_streams_line_by_line() {
    let (text, asked) = stream(script(), "?rank=0&tail=10", None).await;
    expect!["LogQuery { rank: Some(0), attempt: None, tail: Some(10), after: None, follow: true }"].assert_eq(&asked);
    check(
        &text,
        expect![[r#"
            retry: 3000

            id: 0-0-1
            event: log
            data: {"rank":0,"attempt":1,"stream":"stdout","time":"2026-01-01T00:00:00.123Z","line":"step=1 loss=2.5"}

            id: 0-0-2
            event: log
            data: {"rank":0,"attempt":1,"stream":"stdout","time":"2026-01-01T00:00:00.123Z","line":"with \"quotes\" \\ and\ttab"}

            id: 0-87-0
            event: log
            data: {"rank":0,"attempt":1,"stream":"stdout","time":"2026-01-01T00:00:00.123Z","line":"\u001b[1mbold\u0007"}

            id: 0-100-1
            event: log
            data: {"rank":1,"attempt":1,"stream":"stderr","time":"2026-01-01T00:00:00.123Z","line":"café ��"}

            id: 0-154-0
            event: log
            data: {"rank":1,"attempt":1,"stream":"stderr","time":"2026-01-01T00:00:00.123Z","line":"half of a","partial":true}

            id: 0-242-0
            event: log
            data: {"rank":1,"attempt":1,"stream":"stderr","time":"2026-01-01T00:00:00.123Z","line":" line"}

            id: 0-340-0
            event: gap
            data: {"bytes":4096,"rank":0,"attempt":1}

            id: 0-385-0
            event: log
            data: {"rank":0,"attempt":1,"stream":"stdout","time":"2026-01-01T00:00:00.123Z","line":"half a li","partial":true}

            id: 2-0-0
            event: gap
            data: {"bytes":77}

            id: 0-42-0
            event: log
            data: {"rank":0,"attempt":1,"stream":"stdout","time":"2026-01-01T00:00:00.123Z","line":"no end"}

            id: 0-42-0
            event: end
            data: {"state":"succeeded"}

        "#]],
    );
}

#[tokio::test]
async fn a_stream_goes_on_inside_a_record() {
    for (query, header) in [("?after=0-0-2", None), ("?after=9-9-9&tail=5", Some("0-0-2"))] {
        let (text, asked) = stream(script().drain(..1).collect(), query, header).await;
        expect![
            "LogQuery { rank: None, attempt: None, tail: None, after: Some(LogPlace([LogPosition { segment: 0, offset: 0, line: 2 }])), follow: true }"
        ]
        .assert_eq(&asked);
        check(
            &text,
            expect![[r#"
                retry: 3000

                id: 0-87-0
                event: log
                data: {"rank":0,"attempt":1,"stream":"stdout","time":"2026-01-01T00:00:00.123Z","line":"\u001b[1mbold\u0007"}

            "#]],
        );
    }
}

/// Every cut of a stream, gone on from the last id seen, gives each line once.
#[tokio::test]
async fn any_reconnect_gives_every_line_once() {
    let whole = stream(script(), "", None).await.0;
    let events: Vec<&str> = whole.split_inclusive("\n\n").skip(1).collect();
    for (cut, seen) in events.iter().enumerate().take(3) {
        let id = seen.lines().next().and_then(|line| line.strip_prefix("id: ")).expect("an id");
        let position: LogPosition = id.parse().expect("a position");
        // What a control gives after a place: the record at that place, or what follows it.
        let rest = script()
            .into_iter()
            .filter(|item| !matches!(item, LogItem::Record { at, next, .. } if at.segment == 0 && (next.offset <= position.offset)));
        let again = stream(rest.collect(), "", Some(id)).await.0;
        let got: Vec<&str> = again.split_inclusive("\n\n").skip(1).collect();
        if !id.ends_with("-0") {
            assert_eq!(got[..2 - cut], events[cut + 1..3], "after {id}");
        }
        assert!(got.iter().all(|event| !events[..=cut].contains(event)), "after {id}");
    }
}

#[tokio::test]
async fn a_tail_that_begins_inside_a_record_keeps_its_numbers() {
    let LogItem::Record { source, header, data, at, next } = script().remove(0) else { unreachable!("a record") };
    let data = data.slice("step=1 loss=2.5\n".len()..);
    let item = LogItem::Record { source, header, data, at: LogPosition { line: 1, ..at }, next };
    let (text, _) = stream(vec![item.clone()], "?tail=1", None).await;
    let ids: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
    assert_eq!(ids, ["0-0-2", "0-87-0"]);
    let house = House::new();
    *house.fake.log.lock().expect("lock") = vec![item, LogItem::CaughtUp];
    assert_eq!(house.get(&format!("/jobs/{}/logs?tail=2", id())).await.body, b"with \"quotes\" \\ and\ttab\r\n\x1b[1mbold\x07\n");
}

/// A record of another node: positions of two logs in one id.
fn of_node(source: usize, data: &[u8], offset: u64) -> LogItem {
    let LogItem::Record { header, data, at, next, .. } = record(data, offset, 0, Stream::Stdout, source as u32) else { unreachable!() };
    LogItem::Record { source, header, data, at, next }
}

fn ids_of(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("id: ")).collect()
}

#[tokio::test]
async fn an_id_is_the_place_on_every_node() {
    let missing = LogItem::Missing { node: NodeId("n2".into()), reason: "it is not connected".into() };
    let passed = LogItem::Passed { source: 2, next: LogPosition { segment: 4, offset: 9, line: 0 } };
    let items =
        vec![of_node(0, b"a\n", 0), of_node(1, b"b\nc\n", 0), passed, of_node(0, b"d\n", 38), missing, LogItem::End(JobState::Stopped)];
    let (text, _) = stream(items, "", None).await;
    let expected = ["0-38-0", "0-38-0,0-0-1", "0-38-0,0-40-0", "0-76-0,0-40-0,4-9-0", "0-76-0,0-40-0,4-9-0", "0-76-0,0-40-0,4-9-0"];
    assert_eq!(ids_of(&text), expected);
    let gap = "event: gap\ndata: {\"bytes\":0,\"node\":\"n2\",\"reason\":\"it is not connected\"}\n\n";
    assert!(text.contains(gap), "{text}");
}

#[tokio::test]
async fn a_stream_goes_on_inside_the_records_of_two_nodes() {
    let items = [of_node(1, b"x\ny\n", 7), of_node(0, b"a\nb\nc\n", 0), of_node(1, b"z\n", 7)];
    let (text, asked) = stream(items[..2].to_vec(), "", Some("0-0-2,0-7-1")).await;
    expect![[r#"LogQuery { rank: None, attempt: None, tail: None, after: Some(LogPlace([LogPosition { segment: 0, offset: 0, line: 2 }, LogPosition { segment: 0, offset: 7, line: 1 }])), follow: true }"#]]
        .assert_eq(&asked);
    assert_eq!(ids_of(&text), ["0-0-2,0-47-0", "0-42-0,0-47-0"]);
    assert!(text.contains("\"line\":\"y\"") && text.contains("\"line\":\"c\""), "{text}");
    assert!(!text.contains("\"line\":\"x\"") && !text.contains("\"line\":\"b\""), "{text}");
}

#[tokio::test]
async fn plain_text_names_the_node_whose_part_is_missing() {
    let house = House::new();
    let missing = || LogItem::Missing { node: NodeId("n2".into()), reason: "it is not connected".into() };
    *house.fake.log.lock().expect("lock") = vec![of_node(0, b"a\n", 0), missing(), of_node(0, b"half", 38), missing(), LogItem::CaughtUp];
    let told = "everlit: the part of this log that is on node n2 is missing: it is not connected\n";
    let body = house.get(&format!("/jobs/{}/logs", id())).await.body;
    assert_eq!(String::from_utf8_lossy(&body), format!("a\n{told}half\n{told}"));
}

#[tokio::test]
async fn a_log_that_fails_says_so() {
    let problem = Problem::new(Code::NodeUnavailable, "the node is away");
    let (text, _) = stream(vec![record(b"x\n", 0, 0, Stream::Stdout, 0), LogItem::Failed(problem), LogItem::CaughtUp], "", None).await;
    assert!(text.ends_with("\"detail\":\"the node is away\",\"code\":\"node_unavailable\",\"request_id\":\"\"}\n\n"), "{text}");
    assert!(text.contains("id: 0-38-0\nevent: error\n"));
}

#[tokio::test]
async fn bad_places_are_refused() {
    let house = House::new();
    for query in [
        "?after=x",
        "?after=1-2",
        "?after=1-2-3,",
        "?after=1-2-3,4-5",
        "?rank=-1",
        "?rank=x",
        "?tail=x",
        "?tail=-5",
        "?attempt=y",
        "?tail=99999999999",
        "?follow=true",
    ] {
        let reply = house.get(&format!("/jobs/{}/logs/stream{query}", id())).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::UNPROCESSABLE_ENTITY, "invalid"), "{query}");
    }
    assert_eq!(house.get(&format!("/jobs/{}/events/stream?after=x", id())).await.code(), "invalid");
    assert_eq!(house.get(&format!("/jobs/{}/events?after=x", id())).await.code(), "invalid");
    assert_eq!(house.asked(), "");
}

#[tokio::test]
async fn raw_logs_are_the_bytes_themselves() {
    let house = House::new();
    *house.fake.log.lock().expect("lock") = script();
    let reply = house.get(&format!("/jobs/{}/logs?rank=1&attempt=2&tail=5&follow=true", id())).await;
    expect!["LogQuery { rank: Some(1), attempt: Some(2), tail: Some(5), after: None, follow: true }"].assert_eq(&house.asked());
    assert_eq!(reply.header("content-type"), "text/plain; charset=utf-8");
    let expected =
        b"step=1 loss=2.5\nwith \"quotes\" \\ and\ttab\r\n\x1b[1mbold\x07\ncaf\xc3\xa9 \xff\xfe\nhalf of a line\nhalf a lino end";
    assert_eq!(reply.body, expected);
}

#[tokio::test]
async fn a_raw_log_that_fails_is_cut_off() {
    let house = House::new();
    *house.fake.log.lock().expect("lock") =
        vec![record(b"x\n", 0, 0, Stream::Stdout, 0), LogItem::Failed(Problem::new(Code::NodeUnavailable, "away"))];
    let ask = request("GET", &format!("/jobs/{}/logs", id())).body(Body::empty()).expect("request");
    let answer = house.doors.oneshot(ask).await.expect("infallible");
    assert!(answer.into_body().collect().await.is_err());
}

#[tokio::test]
async fn events_stream_under_their_names() {
    let house = House::new();
    *house.fake.happenings.lock().expect("lock") = vec![happening(4), happening(5), EventItem::End(JobState::Failed)];
    let ask = request("GET", &format!("/jobs/{}/events/stream?after=1", id())).header("last-event-id", "3").body(Body::empty());
    let reply = house.send(ask.expect("request")).await;
    assert_eq!(house.asked(), format!("follow EventQuery {{ job: Some({:?}), after: Some(3), user: None }}", id()));
    check(
        &reply.text().replace(&id().to_string(), "JOB"),
        expect![[r#"
            retry: 3000

            id: 4
            event: rank_exited
            data: {"id":"4","job_id":"JOB","time":"2026-01-01T00:00:00.000Z","event":"rank_exited","reason":"rank 1 ended: signal 9 (SIGKILL)","data":{"rank":1}}

            id: 5
            event: rank_exited
            data: {"id":"5","job_id":"JOB","time":"2026-01-01T00:00:00.000Z","event":"rank_exited","reason":"rank 1 ended: signal 9 (SIGKILL)","data":{"rank":1}}

            id: 5
            event: end
            data: {"state":"failed"}

        "#]],
    );
    house.get("/events/stream").await;
    assert_eq!(house.asked(), "follow EventQuery { job: None, after: None, user: None }");
    house.get(&format!("/jobs/{}/events?limit=3&after=2", id())).await;
    assert_eq!(house.asked(), format!("EventQuery {{ job: Some({:?}), after: Some(2), user: None }} limit 3", id()));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_stream_pings() {
    let fake = std::sync::Arc::new(Fake { keep_log_open: true, ..Default::default() });
    let doors = router(fake.clone(), Policy::loopback());
    let ask = request("GET", &format!("/jobs/{}/logs/stream", id())).body(Body::empty()).expect("request");
    let mut body = doors.oneshot(ask).await.expect("infallible").into_body();
    let mut next = async || body.frame().await.expect("open").expect("fine").into_data().expect("data");
    assert_eq!(next().await, "retry: 3000\n\n");
    let begun = tokio::time::Instant::now();
    for _ in 0..3 {
        assert_eq!(next().await, ": ping\n\n");
    }
    assert!(begun.elapsed() <= std::time::Duration::from_secs(45), "{:?}", begun.elapsed());
    let to = fake.log_stays_open.lock().expect("lock").pop().expect("open");
    to.send(record(b"late\n", 0, 0, Stream::Stdout, 0)).await.expect("open");
    assert!(next().await.ends_with(b"\"line\":\"late\"}\n\n"));
    drop(to);
    assert!(body.frame().await.is_none());
}
