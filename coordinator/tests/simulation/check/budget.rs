//! INV-7: counted restarts never exceed the budget, over any number of coordinator restarts. Counted again here from the durable events.

use std::collections::BTreeMap;

use everlit_api::ids::JobId;
use everlit_api::rank::Cause;

use super::Seen;
use crate::store::Store;
use crate::world::World;

#[derive(Debug, Default)]
pub struct Budget {
    counted: BTreeMap<JobId, u32>,
    restarts: BTreeMap<JobId, u32>,
    /// The rank that is joining a smaller gang: one that never took part is no loss, and costs nothing.
    joining: BTreeMap<JobId, u64>,
}

impl Budget {
    pub fn forget(&mut self, store: &Store) {
        self.joining.clear();
        self.counted.clear();
        self.restarts.clear();
        for id in store.active.keys() {
            let Some(job) = store.read(*id) else { continue };
            self.counted.insert(*id, job.budget.counted);
            self.restarts.insert(*id, job.budget.restarts);
        }
    }

    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::Written(record) = seen else { return Ok(()) };
        for event in &record.events {
            let Some(id) = event.job else { continue };
            match (event.event, event.data["rank"].as_u64()) {
                ("gang_growing", Some(rank)) => {
                    self.joining.insert(id, rank);
                }
                ("gang_grown" | "attempt_placed", _) => {
                    self.joining.remove(&id);
                }
                _ => {}
            }
            if !matches!(event.event, "restart_scheduled" | "rank_replaced" | "rank_failed") {
                continue;
            }
            if event.event == "rank_replaced" && self.joining.remove(&id).is_some_and(|rank| Some(rank) == event.data["rank"].as_u64()) {
                continue;
            }
            let cause: Cause = serde_json::from_value(event.data["cause"].clone()).map_err(|error| error.to_string())?;
            let counted = self.counted.entry(id).or_default();
            *counted += u32::from(!cause.is_free());
            let most = world.coordinator.store.read(id).map_or(u32::MAX, |job| job.spec.restart.max_restarts);
            if *counted > most {
                return Err(format!("INV-7: restart {counted} of job {}, whose budget is {most}", id.as_u128()));
            }
        }
        for row in &record.jobs {
            let Some(job) = world.coordinator.store.read(row.id) else { continue };
            let before = self.restarts.insert(row.id, job.budget.restarts).unwrap_or(0);
            if job.budget.restarts < before {
                return Err(format!("INV-7: job {} forgot restarts: {before}, then {}", row.id.as_u128(), job.budget.restarts));
            }
        }
        Ok(())
    }
}
