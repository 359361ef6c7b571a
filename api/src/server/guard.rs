//! What every request passes on its way in and every answer on its way out: where it comes from, who calls and what they may, how often,
//! the audit log; a request id, a span, problems.
//!
//! Loopback is not private: any web page may send requests to it. So the Host must be a loopback name there (a rebound DNS name is not), an
//! Origin must be this very door's, and a browser that says it comes from elsewhere changes nothing (CONTRACT section 7). All doors are
//! guarded here and by the table in `access`: a handler can not forget to.

use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequestParts, MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use tracing::Instrument;

use super::Shared;
use super::access::{Access, Door, Needs};
use super::answer::{Attached, Refusal, for_status};
use super::peer::Peer;
use super::rate::{Limit, Rates};
use crate::auth::{AuditEntry, Caller, Role};
use crate::control::Agent;
use crate::ids::JobId;
use crate::join::{BadCertificate, BadJoin};
use crate::problem::{Code, Problem};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");
const BEARER: HeaderValue = HeaderValue::from_static("Bearer realm=\"everlit\"");
const NOSNIFF: HeaderValue = HeaderValue::from_static("nosniff");
/// Characters of an inbound request id at most.
const REQUEST_ID_CHARS_MAX: usize = 128;

/// Characters of an audit entry's target at most.
const TARGET_CHARS_MAX: usize = 512;

/// Who may call, and how often.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Only programs on this machine reach the doors: nothing but their names must be guarded, and calls without a token are not counted.
    pub loopback: bool,
    /// The doors end TLS themselves; where they do not and are open, something in front does.
    pub tls: bool,
    /// What a caller without a token may; `None`: nothing.
    pub anonymous: Option<Role>,
    /// This machine's own agent comes in here, with its secret.
    pub agents: bool,
    /// Requests of one token, or of one address without any.
    pub requests: Limit,
    /// Bad tokens from one address.
    pub bad_tokens: Limit,
}

impl Policy {
    /// Programs on this machine, without a token; web pages only when the coordinator serves them itself.
    pub fn loopback() -> Self {
        Self { loopback: true, anonymous: Some(Role::Admin), agents: true, ..Self::open() }
    }

    /// Everybody who has a token.
    pub fn open() -> Self {
        let requests = Limit { burst: 1_000.0, per_second: 200.0 };
        Self { loopback: false, tls: false, anonymous: None, agents: false, requests, bad_tokens: Limit { burst: 20.0, per_second: 0.2 } }
    }
}

/// The guard with what it remembers.
pub(super) struct Gate {
    policy: Policy,
    access: Access,
    control: Shared,
    requests: Rates<String>,
    bad_tokens: Rates<Option<IpAddr>>,
}

impl Gate {
    pub(super) fn new(policy: Policy, access: Access, control: Shared) -> Self {
        Self { policy, access, control, requests: Rates::new(policy.requests), bad_tokens: Rates::new(policy.bad_tokens) }
    }
}

/// The outermost layer.
pub(super) async fn doors(State(gate): State<std::sync::Arc<Gate>>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let span = tracing::debug_span!("request", id = id.to_str().unwrap_or_default(), %method, path);
    let started = Instant::now();
    let mut response = match gate.let_in(&mut request, &id).await {
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
    if problem.code == Code::Unauthorized {
        parts.headers.insert(WWW_AUTHENTICATE, BEARER);
    }
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

impl Gate {
    /// Whether a request may go on; it then carries its [`Caller`], where one is known.
    async fn let_in(&self, request: &mut Request, id: &HeaderValue) -> Result<(), Refusal> {
        come_from(self.policy, request)?;
        // A path that is not there, and a method that it does not take, are answered to anybody.
        let matched = request.extensions().get::<MatchedPath>();
        let Some(door) = matched.and_then(|path| self.access.door(request.method(), path.as_str())) else { return Ok(()) };
        let peer = request.extensions().get::<ConnectInfo<Peer>>().map(|ConnectInfo(peer)| *peer);
        let address = peer.map(|peer| peer.address.ip());
        let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        let (caller, decided) = match door.needs {
            Needs::Agent => match self.agent(peer) {
                Ok(agent) => {
                    let caller = node_caller(&agent);
                    request.extensions_mut().insert(agent);
                    (caller, Ok(()))
                }
                // Else whoever can reach the door could fill the audit log. Dialling is not in it, and a node that is expelled must hear so.
                Err(refusal) if changes => (None, Err(self.counted(refusal, address))),
                Err(refusal) => (None, Err(refusal)),
            },
            Needs::JoinToken => match self.join_token(request, address) {
                Ok(id) => (Some(Caller { token: Some(id), ..Caller::anonymous(Role::Viewer) }), Ok(())),
                Err(refusal) => (None, Err(refusal)),
            },
            // Where none is needed a missing token is nothing to count, and whatever came along is good.
            Needs::Nothing => match self.shown(request) {
                Ok(caller) => (Some(caller), Ok(())),
                Err(_) => (None, self.not_too_often(None, address)),
            },
            Needs::Role(least) => match self.caller(request, address) {
                Ok(caller) => {
                    let decided = self.may(&caller, least, door, request, address).await;
                    (Some(caller), decided)
                }
                Err(refusal) => (None, Err(refusal)),
            },
        };
        // What is refused for coming too often is not worth a line each: a flood would fill the disk with them.
        if changes && !decided.as_ref().is_err_and(|refusal| refusal.0.code == Code::RateLimited) {
            let entry = AuditEntry {
                user: caller.as_ref().and_then(|caller| caller.user.clone()),
                role: caller.as_ref().filter(|_| matches!(door.needs, Needs::Nothing | Needs::Role(_))).map(|caller| caller.role),
                token: caller.as_ref().and_then(|caller| caller.token.clone()),
                address: address.map(|ip| ip.to_string()),
                operation: door.operation.clone(),
                target: request.uri().to_string().chars().take(TARGET_CHARS_MAX).collect(),
                allowed: decided.is_ok(),
                request_id: id.to_str().unwrap_or_default().into(),
            };
            // It goes the same way as the change, before it: whatever is done is in the log no later.
            self.control.audit(entry).await?;
        }
        decided?;
        if let Some(caller) = caller {
            request.extensions_mut().insert(caller);
        }
        Ok(())
    }

    /// Who calls, by the token that is shown.
    fn caller(&self, request: &Request, address: Option<IpAddr>) -> Result<Caller, Refusal> {
        let known = self.shown(request);
        // A good token is let in whatever else comes from its address: many may share it.
        known.map_err(|refusal| self.counted(refusal, address))
    }

    /// A refusal of one who showed nothing good: so many from an address, and then another.
    fn counted(&self, refusal: Refusal, address: Option<IpAddr>) -> Refusal {
        match self.bad_tokens.take(address) {
            Ok(()) => refusal,
            Err(wait) => too_often("too many requests without a good token came from this address", wait),
        }
    }

    fn shown(&self, request: &Request) -> Result<Caller, Refusal> {
        let Some(shown) = bearer(request.headers()) else {
            let needed = "a token is needed: send the header `authorization: Bearer <token>`, or set EVERLIT_TOKEN for `everlit`";
            let role = self.policy.anonymous.ok_or_else(|| unauthorized(needed))?;
            // A page of any name that was turned to this address has no token, but a browser would send it here without one.
            if !self.policy.loopback && !self.policy.tls && !host(request.headers(), request.uri()).is_ok_and(is_address) {
                return Err(unauthorized("without a token this is called by its address, like http://10.0.0.5:8000, and by no name"));
            }
            return Ok(Caller::anonymous(role));
        };
        let token = shown.ok_or_else(|| unauthorized(ONE_BEARER))?;
        self.control.caller(token).map_err(|bad| unauthorized(bad.detail()))
    }

    /// Which agent calls: a node by the certificate of its connection, this machine's own by where it comes in.
    fn agent(&self, peer: Option<Peer>) -> Result<Agent, Refusal> {
        match peer.and_then(|peer| peer.certificate) {
            Some(certificate) => match self.control.node_of(&certificate) {
                Ok(node) => Ok(Agent::Node { node, certificate }),
                Err(bad) => Err(Refusal::new(if bad == BadCertificate::Expelled { Code::Expelled } else { Code::Forbidden }, bad.detail())),
            },
            None if self.policy.agents => Ok(Agent::Local),
            None => Err(forbidden("agents come in here with the certificate that they got when they joined: `everlit-agent join`")),
        }
    }

    fn join_token(&self, request: &Request, address: Option<IpAddr>) -> Result<String, Refusal> {
        let known = match bearer(request.headers()) {
            Some(Some(shown)) => self.control.join_token(shown).map_err(BadJoin::detail),
            Some(None) => Err(ONE_BEARER),
            None => Err("a join token is needed: `everlit node token create` makes one"),
        };
        known.map_err(|detail| self.counted(unauthorized(detail), address))
    }

    fn not_too_often(&self, caller: Option<&Caller>, address: Option<IpAddr>) -> Result<(), Refusal> {
        let token = caller.and_then(|caller| caller.token.clone());
        if token.is_none() && self.policy.loopback {
            return Ok(());
        }
        let who = token.unwrap_or_else(|| address.map(|ip| ip.to_string()).unwrap_or_default());
        self.requests.take(who).map_err(|wait| too_often("too many requests", wait))
    }

    async fn may(&self, caller: &Caller, least: Role, door: &Door, request: &mut Request, address: Option<IpAddr>) -> Result<(), Refusal> {
        self.not_too_often(Some(caller), address)?;
        if caller.role < least {
            let who = caller.user.as_deref().map_or_else(|| "a caller without a token".to_string(), |user| format!("`{user}`"));
            return Err(forbidden(&format!(
                "{who} is {} here, and this takes {least}: an admin can make a token for it",
                with_article(caller.role)
            )));
        }
        if let Some(user) = caller.only().filter(|_| door.of_job) {
            let job = job_of(request).await;
            // As if it were not there: that it is, is none of their business.
            if let Some(job) = job
                && !is_of(&self.control, job, user).await?
            {
                return Err(Refusal::new(Code::NotFound, format!("there is no job {job} of yours; GET /jobs lists them")));
            }
        }
        Ok(())
    }
}

/// Whether a job is a user's; one that is not there is nobody's.
pub(super) async fn is_of(control: &Shared, job: JobId, user: &str) -> Result<bool, Problem> {
    match control.job_user(job).await {
        Ok(whose) => Ok(whose.as_deref() == Some(user)),
        Err(problem) if problem.code == Code::NotFound => Ok(false),
        Err(problem) => Err(problem),
    }
}

const ONE_BEARER: &str = "the authorization header must be given once, as `authorization: Bearer <token>`";

/// What the one authorization header shows; `Some(None)`: it is another, or there are several; `None`: there is none.
pub(super) fn bearer(headers: &HeaderMap) -> Option<Option<&str>> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let value = all.next()?;
    let shown = value.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    Some(shown.filter(|_| all.next().is_none()))
}

/// A node in the audit log: no user has such a name.
fn node_caller(agent: &Agent) -> Option<Caller> {
    match agent {
        Agent::Local => None,
        Agent::Node { node, .. } => Some(Caller { user: Some(format!("node/{node}")), ..Caller::anonymous(Role::Viewer) }),
    }
}

fn with_article(role: Role) -> &'static str {
    match role {
        Role::Viewer => "a viewer",
        Role::User => "a user",
        Role::Operator => "an operator",
        Role::Admin => "an admin",
    }
}

/// The job that the path names; one that can not be read is no job of anybody's, and the door says so.
async fn job_of(request: &mut Request) -> Option<JobId> {
    let (mut parts, body) = std::mem::take(request).into_parts();
    let named = axum::extract::Path::<std::collections::HashMap<String, String>>::from_request_parts(&mut parts, &()).await;
    *request = Request::from_parts(parts, body);
    named.ok()?.get("id")?.parse().ok()
}

/// Where a request comes from, as far as browsers and names tell.
fn come_from(policy: Policy, request: &Request) -> Result<(), Refusal> {
    let host = host(request.headers(), request.uri())?;
    if policy.loopback && !is_loopback(host) {
        return Err(forbidden("this door answers only to loopback names: call it as http://127.0.0.1 or http://localhost with its port"));
    }
    if let Some(origin) = request.headers().get(ORIGIN) {
        let of_scheme = |text: &'_ str| match text.split_once("://")? {
            ("https", authority) if policy.tls || !policy.loopback => Some(authority.to_string()),
            ("http", authority) if !policy.tls => Some(authority.to_string()),
            _ => None,
        };
        let own = origin.to_str().ok().and_then(of_scheme);
        if !own.is_some_and(|authority| same_authority(&authority, host)) {
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

fn unauthorized(detail: &str) -> Refusal {
    Refusal::new(Code::Unauthorized, detail)
}

fn too_often(what: &str, wait: u64) -> Refusal {
    Problem::new(Code::RateLimited, format!("{what}: wait {wait} s")).retry_after(wait).into()
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
    let plain = |text: &str| text.strip_suffix(":80").or_else(|| text.strip_suffix(":443")).unwrap_or(text).to_ascii_lowercase();
    plain(a) == plain(b)
}

/// The name or address of a Host, without its port.
fn name_of(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => host.find(':').map_or((host, ""), |colon| host.split_at(colon)),
    };
    let port_is_fine = port.is_empty() || port.strip_prefix(':').is_some_and(|digits| digits.parse::<u16>().is_ok());
    port_is_fine.then_some(name)
}

fn is_loopback(host: &str) -> bool {
    let is = |name: &str| name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    name_of(host).is_some_and(is)
}

/// It is an address, which no web page can be of but one that is served there; loopback's own name is as good.
fn is_address(host: &str) -> bool {
    is_loopback(host) || name_of(host).is_some_and(|name| name.parse::<IpAddr>().is_ok())
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
