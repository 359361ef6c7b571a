//! What is brought to a server: the programs, and whether it can run them.

use std::path::{Path, PathBuf};

use super::Fault;
use super::host::Look;

/// What a node needs, the last one only for the built-in program.
pub(super) const NAMES: [&str; 3] = ["everlit-agent", "everlit-shim", "everlit-worker"];
/// What the built-in program trains on when it is told nothing; a few MiB.
const SAMPLE_TEXT: &str = "sample-text";
/// Beside the programs: while they are brought, and what is kept of them.
const ROOM_FACTOR: u64 = 2;

/// Programs of this machine that servers get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Programs {
    /// Where they are.
    pub folder: PathBuf,
    /// Those that are there, and what goes with them.
    pub names: Vec<&'static str>,
    /// As `uname -m` says it.
    machine: &'static str,
    /// The glibc that they need at least.
    glibc: Option<(u32, u32)>,
    bytes: u64,
}

impl Programs {
    /// Reads them.
    pub(super) fn find(from: Option<&Path>) -> Result<Self, Fault> {
        let own = || std::env::current_exe().ok()?.parent().map(Path::to_path_buf);
        let folder = from.map(Path::to_path_buf).or_else(own).unwrap_or_default();
        let remedy = "run scripts/build.sh, or say --from FOLDER";
        let mut found = Self { folder: folder.clone(), names: Vec::new(), machine: "", glibc: None, bytes: 0 };
        for (at, name) in NAMES.into_iter().enumerate() {
            let path = folder.join(name);
            let program = match std::fs::read(&path) {
                Ok(program) => program,
                Err(error) if at == NAMES.len() - 1 && error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Fault::new(format!("{} can not be read: {error}", path.display()), remedy)),
            };
            found.machine = machine(&program).ok_or_else(|| Fault::new(format!("{} is no program for Linux", path.display()), remedy))?;
            found.glibc = found.glibc.max(glibc(&program));
            found.bytes += program.len() as u64;
            found.names.push(name);
        }
        if found.names.len() == NAMES.len() && folder.join(SAMPLE_TEXT).is_dir() {
            found.names.push(SAMPLE_TEXT);
        }
        Ok(found)
    }

    /// Whether they run on a server, and there is room for them.
    pub(super) fn suit(&self, look: &Look) -> Result<(), Fault> {
        if look.machine != self.machine {
            let why = format!("it is {}, and the programs in {} are for {}", look.machine, self.folder.display(), self.machine);
            return Err(Fault::new(why, "build them on such a machine, and say --from FOLDER"));
        }
        if let Some((major, minor)) = self.glibc
            && look.glibc.is_none_or(|has| has < (major, minor))
        {
            let has = look.glibc.map_or("no glibc".into(), |(major, minor)| format!("glibc {major}.{minor}"));
            let why = format!("it has {has}, and the programs in {} need {major}.{minor}", self.folder.display());
            return Err(Fault::new(why, "build them on a machine as old as it is, and say --from FOLDER"));
        }
        let needed = self.bytes * ROOM_FACTOR;
        match look.free.iter().find(|(_, free)| *free < needed) {
            None => Ok(()),
            Some((folder, free)) => {
                let mib = |bytes: u64| bytes.div_ceil(1 << 20);
                let why = format!("{folder} has {} MiB free, and this takes {} MiB", free >> 20, mib(needed));
                Err(Fault::new(why, "make room there"))
            }
        }
    }
}

/// What an ELF program is for, as `uname -m` says it.
fn machine(program: &[u8]) -> Option<&'static str> {
    let known = program.get(18..20).filter(|_| program.starts_with(b"\x7fELF"))?;
    match known {
        [0x3e, 0] => Some("x86_64"),
        [0xb7, 0] => Some("aarch64"),
        _ => None,
    }
}

/// The newest glibc that a program names.
fn glibc(program: &[u8]) -> Option<(u32, u32)> {
    const NAME: &[u8] = b"GLIBC_";
    let named = |at: usize| {
        let text: String = program[at..].iter().take(8).take_while(|c| c.is_ascii_digit() || **c == b'.').map(|c| char::from(*c)).collect();
        version(&text)
    };
    program.windows(NAME.len()).enumerate().filter(|(_, found)| *found == NAME).filter_map(|(at, _)| named(at + NAME.len())).max()
}

/// Like `2.36`; what comes after the second number does not count.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kind: u8, words: &str) -> Vec<u8> {
        let mut program = b"\x7fELF".to_vec();
        program.resize(20, 0);
        program[18] = kind;
        program.extend(words.as_bytes());
        program
    }

    fn look(machine: &str, glibc: Option<(u32, u32)>, free: u64) -> Look {
        Look { machine: machine.into(), glibc, free: vec![("/usr/local".into(), free)], ..Look::default() }
    }

    #[test]
    fn programs_are_read_for_what_they_need() {
        let dir = tempfile::tempdir().expect("a folder");
        let missing = Programs::find(Some(dir.path())).expect_err("nothing there").to_string();
        assert!(missing.contains("everlit-agent can not be read") && missing.contains("scripts/build.sh"), "{missing}");
        std::fs::write(dir.path().join("everlit-agent"), elf(0x3e, "\0GLIBC_2.9\0GLIBC_2.34\0GLIBC_2.4\0GLIBC_PRIVATE\0GLIBC_2.33"))
            .expect("written");
        std::fs::write(dir.path().join("everlit-shim"), elf(0x3e, "")).expect("written");
        let found = Programs::find(Some(dir.path())).expect("found");
        assert_eq!((found.names.as_slice(), found.glibc), (["everlit-agent", "everlit-shim"].as_slice(), Some((2, 34))));
        let told = |look: &Look| found.suit(look).map_err(|fault| fault.why.replace(&dir.path().display().to_string(), "DIR"));
        assert_eq!(told(&look("x86_64", Some((2, 34)), 1 << 20)), Ok(()));
        assert_eq!(told(&look("riscv64", Some((2, 40)), 1 << 20)), Err("it is riscv64, and the programs in DIR are for x86_64".into()));
        assert_eq!(told(&look("x86_64", Some((2, 33)), 1 << 20)), Err("it has glibc 2.33, and the programs in DIR need 2.34".into()));
        assert_eq!(told(&look("x86_64", None, 1 << 20)), Err("it has no glibc, and the programs in DIR need 2.34".into()));
        assert_eq!(told(&look("x86_64", Some((3, 0)), 100)), Err("/usr/local has 0 MiB free, and this takes 1 MiB".into()));
        std::fs::write(dir.path().join("everlit-agent"), "#!/bin/sh").expect("written");
        assert!(Programs::find(Some(dir.path())).expect_err("a script").why.contains("is no program for Linux"));
    }
}
