//! Appending records to the job's log segments, together with the shims of all other ranks of the job on this node.
//!
//! Every write is one `writev` to a file opened `O_APPEND` under a shared lock; who finds the segment full takes the lock for itself alone,
//! takes away the write permission bits (sealed, for ever) and removes the oldest segments beyond the job's bound. The bits are looked at
//! before each write, because root may write to a sealed file. The trap: a number must never be made again after its segment was removed,
//! so a new segment is made only above the highest that is there, and only when that one is sealed.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use everlit_api::agent::log::SEGMENT_BYTES;
use nix::libc;

/// Segments that are tried for one record before it counts as not written.
const TRIES: usize = 64;
/// Smallest segment, for jobs with a small bound.
const SEGMENT_BYTES_MIN: u64 = 256 * 1024;
/// Permission bits of a segment, open and sealed.
const MODE_OPEN: u32 = 0o640;
pub(crate) const MODE_SEALED: u32 = 0o440;
const WRITE_BITS: u32 = 0o222;

/// The file name of a segment: twenty digits, so that names sort like numbers.
pub fn segment_name(number: u64) -> String {
    format!("{number:020}.log")
}

/// The number of a segment's file name, if it is one.
pub fn segment_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".log")?.parse().ok()?;
    (segment_name(number) == name).then_some(number)
}

/// All segments of a folder, oldest first; none when it is not there.
pub fn segment_numbers(dir: &Path) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut numbers: Vec<u64> = entries.flatten().filter_map(|entry| segment_number(entry.file_name().to_str()?)).collect();
    numbers.sort_unstable();
    numbers
}

/// Whether nothing will be appended any more.
pub fn is_sealed(about: &std::fs::Metadata) -> bool {
    about.permissions().mode() & WRITE_BITS == 0 || about.nlink() == 0
}

/// One shim's way into the log.
#[derive(Debug)]
pub(super) struct Segments {
    dir: PathBuf,
    bytes_max: u64,
    current: Option<(u64, File)>,
}

impl Segments {
    pub(super) fn new(dir: PathBuf, bytes_max: u64) -> Self {
        Self { dir, bytes_max, current: None }
    }

    /// Bytes after which a segment is sealed: at least four of them fit the bound.
    fn segment_bytes(&self) -> u64 {
        (self.bytes_max / 4).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES)
    }

    /// Appends one record; answers how many bytes of the data were written, which are fewer on a full disk (a torn record).
    pub(super) fn append(&mut self, header: &[u8], data: &[u8]) -> io::Result<usize> {
        for _ in 0..TRIES {
            let segment_bytes = self.segment_bytes();
            let (_, file) = self.open()?;
            lock(file, libc::LOCK_SH)?;
            let about = file.metadata()?;
            if is_sealed(&about) {
                lock(file, libc::LOCK_UN)?;
                self.current = self.current.take().and_then(|(number, _)| self.open_above(number).transpose()).transpose()?;
                continue;
            }
            let written = file.write_vectored(&[IoSlice::new(header), IoSlice::new(data)]);
            let total = header.len() + data.len();
            if about.len() + total as u64 >= segment_bytes {
                self.seal();
            } else {
                lock(file, libc::LOCK_UN)?;
            }
            return written.map(|count| count.saturating_sub(header.len()));
        }
        Err(io::Error::other("no segment takes the record"))
    }

    fn open(&mut self) -> io::Result<&mut (u64, File)> {
        if self.current.is_none() {
            self.current = self.open_above(0)?;
        }
        self.current.as_mut().ok_or_else(|| io::Error::other("no segment can be opened"))
    }

    /// Opens the newest segment, or makes the one above it when it is sealed. `below`: sealed, as far as this shim knows.
    fn open_above(&self, below: u64) -> io::Result<Option<(u64, File)>> {
        for _ in 0..TRIES {
            let highest = segment_numbers(&self.dir).last().copied().unwrap_or(0).max(below);
            let path = self.dir.join(segment_name(highest));
            match OpenOptions::new().append(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
                Ok(file) if !is_sealed(&file.metadata()?) => return Ok(Some((highest, file))),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && highest == below => {}
                // Sealed, for whom the bits hold.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            }
            let path = self.dir.join(segment_name(highest + 1));
            let made = OpenOptions::new().append(true).create(true).mode(MODE_OPEN).custom_flags(libc::O_NOFOLLOW).open(&path);
            match made {
                Ok(file) => return Ok(Some((highest + 1, file))),
                // Made, filled and sealed by others meanwhile.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && path.exists() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Seals the current segment unless others are writing to it: then one of them will.
    fn seal(&mut self) {
        let Some((_, file)) = &self.current else { return };
        // A failed conversion loses the shared lock too, which is what is wanted.
        if lock(file, libc::LOCK_EX | libc::LOCK_NB).is_err() {
            return;
        }
        let sealed = file.set_permissions(PermissionsExt::from_mode(MODE_SEALED)).is_ok();
        let _ = lock(file, libc::LOCK_UN);
        if sealed {
            self.current = None;
            self.remove_oldest();
        }
    }

    fn remove_oldest(&self) {
        let numbers = segment_numbers(&self.dir);
        let Some((_, older)) = numbers.split_last() else { return };
        let bytes = |number: u64| std::fs::metadata(self.dir.join(segment_name(number))).map_or(0, |about| about.len());
        let mut sum: u64 = numbers.iter().map(|number| bytes(*number)).sum();
        // Room for the segment that comes next.
        let allowed = self.bytes_max.saturating_sub(self.segment_bytes());
        for number in older {
            if sum <= allowed {
                break;
            }
            sum = sum.saturating_sub(bytes(*number));
            let _ = std::fs::remove_file(self.dir.join(segment_name(*number)));
        }
    }
}

fn lock(file: &File, how: i32) -> io::Result<()> {
    loop {
        // SAFETY: a system call on an open descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(dir: &Path, bytes_max: u64, records: usize) -> Segments {
        let mut segments = Segments::new(dir.into(), bytes_max);
        for _ in 0..records {
            segments.append(&[b'h'; 36], &[b'x'; 65_500]).unwrap();
        }
        segments
    }

    #[test]
    fn full_segments_are_sealed_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 2 * 1024 * 1024, 100);
        let numbers = segment_numbers(dir.path());
        let about: Vec<_> = numbers.iter().map(|n| std::fs::metadata(dir.path().join(segment_name(*n))).unwrap()).collect();
        assert!(numbers[0] > 1, "{numbers:?}");
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{numbers:?}");
        assert!(about.iter().map(std::fs::Metadata::len).sum::<u64>() <= 2 * 1024 * 1024);
        assert!(about[..about.len() - 1].iter().all(is_sealed));
    }

    #[test]
    fn a_writer_that_was_away_goes_on_at_the_newest_segment() {
        let dir = tempfile::tempdir().unwrap();
        let mut away = filled(dir.path(), 1024 * 1024, 1);
        filled(dir.path(), 1024 * 1024, 60);
        let before = segment_numbers(dir.path());
        away.append(b"h", b"back").unwrap();
        let after = segment_numbers(dir.path());
        assert_eq!(before.first(), after.first());
        let newest = std::fs::read(dir.path().join(segment_name(*after.last().unwrap()))).unwrap();
        assert!(newest.ends_with(b"hback"));
    }

    #[test]
    fn a_sealed_segment_is_not_written_to_even_by_root() {
        let dir = tempfile::tempdir().unwrap();
        let mut segments = filled(dir.path(), 1 << 30, 1);
        let first = dir.path().join(segment_name(1));
        std::fs::set_permissions(&first, PermissionsExt::from_mode(MODE_SEALED)).unwrap();
        let length = std::fs::metadata(&first).unwrap().len();
        segments.append(b"h", b"more").unwrap();
        assert_eq!(std::fs::metadata(&first).unwrap().len(), length);
        assert_eq!(segment_numbers(dir.path()), vec![1, 2]);
    }

    #[test]
    fn names_have_one_spelling() {
        assert_eq!(segment_number(&segment_name(7)), Some(7));
        for name in ["7.log", "00000000000000000007", "x.log", "00000000000000000007.log.gz"] {
            assert_eq!(segment_number(name), None, "{name}");
        }
    }
}
