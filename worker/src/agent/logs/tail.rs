//! Finding the record that holds the n-th last line, from the newest segment back to the oldest.
//!
//! A segment is read once from front to back, keeping only the records that may still be the answer; so memory is bounded by the lines
//! asked for, and a job with little output of one rank costs one pass over its log.

use std::collections::VecDeque;
use std::path::Path;

use everlit_api::agent::log::{FLAG_DROPPED, Records};

use super::reader::Reader;
use crate::shim::segments::segment_numbers;

/// A reader that begins where the last `lines` lines do (of this rank and attempt, where given), or at the oldest that is kept.
pub(super) fn locate(dir: &Path, lines: u64, rank: Option<u32>, attempt: Option<u32>) -> Reader {
    let numbers = segment_numbers(dir);
    let mut wanted = lines;
    let mut begin = None;
    for segment in numbers.iter().rev() {
        let found = in_segment(dir, *segment, wanted, rank, attempt);
        if let Some(offset) = found.offset {
            begin = Some((*segment, offset));
        }
        wanted -= found.lines.min(wanted);
        if wanted == 0 {
            break;
        }
    }
    // Nothing of it yet: what comes next is all there is to say.
    let newest = || {
        numbers.last().map_or((1, 0), |newest| {
            (*newest, std::fs::metadata(dir.join(crate::shim::segments::segment_name(*newest))).map_or(0, |about| about.len()))
        })
    };
    let (segment, offset) = begin.unwrap_or_else(newest);
    Reader::new(dir, segment, offset)
}

struct Found {
    /// The first record that belongs to the answer.
    offset: Option<u64>,
    /// Its lines, and all after it.
    lines: u64,
}

fn in_segment(dir: &Path, segment: u64, wanted: u64, rank: Option<u32>, attempt: Option<u32>) -> Found {
    let mut reader = Reader::new(dir, segment, 0);
    let mut kept: VecDeque<(u64, u64)> = VecDeque::new();
    let mut total = 0;
    let mut buffer = Vec::new();
    while let Ok(chunk) = reader.read(&mut buffer, true) {
        if chunk.segment != segment || chunk.bytes.is_empty() {
            break;
        }
        for record in Records::new(&chunk.bytes, true) {
            let header = record.header;
            let other = rank.is_some_and(|rank| rank != header.rank) || attempt.is_some_and(|attempt| attempt != header.attempt);
            if other || header.flags & FLAG_DROPPED != 0 {
                continue;
            }
            let lines = record.data.iter().filter(|byte| **byte == b'\n').count() as u64;
            kept.push_back((chunk.offset + record.at as u64, lines));
            total += lines;
            while kept.front().is_some_and(|(_, first)| total - first >= wanted) {
                total -= kept.pop_front().map_or(0, |(_, first)| first);
            }
        }
    }
    Found { offset: kept.front().map(|(offset, _)| *offset), lines: total }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::segments::segment_name;
    use everlit_api::agent::log::{Header, Stream};
    use std::os::unix::fs::PermissionsExt;

    fn record(rank: u32, data: &str) -> Vec<u8> {
        let header = Header { len: data.len() as u32, rank, attempt: 1, stream: Stream::Stdout, flags: 0, time_us: 0 };
        [&header.encode(data.as_bytes())[..], data.as_bytes()].concat()
    }

    fn tail(dir: &Path, lines: u64, rank: Option<u32>) -> String {
        let mut reader = locate(dir, lines, rank, None);
        let mut out = String::new();
        loop {
            let chunk = reader.read(&mut Vec::new(), false).unwrap();
            if chunk.bytes.is_empty() {
                return out;
            }
            Records::new(&chunk.bytes, true).for_each(|r| out.push_str(&String::from_utf8_lossy(r.data)));
        }
    }

    #[test]
    fn the_tail_begins_at_the_record_that_holds_its_first_line() {
        let dir = tempfile::tempdir().unwrap();
        let sealed = dir.path().join(segment_name(1));
        std::fs::write(&sealed, [record(0, "a\nb\n"), record(1, "c\n")].concat()).unwrap();
        std::fs::set_permissions(&sealed, PermissionsExt::from_mode(0o440)).unwrap();
        std::fs::write(dir.path().join(segment_name(2)), [record(0, "d\n"), record(1, "e\nf\n")].concat()).unwrap();
        assert_eq!(tail(dir.path(), 1, None), "e\nf\n");
        assert_eq!(tail(dir.path(), 2, None), "e\nf\n");
        assert_eq!(tail(dir.path(), 3, None), "d\ne\nf\n");
        assert_eq!(tail(dir.path(), 5, None), "a\nb\nc\nd\ne\nf\n");
        assert_eq!(tail(dir.path(), 100, None), "a\nb\nc\nd\ne\nf\n");
        assert_eq!(tail(dir.path(), 1, Some(0)), "d\ne\nf\n");
        assert_eq!(tail(dir.path(), 1, Some(9)), "");
        assert_eq!(tail(&dir.path().join("none"), 1, None), "");
    }
}
