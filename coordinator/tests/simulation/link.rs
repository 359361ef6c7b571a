//! The network between agents and the coordinator: sessions in which frames keep their order, take time, may come twice, and are lost
//! when the session is cut. Each end learns of a cut by itself, at its own time.

use std::collections::BTreeMap;

use everlit_api::agent::copies::CopyDoor;
use everlit_api::agent::{FromAgent, Hello, PROTOCOL, ToAgent};
use everlit_api::ids::NodeId;
use everlit_worker::agent::engine::Event as AgentEvent;

use crate::world::{Happening, World};

/// One connection.
#[derive(Debug, Clone)]
pub struct Link {
    pub node: usize,
    agent_life: u64,
    coordinator_life: u64,
    /// Frames that would come later are lost.
    cut_at: Option<u64>,
    /// The coordinator has had the hello, and not seen the end.
    pub coordinator_up: bool,
    pub agent_seen_end: bool,
    /// When the last frame arrives, each way.
    last: [u64; 2],
    pub since: u64,
}

#[derive(Debug, Default)]
pub struct Links {
    pub all: BTreeMap<u64, Link>,
    next: u64,
    /// The next frame comes twice.
    pub duplicate: bool,
}

impl World {
    /// The agent's session, as the agent sees it.
    pub fn session_of(&self, node: usize) -> Option<u64> {
        let own = |link: &Link| link.node == node && !link.agent_seen_end && link.agent_life == self.nodes[node].life;
        self.links.all.iter().find(|(_, link)| own(link)).map(|(id, _)| *id)
    }

    /// Since when a node can be reached: over a session that is not cut, and that both ends believe in.
    pub fn reached_since(&self, node: usize) -> Option<u64> {
        let own = &self.nodes[node];
        let stands = |link: &&Link| {
            link.node == node
                && link.cut_at.is_none()
                && link.coordinator_up
                && link.coordinator_life == self.coordinator.life
                && link.agent_life == own.life
        };
        self.links.all.values().find(stands).map(|link| link.since)
    }

    pub fn dial(&mut self, node: usize, life: u64) {
        if self.nodes[node].life != life || self.nodes[node].agent.is_none() || self.session_of(node).is_some() {
            return;
        }
        if self.nodes[node].partitioned || self.coordinator.engine.is_none() {
            return self.soon(50, 2_000, Happening::Dial { node, life });
        }
        self.links.next += 1;
        let session = self.links.next;
        let link = Link {
            node,
            agent_life: life,
            coordinator_life: self.coordinator.life,
            cut_at: None,
            coordinator_up: false,
            agent_seen_end: false,
            last: [self.now; 2],
            since: self.now,
        };
        self.links.all.insert(session, link);
        self.note(10, node as u64, session);
        let hello = self.hello_of(node);
        self.send_to_coordinator(node, FromAgent::Hello(hello));
        self.tell_agent(node, AgentEvent::Linked);
    }

    fn hello_of(&self, node: usize) -> Hello {
        let own = &self.nodes[node];
        let engine = own.agent.as_ref().expect("a living agent dials");
        let (ranks, checkpoints, draining) = engine.hello(self.now - own.base);
        Hello {
            protocol: PROTOCOL,
            node: own.id.clone(),
            boot_id: format!("boot-{}", own.boot),
            version: "simulated".into(),
            pid: 1,
            capacity: own.capacity.clone(),
            ranks,
            checkpoints,
            draining,
            address: own.address.clone(),
            copies: own.address.as_ref().map(|_| CopyDoor { port: 1, certificate: String::new(), secret: String::new() }),
            labels: Default::default(),
            taints: Vec::new(),
        }
    }

    pub fn send_to_coordinator(&mut self, node: usize, frame: FromAgent) {
        let Some(session) = self.session_of(node) else { return };
        for at in self.arrivals(session, 0) {
            self.at(at, Happening::ToCoordinator { session, frame: Box::new(frame.clone()) });
        }
    }

    pub fn send_to_agent(&mut self, node: &NodeId, frame: ToAgent) {
        let Some(session) = self.coordinator.sessions.get(node).copied() else { return };
        if !self.links.all.get(&session).is_some_and(|link| link.coordinator_up) {
            return;
        }
        for at in self.arrivals(session, 1) {
            self.at(at, Happening::ToAgent { session, frame: Box::new(frame.clone()) });
        }
    }

    /// When a frame arrives: after those before it, and maybe twice.
    fn arrivals(&mut self, session: u64, way: usize) -> Vec<u64> {
        let delay = self.random.between(1, 15);
        let twice = std::mem::take(&mut self.links.duplicate);
        let Some(link) = self.links.all.get_mut(&session) else { return Vec::new() };
        let at = (self.now + delay).max(link.last[way]);
        link.last[way] = at;
        if twice { vec![at, at] } else { vec![at] }
    }

    fn stands(&self, session: u64) -> Option<&Link> {
        self.links.all.get(&session).filter(|link| link.cut_at.is_none_or(|at| self.now < at))
    }

    pub fn deliver_to_coordinator(&mut self, session: u64, frame: FromAgent) {
        let life = self.coordinator.life;
        let Some(link) = self.stands(session).filter(|link| link.coordinator_life == life) else { return };
        let node = self.nodes[link.node].id.clone();
        let hello = matches!(frame, FromAgent::Hello(_));
        if !hello && !link.coordinator_up {
            return;
        }
        if let Some(link) = self.links.all.get_mut(&session) {
            link.coordinator_up = true;
        }
        self.hear(node, session, frame);
    }

    pub fn deliver_to_agent(&mut self, session: u64, frame: ToAgent) {
        let Some(link) = self.stands(session).filter(|link| !link.agent_seen_end) else { return };
        let node = link.node;
        if self.nodes[node].life != link.agent_life {
            return;
        }
        let event = match frame {
            ToAgent::StartGang(spec) => AgentEvent::GangOrdered(spec),
            ToAgent::StopGang { job, attempt, grace } => AgentEvent::StopOrdered { job, attempt, grace },
            ToAgent::SaveNow { job, attempt } => AgentEvent::SaveOrdered { job, attempt },
            ToAgent::Forget { incarnations } => AgentEvent::ForgetOrdered(incarnations),
            ToAgent::RemoveJob { job } => AgentEvent::RemoveOrdered(job),
            ToAgent::JobEnded { job } => AgentEvent::JobEnded(job),
            ToAgent::CopyCheckpoint(order) => {
                let life = self.nodes[node].life;
                return self.soon(20, 3_000, Happening::Copy { node, life, order });
            }
            ToAgent::PutAside { job, attempt, beyond } => return self.put_aside(node, job, attempt, beyond),
            ToAgent::Shutdown => AgentEvent::ShutdownOrdered,
            ToAgent::Welcome { .. }
            | ToAgent::Refused { .. }
            // No world has a store.
            | ToAgent::Upload(_)
            | ToAgent::ArchiveLogs(_)
            | ToAgent::OpenLog { .. }
            | ToAgent::LogCredit { .. }
            | ToAgent::CloseLog { .. } => return,
        };
        self.tell_agent(node, event);
    }

    /// Cuts every session that is chosen; both ends notice within these bounds.
    pub fn cut_where(&mut self, chosen: impl Fn(&Link) -> bool, least: u64, most: u64) {
        let sessions: Vec<u64> =
            self.links.all.iter().filter(|(_, link)| link.cut_at.is_none() && chosen(link)).map(|(id, _)| *id).collect();
        for session in sessions {
            if let Some(link) = self.links.all.get_mut(&session) {
                link.cut_at = Some(self.now);
            }
            for agent_side in [true, false] {
                self.soon(least, most, Happening::Notice { session, agent_side });
            }
        }
    }

    pub fn notice(&mut self, session: u64, agent_side: bool) {
        let Some(link) = self.links.all.get_mut(&session) else { return };
        let (node, life) = (link.node, link.agent_life);
        if agent_side {
            let alive = !link.agent_seen_end && self.nodes[node].life == life && self.nodes[node].agent.is_some();
            link.agent_seen_end = true;
            if alive {
                self.tell_agent(node, AgentEvent::Unlinked);
                self.soon(50, 500, Happening::Dial { node, life });
            }
            return;
        }
        let up = std::mem::take(&mut link.coordinator_up) && link.coordinator_life == self.coordinator.life;
        let id = self.nodes[node].id.clone();
        if up && self.coordinator.sessions.get(&id) == Some(&session) {
            self.feed(everlit_coordinator::engine::Event::NodeUnlinked { node: id });
        }
    }
}
