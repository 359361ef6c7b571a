//! Submitting jobs and looking at them.
//!
//! `Location` is made from the path as it was called, so it is right under `/api/v1` too.

use axum::extract::{OriginalUri, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::Shared;
use super::answer::Refusal;
use super::docs::JobRequest;
use super::extract::{Job, JsonBody, LIMIT_DEFAULT, LIMIT_MAX, Params};
use super::guard::is_of;
use crate::auth::Caller;
use crate::control::{ListQuery, Submission};
use crate::ids::JobId;
use crate::job;
use crate::problem::Code;
use crate::status::{JobView, Page, PlacementPlan, Summary};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const KEY_CHARS_MAX: usize = 255;

/// Submit a job.
///
/// Every field is optional: `{"world_size": 4}` alone trains the built-in model with four ranks. All faults of the body are named at
/// once. With `resume_from` a job's id, settings of the built-in program that are not given stay what they were in that job. With
/// `Idempotency-Key` a repeated request answers with the job that the first one made.
#[utoipa::path(post, path = "/jobs", tag = "jobs", operation_id = "submit_job", request_body(content = JobRequest, content_type = "application/json"),
    params(
        ("dry_run" = Option<bool>, Query, description = "Answer what would happen, and accept nothing"),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters of your choice"),
    ),
    responses(
        (status = 200, description = "The plan, with `dry_run`", body = PlacementPlan),
        (status = 201, description = "Accepted and durable", body = JobView, headers(
            ("location" = String, description = "The job's path"),
            ("idempotent-replayed" = Option<bool>, description = "true when the key had been used with this body before"),
        )),
    ))]
pub(super) async fn submit(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    OriginalUri(uri): OriginalUri,
    mut params: Params,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, Refusal> {
    let dry_run = params.flag("dry_run");
    params.finish()?;
    let key = idempotency_key(&headers)?;
    let spec = job::parse(&with_inherited(&control, body.value, &caller).await?)?;
    let key = match (&caller.user, caller.only()) {
        // Callers without a name would share their keys.
        (None, Some(_)) if key.is_some() => {
            return Err(Refusal::new(Code::Invalid, "an Idempotency-Key needs a token: without one it is nobody's"));
        }
        _ => key,
    };
    own_resumed(&control, spec.resume_from.as_deref(), &caller).await?;
    if dry_run {
        return Ok(Json(control.plan(spec).await?).into_response());
    }
    let idempotency = key.map(|key| (key, Sha256::digest(&body.raw).into()));
    let accepted = control.submit(Submission { spec, idempotency, user: caller.user }).await?;
    let place = format!("{}/{}", uri.path().trim_end_matches('/'), accepted.job.job_id);
    let mut response = (StatusCode::CREATED, Json(accepted.job)).into_response();
    if let Ok(place) = HeaderValue::try_from(place) {
        response.headers_mut().insert(LOCATION, place);
    }
    if accepted.replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// A user resumes from its own jobs only, whatever the program: weights are another user's, and one that is not known here may be, too.
async fn own_resumed(control: &Shared, resumed: Option<&str>, caller: &Caller) -> Result<(), Refusal> {
    let (Some(user), Some(Ok(id))) = (caller.only(), resumed.map(str::parse::<JobId>)) else { return Ok(()) };
    if is_of(control, id, user).await? {
        return Ok(());
    }
    Err(Refusal::new(Code::NotFound, format!("there is no job {id} of yours to resume from; GET /jobs lists them")))
}

/// A job that resumes one that is known here goes on with that one's settings where it gives none.
async fn with_inherited(control: &Shared, body: Value, caller: &Caller) -> Result<Value, Refusal> {
    let Some(id) = job::resumes(&body) else { return Ok(body) };
    own_resumed(control, Some(&id.to_string()), caller).await?;
    match control.job(id).await {
        Ok(JobView { spec: Some(old), .. }) => Ok(job::inherit(body, &old)),
        Ok(_) => Ok(body),
        // Its node may still have its checkpoints.
        Err(problem) if problem.code == Code::NotFound => Ok(body),
        Err(problem) => Err(problem.into()),
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let mut all = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = all.next() else { return Ok(None) };
    let bytes = value.as_bytes();
    let fine = !bytes.is_empty() && bytes.len() <= KEY_CHARS_MAX && bytes.iter().all(u8::is_ascii_graphic) && all.next().is_none();
    let key = value.to_str().ok().filter(|_| fine);
    let wrong = || {
        Refusal::new(
            Code::Invalid,
            format!("the Idempotency-Key header must be given once, with 1 to {KEY_CHARS_MAX} visible ASCII characters"),
        )
    };
    key.map(|key| Some(key.into())).ok_or_else(wrong)
}

fn list_query(mut params: Params, caller: &Caller) -> Result<ListQuery, Refusal> {
    let user = params.one("user");
    let query = ListQuery {
        limit: params.limit(LIMIT_DEFAULT, LIMIT_MAX),
        after: params.one("after"),
        states: params.states(),
        name: params.one("name"),
        labels: params.labels(),
        user: caller.only().map(Into::into).or(user),
    };
    params.finish().map(|()| query)
}

/// List jobs, newest first.
#[utoipa::path(get, path = "/jobs", tag = "jobs", operation_id = "list_jobs", params(
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
        ("state" = Option<String>, Query, description = "Only these states, separated by commas"),
        ("name" = Option<String>, Query, description = "Only jobs of this name"),
        ("label" = Option<Vec<String>>, Query, description = "Only jobs with this label, like team=vision; may be repeated"),
        ("user" = Option<String>, Query, description = "Only jobs of this user; a user sees no others anyway"),
    ), responses((status = 200, description = "A page", body = Page<JobView>)))]
pub(super) async fn list(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    params: Params,
) -> Result<Json<Page<JobView>>, Refusal> {
    Ok(Json(control.jobs(list_query(params, &caller)?).await?))
}

/// List summaries, newest first.
#[utoipa::path(get, path = "/jobs/summaries", tag = "jobs", operation_id = "list_summaries", params(
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
        ("state" = Option<String>, Query, description = "Only these states, separated by commas"),
        ("name" = Option<String>, Query, description = "Only jobs of this name"),
        ("label" = Option<Vec<String>>, Query, description = "Only jobs with this label, like team=vision; may be repeated"),
        ("user" = Option<String>, Query, description = "Only jobs of this user; a user sees no others anyway"),
    ), responses((status = 200, description = "A page", body = Page<Summary>)))]
pub(super) async fn summaries(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    params: Params,
) -> Result<Json<Page<Summary>>, Refusal> {
    Ok(Json(control.summaries(list_query(params, &caller)?).await?))
}

/// One job with its spec.
#[utoipa::path(get, path = "/jobs/{id}", tag = "jobs", operation_id = "get_job", params(("id" = String, Path, description = "Job id")),
    responses((status = 200, description = "The job", body = JobView)))]
pub(super) async fn one(State(control): State<Shared>, Job(id): Job, params: Params) -> Result<Json<JobView>, Refusal> {
    params.finish()?;
    Ok(Json(control.job(id).await?))
}

/// Progress, ranks, restarts and where the time went.
#[utoipa::path(get, path = "/jobs/{id}/summary", tag = "jobs", operation_id = "get_summary", params(("id" = String, Path, description = "Job id")),
    responses((status = 200, description = "The summary", body = Summary)))]
pub(super) async fn summary(State(control): State<Shared>, Job(id): Job, params: Params) -> Result<Json<Summary>, Refusal> {
    params.finish()?;
    Ok(Json(control.summary(id).await?))
}
