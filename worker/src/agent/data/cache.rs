//! The node's cache of shards: files named by what they hold, bounded, the least recently used first to go.
//!
//! A file is on the disk before it gets its name, so one that is there is whole. What is linked elsewhere as well (a program that was
//! given all of its shards) frees nothing and stays. There is no index: names say what is there, times of change when it was last used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use everlit_api::data::ListedShard;
use everlit_api::join::to_hex;
use everlit_api::store::Place;
use sha2::{Digest, Sha256};

use crate::agent::limits::COPY_SPARE_BYTES;
use crate::agent::load::disk_free;

const PART_END: &str = ".part";

/// Why there is no room for a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// There never will be.
    TooLarge(String),
    /// What is in use fills it.
    Now(String),
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    /// A later number was used later.
    used: u64,
}

#[derive(Debug, Default)]
struct State {
    is_read: bool,
    entries: BTreeMap<String, Entry>,
    /// Of all entries, and of what is on its way.
    bytes: u64,
    turn: u64,
}

/// The cache.
#[derive(Debug)]
pub(in crate::agent) struct Cache {
    folder: PathBuf,
    bytes_max: u64,
    state: Mutex<State>,
}

/// Room that is kept for one file until it is there.
#[derive(Debug)]
pub(super) struct Room<'a> {
    cache: &'a Cache,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.cache.lock().bytes -= self.bytes;
    }
}

impl Cache {
    /// In `folder`, which is looked at when the first shard is asked for.
    pub(in crate::agent) fn new(folder: PathBuf, bytes_max: u64) -> Self {
        Self { folder, bytes_max, state: Mutex::default() }
    }

    /// What a shard is called here: the same only for the same content.
    pub(super) fn key(base: &Place, shard: &ListedShard) -> String {
        let mut hasher = Sha256::new();
        for part in [base.to_string().as_bytes(), shard.name.as_bytes(), shard.etag.as_deref().unwrap_or_default().as_bytes()] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.update(shard.bytes.to_le_bytes());
        to_hex(&hasher.finalize())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an agent before this one left, in the order in which it was used; what was on its way goes.
    fn read(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.is_read {
            return Ok(state);
        }
        fs::create_dir_all(&self.folder)?;
        let mut found: Vec<(SystemTime, String, u64)> = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.ends_with(PART_END) {
                fs::remove_file(entry.path())?;
                continue;
            }
            let about = entry.metadata()?;
            found.push((about.modified()?, name, about.len()));
        }
        found.sort();
        for (_, name, bytes) in found {
            state.add(name, bytes);
        }
        state.is_read = true;
        Ok(state)
    }

    /// Where a shard is, when it is here. It counts as used now.
    pub(super) fn find(&self, key: &str, bytes: u64) -> Option<PathBuf> {
        let mut state = self.read().ok()?;
        let path = self.folder.join(key);
        let there = fs::metadata(&path).is_ok_and(|about| about.len() == bytes);
        if !there {
            state.forget(key);
            return None;
        }
        state.turn += 1;
        let turn = state.turn;
        state.entries.get_mut(key)?.used = turn;
        // For the agent after this one; that it fails costs it only some of the order.
        let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(path)
    }

    /// Room for so many bytes, which others make if need be.
    pub(super) fn room(&self, bytes: u64) -> Result<Room<'_>, NoRoom> {
        if bytes > self.bytes_max {
            return Err(NoRoom::TooLarge(format!(
                "it has {bytes} bytes, and the node's cache takes {}: start its agent with a larger --data-cache, or cut the data smaller",
                self.bytes_max
            )));
        }
        let mut state =
            self.read().map_err(|error| NoRoom::Now(format!("the cache {} can not be used: {error}", self.folder.display())))?;
        let fits = |state: &State| {
            let on_disk = disk_free(&self.folder).is_none_or(|free| free >= bytes.saturating_add(COPY_SPARE_BYTES));
            (state.bytes + bytes <= self.bytes_max, on_disk)
        };
        let mut by_use: Vec<(u64, String)> = state.entries.iter().map(|(key, entry)| (entry.used, key.clone())).collect();
        by_use.sort_unstable();
        let mut oldest = by_use.into_iter();
        loop {
            let (within, on_disk) = fits(&state);
            if within && on_disk {
                state.bytes += bytes;
                return Ok(Room { cache: self, bytes });
            }
            let Some((_, key)) = oldest.next() else {
                let what = if within { "the disk".to_string() } else { format!("the cache of {} bytes (--data-cache)", self.bytes_max) };
                return Err(NoRoom::Now(format!("{what} has no room for {bytes} bytes beside what is in use")));
            };
            let path = self.folder.join(&key);
            let is_alone = fs::metadata(&path).map_or(true, |about| about.nlink() == 1);
            if is_alone {
                // One that can not be removed is found again, and counted.
                if let Err(error) = fs::remove_file(&path)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(path = %path.display(), %error, "could not remove");
                    continue;
                }
                state.forget(&key);
            }
        }
    }

    /// Where a file is written before it is whole.
    pub(super) fn draft(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}{PART_END}"))
    }

    /// A draft is whole and on the disk: it gets its name.
    pub(super) fn keep(&self, room: Room<'_>, key: &str) -> io::Result<PathBuf> {
        let path = self.folder.join(key);
        fs::rename(self.draft(key), &path)?;
        // Its own bytes are counted from here on.
        let bytes = room.bytes;
        drop(room);
        self.lock().add(key.into(), bytes);
        Ok(path)
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl State {
    fn add(&mut self, key: String, bytes: u64) {
        self.forget(&key);
        self.turn += 1;
        self.bytes += bytes;
        self.entries.insert(key, Entry { bytes, used: self.turn });
    }

    fn forget(&mut self, key: &str) {
        if let Some(gone) = self.entries.remove(key) {
            self.bytes -= gone.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(cache: &Cache, key: &str, bytes: u64) -> Result<PathBuf, NoRoom> {
        let room = cache.room(bytes)?;
        fs::write(cache.draft(key), vec![7; bytes as usize]).unwrap();
        Ok(cache.keep(room, key).unwrap())
    }

    fn names(cache: &Cache) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(cache.folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_least_recently_used_goes_first_and_what_is_linked_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("cache"), 100);
        for key in ["a", "b", "c"] {
            put(&cache, key, 30).unwrap();
        }
        assert!(cache.find("a", 30).is_some());
        put(&cache, "d", 30).unwrap();
        assert_eq!(names(&cache), ["a", "c", "d"], "b was not used for longest");
        fs::hard_link(cache.folder().join("c"), dir.path().join("held")).unwrap();
        put(&cache, "e", 60).unwrap();
        assert_eq!(names(&cache), ["c", "e"]);
        assert!(matches!(put(&cache, "f", 80), Err(NoRoom::Now(why)) if why.contains("beside what is in use")));
        assert!(matches!(put(&cache, "g", 101), Err(NoRoom::TooLarge(why)) if why.contains("--data-cache")));
        assert_eq!(names(&cache), ["c"]);
        put(&cache, "h", 70).unwrap();
    }

    #[test]
    fn the_agent_after_this_one_goes_on_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("cache"), 100);
        put(&cache, "a", 30).unwrap();
        put(&cache, "b", 30).unwrap();
        for (at, name) in ["b", "a"].iter().enumerate() {
            let used = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(at as u64);
            File::open(cache.folder().join(name)).unwrap().set_modified(used).unwrap();
        }
        fs::write(cache.draft("c"), "half").unwrap();
        let next = Cache::new(dir.path().join("cache"), 100);
        put(&next, "d", 60).unwrap();
        assert_eq!(names(&next), ["a", "d"], "what was on its way is gone, and b was used before a");
        assert_eq!((next.find("a", 29), next.find("b", 30)), (None, None), "of another length is another");
    }

    #[test]
    fn room_that_was_not_used_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("cache"), 100);
        for _ in 0..3 {
            drop(cache.room(80).unwrap());
        }
        let held = cache.room(80).unwrap();
        assert!(cache.room(30).is_err());
        drop(held);
        cache.room(30).unwrap();
    }

    #[test]
    fn a_key_says_what_a_shard_holds() {
        let shard = |name: &str, bytes, etag: &str| ListedShard { source: 0, name: name.into(), bytes, etag: Some(etag.into()) };
        let place = |text: &str| text.parse::<Place>().unwrap();
        let all = [
            Cache::key(&place("s3://b/x"), &shard("a", 1, "e")),
            Cache::key(&place("s3://b/y"), &shard("a", 1, "e")),
            Cache::key(&place("s3://b/x"), &shard("b", 1, "e")),
            Cache::key(&place("s3://b/x"), &shard("a", 2, "e")),
            Cache::key(&place("s3://b/x"), &shard("a", 1, "f")),
        ];
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
