//! Whether the coordinator lives, is ready, and what it does.
//!
//! Liveness never asks [`crate::control::Control`]: a busy coordinator is not a dead one.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::answer::Refusal;
use crate::auth::Caller;
use crate::problem::Code;
use crate::status::StatusView;

/// A short yes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, or `ready`.
    status: &'static str,
}

/// Alive.
#[utoipa::path(get, path = "/health", tag = "health", operation_id = "health", responses((status = 200, description = "Alive", body = Health)))]
pub(super) async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Alive, whatever the load.
#[utoipa::path(get, path = "/livez", tag = "health", operation_id = "livez", responses((status = 200, description = "Alive", body = Health)))]
pub(super) async fn livez() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// The store answers and recovery is done.
#[utoipa::path(get, path = "/readyz", tag = "health", operation_id = "readyz", responses((status = 200, description = "Ready", body = Health)))]
pub(super) async fn readyz(State(control): State<Shared>) -> Result<Json<Health>, Refusal> {
    match control.ready() {
        Ok(()) => Ok(Json(Health { status: "ready" })),
        Err(why) => Err(Refusal::new(Code::NotReady, why)),
    }
}

/// What anybody may know.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ShortStatus {
    /// Of the coordinator.
    version: String,
    /// Since it started.
    uptime_seconds: f64,
    /// Whether it decides; others pass on.
    leader: bool,
    /// How callers are known.
    auth: String,
}

/// All of it, or what anybody may know.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum Status {
    /// For whoever may see nodes and jobs.
    Full(StatusView),
    /// For everybody else.
    Short(ShortStatus),
}

/// Version, nodes, jobs, GPUs, queue; without a token where one is needed only what anybody may know.
#[utoipa::path(get, path = "/status", tag = "health", operation_id = "status", responses((status = 200, description = "Now", body = Status)))]
pub(super) async fn status(State(control): State<Shared>, caller: Option<Extension<Caller>>) -> Result<Json<Status>, Refusal> {
    let full = control.status().await?;
    Ok(Json(if caller.is_some() {
        Status::Full(full)
    } else {
        Status::Short(ShortStatus { version: full.version, uptime_seconds: full.uptime_seconds, leader: full.leader, auth: full.auth })
    }))
}

/// For Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "health", operation_id = "metrics",
    responses((status = 200, description = "Every metric", body = String, content_type = "text/plain")))]
pub(super) async fn metrics(State(control): State<Shared>) -> Result<Response, Refusal> {
    let text = control.prometheus().await?;
    // OpenMetrics is told by its end mark.
    let open = text.trim_end().ends_with("# EOF");
    let kind = if open { "application/openmetrics-text; version=1.0.0; charset=utf-8" } else { "text/plain; version=0.0.4; charset=utf-8" };
    Ok(([(CONTENT_TYPE, kind)], text).into_response())
}
