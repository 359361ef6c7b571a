//! The learning rate of each update: a function of the job's settings and the step alone.

use everlit_api::job::WorkerSpec;

/// A linear rise, then half a cosine down.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    peak: f64,
    floor: f64,
    rise: u64,
    total: u64,
}

impl Schedule {
    /// As the job says. By default the rise takes a tenth of the updates, at most 100, and the end is a tenth of the peak.
    pub fn of(worker: &WorkerSpec) -> Self {
        Self {
            peak: worker.learning_rate,
            floor: worker.min_learning_rate.unwrap_or(worker.learning_rate * 0.1),
            rise: worker.warmup_steps.unwrap_or((worker.steps / 10).clamp(1, 100)),
            total: worker.steps,
        }
    }

    /// The rate of update `step`, from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.rise {
            return self.peak * (step + 1) as f64 / self.rise as f64;
        }
        let part = (step - self.rise) as f64 / self.total.saturating_sub(self.rise).max(1) as f64;
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (std::f64::consts::PI * part).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_falls_and_depends_on_the_step_alone() {
        let worker = WorkerSpec { learning_rate: 1.0, steps: 2000, ..WorkerSpec::for_world(1) };
        let schedule = Schedule::of(&worker);
        let rates: Vec<f64> = (0..2000).map(|step| schedule.rate(step)).collect();
        assert!(rates[0] > 0.0 && rates[99] == 1.0);
        assert!(rates[..100].is_sorted() && rates[100..].is_sorted_by(|a, b| a >= b));
        assert!((rates[1999] - 0.1).abs() < 0.01);
        assert_eq!(Schedule::of(&WorkerSpec { steps: 1, learning_rate: 0.5, ..worker.clone() }).rate(0), 0.5);
        let given = Schedule::of(&WorkerSpec { warmup_steps: Some(0), min_learning_rate: Some(0.5), ..worker });
        assert_eq!(given.rate(0), 1.0);
        assert!((given.rate(2000) - 0.5).abs() < 1e-9);
    }
}
