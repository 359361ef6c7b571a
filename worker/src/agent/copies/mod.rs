//! Checkpoints from node to node: the door where others fetch them, and fetching them from others.
//!
//! The door has a thread of its own, and what is fetched is fetched on threads that may block: heartbeats never wait for either.

mod door;
mod fetch;
#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use everlit_api::agent::copies::{CopyDoor, CopyOrder};
use everlit_api::ids::JobId;
use everlit_api::ports::PortRange;
use tokio::sync::Semaphore;

use super::checkpoints::{self, Checked};
use super::folders::Folders;
use super::limits::{COPIES_AT_ONCE, COPY_SPARE_BYTES};
use super::load::disk_free;
use door::Door;
pub(super) use fetch::{Wanted, fetch};

/// The node's door, and the copies that are being made here.
pub(super) struct Copies {
    door: Option<Door>,
    room: Arc<Semaphore>,
    under_way: BTreeMap<JobId, UnderWay>,
}

impl Default for Copies {
    fn default() -> Self {
        Self { door: None, room: Arc::new(Semaphore::new(COPIES_AT_ONCE)), under_way: BTreeMap::new() }
    }
}

#[derive(Default)]
struct UnderWay {
    unwanted: Arc<AtomicBool>,
    next: Option<CopyOrder>,
}

impl Copies {
    /// Opens the door at an address, unless it is open there; answers what the coordinator is told.
    pub(super) fn open(&mut self, folders: &Folders, at: IpAddr, ports: PortRange) -> Option<CopyDoor> {
        if self.door.as_ref().is_none_or(|door| door.address() != at) {
            // Its port is free again then.
            self.door = None;
            match Door::open(folders.clone(), at, ports) {
                Ok(door) => self.door = Some(door),
                Err(error) => tracing::warn!("this node takes no part in copies of checkpoints: {error:#}"),
            }
        }
        self.door.as_ref().map(Door::told)
    }

    /// Whether other nodes fetch from here, or did within that time.
    pub(super) fn is_giving(&self, within: Duration) -> bool {
        self.door.as_ref().is_some_and(|door| door.is_used(within))
    }

    /// Whether others could fetch from here.
    pub(super) fn is_open(&self) -> bool {
        self.door.is_some()
    }

    /// What to fetch now, if nothing of its job is being fetched; else the newest order waits.
    pub(super) fn begin(&mut self, order: CopyOrder) -> Option<(CopyOrder, Arc<AtomicBool>, Arc<Semaphore>)> {
        if let Some(own) = self.under_way.get_mut(&order.job) {
            own.next = Some(order);
            return None;
        }
        let own = self.under_way.entry(order.job).or_default();
        Some((order, own.unwanted.clone(), self.room.clone()))
    }

    /// One is done; answers the order that waited.
    pub(super) fn end(&mut self, job: JobId) -> Option<CopyOrder> {
        self.under_way.remove(&job)?.next
    }

    /// The job goes: what is being fetched of it is of no use. One that only ended keeps what it has, its last checkpoint among it.
    pub(super) fn drop_job(&mut self, job: JobId) {
        if let Some(own) = self.under_way.get_mut(&job) {
            own.unwanted.store(true, Ordering::Relaxed);
            own.next = None;
        }
    }
}

/// Fetches a checkpoint, reads it back, and removes what is beyond `keep`. Blocks.
pub(super) fn keep(folders: &Folders, order: &CopyOrder, unwanted: &AtomicBool) -> Result<Checked, String> {
    let dir = folders.checkpoints(order.job);
    let is_wanted = || !unwanted.load(Ordering::Relaxed);
    // Ranks that save here come first.
    let free = disk_free(folders.root());
    if free.is_some_and(|free| free < order.bytes.saturating_add(COPY_SPARE_BYTES)) {
        return Err(format!(
            "there is no room for {} bytes here: {} are free, and {COPY_SPARE_BYTES} are kept",
            order.bytes,
            free.unwrap_or(0)
        ));
    }
    let CopyOrder { job, step, bytes, attempt, .. } = *order;
    let from = fetch(&dir, Wanted { job, step, bytes, attempt, sources: &order.sources }, &is_wanted)?;
    tracing::info!(job = %order.job, step = order.step, %from, "a checkpoint was copied");
    checkpoints::check(folders, order.job, order.keep).map_err(|error| error.to_string())
}
