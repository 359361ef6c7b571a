//! Small bodies that are sent to the REST API and the answers that belong to them alone (CONTRACT section 6).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::JobId;
use crate::status::JobState;
use crate::time::Millis;

/// The body of a stop; may be empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct StopRequest {
    /// Skip the grace: SIGKILL at once.
    pub force: bool,
}

/// The body of a purge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PurgeRequest {
    /// Finished at least this long ago; `0s` for all.
    pub older_than: Millis,
    /// Only these final states; empty means all three.
    #[serde(default)]
    pub states: Vec<JobState>,
    /// Tell, but remove nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a purge removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Purged {
    /// Ids, newest first.
    pub removed: Vec<JobId>,
    /// Nothing was removed: these would be.
    pub dry_run: bool,
}
