//! How a refusal becomes an answer: as a [`Problem`] in the response's extensions, which `guard` writes out with the request's id.
//!
//! What axum refuses itself has no problem attached: [`for_status`] finds the code for its status.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::job::{Fault, FaultKind};
use crate::problem::{Code, Problem};

/// A refused request.
#[derive(Debug, Clone)]
pub(super) struct Refusal(pub(super) Box<Problem>);

impl Refusal {
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        Problem::new(code, detail).into()
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self(Box::new(problem))
    }
}

/// Faults of a body: `not_supported` when nothing is wrong with it but what is not built.
impl From<Vec<Fault>> for Refusal {
    fn from(faults: Vec<Fault>) -> Self {
        let not_built = faults.iter().all(|fault| fault.kind == FaultKind::NotSupported);
        let detail = match faults.as_slice() {
            [one] if one.pointer.is_empty() => format!("the body {}", one.detail),
            [one] => format!("{} {}", one.pointer, one.detail),
            many => format!("{} faults: see `errors`", many.len()),
        };
        let code = if not_built { Code::NotSupported } else { Code::Invalid };
        Self(Box::new(Problem { errors: faults, ..Problem::new(code, detail) }))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(Attached(self.0));
        response
    }
}

/// The problem of a response that is not written out yet.
#[derive(Debug, Clone)]
pub(super) struct Attached(pub(super) Box<Problem>);

/// The problem for a status that axum answered by itself.
pub(super) fn for_status(status: StatusCode, method: &str, path: &str) -> Problem {
    match status {
        StatusCode::NOT_FOUND => Problem::new(Code::NotFound, format!("there is nothing at {path}: GET /openapi.json lists every path")),
        StatusCode::METHOD_NOT_ALLOWED => {
            Problem::new(Code::MethodNotAllowed, format!("{path} does not take {method}: the `allow` header says what it takes"))
        }
        StatusCode::PAYLOAD_TOO_LARGE => Problem::new(Code::BodyTooLarge, "the body is too large"),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Problem::new(Code::UnsupportedMediaType, "send the body as `content-type: application/json`"),
        StatusCode::UNPROCESSABLE_ENTITY => Problem::new(Code::Invalid, "the request has faults"),
        other if other.is_client_error() => Problem::new(Code::BadRequest, "the request can not be read"),
        _ => Problem::new(Code::Internal, "the coordinator failed: its log has more under this request's id"),
    }
}

/// Any path without a door.
pub(super) async fn no_such_path(request: axum::extract::Request) -> Refusal {
    for_status(StatusCode::NOT_FOUND, request.method().as_str(), request.uri().path()).into()
}
