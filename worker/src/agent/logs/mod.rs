//! Sending logs to the coordinator: one thread reads segments for all streams and puts frames into the link.
//!
//! A thread, because reading a disk blocks and must not hold up heartbeats. It sleeps in one poll over its commands and the kernel's news of
//! log folders, and looks at everything every half second in case news got lost. A stream has at most [`LOG_CREDIT_BYTES`] under way; the
//! link's own queue is bounded too, so a slow coordinator slows the reading and nothing else.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use everlit_api::agent::log::LogStart;
use everlit_api::agent::{FromAgent, LOG_CREDIT_BYTES};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::folders::Folders;
use super::link::{FromLogs, Link};
use crate::shim::segments::{MODE_SEALED, segment_name};

mod reader;
mod stream;
mod tail;
mod thread;

pub(super) use reader::Reader;

/// Segments that a node's disk can have in its life: a folder that is begun in a later attempt begins above all that can have been there.
const LIFE_SEGMENTS: u64 = 1 << 32;

/// The number below the first segment of the life that a segment is of.
pub(super) fn life(segment: u64) -> u64 {
    segment / LIFE_SEGMENTS * LIFE_SEGMENTS
}

/// A node that comes to a job anew, with another disk than it had there before, goes on with other numbers: a position means one record for ever,
/// also where the records of its life before are kept elsewhere. An empty segment that is sealed says where to begin.
pub(super) fn begin_life(dir: &Path, attempt: u32) -> io::Result<()> {
    let place = dir.join(segment_name(u64::from(attempt) * LIFE_SEGMENTS));
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(MODE_SEALED).open(place).map(drop)
}

/// What the thread is told.
#[derive(Debug)]
enum Command {
    Open {
        stream: u64,
        dir: PathBuf,
        from: LogStart,
        follow: bool,
        link: Link,
    },
    /// Where a tail begins was found.
    Located {
        stream: u64,
        link: u64,
        reader: Reader,
    },
    Credit {
        stream: u64,
        link: u64,
        bytes: u64,
    },
    Close {
        stream: u64,
        link: u64,
    },
    LinkDown(u64),
}

/// The way to the thread.
#[derive(Debug, Clone)]
struct Commands {
    queue: Arc<Mutex<Vec<Command>>>,
    wake: Arc<EventFd>,
}

impl Commands {
    fn send(&self, command: Command) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        // Fails only when the thread has billions of wake-ups to read.
        let _ = self.wake.write(1);
    }

    fn take(&self) -> Vec<Command> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// All log streams of this agent.
#[derive(Debug)]
pub(super) struct Logs {
    folders: Folders,
    commands: Option<Commands>,
}

impl Logs {
    /// Starts no thread before the first stream.
    pub(super) fn new(folders: Folders) -> Self {
        Self { folders, commands: None }
    }

    /// Begins a stream.
    pub(super) fn open(&mut self, stream: u64, job: everlit_api::ids::JobId, from: LogStart, follow: bool, link: Link) {
        let dir = self.folders.logs(job);
        let closing = link.clone();
        let started = match &self.commands {
            Some(commands) => Ok(commands.clone()),
            None => self.start(),
        };
        match started {
            Ok(commands) => commands.send(Command::Open { stream, dir, from, follow, link }),
            // A full queue is a stream that never begins; the reader's own patience ends it.
            Err(error) => drop(closing.logs.try_send(closed(stream, Some(format!("logs can not be read: {error}"))))),
        }
    }

    fn start(&mut self) -> io::Result<Commands> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let commands = Commands { queue: Arc::default(), wake: Arc::new(wake) };
        thread::start(commands.clone())?;
        self.commands = Some(commands.clone());
        Ok(commands)
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            commands.send(command);
        }
    }

    /// The coordinator took so many bytes.
    pub(super) fn credit(&self, stream: u64, link: u64, bytes: u64) {
        self.send(Command::Credit { stream, link, bytes });
    }

    /// Ends a stream.
    pub(super) fn close(&self, stream: u64, link: u64) {
        self.send(Command::Close { stream, link });
    }

    /// Ends all streams of a connection that has ended.
    pub(super) fn link_down(&self, link: u64) {
        self.send(Command::LinkDown(link));
    }
}

/// The last word of a stream.
fn closed(stream: u64, error: Option<String>) -> FromLogs {
    // A number and a text always serialize.
    FromLogs::Text(serde_json::to_string(&FromAgent::LogClosed { stream, error }).unwrap_or_default())
}

const _: () = assert!(LOG_CREDIT_BYTES >= everlit_api::agent::LOG_FRAME_BYTES_MAX as u64);
