//! Saving behind the step: a copy into one of two buffers beside the next forward and backward pass, and a writer behind that.
//!
//! The state changes only in the optimizer's update, so the training loop asks for a snapshot after an update and waits, before the next
//! one, only for what is not copied by then. The writer persists one snapshot at a time; a snapshot that comes meanwhile goes into the
//! other buffer and waits, overwriting one that waited: saving falls behind by skipping. Which buffer, and when the writer starts, are
//! decided from what all ranks heard in the same reduction, so that every rank's buffers always hold the same steps. The trap: after
//! [`Saver::snapshot`] nobody may write to the state before [`Saver::wait_copied`].

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use everlit_api::manifest::Manifest;
use everlit_worker::checkpoint::snapshot::Note;
use everlit_worker::checkpoint::{self, CheckpointError};
use nix::time::{ClockId, clock_gettime};

use super::TrainError;
use super::state::State;
use part::Part;
use slots::Slot;
use write::{Persisted, Target};

pub mod part;
pub mod slots;
pub mod write;

/// Training comes first: this much nicer is the writer than a rank.
const WRITER_NICENESS: i32 = 5;

/// What a saver is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The job's checkpoints.
    pub dir: PathBuf,
    /// Where snapshots outlive this process.
    pub snapshots: Option<PathBuf>,
    /// This rank.
    pub rank: u32,
    /// All of them.
    pub world: u32,
    /// The fencing token.
    pub attempt: u32,
    /// Checkpoints kept, when no agent prunes.
    pub prune: Option<u32>,
}

/// A save that did not happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The step that was to be saved.
    pub step: u64,
    /// Why.
    pub reason: String,
    /// A later attempt runs: this one must end.
    pub fenced: bool,
}

/// What saving cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Costs {
    /// Snapshots persisted, as far as this rank's part goes.
    pub saves: u64,
    /// Processor time of the last copy and the last write together.
    pub processor: Duration,
    /// From the order to the last byte on the disk, of the last write.
    pub write: Duration,
}

enum Order {
    Idle,
    Persist(usize),
}

struct Progress {
    copying: Option<(usize, Manifest)>,
    /// The copy still reads the state. On a GPU it ends before the checksum does.
    reading: bool,
    /// What is whole in each buffer.
    whole: [Option<Manifest>; 2],
    order: Order,
    persisting: bool,
    cancel: bool,
    failure: Option<Failure>,
    copy_time: Duration,
    costs: Costs,
    ended: bool,
}

struct Shared {
    part: Part,
    slots: [Slot; 2],
    settings: Settings,
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// One rank's saving. Dropping it waits for a copy under way, not for the writer.
pub struct Saver {
    shared: Arc<Shared>,
    copier: Option<JoinHandle<()>>,
    /// The buffer that was asked for last.
    newest: usize,
    newest_step: Option<u64>,
    /// The newest step that the writer was told of (`None`: of a membership that is over), and its buffer.
    told: Option<(Option<u64>, usize)>,
    /// Time that training was held up by the last snapshot.
    stall: Duration,
}

impl Saver {
    /// Reserves the buffers and starts the threads. `state` must live as long as the saver.
    pub fn start(settings: Settings, state: &State) -> Result<Self, TrainError> {
        let part = Part::new(state, settings.rank, settings.world).map_err(TrainError::failed)?;
        let opened = slots::open(settings.snapshots.as_deref(), settings.attempt, settings.rank, part.bytes());
        let (slots, why) = opened.map_err(|error| TrainError::Failed(format!("no memory for snapshots: {error}")))?;
        if let Some(why) = why {
            eprintln!("rank {}: {why}; snapshots of this run end with its ranks", settings.rank);
        }
        let progress = Progress {
            copying: None,
            reading: false,
            whole: [None, None],
            order: Order::Idle,
            persisting: false,
            cancel: false,
            failure: None,
            copy_time: Duration::ZERO,
            costs: Costs::default(),
            ended: false,
        };
        let shared = Arc::new(Shared { part, slots, settings, progress: Mutex::new(progress), changed: Condvar::new() });
        let spawn = |name: &str, run: fn(&Shared)| {
            let own = shared.clone();
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&own));
            thread.map_err(|error| TrainError::Failed(format!("no thread for saving: {error}")))
        };
        spawn("populate", Shared::populate)?;
        spawn("writer", Shared::write)?;
        let copier = Some(spawn("copier", Shared::copy)?);
        Ok(Self { shared, copier, newest: 0, newest_step: None, told: None, stall: Duration::ZERO })
    }

    /// Whether this rank's writer is at work.
    pub fn is_busy(&self) -> bool {
        self.shared.lock().persisting
    }

    /// Whether a save of this rank failed and the others do not know yet.
    pub fn has_failed(&self) -> bool {
        self.shared.lock().failure.is_some()
    }

    /// The failure that all ranks know of now; the save under way is given up.
    pub fn give_up(&self) -> Option<Failure> {
        let mut progress = self.shared.lock();
        progress.cancel = progress.persisting;
        progress.failure.take()
    }

    /// Begins to copy the state as of `manifest`. `any_busy`: some rank's writer is at work, so its buffer is left alone.
    pub fn snapshot(&mut self, manifest: Manifest, any_busy: bool) -> Result<(), TrainError> {
        let begun = Instant::now();
        self.shared.part.mark()?;
        let slot = match self.told {
            Some((_, persisting)) if any_busy => 1 - persisting,
            _ => 1 - self.newest,
        };
        let mut progress = self.shared.lock();
        assert!(!progress.reading, "the copy before was waited for");
        while progress.copying.is_some() {
            progress = self.shared.wait(progress);
        }
        progress.whole[slot] = None;
        (self.newest, self.newest_step) = (slot, Some(manifest.step));
        progress.copying = Some((slot, manifest));
        progress.reading = true;
        drop(progress);
        self.shared.changed.notify_all();
        self.stall = begun.elapsed();
        Ok(())
    }

    /// Tells the writer to persist the newest snapshot, unless it was told before. No rank's writer is at work.
    pub fn persist_newest(&mut self) {
        let told = self.told.and_then(|(told, _)| told);
        let Some(step) = self.newest_step.filter(|step| told != Some(*step)) else { return };
        self.told = Some((Some(step), self.newest));
        let mut progress = self.shared.lock();
        progress.order = Order::Persist(self.newest);
        progress.persisting = true;
        progress.cancel = false;
        drop(progress);
        self.shared.changed.notify_all();
    }

    /// Waits until the state may change; answers how long training was held up by the snapshot since it was asked for.
    pub fn wait_copied(&mut self) -> Duration {
        let begun = Instant::now();
        let mut progress = self.shared.lock();
        if !progress.reading {
            return std::mem::take(&mut self.stall);
        }
        while progress.reading {
            progress = self.shared.wait(progress);
        }
        drop(progress);
        std::mem::take(&mut self.stall) + begun.elapsed()
    }

    /// The membership is over: a save under way is given up, and what was copied for it counts for nothing. Its writer may still be at
    /// work on one buffer.
    pub fn abandon(&mut self) {
        self.wait_copied();
        let mut progress = self.shared.lock();
        progress.cancel = progress.persisting;
        progress.failure = None;
        drop(progress);
        self.newest_step = None;
        self.told = self.told.map(|(_, slot)| (None, slot));
    }

    /// Ends it: after this nobody touches its buffers or writes a part of a checkpoint.
    pub fn retire(mut self) {
        self.abandon();
        let mut progress = self.shared.lock();
        while progress.persisting || progress.copying.is_some() {
            progress = self.shared.wait(progress);
        }
    }

    /// The step of the newest snapshot that was asked for.
    pub fn newest_step(&self) -> Option<u64> {
        self.newest_step
    }

    /// What saving cost so far.
    pub fn costs(&self) -> Costs {
        self.shared.lock().costs
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        let mut progress = self.shared.lock();
        progress.ended = true;
        progress.cancel = true;
        drop(progress);
        self.shared.changed.notify_all();
        if let Some(copier) = self.copier.take() {
            // A panic there was printed; the state may go.
            let _ = copier.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, progress: MutexGuard<'a, Progress>) -> MutexGuard<'a, Progress> {
        self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner)
    }

    fn populate(&self) {
        // Not lower: a rank that is killed has gone when its last thread has run once more.
        lower_priority(2 * WRITER_NICENESS);
        // For a GPU they are pinned, and so present, before the first copy.
        if !self.part.is_on_gpu() {
            self.slots.iter().for_each(Slot::populate);
        }
    }

    fn copy(&self) {
        let _pinned = self.part.pin(&self.slots);
        let mut progress = self.lock();
        loop {
            let Some((slot, manifest)) = progress.copying.clone() else {
                if progress.ended {
                    return;
                }
                progress = self.wait(progress);
                continue;
            };
            drop(progress);
            let begun = processor_time();
            let step = manifest.step;
            let copied = self.copy_into(slot, &manifest);
            progress = self.lock();
            progress.copy_time = processor_time().saturating_sub(begun);
            progress.copying = None;
            progress.reading = false;
            match copied {
                Ok(()) => progress.whole[slot] = Some(manifest),
                Err(error) => {
                    progress.failure = Some(Failure { step, reason: format!("the snapshot was not kept: {error}"), fenced: false });
                }
            }
            self.changed.notify_all();
        }
    }

    fn copy_into(&self, slot: usize, manifest: &Manifest) -> std::io::Result<()> {
        let target = &self.slots[slot];
        target.unseal()?;
        let read = || {
            self.lock().reading = false;
            self.changed.notify_all();
        };
        // SAFETY: the training loop does not change the state while `reading`, and the writer has another buffer: the order for this one
        // comes after the copy.
        let crc32 = unsafe { self.part.copy(target.bytes_mut(), read) }.map_err(std::io::Error::other)?;
        let bytes = self.part.bytes() as u64;
        target.seal(&Note { rank: self.settings.rank, name: self.part.name().map(Into::into), bytes, crc32, manifest: manifest.clone() })
    }

    fn write(&self) {
        lower_priority(WRITER_NICENESS);
        let mut progress = self.lock();
        loop {
            if progress.ended {
                return;
            }
            let Order::Persist(slot) = progress.order else {
                progress = self.wait(progress);
                continue;
            };
            if progress.copying.as_ref().is_some_and(|(copying, _)| *copying == slot) {
                progress = self.wait(progress);
                continue;
            }
            progress.order = Order::Idle;
            // No manifest: the copy failed, and said so.
            if let Some(manifest) = progress.whole[slot].clone() {
                drop(progress);
                let (begun, processor) = (Instant::now(), processor_time());
                let step = manifest.step;
                let result = self.persist(slot, manifest);
                progress = self.lock();
                self.note(&mut progress, step, result, begun.elapsed(), processor_time().saturating_sub(processor));
            }
            progress.persisting = false;
            self.changed.notify_all();
        }
    }

    fn persist(&self, slot: usize, manifest: Manifest) -> Result<Persisted, CheckpointError> {
        let own = &self.settings;
        let target = Target { dir: own.dir.clone(), rank: own.rank, world: own.world };
        let cancelled = || self.lock().cancel;
        let persisted = write::persist(&target, self.part.name(), self.slots[slot].bytes(), manifest, &cancelled)?;
        if let (Some(keep), 0, Persisted::Done) = (own.prune, own.rank, &persisted)
            && let Err(error) = checkpoint::prune(&own.dir, keep)
        {
            eprintln!("could not remove old checkpoints: {error}");
        }
        Ok(persisted)
    }

    fn note(&self, progress: &mut Progress, step: u64, result: Result<Persisted, CheckpointError>, time: Duration, processor: Duration) {
        match result {
            Ok(Persisted::Done) => {
                progress.costs.saves += 1;
                progress.costs.write = time;
                progress.costs.processor = processor + progress.copy_time;
            }
            Ok(Persisted::Cancelled) => {}
            Err(error) => {
                let fenced = matches!(error, CheckpointError::Fenced { .. });
                progress.failure = Some(Failure { step, reason: error.to_string(), fenced });
            }
        }
    }
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Into::into)
}

/// Makes this thread, and those that it starts, give way to others. A hint.
fn lower_priority(niceness: i32) {
    // SAFETY: plain numbers; 0 is the calling thread.
    unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, niceness) };
}
