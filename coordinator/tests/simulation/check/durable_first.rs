//! INV-3: nothing is acted on before it is durable.

use everlit_api::agent::ToAgent;
use everlit_coordinator::engine::state::{Gang, Role};

use super::Seen;
use crate::world::World;

pub fn saw(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let store = &world.coordinator.store;
    match seen {
        Seen::Told { frame: ToAgent::StartGang(spec), .. } => {
            let stored = store.read(spec.job);
            let known = stored.as_ref().map_or(0, |job| job.attempt);
            let membership = stored.and_then(|job| job.gang).filter(|gang| gang.attempt == spec.attempt).map(|gang| gang.generation);
            if membership.is_some_and(|known| known < spec.generation) {
                return Err(format!("INV-3: membership {} of job {} is ordered and not on the disk", spec.generation, spec.job.as_u128()));
            }
            if known < spec.attempt && !store.deleted.contains(&spec.job) {
                return Err(format!(
                    "INV-3: attempt {} of job {} is ordered and not on the disk ({known})",
                    spec.attempt,
                    spec.job.as_u128()
                ));
            }
        }
        Seen::Told { frame: ToAgent::Forget { incarnations }, node } => {
            for own in incarnations {
                let Some(job) = store.active.get(&own.job).and_then(|_| store.read(own.job)) else { continue };
                let outsider = job.gang.as_ref().is_some_and(|gang| gang.role(own.rank) == Role::Former);
                // Of what a lying disk has forgotten, nothing is waited for.
                let elsewhere = |gang: &Gang| gang.placement.iter().all(|share| share.node != **node);
                let unknown = own.attempt > job.attempt || job.gang.as_ref().is_some_and(elsewhere);
                let over = unknown || job.attempt > own.attempt || job.gang.is_none() || job.retry_at.is_some() || outsider;
                if !over {
                    return Err(format!("INV-3: the end of {own} is to be forgotten and its attempt's end is not on the disk"));
                }
            }
        }
        Seen::Final { job, state } if !store.deleted.contains(job) && store.final_state(*job) != Some(*state) => {
            return Err(format!("INV-3: job {} is said to be {state}, which is not on the disk", job.as_u128()));
        }
        _ => {}
    }
    Ok(())
}
