//! INV-11: the ledger's parts sum to wall time, to the millisecond.

use super::Seen;
use crate::world::World;

pub fn saw(world: &World, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Final { job, .. } = seen else { return Ok(()) };
    let Some(job) = world.coordinator.store.read(*job) else { return Ok(()) };
    let Some(finished) = job.finished_at else { return Err(format!("job {} is final without a time", job.id.as_u128())) };
    let ledger = serde_json::to_value(job.summary(finished, String::new()).ledger).map_err(|error| error.to_string())?;
    let sum: f64 = ledger.as_object().into_iter().flatten().filter_map(|(_, part)| part.as_f64()).sum();
    let wall = finished.since_ms(job.submitted_at) as f64 / 1_000.0;
    if (sum - wall).abs() > 0.000_5 {
        return Err(format!("INV-11: the ledger of job {} sums to {sum} s of {wall} s: {ledger}", job.id.as_u128()));
    }
    Ok(())
}
