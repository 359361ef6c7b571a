//! The shim's life: take over the descriptors, start the rank, serve it, write down its end.
//!
//! One poll loop over the rank's end (a signalfd), its output and the control connections. The end is said to the agents before anything
//! slow happens; it is synced to disk only when no agent took it, because an agent's coordinator has its own durable record.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::unistd::{Pid, getpid, setsid};

use super::control::{Control, Order};
use super::output::{Output, wall_us};
use super::rank::{self, Rank};
use super::segments::Segments;
use super::spec::Spec;
use super::state::{Begin, End, begin_line, end_line, output_line};

/// Bytes of a spec at most: a job's body is at most one megabyte.
const SPEC_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Longest time that output is read on after everything that could write it was killed.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// Shortest time between two words to the agent that there was output.
const OUTPUT_NEWS: Duration = Duration::from_secs(1);
/// A shim is small and its death costs a rank: the kernel should take others first.
const OOM_SCORE: &str = "-500";

struct Shim {
    state: File,
    control: Control,
    output: Output,
    output_told: Option<Instant>,
}

/// Runs one rank to its end.
pub(super) fn run(folder: &Path) -> ExitCode {
    let Some([spec, state, control]) = take_streams() else { return ExitCode::from(2) };
    let signals = signals();
    let _ = setsid();
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let control = Control::new(Some(control), folder);
    let spec = read_spec(&spec.into());
    let (logs, bytes_max) = spec.as_ref().map(|spec| (spec.logs.clone(), spec.log_bytes_max)).unwrap_or_default();
    let (number, attempt) = spec.as_ref().map_or((0, 0), |spec| (spec.rank, spec.attempt));
    let output = Output::new(number, attempt, Segments::new(logs, bytes_max));
    let mut shim = Shim { state: state.into(), control, output, output_told: None };
    let oom_score = lower_oom_score();
    let started = match (&spec, signals) {
        (Ok(spec), Ok(signals)) => rank::start(spec, oom_score.as_deref()).map(|rank| (rank, signals)),
        (Err(error), _) => Err(rank::NotStarted { code: None, error: error.clone() }),
        (_, Err(errno)) => Err(rank::NotStarted { code: None, error: format!("could not watch for signals: {errno}") }),
    };
    // Environment and secrets are the rank's from here on.
    drop(spec);
    match started {
        Ok((rank, signals)) => shim.serve(rank, &signals),
        Err(not) => shim.write_end(&End { code: not.code, signal: None, error: Some(not.error), at_ms: wall_us() / 1000 }),
    }
    ExitCode::SUCCESS
}

/// Moves the three descriptors away from the standard streams, which become `/dev/null`.
fn take_streams() -> Option<[OwnedFd; 3]> {
    let null = File::options().read(true).write(true).open("/dev/null").ok()?;
    // SAFETY: the standard streams are open: the agent gave them, or the standard library opened them at start.
    let taken = [0, 1, 2].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) }).map(|fd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(3)).ok());
    nix::unistd::dup2_stdin(&null).and_then(|()| nix::unistd::dup2_stdout(&null)).and_then(|()| nix::unistd::dup2_stderr(&null)).ok()?;
    let [Some(spec), Some(state), Some(control)] = taken else { return None };
    // SAFETY: fresh descriptors that nobody else owns.
    Some([spec, state, control].map(|fd| unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }))
}

/// Children's ends come through a descriptor. Everything else that can be is blocked: a shim ends by SIGKILL, its own faults, or its rank's end.
fn signals() -> nix::Result<SignalFd> {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // SAFETY: sets a disposition to a constant. The agent ignores SIGCHLD, and ignored is inherited: ends of children would be lost.
    unsafe { nix::sys::signal::signal(Signal::SIGCHLD, nix::sys::signal::SigHandler::SigDfl)? };
    let mut blocked = SigSet::all();
    for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGABRT] {
        blocked.remove(fault);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)?;
    SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn read_spec(file: &File) -> Result<Spec, String> {
    let length = file.metadata().map_err(|error| format!("could not read the spec: {error}"))?.len();
    if length > SPEC_BYTES_MAX {
        return Err("the spec is too large".into());
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    // The agent's offset is at the end of what it wrote, and it is shared.
    file.read_exact_at(&mut bytes, 0).map_err(|error| format!("could not read the spec: {error}"))?;
    Spec::decode(&bytes).map_err(|error| error.to_string())
}

/// Answers the score of before, which the rank gets back.
fn lower_oom_score() -> Option<String> {
    let path = "/proc/self/oom_score_adj";
    let before = std::fs::read_to_string(path).ok()?;
    std::fs::write(path, OOM_SCORE).ok().map(|()| before.trim().to_string())
}

impl Shim {
    fn serve(&mut self, rank: Rank, signals: &SignalFd) {
        let Rank { pid, ticks, stdout, stderr } = rank;
        self.output.attach(stdout, stderr);
        let begin = begin_line(&Begin { shim: getpid().as_raw(), pid: pid.as_raw(), ticks, at_ms: wall_us() / 1000 });
        self.write_state(&begin);
        self.control.say(&begin, true);
        loop {
            self.turn(pid, Some(signals), None);
            while let Ok(Some(_)) = signals.read_signal() {}
            if let Some(mut end) = rank::look(pid) {
                end.at_ms = wall_us() / 1000;
                self.finish(pid, &end);
                return;
            }
        }
    }

    /// Waits for something to happen and handles it, except a child's end.
    fn turn(&mut self, rank: Pid, signals: Option<&SignalFd>, until: Option<Instant>) {
        let now = Instant::now();
        let deadline = [self.output.deadline(now), until].into_iter().flatten().min();
        let (listener, connections) = self.control.waits_for();
        let pipes = self.output.waits_for(now);
        let fixed = [signals.map(AsFd::as_fd), listener, pipes[0], pipes[1]];
        let mut sources = fixed.to_vec();
        sources.extend(connections.map(Some));
        let mut fds: Vec<PollFd<'_>> = sources.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let timeout = deadline.map(|at| TimeSpec::from(at.saturating_duration_since(now)));
        if ppoll(&mut fds, timeout, None).is_err() {
            return;
        }
        let mut answers = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        let ready: Vec<bool> = sources.iter().map(|source| source.is_some() && answers.next().unwrap_or(false)).collect();
        let now = Instant::now();
        for index in 0..2 {
            if ready[2 + index] && self.output.on_readable(index, now) {
                self.tell_output(now);
            }
        }
        self.output.on_time(now);
        let mut orders = Vec::new();
        let readable = (fixed_len()..ready.len()).filter(|index| ready[*index]).map(|index| index - fixed_len());
        let ended: Vec<usize> = readable.filter(|index| !self.control.on_readable(*index, &mut orders)).collect();
        self.control.drop_connections(&ended);
        if ready[1] {
            self.control.on_connect();
        }
        for order in orders {
            match order {
                Order::Signal(number) => rank::signal(rank, number),
                Order::Notify(number) => rank::notify(rank, number),
                Order::Rename(number) => self.output.rename(number),
                Order::Kill => rank::signal(rank, Signal::SIGKILL as i32),
            }
        }
    }

    fn tell_output(&mut self, now: Instant) {
        if self.output_told.is_some_and(|told| now < told + OUTPUT_NEWS) {
            return;
        }
        let line = output_line(wall_us() / 1000);
        let first = self.output_told.replace(now).is_none();
        if first {
            self.write_state(&line);
        }
        self.control.say(&line, first);
    }

    /// The rank has ended: nothing of it may live on, and nothing of its output may be lost.
    fn finish(&mut self, pid: Pid, end: &End) {
        rank::sweep(pid);
        let until = Instant::now() + DRAIN_MAX;
        while !self.output.is_closed() && Instant::now() < until {
            let now = Instant::now();
            let read = [0, 1].map(|index| self.output.on_readable(index, now));
            if read.contains(&true) {
                self.tell_output(now);
            } else if !self.output.is_closed() {
                // Somebody who survived the sweep still holds the other end.
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.output.finish();
        self.write_end(end);
    }

    fn write_end(&mut self, end: &End) {
        let line = end_line(end, self.output.tail());
        self.write_state(&line);
        if !self.control.say(&line, true) {
            let _ = self.state.sync_data();
        }
    }

    fn write_state(&mut self, line: &str) {
        // A state that can not be written is a full disk: the agents are told all the same.
        let _ = self.state.write_all(line.as_bytes());
    }
}

const fn fixed_len() -> usize {
    4
}
