//! The links to agents: who is connected, and a bounded line to each. A line that is full is cut: the agent comes back and says `Hello`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use everlit_api::agent::{FromAgent, LogFrame, PROTOCOL, ToAgent};
use everlit_api::control::{AgentFrame, AgentLink};
use everlit_api::ids::NodeId;
use everlit_api::time::Millis;
use tokio::sync::{mpsc, watch};

use super::driver::Input;
use super::logs::{LogMessage, Streams};

/// Time for the first frame of a link.
const HELLO_WAIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Link {
    session: u64,
    to: mpsc::Sender<String>,
}

/// Everybody who is connected.
#[derive(Debug)]
pub struct Agents {
    links: Mutex<BTreeMap<NodeId, Link>>,
    sessions: AtomicU64,
    report_interval: Millis,
    changed: watch::Sender<u64>,
    /// Log streams that are open over the links.
    pub streams: Streams,
}

impl Agents {
    /// Nobody yet.
    pub fn new(report_interval: Millis) -> Self {
        Self {
            links: Mutex::default(),
            sessions: AtomicU64::new(1),
            report_interval,
            changed: watch::Sender::new(0),
            streams: Streams::default(),
        }
    }

    fn links(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Link>> {
        self.links.lock().expect("no panic while holding the lock")
    }

    /// Says it to a node's agent if it is connected.
    pub fn tell(&self, node: &NodeId, frame: &ToAgent) {
        let text = serde_json::to_string(frame).expect("frames are plain data");
        let mut links = self.links();
        let Some(link) = links.get(node) else { return };
        if let Err(e) = link.to.try_send(text) {
            tracing::warn!(%node, "the link is cut: {e}");
            links.remove(node);
        }
    }

    /// Whether a node's agent is connected.
    pub fn is_linked(&self, node: &NodeId) -> bool {
        self.links().contains_key(node)
    }

    /// Every node that is connected.
    pub fn linked(&self) -> Vec<NodeId> {
        self.links().keys().cloned().collect()
    }

    /// Changes whenever a link comes or goes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Serves a link until it ends.
    pub async fn serve(&self, mut link: AgentLink, inputs: &mpsc::Sender<Input>) {
        let first = tokio::time::timeout(HELLO_WAIT, link.from.recv()).await;
        let hello = match first {
            Ok(Some(AgentFrame::Text(text))) => serde_json::from_str(&text),
            _ => return,
        };
        let hello = match hello {
            Ok(FromAgent::Hello(hello)) if hello.protocol == PROTOCOL => hello,
            Ok(FromAgent::Hello(hello)) => {
                tracing::error!(node = %hello.node, "an agent speaks protocol {}, this coordinator {PROTOCOL}: use the same version", hello.protocol);
                return;
            }
            other => {
                tracing::warn!("a link that does not begin with hello: {:?}", other.err());
                return;
            }
        };
        let node = hello.node.clone();
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let welcome = ToAgent::Welcome { protocol: PROTOCOL, report_interval: self.report_interval };
        let text = serde_json::to_string(&welcome).expect("frames are plain data");
        if link.to.send(text).await.is_err() {
            return;
        }
        let before = self.links().insert(node.clone(), Link { session, to: link.to });
        drop(before);
        if inputs.send(Input::Linked(session, Box::new(hello))).await.is_err() {
            return;
        }
        self.changed.send_modify(|n| *n += 1);
        tracing::info!(%node, "an agent is linked");
        while let Some(frame) = link.from.recv().await {
            if !self.pass_on(&node, frame, inputs).await {
                break;
            }
        }
        let newest = self.unlink(&node, session);
        self.streams.node_gone(&node);
        if newest {
            tracing::warn!(%node, "an agent's link ended");
        }
        let _ = inputs.send(Input::Unlinked(session, node)).await;
        self.changed.send_modify(|n| *n += 1);
    }

    /// True when no newer link of the node is there.
    fn unlink(&self, node: &NodeId, session: u64) -> bool {
        let mut links = self.links();
        let newest = links.get(node).is_none_or(|l| l.session == session);
        if newest {
            links.remove(node);
        }
        newest
    }

    /// False when the link must end.
    async fn pass_on(&self, node: &NodeId, frame: AgentFrame, inputs: &mpsc::Sender<Input>) -> bool {
        match frame {
            AgentFrame::Binary(bytes) => {
                if let Some(header) = LogFrame::decode(&bytes) {
                    self.streams.deliver(header.stream, LogMessage::Frame(header, bytes.slice(LogFrame::BYTES..)));
                }
                true
            }
            AgentFrame::Text(text) => match serde_json::from_str(&text) {
                Ok(FromAgent::LogClosed { stream, error }) => {
                    self.streams.deliver(stream, LogMessage::Closed(error));
                    true
                }
                Ok(frame) => inputs.send(Input::Agent(node.clone(), frame)).await.is_ok(),
                Err(e) => {
                    // A newer agent may say more than this coordinator knows.
                    tracing::warn!(%node, "a frame is not understood and passed over: {e}");
                    true
                }
            },
        }
    }
}
