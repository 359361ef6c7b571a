//! Copies of checkpoints from node to node: what the agents and the coordinator say about them.
//!
//! Each agent that others can reach keeps a door for the bytes: TLS with a certificate that it made for this run and tells the coordinator,
//! so who fetches knows whom to expect. Who fetches shows a ticket for one job, made by the coordinator from a secret of the node that gives.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ids::{JobId, NodeId};
use crate::join::to_hex;

/// What a door's certificate is for, whatever its address.
pub const COPIES_NAME: &str = "copies.everlit.internal";

/// Where other nodes fetch checkpoints from a node; its address is in the hello.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyDoor {
    /// TCP port.
    pub port: u16,
    /// Its certificate, PEM: it is trusted for this and nothing else.
    pub certificate: String,
    /// What its tickets are made from; new with every start of the agent.
    pub secret: String,
}

// Neither is printed with what opens a door.
impl fmt::Debug for CopyDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyDoor").field("port", &self.port).finish_non_exhaustive()
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("node", &self.node).field("address", &self.address).finish_non_exhaustive()
    }
}

impl CopyDoor {
    /// What opens the door for the checkpoints of one job.
    pub fn ticket(&self, job: JobId) -> String {
        let mut hash = Sha256::new();
        for part in [b"everlit copy".as_slice(), self.secret.as_bytes(), job.to_string().as_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        to_hex(&hash.finalize())
    }
}

/// A node that has a checkpoint. The engine names it; the coordinator's shell says how it is reached.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Which.
    pub node: NodeId,
    /// Its address.
    #[serde(default)]
    pub address: String,
    /// The port of its door.
    #[serde(default)]
    pub port: u16,
    /// Its door's certificate, PEM.
    #[serde(default)]
    pub certificate: String,
    /// What opens it for the job.
    #[serde(default)]
    pub ticket: String,
}

impl Source {
    /// One that is only named.
    pub fn named(node: &NodeId) -> Self {
        Self { node: node.clone(), address: String::new(), port: 0, certificate: String::new(), ticket: String::new() }
    }
}

/// A node is to fetch a checkpoint and keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOrder {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub step: u64,
    /// Sum of its files, as its writer's node has told: what has more is another.
    pub bytes: u64,
    /// The job's newest attempt: a node that knows a later one refuses.
    pub attempt: u32,
    /// Checkpoints kept, as `checkpoint.keep`.
    pub keep: u32,
    /// Where it is, to be tried in this order.
    pub sources: Vec<Source>,
}

/// A gang's node may have less than others have: it fetches what is newer before its ranks start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// Whose it is, when it is another job's that this one begins from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<JobId>,
    /// Of this step.
    pub step: u64,
    /// Sum of its files, as its writer's node has told: what has more is another.
    pub bytes: u64,
    /// No node of the gang is known to have it: without it the attempt must not start.
    pub required: bool,
    /// Where it is, to be tried in this order.
    pub sources: Vec<Source>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_for_one_job_and_one_life_of_the_agent() {
        let door = |secret: &str| CopyDoor { port: 1, certificate: String::new(), secret: secret.into() };
        let [one, other] = [1, 2].map(JobId::from_u128);
        assert_eq!(door("a").ticket(one), door("a").ticket(one));
        assert_eq!(door("a").ticket(one).len(), 64);
        assert_ne!(door("a").ticket(one), door("a").ticket(other));
        assert_ne!(door("a").ticket(one), door("b").ticket(one));
    }
}
