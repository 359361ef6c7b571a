//! INV-1 over several nodes: no attempt resumes from what an older one has committed after another had begun elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::JobId;

use super::Seen;

/// A checkpoint on a node.
type Place = (usize, JobId, u64);

#[derive(Debug, Default)]
pub struct Late {
    /// The newest attempt that began, and where.
    begun: BTreeMap<JobId, (u32, BTreeSet<usize>)>,
    late: BTreeSet<Place>,
}

impl Late {
    pub fn saw(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Committed { node, job, attempt, step } => {
                let is_late = self.begun.get(job).is_some_and(|(newest, on)| attempt < newest && !on.contains(node));
                if is_late {
                    self.late.insert((*node, *job, *step));
                } else {
                    self.late.remove(&(*node, *job, *step));
                }
            }
            Seen::Copied { node, from, job, step } => {
                if self.late.contains(&(*from, *job, *step)) {
                    return Err(format!("INV-1: step {step} of job {} is copied, and was committed too late", job.as_u128()));
                }
                self.late.remove(&(*node, *job, *step));
            }
            Seen::Resumed { node, job, attempt, from } => {
                if let Some((step, by)) = from
                    && self.late.contains(&(*node, *job, *step))
                {
                    let job = job.as_u128();
                    return Err(format!(
                        "INV-1: attempt {attempt} of job {job} resumes from step {step}, which attempt {by} committed too late"
                    ));
                }
                let begun = self.begun.entry(*job).or_default();
                if *attempt > begun.0 {
                    *begun = (*attempt, BTreeSet::new());
                }
                begun.1.insert(*node);
            }
            Seen::Removed { node, job } => self.late.retain(|(on, of, _)| on != node || of != job),
            _ => {}
        }
        Ok(())
    }

    /// The coordinator may not know any more what it knew.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}
