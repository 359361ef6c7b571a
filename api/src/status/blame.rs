//! What is held against nodes and their GPUs, as `GET /nodes` shows it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::JobId;
use crate::rank::Cause;
use crate::time::Timestamp;

/// A failure that is held against a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BlameView {
    /// When it was judged.
    pub time: Timestamp,
    /// Whose rank failed.
    pub job_id: JobId,
    /// What kind.
    pub cause: Cause,
}

/// A hardware error that is held against a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuBlameView {
    /// When it was heard of.
    pub time: Timestamp,
    /// Index as the driver counts.
    pub gpu: u32,
    /// Unique id of the device.
    pub uuid: String,
    /// NVIDIA's number for the error.
    pub xid: u32,
    /// In one sentence.
    pub reason: String,
    /// Whose ranks had the GPU, if any had.
    pub job_id: Option<JobId>,
}
