//! What happened, with reasons: pages and streams over one durable sequence.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::{Extension, Json};

use super::Shared;
use super::answer::Refusal;
use super::extract::{Job, LIMIT_DEFAULT, LIMIT_MAX, Params};
use super::sse;
use crate::auth::Caller;
use crate::control::EventQuery;
use crate::status::{EventView, Page};

const CURSOR: &str = "must be the id of an event";

/// What happened to a job, oldest first.
#[utoipa::path(get, path = "/jobs/{id}/events", tag = "events", operation_id = "list_events", params(
        ("id" = String, Path, description = "Job id"),
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this event's id"),
    ), responses((status = 200, description = "A page", body = Page<EventView>)))]
pub(super) async fn of_job(State(control): State<Shared>, Job(id): Job, mut params: Params) -> Result<Json<Page<EventView>>, Refusal> {
    let (limit, after) = (params.limit(LIMIT_DEFAULT, LIMIT_MAX), params.parsed("after", CURSOR));
    params.finish()?;
    Ok(Json(control.events(EventQuery { job: Some(id), after, user: None }, limit).await?))
}

/// What happens to a job, as server-sent events named like the event, until it is final.
#[utoipa::path(get, path = "/jobs/{id}/events/stream", tag = "events", operation_id = "stream_job_events", params(
        ("id" = String, Path, description = "Job id"),
        ("after" = Option<String>, Query, description = "Go on after this event's id"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same, as browsers send it; wins over `after`"),
    ), responses((status = 200, description = "Server-sent events", body = String, content_type = "text/event-stream")))]
pub(super) async fn stream_of_job(
    State(control): State<Shared>,
    Job(id): Job,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    follow(&control, EventQuery { job: Some(id), ..EventQuery::default() }, params, &headers).await
}

/// What happens to every job and node, as server-sent events named like the event; a user hears of its own jobs only.
#[utoipa::path(get, path = "/events/stream", tag = "events", operation_id = "stream_events", params(
        ("after" = Option<String>, Query, description = "Go on after this event's id"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same, as browsers send it; wins over `after`"),
    ), responses((status = 200, description = "Server-sent events", body = String, content_type = "text/event-stream")))]
pub(super) async fn stream_of_all(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let user = caller.only().map(Into::into);
    follow(&control, EventQuery { user, ..EventQuery::default() }, params, &headers).await
}

async fn follow(control: &Shared, query: EventQuery, mut params: Params, headers: &HeaderMap) -> Result<Response, Refusal> {
    let given = params.parsed::<u64>("after", CURSOR);
    let after = match sse::last_event_id(headers) {
        None => given,
        Some(text) => {
            let place = text.parse().ok();
            if place.is_none() {
                params.fault("after", "(or Last-Event-ID) must be the id of an event");
            }
            place
        }
    };
    params.finish()?;
    let from = control.follow_events(EventQuery { after, ..query }).await?;
    Ok(sse::respond(from, sse::Happenings::new(after)))
}
