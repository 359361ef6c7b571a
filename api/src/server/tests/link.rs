use std::time::Duration;

use axum::body::Body;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::fake::TOKEN;
use super::{House, request};
use crate::control::AgentFrame;

#[tokio::test]
async fn the_agents_door_checks_who_knocks() {
    let house = House::new();
    let knock = |headers: &[(&str, &str)]| {
        let upgrade = [
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ];
        let all = upgrade.iter().chain(headers);
        all.fold(request("GET", "/agent/link"), |request, (name, value)| request.header(*name, *value))
            .body(Body::empty())
            .expect("request")
    };
    let bearer = format!("Bearer {TOKEN}");
    assert_eq!(house.send(knock(&[])).await.code(), "forbidden");
    assert_eq!(house.send(knock(&[("authorization", "Bearer wrong")])).await.code(), "forbidden");
    assert_eq!(house.send(knock(&[("authorization", TOKEN)])).await.code(), "forbidden");
    let page = house.send(knock(&[("authorization", &bearer), ("origin", "http://127.0.0.1:8000")])).await;
    assert_eq!(page.code(), "forbidden");
    let plain = house.send(request("GET", "/agent/link").header("authorization", &bearer).body(Body::empty()).expect("request")).await;
    assert_eq!(plain.code(), "bad_request");
}

#[tokio::test]
async fn frames_go_both_ways_and_the_end_is_passed_on() {
    let house = House::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = tokio::spawn(axum::serve(listener, house.doors.clone()).into_future());
    let mut ask = format!("ws://{address}/agent/link").into_client_request().expect("a request");
    ask.headers_mut().insert("authorization", format!("Bearer {TOKEN}").parse().expect("a header"));
    let (mut socket, _) = tokio_tungstenite::connect_async(ask).await.expect("connects");
    socket.send(Message::text("hello")).await.expect("open");
    socket.send(Message::binary(vec![7; 1_000_000])).await.expect("open");
    socket.send(Message::text("bye")).await.expect("open");
    let mut welcomed = false;
    // The control hung up after `bye`: the connection must end, with the welcome before.
    let end = async {
        while let Some(Ok(message)) = socket.next().await {
            welcomed |= message.to_text().is_ok_and(|text| text == "welcome");
        }
    };
    tokio::time::timeout(Duration::from_secs(10), end).await.expect("the connection ends");
    assert!(welcomed);
    let frames = house.fake.frames.lock().expect("lock").clone();
    assert!(matches!(&frames[0], AgentFrame::Text(text) if text == "hello"));
    assert!(matches!(&frames[1], AgentFrame::Binary(bytes) if bytes.len() == 1_000_000));
    assert_eq!(frames.len(), 3);
    server.abort();
}
