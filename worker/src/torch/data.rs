//! Text as training samples: which bytes are sample number k, for any k, without state.
//!
//! Shards are cut into windows; an epoch visits each window once in an order that is computed from (seed, epoch). Sample
//! k of the job is place `k % windows` of epoch `k / windows`, whatever the world size: a resume, or a resume with other
//! ranks, continues with the next k and neither skips nor repeats. Memory is bounded: files are read where needed. Shards of a store that
//! are more than a node may want to hold at once come in blocks ([`Order`]), and the next block is asked for before it is needed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::TrainError;
use super::feed::Feed;
use super::order::Order;
use everlit_worker::train_config::{StoredData, TrainConfig};

/// Files held open at once; more are opened again when needed.
const OPEN_MAX: usize = 256;

struct Shard {
    path: PathBuf,
    /// Windows in all shards before this one.
    first: u64,
    /// Length and time of the last change, as they were at the start; of a store's only the length, and what comes has it.
    seen: (u64, Option<SystemTime>),
    file: Option<File>,
}

/// Where a job's text is.
#[derive(Debug, Clone)]
pub enum Source {
    /// Files of this node.
    Files(Vec<PathBuf>),
    /// Shards that are asked for.
    Stored(StoredData),
}

impl Source {
    /// What a job's settings name.
    pub fn of(config: &TrainConfig) -> Result<Self, TrainError> {
        match &config.stored {
            Some(stored) => Ok(Self::Stored(stored.clone())),
            None => locate(&config.shards, config.worker.data.as_deref()).map(Self::Files),
        }
    }

    /// The samples that it has.
    pub fn open(&self, window: u64, seed: u64, held_out: u64) -> Result<Corpus, TrainError> {
        match self {
            Self::Files(paths) => Corpus::open(paths, window, seed, held_out),
            Self::Stored(stored) => Corpus::stored(stored, window, seed, held_out),
        }
    }
}

/// The text of a job.
pub struct Corpus {
    shards: Vec<Shard>,
    open: usize,
    window: u64,
    /// Windows that an epoch visits; those after them are held out.
    windows: u64,
    held_out: u64,
    listing_sha256: String,
    order: Order,
    feed: Option<Feed>,
}

impl std::fmt::Debug for Corpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Corpus").field("shards", &self.shards.len()).field("windows", &self.windows).finish()
    }
}

/// The shards that a job's settings name, in order: given ones, a file, a folder's `*.txt`, or the sample text.
pub fn locate(shards: &[String], data: Option<&str>) -> Result<Vec<PathBuf>, TrainError> {
    if !shards.is_empty() {
        return Ok(shards.iter().map(PathBuf::from).collect());
    }
    let place = match data {
        Some(path) => PathBuf::from(path),
        None => sample_text()?,
    };
    if !place.is_dir() {
        return Ok(vec![place]);
    }
    let bad = |error: std::io::Error| TrainError::Config(format!("data `{}` can not be listed: {error}", place.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&place).map_err(bad)? {
        let path = entry.map_err(bad)?.path();
        if path.extension().is_some_and(|end| end == "txt") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(TrainError::Config(format!("data `{}` has no file that ends in .txt", place.display())));
    }
    Ok(files)
}

fn sample_text() -> Result<PathBuf, TrainError> {
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(|folder| folder.join("sample-text")));
    beside.filter(|path| path.is_dir()).ok_or_else(|| {
        TrainError::Config("no data given and no folder `sample-text` beside the executable: run scripts/fetch-sample-text.sh".into())
    })
}

impl Corpus {
    /// Looks at every shard once. Each window has `window` bytes, the last of which is the next one's first. The last `held_out`
    /// windows are never trained on.
    pub fn open(paths: &[PathBuf], window: u64, seed: u64, held_out: u64) -> Result<Self, TrainError> {
        let mut shards = Vec::with_capacity(paths.len());
        let mut windows = 0;
        let mut listing = Sha256::new();
        for path in paths {
            let bad = |why: &dyn std::fmt::Display| TrainError::Config(format!("data `{}`: {why}", path.display()));
            let about = std::fs::metadata(path).map_err(|error| bad(&error))?;
            if !about.is_file() {
                return Err(bad(&"it is not a regular file"));
            }
            File::open(path).map_err(|error| bad(&error))?;
            note(&mut listing, &path.file_name().unwrap_or_default().to_string_lossy(), about.len());
            shards.push(Shard { path: path.clone(), first: windows, seen: (about.len(), about.modified().ok()), file: None });
            windows += about.len().saturating_sub(1) / (window - 1);
        }
        let listing_sha256 = check(windows, window, held_out, listing)?;
        let windows = windows - held_out;
        let order = Order::whole(seed, windows);
        Ok(Self { shards, open: 0, window, windows, held_out, listing_sha256, order, feed: None })
    }

    /// The same of shards that are asked for as they are needed. The same names and lengths give the same listing wherever they are.
    fn stored(stored: &StoredData, window: u64, seed: u64, held_out: u64) -> Result<Self, TrainError> {
        let feed = Feed::new(stored);
        let (mut shards, mut sizes, mut windows, mut listing) = (Vec::with_capacity(stored.shards.len()), Vec::new(), 0, Sha256::new());
        for (index, shard) in stored.shards.iter().enumerate() {
            note(&mut listing, shard.name.rsplit('/').next().unwrap_or_default(), shard.bytes);
            shards.push(Shard { path: feed.path(index), first: windows, seen: (shard.bytes, None), file: None });
            let own = shard.bytes.saturating_sub(1) / (window - 1);
            sizes.push((shard.bytes, own));
            windows += own;
        }
        let listing_sha256 = check(windows, window, held_out, listing)?;
        let windows = windows - held_out;
        let order = Order::of_shards(seed, windows, &sizes);
        Ok(Self { shards, open: 0, window, windows, held_out, listing_sha256, order, feed: Some(feed) })
    }

    /// Samples of an epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Windows to measure on: those held out, or all of a text of its own.
    pub fn held_out(&self) -> std::ops::Range<u64> {
        if self.held_out > 0 { self.windows..self.windows + self.held_out } else { 0..self.windows }
    }

    /// Hex sha256 over name and length of each shard, in order, and how much is held out.
    pub fn listing_sha256(&self) -> &str {
        &self.listing_sha256
    }

    /// The window, over all shards, that sample `number` is.
    pub fn window_of(&mut self, number: u64) -> u64 {
        self.order.window(number)
    }

    /// Appends the bytes of sample `number` to `into`, widened to what an embedding takes.
    pub fn read(&mut self, number: u64, scratch: &mut Vec<u8>, into: &mut Vec<i64>) -> Result<(), TrainError> {
        let window = self.window_of(number);
        if self.feed.is_some()
            && let Some((leaves, comes)) = self.order.turned(number)
        {
            self.turn_to(&leaves, &comes);
        }
        self.read_window(window, scratch, into)
    }

    /// Another block begins: what only the one before it needs is let go, what this one needs is asked for, and then what comes after it.
    fn turn_to(&mut self, leaves: &[usize], comes: &[usize]) {
        for index in leaves {
            self.open -= usize::from(self.shards[*index].file.take().is_some());
        }
        if let Some(feed) = &self.feed {
            feed.ask(comes, false);
        }
    }

    /// Appends the bytes of a window.
    pub fn read_window(&mut self, window: u64, scratch: &mut Vec<u8>, into: &mut Vec<i64>) -> Result<(), TrainError> {
        let index = self.shards.partition_point(|shard| shard.first <= window) - 1;
        scratch.resize(usize::try_from(self.window).unwrap_or(usize::MAX), 0);
        let offset = (window - self.shards[index].first) * (self.window - 1);
        let failed = |path: &Path, error: std::io::Error| TrainError::failed(format!("data `{}`: {error}", path.display()));
        if self.shards[index].file.is_none() {
            if self.open >= OPEN_MAX {
                self.shards.iter_mut().for_each(|shard| shard.file = None);
                self.open = 0;
            }
            let shard = &mut self.shards[index];
            let file = match &self.feed {
                Some(feed) => feed.wait_for(index)?,
                None => File::open(&shard.path).map_err(|error| failed(&shard.path, error))?,
            };
            let about = file.metadata().map_err(|error| failed(&shard.path, error))?;
            if (about.len(), about.modified().ok().filter(|_| self.feed.is_none())) != shard.seen {
                return Err(changed(&shard.path));
            }
            shard.file = Some(file);
            self.open += 1;
        }
        let shard = &self.shards[index];
        let file = shard.file.as_ref().expect("opened above");
        file.read_exact_at(scratch, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(&shard.path),
            _ => failed(&shard.path, error),
        })?;
        into.extend(scratch.iter().map(|byte| i64::from(*byte)));
        Ok(())
    }
}

/// A shard as the listing knows it.
fn note(listing: &mut Sha256, name: &str, bytes: u64) {
    listing.update(name.as_bytes());
    listing.update(b"\0");
    listing.update(bytes.to_le_bytes());
}

/// Whether there is enough of it; answers the listing's sha256.
fn check(windows: u64, window: u64, held_out: u64, mut listing: Sha256) -> Result<String, TrainError> {
    if windows == 0 {
        return Err(TrainError::Config(format!("the data has not even one sample of {window} bytes")));
    }
    if held_out > windows / 2 {
        return Err(TrainError::Config(format!(
            "the data has {windows} samples, of which {held_out} would be held out for evaluation: give more text, fewer evaluation.samples, or evaluation.data"
        )));
    }
    if held_out > 0 {
        listing.update(b"held out\0");
        listing.update(held_out.to_le_bytes());
    }
    Ok(listing.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Going on would train on something else than was asked for, and a resume could not repeat it.
fn changed(path: &Path) -> TrainError {
    TrainError::Config(format!("data `{}` changed while it was trained on: start a new job for the new text", path.display()))
}

/// The samples of one update that are this rank's: numbers `from..from + batch`, dealt out in turn.
pub fn own_samples(from: u64, batch: u64, rank: u32, world: u32) -> impl Iterator<Item = u64> {
    (u64::from(rank)..batch).step_by(world as usize).map(move |place| from + place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(texts: &[&str], window: u64, seed: u64) -> (tempfile::TempDir, Corpus) {
        let dir = tempfile::tempdir().unwrap();
        let write = |(index, text): (usize, &&str)| {
            let path = dir.path().join(format!("{index}.txt"));
            std::fs::write(&path, text).unwrap();
            path
        };
        let paths: Vec<_> = texts.iter().enumerate().map(write).collect();
        let corpus = Corpus::open(&paths, window, seed, 0).unwrap();
        (dir, corpus)
    }

    fn text(corpus: &mut Corpus, number: u64) -> String {
        let mut bytes = Vec::new();
        corpus.read(number, &mut Vec::new(), &mut bytes).unwrap();
        bytes.iter().map(|byte| char::from(u8::try_from(*byte).unwrap())).collect()
    }

    #[test]
    fn an_epoch_reads_every_window_of_every_shard_once() {
        let (_dir, mut corpus) = corpus(&["abcdefg", "x", "", "hijkl"], 3, 1);
        assert_eq!(corpus.windows, 5);
        for epoch in 0..3 {
            let mut seen: Vec<String> = (0..5).map(|place| text(&mut corpus, epoch * 5 + place)).collect();
            seen.sort();
            assert_eq!(seen, ["abc", "cde", "efg", "hij", "jkl"]);
        }
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_only() {
        let long = "x".repeat(2001);
        let order = |seed, from| {
            let (_dir, mut corpus) = corpus(&[&long], 3, seed);
            (from..from + 100).map(|number| corpus.window_of(number)).collect::<Vec<_>>()
        };
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), order(1, 1000), "the next epoch has another order");
    }

    #[test]
    fn held_out_windows_are_never_trained_on_and_belong_to_the_listing() {
        let (dir, all) = corpus(&["abcdefg", "hijkl"], 3, 1);
        let paths = [dir.path().join("0.txt"), dir.path().join("1.txt")];
        let mut part = Corpus::open(&paths, 3, 1, 2).unwrap();
        assert_eq!((part.windows, part.held_out(), all.held_out()), (3, 3..5, 0..5));
        let mut seen: Vec<u64> = (0..3).map(|number| part.window_of(number)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
        assert_ne!(part.listing_sha256(), all.listing_sha256());
        assert!(Corpus::open(&paths, 3, 1, 3).unwrap_err().to_string().contains("held out"));
    }

    #[test]
    fn a_shard_that_changes_is_noticed() {
        let (dir, mut corpus) = corpus(&["abcdefg", "hijkl"], 3, 1);
        let path = dir.path().join("1.txt");
        std::fs::write(&path, "hijklm").unwrap();
        let mut read =
            |window| corpus.read_window(window, &mut Vec::new(), &mut Vec::new()).err().map(|error| (error.exit_code(), error.to_string()));
        assert!(read(3).is_some_and(|(code, why)| code == 78 && why.contains("1.txt` changed while it was trained on")));
        assert_eq!(read(0), None);
        std::fs::write(dir.path().join("0.txt"), "a").unwrap();
        assert!(read(1).is_some_and(|(code, why)| code == 78 && why.contains("0.txt` changed")), "the open file is too short now");
    }

    #[test]
    fn any_world_size_consumes_the_same_samples() {
        for world in 1..=7 {
            let mut all: Vec<u64> = (0..world).flat_map(|rank| own_samples(100, 16, rank, world)).collect();
            all.sort_unstable();
            assert_eq!(all, (100..116).collect::<Vec<_>>(), "world {world}");
        }
    }

    #[test]
    fn the_listing_knows_names_lengths_and_order() {
        let listing = |texts: &[&str]| corpus(texts, 3, 0).1.listing_sha256().to_string();
        assert_eq!(listing(&["abc", "de"]), listing(&["xyz", "uv"]));
        assert_ne!(listing(&["abc", "de"]), listing(&["de", "abc"]));
        assert_ne!(listing(&["abc"]), listing(&["abcd"]));
    }

    #[test]
    fn missing_or_tiny_data_is_a_configuration_error() {
        let code = |paths: &[PathBuf]| Corpus::open(paths, 129, 0, 0).unwrap_err().exit_code();
        assert_eq!(code(&[PathBuf::from("/nowhere/at/all.txt")]), 78);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(code(&[dir.path().into()]), 78);
        assert_eq!(locate(&[], dir.path().to_str()).unwrap_err().exit_code(), 78);
        std::fs::write(dir.path().join("a.txt"), "short").unwrap();
        assert_eq!(code(&locate(&[], dir.path().to_str()).unwrap()), 78);
    }
}
