//! The coordinator's disk: rows as the real store keeps them, changed by whole transactions only.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::{JobId, NodeId};
use everlit_api::status::JobState;
use everlit_api::time::Timestamp;
use everlit_coordinator::engine::{Command, Held, Record, Step, StoredJob, StoredNode, read_job, state::Job};

#[derive(Debug, Default, Clone)]
pub struct Store {
    pub active: BTreeMap<JobId, StoredJob>,
    /// With how often a row of it was written after it was final.
    pub finals: BTreeMap<JobId, StoredJob>,
    pub cordoned: BTreeSet<NodeId>,
    pub blames: BTreeMap<NodeId, Held>,
    /// Jobs whose files are to go, by node.
    pub removals: BTreeMap<NodeId, BTreeSet<JobId>>,
    /// Removed with everything.
    pub deleted: BTreeSet<JobId>,
    pub last_time: Timestamp,
}

impl Store {
    /// One transaction.
    pub fn commit(&mut self, steps: &[(Timestamp, Step)]) {
        for (at, step) in steps {
            self.last_time = self.last_time.max(*at);
            self.apply(&step.record);
            for command in &step.commands {
                if let Command::Final { job, nodes, delete: true, .. } = command {
                    self.finals.remove(job);
                    self.deleted.insert(*job);
                    for node in nodes {
                        self.removals.entry(node.clone()).or_default().insert(*job);
                    }
                }
            }
        }
    }

    fn apply(&mut self, record: &Record) {
        for row in &record.jobs {
            let before = self.active.remove(&row.id);
            let text = |spec: &std::sync::Arc<everlit_api::job::JobSpec>| serde_json::to_string(&**spec).expect("plain data");
            let spec = row.spec.as_ref().map(text).or(before.as_ref().map(|b| b.spec.clone())).expect("the first row has the spec");
            let series = row.series.clone().or(before.as_ref().and_then(|b| b.series.clone()));
            let listing = row.listing.clone().or(before.and_then(|b| b.listing));
            let stored = StoredJob { id: row.id, spec, body: row.body.clone(), ranks: row.ranks.clone(), series, listing };
            if row.finished_at.is_some() {
                self.finals.insert(row.id, stored)
            } else {
                self.active.insert(row.id, stored)
            };
        }
        self.blames.extend(record.blames.iter().cloned());
        for (node, cordoned) in &record.cordons {
            if *cordoned {
                self.cordoned.insert(node.clone())
            } else {
                self.cordoned.remove(node)
            };
        }
    }

    pub fn jobs(&self) -> Vec<StoredJob> {
        self.active.values().cloned().collect()
    }

    pub fn nodes(&self) -> Vec<StoredNode> {
        let known: BTreeSet<&NodeId> = self.cordoned.iter().chain(self.blames.keys()).collect();
        let text = |id: &NodeId| self.blames.get(id).map(|blames| serde_json::to_string(blames).expect("plain data"));
        known.into_iter().map(|id| StoredNode { id: id.clone(), cordoned: self.cordoned.contains(id), blames: text(id) }).collect()
    }

    /// A job as the disk has it.
    pub fn read(&self, job: JobId) -> Option<Job> {
        let row = self.active.get(&job).or_else(|| self.finals.get(&job))?;
        Some(read_job(row).expect("rows of this build"))
    }

    pub fn final_state(&self, job: JobId) -> Option<JobState> {
        self.finals.contains_key(&job).then(|| self.read(job).expect("it is there").state)
    }
}
