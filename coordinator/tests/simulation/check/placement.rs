//! INV-9: a gang starts whole, or with as many ranks as it can live with, or not at all, and nothing is allocated twice. Added up again from what is on the disk.

use std::collections::BTreeMap;

use everlit_api::status::GpuInfo;

use super::Seen;
use crate::world::World;

pub fn saw(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Written(record) = seen else { return Ok(()) };
    if !record.events.iter().any(|event| event.event == "attempt_placed") {
        return Ok(());
    }
    let mut ranks: BTreeMap<&str, u32> = BTreeMap::new();
    // Bytes of each GPU, and whether somebody has it alone.
    let mut gpus: BTreeMap<(&str, u32), (u64, bool)> = BTreeMap::new();
    let jobs: Vec<_> = world.coordinator.store.active.keys().filter_map(|id| world.coordinator.store.read(*id)).collect();
    for job in &jobs {
        let Some(gang) = &job.gang else { continue };
        let placed: u32 = gang.placement.iter().map(|share| share.count).sum();
        if !(job.spec.least_world_size()..=job.spec.world_size).contains(&placed) {
            return Err(format!("INV-9: {placed} of {} ranks of job {} are placed", job.spec.world_size, job.id.as_u128()));
        }
        let spares = if gang.placement.len() == 1 { job.spec.restart.spares } else { 0 };
        for share in &gang.placement {
            *ranks.entry(share.node.0.as_str()).or_default() += share.count + spares;
            let alone = job.spec.resources.gpus > 0 || job.spec.resources.gpu_memory == 0;
            for gpu in &share.gpus {
                let before = gpus.get(&(share.node.0.as_str(), *gpu)).copied();
                if before.is_some_and(|(_, taken)| taken || alone) {
                    return Err(format!("INV-9: GPU {gpu} of {} is granted twice", share.node));
                }
                let bytes = before.map_or(0, |(bytes, _)| bytes) + if alone { 0 } else { job.spec.resources.gpu_memory };
                gpus.insert((share.node.0.as_str(), *gpu), (bytes, alone));
            }
        }
    }
    for node in &world.nodes {
        let over = |gpu: &&GpuInfo| gpus.get(&(node.id.0.as_str(), gpu.index)).is_some_and(|(bytes, _)| *bytes > gpu.memory);
        if let Some(gpu) = node.capacity.gpus.iter().find(over) {
            return Err(format!("INV-9: more of GPU {} of {} is granted than it has", gpu.index, node.id));
        }
        let taken = ranks.get(node.id.0.as_str()).copied().unwrap_or(0);
        if taken > node.capacity.slots {
            return Err(format!("INV-9: {taken} ranks on {}, which takes {}", node.id, node.capacity.slots));
        }
    }
    Ok(())
}
