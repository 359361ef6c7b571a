//! The agents' door: a WebSocket, bridged to [`crate::control::Control::agent_linked`] by two bounded queues.
//!
//! Reader and writer run side by side, so that a full queue one way never stops the other. Frames are unpacked here and large ones packed,
//! where the agent said that it can; not for this machine's own, whose bytes cost nothing. What can not be read as a frame ends the link, and
//! both ends are told why. The trap: only time spent waiting for a frame counts as silence, never time in which the coordinator itself did
//! not take one.

use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, close_code};
use axum::http::header::{AUTHORIZATION, ORIGIN};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::error::ProtocolError;

use super::Shared;
use super::answer::Refusal;
use crate::agent::FRAME_BYTES_MAX;
use crate::agent::pack::{self, Unpacked};
use crate::control::{Agent, AgentFrame, AgentLink};
use crate::problem::Code;

/// Frames that may wait each way.
const FRAMES_MAX: usize = 1024;
const PING_EVERY: Duration = Duration::from_secs(5);
/// Bytes of a reason that a closing frame has room for.
const REASON_BYTES_MAX: usize = 123;
/// For the last word to a link that ends.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);
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
    must_be_agent(&control, &agent, &headers)?;
    let upgrade = upgrade.map_err(|_| Refusal::new(Code::BadRequest, "this is the agents' WebSocket: connect with an upgrade"))?;
    let upgrade = upgrade.max_message_size(FRAME_BYTES_MAX).max_frame_size(FRAME_BYTES_MAX);
    let packs = agent != Agent::Local && headers.get(pack::HEADER).is_some_and(|said| said == pack::LZ4);
    let mut answer = upgrade.on_upgrade(move |socket| bridge(control, agent, packs, socket)).into_response();
    if packs {
        answer.headers_mut().insert(pack::HEADER, HeaderValue::from_static(pack::LZ4));
    }
    Ok(answer)
}

/// A node that joined is known by its certificate; this machine's own agent shows its secret.
pub(super) fn must_be_agent(control: &Shared, agent: &Agent, headers: &HeaderMap) -> Result<(), Refusal> {
    let token = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
    if *agent == Agent::Local && !token.is_some_and(|token| control.agent_token_is(token.trim())) {
        return Err(Refusal::new(Code::Forbidden, "this is not the token of an agent: give it as `authorization: Bearer <token>`"));
    }
    Ok(())
}

async fn bridge(control: Shared, agent: Agent, packs: bool, socket: WebSocket) {
    let silence_max = control.agent_silence_max();
    let whose = match &agent {
        Agent::Local => "this machine's agent".to_string(),
        Agent::Node { node, .. } => node.to_string(),
    };
    let (mut sink, source) = socket.split();
    let (from_agent, from) = mpsc::channel(FRAMES_MAX);
    let (to, to_agent) = mpsc::channel(FRAMES_MAX);
    let linked = async {
        if let Err(problem) = control.agent_linked(agent, AgentLink { from, to }).await {
            tracing::warn!(%problem, "agent link refused");
        }
    };
    let carried = async {
        // Whichever side ends first ends the other: dropping the queues tells the coordinator.
        let ended = tokio::select! {
            ended = read(source, from_agent, silence_max) => ended,
            () = write(&mut sink, to_agent, packs, PING_EVERY.min(silence_max / 3)) => None,
        };
        if let Some(reason) = ended {
            tracing::warn!(agent = whose, "an agent's link is ended: {reason}");
            let reason = reason.get(..REASON_BYTES_MAX).unwrap_or(&reason);
            let last = CloseFrame { code: close_code::POLICY, reason: Utf8Bytes::from(reason) };
            // The agent may be gone, or not listen.
            let _ = timeout(LAST_WORD_MAX, sink.send(Message::Close(Some(last)))).await;
        }
    };
    tokio::join!(linked, carried);
}

/// Why the link must end, where the agent is to be told.
async fn read(mut source: SplitStream<WebSocket>, to: mpsc::Sender<AgentFrame>, silence_max: Duration) -> Option<String> {
    loop {
        // Neither a frame nor a pong: the connection is dead.
        let message = match timeout(silence_max, source.next()).await {
            Err(_) => return Some(format!("it was silent for {} s", silence_max.as_secs_f64())),
            Ok(None) => return None,
            Ok(Some(Err(error))) => return why_unread(error),
            Ok(Some(Ok(message))) => message,
        };
        let frame = match message {
            Message::Text(text) => AgentFrame::Text(text.as_str().into()),
            Message::Binary(bytes) => match pack::unpack(&bytes) {
                Ok(None) => AgentFrame::Binary(bytes),
                Ok(Some(Unpacked::Text(text))) => AgentFrame::Text(text),
                Ok(Some(Unpacked::Binary(bytes))) => AgentFrame::Binary(bytes.into()),
                Err(bad) => return Some(bad.to_string()),
            },
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => return None,
        };
        if to.send(frame).await.is_err() {
            return None;
        }
    }
}

/// What is wrong with a frame; `None`: the connection broke.
fn why_unread(error: axum::Error) -> Option<String> {
    let error = error.into_inner();
    match error.downcast_ref() {
        Some(Error::Capacity(_)) => Some(format!("a frame is larger than {FRAME_BYTES_MAX} bytes")),
        Some(Error::Utf8(_)) => Some("a text frame is not UTF-8".into()),
        Some(Error::Protocol(broken)) if *broken != ProtocolError::ResetWithoutClosingHandshake => {
            Some(format!("what it sends is no WebSocket: {broken}"))
        }
        _ => {
            tracing::debug!(%error, "an agent's link broke");
            None
        }
    }
}

fn message(text: String, packs: bool) -> Message {
    let packed = if packs { pack::pack_text(&text) } else { None };
    packed.map_or_else(|| Message::Text(Utf8Bytes::from(text)), |packed| Message::Binary(packed.into()))
}

async fn write(sink: &mut SplitSink<WebSocket, Message>, mut from: mpsc::Receiver<String>, packs: bool, ping_every: Duration) {
    let mut ping = tokio::time::interval(ping_every);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let sent = tokio::select! {
            frame = from.recv() => match frame {
                Some(text) => feed(sink, &mut from, text, packs).await,
                None => {
                    // The agent may be gone already.
                    let _ = timeout(WRITE_MAX, sink.close()).await;
                    return;
                }
            },
            _ = ping.tick() => send(sink, Message::Ping(axum::body::Bytes::new())).await,
        };
        if !sent {
            return;
        }
    }
}

/// Sends a frame and what waits behind it, with one flush.
async fn feed(sink: &mut SplitSink<WebSocket, Message>, from: &mut mpsc::Receiver<String>, first: String, packs: bool) -> bool {
    let write = async {
        sink.feed(message(first, packs)).await?;
        for _ in 0..FRAMES_MAX {
            let Ok(text) = from.try_recv() else { break };
            sink.feed(message(text, packs)).await?;
        }
        sink.flush().await
    };
    matches!(timeout(WRITE_MAX, write).await, Ok(Ok(())))
}

async fn send(sink: &mut SplitSink<WebSocket, Message>, message: Message) -> bool {
    matches!(timeout(WRITE_MAX, sink.send(message)).await, Ok(Ok(())))
}
