//! Starting the rank, seeing it end, and leaving nothing of it behind.
//!
//! Between fork and exec only plain system calls run; the shim has one thread, so even an allocation there would be safe. Why exec failed
//! comes back through a pipe that a successful exec closes. The end is looked at first and reaped last: until then neither the pid nor the
//! process group can be taken by another process, so the group can be killed without a doubt.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg, sigprocmask};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdout, execvpe, fork, getpid, getppid, pipe2, setpgid};

use super::spec::Spec;
use super::state::End;

/// Bytes that a pipe may hold: a rank writes on while its shim is busy.
const PIPE_BYTES: i32 = 1024 * 1024;
/// Longest time that is spent on processes which do not die.
const SWEEP_MAX: Duration = Duration::from_secs(2);

/// A started rank.
#[derive(Debug)]
pub(super) struct Rank {
    pub(super) pid: Pid,
    pub(super) ticks: u64,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// Why there is no rank, with the exit code that a shell would give.
#[derive(Debug)]
pub(super) struct NotStarted {
    pub(super) code: Option<i32>,
    pub(super) error: String,
}

const STAGE_WORKDIR: u8 = 1;
const STAGE_EXEC: u8 = 2;

/// Starts the rank; returns once its program runs or could not be run.
pub(super) fn start(spec: &Spec, oom_score_before: Option<&str>) -> Result<Rank, NotStarted> {
    let system = |what: &str, errno: Errno| NotStarted { code: None, error: format!("could not {what}: {}", errno.desc()) };
    let (stdout, stdout_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| system("make a pipe", e))?;
    let (stderr, stderr_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| system("make a pipe", e))?;
    let (failure, failure_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| system("make a pipe", e))?;
    for end in [&stdout, &stderr] {
        // A smaller pipe works too.
        let _ = fcntl(end, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)).or_else(|_| fcntl(end, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES / 4)));
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| system("set up a pipe", e))?;
    }
    let parent = getpid();
    // SAFETY: this process has one thread, so the child may do whatever the parent may.
    let pid = match unsafe { fork() }.map_err(|e| system("fork", e))? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let (stage, errno) = become_rank(spec, oom_score_before, parent, stdout_write.as_fd(), stderr_write.as_fd());
            let mut told = [stage, 0, 0, 0, 0];
            told[1..].copy_from_slice(&(errno as i32).to_le_bytes());
            let _ = File::from(failure_write).write_all(&told);
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(127) }
        }
    };
    drop((stdout_write, stderr_write, failure_write));
    let mut told = Vec::new();
    // Ends when exec closes the child's end.
    let _ = File::from(failure).read_to_end(&mut told);
    if let [stage, errno @ ..] = told.as_slice() {
        let _ = waitpid(pid, None);
        let errno = Errno::from_raw(errno.try_into().map_or(0, i32::from_le_bytes));
        return Err(not_started(spec, *stage, errno));
    }
    Ok(Rank { pid, ticks: start_ticks(pid).unwrap_or(0), stdout, stderr })
}

fn not_started(spec: &Spec, stage: u8, errno: Errno) -> NotStarted {
    let program = spec.argv.first().map_or_else(String::new, |arg| arg.to_string_lossy().into_owned());
    let (code, what) = match (stage, errno) {
        (STAGE_WORKDIR, _) => {
            let folder = spec.workdir.as_deref().map_or_else(String::new, |path| path.display().to_string());
            (127, format!("could not enter the folder `{folder}`"))
        }
        (STAGE_EXEC, Errno::ENOENT | Errno::ENOTDIR) => (127, format!("could not find the program `{program}`")),
        _ => (126, format!("could not run the program `{program}`")),
    };
    NotStarted { code: Some(code), error: format!("{what}: {}", errno.desc()) }
}

/// In the child: everything up to exec. Returns only what went wrong.
fn become_rank(spec: &Spec, oom_score: Option<&str>, parent: Pid, stdout: BorrowedFd<'_>, stderr: BorrowedFd<'_>) -> (u8, Errno) {
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    if getppid() != parent {
        return (STAGE_EXEC, Errno::ESRCH);
    }
    if let Some(score) = oom_score {
        let _ = std::fs::write("/proc/self/oom_score_adj", score);
    }
    if let Err(errno) = dup2_stdout(stdout).and_then(|()| dup2_stderr(stderr)) {
        return (STAGE_EXEC, errno);
    }
    if let (Some(soft), Ok((_, hard))) = (spec.open_files, getrlimit(Resource::RLIMIT_NOFILE)) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard);
    }
    for number in 1..libc::SIGRTMAX() {
        // SAFETY: sets default dispositions only; those that can not be set are refused.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    if let Some(Err(errno)) = spec.workdir.as_deref().map(chdir) {
        return (STAGE_WORKDIR, errno);
    }
    if let Some(path) = spec.env.iter().find_map(|entry| entry.as_bytes().strip_prefix(b"PATH=")) {
        // SAFETY: one thread. execvpe looks the program up in the caller's own PATH.
        unsafe { std::env::set_var("PATH", OsStr::from_bytes(path)) };
    }
    // SAFETY: marks descriptors only. Everything that is not a standard stream closes at exec, whoever opened it.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    let empty = CString::default();
    let program = spec.argv.first().unwrap_or(&empty);
    match execvpe(program, &spec.argv, &spec.env) {
        Ok(never) => match never {},
        Err(errno) => (STAGE_EXEC, errno),
    }
}

/// Field 22 of `/proc/PID/stat`.
pub(super) fn start_ticks(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Reaps adopted processes that ended; answers the rank's end when it is there, without reaping the rank.
pub(super) fn look(rank: Pid) -> Option<End> {
    loop {
        // SAFETY: a zeroed siginfo_t is valid, and the kernel fills it. (The typed call fails for real-time signals.)
        let mut about: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `about` outlives the call.
        let answer = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut about, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
        if answer != 0 && Errno::last() == Errno::EINTR {
            continue;
        }
        // SAFETY: after a successful waitid these fields are set; the pid is 0 when nothing has ended.
        let (pid, status) = unsafe { (about.si_pid(), about.si_status()) };
        if answer != 0 || pid == 0 {
            return None;
        }
        if pid == rank.as_raw() {
            return Some(match about.si_code {
                libc::CLD_EXITED => End { code: Some(status), ..End::default() },
                _ => End { signal: Some(status), ..End::default() },
            });
        }
        let _ = waitpid(Pid::from_raw(pid), None);
    }
}

/// Kills what is left of an ended rank: its group, then everything that the shim adopted; reaps it all.
pub(super) fn sweep(rank: Pid) {
    let _ = killpg(rank, Signal::SIGKILL);
    let _ = waitpid(rank, None);
    let until = Instant::now() + SWEEP_MAX;
    loop {
        match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Err(Errno::ECHILD) => return,
            Ok(WaitStatus::StillAlive) => {
                if Instant::now() > until {
                    return;
                }
                let children = children();
                children.iter().for_each(|pid| {
                    let _ = kill(*pid, Signal::SIGKILL);
                });
                std::thread::sleep(Duration::from_millis(1));
            }
            _ => {}
        }
    }
}

fn children() -> Vec<Pid> {
    let own = getpid().as_raw().to_string();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1)) == Some(own.as_str())
    })
    .map(Pid::from_raw)
    .collect()
}

/// Sends a signal to the rank's process alone: what it started may die of a signal that it does not know.
pub(super) fn notify(rank: Pid, number: i32) {
    // SAFETY: a system call on numbers. The pid is the rank's until it is reaped, which only this process does.
    unsafe { libc::kill(rank.as_raw(), number) };
}

/// Sends a signal to the rank's process group.
pub(super) fn signal(rank: Pid, number: i32) {
    // SAFETY: a system call on numbers. `number` may be a real-time signal, which the typed call has no name for.
    unsafe { libc::killpg(rank.as_raw(), number) };
}
