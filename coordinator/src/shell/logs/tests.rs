//! A reader over real links to nodes that are fakes: each has one segment in memory and answers as an agent does.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use everlit_api::agent::log::{FLAG_PARTIAL, Header, LogPlace, LogPosition, LogStart, Records, Stream};
use everlit_api::agent::{FromAgent, Hello, LOG_CREDIT_BYTES, LogFrame, PROTOCOL, ToAgent};
use everlit_api::control::{Agent, AgentFrame, AgentLink, LogItem, LogQuery};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::problem::Code;
use everlit_api::status::{Capacity, EventView, JobState};
use everlit_api::time::{Millis, Timestamp};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::shell::members::Members;
use crate::shell::store::StoredEvent;

fn job() -> JobId {
    JobId::from_u128(7)
}

fn record(rank: u32, time_us: u64, text: &str) -> Vec<u8> {
    let flags = if text.ends_with('\n') { 0 } else { FLAG_PARTIAL };
    let header = Header { len: text.len() as u32, rank, attempt: 1, stream: Stream::Stdout, flags, time_us };
    [&header.encode(text.as_bytes())[..], text.as_bytes()].concat()
}

/// One node: what its log is, and how it behaves.
#[derive(Clone)]
struct Node {
    name: &'static str,
    log: Arc<Mutex<Vec<u8>>>,
    records_per_frame: usize,
    /// Between two frames.
    pace: Duration,
    /// It takes orders and says nothing.
    mute: bool,
    sent: Arc<AtomicU64>,
    opened: Arc<AtomicU64>,
}

impl Node {
    fn new(name: &'static str, records: &[(u32, u64, &str)]) -> Self {
        let node = Self {
            name,
            log: Arc::default(),
            records_per_frame: 1,
            pace: Duration::ZERO,
            mute: false,
            sent: Arc::default(),
            opened: Arc::default(),
        };
        node.write(records);
        node
    }

    fn write(&self, records: &[(u32, u64, &str)]) {
        let mut log = self.log.lock().unwrap();
        records.iter().for_each(|(rank, time, text)| log.extend(record(*rank, *time, text)));
    }

    fn id(&self) -> NodeId {
        NodeId(self.name.into())
    }

    fn begin(&self, from: LogStart) -> usize {
        let log = self.log.lock().unwrap();
        match from {
            LogStart::Beginning => 0,
            LogStart::At { offset, .. } => offset as usize,
            LogStart::Tail { lines, rank, attempt } => {
                let ours = |header: &Header| rank.is_none_or(|r| r == header.rank) && attempt.is_none_or(|a| a == header.attempt);
                let found: Vec<_> = Records::new(&log, true).filter(|r| ours(&r.header)).map(|r| (r.at, r.data.len())).collect();
                let mut left = lines as usize;
                let mut at = log.len();
                for (begin, _) in found.into_iter().rev() {
                    if left == 0 {
                        break;
                    }
                    let record = Records::new(&log[begin..], true).next().unwrap();
                    left = left.saturating_sub(record.data.iter().filter(|b| **b == b'\n').count());
                    at = begin;
                }
                at
            }
        }
    }

    /// One stream, with credit.
    async fn serve(self, stream: u64, from: LogStart, follow: bool, taken: Arc<AtomicU64>, to: mpsc::Sender<AgentFrame>) {
        let mut offset = self.begin(from);
        let (mut under_way, mut said) = (0, false);
        loop {
            let (bytes, at_end) = {
                let log = self.log.lock().unwrap();
                // A node with another disk may be asked for what it never had.
                let rest = log.get(offset..).unwrap_or_default();
                let end = Records::new(rest, true).take(self.records_per_frame).last().map_or(0, |record| record.end);
                (rest[..end].to_vec(), offset + end >= log.len())
            };
            let size = bytes.len() as u64;
            if under_way + size > LOG_CREDIT_BYTES + taken.load(Ordering::Relaxed) || (bytes.is_empty() && said) {
                sleep(Duration::from_millis(5)).await;
                continue;
            }
            let frame = LogFrame { stream, segment: 1, offset: offset as u64, skipped: 0, caught_up: at_end };
            (offset, under_way, said) = (offset + bytes.len(), under_way + size, at_end);
            self.sent.fetch_add(size, Ordering::Relaxed);
            if to.send(AgentFrame::Binary(frame.encode(&bytes).into())).await.is_err() {
                return;
            }
            if !self.pace.is_zero() {
                sleep(self.pace).await;
            }
            if at_end && !follow {
                let closed = FromAgent::LogClosed { stream, error: None };
                let _ = to.send(AgentFrame::Text(serde_json::to_string(&closed).unwrap())).await;
                return;
            }
        }
    }

    async fn obey(self, mut orders: mpsc::Receiver<String>, to: mpsc::Sender<AgentFrame>) {
        let mut streams = std::collections::BTreeMap::new();
        while let Some(text) = orders.recv().await {
            match serde_json::from_str(&text).unwrap() {
                ToAgent::OpenLog { stream, from, follow, .. } if !self.mute => {
                    let taken = Arc::new(AtomicU64::new(0));
                    self.opened.fetch_add(1, Ordering::Relaxed);
                    let task = tokio::spawn(self.clone().serve(stream, from, follow, taken.clone(), to.clone()));
                    streams.insert(stream, (taken, task));
                }
                ToAgent::LogCredit { stream, bytes } => {
                    streams.get(&stream).map(|(taken, _)| taken.fetch_add(bytes, Ordering::Relaxed));
                }
                ToAgent::CloseLog { stream } => {
                    streams.remove(&stream).inspect(|(_, task)| task.abort());
                }
                _ => {}
            }
        }
        streams.values().for_each(|(_, task)| task.abort());
    }

    fn hello(&self) -> AgentFrame {
        let hello = FromAgent::Hello(Hello {
            protocol: PROTOCOL,
            node: self.id(),
            boot_id: "boot".into(),
            version: "0".into(),
            pid: 1,
            capacity: Capacity { cpus: 2.0, memory: 1 << 30, gpus: vec![], slots: 8 },
            ranks: vec![],
            checkpoints: vec![],
            draining: false,
            address: None,
            copies: None,
            labels: Default::default(),
            taints: vec![],
        });
        AgentFrame::Text(serde_json::to_string(&hello).unwrap())
    }
}

struct Scene {
    agents: Arc<Agents>,
    news: broadcast::Sender<News>,
    now: Arc<Mutex<Whereabouts>>,
}

impl Scene {
    fn new() -> Self {
        let agents = Arc::new(Agents::new(Millis(1_000), Millis(10_000)));
        let spec = Arc::new(everlit_api::job::JobSpec::default_for(1));
        let at = Whereabouts { nodes: Vec::new(), state: JobState::Running, spec, wanted: Default::default() };
        Self { agents, news: broadcast::channel(64).0, now: Arc::new(Mutex::new(at)) }
    }

    /// Links a node; its link ends when the answer is dropped or aborted.
    async fn link(&self, node: &Node) -> tokio::task::JoinHandle<()> {
        let (to, orders) = mpsc::channel(256);
        let (said, from) = mpsc::channel(4096);
        said.send(node.hello()).await.unwrap();
        let (agents, id, own) = (self.agents.clone(), node.id(), node.clone());
        let (inputs, mut heard) = mpsc::channel(64);
        tokio::spawn(async move { while heard.recv().await.is_some() {} });
        tokio::spawn(async move {
            let members = Members::new(vec![], vec![]);
            agents.serve(&Agent::Local, AgentLink { from, to }, &members, &inputs).await;
        });
        let link = tokio::spawn(own.obey(orders, said));
        while !self.agents.is_linked(&id) {
            sleep(Duration::from_millis(1)).await;
        }
        link
    }

    fn placed(&self, nodes: &[&Node]) {
        self.now.lock().unwrap().nodes = nodes.iter().map(|node| node.id()).collect();
        let view = EventView {
            id: "1".into(),
            job_id: Some(job()),
            time: Timestamp(1),
            event: "attempt_placed".into(),
            reason: String::new(),
            data: serde_json::Value::Null,
        };
        let _ = self.news.send(News::Event(Arc::new(StoredEvent { seq: 1, view })));
    }

    fn end(&self, state: JobState) {
        self.now.lock().unwrap().state = state;
        let _ = self.news.send(News::Final(job(), state));
    }

    fn read(&self, query: LogQuery) -> Seen {
        let (items, from) = mpsc::channel(ITEMS_MAX);
        let now = self.now.clone();
        let at = now.lock().unwrap().clone();
        let look = move || {
            let found = Some(now.lock().unwrap().clone());
            Box::pin(async move { found }) as futures_util::future::BoxFuture<'static, _>
        };
        let place = query.after.clone().unwrap_or_default();
        let ended = at.state.is_final().then_some(at.state);
        let (agents, news) = (self.agents.clone(), self.news.subscribe());
        tokio::spawn(Reader { agents, job: job(), at, query, ended, news, look: Box::new(look), items }.run());
        Seen { from, place }
    }
}

/// What a reader saw, told as the doors do it.
struct Seen {
    from: mpsc::Receiver<LogItem>,
    place: LogPlace,
}

impl Seen {
    /// The next thing that shows; `None` after the last.
    async fn next(&mut self) -> Option<String> {
        loop {
            let shown = match timeout(Duration::from_secs(100), self.from.recv()).await.expect("something comes")? {
                LogItem::Record { source, data, next, .. } => {
                    self.place.set(source, next);
                    String::from_utf8_lossy(&data).trim_end().replace('\n', "+")
                }
                LogItem::Gap { source, next, bytes } => {
                    self.place.set(source, next);
                    format!("gap {bytes}")
                }
                LogItem::Passed { source, next } => {
                    self.place.set(source, next);
                    continue;
                }
                LogItem::Missing { node, reason } => format!("({node}: {reason})"),
                LogItem::End(state) => format!("<{state}>"),
                LogItem::CaughtUp => "<now>".into(),
                LogItem::Failed(problem) => format!("<{:?} {}>", problem.code, problem.detail),
            };
            return Some(shown);
        }
    }

    async fn some(&mut self, count: usize) -> String {
        let mut text = String::new();
        for _ in 0..count {
            let _ = write!(text, "{} ", self.next().await.expect("more"));
        }
        text.trim_end().into()
    }

    async fn all(&mut self) -> String {
        let mut text = String::new();
        while let Some(shown) = self.next().await {
            let _ = write!(text, "{shown} ");
        }
        text.trim_end().into()
    }

    async fn nothing_for(&mut self, seconds: u64) {
        let waited = timeout(Duration::from_secs(seconds), self.next()).await;
        assert!(waited.is_err(), "{waited:?}");
    }
}

fn two() -> (Node, Node) {
    let a = Node::new("a", &[(0, 10, "a1\n"), (0, 30, "a2\n"), (0, 50, "a3\n"), (0, 50, "a4\n")]);
    let b = Node::new("b", &[(1, 5, "b1\n"), (1, 20, "b2\n"), (1, 40, "b3\n"), (1, 60, "b4\n")]);
    (a, b)
}

fn whole() -> LogQuery {
    LogQuery::default()
}

fn following() -> LogQuery {
    LogQuery { follow: true, ..whole() }
}

fn tail(lines: u64) -> LogQuery {
    LogQuery { tail: Some(lines), ..whole() }
}

#[tokio::test(start_paused = true)]
async fn one_node_s_log_is_given_as_it_stands() {
    let scene = Scene::new();
    // Times mean nothing in one segment.
    let node = Node::new("a", &[(0, 9, "x\n"), (1, 3, "y\nz\n"), (0, 7, "end")]);
    let _link = scene.link(&node).await;
    scene.placed(&[&node]);
    scene.end(JobState::Failed);
    let mut seen = scene.read(following());
    let ids: Vec<String> = [seen.some(1).await, seen.place.to_string(), seen.some(1).await, seen.place.to_string()].into();
    assert_eq!(ids, ["x", "1-38-0", "y+z", "1-78-0"]);
    assert_eq!(seen.all().await, "end <failed>");
    let mut seen = scene.read(LogQuery { after: Some("1-38-0".parse().unwrap()), follow: true, ..whole() });
    assert_eq!(seen.all().await, "y+z end <failed>", "an id of before there were several nodes");
    assert_eq!(scene.read(LogQuery { rank: Some(1), ..whole() }).all().await, "y+z <failed>");
    assert_eq!(scene.read(tail(2)).all().await, "z end <failed>");
    assert_eq!(scene.read(LogQuery { after: Some(LogPlace::default()), ..tail(1) }).all().await, "x y+z end <failed>");
}

#[tokio::test(start_paused = true)]
async fn history_is_merged_by_time_and_every_id_goes_on_where_it_says() {
    let scene = Scene::new();
    let (a, mut b) = two();
    b.pace = Duration::from_millis(700);
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a, &b]);
    let expected = "b1 a1 b2 a2 b3 a3 a4 b4 <now>";
    let mut seen = scene.read(whole());
    let words: Vec<&str> = expected.split(' ').collect();
    for cut in 0..words.len() - 1 {
        assert_eq!(seen.some(1).await, words[cut]);
        // All that a reader that was cut off has is the text of the id.
        let after = Some(seen.place.to_string().parse().unwrap());
        assert_eq!(scene.read(LogQuery { after, ..whole() }).all().await, words[cut + 1..].join(" "), "after {}", seen.place);
    }
    assert_eq!(seen.place.to_string(), "1-156-0,1-156-0");
    assert_eq!(scene.read(LogQuery { rank: Some(1), ..whole() }).all().await, "b1 b2 b3 b4 <now>");
}

#[tokio::test(start_paused = true)]
async fn a_tail_is_the_last_of_the_merge_and_its_ids_lead_back_to_nothing_older() {
    let scene = Scene::new();
    let (a, b) = two();
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a, &b]);
    for (lines, expected) in [(1, "b4"), (3, "a3 a4 b4"), (5, "a2 b3 a3 a4 b4"), (99, "b1 a1 b2 a2 b3 a3 a4 b4")] {
        assert_eq!(scene.read(tail(lines)).all().await, format!("{expected} <now>"));
        let mut seen = scene.read(tail(lines));
        seen.some(1).await;
        let (_, rest) = expected.split_once(' ').unwrap_or(("", ""));
        let again = scene.read(LogQuery { after: Some(seen.place.clone()), ..whole() }).all().await;
        assert_eq!(again, format!("{rest} <now>").trim_start(), "after {} of a tail of {lines}", seen.place);
    }
    assert_eq!(scene.read(tail(0)).all().await, "<now>");
}

#[tokio::test(start_paused = true)]
async fn followers_get_new_lines_as_they_come_and_the_end_once() {
    let scene = Scene::new();
    let (a, b) = two();
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a, &b]);
    let mut seen = scene.read(LogQuery { tail: Some(1), ..following() });
    assert_eq!(seen.some(1).await, "b4");
    b.write(&[(1, 90, "late\n")]);
    assert_eq!(seen.some(1).await, "late");
    // A clock that is behind: nobody waits for the other node.
    a.write(&[(0, 70, "a5\n")]);
    assert_eq!(seen.some(1).await, "a5");
    a.write(&[(0, 99, "last\n")]);
    scene.end(JobState::Succeeded);
    assert_eq!(seen.all().await, "last <succeeded>");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_away_holds_nobody_up_for_long_and_its_lines_come_when_it_is_back() {
    let scene = Scene::new();
    let (a, b) = two();
    let _link = scene.link(&a).await;
    scene.placed(&[&a, &b]);
    let started = Instant::now();
    let mut seen = scene.read(following());
    assert_eq!(seen.some(4).await, "a1 a2 a3 a4");
    assert!((2_000..3_000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    seen.nothing_for(60).await;
    let other = scene.link(&b).await;
    assert_eq!(seen.some(2).await, "b1 b2");
    // Its link breaks wherever it is, and it comes back.
    other.abort();
    assert_eq!(seen.some(2).await, {
        let _other = scene.link(&b).await;
        "b3 b4"
    });
    a.write(&[(0, 1, "a5\n")]);
    scene.end(JobState::Stopped);
    let _other = scene.link(&b).await;
    assert_eq!(seen.all().await, "a5 <stopped>");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_says_nothing_holds_nobody_up_for_long() {
    let scene = Scene::new();
    let (a, mut b) = two();
    b.mute = true;
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a, &b]);
    let started = Instant::now();
    assert_eq!(scene.read(whole()).some(4).await, "a1 a2 a3 a4");
    assert!((2_000..3_000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    let started = Instant::now();
    assert_eq!(scene.read(tail(2)).all().await, "a3 a4 (b: it does not answer) <now>");
    assert!(started.elapsed() < Duration::from_secs(11), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn whose_part_is_missing_is_told_when_others_gave_theirs() {
    let scene = Scene::new();
    let (a, b) = two();
    scene.placed(&[&a, &b]);
    let unavailable = |what: &str| format!("<{:?} {what}>", Code::NodeUnavailable);
    assert_eq!(scene.read(whole()).all().await, unavailable("nodes a, b have the log and are not connected"));
    assert_eq!(scene.read(following()).all().await, unavailable("nodes a, b have the log and are not connected"));
    let link = scene.link(&b).await;
    let started = Instant::now();
    assert_eq!(scene.read(whole()).all().await, "b1 b2 b3 b4 (a: it is not connected) <now>");
    assert!((30..33).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    let started = Instant::now();
    assert_eq!(scene.read(tail(2)).all().await, "b3 b4 (a: it is not connected) <now>");
    assert!((2..4).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    // A follower that has seen it away for long need not wait again at the end.
    let mut seen = scene.read(following());
    assert_eq!(seen.some(4).await, "b1 b2 b3 b4");
    sleep(Duration::from_secs(60)).await;
    let started = Instant::now();
    scene.end(JobState::Failed);
    assert_eq!(seen.all().await, "(a: it is not connected) <failed>");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    // Who comes back with the id gets what was missing, and only that.
    let _other = scene.link(&a).await;
    let after = Some(seen.place.to_string().parse().unwrap());
    assert_eq!(scene.read(LogQuery { after, ..whole() }).all().await, "a1 a2 a3 a4 <failed>");
    link.abort();
    scene.placed(&[&b]);
    while scene.agents.is_linked(&b.id()) {
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(scene.read(whole()).all().await, unavailable("node b has the log and is not connected"));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_joins_later_is_read_from_its_beginning() {
    let scene = Scene::new();
    let (a, b) = two();
    let mut seen = scene.read(following());
    seen.nothing_for(60).await;
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a]);
    assert_eq!(seen.some(4).await, "a1 a2 a3 a4");
    assert_eq!(seen.place.to_string(), "1-156-0");
    scene.placed(&[&a, &b]);
    assert_eq!(seen.some(4).await, "b1 b2 b3 b4");
    let after = Some("1-117-0".parse().unwrap());
    let mut again = scene.read(LogQuery { after, ..following() });
    assert_eq!(again.some(5).await, "b1 b2 b3 a4 b4", "an id of the time with one node");
    scene.end(JobState::Succeeded);
    assert_eq!(seen.all().await, "<succeeded>");
    assert_eq!(scene.read(LogQuery { tail: Some(1), ..following() }).all().await, "b4 <succeeded>");
}

#[tokio::test(start_paused = true)]
async fn no_break_of_a_link_loses_or_repeats_a_line() {
    for records_per_frame in [1, 3, 100] {
        let scene = Scene::new();
        let lines: Vec<String> = (0..300).map(|n| format!("{n}\n")).collect();
        let of = |name, add: u64| {
            let records: Vec<(u32, u64, &str)> =
                lines.iter().zip(0..).map(|(line, n)| ((add % 2) as u32, n * 10 + add, line.as_str())).collect();
            Node { records_per_frame, pace: Duration::from_millis(1), ..Node::new(name, &records) }
        };
        let (a, b) = (of("a", 0), of("b", 5));
        let links = [scene.link(&a).await, scene.link(&b).await];
        scene.placed(&[&a, &b]);
        let mut seen = scene.read(following());
        let (mut got, mut links) = ([Vec::new(), Vec::new()], Vec::from(links));
        for count in 0..600 {
            let item = loop {
                match seen.from.recv().await.unwrap() {
                    LogItem::Passed { .. } => {}
                    item => break item,
                }
            };
            let LogItem::Record { header, data, .. } = item else { panic!("{item:?}") };
            got[header.rank as usize].push(String::from_utf8_lossy(&data).into_owned());
            if count % 37 == 5 {
                let which = &[&a, &b][count % 2];
                links.remove(count % 2).abort();
                links.insert(count % 2, scene.link(which).await);
                sleep(Duration::from_millis(2)).await;
            }
        }
        assert_eq!(got[0], lines);
        assert_eq!(got[1], lines);
        assert!(a.opened.load(Ordering::Relaxed) > 3, "links broke");
        scene.end(JobState::Succeeded);
        assert_eq!(seen.all().await, "<succeeded>");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_slow_reader_does_not_take_stays_on_the_nodes() {
    let scene = Scene::new();
    let text = format!("{}\n", "x".repeat(10_000));
    let records: Vec<(u32, u64, &str)> = (0..1_000).map(|n| (0, n, text.as_str())).collect();
    let (a, b) = (Node::new("a", &records), Node::new("b", &records));
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a, &b]);
    let mut seen = scene.read(whole());
    sleep(Duration::from_secs(60)).await;
    // What the items hold, and the credit beyond it.
    let most = LOG_CREDIT_BYTES + (ITEMS_MAX + 2 * merge::HELD_MAX) as u64 * 10_100;
    for node in [&a, &b] {
        assert!(node.sent.load(Ordering::Relaxed) <= most, "{} of {most}", node.sent.load(Ordering::Relaxed));
    }
    let mut count = 0;
    while let Some(shown) = seen.next().await {
        count += usize::from(shown.len() == 10_000);
    }
    assert_eq!(count, 2_000);
}

#[tokio::test(start_paused = true)]
async fn what_is_passed_over_is_not_read_again() {
    let scene = Scene::new();
    let (a, b) = two();
    let _links = (scene.link(&a).await, scene.link(&b).await);
    scene.placed(&[&a, &b]);
    let query = LogQuery { rank: Some(1), ..whole() };
    let mut seen = scene.read(query.clone());
    assert_eq!(seen.all().await, "b1 b2 b3 b4 <now>");
    assert_eq!((seen.place.of(0), seen.place.of(1)), (LogPosition { segment: 1, offset: 156, line: 0 }, seen.place.of(0)));
    assert_eq!(scene.read(LogQuery { after: Some(seen.place), ..query }).all().await, "<now>");
}

#[test]
fn a_stream_is_its_node_s_and_takes_no_more_than_it_gave_credit_for() {
    let streams = Streams::default();
    let (to, mut inbox) = mpsc::unbounded_channel();
    let (own, other) = (NodeId("n1".into()), NodeId("n2".into()));
    let stream = streams.add(own.clone(), to);
    let frame = |bytes: usize| {
        let header = LogFrame { stream, segment: 0, offset: 0, skipped: 0, caught_up: false };
        LogMessage::Frame(header, vec![0; bytes].into())
    };
    assert_eq!(streams.deliver(&other, stream, frame(10)), Delivery::Foreign);
    assert_eq!(streams.deliver(&other, stream, LogMessage::Closed(None)), Delivery::Foreign);
    assert!(inbox.try_recv().is_err(), "nobody else ends or fills it");
    let credit = LOG_CREDIT_BYTES as usize;
    assert_eq!(streams.deliver(&own, stream, frame(credit)), Delivery::Done);
    assert_eq!(streams.deliver(&own, stream, frame(1)), Delivery::Overrun);
    streams.taken(stream, credit as u64);
    assert_eq!(streams.deliver(&own, stream, frame(credit - 1)), Delivery::Done);
    // Frames without bytes are bounded, too.
    let empty = (0..=FRAMES_WAITING_MAX).map(|_| streams.deliver(&own, stream, frame(0))).find(|came| *came == Delivery::Overrun);
    assert_eq!(empty, Some(Delivery::Overrun));
    assert_eq!(streams.deliver(&own, stream + 1, frame(1)), Delivery::Done, "of a stream that was closed nobody is told");
}

/// Nodes' parts in a folder that is the job's store.
struct Shelf {
    dir: tempfile::TempDir,
    archive: everlit_api::store::Archive,
}

impl Shelf {
    fn new(scene: &Scene) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = everlit_api::job::JobSpec::default_for(1);
        spec.logs.to = Some(dir.path().to_str().unwrap().parse().unwrap());
        let archive = archive::open(&spec, job()).unwrap();
        scene.now.lock().unwrap().spec = Arc::new(spec);
        Self { dir, archive }
    }

    /// What the node has, in pieces of so many records, and that this was all.
    async fn keep(&self, node: &Node, records_each: usize) -> Vec<everlit_api::store::Piece> {
        let log = node.log.lock().unwrap().clone();
        let ends: Vec<usize> = Records::new(&log, true).map(|record| record.end).collect();
        let (mut from, mut pieces) = (0, Vec::new());
        for end in ends.chunks(records_each).filter_map(|ends| ends.last().copied()) {
            let piece = everlit_api::store::Piece { segment: 1, from: from as u64, to: end as u64, before: from as u64 };
            self.archive.put(&node.id(), &piece, Bytes::copy_from_slice(&log[from..end])).await.unwrap();
            pieces.push(piece);
            from = end;
        }
        self.archive.end(&node.id(), 1, log.len() as u64).await.unwrap();
        pieces
    }

    fn path(&self, node: &Node, piece: &everlit_api::store::Piece) -> std::path::PathBuf {
        let name = format!("{:020}-{:010}-{:010}-{:020}", piece.segment, piece.from, piece.to, piece.before);
        self.dir.path().join(job().to_string()).join("logs").join(node.name).join(name)
    }
}

const FOUR: [(u32, u64, &str); 4] = [(0, 1, "one\n"), (1, 2, "two\n"), (0, 3, "three\n"), (0, 4, "four\n")];

#[tokio::test(start_paused = true)]
async fn what_a_node_that_is_gone_had_comes_from_the_store_at_the_same_places() {
    let (scene, node) = (Scene::new(), Node::new("n1", &FOUR));
    let shelf = Shelf::new(&scene);
    shelf.keep(&node, 2).await;
    scene.placed(&[&node]);
    scene.end(JobState::Succeeded);
    let link = scene.link(&node).await;
    let (mut there, mut places) = (scene.read(LogQuery::default()), Vec::new());
    while let Some(shown) = there.next().await {
        places.push((shown, there.place.clone()));
    }
    link.abort();
    while scene.agents.is_linked(&node.id()) {
        sleep(Duration::from_millis(1)).await;
    }
    // From each place on, what follows there, with the same places.
    for from in 0..places.len() - 1 {
        let after = from.checked_sub(1).map(|last| places[last].1.clone());
        let mut gone = scene.read(LogQuery { after, ..LogQuery::default() });
        let mut seen = Vec::new();
        while let Some(shown) = gone.next().await {
            seen.push((shown, gone.place.clone()));
        }
        assert_eq!(seen, places[from..], "from {from}");
    }
    let shown = async |query| {
        let (mut seen, mut all) = (scene.read(query), Vec::new());
        while let Some(item) = seen.next().await {
            all.push(item);
        }
        all.join(" ")
    };
    assert_eq!(shown(LogQuery { tail: Some(3), ..LogQuery::default() }).await, "two three four <succeeded>");
    assert_eq!(shown(LogQuery { tail: Some(1), rank: Some(1), ..LogQuery::default() }).await, "two <succeeded>");
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_in_the_store_is_told_to_the_byte_and_what_overlaps_comes_once() {
    let (scene, node) = (Scene::new(), Node::new("n1", &FOUR));
    let shelf = Shelf::new(&scene);
    let pieces = shelf.keep(&node, 1).await;
    shelf.keep(&node, 3).await;
    scene.placed(&[&node]);
    scene.end(JobState::Failed);
    assert_eq!(told(&scene).await, ["one", "two", "three", "four", "<failed>"], "pieces that overlap");
    let whole = everlit_api::store::Piece { to: pieces[2].to, ..pieces[0] };
    std::fs::remove_file(shelf.path(&node, &whole)).unwrap();
    assert_eq!(told(&scene).await, ["one", "two", "three", "four", "<failed>"]);
    // One is cut, one is gone.
    std::fs::write(shelf.path(&node, &pieces[1]), "x").unwrap();
    let gap = pieces[1].bytes();
    assert_eq!(told(&scene).await, ["one".to_string(), format!("gap {gap}"), "three".into(), "four".into(), "<failed>".into()]);
    std::fs::remove_file(shelf.path(&node, &pieces[3])).unwrap();
    let seen = told(&scene).await;
    let end = format!("{} bytes of it are missing in", pieces[3].bytes());
    assert!(seen.len() == 5 && seen[3].contains(&end) && seen[4] == "<failed>", "{seen:?}");
}

async fn told(scene: &Scene) -> Vec<String> {
    let (mut seen, mut all) = (scene.read(LogQuery::default()), Vec::new());
    while let Some(item) = seen.next().await {
        all.push(item);
    }
    all
}

#[tokio::test(start_paused = true)]
async fn a_store_that_can_not_be_read_or_has_nothing_is_told_and_holds_nobody_up() {
    let (scene, gone, here) = (Scene::new(), Node::new("n1", &FOUR), Node::new("n2", &[(1, 9, "here\n")]));
    let shelf = Shelf::new(&scene);
    scene.placed(&[&gone, &here]);
    scene.end(JobState::Failed);
    let _link = scene.link(&here).await;
    let seen = told(&scene).await;
    assert!(seen[0] == "here" && seen[1].contains("(n1: it is not connected, and of its archive: nothing of it is in"), "{seen:?}");
    shelf.dir.close().unwrap();
    let seen = told(&scene).await;
    assert!(seen[0] == "here" && seen[1].contains("make it, or mount it"), "{seen:?}");
    scene.placed(&[&gone]);
    let seen = told(&scene).await;
    assert!(seen.len() == 1 && seen[0].starts_with("<NodeUnavailable node n1: it is not connected"), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_came_back_with_nothing_is_read_from_the_store_first() {
    let (scene, node) = (Scene::new(), Node::new("n1", &FOUR));
    let shelf = Shelf::new(&scene);
    shelf.keep(&node, 2).await;
    scene.placed(&[&node]);
    scene.end(JobState::Succeeded);
    let empty = Node::new("n1", &[]);
    let _link = scene.link(&empty).await;
    let all = tokio::time::timeout(Duration::from_secs(60), told(&scene)).await.unwrap();
    assert_eq!(all, ["one", "two", "three", "four", "<succeeded>"]);
}
