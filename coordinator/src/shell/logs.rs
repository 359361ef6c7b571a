//! Readers of a job's log: a stream over the agent's link per reader, with credit, so that a slow reader holds up only itself.
//!
//! The order of lines is the order in the segments on the node; this file only filters, and goes on from its position when a link breaks.
//! A job's end: once it is final the log is read once more without following, so nothing written before the end is missed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use everlit_api::agent::log::{LogPosition, LogStart, Records};
use everlit_api::agent::{LogFrame, ToAgent};
use everlit_api::control::{LogItem, LogQuery};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::problem::{Code, Problem};
use everlit_api::status::JobState;
use tokio::sync::{broadcast, mpsc};

use super::agents::Agents;
use super::driver::News;

/// Items that wait for a reader.
pub const ITEMS_MAX: usize = 256;
/// How long a reader waits for a node to come back.
const NODE_WAIT: Duration = Duration::from_secs(30);
/// Lines of a tail at most.
pub const TAIL_LINES_MAX: u64 = 100_000;

/// What comes over a link for a stream.
#[derive(Debug)]
pub enum LogMessage {
    /// Whole records.
    Frame(LogFrame, Bytes),
    /// Everything was sent, or why not.
    Closed(Option<String>),
    /// The link is gone.
    Gone,
}

#[derive(Debug)]
struct Open {
    node: NodeId,
    // Unbounded as a type, bounded by the credit that the coordinator gives.
    to: mpsc::UnboundedSender<LogMessage>,
}

/// Streams that are open.
#[derive(Debug, Default)]
pub struct Streams {
    open: Mutex<BTreeMap<u64, Open>>,
    next: AtomicU64,
}

impl Streams {
    fn open(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Open>> {
        self.open.lock().expect("no panic while holding the lock")
    }

    fn add(&self, node: NodeId) -> (u64, mpsc::UnboundedReceiver<LogMessage>) {
        let (to, from) = mpsc::unbounded_channel();
        let stream = self.next.fetch_add(1, Ordering::Relaxed);
        self.open().insert(stream, Open { node, to });
        (stream, from)
    }

    /// Passes on what came for a stream.
    pub fn deliver(&self, stream: u64, message: LogMessage) {
        if let Some(open) = self.open().get(&stream) {
            let _ = open.to.send(message);
        }
    }

    /// A node's link ended.
    pub fn node_gone(&self, node: &NodeId) {
        for open in self.open().values().filter(|o| o.node == *node) {
            let _ = open.to.send(LogMessage::Gone);
        }
    }
}

/// Where a job's log is and how far the job is; `None` when it is gone.
pub type Look = Box<dyn Fn() -> futures_util::future::BoxFuture<'static, Option<(Option<NodeId>, JobState)>> + Send + Sync>;

/// One reader of one job's log.
pub struct Reader {
    /// Links and streams.
    pub agents: Arc<Agents>,
    /// Which job.
    pub job: JobId,
    /// Where its log is; `None` when it never had a place.
    pub node: Option<NodeId>,
    /// What is wanted.
    pub query: LogQuery,
    /// How it ended, when it has.
    pub ended: Option<JobState>,
    /// Tells of the end.
    pub news: broadcast::Receiver<News>,
    /// Finds out where the log is and whether the job is final, after missed news.
    pub look: Look,
    /// Where items go.
    pub items: mpsc::Sender<LogItem>,
}

/// How a pass over the log ended.
enum Pass {
    /// Everything that there was.
    Done,
    /// The job became final while following.
    Ended,
    /// The link broke, or the reader must look again.
    Again,
    /// The reader went away, or nothing more can be read.
    Stop,
}

/// Closes the stream at the agent when it goes, however that happens.
struct Stream<'a> {
    agents: &'a Agents,
    node: NodeId,
    id: u64,
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        if self.agents.streams.open().remove(&self.id).is_some() {
            self.agents.tell(&self.node, &ToAgent::CloseLog { stream: self.id });
        }
    }
}

impl Reader {
    /// Gives out items until the end, or until nobody takes them.
    pub async fn run(mut self) {
        let mut start = match (self.query.after, self.query.tail) {
            (Some(at), _) => LogStart::At { segment: at.segment, offset: at.offset },
            (None, Some(lines)) => LogStart::Tail { lines: lines.min(TAIL_LINES_MAX), rank: self.query.rank, attempt: self.query.attempt },
            (None, None) => LogStart::Beginning,
        };
        loop {
            let Some(node) = self.node.clone() else {
                if !self.wait_for_place().await {
                    return;
                }
                continue;
            };
            if !self.wait_for_link(&node).await {
                let why = format!("node {node} has the log and is not connected");
                let _ = self.items.send(LogItem::Failed(Problem::new(Code::NodeUnavailable, why).retry_after(3))).await;
                return;
            }
            let follow = self.query.follow && self.ended.is_none();
            match self.pass(&node, &mut start, follow).await {
                Pass::Stop => return,
                Pass::Again | Pass::Ended => {}
                Pass::Done => {
                    let last = self.ended.map_or(LogItem::CaughtUp, LogItem::End);
                    let _ = self.items.send(last).await;
                    return;
                }
            }
        }
    }

    /// A job without a place has no log yet. False when there is nothing to wait for.
    async fn wait_for_place(&mut self) -> bool {
        if let Some(state) = self.ended {
            let _ = self.items.send(LogItem::End(state)).await;
            return false;
        }
        if !self.query.follow {
            let _ = self.items.send(LogItem::CaughtUp).await;
            return false;
        }
        loop {
            tokio::select! {
                () = self.items.closed() => return false,
                news = self.news.recv() => {
                    let ours = match news {
                        Ok(News::Event(event)) => event.view.job_id == Some(self.job),
                        Ok(News::Final(job, _)) => job == self.job,
                        Err(broadcast::error::RecvError::Lagged(_)) => true,
                        Err(broadcast::error::RecvError::Closed) => return false,
                    };
                    if ours {
                        return self.look_again().await;
                    }
                }
            }
        }
    }

    /// False when the job is gone.
    async fn look_again(&mut self) -> bool {
        let Some((node, state)) = (self.look)().await else {
            let gone = Problem::new(Code::NotFound, format!("job {} was removed", self.job));
            let _ = self.items.send(LogItem::Failed(gone)).await;
            return false;
        };
        self.node = node.or(self.node.take());
        self.ended = state.is_final().then_some(state);
        true
    }

    async fn wait_for_link(&self, node: &NodeId) -> bool {
        let mut changes = self.agents.changes();
        let deadline = tokio::time::Instant::now() + NODE_WAIT;
        while !self.agents.is_linked(node) {
            tokio::select! {
                () = self.items.closed() => return false,
                changed = tokio::time::timeout_at(deadline, changes.changed()) => {
                    if !matches!(changed, Ok(Ok(()))) {
                        return false;
                    }
                }
            }
        }
        true
    }

    async fn pass(&mut self, node: &NodeId, start: &mut LogStart, follow: bool) -> Pass {
        let (id, mut from) = self.agents.streams.add(node.clone());
        let agents = self.agents.clone();
        let stream = Stream { agents: &agents, node: node.clone(), id };
        agents.tell(node, &ToAgent::OpenLog { stream: id, job: self.job, from: *start, follow });
        if !agents.is_linked(node) {
            return Pass::Again;
        }
        let mut tail = match *start {
            LogStart::Tail { lines, .. } => Some(Tail { lines, held: VecDeque::new(), held_lines: 0 }),
            _ => None,
        };
        loop {
            tokio::select! {
                biased;
                message = from.recv() => match message {
                    Some(LogMessage::Frame(header, records)) => {
                        if !self.give_out(&header, &records, start, &mut tail).await {
                            return Pass::Stop;
                        }
                        agents.tell(node, &ToAgent::LogCredit { stream: stream.id, bytes: records.len() as u64 });
                    }
                    Some(LogMessage::Closed(None)) => {
                        if !self.give_out_tail(&mut tail).await {
                            return Pass::Stop;
                        }
                        return Pass::Done;
                    }
                    Some(LogMessage::Closed(Some(error))) => {
                        let _ = self.items.send(LogItem::Failed(Problem::new(Code::Internal, format!("the log can not be read: {error}")))).await;
                        return Pass::Stop;
                    }
                    Some(LogMessage::Gone) | None => return Pass::Again,
                },
                () = self.items.closed() => return Pass::Stop,
                news = self.news.recv(), if follow => match news {
                    Ok(News::Final(job, state)) if job == self.job => {
                        self.ended = Some(state);
                        return Pass::Ended;
                    }
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        if !self.look_again().await {
                            return Pass::Stop;
                        }
                        if self.ended.is_some() {
                            return Pass::Ended;
                        }
                    }
                    Err(broadcast::error::RecvError::Closed) => return Pass::Stop,
                },
            }
        }
    }

    /// False when nobody takes items any more.
    async fn give_out(&self, header: &LogFrame, records: &Bytes, start: &mut LogStart, tail: &mut Option<Tail>) -> bool {
        let place = |offset: usize| LogPosition { segment: header.segment, offset: header.offset + offset as u64, line: 0 };
        if header.skipped > 0 && self.items.send(LogItem::Gap { bytes: header.skipped, next: place(0) }).await.is_err() {
            return false;
        }
        for record in Records::new(records, true) {
            let ours = self.query.rank.is_none_or(|rank| rank == record.header.rank)
                && self.query.attempt.is_none_or(|attempt| attempt == record.header.attempt);
            if !ours {
                continue;
            }
            let data = records.slice_ref(record.data);
            let item = LogItem::Record { header: record.header, data, at: place(record.at), next: place(record.end) };
            match tail {
                Some(tail) => tail.hold(item),
                None if self.items.send(item).await.is_err() => return false,
                None => {}
            }
        }
        if tail.is_none() || header.caught_up {
            *start = LogStart::At { segment: header.segment, offset: header.offset + records.len() as u64 };
        }
        if header.caught_up && !self.give_out_tail(tail).await {
            return false;
        }
        true
    }

    async fn give_out_tail(&self, tail: &mut Option<Tail>) -> bool {
        for item in tail.take().map(Tail::trimmed).unwrap_or_default() {
            if self.items.send(item).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// The last lines, held back until the end is reached.
struct Tail {
    lines: u64,
    held: VecDeque<LogItem>,
    held_lines: u64,
}

fn lines_of(item: &LogItem) -> u64 {
    let LogItem::Record { data, .. } = item else { return 0 };
    let whole = data.iter().filter(|b| **b == b'\n').count() as u64;
    whole + u64::from(data.last().is_some_and(|b| *b != b'\n'))
}

impl Tail {
    fn hold(&mut self, item: LogItem) {
        self.held_lines += lines_of(&item);
        self.held.push_back(item);
        while let Some(first) = self.held.front().map(lines_of)
            && self.held_lines - first >= self.lines
        {
            self.held_lines -= first;
            self.held.pop_front();
        }
    }

    /// What is held, the first record cut to the lines that are wanted of it.
    fn trimmed(mut self) -> VecDeque<LogItem> {
        let extra = self.held_lines.saturating_sub(self.lines);
        if let Some(LogItem::Record { data, at, .. }) = self.held.front_mut() {
            for _ in 0..extra {
                let cut = data.iter().position(|b| *b == b'\n').map_or(data.len(), |n| n + 1);
                *data = data.slice(cut..);
                at.line += 1;
            }
        }
        self.held
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::agent::log::{Header, Stream};

    use super::*;

    fn item(text: &str) -> LogItem {
        let header = Header { len: text.len() as u32, rank: 0, attempt: 1, stream: Stream::Stdout, flags: 0, time_us: 0 };
        LogItem::Record { header, data: Bytes::copy_from_slice(text.as_bytes()), at: LogPosition::default(), next: LogPosition::default() }
    }

    fn tail_of(lines: u64, records: &[&str]) -> (Vec<String>, u32) {
        let mut tail = Tail { lines, held: VecDeque::new(), held_lines: 0 };
        for record in records {
            tail.hold(item(record));
        }
        let held = tail.trimmed();
        let first = match held.front() {
            Some(LogItem::Record { at, .. }) => at.line,
            _ => 0,
        };
        let text = held
            .iter()
            .filter_map(|i| if let LogItem::Record { data, .. } = i { Some(String::from_utf8_lossy(data).into_owned()) } else { None });
        (text.collect(), first)
    }

    #[test]
    fn a_tail_is_cut_to_the_line() {
        assert_eq!(tail_of(3, &["a\nb\n", "c\n", "d\ne\n"]), (vec!["c\n".into(), "d\ne\n".into()], 0));
        assert_eq!(tail_of(2, &["a\nb\nc\nd\n"]), (vec!["c\nd\n".into()], 2));
        assert_eq!(tail_of(9, &["a\n", "b"]), (vec!["a\n".into(), "b".into()], 0));
        assert_eq!(tail_of(1, &["a\nb"]), (vec!["b".into()], 1));
    }
}
