//! What follows a failure by what the failed rank wrote: a pattern, and what is done where it matches.
//!
//! The agent looks, because it has the output and the pattern goes with the gang; the engine decides by what it found. Patterns are bounded
//! here, once, so that what the door takes the agent can use.

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bytes of a compiled pattern, and of what its search may remember.
const COMPILED_BYTES_MAX: usize = 256 * 1024;
/// Characters of a pattern in a sentence.
const SHOWN_CHARS_MAX: usize = 80;

/// What follows a failure when the failed rank's last output has a line that matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogPolicy {
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A regular expression that is looked for in each line.
    pub pattern: String,
    /// What is done.
    pub action: LogAction,
}

/// What follows when a line matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogAction {
    /// The job is not placed on that node again.
    ExcludeNode,
    /// The job fails at once.
    CancelRetries,
}

impl LogAction {
    /// As it is written in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ExcludeNode => "exclude_node",
            Self::CancelRetries => "cancel_retries",
        }
    }
}

impl LogPolicy {
    /// The pattern, ready to search.
    pub fn compile(pattern: &str) -> Result<Regex, regex::Error> {
        RegexBuilder::new(pattern).size_limit(COMPILED_BYTES_MAX).dfa_size_limit(COMPILED_BYTES_MAX).build()
    }

    /// Its name and its pattern, cut for a sentence.
    pub fn title(&self) -> String {
        let name = self.name.iter().map(|name| format!("\"{name}\" ")).collect::<String>();
        let cut: String = self.pattern.chars().take(SHOWN_CHARS_MAX).collect();
        if cut.len() < self.pattern.len() { format!("{name}`{cut}…`") } else { format!("{name}`{cut}`") }
    }
}
