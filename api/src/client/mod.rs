//! The typed client of the REST API: one method per call, problems decoded, streams that survive a restart of the coordinator.
//!
//! It knows the words and HTTP, nothing of a terminal. The trap is a proxy from the environment: loopback never goes through one.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::problem::Problem;

mod calls;
mod follow;
mod sse;

pub use calls::{ListRequest, LogRequest, LogText};
pub use follow::{EventNews, EventStream, LogNews, LogStream};

/// Where a coordinator listens unless told otherwise.
pub const DEFAULT_URL: &str = "http://127.0.0.1:8000";

const CONNECT_MAX: Duration = Duration::from_secs(5);
/// For an answer that needs no waiting on ranks.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// For an answer that may wait for ranks to end with their grace.
const PATIENT_MAX: Duration = Duration::from_secs(3_900);

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The coordinator refused it.
    #[error("{}", told(.0))]
    Problem(Box<Problem>),
    /// Nobody listens there.
    #[error("no coordinator answers at {url} ({why}): start one with `everlit up`, or say where it is with --url or EVERLIT_URL")]
    Unreachable {
        /// The base URL.
        url: String,
        /// What the system said.
        why: String,
    },
    /// The connection broke, or what came is not what a coordinator says.
    #[error("{0}")]
    Broken(String),
}

impl Error {
    /// The problem, when the coordinator refused.
    pub fn problem(&self) -> Option<&Problem> {
        if let Self::Problem(problem) = self { Some(problem) } else { None }
    }
}

fn told(problem: &Problem) -> String {
    let mut text = problem.to_string();
    if problem.errors.len() > 1 || problem.errors.iter().any(|fault| !problem.detail.contains(&fault.detail)) {
        for fault in &problem.errors {
            text.push_str(&format!("\n  {} {}", fault.pointer, fault.detail));
        }
    }
    text
}

/// A client of one coordinator.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<String>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the coordinator at `base`, like [`DEFAULT_URL`]; nothing is sent yet. With `ca` (PEM) its certificate must be of that CA,
    /// else of one that this machine trusts.
    pub fn new(base: &str, token: Option<String>, ca: Option<&[u8]>) -> Result<Self, Error> {
        let bad = |why: String| Error::Broken(format!("`{base}` is not the URL of a coordinator: {why}; write it like {DEFAULT_URL}"));
        let url = reqwest::Url::parse(base).map_err(|error| bad(error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(bad(format!("it speaks http and https, not {}", url.scheme())));
        }
        // Already there is as good: it is one of a process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut http = reqwest::Client::builder().connect_timeout(CONNECT_MAX).user_agent(concat!("everlit/", env!("CARGO_PKG_VERSION")));
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        if host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
            http = http.no_proxy();
        }
        if let Some(pem) = ca {
            let roots = reqwest::Certificate::from_pem_bundle(pem).ok().filter(|roots| !roots.is_empty());
            http = http.tls_certs_only(roots.ok_or_else(|| Error::Broken("the CA file has no certificate in PEM in it".into()))?);
        } else if url.scheme() == "http" {
            // No machine needs certificates for it.
            http = http.tls_certs_only(Vec::new());
        }
        let http = http.build().map_err(|error| Error::Broken(innermost(&error)))?;
        Ok(Self { http, base: base.trim_end_matches('/').into(), token: token.filter(|token| !token.is_empty()) })
    }

    /// The base URL.
    pub fn url(&self) -> &str {
        &self.base
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    fn post<T: Serialize>(&self, path: &str, body: &T) -> RequestBuilder {
        self.request(Method::POST, path).json(body)
    }

    /// Sends, and turns an error answer into its problem.
    async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let response = request.send().await.map_err(|error| self.broken(&error))?;
        let status = response.status();
        if status.is_client_error() || status.is_server_error() { Err(self.refused(status, response).await) } else { Ok(response) }
    }

    async fn refused(&self, status: StatusCode, response: Response) -> Error {
        let body = response.bytes().await.unwrap_or_default();
        match serde_json::from_slice(&body) {
            Ok(problem) => Error::Problem(problem),
            Err(_) => Error::Broken(format!("{} answered {status} without a problem: is it a coordinator?", self.base)),
        }
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, Error> {
        self.json_within(request, ANSWER_MAX).await
    }

    async fn json_within<T: DeserializeOwned>(&self, request: RequestBuilder, most: Duration) -> Result<T, Error> {
        let body = self.send(request.timeout(most)).await?.bytes().await.map_err(|error| self.broken(&error))?;
        serde_json::from_slice(&body).map_err(|bad| Error::Broken(format!("{} answered what this client can not read: {bad}", self.base)))
    }

    async fn text(&self, request: RequestBuilder) -> Result<String, Error> {
        self.send(request.timeout(ANSWER_MAX)).await?.text().await.map_err(|error| self.broken(&error))
    }

    fn broken(&self, error: &reqwest::Error) -> Error {
        let why = innermost(error);
        if error.is_connect() && self.base.starts_with("https") && why.contains("ertificate") {
            let remedy = "with a CA of the coordinator's own, give its ca/ca.pem as --ca-file or EVERLIT_CA_FILE";
            return Error::Broken(format!("the certificate of {} is not one to trust ({why}): {remedy}", self.base));
        }
        if error.is_connect() {
            return Error::Unreachable { url: self.base.clone(), why };
        }
        let what = if error.is_timeout() { "took too long" } else { "broke the connection" };
        Error::Broken(format!("the coordinator at {} {what}: {why}", self.base))
    }
}

/// What lies at the bottom of an error, like `connection refused`.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(next) = inner.source() {
        inner = next;
    }
    inner.to_string()
}

/// A text as one segment of a path.
fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
