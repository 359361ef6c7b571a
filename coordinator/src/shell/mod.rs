//! The shell around the engine: clock, store, links to agents, logs, control. It does; it does not decide.

use std::path::Path;

pub mod agents;
pub mod bounds;
pub mod ca;
mod cannot_save;
pub mod clock;
pub mod control;
pub mod down;
pub mod driver;
mod follow;
pub mod local;
pub mod logs;
pub mod members;
pub mod metrics;
pub mod packages;
pub mod postmortems;
pub mod serve;
pub mod store;
pub mod tls;
pub mod tokens;
pub mod up;

/// Bytes that an unprivileged process may still write to the disk of a folder.
pub(crate) fn disk_free(dir: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    Some(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}
