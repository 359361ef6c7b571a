//! The nodes that have a part of a job's log: a stream over the link of each, and what came over it.
//!
//! Frames are kept as bytes, which the credit of each stream bounds, and cut into records only as the merge takes them. The trap: a source goes on
//! after the last frame that *came*, also when that is not given out yet, for what is here survives the stream that brought it. A node that is not
//! linked is read from its job's archive, where there is one, once; and so is what a linked node has no more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use everlit_api::agent::log::{LogPosition, LogStart, Records};
use everlit_api::agent::{LOG_CREDIT_BYTES, LogFrame, ToAgent};
use everlit_api::control::{LogItem, LogQuery};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::problem::{Code, Problem};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::archive::{Giver, Whereabouts};
use super::merge::Merge;
use super::{LogMessage, NODE_WAIT};
use crate::shell::agents::Agents;

/// A source that is silent for longer holds nobody up.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// The same while a linked node looks for where a tail begins: it may have to read its whole log.
const LOCATE_MAX: Duration = Duration::from_secs(10);

/// An archive that has not all of a node's part was read, and the node may only be between two links: it is waited for so long.
const ARCHIVED_WAIT: Duration = Duration::from_secs(5);
/// Segments of one life of a node's disk: one that is new begins above all that were there before.
const LIFE_SEGMENTS: u64 = 1 << 32;

/// How far a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There is more, older than now.
    History,
    /// It was at its end: what comes is new.
    Live,
    /// Everything came.
    Done,
    /// It can not be had, and that is told.
    Missing,
}

/// What is known of a node's part in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Shelved {
    /// It was not asked.
    Unread,
    /// A linked node does not have what it may have: it comes first.
    Wanted,
    /// It gave all that it has, when the reader followed or when it did not; and what it lacks.
    Read { follow: bool, lacks: Option<String> },
}

/// Where a stream that is open comes from.
enum From {
    Node,
    Archive { credit: Arc<Semaphore>, task: AbortHandle },
}

/// A stream that is open. Closes it at the agent when it goes, however that happens.
struct Stream {
    agents: Arc<Agents>,
    node: NodeId,
    id: u64,
    follow: bool,
    from: From,
}

impl Stream {
    fn is_archived(&self) -> bool {
        matches!(self.from, From::Archive { .. })
    }

    /// A frame of so many bytes was taken: as many may follow.
    fn taken(&self, bytes: usize) {
        self.agents.streams.taken(self.id, bytes as u64);
        match &self.from {
            From::Node => self.agents.tell(&self.node, &ToAgent::LogCredit { stream: self.id, bytes: bytes as u64 }),
            From::Archive { credit, .. } => credit.add_permits(bytes),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let was_open = self.agents.streams.open().remove(&self.id).is_some();
        match &self.from {
            From::Node if was_open => self.agents.tell(&self.node, &ToAgent::CloseLog { stream: self.id }),
            From::Node => {}
            From::Archive { task, .. } => task.abort(),
        }
    }
}

/// A frame, and how far it is cut into records.
struct Frame {
    header: LogFrame,
    records: Bytes,
    read: usize,
    begun: bool,
    /// Its first record is where a tail begins.
    begins_tail: bool,
    /// Something of it was wanted.
    gave: bool,
}

struct Source {
    node: NodeId,
    /// Where a stream that is opened now begins.
    start: LogStart,
    stream: Option<Stream>,
    frames: VecDeque<Frame>,
    phase: Phase,
    /// Why its log can not be read; told after what came before.
    error: Option<String>,
    quiet_since: Instant,
    away_since: Option<Instant>,
    shelved: Shelved,
    /// Its job has an archive.
    has_archive: bool,
    /// Something of it came.
    came: bool,
    /// What is told after all that came.
    last_word: Option<LogItem>,
}

impl Source {
    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Done | Phase::Missing)
    }

    fn stays_away(&self, now: Instant) -> bool {
        self.away_since.is_some_and(|since| now >= since + NODE_WAIT)
    }

    fn patience(&self) -> Duration {
        let looks = self.stream.as_ref().is_some_and(|own| own.is_archived() || matches!(self.start, LogStart::Tail { .. }));
        if looks { LOCATE_MAX } else { QUIET_MAX }
    }

    /// A linked node begins later than it was asked to, or has nothing at all: what was there before may be in the archive.
    fn may_be_archived(&self, header: &LogFrame, records: &[u8]) -> bool {
        let has_nothing = records.is_empty() && header.caught_up && !self.came;
        let is_later = match self.start {
            LogStart::Beginning => header.skipped > 0 || header.segment >= LIFE_SEGMENTS,
            LogStart::At { segment, .. } => header.skipped > 0 || header.segment / LIFE_SEGMENTS > segment / LIFE_SEGMENTS,
            LogStart::Tail { .. } => false,
        } || has_nothing;
        self.has_archive && is_later && self.shelved == Shelved::Unread && self.stream.as_ref().is_some_and(|own| !own.is_archived())
    }

    fn missing(&self, reason: &str) -> LogItem {
        LogItem::Missing { node: self.node.clone(), reason: reason.into() }
    }
}

/// All sources of one reader.
pub(super) struct Sources {
    agents: Arc<Agents>,
    job: JobId,
    rank: Option<u32>,
    attempt: Option<u32>,
    to: mpsc::UnboundedSender<(u64, LogMessage)>,
    /// What comes over the links.
    pub(super) inbox: mpsc::UnboundedReceiver<(u64, LogMessage)>,
    list: Vec<Source>,
    merge: Merge<LogItem>,
}

impl Sources {
    /// None yet.
    pub(super) fn new(agents: Arc<Agents>, job: JobId, query: &LogQuery) -> Self {
        // Unbounded as a type, bounded by the credit that is given.
        let (to, inbox) = mpsc::unbounded_channel();
        Self { agents, job, rank: query.rank, attempt: query.attempt, to, inbox, list: Vec::new(), merge: Merge::default() }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// One more. `live`: the others do not wait for its history.
    pub(super) fn add(&mut self, node: NodeId, start: LogStart, live: bool, now: Instant) {
        let phase = if live { Phase::Live } else { Phase::History };
        let source = Source {
            node,
            start,
            stream: None,
            frames: VecDeque::new(),
            phase,
            error: None,
            quiet_since: now,
            away_since: None,
            shelved: Shelved::Unread,
            has_archive: false,
            came: false,
            last_word: None,
        };
        self.list.push(source);
        self.merge.add(!live);
    }

    /// Opens what is not open and can be, and opens anew what must not follow any more.
    pub(super) fn open(&mut self, follow: bool, at: &Whereabouts, now: Instant) {
        for source in self.list.iter_mut().filter(|source| !source.is_over()) {
            // What is read from an archive has an end, whoever follows.
            if source.stream.as_ref().is_some_and(|stream| stream.follow == follow || stream.is_archived()) {
                continue;
            }
            source.stream = None;
            source.has_archive = at.spec.archive(self.job).is_some();
            let is_linked = self.agents.is_linked(&source.node);
            let is_unread = source.shelved == Shelved::Unread || matches!(source.shelved, Shelved::Read { follow: true, .. } if !follow);
            if source.has_archive && (source.shelved == Shelved::Wanted || (!is_linked && is_unread)) {
                source.away_since = if is_linked { None } else { source.away_since.or(Some(now)) };
                source.stream = Some(archived(&self.agents, &self.to, self.job, source, follow, at));
                continue;
            }
            if is_linked {
                let id = self.agents.streams.add(source.node.clone(), self.to.clone());
                source.stream = Some(Stream { agents: self.agents.clone(), node: source.node.clone(), id, follow, from: From::Node });
                self.agents.tell(&source.node, &ToAgent::OpenLog { stream: id, job: self.job, from: source.start, follow });
                source.away_since = None;
            }
            // Asked again: of a link that went in between nobody tells this stream.
            if !self.agents.is_linked(&source.node) {
                source.stream = None;
                source.away_since.get_or_insert(now);
            }
        }
    }

    /// What came for a stream; of one that is not open any more it is passed over.
    pub(super) fn on_message(&mut self, stream: u64, message: LogMessage, now: Instant) {
        let is_its = |source: &Source| source.stream.as_ref().is_some_and(|own| own.id == stream);
        let Some(index) = self.list.iter().position(is_its) else { return };
        let source = &mut self.list[index];
        source.quiet_since = now;
        match message {
            LogMessage::Frame(header, records) if source.may_be_archived(&header, &records) => {
                source.shelved = Shelved::Wanted;
                source.stream = None;
            }
            LogMessage::Frame(header, records) => {
                source.came = true;
                let begins_tail = matches!(source.start, LogStart::Tail { .. });
                source.start = LogStart::At { segment: header.segment, offset: header.offset + records.len() as u64 };
                if header.caught_up && source.phase == Phase::History {
                    source.phase = Phase::Live;
                }
                source.frames.push_back(Frame { header, records, read: 0, begun: false, begins_tail, gave: false });
            }
            LogMessage::Archived { lacks, failed } => {
                let follow = source.stream.take().is_some_and(|stream| stream.follow);
                if failed && source.shelved == Shelved::Wanted {
                    source.last_word = lacks.as_ref().map(|why| source.missing(&format!("its archive can not be read: {why}")));
                }
                source.shelved = Shelved::Read { follow, lacks };
            }
            LogMessage::Closed(error) => {
                source.phase = if error.is_none() { Phase::Done } else { Phase::Missing };
                source.error = error;
                source.stream = None;
            }
            // An archive is read on: its node's link is nothing to it.
            LogMessage::Gone if source.stream.as_ref().is_some_and(Stream::is_archived) => {}
            LogMessage::Gone => source.stream = None,
        }
        let waited_for = source.phase == Phase::History;
        self.merge.wait_for(index, waited_for);
        self.fill(index);
    }

    /// The next item, when there is one.
    pub(super) fn next(&mut self) -> Option<LogItem> {
        let (index, item) = self.merge.pop()?;
        if self.merge.is_out_of(index) {
            self.fill(index);
            if self.merge.misses(index) {
                self.list[index].quiet_since = Instant::now();
            }
        }
        Some(item)
    }

    /// Cuts records of what came, as many as there is room for.
    fn fill(&mut self, index: usize) {
        let source = &mut self.list[index];
        while self.merge.room(index) > 0
            && let Some(frame) = source.frames.front_mut()
        {
            let (segment, offset) = (frame.header.segment, frame.header.offset);
            let place = |at: usize| LogPosition { segment, offset: offset + at as u64, line: 0 };
            if !std::mem::replace(&mut frame.begun, true) {
                if frame.begins_tail {
                    self.merge.push(index, None, LogItem::Passed { source: index, next: place(0) });
                }
                if frame.header.skipped > 0 {
                    frame.gave = true;
                    self.merge.push(index, None, LogItem::Gap { source: index, bytes: frame.header.skipped, next: place(0) });
                }
            }
            let (from, rest) = (frame.read, frame.records.slice(frame.read..));
            let mut last_us = None;
            let mut records = Records::new(&rest, true);
            while self.merge.room(index) > 0
                && let Some(record) = records.next()
            {
                frame.read = from + record.end;
                last_us = Some(record.header.time_us);
                let ours = self.rank.is_none_or(|rank| rank == record.header.rank)
                    && self.attempt.is_none_or(|attempt| attempt == record.header.attempt);
                if ours {
                    frame.gave = true;
                    let (at, next) = (place(from + record.at), place(from + record.end));
                    let data = rest.slice_ref(record.data);
                    self.merge.push(index, last_us, LogItem::Record { source: index, header: record.header, data, at, next });
                }
            }
            if self.merge.room(index) == 0 {
                break;
            }
            let len = frame.records.len();
            if !frame.gave && len > 0 {
                // A reader that comes back need not read it again.
                self.merge.push(index, last_us, LogItem::Passed { source: index, next: place(len) });
            }
            if let Some(stream) = source.stream.as_ref().filter(|stream| stream.id == frame.header.stream) {
                stream.taken(len);
            }
            source.frames.pop_front();
        }
        self.tell_error(index);
    }

    fn tell_error(&mut self, index: usize) {
        let alone = self.list.len() == 1;
        let source = &mut self.list[index];
        if source.frames.is_empty()
            && let Some(item) = source.last_word.take()
        {
            self.merge.push(index, None, item);
        }
        if source.frames.is_empty()
            && let Some(error) = source.error.take()
        {
            let why = format!("the log can not be read: {error}");
            let item = if alone { LogItem::Failed(Problem::new(Code::Internal, why)) } else { source.missing(&why) };
            self.merge.push(index, None, item);
        }
    }

    /// Whoever is silent for too long holds nobody up any more, until something comes.
    pub(super) fn judge(&mut self, now: Instant) {
        for (index, source) in self.list.iter().enumerate().filter(|_| self.list.len() > 1) {
            if self.merge.misses(index) && now >= source.quiet_since + source.patience() {
                self.merge.wait_for(index, false);
            }
        }
    }

    /// A node that is gone and whose archive was read is not waited for: at once when that was all, else when it does not come back soon.
    pub(super) fn settle(&mut self, follow: bool, now: Instant) {
        let alone = self.list.len() == 1;
        for index in 0..self.list.len() {
            let source = &mut self.list[index];
            let Shelved::Read { lacks, .. } = &source.shelved else { continue };
            let is_open = source.phase == Phase::History || (source.phase == Phase::Live && !follow);
            let Some(since) = source.away_since.filter(|_| is_open && source.stream.is_none()) else { continue };
            if lacks.is_some() && now < since + ARCHIVED_WAIT {
                continue;
            }
            source.last_word = lacks.as_ref().map(|lacks| {
                let reason = format!("it is not connected, and of its archive: {lacks}");
                let problem = || Problem::new(Code::NodeUnavailable, format!("node {}: {reason}", source.node)).retry_after(3);
                let nothing = alone && !follow && !source.came;
                if nothing { LogItem::Failed(problem()) } else { source.missing(&reason) }
            });
            source.phase = if follow { Phase::Live } else { Phase::Done };
            self.merge.wait_for(index, false);
            self.fill(index);
        }
    }

    /// When to look again although nothing came.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let missed = |index: &usize| self.list.len() > 1 && self.merge.misses(*index);
        let quiet = (0..self.list.len()).filter(missed).map(|index| self.list[index].quiet_since + self.list[index].patience());
        let away = self.list.iter().filter_map(|source| source.away_since.map(|since| since + NODE_WAIT)).filter(|at| *at > now);
        let shelved = self.list.iter().filter(|source| source.phase == Phase::History && matches!(source.shelved, Shelved::Read { .. }));
        let settled = shelved.filter_map(|source| source.away_since.map(|since| since + ARCHIVED_WAIT)).filter(|at| *at > now);
        quiet.chain(away).chain(settled).min()
    }

    /// Everything that is there was taken, nobody is waited for, and somebody was at his end.
    pub(super) fn is_level(&self) -> bool {
        self.merge.is_level() && self.list.iter().any(|source| matches!(source.phase, Phase::Live | Phase::Done))
    }

    /// Gives up those that have not come to their end; tells whose part is missing.
    pub(super) fn abandon(&mut self) -> Vec<LogItem> {
        let late = self.list.iter_mut().filter(|source| source.phase == Phase::History);
        late.map(|source| {
            let reason = if source.stream.take().is_some() { "it does not answer" } else { "it is not connected" };
            source.phase = Phase::Missing;
            source.missing(reason)
        })
        .collect()
    }

    /// How it ends, once it does: whose part is missing; else that there is nothing to be had.
    pub(super) fn end(&self, follow: bool, now: Instant) -> Option<Result<Vec<LogItem>, Problem>> {
        if (0..self.list.len()).any(|index| !self.merge.is_out_of(index)) {
            return None;
        }
        let awaited = || self.list.iter().filter(|source| !source.is_over());
        if self.list.is_empty() {
            return (!follow).then(|| Ok(Vec::new()));
        }
        if !awaited().all(|source| source.stays_away(now)) {
            return None;
        }
        if !follow && self.list.iter().any(|source| source.phase == Phase::Done) {
            return Some(Ok(awaited().map(|source| source.missing("it is not connected")).collect()));
        }
        let names: Vec<&str> = awaited().map(|source| source.node.0.as_str()).collect();
        let why = match names[..] {
            [] => "no node has a part of this log that can be read".into(),
            [node] => format!("node {node} has the log and is not connected"),
            _ => format!("nodes {} have the log and are not connected", names.join(", ")),
        };
        Some(Err(Problem::new(Code::NodeUnavailable, why).retry_after(3)))
    }
}

/// A node's part as its job's archive has it.
fn archived(
    agents: &Arc<Agents>,
    to: &mpsc::UnboundedSender<(u64, LogMessage)>,
    job: JobId,
    source: &Source,
    follow: bool,
    at: &Whereabouts,
) -> Stream {
    let node = source.node.clone();
    let id = agents.streams.add(node.clone(), to.clone());
    let credit = Arc::new(Semaphore::new(LOG_CREDIT_BYTES as usize));
    let giver = Giver {
        agents: agents.clone(),
        stream: id,
        credit: credit.clone(),
        spec: at.spec.clone(),
        job,
        node: node.clone(),
        start: source.start,
        wanted: at.wanted.get(&node).copied(),
    };
    let task = tokio::spawn(giver.run()).abort_handle();
    Stream { agents: agents.clone(), node, id, follow, from: From::Archive { credit, task } }
}
