//! A rank that is said to be slow was made slow, and it is said once: again only after it kept up, or by another coordinator.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::agent::ToAgent;
use everlit_api::ids::{Incarnation, JobId};

use super::Seen;

/// A job, its attempt and generation.
type Membership = (JobId, u32, u32);

#[derive(Debug, Default)]
pub struct Slow {
    slowed: BTreeSet<Incarnation>,
    /// Seats by rank, as agents were told.
    seats: BTreeMap<Membership, BTreeMap<u32, u32>>,
    said: BTreeSet<(Membership, u32)>,
}

impl Slow {
    pub fn slowed(&mut self, own: Incarnation) {
        self.slowed.insert(own);
    }

    pub fn saw(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::CoordinatorStarted => self.said.clear(),
            Seen::Told { frame: ToAgent::StartGang(spec), .. } => {
                let membership = (spec.job, spec.attempt, spec.generation);
                self.seats.entry(membership).or_default().extend(spec.own_seats());
            }
            Seen::Written(record) => {
                for event in record.events.iter().filter(|event| matches!(event.event, "rank_slow" | "rank_slow_over")) {
                    let Some(job) = event.job else { continue };
                    let number = |name: &str| event.data[name].as_u64().unwrap_or_default() as u32;
                    let (attempt, rank) = (number("attempt"), number("rank"));
                    let membership = (job, attempt, number("generation"));
                    let seat = self.seats.get(&membership).and_then(|seats| seats.get(&rank)).copied();
                    let own = seat.map(|rank| Incarnation { job, attempt, rank });
                    let began = event.event == "rank_slow";
                    if began && !own.is_some_and(|own| self.slowed.contains(&own)) {
                        return Err(format!("job {}: rank {rank} ({own:?}) never was slow: {}", job.as_u128(), event.reason));
                    }
                    let news = if began { self.said.insert((membership, rank)) } else { self.said.remove(&(membership, rank)) };
                    if !news {
                        return Err(format!("job {}: {} of rank {rank} is said twice", job.as_u128(), event.event));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
