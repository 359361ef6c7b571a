//! The shim: the small parent of one rank. It outlives agent and coordinator, keeps the rank's output and writes down how it ended.
//!
//! One process per rank, one thread, no async runtime, no allocation to speak of: it must stay near two megabytes. It knows nothing of jobs
//! beyond the names in its [`spec`]. Its agent gives it three descriptors as standard streams: the spec (a memory file, so that no secret
//! is in a folder or in argv), the run folder's `state` file, already locked (the lock lives as long as the shim: who can take it knows that
//! the shim is dead), and the first control connection. The trap: whatever kills the shim kills its rank, so only SIGKILL may.

use std::process::ExitCode;

mod control;
mod output;
mod rank;
mod run;
pub mod segments;
pub mod spec;
pub mod state;

/// Version of the spec, the state lines and the control orders; said in the first state line.
pub const PROTOCOL: u32 = 1;
/// The file of state lines in a run folder; whoever holds its lock is the rank's shim, or about to become it.
pub const STATE_NAME: &str = "state";
/// The socket in a run folder that later agents connect to.
pub const SOCKET_NAME: &str = "shim.sock";
/// Lines of output kept for the exit record: what the agent searches. Native stack traces can be a hundred lines below the error.
pub const TAIL_LINES_MAX: usize = 200;
/// Bytes of output kept for the exit record; in escapes it must still fit into a socket's buffer at once.
pub const TAIL_BYTES_MAX: usize = 16 * 1024;

/// The whole program.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(folder), None) = (args.next(), args.next()) else {
        // Nobody to tell when standard error is gone too.
        let _ =
            std::io::Write::write_all(&mut std::io::stderr(), b"everlit-shim is started by everlit-agent, as: everlit-shim RUN_FOLDER\n");
        return ExitCode::from(2);
    };
    run::run(folder.as_ref())
}
