//! How far a job got: steps, loss, recent speed and a thinned-out time series, all from what its ranks report.
//!
//! `reached` is the highest step ever done by the slowest rank; a step at or below it is a repeated one.

use std::collections::{BTreeMap, VecDeque};

use everlit_api::agent::Beat;
use everlit_api::status::MetricPoint;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::limits::{RATE_SAMPLE_MS, RATE_SAMPLES_MAX, RATE_WINDOW_MS, SERIES_POINTS_MAX};

/// The metric by which a program tells its loss on held-out text.
pub const EVALUATION_LOSS: &str = "evaluation_loss";

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
    /// Newest named numbers.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}

impl Progress {
    /// The leading rank said this; what it does not say did not change.
    pub fn note(&mut self, beat: &Beat) {
        self.loss = beat.loss.or(self.loss);
        self.samples = beat.samples.or(self.samples);
        if !beat.metrics.is_empty() {
            self.metrics.clone_from(&beat.metrics);
        }
    }

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
    /// What was kept before; the resolution stays what it was.
    pub fn restore(points: Vec<MetricPoint>) -> Self {
        let span = points.first().zip(points.last()).map_or(0, |(first, last)| last.time.since_ms(first.time));
        let stride_ms = if points.len() >= SERIES_POINTS_MAX / 2 { span / points.len() as u64 } else { 0 };
        Self { points, stride_ms }
    }

    /// Keeps a point unless the last one is too near. News of the same step are added to its point; a fresh evaluation is never too near.
    pub fn note(&mut self, point: MetricPoint) {
        if let Some(last) = self.points.last_mut().filter(|last| last.attempt == point.attempt) {
            if last.step == point.step {
                last.loss = point.loss.or(last.loss);
                last.samples = point.samples.or(last.samples);
                last.metrics.extend(point.metrics);
                return;
            }
            let measured = |point: &MetricPoint| point.metrics.get(EVALUATION_LOSS).copied();
            let news = measured(&point).is_some() && measured(&point) != measured(last);
            if point.time.since_ms(last.time) < self.stride_ms && !news {
                return;
            }
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

    fn point(ms: u64, step: u64, metrics: &[(&str, f64)]) -> MetricPoint {
        let metrics = metrics.iter().map(|(name, value)| ((*name).to_string(), *value)).collect();
        MetricPoint { time: Timestamp(ms), attempt: 1, step, samples: Some(step * 8), loss: Some(1.0), metrics }
    }

    #[test]
    fn an_evaluation_is_kept_however_near_and_news_of_a_step_stay_with_it() {
        let mut series = Series { points: Vec::new(), stride_ms: 1_000 };
        series.note(point(0, 1, &[("lr", 0.1)]));
        series.note(point(10, 2, &[("lr", 0.1)]));
        series.note(point(20, 3, &[("lr", 0.1), (EVALUATION_LOSS, 2.0)]));
        series.note(point(30, 4, &[("lr", 0.1), (EVALUATION_LOSS, 2.0)]));
        series.note(point(1_030, 5, &[("lr", 0.1)]));
        series.note(point(1_040, 5, &[(EVALUATION_LOSS, 1.5)]));
        let kept: Vec<_> = series.points().iter().map(|p| (p.step, p.metrics.get(EVALUATION_LOSS).copied(), p.metrics.len())).collect();
        assert_eq!(kept, [(1, None, 1), (3, Some(2.0), 2), (5, Some(1.5), 2)]);
    }

    #[test]
    fn a_restored_series_keeps_its_resolution() {
        let mut series = Series::default();
        (0..5_000).for_each(|step| series.note(point(step * 100, step, &[])));
        let mut restored = Series::restore(series.points().to_vec());
        let before = restored.points().len();
        (5_000..5_100).for_each(|step| restored.note(point(step * 100, step, &[])));
        let added = restored.points().len() - before;
        assert!((1..=100 * before / 5_000 + 1).contains(&added), "{before} and {added}");
    }

    #[test]
    fn a_series_stays_bounded_and_keeps_its_ends() {
        let mut series = Series::default();
        for step in 0..100_000 {
            series.note(point(step * 10, step, &[]));
        }
        assert!(series.points().len() <= SERIES_POINTS_MAX);
        assert!(series.points().len() > SERIES_POINTS_MAX / 4);
        assert_eq!(series.points()[0].step, 0);
        assert!(series.points().last().expect("some").step > 95_000);
    }

    #[test]
    fn samples_of_the_rate_are_apart_bounded_and_from_the_window() {
        let mut rates = Rates::default();
        rates.note(Timestamp(0), 0, None);
        rates.note(Timestamp(RATE_SAMPLE_MS - 1), 1, None);
        assert_eq!(rates.samples.len(), 1, "too near");
        rates.note(Timestamp(RATE_SAMPLE_MS), 2, None);
        assert_eq!(rates.samples.len(), 2);
        // The last moment of the window, and the first after it.
        rates.note(Timestamp(RATE_WINDOW_MS), 3, None);
        assert_eq!(rates.samples.len(), 3);
        assert!(rates.per_second(Timestamp(2 * RATE_WINDOW_MS)).0.is_some());
        assert_eq!(rates.per_second(Timestamp(2 * RATE_WINDOW_MS + 1)).0, None);
        rates.note(Timestamp(RATE_WINDOW_MS + 1 + RATE_SAMPLE_MS), 4, None);
        assert_eq!(rates.samples.front().map(|(_, step, _)| *step), Some(3));
        rates.clear();
        assert_eq!(rates.per_second(Timestamp(2 * RATE_WINDOW_MS)), (None, None));
        (0..100).for_each(|n| rates.note(Timestamp(n * RATE_SAMPLE_MS), n, None));
        assert!(rates.samples.len() <= RATE_SAMPLES_MAX);
        assert!(rates.samples.len() + 1 >= RATE_SAMPLES_MAX.min((RATE_WINDOW_MS / RATE_SAMPLE_MS) as usize));
    }

    #[test]
    fn points_are_as_far_apart_as_the_series_says_and_farther_each_time_it_is_full() {
        let mut series = Series { points: Vec::new(), stride_ms: 1_000 };
        [0, 999, 1_000].into_iter().for_each(|ms| series.note(point(ms, ms, &[])));
        assert_eq!(series.points().iter().map(|point| point.step).collect::<Vec<_>>(), [0, 1_000]);
        let full = |stride_ms| {
            let mut series =
                Series { points: (0..SERIES_POINTS_MAX as u64).map(|step| point(step * 2_000, step, &[])).collect(), stride_ms };
            series.note(point(10_000_000, 10_000_000, &[]));
            series.stride_ms
        };
        assert_eq!([full(0), full(1_000), full(2_000)], [500, 2_000, 4_000]);
    }
}
