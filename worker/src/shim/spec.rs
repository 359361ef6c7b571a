//! What the agent tells a new shim, once: which program, where its output goes, under which names.
//!
//! A version line and `name=value` entries, each ended by a NUL: nothing that exec takes can contain one, and the shim needs no parser
//! library for it. Order matters only among `arg`s and among `env`s. An unknown name is an error: agent and shim are built together.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::PROTOCOL;

/// Everything that a shim needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spec {
    /// The rank's number.
    pub rank: u32,
    /// The attempt's number.
    pub attempt: u32,
    /// Folder of the job's log segments.
    pub logs: PathBuf,
    /// Bytes of log kept for the job.
    pub log_bytes_max: u64,
    /// Folder that the rank starts in; the shim's own when there is none.
    pub workdir: Option<PathBuf>,
    /// Soft limit of open files for the rank (the agent raises its own).
    pub open_files: Option<u64>,
    /// Program and arguments.
    pub argv: Vec<CString>,
    /// The rank's whole environment, as `NAME=value`.
    pub env: Vec<CString>,
}

/// A text that is not a spec.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("bad spec: {0}")]
pub struct BadSpec(String);

fn head() -> String {
    format!("everlit-shim {PROTOCOL}")
}

impl Spec {
    /// As it stands in the memory file. Paths are the agent's own and contain no NUL, which no file system takes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head().into_bytes();
        out.push(0);
        let mut put = |name: &str, value: &[u8]| {
            out.extend_from_slice(name.as_bytes());
            out.push(b'=');
            out.extend_from_slice(value);
            out.push(0);
        };
        put("rank", self.rank.to_string().as_bytes());
        put("attempt", self.attempt.to_string().as_bytes());
        put("logs", self.logs.as_os_str().as_bytes());
        put("log_bytes_max", self.log_bytes_max.to_string().as_bytes());
        if let Some(workdir) = &self.workdir {
            put("workdir", workdir.as_os_str().as_bytes());
        }
        if let Some(limit) = self.open_files {
            put("open_files", limit.to_string().as_bytes());
        }
        self.argv.iter().for_each(|arg| put("arg", arg.as_bytes()));
        self.env.iter().for_each(|env| put("env", env.as_bytes()));
        out
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadSpec> {
        let mut entries = bytes.strip_suffix(&[0]).ok_or_else(|| BadSpec("it is cut off".into()))?.split(|b| *b == 0);
        let first = entries.next().unwrap_or_default();
        if first != head().as_bytes() {
            return Err(BadSpec(format!("this shim reads `{}`, not `{}`", head(), String::from_utf8_lossy(first))));
        }
        let mut spec = Self::default();
        for entry in entries {
            let text = || String::from_utf8_lossy(entry).into_owned();
            let at = entry.iter().position(|b| *b == b'=').ok_or_else(|| BadSpec(text()))?;
            let (name, value) = (&entry[..at], &entry[at + 1..]);
            let path = || PathBuf::from(OsString::from_vec(value.to_vec()));
            let number = || std::str::from_utf8(value).ok().and_then(|v| v.parse::<u64>().ok()).ok_or_else(|| BadSpec(text()));
            let small = || number().and_then(|n| u32::try_from(n).map_err(|_| BadSpec(text())));
            let string = || CString::new(value).map_err(|_| BadSpec(text()));
            match name {
                b"rank" => spec.rank = small()?,
                b"attempt" => spec.attempt = small()?,
                b"logs" => spec.logs = path(),
                b"log_bytes_max" => spec.log_bytes_max = number()?,
                b"workdir" => spec.workdir = Some(path()),
                b"open_files" => spec.open_files = Some(number()?),
                b"arg" => spec.argv.push(string()?),
                b"env" => spec.env.push(string()?),
                _ => return Err(BadSpec(format!("unknown entry `{}`", String::from_utf8_lossy(name)))),
            }
        }
        if spec.argv.is_empty() || spec.logs.as_os_str().is_empty() {
            return Err(BadSpec("no program or no log folder".into()));
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec {
            rank: 3,
            attempt: 2,
            logs: "/d/logs".into(),
            log_bytes_max: 1 << 30,
            workdir: Some("/tmp/a=b\n".into()),
            open_files: Some(1024),
            argv: vec![c"sh".into(), c"".into(), c"-c=x\ny".into()],
            env: vec![c"A=".into(), c"B=1=2".into()],
        }
    }

    #[test]
    fn a_spec_reads_back() {
        assert_eq!(Spec::decode(&spec().encode()), Ok(spec()));
    }

    #[test]
    fn what_is_not_a_spec_is_refused() {
        let whole = spec().encode();
        assert!(Spec::decode(&whole[..whole.len() - 1]).is_err());
        assert!(Spec::decode(b"").is_err());
        assert!(Spec::decode(b"everlit-shim 99\0arg=true\0logs=/l\0").is_err());
        assert!(Spec::decode(b"everlit-shim 1\0logs=/l\0").is_err());
        assert!(Spec::decode(b"everlit-shim 1\0arg=true\0logs=/l\0colour=red\0").is_err());
        assert!(Spec::decode(b"everlit-shim 1\0arg=true\0logs=/l\0rank=-1\0").is_err());
    }
}
