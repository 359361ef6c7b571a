//! Kinds of faults of a store, as they are told, counted and acted on.

use serde::{Deserialize, Serialize};

/// What kind of fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// What was given to open it contradicts itself, or lacks something.
    Settings,
    /// It does not know who asks, or does not believe it.
    Credentials,
    /// The clock here is off by more than it allows.
    Clock,
    /// It knows who asks, and that one may not.
    Denied,
    /// There is no such bucket or folder.
    NoBucket,
    /// There is no such object.
    NotFound,
    /// Another one was first.
    Conflict,
    /// It has no room, or a quota is used up.
    Full,
    /// It is asked too much at a time, or has an hour of its own.
    Busy,
    /// It can not be reached, or the connection broke.
    Unreachable,
    /// It did not answer in time.
    TimedOut,
    /// What it gave is not what was put there.
    Damaged,
    /// Anything else.
    Other,
}

impl Trouble {
    /// As it is counted.
    pub fn name(self) -> &'static str {
        match self {
            Self::Settings => "settings",
            Self::Credentials => "credentials",
            Self::Clock => "clock",
            Self::Denied => "denied",
            Self::NoBucket => "no_bucket",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Full => "full",
            Self::Busy => "busy",
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Damaged => "damaged",
            Self::Other => "other",
        }
    }

    /// Whether the same may work later, without anybody changing what was asked for. A clock is set right.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Clock | Self::Full | Self::Busy | Self::Unreachable | Self::TimedOut | Self::Conflict | Self::Other)
    }
}
