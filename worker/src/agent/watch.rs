//! What the kernel tells about folders: a heartbeat was written, a checkpoint was committed, the coordinator's file changed.
//!
//! One inotify instance for all (a user may have few), its watches named by what they are for. When the kernel's queue overflows everything
//! has to be looked at; the driver looks every half second anyway.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;

use everlit_api::ids::{Incarnation, JobId};
use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask};

use super::folders::HEARTBEAT_NAME;
use crate::checkpoint::folder_step;

/// What a folder is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watched {
    /// A rank's heartbeat file.
    Run(Incarnation),
    /// A job's checkpoints.
    Checkpoints(JobId),
    /// The coordinator's file.
    Coordinator,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noticed {
    /// In a watched folder.
    In(Watched),
    /// More than could be kept.
    Overflow,
}

/// All watches.
pub(super) struct Watcher {
    stream: EventStream<[u8; 4096]>,
    what: HashMap<WatchDescriptor, Watched>,
    watches: BTreeMap<Watched, WatchDescriptor>,
    coordinator_name: OsString,
}

impl Watcher {
    /// Watches the folder of the coordinator's file, which may not be there yet.
    pub(super) fn new(coordinator_file: &Path) -> io::Result<Self> {
        let stream = Inotify::init()?.into_event_stream([0; 4096])?;
        let coordinator_name = coordinator_file.file_name().map(OsStr::to_os_string).unwrap_or_default();
        let mut watcher = Self { stream, what: HashMap::new(), watches: BTreeMap::new(), coordinator_name };
        watcher.add(Watched::Coordinator, coordinator_file.parent().unwrap_or(Path::new(".")));
        Ok(watcher)
    }

    /// Watches a folder. Where that fails (limits) the driver's regular look has to do.
    pub(super) fn add(&mut self, what: Watched, folder: &Path) {
        if self.watches.contains_key(&what) {
            return;
        }
        match self.stream.watches().add(folder, WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE | WatchMask::ONLYDIR) {
            Ok(descriptor) => {
                self.what.insert(descriptor.clone(), what);
                self.watches.insert(what, descriptor);
            }
            Err(error) => tracing::debug!(?what, %error, "could not watch a folder"),
        }
    }

    /// Watches it no more.
    pub(super) fn remove(&mut self, what: Watched) {
        if let Some(descriptor) = self.watches.remove(&what) {
            self.what.remove(&descriptor);
            // Gone already when the folder is.
            let _ = self.stream.watches().remove(descriptor);
        }
    }

    /// The next thing that matters. Safe to cancel.
    pub(super) async fn next(&mut self) -> Noticed {
        loop {
            let Some(Ok(event)) = self.stream.next().await else {
                // Without a kernel queue only the regular looks are left.
                return std::future::pending().await;
            };
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                return Noticed::Overflow;
            }
            let Some(what) = self.what.get(&event.wd).copied() else { continue };
            if event.mask.contains(EventMask::IGNORED) {
                self.what.remove(&event.wd);
                self.watches.remove(&what);
                continue;
            }
            let name = event.name.unwrap_or_default();
            let matters = match what {
                Watched::Run(_) => name == HEARTBEAT_NAME,
                Watched::Checkpoints(_) => name.to_str().is_some_and(|name| folder_step(name).is_some()),
                Watched::Coordinator => name == self.coordinator_name,
            };
            if matters {
                return Noticed::In(what);
            }
        }
    }
}
