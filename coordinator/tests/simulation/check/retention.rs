//! INV-6, as far as the engines decide it: files of a job go only when a user asked for that, and a job is retired only when it is final.

use std::collections::BTreeSet;

use everlit_api::ids::JobId;

use super::Seen;
use crate::world::World;

#[derive(Debug, Default)]
pub struct Retention {
    /// Users asked for their removal.
    pub asked: BTreeSet<JobId>,
    /// A disk has forgotten who was final or deleted.
    pub unsure: bool,
}

impl Retention {
    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let store = &world.coordinator.store;
        match seen {
            Seen::Removed { job, .. } if !self.asked.contains(job) || !(self.unsure || store.deleted.contains(job)) => {
                Err(format!("INV-6: the files of job {} are removed, and nobody asked for it", job.as_u128()))
            }
            Seen::Retired { job } if !self.unsure && store.final_state(*job).is_none() && !store.deleted.contains(job) => {
                Err(format!("INV-6: job {} is retired and not final", job.as_u128()))
            }
            _ => Ok(()),
        }
    }
}
