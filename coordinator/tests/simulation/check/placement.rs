//! INV-9: a gang starts whole, or with as many ranks as it can live with, or not at all, and nothing is allocated twice. Added up again from what is on the disk.

use std::collections::{BTreeMap, BTreeSet};

use super::Seen;
use crate::world::World;

pub fn saw(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Written(record) = seen else { return Ok(()) };
    if !record.events.iter().any(|event| event.event == "attempt_placed") {
        return Ok(());
    }
    let mut ranks: BTreeMap<&str, u32> = BTreeMap::new();
    let mut gpus: BTreeSet<(String, u32)> = BTreeSet::new();
    let jobs: Vec<_> = world.coordinator.store.active.keys().filter_map(|id| world.coordinator.store.read(*id)).collect();
    for job in &jobs {
        let Some(gang) = &job.gang else { continue };
        let placed: u32 = gang.placement.iter().map(|share| share.count).sum();
        if !(job.spec.least_world_size()..=job.spec.world_size).contains(&placed) {
            return Err(format!("INV-9: {placed} of {} ranks of job {} are placed", job.spec.world_size, job.id.as_u128()));
        }
        for share in &gang.placement {
            *ranks.entry(share.node.0.as_str()).or_default() += share.count + job.spec.restart.spares;
            for gpu in &share.gpus {
                if !gpus.insert((share.node.0.clone(), *gpu)) {
                    return Err(format!("INV-9: GPU {gpu} of {} is granted twice", share.node));
                }
            }
        }
    }
    for node in &world.nodes {
        let taken = ranks.get(node.id.0.as_str()).copied().unwrap_or(0);
        if taken > node.capacity.slots {
            return Err(format!("INV-9: {taken} ranks on {}, which takes {}", node.id, node.capacity.slots));
        }
    }
    Ok(())
}
