//! Where a job is, or would be, and why not elsewhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::JobState;
use crate::ids::NodeId;
use crate::job::JobSpec;
use crate::model::MemoryEstimate;

/// `GET /jobs/{id}/explain`: why it is not running.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// The job's state.
    pub state: JobState,
    /// In one sentence.
    pub reason: String,
    /// Jobs before it in the queue.
    pub position: Option<u64>,
    /// A sentence per node, of 50 nodes at most.
    pub nodes: BTreeMap<String, String>,
    /// Of how many nodes more each sentence is true.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub more_nodes: BTreeMap<String, u64>,
}

/// The answer to `POST /jobs?dry_run=true`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlacementPlan {
    /// It would start at once.
    pub fits_now: bool,
    /// It could start on these nodes when they are empty.
    pub fits_ever: bool,
    /// In one sentence.
    pub reason: String,
    /// Ranks per node.
    pub placement: Vec<PlacedRanks>,
    /// What each rank of the built-in program will take in training; null for other programs.
    #[serde(default)]
    pub memory_estimate: Option<MemoryEstimate>,
    /// The job with every default filled in.
    pub spec: JobSpec,
}

/// Ranks of a gang on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlacedRanks {
    /// Where.
    pub node: NodeId,
    /// The first rank there.
    pub first_rank: u32,
    /// How many, in a row.
    pub count: u32,
    /// Indexes of the GPUs granted there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<u32>,
}

/// Keeps jobs off a node that do not tolerate it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct Taint {
    /// Like `reserved-for`.
    pub key: String,
    /// Like `research`; may be empty.
    #[serde(default)]
    pub value: String,
}
