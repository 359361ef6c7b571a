use axum::body::Body;
use axum::http::StatusCode;
use expect_test::expect;

use super::fake::id;
use super::{House, request};
use crate::job::BODY_BYTES_MAX;

#[tokio::test]
async fn unknown_paths_and_methods_are_problems() {
    let house = House::new();
    for path in ["/", "/nothing", "/v1/models", "/models", "/jobs/", "/api/v1", "/api/v1/nothing", "/api/v2/jobs", "/docs/no-such-file.js"]
    {
        let reply = house.get(path).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::NOT_FOUND, "not_found"), "{path}");
    }
    let reply = house.call("POST", &format!("/jobs/{}/scale", id()), "{}").await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::NOT_FOUND, "not_found"));
    for (method, path, allow) in [
        ("PUT", "/jobs", "GET,HEAD,POST"),
        ("PATCH", "/api/v1/jobs", "GET,HEAD,POST"),
        ("GET", "/jobs/purge", "POST"),
        ("DELETE", "/health", "GET,HEAD"),
    ] {
        let reply = house.call(method, path, "").await;
        assert_eq!(
            (reply.status, reply.code().as_str(), reply.header("allow")),
            (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", allow),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn unknown_ids_are_404_everywhere() {
    let house = House::new();
    let other = crate::ids::JobId::from_parts(1, 1).to_string();
    for bad in ["nonsense", "%2e%2e", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "%ff", other.as_str()] {
        for rest in ["", "/summary", "/logs", "/logs/stream", "/attempts", "/attempts/1/postmortem", "/checkpoints", "/metrics", "/explain"]
        {
            let reply = house.get(&format!("/jobs/{bad}{rest}")).await;
            assert_eq!((reply.status, reply.code().as_str()), (StatusCode::NOT_FOUND, "not_found"), "{bad}{rest}");
        }
        assert_eq!(house.call("POST", &format!("/jobs/{bad}/stop"), "").await.code(), "not_found");
        assert_eq!(house.call("DELETE", &format!("/jobs/{bad}"), "").await.code(), "not_found");
    }
}

#[tokio::test]
async fn bodies_that_can_not_be_read_are_refused() {
    let house = House::new();
    let post = |body: Vec<u8>, kind: &str| request("POST", "/jobs").header("content-type", kind).body(Body::from(body)).expect("request");
    let reply = house.send(post(b"{\n  \"world_size\": }".to_vec(), "application/json")).await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::BAD_REQUEST, "invalid_json"));
    expect!["line 2, column 17: expected value"].assert_eq(reply.json()["detail"].as_str().expect("text"));
    for bad in [b"{".to_vec(), b"{} x".to_vec(), b"\xff".to_vec(), b"NaN".to_vec(), vec![b'['; 100_000]] {
        assert_eq!(house.send(post(bad, "application/json")).await.code(), "invalid_json");
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"] {
        let reply = house.send(post(b"{}".to_vec(), kind)).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"), "{kind}");
    }
    let without = request("POST", "/jobs").body(Body::from("{}")).expect("request");
    assert_eq!(house.send(without).await.code(), "unsupported_media_type");
    for kind in ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"] {
        assert_eq!(house.send(post(b"{}".to_vec(), kind)).await.status, StatusCode::CREATED, "{kind}");
    }
    let mut large = vec![b' '; BODY_BYTES_MAX - 2];
    large.extend_from_slice(b"{}");
    assert_eq!(house.send(post(large.clone(), "application/json")).await.status, StatusCode::CREATED);
    large.push(b' ');
    let reply = house.send(post(large, "application/json")).await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"));
}

#[tokio::test]
async fn faults_of_a_job_are_listed() {
    let house = House::new();
    let reply = house.call("POST", "/jobs", r#"{"world_size": 0, "nam": "x"}"#).await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::UNPROCESSABLE_ENTITY, "invalid"));
    expect![[r#"{"code":"invalid","detail":"2 faults: see `errors`","errors":[{"detail":"must be a whole number from 1 to 65536","pointer":"/world_size"},{"detail":"is not a known field: did you mean `name`?","pointer":"/nam"}],"request_id":"-","status":422,"title":"the request has faults","type":"about:blank"}"#]]
        .assert_eq(&reply.json().to_string().replace(reply.header("x-request-id"), "-"));
    let not_built = house.call("POST", "/jobs", r#"{"image": "x"}"#).await;
    assert_eq!(not_built.code(), "not_supported");
    let both = house.call("POST", "/jobs", r#"{"image": "x", "world_size": 0}"#).await;
    assert_eq!(both.code(), "invalid");
    let dry = house.call("POST", "/jobs?dry_run=true", r#"{"world_size": 0}"#).await;
    assert_eq!(dry.code(), "invalid");
    assert_eq!(house.asked(), "");
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let reply = House::new().call("POST", "/jobs", r#"{"name": "full"}"#).await;
    assert_eq!((reply.status, reply.code().as_str(), reply.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, "queue_full", "7"));
}

#[tokio::test]
async fn a_panic_is_a_problem() {
    let reply = House::new().call("POST", "/jobs", r#"{"name": "panic"}"#).await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::INTERNAL_SERVER_ERROR, "internal"));
}

#[tokio::test]
async fn request_ids_are_taken_over_when_sane() {
    let house = House::new();
    let with = |id: &str| request("GET", "/health").header("x-request-id", id).body(Body::empty()).expect("request");
    assert_eq!(house.send(with("abc-1.2_3")).await.header("x-request-id"), "abc-1.2_3");
    let long = "x".repeat(129);
    for bad in ["a b", "", "<script>", long.as_str()] {
        let reply = house.send(with(bad)).await;
        assert_ne!(reply.header("x-request-id"), bad);
        assert_eq!(reply.header("x-request-id").len(), 20);
    }
    assert_ne!(house.get("/health").await.header("x-request-id"), house.get("/health").await.header("x-request-id"));
}

#[tokio::test]
async fn web_pages_from_elsewhere_are_kept_out() {
    let house = House::new();
    let ask = |method: &str, host: &str, name: &str, value: &str| {
        let mut request =
            axum::http::Request::builder().method(method).uri("/jobs").header("host", host).header("content-type", "application/json");
        if !name.is_empty() {
            request = request.header(name, value);
        }
        request.body(Body::from(if method == "POST" { "{}" } else { "" })).expect("request")
    };
    for (method, host, name, value) in [
        ("GET", "evil.example", "", ""),
        ("POST", "evil.example:8000", "", ""),
        ("POST", "127.0.0.1.evil.example", "", ""),
        ("GET", "127.0.0.1:8000", "origin", "http://evil.example"),
        ("POST", "127.0.0.1:8000", "origin", "null"),
        ("POST", "127.0.0.1:8000", "origin", "http://127.0.0.1:3000"),
        ("POST", "127.0.0.1:8000", "origin", "https://127.0.0.1:8000"),
        ("POST", "127.0.0.1:8000", "origin", "http://localhost:8000"),
        ("POST", "127.0.0.1:8000", "sec-fetch-site", "cross-site"),
        ("POST", "127.0.0.1:8000", "sec-fetch-site", "same-site"),
    ] {
        let reply = house.send(ask(method, host, name, value)).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::FORBIDDEN, "forbidden"), "{method} {host} {name} {value}");
    }
    assert_eq!(house.asked(), "");
    for (method, host, name, value) in [
        ("POST", "localhost:8000", "origin", "http://localhost:8000"),
        ("POST", "localhost", "origin", "http://LOCALHOST:80"),
        ("POST", "[::1]:8000", "sec-fetch-site", "same-origin"),
        ("GET", "127.0.0.1:8000", "sec-fetch-site", "cross-site"),
        ("POST", "127.0.0.1:8000", "sec-fetch-site", "none"),
    ] {
        let reply = house.send(ask(method, host, name, value)).await;
        assert!(reply.status.is_success(), "{method} {host} {name} {value}: {}", reply.text());
    }
    let without = axum::http::Request::builder().uri("/health").body(Body::empty()).expect("request");
    assert_eq!(house.send(without).await.code(), "bad_request");
    let preflight = house.send(ask("OPTIONS", "127.0.0.1:8000", "origin", "http://evil.example")).await;
    assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (StatusCode::FORBIDDEN, ""));
}
