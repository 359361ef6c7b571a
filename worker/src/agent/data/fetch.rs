//! One shard from its store into the cache: what was listed, whole, on the disk before it has its name.

use std::io;

use everlit_api::data::ListedShard;
use everlit_api::join::to_hex;
use everlit_api::store::{About, Fault, Store, Trouble};
use futures_util::StreamExt;
use md5::{Digest, Md5};
use tokio::fs::File;
use tokio::io::{AsyncWriteExt, BufWriter};

use super::cache::{Cache, NoRoom, Room};

/// Bytes that are gathered before they are written.
const WRITE_BYTES: usize = 1024 * 1024;

/// Why a shard is not here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NotHere {
    /// The store did not give it; it may later.
    Later(Fault),
    /// It never will be what was listed, or may not be had.
    Never(Fault),
    /// This node can not take it now.
    Here(String),
}

/// How its bytes may be told from altered ones.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// What came the last time, where the store's tag looks like an MD5 and was another one.
    seen: Option<String>,
}

impl Doubt {
    /// Whether bytes with this MD5 are to be taken. A tag that only looks like one (a store that encrypts has others) is found out by the
    /// same bytes coming twice.
    fn trusts(&mut self, etag: Option<&str>, found: &str) -> bool {
        let etag = etag.unwrap_or_default().trim_matches('"');
        let is_md5 = etag.len() == 32 && etag.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_md5 || etag.eq_ignore_ascii_case(found) {
            return true;
        }
        self.seen.replace(found.into()).is_some_and(|before| before == found)
    }
}

/// Brings a shard into the cache.
pub(super) async fn fetch(store: &Store, shard: &ListedShard, cache: &Cache, key: &str, doubt: &mut Doubt) -> Result<(), NotHere> {
    let room = cache.room(shard.bytes).map_err(|why| match why {
        NoRoom::TooLarge(why) => NotHere::Never(fault(Trouble::Full, store, shard, why)),
        NoRoom::Now(why) => NotHere::Here(why),
    })?;
    let seen = About { name: shard.name.clone(), bytes: shard.bytes, etag: shard.etag.clone() };
    let pieces = store.stream_as_seen(&seen).await.map_err(|own| match own.trouble {
        Trouble::Conflict | Trouble::NotFound => {
            let why = "it changed since the job began, and the job's data is what was there then: put it back, or start a new job for the new data";
            NotHere::Never(Fault { why: format!("{why} ({})", own.why), ..own })
        }
        trouble if trouble.is_transient() => NotHere::Later(own),
        _ => NotHere::Never(own),
    })?;
    let taken = take(store, shard, cache, key, pieces, doubt).await;
    match taken {
        Ok(()) => put(cache, room, key),
        Err(error) => {
            // What is half there helps nobody.
            let _ = tokio::fs::remove_file(cache.draft(key)).await;
            Err(error)
        }
    }
}

fn put(cache: &Cache, room: Room<'_>, key: &str) -> Result<(), NotHere> {
    cache.keep(room, key).map(drop).map_err(|error| NotHere::Here(error.to_string()))
}

async fn take(
    store: &Store,
    shard: &ListedShard,
    cache: &Cache,
    key: &str,
    mut pieces: impl futures_util::Stream<Item = Result<bytes::Bytes, Fault>> + Unpin,
    doubt: &mut Doubt,
) -> Result<(), NotHere> {
    let here = |error: io::Error| NotHere::Here(format!("{} could not be written: {error}", cache.folder().display()));
    let damaged = |why: String| NotHere::Later(fault(Trouble::Damaged, store, shard, why));
    let mut file = BufWriter::with_capacity(WRITE_BYTES, File::create(cache.draft(key)).await.map_err(here)?);
    let (mut left, mut hasher) = (shard.bytes, Md5::new());
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(NotHere::Later)?;
        if piece.len() as u64 > left {
            return Err(damaged(format!("more came than its {} bytes", shard.bytes)));
        }
        left -= piece.len() as u64;
        hasher.update(&piece);
        file.write_all(&piece).await.map_err(here)?;
    }
    if left > 0 {
        return Err(damaged(format!("it ended {left} bytes early")));
    }
    let found = to_hex(&hasher.finalize());
    if !doubt.trusts(shard.etag.as_deref(), &found) {
        return Err(damaged("what came is not what the store's tag says".into()));
    }
    file.flush().await.map_err(here)?;
    file.into_inner().sync_data().await.map_err(here)
}

fn fault(trouble: Trouble, store: &Store, shard: &ListedShard, why: String) -> Fault {
    Fault { trouble, asked: format!("get {}/{}", store.place(), shard.name), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn altered_bytes_are_not_taken_and_tags_that_are_no_md5_stop_nobody() {
        let (own, other, third) = ("0".repeat(32), "1".repeat(32), "2".repeat(32));
        let mut doubt = Doubt::default();
        assert!(doubt.trusts(Some(&format!("\"{own}\"")), &own));
        assert!(!doubt.trusts(Some(&own), &other) && !doubt.trusts(Some(&own), &third), "each time other bytes");
        assert!(doubt.trusts(Some(&own), &third), "the same bytes twice");
        let mut doubt = Doubt::default();
        assert!(doubt.trusts(Some("\"abc-2\""), &own) && doubt.trusts(None, &own));
    }
}
