//! Checkpoints on their way into stores, behind training: on threads of their own that yield to ranks, some at a time, with bounded memory
//! and at most so many bytes a second.
//!
//! Each job has one task that holds the newest order until it is done: a fault is told and tried again after a pause that grows, unless what is
//! here is damaged. A newer
//! order is taken up when the one under way is done or has failed. What is being uploaded is held by links of its own, so that ranks and
//! agent may remove older checkpoints meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use everlit_api::agent::stored::{StoreFault, UploadOrder, Uploaded};
use everlit_api::ids::JobId;
use everlit_api::manifest::{Manifest, ManifestFile};
use everlit_api::store::{Begun, CheckedFile, Fault, NotKept, Sending, Settings, Shelf, Source, Store, Trouble, Window, digest};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Semaphore, mpsc, watch};

use super::effects::{Done, not_found_is_fine};
use super::folders::Folders;
use super::limits::{ABANDON_MAX, UPLOAD_WAIT_MAX, UPLOAD_WAIT_MIN, UPLOADS_AT_ONCE};
use crate::checkpoint::{self, Damage};

/// How many bytes a second all uploads of this node take together.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Pace {
    /// `None`: as many as go.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// When so many bytes may be sent.
    pub(super) fn turn(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) else { return now };
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*free_at).max(now);
        *free_at = at + Duration::from_secs_f64(bytes as f64 / rate as f64);
        at
    }
}

/// What all that is sent to stores shares.
#[derive(Clone)]
pub(super) struct Lane {
    /// How fast.
    pub pace: Arc<Pace>,
    /// How many at a time.
    pub room: Arc<Semaphore>,
    /// How much in memory.
    pub window: Window,
}

/// The uploads of this node.
pub(super) struct Uploads {
    runtime: Option<Runtime>,
    jobs: BTreeMap<JobId, watch::Sender<UploadOrder>>,
    lane: Lane,
    busy: Arc<AtomicUsize>,
}

impl Uploads {
    /// None yet.
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            runtime: None,
            jobs: BTreeMap::new(),
            lane: Lane { pace: Arc::new(pace), room: Arc::new(Semaphore::new(UPLOADS_AT_ONCE)), window: Window::default() },
            busy: Arc::default(),
        }
    }

    /// Takes an order up; the same one again changes nothing.
    pub(super) fn order(&mut self, order: UploadOrder, folders: &Folders, done: &mpsc::Sender<Done>) {
        if let Some(own) = self.jobs.get(&order.job).filter(|own| !own.is_closed()) {
            own.send_if_modified(|known| {
                let news = *known != order;
                *known = order;
                news
            });
            return;
        }
        let Some(runtime) = self.runtime() else { return };
        let job = order.job;
        let (to, orders) = watch::channel(order);
        let task = Tended {
            job,
            orders,
            folders: folders.clone(),
            lane: self.lane.clone(),
            begun: Begun::default(),
            busy: self.busy.clone(),
            done: done.clone(),
        };
        runtime.spawn(task.run());
        self.jobs.insert(job, to);
    }

    /// Few threads, which yield to ranks: a step must not wait for an upload.
    pub(super) fn runtime(&mut self) -> Option<Handle> {
        if self.runtime.is_none() {
            let built = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .thread_name("upload")
                .on_thread_start(be_nice)
                .enable_all()
                .build();
            match built {
                Ok(runtime) => self.runtime = Some(runtime),
                Err(error) => tracing::warn!(%error, "nothing can be uploaded"),
            }
        }
        self.runtime.as_ref().map(|runtime| runtime.handle().clone())
    }

    /// What all that is sent to stores shares.
    pub(super) fn lane(&self) -> Lane {
        self.lane.clone()
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

impl Drop for Uploads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// This thread comes after all others that want to run.
fn be_nice() {
    const NICE: i32 = 15;
    // SAFETY: the call has no memory to go wrong with; 0 is the calling thread. That it may fail costs only some speed of the ranks.
    let _ = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
}

/// One job's uploads.
struct Tended {
    job: JobId,
    orders: watch::Receiver<UploadOrder>,
    folders: Folders,
    lane: Lane,
    /// What a try that broke off has brought of large files.
    begun: Begun,
    busy: Arc<AtomicUsize>,
    done: mpsc::Sender<Done>,
}

impl Tended {
    async fn run(mut self) {
        let (mut wait, mut last) = (UPLOAD_WAIT_MIN, None);
        loop {
            let order = self.orders.borrow_and_update().clone();
            self.busy.fetch_add(1, Ordering::Relaxed);
            if last.replace(order.step).is_some_and(|last| last != order.step) {
                self.abandon().await;
            }
            let outcome = self.upload(&order).await;
            let gone = self.orders.has_changed().is_err();
            let again = !gone && matches!(&outcome, Err(NotKept::Fault(fault)) if is_tried_again(fault.trouble));
            if !again {
                tokio::task::block_in_place(|| self.let_go());
                self.abandon().await;
            }
            let news = match outcome {
                Ok(done) => {
                    wait = UPLOAD_WAIT_MIN;
                    Some(Done::Uploaded(done))
                }
                // Nobody waits for it.
                Err(_) if gone => None,
                Err(NotKept::Fault(fault)) => Some(self.failed(order.step, fault.trouble, &fault)),
                Err(fenced @ NotKept::Fenced { .. }) => Some(self.failed(order.step, Trouble::Conflict, &fenced)),
            };
            if let Some(news) = news {
                // The driver is gone only when the agent ends.
                let _ = self.done.send(news).await;
            }
            if again {
                self.pause(wait).await;
                wait = (wait * 2).min(UPLOAD_WAIT_MAX);
            }
            self.busy.fetch_sub(1, Ordering::Relaxed);
            let ends = if again { self.orders.has_changed().is_err() } else { self.orders.changed().await.is_err() };
            if ends || self.done.is_closed() {
                break;
            }
        }
        tokio::task::block_in_place(|| self.let_go());
        self.abandon().await;
    }

    fn failed(&self, step: u64, trouble: Trouble, why: &dyn fmt::Display) -> Done {
        Done::StoreFault(StoreFault { job: self.job, step: Some(step), trouble, reason: why.to_string() })
    }

    /// Waits before the next try, as long as the job is there. A newer order does not make a store that fails work.
    async fn pause(&mut self, wait: Duration) {
        let until = tokio::time::Instant::now() + wait;
        while let Ok(Ok(())) = tokio::time::timeout_at(until, self.orders.changed()).await {}
    }

    /// Takes back parts of files that nobody goes on with, if the store does it soon.
    async fn abandon(&self) {
        let _ = tokio::time::timeout(ABANDON_MAX, self.begun.abandon()).await;
    }

    /// Links of a checkpoint's files, which stay when the checkpoint is removed.
    fn hold(&self, step: u64) -> io::Result<PathBuf> {
        let from = self.folders.checkpoints(self.job).join(checkpoint::step_folder(step));
        let held = self.folders.uploads(self.job).join(checkpoint::step_folder(step));
        if held.join(checkpoint::MANIFEST_NAME).exists() {
            return Ok(held);
        }
        self.let_go();
        // Nothing is made for a checkpoint that is not there.
        let found = fs::read_dir(&from)?;
        fs::create_dir_all(&held)?;
        let mut manifest = None;
        for entry in found {
            let entry = entry?;
            if entry.file_name() == checkpoint::MANIFEST_NAME {
                manifest = Some(entry.path());
            } else if entry.file_type()?.is_file() {
                fs::hard_link(entry.path(), held.join(entry.file_name()))?;
            }
        }
        // It comes last: what has one is whole.
        fs::hard_link(manifest.unwrap_or(from), held.join(checkpoint::MANIFEST_NAME))?;
        Ok(held)
    }

    fn let_go(&self) {
        let place = self.folders.uploads(self.job);
        if let Err(error) = fs::remove_dir_all(&place).or_else(not_found_is_fine) {
            tracing::warn!(path = %place.display(), %error, "could not remove");
        }
    }

    async fn upload(&self, order: &UploadOrder) -> Result<Uploaded, NotKept> {
        let Ok(_room) = self.lane.room.acquire().await else { return Err(ended().into()) };
        let begun = Instant::now();
        let held = tokio::task::block_in_place(|| self.hold(order.step));
        let path =
            held.map_err(|error| unread(&self.folders.checkpoints(order.job), &format!("step {}: {error}", order.step), error.kind()))?;
        let text = tokio::task::block_in_place(|| checkpoint::manifest_bytes(&path)).map_err(|damage| damaged(&path, &damage))?;
        let (manifest, text) = (Manifest::parse(&text).map_err(|error| here(&path, &error.to_string()))?, Bytes::from(text));
        let settings = Settings::of_process().with_job(&order.env);
        let base = order.to.parent().ok_or_else(|| here(&path, "its place in the store is none"))?;
        let shelf = Shelf::new(Store::open(&base, &settings)?.at(&order.job.to_string()));
        let counts = shelf.begin(&order.lineage).await?;
        if !counts.counts(manifest.attempt, manifest.step) {
            // It says so in the words of a commit.
            shelf.commit(&manifest, &text).await?;
        }
        let digest = digest(&text);
        let lacking = shelf.lacking(&manifest, &text).await?;
        let open = |file: &ManifestFile| -> Result<Box<dyn Source + '_>, Fault> {
            let open = tokio::task::block_in_place(|| checkpoint::open_named(&path, file)).map_err(|damage| damaged(&path, &damage))?;
            Ok(Box::new(FileSource { file: CheckedFile::new(open, &path, file), tended: self }))
        };
        shelf.put_files(order.step, &digest, &lacking, &Sending { open: &open, window: &self.lane.window, begun: &self.begun }).await?;
        let bytes = lacking.iter().map(|file| file.bytes).sum();
        shelf.commit(&manifest, &text).await?;
        let kept = match shelf.prune(order.keep as usize, order.step, &counts).await {
            Ok(kept) => kept,
            Err(fault) => {
                tracing::warn!(job = %order.job, %fault, "older checkpoints are left in the store");
                vec![order.step]
            }
        };
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Uploaded { job: order.job, step: order.step, bytes, took_ms, kept })
    }
}

/// Whether the same upload may work later: not where what is here is not what was committed.
fn is_tried_again(trouble: Trouble) -> bool {
    trouble != Trouble::Damaged
}

fn ended() -> Fault {
    Fault { trouble: Trouble::NotFound, asked: "go on".into(), why: "the job is gone".into() }
}

/// What is to be uploaded is not what it was.
fn here(path: &Path, why: &str) -> Fault {
    Fault { trouble: Trouble::Damaged, asked: format!("read {}", path.display()), why: why.into() }
}

/// What says so is damaged, or can not be read now.
fn damaged(path: &Path, damage: &Damage) -> Fault {
    match damage {
        Damage::Unreadable { source, .. } => unread(path, &damage.to_string(), source.kind()),
        _ => here(path, &damage.to_string()),
    }
}

/// This node's own disk: what it can not give now it may give later, what is not there never.
fn unread(path: &Path, why: &str, kind: io::ErrorKind) -> Fault {
    let trouble = if kind == io::ErrorKind::NotFound { Trouble::Damaged } else { Trouble::Other };
    Fault { trouble, ..here(path, why) }
}

/// A file on its way, as long as its job is there, and at the pace of all.
struct FileSource<'a> {
    file: CheckedFile<'a>,
    tended: &'a Tended,
}

impl Source for FileSource<'_> {
    fn next(&mut self, bytes: usize) -> Result<Vec<u8>, Fault> {
        tokio::task::block_in_place(|| self.file.read(bytes))
    }

    fn wait_for_turn(&mut self, bytes: usize) -> Result<(), Fault> {
        // Looked at between parts: a job that goes is not waited for longer than one part takes.
        if self.tended.orders.has_changed().is_err() {
            return Err(ended());
        }
        let wait = self.tended.lane.pace.turn(bytes).saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            tokio::task::block_in_place(|| std::thread::sleep(wait));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
