//! Who may what, every role at every door; and tokens that open nothing.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::StatusCode;
use expect_test::expect;

use super::fake::{ADMIN, ALICE, BOB, EXPIRED, OPERATOR, REVOKED, VIEWER, full, id};
use super::{House, Policy, Reply, request};
use crate::auth::Role;
use crate::server::Limit;

/// Open doors without any limit that a test would meet.
fn policy() -> Policy {
    let much = Limit { burst: 1e9, per_second: 1.0 };
    Policy { requests: much, bad_tokens: much, ..Policy::open() }
}

impl House {
    async fn call_as(&self, token: Option<&str>, method: &str, path: &str, body: &str) -> Reply {
        let mut request = request(method, path).header("host", "coordinator.example:8000");
        request.headers_mut().expect("headers").remove("host");
        request = request.header("host", "coordinator.example:8000");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        self.send(request.body(Body::from(body.to_string())).expect("request")).await
    }

    fn audited(&self) -> Vec<String> {
        let entries = std::mem::take(&mut *self.fake.audited.lock().expect("lock"));
        let line = |entry: crate::auth::AuditEntry| {
            let role = entry.role.map_or("nobody", Role::as_str);
            let allowed = if entry.allowed { "let in" } else { "refused" };
            format!("{} ({role}) {} {} {allowed}", entry.user.as_deref().unwrap_or("-"), entry.operation, entry.target)
        };
        entries.into_iter().map(line).collect()
    }
}

/// Every operation of the document, with a path and a body that would do.
async fn operations(house: &House) -> BTreeMap<String, (String, String, String, String)> {
    let document = house.call_as(Some(&full(ADMIN)), "GET", "/openapi.json", "").await.json();
    let mut all = BTreeMap::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("an item") {
            let name = match path.split('/').nth(1) {
                Some("nodes") => "a".into(),
                Some("tokens" | "join-tokens") => ADMIN.into(),
                Some("packages" | "agent") => "aa".repeat(32),
                _ => id().to_string(),
            };
            let concrete = path.replace("{n}", "1").replace("{id}", &name).replace("{file}", "index.html");
            let body = match path.as_str() {
                "/jobs/purge" => r#"{"older_than": "0s"}"#,
                "/tokens" if method == "post" => r#"{"user": "eve", "role": "viewer"}"#,
                _ => "",
            };
            let role = operation["x-role"].as_str().expect("every operation says who may").to_string();
            let name = operation["operationId"].as_str().expect("an id").to_string();
            all.insert(name, (method.to_uppercase(), concrete, body.to_string(), role));
        }
    }
    all
}

#[tokio::test]
async fn the_table_says_who_may_what() {
    let house = House::locked(policy());
    let mut rows: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (operation, (.., role)) in operations(&house).await {
        rows.entry(role).or_default().push(operation);
    }
    let text: String = rows.iter().map(|(role, operations)| format!("{role}: {}\n", operations.join(" "))).collect();
    expect![[r#"
        admin: create_join_token create_token expel_node list_audit list_join_tokens list_tokens revoke_join_token revoke_token
        agent: agent_link fetch_package renew_certificate
        join token: join_node
        none: health livez readyz status
        operator: cordon_node drain_node purge_jobs uncordon_node
        user: checkpoint_job delete_job get_package put_package restart_job stop_job submit_job
        viewer: docs docs_file explain_job get_job get_logs get_node get_postmortem get_summary list_attempts list_checkpoints list_events list_jobs list_metrics list_nodes list_summaries metrics openapi stream_events stream_job_events stream_logs whoami
    "#]].assert_eq(&text);
}

/// Each cell: a role at a door. What is let in reaches the control or is answered by the door itself; what is not, reaches nothing.
#[tokio::test]
async fn every_role_at_every_door() {
    let house = House::locked(policy());
    house.fake.log.lock().expect("lock").push(crate::control::LogItem::End(crate::status::JobState::Failed));
    let callers = [
        ("none", None, None),
        ("viewer", Some(VIEWER), Some(Role::Viewer)),
        ("alice", Some(ALICE), Some(Role::User)),
        ("bob", Some(BOB), Some(Role::User)),
        ("operator", Some(OPERATOR), Some(Role::Operator)),
        ("admin", Some(ADMIN), Some(Role::Admin)),
        ("expired", Some(EXPIRED), None),
        ("revoked", Some(REVOKED), None),
    ];
    let mut cells = 0;
    for (operation, (method, path, body, needs)) in operations(&house).await {
        for (name, token, role) in callers {
            for prefix in ["", "/api/v1"] {
                house.asked();
                house.audited();
                let reply = house.call_as(token.map(full).as_deref(), &method, &format!("{prefix}{path}"), &body).await;
                let least = Role::ALL.into_iter().find(|role| role.as_str() == needs);
                let expected = match (needs.as_str(), role, least) {
                    ("none", ..) => None,
                    // It is known by a secret of its own.
                    ("agent", ..) => Some(StatusCode::FORBIDDEN),
                    // Nobody's token is one that servers join with.
                    ("join token", ..) => Some(StatusCode::UNAUTHORIZED),
                    (_, None, _) => Some(StatusCode::UNAUTHORIZED),
                    (_, Some(role), Some(least)) if role < least => Some(StatusCode::FORBIDDEN),
                    // Alice's job is not there for Bob.
                    _ if name == "bob" && path.contains("/jobs/") && !path.contains("/jobs/summaries") => Some(StatusCode::NOT_FOUND),
                    _ => None,
                };
                let cell =
                    format!("{name} at {operation}: {} {}", reply.status, if expected.is_some() { reply.text() } else { String::new() });
                match expected {
                    Some(status) => {
                        assert_eq!(reply.status, status, "{cell}");
                        assert_eq!(house.asked(), "", "{cell}");
                        reply.code();
                    }
                    None => assert!(!matches!(reply.status.as_u16(), 401 | 403 | 404 | 500..), "{cell}"),
                }
                assert_eq!(reply.header("www-authenticate").is_empty(), reply.status != StatusCode::UNAUTHORIZED, "{cell}");
                let audited = house.audited();
                let changes = method != "GET";
                assert_eq!(audited.len(), usize::from(changes), "{cell}: {audited:?}");
                if let [one] = audited.as_slice() {
                    assert!(one.contains(&format!("{operation} {prefix}{path}")), "{cell}: {one}");
                    assert_eq!(one.ends_with("let in"), expected.is_none(), "{cell}: {one}");
                }
                cells += 1;
            }
        }
    }
    assert_eq!(cells, 48 * 8 * 2);
}

#[tokio::test]
async fn a_user_sees_and_makes_only_what_is_its_own() {
    let house = House::locked(policy());
    let alice = full(ALICE);
    house.call_as(Some(&alice), "GET", "/jobs?user=bob", "").await;
    assert!(house.asked().contains("user: Some(\"alice\")"), "a filter opens nothing");
    house.call_as(Some(&full(VIEWER)), "GET", "/jobs?user=bob", "").await;
    assert!(house.asked().contains("user: Some(\"bob\")"));
    house.call_as(Some(&alice), "GET", "/events/stream", "").await;
    assert!(house.asked().contains("user: Some(\"alice\")"));
    house.call_as(Some(&alice), "POST", "/jobs", "{}").await;
    assert_eq!(house.asked(), "submit world 1 of alice");
    // Her job's weights are not for him to go on with.
    let resume = format!(r#"{{"resume_from": "{}"}}"#, id());
    let reply = house.call_as(Some(&full(BOB)), "POST", "/jobs", &resume).await;
    assert_eq!((reply.status, house.asked().as_str()), (StatusCode::NOT_FOUND, ""));
    let resume = format!(r#"{{"resume_from": "{}", "command": ["x"]}}"#, id());
    assert_eq!(house.call_as(Some(&full(BOB)), "POST", "/jobs", &resume).await.status, StatusCode::NOT_FOUND, "nor for a program of his");
    let (hers, nobodys) = (id().to_string(), crate::ids::JobId::from_parts(1, 1).to_string());
    let told = |reply: Reply, id: &str| reply.json()["detail"].as_str().expect("text").replace(id, "ID");
    let seen = told(house.call_as(Some(&full(BOB)), "GET", &format!("/jobs/{hers}"), "").await, &hers);
    assert_eq!(
        seen,
        told(house.call_as(Some(&full(BOB)), "GET", &format!("/jobs/{nobodys}"), "").await, &nobodys),
        "what is not his is not there"
    );
    house.asked();
    let unknown = format!(r#"{{"resume_from": "{}"}}"#, crate::ids::JobId::from_parts(1, 1));
    assert_eq!(house.call_as(Some(&full(BOB)), "POST", "/jobs", &unknown).await.status, StatusCode::NOT_FOUND);
    assert_eq!(house.call_as(Some(&alice), "POST", "/jobs", &resume).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn tokens_that_open_nothing_are_told_why() {
    let house = House::locked(policy());
    let whole = full(ADMIN);
    let other = whole.replace("00112233", "99112233");
    let mut told = String::new();
    for token in [&whole[..40], "", "agent-secret", other.as_str(), &full(EXPIRED), &full(REVOKED)] {
        let reply = house.call_as(Some(token), "GET", "/jobs", "").await;
        assert_eq!((reply.status, reply.header("www-authenticate")), (StatusCode::UNAUTHORIZED, "Bearer realm=\"everlit\""));
        assert!(!reply.text().contains("00112233445566"), "no secret in an answer");
        told.push_str(&format!("{}\n", reply.json()["detail"].as_str().expect("text")));
    }
    for headers in [vec!["Basic YTpi"], vec!["Bearer"], vec![&whole[..]], vec!["Bearer x", "Bearer y"]] {
        let mut request = request("GET", "/jobs");
        for value in headers {
            request = request.header("authorization", value);
        }
        let reply = house.send(request.body(Body::empty()).expect("request")).await;
        assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
        told.push_str(&format!("{}\n", reply.json()["detail"].as_str().expect("text")));
    }
    let nothing = house.call_as(None, "GET", "/jobs", "").await;
    told.push_str(&format!("{}\n", nothing.json()["detail"].as_str().expect("text")));
    expect![[r#"
        this is not a token of everlit: it is `everlit_`, 12 and 64 hexadecimal characters; was it cut off when it was copied?
        this is not a token of everlit: it is `everlit_`, 12 and 64 hexadecimal characters; was it cut off when it was copied?
        this is not a token of everlit: it is `everlit_`, 12 and 64 hexadecimal characters; was it cut off when it was copied?
        this token is not known here: is it for another coordinator? an admin makes one with `everlit token create`
        this token has expired: an admin makes another with `everlit token create`
        this token was revoked: an admin makes another with `everlit token create`
        the authorization header must be given once, as `authorization: Bearer <token>`
        the authorization header must be given once, as `authorization: Bearer <token>`
        the authorization header must be given once, as `authorization: Bearer <token>`
        the authorization header must be given once, as `authorization: Bearer <token>`
        a token is needed: send the header `authorization: Bearer <token>`, or set EVERLIT_TOKEN for `everlit`
    "#]]
    .assert_eq(&told);
    assert_eq!(house.asked(), "");
}

#[tokio::test]
async fn a_token_counts_on_loopback_too() {
    let house = House::new();
    let at = |token: Option<&str>, method: &str, path: &str| {
        let request = request(method, path);
        let request = token.into_iter().fold(request, |request, token| request.header("authorization", format!("Bearer {}", full(token))));
        request.body(Body::empty()).expect("request")
    };
    let stop = format!("/jobs/{}/stop", id());
    assert_eq!(house.send(at(None, "POST", &stop)).await.status, StatusCode::OK);
    assert_eq!(house.send(at(Some(VIEWER), "POST", &stop)).await.status, StatusCode::FORBIDDEN);
    assert_eq!(house.send(at(Some(EXPIRED), "POST", &stop)).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(house.send(at(None, "GET", "/whoami")).await.json()["role"], "admin");
    // Doors with a role for whoever has no token.
    let house = House::locked(Policy { anonymous: Some(Role::Viewer), tls: true, ..policy() });
    assert_eq!(house.call_as(None, "GET", "/jobs", "").await.status, StatusCode::OK);
    let reply = house.call_as(None, "POST", &stop, "").await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::FORBIDDEN, "forbidden"));
    assert_eq!(house.audited(), [format!("- (viewer) stop_job {stop} refused")]);
    // A page of any name that was turned to this address is no caller; one with a token is.
    let house = House::locked(Policy { anonymous: Some(Role::Operator), ..policy() });
    let named = |host: &str, token: Option<&str>| {
        let asked = axum::http::Request::builder().uri("/jobs").header("host", host);
        let asked = token.into_iter().fold(asked, |asked, token| asked.header("authorization", format!("Bearer {}", full(token))));
        asked.body(Body::empty()).expect("request")
    };
    assert_eq!(house.send(named("evil.example:8000", None)).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(house.send(named("evil.example:8000", Some(VIEWER))).await.status, StatusCode::OK);
    for address in ["10.0.0.5:8000", "[fd00::1]:8000", "localhost"] {
        assert_eq!(house.send(named(address, None)).await.status, StatusCode::OK, "{address}");
    }
    let house = House::locked(Policy { anonymous: Some(Role::Viewer), tls: true, ..policy() });
    assert_eq!(house.send(named("a.example", None)).await.status, StatusCode::OK, "a certificate names it");
    // And a user without a name has no jobs.
    let house = House::locked(Policy { anonymous: Some(Role::User), tls: true, ..policy() });
    assert_eq!(house.call_as(None, "GET", &format!("/jobs/{}", id()), "").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn without_a_token_the_status_is_short() {
    let house = House::locked(policy());
    let keys = |reply: &Reply| reply.json().as_object().expect("an object").keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(keys(&house.call_as(None, "GET", "/status", "").await), "auth leader uptime_seconds version");
    assert_eq!(keys(&house.call_as(Some(&full(EXPIRED)), "GET", "/status", "").await), "auth leader uptime_seconds version");
    let all = keys(&house.call_as(Some(&full(VIEWER)), "GET", "/status", "").await);
    assert!(all.contains("jobs") && all.contains("nodes"), "{all}");
}

#[tokio::test]
async fn who_asks_too_often_waits() {
    let house = House::locked(Policy { requests: Limit { burst: 3.0, per_second: 0.01 }, ..policy() });
    for _ in 0..3 {
        assert_eq!(house.call_as(Some(&full(ALICE)), "GET", "/jobs", "").await.status, StatusCode::OK);
    }
    let reply = house.call_as(Some(&full(ALICE)), "GET", "/jobs", "").await;
    assert_eq!((reply.status, reply.code().as_str(), reply.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, "rate_limited", "100"));
    assert_eq!(house.call_as(Some(&full(BOB)), "GET", "/jobs", "").await.status, StatusCode::OK, "others are not held up");
    // Guessing is slow.
    let house = House::locked(Policy { bad_tokens: Limit { burst: 2.0, per_second: 0.01 }, ..policy() });
    let guess = full("0000000000ff");
    for _ in 0..2 {
        assert_eq!(house.call_as(Some(&guess), "GET", "/jobs", "").await.status, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(house.call_as(Some(&guess), "GET", "/jobs", "").await.status, StatusCode::TOO_MANY_REQUESTS);
    house.audited();
    for _ in 0..9 {
        assert_eq!(house.call_as(None, "POST", "/jobs", "{}").await.status, StatusCode::TOO_MANY_REQUESTS);
    }
    assert_eq!(house.audited().len(), 0, "a flood fills no disk");
    assert_eq!(house.call_as(None, "GET", "/health", "").await.status, StatusCode::OK);
    assert_eq!(
        house.call_as(Some(&full(ALICE)), "GET", "/jobs", "").await.status,
        StatusCode::OK,
        "who has a token is not locked out by who guesses"
    );
}

#[tokio::test]
async fn a_token_is_made_from_a_whole_wish_or_not_at_all() {
    let house = House::locked(policy());
    let admin = full(ADMIN);
    let made = house.call_as(Some(&admin), "POST", "/tokens", r#"{"user": "eve", "role": "user", "ttl": "1h"}"#).await;
    assert_eq!(
        (made.status, made.json()["token"].as_str().is_some(), made.json()["created_by"].as_str()),
        (StatusCode::CREATED, true, Some("ada"))
    );
    assert_eq!(house.asked(), "NewToken { user: \"eve\", role: User, ttl: Millis(3600000) }");
    let listed = house.call_as(Some(&admin), "GET", "/tokens", "").await.json();
    assert!(listed["data"][0].get("token").is_none(), "a secret is shown once");
    let mut told = String::new();
    for body in [
        "{}",
        r#"{"user": "a b", "role": "root", "ttl": "1s"}"#,
        r#"{"user": 1, "role": "user", "ttl": 5}"#,
        r#"{"user": "a", "role": "user", "name": "x"}"#,
    ] {
        let reply = house.call_as(Some(&admin), "POST", "/tokens", body).await;
        assert_eq!(reply.status, StatusCode::UNPROCESSABLE_ENTITY);
        for fault in reply.json()["errors"].as_array().expect("faults") {
            told.push_str(&format!("{} {}\n", fault["pointer"].as_str().expect("text"), fault["detail"].as_str().expect("text")));
        }
    }
    expect![[r#"
        /user must be a name of 1 to 64 letters, digits, ".", "_", "-" or "@"
        /role must be one of "viewer", "user", "operator", "admin"
        /user must be a name of 1 to 64 letters, digits, ".", "_", "-" or "@"
        /role must be one of "viewer", "user", "operator", "admin"
        /ttl must be from "1m" to "3650d"
        /user must be a name of 1 to 64 letters, digits, ".", "_", "-" or "@"
        /ttl must be a duration with its unit in quotes, like "90d"
        /name is not a known field: known are user, role, ttl
    "#]]
    .assert_eq(&told);
    assert_eq!(house.asked(), "");
}
