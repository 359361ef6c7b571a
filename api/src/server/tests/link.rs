use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::ConnectInfo;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::fake::TOKEN;
use super::{House, request};
use crate::agent::{FRAME_BYTES_MAX, pack};
use crate::control::AgentFrame;
use crate::server::Peer;

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

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

/// A link to doors that see this certificate, and what the handshake said of packing.
async fn link(house: &House, certificate: Option<[u8; 32]>, packing: Option<&str>) -> (Socket, Option<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let doors = match certificate {
        Some(_) => house.doors.clone().layer(Extension(ConnectInfo(Peer { address, certificate }))),
        None => house.doors.clone(),
    };
    tokio::spawn(axum::serve(listener, doors).into_future());
    let mut ask = format!("ws://{address}/agent/link").into_client_request().expect("a request");
    ask.headers_mut().insert("authorization", format!("Bearer {TOKEN}").parse().expect("a header"));
    if let Some(packing) = packing {
        ask.headers_mut().insert(pack::HEADER, packing.parse().expect("a header"));
    }
    let (socket, answer) = tokio_tungstenite::connect_async(ask).await.expect("connects");
    let taken = answer.headers().get(pack::HEADER).map(|taken| taken.to_str().expect("ASCII").to_string());
    (socket, taken)
}

/// Everything that comes until the connection ends, and the last word.
async fn to_its_end(socket: &mut Socket) -> (Vec<Message>, Option<String>) {
    let (mut all, mut last) = (Vec::new(), None);
    let end = async {
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Close(word) => last = word.map(|word| word.reason.to_string()),
                Message::Ping(_) => {}
                other => all.push(other),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), end).await.expect("the connection ends");
    (all, last)
}

#[tokio::test]
async fn frames_go_both_ways_and_the_end_is_passed_on() {
    let house = House::new();
    let (mut socket, packing) = link(&house, None, Some(pack::LZ4)).await;
    assert_eq!(packing, None, "bytes cost nothing on one machine");
    socket.send(Message::text("hello")).await.expect("open");
    socket.send(Message::binary(vec![7; 1_000_000])).await.expect("open");
    socket.send(Message::text("say much")).await.expect("open");
    socket.send(Message::text("bye")).await.expect("open");
    // The control hung up after `bye`: the connection must end, with the welcome before.
    let (all, _) = to_its_end(&mut socket).await;
    assert_eq!(all, [Message::text("welcome"), Message::text("much ".repeat(1_000))]);
    let frames = house.fake.frames.lock().expect("lock").clone();
    assert!(matches!(&frames[0], AgentFrame::Text(text) if text == "hello"));
    assert!(matches!(&frames[1], AgentFrame::Binary(bytes) if bytes.len() == 1_000_000));
    assert_eq!(frames.len(), 4);
}

#[tokio::test]
async fn large_frames_are_packed_where_both_ends_can() {
    let house = House::new();
    let (mut socket, packing) = link(&house, Some([1; 32]), Some(pack::LZ4)).await;
    assert_eq!(packing.as_deref(), Some(pack::LZ4));
    let text = "a line of a log ".repeat(500);
    socket.send(Message::binary(pack::pack_text(&text).expect("it pays"))).await.expect("open");
    socket.send(Message::binary(pack::pack_binary(text.as_bytes()).expect("it pays"))).await.expect("open");
    socket.send(Message::text("say much")).await.expect("open");
    socket.send(Message::text("bye")).await.expect("open");
    let (all, _) = to_its_end(&mut socket).await;
    let [welcome, Message::Binary(packed)] = &all[..] else { panic!("{all:?}") };
    assert_eq!(*welcome, Message::text("welcome"), "a small one goes as it is");
    assert!(packed.len() < 200, "{}", packed.len());
    assert_eq!(pack::unpack(packed), Ok(Some(pack::Unpacked::Text("much ".repeat(1_000)))));
    let frames = house.fake.frames.lock().expect("lock").clone();
    assert!(matches!(&frames[0], AgentFrame::Text(own) if *own == text));
    assert!(matches!(&frames[1], AgentFrame::Binary(bytes) if bytes[..] == *text.as_bytes()));
    // Agents of before, and ones that know another way, go on as they were.
    for other in [None, Some("zstd")] {
        let (mut socket, packing) = link(&house, Some([1; 32]), other).await;
        assert_eq!(packing, None);
        socket.send(Message::text("say much")).await.expect("open");
        socket.send(Message::text("bye")).await.expect("open");
        assert_eq!(to_its_end(&mut socket).await.0[1], Message::text("much ".repeat(1_000)));
    }
}

/// The raw bytes of a text frame of a client, unmasked in effect: the mask is zero.
fn raw_text(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x81, 0x80 | u8::try_from(bytes.len()).expect("short"), 0, 0, 0, 0];
    out.extend_from_slice(bytes);
    out
}

#[tokio::test]
async fn what_is_no_frame_ends_the_link_and_says_why() {
    let house = House::new();
    // A bomb: a block that says it is larger than any frame.
    let mut bomb = pack::pack_text(&" ".repeat(100_000)).expect("it pays");
    bomb[9..13].copy_from_slice(&u32::MAX.to_le_bytes());
    let (mut socket, _) = link(&house, Some([1; 32]), Some(pack::LZ4)).await;
    socket.send(Message::binary(bomb)).await.expect("open");
    let (_, last) = to_its_end(&mut socket).await;
    assert_eq!(last.as_deref(), Some("a packed frame of 4294967295 bytes: 16777216 are the most"));
    // Larger than any frame may be: only its header is ever read.
    let (mut socket, _) = link(&house, Some([1; 32]), None).await;
    let head = [&[0x82, 0xff][..], &(FRAME_BYTES_MAX as u64 + 1).to_be_bytes(), &[0; 4]].concat();
    write_raw(&mut socket, &head).await;
    let (_, last) = to_its_end(&mut socket).await;
    assert_eq!(last.as_deref(), Some("a frame is larger than 16777216 bytes"));
    // No text.
    let (mut socket, _) = link(&house, Some([1; 32]), None).await;
    write_raw(&mut socket, &raw_text(&[0xff, 0xfe])).await;
    let (_, last) = to_its_end(&mut socket).await;
    assert_eq!(last.as_deref(), Some("a text frame is not UTF-8"));
    // No WebSocket: a frame that a client must mask and has not.
    let (mut socket, _) = link(&house, Some([1; 32]), None).await;
    write_raw(&mut socket, &[0x81, 0x01, b'x']).await;
    let (_, last) = to_its_end(&mut socket).await;
    assert!(last.as_deref().is_some_and(|last| last.starts_with("what it sends is no WebSocket: ")), "{last:?}");
    assert!(house.fake.frames.lock().expect("lock").is_empty(), "nobody in control has seen any of it");
}

async fn write_raw(socket: &mut Socket, bytes: &[u8]) {
    use tokio::io::AsyncWriteExt;
    let tokio_tungstenite::MaybeTlsStream::Plain(stream) = socket.get_mut() else { panic!("in the clear") };
    stream.write_all(bytes).await.expect("open");
    stream.flush().await.expect("open");
}
