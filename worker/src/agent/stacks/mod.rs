//! What a process's threads are doing: taken before a rank that hangs is killed, for whoever asks why, and by `everlit-agent stacks`.
//!
//! The states and what the kernel waits for are in `/proc`; the frames of threads that wait come from their stacks' memory ([`unwind`]).
//! Nothing is stopped or attached to, so no rank is disturbed and one that is stopped tells as much. Frames are told by a process of its
//! own, within a time: it maps files that may be cut short under it. Rejected: a debugger, which stops the process, survivors included, and
//! takes seconds on a program of this size. Bounded: time, threads, frames and bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use everlit_api::rank::Stacks;
use files::{Mapping, mappings, place_of};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

mod files;
#[cfg(target_arch = "x86_64")]
mod unwind;

/// Threads of one process that are looked at.
const THREADS_MAX: usize = 48;
/// Kernel frames of one thread.
const FRAMES_MAX: usize = 8;
/// Bytes of one process's text at most.
const TEXT_BYTES_MAX: usize = 16 * 1024;
/// Bytes of all of them as they are told.
const TOLD_BYTES_MAX: usize = 1 << 20;
/// Whoever waits for a verdict waits for this.
const FRAMES_WITHIN: Duration = Duration::from_millis(500);
/// Ends the text of a process whose frames were not told in that time: on a busy machine, or a slow disk.
const NO_FRAMES: &str = "the frames of its threads were not told within 500 ms\n";

/// A line of the process that tells frames.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    pid: u32,
    text: String,
}

/// What these ranks' processes are doing; those that are gone are left out.
pub(super) fn of(ranks: &[(u32, u32)]) -> Vec<Stacks> {
    let mut told = with_frames(ranks.iter().map(|(_, pid)| *pid));
    let without = |pid: u32| text_of(pid, false).map(|text| text + NO_FRAMES);
    let mut text = |pid: u32| told.remove(&pid).or_else(|| without(pid));
    ranks.iter().filter_map(|&(rank, pid)| Some(Stacks { rank, pid, text: text(pid)? })).collect()
}

/// What the process that tells frames has told in time: this very program, also when its file was replaced.
fn with_frames(pids: impl Iterator<Item = u32>) -> BTreeMap<u32, String> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["stacks", "--json"]).args(pids.map(|pid| pid.to_string()));
    told_by(command, FRAMES_WITHIN)
}

fn told_by(mut command: Command, within: Duration) -> BTreeMap<u32, String> {
    let mut told = BTreeMap::new();
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = spawned else { return told };
    let deadline = Instant::now() + within;
    let mut text = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        let mut chunk = [0; 16 * 1024];
        while text.len() < TOLD_BYTES_MAX {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let ready = poll(&mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)], timeout).is_ok_and(|ready| ready > 0);
            match ready.then(|| output.read(&mut chunk)) {
                Some(Ok(bytes)) if bytes > 0 => text.extend_from_slice(&chunk[..bytes]),
                _ => break,
            }
        }
    }
    // It may be at work still, and has nothing to lose. Where it reads a file of a disk that hangs, even its end comes when that is back.
    let _ = child.kill();
    let _ = std::thread::Builder::new().name("stacks".into()).spawn(move || child.wait());
    for line in text.split(|byte| *byte == b'\n') {
        if let Ok(Told { pid, text }) = serde_json::from_slice(line) {
            told.insert(pid, text);
        }
    }
    told
}

/// `everlit-agent stacks`: each process's text on stdout, as JSON lines or to be read. Answers whether all of them were there.
pub(super) fn tell(pids: &[u32], json: bool) -> std::io::Result<bool> {
    use std::io::Write;
    let mut all = true;
    for pid in pids.iter().copied() {
        let Some(text) = text_of(pid, true) else {
            all = false;
            continue;
        };
        let mut stdout = std::io::stdout().lock();
        if json {
            writeln!(stdout, "{}", serde_json::to_string(&Told { pid, text })?)?;
        } else {
            writeln!(stdout, "process {pid} {text}")?;
        }
        stdout.flush()?;
    }
    Ok(all)
}

/// One thread as `/proc` tells it.
struct Thread {
    id: u32,
    text: String,
    /// Its stack and instruction pointer while it waits.
    waits_at: Option<(u64, u64)>,
    kernel: Vec<String>,
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    /// An address inside the instruction that is under way.
    at: u64,
    /// Found by its looks.
    guessed: bool,
}

/// The frames of a process.
#[derive(Debug, Default)]
struct Frames {
    /// The innermost first, for each thread that waits.
    of: BTreeMap<u32, Vec<Frame>>,
    /// Functions by address.
    names: BTreeMap<u64, String>,
}

/// What a process is doing; `None` when it is gone.
fn text_of(pid: u32, with_frames: bool) -> Option<String> {
    let root = Path::new("/proc").join(pid.to_string());
    let status = fs::read_to_string(root.join("status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map_or("?", |(_, value)| value.trim())
    };
    let mut text = format!("{}: {}, resident {}, {} threads\n", field("Name"), field("State"), field("VmRSS"), field("Threads"));
    let maps = fs::read_to_string(root.join("maps")).unwrap_or_default();
    let maps = mappings(&maps);
    let mut ids: Vec<u32> = fs::read_dir(root.join("task"))
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    ids.sort_unstable();
    ids.truncate(THREADS_MAX);
    let threads: Vec<Thread> = ids.into_iter().map(|id| look(&root.join("task").join(id.to_string()), id, &maps)).collect();
    let frames = if with_frames { frames_of(&root, pid, &threads, &maps) } else { Frames::default() };
    for (index, thread) in threads.iter().enumerate() {
        text.push_str(&thread.text);
        thread.kernel.iter().for_each(|name| text.push_str(&format!("  kernel: {name}\n")));
        text.push_str(&frames_text(&frames, &threads[..index], thread, &maps));
        if text.len() > TEXT_BYTES_MAX {
            text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
            break;
        }
    }
    Some(text)
}

#[cfg(target_arch = "x86_64")]
fn frames_of(root: &Path, pid: u32, threads: &[Thread], maps: &[Mapping<'_>]) -> Frames {
    let mut process = unwind::Process::open(root, pid, maps);
    let of = threads.iter().filter_map(|thread| thread.waits_at.map(|(sp, pc)| (thread.id, process.frames(sp, pc)))).collect();
    Frames { names: process.names(&of), of }
}

/// How the frames of other processors are undone from what the kernel tells was not tried.
#[cfg(not(target_arch = "x86_64"))]
fn frames_of(_: &Path, _: u32, _: &[Thread], _: &[Mapping<'_>]) -> Frames {
    Frames::default()
}

/// Frames with their names; threads that all wait alike are told once.
fn frames_text(frames: &Frames, before: &[Thread], own: &Thread, maps: &[Mapping<'_>]) -> String {
    let Some(list) = frames.of.get(&own.id).filter(|list| list.len() > 1) else { return String::new() };
    if let Some(same) = before.iter().find(|other| frames.of.get(&other.id) == Some(list)) {
        return format!("  the same frames as thread {}\n", same.id);
    }
    let line = |frame: &Frame| {
        let place = place_of(frame.at, maps).unwrap_or_else(|| "?".into());
        let guess = if frame.guessed { "? " } else { "" };
        match frames.names.get(&frame.at) {
            Some(name) => format!("  {guess}{name} ({place})\n"),
            None => format!("  {guess}{place}\n"),
        }
    };
    list.iter().map(line).collect()
}

/// A thread as `/proc` tells it.
fn look(folder: &Path, id: u32, maps: &[Mapping<'_>]) -> Thread {
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let stat = read("stat");
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?');
    let mut text = format!("thread {id} {}: {}", read("comm").trim(), state_name(state));
    let wchan = read("wchan");
    if !matches!(wchan.trim(), "" | "0") {
        text.push_str(&format!(", waits in {}", wchan.trim()));
    }
    let (call, waits_at) = parse_syscall(&read("syscall"));
    if let Some(call) = call {
        text.push_str(&format!(", in {call}"));
    }
    if let Some(place) = waits_at.and_then(|(_, pc)| place_of(pc, maps)) {
        text.push_str(&format!(", at {place}"));
    }
    text.push('\n');
    // Only root may read it.
    let name = |frame: &str| {
        let name = frame.split_once("] ").map_or(frame, |(_, name)| name);
        name.split('+').next().unwrap_or(name).trim().to_string()
    };
    // How every thread comes into the kernel says nothing.
    let enters = |name: &String| ["__x64_sys_", "do_syscall_", "entry_", "__arm64_sys_"].iter().any(|start| name.starts_with(start));
    let kernel = read("stack").lines().take(FRAMES_MAX).map(name).take_while(|name| !enters(name)).collect();
    Thread { id, text, waits_at, kernel }
}

fn state_name(state: char) -> &'static str {
    match state {
        'R' => "runs",
        'S' => "sleeps",
        'D' => "waits for a device",
        'T' => "is stopped by a signal",
        't' => "is stopped by a debugger",
        'Z' | 'X' => "is dead",
        'I' => "is idle",
        _ => "is in an unknown state",
    }
}

/// System call of a thread that waits, its stack pointer and program counter: `<number> <6 arguments> <sp> <pc>`, or `-1 <sp> <pc>`.
fn parse_syscall(text: &str) -> (Option<String>, Option<(u64, u64)>) {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let number = words.first().and_then(|word| word.parse::<i64>().ok());
    let address = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let at = if let [_, .., sp, pc] = words.as_slice() { address(sp).zip(address(pc)) } else { None };
    (number.filter(|number| *number >= 0).map(call_name), at)
}

/// The calls that threads hang in.
#[cfg(target_arch = "x86_64")]
fn call_name(number: i64) -> String {
    let name = match number {
        0 => "read",
        1 => "write",
        7 => "poll",
        16 => "ioctl",
        35 | 230 => "nanosleep",
        42 => "connect",
        43 | 288 => "accept",
        44 => "sendto",
        45 => "recvfrom",
        46 => "sendmsg",
        47 => "recvmsg",
        61 | 247 => "wait",
        74 => "fsync",
        75 => "fdatasync",
        202 => "futex",
        232 | 281 => "epoll_wait",
        270 => "select",
        271 => "ppoll",
        _ => return format!("system call {number}"),
    };
    name.into()
}

/// Numbers differ between machines.
#[cfg(not(target_arch = "x86_64"))]
fn call_name(number: i64) -> String {
    format!("system call {number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn waits_for_the_test(receiver: &std::sync::mpsc::Receiver<()>) -> bool {
        let ended = receiver.recv().is_err();
        // Something is left to do after the wait, so this function stays on the stack.
        std::hint::black_box(ended)
    }

    #[test]
    fn a_living_process_tells_what_its_threads_do_and_a_dead_one_nothing() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let waits = std::thread::Builder::new().name("waits".into()).spawn(move || waits_for_the_test(&receiver)).unwrap();
        let of_thread = |text: &str| {
            let own = text.split("\nthread ").find(|part| part.contains(" waits: sleeps")).map(ToString::to_string);
            own.filter(|own| !cfg!(target_arch = "x86_64") || own.contains("waits_for_the_test"))
        };
        let mine = loop {
            let mine = text_of(std::process::id(), true).unwrap();
            // It may not have gone to sleep yet.
            if of_thread(&mine).is_some() {
                break mine;
            }
            std::thread::yield_now();
        };
        assert!(mine.contains("threads") && mine.len() <= TEXT_BYTES_MAX, "{mine}");
        // Up to the first function of the thread.
        let own = of_thread(&mine).unwrap();
        assert!(!cfg!(target_arch = "x86_64") || own.contains("thread_start"), "{own}");
        assert!(!text_of(std::process::id(), false).unwrap().contains("waits_for_the_test"));
        drop(sender);
        assert!(waits.join().unwrap());
        assert_eq!(text_of(u32::MAX - 1, true), None);
    }

    #[test]
    fn what_was_told_before_the_time_was_up_counts_and_who_tells_no_more_is_not_waited_for() {
        let told = |script: &str, within| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            told_by(command, within)
        };
        let one = r#"echo '{"pid":7,"text":"x"}'; "#;
        let begun = Instant::now();
        let half = format!("{one} printf '{{\"pid\":8,'; exec sleep 600");
        assert_eq!(told(&half, Duration::from_secs(3)), [(7, "x".to_string())].into());
        assert_eq!(told("exec sleep 600", Duration::from_millis(50)), BTreeMap::new());
        assert!(begun.elapsed() < Duration::from_secs(300), "nobody waited for them");
        let killed = format!("echo nonsense; {one} kill -9 $$");
        assert_eq!(told(&killed, Duration::from_secs(60)), [(7, "x".to_string())].into());
        assert_eq!(told_by(Command::new("/no such program"), Duration::ZERO), BTreeMap::new());
    }

    #[test]
    fn what_the_kernel_says_of_a_thread_is_read() {
        assert_eq!(parse_syscall("running\n"), (None, None));
        assert_eq!(parse_syscall("-1 0x7ffe 0x7f10\n"), (None, Some((0x7ffe, 0x7f10))));
        let (call, at) = parse_syscall("202 0x1 0x80 0x0 0x0 0x0 0x0 0x7ffe 0x7f0000001234");
        assert_eq!((call.is_some(), at), (true, Some((0x7ffe, 0x7f00_0000_1234))));
    }
}
