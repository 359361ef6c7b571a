//! Bringing a checkpoint from a store into a folder of this node: some files at a time, each chunk checked as it comes, then one rename.
//! Blocks.
//!
//! What a broken transfer has brought stays, and the next try goes on from there. One whose bytes are not those that were committed is
//! passed over, after a second look, for the next older one.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::{Buf, Bytes};
use everlit_api::manifest::folder_step;
use everlit_api::store::{Committed, Fault, Place, Settings, Shelf, Store, Trouble};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::runtime::{Handle, Runtime};

use super::limits::{COPY_SPARE_BYTES, STORE_FILES_AT_ONCE};
use super::load::disk_free;
use crate::checkpoint::{Copy, CopyError};

/// Looks at a checkpoint whose bytes are wrong: what was altered on its way may be right the next time.
const LOOKS: usize = 2;

/// What is to be fetched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// A job's folder in a store, or one checkpoint there.
    pub place: &'a Place,
    /// What reaches and opens it, beside this node's own settings.
    pub env: &'a BTreeMap<String, String>,
    /// None newer than this.
    pub max: Option<u64>,
    /// Only what is newer than this.
    pub above: Option<u64>,
    /// The newest attempt that may have written it.
    pub attempt: u32,
}

/// Why nothing was fetched.
#[derive(Debug)]
pub(super) enum NotFetched {
    /// The store did not give it.
    Fault(Fault),
    /// This node could not take it.
    Here(String),
}

impl From<Fault> for NotFetched {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Brings the newest that is wanted into `dir`; answers its step. `None`: there is none.
pub(super) fn fetch(dir: &Path, wanted: Wanted<'_>, is_wanted: &(dyn Fn() -> bool + Sync)) -> Result<Option<u64>, NotFetched> {
    fetch_with(dir, wanted, is_wanted, disk_free)
}

/// The same; `free` says how many bytes are free where a folder is.
pub(super) fn fetch_with(
    dir: &Path,
    wanted: Wanted<'_>,
    is_wanted: &(dyn Fn() -> bool + Sync),
    free: fn(&Path) -> Option<u64>,
) -> Result<Option<u64>, NotFetched> {
    let here = |error: io::Error| NotFetched::Here(error.to_string());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("fetch").enable_all().build().map_err(here)?;
    let settings = Settings::of_process().with_job(wanted.env);
    let (shelf, mut max) = match (folder_step(wanted.place.last()), wanted.place.parent()) {
        (Some(step), Some(parent)) => (Shelf::new(Store::open(&parent, &settings)?), Some(step)),
        _ => (Shelf::new(open(wanted.place, &settings)?), wanted.max),
    };
    let mut looks = 0;
    let outcome = loop {
        let (found, passed) = match runtime.block_on(shelf.newest(max)) {
            Ok(answer) => answer,
            Err(fault) => break Err(fault.into()),
        };
        for (step, why) in passed {
            tracing::warn!(place = %wanted.place, step, why, "a checkpoint in the store is passed over");
        }
        let Some(found) = found.filter(|found| wanted.above.is_none_or(|above| found.manifest.step > above)) else { break Ok(None) };
        let step = found.manifest.step;
        let copy = Copy::begin(dir, step, wanted.attempt, &found.text).map_err(|error| told(error, None));
        match copy.and_then(|copy| has_room(dir, copy, free)).and_then(|copy| take(copy, &shelf, &found, &runtime, is_wanted)) {
            // A listing may name what was removed since.
            Err(NotFetched::Fault(fault)) if matches!(fault.trouble, Trouble::Damaged | Trouble::NotFound) => {
                looks += 1;
                tracing::warn!(place = %wanted.place, step, %fault, "a checkpoint in the store is damaged, or gone");
                if looks == LOOKS {
                    looks = 0;
                    let Some(older) = step.checked_sub(1) else { break Ok(None) };
                    max = Some(older);
                }
            }
            outcome => break outcome.map(|()| Some(step)),
        }
    };
    runtime.shutdown_background();
    outcome
}

/// A job's folder in a shared folder may not be there yet.
fn open(place: &Place, settings: &Settings) -> Result<Store, Fault> {
    match place.parent() {
        Some(parent) => Ok(Store::open(&parent, settings)?.at(place.last())),
        None => Store::open(place, settings),
    }
}

/// What is still to come fits, and leaves what ranks that save here need.
fn has_room(dir: &Path, copy: Copy, free: fn(&Path) -> Option<u64>) -> Result<Copy, NotFetched> {
    let lacking: u64 = copy.manifest().files.iter().map(|file| file.bytes.saturating_sub(copy.bytes_there(file))).sum();
    match free(dir) {
        Some(free) if free < lacking.saturating_add(COPY_SPARE_BYTES) => {
            copy.abandon();
            let why = format!("there is no room for {lacking} bytes here: {free} are free, and {COPY_SPARE_BYTES} are kept");
            Err(NotFetched::Here(why))
        }
        _ => Ok(copy),
    }
}

fn take(copy: Copy, shelf: &Shelf, found: &Committed, runtime: &Runtime, is_wanted: &(dyn Fn() -> bool + Sync)) -> Result<(), NotFetched> {
    let (next, is_useless) = (AtomicUsize::new(0), AtomicBool::new(false));
    let failed: Mutex<Option<NotFetched>> = Mutex::new(None);
    let work = || {
        while let Some(file) = copy.manifest().files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.lock().is_ok_and(|failed| failed.is_some()) || !is_wanted() {
                return;
            }
            let taken = if copy.has(file) {
                Ok(())
            } else {
                runtime.block_on(shelf.open(found, file)).map_err(NotFetched::from).and_then(|(_, stream)| {
                    let mut body = Body { runtime: runtime.handle(), stream, left: Bytes::new(), fault: None, is_wanted };
                    let taken = copy.take(file, &mut body).map_err(|error| {
                        // Half of it on a disk that is full helps nobody.
                        is_useless.fetch_or(matches!(error, CopyError::Here(_)), Ordering::Relaxed);
                        told(error, body.fault.take())
                    });
                    // What came beyond the file's length is an answer to nothing.
                    if taken.is_ok() && !body.left.is_empty() { Err(longer(shelf, &file.name)) } else { taken }
                })
            };
            if let (Err(error), Ok(mut failed)) = (taken, failed.lock()) {
                failed.get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..STORE_FILES_AT_ONCE.min(copy.manifest().files.len()) {
            scope.spawn(work);
        }
    });
    if let Some(error) = failed.into_inner().ok().flatten() {
        if is_useless.into_inner() {
            copy.abandon();
        }
        return Err(error);
    }
    if !is_wanted() {
        return Err(NotFetched::Here("it is not wanted any more".into()));
    }
    copy.commit().map(drop).map_err(|error| NotFetched::Here(error.to_string()))
}

fn longer(shelf: &Shelf, name: &str) -> NotFetched {
    let asked = format!("get {name} from {}", shelf.place());
    NotFetched::Fault(Fault { trouble: Trouble::Damaged, asked, why: "it is longer than its manifest says".into() })
}

/// What a copy says, with what the store said before.
fn told(error: CopyError, fault: Option<Fault>) -> NotFetched {
    match (error, fault) {
        (CopyError::Broken { .. }, Some(fault)) => NotFetched::Fault(fault),
        (CopyError::Damaged(damage), _) => {
            NotFetched::Fault(Fault { trouble: Trouble::Damaged, asked: "check what came".into(), why: damage.to_string() })
        }
        (error, _) => NotFetched::Here(error.to_string()),
    }
}

/// An object, as something to read from.
struct Body<'a> {
    runtime: &'a Handle,
    stream: BoxStream<'static, Result<Bytes, Fault>>,
    left: Bytes,
    fault: Option<Fault>,
    is_wanted: &'a (dyn Fn() -> bool + Sync),
}

impl Read for Body<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            if !(self.is_wanted)() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match self.runtime.block_on(self.stream.next()) {
                None => return Ok(0),
                Some(Ok(piece)) => self.left = piece,
                Some(Err(fault)) => {
                    let text = fault.to_string();
                    self.fault = Some(fault);
                    return Err(io::Error::other(text));
                }
            }
        }
        let bytes = to.len().min(self.left.len());
        self.left.copy_to_slice(&mut to[..bytes]);
        Ok(bytes)
    }
}
