//! A file of a checkpoint on this machine, checked as it is read: what is sent is what was committed.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::fault::Fault;
use super::trouble::Trouble;
use crate::join::to_hex;
use crate::manifest::ManifestFile;

/// An open file, and how far it was read and found right.
#[derive(Debug)]
pub struct CheckedFile<'a> {
    file: File,
    folder: &'a Path,
    about: ManifestFile,
    hasher: Sha256,
    chunk: usize,
    of_chunk: u64,
    left: u64,
}

impl<'a> CheckedFile<'a> {
    /// From its beginning. `folder` is for people.
    pub fn new(file: File, folder: &'a Path, about: &ManifestFile) -> Self {
        let of_chunk = about.chunk_bytes.min(about.bytes);
        Self { file, folder, about: about.clone(), hasher: Sha256::new(), chunk: 0, of_chunk, left: about.bytes }
    }

    /// The next `bytes`, which must be there. What is wrong with a chunk is told at its end.
    pub fn read(&mut self, bytes: usize) -> Result<Vec<u8>, Fault> {
        let mut piece = vec![0; bytes];
        self.file.read_exact(&mut piece).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.fault(Trouble::Damaged, "it ends early"),
            // A disk that can not be read now says nothing about what is on it.
            _ => self.fault(Trouble::Other, &error.to_string()),
        })?;
        let mut rest = piece.as_slice();
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(usize::try_from(self.of_chunk).unwrap_or(usize::MAX)));
            self.hasher.update(part);
            self.of_chunk -= part.len() as u64;
            self.left = self.left.saturating_sub(part.len() as u64);
            rest = after;
            if self.of_chunk == 0 {
                self.check()?;
            }
        }
        if self.about.bytes == 0 {
            self.check()?;
        }
        Ok(piece)
    }

    fn check(&mut self) -> Result<(), Fault> {
        let found = to_hex(&std::mem::take(&mut self.hasher).finalize());
        if self.about.sha256.get(self.chunk).is_none_or(|wanted| !wanted.eq_ignore_ascii_case(&found)) {
            return Err(self.fault(Trouble::Damaged, &format!("chunk {} has another sha256 than committed", self.chunk)));
        }
        self.chunk += 1;
        self.of_chunk = self.about.chunk_bytes.min(self.left);
        Ok(())
    }

    fn fault(&self, trouble: Trouble, why: &str) -> Fault {
        Fault::new(trouble, format!("read {}", self.folder.display()), format!("{}: {why}", self.about.name))
    }
}
