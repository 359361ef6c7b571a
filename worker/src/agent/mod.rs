//! The agent: supervises the ranks of one node, tells a coordinator about them, and outlives it.
//!
//! The [`engine`] decides and does nothing; the `driver` does and decides nothing: one `select!` over the link, shims, the kernel's news of
//! files, signals and the engine's clock. Everything that can block for long (preparing a gang, reading back a checkpoint, removing folders,
//! reading logs) runs on other threads. A rank's process belongs to its shim, so nothing here may assume that it started what it finds.

mod adopt;
mod archives;
mod begin;
mod checkpoints;
pub mod cli;
mod copies;
mod data;
mod dial;
mod driver;
mod effects;
pub mod engine;
mod environment;
mod fetch_stored;
mod folders;
mod gpu;
mod gpu_memory;
mod heartbeat;
mod identity;
mod join;
mod late;
mod limits;
mod link;
mod load;
mod logs;
mod memory;
mod metrics;
mod packages;
mod place;
mod policies;
mod preprocess;
mod procs;
mod progress;
mod ranks;
mod resume;
mod shim;
mod stacks;
mod start;
mod status;
mod uploads;
mod watch;
