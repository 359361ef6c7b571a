//! Progress of programs that write no heartbeats, read from their output: a job's own patterns, or the usual forms.
//!
//! Only what is new since the last look is searched, at most the last 256 KiB, and of each rank the newest line that has a field wins. A
//! pattern that matches nonsense costs a wrong number in a summary and nothing else; patterns are limited in size when compiled.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use everlit_api::agent::Beat;
use everlit_api::agent::log::{FLAG_DROPPED, Records};
use everlit_api::ids::JobId;
use everlit_api::job::LogMetric;
use regex::{Regex, RegexBuilder};

use super::limits::{METRIC_NAME_MAX, METRICS_BYTES_MAX, METRICS_MAX, PATTERN_BYTES_MAX};
use super::logs::Reader;
use crate::shim::segments::{segment_name, segment_numbers};

/// `step=12`, `Step 12/100`, `step: 12 / 100`.
const STEP: &str = r"(?i)\bstep['\x22]?\s*[=: ]\s*(?P<step>\d+)(?:\s*/\s*(?P<total>\d+))?";
/// `loss=2.31`, `loss: 2.31`, and the Hugging Face Trainer's `{'loss': 2.31, 'epoch': 0.1}`.
const LOSS: &str = r"(?i)\bloss['\x22]?\s*[=: ]\s*(?P<loss>[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)";
/// tqdm: ` 10%|█   | 12/100 [00:01<00:09,  9.9it/s]`.
const TQDM: &str = r"\|\s*(?P<step>\d+)/(?P<total>\d+)\s*\[";

/// A job's compiled patterns.
#[derive(Debug)]
pub(super) struct Patterns(Vec<(Regex, Option<String>)>);

impl Patterns {
    /// The job's, or the defaults when it has none. A pattern that does not compile is left out: the job was checked when it was accepted.
    pub(super) fn new(metrics: &[LogMetric]) -> Self {
        let compile = |pattern: &str, field: Option<&String>| {
            let regex = RegexBuilder::new(pattern).size_limit(PATTERN_BYTES_MAX).dfa_size_limit(PATTERN_BYTES_MAX).build();
            regex.inspect_err(|error| tracing::warn!(%error, "a log pattern is left out")).ok().map(|regex| (regex, field.cloned()))
        };
        if metrics.is_empty() {
            Self([STEP, LOSS, TQDM].iter().filter_map(|pattern| compile(pattern, None)).collect())
        } else {
            Self(metrics.iter().take(METRICS_MAX).filter_map(|metric| compile(&metric.pattern, Some(&metric.field))).collect())
        }
    }

    /// Reads what the lines tell, newest first. `None`: nothing.
    pub(super) fn read(&self, text: &str) -> Option<Beat> {
        let mut beat = Beat::default();
        let mut any = false;
        // A progress bar writes many states into one line.
        for line in text.rsplit(['\n', '\r']) {
            for (regex, field) in &self.0 {
                let Some(found) = regex.captures(line) else { continue };
                let number = |name: &str| found.name(name).and_then(|m| m.as_str().parse::<f64>().ok());
                match field {
                    Some(field) => {
                        let value = found.name("value").or_else(|| found.get(1)).and_then(|m| m.as_str().trim().parse().ok());
                        any |= value.is_some_and(|value| set(&mut beat, field, value));
                    }
                    None => {
                        for (name, field) in [("step", "step"), ("total", "total_steps"), ("loss", "loss")] {
                            any |= number(name).is_some_and(|value| set(&mut beat, field, value));
                        }
                    }
                }
            }
        }
        any.then_some(beat)
    }
}

/// Sets a field that is not set yet.
fn set(beat: &mut Beat, field: &str, value: f64) -> bool {
    if !value.is_finite() {
        return false;
    }
    let count = (value >= 0.0 && value < u64::MAX as f64).then_some(value as u64);
    let first = |slot: &mut Option<u64>| {
        let free = slot.is_none() && count.is_some();
        *slot = slot.or(count);
        free
    };
    match field {
        "step" => first(&mut beat.step),
        "total_steps" => first(&mut beat.total_steps),
        "samples" => first(&mut beat.samples),
        "loss" => {
            let free = beat.loss.is_none();
            beat.loss = beat.loss.or(Some(value));
            free
        }
        name if name.len() <= METRIC_NAME_MAX && !beat.metrics.contains_key(name) => beat.metrics.insert(name.into(), value).is_none(),
        _ => false,
    }
}

/// One job's output and how far it was read.
#[derive(Debug)]
pub(super) struct Scanner {
    patterns: Arc<Patterns>,
    reader: Reader,
}

/// What one rank's output told: its attempt, its rank, and the progress.
pub(super) type Progress = Vec<((u32, u32), Beat)>;

impl Scanner {
    /// Begins a little before now.
    pub(super) fn new(logs: &Path, patterns: Arc<Patterns>) -> Self {
        Self { patterns, reader: Reader::new(logs, 0, 0) }
    }

    /// Reads what is new. Blocks.
    pub(super) fn scan(&mut self, job: JobId) -> Progress {
        self.skip_to_the_last();
        let mut text: BTreeMap<(u32, u32), Vec<u8>> = BTreeMap::new();
        let mut buffer = Vec::new();
        let mut budget = METRICS_BYTES_MAX * 2;
        while let Ok(chunk) = self.reader.read(&mut buffer, false) {
            for record in Records::new(&chunk.bytes, true).filter(|record| record.header.flags & FLAG_DROPPED == 0) {
                text.entry((record.header.attempt, record.header.rank)).or_default().extend_from_slice(record.data);
            }
            budget = budget.saturating_sub(chunk.bytes.len() as u64);
            if chunk.at_end || budget == 0 {
                break;
            }
        }
        let read = text.into_iter().filter_map(|((attempt, rank), text)| {
            let mut beat = self.patterns.read(&String::from_utf8_lossy(&text))?;
            beat.incarnation = Some(everlit_api::ids::Incarnation { job, attempt, rank });
            Some(((attempt, rank), beat))
        });
        read.collect()
    }

    /// Of more than the limit only the end is read.
    fn skip_to_the_last(&mut self) {
        let (segment, offset) = self.reader.place();
        let dir = self.reader.dir().to_path_buf();
        let Some(newest) = segment_numbers(&dir).last().copied() else { return };
        let length = std::fs::metadata(dir.join(segment_name(newest))).map_or(0, |about| about.len());
        let from = length.saturating_sub(METRICS_BYTES_MAX);
        if newest > segment || (newest == segment && from > offset) {
            self.reader = Reader::new(&dir, newest, from.max(if newest == segment { offset } else { 0 }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Option<u64>, Option<u64>, Option<f64>) {
        Patterns::new(&[]).read(text).map_or((None, None, None), |beat| (beat.step, beat.total_steps, beat.loss))
    }

    #[test]
    fn usual_forms_are_read() {
        assert_eq!(read("step=12 loss=2.5\n"), (Some(12), None, Some(2.5)));
        assert_eq!(read("[rank0] Step: 12/100, Loss: 1e-3\n"), (Some(12), Some(100), Some(0.001)));
        assert_eq!(read("{'loss': 2.31, 'grad_norm': 1.2, 'epoch': 0.1}\n"), (None, None, Some(2.31)));
        assert_eq!(read(" 10%|█         | 12/100 [00:01<00:09,  9.9it/s]"), (Some(12), Some(100), None));
        assert_eq!(read("train_loss=3 misstep=4 loss=nan\nnothing here\n"), (None, None, None));
    }

    #[test]
    fn the_newest_line_wins() {
        assert_eq!(read("step=1 loss=3\nstep=2 loss=2\n"), (Some(2), None, Some(2.0)));
        assert_eq!(read("step=1 loss=3\nstep=2\n"), (Some(2), None, Some(3.0)));
        assert_eq!(read("\r| 1/9 [\r| 2/9 ["), (Some(2), Some(9), None));
    }

    #[test]
    fn a_jobs_own_patterns_replace_the_defaults() {
        let metric = |pattern: &str, field: &str| LogMetric { pattern: pattern.into(), field: field.into() };
        let own = [metric(r"it (\d+)", "step"), metric(r"tok/s (?P<value>[\d.]+) of (\d+)", "tokens_per_second"), metric("(", "bad")];
        let beat = Patterns::new(&own).read("it 7 tok/s 12.5 of 9 loss=1\n").unwrap();
        assert_eq!((beat.step, beat.loss, beat.metrics["tokens_per_second"]), (Some(7), None, 12.5));
    }
}
