//! The shim's side of its control connections: the one it was born with, and those of later agents through `shim.sock`.
//!
//! To an agent go state lines ([`super::state`]); from it come lines `hello VERSION`, `signal NUMBER`, `notify NUMBER`, `rank NUMBER` and `kill`. An agent that connects late
//! is told everything that was said so far. Nothing here blocks: an agent that does not read is dropped, and can connect again.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::SOCKET_NAME;

/// Agents at once: one, and a few that are on their way out.
const CONNECTIONS_MAX: usize = 8;
/// Bytes of an order at most.
const ORDER_BYTES_MAX: usize = 64;

/// What an agent wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Send this signal to the rank's process group.
    Signal(i32),
    /// Send this signal to the rank's own process and to nothing that it started.
    Notify(i32),
    /// From now on the output is that of this rank.
    Rename(u32),
    /// Kill the group.
    Kill,
}

struct Connection {
    stream: UnixStream,
    partial: Vec<u8>,
}

/// All control connections.
pub(super) struct Control {
    listener: Option<UnixListener>,
    connections: Vec<Connection>,
    said: Vec<u8>,
}

impl Control {
    /// Takes the first connection and opens the socket in the run folder, whose own path may be too long for one.
    pub(super) fn new(first: Option<OwnedFd>, folder: &Path) -> Self {
        let listener = std::fs::File::open(folder).and_then(|dir| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&dir);
            UnixListener::bind(format!("/proc/self/fd/{fd}/{SOCKET_NAME}"))
        });
        let listener = listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)).ok();
        let mut control = Self { listener, connections: Vec::new(), said: Vec::new() };
        if let Some(first) = first {
            control.add(first.into());
        }
        control
    }

    fn add(&mut self, stream: UnixStream) {
        if self.connections.len() < CONNECTIONS_MAX && stream.set_nonblocking(true).is_ok() {
            self.connections.push(Connection { stream, partial: Vec::new() });
        }
    }

    /// What to wait for with poll: the listener, then the connections.
    pub(super) fn waits_for(&self) -> (Option<BorrowedFd<'_>>, impl Iterator<Item = BorrowedFd<'_>>) {
        (self.listener.as_ref().map(AsFd::as_fd), self.connections.iter().map(|connection| connection.stream.as_fd()))
    }

    /// Takes a connection of the same user and tells it everything said so far.
    pub(super) fn on_connect(&mut self) {
        let Some(Ok((mut stream, _))) = self.listener.as_ref().map(UnixListener::accept) else { return };
        let own = nix::unistd::geteuid().as_raw();
        let Ok(peer) = getsockopt(&stream, PeerCredentials) else { return };
        if (peer.uid() == own || peer.uid() == 0) && stream.write_all(&self.said).is_ok() {
            self.add(stream);
        }
    }

    /// Reads the orders of one connection (in the order of [`Self::waits_for`]); `false` when it has ended.
    pub(super) fn on_readable(&mut self, index: usize, orders: &mut Vec<Order>) -> bool {
        let Some(connection) = self.connections.get_mut(index) else { return true };
        let mut buffer = [0; 256];
        match connection.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => connection.partial.extend_from_slice(&buffer[..count]),
            Err(error) => return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
        while let Some(end) = connection.partial.iter().position(|byte| *byte == b'\n') {
            orders.extend(parse(&connection.partial[..end]));
            connection.partial.drain(..=end);
        }
        connection.partial.len() <= ORDER_BYTES_MAX
    }

    /// Drops connections by index, the highest first.
    pub(super) fn drop_connections(&mut self, ended: &[usize]) {
        ended.iter().rev().for_each(|index| drop(self.connections.remove(*index)));
    }

    /// Says a line to every agent, and to every later one when `for_later`. Answers whether an agent took it.
    pub(super) fn say(&mut self, line: &str, for_later: bool) -> bool {
        if for_later {
            self.said.extend_from_slice(line.as_bytes());
        }
        self.connections.retain_mut(|connection| connection.stream.write(line.as_bytes()).is_ok_and(|count| count == line.len()));
        !self.connections.is_empty()
    }
}

/// An unknown order is ignored: a later agent may know more than this shim.
fn parse(line: &[u8]) -> Option<Order> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let number = |text: &str| text.parse().ok().filter(|number| (1..=64).contains(number));
    match (words.next()?, words.next()) {
        ("kill", None) => Some(Order::Kill),
        ("signal", Some(text)) => number(text).map(Order::Signal),
        ("notify", Some(text)) => number(text).map(Order::Notify),
        ("rank", Some(text)) => text.parse().ok().map(Order::Rename),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_and_strangers_ignored() {
        assert_eq!(parse(b"signal 15"), Some(Order::Signal(15)));
        assert_eq!(parse(b"notify 10"), Some(Order::Notify(10)));
        assert_eq!(parse(b"kill"), Some(Order::Kill));
        assert_eq!(parse(b"rank 65535"), Some(Order::Rename(65_535)));
        for line in [&b"rank -1"[..], b"rank", b"rank x"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
        for line in [&b"hello 1"[..], b"signal", b"signal 0", b"signal 999", b"signal -9", b"notify 65", b"kill all", b"", b"\xff"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
