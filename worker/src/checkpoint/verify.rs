//! Full verification of a checkpoint: the manifest's form, plain file names, exact lengths and every chunk's hash.
//!
//! A [`Damage`] says which file, which chunk and why. Damage is about the bytes; an answer of the file system that may
//! differ next time (out of descriptors, an I/O error) is `Damage::Unreadable`, which is no reason to throw the
//! checkpoint away. Extra files are ignored, links are refused. Memory is bounded: each thread reads 256 KiB at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use everlit_api::join::to_hex;
use everlit_api::manifest::{
    MANIFEST_BYTES_MAX, MANIFEST_FORMAT, MANIFEST_NAME, Manifest, ManifestError, ManifestFile, folder_step, hex_sha256,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

const READ_BYTES: usize = 256 * 1024;

/// Why a checkpoint does not verify.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// A file that must be there is not.
    #[error("{0} is missing")]
    Missing(String),
    /// A link, a folder or a device stands where a regular file must be.
    #[error("{0} is not a regular file")]
    NotRegular(String),
    /// The manifest is larger than any real one.
    #[error("{MANIFEST_NAME} has {0} bytes, more than {MANIFEST_BYTES_MAX}")]
    HugeManifest(u64),
    /// The manifest can not be read as format 1.
    #[error("{MANIFEST_NAME} is not valid: {0}")]
    BadManifest(String),
    /// The manifest is of a format that this build does not know.
    #[error("{MANIFEST_NAME} has format {0}, this build reads format {MANIFEST_FORMAT}")]
    UnknownFormat(u64),
    /// A file is shorter or longer than the manifest says.
    #[error("{file} has {found} bytes instead of {expected}")]
    Length {
        /// Which file.
        file: String,
        /// By the manifest.
        expected: u64,
        /// On the disk.
        found: u64,
    },
    /// A chunk's bytes are not those that were committed.
    #[error("{file}: chunk {chunk} (from byte {offset}) has another sha256 than committed")]
    Content {
        /// Which file.
        file: String,
        /// Which chunk, from 0.
        chunk: usize,
        /// Where it begins.
        offset: u64,
    },
    /// The file system could not answer; says nothing about the bytes.
    #[error("{file} could not be read: {source}")]
    Unreadable {
        /// Which file.
        file: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Damage {
    /// Whether looking again may give another answer; such a checkpoint is not to be quarantined.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreadable { .. })
    }

    fn reading(file: &str, source: io::Error) -> Self {
        use nix::libc;
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::Missing(file.into()),
            // A link under O_NOFOLLOW; a socket; a folder.
            Some(libc::ELOOP | libc::ENXIO | libc::EISDIR) => Self::NotRegular(file.into()),
            _ => Self::Unreadable { file: file.into(), source },
        }
    }
}

/// Verifies the checkpoint in folder `path` in full and answers its manifest.
pub fn verify(path: &Path) -> Result<Manifest, Damage> {
    let manifest = read_manifest(path)?;
    match manifest.files.par_iter().map(|file| verify_file(path, file)).find_map_first(Result::err) {
        None => Ok(manifest),
        Some(damage) => Err(damage),
    }
}

/// Reads and checks the manifest alone: format, names, and counts of chunks, not the files.
pub fn read_manifest(path: &Path) -> Result<Manifest, Damage> {
    match path.symlink_metadata() {
        Ok(about) if about.is_dir() => {}
        Ok(_) => return Err(Damage::NotRegular("the checkpoint's folder".into())),
        Err(error) => return Err(Damage::reading("the checkpoint's folder", error)),
    }
    let (mut file, bytes) = open_regular(path, MANIFEST_NAME)?;
    if bytes > MANIFEST_BYTES_MAX {
        return Err(Damage::HugeManifest(bytes));
    }
    let mut text = Vec::new();
    (&mut file).take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| Damage::reading(MANIFEST_NAME, error))?;
    let manifest = parse_manifest(&text)?;
    let folder = path.file_name().and_then(|name| name.to_str()).and_then(folder_step);
    if folder.is_some_and(|step| step != manifest.step) {
        return Err(Damage::BadManifest(format!("it is of step {}, its folder of another", manifest.step)));
    }
    Ok(manifest)
}

pub(super) fn parse_manifest(text: &[u8]) -> Result<Manifest, Damage> {
    Manifest::parse(text).map_err(|error| match error {
        ManifestError::UnknownFormat(format) => Damage::UnknownFormat(format),
        ManifestError::Bad(why) => Damage::BadManifest(why),
    })
}

/// Opens a regular file of the folder without following a link, and answers its length.
pub(super) fn open_regular(folder: &Path, name: &str) -> Result<(File, u64), Damage> {
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC)
        .open(folder.join(name))
        .and_then(|file| file.metadata().map(|about| (file, about)));
    match open {
        Ok((file, about)) if about.is_file() => Ok((file, about.len())),
        Ok(_) => Err(Damage::NotRegular(name.into())),
        Err(error) => Err(Damage::reading(name, error)),
    }
}

pub(super) fn verify_file(folder: &Path, expected: &ManifestFile) -> Result<(), Damage> {
    let name = &expected.name;
    let (file, found) = open_regular(folder, name)?;
    if found != expected.bytes {
        return Err(Damage::Length { file: name.clone(), expected: expected.bytes, found });
    }
    let wrong = |(chunk, sha256): (usize, &String)| {
        let offset = chunk as u64 * expected.chunk_bytes;
        match hash_chunk(&file, offset, expected.chunk_bytes.min(expected.bytes - offset)) {
            Ok(hash) if hash.eq_ignore_ascii_case(sha256) => None,
            Ok(_) => Some(Damage::Content { file: name.clone(), chunk, offset }),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Some(Damage::Length { file: name.clone(), expected: expected.bytes, found: offset })
            }
            Err(error) => Some(Damage::reading(name, error)),
        }
    };
    match expected.sha256.par_iter().enumerate().find_map_first(wrong) {
        None => Ok(()),
        Some(damage) => Err(damage),
    }
}

/// Reads one file of a manifest into memory and verifies what was read, so that the bytes used are the bytes checked.
pub fn read_file(folder: &Path, expected: &ManifestFile) -> Result<Vec<u8>, Damage> {
    let name = &expected.name;
    let (file, found) = open_regular(folder, name)?;
    let length = |found| Damage::Length { file: name.clone(), expected: expected.bytes, found };
    let (Ok(bytes), Ok(chunk_bytes), true) =
        (usize::try_from(expected.bytes), usize::try_from(expected.chunk_bytes), found == expected.bytes)
    else {
        return Err(length(found));
    };
    let mut content = vec![0; bytes];
    let wrong = |(chunk, (part, sha256)): (usize, (&mut [u8], &String))| {
        let offset = chunk as u64 * expected.chunk_bytes;
        match file.read_exact_at(part, offset) {
            Ok(()) if hex_sha256(part).eq_ignore_ascii_case(sha256) => None,
            Ok(()) => Some(Damage::Content { file: name.clone(), chunk, offset }),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Some(length(offset)),
            Err(error) => Some(Damage::reading(name, error)),
        }
    };
    match content.par_chunks_mut(chunk_bytes).zip(&expected.sha256).enumerate().find_map_first(wrong) {
        None => Ok(content),
        Some(damage) => Err(damage),
    }
}

/// Reads one file of a manifest in pieces and hands each on once it is verified, with its offset; several at a time, in any order. Memory
/// is bounded by a chunk per thread. The first piece that does not verify ends it: what was handed on is then not to be used.
pub fn stream_file(folder: &Path, expected: &ManifestFile, take: &(dyn Fn(u64, &[u8]) + Sync)) -> Result<(), Damage> {
    let name = &expected.name;
    let (file, found) = open_regular(folder, name)?;
    let length = |found| Damage::Length { file: name.clone(), expected: expected.bytes, found };
    if found != expected.bytes {
        return Err(length(found));
    }
    let wrong = |buffer: &mut Vec<u8>, (chunk, sha256): (usize, &String)| {
        let offset = chunk as u64 * expected.chunk_bytes;
        let Ok(bytes) = usize::try_from(expected.chunk_bytes.min(expected.bytes - offset)) else { return Some(length(0)) };
        buffer.resize(bytes, 0);
        match file.read_exact_at(buffer, offset) {
            Ok(()) if hex_sha256(buffer).eq_ignore_ascii_case(sha256) => take(offset, buffer),
            Ok(()) => return Some(Damage::Content { file: name.clone(), chunk, offset }),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Some(length(offset)),
            Err(error) => return Some(Damage::reading(name, error)),
        }
        None
    };
    match expected.sha256.par_iter().enumerate().map_init(Vec::new, wrong).find_map_first(|damage| damage) {
        None => Ok(()),
        Some(damage) => Err(damage),
    }
}

/// The hex sha256 of `length` bytes from `offset`.
pub(super) fn hash_chunk(file: &File, mut offset: u64, mut length: u64) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; READ_BYTES.min(usize::try_from(length).unwrap_or(READ_BYTES))];
    while length > 0 {
        let part = buffer.len().min(usize::try_from(length).unwrap_or(buffer.len()));
        file.read_exact_at(&mut buffer[..part], offset)?;
        hasher.update(&buffer[..part]);
        offset += part as u64;
        length -= part as u64;
    }
    Ok(to_hex(&hasher.finalize()))
}
