//! INV-4: the death of a coordinator or an agent signals no rank. Every signal must have another reason: something happened to the attempt,
//! a user asked, its node is being emptied, or it is not wanted any more.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::{JobId, NodeId};

use super::Seen;
use crate::world::World;

/// After a drain was asked for, whatever still starts there may be stopped.
const DRAIN_MS: u64 = 120_000;

#[derive(Debug, Default)]
pub struct Signals {
    reasons: BTreeSet<(JobId, u32)>,
    drains: BTreeMap<NodeId, Option<u64>>,
}

impl Signals {
    pub fn drained(&mut self, node: &NodeId) {
        self.drains.insert(node.clone(), None);
    }

    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        for at in self.drains.values_mut() {
            at.get_or_insert(world.now);
        }
        match seen {
            Seen::Reason { job, attempt, .. } => drop(self.reasons.insert((*job, *attempt))),
            Seen::Signal { node, incarnation, signal } => {
                let (job, attempt) = (incarnation.job, incarnation.attempt);
                let known = world.coordinator.store.read(job);
                let gang = known.and_then(|job| job.gang).filter(|gang| gang.attempt == attempt);
                let unwanted = gang.is_none();
                let drained = |node: &NodeId| self.drains.get(node).copied().flatten().is_some_and(|at| world.now <= at + DRAIN_MS);
                // A gang ends as a whole, whichever of its nodes is emptied.
                let gang_drain = gang.is_some_and(|gang| gang.placement.iter().any(|share| drained(&share.node)));
                let drain = gang_drain || drained(&world.nodes[*node].id);
                let disturbed = world.disturbed.contains(&(job, attempt)) || self.reasons.contains(&(job, attempt));
                // A spare waits for its gang, and is not needed when that is through.
                let through = world.nodes[*node].members(job, attempt).iter().all(|own| world.nodes[*node].has_ended(own));
                if !(unwanted || drain || disturbed || through) {
                    return Err(format!("INV-4: signal {signal} to {incarnation}, to which nothing has happened"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
