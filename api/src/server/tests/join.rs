//! How servers become nodes, at the doors: which certificate and which token opens what, and what is said to the others.

use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::StatusCode;
use serde_json::json;

use super::fake::{ADMIN, ALICE, full, join_token_of};
use super::{House, Policy, Reply, request};
use crate::server::{Limit, Peer};

const REQUEST: &str = "-----BEGIN CERTIFICATE REQUEST-----";

fn house() -> House {
    House::locked(Policy { bad_tokens: Limit { burst: 3.0, per_second: 0.01 }, ..Policy::open() })
}

impl House {
    async fn call_by(&self, certificate: Option<[u8; 32]>, bearer: Option<&str>, path: &str, body: &serde_json::Value) -> Reply {
        let peer = Peer { address: ([10, 0, 0, 7], 1).into(), certificate };
        let mut asked = request("POST", path).header("content-type", "application/json").extension(ConnectInfo(peer));
        if let Some(bearer) = bearer {
            asked = asked.header("authorization", format!("Bearer {bearer}"));
        }
        self.send(asked.body(Body::from(body.to_string())).expect("request")).await
    }

    fn doors_of_audit(&self) -> Vec<String> {
        let entries = std::mem::take(&mut *self.fake.audited.lock().expect("lock"));
        let line = |e: crate::auth::AuditEntry| format!("{:?} {:?} {:?} {} {}", e.user, e.role, e.token, e.operation, e.allowed);
        entries.into_iter().map(line).collect()
    }
}

#[tokio::test]
async fn a_server_joins_with_a_join_token_and_with_nothing_else() {
    let house = house();
    let body = json!({"node": "gpu-1", "request": REQUEST});
    let good = join_token_of(ADMIN);
    let reply = house.call_by(None, Some(&good), "/join", &body).await;
    assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text());
    assert_eq!(house.asked(), format!("join gpu-1 with {ADMIN}"));
    assert_eq!(house.doors_of_audit(), [format!("None None Some({ADMIN:?}) join_node true")], "by the token's id");
    let mut told = Vec::new();
    for bearer in [None, Some(full(ALICE)), Some(good[..40].to_string()), Some(join_token_of(ALICE))] {
        let reply = house.call_by(None, bearer.as_deref(), "/join", &body).await;
        told.push(format!("{} {}", reply.code(), reply.json()["detail"].as_str().expect("text").split(':').next().expect("a word")));
    }
    assert_eq!(
        told,
        [
            "unauthorized a join token is needed",
            "unauthorized this is not a join token",
            "unauthorized this is not a join token",
            "rate_limited too many requests without a good token came from this address",
        ]
    );
    assert_eq!(house.asked(), "");
    // A good one comes in from the same address, and a join token opens nothing else.
    assert_eq!(house.call_by(None, Some(&good), "/join", &body).await.status, StatusCode::CREATED);
    assert_eq!(house.call_by(None, Some(&good), "/jobs", &json!({})).await.code(), "rate_limited");
}

#[tokio::test]
async fn what_is_wrong_with_a_join_is_said_all_at_once() {
    let house = house();
    let good = join_token_of(ADMIN);
    let long = format!("{REQUEST}{}", "x".repeat(9_000));
    for (body, pointers) in [
        (json!({"node": "a/b", "request": "x"}), vec!["/node", "/request"]),
        (json!({"request": REQUEST}), vec!["/node"]),
        (json!({"node": "a", "request": long}), vec!["/request"]),
        (json!({"node": "a", "request": REQUEST, "role": "admin"}), vec!["/role"]),
    ] {
        let reply = house.call_by(None, Some(&good), "/join", &body).await;
        let errors = reply.json()["errors"].as_array().cloned().unwrap_or_default();
        let found: Vec<_> = errors.iter().map(|e| e["pointer"].as_str().expect("a pointer").to_string()).collect();
        assert_eq!((reply.code().as_str(), found), ("invalid", pointers.iter().map(ToString::to_string).collect()), "{body}");
    }
    let admin = full(ADMIN);
    let reply = house.call_by(None, Some(&admin), "/join-tokens", &json!({"ttl": "1s", "uses": 0, "node": "-"})).await;
    assert_eq!(reply.json()["errors"].as_array().expect("errors").len(), 3, "{}", reply.text());
    assert_eq!(house.asked(), "");
    let reply = house.call_by(None, Some(&admin), "/join-tokens", &json!({"ttl": "2h", "uses": 3, "node": "n"})).await;
    assert_eq!(reply.status, StatusCode::CREATED);
    assert_eq!(house.asked(), "NewNodeToken { ttl: Millis(7200000), uses: 3, node: Some(NodeId(\"n\")) }");
}

#[tokio::test]
async fn a_certificate_is_renewed_by_the_node_that_shows_it() {
    let house = house();
    let body = json!({"request": REQUEST});
    let reply = house.call_by(Some([1; 32]), None, "/join/renew", &body).await;
    assert_eq!((reply.status, house.asked().as_str()), (StatusCode::OK, "renew a"));
    assert_eq!(house.doors_of_audit(), ["Some(\"node/a\") None None renew_certificate true"]);
    for (certificate, part) in [(Some([2; 32]), "expelled"), (Some([3; 32]), "no node here"), (None, "everlit-agent join")] {
        // An admin's token is no certificate.
        let reply = house.call_by(certificate, Some(&full(ADMIN)), "/join/renew", &body).await;
        assert_eq!(reply.code(), if part == "expelled" { "expelled" } else { "forbidden" });
        assert!(reply.text().contains(part), "{}", reply.text());
    }
    assert_eq!(house.asked(), "");
    // A flood of them is slowed, and is not in the audit log; who has a good one is let in all the same.
    house.doors_of_audit();
    assert_eq!(house.call_by(None, None, "/join/renew", &body).await.code(), "rate_limited");
    assert_eq!(house.doors_of_audit(), Vec::<String>::new());
    assert_eq!(house.call_by(Some([1; 32]), None, "/join/renew", &body).await.status, StatusCode::OK);
    // A certificate opens the agents' doors only.
    let other = self::house();
    assert_eq!(other.call_by(Some([1; 32]), None, "/jobs", &json!({})).await.code(), "unauthorized");
    let local = House::new();
    let reply = local.call("POST", "/join/renew", &body.to_string()).await;
    assert!(reply.code() == "forbidden" && reply.text().contains("has no certificate"));
}
