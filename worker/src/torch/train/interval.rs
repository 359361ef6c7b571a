//! When a save is due by time: every so often, or as often as costs least.
//!
//! Saving seldom loses work at each failure, saving often costs time at each save. With a cost C per save and a mean time M between
//! failures the best interval is about sqrt(2 C M) (Young 1974); the higher terms are Daly's (2006, equation 37). Only rank 0 looks at
//! this clock; what it finds rides in the reduction.

use std::time::{Duration, Instant};

use everlit_api::job::CheckpointInterval;

/// Without a word about failures: one in four hours.
const BETWEEN_FAILURES: Duration = Duration::from_secs(4 * 3600);
/// Before the cost of a save is known.
const FIRST: Duration = Duration::from_secs(10);
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3600);

/// The clock of saves by time.
#[derive(Debug)]
pub struct Clock {
    every: Option<CheckpointInterval>,
    between_failures: Duration,
    last: Instant,
    interval: Duration,
}

impl Clock {
    /// Starts now.
    pub fn new(every: Option<CheckpointInterval>, seconds_between_failures: Option<f64>) -> Self {
        let known = seconds_between_failures.filter(|seconds| seconds.is_finite() && *seconds >= 1.0);
        let between_failures = known.map_or(BETWEEN_FAILURES, |seconds| Duration::from_secs_f64(seconds.min(1e9)));
        let interval = match every {
            Some(CheckpointInterval::Time(time)) => Duration::from_millis(time.0),
            _ => FIRST,
        };
        Self { every, between_failures, last: Instant::now(), interval }
    }

    /// Whether a save is due.
    pub fn is_due(&self) -> bool {
        self.every.is_some() && self.last.elapsed() >= self.interval
    }

    /// A save was begun.
    pub fn restart(&mut self) {
        self.last = Instant::now();
    }

    /// A save cost so much.
    pub fn learn(&mut self, cost: Duration) {
        if matches!(self.every, Some(CheckpointInterval::Auto(_))) {
            self.interval = best_interval(cost, self.between_failures).clamp(SHORTEST, LONGEST);
        }
    }

    /// Time between saves, when they go by time.
    pub fn interval(&self) -> Option<Duration> {
        self.every.map(|_| self.interval)
    }
}

/// Daly's optimum.
fn best_interval(cost: Duration, between_failures: Duration) -> Duration {
    let (cost, mean) = (cost.as_secs_f64(), between_failures.as_secs_f64());
    if cost >= 2.0 * mean {
        return between_failures;
    }
    let ratio = cost / (2.0 * mean);
    Duration::from_secs_f64(((2.0 * cost * mean).sqrt() * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - cost).max(0.0))
}

#[cfg(test)]
mod tests {
    use everlit_api::job::Auto;
    use everlit_api::time::Millis;

    use super::*;

    #[test]
    fn the_best_interval_is_young_s_for_cheap_saves() {
        let hour = Duration::from_secs(3600);
        let of = |cost| best_interval(Duration::from_secs_f64(cost), hour).as_secs_f64();
        assert!((of(0.02) - 12.0).abs() < 0.1, "sqrt(2 * 0.02 * 3600) is 12, not {}", of(0.02));
        assert!((of(60.0) - 617.3).abs() < 2.0, "{}", of(60.0));
        assert_eq!(best_interval(hour * 3, hour), hour);
    }

    #[test]
    fn saves_go_by_time_only_when_asked_to() {
        let clock = |every| Clock::new(every, Some(100.0));
        assert_eq!((clock(None).is_due(), clock(None).interval()), (false, None));
        assert!(clock(Some(CheckpointInterval::Time(Millis(0)))).is_due());
        let mut auto = clock(Some(CheckpointInterval::Auto(Auto::Auto)));
        assert_eq!((auto.is_due(), auto.interval()), (false, Some(FIRST)));
        auto.learn(Duration::from_millis(500));
        assert!(auto.interval().unwrap().abs_diff(Duration::from_secs(10)) < Duration::from_secs(1));
        auto.learn(Duration::ZERO);
        assert_eq!(auto.interval(), Some(SHORTEST));
    }
}
