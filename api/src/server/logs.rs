//! A job's log: raw bytes, or one event per line.
//!
//! A raw answer that can not be finished is cut off, so that the client sees an error and not a silent end.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc;

use super::Shared;
use super::answer::Refusal;
use super::extract::{Job, Params};
use super::sse;
use crate::agent::log::{FLAG_DROPPED, LogPlace};
use crate::control::{LogItem, LogQuery};
use crate::problem::Problem;

const FLUSH_TIME: Duration = Duration::from_millis(20);
/// Lines of a tail at most: they are held back until the end of the log is reached.
const TAIL_MAX: u64 = 100_000;

fn selection(params: &mut Params) -> LogQuery {
    let tail = params.parsed::<u64>("tail", "must be a number of lines");
    if tail.is_some_and(|lines| lines > TAIL_MAX) {
        params.fault("tail", &format!("must be at most {TAIL_MAX}"));
    }
    LogQuery {
        rank: params.parsed("rank", "must be a rank, counted from 0"),
        attempt: params.parsed("attempt", "must be an attempt, counted from 1"),
        tail,
        after: None,
        follow: false,
    }
}

/// The log as plain text, all ranks in the order in which they wrote; of several nodes merged by time. A line of its own names a node whose part is missing.
#[utoipa::path(get, path = "/jobs/{id}/logs", tag = "logs", operation_id = "get_logs", params(
        ("id" = String, Path, description = "Job id"),
        ("rank" = Option<u32>, Query, description = "Of this rank only"),
        ("attempt" = Option<u32>, Query, description = "Of this attempt only"),
        ("tail" = Option<u64>, Query, description = "Only the last so many lines"),
        ("follow" = Option<bool>, Query, description = "Go on until the job is final"),
    ), responses((status = 200, description = "Raw bytes", body = String, content_type = "text/plain")))]
pub(super) async fn text(State(control): State<Shared>, Job(id): Job, mut params: Params) -> Result<Response, Refusal> {
    let query = LogQuery { follow: params.flag("follow"), ..selection(&mut params) };
    params.finish()?;
    let from = control.logs(id, query).await?;
    let stream = futures_util::stream::unfold(Some((from, false)), |state| async move {
        let (mut from, mut in_line) = state?;
        match next_bytes(&mut from, &mut in_line).await {
            Ok(Some(bytes)) => Some((Ok(bytes), Some((from, in_line)))),
            Ok(None) => None,
            Err(problem) => {
                // A pause lets the server send what came before; an error in the same breath would take it along.
                tokio::time::sleep(FLUSH_TIME).await;
                Some((Err(problem), None))
            }
        }
    });
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-cache")], Body::from_stream(stream)).into_response())
}

/// `in_line`: what was given out so far ends in mid-line.
async fn next_bytes(from: &mut mpsc::Receiver<LogItem>, in_line: &mut bool) -> Result<Option<Bytes>, Problem> {
    loop {
        match from.recv().await {
            Some(LogItem::Record { header, data, .. }) if header.flags & FLAG_DROPPED == 0 && !data.is_empty() => {
                *in_line = !data.ends_with(b"\n");
                return Ok(Some(data));
            }
            Some(LogItem::Missing { node, reason }) => {
                let begin = if std::mem::take(in_line) { "\n" } else { "" };
                return Ok(Some(format!("{begin}everlit: the part of this log that is on node {node} is missing: {reason}\n").into()));
            }
            Some(LogItem::Record { .. } | LogItem::Gap { .. } | LogItem::Passed { .. }) => {}
            Some(LogItem::End(_) | LogItem::CaughtUp) => return Ok(None),
            Some(LogItem::Failed(problem)) => return Err(problem),
            None => return Err(Problem::new(crate::problem::Code::Internal, "the log ended early")),
        }
    }
}

/// The log as server-sent events, until the job is final.
///
/// `event: log` has `{rank, attempt, stream, time, line}`; `event: gap` says how many bytes are gone, or which node's part can not be had now;
/// `event: end` has the final state.
/// Reconnect with `Last-Event-ID` to go on without a gap or a repeat.
#[utoipa::path(get, path = "/jobs/{id}/logs/stream", tag = "logs", operation_id = "stream_logs", params(
        ("id" = String, Path, description = "Job id"),
        ("rank" = Option<u32>, Query, description = "Of this rank only"),
        ("attempt" = Option<u32>, Query, description = "Of this attempt only"),
        ("tail" = Option<u64>, Query, description = "Begin with the last so many lines"),
        ("after" = Option<String>, Query, description = "Go on after this event's id"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same, as browsers send it; wins over `after` and `tail`"),
    ), responses((status = 200, description = "Server-sent events", body = String, content_type = "text/event-stream")))]
pub(super) async fn stream(
    State(control): State<Shared>,
    Job(id): Job,
    mut params: Params,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let mut query = LogQuery { follow: true, ..selection(&mut params) };
    let given = params.one("after");
    let place = sse::last_event_id(&headers).or(given);
    if let Some(text) = place {
        query.after = text.parse::<LogPlace>().ok();
        query.tail = None;
        if query.after.is_none() {
            params.fault("after", "(or Last-Event-ID) must be the id of an event of this log");
        }
    }
    params.finish()?;
    let after = query.after.clone();
    let from = control.logs(id, query).await?;
    Ok(sse::respond(from, sse::LogEvents::new(after)))
}
