//! The doors before a fake of whoever is in control: what passes, what is refused and how, and every byte of a stream.

mod access;
#[cfg(feature = "client")]
mod client;
mod document;
mod fake;
mod jobs;
mod join;
mod link;
mod packages;
mod refusals;
mod streams;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

use super::{Policy, router};
use fake::Fake;

/// The doors and what is behind them.
struct House {
    fake: Arc<Fake>,
    doors: Router,
}

/// An answer, read to its end.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|bad| panic!("{bad}: {}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().expect("ASCII"))
    }

    /// The problem's code, after checking that it is one in full.
    fn code(&self) -> String {
        assert_eq!(self.header("content-type"), "application/problem+json", "{}", self.text());
        let problem = self.json();
        assert_eq!(problem["type"], "about:blank");
        assert_eq!(problem["status"], self.status.as_u16());
        assert_eq!(problem["request_id"], self.header("x-request-id"));
        assert!(!problem["detail"].as_str().expect("detail").is_empty() && !problem["title"].as_str().expect("title").is_empty());
        problem["code"].as_str().expect("code").into()
    }
}

impl House {
    fn new() -> Self {
        let fake = Arc::new(Fake::default());
        Self { doors: router(fake.clone(), Policy::loopback()), fake }
    }

    /// Doors that demand a token.
    fn locked(policy: Policy) -> Self {
        let fake = Arc::new(Fake::default());
        Self { doors: router(fake.clone(), policy), fake }
    }

    async fn send(&self, request: Request<Body>) -> Reply {
        let answer = self.doors.clone().oneshot(request).await.expect("infallible");
        let (parts, body) = answer.into_parts();
        let body = body.collect().await.expect("a whole body").to_bytes().to_vec();
        Reply { status: parts.status, headers: parts.headers, body }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(request("GET", path).body(Body::empty()).expect("request")).await
    }

    async fn call(&self, method: &str, path: &str, body: &str) -> Reply {
        let mut request = request(method, path);
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        self.send(request.body(Body::from(body.to_string())).expect("request")).await
    }

    /// What was asked of the control since the last look.
    fn asked(&self) -> String {
        std::mem::take(&mut *self.fake.asked.lock().expect("lock")).join("\n")
    }
}

fn request(method: &str, path: &str) -> axum::http::request::Builder {
    Request::builder().method(method).uri(path).header("host", "127.0.0.1:8000")
}
