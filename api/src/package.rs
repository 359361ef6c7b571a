//! Folders that go with a job: a gzipped tar of plain files and folders, known by the sha256 of its bytes.
//!
//! [`check`] and [`unpack`] are one walk over what somebody else has packed, and trust nothing of it: no path leaves the folder, there are no links or
//! devices, nothing is there twice, and every size is bounded while it streams. The trap is a tar that two readers understand differently:
//! what could be read in two ways (sizes in extended headers, sparse files) is refused.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde::{Deserialize, Serialize};
use tar::{Archive, EntryType, PaxExtensions};
use utoipa::ToSchema;

#[cfg(feature = "client")]
mod pack;
#[cfg(test)]
mod tests;

#[cfg(feature = "client")]
pub use pack::{CannotPack, IGNORE_NAME, Packed, pack};

/// Bytes of a packed folder at most.
pub const PACKED_BYTES_MAX: u64 = 512 << 20;
/// Bytes of its files at most.
pub const UNPACKED_BYTES_MAX: u64 = 4 << 30;
/// Files and folders in it at most.
pub const ENTRIES_MAX: u64 = 100_000;
/// The same, so that tests can try smaller ones.
#[derive(Debug, Clone, Copy)]
struct Limits {
    #[cfg_attr(not(feature = "client"), expect(dead_code, reason = "what is packed is measured by who packs"))]
    packed: u64,
    unpacked: u64,
    entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { packed: PACKED_BYTES_MAX, unpacked: UNPACKED_BYTES_MAX, entries: ENTRIES_MAX }
    }
}

/// Bytes of a path in it, and of one name, at most.
pub const PATH_BYTES_MAX: usize = 1_024;
const NAME_BYTES_MAX: usize = 255;
/// Bytes of all paths together: they are kept in memory while it is read.
const PATHS_BYTES_MAX: u64 = 32 << 20;
/// Bytes of an extended header at most: it has nothing to say but a path.
const EXTENDED_BYTES_MAX: u64 = 16 << 10;
/// Zeros behind the last entry at most; tar fills up to 10 KiB.
const PADDING_BYTES_MAX: u64 = 1 << 20;
/// Bytes of tar beyond those of the files at most.
const FRAME_BYTES_MAX: u64 = ENTRIES_MAX * 2_048 + PADDING_BYTES_MAX;
/// Characters of a path that a message shows.
const SHOWN_CHARS_MAX: usize = 120;

/// A package that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PackageView {
    /// The sha256 of its bytes, as hexadecimal: what `package` of a job names.
    pub package: String,
    /// Bytes as packed.
    pub bytes: u64,
}

/// What is in a package.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contents {
    /// Plain files.
    pub files: u64,
    /// Folders below the first.
    pub folders: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

/// What is wrong with a package, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadPackage(String);

/// Why a package is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is no good, and never will be.
    #[error(transparent)]
    Bad(#[from] BadPackage),
    /// This machine could not read or write.
    #[error("could not read or write `{}`: {error}", path.display())]
    Io {
        /// What; empty for the package itself.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Reads a package to its end and keeps nothing of it.
///
/// # Errors
/// It is no good, or (as [`UnpackError::Io`]) it could not be read.
pub fn check(packed: impl Read) -> Result<Contents, UnpackError> {
    check_within(packed, Limits::default())
}

fn check_within(packed: impl Read, limits: Limits) -> Result<Contents, UnpackError> {
    walk(packed, limits, |_, entry| match entry {
        Entry::Folder => Ok(()),
        Entry::File { data, .. } => io::copy(data, &mut io::sink()).map(drop).map_err(unreadable),
    })
}

/// Unpacks into a folder that is there and empty; every file and folder is synced. What it has written stays there when it fails.
///
/// # Errors
/// It is no good, or it could not be read or written.
pub fn unpack(packed: impl Read, into: &Path) -> Result<Contents, UnpackError> {
    let mut folders = vec![into.to_path_buf()];
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |error| UnpackError::Io { path, error }
    };
    let contents = walk(packed, Limits::default(), |path, entry| {
        let place = into.join(path);
        let mut make = |folder: &Path| match DirBuilder::new().mode(0o755).create(folder) {
            Ok(()) => {
                folders.push(folder.to_path_buf());
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(failed(folder)(error)),
        };
        let parts: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        // From the top; the last of them is the folder itself.
        for above in parts.iter().rev().skip(1) {
            make(&into.join(above))?;
        }
        match entry {
            Entry::Folder => make(&place),
            Entry::File { executable, data } => {
                let mode = if executable { 0o755 } else { 0o644 };
                let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&place);
                write(file, data).map_err(|error| if is_of_system(&error) { failed(&place)(error) } else { unreadable(error) })
            }
        }
    })?;
    for folder in folders.iter().rev() {
        File::open(folder).and_then(|own| own.sync_all()).map_err(failed(folder))?;
    }
    Ok(contents)
}

fn write(file: io::Result<File>, data: &mut dyn Read) -> io::Result<()> {
    let mut file = file?;
    io::copy(data, &mut file)?;
    file.sync_all()
}

/// One entry.
enum Entry<'a> {
    Folder,
    File { executable: bool, data: &'a mut dyn Read },
}

/// What the system said, and not what was found in the package.
fn is_of_system(error: &io::Error) -> bool {
    error.raw_os_error().is_some()
}

fn unreadable(error: io::Error) -> UnpackError {
    if is_of_system(&error) {
        return UnpackError::Io { path: PathBuf::new(), error };
    }
    if let Some(bad) = error.get_ref().and_then(|inner| inner.downcast_ref::<BadPackage>()) {
        return bad.clone().into();
    }
    BadPackage(format!("it is no gzipped tar, or is cut off or damaged ({error})")).into()
}

/// A path as it may be shown.
fn shown(raw: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(raw).escape_debug().take(SHOWN_CHARS_MAX + 1).collect();
    if text.chars().count() > SHOWN_CHARS_MAX { text.chars().take(SHOWN_CHARS_MAX).chain(['…']).collect() } else { text }
}

fn refused(raw: &[u8], why: &str) -> BadPackage {
    BadPackage(format!("`{}` in it {why}", shown(raw)))
}

/// A path without what means nothing in it; empty for the folder itself.
fn clean(raw: &[u8]) -> Result<String, BadPackage> {
    let text = std::str::from_utf8(raw).map_err(|_| refused(raw, "has a name that is not UTF-8"))?;
    if text.chars().any(char::is_control) {
        return Err(refused(raw, "has a control character in its name"));
    }
    if text.starts_with('/') {
        return Err(refused(raw, "is an absolute path: only what lies in the folder may be in it"));
    }
    let mut parts = Vec::new();
    for part in text.split('/').filter(|part| !matches!(*part, "" | ".")) {
        match part {
            ".." => return Err(refused(raw, "has `..` in its path: only what lies in the folder may be in it")),
            _ if part.len() > NAME_BYTES_MAX => return Err(refused(raw, &format!("has a name of more than {NAME_BYTES_MAX} bytes"))),
            _ => parts.push(part),
        }
    }
    let path = parts.join("/");
    if path.len() > PATH_BYTES_MAX {
        return Err(refused(raw, &format!("has a path of more than {PATH_BYTES_MAX} bytes")));
    }
    Ok(path)
}

/// What was seen so far.
struct Seen {
    limits: Limits,
    known: HashMap<String, Known>,
    paths_bytes: u64,
    contents: Contents,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    File,
    Folder,
    /// Something lies in it, and it was not named itself yet.
    Implied,
}

impl Seen {
    fn new(limits: Limits) -> Self {
        Self { limits, known: HashMap::new(), paths_bytes: 0, contents: Contents::default() }
    }

    /// Notes an entry and the folders that it lies in.
    fn note(&mut self, path: &str, raw: &[u8], is_file: bool) -> Result<(), BadPackage> {
        for (end, _) in path.match_indices('/') {
            match self.known.get(&path[..end]) {
                Some(Known::File) => return Err(refused(raw, &format!("lies in `{}`, which is a file", shown(&path.as_bytes()[..end])))),
                Some(_) => {}
                None => self.add(&path[..end], Known::Implied)?,
            }
        }
        match self.known.get_mut(path) {
            Some(known @ Known::Implied) if !is_file => *known = Known::Folder,
            Some(_) => return Err(refused(raw, "is there twice")),
            None => self.add(path, if is_file { Known::File } else { Known::Folder })?,
        }
        Ok(())
    }

    fn add(&mut self, path: &str, known: Known) -> Result<(), BadPackage> {
        self.paths_bytes += path.len() as u64;
        if self.known.len() as u64 >= self.limits.entries || self.paths_bytes > PATHS_BYTES_MAX {
            let most = self.limits.entries;
            return Err(BadPackage(format!("it has more than {most} files and folders, or longer paths than are taken")));
        }
        match known {
            Known::File => self.contents.files += 1,
            Known::Folder | Known::Implied => self.contents.folders += 1,
        }
        self.known.insert(path.into(), known);
        Ok(())
    }

    fn add_bytes(&mut self, size: u64) -> Result<(), BadPackage> {
        self.contents.bytes = self.contents.bytes.saturating_add(size);
        if self.contents.bytes > self.limits.unpacked { Err(too_much()) } else { Ok(()) }
    }
}

fn too_much() -> BadPackage {
    BadPackage("it unpacks to more than a job may bring with it (4 GiB)".into())
}
const _: () = assert!(UNPACKED_BYTES_MAX == 4 << 30);

/// Gives each entry of a package that is good so far, in its order.
fn walk(
    packed: impl Read,
    limits: Limits,
    mut take: impl FnMut(&str, Entry<'_>) -> Result<(), UnpackError>,
) -> Result<Contents, UnpackError> {
    let mut stream = Bounded { inner: GzDecoder::new(packed), left: limits.unpacked + FRAME_BYTES_MAX };
    let mut seen = Seen::new(limits);
    let mut long_path: Option<Vec<u8>> = None;
    let mut archive = Archive::new(&mut stream);
    // As it is written: a reader that puts names together by itself reads them into memory, whatever their size.
    for entry in archive.entries().map_err(unreadable)?.raw(true) {
        let mut entry = entry.map_err(unreadable)?;
        let size = entry.header().entry_size().map_err(unreadable)?;
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::GNULongName | EntryType::XHeader | EntryType::XGlobalHeader) {
            if size > EXTENDED_BYTES_MAX {
                return Err(BadPackage(format!("it has an extended header of {size} bytes")).into());
            }
            let mut text = Vec::new();
            entry.read_to_end(&mut text).map_err(unreadable)?;
            let path = if kind == EntryType::GNULongName { Some(trimmed(&text)) } else { extended(&text, kind)? };
            if path.is_some() && long_path.is_some() {
                return Err(BadPackage("it names one of its entries twice".into()).into());
            }
            long_path = path.or(long_path);
            continue;
        }
        let raw = long_path.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let path = clean(&raw)?;
        match kind {
            EntryType::Directory if size > 0 => return Err(refused(&raw, "is a folder with bytes of its own").into()),
            // The folder itself.
            EntryType::Directory if path.is_empty() => {}
            EntryType::Directory => {
                seen.note(&path, &raw, false)?;
                take(&path, Entry::Folder)?;
            }
            EntryType::Regular if path.is_empty() || raw.ends_with(b"/") => {
                return Err(refused(&raw, "is a file named like a folder").into());
            }
            EntryType::Regular => {
                seen.note(&path, &raw, true)?;
                seen.add_bytes(size)?;
                let executable = entry.header().mode().map_err(unreadable)? & 0o100 != 0;
                let mut data = Counted { inner: &mut entry, bytes: 0 };
                take(&path, Entry::File { executable, data: &mut data })?;
                if data.bytes != size {
                    return Err(refused(&raw, "is cut off").into());
                }
            }
            EntryType::Symlink | EntryType::Link => {
                return Err(refused(&raw, "is a link: put what it points to in its place (`tar --dereference --hard-dereference`)").into());
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                return Err(refused(&raw, "is a device or a pipe: only files and folders are taken").into());
            }
            _ => return Err(refused(&raw, "is of a kind that is not taken: only plain files and folders are").into()),
        }
    }
    if long_path.is_some() {
        return Err(BadPackage("it ends with a name, and nothing of that name".into()).into());
    }
    padding(&mut stream)?;
    Ok(seen.contents)
}

/// The bytes before the first NUL at the end.
fn trimmed(text: &[u8]) -> Vec<u8> {
    let end = text.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    text[..end].to_vec()
}

/// The path that an extended header gives; what would give another size or kind is refused.
fn extended(text: &[u8], kind: EntryType) -> Result<Option<Vec<u8>>, UnpackError> {
    let mut path = None;
    for record in PaxExtensions::new(text) {
        let record = record.map_err(unreadable)?;
        match record.key_bytes() {
            b"path" if kind == EntryType::XHeader && path.is_none() => path = Some(record.value_bytes().to_vec()),
            key @ (b"path" | b"size" | b"linkpath") => {
                return Err(BadPackage(format!("it has a `{}` in an extended header", shown(key))).into());
            }
            key if key.starts_with(b"GNU.sparse") => return Err(BadPackage("it has a sparse file in it: pack it in full".into()).into()),
            _ => {}
        }
    }
    Ok(path)
}

/// Nothing but zeros may come behind the last entry; to read them checks the sum of the whole, too.
fn padding(stream: &mut impl Read) -> Result<(), UnpackError> {
    let mut rest = stream.take(PADDING_BYTES_MAX + 1);
    let mut block = [0; 4096];
    let mut seen = 0;
    loop {
        let read = rest.read(&mut block).map_err(unreadable)?;
        if read == 0 {
            return Ok(());
        }
        seen += read as u64;
        if seen > PADDING_BYTES_MAX || block[..read].iter().any(|b| *b != 0) {
            return Err(BadPackage("it has something behind its last entry".into()).into());
        }
    }
}

/// Ends with an error where a stream is longer than it may be.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| io::Error::other(too_much()))?;
        Ok(read)
    }
}

struct Counted<R> {
    inner: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}
