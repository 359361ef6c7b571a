//! Readers of a job's log: a stream over the link of each node that has a part of it, with credit, so that a slow reader holds up only itself.
//!
//! Promised: the order of a node's lines is the order in its segments, for ever; over any reconnect no line is lost or repeated, for an id is the
//! vector of the places on all nodes. Between nodes history is merged by time as long as every node answers; one that is silent for 2 s (10 s
//! while it looks for where a tail begins) is not waited for, and its lines come when they come. What is new comes in the order of arrival.
//! A node that is gone: what its job's store has of its log comes from there (`logs::archive`), at the same positions; what is not there is told.
//! Not promised: that two readers see lines of different nodes in the same order; a tail has no lines of nodes that did not answer in time.
//! A job's end: once it is final the log is read once more without following, so nothing written before the end is missed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use everlit_api::agent::log::LogStart;
use everlit_api::agent::{LOG_CREDIT_BYTES, LogFrame};
use everlit_api::control::{LogItem, LogQuery};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::problem::{Code, Problem};
use everlit_api::status::JobState;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep_until};

use super::agents::Agents;
use super::driver::News;
pub use archive::Whereabouts;
use sources::Sources;
use tail::Tail;

pub(super) mod archive;
mod merge;
mod sources;
mod tail;

/// Items that wait for a reader.
pub const ITEMS_MAX: usize = 256;
/// Frames of one stream that may wait for its reader; so many small ones that their bytes are far from the credit are no log.
const FRAMES_WAITING_MAX: u64 = LOG_CREDIT_BYTES / 16;
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
    /// What an archive has was given.
    Archived {
        /// What it has not, for people.
        lacks: Option<String>,
        /// That is because it could not be read.
        failed: bool,
    },
}

#[derive(Debug)]
struct Open {
    node: NodeId,
    to: mpsc::UnboundedSender<(u64, LogMessage)>,
    /// Bytes and frames that came and that its reader has not taken.
    waiting: (u64, u64),
}

/// What became of something that came for a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Its reader has it, or is gone.
    Done,
    /// The stream is of another node: passed over.
    Foreign,
    /// More than there was credit for: whoever sends so fills our memory.
    Overrun,
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

    fn add(&self, node: NodeId, to: mpsc::UnboundedSender<(u64, LogMessage)>) -> u64 {
        let stream = self.next.fetch_add(1, Ordering::Relaxed);
        self.open().insert(stream, Open { node, to, waiting: (0, 0) });
        stream
    }

    /// Passes on what a node sent for a stream.
    pub fn deliver(&self, node: &NodeId, stream: u64, message: LogMessage) -> Delivery {
        let mut all = self.open();
        // Closed a moment ago.
        let Some(open) = all.get_mut(&stream) else { return Delivery::Done };
        if open.node != *node {
            return Delivery::Foreign;
        }
        if let LogMessage::Frame(_, records) = &message {
            open.waiting = (open.waiting.0 + records.len() as u64, open.waiting.1 + 1);
            if open.waiting.0 > LOG_CREDIT_BYTES || open.waiting.1 > FRAMES_WAITING_MAX {
                return Delivery::Overrun;
            }
        }
        let _ = open.to.send((stream, message));
        Delivery::Done
    }

    /// A reader took a frame of so many bytes: its node may send as many.
    fn taken(&self, stream: u64, bytes: u64) {
        if let Some(open) = self.open().get_mut(&stream) {
            open.waiting = (open.waiting.0.saturating_sub(bytes), open.waiting.1.saturating_sub(1));
        }
    }

    /// A node's link ended.
    pub fn node_gone(&self, node: &NodeId) {
        for (stream, open) in self.open().iter().filter(|(_, o)| o.node == *node) {
            let _ = open.to.send((*stream, LogMessage::Gone));
        }
    }
}

/// Where a job's log is and how far the job is; `None` when it is gone.
pub type Look = Box<dyn Fn() -> futures_util::future::BoxFuture<'static, Option<Whereabouts>> + Send + Sync>;

/// One reader of one job's log.
pub struct Reader {
    /// Links and streams.
    pub agents: Arc<Agents>,
    /// Which job.
    pub job: JobId,
    /// Where its log is; on no node when it never had a place.
    pub at: Whereabouts,
    /// What is wanted.
    pub query: LogQuery,
    /// How it ended, when it has.
    pub ended: Option<JobState>,
    /// Tells of the end.
    pub news: broadcast::Receiver<News>,
    /// Finds out where the log is and whether the job is final, after news of it or when some were missed.
    pub look: Look,
    /// Where items go.
    pub items: mpsc::Sender<LogItem>,
}

impl Reader {
    /// Gives out items until the end, or until nobody takes them.
    pub async fn run(mut self) {
        let mut changes = self.agents.changes();
        let mut sources = Sources::new(self.agents.clone(), self.job, &self.query);
        let mut tail = self.query.tail.filter(|_| self.query.after.is_none()).map(|lines| Tail::new(lines.min(TAIL_LINES_MAX)));
        loop {
            let now = Instant::now();
            self.add_new(&mut sources, tail.is_some(), now);
            // Before anybody is called silent.
            while let Ok((stream, message)) = sources.inbox.try_recv() {
                sources.on_message(stream, message, now);
            }
            let follow = self.query.follow && self.ended.is_none();
            sources.open(follow, &self.at, now);
            sources.judge(now);
            sources.settle(follow, now);
            if !self.give_out(&mut sources, &mut tail, follow).await {
                return;
            }
            let now = Instant::now();
            if let Some(end) = sources.end(follow, now) {
                return self.last_words(end).await;
            }
            let deadline = sources.deadline(now);
            tokio::select! {
                Some((stream, message)) = sources.inbox.recv() => sources.on_message(stream, message, Instant::now()),
                () = self.items.closed() => return,
                // An error is the end of all links, and of this process.
                _ = changes.changed() => {}
                news = self.news.recv(), if follow => if !self.on_news(news).await {
                    return;
                },
                () = async { sleep_until(deadline.expect("guarded")).await }, if deadline.is_some() => {}
            }
        }
    }

    /// Nodes that came to the job, now or since.
    fn add_new(&self, sources: &mut Sources, tail: bool, now: Instant) {
        let live = sources.len() > 0 && !tail;
        for index in sources.len()..self.at.nodes.len() {
            let start = match (&self.query.after, self.query.tail) {
                (Some(place), _) => {
                    let at = place.of(index);
                    LogStart::At { segment: at.segment, offset: at.offset }
                }
                (None, Some(lines)) if tail => {
                    LogStart::Tail { lines: lines.min(TAIL_LINES_MAX), rank: self.query.rank, attempt: self.query.attempt }
                }
                _ => LogStart::Beginning,
            };
            sources.add(self.at.nodes[index].clone(), start, live, now);
        }
    }

    /// False when nobody takes items any more, or one was the last.
    async fn give_out(&self, sources: &mut Sources, tail: &mut Option<Tail>, follow: bool) -> bool {
        while let Some(item) = sources.next() {
            let is_last = matches!(item, LogItem::Failed(_));
            match tail {
                Some(tail) if !is_last && !matches!(item, LogItem::Missing { .. }) => tail.hold(item),
                _ if self.items.send(item).await.is_err() || is_last => return false,
                _ => {}
            }
        }
        if !sources.is_level() {
            return true;
        }
        let Some(tail) = tail.take() else { return true };
        // Who is late would bring more lines than were asked for; a follower wants them none the less.
        let missing = if follow { Vec::new() } else { sources.abandon() };
        for item in tail.trimmed().chain(missing) {
            if self.items.send(item).await.is_err() {
                return false;
            }
        }
        true
    }

    async fn last_words(&self, end: Result<Vec<LogItem>, Problem>) {
        let last = self.ended.map_or(LogItem::CaughtUp, LogItem::End);
        let items = end.map_or_else(|problem| vec![LogItem::Failed(problem)], |missing| missing.into_iter().chain([last]).collect());
        for item in items {
            // Nobody listening is no error.
            let _ = self.items.send(item).await;
        }
    }

    /// False when there is nothing more to read.
    async fn on_news(&mut self, news: Result<News, broadcast::error::RecvError>) -> bool {
        match news {
            Ok(News::Final(job, state)) if job == self.job => {
                self.ended = Some(state);
                true
            }
            // What a long job has most of moves it nowhere.
            Ok(News::Event(event)) if event.view.job_id == Some(self.job) && event.view.event != "checkpoint_committed" => {
                self.look_again().await
            }
            Ok(_) => true,
            Err(broadcast::error::RecvError::Lagged(_)) => self.look_again().await,
            Err(broadcast::error::RecvError::Closed) => false,
        }
    }

    /// False when the job is gone.
    async fn look_again(&mut self) -> bool {
        let Some(at) = (self.look)().await else {
            let gone = Problem::new(Code::NotFound, format!("job {} was removed", self.job));
            let _ = self.items.send(LogItem::Failed(gone)).await;
            return false;
        };
        self.ended = at.state.is_final().then_some(at.state);
        self.at = at;
        true
    }
}

#[cfg(test)]
mod tests;
