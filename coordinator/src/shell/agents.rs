//! The links to agents: who is connected, and a bounded line to each. A line that is full is cut: the agent comes back and says `Hello`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use everlit_api::agent::{FromAgent, LogFrame, PROTOCOL, ToAgent};
use everlit_api::control::{Agent, AgentFrame, AgentLink};
use everlit_api::ids::NodeId;
use everlit_api::join::BadCertificate;
use everlit_api::time::Millis;
use tokio::sync::{mpsc, watch};

use super::driver::Input;
use super::logs::{LogMessage, Streams};
use super::members::Members;

/// Time for the first frame of a link.
const HELLO_WAIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Link {
    session: u64,
    is_local: bool,
    to: mpsc::Sender<String>,
}

/// Everybody who is connected.
#[derive(Debug)]
pub struct Agents {
    links: Mutex<BTreeMap<NodeId, Link>>,
    sessions: AtomicU64,
    report_interval: Millis,
    silence_max: Millis,
    changed: watch::Sender<u64>,
    /// Log streams that are open over the links.
    pub streams: Streams,
}

impl Agents {
    /// Nobody yet.
    pub fn new(report_interval: Millis, silence_max: Millis) -> Self {
        Self {
            links: Mutex::default(),
            sessions: AtomicU64::new(1),
            report_interval,
            silence_max,
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

    /// The nodes of this machine's own agents that are connected.
    pub fn local(&self) -> Vec<NodeId> {
        self.links().iter().filter(|(_, link)| link.is_local).map(|(node, _)| node.clone()).collect()
    }

    /// Tells a node's agent that it is no more wanted, and ends its link.
    pub fn expel(&self, node: &NodeId, reason: &str) {
        if let Some(link) = self.links().remove(node) {
            // Ended by dropping it, after what was said before.
            let _ = link.to.try_send(refused(reason, true));
        }
    }

    /// Changes whenever a link comes or goes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Serves a link until it ends.
    pub async fn serve(&self, agent: &Agent, mut link: AgentLink, members: &Members, inputs: &mpsc::Sender<Input>) {
        let first = tokio::time::timeout(HELLO_WAIT, link.from.recv()).await;
        let hello = match first {
            Ok(Some(AgentFrame::Text(text))) => serde_json::from_str(&text),
            _ => return,
        };
        let hello = match hello {
            Ok(FromAgent::Hello(hello)) if hello.protocol == PROTOCOL => hello,
            Ok(FromAgent::Hello(hello)) => {
                let why =
                    format!("this agent speaks protocol {}, and the coordinator {PROTOCOL}: install the same version", hello.protocol);
                return turn_away(&link, &hello.node, &why).await;
            }
            other => {
                tracing::warn!("a link that does not begin with hello: {:?}", other.err());
                return;
            }
        };
        let node = hello.node.clone();
        let is_local = *agent == Agent::Local;
        match agent {
            Agent::Node { node: own, .. } if *own != node => {
                let why = format!("this agent says that it is {node}, and its certificate is that of {own}");
                return turn_away(&link, &node, &why).await;
            }
            Agent::Local if members.is_member(&node) => {
                let why = format!("{node} is the name of a node that joined: start one of them with another --node");
                return turn_away(&link, &node, &why).await;
            }
            Agent::Local | Agent::Node { .. } => {}
        }
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (report_interval, silence_max) = (self.report_interval, Some(self.silence_max));
        let welcome = ToAgent::Welcome { protocol: PROTOCOL, report_interval, silence_max };
        let text = serde_json::to_string(&welcome).expect("frames are plain data");
        if link.to.send(text).await.is_err() {
            return;
        }
        let before = self.links().insert(node.clone(), Link { session, is_local, to: link.to });
        drop(before);
        if !is_local && !members.is_member(&node) {
            // It was expelled while it connected.
            return self.expel(&node, BadCertificate::Expelled.detail());
        }
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
                Ok(FromAgent::Hello(_)) => {
                    tracing::warn!(%node, "a second hello on one link: it is ended");
                    false
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

fn refused(reason: &str, expelled: bool) -> String {
    serde_json::to_string(&ToAgent::Refused { reason: reason.into(), expelled }).expect("frames are plain data")
}

/// Says why a link is not taken; it ends with that.
async fn turn_away(link: &AgentLink, node: &NodeId, why: &str) {
    tracing::error!(%node, "an agent is turned away: {why}");
    let _ = link.to.send(refused(why, false)).await;
}
