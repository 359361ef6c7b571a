//! Logs on their way into stores when an attempt has ended: on the threads of uploads and at their pace, one piece in memory at a time.
//!
//! How far to go is measured when the order comes: between two attempts no shim writes, so what looks unfinished there is torn. What the store
//! has already is asked of the store itself, so who was cut off, or comes after an agent that was, goes on where that one ended. An order is held until it
//! is done; a fault is told and tried again after a pause that grows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use everlit_api::agent::log::{HEADER_BYTES, Records};
use everlit_api::agent::stored::{ArchiveOrder, Archived, StoreFault};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::store::{Archive, Fault, PIECE_BYTES, Piece, Settings, Store, Trouble};
use tokio::sync::{mpsc, watch};

use super::effects::Done;
use super::folders::Folders;
use super::limits::{UPLOAD_WAIT_MAX, UPLOAD_WAIT_MIN};
use super::logs::life;
use super::uploads::{Lane, Uploads};
use crate::shim::segments::{segment_name, segment_numbers};

/// An order, and how far the log went when it came.
#[derive(Debug, Clone, PartialEq)]
struct Wanted {
    order: ArchiveOrder,
    /// The last segment, and its length then.
    end: (u64, u64),
    /// Nobody wrote then.
    is_still: bool,
}

/// The logs that this node puts in stores.
#[derive(Default)]
pub(super) struct Archives {
    jobs: BTreeMap<JobId, watch::Sender<Wanted>>,
    busy: Arc<AtomicUsize>,
}

impl Archives {
    /// Takes an order up. `is_still`: no rank of the job lives here.
    pub(super) fn order(
        &mut self,
        order: ArchiveOrder,
        node: &NodeId,
        is_still: bool,
        folders: &Folders,
        uploads: &mut Uploads,
        done: &mpsc::Sender<Done>,
    ) {
        let job = order.job;
        let wanted = Wanted { end: end_of(&folders.logs(job)), order, is_still };
        if let Some(own) = self.jobs.get(&job).filter(|own| !own.is_closed()) {
            // It may be done with the one before: the same is looked at again, and said again.
            let _ = own.send(wanted);
            return;
        }
        let Some(runtime) = uploads.runtime() else { return };
        let (to, orders) = watch::channel(wanted);
        let lane = uploads.lane();
        let busy = Busy::new(&self.busy);
        let task = Tended { job, node: node.clone(), orders, folders: folders.clone(), lane, done: done.clone() };
        runtime.spawn(task.run(busy));
        self.jobs.insert(job, to);
    }

    /// The job goes: what is under way of it is given up.
    pub(super) fn drop_job(&mut self, job: JobId) {
        self.jobs.remove(&job);
    }

    /// Whether anything is under way, or waits for its next try.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }
}

/// Counts as work as long as it is there.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a log ends now.
fn end_of(dir: &Path) -> (u64, u64) {
    let last = segment_numbers(dir).last().copied();
    last.map_or((0, 0), |last| (last, std::fs::metadata(dir.join(segment_name(last))).map_or(0, |about| about.len())))
}

/// One job's.
struct Tended {
    job: JobId,
    node: NodeId,
    orders: watch::Receiver<Wanted>,
    folders: Folders,
    lane: Lane,
    done: mpsc::Sender<Done>,
}

impl Tended {
    async fn run(mut self, busy: Busy) {
        let count = busy.0.clone();
        let mut busy = Some(busy);
        let mut wait = UPLOAD_WAIT_MIN;
        loop {
            busy.get_or_insert_with(|| Busy::new(&count));
            let wanted = self.orders.borrow_and_update().clone();
            let (news, again) = match self.archive(&wanted).await {
                Ok(done) => (Done::Archived(done), false),
                Err(fault) => {
                    let told = StoreFault { job: self.job, step: None, trouble: fault.trouble, reason: fault.to_string() };
                    (Done::StoreFault(told), fault.trouble != Trouble::Damaged)
                }
            };
            // The driver is gone only when the agent ends.
            if self.done.send(news).await.is_err() {
                return;
            }
            if again {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(UPLOAD_WAIT_MAX);
                if self.orders.has_changed().is_err() {
                    return;
                }
            } else {
                wait = UPLOAD_WAIT_MIN;
                // An order that came meanwhile is work that waits.
                if !self.orders.has_changed().unwrap_or(false) {
                    busy = None;
                }
                if self.orders.changed().await.is_err() {
                    return;
                }
            }
        }
    }

    async fn archive(&self, wanted: &Wanted) -> Result<Archived, Fault> {
        let begun = Instant::now();
        let ended = || here("go on", "the job is gone");
        let _room = self.lane.room.acquire().await.map_err(|_| ended())?;
        let order = &wanted.order;
        let settings = tokio::task::block_in_place(Settings::of_process).with_job(&order.env);
        let base = order.to.parent().ok_or_else(|| here("open the archive", "its place in the store is none"))?;
        let archive = Archive::new(Store::open(&base, &settings)?.at(&order.job.to_string()));
        let dir = self.folders.logs(self.job);
        let (segment, offset, mut before) = archive.list(&self.node).await?.end().unwrap_or_default();
        let (mut at, mut sent) = ((segment, offset), 0);
        loop {
            let read = tokio::task::block_in_place(|| next(&dir, at, wanted));
            let read = read.map_err(|error| here(&format!("read {}", dir.display()), &error.to_string()))?;
            let Some(Read { segment, offset, bytes, lost }) = read else { break };
            before += lost;
            let piece = Piece { segment, from: offset, to: offset + bytes.len() as u64, before };
            if self.orders.has_changed().is_err() {
                return Err(ended());
            }
            let turn = self.lane.pace.turn(bytes.len()).saturating_duration_since(Instant::now());
            tokio::time::sleep(turn).await;
            archive.put(&self.node, &piece, bytes).await?;
            (at, before, sent) = ((segment, piece.to), piece.after(), sent + piece.bytes());
        }
        archive.end(&self.node, order.attempt, before).await?;
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Archived { job: self.job, attempt: order.attempt, bytes: sent, took_ms })
    }
}

fn here(asked: &str, why: &str) -> Fault {
    Fault { trouble: Trouble::Damaged, asked: asked.into(), why: why.into() }
}

/// Bytes that come next.
#[derive(Debug, PartialEq)]
struct Read {
    segment: u64,
    offset: u64,
    /// Whole records, and what a torn one left before them.
    bytes: Bytes,
    /// Bytes before them that are gone.
    lost: u64,
}

/// Reads on from a place, no further than is wanted and no more than a piece. `None`: that was all.
fn next(dir: &Path, at: (u64, u64), wanted: &Wanted) -> io::Result<Option<Read>> {
    let (mut segment, mut offset) = (at.0.max(1), at.1);
    let mut lost = 0;
    loop {
        if (segment, offset) >= wanted.end {
            return Ok(None);
        }
        let Some(number) = segment_numbers(dir).into_iter().find(|number| *number >= segment) else { return Ok(None) };
        if number > wanted.end.0 {
            return Ok(None);
        }
        let file = match File::open(dir.join(segment_name(number))) {
            // Removed beyond the bound of the log, in this moment.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let len = file.metadata()?.len();
        if number > segment {
            // Nobody measured what is gone: a neighbour's size is the estimate, as for readers.
            let first = segment.max(life(number));
            let begun = if first == segment { offset } else { 0 };
            lost += ((number - first) * len.max(1)).saturating_sub(begun);
            (segment, offset) = (number, 0);
        }
        let limit = if segment == wanted.end.0 { wanted.end.1.min(len) } else { len };
        let count = limit.saturating_sub(offset).min(PIECE_BYTES);
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, offset)?;
        let reached = offset + count >= limit;
        // In a segment that another follows, and at an end that nobody writes to, what looks unfinished is torn.
        let mut records = Records::new(&bytes, reached && (segment < wanted.end.0 || wanted.is_still));
        records.by_ref().for_each(drop);
        let consumed = match records.consumed() {
            // No record in all of a piece: not a log. It goes as it is.
            0 if !reached => bytes.len() - HEADER_BYTES,
            consumed => consumed,
        };
        if consumed > 0 {
            bytes.truncate(consumed);
            return Ok(Some(Read { segment, offset, bytes: bytes.into(), lost }));
        }
        if segment >= wanted.end.0 {
            return Ok(None);
        }
        (segment, offset) = (segment + 1, 0);
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::agent::log::{Header, Stream};
    use everlit_api::store::Listed;

    use super::*;
    use crate::agent::copies::tests::{Node, job, node};
    use crate::agent::logs::begin_life;
    use crate::agent::uploads::Pace;

    /// A node with a log, and a folder as its job's store.
    struct Scene {
        uploads: Uploads,
        archives: Archives,
        node: Node,
        shared: tempfile::TempDir,
        to: mpsc::Sender<Done>,
        done: mpsc::Receiver<Done>,
    }

    fn name() -> NodeId {
        NodeId("n1".into())
    }

    fn record(attempt: u32, text: &str) -> Vec<u8> {
        let header = Header { len: text.len() as u32, rank: 0, attempt, stream: Stream::Stdout, flags: 0, time_us: 0 };
        [&header.encode(text.as_bytes())[..], text.as_bytes()].concat()
    }

    impl Scene {
        fn new() -> Self {
            let (to, done) = mpsc::channel(8);
            let (uploads, archives) = (Uploads::new(Pace::new(None)), Archives::default());
            let own = Self { uploads, archives, node: node(), shared: tempfile::tempdir().unwrap(), to, done };
            std::fs::create_dir_all(own.dir()).unwrap();
            own
        }

        fn dir(&self) -> std::path::PathBuf {
            self.node.folders.logs(job())
        }

        fn segment(&self, number: u64, bytes: &[u8]) {
            std::fs::write(self.dir().join(segment_name(number)), bytes).unwrap();
        }

        fn send(&mut self, attempt: u32, is_still: bool) {
            let place = self.shared.path().join(job().to_string());
            let order = ArchiveOrder { job: job(), attempt, to: place.to_str().unwrap().parse().unwrap(), env: BTreeMap::new() };
            self.archives.order(order, &name(), is_still, &self.node.folders, &mut self.uploads, &self.to);
        }

        fn order(&mut self, attempt: u32, is_still: bool) -> Done {
            self.send(attempt, is_still);
            self.done.blocking_recv().unwrap()
        }

        /// What is there: names and all bytes, in order.
        fn kept(&self) -> (Listed, Vec<u8>) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let place = self.shared.path().to_str().unwrap().parse().unwrap();
            let archive = Archive::new(Store::open(&place, &Settings::default()).unwrap().at(&job().to_string()));
            runtime.block_on(async {
                let listed = archive.list(&name()).await.unwrap();
                let mut all = Vec::new();
                for piece in &listed.pieces {
                    all.extend(archive.read(&name(), piece).await.unwrap());
                }
                (listed, all)
            })
        }
    }

    fn sent(done: Done) -> (u32, u64) {
        match done {
            Done::Archived(done) => (done.attempt, done.bytes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_attempt_s_end_brings_what_came_since_byte_for_byte_in_pieces_of_bounded_size() {
        let mut scene = Scene::new();
        let text = "x".repeat(60_000);
        let first: Vec<u8> = (0..150).flat_map(|_| record(1, &text)).collect();
        scene.segment(1, &first);
        assert_eq!(sent(scene.order(1, true)), (1, first.len() as u64));
        let (listed, all) = scene.kept();
        assert_eq!((all == first, listed.pieces.len()), (true, 3));
        assert!(listed.pieces.iter().all(|piece| piece.bytes() <= PIECE_BYTES));
        assert_eq!(sent(scene.order(1, true)), (1, 0), "the same again brings nothing");
        let more = record(2, "later\n");
        scene.segment(1, &[first.clone(), more.clone()].concat());
        scene.segment(2, &record(2, "last\n"));
        // An agent after this one, which remembers nothing.
        scene.archives = Archives::default();
        let bytes = (more.len() + record(2, "last\n").len()) as u64;
        assert_eq!(sent(scene.order(2, true)), (2, bytes));
        let (listed, all) = scene.kept();
        assert_eq!(all, [first.clone(), more, record(2, "last\n")].concat());
        assert_eq!(listed.ends, [(1, first.len() as u64), (2, first.len() as u64 + bytes)].into());
    }

    #[test]
    fn what_is_torn_goes_with_it_only_when_nobody_writes_any_more() {
        let mut scene = Scene::new();
        let (whole, torn) = (record(1, "whole\n"), record(1, "torn\n"));
        let cut = [whole.clone(), torn[..torn.len() - 2].to_vec()].concat();
        scene.segment(1, &cut);
        assert_eq!(sent(scene.order(1, false)).1, whole.len() as u64);
        assert_eq!(sent(scene.order(1, true)).1, (cut.len() - whole.len()) as u64);
        assert_eq!(scene.kept().1, cut);
    }

    #[test]
    fn what_is_gone_here_leaves_a_hole_that_shows_and_another_disk_begins_above_all_that_was() {
        let mut scene = Scene::new();
        scene.segment(1, &record(1, "one\n"));
        let bytes = record(1, "one\n").len() as u64;
        assert_eq!(sent(scene.order(1, true)).1, bytes);
        // Two segments went beyond the bound.
        std::fs::remove_file(scene.dir().join(segment_name(1))).unwrap();
        scene.segment(3, &record(1, "two\n"));
        assert_eq!(sent(scene.order(1, true)).1, bytes);
        let listed = scene.kept().0;
        assert_eq!(listed.pieces[1], Piece { segment: 3, from: 0, to: bytes, before: 2 * bytes });
        std::fs::remove_dir_all(scene.dir()).unwrap();
        std::fs::create_dir_all(scene.dir()).unwrap();
        begin_life(&scene.dir(), 5).unwrap();
        let next = segment_numbers(&scene.dir())[0] + 1;
        scene.segment(next, &record(5, "three\n"));
        let more = record(5, "three\n").len() as u64;
        assert_eq!(sent(scene.order(5, true)).1, more);
        let (listed, all) = scene.kept();
        assert_eq!(listed.pieces[2], Piece { segment: (5 << 32) + 1, from: 0, to: more, before: 3 * bytes });
        assert_eq!(all, [record(1, "one\n"), record(1, "two\n"), record(5, "three\n")].concat());
    }

    #[test]
    fn a_store_that_fails_is_told_and_tried_again_until_it_works() {
        let mut scene = Scene::new();
        scene.segment(1, &record(1, "one\n"));
        let place = scene.shared.path().to_path_buf();
        std::fs::remove_dir(&place).unwrap();
        let Done::StoreFault(fault) = scene.order(1, true) else { panic!("it is not there") };
        assert_eq!((fault.trouble, fault.step), (Trouble::NoBucket, None));
        assert!(scene.archives.is_busy(), "an agent that ends waits for it");
        std::fs::create_dir(&place).unwrap();
        let mut news = scene.done.blocking_recv().unwrap();
        while let Done::StoreFault(_) = news {
            news = scene.done.blocking_recv().unwrap();
        }
        assert_eq!(sent(news).0, 1);
    }
}
