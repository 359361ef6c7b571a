//! What a real job says of costs: its ledger over its steps, saves and restarts. Averages, so a job with more restarts tells more.
//!
//! Only what the ledger holds can be measured. How long a save takes behind the steps, and what repairs cost, are in no ledger.

use everlit_api::client::Client;
use everlit_api::status::{AttemptView, Summary};

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
    let mut saves = 0;
    let mut after: Option<String> = None;
    for _ in 0..PAGES_MAX {
        let page = client.events(id, 500, after.as_deref()).await?;
        saves += page.data.iter().filter(|event| event.event == "checkpoint_committed").count();
        after = page.last_id;
        if !page.has_more || after.is_none() {
            break;
        }
    }
    costs_of(&summary, attempts.first(), saves as u64).map_err(Fail::Refused)
}

fn costs_of(summary: &Summary, first: Option<&AttemptView>, saves: u64) -> Result<Measured, String> {
    let ledger = &summary.ledger;
    let begun_at = first.and_then(|attempt| attempt.resumed_from_step).unwrap_or(0);
    let steps = summary.step.unwrap_or(0).saturating_sub(begun_at);
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
    measured.restarts(summary);
    Ok(measured)
}

impl Measured {
    /// The ledger has one figure for all restarts, with stop, start and load in it. A restart without a new attempt was one in place.
    fn restarts(&mut self, summary: &Summary) {
        let (ledger, all) = (&summary.ledger, summary.restarts);
        let of_gang = summary.attempt.saturating_sub(1).min(all);
        if all > 0 {
            let each = ledger.restoring / f64::from(all);
            let unseen = ledger.undetected / f64::from(all);
            self.costs.seen_exit_ms = ms(unseen);
            if of_gang < all {
                self.costs.in_place_ms = ms(each);
                self.lines.push(format!("recovery in place {each:.3} s ({} of {all} restarts)", all - of_gang));
            }
            if of_gang > 0 {
                self.costs.start_ms = ms(each);
                (self.costs.stop_ms, self.costs.load_ms, self.costs.load_snapshot_ms) = (0, 0, 0);
                self.lines.push(format!("restart of the gang {each:.3} s, stop and load included ({of_gang} of {all} restarts)"));
            }
            self.lines.push(format!("failures seen after {unseen:.3} s"));
        }
        if of_gang == 0 {
            self.costs.start_ms = ms(ledger.starting);
            self.lines.push(format!("start {:.3} s; restarts of the gang not measured: there was none", ledger.starting));
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

    #[test]
    fn costs_are_the_ledger_over_what_happened() {
        let measured = costs_of(&summary(5, 4, 450), None, 3).expect("measured");
        let costs = measured.costs;
        assert_eq!((costs.step_ms, costs.save_stall_ms, costs.start_ms, costs.stop_ms), (200, 500, 2_000, 0));
        assert_eq!((costs.seen_exit_ms, costs.load_ms, costs.load_snapshot_ms), (100, 0, 0));
        assert!(measured.lines.iter().any(|line| line.contains("4 of 4 restarts")), "{:?}", measured.lines);
    }

    #[test]
    fn a_restart_without_an_attempt_was_in_place() {
        let costs = costs_of(&summary(1, 4, 450), None, 3).expect("measured").costs;
        assert_eq!((costs.in_place_ms, costs.start_ms, costs.load_ms), (2_000, 3_000, Costs::default().load_ms));
    }

    #[test]
    fn what_was_not_seen_keeps_its_default_and_is_told() {
        let measured = costs_of(&summary(1, 0, 450), None, 0).expect("measured");
        assert_eq!(measured.costs.save_stall_ms, Costs::default().save_stall_ms);
        assert_eq!((measured.costs.start_ms, measured.costs.load_ms), (3_000, Costs::default().load_ms));
        assert_eq!(measured.lines.iter().filter(|line| line.contains("not measured")).count(), 2);
        assert!(costs_of(&summary(1, 0, 0), None, 0).expect_err("no step").contains("no steps"));
    }
}
