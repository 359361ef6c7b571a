//! What a real job says of costs: its ledger over its steps, saves and restarts, and its events and its series where the ledger has one figure
//! for several. Averages, so a job with more restarts tells more. What repairs cost, no job knows.

use everlit_api::client::Client;
use everlit_api::status::{AttemptView, EventView, MetricPoint, Summary};
use everlit_api::time::Timestamp;

use crate::cli::{Fail, find};
use crate::simulate::scenario::Costs;

/// Pages of events that are read at most.
const PAGES_MAX: usize = 200;

/// Costs of a job, and what was measured.
#[derive(Debug)]
pub(super) struct Measured {
    /// Defaults where nothing could be measured.
    pub costs: Costs,
    /// One line for each cost.
    pub lines: Vec<String>,
}

/// Asks the coordinator.
pub(super) async fn measure(client: &Client, job: &str) -> Result<Measured, Fail> {
    let id = find::job(client, job).await?;
    let summary = client.summary(id).await?;
    let attempts = client.attempts(id).await?.data;
    let mut seen = Seen::default();
    let mut after: Option<String> = None;
    for _ in 0..PAGES_MAX {
        let page = client.events(id, 500, after.as_deref()).await?;
        page.data.iter().for_each(|event| seen.note(event));
        after = page.last_id;
        if !page.has_more || after.is_none() {
            break;
        }
    }
    seen.writes = writes(&client.metrics(id, 0).await?.data);
    costs_of(&summary, &attempts, &seen).map_err(Fail::Refused)
}

/// What events and series tell beyond the ledger.
#[derive(Debug, Default)]
struct Seen {
    /// Commits.
    saves: u64,
    /// When the gang that is being stopped was seen to have failed.
    failed_at: Option<Timestamp>,
    /// From such a failure to the end of the last rank.
    stops: Vec<f64>,
    /// Recoveries in place, until all ranks stepped.
    in_place: Vec<f64>,
    /// Writes of checkpoints behind the steps.
    writes: Vec<f64>,
}

impl Seen {
    fn note(&mut self, event: &EventView) {
        match event.event.as_str() {
            "checkpoint_committed" => self.saves += 1,
            "gang_failed" => self.failed_at = Some(event.time),
            "restart_scheduled" => {
                self.stops.extend(self.failed_at.take().map(|at| event.time.since_ms(at) as f64 / 1_000.0));
            }
            "recovered_in_place" => self.in_place.extend(event.data["took_ms"].as_f64().map(|took| took / 1_000.0)),
            _ => {}
        }
    }
}

/// The series repeats the last write until there is another.
fn writes(points: &[MetricPoint]) -> Vec<f64> {
    let mut writes: Vec<f64> = points.iter().filter_map(|point| point.metrics.get("save_write_seconds").copied()).collect();
    writes.dedup();
    writes
}

fn mean(seconds: &[f64]) -> Option<f64> {
    (!seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64)
}

fn costs_of(summary: &Summary, attempts: &[AttemptView], seen: &Seen) -> Result<Measured, String> {
    let ledger = &summary.ledger;
    let begun_at = attempts.first().and_then(|attempt| attempt.resumed_from_step).unwrap_or(0);
    // A job that restarts right now is at no step, or at one that it did before.
    let reached = attempts.iter().filter_map(|attempt| attempt.reached_step).chain(summary.step).max();
    let steps = reached.unwrap_or(0).saturating_sub(begun_at);
    let saves = seen.saves;
    if steps == 0 || ledger.training <= 0.0 {
        return Err(format!("job {} has done no steps that could be measured", summary.job_id));
    }
    let mut measured = Measured { costs: Costs::default(), lines: Vec::new() };
    let step = ledger.training / steps as f64;
    measured.costs.step_ms = ms(step).max(1);
    measured.lines.push(format!("step {step:.3} s ({steps} steps in {:.1} s)", ledger.training));
    if saves > 0 {
        let stall = ledger.checkpointing / saves as f64;
        measured.costs.save_stall_ms = ms(stall);
        measured.lines.push(format!("save stall {stall:.3} s ({saves} saves in {:.1} s)", ledger.checkpointing));
    } else {
        measured.lines.push("save stall not measured: the job has not saved yet".into());
    }
    if let Some(write) = mean(&seen.writes) {
        measured.costs.save_ms = ms(write);
        measured.lines.push(format!("save {write:.3} s behind the steps (mean of {})", seen.writes.len()));
    }
    measured.restarts(summary, seen);
    Ok(measured)
}

impl Measured {
    /// The ledger has one figure for all restarts, with stop, start and load in it. A restart without a new attempt was one in place.
    fn restarts(&mut self, summary: &Summary, seen: &Seen) {
        let (ledger, all) = (&summary.ledger, summary.restarts);
        let of_gang = summary.attempt.saturating_sub(1).min(all);
        let in_place: f64 = seen.in_place.iter().sum();
        if let Some(each) = mean(&seen.in_place) {
            self.costs.in_place_ms = ms(each);
            self.lines.push(format!("recovery in place {each:.3} s ({} of {all} restarts)", seen.in_place.len()));
        }
        if of_gang > 0 {
            // The wait before a restart begins at the failure, and the stop is a part of it.
            let stop = mean(&seen.stops).unwrap_or(0.0);
            let start = ((ledger.restoring - in_place).max(0.0) / f64::from(of_gang) - stop).max(0.0);
            (self.costs.start_ms, self.costs.stop_ms) = (ms(start), ms(stop));
            (self.costs.load_ms, self.costs.load_snapshot_ms) = (0, 0);
            self.lines.push(format!("stop of the gang {stop:.3} s, start {start:.3} s, load included ({of_gang} of {all} restarts)"));
        } else {
            self.costs.start_ms = ms(ledger.starting);
            self.lines.push(format!("start {:.3} s; restarts of the gang not measured: there was none", ledger.starting));
        }
        if all > 0 {
            let unseen = ledger.undetected / f64::from(all);
            self.costs.seen_exit_ms = ms(unseen);
            self.lines.push(format!("failures seen after {unseen:.3} s"));
        }
    }
}

fn ms(seconds: f64) -> u64 {
    (seconds * 1_000.0).round() as u64
}

#[cfg(test)]
mod tests {
    use everlit_api::ids::JobId;
    use serde_json::json;

    use super::*;

    fn summary(attempt: u32, restarts: u32, step: u64) -> Summary {
        let text = json!({
            "job_id": JobId::from_u128(7), "name": null, "kind": "train", "state": "running", "world_size": 2, "step": step,
            "total_steps": 1000, "progress": null, "steps_per_second": null, "samples_per_second": null, "loss": null,
            "eta_seconds": null, "attempt": attempt, "generation": 0, "restarts": restarts, "lost_steps": 0, "goodput": null,
            "ledger": {"training": 90.0, "starting": 3.0, "restoring": 8.0, "checkpointing": 1.5, "undetected": 0.4},
            "last_checkpoint": null, "ranks": [], "spares": [], "submitted_at": "2026-01-01T00:00:00Z",
            "started_at": null, "finished_at": null, "reason": null
        });
        serde_json::from_value(text).expect("a summary")
    }

    fn event(name: &str, ms: u64, data: serde_json::Value) -> EventView {
        let time = Timestamp(1_767_225_600_000 + ms);
        EventView { id: "1".into(), job_id: None, time, event: name.into(), reason: String::new(), data }
    }

    fn seen(events: &[EventView]) -> Seen {
        let mut seen = Seen::default();
        events.iter().for_each(|event| seen.note(event));
        seen
    }

    #[test]
    fn costs_are_the_ledger_over_what_happened() {
        let mut seen = seen(&[event("gang_failed", 0, json!({})), event("restart_scheduled", 500, json!({}))]);
        (seen.saves, seen.writes) = (3, vec![0.25, 0.75]);
        let measured = costs_of(&summary(5, 4, 450), &[], &seen).expect("measured");
        let costs = measured.costs;
        assert_eq!((costs.step_ms, costs.save_stall_ms, costs.save_ms, costs.start_ms, costs.stop_ms), (200, 500, 500, 1_500, 500));
        assert_eq!((costs.seen_exit_ms, costs.load_ms, costs.load_snapshot_ms), (100, 0, 0));
        assert!(measured.lines.iter().any(|line| line.contains("4 of 4 restarts")), "{:?}", measured.lines);
    }

    #[test]
    fn recoveries_in_place_are_told_apart_from_restarts_of_the_gang() {
        let took = |ms: u64| event("recovered_in_place", 0, json!({"took_ms": ms}));
        let costs = costs_of(&summary(1, 4, 450), &[], &seen(&[took(1_500), took(2_500)])).expect("measured").costs;
        assert_eq!((costs.in_place_ms, costs.start_ms, costs.load_ms), (2_000, 3_000, Costs::default().load_ms));
        let costs = costs_of(&summary(3, 4, 450), &[], &seen(&[took(1_500), took(2_500)])).expect("measured").costs;
        assert_eq!((costs.in_place_ms, costs.start_ms), (2_000, 2_000), "8 s of restoring, 4 of them in place, two starts");
    }

    #[test]
    fn a_job_that_restarts_right_now_is_measured_by_what_it_reached() {
        let mut restarting = summary(2, 1, 0);
        restarting.step = None;
        let attempt = json!({"attempt": 1, "started_at": "2026-01-01T00:00:00Z", "ended_at": null, "resumed_from_step": 50,
            "reached_step": 500, "cause": null, "first_failed_rank": null, "reason": null, "backoff_ms": null});
        let attempts = [serde_json::from_value(attempt).expect("an attempt")];
        assert_eq!(costs_of(&restarting, &attempts, &Seen::default()).expect("measured").costs.step_ms, 200);
    }

    #[test]
    fn what_was_not_seen_keeps_its_default_and_is_told() {
        let measured = costs_of(&summary(1, 0, 450), &[], &Seen::default()).expect("measured");
        assert_eq!(measured.costs.save_stall_ms, Costs::default().save_stall_ms);
        assert_eq!((measured.costs.start_ms, measured.costs.load_ms), (3_000, Costs::default().load_ms));
        assert_eq!(measured.lines.iter().filter(|line| line.contains("not measured")).count(), 2);
        assert!(costs_of(&summary(1, 0, 0), &[], &Seen::default()).expect_err("no step").contains("no steps"));
    }
}
