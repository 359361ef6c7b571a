//! INV-2: a job answered 2xx is never lost and ends in a final state that never changes.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::JobId;
use everlit_api::status::JobState;

use super::Seen;
use crate::store::Store;
use crate::world::World;

#[derive(Debug, Default)]
pub struct Accepted {
    jobs: BTreeSet<JobId>,
    finals: BTreeMap<JobId, JobState>,
}

impl Accepted {
    pub fn count(&self) -> usize {
        self.jobs.len()
    }

    pub fn forget(&mut self, store: &Store) {
        self.jobs.retain(|job| store.active.contains_key(job) || store.finals.contains_key(job) || store.deleted.contains(job));
        self.finals.retain(|job, _| store.finals.contains_key(job) || store.deleted.contains(job));
    }

    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Written(record) => {
                for row in &record.jobs {
                    // Accepted is what the answer waits for: the first row.
                    self.jobs.insert(row.id);
                    if let Some(state) = self.finals.get(&row.id) {
                        return Err(format!("INV-2: job {} was {state} for good and is written again as {}", row.id.as_u128(), row.state));
                    }
                    if row.state.is_final() {
                        self.finals.insert(row.id, row.state);
                    }
                }
            }
            Seen::CoordinatorStarted => return self.all_are_there(world),
            _ => {}
        }
        Ok(())
    }

    fn all_are_there(&self, world: &World) -> Result<(), String> {
        let store = &world.coordinator.store;
        match self.jobs.iter().find(|job| !store.deleted.contains(job) && store.read(**job).is_none()) {
            Some(lost) => Err(format!("INV-2: job {} was accepted and is lost", lost.as_u128())),
            None => Ok(()),
        }
    }

    pub fn at_the_end(&self, world: &World) -> Result<(), String> {
        self.all_are_there(world)?;
        let store = &world.coordinator.store;
        let open = self.jobs.iter().find(|job| !store.deleted.contains(job) && store.final_state(**job).is_none());
        open.map_or(Ok(()), |job| Err(format!("INV-2: job {} is not final", job.as_u128())))
    }
}
