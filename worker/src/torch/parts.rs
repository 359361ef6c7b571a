//! Where the time of a step goes, for a rank alone: what it did itself and what it waited for.
//!
//! All ranks' steps take equally long, because each waits for the slowest in the reduction; only so a rank that holds the others up can be
//! told from those. Saves, evaluations and what is printed are in no part.

use std::collections::BTreeMap;
use std::time::Duration;

use everlit_api::rank::{EXCHANGE_METRIC, StepPart};

/// The parts of one step.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepTimes {
    /// Waiting for samples.
    pub data: Duration,
    /// Forward and backward pass, without waiting for others.
    pub compute: Duration,
    /// From its own gradients to the sums of all ranks.
    pub exchange: Duration,
    /// The gradient's norm and the optimizer.
    pub update: Duration,
}

/// Steps since the last heartbeat: there may be many between two.
#[derive(Debug, Clone, Copy, Default)]
pub struct Parts {
    steps: u32,
    sum: StepTimes,
}

impl Parts {
    /// One step more.
    pub fn add(&mut self, times: StepTimes) {
        self.steps += 1;
        self.sum.data += times.data;
        self.sum.compute += times.compute;
        self.sum.exchange += times.exchange;
        self.sum.update += times.update;
    }

    /// Puts the means over these steps among the metrics and begins anew; without a step since, what was told last stays.
    pub fn tell(&mut self, metrics: &mut BTreeMap<String, f64>) {
        let Self { steps, sum } = std::mem::take(self);
        if steps == 0 {
            return;
        }
        let [data, compute, update] = StepPart::ALL.map(StepPart::metric);
        for (name, time) in [(data, sum.data), (compute, sum.compute), (EXCHANGE_METRIC, sum.exchange), (update, sum.update)] {
            let mean = time.as_secs_f64() / f64::from(steps);
            match metrics.get_mut(name) {
                Some(known) => *known = mean,
                None => drop(metrics.insert(name.into(), mean)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_tells_the_means_over_its_own_steps() {
        let (mut parts, mut metrics) = (Parts::default(), BTreeMap::new());
        parts.tell(&mut metrics);
        assert!(metrics.is_empty(), "nothing is known before the first step");
        let ms = Duration::from_millis;
        let step = |n| StepTimes { data: ms(n), compute: ms(10 * n), exchange: ms(100 * n), update: ms(1000 * n) };
        parts.add(step(1));
        parts.add(step(3));
        parts.tell(&mut metrics);
        let told = |metrics: &BTreeMap<String, f64>| {
            ["data_seconds", "compute_seconds", "exchange_seconds", "update_seconds"].map(|name| (metrics[name] * 1000.0).round())
        };
        assert_eq!(told(&metrics), [2.0, 20.0, 200.0, 2000.0]);
        parts.tell(&mut metrics);
        assert_eq!(told(&metrics), [2.0, 20.0, 200.0, 2000.0], "a heartbeat between two steps says the same again");
        parts.add(step(5));
        parts.tell(&mut metrics);
        assert_eq!(told(&metrics), [5.0, 50.0, 500.0, 5000.0], "steps of before are in no later heartbeat");
    }
}
