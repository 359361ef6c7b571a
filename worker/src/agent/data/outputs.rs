//! What ranks of a preprocessing job have made, on its way into the store: one output of each shard, put there once.
//!
//! A rank names a file of `out` that is whole (`>name` in the pipe); when it is in the store, `done` has the shard's number and `out` has the
//! file no more. What the store had when an attempt began is in `done` too, so nothing is made again. Each output is put where none is, or is one
//! object in the end: of two attempts that make the same, one counts, and never a mixture. What fails is tried again for as long as the job lives.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use everlit_api::agent::stored::StoreFault;
use everlit_api::data::{ListedShard, Output, output_of, record_name};
use everlit_api::ids::JobId;
use everlit_api::store::{Begun, Fault, PART_BYTES, Place, Settings, Source, Store, Trouble};
use tokio::sync::{mpsc, watch};

use super::feed::Order;
use super::{DONE_NAME, OUT_NAME, OUTPUTS_NAME};
use crate::agent::effects::{Done, not_found_is_fine};
use crate::agent::limits::{UPLOAD_WAIT_MAX, UPLOAD_WAIT_MIN};
use crate::agent::uploads::Lane;

/// Bytes of a rank's record at most.
pub(super) const RECORD_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The outputs of one job.
#[derive(Clone)]
pub(super) struct Outputs {
    pub job: JobId,
    pub to: Place,
    /// The job's data folder.
    pub folder: PathBuf,
    pub orders: watch::Receiver<Order>,
    pub lane: Lane,
    pub done: mpsc::Sender<Done>,
}

impl Outputs {
    /// Learns what the store has already, for whom `done` is read by.
    pub(super) async fn look(&self, shards: &[ListedShard]) -> Result<(), Fault> {
        let listed = self.open().await?.list(OUTPUTS_NAME).await?;
        let here = |error: io::Error| self.here("write", &error);
        tokio::task::block_in_place(|| {
            fs::create_dir_all(self.folder.join(OUT_NAME)).map_err(here)?;
            fs::create_dir_all(self.folder.join(DONE_NAME)).map_err(here)?;
            for (name, bytes) in listed {
                let name = name.rsplit('/').next().unwrap_or_default();
                if let Some(index) = output_of(name, shards) {
                    self.mark(&mark_of(index), name, bytes).map_err(here)?;
                }
            }
            Ok(())
        })
    }

    async fn open(&self) -> Result<Store, Fault> {
        let env = self.orders.borrow().env.clone();
        let settings = tokio::task::block_in_place(Settings::of_process).with_job(&env);
        let inner = |place: &Place| place.parent();
        // The place that the job names must be there; what is below it is ours to make.
        let base = inner(&self.to).ok_or_else(|| Fault {
            trouble: Trouble::Settings,
            asked: format!("open {}", self.to),
            why: "it is no place for a job's outputs".into(),
        })?;
        Ok(Store::open(&base, &settings)?.at(self.to.last()))
    }

    fn here(&self, verb: &str, error: &io::Error) -> Fault {
        Fault { trouble: Trouble::Other, asked: format!("{verb} in {}", self.folder.display()), why: error.to_string() }
    }

    fn mark(&self, mark: &str, name: &str, bytes: u64) -> io::Result<()> {
        let place = self.folder.join(DONE_NAME).join(mark);
        let draft = place.with_extension("tmp");
        fs::write(&draft, serde_json::to_vec(&Output { name: name.into(), bytes })?)?;
        fs::rename(&draft, &place)
    }

    /// Until it is in the store, or the job is gone. `mark`: what says so in `done`.
    pub(super) async fn bring(&self, name: &str, mark: &str) {
        let (mut wait, begun) = (UPLOAD_WAIT_MIN, Begun::default());
        while let Err(fault) = self.try_to_bring(name, mark, &begun).await {
            tracing::warn!(job = %self.job, name, %fault, "an output could not be stored");
            let told = StoreFault { job: self.job, step: None, trouble: fault.trouble, reason: fault.to_string() };
            // The driver is gone only when the agent ends.
            if self.done.send(Done::StoreFault(told)).await.is_err() || !self.pause(wait).await {
                break;
            }
            wait = (wait * 2).min(UPLOAD_WAIT_MAX);
        }
        begun.abandon().await;
    }

    /// `false`: the job is gone.
    async fn pause(&self, wait: Duration) -> bool {
        let mut orders = self.orders.clone();
        let until = tokio::time::Instant::now() + wait;
        loop {
            match tokio::time::timeout_at(until, orders.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return false,
                Err(_) => return true,
            }
        }
    }

    async fn try_to_bring(&self, name: &str, mark: &str, begun: &Begun) -> Result<(), Fault> {
        let path = self.folder.join(OUT_NAME).join(name);
        let is_record = mark == name;
        if is_record || !self.folder.join(DONE_NAME).join(mark).exists() {
            let _room = self.lane.room.acquire().await.map_err(|_| gone())?;
            let opened = tokio::task::block_in_place(|| {
                let file = File::open(&path)?;
                Ok((file.metadata()?.len(), file))
            });
            let (bytes, file) = match opened {
                Ok(opened) => opened,
                // It was named twice, and is there.
                Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(self.here("read", &error)),
            };
            let store = self.open().await?;
            let bytes = if is_record {
                store.put(name, self.read(file, bytes)?.into()).await?;
                bytes
            } else {
                self.send(&store.at(OUTPUTS_NAME), name, bytes, file, begun).await?
            };
            tokio::task::block_in_place(|| self.mark(mark, name, bytes)).map_err(|error| self.here("write", &error))?;
        }
        let removed = tokio::task::block_in_place(|| fs::remove_file(&path).or_else(not_found_is_fine));
        removed.map_err(|error| self.here("remove", &error))
    }

    /// Puts it where none is; answers how long what is there is.
    async fn send(&self, store: &Store, name: &str, bytes: u64, file: File, begun: &Begun) -> Result<u64, Fault> {
        if bytes > PART_BYTES {
            if let Some(there) = store.size(name).await? {
                return Ok(there);
            }
            store.send(name, bytes, Box::new(Paced { file, own: self }), &self.lane.window, begun).await?;
            return Ok(bytes);
        }
        let turn = self.lane.pace.turn(usize::try_from(bytes).unwrap_or(usize::MAX)).saturating_duration_since(Instant::now());
        tokio::time::sleep(turn).await;
        match store.create(name, self.read(file, bytes)?.into()).await {
            Ok(()) => Ok(bytes),
            // An attempt before this one was here first, or what was sent had arrived after all.
            Err(fault) if fault.trouble == Trouble::Conflict => store.size(name).await?.ok_or(fault),
            Err(fault) => Err(fault),
        }
    }

    fn read(&self, file: File, bytes: u64) -> Result<Vec<u8>, Fault> {
        let mut all = Vec::new();
        let read = tokio::task::block_in_place(|| file.take(bytes.min(RECORD_BYTES_MAX)).read_to_end(&mut all));
        read.map_err(|error| self.here("read", &error))?;
        Ok(all)
    }
}

/// What says in `done` that a shard's output is in the store.
pub(in crate::agent) fn mark_of(index: usize) -> String {
    format!("{index:06}")
}

/// What a line in the pipe names: a file of `out`, and what says in `done` that it is in the store.
pub(super) fn named(line: &str, shards: &[ListedShard], world_size: u32) -> Option<(String, String)> {
    let name = line.strip_prefix('>')?;
    if let Some(index) = output_of(name, shards) {
        return Some((name.into(), mark_of(index)));
    }
    let rank = name.strip_prefix("rank-").and_then(|rest| rest.split_once('-')).and_then(|(rank, _)| rank.parse::<u32>().ok())?;
    (rank < world_size && name == record_name(rank, world_size)).then(|| (name.into(), name.into()))
}

/// Whether a shard's output is in the store.
pub(in crate::agent) fn is_made(folder: &Path, index: usize) -> bool {
    folder.join(DONE_NAME).join(mark_of(index)).exists()
}

fn gone() -> Fault {
    Fault { trouble: Trouble::NotFound, asked: "go on".into(), why: "the job is gone".into() }
}

/// A file on its way, as long as its job is there, and at the pace of all that is sent.
struct Paced<'a> {
    file: File,
    own: &'a Outputs,
}

impl Source for Paced<'_> {
    fn next(&mut self, bytes: usize) -> Result<Vec<u8>, Fault> {
        let mut piece = vec![0; bytes];
        tokio::task::block_in_place(|| self.file.read_exact(&mut piece)).map_err(|error| self.own.here("read", &error))?;
        Ok(piece)
    }

    fn wait_for_turn(&mut self, bytes: usize) -> Result<(), Fault> {
        if self.own.orders.has_changed().is_err() {
            return Err(gone());
        }
        let wait = self.own.lane.pace.turn(bytes).saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            tokio::task::block_in_place(|| std::thread::sleep(wait));
        }
        Ok(())
    }
}
