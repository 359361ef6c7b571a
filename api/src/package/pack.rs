//! Packing a folder: the same bytes for the same files, whoever packs them and when.
//!
//! What version control ignores stays out, and so do caches. Links are followed as long as they stay in the folder, so that none has to be
//! taken at the other end. The trap: a file that changes while it is packed must not shift what comes after it.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flate2::{Compression, GzBuilder};
use ignore::{DirEntry, WalkBuilder};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::{Contents, Limits, clean};

/// What is left out beside what `.gitignore` says, in the same form.
pub const IGNORE_NAME: &str = ".everlitignore";
/// Folders that are never packed.
const NEVER: [&str; 5] = [".git", ".hg", ".svn", ".venv", "__pycache__"];
/// What marks a folder as a cache that can be made again (cargo's `target` has it), by the Cache Directory Tagging Specification; and a
/// Python environment.
const MARKS: [&str; 2] = ["CACHEDIR.TAG", "pyvenv.cfg"];
/// Entries that are named when it is too much.
const NAMED_MAX: usize = 5;

/// A folder that was packed.
#[derive(Debug)]
pub struct Packed {
    /// The sha256 of its bytes, as hexadecimal.
    pub package: String,
    /// Bytes as packed.
    pub bytes: u64,
    /// What is in it.
    pub contents: Contents,
    /// What was left out though nothing says that it should be, each with the reason.
    pub left_out: Vec<String>,
    /// Its bytes, from the beginning; the file has no name and goes with this.
    pub file: File,
}

/// Why a folder is not packed.
#[derive(Debug, thiserror::Error)]
pub enum CannotPack {
    /// What is in it can not go with a job.
    #[error("{0}")]
    Refused(String),
    /// It could not be read, or the packed bytes could not be kept.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        error: io::Error,
    },
}

fn refused<T>(why: impl Into<String>) -> Result<T, CannotPack> {
    Err(CannotPack::Refused(why.into()))
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> CannotPack {
    let what = what.into();
    move |error| CannotPack::Io { what, error }
}

/// One file or folder that is to be packed.
struct Found {
    /// Below the folder, as it will be unpacked.
    path: String,
    place: PathBuf,
    metadata: Metadata,
}

/// Packs a folder. Blocks.
///
/// # Errors
/// It is no folder or can not be read, a link leads out of it, nothing is in it, or it is larger than
/// [`super::PACKED_BYTES_MAX`], [`super::UNPACKED_BYTES_MAX`] and [`super::ENTRIES_MAX`] allow.
pub fn pack(folder: &Path) -> Result<Packed, CannotPack> {
    pack_within(folder, Limits::default())
}

pub(super) fn pack_within(folder: &Path, limits: Limits) -> Result<Packed, CannotPack> {
    let shown = folder.display();
    let root = std::fs::canonicalize(folder).map_err(failed(format!("`{shown}` can not be packed")))?;
    if !root.is_dir() {
        return refused(format!("`{shown}` is no folder: a folder is packed as a whole"));
    }
    let (found, left_out) = find(&root, limits.entries)?;
    let contents = count(&found, limits.unpacked)?;
    if contents.files == 0 {
        return refused(format!("`{shown}` has nothing to pack in it, or .gitignore and {IGNORE_NAME} leave nothing of it"));
    }
    let kept = failed("the packed folder could not be kept for a moment (TMPDIR names another place for it)");
    let sink = tempfile::tempfile().map_err(kept)?;
    let sink = Hashed { inner: BufWriter::new(sink), hash: Sha256::new(), bytes: 0, most: limits.packed };
    let mut tar = Builder::new(GzBuilder::new().mtime(0).write(sink, Compression::new(6)));
    for one in &found {
        add(&mut tar, one).map_err(|error| too_large(error, &found))?;
    }
    let finished = tar.into_inner().and_then(flate2::write::GzEncoder::finish);
    let Hashed { inner, hash, bytes, .. } = finished.map_err(|error| too_large(failed("it could not be packed")(error), &found))?;
    let mut file = inner.into_inner().map_err(|error| failed("it could not be packed")(error.into_error()))?;
    file.rewind().map_err(failed("it could not be packed"))?;
    let package = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok(Packed { package, bytes, contents, left_out, file })
}

/// Everything that is to be packed, in the order of its paths.
fn find(root: &Path, most: u64) -> Result<(Vec<Found>, Vec<String>), CannotPack> {
    let mut walk = WalkBuilder::new(root);
    // Rules of folders above count as far as git would look for them.
    let in_repository = root.ancestors().any(|above| above.join(".git").exists());
    walk.standard_filters(false).git_ignore(true).require_git(in_repository).parents(in_repository);
    walk.add_custom_ignore_filename(IGNORE_NAME).follow_links(true).filter_entry(is_wanted).sort_by_file_name(Ord::cmp);
    let (mut found, mut left_out) = (Vec::new(), Vec::new());
    for entry in walk.build() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => match dangling(&error) {
                Some(link) => {
                    left_out.push(format!("{}: a link to what is not there", below(root, &link)));
                    continue;
                }
                None => return refused(unreadable(root, &error)),
            },
        };
        if let Some(error) = entry.error() {
            left_out.push(format!("a rule that is not understood: {error}"));
        }
        if entry.depth() == 0 {
            continue;
        }
        let place = entry.path();
        if entry.path_is_symlink() && !std::fs::canonicalize(place).is_ok_and(|to| to.starts_with(root)) {
            let remedy = format!("copy what it points to, or name it in {IGNORE_NAME}");
            return refused(format!("`{}` is a link that leads out of the folder: {remedy}", below(root, place)));
        }
        let metadata = std::fs::metadata(place).map_err(failed(format!("`{}` can not be read", below(root, place))))?;
        if !metadata.is_dir() && !metadata.is_file() {
            left_out.push(format!("{}: neither a file nor a folder", below(root, place)));
            continue;
        }
        let Some(path) = place.strip_prefix(root).ok().and_then(Path::to_str) else {
            return refused(format!("`{}` has a name that is not UTF-8: rename it, or name it in {IGNORE_NAME}", below(root, place)));
        };
        let path = clean(path.as_bytes()).or_else(|bad| refused(format!("{bad}: rename it, or leave it out ({IGNORE_NAME})")))?;
        found.push(Found { path, place: place.into(), metadata });
        if found.len() as u64 > most {
            return refused(too_many(&found, most));
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((found, left_out))
}

fn is_wanted(entry: &DirEntry) -> bool {
    let is_folder = entry.file_type().is_some_and(|kind| kind.is_dir());
    entry.depth() == 0
        || !is_folder
        || !(entry.file_name().to_str().is_some_and(|name| NEVER.contains(&name))
            || MARKS.iter().any(|mark| entry.path().join(mark).exists()))
}

/// The link, where the error is that it leads to nothing.
fn dangling(error: &ignore::Error) -> Option<PathBuf> {
    match error {
        ignore::Error::WithPath { path, err } => {
            let is_missing = err.io_error().is_some_and(|error| error.kind() == io::ErrorKind::NotFound);
            (is_missing && path.symlink_metadata().is_ok_and(|own| own.is_symlink())).then(|| path.clone())
        }
        ignore::Error::WithDepth { err, .. } | ignore::Error::WithLineNumber { err, .. } => dangling(err),
        _ => None,
    }
}

fn unreadable(root: &Path, error: &ignore::Error) -> String {
    match error {
        ignore::Error::Loop { ancestor, child } => {
            let remedy = format!("remove it, or name it in {IGNORE_NAME}");
            format!("`{}` is a link to `{}`, in which it lies: {remedy}", below(root, child), below(root, ancestor))
        }
        ignore::Error::WithPath { err, .. } | ignore::Error::WithDepth { err, .. } if matches!(**err, ignore::Error::Loop { .. }) => {
            unreadable(root, err)
        }
        ignore::Error::WithDepth { err, .. } => unreadable(root, err),
        ignore::Error::WithPath { path, err } => format!("`{}` can not be read: {err}", below(root, path)),
        other => format!("the folder can not be read: {other}"),
    }
}

fn below(root: &Path, path: &Path) -> String {
    match path.strip_prefix(root) {
        Ok(below) if !below.as_os_str().is_empty() => below.display().to_string(),
        _ => ".".into(),
    }
}

fn count(found: &[Found], most: u64) -> Result<Contents, CannotPack> {
    let mut contents = Contents::default();
    for one in found {
        if one.metadata.is_dir() {
            contents.folders += 1;
        } else {
            contents.files += 1;
            contents.bytes = contents.bytes.saturating_add(one.metadata.len());
        }
    }
    if contents.bytes > most {
        let (has, most) = (size(contents.bytes), size(most));
        return refused(format!("it has {has} of files, and at most {most} can go with a job. {}", largest(found)));
    }
    Ok(contents)
}

fn add(tar: &mut Builder<impl Write>, one: &Found) -> Result<(), CannotPack> {
    let mut header = Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let read = || failed(format!("`{}` could not be packed", one.path));
    if one.metadata.is_dir() {
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        return tar.append_data(&mut header, format!("{}/", one.path), io::empty()).map_err(read());
    }
    let size = one.metadata.len();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(if one.metadata.permissions().mode() & 0o100 == 0 { 0o644 } else { 0o755 });
    header.set_size(size);
    let mut left = Exactly { inner: File::open(&one.place).map_err(read())?, left: size };
    tar.append_data(&mut header, &one.path, &mut left).map_err(read())
}

/// As many bytes as were promised, or an error.
struct Exactly {
    inner: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(io::Error::other("it became shorter while it was packed: try again when nothing writes to it"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// What was written, counted, and refused beyond what may be.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
    most: u64,
}

/// More than may be, as packed.
#[derive(Debug, thiserror::Error)]
#[error("it is more than {} as packed", size(*.0))]
struct TooLarge(u64);

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        if self.bytes > self.most { Err(io::Error::other(TooLarge(self.most))) } else { Ok(written) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Tells what makes it so large, where that is what went wrong.
fn too_large(failure: CannotPack, found: &[Found]) -> CannotPack {
    let CannotPack::Io { error, .. } = &failure else { return failure };
    match error.get_ref().and_then(|inner| inner.downcast_ref::<TooLarge>()) {
        Some(told) => CannotPack::Refused(format!("{told}, and no more can go with a job. {}", largest(found))),
        None => failure,
    }
}

const ELSEWHERE: &str = "Put data where all nodes can read it, and leave it out";

fn largest(found: &[Found]) -> String {
    let mut files: Vec<(u64, &str)> =
        found.iter().filter(|one| one.metadata.is_file()).map(|one| (one.metadata.len(), one.path.as_str())).collect();
    files.sort_by(|a, b| b.cmp(a));
    let named: Vec<String> = files.iter().take(NAMED_MAX).map(|(bytes, path)| format!("{path} ({})", size(*bytes))).collect();
    format!("Largest: {}. {ELSEWHERE} ({IGNORE_NAME})", named.join(", "))
}

fn too_many(found: &[Found], most: u64) -> String {
    let mut folders: BTreeMap<&str, u64> = BTreeMap::new();
    for one in found {
        *folders.entry(one.path.rsplit_once('/').map_or(".", |(folder, _)| folder)).or_default() += 1;
    }
    let mut folders: Vec<(u64, &str)> = folders.into_iter().map(|(folder, count)| (count, folder)).collect();
    folders.sort_by(|a, b| b.cmp(a));
    let named: Vec<String> = folders.iter().take(NAMED_MAX).map(|(count, folder)| format!("{folder} ({count} and more)")).collect();
    format!("it has more than {most} files and folders. Most are in {}. {ELSEWHERE} ({IGNORE_NAME})", named.join(", "))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        1_048_576..1_073_741_824 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}
