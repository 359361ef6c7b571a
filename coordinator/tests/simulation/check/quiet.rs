//! INV-8: once a job is final, none of its processes lives on a node that can be reached.

use super::Seen;
use crate::world::World;

/// A record may be written so slowly that a lost node is back before it is.
const REACHED_MS: u64 = 60_000;

pub fn saw(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Final { job, state } = seen else { return Ok(()) };
    for (number, node) in world.nodes.iter().enumerate() {
        let reached = world.reached_since(number).is_some_and(|since| world.now >= since + REACHED_MS);
        if let Some(living) = node.living().find(|own| own.job == *job).filter(|_| reached) {
            return Err(format!("INV-8: job {} is {state} and {living} lives on {}", job.as_u128(), node.id));
        }
    }
    Ok(())
}

pub fn at_the_end(world: &World) -> Result<(), String> {
    let living = world.nodes.iter().flat_map(|node| node.living()).next();
    living.map_or(Ok(()), |own| Err(format!("INV-8: {own} lives and every job is final")))
}
