//! Data shards of jobs that are in a store, on their way to ranks: listed once, fetched into a cache that all jobs of the node share, and
//! linked where the job's ranks read them; and the outputs that ranks make of them, on their way back.
//!
//! Ranks ask by a named pipe and wait for a file, so a program needs no library, and an agent that comes after this one is asked again.
//! What is read is what was listed: another object under the same name is an error, never other data. The trap: a link into the cache may
//! point to nothing (what was not used for longest goes first); who finds it so asks again.

mod cache;
mod feed;
mod fetch;
mod list;
mod outputs;
#[cfg(test)]
mod tests;

pub(super) use cache::Cache;
pub(super) use feed::Feeds;
pub(super) use outputs::{is_made, mark_of};

/// In a job's data folder: the pipe that ranks ask by.
pub(super) const WANT_NAME: &str = "want";
/// In a job's data folder: where shards are.
pub(super) const HAVE_NAME: &str = "have";
/// In a job's data folder: outputs that are to go to the store, and drafts of them.
pub(super) const OUT_NAME: &str = "out";
/// In a job's data folder: a file for each output that is in the store.
pub(super) const DONE_NAME: &str = "done";
/// In a job's place in the store: its outputs.
pub(super) const OUTPUTS_NAME: &str = "shards";
