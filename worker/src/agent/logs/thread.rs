//! The thread that serves all streams in turns.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use everlit_api::agent::log::LogStart;
use inotify::{Inotify, WatchDescriptor, WatchMask};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::reader::Reader;
use super::stream::{Next, Stream};
use super::{Command, Commands, closed, tail};
use crate::agent::limits::LOOK_EVERY;

struct Thread {
    commands: Commands,
    inotify: Inotify,
    /// Which folder a watch is for, and the other way.
    folders: HashMap<WatchDescriptor, PathBuf>,
    watches: BTreeMap<PathBuf, WatchDescriptor>,
    /// By stream and connection; the folder is for news of it.
    streams: BTreeMap<(u64, u64), (PathBuf, Stream)>,
    buffer: Vec<u8>,
}

/// Starts it; it lives as long as the agent.
pub(super) fn start(commands: Commands) -> io::Result<()> {
    let inotify = Inotify::init()?;
    let thread =
        Thread { commands, inotify, folders: HashMap::new(), watches: BTreeMap::new(), streams: BTreeMap::new(), buffer: Vec::new() };
    std::thread::Builder::new().name("logs".into()).stack_size(256 * 1024).spawn(|| thread.run()).map(drop)
}

impl Thread {
    fn run(mut self) {
        let mut look_at = Instant::now() + LOOK_EVERY;
        let mut due: Option<Instant> = None;
        loop {
            self.sleep(due, look_at);
            // Cleared before the commands are read, so that none is slept over.
            let _ = self.commands.wake.read();
            for command in self.commands.take() {
                self.on_command(command);
            }
            self.on_folder_news();
            let now = Instant::now();
            if now >= look_at {
                look_at = now + LOOK_EVERY;
                let wanted: Vec<PathBuf> = self.streams.values().filter(|(_, s)| s.follows()).map(|(dir, _)| dir.clone()).collect();
                wanted.iter().for_each(|dir| self.watch(dir));
                self.streams.values_mut().for_each(|(_, stream)| stream.dirty = true);
            }
            due = self.turn(now);
        }
    }

    fn sleep(&self, due: Option<Instant>, look_at: Instant) {
        let mut fds = [PollFd::new(self.commands.wake.as_fd(), PollFlags::POLLIN), PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        // Without streams there is nothing to look at.
        let until = if self.streams.is_empty() { due } else { Some(due.map_or(look_at, |due| due.min(look_at))) };
        let timeout = until.map(|at| TimeSpec::from(at.saturating_duration_since(Instant::now())));
        // An interrupted sleep is a short one.
        let _ = ppoll(&mut fds, timeout, None);
    }

    /// Gives every stream its turns, one frame at a time; answers when the next is due.
    fn turn(&mut self, now: Instant) -> Option<Instant> {
        let mut due: Option<Instant> = None;
        let mut busy = true;
        while busy {
            busy = false;
            let mut ended = Vec::new();
            for (key, (_, stream)) in &mut self.streams {
                match stream.turn(now, &mut self.buffer) {
                    Next::Again => busy = true,
                    Next::Wait(None) => {}
                    Next::Wait(Some(at)) => due = Some(due.map_or(at, |before| before.min(at))),
                    Next::Closed(error) => {
                        // When the link is down nobody waits for it.
                        let _ = stream.link.logs.blocking_send(closed(stream.id, error));
                        ended.push(*key);
                    }
                    Next::LinkDown => ended.push(*key),
                }
            }
            ended.iter().for_each(|key| self.end(*key));
            // A close or a credit must not wait until a long log is sent.
            if busy {
                self.commands.take().into_iter().for_each(|command| self.on_command(command));
            }
        }
        due
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Open { stream, dir, from, follow, link } => {
                let key = (stream, link.id);
                let reader = match from {
                    LogStart::Beginning => Some(Reader::new(&dir, 0, 0)),
                    LogStart::At { segment, offset } => Some(Reader::new(&dir, segment, offset)),
                    LogStart::Tail { lines, rank, attempt } => {
                        self.locate(key, &dir, lines, rank, attempt);
                        None
                    }
                };
                if follow {
                    self.watch(&dir);
                }
                self.streams.insert(key, (dir, Stream::new(stream, link, follow, reader)));
            }
            Command::Located { stream, link, reader } => {
                if let Some((_, own)) = self.streams.get_mut(&(stream, link)) {
                    own.located(reader);
                }
            }
            Command::Credit { stream, link, bytes } => {
                if let Some((_, own)) = self.streams.get_mut(&(stream, link)) {
                    own.credit(bytes);
                }
            }
            Command::Close { stream, link } => self.end((stream, link)),
            Command::LinkDown(link) => {
                let ended: Vec<_> = self.streams.keys().filter(|(_, own)| *own == link).copied().collect();
                ended.into_iter().for_each(|key| self.end(key));
            }
        }
    }

    /// A tail may need a pass over a large log: in a thread of its own, so that nobody waits for it.
    fn locate(&self, key: (u64, u64), dir: &Path, lines: u64, rank: Option<u32>, attempt: Option<u32>) {
        let (commands, dir) = (self.commands.clone(), dir.to_path_buf());
        let work = move || {
            let reader = tail::locate(&dir, lines, rank, attempt);
            commands.send(Command::Located { stream: key.0, link: key.1, reader });
        };
        let spawned = std::thread::Builder::new().name("log-tail".into()).stack_size(256 * 1024).spawn(work.clone());
        if spawned.is_err() {
            work();
        }
    }

    fn watch(&mut self, dir: &Path) {
        if self.watches.contains_key(dir) {
            return;
        }
        // Not there yet: the regular look tries again.
        if let Ok(descriptor) = self.inotify.watches().add(dir, WatchMask::MODIFY | WatchMask::CREATE | WatchMask::ONLYDIR) {
            self.folders.insert(descriptor.clone(), dir.to_path_buf());
            self.watches.insert(dir.to_path_buf(), descriptor);
            self.streams.values_mut().filter(|(own, _)| own == dir).for_each(|(_, stream)| stream.dirty = true);
        }
    }

    fn on_folder_news(&mut self) {
        let mut buffer = [0; 16 * 1024];
        loop {
            let Ok(events) = self.inotify.read_events(&mut buffer) else { return };
            let mut dirs: Vec<&PathBuf> = events.filter_map(|event| self.folders.get(&event.wd)).collect();
            if dirs.is_empty() {
                return;
            }
            dirs.dedup();
            for (own, stream) in self.streams.values_mut() {
                if dirs.contains(&&*own) {
                    stream.dirty = true;
                }
            }
        }
    }

    fn end(&mut self, key: (u64, u64)) {
        let Some((dir, _)) = self.streams.remove(&key) else { return };
        if self.streams.values().all(|(own, _)| *own != dir)
            && let Some(descriptor) = self.watches.remove(&dir)
        {
            self.folders.remove(&descriptor);
            let _ = self.inotify.watches().remove(descriptor);
        }
        if self.streams.is_empty() {
            self.buffer = Vec::new();
        }
    }
}
