//! Logs from the rank's write to the coordinator's frame: nothing lost, nothing twice, in one order for every reader.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use std::collections::BTreeMap;
use std::time::Duration;

use agent_support::{Bench, PATIENCE, rank};
use everlit_api::agent::log::{DATA_BYTES_MAX, FLAG_PARTIAL, Header, LogStart, Records, Stream};
use everlit_api::agent::{FromAgent, GangSpec, LOG_CREDIT_BYTES, ToAgent};

/// One record as a reader gets it, with its place.
#[derive(Debug, Clone, PartialEq)]
struct Got {
    place: (u64, u64),
    header: Header,
    data: Vec<u8>,
}

struct Tape {
    stream: u64,
    got: Vec<Got>,
    skipped: u64,
    caught_up: bool,
    bytes: u64,
}

impl Tape {
    fn open(bench: &mut Bench, stream: u64, spec: &GangSpec, from: LogStart, follow: bool) -> Self {
        bench.send(ToAgent::OpenLog { stream, job: spec.job, from, follow });
        Self { stream, got: Vec::new(), skipped: 0, caught_up: false, bytes: 0 }
    }

    /// Takes what came, gives credit, and reads one more frame. `false`: the stream has ended.
    fn turn(&mut self, bench: &mut Bench, credit: bool) -> bool {
        let came: Vec<_> = std::mem::take(&mut bench.logs).into();
        let (own, others): (Vec<_>, Vec<_>) = came.into_iter().partition(|(frame, _)| frame.stream == self.stream);
        bench.logs.extend(others);
        for (frame, bytes) in own {
            self.skipped += frame.skipped;
            self.caught_up = frame.caught_up;
            self.bytes += bytes.len() as u64;
            let mut records = Records::new(&bytes, true);
            self.got.extend(records.by_ref().map(|record| Got {
                place: (frame.segment, frame.offset + record.at as u64),
                header: record.header,
                data: record.data.to_vec(),
            }));
            assert_eq!(records.consumed(), bytes.len());
            if credit {
                bench.send(ToAgent::LogCredit { stream: self.stream, bytes: bytes.len() as u64 });
            }
        }
        let closed = |frame: &FromAgent| matches!(frame, FromAgent::LogClosed { stream, .. } if *stream == self.stream);
        if bench.not_taken().any(closed) {
            return false;
        }
        assert!(bench.read(PATIENCE));
        true
    }

    fn read_to_end(mut self, bench: &mut Bench) -> Self {
        while self.turn(bench, true) {}
        self
    }

    fn until(&mut self, bench: &mut Bench, mut enough: impl FnMut(&Self) -> bool) {
        let until = std::time::Instant::now() + PATIENCE;
        while !enough(self) {
            assert!(self.turn(bench, true) && std::time::Instant::now() < until, "in vain: {} records", self.got.len());
        }
    }

    fn text(&self) -> String {
        self.got.iter().map(|got| String::from_utf8_lossy(&got.data).into_owned()).collect()
    }

    fn lines_of(&self, rank: u32, stream: Stream) -> String {
        let own = self.got.iter().filter(|got| got.header.rank == rank && got.header.stream == stream);
        own.map(|got| String::from_utf8_lossy(&got.data).into_owned()).collect()
    }
}

fn numbers(count: u32) -> String {
    (1..=count).map(|n| format!("{n}\n")).collect()
}

#[test]
fn every_reader_gets_every_line_once_and_in_the_same_order() {
    let mut bench = Bench::new();
    // Enough for several segments of the job's small bound to be sealed, few enough for none to be removed.
    let mut spec = bench.gang(3, "seq 1 60000; seq 1 1000 >&2");
    spec.log_bytes_max = 4 * 1024 * 1024;
    bench.order(&spec);
    let mut follower = Tape::open(&mut bench, 1, &spec, LogStart::Beginning, true);
    follower.until(&mut bench, |tape| tape.got.len() > 5);
    // The link breaks; the reader comes back with the place after its last record.
    let last = follower.got.last().unwrap().clone();
    bench.drop_link();
    bench.accept();
    let offset = last.place.1 + 36 + last.data.len() as u64;
    let mut rest = Tape::open(&mut bench, 2, &spec, LogStart::At { segment: last.place.0, offset }, true);
    let all = |tape: &Tape| tape.got.iter().map(|got| got.data.len()).sum::<usize>();
    let wanted = 3 * (numbers(60_000).len() + numbers(1000).len());
    rest.until(&mut bench, |tape| all(tape) + all(&follower) >= wanted && tape.caught_up);
    let whole = Tape::open(&mut bench, 3, &spec, LogStart::Beginning, false).read_to_end(&mut bench);
    let joined: Vec<Got> = follower.got.into_iter().chain(rest.got).collect();
    assert_eq!(joined.len(), whole.got.len());
    assert!(joined == whole.got, "the two readings differ");
    assert_eq!((whole.skipped, whole.caught_up), (0, true));
    for number in 0..3 {
        assert!(whole.lines_of(number, Stream::Stdout) == numbers(60_000), "rank {number}");
        assert!(whole.lines_of(number, Stream::Stderr) == numbers(1000), "rank {number}");
    }
    assert!(whole.got.iter().any(|got| got.place.0 > 1), "no segment was sealed: the test tests nothing");
    assert!(whole.got.iter().all(|got| got.data.ends_with(b"\n") && got.header.attempt == 1));
}

#[test]
fn long_lines_and_binary_output_come_through_whole() {
    let mut bench = Bench::new();
    let spec = bench.gang(1, "head -c 10000000 /dev/zero; head -c 300000 /dev/urandom | tee random.bin; printf end");
    bench.order(&spec);
    bench.exited(rank(&spec, 0));
    let tape = Tape::open(&mut bench, 1, &spec, LogStart::Beginning, false).read_to_end(&mut bench);
    let bytes: Vec<u8> = tape.got.iter().flat_map(|got| got.data.clone()).collect();
    let expected = [vec![0; 10_000_000], std::fs::read(bench.dir.path().join("random.bin")).unwrap(), b"end".to_vec()].concat();
    assert!(bytes == expected, "{} of {} bytes", bytes.len(), expected.len());
    assert!(tape.got[0].data.len() <= DATA_BYTES_MAX && tape.got[0].header.flags == FLAG_PARTIAL);
    assert_eq!(tape.got.last().unwrap().header.flags, FLAG_PARTIAL);
}

#[test]
fn a_reader_that_gives_no_credit_gets_no_more_and_holds_up_nobody() {
    let mut bench = Bench::new();
    let spec = bench.gang(1, "head -c 5000000 /dev/urandom | base64");
    bench.order(&spec);
    bench.exited(rank(&spec, 0));
    let mut slow = Tape::open(&mut bench, 1, &spec, LogStart::Beginning, true);
    let quick = Tape::open(&mut bench, 2, &spec, LogStart::Beginning, false).read_to_end(&mut bench);
    assert!(quick.bytes > 6_000_000);
    while bench.logs.iter().any(|(frame, _)| frame.stream == 1) || bench.read(Duration::from_millis(300)) {
        slow.turn(&mut bench, false);
        if bench.logs.is_empty() && slow.bytes > LOG_CREDIT_BYTES / 2 {
            break;
        }
    }
    assert!(slow.bytes <= LOG_CREDIT_BYTES && !slow.caught_up, "{}", slow.bytes);
    bench.send(ToAgent::LogCredit { stream: 1, bytes: slow.bytes });
    slow.bytes = 0;
    slow.until(&mut bench, |tape| tape.caught_up);
    assert!(slow.got == quick.got);
}

#[test]
fn a_line_is_seen_while_the_rank_runs_and_a_tail_is_the_end() {
    let mut bench = Bench::new();
    let (spec, _) =
        bench.start("seq 1 5000; printf 'no end'; while :; do [ -e more ] && { echo; echo more; break; }; sleep 0.02; done; sleep 600");
    let mut tape = Tape::open(&mut bench, 1, &spec, LogStart::Beginning, true);
    tape.until(&mut bench, |tape| tape.text().ends_with("5000\nno end"));
    std::fs::write(bench.dir.path().join("more"), "").unwrap();
    tape.until(&mut bench, |tape| tape.text().ends_with("no end\nmore\n") && tape.caught_up);
    let tail =
        Tape::open(&mut bench, 2, &spec, LogStart::Tail { lines: 2, rank: Some(0), attempt: Some(1) }, false).read_to_end(&mut bench);
    assert!(tail.text().ends_with("no end\nmore\n") || tail.text() == "\nmore\n", "{}", tail.text());
    assert!(tail.got.len() < tape.got.len());
    bench.send(ToAgent::CloseLog { stream: 1 });
    let none = Tape::open(&mut bench, 3, &spec, LogStart::Tail { lines: 5, rank: Some(9), attempt: None }, false).read_to_end(&mut bench);
    assert_eq!((none.text(), none.caught_up), (String::new(), true));
}

#[test]
fn a_job_without_a_log_is_at_its_end_at_once() {
    let mut bench = Bench::new();
    let unknown = bench.gang(1, "");
    let tape = Tape::open(&mut bench, 1, &unknown, LogStart::Beginning, false).read_to_end(&mut bench);
    assert_eq!((tape.got.len(), tape.caught_up, tape.skipped), (0, true, 0));
    // One who follows sees what comes later.
    let mut later = Tape::open(&mut bench, 2, &unknown, LogStart::Beginning, true);
    later.until(&mut bench, |tape| tape.caught_up);
    let mut spec = unknown.clone();
    spec.program = everlit_api::agent::Program::Command { argv: vec!["echo".into(), "late".into()] };
    bench.order(&spec);
    later.until(&mut bench, |tape| tape.text() == "late\n");
}

#[test]
fn a_log_is_bounded_and_what_is_gone_is_said() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(2, "seq 1 600000");
    spec.log_bytes_max = 2 * 1024 * 1024;
    bench.order(&spec);
    for number in 0..2 {
        bench.exited(rank(&spec, number));
    }
    let logs = bench.job_folder(spec.job).join("logs");
    let sizes: u64 = std::fs::read_dir(&logs).unwrap().flatten().map(|entry| entry.metadata().unwrap().len()).sum();
    assert!(sizes <= spec.log_bytes_max, "{sizes}");
    let tape = Tape::open(&mut bench, 1, &spec, LogStart::At { segment: 1, offset: 1000 }, false).read_to_end(&mut bench);
    assert!(tape.skipped > 1_000_000, "{}", tape.skipped);
    let mut last: BTreeMap<u32, u64> = BTreeMap::new();
    for got in &tape.got {
        for line in String::from_utf8_lossy(&got.data).lines() {
            let number: u64 = line.parse().unwrap();
            assert!(
                last.insert(got.header.rank, number).is_none_or(|before| before + 1 == number),
                "rank {} after {number}",
                got.header.rank
            );
        }
    }
    // A rank that ended early may be gone altogether.
    assert!(!last.is_empty() && last.values().all(|number| *number == 600_000), "{last:?}");
}

#[test]
fn a_torn_record_costs_only_itself() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("echo before; while [ ! -e more ]; do sleep 0.02; done; echo after; sleep 600");
    let mut tape = Tape::open(&mut bench, 1, &spec, LogStart::Beginning, true);
    tape.until(&mut bench, |tape| tape.text() == "before\n");
    // What another rank's shim leaves when it is killed in the middle of a write.
    let header = Header { len: 5000, rank: 7, attempt: 1, stream: Stream::Stdout, flags: 0, time_us: 1 };
    let path = bench.job_folder(spec.job).join("logs/00000000000000000001.log");
    let mut segment = std::fs::File::options().append(true).open(path).unwrap();
    std::io::Write::write_all(&mut segment, &[&header.encode(&[b'x'; 5000])[..], b"torn of"].concat()).unwrap();
    std::fs::write(bench.dir.path().join("more"), "").unwrap();
    tape.until(&mut bench, |tape| tape.text().ends_with("after\n"));
    assert_eq!(tape.text(), "before\ntorn ofafter\n");
    assert_eq!(tape.got[1].header.rank, 7);
}

#[test]
fn a_rank_that_closes_its_output_runs_on() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("echo bye; exec >&- 2>&-; sleep 0.3; exit 3");
    let exited = bench.exited(rank(&spec, 0));
    assert_eq!((exited.exit.code, exited.exit.tail), (Some(3), vec!["bye".to_string()]));
}

#[test]
fn a_full_disk_costs_output_but_never_the_rank() {
    let mut bench = Bench::unstarted();
    // Much more than the pipe holds, so that the shim has met the limit when the rank is done.
    // A limit on file sizes is a disk that is full for the log alone, and can be made larger from outside.
    bench.start_agent_limited(64 * 1024);
    bench.accept();
    let (spec, started) = bench.start("seq 1 500000; echo done > done; while [ ! -e more ]; do sleep 0.02; done; echo back; exit 0");
    let done = bench.dir.path().join("done");
    bench.until("the rank to have written everything", || done.exists());
    let shim = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(started.pid as i32))).unwrap();
    agent_support::lift_file_size_limit(shim.as_raw());
    std::fs::write(bench.dir.path().join("more"), "").unwrap();
    let mut tape = Tape::open(&mut bench, 1, &spec, LogStart::Beginning, true);
    tape.until(&mut bench, |tape| tape.text().ends_with("back\n"));
    assert_eq!(bench.exited(rank(&spec, 0)).exit.code, Some(0));
    let (told, kept): (Vec<_>, Vec<_>) = tape.got.iter().partition(|got| got.header.flags == everlit_api::agent::log::FLAG_DROPPED);
    let dropped: usize = String::from_utf8_lossy(&told[0].data).parse().unwrap();
    let kept: usize = kept.iter().map(|got| got.data.len()).sum();
    assert_eq!(told.len(), 1);
    assert_eq!(kept + dropped, numbers(500_000).len() + "back\n".len());
    assert!(dropped > 100_000);
}
