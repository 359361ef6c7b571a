//! Nodes as they are shown: what they have, what they do, what is held against them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{BlameView, GpuBlameView, Taint};
use crate::ids::NodeId;
use crate::join::Joined;

/// What a node has.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// CPUs that the agent may use.
    pub cpus: f64,
    /// Bytes of memory.
    pub memory: u64,
    /// GPUs by index.
    pub gpus: Vec<GpuInfo>,
    /// Ranks at most.
    pub slots: u32,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuInfo {
    /// Index as the driver counts.
    pub index: u32,
    /// Like `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Unique id of the device.
    pub uuid: String,
    /// Bytes of memory.
    pub memory: u64,
}

/// What a node does right now.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeLoad {
    /// Busy CPUs, 0 to the number of CPUs.
    pub cpus: f64,
    /// Bytes of memory in use.
    pub memory: u64,
    /// Bytes free on the disk of the agent's folder.
    pub disk_free: u64,
    /// Per GPU, in the order of the capacity.
    #[serde(default)]
    pub gpus: Vec<GpuLoad>,
    /// Resident bytes of the agent itself.
    #[serde(default)]
    pub agent_memory: u64,
}

/// What a GPU does right now.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GpuLoad {
    /// 0 to 1.
    pub utilization: f64,
    /// Bytes in use.
    pub memory: u64,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
}

/// `GET /nodes`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// `ready`, `lost`, and whether it takes new ranks.
    pub state: NodeState,
    /// Takes no new ranks.
    pub cordoned: bool,
    /// How it joined; null for the agent of the coordinator's own machine.
    #[serde(default)]
    pub joined: Option<Joined>,
    /// What it has.
    pub capacity: Capacity,
    /// What it does.
    pub load: NodeLoad,
    /// Ranks placed there.
    pub ranks: u32,
    /// CPUs reserved.
    pub cpus_reserved: f64,
    /// Bytes reserved.
    pub memory_reserved: u64,
    /// Indexes of the GPUs granted, whole or in part.
    pub gpus_granted: Vec<u32>,
    /// Bytes of GPU memory reserved on GPUs that ranks share, by index.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gpu_memory_reserved: BTreeMap<u32, u64>,
    /// Where ranks of other nodes reach it; without it no gang of several nodes has ranks here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// What kind of node it is, for `node_selector`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// It takes only jobs that tolerate all of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<Taint>,
    /// Version of its agent.
    pub agent_version: String,
    /// Since its last report.
    pub report_age_seconds: Option<f64>,
    /// New ranks go elsewhere where there is room: two failures or more in a day may be the machine's.
    #[serde(default)]
    pub avoided: bool,
    /// Failures of the last day that may be the machine's, oldest first.
    #[serde(default)]
    pub blames: Vec<BlameView>,
    /// Indexes of GPUs that new ranks get last: one that needs a reset or replacement, or had two hardware errors or more in a day.
    #[serde(default)]
    pub gpus_avoided: Vec<u32>,
    /// Hardware errors of its GPUs in the last day, oldest first.
    #[serde(default)]
    pub gpu_blames: Vec<GpuBlameView>,
}

/// Whether a node can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Its agent is connected.
    Ready,
    /// Its agent has not been heard of for `--node-timeout`, or never since the start.
    Lost,
    /// It is being emptied.
    Draining,
}
