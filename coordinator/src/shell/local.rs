//! This machine's own agent: found alive or started, and started again when it dies. Its ranks never notice.
//!
//! The agent is in a session of its own, so no Ctrl-C and no closed terminal reaches it. Whether one lives is told by the lock on its
//! folder, not by a process id.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

/// Between two looks for the agent.
const LOOK: Duration = Duration::from_millis(500);
/// Longest wait before an agent that keeps dying is started again.
const RESPAWN_MAX: Duration = Duration::from_secs(10);

/// Where this machine's agent lives and how it is started.
#[derive(Debug, Clone)]
pub struct LocalAgent {
    /// The agent's own folder.
    pub dir: PathBuf,
    /// The file that tells it where the coordinator is.
    pub coordinator_file: PathBuf,
    /// The program.
    pub program: PathBuf,
    /// Where ranks of other nodes reach this machine; `None` leaves it to the agent's own environment.
    pub address: Option<IpAddr>,
}

/// Where others reach this machine, when its doors are open for others: the address that is listened on, or the one that the way out has.
pub fn reached_at(listen: IpAddr) -> Option<IpAddr> {
    if listen.is_loopback() || std::env::var_os("EVERLIT_ADDRESS").is_some() {
        return None;
    }
    if !listen.is_unspecified() {
        return Some(listen);
    }
    // Nothing is sent: the kernel only looks up the way to an address that is kept for documents.
    let (own, far) = if listen.is_ipv4() { ("0.0.0.0:0", "192.0.2.1:9") } else { ("[::]:0", "[2001:db8::1]:9") };
    let socket = UdpSocket::bind(own).ok()?;
    socket.connect(far).ok()?;
    socket.local_addr().ok().map(|at| at.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

/// A folder's lock; given up when dropped, or when the process ends however it does.
pub fn try_lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).read(true).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// A program that is installed beside this one.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    Ok(own.parent().unwrap_or(Path::new("/")).join(name))
}

impl LocalAgent {
    /// Whether an agent holds the folder.
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(self.dir.exists() && try_lock(&self.dir.join("agent.lock"))?.is_none())
    }

    /// Keeps one alive until this future is dropped; the agent itself goes on.
    pub async fn keep(&self) {
        let mut wait = LOOK;
        loop {
            match self.is_alive() {
                Ok(true) => wait = LOOK,
                Ok(false) => match self.spawn() {
                    Ok(mut child) => {
                        tracing::info!(pid = child.id(), "this machine's agent was started");
                        let begun = tokio::time::Instant::now();
                        let ended = child.wait().await;
                        if begun.elapsed() >= RESPAWN_MAX {
                            wait = LOOK;
                        }
                        // Another may have come first: then this one has ended and said so in its log.
                        tracing::warn!("this machine's agent ended: {ended:?}; {}", self.dir.join("agent.log").display());
                        tokio::time::sleep(wait).await;
                        wait = (wait * 2).min(RESPAWN_MAX);
                        continue;
                    }
                    Err(e) => {
                        tracing::error!("{} can not be started: {e}", self.program.display());
                        wait = (wait * 2).min(RESPAWN_MAX);
                    }
                },
                Err(e) => tracing::error!("{}: {e}", self.dir.display()),
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn spawn(&self) -> io::Result<tokio::process::Child> {
        std::fs::create_dir_all(&self.dir)?;
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("agent.log"))?;
        let mut command = std::process::Command::new(&self.program);
        command
            .arg("run")
            .arg("--data-dir")
            .arg(&self.dir)
            .arg("--coordinator-file")
            .arg(&self.coordinator_file)
            .args(self.address.iter().flat_map(|at| ["--address".to_string(), at.to_string()]))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        for name in everlit_api::service::VARIABLES {
            command.env_remove(name);
        }
        // SAFETY: setsid is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        tokio::process::Command::from(command).kill_on_drop(false).spawn()
    }
}
