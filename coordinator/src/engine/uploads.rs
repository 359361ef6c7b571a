//! Checkpoints in a job's store (`checkpoint.to`): who puts which there, and what a gang is told of it.
//!
//! The newest verified checkpoint is ordered from one node that has it, until that node says that it is there; the node itself tries again
//! when the store fails. Nothing waits for a store but an attempt that has nothing else to begin from. The trap: a job that is over leaves
//! the engine at once, so its last upload is remembered beside the jobs, and ordered again from a node that is back; not by the next coordinator.

use std::collections::BTreeMap;

use everlit_api::agent::ToAgent;
use everlit_api::agent::stored::{StoreFault, Stored, UploadOrder, Uploaded};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::manifest::step_folder;
use everlit_api::status::{CheckpointView, PlacedRanks};
use everlit_api::store::{Place, Trouble};
use everlit_api::time::Timestamp;

use super::limits::{LAST_UPLOADS_MAX, STORE_FAULT_EVERY_MS};
use super::state::{Facts, Job};
use super::{Engine, Turn};

/// What is being put in a job's store: nothing of it outlives the coordinator.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Uploading {
    /// Who was told to put which step there.
    ordered: Option<(NodeId, u64)>,
    /// The fault that was told last, and when.
    told: Option<(Trouble, Timestamp)>,
}

/// The last upload of a job that is over.
#[derive(Debug, Clone)]
pub(super) struct LastUpload {
    node: NodeId,
    order: UploadOrder,
    told: Option<(Trouble, Timestamp)>,
}

/// Those that are not known to be done.
pub(super) type LastUploads = BTreeMap<JobId, LastUpload>;

impl Engine {
    /// Has the newest verified checkpoint of a job put in its store, if it is not there.
    pub(super) fn upload_newest(&mut self, turn: &mut Turn, id: JobId) {
        let Some((to, order)) = self.next_upload(id, |view| view.verified) else { return };
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.uploading.ordered.as_ref() != Some(&(to.clone(), order.step)) {
            job.uploading.ordered = Some((to.clone(), order.step));
            turn.tell(&to, ToAgent::Upload(order));
        }
    }

    /// A job ends: what it leaves is put in its store by whoever has it, in its own time.
    pub(super) fn upload_last(&mut self, turn: &mut Turn, id: JobId) {
        if self.jobs.get(&id).is_none_or(|job| job.delete_when_final) {
            return;
        }
        let Some((to, order)) = self.next_upload(id, |_| true) else { return };
        if self.last_uploads.len() >= LAST_UPLOADS_MAX {
            self.last_uploads.pop_first();
        }
        self.last_uploads.insert(id, LastUpload { node: to.clone(), order: order.clone(), told: None });
        turn.tell(&to, ToAgent::Upload(order));
    }

    fn next_upload(&self, id: JobId, counts: impl Fn(&CheckpointView) -> bool) -> Option<(NodeId, UploadOrder)> {
        let job = self.jobs.get(&id)?;
        let place = job.shelf()?;
        let newest = job.checkpoints.iter().find(|view| counts(view)).filter(|view| view.stored.is_none())?;
        if job.saves_in_parts() {
            return None;
        }
        let linked = |name: &&NodeId| self.nodes.get(*name).is_some_and(|node| node.linked);
        // Who is at it goes on; it may have sent most of it.
        let at_it = job.uploading.ordered.as_ref().map(|(node, _)| node).filter(|node| newest.nodes().any(|own| own == *node));
        let to = at_it.filter(linked).or_else(|| newest.nodes().find(linked))?;
        let mut env = job.spec.env.clone();
        env.extend(job.spec.secrets.clone());
        let (step, lineage, keep) = (newest.step, job.lineage.clone(), job.spec.checkpoint.keep_stored);
        Some((to.clone(), UploadOrder { job: id, step, to: place, env, lineage, keep }))
    }

    /// A node is linked anew: what it was told before may be lost.
    pub(super) fn look_at_uploads(&mut self, turn: &mut Turn, node: &NodeId) {
        let jobs = self.jobs.values().filter(|job| job.spec.checkpoint.to.is_some());
        let jobs: Vec<JobId> = jobs.map(|job| job.id).collect();
        for id in jobs {
            if let Some(job) = self.jobs.get_mut(&id)
                && job.uploading.ordered.as_ref().is_some_and(|(own, _)| own == node)
            {
                job.uploading.ordered = None;
            }
            self.upload_newest(turn, id);
        }
        let linked = self.nodes.get(node).is_some_and(|own| own.linked);
        for last in self.last_uploads.values().filter(|last| linked && last.node == *node) {
            turn.tell(node, ToAgent::Upload(last.order.clone()));
        }
    }

    pub(super) fn on_uploaded(&mut self, turn: &mut Turn, node: &NodeId, done: &Uploaded) {
        let Uploaded { job: id, step, bytes, took_ms, .. } = *done;
        self.uploads += 1;
        self.upload_bytes += bytes;
        let facts =
            || Facts::from([("step", step.into()), ("node", node.0.clone().into()), ("bytes", bytes.into()), ("took_ms", took_ms.into())]);
        let Some(job) = self.jobs.get_mut(&id) else {
            if self.last_uploads.remove(&id).is_some() {
                turn.event(Some(id), "checkpoint_stored", format!("step {step} is in the job's store"), facts());
            }
            return;
        };
        let Some(place) = job.shelf() else { return };
        for view in &mut job.checkpoints {
            let there = done.kept.contains(&view.step) && (view.stored.is_some() || view.step == step);
            view.stored = there.then(|| place.join(&step_folder(view.step)).to_string());
        }
        job.checkpoints.retain(CheckpointView::is_somewhere);
        if job.uploading.told.take().is_some() {
            turn.event(Some(id), "store_works_again", format!("{place} takes checkpoints again"), Facts::new());
        }
        turn.event(Some(id), "checkpoint_stored", format!("step {step} is in {place}"), facts());
        turn.touched.insert(id);
        self.upload_newest(turn, id);
    }

    pub(super) fn on_store_fault(&mut self, turn: &mut Turn, node: &NodeId, fault: &StoreFault) {
        *self.store_faults.entry(fault.trouble).or_default() += 1;
        let active = self.jobs.get_mut(&fault.job).map(|job| &mut job.uploading.told);
        let gives_up = fault.trouble == Trouble::Damaged;
        // What its node has given up for good is not ordered again.
        let mut over = if active.is_none() && gives_up { self.last_uploads.remove(&fault.job) } else { None };
        let last = over.as_mut().or_else(|| self.last_uploads.get_mut(&fault.job));
        let archive = self.last_archives.get_mut(&fault.job);
        let Some(told) = active.or(last.map(|last| &mut last.told)).or(archive.map(|last| &mut last.told)) else { return };
        if told.is_some_and(|(trouble, at)| trouble == fault.trouble && turn.now.since_ms(at) < STORE_FAULT_EVERY_MS) {
            return;
        }
        *told = Some((fault.trouble, turn.now));
        let mut facts = Facts::from([("node", node.0.clone().into()), ("trouble", fault.trouble.name().into())]);
        facts.extend(fault.step.map(|step| ("step", step.into())));
        turn.event(Some(fault.job), "store_failed", format!("{node}: {}", fault.reason), facts);
    }

    /// What a store has of a job, for a gang that begins.
    pub(super) fn stored_for(&self, job: &Job, placement: &[PlacedRanks]) -> Option<Stored> {
        let place = job.shelf()?;
        let rejected = job.rejected_step();
        let step =
            job.checkpoints.iter().filter(|view| view.stored.is_some() && Some(view.step) != rejected).map(|view| view.step).max()?;
        let gives = |name: &NodeId| self.nodes.get(name).is_some_and(|node| node.linked);
        let is_near = |view: &CheckpointView| view.nodes().any(|own| gives(own) || placement.iter().any(|share| share.node == *own));
        let near = job.checkpoints.iter().filter(|view| is_near(view)).map(|view| view.step).max();
        Some(Stored { place, step, required: near.is_none_or(|near| near < step) })
    }

    /// Uploads that were done, and their bytes; and faults of stores by kind; since the start.
    pub fn stores(&self) -> (u64, u64, &BTreeMap<Trouble, u64>) {
        (self.uploads, self.upload_bytes, &self.store_faults)
    }
}

impl Job {
    /// Its folder in its store.
    pub(super) fn shelf(&self) -> Option<Place> {
        Some(self.spec.checkpoint.to.as_ref()?.join(&self.id.to_string()))
    }

    /// What a program that is not ours saves on several nodes may be different there: no node has all of it.
    fn saves_in_parts(&self) -> bool {
        self.spec.worker.is_none() && self.gang.as_ref().map_or(&self.ran_on, |gang| &gang.placement).len() > 1
    }
}
