//! What a rank's threads are doing, from `/proc`: taken before a rank that hangs is killed, for whoever asks why.
//!
//! Nothing is stopped or attached to, so this works on a process that is stopped, costs a few milliseconds, and can be done in the driver.
//! Rejected: a debugger, which takes seconds on a program of this size while a gang waits. Bounded: threads, lines and bytes.

use std::fs;
use std::path::Path;

use everlit_api::rank::Stacks;

/// Threads of one process that are looked at.
const THREADS_MAX: usize = 48;
/// Kernel frames of one thread.
const FRAMES_MAX: usize = 8;
/// Bytes of one process's text at most.
const TEXT_BYTES_MAX: usize = 8 * 1024;

/// What a process is doing; `None` when it is gone.
pub(super) fn of(rank: u32, pid: u32) -> Option<Stacks> {
    let root = Path::new("/proc").join(pid.to_string());
    let status = fs::read_to_string(root.join("status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map_or("?", |(_, value)| value.trim())
    };
    let mut text = format!("{}: {}, resident {}, {} threads\n", field("Name"), field("State"), field("VmRSS"), field("Threads"));
    let maps = fs::read_to_string(root.join("maps")).unwrap_or_default();
    let maps = mappings(&maps);
    let mut threads: Vec<u32> = fs::read_dir(root.join("task"))
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    threads.sort_unstable();
    for thread in threads.into_iter().take(THREADS_MAX) {
        text.push_str(&thread_text(&root.join("task").join(thread.to_string()), thread, &maps));
        if text.len() > TEXT_BYTES_MAX {
            text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
            break;
        }
    }
    Some(Stacks { rank, pid, text })
}

fn thread_text(folder: &Path, thread: u32, maps: &[Mapping<'_>]) -> String {
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let stat = read("stat");
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?');
    let mut text = format!("thread {thread} {}: {}", read("comm").trim(), state_name(state));
    let wchan = read("wchan");
    if !matches!(wchan.trim(), "" | "0") {
        text.push_str(&format!(", waits in {}", wchan.trim()));
    }
    let (call, at) = parse_syscall(&read("syscall"));
    if let Some(call) = call {
        text.push_str(&format!(", in {call}"));
    }
    if let Some(place) = at.and_then(|at| place_of(at, maps)) {
        text.push_str(&format!(", at {place}"));
    }
    text.push('\n');
    // Only root may read it.
    for frame in read("stack").lines().take(FRAMES_MAX) {
        let name = frame.split_once("] ").map_or(frame, |(_, name)| name);
        text.push_str(&format!("  {}\n", name.split('+').next().unwrap_or(name).trim()));
    }
    text
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

/// System call and program counter of a thread that waits: `<number> <6 arguments> <stack pointer> <program counter>`, or `-1 <sp> <pc>`.
fn parse_syscall(text: &str) -> (Option<String>, Option<u64>) {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let number = words.first().and_then(|word| word.parse::<i64>().ok());
    let at = words.last().filter(|_| words.len() > 2).and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
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

struct Mapping<'a> {
    from: u64,
    to: u64,
    offset: u64,
    file: &'a str,
}

/// Executable files of `/proc/PID/maps`.
fn mappings(maps: &str) -> Vec<Mapping<'_>> {
    let parse = |line| {
        let line: &str = line;
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let executable = words.next()?.contains('x');
        let offset = words.next()?;
        let file = words.nth(2).filter(|_| executable)?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Mapping { from: number(from)?, to: number(to)?, offset: number(offset)?, file })
    };
    maps.lines().filter_map(parse).collect()
}

/// Library and offset, as `addr2line` wants them.
fn place_of(at: u64, maps: &[Mapping<'_>]) -> Option<String> {
    let own = maps.iter().find(|own| (own.from..own.to).contains(&at))?;
    let name = own.file.rsplit('/').next().unwrap_or(own.file);
    Some(format!("{name}+{:#x}", at - own.from + own.offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_tells_what_its_threads_do_and_a_dead_one_nothing() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let waits = std::thread::Builder::new().name("waits".into()).spawn(move || receiver.recv()).unwrap();
        let mine = loop {
            let mine = of(3, std::process::id()).unwrap();
            // It may not have gone to sleep yet.
            if mine.text.lines().any(|line| line.contains("waits: sleeps")) {
                break mine;
            }
            std::thread::yield_now();
        };
        assert_eq!((mine.rank, mine.pid), (3, std::process::id()));
        assert!(mine.text.contains("threads") && mine.text.len() <= TEXT_BYTES_MAX, "{}", mine.text);
        drop(sender);
        waits.join().unwrap().unwrap_err();
        assert_eq!(of(0, u32::MAX - 1), None);
    }

    #[test]
    fn what_the_kernel_says_of_a_thread_is_read() {
        assert_eq!(parse_syscall("running\n"), (None, None));
        assert_eq!(parse_syscall("-1 0x7ffe 0x7f10\n"), (None, Some(0x7f10)));
        let (call, at) = parse_syscall("202 0x1 0x80 0x0 0x0 0x0 0x0 0x7ffe 0x7f0000001234");
        assert_eq!((call.is_some(), at), (true, Some(0x7f00_0000_1234)));
        let maps = "7f0000001000-7f0000002000 r-xp 00003000 fe:00 12 /lib/libc.so.6\n7f0000002000-7f0000003000 rw-p 00004000 fe:00 12 /lib/libc.so.6\n";
        assert_eq!(place_of(0x7f00_0000_1234, &mappings(maps)), Some("libc.so.6+0x3234".into()));
        assert_eq!(place_of(0x7f00_0000_2234, &mappings(maps)), None);
    }
}
