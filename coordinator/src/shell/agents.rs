//! The links to agents: who is connected, and a bounded line to each. A line that is full is cut: the agent comes back and says `Hello`.
//!
//! Each link has a share of the driver's queue, by bytes: one that sends as fast as it can waits for its own frames to be handled, and others
//! go on between them. The trap: what is not understood may be a newer agent's, and is passed over; what is no frame at all ends the link.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use everlit_api::agent::copies::{CopyDoor, Source};
use everlit_api::agent::{FromAgent, LogFrame, PROTOCOL, ToAgent};
use everlit_api::control::{Agent, AgentFrame, AgentLink};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::join::BadCertificate;
use everlit_api::time::Millis;
use serde::Deserialize;
use tokio::sync::{Semaphore, mpsc, watch};

use super::driver::Input;
use super::logs::{Delivery, LogMessage, Streams};
use super::members::Members;

/// Time for the first frame of a link.
const HELLO_WAIT: Duration = Duration::from_secs(10);

/// Bytes of one link's frames that may wait for the driver, and what a frame counts for at least: 256 small ones, or one that is large.
const WAITING_BYTES_MAX: u32 = 1024 * 1024;
const FRAME_COUNTS_MIN: u32 = 4 * 1024;

/// What the `Hello` of every version has.
#[derive(Debug, Deserialize)]
struct AnyHello {
    protocol: u32,
    node: NodeId,
}

/// One link while it is served.
struct Served<'a> {
    node: &'a NodeId,
    inputs: &'a mpsc::Sender<Input>,
    /// Its share of the driver's queue.
    room: Arc<Semaphore>,
    /// Frames that were passed over.
    strange: u64,
}

#[derive(Debug)]
struct Link {
    session: u64,
    is_local: bool,
    to: mpsc::Sender<String>,
    /// Its address, and its door for checkpoints.
    copies: Option<(String, CopyDoor)>,
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

    /// Says how those are reached who give a job's checkpoints; who can not be reached now is left out.
    pub fn reach(&self, job: JobId, sources: &mut Vec<Source>) {
        let links = self.links();
        sources.retain_mut(|source| {
            let Some((address, door)) = links.get(&source.node).and_then(|link| link.copies.as_ref()) else { return false };
            (source.address, source.port, source.certificate) = (address.clone(), door.port, door.certificate.clone());
            source.ticket = door.ticket(job);
            true
        });
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
        let text = match first {
            Ok(Some(AgentFrame::Text(text))) => text,
            Ok(Some(AgentFrame::Binary(_))) => {
                return not_begun(&link, "its first frame is of a log").await;
            }
            Ok(None) => return,
            Err(_) => return tracing::warn!("a link is ended: it said nothing for {} s", HELLO_WAIT.as_secs()),
        };
        // Of another version it may have any other fields.
        if let Ok(AnyHello { protocol, node }) = serde_json::from_str(&text)
            && protocol != PROTOCOL
        {
            let why = format!("this agent speaks protocol {protocol}, and the coordinator {PROTOCOL}: install the same version");
            return turn_away(&link, &node, &why).await;
        }
        let hello = match serde_json::from_str(&text) {
            Ok(FromAgent::Hello(hello)) => hello,
            Ok(_) => return not_begun(&link, "its first frame is another").await,
            Err(error) => return not_begun(&link, &format!("its first frame can not be read: {error}")).await,
        };
        drop(text);
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
        let copies = hello.address.clone().zip(hello.copies.clone());
        let before = self.links().insert(node.clone(), Link { session, is_local, to: link.to, copies });
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
        let mut own = Served { node: &node, inputs, room: Arc::new(Semaphore::new(WAITING_BYTES_MAX as usize)), strange: 0 };
        while let Some(frame) = link.from.recv().await {
            if !self.pass_on(&mut own, frame).await {
                break;
            }
        }
        if own.strange > 1 {
            tracing::warn!(%node, "{} frames of its link were passed over", own.strange);
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
    async fn pass_on(&self, own: &mut Served<'_>, frame: AgentFrame) -> bool {
        let text = match frame {
            AgentFrame::Text(text) => text,
            AgentFrame::Binary(bytes) => {
                let Some(header) = LogFrame::decode(&bytes) else {
                    own.pass_over("a log frame that is too short");
                    return true;
                };
                return self.deliver(own, header.stream, LogMessage::Frame(header, bytes.slice(LogFrame::BYTES..)));
            }
        };
        match serde_json::from_str(&text) {
            Ok(FromAgent::LogClosed { stream, error }) => self.deliver(own, stream, LogMessage::Closed(error)),
            Ok(FromAgent::Hello(_)) => {
                tracing::warn!(node = %own.node, "a second hello on one link: it is ended");
                if let Some(link) = self.links().get(own.node) {
                    // Full, it says so by its end.
                    let _ = link.to.try_send(refused("a second `hello` on one link", false));
                }
                false
            }
            Ok(frame) => {
                let counts = u32::try_from(text.len()).unwrap_or(u32::MAX).clamp(FRAME_COUNTS_MIN, WAITING_BYTES_MAX);
                drop(text);
                let Ok(room) = own.room.clone().acquire_many_owned(counts).await else { return false };
                own.inputs.send(Input::Agent(own.node.clone(), frame, room)).await.is_ok()
            }
            Err(e) => {
                // A newer agent may say more than this coordinator knows.
                own.pass_over(&e.to_string());
                true
            }
        }
    }

    fn deliver(&self, own: &mut Served<'_>, stream: u64, message: LogMessage) -> bool {
        match self.streams.deliver(own.node, stream, message) {
            Delivery::Done => true,
            Delivery::Foreign => {
                own.pass_over("part of a log that another node was asked for");
                true
            }
            Delivery::Overrun => {
                tracing::warn!(node = %own.node, "it sends more of a log than it was given credit for: its link is ended");
                false
            }
        }
    }
}

impl Served<'_> {
    /// The first is told, and how many there were when the link ends.
    fn pass_over(&mut self, why: &str) {
        self.strange += 1;
        if self.strange == 1 {
            tracing::warn!(node = %self.node, "a frame is passed over: {why}");
        }
    }
}

fn refused(reason: &str, expelled: bool) -> String {
    serde_json::to_string(&ToAgent::Refused { reason: reason.into(), expelled }).expect("frames are plain data")
}

/// Says that a link is not one of an agent; it ends with that.
async fn not_begun(link: &AgentLink, what: &str) {
    tracing::warn!("a link that does not begin with hello is ended: {what}");
    let _ = link.to.send(refused(&format!("a link begins with `hello`, and {what}"), false)).await;
}

/// Says why a link is not taken; it ends with that.
async fn turn_away(link: &AgentLink, node: &NodeId, why: &str) {
    tracing::error!(%node, "an agent is turned away: {why}");
    let _ = link.to.send(refused(why, false)).await;
}

#[cfg(test)]
mod tests;
