//! What every request passes on its way in and every answer on its way out: the loopback guard, a request id, a span, problems.
//!
//! Loopback is not private: any web page may send requests to it. So the Host must be a loopback name (a rebound DNS name is not), an
//! Origin must be this very door's, and a browser that says it comes from elsewhere changes nothing (CONTRACT section 7).

use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HOST, ORIGIN, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use tracing::Instrument;

use super::answer::{Attached, Refusal, for_status};
use crate::problem::{Code, Problem};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");
const NOSNIFF: HeaderValue = HeaderValue::from_static("nosniff");
/// Characters of an inbound request id at most.
const REQUEST_ID_CHARS_MAX: usize = 128;

/// Who may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Programs on this machine, without a token; web pages only when the coordinator serves them itself.
    Loopback,
}

/// The outermost layer.
pub(super) async fn doors(State(policy): State<Policy>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let span = tracing::debug_span!("request", id = id.to_str().unwrap_or_default(), %method, path);
    let started = Instant::now();
    let mut response = match guard(policy, &request) {
        Err(refusal) => refusal.into_response(),
        Ok(()) => AssertUnwindSafe(next.run(request)).catch_unwind().instrument(span.clone()).await.unwrap_or_else(|_| panicked()),
    };
    if response.status().is_client_error() || response.status().is_server_error() {
        response = with_problem(response, &id, &method, &path);
    }
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, NOSNIFF);
    headers.insert(REQUEST_ID, id);
    let _entered = span.enter();
    let (status, ms) = (response.status().as_u16(), started.elapsed().as_millis() as u64);
    if status == 500 {
        tracing::error!(status, ms, "answered")
    } else {
        tracing::debug!(status, ms, "answered")
    }
    response
}

fn panicked() -> Response {
    // The panic hook has written the message and the place to the log.
    Refusal::new(Code::Internal, "the coordinator failed on this request: its log has more under the request's id").into_response()
}

fn with_problem(response: Response, id: &HeaderValue, method: &Method, path: &str) -> Response {
    let (mut parts, body) = response.into_parts();
    let mut problem: Problem = match parts.extensions.remove::<Attached>() {
        Some(Attached(problem)) => *problem,
        None if parts.headers.get(CONTENT_TYPE).is_some_and(|kind| kind == PROBLEM_JSON) => return Response::from_parts(parts, body),
        None => for_status(parts.status, method.as_str(), path),
    };
    problem.request_id = id.to_str().unwrap_or_default().into();
    parts.status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    parts.headers.insert(CONTENT_TYPE, PROBLEM_JSON);
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    if let Some(seconds) = problem.retry_after {
        parts.headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    let text = serde_json::to_vec(&problem).unwrap_or_default();
    Response::from_parts(parts, Body::from(text))
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    static SEED: LazyLock<u64> = LazyLock::new(|| std::collections::hash_map::RandomState::new().build_hasher().finish());
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let sane = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        !bytes.is_empty() && bytes.len() <= REQUEST_ID_CHARS_MAX && bytes.iter().all(allowed)
    };
    if let Some(given) = headers.get(REQUEST_ID).filter(sane) {
        return given.clone();
    }
    let id = format!("{:012x}{:08x}", *SEED >> 16, COUNT.fetch_add(1, Ordering::Relaxed));
    HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"))
}

fn guard(policy: Policy, request: &Request) -> Result<(), Refusal> {
    let Policy::Loopback = policy;
    let host = host(request.headers(), request.uri())?;
    if !is_loopback(host) {
        return Err(forbidden("this door answers only to loopback names: call it as http://127.0.0.1 or http://localhost with its port"));
    }
    if let Some(origin) = request.headers().get(ORIGIN) {
        let own = origin.to_str().ok().and_then(|text| text.strip_prefix("http://"));
        if !own.is_some_and(|authority| same_authority(authority, host)) {
            return Err(forbidden("a web page from another origin may not call this: open the page from the coordinator itself"));
        }
    }
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let elsewhere = request.headers().get(SEC_FETCH_SITE).is_some_and(|site| site != "same-origin" && site != "none");
    if changes && elsewhere {
        return Err(forbidden("a web page from another site may not change anything here"));
    }
    Ok(())
}

fn forbidden(detail: &str) -> Refusal {
    Refusal::new(Code::Forbidden, detail)
}

/// What the caller called us: the Host header and, where the request line names one too, the same there.
fn host<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Result<&'a str, Refusal> {
    let mut all = headers.get_all(HOST).iter();
    let header = all.next().and_then(|value| value.to_str().ok());
    let line = uri.authority().map(axum::http::uri::Authority::as_str);
    match (header, line) {
        _ if all.next().is_some() => Err(Refusal::new(Code::BadRequest, "the Host header is given twice")),
        (Some(header), Some(line)) if !same_authority(header, line) => {
            Err(Refusal::new(Code::BadRequest, "the Host header is not the URL's"))
        }
        (Some(host), _) | (None, Some(host)) => Ok(host),
        (None, None) => Err(Refusal::new(Code::BadRequest, "the Host header is missing")),
    }
}

fn same_authority(a: &str, b: &str) -> bool {
    let plain = |text: &str| text.strip_suffix(":80").unwrap_or(text).to_ascii_lowercase();
    plain(a) == plain(b)
}

fn is_loopback(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) => (name, port),
            None => return false,
        },
        None => host.find(':').map_or((host, ""), |colon| host.split_at(colon)),
    };
    let port_is_fine = port.is_empty() || port.strip_prefix(':').is_some_and(|digits| digits.parse::<u16>().is_ok());
    port_is_fine && (name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names_are_told_from_others() {
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "127.8.9.1:80", "[::1]", "[::1]:8000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "example.com",
            "localhost.example.com",
            "127.0.0.1.example.com",
            "10.0.0.1:8000",
            "[::2]:1",
            "[::1",
            "localhost:x",
            "0.0.0.0",
            "user@localhost",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
