//! Why an attempt ended as it did: put together from its history, the events, and what its ranks wrote last.
//!
//! Nothing is kept for it twice: events are durable and hold the evidence (exits, stacks, what the nodes were doing), logs are on the nodes, or in
//! the job's store. Lines are there as long as one of these can be read; else the answer says so and has the rest. Which node that was nobody
//! needs to know: only that one has lines of this rank and attempt.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use futures_util::StreamExt;
use tokio::time::timeout;

use super::Shared;
use super::answer::Refusal;
use super::extract::{Attempt, Params};
use crate::agent::log::FLAG_DROPPED;
use crate::control::{EventQuery, LogItem, LogQuery};
use crate::ids::JobId;
use crate::problem::{Code, Problem};
use crate::rank::Cause;
use crate::status::{EventView, FailureView, Postmortem, RankWords};

/// Last lines of each rank.
const LINES: u64 = 200;
/// Ranks whose lines are in an answer, those that failed first.
const RANKS_MAX: usize = 32;
/// Bytes of one line.
const LINE_BYTES_MAX: usize = 2_000;
/// Pages of events that are looked through.
const PAGES_MAX: usize = 2_000;
const PAGE: u32 = 500;
/// Who does not answer is not waited for: longer than a log of several nodes waits for one of them.
const LOG_PATIENCE: Duration = Duration::from_secs(12);
/// Ranks whose lines are looked for at once.
const RANKS_AT_ONCE: usize = 8;

/// Why an attempt ended, or what it has been through so far.
///
/// Failures in the order in which they were seen (an attempt that recovered in place has several), each with its cause, exit, stacks of
/// ranks that hung, load of the nodes, and what was decided; the rank that failed first by the kernel's order; the last 200 lines of up
/// to 32 ranks.
#[utoipa::path(get, path = "/jobs/{id}/attempts/{n}/postmortem", tag = "jobs", operation_id = "get_postmortem", params(
        ("id" = String, Path, description = "Job id"),
        ("n" = u32, Path, description = "Attempt, from 1"),
    ), responses((status = 200, description = "The post-mortem", body = Postmortem)))]
pub(super) async fn one(State(control): State<Shared>, Attempt(id, n): Attempt, params: Params) -> Result<Json<Postmortem>, Refusal> {
    params.finish()?;
    Ok(Json(postmortem(&control, id, n).await?))
}

/// The same for who puts it elsewhere.
pub async fn postmortem(control: &Shared, id: JobId, n: u32) -> Result<Postmortem, Problem> {
    let attempts = control.attempts(id).await?;
    let Some(view) = attempts.into_iter().find(|view| view.attempt == n) else {
        return Err(Problem::new(Code::NotFound, format!("job {id} has no attempt {n}")));
    };
    let summary = control.summary(id).await?;
    let (failures, decision) = story(all_events(control, id).await?, n);
    let mut order: Vec<u32> = failures.iter().filter_map(|failure| failure.rank).chain(view.first_failed_rank).collect();
    order.extend(0..summary.world_size.min(RANKS_MAX as u32));
    let mut seen = std::collections::BTreeSet::new();
    order.retain(|rank| seen.insert(*rank));
    order.truncate(RANKS_MAX);
    let (ranks, missing) = words(control, id, n, order).await;
    Ok(Postmortem {
        job_id: id,
        attempt: n,
        started_at: view.started_at,
        ended_at: view.ended_at,
        resumed_from_step: view.resumed_from_step,
        reached_step: view.reached_step,
        cause: view.cause,
        first_failed_rank: view.first_failed_rank,
        reason: view.reason,
        decision,
        failures,
        ranks,
        lines_missing: missing,
    })
}

async fn all_events(control: &Shared, id: JobId) -> Result<Vec<EventView>, Problem> {
    let mut all = Vec::new();
    let mut after = None;
    for _ in 0..PAGES_MAX {
        let page = control.events(EventQuery { job: Some(id), after, user: None }, PAGE).await?;
        after = page.data.last().and_then(|event| event.id.parse().ok());
        // What a long job has most of.
        all.extend(page.data.into_iter().filter(|event| event.event != "checkpoint_committed"));
        if !page.has_more || after.is_none() {
            break;
        }
    }
    Ok(all)
}

/// Failures of the attempt, and what was decided at its end.
fn story(events: Vec<EventView>, attempt: u32) -> (Vec<FailureView>, Option<String>) {
    let number = |event: &EventView, name: &str| event.data[name].as_u64().and_then(|number| u32::try_from(number).ok());
    let mut failures: Vec<FailureView> = Vec::new();
    // Apart: what is said of the last failure is not said of them.
    let mut gpu_errors = Vec::new();
    let mut decision = None;
    for mut event in events {
        let of = number(&event, "attempt");
        match event.event.as_str() {
            "gang_failed" | "rank_replaced" | "rank_failed" if of == Some(attempt) => {
                let why_not = event.data["not_in_place"].as_str().map(|why| format!("the gang is restarted, not in place: {why}"));
                let decided = match event.event.as_str() {
                    "rank_replaced" => Some("its place was given to another process, and the others went on".to_string()),
                    "rank_failed" => Some("only this rank was started again".to_string()),
                    _ => why_not,
                };
                let take = |event: &mut EventView, name: &str| event.data[name].take();
                failures.push(FailureView {
                    time: event.time,
                    rank: number(&event, "rank"),
                    cause: serde_json::from_value(take(&mut event, "cause")).ok(),
                    exit: serde_json::from_value(take(&mut event, "exit")).ok(),
                    stacks: serde_json::from_value(take(&mut event, "stacks")).unwrap_or_default(),
                    nodes: serde_json::from_value(take(&mut event, "nodes")).unwrap_or_else(|_| BTreeMap::new()),
                    decision: decided,
                    recovered_ms: None,
                    reason: event.reason,
                });
            }
            "gpu_error" if of == Some(attempt) => gpu_errors.push(FailureView {
                time: event.time,
                rank: number(&event, "rank"),
                cause: Some(Cause::Gpu),
                reason: event.reason,
                exit: None,
                stacks: Vec::new(),
                nodes: BTreeMap::new(),
                decision: None,
                recovered_ms: None,
            }),
            "recovered_in_place" if of == Some(attempt) => {
                if let Some(last) = failures.last_mut() {
                    last.recovered_ms = event.data["took_ms"].as_u64();
                }
            }
            "log_policy_matched" if of == Some(attempt) => {
                if let Some(last) = failures.last_mut() {
                    last.decision = Some(event.reason);
                }
            }
            "restart_scheduled" if of == attempt.checked_add(1) => decision = Some(event.reason),
            "job_final" if decision.is_none() => decision = Some(format!("the job ended: {}", event.reason)),
            _ => {}
        }
    }
    failures.extend(gpu_errors);
    failures.sort_by_key(|failure| failure.time);
    (failures, decision)
}

/// What the ranks wrote last, and why it is not all.
async fn words(control: &Shared, id: JobId, attempt: u32, order: Vec<u32>) -> (Vec<RankWords>, Option<String>) {
    let asked = order.into_iter().map(|rank| async move { (rank, last_lines(control, id, attempt, rank).await) });
    let mut answers = futures_util::stream::iter(asked).buffered(RANKS_AT_ONCE);
    let (mut ranks, mut missing) = (Vec::new(), None);
    while let Some((rank, answer)) = answers.next().await {
        match answer {
            Ok((lines, why)) => {
                // With lines its node is there, and it does not matter which is not.
                missing = missing.or(why.filter(|_| lines.is_empty()));
                ranks.push(RankWords { rank, lines });
            }
            Err(why) => {
                // No node is there: nothing of the others either.
                missing = Some(why);
                break;
            }
        }
    }
    ranks.sort_by_key(|words| words.rank);
    (ranks, missing)
}

/// The last lines of a rank, and whose part of the log is missing; or why there is nothing to be had.
async fn last_lines(control: &Shared, id: JobId, attempt: u32, rank: u32) -> Result<(Vec<String>, Option<String>), String> {
    let query = LogQuery { rank: Some(rank), attempt: Some(attempt), tail: Some(LINES), ..LogQuery::default() };
    let mut from = control.logs(id, query).await.map_err(|problem| problem.detail)?;
    let (mut text, mut missing) = (Vec::new(), None);
    loop {
        match timeout(LOG_PATIENCE, from.recv()).await {
            Err(_) => return Err("the node that has the log does not answer".into()),
            Ok(None | Some(LogItem::End(_) | LogItem::CaughtUp)) => break,
            Ok(Some(LogItem::Failed(problem))) => return Err(problem.detail),
            Ok(Some(LogItem::Record { header, data, .. })) if header.flags & FLAG_DROPPED == 0 => text.extend_from_slice(&data),
            Ok(Some(LogItem::Missing { node, reason })) => {
                missing = Some(format!("the part of the log on node {node} is missing: {reason}"))
            }
            Ok(Some(LogItem::Record { .. } | LogItem::Gap { .. } | LogItem::Passed { .. })) => {}
        }
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES as usize);
    let lines = lines[from..].iter().map(|line| line[..line.floor_char_boundary(LINE_BYTES_MAX)].to_string()).collect();
    Ok((lines, missing))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use serde_json::json;

    use super::*;
    use crate::time::Timestamp;

    fn event(name: &str, reason: &str, data: serde_json::Value) -> EventView {
        EventView { id: "1".into(), job_id: None, time: Timestamp(1), event: name.into(), reason: reason.into(), data }
    }

    #[test]
    fn an_attempt_s_story_is_told_and_no_other_s() {
        let stacks = json!([{"rank": 1, "pid": 7, "text": "thread 7 main: is stopped by a signal\n"}]);
        let events = vec![
            event("gang_failed", "an older one", json!({"attempt": 1, "cause": "exit", "rank": 3})),
            event("restart_scheduled", "attempt 2 in 500 ms: restart 1 of 50", json!({"attempt": 2})),
            event("rank_replaced", "rank 1 is stuck", json!({"attempt": 2, "cause": "stuck", "rank": 1, "stacks": stacks})),
            event("recovered_in_place", "all step again", json!({"attempt": 2, "took_ms": 640})),
            event(
                "gang_failed",
                "rank 0 died",
                json!({"attempt": 2, "cause": "signal", "rank": 0, "not_in_place": "rank 1 is gone too",
                "exit": {"signal": 9, "at": "2026-01-01T00:00:00Z"}}),
            ),
            event("log_policy_matched", "an older one", json!({"attempt": 1})),
            event("gpu_error", "an older one", json!({"attempt": 1, "xid": 48})),
            event("gpu_error", "GPU 0 of n1 fell off the bus", json!({"attempt": 2, "rank": 0, "xid": 79})),
            event(
                "log_policy_matched",
                "rank 0 wrote \"ECC\" (log policy `ECC`, cancel_retries: it is not tried again)",
                json!({"attempt": 2}),
            ),
            event("job_final", "rank 0 died; all 1 restarts are used", json!({"state": "failed"})),
        ];
        let (failures, decision) = story(events, 2);
        let told: Vec<String> = failures
            .iter()
            .map(|f| {
                let exit = f.exit.as_ref().map(crate::rank::RankExit::describe);
                format!(
                    "{:?} {:?} {} {exit:?} {} stacks, {:?}, {:?}\n",
                    f.rank,
                    f.cause,
                    f.reason,
                    f.stacks.len(),
                    f.decision,
                    f.recovered_ms
                )
            })
            .collect();
        expect![[r#"
            Some(1) Some(Stuck) rank 1 is stuck None 1 stacks, Some("its place was given to another process, and the others went on"), Some(640)
            Some(0) Some(Signal) rank 0 died Some("signal 9 (SIGKILL)") 0 stacks, Some("rank 0 wrote \"ECC\" (log policy `ECC`, cancel_retries: it is not tried again)"), None
            Some(0) Some(Gpu) GPU 0 of n1 fell off the bus None 0 stacks, None, None
        "#]]
        .assert_eq(&told.concat());
        assert_eq!(decision.as_deref(), Some("the job ended: rank 0 died; all 1 restarts are used"));
    }
}
