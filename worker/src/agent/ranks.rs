//! The shims that this agent talks to: their connections, their ranks' heartbeat files, and the way signals take.
//!
//! A task per shim reads its lines. When a connection ends without an exit line the truth is found out on a blocking thread; what a killed
//! shim left behind is killed there too. Everything comes to the driver as [`ShimNews`].

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use everlit_api::ids::Incarnation;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::mpsc;

use super::folders::Folders;
use super::heartbeat::{self, Heard, Look, Seen};
use super::procs::kill_leftovers;
use super::shim::{Settled, Told, parse_line, settle};

/// Bytes of a line from a shim at most; one with the whole tail in escapes is well below.
const LINE_BYTES_MAX: u64 = 256 * 1024;
/// Bad heartbeats of one rank that are logged.
const WARNINGS_MAX: u64 = 3;

/// What happened to a shim.
#[derive(Debug)]
pub(super) enum ShimNews {
    /// It told something.
    Told(Told),
    /// Its connection ended without an exit line, and this is what is true.
    Settled(Box<Settled>),
}

struct Entry {
    /// Orders go here; small enough never to block.
    orders: UnixStream,
    folder: PathBuf,
    shim: Option<i32>,
    pid: Option<u32>,
    seen: Option<Seen>,
    bad: u64,
    /// It wrote a heartbeat, so its output is not searched for progress.
    beats: bool,
}

/// All ranks with a living shim.
pub(super) struct Ranks {
    folders: Folders,
    news: mpsc::Sender<(Incarnation, ShimNews)>,
    table: BTreeMap<Incarnation, Entry>,
}

impl Ranks {
    /// News go to `news`.
    pub(super) fn new(folders: Folders, news: mpsc::Sender<(Incarnation, ShimNews)>) -> Self {
        Self { folders, news, table: BTreeMap::new() }
    }

    /// Takes a control connection and reads it from now on.
    pub(super) fn connect(&mut self, incarnation: Incarnation, stream: UnixStream) -> std::io::Result<()> {
        let folder = self.folders.run(incarnation);
        let reading = tokio::net::UnixStream::from_std(stream.try_clone()?)?;
        let old = self.table.remove(&incarnation);
        let (seen, beats) = old.map_or((None, false), |old| (old.seen, old.beats));
        self.table.insert(incarnation, Entry { orders: stream, folder: folder.clone(), shim: None, pid: None, seen, bad: 0, beats });
        tokio::spawn(listen(incarnation, folder, reading, self.news.clone()));
        Ok(())
    }

    /// Remembers the processes of a shim and its rank.
    pub(super) fn set_processes(&mut self, incarnation: Incarnation, shim: i32, pid: u32) {
        if let Some(entry) = self.table.get_mut(&incarnation) {
            entry.shim = Some(shim);
            entry.pid = Some(pid);
        }
    }

    /// Living processes of an attempt, a given one first.
    pub(super) fn beside(&self, first: Incarnation) -> Vec<(Incarnation, u32)> {
        let gang = Incarnation { rank: 0, ..first }..=Incarnation { rank: u32::MAX, ..first };
        let mut all: Vec<_> = self.table.range(gang).filter_map(|(own, entry)| Some((*own, entry.pid?))).collect();
        all.sort_by_key(|(own, _)| (*own != first, own.rank));
        all
    }

    /// The shim's process, which is its rank's session.
    pub(super) fn shim(&self, incarnation: Incarnation) -> Option<i32> {
        self.table.get(&incarnation)?.shim
    }

    /// Whether it ever wrote a heartbeat.
    pub(super) fn beats(&self, incarnation: Incarnation) -> bool {
        self.table.get(&incarnation).is_some_and(|entry| entry.beats)
    }

    /// No rank has one.
    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Every rank with a shim.
    pub(super) fn all(&self) -> Vec<Incarnation> {
        self.table.keys().copied().collect()
    }

    /// Has the shim send a signal to the rank's process group.
    pub(super) fn signal(&mut self, incarnation: Incarnation, signal: i32) {
        self.order(incarnation, &format!("signal {signal}\n"));
    }

    /// Has the shim send a signal to the rank's process alone. A shim of before this order ignores it.
    pub(super) fn notify(&mut self, incarnation: Incarnation, signal: i32) {
        self.order(incarnation, &format!("notify {signal}\n"));
    }

    /// From now on its output is that of this rank. A shim of before this order ignores it.
    pub(super) fn rename(&mut self, incarnation: Incarnation, rank: u32) {
        self.order(incarnation, &format!("rank {rank}\n"));
    }

    fn order(&mut self, incarnation: Incarnation, order: &str) {
        let Some(entry) = self.table.get_mut(&incarnation) else { return };
        if let Err(error) = entry.orders.write_all(order.as_bytes()) {
            // The end of the connection tells the rest.
            tracing::warn!(%incarnation, order, %error, "a signal could not be sent");
        }
    }

    /// Reads the heartbeat file if it changed.
    pub(super) fn look(&mut self, incarnation: Incarnation) -> Option<Heard> {
        let entry = self.table.get_mut(&incarnation)?;
        match heartbeat::look(&entry.folder, incarnation, entry.seen) {
            Look::Nothing => None,
            Look::Beat(seen, heard) => {
                entry.seen = Some(seen);
                entry.beats = true;
                Some(heard)
            }
            Look::Bad(seen, reason) => {
                if seen.is_none() || seen != entry.seen {
                    entry.bad += 1;
                    if entry.bad <= WARNINGS_MAX {
                        tracing::warn!(%incarnation, reason, count = entry.bad, "a heartbeat file is ignored");
                    }
                }
                entry.seen = seen;
                None
            }
        }
    }

    /// Forgets a rank that has ended.
    pub(super) fn remove(&mut self, incarnation: Incarnation) {
        self.table.remove(&incarnation);
    }
}

async fn listen(incarnation: Incarnation, folder: PathBuf, stream: tokio::net::UnixStream, news: mpsc::Sender<(Incarnation, ShimNews)>) {
    let mut reader = BufReader::with_capacity(1024, stream);
    let mut line = Vec::new();
    let mut shim = None;
    loop {
        line.clear();
        match tokio::io::AsyncReadExt::take(&mut reader, LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(count) if count > 0 && line.ends_with(b"\n") => {}
            _ => break,
        }
        let Some(told) = parse_line(&line) else { continue };
        if let Told::Started { shim: pid, .. } = told {
            shim = Some(pid);
        }
        let ended = matches!(told, Told::Exit { .. });
        if news.send((incarnation, ShimNews::Told(told))).await.is_err() || ended {
            return;
        }
    }
    let found = tokio::task::spawn_blocking(move || {
        let settled = settle(&folder);
        if matches!(settled, Settled::Ended { lost: true, .. } | Settled::NeverStarted) {
            kill_leftovers(&folder, shim);
        }
        settled
    });
    if let Ok(settled) = found.await {
        // Nobody listens when the agent ends.
        let _ = news.send((incarnation, ShimNews::Settled(Box::new(settled)))).await;
    }
}
