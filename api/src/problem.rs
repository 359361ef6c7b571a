//! Errors as RFC 9457 problem details, with a stable code each. docs/errors.md lists every code with its remedy.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::Fault;

macro_rules! codes {
    ($($name:ident = $text:literal, $status:literal, $title:literal;)*) => {
        /// A stable name for a kind of error. Clients may match on it; titles and details may change.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Code { $(#[doc = $title] $name,)* }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// As it is written in JSON.
            pub fn as_str(self) -> &'static str { match self { $(Self::$name => $text,)* } }
            /// The HTTP status.
            pub fn status(self) -> u16 { match self { $(Self::$name => $status,)* } }
            /// A short title.
            pub fn title(self) -> &'static str { match self { $(Self::$name => $title,)* } }
        }
    };
}

codes! {
    BadRequest = "bad_request", 400, "the request can not be read";
    InvalidJson = "invalid_json", 400, "the body is not JSON";
    Unauthorized = "unauthorized", 401, "a token is needed";
    Forbidden = "forbidden", 403, "this caller may not do this";
    Expelled = "expelled", 403, "this node was expelled";
    NotFound = "not_found", 404, "there is no such thing here";
    MethodNotAllowed = "method_not_allowed", 405, "this path does not take this method";
    Conflict = "conflict", 409, "the job's state does not allow this";
    IdempotencyInProgress = "idempotency_in_progress", 409, "a request with this Idempotency-Key is still running";
    BodyTooLarge = "body_too_large", 413, "the body is too large";
    UnsupportedMediaType = "unsupported_media_type", 415, "the body must be application/json";
    Invalid = "invalid", 422, "the request has faults";
    NotSupported = "not_supported", 422, "the request asks for something that is not built";
    IdempotencyMismatch = "idempotency_mismatch", 422, "this Idempotency-Key was used with another body";
    QueueFull = "queue_full", 429, "the queue is full";
    RateLimited = "rate_limited", 429, "too many requests";
    Internal = "internal", 500, "the coordinator failed";
    StoreUnavailable = "store_unavailable", 503, "the store can not take writes";
    NotReady = "not_ready", 503, "the coordinator is not ready";
    NodeUnavailable = "node_unavailable", 503, "the node that has the answer can not be reached";
}

/// The body of every error answer (`application/problem+json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`; `code` tells.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: String,
    /// Short, the same for every error of this code.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong this time and what to do about it.
    pub detail: String,
    /// Stable name.
    pub code: Code,
    /// Every fault of the body, where it is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Fault>,
    /// The request's id, also in the `x-request-id` header.
    #[serde(default)]
    pub request_id: String,
    /// Seconds to wait before trying again, also in the `retry-after` header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
}

fn about_blank() -> String {
    "about:blank".into()
}

impl Problem {
    /// A problem with its code's status and title.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            kind: about_blank(),
            title: code.title().into(),
            status: code.status(),
            detail: detail.into(),
            code,
            errors: Vec::new(),
            request_id: String::new(),
            retry_after: None,
        }
    }

    /// The same with a wait in seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.detail, self.code.as_str())
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Code and status of every row of the table.
    fn rows() -> Vec<(String, u16)> {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors.md")).expect("docs/errors.md");
        let row = |line: &str| {
            let cells: Vec<&str> = line.strip_prefix("| `")?.split('|').map(str::trim).collect();
            assert!(cells.len() == 5 && cells[2].len() > 20 && cells[3].len() > 20, "cause and remedy: {line}");
            Some((cells[0].trim_end_matches('`').into(), cells[1].parse().expect("a status")))
        };
        text.lines().filter_map(row).collect()
    }

    #[test]
    fn every_code_is_documented_with_its_remedy() {
        let codes: Vec<(String, u16)> = Code::ALL.iter().map(|code| (code.as_str().into(), code.status())).collect();
        assert_eq!(rows(), codes);
    }

    #[test]
    fn codes_are_written_as_they_are_named() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).expect("serializes"), code.as_str());
        }
    }
}
