//! Small bodies that are sent to the REST API and what belongs to them alone, lines of a log among it (CONTRACT section 6).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::log::Stream;
use crate::ids::JobId;
use crate::status::JobState;
use crate::time::{Millis, Timestamp};

/// The body of a stop; may be empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct StopRequest {
    /// Skip the grace: SIGKILL at once.
    pub force: bool,
}

/// What `POST /nodes/{id}/drain` takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainRequest {
    /// What lives so long after is killed, whatever grace its job has; null: each its own grace. At most "1d".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Millis>,
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

/// The data of an `event: log`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Who wrote it.
    pub rank: u32,
    /// In which attempt.
    pub attempt: u32,
    /// To which stream.
    pub stream: Stream,
    /// When it was read from the rank.
    pub time: Timestamp,
    /// Without its end; bytes that are not UTF-8 became U+FFFD.
    pub line: String,
    /// It goes on in the next line of the same rank and stream.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}
