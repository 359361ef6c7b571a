//! Small checkpoints for tests.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use everlit_api::manifest::{DataPosition, MANIFEST_FORMAT, Manifest};
use everlit_api::time::Timestamp;
use everlit_worker::checkpoint::{begin, commit, describe_file};

/// The files of every test checkpoint: one of several chunks, one small, one empty.
pub const FILES: [(&str, usize); 3] = [("a.safetensors", 9 * 1024 * 1024 + 5), ("b.safetensors", 100), ("c.bin", 0)];

/// Bytes that depend on step and file.
pub fn content(step: u64, name: &str, bytes: usize) -> Vec<u8> {
    let mut state = step * 31 + u64::from(name.as_bytes()[0]);
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..bytes).map(next).collect()
}

/// A draft with all files written and its manifest.
pub fn draft(dir: &Path, step: u64, attempt: u32) -> (PathBuf, Manifest) {
    let draft = begin(dir, step, attempt, 0).unwrap();
    for (name, bytes) in FILES {
        fs::write(draft.join(name), content(step, name, bytes)).unwrap();
    }
    let manifest = describe(&draft, step, attempt);
    (draft, manifest)
}

/// The manifest of a folder with the test's files.
pub fn describe(folder: &Path, step: u64, attempt: u32) -> Manifest {
    Manifest {
        format: MANIFEST_FORMAT,
        job_id: String::new(),
        attempt,
        generation: 0,
        step,
        epoch: 0,
        world_size: 1,
        global_batch: 8,
        samples: 8 * step,
        seed: 0,
        data: DataPosition::default(),
        model: None,
        created_at: Timestamp::now(),
        files: FILES.iter().map(|(name, _)| describe_file(&folder.join(name)).unwrap()).collect(),
        manifest_sha256: None,
    }
}

/// A committed checkpoint.
pub fn checkpoint(dir: &Path, step: u64, attempt: u32) -> PathBuf {
    let (draft, manifest) = draft(dir, step, attempt);
    commit(dir, &draft, &manifest).unwrap()
}

/// Changes one byte of a file.
pub fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// The names in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
