//! The rank's two output streams, cut into records of whole lines.
//!
//! What comes is written at once when the rank is quiet, and at most every [`SPACING`] when it is not, so that ten thousand small writes
//! become a few large records. A part of a line waits for its end, for [`QUIET_MAX`] without more, or for [`HELD_MAX`] (progress bars that
//! never end a line). The rank is never held up: what can not be written (full disk) is counted, and the count written when that works again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use everlit_api::agent::log::{DATA_BYTES_MAX, FLAG_DROPPED, FLAG_PARTIAL, Header, Stream};

use super::TAIL_BYTES_MAX;
use super::segments::Segments;

/// Shortest time between records of a busy rank.
const SPACING: Duration = Duration::from_millis(2);
/// A part of a line is written when nothing follows for so long.
const QUIET_MAX: Duration = Duration::from_millis(250);
/// A part of a line is written when it was held for so long.
const HELD_MAX: Duration = Duration::from_secs(1);
/// Bytes taken from one stream before the other things of the shim have their turn.
const TURN_BYTES: usize = 1024 * 1024;

/// Wall time in microseconds since 1970.
pub(super) fn wall_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

struct Pipe {
    stream: Stream,
    /// None at the end of the stream.
    file: Option<File>,
    /// A part of a line; between reads never more than that.
    held: Vec<u8>,
    held_since: Instant,
    last_read: Instant,
}

/// Both streams of a rank.
pub(super) struct Output {
    rank: u32,
    attempt: u32,
    segments: Segments,
    pipes: [Pipe; 2],
    next_read: Instant,
    dropped: u64,
    tail: Vec<u8>,
}

impl Output {
    pub(super) fn new(rank: u32, attempt: u32, segments: Segments) -> Self {
        let now = Instant::now();
        let pipe = |stream| Pipe { stream, file: None, held: Vec::new(), held_since: now, last_read: now };
        let pipes = [pipe(Stream::Stdout), pipe(Stream::Stderr)];
        Self { rank, attempt, segments, pipes, next_read: now, dropped: 0, tail: Vec::new() }
    }

    /// Takes the reading ends, which must be non-blocking.
    pub(super) fn attach(&mut self, stdout: OwnedFd, stderr: OwnedFd) {
        self.pipes[0].file = Some(stdout.into());
        self.pipes[1].file = Some(stderr.into());
    }

    /// The rank took another one's place: what comes from now on is that one's.
    pub(super) fn rename(&mut self, rank: u32) {
        self.rank = rank;
    }

    /// The last output, for the exit record.
    pub(super) fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// Both streams are at their end.
    pub(super) fn is_closed(&self) -> bool {
        self.pipes.iter().all(|pipe| pipe.file.is_none())
    }

    /// What to wait for with poll: nothing while the next record is not due.
    pub(super) fn waits_for(&self, now: Instant) -> [Option<BorrowedFd<'_>>; 2] {
        let due = now >= self.next_read;
        [0, 1].map(|index| self.pipes[index].file.as_ref().filter(|_| due).map(|file| file.as_fd()))
    }

    /// When to call [`Self::on_time`] or poll again at the latest.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let spacing = (now < self.next_read && !self.is_closed()).then_some(self.next_read);
        let parts = self.pipes.iter().filter(|pipe| !pipe.held.is_empty());
        parts.map(|pipe| (pipe.last_read + QUIET_MAX).min(pipe.held_since + HELD_MAX)).chain(spacing).min()
    }

    /// Writes parts of lines that were held long enough.
    pub(super) fn on_time(&mut self, now: Instant) {
        for index in 0..self.pipes.len() {
            let pipe = &self.pipes[index];
            if !pipe.held.is_empty() && (now >= pipe.last_read + QUIET_MAX || now >= pipe.held_since + HELD_MAX) {
                self.write_held(index);
            }
        }
    }

    /// Reads what is there; answers whether anything was.
    pub(super) fn on_readable(&mut self, index: usize, now: Instant) -> bool {
        let mut taken = 0;
        let drained = loop {
            match self.read_once(index, now) {
                Ok(0) => {
                    self.pipes[index].file = None;
                    self.write_held(index);
                    break true;
                }
                Ok(count) => {
                    taken += count;
                    if taken >= TURN_BYTES {
                        break false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
                Err(_) => {
                    self.pipes[index].file = None;
                    break true;
                }
            }
        };
        if taken > 0 && drained {
            self.next_read = now + SPACING;
        }
        taken > 0
    }

    /// Writes everything that is held, and the count of what was dropped.
    pub(super) fn finish(&mut self) {
        (0..self.pipes.len()).for_each(|index| self.write_held(index));
        self.write_dropped();
    }

    /// One read, and the whole lines in it as one record.
    fn read_once(&mut self, index: usize, now: Instant) -> io::Result<usize> {
        let pipe = &mut self.pipes[index];
        let Some(file) = &mut pipe.file else { return Err(io::ErrorKind::WouldBlock.into()) };
        let had = pipe.held.len();
        if pipe.held.capacity() == 0 {
            pipe.held.reserve_exact(DATA_BYTES_MAX);
        }
        let count = file.take((DATA_BYTES_MAX - had) as u64).read_to_fit(&mut pipe.held)?;
        if count == 0 {
            return Ok(0);
        }
        pipe.last_read = now;
        if had == 0 {
            pipe.held_since = now;
        }
        let lines_end = pipe.held.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        match lines_end {
            Some(end) => {
                self.write(index, end, 0);
                self.pipes[index].held_since = now;
            }
            None if self.pipes[index].held.len() == DATA_BYTES_MAX => self.write(index, DATA_BYTES_MAX, FLAG_PARTIAL),
            None => {}
        }
        Ok(count)
    }

    fn write_held(&mut self, index: usize) {
        let length = self.pipes[index].held.len();
        if length > 0 {
            self.write(index, length, FLAG_PARTIAL);
        }
    }

    /// Writes the first `end` held bytes as a record and forgets them.
    fn write(&mut self, index: usize, end: usize, flags: u8) {
        self.write_dropped();
        let Self { rank, attempt, segments, pipes, dropped, tail, .. } = self;
        let pipe = &mut pipes[index];
        let data = &pipe.held[..end];
        let header = Header { len: end as u32, rank: *rank, attempt: *attempt, stream: pipe.stream, flags, time_us: wall_us() };
        // While the count of what was dropped can not be written, nothing else is: it stands where the hole is.
        let kept = if *dropped > 0 { 0 } else { segments.append(&header.encode(data), data).unwrap_or(0) };
        *dropped += (end - kept) as u64;
        keep_tail(tail, data);
        pipe.held.drain(..end);
    }

    fn write_dropped(&mut self) {
        if self.dropped == 0 {
            return;
        }
        let count = self.dropped.to_string();
        let header = Header {
            len: count.len() as u32,
            rank: self.rank,
            attempt: self.attempt,
            stream: Stream::Stderr,
            flags: FLAG_DROPPED,
            time_us: wall_us(),
        };
        if self.segments.append(&header.encode(count.as_bytes()), count.as_bytes()).is_ok_and(|kept| kept == count.len()) {
            self.dropped = 0;
        }
    }
}

trait ReadToFit {
    fn read_to_fit(&mut self, into: &mut Vec<u8>) -> io::Result<usize>;
}

impl ReadToFit for io::Take<&mut File> {
    /// One read into the spare room of `into`, up to the limit, without zeroing it first.
    fn read_to_fit(&mut self, into: &mut Vec<u8>) -> io::Result<usize> {
        let room = (into.capacity() - into.len()).min(usize::try_from(self.limit()).unwrap_or(usize::MAX));
        let spare = &mut into.spare_capacity_mut()[..room];
        // SAFETY: read only writes to the bytes; they count as initialized only as far as it answers.
        let count = unsafe { nix::libc::read(std::os::fd::AsRawFd::as_raw_fd(*self.get_ref()), spare.as_mut_ptr().cast(), room) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the kernel wrote `count` bytes there.
        unsafe { into.set_len(into.len() + count) };
        Ok(count)
    }
}

/// Keeps the last bytes, both streams in the order of their records.
fn keep_tail(tail: &mut Vec<u8>, data: &[u8]) {
    let new = &data[data.len().saturating_sub(TAIL_BYTES_MAX)..];
    let keep = TAIL_BYTES_MAX - new.len();
    tail.drain(..tail.len().saturating_sub(keep));
    tail.extend_from_slice(new);
}

#[cfg(test)]
mod tests {
    use super::*;
    use everlit_api::agent::log::Records;
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;
    use std::io::Write;

    struct Fixture {
        dir: tempfile::TempDir,
        output: Output,
        stdout: File,
        now: Instant,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::new(1, 2, Segments::new(dir.path().into(), 1 << 30));
        let (read, write) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let (quiet, _) = pipe2(OFlag::O_NONBLOCK).unwrap();
        output.attach(read, quiet);
        Fixture { dir, output, stdout: write.into(), now: Instant::now() }
    }

    impl Fixture {
        fn say(&mut self, text: &[u8]) {
            self.stdout.write_all(text).unwrap();
            self.output.on_readable(0, self.now);
        }

        fn later(&mut self, ms: u64) {
            self.now += Duration::from_millis(ms);
            self.output.on_time(self.now);
        }

        fn records(&self) -> Vec<(u8, String)> {
            let bytes = std::fs::read(self.dir.path().join(super::super::segments::segment_name(1))).unwrap_or_default();
            let records = Records::new(&bytes, true);
            records.map(|r| (r.header.flags, String::from_utf8_lossy(r.data).into_owned())).collect()
        }
    }

    #[test]
    fn only_whole_lines_are_written_at_once() {
        let mut at = fixture();
        at.say(b"one\ntwo\nthr");
        assert_eq!(at.records(), [(0, "one\ntwo\n".into())]);
        at.say(b"ee\n");
        assert_eq!(at.records()[1..], [(0, "three\n".into())]);
    }

    #[test]
    fn a_part_of_a_line_is_written_when_it_stays_alone() {
        let mut at = fixture();
        at.say(b"name: ");
        at.later(249);
        assert_eq!(at.records(), []);
        at.later(1);
        assert_eq!(at.records(), [(FLAG_PARTIAL, "name: ".into())]);
    }

    #[test]
    fn a_progress_bar_is_seen_once_a_second() {
        let mut at = fixture();
        for _ in 0..10 {
            at.say(b"\r 10%");
            at.later(100);
        }
        assert_eq!(at.records(), [(FLAG_PARTIAL, "\r 10%".repeat(10))]);
    }

    #[test]
    fn a_busy_rank_is_read_every_two_milliseconds() {
        let mut at = fixture();
        assert!(at.output.waits_for(at.now)[0].is_some());
        at.say(b"x\n");
        assert!(at.output.waits_for(at.now)[0].is_none());
        assert_eq!(at.output.deadline(at.now), Some(at.now + SPACING));
        at.later(2);
        assert!(at.output.waits_for(at.now)[0].is_some());
        assert_eq!(at.output.deadline(at.now), None);
    }

    #[test]
    fn a_long_line_is_cut_and_its_end_is_marked() {
        let mut at = fixture();
        for _ in 0..3 {
            at.say(&[b'x'; 30_000]);
        }
        assert_eq!(at.records().iter().map(|(flags, data)| (*flags, data.len())).collect::<Vec<_>>(), [(FLAG_PARTIAL, DATA_BYTES_MAX)]);
        drop(std::mem::replace(&mut at.stdout, File::open("/dev/null").unwrap()));
        at.output.on_readable(0, at.now);
        assert_eq!(at.records()[1].1.len(), 90_000 - DATA_BYTES_MAX);
    }

    #[test]
    fn what_can_not_be_written_is_counted_and_told() {
        let mut at = fixture();
        let moved = at.dir.path().with_extension("away");
        std::fs::rename(at.dir.path(), &moved).unwrap();
        at.say(b"lost\n");
        std::fs::rename(&moved, at.dir.path()).unwrap();
        at.say(b"kept\n");
        assert_eq!(at.records(), [(FLAG_DROPPED, "5".into()), (0, "kept\n".into())]);
        assert_eq!(at.output.tail(), b"lost\nkept\n");
    }
}
