//! How fast a disk takes and gives checkpoints: the same code that saves and loads, timed, beside plain reading.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use everlit_api::manifest::{CHUNK_BYTES, ManifestFile};
use everlit_worker::checkpoint;
use serde::Serialize;

use super::TrainError;
use super::random::Stream;
use super::save::write::write_durably;

/// Megabytes (10^6) per second.
#[derive(Debug, Serialize)]
pub struct Rates {
    /// Bytes that were written and read.
    pub bytes: usize,
    /// Written with checksums, and synced.
    pub write_mb_per_second: f64,
    /// Read back from the disk by one thread, unverified.
    pub cold_read_mb_per_second: f64,
    /// Read back from the disk and verified.
    pub load_mb_per_second: f64,
    /// Copied in memory.
    pub copy_mb_per_second: f64,
}

/// Measures in a folder, which is made, and leaves nothing there.
pub fn measure(folder: &Path, bytes: usize) -> Result<Rates, TrainError> {
    let failed = |error: io::Error| TrainError::Failed(format!("`{}`: {error}", folder.display()));
    fs::create_dir_all(folder).map_err(failed)?;
    let path = folder.join("everlit-disk.bin");
    let rates = run(folder, &path, bytes);
    // What is left behind is named in the error that comes first.
    let removed = fs::remove_file(&path);
    let rates = rates?;
    removed.map_err(failed)?;
    Ok(rates)
}

fn run(folder: &Path, path: &Path, bytes: usize) -> Result<Rates, TrainError> {
    let failed = |error: io::Error| TrainError::Failed(format!("`{}`: {error}", path.display()));
    let stream = Stream::new(1, "disk");
    let content: Vec<u8> = (0..bytes.div_ceil(8) as u64).flat_map(|position| stream.bits(position).to_le_bytes()).take(bytes).collect();
    let mut copy = vec![1_u8; bytes];
    let rate = |begun: Instant| bytes as f64 / 1e6 / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    copy.copy_from_slice(&content);
    let copy_mb_per_second = rate(begun);
    drop(copy);
    let begun = Instant::now();
    let sha256 = write_durably(path, &content).map_err(failed)?;
    let write_mb_per_second = rate(begun);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_string();
    let file = ManifestFile { name, bytes: bytes as u64, chunk_bytes: CHUNK_BYTES, sha256 };
    forget(path).map_err(failed)?;
    let begun = Instant::now();
    let mut buffer = vec![0; 4 << 20];
    let mut open = File::open(path).map_err(failed)?;
    while open.read(&mut buffer).map_err(failed)? > 0 {}
    let cold_read_mb_per_second = rate(begun);
    drop(open);
    forget(path).map_err(failed)?;
    let begun = Instant::now();
    checkpoint::stream_file(folder, &file, &|_, _| {}).map_err(|damage| TrainError::Failed(damage.to_string()))?;
    let load_mb_per_second = rate(begun);
    Ok(Rates { bytes, write_mb_per_second, cold_read_mb_per_second, load_mb_per_second, copy_mb_per_second })
}

/// Takes a file's pages out of memory.
fn forget(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open file and plain numbers.
    match unsafe { nix::libc::posix_fadvise(file.as_raw_fd(), 0, 0, nix::libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
