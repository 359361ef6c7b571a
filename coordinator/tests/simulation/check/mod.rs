//! What must always be true, one property per file. A checker sees what the world did; it never looks inside an engine.
//!
//! Simulated are INV-1 to INV-4, INV-7 to INV-9 and INV-11, and of INV-6 that nobody's files are removed unasked. Bytes of checkpoints (INV-5,
//! INV-6, INV-12), logs (INV-10) and secrets (INV-13) are not in this world: the tests with real files and the end-to-end scripts hold them.

use everlit_api::agent::ToAgent;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::status::JobState;
use everlit_coordinator::engine::Record;

use crate::world::World;

mod accepted;
mod budget;
mod durable_first;
mod late;
mod ledger;
mod one_lives;
mod placement;
mod policies;
mod quiet;
pub mod retention;
pub mod signals;
pub mod slow;

/// Something that happened.
#[derive(Debug)]
pub enum Seen<'a> {
    CoordinatorStarted,
    /// A transaction is on the disk.
    Written(&'a Record),
    /// The coordinator says something, its record being durable.
    Told {
        node: &'a NodeId,
        frame: &'a ToAgent,
    },
    Final {
        job: JobId,
        state: JobState,
    },
    /// A user, or the job's own limit, asked to stop an attempt.
    Reason {
        job: JobId,
        attempt: u32,
    },
    Signal {
        node: usize,
        incarnation: Incarnation,
        signal: i32,
    },
    RankUp {
        incarnation: Incarnation,
    },
    /// A checkpoint was committed.
    Committed {
        node: usize,
        job: JobId,
        attempt: u32,
        step: u64,
    },
    /// A node has a checkpoint that another one has, too.
    Copied {
        node: usize,
        from: usize,
        job: JobId,
        step: u64,
    },
    /// A node begins an attempt, from a step that some attempt has committed.
    Resumed {
        node: usize,
        job: JobId,
        attempt: u32,
        from: Option<(u64, u32)>,
    },
    /// A node marks a job as final.
    Retired {
        job: JobId,
    },
    /// A node removes a job's files.
    Removed {
        node: usize,
        job: JobId,
    },
}

impl Seen<'_> {
    /// For a reader.
    pub fn text(&self) -> String {
        match self {
            Self::Written(record) => {
                let rows: Vec<String> = record.jobs.iter().map(|row| format!("{} {}", row.id.as_u128(), row.state)).collect();
                let events: Vec<String> =
                    record.events.iter().map(|e| format!("{} {}: {}", e.job.map_or(0, |job| job.as_u128()), e.event, e.reason)).collect();
                format!("written [{}] {}", rows.join(", "), events.join(" | "))
            }
            Self::Told { node, frame: ToAgent::StartGang(spec) } => {
                let seats: Vec<u32> = spec.own_seats().map(|(_, seat)| seat).collect();
                let (attempt, generation, spares) = (spec.attempt, spec.generation, &spec.spares);
                format!(
                    "told {node}: start attempt {attempt} of {}, membership {generation} {seats:?}, spares {spares:?}",
                    spec.job.as_u128()
                )
            }
            other => format!("{other:?}"),
        }
    }
}

#[derive(Debug, Default)]
pub struct Checkers {
    one_lives: one_lives::OneLives,
    late: late::Late,
    accepted: accepted::Accepted,
    pub signals: signals::Signals,
    pub retention: retention::Retention,
    budget: budget::Budget,
    policies: policies::Policies,
    pub slow: slow::Slow,
}

impl Checkers {
    pub fn saw(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        self.one_lives.saw(world, seen)?;
        self.late.saw(seen)?;
        self.accepted.saw(world, seen)?;
        durable_first::saw(world, seen)?;
        self.signals.saw(world, seen)?;
        self.retention.saw(world, seen)?;
        self.budget.saw(world, seen)?;
        self.policies.saw(world, seen)?;
        self.slow.saw(seen)?;
        quiet::saw(world, seen)?;
        placement::saw(world, seen)?;
        ledger::saw(world, seen)
    }

    /// What the disk said was durable is not there any more: what was known from it is forgotten, and from here on held against nobody.
    pub fn forget(&mut self, world: &World) {
        let store = &world.coordinator.store;
        self.accepted.forget(store);
        self.budget.forget(store);
        self.policies.forget(store);
        self.retention.unsure = true;
        self.late.forget();
    }

    pub fn at_the_end(&self, world: &World) -> Result<(), String> {
        self.accepted.at_the_end(world)?;
        quiet::at_the_end(world)
    }

    /// Jobs that were accepted.
    pub fn jobs(&self) -> usize {
        self.accepted.count()
    }
}
