//! A job's history: attempts, checkpoints, the time series, and why it is not running.

use axum::Json;
use axum::extract::State;

use super::Shared;
use super::answer::Refusal;
use super::extract::{Job, LIMIT_DEFAULT, LIMIT_MAX, Params, page};
use crate::status::{AttemptView, CheckpointView, Explanation, MetricPoint, Page};

/// Points of a page of metrics unless asked otherwise, and at most: what [`crate::control::Control::metrics`] gives at most.
const POINTS_MAX: u32 = 1000;

/// Every run of its gang, oldest first.
#[utoipa::path(get, path = "/jobs/{id}/attempts", tag = "jobs", operation_id = "list_attempts", params(
        ("id" = String, Path, description = "Job id"),
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
    ), responses((status = 200, description = "A page", body = Page<AttemptView>)))]
pub(super) async fn attempts(State(control): State<Shared>, Job(id): Job, mut params: Params) -> Result<Json<Page<AttemptView>>, Refusal> {
    let (limit, after) = (params.limit(LIMIT_DEFAULT, LIMIT_MAX), params.one("after"));
    params.finish()?;
    let all = control.attempts(id).await?;
    page(all, limit, after.as_deref(), |one| one.attempt.to_string()).map(Json)
}

/// Its checkpoints, newest first.
#[utoipa::path(get, path = "/jobs/{id}/checkpoints", tag = "jobs", operation_id = "list_checkpoints", params(
        ("id" = String, Path, description = "Job id"),
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
    ), responses((status = 200, description = "A page", body = Page<CheckpointView>)))]
pub(super) async fn checkpoints(
    State(control): State<Shared>,
    Job(id): Job,
    mut params: Params,
) -> Result<Json<Page<CheckpointView>>, Refusal> {
    let (limit, after) = (params.limit(LIMIT_DEFAULT, LIMIT_MAX), params.one("after"));
    params.finish()?;
    let all = control.checkpoints(id).await?;
    page(all, limit, after.as_deref(), |one| format!("{}-{}-{}", one.step, one.attempt, one.node.as_ref().map_or("store", |node| &node.0)))
        .map(Json)
}

/// Its time series, oldest first; thinned out to at most a thousand points.
#[utoipa::path(get, path = "/jobs/{id}/metrics", tag = "jobs", operation_id = "list_metrics", params(
        ("id" = String, Path, description = "Job id"),
        ("limit" = Option<u32>, Query, description = "Points per page: 1000, which is all of them", minimum = 1, maximum = 1000),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
        ("since_step" = Option<u64>, Query, description = "Only points of this step and later ones"),
    ), responses((status = 200, description = "A page", body = Page<MetricPoint>)))]
pub(super) async fn metrics(State(control): State<Shared>, Job(id): Job, mut params: Params) -> Result<Json<Page<MetricPoint>>, Refusal> {
    let (limit, after) = (params.limit(POINTS_MAX, POINTS_MAX), params.one("after"));
    let since_step = params.parsed("since_step", "must be a whole number").unwrap_or(0);
    params.finish()?;
    let mut all = control.metrics(id).await?;
    all.retain(|point| point.step >= since_step);
    page(all, limit, after.as_deref(), |one| format!("{}-{}-{}", one.attempt, one.step, one.time.0)).map(Json)
}

/// Why it is not running.
#[utoipa::path(get, path = "/jobs/{id}/explain", tag = "jobs", operation_id = "explain_job", params(("id" = String, Path, description = "Job id")),
    responses((status = 200, description = "The reasons", body = Explanation)))]
pub(super) async fn explain(State(control): State<Shared>, Job(id): Job, params: Params) -> Result<Json<Explanation>, Refusal> {
    params.finish()?;
    Ok(Json(control.explain(id).await?))
}
