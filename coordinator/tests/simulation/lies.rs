//! Disks that lie: a loss of power takes what they said was durable, or tears it. In one world of ten, so that all others show what holds
//! on honest disks.
//!
//! The coordinator's store forgets its last transactions as a whole (a database finds a torn one by its checksum). A node forgets a
//! checkpoint, has a torn one, or a torn `gang.json`. What was promised by what is lost can not be kept; all else must hold, two ranks must
//! never be one, and every job that is still known must end. Has a source of chance of its own: other worlds are the runs that they were.

use std::collections::VecDeque;

use crate::faults::Fault;
use crate::random::Random;
use crate::store::Store;
use crate::world::World;

/// Transactions that a lying disk may forget.
const FORGETS: usize = 12;

#[derive(Debug)]
pub struct Lies {
    random: Random,
    past: VecDeque<Store>,
}

impl Lies {
    /// Of a world; `None`: its disks are honest.
    pub fn of(seed: u64) -> Option<Self> {
        (seed % 10 == 5).then(|| Self { random: Random::new(!seed), past: VecDeque::new() })
    }
}

impl World {
    /// Before a transaction.
    pub fn remember_store(&mut self) {
        let Some(lies) = &mut self.lies else { return };
        lies.past.push_back(self.coordinator.store.clone());
        if lies.past.len() > FORGETS {
            lies.past.pop_front();
        }
    }

    /// The coordinator's machine loses power.
    pub fn lose_store_writes(&mut self) {
        let Some(lies) = &mut self.lies else { return };
        if lies.past.is_empty() || !lies.random.percent(40) {
            return;
        }
        let kept = lies.random.below(lies.past.len() as u64) as usize;
        self.coordinator.store = lies.past.swap_remove_back(kept).unwrap_or_default();
        lies.past.clear();
        self.faults.fired(Fault::StoreWritesLost);
        self.note(31, kept as u64, 0);
        let mut checkers = std::mem::take(&mut self.checkers);
        checkers.forget(self);
        self.checkers = checkers;
        for node in 0..self.nodes.len() {
            self.disturb_node(node);
        }
    }

    /// A node loses power.
    pub fn lose_node_writes(&mut self, node: usize) {
        let Some(lies) = &mut self.lies else { return };
        let own = &mut self.nodes[node];
        let mut fired = Vec::new();
        for kept in own.checkpoints.values_mut() {
            match lies.random.below(10) {
                0..=2 if kept.steps.pop_last().is_some() => fired.push(Fault::CheckpointLost),
                3..=4 => {
                    let newest = kept.steps.values_mut().next_back();
                    fired.extend(newest.map(|newest| newest.1 = true).map(|()| Fault::CheckpointTorn));
                }
                _ => {}
            }
        }
        let torn: Vec<_> = own.gangs.keys().copied().filter(|_| lies.random.percent(30)).collect();
        for (job, attempt) in torn {
            // Without its order a run folder is one of a rank that was never started, and goes.
            own.gangs.remove(&(job, attempt));
            own.runs.retain(|run, _| (run.job, run.attempt) != (job, attempt));
            fired.push(Fault::OrderLost);
        }
        self.note(32, node as u64, fired.len() as u64);
        fired.into_iter().for_each(|fault| self.faults.fired(fault));
    }
}
