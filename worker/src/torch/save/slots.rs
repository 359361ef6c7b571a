//! The two buffers that a rank's share is copied into: in shared memory, where they outlive the rank, or in its own.
//!
//! Under an agent they are files of the job's snapshot folder, reserved whole at the start: too little shared memory shows here and not
//! as a fault in the middle of a copy. Then, and alone, the buffers are ordinary memory: saving works the same, but dies with the rank.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use everlit_worker::checkpoint::snapshot::{Note, seal, slot_path, unseal};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Linux 5.14: fault pages in without changing what is in them.
const MADV_POPULATE_WRITE: i32 = 23;

/// One buffer.
#[derive(Debug)]
pub struct Slot {
    memory: Option<(NonNull<u8>, usize)>,
    path: Option<PathBuf>,
}

// SAFETY: plain memory that the slot owns; who may touch it when is the saver's business.
unsafe impl Send for Slot {}
// SAFETY: as above; `bytes_mut` is unsafe for that reason.
unsafe impl Sync for Slot {}

/// Both buffers, in shared memory if it has room; else the reason why not is answered too.
pub fn open(dir: Option<&Path>, attempt: u32, rank: u32, bytes: usize) -> io::Result<([Slot; 2], Option<String>)> {
    let mut why = None;
    if let Some(dir) = dir {
        match shared(dir, attempt, rank, bytes) {
            Ok(slots) => return Ok((slots, None)),
            Err(error) => why = Some(explain(dir, bytes, &error)),
        }
    }
    Ok(([Slot::private(bytes)?, Slot::private(bytes)?], why))
}

fn shared(dir: &Path, attempt: u32, rank: u32, bytes: usize) -> io::Result<[Slot; 2]> {
    let paths = [0, 1].map(|slot| slot_path(dir, attempt, rank, slot));
    let both = || Ok([Slot::shared(&paths[0], bytes)?, Slot::shared(&paths[1], bytes)?]);
    both().inspect_err(|_| {
        for path in &paths {
            // Half of what does not fit is of no use to anybody.
            let _ = std::fs::remove_file(path);
        }
    })
}

fn explain(dir: &Path, bytes: usize, error: &io::Error) -> String {
    let free = nix::sys::statvfs::statvfs(dir).map(|about| about.blocks_available() * about.fragment_size());
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    match free {
        Ok(free) if error.raw_os_error() == Some(nix::libc::ENOSPC) => format!(
            "shared memory has {} MiB left for this rank's snapshots of twice {} MiB: give it more (docker: --shm-size, kubernetes: a memory volume)",
            mib(free),
            mib(bytes as u64)
        ),
        _ => format!("`{}` can not hold snapshots: {error}", dir.display()),
    }
}

impl Slot {
    fn shared(path: &Path, bytes: usize) -> io::Result<Self> {
        unseal(path)?;
        let Some(length) = NonZeroUsize::new(bytes) else { return Ok(Self { memory: None, path: Some(path.into()) }) };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        reserve(&file, bytes)?;
        // SAFETY: a new mapping of a file of that length, which nobody truncates while this rank lives.
        let memory = unsafe { mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &file, 0)? };
        Ok(Self { memory: Some((memory.cast(), bytes)), path: Some(path.into()) })
    }

    fn private(bytes: usize) -> io::Result<Self> {
        let Some(length) = NonZeroUsize::new(bytes) else { return Ok(Self { memory: None, path: None }) };
        // SAFETY: a new mapping.
        let memory = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)? };
        Ok(Self { memory: Some((memory.cast(), bytes)), path: None })
    }

    /// Makes every page present, so that the first copy is as fast as the others. A hint: older kernels do it in the copy.
    pub fn populate(&self) {
        if let Some((start, bytes)) = self.memory {
            // SAFETY: the slot's own mapping; no byte changes.
            unsafe { nix::libc::madvise(start.as_ptr().cast(), bytes, MADV_POPULATE_WRITE) };
        }
    }

    /// What is in it. Nobody overwrites it meanwhile: the saver sees to that.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the slot's own mapping, every byte of which is initialized.
        self.memory.map_or(&[], |(start, bytes)| unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) })
    }

    /// The same, to be overwritten.
    ///
    /// # Safety
    /// Nobody reads or writes it meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: the slot's own mapping; alone by the caller.
        self.memory.map_or(&mut [], |(start, bytes)| unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), bytes) })
    }

    /// What is in it does not count any more.
    pub fn unseal(&self) -> io::Result<()> {
        self.path.as_ref().map_or(Ok(()), |path| unseal(path))
    }

    /// What is in it counts.
    pub fn seal(&self, note: &Note) -> io::Result<()> {
        self.path.as_ref().map_or(Ok(()), |path| seal(path, note))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some((start, bytes)) = self.memory.take() {
            // SAFETY: the slot's own mapping, unmapped once. A failure leaves it mapped, which harms nobody.
            let _ = unsafe { munmap(start.cast(), bytes) };
        }
    }
}

fn reserve(file: &File, bytes: usize) -> io::Result<()> {
    let bytes = i64::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
    nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), 0, bytes).map_err(Into::into)
}
