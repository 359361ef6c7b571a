//! Who holds the data folder, and how it is: the lock that only one agent can have, and the socket behind `everlit-agent health`.
//!
//! The socket is answered by the driver's own loop, so an answer says that the loop turns.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use super::folders::Folders;

const SOCKET_NAME: &str = "agent.sock";
/// Longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A killed agent may still hold the lock for a moment: a child that it was starting has it until its exec.
const LOCK_MAX: Duration = Duration::from_secs(2);

/// What an agent says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Status {
    /// Its process id.
    pub pid: u32,
    /// A coordinator is connected.
    pub linked: bool,
    /// It is ending.
    pub draining: bool,
    /// Ranks whose process lives.
    pub ranks: usize,
}

/// Takes the data folder's lock for the life of this process.
pub(super) fn lock(folders: &Folders) -> anyhow::Result<File> {
    let path = folders.lock();
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
    let until = Instant::now() + LOCK_MAX;
    // SAFETY: a system call on an open descriptor.
    while unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        if Instant::now() > until {
            anyhow::bail!("another agent holds `{}`: end it first, or use another --data-dir", path.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // For `everlit down`: the process to tell, trusted only while the lock is held.
    file.set_len(0)?;
    (&file).write_all(std::process::id().to_string().as_bytes())?;
    Ok(file)
}

/// The socket's path through the folder's descriptor, because its own may be too long.
fn socket_path(folder: &File) -> String {
    format!("/proc/self/fd/{}/{SOCKET_NAME}", folder.as_raw_fd())
}

/// Opens the socket; the lock must be held.
pub(super) fn listen(root: &Path) -> io::Result<UnixListener> {
    let folder = File::open(root)?;
    let path = socket_path(&folder);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

/// Asks the agent that holds the folder.
pub(super) fn ask(root: &Path) -> io::Result<Status> {
    let folder = File::open(root)?;
    let mut stream = UnixStream::connect(socket_path(&folder))?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    serde_json::from_str(&text).map_err(io::Error::other)
}
