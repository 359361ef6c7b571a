//! Checkpoints that were committed after a later attempt had begun on another node: the coordinator names them, and they are put aside before
//! anything on this node resumes from them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use everlit_api::ids::JobId;

use super::folders::Folders;
use crate::checkpoint::{self, CheckpointError, Quarantined};

/// What stands beside one in the quarantine.
const WHY: &str = "it was committed when a later attempt had begun elsewhere";

/// What is still to be put aside: of each job attempts up to one, beyond a step.
#[derive(Debug, Default)]
pub(super) struct Late {
    orders: Mutex<BTreeMap<JobId, (u32, Option<u64>)>>,
    one_at_a_time: Mutex<()>,
}

impl Late {
    /// To be put aside, by whoever comes first: a gang that starts waits for it.
    pub(super) fn note(&self, job: JobId, attempt: u32, beyond: Option<u64>) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).insert(job, (attempt, beyond));
    }

    /// Puts aside what is known to be late of a job; answers what that was. Blocks.
    pub(super) fn put_aside(&self, folders: &Folders, job: JobId) -> Result<Vec<Quarantined>, CheckpointError> {
        let _one = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let order = self.orders.lock().unwrap_or_else(PoisonError::into_inner).get(&job).copied();
        let Some((attempt, beyond)) = order else { return Ok(Vec::new()) };
        let done = checkpoint::put_aside(&folders.checkpoints(job), attempt, beyond, WHY)?;
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        // What was asked for meanwhile stays asked for.
        if orders.get(&job) == Some(&(attempt, beyond)) {
            orders.remove(&job);
        }
        Ok(done)
    }
}
