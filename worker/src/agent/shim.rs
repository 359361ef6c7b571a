//! The agent's side of a shim: starting one, connecting to one that an earlier agent started, and reading what it tells.
//!
//! A new shim gets three descriptors as its standard streams, so nothing has to be made inheritable: the spec in a memory file, the locked
//! `state` file, and one end of a socket pair. When the connection ends without an exit line, [`settle`] finds out what is true: the lock tells
//! whether the shim lives, the state file what it wrote before it died.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use everlit_api::rank::RankExit;
use everlit_api::time::Timestamp;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;

use super::engine::{drained, no_exit};
use super::folders::{DRAINED_NAME, ERROR_NAME};
use super::limits::{ERROR_CHARS_MAX, ERROR_FILE_BYTES_MAX};
use crate::shim::spec::Spec;
use crate::shim::{PROTOCOL, SOCKET_NAME, STATE_NAME};

/// What a shim says (`crate::shim::state`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Told {
    /// Its rank lives.
    Started {
        /// The shim's process and session.
        shim: i32,
        /// The rank's process.
        pid: u32,
        /// Wall time.
        at_ms: u64,
    },
    /// Its rank wrote something.
    Output {},
    /// Its rank ended.
    Exit {
        /// Exit code.
        #[serde(default)]
        code: Option<i32>,
        /// Signal number.
        #[serde(default)]
        signal: Option<i32>,
        /// Why it could not be started.
        #[serde(default)]
        error: Option<String>,
        /// Wall time.
        at_ms: u64,
        /// Last lines of output.
        #[serde(default)]
        tail: Vec<String>,
    },
}

/// Reads one line; `None` for a torn one, or one of a later shim.
pub(super) fn parse_line(line: &[u8]) -> Option<Told> {
    serde_json::from_slice(line).ok()
}

/// How a rank ended, as its shim told it, with what the program itself wrote about it. `true`: nobody saw an end.
pub(super) fn rank_exit(told: Told, run_folder: &Path) -> Option<(RankExit, bool)> {
    let Told::Exit { code, signal, error, at_ms, tail } = told else { return None };
    let lost = code.is_none() && signal.is_none();
    let message = if code == Some(0) { None } else { error_message(&run_folder.join(ERROR_NAME)) };
    let exit = RankExit { code, signal, error, at: Timestamp(at_ms), tail, message, matched: None, out_of_memory: false, gpu_error: None };
    Some(if run_folder.join(DRAINED_NAME).exists() { (drained(exit), true) } else { (exit, lost) })
}

/// The message of torchrun's error file, in both of its forms.
fn error_message(path: &Path) -> Option<String> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(ERROR_FILE_BYTES_MAX).read_to_end(&mut text).ok()?;
    let value: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let message = &value["message"];
    let text = message.as_str().or_else(|| message["message"].as_str())?;
    Some(text.chars().take(ERROR_CHARS_MAX).collect())
}

/// Tries to take the lock of a `state` file. Who has it knows that no shim lives.
fn try_lock(file: &File) -> bool {
    // SAFETY: a system call on an open descriptor.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Starts a shim; answers its control connection.
pub(super) fn start(program: &Path, run_folder: &Path, spec: &Spec) -> io::Result<UnixStream> {
    let path = run_folder.join(STATE_NAME);
    let state = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    if !try_lock(&state) || state.metadata()?.len() > 0 {
        return Err(io::Error::other("another shim has this run folder"));
    }
    let mut memory = File::from(memfd_create(c"everlit-spec", MFdFlags::MFD_CLOEXEC)?);
    memory.write_all(&spec.encode())?;
    let (own, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command.arg(run_folder).env_clear();
    command.stdin(Stdio::from(memory)).stdout(Stdio::from(state)).stderr(Stdio::from(OwnedFd::from(theirs)));
    // Its end is never waited for: the agent ignores SIGCHLD, so the kernel reaps it.
    drop(command.spawn()?);
    own.set_nonblocking(true)?;
    Ok(own)
}

/// What is true of a run folder without a control connection.
#[derive(Debug)]
pub(super) enum Settled {
    /// The shim lives; this is a new connection.
    Alive(UnixStream),
    /// No shim was ever started here: the agent makes `state` before it starts one. An empty one tells nothing, since a full disk leaves it so.
    NeverStarted,
    /// The rank ended; `true`: nobody saw how.
    Ended {
        /// The shim and rank, when the rank ran.
        started: Option<Told>,
        /// How.
        exit: Box<RankExit>,
        /// Nobody saw how.
        lost: bool,
    },
}

/// The end of a rank that never was.
pub(super) fn never_started() -> RankExit {
    no_exit("it was never started", Timestamp::now())
}

/// Finds out what is true. Blocks for a moment when the shim is just beginning or ending.
pub(super) fn settle(run_folder: &Path) -> Settled {
    for _ in 0..200 {
        let lock = OpenOptions::new().read(true).append(true).custom_flags(libc::O_NOFOLLOW).open(run_folder.join(STATE_NAME));
        match lock {
            Ok(state) if !try_lock(&state) => {
                if let Ok(stream) = connect(run_folder) {
                    return Settled::Alive(stream);
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Ok(_) => return ended(run_folder, "its shim was killed"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Settled::NeverStarted,
            Err(_) => return ended(run_folder, "its state can not be read"),
        }
    }
    ended(run_folder, "its shim does not answer")
}

fn ended(run_folder: &Path, why: &str) -> Settled {
    let text = std::fs::read(run_folder.join(STATE_NAME)).unwrap_or_default();
    let told: Vec<Told> = text.split(|byte| *byte == b'\n').filter_map(parse_line).collect();
    let started = told.iter().find(|told| matches!(told, Told::Started { .. })).cloned();
    let exit = told.into_iter().find_map(|told| rank_exit(told, run_folder));
    let why = if started.is_none() { "nothing is written down of its start" } else { why };
    let (exit, lost) = exit.unwrap_or_else(|| (no_exit(why, Timestamp::now()), true));
    Settled::Ended { started, exit: Box::new(exit), lost }
}

/// Whether the shim of a run may live. Its lock is not tried: that would keep a shim that is just beginning from having it.
pub(super) fn may_live(run_folder: &Path) -> bool {
    let Ok(text) = std::fs::read(run_folder.join(STATE_NAME)) else { return run_folder.exists() };
    let started = text
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .find_map(|told| if let Told::Started { shim, .. } = told { Some(shim) } else { None });
    let Some(shim) = started else { return true };
    let arguments = std::fs::read(format!("/proc/{shim}/cmdline")).unwrap_or_default();
    arguments.split(|byte| *byte == 0).nth(1) == Some(run_folder.as_os_str().as_encoded_bytes())
}

/// Connects to a living shim. Its socket's path may be too long, so it is reached through the folder's descriptor.
fn connect(run_folder: &Path) -> io::Result<UnixStream> {
    let folder = File::open(run_folder)?;
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET_NAME}", folder.as_raw_fd()))?;
    stream.write_all(format!("hello {PROTOCOL}\n").as_bytes())?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::state::{Begin, End, begin_line, end_line, output_line};

    #[test]
    fn what_a_shim_writes_is_read_back() {
        let begin = begin_line(&Begin { shim: 1, pid: 2, ticks: 3, at_ms: 4 });
        assert_eq!(parse_line(begin.trim_end().as_bytes()), Some(Told::Started { shim: 1, pid: 2, at_ms: 4 }));
        assert_eq!(parse_line(output_line(7).trim_end().as_bytes()), Some(Told::Output {}));
        let end = end_line(&End { code: Some(3), at_ms: 9, ..End::default() }, b"a\nb\n");
        let told = Told::Exit { code: Some(3), signal: None, error: None, at_ms: 9, tail: vec!["a".into(), "b".into()] };
        assert_eq!(parse_line(end.trim_end().as_bytes()), Some(told));
        assert_eq!(parse_line(&end.as_bytes()[..20]), None);
    }

    #[test]
    fn both_forms_of_the_error_file_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ERROR_NAME);
        for text in [r#"{"message": "boom"}"#, r#"{"message": {"message": "boom", "extraInfo": {"py_callstack": "…", "timestamp": "1"}}}"#]
        {
            std::fs::write(&path, text).unwrap();
            assert_eq!(error_message(&path), Some("boom".into()));
        }
        std::fs::write(&path, "not json").unwrap();
        assert_eq!(error_message(&path), None);
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(error_message(&path), None);
    }

    #[test]
    fn a_folder_without_a_shim_settles_as_what_its_state_says() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(settle(dir.path()), Settled::NeverStarted));
        let settled = |text: &str| {
            std::fs::write(dir.path().join(STATE_NAME), text).unwrap();
            match settle(dir.path()) {
                Settled::Ended { exit, lost, .. } => (exit.describe(), lost),
                Settled::NeverStarted | Settled::Alive(_) => panic!("it has a state, and nothing lives here"),
            }
        };
        let begin = begin_line(&Begin { shim: 1, pid: 2, ticks: 3, at_ms: 4 });
        let end = end_line(&End { signal: Some(9), at_ms: 9, ..End::default() }, b"");
        for text in ["", &begin[..10]] {
            assert_eq!(settled(text), ("nothing is written down of its start".into(), true));
        }
        assert_eq!(settled(&begin), ("its shim was killed".into(), true));
        assert_eq!(settled(&format!("{begin}{end}")), ("signal 9 (SIGKILL)".into(), false));
        assert_eq!(settled(&format!("{begin}{}", &end[..10])), ("its shim was killed".into(), true));
        std::fs::write(dir.path().join(DRAINED_NAME), "").unwrap();
        assert_eq!(settled(&format!("{begin}{end}")), ("signal 9 (SIGKILL)".into(), true));
    }
}
