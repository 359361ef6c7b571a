//! Which jobs have new output to search for progress, and the scanners that do it.
//!
//! Only programs that write no heartbeats are searched, only when their shims said that there was output, and only one scan per job is
//! under way. At a rank's end its last lines are searched once more, because what came after the last scan is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use everlit_api::agent::{Beat, GangSpec, Program};
use everlit_api::ids::{Incarnation, JobId};

use super::folders::Folders;
use super::metrics::{Patterns, Scanner};

static DEFAULT: LazyLock<Arc<Patterns>> = LazyLock::new(|| Arc::new(Patterns::new(&[])));

struct Job {
    patterns: Arc<Patterns>,
    /// None while a scan is under way.
    scanner: Option<Scanner>,
}

/// All jobs whose output is searched.
pub(super) struct Outputs {
    folders: Folders,
    jobs: BTreeMap<JobId, Job>,
    fresh: BTreeSet<JobId>,
}

impl Outputs {
    pub(super) fn new(folders: Folders) -> Self {
        Self { folders, jobs: BTreeMap::new(), fresh: BTreeSet::new() }
    }

    /// A rank without heartbeats wrote something.
    pub(super) fn on_output(&mut self, spec: &GangSpec) {
        if !matches!(spec.program, Program::Command { .. }) {
            return;
        }
        self.fresh.insert(spec.job);
        let logs = self.folders.logs(spec.job);
        self.jobs.entry(spec.job).or_insert_with(|| {
            let patterns = if spec.log_metrics.is_empty() { DEFAULT.clone() } else { Arc::new(Patterns::new(&spec.log_metrics)) };
            Job { scanner: Some(Scanner::new(&logs, patterns.clone())), patterns }
        });
    }

    /// Scanners whose turn it is; each must come back.
    pub(super) fn take_due(&mut self) -> Vec<(JobId, Scanner)> {
        let mut due = Vec::new();
        for job in std::mem::take(&mut self.fresh) {
            let Some(own) = self.jobs.get_mut(&job) else { continue };
            match own.scanner.take() {
                Some(scanner) => due.push((job, scanner)),
                None => drop(self.fresh.insert(job)),
            }
        }
        due
    }

    pub(super) fn put_back(&mut self, job: JobId, scanner: Scanner) {
        if let Some(own) = self.jobs.get_mut(&job) {
            own.scanner = Some(scanner);
        }
    }

    pub(super) fn drop_job(&mut self, job: JobId) {
        self.jobs.remove(&job);
        self.fresh.remove(&job);
    }

    /// What the last lines of a rank tell.
    pub(super) fn in_tail(&self, incarnation: Incarnation, tail: &[String]) -> Option<Box<Beat>> {
        let beat = self.jobs.get(&incarnation.job)?.patterns.read(&tail.join("\n"))?;
        Some(Box::new(Beat { incarnation: Some(incarnation), ..beat }))
    }
}
