//! Links of agents that are bad, confused, newer or busy.

use std::collections::BTreeMap;

use everlit_api::agent::Hello;
use everlit_api::status::{Capacity, NodeLoad};
use tokio::task::JoinHandle;

use super::*;

/// One agent's end of a link that is served.
struct Peer {
    says: mpsc::Sender<AgentFrame>,
    hears: mpsc::Receiver<String>,
    served: JoinHandle<()>,
}

struct Scene {
    agents: Arc<Agents>,
    to_driver: mpsc::Sender<Input>,
    driver: mpsc::Receiver<Input>,
}

fn hello(name: &str) -> FromAgent {
    FromAgent::Hello(Hello {
        protocol: PROTOCOL,
        node: NodeId(name.into()),
        boot_id: "boot".into(),
        version: "0".into(),
        pid: 1,
        capacity: Capacity { cpus: 2.0, memory: 1 << 30, gpus: vec![], slots: 8 },
        ranks: vec![],
        checkpoints: vec![],
        draining: false,
        address: None,
        copies: None,
        labels: BTreeMap::new(),
        taints: vec![],
    })
}

fn text(frame: &FromAgent) -> AgentFrame {
    AgentFrame::Text(serde_json::to_string(frame).unwrap())
}

fn report() -> AgentFrame {
    text(&FromAgent::Report(NodeLoad::default()))
}

impl Scene {
    fn new() -> Self {
        let (to_driver, driver) = mpsc::channel(super::super::driver::INPUTS_MAX);
        Self { agents: Arc::new(Agents::new(Millis(1_000), Millis(10_000))), to_driver, driver }
    }

    fn link(&self) -> Peer {
        let (says, from) = mpsc::channel(4_096);
        let (to, hears) = mpsc::channel(64);
        let (agents, inputs) = (self.agents.clone(), self.to_driver.clone());
        let served = tokio::spawn(async move {
            agents.serve(&Agent::Local, AgentLink { from, to }, &Members::new(vec![], vec![]), &inputs).await;
        });
        Peer { says, hears, served }
    }

    async fn linked(&mut self, name: &str) -> Peer {
        let mut peer = self.link();
        peer.says.send(text(&hello(name))).await.unwrap();
        assert!(peer.hears.recv().await.unwrap().contains("welcome"));
        assert!(matches!(self.driver.recv().await, Some(Input::Linked(..))));
        peer
    }

    /// Waits until so much lies in the driver's queue, and nobody could put more there.
    async fn queued(&self, count: usize) {
        let settled = async {
            while self.driver.len() != count {
                tokio::task::yield_now().await;
            }
            for _ in 0..10_000 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), settled).await.unwrap_or_else(|_| panic!("{} inputs", self.driver.len()));
        assert_eq!(self.driver.len(), count);
    }
}

#[tokio::test]
async fn a_link_begins_with_hello_or_ends() {
    let nested = format!(r#"{{"type":"hello","protocol":{}"#, "[".repeat(1_000_000));
    let firsts = [report(), AgentFrame::Binary(vec![0; 64].into()), AgentFrame::Text("{".into()), AgentFrame::Text(nested)];
    let mut scene = Scene::new();
    for first in firsts {
        let mut peer = scene.link();
        peer.says.send(first).await.unwrap();
        peer.served.await.unwrap();
        let said = peer.hears.recv().await.unwrap();
        assert!(said.contains("refused") && said.contains("a link begins with `hello`, and its first frame"), "{said}");
        assert_eq!(peer.hears.recv().await, None);
    }
    assert!(scene.driver.try_recv().is_err());
}

#[tokio::test]
async fn an_agent_of_another_protocol_is_told_so_whatever_its_hello_has_become() {
    let scene = Scene::new();
    for frame in [r#"{"type":"hello","protocol":2,"node":"n9","everything":{"is":"new"}}"#, r#"{"type":"hello2","protocol":0,"node":"n9"}"#]
    {
        let mut peer = scene.link();
        peer.says.send(AgentFrame::Text(frame.into())).await.unwrap();
        let said = peer.hears.recv().await.unwrap();
        assert!(said.contains("refused") && said.contains("and the coordinator 1: install the same version"), "{said}");
        peer.served.await.unwrap();
    }
    assert!(!scene.agents.is_linked(&NodeId("n9".into())));
}

#[tokio::test]
async fn a_second_hello_ends_the_link() {
    let mut scene = Scene::new();
    let mut peer = scene.linked("n1").await;
    peer.says.send(text(&hello("n1"))).await.unwrap();
    peer.served.await.unwrap();
    assert!(peer.hears.recv().await.unwrap().contains("a second `hello` on one link"));
    assert!(matches!(scene.driver.recv().await, Some(Input::Unlinked(..))));
}

#[tokio::test]
async fn what_is_not_understood_is_passed_over_and_the_link_goes_on() {
    let mut scene = Scene::new();
    let peer = scene.linked("n1").await;
    let strange = [
        AgentFrame::Text(r#"{"type":"from_the_future","it":1}"#.into()),
        AgentFrame::Text(r#"{"type":"started"}"#.into()),
        AgentFrame::Text(r#"{"type":"report","cpu":1e999}"#.into()),
        AgentFrame::Text(format!(r#"{{"type":"report","later":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000))),
        AgentFrame::Text("\0".into()),
        AgentFrame::Binary(vec![].into()),
        AgentFrame::Binary(vec![0; LogFrame::BYTES - 1].into()),
        // A stream that nobody has opened.
        AgentFrame::Binary(vec![7; 1_000].into()),
    ];
    for frame in strange {
        peer.says.send(frame).await.unwrap();
    }
    peer.says.send(text(&FromAgent::Draining)).await.unwrap();
    peer.says.send(report()).await.unwrap();
    assert!(matches!(scene.driver.recv().await, Some(Input::Agent(_, FromAgent::Draining, _))), "the first that was understood");
    assert!(matches!(scene.driver.recv().await, Some(Input::Agent(_, FromAgent::Report(_), _))), "who drains is heard until it is gone");
    assert!(scene.agents.is_linked(&NodeId("n1".into())));
}

#[tokio::test]
async fn who_sends_as_fast_as_it_can_has_its_share_of_the_queue_and_no_more() {
    let mut scene = Scene::new();
    let (busy, quiet, large) = (scene.linked("busy").await, scene.linked("quiet").await, scene.linked("large").await);
    let share = (WAITING_BYTES_MAX / FRAME_COUNTS_MIN) as usize;
    for _ in 0..4 * share {
        busy.says.send(report()).await.unwrap();
    }
    scene.queued(share).await;
    // Another link's frame comes right behind.
    quiet.says.send(report()).await.unwrap();
    scene.queued(share + 1).await;
    // Large frames wait one at a time.
    let padding = " ".repeat(WAITING_BYTES_MAX as usize);
    for _ in 0..3 {
        large.says.send(AgentFrame::Text(format!(r#"{{"type":"draining"{padding}}}"#))).await.unwrap();
    }
    scene.queued(share + 2).await;
    let mut who = BTreeMap::new();
    for _ in 0..4 * share + 4 {
        let Some(Input::Agent(node, _, _)) = scene.driver.recv().await else { panic!("only frames are left") };
        *who.entry(node.0).or_insert(0) += 1;
    }
    assert_eq!(who, BTreeMap::from([("busy".into(), 4 * share), ("quiet".into(), 1), ("large".into(), 3)]), "none was lost");
}
