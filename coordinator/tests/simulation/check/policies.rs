//! What `log_policies` say is done: no attempt on an excluded node until a user restarts the job, and none at all of a job that is not to be
//! tried again. What is held against nodes is what the disk says, over any number of coordinator restarts.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::JobId;

use super::Seen;
use crate::store::Store;
use crate::world::World;

#[derive(Debug, Default)]
pub struct Policies {
    excluded: BTreeMap<JobId, BTreeSet<String>>,
    cancelled: BTreeSet<JobId>,
}

impl Policies {
    pub fn forget(&mut self, store: &Store) {
        self.cancelled.retain(|job| !store.active.contains_key(job));
        self.excluded.clear();
        for id in store.active.keys() {
            let nodes = store.read(*id).map(|job| job.excluded.iter().map(ToString::to_string).collect());
            self.excluded.extend(nodes.map(|nodes| (*id, nodes)));
        }
    }

    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Written(record) => {
                for event in &record.events {
                    let Some(job) = event.job else { continue };
                    let text = |name: &str| event.data[name].as_str().unwrap_or_default().to_string();
                    match event.event {
                        "log_policy_matched" if text("action") == "exclude_node" => {
                            self.excluded.entry(job).or_default().insert(text("node"));
                        }
                        "log_policy_matched" => drop(self.cancelled.insert(job)),
                        "nodes_readmitted" => drop(self.excluded.remove(&job)),
                        "attempt_placed" if self.cancelled.contains(&job) => {
                            return Err(format!("job {} is tried again, which its log_policies forbid", job.as_u128()));
                        }
                        "attempt_placed" if self.excluded.get(&job).is_some_and(|nodes| nodes.contains(&text("nodes"))) => {
                            return Err(format!("job {} is placed on {}, which is excluded for it", job.as_u128(), text("nodes")));
                        }
                        _ => {}
                    }
                }
                Ok(())
            }
            Seen::CoordinatorStarted => {
                let Some(engine) = &world.coordinator.engine else { return Ok(()) };
                let kept = engine.nodes().iter().map(|(id, node)| (id.clone(), node.held())).filter(|(_, held)| !held.is_empty());
                let stored = world.coordinator.store.blames.clone().into_iter().filter(|(_, held)| !held.is_empty());
                if kept.eq(stored) { Ok(()) } else { Err("what was held against nodes is not what is held against them now".into()) }
            }
            _ => Ok(()),
        }
    }
}
