//! The agents' door: a WebSocket, bridged to [`crate::control::Control::agent_linked`] by two bounded queues.
//!
//! Reader and writer run side by side, so that a full queue one way never stops the other. The trap: only time spent waiting for a frame
//! counts as silence, never time in which the coordinator itself did not take one.

use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, ORIGIN};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

use super::Shared;
use super::answer::Refusal;
use crate::agent::FRAME_BYTES_MAX;
use crate::control::{Agent, AgentFrame, AgentLink};
use crate::problem::Code;

/// Frames that may wait each way.
const FRAMES_MAX: usize = 1024;
const PING_EVERY: Duration = Duration::from_secs(5);
/// A frame that can not be written for this long: the connection is dead.
const WRITE_MAX: Duration = Duration::from_secs(20);

/// Where agents connect (WebSocket).
#[utoipa::path(get, path = "/agent/link", tag = "agents", operation_id = "agent_link",
    params(("Authorization" = Option<String>, Header, description = "`Bearer` and the secret of this machine's own agent; a node that joined shows its certificate instead")),
    responses((status = 101, description = "The WebSocket of the agent protocol")))]
pub(super) async fn link(
    State(control): State<Shared>,
    Extension(agent): Extension<Agent>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    if headers.contains_key(ORIGIN) {
        return Err(Refusal::new(Code::Forbidden, "web pages may not connect here: only agents may"));
    }
    let is_local = agent == Agent::Local;
    let token = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
    if is_local && !token.is_some_and(|token| control.agent_token_is(token.trim())) {
        return Err(Refusal::new(Code::Forbidden, "this is not the token of an agent: give it as `authorization: Bearer <token>`"));
    }
    let upgrade = upgrade.map_err(|_| Refusal::new(Code::BadRequest, "this is the agents' WebSocket: connect with an upgrade"))?;
    let upgrade = upgrade.max_message_size(FRAME_BYTES_MAX).max_frame_size(FRAME_BYTES_MAX);
    Ok(upgrade.on_upgrade(move |socket| bridge(control, agent, socket)).into_response())
}

async fn bridge(control: Shared, agent: Agent, socket: WebSocket) {
    let silence_max = control.agent_silence_max();
    let (sink, source) = socket.split();
    let (from_agent, from) = mpsc::channel(FRAMES_MAX);
    let (to, to_agent) = mpsc::channel(FRAMES_MAX);
    let linked = async {
        if let Err(problem) = control.agent_linked(agent, AgentLink { from, to }).await {
            tracing::warn!(%problem, "agent link refused");
        }
    };
    let carried = async {
        // Whichever side ends first ends the other: dropping the queues tells the coordinator.
        tokio::select! {
            () = read(source, from_agent, silence_max) => {}
            () = write(sink, to_agent, PING_EVERY.min(silence_max / 3)) => {}
        }
    };
    tokio::join!(linked, carried);
}

async fn read(mut source: SplitStream<WebSocket>, to: mpsc::Sender<AgentFrame>, silence_max: Duration) {
    loop {
        // Neither a frame nor a pong: the connection is dead.
        let message = match timeout(silence_max, source.next()).await {
            Err(_) => return tracing::warn!("an agent's link was silent for {} s and is given up", silence_max.as_secs_f64()),
            Ok(None) => return,
            Ok(Some(Err(error))) => return tracing::debug!(%error, "agent link broke"),
            Ok(Some(Ok(message))) => message,
        };
        let frame = match message {
            Message::Text(text) => AgentFrame::Text(text.as_str().into()),
            Message::Binary(bytes) => AgentFrame::Binary(bytes),
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => return,
        };
        if to.send(frame).await.is_err() {
            return;
        }
    }
}

async fn write(mut sink: SplitSink<WebSocket, Message>, mut from: mpsc::Receiver<String>, ping_every: Duration) {
    let mut ping = tokio::time::interval(ping_every);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let sent = tokio::select! {
            frame = from.recv() => match frame {
                Some(text) => feed(&mut sink, &mut from, text).await,
                None => {
                    // The agent may be gone already.
                    let _ = timeout(WRITE_MAX, sink.close()).await;
                    return;
                }
            },
            _ = ping.tick() => send(&mut sink, Message::Ping(axum::body::Bytes::new())).await,
        };
        if !sent {
            return;
        }
    }
}

/// Sends a frame and what waits behind it, with one flush.
async fn feed(sink: &mut SplitSink<WebSocket, Message>, from: &mut mpsc::Receiver<String>, first: String) -> bool {
    let write = async {
        sink.feed(Message::Text(Utf8Bytes::from(first))).await?;
        for _ in 0..FRAMES_MAX {
            let Ok(text) = from.try_recv() else { break };
            sink.feed(Message::Text(Utf8Bytes::from(text))).await?;
        }
        sink.flush().await
    };
    matches!(timeout(WRITE_MAX, write).await, Ok(Ok(())))
}

async fn send(sink: &mut SplitSink<WebSocket, Message>, message: Message) -> bool {
    matches!(timeout(WRITE_MAX, sink.send(message)).await, Ok(Ok(())))
}
