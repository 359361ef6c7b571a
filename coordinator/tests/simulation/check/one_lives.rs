//! INV-1: at most one incarnation of a rank can commit, and on nodes that can be reached at most one lives.

use std::collections::BTreeMap;

use everlit_api::ids::{Incarnation, JobId};

use super::Seen;
use crate::node::SimNode;
use crate::world::World;

/// A node that has been linked for so long has been told what is not wanted there, and has acted on it.
const TOLD_MS: u64 = 30_000;

fn is_former(node: &SimNode, own: Incarnation, fresh: Incarnation) -> bool {
    (own.job, own.attempt) == (fresh.job, fresh.attempt) && own != fresh && node.spec(own).is_some_and(|spec| !spec.wants(own.rank))
}

#[derive(Debug, Default)]
pub struct OneLives {
    committed: BTreeMap<(usize, JobId), u32>,
}

impl OneLives {
    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Committed { node, job, attempt, .. } => {
                let newest = self.committed.entry((*node, *job)).or_default();
                if attempt < newest {
                    return Err(format!("INV-1: attempt {attempt} of job {} commits after attempt {newest} did", job.as_u128()));
                }
                *newest = *attempt;
            }
            // What the attempts are fenced off from is gone. Only a store that forgets the removal brings the job back, and it begins anew.
            Seen::Removed { node, job } => drop(self.committed.remove(&(*node, *job))),
            Seen::RankUp { incarnation } => {
                for (number, node) in world.nodes.iter().enumerate() {
                    // One attempt is on one node: what is no member there any more is gone before its successor starts.
                    if let Some(former) = node.living().find(|own| is_former(node, *own, *incarnation)) {
                        return Err(format!("INV-1: {incarnation} starts while {former}, which it replaces, lives"));
                    }
                    let told = |node| world.reached_since(node).is_some_and(|since| world.now >= since + TOLD_MS);
                    let same = |own: &Incarnation| own.job == incarnation.job && own.rank == incarnation.rank;
                    let other = node.living().find(|own| same(own) && own.attempt != incarnation.attempt);
                    // It is the older one's node that must have heard: that one may start late, too.
                    let starts_at = world.nodes.iter().position(|node| node.runs.contains_key(incarnation)).unwrap_or(number);
                    let older_at = |other: Incarnation| if incarnation.attempt < other.attempt { starts_at } else { number };
                    if let Some(other) = other.filter(|other| told(older_at(*other))) {
                        return Err(format!("INV-1: {incarnation} starts while {other} lives on {}", node.id));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
