//! A node's part of a log out of its job's store, for a node that is not there: the same records at the same positions as on the node.
//!
//! It comes as a stream like those of agents, with the same credit, so readers merge and resume it as any other. What is missing is told to the
//! byte, since each piece's name says how much of the log stands before it. Every request has a time limit; who goes on reading is no concern
//! of this: it ends with its stream.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use everlit_api::agent::log::{FLAG_DROPPED, LogStart, Records};
use everlit_api::agent::{LOG_FRAME_BYTES_MAX, LogFrame};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::status::JobState;
use everlit_api::store::{Archive, Fault, Listed, Piece, Settings, Store, Trouble};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::LogMessage;
use crate::engine::state::Job;
use crate::shell::agents::Agents;

/// A request to a store, with its retries: shorter than anybody waits for a part of a log.
const ASK_MAX: Duration = Duration::from_secs(10);

/// Where a job's log is.
#[derive(Clone)]
pub struct Whereabouts {
    /// Nodes that have a part of it, in the order in which they came to the job.
    pub nodes: Vec<NodeId>,
    /// How far the job is.
    pub state: JobState,
    /// What says where its archive is and what opens it.
    pub spec: Arc<JobSpec>,
    /// Nodes whose part in the archive is whole only with the end of this attempt.
    pub wanted: BTreeMap<NodeId, u32>,
}

impl Whereabouts {
    /// Of a job.
    pub fn of(job: &Job) -> Self {
        let mut wanted = job.archiving.clone();
        let runs = job.gang.iter().flat_map(|gang| gang.placement.iter().map(|share| (share.node.clone(), gang.attempt)));
        wanted.extend(runs);
        Self { nodes: job.nodes.clone(), state: job.state, spec: job.spec.clone(), wanted }
    }
}

/// Opens a job's archive with the job's own keys, else with this process's.
pub(crate) fn open(spec: &JobSpec, job: JobId) -> Result<Archive, Fault> {
    let place = spec.archive(job).and_then(|place| place.parent());
    let settings = || Settings::of_process().with_job(&spec.environment());
    let none = || Fault { trouble: Trouble::Settings, asked: "open the archive".into(), why: "the job has no store".into() };
    Ok(Archive::new(Store::open(&place.ok_or_else(none)?, &settings())?.at(&job.to_string())))
}

/// A request that is not waited for for ever.
async fn ask<T>(what: &str, request: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let late = || Fault {
        trouble: Trouble::TimedOut,
        asked: what.into(),
        why: format!("the store did not answer within {} s", ASK_MAX.as_secs()),
    };
    timeout(ASK_MAX, request).await.unwrap_or_else(|_| Err(late()))
}

/// One stream out of an archive.
pub(super) struct Giver {
    pub(super) agents: Arc<Agents>,
    pub(super) stream: u64,
    /// Bytes that may be sent.
    pub(super) credit: Arc<Semaphore>,
    pub(super) spec: Arc<JobSpec>,
    pub(super) job: JobId,
    pub(super) node: NodeId,
    pub(super) start: LogStart,
    /// The attempt whose end must be there.
    pub(super) wanted: Option<u32>,
}

/// A piece, and the first byte of it that no piece before it has.
type Part = (Piece, u64);

fn parts(listed: &Listed) -> Vec<Part> {
    let mut end = (0, 0);
    let mut parts = Vec::with_capacity(listed.pieces.len());
    for piece in listed.pieces.iter().filter(|piece| piece.from < piece.to) {
        if (piece.segment, piece.to) > end {
            let from = if piece.segment == end.0 { piece.from.max(end.1) } else { piece.from };
            parts.push((*piece, from));
            end = (piece.segment, piece.to);
        }
    }
    parts
}

impl Giver {
    /// Gives all that there is from the start on, then says that this was all, or what is missing.
    pub(super) async fn run(self) {
        let message = match self.give().await {
            Ok(lacks) => LogMessage::Archived { lacks, failed: false },
            Err(fault) => LogMessage::Archived { lacks: Some(fault.to_string()), failed: true },
        };
        self.agents.streams.deliver(&self.node, self.stream, message);
    }

    async fn give(&self) -> Result<Option<String>, Fault> {
        let archive = open(&self.spec, self.job)?;
        let listed = ask("list the archive", archive.list(&self.node)).await?;
        let parts = parts(&listed);
        let start = match self.start {
            LogStart::Beginning => (0, 0),
            LogStart::At { segment, offset } => (segment, offset),
            LogStart::Tail { lines, rank, attempt } => self.locate(&archive, &parts, lines, rank, attempt).await?,
        };
        // Bytes of the log up to the start, as far as the piece there or before it tells.
        let before = parts.iter().rev().find(|(piece, _)| (piece.segment, piece.from) <= start);
        let mut given =
            before.map_or(
                0,
                |(piece, _)| {
                    if piece.segment == start.0 { piece.before + start.1.min(piece.to) - piece.from } else { piece.after() }
                },
            );
        for (piece, from) in parts.iter().filter(|(piece, _)| (piece.segment, piece.to) > start) {
            let from = if piece.segment == start.0 { start.1.max(*from) } else { *from };
            let bytes = match ask("read the archive", archive.read(&self.node, piece)).await {
                Ok(bytes) => bytes.slice(usize::try_from(from - piece.from).unwrap_or(bytes.len())..),
                // What follows tells how much that was.
                Err(fault) if matches!(fault.trouble, Trouble::NotFound | Trouble::Damaged) => continue,
                Err(fault) => return Err(fault),
            };
            let skipped = (piece.before + (from - piece.from)).saturating_sub(given);
            self.send(piece.segment, from, &bytes, skipped).await;
            given = piece.after();
        }
        Ok(self.lacks(&archive, &listed, given))
    }

    /// Why what was given is not all.
    fn lacks(&self, archive: &Archive, listed: &Listed, given: u64) -> Option<String> {
        let last = listed.end().map(|(.., bytes)| bytes);
        let all = listed.ends.values().copied().chain(last).max();
        match (all, self.wanted) {
            (None, _) => Some(format!("nothing of it is in {}", archive.place())),
            (Some(all), _) if all > given => Some(format!("{} bytes of it are missing in {}", all - given, archive.place())),
            (_, Some(attempt)) if listed.ends.keys().all(|own| *own < attempt) => {
                Some(format!("what it wrote last, in attempt {attempt}, is not in {}", archive.place()))
            }
            _ => None,
        }
    }

    /// Whole records of a piece, in frames, as its credit allows.
    async fn send(&self, segment: u64, from: u64, bytes: &Bytes, mut skipped: u64) {
        let mut at = 0;
        while at < bytes.len() {
            let window = bytes.slice(at..bytes.len().min(at + LOG_FRAME_BYTES_MAX));
            let mut records = Records::new(&window, at + window.len() == bytes.len());
            let first = records.by_ref().fold(None, |first: Option<usize>, record| Some(first.unwrap_or(record.at)));
            let consumed = records.consumed();
            let Some(first) = first else {
                // No record: it is none of ours, or the rest of one that was torn.
                let passed = if consumed > 0 { consumed } else { window.len() };
                (at, skipped) = (at + passed, skipped + passed as u64);
                continue;
            };
            let records = window.slice(first..consumed);
            // Closed with the stream, which nobody does before this has ended.
            let Ok(credit) = self.credit.acquire_many(u32::try_from(records.len()).unwrap_or(u32::MAX)).await else { return };
            credit.forget();
            let offset = from + (at + first) as u64;
            let header = LogFrame { stream: self.stream, segment, offset, skipped: skipped + first as u64, caught_up: false };
            self.agents.streams.deliver(&self.node, self.stream, LogMessage::Frame(header, records));
            (at, skipped) = (at + consumed, 0);
        }
    }

    /// Where the last lines begin: from the newest piece back, one in memory at a time.
    async fn locate(
        &self,
        archive: &Archive,
        parts: &[Part],
        lines: u64,
        rank: Option<u32>,
        attempt: Option<u32>,
    ) -> Result<(u64, u64), Fault> {
        let mut wanted = lines;
        let mut begin = parts.last().map_or((0, 0), |(piece, _)| (piece.segment, piece.to));
        for (piece, from) in parts.iter().rev() {
            if wanted == 0 {
                break;
            }
            let bytes = match ask("read the archive", archive.read(&self.node, piece)).await {
                Ok(bytes) => bytes.slice(usize::try_from(from - piece.from).unwrap_or(bytes.len())..),
                Err(fault) if matches!(fault.trouble, Trouble::NotFound | Trouble::Damaged) => continue,
                Err(fault) => return Err(fault),
            };
            let mut kept: VecDeque<(usize, u64)> = VecDeque::new();
            let mut total = 0;
            for record in Records::new(&bytes, true) {
                let header = record.header;
                let other = rank.is_some_and(|rank| rank != header.rank) || attempt.is_some_and(|attempt| attempt != header.attempt);
                if other || header.flags & FLAG_DROPPED != 0 {
                    continue;
                }
                let own = record.data.iter().filter(|byte| **byte == b'\n').count() as u64;
                kept.push_back((record.at, own));
                total += own;
                while kept.front().is_some_and(|(_, first)| total - first >= wanted) {
                    total -= kept.pop_front().map_or(0, |(_, first)| first);
                }
            }
            if let Some((at, _)) = kept.front() {
                begin = (piece.segment, from + *at as u64);
            }
            wanted -= total.min(wanted);
        }
        Ok(begin)
    }
}
