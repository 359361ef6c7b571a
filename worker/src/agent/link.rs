//! The WebSocket to the coordinator: dial, keep, dial again.
//!
//! Knows frames as text and bytes and nothing of what they mean. A connection that is silent or does not take frames is given up: everything
//! is said again after the next one. Frames of the engine go before log bytes. This is the one place that uses `backoff`, which is no longer
//! maintained; when the coordinator's file changes it is dialled at once.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use backoff::ExponentialBackoff;
use backoff::backoff::Backoff;
use everlit_api::agent::{FRAME_BYTES_MAX, ToAgent};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{interval, sleep, timeout};
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::limits::{CONNECT_MAX, LINK_FRAMES_MAX, LINK_LOG_FRAMES_MAX, LINK_SILENCE_MAX, PING_EVERY, RECONNECT_MAX, RECONNECT_MIN};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Where the coordinator is, as `everlit up` writes it down.
#[derive(Debug, Deserialize)]
struct CoordinatorFile {
    url: String,
    #[serde(default)]
    token: String,
}

/// What happens on the link.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// Connected; a hello is due.
    Up(Link),
    /// A frame of this connection.
    Frame(u64, Box<ToAgent>),
    /// This connection has ended.
    Down(u64),
}

/// The sending side of one connection.
#[derive(Debug, Clone)]
pub(super) struct Link {
    /// Tells this connection from others.
    pub id: u64,
    /// JSON frames.
    pub frames: mpsc::Sender<String>,
    /// What log streams send, in order.
    pub logs: mpsc::Sender<FromLogs>,
}

/// What log streams send.
#[derive(Debug)]
pub(super) enum FromLogs {
    /// A binary frame.
    Frame(Vec<u8>),
    /// A JSON frame that must come after the binary ones.
    Text(String),
}

/// Dials for ever.
pub(super) async fn run(file: PathBuf, file_changed: Arc<Notify>, events: mpsc::Sender<LinkEvent>) {
    let fresh = || ExponentialBackoff {
        current_interval: RECONNECT_MIN,
        initial_interval: RECONNECT_MIN,
        max_interval: RECONNECT_MAX,
        max_elapsed_time: None,
        ..ExponentialBackoff::default()
    };
    let mut backoff = fresh();
    let mut last_failure = String::new();
    for id in 1.. {
        match timeout(CONNECT_MAX, connect(&file)).await.context("no answer in time").and_then(|answer| answer) {
            Ok(socket) => {
                backoff = fresh();
                last_failure.clear();
                serve(id, socket, &events).await;
                if events.send(LinkEvent::Down(id)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let failure = format!("{error:#}");
                if failure != last_failure {
                    tracing::info!(reason = failure, "no coordinator; dialling on");
                    last_failure = failure;
                }
            }
        }
        let wait = backoff.next_backoff().unwrap_or(RECONNECT_MAX);
        tokio::select! {
            () = sleep(wait) => {}
            () = file_changed.notified() => backoff = fresh(),
        }
    }
}

async fn connect(file: &Path) -> anyhow::Result<Socket> {
    let text = std::fs::read(file).with_context(|| format!("could not read `{}`", file.display()))?;
    let coordinator: CoordinatorFile = serde_json::from_slice(&text).with_context(|| format!("could not read `{}`", file.display()))?;
    let Some(address) = coordinator.url.strip_prefix("http://") else { bail!("`{}` is not an http:// address", coordinator.url) };
    let uri = format!("ws://{}/agent/link", address.trim_end_matches('/')).parse().context("not an address")?;
    let request = ClientRequestBuilder::new(uri).with_header("Authorization", format!("Bearer {}", coordinator.token));
    let config = WebSocketConfig::default().max_message_size(Some(FRAME_BYTES_MAX)).max_frame_size(Some(FRAME_BYTES_MAX));
    let (socket, _) = connect_async_with_config(request, Some(config), true).await.context("could not connect")?;
    Ok(socket)
}

/// Serves one connection to its end.
async fn serve(id: u64, socket: Socket, events: &mpsc::Sender<LinkEvent>) {
    let (frames, frames_rx) = mpsc::channel(LINK_FRAMES_MAX);
    let (logs, logs_rx) = mpsc::channel(LINK_LOG_FRAMES_MAX);
    if events.send(LinkEvent::Up(Link { id, frames, logs })).await.is_err() {
        return;
    }
    let (sink, stream) = socket.split();
    let ended = tokio::select! {
        ended = read(id, stream, events) => ended,
        ended = write(sink, frames_rx, logs_rx) => ended,
    };
    tracing::info!(reason = ended, "the link has ended");
}

async fn read(id: u64, mut stream: SplitStream<Socket>, events: &mpsc::Sender<LinkEvent>) -> String {
    loop {
        let text = match timeout(LINK_SILENCE_MAX, stream.next()).await {
            Err(_) => return "the coordinator is silent".into(),
            Ok(None | Some(Ok(Message::Close(_)))) => return "the coordinator closed it".into(),
            Ok(Some(Err(error))) => return error.to_string(),
            Ok(Some(Ok(Message::Text(text)))) => text,
            Ok(Some(Ok(_))) => continue,
        };
        match serde_json::from_str(&text) {
            Ok(frame) => {
                if events.send(LinkEvent::Frame(id, Box::new(frame))).await.is_err() {
                    return "this agent ends".into();
                }
            }
            Err(error) => tracing::warn!(%error, "a frame that can not be read is ignored"),
        }
    }
}

async fn write(mut sink: SplitSink<Socket, Message>, mut frames: mpsc::Receiver<String>, mut logs: mpsc::Receiver<FromLogs>) -> String {
    let mut ping = interval(PING_EVERY);
    loop {
        let first = tokio::select! {
            biased;
            frame = frames.recv() => match frame {
                Some(frame) => Message::text(frame),
                None => break,
            },
            // Ends together with `frames`.
            Some(frame) = logs.recv() => match frame {
                FromLogs::Frame(frame) => Message::binary(frame),
                FromLogs::Text(text) => Message::text(text),
            },
            _ = ping.tick() => Message::Ping(Vec::new().into()),
        };
        if let Err(why) = in_time(sink.feed(first)).await {
            return why;
        }
        // What has come meanwhile goes in the same write.
        while let Ok(frame) = frames.try_recv() {
            if let Err(why) = in_time(sink.feed(Message::text(frame))).await {
                return why;
            }
        }
        if let Err(why) = in_time(sink.flush()).await {
            return why;
        }
    }
    // Best effort: the other side sees the connection end anyway.
    let _ = in_time(sink.close()).await;
    "this agent closed it".into()
}

async fn in_time(step: impl Future<Output = Result<(), Error>>) -> Result<(), String> {
    match timeout(LINK_SILENCE_MAX, step).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the coordinator takes no frames".into()),
    }
}
