use axum::body::Body;
use axum::http::StatusCode;

use super::fake::TOKEN;
use super::{House, request};
use crate::package::PACKED_BYTES_MAX;

fn named() -> String {
    format!("/packages/{}", "aa".repeat(32))
}

#[tokio::test]
async fn a_package_is_kept_under_its_hash_and_told_when_it_is_there() {
    let house = House::new();
    let put = |body: Body| house.send(request("PUT", &named()).body(body).expect("request"));
    let made = put(Body::from(vec![7; 3_000_000])).await;
    assert_eq!((made.status, made.json()["package"].as_str()), (StatusCode::CREATED, Some("aa".repeat(32).as_str())));
    assert_eq!(house.asked(), "keep package of 3000000 bytes", "it may be larger than other bodies");
    assert_eq!(put(Body::empty()).await.status, StatusCode::OK, "it was there");
    assert_eq!(house.get(&named()).await.json()["bytes"], 3);
    assert_eq!(house.get(&named().replace("aa", "bb")).await.code(), "not_found");
    house.asked();
    // What can be no package's name is not looked for.
    for name in ["x", "..%2f..%2fadmin.token", &"AA".repeat(32), &"a".repeat(63), &"a".repeat(65)] {
        let reply = house.get(&format!("/packages/{name}")).await;
        assert_eq!((reply.code().as_str(), house.asked().as_str()), ("not_found", ""), "{name}");
    }
    let long = request("PUT", &named()).header("content-length", PACKED_BYTES_MAX + 1).body(Body::empty()).expect("request");
    let reply = house.send(long).await;
    assert_eq!((reply.status, reply.code().as_str(), house.asked().as_str()), (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", ""));
    let broken = Body::from_stream(futures_util::stream::iter([Ok("ab"), Err(std::io::Error::other("gone"))]));
    assert_eq!(put(broken).await.code(), "bad_request");
}

#[tokio::test]
async fn only_agents_read_a_package() {
    let house = House::new();
    let fetch = |token: Option<&str>| {
        let request = request("GET", &format!("/agent{}", named()));
        let request = token.iter().fold(request, |request, token| request.header("authorization", format!("Bearer {token}")));
        house.send(request.body(Body::empty()).expect("request"))
    };
    for token in [None, Some("wrong")] {
        assert_eq!(fetch(token).await.code(), "forbidden");
    }
    assert_eq!(house.asked(), "");
    let reply = fetch(Some(TOKEN)).await;
    assert_eq!((reply.text().as_str(), reply.header("content-length"), reply.header("content-type")), ("pack", "4", "application/gzip"));
}
