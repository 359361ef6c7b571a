//! A job's data in a store: how shards are named (`data.shards`), and the listing that is made of them once and kept with the job.
//!
//! A changed bucket can not change a running job's data: what is read is what was listed, by name, length and the store's own tag of the
//! content. Nothing here reads a store.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ids::JobId;
use crate::join::to_hex;
use crate::store::{Place, Scheme};

/// Shards of one job at most.
pub const SHARDS_MAX: usize = 65_536;
/// Bytes of a listing's names and tags together at most: it travels in one frame.
pub const LISTING_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Characters of a shard's own name that are kept of its name in the store.
const FILE_NAME_CHARS_MAX: usize = 100;

/// One entry of `data.shards` that names a store: an object (`s3://bucket/a.txt`), everything below a prefix (`s3://bucket/text/`), or
/// what matches in one (`s3://bucket/text/*.txt`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ShardSource {
    place: Place,
    select: Select,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Select {
    /// The object itself.
    Object,
    /// Everything below.
    Below,
    /// What is directly in it and matches; `*` stands for any characters.
    Matching(String),
}

impl ShardSource {
    /// Where names of its shards begin.
    pub fn base(&self) -> Place {
        match self.select {
            Select::Object => self.place.parent().unwrap_or_else(|| self.place.clone()),
            Select::Below | Select::Matching(_) => self.place.clone(),
        }
    }

    /// The name of the one object that it is; `None` when it must be listed.
    pub fn object(&self) -> Option<&str> {
        (self.select == Select::Object).then(|| self.place.last())
    }

    /// Whether an object of this name, seen from [`Self::base`], belongs to it.
    pub fn takes(&self, name: &str) -> bool {
        match &self.select {
            Select::Object => name == self.place.last(),
            Select::Below => true,
            Select::Matching(pattern) => !name.contains('/') && matches(pattern, name),
        }
    }
}

/// Whether a name is what a pattern says; `*` stands for any characters, also none.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

impl FromStr for ShardSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (folder, last) = text.rsplit_once('/').ok_or("must be an absolute path or a place in a store")?;
        if last.contains('*') {
            let place: Place = folder.parse()?;
            if last.chars().any(char::is_control) {
                return Err("must not have control characters in it".into());
            }
            return Ok(Self { place, select: Select::Matching(last.into()) });
        }
        let place: Place = text.parse()?;
        let whole = place.path().is_empty() && place.scheme() != Scheme::Folder;
        let select = if last.is_empty() || whole { Select::Below } else { Select::Object };
        Ok(Self { place, select })
    }
}

impl fmt::Display for ShardSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A folder is named as a place of a store here: a plain path is read where it is.
        let scheme = if self.place.scheme() == Scheme::Folder { "file://" } else { "" };
        match &self.select {
            Select::Object => write!(f, "{scheme}{}", self.place),
            Select::Below => write!(f, "{scheme}{}/", self.place),
            Select::Matching(pattern) => write!(f, "{scheme}{}/{pattern}", self.place),
        }
    }
}

impl TryFrom<String> for ShardSource {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ShardSource> for String {
    fn from(source: ShardSource) -> Self {
        source.to_string()
    }
}

/// One shard as it was listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedShard {
    /// Which entry of `data.shards` it is of, from 0.
    pub source: u32,
    /// Its name, seen from that entry's [`ShardSource::base`].
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The store's tag of its content; null where the store has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
}

/// Hex sha256 over name, length and tag of each shard, in order.
pub fn listing_sha256(shards: &[ListedShard]) -> String {
    let mut listing = Sha256::new();
    for shard in shards {
        listing.update(shard.name.as_bytes());
        listing.update(b"\0");
        listing.update(shard.bytes.to_le_bytes());
        listing.update(shard.etag.as_deref().unwrap_or_default().as_bytes());
        listing.update(b"\0");
    }
    to_hex(&listing.finalize())
}

/// What a gang is told of its data in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GangData {
    /// `data.shards`.
    pub sources: Vec<ShardSource>,
    /// What is in them; null until it was listed: then the first node lists it, and all wait for the order to come again with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<Vec<ListedShard>>,
    /// The program asks for shards as it goes; else they are all there before it starts.
    pub stream: bool,
    /// A folder of the nodes that has the same files under the same names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Where outputs go, one of each shard: the job's own folder in `data.to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Place>,
}

/// A job's data was listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Whose.
    pub job: JobId,
    /// For which attempt.
    pub attempt: u32,
    /// What is there, in the order of `data.shards` and of names.
    pub shards: Vec<ListedShard>,
}

/// Where a node reads a job's shards has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataTurn {
    /// Whose.
    pub job: JobId,
    /// From the local copy (`data.fallback`), or from the store again.
    pub local: bool,
    /// Why, for people.
    pub reason: String,
}

/// What a shard's file is called where ranks read it: its number and the last part of its name.
pub fn file_name(index: usize, name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or_default();
    let plain = last.chars().map(|c| if c.is_control() { '_' } else { c });
    // The end tells what kind of file it is.
    let skip = last.chars().count().saturating_sub(FILE_NAME_CHARS_MAX);
    format!("{index:06}-{}", plain.skip(skip).collect::<String>())
}

/// Characters of an output's name after that of its shard's file.
const OUTPUT_SUFFIX_CHARS_MAX: usize = 40;
/// An output that ends so is not finished.
pub const DRAFT_END: &str = ".tmp";

/// Which shard a file is the output of: its name is that of the shard's file, and may go on (`000007-a.txt`, `000007-a.txt.bin`).
pub fn output_of(name: &str, shards: &[ListedShard]) -> Option<usize> {
    let index = shard_number(name)?;
    is_output_of(name, &file_name(index, &shards.get(index)?.name)).then_some(index)
}

/// Whether this may be the name of the output of the shard that has this file.
pub fn is_output_of(name: &str, file: &str) -> bool {
    let fits = |more: &str| more.chars().count() <= OUTPUT_SUFFIX_CHARS_MAX && !more.chars().any(|c| c.is_control() || c == '/');
    !name.ends_with(DRAFT_END) && name.strip_prefix(file).is_some_and(fits)
}

/// The shard's number at the beginning of a name.
pub fn shard_number(name: &str) -> Option<usize> {
    name.split_once('-').and_then(|(digits, _)| digits.parse().ok())
}

/// What a rank's record of its shards and outputs is called.
pub fn record_name(rank: u32, world_size: u32) -> String {
    format!("rank-{rank:05}-of-{world_size:05}.json")
}

/// What became of a shard, as a rank's record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The name of the object.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_an_object_a_prefix_or_a_pattern() {
        for (text, shown, base, object) in [
            ("s3://b/a.txt", "s3://b/a.txt", "s3://b", Some("a.txt")),
            ("s3://b/x/a.txt", "s3://b/x/a.txt", "s3://b/x", Some("a.txt")),
            ("s3://b/x/", "s3://b/x/", "s3://b/x", None),
            ("s3://b", "s3://b/", "s3://b", None),
            ("gs://b/x/*.txt", "gs://b/x/*.txt", "gs://b/x", None),
            ("file:///mnt/text/", "file:///mnt/text/", "/mnt/text", None),
        ] {
            let source: ShardSource = text.parse().expect(text);
            assert_eq!((source.to_string().as_str(), source.base().to_string().as_str(), source.object()), (shown, base, object), "{text}");
            assert_eq!(shown.parse().as_ref(), Ok(&source));
        }
        for text in ["s3://", "s3://b/*/a", "s3://b/**/x", "s3://b/a//b", "x", "s3://b/%2e/"] {
            let parsed = text.parse::<ShardSource>();
            assert!(parsed.is_err(), "{text}: {parsed:?}");
        }
    }

    #[test]
    fn a_pattern_takes_what_is_directly_there() {
        let takes = |text: &str, name: &str| text.parse::<ShardSource>().unwrap().takes(name);
        assert!(takes("s3://b/x/*.txt", "a.txt") && takes("s3://b/x/*", "a") && takes("s3://b/x/a*b*c", "a1b2b3c"));
        assert!(!takes("s3://b/x/*.txt", "y/a.txt") && !takes("s3://b/x/*.txt", "a.txt.gz") && !takes("s3://b/x/a*a", "a"));
        assert!(takes("s3://b/x/", "y/a.txt") && takes("s3://b/x/a.txt", "a.txt") && !takes("s3://b/x/a.txt", "b.txt"));
    }

    #[test]
    fn a_shard_s_file_says_its_number_and_its_kind() {
        assert_eq!(file_name(7, "deep/er/a b.txt"), "000007-a b.txt");
        assert_eq!(file_name(0, "a\n/\u{1}x"), "000000-_x");
        let long = file_name(1, &format!("{}.txt", "ä".repeat(500)));
        assert!(long.ends_with(".txt") && long.chars().count() == 7 + FILE_NAME_CHARS_MAX && long.len() < 255);
    }

    #[test]
    fn an_output_is_named_like_its_shard() {
        let shards: Vec<_> = ["x/a.txt", "b"].map(|name| ListedShard { source: 0, name: name.into(), bytes: 1, etag: None }).into();
        let of = |name: &str| output_of(name, &shards);
        assert_eq!((of("000000-a.txt"), of("000000-a.txt.bin"), of("000001-b.jsonl")), (Some(0), Some(0), Some(1)));
        for name in ["a.txt", "000000-b", "000001-a.txt", "000002-c", "000000-a.txt.tmp", "000000-a.txt/../x", "-b", "x-b", "000001-b\n"] {
            assert_eq!(of(name), None, "{name}");
        }
        assert_eq!(of(&format!("000001-b{}", "x".repeat(OUTPUT_SUFFIX_CHARS_MAX + 1))), None);
        // Other spellings of a number are other names.
        assert_eq!(of("1-b"), None);
    }

    #[test]
    fn the_listing_knows_names_lengths_tags_and_order() {
        let shard = |name: &str, bytes, etag: Option<&str>| ListedShard { source: 0, name: name.into(), bytes, etag: etag.map(Into::into) };
        let (a, b) = (shard("a", 1, Some("x")), shard("b", 1, None));
        let base = listing_sha256(&[a.clone(), b.clone()]);
        for other in [
            vec![b.clone(), a.clone()],
            vec![a.clone()],
            vec![shard("a", 2, Some("x")), b.clone()],
            vec![shard("a", 1, Some("y")), b.clone()],
            vec![shard("a", 1, None), b.clone()],
        ] {
            assert_ne!(listing_sha256(&other), base);
        }
    }
}
