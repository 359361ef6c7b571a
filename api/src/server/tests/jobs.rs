use axum::body::Body;
use axum::http::StatusCode;
use expect_test::expect;

use super::fake::id;
use super::{House, request};

#[tokio::test]
async fn a_job_is_submitted_and_located() {
    let house = House::new();
    let reply = house.call("POST", "/jobs", r#"{"world_size": 4, "secrets": {"KEY": "hidden"}}"#).await;
    assert_eq!(reply.status, StatusCode::CREATED);
    assert_eq!(reply.header("location"), format!("/jobs/{}", id()));
    assert_eq!(reply.header("content-type"), "application/json");
    assert!(!reply.header("x-request-id").is_empty());
    assert!(reply.text().starts_with(&format!("{{\"job_id\":\"{}\"", id())));
    assert!(!reply.text().contains("hidden"));
    assert_eq!(reply.json()["spec"]["secrets"]["KEY"], "***");
    assert_eq!(house.asked(), "submit world 4");

    let under_prefix = house.call("POST", "/api/v1/jobs", "{}").await;
    assert_eq!(under_prefix.header("location"), format!("/api/v1/jobs/{}", id()));
    let empty = house.call("POST", "/jobs", "").await;
    assert_eq!((empty.status, house.asked().as_str()), (StatusCode::CREATED, "submit world 1\nsubmit world 1"));
}

#[tokio::test]
async fn an_idempotency_key_reaches_the_control_with_the_bodys_hash() {
    let house = House::new();
    let build = |key: &str| request("POST", "/jobs").header("content-type", "application/json").header("idempotency-key", key);
    let reply = house.send(build("k-1").body(Body::from("{}")).expect("request")).await;
    assert_eq!((reply.status, reply.header("idempotent-replayed")), (StatusCode::CREATED, "true"));
    // sha256 of `{}` begins with 44 13.
    assert_eq!(house.asked(), "submit world 1 key k-1 hash 4413");
    let long = "x".repeat(256);
    for bad in ["a b", "", long.as_str()] {
        let reply = house.send(build(bad).body(Body::from("{}")).expect("request")).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::UNPROCESSABLE_ENTITY, "invalid"), "{bad:?}");
    }
    let twice = build("a").header("idempotency-key", "b").body(Body::from("{}")).expect("request");
    assert_eq!(house.send(twice).await.code(), "invalid");
    assert_eq!(house.asked(), "");
}

#[tokio::test]
async fn a_dry_run_plans_and_accepts_nothing() {
    let house = House::new();
    let reply = house.call("POST", "/jobs?dry_run=true", r#"{"world_size": 3}"#).await;
    assert_eq!((reply.status, reply.json()["spec"]["world_size"].as_u64()), (StatusCode::OK, Some(3)));
    assert_eq!(house.asked(), "plan");
}

#[tokio::test]
async fn a_job_that_resumes_a_known_one_keeps_what_it_does_not_give() {
    let house = House::new();
    let unknown = crate::ids::JobId::from_parts(1, 1);
    for (body, asked) in [
        (format!(r#"{{"resume_from": "{}", "world_size": 4}}"#, id()), "job\nsubmit world 4 seed 9"),
        (format!(r#"{{"resume_from": "{}", "worker": {{"seed": 0}}}}"#, id()), "job\nsubmit world 1"),
        (format!(r#"{{"resume_from": "{}", "command": ["x"]}}"#, id()), "submit world 1"),
        (format!(r#"{{"resume_from": "{unknown}"}}"#), "job\nsubmit world 1"),
        (r#"{"resume_from": "/a/checkpoint"}"#.to_string(), "submit world 1"),
    ] {
        assert_eq!(house.call("POST", "/jobs", &body).await.status, StatusCode::CREATED, "{body}");
        assert_eq!(house.asked(), asked, "{body}");
    }
    let plan = house.call("POST", "/jobs?dry_run=true", &format!(r#"{{"resume_from": "{}"}}"#, id())).await;
    assert_eq!((plan.json()["spec"]["worker"]["seed"].as_u64(), house.asked().as_str()), (Some(9), "job\nplan"));
}

#[tokio::test]
async fn list_filters_are_read() {
    let house = House::new();
    let path = "/jobs?limit=7&after=abc&state=running,queued&state=failed&name=my%20job&label=team%3Dvision&label=a=b=c";
    assert_eq!(house.get(path).await.status, StatusCode::OK);
    expect![[r#"ListQuery { limit: 7, after: Some("abc"), states: [Running, Queued, Failed], name: Some("my job"), labels: [("team", "vision"), ("a", "b=c")], user: None }"#]]
        .assert_eq(&house.asked());
    assert_eq!(house.get("/jobs").await.json()["data"][0]["job_id"], id().to_string());
    expect!["ListQuery { limit: 50, after: None, states: [], name: None, labels: [], user: None }"].assert_eq(&house.asked());
    assert_eq!(house.get("/jobs/summaries?limit=500").await.json()["data"][0]["step"], 3);
    assert!(house.asked().starts_with("summaries ListQuery { limit: 500"));
}

#[tokio::test]
async fn bad_query_parameters_are_all_named() {
    let house = House::new();
    let reply = house.get("/jobs?limit=0&state=sleeping&label=x&name=a&name=b&limt=3").await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::UNPROCESSABLE_ENTITY, "invalid"));
    expect![[r#"query parameter `limit` must be a whole number from 1 to 500; query parameter `state` must be one or more of queued, starting, running, recovering, stopping, succeeded, failed, stopped; query parameter `name` is given more than once; query parameter `label` must be like label=key=value; query parameter `limt` is not known here"#]]
        .assert_eq(reply.json()["detail"].as_str().expect("text"));
    for path in ["/jobs?limit=501", "/jobs?limit=x", "/jobs?limit=-1", "/jobs?limit=99999999999", "/nodes?limit=0", "/jobs?dry_run=maybe"] {
        assert_eq!(house.get(path).await.status, StatusCode::UNPROCESSABLE_ENTITY, "{path}");
    }
    assert_eq!(house.asked(), "");
}

#[tokio::test]
async fn jobs_are_acted_on() {
    let house = House::new();
    let at = |rest: &str| format!("/jobs/{}{rest}", id());
    for (method, path, body, asked) in [
        ("POST", at("/stop"), "", "stop force false"),
        ("POST", at("/stop"), "{}", "stop force false"),
        ("POST", at("/stop"), r#"{"force": true}"#, "stop force true"),
        ("POST", at("/stop?force=true"), "", "stop force true"),
        ("POST", at("/checkpoint"), "", "save"),
        ("POST", at("/checkpoint"), "{}", "save"),
        ("DELETE", at(""), "", "delete stop_first false force false"),
        ("DELETE", at("?stop_first=true&force=1"), "", "delete stop_first true force true"),
    ] {
        assert_eq!(house.call(method, &path, body).await.status, StatusCode::OK, "{method} {path} {body}");
        assert_eq!(house.asked(), asked);
    }
    let conflict = house.call("POST", &at("/restart"), "").await;
    assert_eq!((conflict.status, conflict.code().as_str()), (StatusCode::CONFLICT, "conflict"));
    for (path, body) in [
        (at("/stop"), r#"{"grace": 1}"#),
        (at("/stop"), r#"{"force": 1}"#),
        (at("/stop"), "[]"),
        (at("/restart"), r#"{"a":1}"#),
        (at("/checkpoint"), r#"{"step":1}"#),
    ] {
        let reply = house.call("POST", &path, body).await;
        assert_eq!((reply.status, reply.code().as_str()), (StatusCode::UNPROCESSABLE_ENTITY, "invalid"), "{path} {body}");
    }
}

#[tokio::test]
async fn a_purge_must_say_how_old() {
    let house = House::new();
    let reply = house.call("POST", "/jobs/purge", r#"{"older_than": "7d", "states": ["failed"], "dry_run": true}"#).await;
    assert_eq!(reply.text(), format!("{{\"removed\":[\"{}\"],\"dry_run\":true}}", id()));
    expect![[r#"PurgeQuery { older_than: Millis(604800000), states: [Failed], dry_run: true }"#]].assert_eq(&house.asked());
    let bad = house.call("POST", "/jobs/purge", r#"{"states": ["running", "failed"], "dry_run": "x"}"#).await;
    expect![[r#"[{"detail":"must be one of \"succeeded\", \"failed\", \"stopped\"","pointer":"/states/0"},{"detail":"must be given, like \"7d\"; \"0s\" removes every final job","pointer":"/older_than"},{"detail":"must be true or false","pointer":"/dry_run"}]"#]]
        .assert_eq(&bad.json()["errors"].to_string());
    assert_eq!(house.call("POST", "/jobs/purge", "").await.code(), "invalid");
    assert_eq!(house.asked(), "");
}

#[tokio::test]
async fn short_lists_are_pages_too() {
    let house = House::new();
    let first = house.get(&format!("/jobs/{}/attempts?limit=2", id())).await.json();
    assert_eq!((&first["first_id"], &first["last_id"], &first["has_more"]), (&"1".into(), &"2".into(), &true.into()));
    let last = house.get(&format!("/jobs/{}/attempts?limit=3&after=2", id())).await.json();
    assert_eq!((&last["data"][0]["attempt"], &last["last_id"], &last["has_more"]), (&3.into(), &"5".into(), &false.into()));
    assert_eq!(house.get(&format!("/jobs/{}/attempts?after=99", id())).await.code(), "invalid");
    assert_eq!(
        house.get(&format!("/jobs/{}/checkpoints", id())).await.text(),
        r#"{"data":[],"first_id":null,"last_id":null,"has_more":false}"#
    );
    let points = house.get(&format!("/jobs/{}/metrics", id())).await.json();
    assert_eq!(points["data"].as_array().map(Vec::len), Some(1000));
    let late = house.get(&format!("/jobs/{}/metrics?since_step=998", id())).await.json();
    assert_eq!((late["data"].as_array().map(Vec::len), &late["data"][0]["step"]), (Some(2), &998.into()));
    assert_eq!(house.get(&format!("/jobs/{}/metrics?since_step=x", id())).await.code(), "invalid");
    let nodes = house.get("/nodes?after=a&limit=1").await.json();
    assert_eq!((&nodes["data"][0]["node"], &nodes["has_more"]), (&"b".into(), &true.into()));
}

#[tokio::test]
async fn nodes_are_taken_out_of_use() {
    let house = House::new();
    for (path, asked) in
        [("/nodes/a/cordon", "cordon a true"), ("/nodes/a/uncordon", "cordon a false"), ("/nodes/my%20node/drain", "drain my node")]
    {
        assert_eq!(house.call("POST", path, "{}").await.status, StatusCode::OK, "{path}");
        assert_eq!(house.asked(), asked);
    }
    assert_eq!(house.get("/nodes/zzz").await.code(), "not_found");
    assert_eq!(house.call("POST", "/nodes/a/drain", r#"{"deadline": "90s"}"#).await.status, StatusCode::OK);
    assert_eq!(house.asked(), "node\ndrain a within 90s");
    for (body, detail) in
        [(r#"{"deadline": 5}"#, "must be a duration with its unit in quotes, like \"5m\""), (r#"{"deadline": "2d"}"#, "must be at most 1d")]
    {
        let answer = house.call("POST", "/nodes/a/drain", body).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        let told = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(told.contains(&detail.replace('"', "\\\"")), "{told}");
    }
}

#[tokio::test]
async fn health_is_told() {
    let house = House::new();
    assert_eq!(house.get("/health").await.text(), r#"{"status":"ok"}"#);
    assert_eq!(house.get("/livez").await.text(), r#"{"status":"ok"}"#);
    assert_eq!(house.get("/readyz").await.status, StatusCode::OK);
    assert_eq!(house.get("/status").await.json()["auth"], "loopback");
    let metrics = house.get("/metrics").await;
    assert_eq!(metrics.header("content-type"), "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let fake = std::sync::Arc::new(super::Fake { keep_log_open: true, ..Default::default() });
    let doors = super::router(fake.clone(), super::Policy::loopback());
    let reply = House { fake, doors }.get("/readyz").await;
    assert_eq!((reply.status, reply.code().as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not_ready"));
}
