//! What a request carries, read strictly: ids in the path, query parameters, a JSON body.
//!
//! Unknown parameters are refused, never ignored. A body that is too large is read on for a while before it is refused, or the client would
//! see a reset connection instead of the answer.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use futures_util::StreamExt;
use serde_json::Value;

use super::answer::{Refusal, for_status};
use crate::ids::{JobId, NodeId};
use crate::job::BODY_BYTES_MAX;
use crate::problem::Code;
use crate::status::{JobState, Page};

/// Entries of a page unless asked otherwise, and at most.
pub(super) const LIMIT_DEFAULT: u32 = 50;
pub(super) const LIMIT_MAX: u32 = 500;
/// Characters of a parameter at most.
const PARAMETER_CHARS_MAX: usize = 1024;
/// A too large body is read this far and this long before it is refused.
const DRAIN_BYTES_MAX: usize = 16 * BODY_BYTES_MAX;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);

async fn only_path_parameter<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<String, Refusal> {
    let missing = |parts: &Parts| for_status(StatusCode::NOT_FOUND, parts.method.as_str(), parts.uri.path()).into();
    Path::<String>::from_request_parts(parts, state).await.map(|Path(text)| text).map_err(|_| missing(parts))
}

/// The job named in the path.
pub(super) struct Job(pub(super) JobId);

impl<S: Send + Sync> FromRequestParts<S> for Job {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let text = only_path_parameter(parts, state).await?;
        text.parse().map(Job).map_err(|bad| Refusal::new(Code::NotFound, format!("there is no such job: {bad}")))
    }
}

/// The job and the attempt named in the path.
pub(super) struct Attempt(pub(super) JobId, pub(super) u32);

impl<S: Send + Sync> FromRequestParts<S> for Attempt {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Ok(Path((job, attempt))) = Path::<(String, String)>::from_request_parts(parts, state).await else {
            return Err(Refusal::new(Code::NotFound, "the path is not valid UTF-8"));
        };
        let job = job.parse().map_err(|bad| Refusal::new(Code::NotFound, format!("there is no such job: {bad}")))?;
        let attempt = attempt.parse().map_err(|_| Refusal::new(Code::NotFound, "attempts are numbered from 1"))?;
        Ok(Self(job, attempt))
    }
}

/// The node named in the path.
pub(super) struct Node(pub(super) NodeId);

impl<S: Send + Sync> FromRequestParts<S> for Node {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        Ok(Node(NodeId(only_path_parameter(parts, state).await?)))
    }
}

/// Query parameters: each is taken by name, faults are collected, [`Params::finish`] refuses what is left.
pub(super) struct Params {
    pairs: Vec<(String, String)>,
    faults: Vec<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let pairs = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri);
        let Query(pairs) =
            pairs.map_err(|_| Refusal::new(Code::BadRequest, "the query can not be read: write it like ?limit=10&state=running"))?;
        Ok(Self { pairs, faults: Vec::new() })
    }
}

impl Params {
    fn all(&mut self, name: &str) -> Vec<String> {
        let mut found = Vec::new();
        self.pairs.retain(|(key, value)| {
            let hit = key == name;
            if hit {
                found.push(value.clone());
            }
            !hit
        });
        found
    }

    /// A parameter that may be given once.
    pub(super) fn one(&mut self, name: &str) -> Option<String> {
        let found = self.all(name);
        if found.len() > 1 {
            self.fault(name, "is given more than once");
        }
        let value = found.into_iter().next()?;
        if value.len() > PARAMETER_CHARS_MAX {
            self.fault(name, "is too long");
            return None;
        }
        Some(value)
    }

    /// Notes that a parameter is wrong.
    pub(super) fn fault(&mut self, name: &str, detail: &str) {
        let short: String = name.chars().take(64).collect();
        self.faults.push(format!("query parameter `{short}` {detail}"));
    }

    /// A parameter through `FromStr`.
    pub(super) fn parsed<T: std::str::FromStr>(&mut self, name: &str, expected: &str) -> Option<T> {
        let value = self.one(name)?.parse().ok();
        if value.is_none() {
            self.fault(name, expected);
        }
        value
    }

    /// True or false; given without a value it is true.
    pub(super) fn flag(&mut self, name: &str) -> bool {
        match self.one(name).as_deref() {
            None | Some("false" | "0") => false,
            Some("true" | "1" | "") => true,
            Some(_) => {
                self.fault(name, "must be true or false");
                false
            }
        }
    }

    /// Entries per page.
    pub(super) fn limit(&mut self, default: u32, most: u32) -> u32 {
        let given = self.one("limit");
        let limit = given.as_deref().map(|text| text.parse::<u32>().ok().filter(|n| (1..=most).contains(n)));
        match limit {
            None => default,
            Some(Some(limit)) => limit,
            Some(None) => {
                self.fault("limit", &format!("must be a whole number from 1 to {most}"));
                default
            }
        }
    }

    /// States, separated by commas or given several times.
    pub(super) fn states(&mut self) -> Vec<JobState> {
        let mut states = Vec::new();
        let names = self.all("state").join(",");
        for name in names.split(',').filter(|name| !name.is_empty()) {
            match JobState::from_name(name) {
                Some(state) => states.push(state),
                None => {
                    let known = JobState::ALL.map(JobState::as_str).join(", ");
                    self.fault("state", &format!("must be one or more of {known}"));
                    break;
                }
            }
        }
        states.dedup();
        states
    }

    /// `label=key=value`, given several times.
    pub(super) fn labels(&mut self) -> Vec<(String, String)> {
        let mut labels = Vec::new();
        for label in self.all("label") {
            match label.split_once('=') {
                Some((key, value)) if !key.is_empty() => labels.push((key.into(), value.into())),
                _ => self.fault("label", "must be like label=key=value"),
            }
        }
        labels
    }

    /// Refuses faults and unknown parameters.
    pub(super) fn finish(mut self) -> Result<(), Refusal> {
        if let Some((name, _)) = self.pairs.first().cloned() {
            self.fault(&name, "is not known here");
        }
        if self.faults.is_empty() { Ok(()) } else { Err(Refusal::new(Code::Invalid, self.faults.join("; "))) }
    }
}

/// The part of a short list that was asked for; `after` is the cursor of an entry.
pub(super) fn page<T>(all: Vec<T>, limit: u32, after: Option<&str>, cursor: impl Fn(&T) -> String) -> Result<Page<T>, Refusal> {
    let skip = match after {
        None => 0,
        Some(after) => {
            let place = all.iter().position(|entry| cursor(entry) == after);
            place.ok_or_else(|| {
                Refusal::new(Code::Invalid, "query parameter `after` is not a cursor of this list: start again without it")
            })? + 1
        }
    };
    let rest = all.len().saturating_sub(skip);
    let data: Vec<T> = all.into_iter().skip(skip).take(limit as usize).collect();
    let (first_id, last_id) = (data.first().map(&cursor), data.last().map(&cursor));
    Ok(Page { has_more: rest > data.len(), data, first_id, last_id })
}

/// A body of JSON; an empty one is `{}`.
pub(super) struct JsonBody {
    /// As it came.
    pub(super) raw: Bytes,
    /// What it says.
    pub(super) value: Value,
}

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let is_json = is_json(request.headers());
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        let raw = read(request.into_body(), announced).await?;
        if raw.is_empty() {
            return Ok(Self { raw, value: Value::Object(serde_json::Map::new()) });
        }
        if !is_json {
            return Err(Refusal::new(Code::UnsupportedMediaType, "send the body with the header `content-type: application/json`"));
        }
        let value = serde_json::from_slice(&raw).map_err(|bad| {
            let detail = bad.to_string();
            let what = detail.split(" at line ").next().unwrap_or(&detail).to_string();
            Refusal::new(Code::InvalidJson, format!("line {}, column {}: {what}", bad.line(), bad.column()))
        })?;
        Ok(Self { raw, value })
    }
}

impl JsonBody {
    /// Only these fields, or a fault for each other one.
    pub(super) fn fields(&self, known: &[&str]) -> Result<&serde_json::Map<String, Value>, Refusal> {
        let fault = |pointer: String, detail: String| crate::job::Fault { pointer, detail, kind: crate::job::FaultKind::Invalid };
        let Some(map) = self.value.as_object() else {
            return Err(vec![fault(String::new(), "must be an object".into())].into());
        };
        let list = if known.is_empty() { "send {} or nothing".into() } else { format!("known are {}", known.join(", ")) };
        let escaped = |key: &str| key.chars().take(128).collect::<String>().replace('~', "~0").replace('/', "~1");
        let unknown = map.keys().filter(|key| !known.contains(&key.as_str()));
        let faults: Vec<_> =
            unknown.take(100).map(|key| fault(format!("/{}", escaped(key)), format!("is not a known field: {list}"))).collect();
        if faults.is_empty() { Ok(map) } else { Err(faults.into()) }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(text) = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()) else { return false };
    let kind = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

async fn read(body: Body, announced: Option<usize>) -> Result<Bytes, Refusal> {
    let mut stream = body.into_data_stream();
    let mut whole = Vec::with_capacity(announced.unwrap_or(0).min(BODY_BYTES_MAX));
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| Refusal::new(Code::BadRequest, "the connection ended before the body did"))?;
        if whole.len() + chunk.len() > BODY_BYTES_MAX {
            drain(stream, announced).await;
            return Err(Refusal::new(Code::BodyTooLarge, format!("the body may have at most {BODY_BYTES_MAX} bytes")));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.into())
}

async fn drain(mut stream: axum::body::BodyDataStream, announced: Option<usize>) {
    if announced.is_some_and(|bytes| bytes > DRAIN_BYTES_MAX) {
        return;
    }
    let read_on = async {
        let mut seen = BODY_BYTES_MAX;
        while let Some(Ok(chunk)) = stream.next().await {
            seen += chunk.len();
            if seen > DRAIN_BYTES_MAX {
                return;
            }
        }
    };
    // However it ends, the answer is the same.
    let _ = tokio::time::timeout(DRAIN_TIME_MAX, read_on).await;
}
