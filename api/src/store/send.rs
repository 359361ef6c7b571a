//! Sending files: several files of a checkpoint and several parts at a time, within a bound of memory that all who send share.
//!
//! The reader is one task, so what is read and hashed is read while other parts are under way. A part takes its room before it is read and
//! gives it back when the store has it.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::door::Store;
use super::fault::Fault;
use super::parts::{Begun, Parts};
use super::shelf::Shelf;
use super::trouble::Trouble;
use crate::manifest::{ManifestFile, step_folder};

/// Bytes of a part of a large file, and of the largest that goes in one piece.
pub const PART_BYTES: u64 = 8 * MIB;
/// Files of one checkpoint that are under way at a time.
const FILES_AT_ONCE: usize = 4;
/// Stores take ten thousand; larger files get larger parts.
const PARTS_MAX: u64 = 9_000;
/// Bytes of all parts that are under way at a time, in [`MIB`]; one part that is larger goes alone.
const WINDOW_MIB: u32 = 64;
const MIB: u64 = 1024 * 1024;

/// Gives the bytes of a file in order.
pub trait Source: Send {
    /// The next piece, of `bytes` unless the file ends before. It may block.
    fn next(&mut self, bytes: usize) -> Result<Vec<u8>, Fault>;
    /// Waits until so many bytes may be sent, or says why no more are wanted. It may block.
    fn wait_for_turn(&mut self, bytes: usize) -> Result<(), Fault>;
}

/// The room for bytes that are under way: at most 64 MiB of all that share it. Clones are the same.
#[derive(Debug, Clone)]
pub struct Window(Arc<Semaphore>);

impl Default for Window {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(WINDOW_MIB as usize)))
    }
}

impl Window {
    async fn enter(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Fault> {
        let wanted = u32::try_from(bytes.div_ceil(MIB)).unwrap_or(u32::MAX).clamp(1, WINDOW_MIB);
        let entered = self.0.clone().acquire_many_owned(wanted).await;
        entered.map_err(|error| Fault::new(Trouble::Other, "go on", error.to_string()))
    }
}

/// What opens a file of a checkpoint.
pub type Open<'a> = dyn Fn(&ManifestFile) -> Result<Box<dyn Source + 'a>, Fault> + Send + Sync + 'a;

/// How files are sent.
pub struct Sending<'a> {
    /// Opens a file of the checkpoint.
    pub open: &'a Open<'a>,
    /// The room they share with others.
    pub window: &'a Window,
    /// What an earlier try has brought of large files, and this one leaves if it breaks off.
    pub begun: &'a Begun,
}

impl Shelf {
    /// Puts files of a checkpoint there, large ones in parts. They count for nothing before the commit. The first fault ends all of them.
    pub async fn put_files(&self, step: u64, digest: &str, files: &[&ManifestFile], how: &Sending<'_>) -> Result<(), Fault> {
        let folder = format!("{}/{digest}", step_folder(step));
        let (mut under_way, mut rest) = (FuturesUnordered::new(), files.iter().copied());
        loop {
            while under_way.len() < FILES_AT_ONCE
                && let Some(file) = rest.next()
            {
                let name = format!("{folder}/{}", file.name);
                under_way.push(async move { self.store().send(&name, file.bytes, (how.open)(file)?, how.window, how.begun).await });
            }
            match under_way.next().await {
                Some(done) => done?,
                None => return Ok(()),
            }
        }
    }
}

impl Store {
    /// Puts a file there, in parts when it is large; it is there once all of it is. `begun` has what an earlier try has brought, and gets what
    /// this one leaves if it breaks off.
    pub async fn send(
        &self,
        name: &str,
        bytes: u64,
        mut source: Box<dyn Source + '_>,
        window: &Window,
        begun: &Begun,
    ) -> Result<(), Fault> {
        let part_bytes = PART_BYTES.max(bytes.div_ceil(PARTS_MAX).next_multiple_of(MIB));
        if bytes > part_bytes {
            return self.send_parts(name, bytes, part_bytes, source, window, begun).await;
        }
        let _entered = window.enter(bytes).await?;
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        source.wait_for_turn(bytes)?;
        let piece = source.next(bytes)?;
        self.put(name, piece.into()).await
    }

    async fn send_parts(
        &self,
        name: &str,
        mut left: u64,
        part_bytes: u64,
        mut source: Box<dyn Source + '_>,
        window: &Window,
        begun: &Begun,
    ) -> Result<(), Fault> {
        let mut parts = Parts::begin(self, name, begun).await?;
        let mut under_way: JoinSet<Result<(), Fault>> = JoinSet::new();
        let ended = |done: Result<_, tokio::task::JoinError>| {
            done.unwrap_or_else(|error| Err(Fault::new(Trouble::Other, format!("put {name}"), error.to_string())))
        };
        let mut sent = Ok(());
        while sent.is_ok() && left > 0 {
            let bytes = left.min(part_bytes);
            left -= bytes;
            let entered = window.enter(bytes).await?;
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            sent = source.wait_for_turn(bytes).and_then(|()| source.next(bytes)).map(|piece| {
                if let Some(part) = parts.put(piece.into()) {
                    under_way.spawn(async move {
                        let _entered = entered;
                        part.await
                    });
                }
            });
            while let (Ok(()), Some(done)) = (&sent, under_way.try_join_next()) {
                sent = ended(done);
            }
        }
        while let (Ok(()), Some(done)) = (&sent, under_way.join_next().await) {
            sent = ended(done);
        }
        under_way.shutdown().await;
        match sent {
            Ok(()) => parts.complete().await,
            Err(fault) => {
                parts.broke(&fault).await;
                Err(fault)
            }
        }
    }
}
