//! Logs in a job's store: whose node is told to put its part there, when, and until when it is told again.
//!
//! When an attempt is over each of its nodes is told, before the ends are on record with it: an agent that ends of having nothing left must know of
//! this first. Who has not said that it is done is in the job's row, and is told again when it is back; what is kept of a job that is over
//! is in memory, and read from its row after a restart of the coordinator. Readers of logs learn from the row whose part may not be whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use everlit_api::agent::ToAgent;
use everlit_api::agent::stored::{ArchiveOrder, Archived};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::rank::Cause;
use everlit_api::store::Trouble;
use everlit_api::time::Timestamp;

use super::command::Command;
use super::limits::LAST_ARCHIVES_MAX;
use super::state::{Ending, Facts, Job, Then};
use super::{Engine, Turn};

/// What jobs that are over still have to put in their stores.
pub(super) type LastArchives = BTreeMap<JobId, LastArchive>;

/// One job's.
#[derive(Debug)]
pub(super) struct LastArchive {
    spec: Arc<JobSpec>,
    /// The last attempt of each node that is not there.
    waits: BTreeMap<NodeId, u32>,
    /// The fault that was told last, and when.
    pub(super) told: Option<(Trouble, Timestamp)>,
}

fn order(id: JobId, spec: &JobSpec, attempt: u32) -> Option<ToAgent> {
    Some(ToAgent::ArchiveLogs(ArchiveOrder { job: id, attempt, to: spec.archive(id)?, env: spec.environment() }))
}

impl Engine {
    /// An attempt is over: its nodes put their logs in the job's store, and why it failed is kept there too.
    pub(super) fn archive_logs(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.delete_when_final) else { return };
        let Some(gang) = &job.gang else { return };
        let Some(frame) = order(id, &job.spec, gang.attempt) else { return };
        for share in &gang.placement {
            job.archiving.insert(share.node.clone(), gang.attempt);
            turn.tell(&share.node, frame.clone());
        }
        let failed = |ending: &Ending| matches!(ending.then, Then::Judge | Then::Fail) || ending.cause == Some(Cause::NodeLost);
        if gang.ending.as_ref().is_some_and(failed) {
            turn.step.commands.push(Command::KeepPostmortem { job: id, attempt: gang.attempt });
        }
    }

    /// A job leaves the engine: what its nodes have not done yet is kept apart.
    pub(super) fn await_last_archives(&mut self, job: &Job) {
        if job.archiving.is_empty() || job.delete_when_final || job.spec.archive(job.id).is_none() {
            return;
        }
        if self.last_archives.len() >= LAST_ARCHIVES_MAX {
            self.last_archives.pop_first();
        }
        self.last_archives.insert(job.id, LastArchive { spec: job.spec.clone(), waits: job.archiving.clone(), told: None });
    }

    /// A node is linked anew: what it was told before may be lost.
    pub(super) fn look_at_archives(&self, turn: &mut Turn, node: &NodeId) {
        let active = self.jobs.values().map(|job| (job.id, &job.spec, &job.archiving));
        let over = self.last_archives.iter().map(|(id, last)| (*id, &last.spec, &last.waits));
        for (id, spec, waits) in active.chain(over) {
            if let Some(frame) = waits.get(node).and_then(|attempt| order(id, spec, *attempt)) {
                turn.tell(node, frame);
            }
        }
    }

    pub(super) fn on_logs_archived(&mut self, turn: &mut Turn, node: &NodeId, done: &Archived) {
        let Archived { job: id, attempt, bytes, took_ms } = *done;
        let waits = match self.jobs.get_mut(&id) {
            Some(job) => &mut job.archiving,
            None => match self.last_archives.get_mut(&id) {
                Some(last) => &mut last.waits,
                None => return,
            },
        };
        // Said twice, or of an attempt before the one that is waited for.
        if waits.get(node).is_none_or(|wanted| *wanted > attempt) {
            return;
        }
        waits.remove(node);
        let is_last = waits.is_empty();
        self.archives += 1;
        self.archive_bytes += bytes;
        let facts = Facts::from([
            ("attempt", attempt.into()),
            ("node", node.0.clone().into()),
            ("bytes", bytes.into()),
            ("took_ms", took_ms.into()),
        ]);
        turn.event(Some(id), "logs_archived", format!("the log of {node} up to the end of attempt {attempt} is in the job's store"), facts);
        if self.jobs.contains_key(&id) {
            turn.touched.insert(id);
        } else if is_last {
            self.last_archives.remove(&id);
        }
    }

    /// A job that is over has gone with all its files: nobody waits for its log.
    pub fn forget_archives(&mut self, id: JobId) {
        self.last_archives.remove(&id);
    }

    /// A job that was over when the coordinator began: its nodes are told again, which costs one that is done a look at its store.
    pub fn await_archives(&mut self, job: &Job) {
        self.await_last_archives(job);
    }

    pub(super) fn on_postmortem_kept(&mut self, turn: &mut Turn, id: JobId, attempt: u32, outcome: Result<String, (Trouble, String)>) {
        let facts = Facts::from([("attempt", attempt.into())]);
        match outcome {
            Ok(place) => turn.event(Some(id), "postmortem_stored", format!("the post-mortem of attempt {attempt} is in {place}"), facts),
            Err((trouble, reason)) => {
                *self.store_faults.entry(trouble).or_default() += 1;
                let mut facts = facts;
                facts.insert("trouble", trouble.name().into());
                turn.event(Some(id), "store_failed", format!("the post-mortem of attempt {attempt} is not kept: {reason}"), facts);
            }
        }
    }

    /// Logs that were put in stores since the start, and their bytes.
    pub fn archived(&self) -> (u64, u64) {
        (self.archives, self.archive_bytes)
    }
}
