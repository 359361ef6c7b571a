//! What the service manager is told (systemd's protocol), by coordinator and agent alike: that it is ready, what goes on, that its loop turns,
//! that its end has begun. Without `NOTIFY_SOCKET` nothing is told.
//!
//! The trap: a [`Pulse`] belongs in the loop that matters. A task of its own would tell of itself alone.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// By these a service manager is told: no program that is started from here may speak for this one.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];
/// What goes on is told this often at least.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// The crate's own `notify` waits for as long as the manager takes nothing; a loop that tells of itself must not. What is lost is told again.
fn tell(states: &[NotifyState<'_>]) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    let told = UnixDatagram::unbound().and_then(|socket| {
        socket.set_nonblocking(true)?;
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(text.as_bytes(), &address)
    });
    if let Err(error) = told {
        tracing::debug!("the service manager is not told: {error}");
    }
}

/// It does from here on what it is for.
pub fn ready() {
    // This one must not be lost.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::warn!("the service manager can not be told: {error}");
    }
}

/// The end has begun.
pub fn ending(why: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(why)]);
}

/// Tells that a loop turns, and what it does.
#[derive(Debug)]
pub struct Pulse {
    every: Option<Interval>,
}

impl Pulse {
    /// As often as this process is asked for it.
    pub fn asked() -> Self {
        let asked = std::env::var_os("NOTIFY_SOCKET").map(|_| sd_notify::watchdog_enabled());
        let every = asked.map(|watchdog| watchdog.map_or(STATUS_EVERY, |most| (most / 3).min(STATUS_EVERY)));
        let every = every.map(|every| {
            let mut every = interval(every.max(Duration::from_millis(1)));
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            every
        });
        Self { every }
    }

    /// When the next word is due; never, where nobody listens.
    pub async fn due(&mut self) {
        match &mut self.every {
            Some(every) => drop(every.tick().await),
            None => std::future::pending().await,
        }
    }

    /// The loop turns, and does this.
    pub fn tell(&self, status: &str) {
        tell(&[NotifyState::Watchdog, NotifyState::Status(status)]);
    }
}
