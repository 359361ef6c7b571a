//! How far a job got: steps, loss, recent speed and a thinned-out time series, all from what its ranks report.
//!
//! `reached` is the highest step ever done by the slowest rank; a step at or below it is a repeated one.

use std::collections::VecDeque;

use everlit_api::status::MetricPoint;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::limits::{RATE_SAMPLE_MS, RATE_SAMPLES_MAX, RATE_WINDOW_MS, SERIES_POINTS_MAX};

/// The durable part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Step of the slowest rank in the current attempt.
    pub step: Option<u64>,
    /// Highest step ever.
    pub reached: u64,
    /// Steps to do.
    pub total_steps: Option<u64>,
    /// Samples consumed.
    pub samples: Option<u64>,
    /// Training loss of the last step.
    pub loss: Option<f64>,
    /// Steps executed again.
    pub lost_steps: u64,
    /// When the last new step was seen.
    pub last_step_at: Option<Timestamp>,
}

impl Progress {
    /// The slowest rank has done `step`; the attempt began at `from` and had to repeat up to `floor`. True when it is news.
    pub fn advance(&mut self, now: Timestamp, step: u64, from: u64, floor: u64) -> bool {
        let before = self.step.unwrap_or(from);
        if self.step.is_some() && step <= before {
            return false;
        }
        self.lost_steps += step.min(floor).saturating_sub(before.min(floor));
        self.step = Some(step);
        self.reached = self.reached.max(step);
        self.last_step_at = Some(now);
        true
    }
}

/// Speed over the last ten seconds or so.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    samples: VecDeque<(Timestamp, u64, Option<u64>)>,
}

impl Rates {
    /// A new attempt begins: its speed is its own.
    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// At `now` the job had done `step` steps and `samples` samples.
    pub fn note(&mut self, now: Timestamp, step: u64, samples: Option<u64>) {
        if self.samples.back().is_some_and(|(at, ..)| now.since_ms(*at) < RATE_SAMPLE_MS) {
            return;
        }
        self.samples.push_back((now, step, samples));
        while self.samples.len() > RATE_SAMPLES_MAX || self.samples.front().is_some_and(|(at, ..)| now.since_ms(*at) > RATE_WINDOW_MS) {
            self.samples.pop_front();
        }
    }

    /// Steps and samples per second; `None` with less than two samples, or when the last is too old.
    pub fn per_second(&self, now: Timestamp) -> (Option<f64>, Option<f64>) {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return (None, None) };
        let span = last.0.since_ms(first.0);
        if span == 0 || now.since_ms(last.0) > RATE_WINDOW_MS {
            return (None, None);
        }
        let rate = |from: u64, to: u64| (to.saturating_sub(from)) as f64 * 1_000.0 / span as f64;
        (Some(rate(first.1, last.1)), first.2.zip(last.2).map(|(from, to)| rate(from, to)))
    }
}

/// Loss and other numbers over steps, at most [`SERIES_POINTS_MAX`] points.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Series {
    points: Vec<MetricPoint>,
    stride_ms: u64,
}

impl Series {
    /// Keeps a point unless the last one is too near.
    pub fn note(&mut self, point: MetricPoint) {
        let near = |last: &MetricPoint| {
            last.attempt == point.attempt && (point.time.since_ms(last.time) < self.stride_ms || last.step == point.step)
        };
        if self.points.last().is_some_and(near) {
            return;
        }
        if self.points.len() >= SERIES_POINTS_MAX {
            let mut keep = false;
            self.points.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride_ms = (self.stride_ms * 2).max(500);
        }
        self.points.push(point);
    }

    /// Oldest first.
    pub fn points(&self) -> &[MetricPoint] {
        &self.points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_steps_are_counted_when_they_are_executed() {
        let mut progress = Progress::default();
        assert!(progress.advance(Timestamp(1), 10, 0, 0));
        assert!(!progress.advance(Timestamp(2), 10, 0, 0));
        assert_eq!((progress.reached, progress.lost_steps), (10, 0));
        // A restart from step 6: 7, 8, 9, 10 are done again, 11 and 12 are new.
        progress.step = None;
        assert!(progress.advance(Timestamp(3), 8, 6, 10));
        assert_eq!(progress.lost_steps, 2);
        assert!(progress.advance(Timestamp(4), 12, 6, 10));
        assert_eq!((progress.reached, progress.lost_steps), (12, 4));
    }

    #[test]
    fn the_rate_is_over_a_window_and_goes_stale() {
        let mut rates = Rates::default();
        for second in 0..30 {
            rates.note(Timestamp(second * 1_000), second * 5, Some(second * 40));
        }
        assert_eq!(rates.per_second(Timestamp(29_500)), (Some(5.0), Some(40.0)));
        assert_eq!(rates.per_second(Timestamp(60_000)), (None, None));
    }

    #[test]
    fn a_series_stays_bounded_and_keeps_its_ends() {
        let mut series = Series::default();
        for step in 0..100_000 {
            series.note(MetricPoint { time: Timestamp(step * 10), attempt: 1, step, loss: None, metrics: Default::default() });
        }
        assert!(series.points().len() <= SERIES_POINTS_MAX);
        assert!(series.points().len() > SERIES_POINTS_MAX / 4);
        assert_eq!(series.points()[0].step, 0);
        assert!(series.points().last().expect("some").step > 95_000);
    }
}
