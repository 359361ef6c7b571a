//! The WebSocket to the coordinator: dial, keep, dial again. In the clear on this machine, over TLS and with a certificate from others.
//!
//! Knows frames as text and bytes and nothing of what they mean; large ones are packed on their way to another machine. A connection that is
//! silent or does not take frames is given up: everything is said again after the next one. Frames of the engine go before log bytes. This is
//! the one place that uses `backoff`, which is no longer maintained; when the coordinator's file changes it is dialled at once.

use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use backoff::ExponentialBackoff;
use backoff::backoff::Backoff;
use everlit_api::agent::pack::{self, Unpacked};
use everlit_api::agent::{FRAME_BYTES_MAX, ToAgent};
use everlit_api::join::AGENTS_NAME;
use everlit_api::problem::{Code, Problem};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{interval, sleep, timeout};
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::dial::{Dialer, in_words};
use super::join::{Shared, current};
use super::limits::{
    CONNECT_MAX, LINK_FRAMES_MAX, LINK_LOG_FRAMES_MAX, LINK_SILENCE_MAX, PING_EVERY, RECONNECT_MAX, RECONNECT_MIN, REFUSED_WAIT,
};

/// A connection, with TLS or without.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type Socket = WebSocketStream<Box<dyn Stream>>;

/// A connection, as it was agreed on.
struct Opened {
    socket: Socket,
    /// This end's address, where the other is on another machine.
    address: Option<IpAddr>,
    /// Large frames may be packed.
    packs: bool,
}

/// Where the coordinator is.
#[derive(Clone)]
pub(super) enum Coordinator {
    /// On this machine: a file says where, and is read before each try.
    Local(PathBuf),
    /// The one that this node joined.
    Joined(Shared),
}

/// The coordinator was there and said why it would not have this agent.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
struct Refused {
    reason: String,
    expelled: bool,
}

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
    /// This node is wanted no more.
    Expelled(String),
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
    /// This end's address, where the other is on another machine.
    pub address: Option<IpAddr>,
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
pub(super) async fn run(coordinator: Coordinator, file_changed: Arc<Notify>, events: mpsc::Sender<LinkEvent>) {
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
        let mut refused = None;
        match timeout(CONNECT_MAX, connect(&coordinator)).await.context("no answer in time").and_then(|answer| answer) {
            Ok(opened) => {
                refused = serve(id, opened, &events).await;
                if events.send(LinkEvent::Down(id)).await.is_err() {
                    return;
                }
                if refused.is_none() {
                    backoff = fresh();
                    last_failure.clear();
                }
            }
            Err(error) => match error.downcast::<Refused>() {
                Ok(why) => refused = Some(why),
                Err(error) => note(&mut last_failure, &format!("{error:#}"), "no coordinator; dialling on"),
            },
        }
        if let Some(why) = &refused {
            note(&mut last_failure, &why.reason, "the coordinator does not take this agent; dialling on");
            if why.expelled && events.send(LinkEvent::Expelled(why.reason.clone())).await.is_err() {
                return;
            }
        }
        let wait = if refused.is_some() { REFUSED_WAIT } else { backoff.next_backoff().unwrap_or(RECONNECT_MAX) };
        tokio::select! {
            () = sleep(wait) => {}
            () = file_changed.notified() => backoff = fresh(),
        }
    }
}

/// Says a failure once.
fn note(last: &mut String, failure: &str, what: &str) {
    if failure != last {
        tracing::info!(reason = failure, "{what}");
        *last = failure.into();
    }
}

async fn connect(coordinator: &Coordinator) -> anyhow::Result<Opened> {
    match coordinator {
        Coordinator::Local(file) => connect_local(file).await,
        Coordinator::Joined(shared) => {
            let own = current(shared);
            let stream = Dialer::of(&own)?.connect(&own.coordinator).await?;
            let uri = format!("wss://{AGENTS_NAME}/agent/link").parse().context("not an address")?;
            let address = stream.get_ref().0.local_addr().ok().map(|own| own.ip());
            let request = ClientRequestBuilder::new(uri).with_header(pack::HEADER, pack::LZ4);
            let opened = open(request, Box::new(stream)).await.map_err(|error| in_words_of(error, &own.coordinator))?;
            Ok(Opened { address, ..opened })
        }
    }
}

/// The coordinator's own words, where it has answered.
fn in_words_of(error: Error, url: &str) -> anyhow::Error {
    let Error::Http(answer) = error else { return in_words(&error, url) };
    match answer.body().as_ref().and_then(|body| serde_json::from_slice::<Problem>(body).ok()) {
        Some(problem) if problem.status == 403 => Refused { expelled: problem.code == Code::Expelled, reason: problem.detail }.into(),
        Some(problem) => anyhow::anyhow!(problem.detail),
        None => anyhow::anyhow!("{url} answered {}: is it an everlit coordinator?", answer.status()),
    }
}

/// Host and port of this machine's coordinator, and what it knows its agent by.
pub(super) fn local(file: &Path) -> anyhow::Result<(String, String)> {
    let text = std::fs::read(file).with_context(|| format!("could not read `{}`", file.display()))?;
    let coordinator: CoordinatorFile = serde_json::from_slice(&text).with_context(|| format!("could not read `{}`", file.display()))?;
    let Some(address) = coordinator.url.strip_prefix("http://") else { bail!("`{}` is not an http:// address", coordinator.url) };
    Ok((address.trim_end_matches('/').into(), coordinator.token))
}

async fn connect_local(file: &Path) -> anyhow::Result<Opened> {
    let (address, token) = local(file)?;
    let uri = format!("ws://{address}/agent/link").parse().context("not an address")?;
    let request = ClientRequestBuilder::new(uri).with_header("Authorization", format!("Bearer {token}"));
    let stream = TcpStream::connect(&address).await.context("could not connect")?;
    stream.set_nodelay(true)?;
    open(request, Box::new(stream)).await.map_err(|error| in_words_of(error, &format!("http://{address}")))
}

async fn open(request: ClientRequestBuilder, stream: Box<dyn Stream>) -> Result<Opened, Error> {
    let config = WebSocketConfig::default().max_message_size(Some(FRAME_BYTES_MAX)).max_frame_size(Some(FRAME_BYTES_MAX));
    let (socket, answer) = client_async_with_config(request, stream, Some(config)).await?;
    let packs = answer.headers().get(pack::HEADER).is_some_and(|taken| taken == pack::LZ4);
    Ok(Opened { socket, address: None, packs })
}

/// Serves one connection to its end; answers why the coordinator would not have it, where it said so.
async fn serve(id: u64, opened: Opened, events: &mpsc::Sender<LinkEvent>) -> Option<Refused> {
    let Opened { socket, address, packs } = opened;
    let (frames, frames_rx) = mpsc::channel(LINK_FRAMES_MAX);
    let (logs, logs_rx) = mpsc::channel(LINK_LOG_FRAMES_MAX);
    if events.send(LinkEvent::Up(Link { id, frames, logs, address })).await.is_err() {
        return None;
    }
    let (sink, stream) = socket.split();
    let ended = tokio::select! {
        ended = read(id, stream, events) => ended,
        ended = write(sink, frames_rx, logs_rx, packs) => Ended::Because(ended),
    };
    match ended {
        Ended::Refused(refused) => Some(refused),
        Ended::Because(reason) => {
            tracing::info!(reason, "the link has ended");
            None
        }
    }
}

/// Why a connection ended.
enum Ended {
    Because(String),
    Refused(Refused),
}

async fn read(id: u64, mut stream: SplitStream<Socket>, events: &mpsc::Sender<LinkEvent>) -> Ended {
    let because = |reason: &str| Ended::Because(reason.into());
    let mut silence_max = LINK_SILENCE_MAX;
    loop {
        let frame = match timeout(silence_max, stream.next()).await {
            Err(_) => return because("the coordinator is silent"),
            Ok(None | Some(Ok(Message::Close(None)))) => return because("the coordinator closed it"),
            Ok(Some(Ok(Message::Close(Some(last))))) => return Ended::Because(format!("the coordinator closed it: {}", last.reason)),
            Ok(Some(Err(error))) => return because(&error.to_string()),
            Ok(Some(Ok(Message::Text(text)))) => serde_json::from_str(&text),
            Ok(Some(Ok(Message::Binary(bytes)))) => match pack::unpack(&bytes) {
                Ok(Some(Unpacked::Text(text))) => serde_json::from_str(&text),
                // There are no others this way.
                Ok(Some(Unpacked::Binary(_)) | None) => continue,
                Err(bad) => return because(&bad.to_string()),
            },
            Ok(Some(Ok(_))) => continue,
        };
        match frame {
            Ok(ToAgent::Refused { reason, expelled }) => return Ended::Refused(Refused { reason, expelled }),
            Ok(frame) => {
                if let ToAgent::Welcome { silence_max: Some(said), .. } = &frame {
                    silence_max = said.as_duration();
                }
                if events.send(LinkEvent::Frame(id, Box::new(frame))).await.is_err() {
                    return because("this agent ends");
                }
            }
            Err(error) => tracing::warn!(%error, "a frame that can not be read is ignored"),
        }
    }
}

fn text(frame: String, packs: bool) -> Message {
    let packed = if packs { pack::pack_text(&frame) } else { None };
    packed.map_or_else(|| Message::text(frame), Message::binary)
}

fn log(frame: Vec<u8>, packs: bool) -> Message {
    let packed = if packs { pack::pack_binary(&frame) } else { None };
    Message::binary(packed.unwrap_or(frame))
}

async fn write(
    mut sink: SplitSink<Socket, Message>,
    mut frames: mpsc::Receiver<String>,
    mut logs: mpsc::Receiver<FromLogs>,
    packs: bool,
) -> String {
    let mut ping = interval(PING_EVERY);
    loop {
        let first = tokio::select! {
            biased;
            frame = frames.recv() => match frame {
                Some(frame) => text(frame, packs),
                None => break,
            },
            // Ends together with `frames`.
            Some(frame) = logs.recv() => match frame {
                FromLogs::Frame(frame) => log(frame, packs),
                FromLogs::Text(frame) => text(frame, packs),
            },
            _ = ping.tick() => Message::Ping(Vec::new().into()),
        };
        if let Err(why) = in_time(sink.feed(first)).await {
            return why;
        }
        // What has come meanwhile goes in the same write.
        while let Ok(frame) = frames.try_recv() {
            if let Err(why) = in_time(sink.feed(text(frame, packs))).await {
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
