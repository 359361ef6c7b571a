//! Acting on jobs: stop, restart, checkpoint, delete, purge.
//!
//! Bodies are small and read strictly. A purge must say how old: an empty request never removes anything.

use axum::Json;
use axum::extract::State;
use serde_json::Value;

use super::Shared;
use super::answer::Refusal;
use super::extract::{Job, JsonBody, Params};
use crate::control::PurgeQuery;
use crate::job::{Fault, FaultKind};
use crate::request::{PurgeRequest, Purged, StopRequest};
use crate::status::{JobState, JobView};
use crate::time::Millis;

fn fault(pointer: &str, detail: impl Into<String>) -> Fault {
    Fault { pointer: pointer.into(), detail: detail.into(), kind: FaultKind::Invalid }
}

/// A boolean field of a small body.
fn flag(map: &serde_json::Map<String, Value>, name: &str) -> Result<bool, Fault> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(fault(&format!("/{name}"), "must be true or false")),
    }
}

/// Stop an active job; its state is saved within the grace. Stopping twice is no error.
#[utoipa::path(post, path = "/jobs/{id}/stop", tag = "jobs", operation_id = "stop_job", request_body(content = Option<StopRequest>),
    params(("id" = String, Path, description = "Job id"), ("force" = Option<bool>, Query, description = "Skip the grace")),
    responses((status = 200, description = "The job, stopping or stopped", body = JobView)))]
pub(super) async fn stop(
    State(control): State<Shared>,
    Job(id): Job,
    mut params: Params,
    body: JsonBody,
) -> Result<Json<JobView>, Refusal> {
    let asked = params.flag("force");
    params.finish()?;
    let force = flag(body.fields(&["force"])?, "force").map_err(|fault| vec![fault])?;
    Ok(Json(control.stop(id, asked || force).await?))
}

/// Restart the gang of an active job from its newest verified checkpoint; counts against no budget.
#[utoipa::path(post, path = "/jobs/{id}/restart", tag = "jobs", operation_id = "restart_job", params(("id" = String, Path, description = "Job id")),
    responses((status = 200, description = "The job", body = JobView)))]
pub(super) async fn restart(State(control): State<Shared>, Job(id): Job, params: Params, body: JsonBody) -> Result<Json<JobView>, Refusal> {
    params.finish()?;
    body.fields(&[])?;
    Ok(Json(control.restart(id).await?))
}

/// Have the ranks of a running job save now; training goes on. An event `checkpoint_requested` is recorded at once, `checkpoint_committed`
/// when it is done.
#[utoipa::path(post, path = "/jobs/{id}/checkpoint", tag = "jobs", operation_id = "checkpoint_job", params(("id" = String, Path, description = "Job id")),
    responses((status = 200, description = "The job, whose ranks were told", body = JobView)))]
pub(super) async fn checkpoint(
    State(control): State<Shared>,
    Job(id): Job,
    params: Params,
    body: JsonBody,
) -> Result<Json<JobView>, Refusal> {
    params.finish()?;
    body.fields(&[])?;
    Ok(Json(control.save(id).await?))
}

/// Remove a final job with its logs and checkpoints.
#[utoipa::path(delete, path = "/jobs/{id}", tag = "jobs", operation_id = "delete_job", params(
        ("id" = String, Path, description = "Job id"),
        ("stop_first" = Option<bool>, Query, description = "Stop it first when it is active, else that is a 409"),
        ("force" = Option<bool>, Query, description = "Skip the grace of that stop"),
    ), responses((status = 200, description = "The job as it was", body = JobView)))]
pub(super) async fn delete(State(control): State<Shared>, Job(id): Job, mut params: Params) -> Result<Json<JobView>, Refusal> {
    let (stop_first, force) = (params.flag("stop_first"), params.flag("force"));
    params.finish()?;
    Ok(Json(control.delete(id, stop_first, force).await?))
}

/// Remove final jobs that finished long ago.
#[utoipa::path(post, path = "/jobs/purge", tag = "jobs", operation_id = "purge_jobs", request_body = PurgeRequest,
    responses((status = 200, description = "What was removed", body = Purged)))]
pub(super) async fn purge(State(control): State<Shared>, params: Params, body: JsonBody) -> Result<Json<Purged>, Refusal> {
    params.finish()?;
    let query = purge_query(&body)?;
    let dry_run = query.dry_run;
    Ok(Json(Purged { removed: control.purge(query).await?, dry_run }))
}

fn purge_query(body: &JsonBody) -> Result<PurgeQuery, Refusal> {
    let map = body.fields(&["older_than", "states", "dry_run"])?;
    let mut faults = Vec::new();
    let older_than = match map.get("older_than") {
        Some(Value::String(text)) => text.parse::<Millis>().map_err(|bad| fault("/older_than", bad.to_string())),
        Some(Value::Null) | None => Err(fault("/older_than", "must be given, like \"7d\"; \"0s\" removes every final job")),
        Some(_) => Err(fault("/older_than", "must be a duration with its unit in quotes, like \"7d\"")),
    };
    let dry_run = flag(map, "dry_run");
    let mut states = Vec::new();
    match map.get("states") {
        None | Some(Value::Null) => {}
        Some(Value::Array(names)) => {
            for (i, name) in names.iter().enumerate() {
                match name.as_str().and_then(JobState::from_name).filter(|state| state.is_final()) {
                    Some(state) => states.push(state),
                    None => faults.push(fault(&format!("/states/{i}"), "must be one of \"succeeded\", \"failed\", \"stopped\"")),
                }
            }
        }
        Some(_) => faults.push(fault("/states", "must be a list like [\"failed\"]")),
    }
    match (older_than, dry_run) {
        (Ok(older_than), Ok(dry_run)) if faults.is_empty() => Ok(PurgeQuery { older_than, states, dry_run }),
        (older_than, dry_run) => {
            faults.extend(older_than.err());
            faults.extend(dry_run.err());
            faults.truncate(100);
            Err(faults.into())
        }
    }
}
