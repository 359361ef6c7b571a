//! The last lines of a log, held back until its end is reached.
//!
//! What was let go of must not come again when a reader resumes: each source's place is told before the lines are.

use std::collections::{BTreeMap, VecDeque};

use everlit_api::agent::log::LogPosition;
use everlit_api::control::LogItem;

/// The last lines so far.
#[derive(Debug)]
pub(super) struct Tail {
    lines: u64,
    held: VecDeque<LogItem>,
    held_lines: u64,
    /// Where each source's first item that is still held stands, or what follows its last.
    starts: BTreeMap<usize, LogPosition>,
}

fn lines_of(item: &LogItem) -> u64 {
    let LogItem::Record { data, .. } = item else { return 0 };
    let whole = data.iter().filter(|b| **b == b'\n').count() as u64;
    whole + u64::from(data.last().is_some_and(|b| *b != b'\n'))
}

impl Tail {
    /// Of so many lines.
    pub(super) fn new(lines: u64) -> Self {
        Self { lines, held: VecDeque::new(), held_lines: 0, starts: BTreeMap::new() }
    }

    /// The next item.
    pub(super) fn hold(&mut self, item: LogItem) {
        if let LogItem::Record { source, at: start, .. } | LogItem::Passed { source, next: start } = &item {
            self.starts.entry(*source).or_insert(*start);
        }
        self.held_lines += lines_of(&item);
        self.held.push_back(item);
        while let Some(first) = self.held.front().map(lines_of)
            && self.held_lines - first >= self.lines
        {
            self.held_lines -= first;
            let gone = self.held.pop_front();
            if let Some(LogItem::Record { source, next, .. } | LogItem::Gap { source, next, .. } | LogItem::Passed { source, next }) = gone
            {
                self.starts.insert(source, next);
            }
        }
    }

    /// Where all sources begin, then what is held, the first record cut to the lines that are wanted of it.
    pub(super) fn trimmed(mut self) -> impl Iterator<Item = LogItem> {
        let extra = self.held_lines.saturating_sub(self.lines);
        if let Some(LogItem::Record { source, data, at, .. }) = self.held.front_mut() {
            for _ in 0..extra {
                let cut = data.iter().position(|b| *b == b'\n').map_or(data.len(), |n| n + 1);
                *data = data.slice(cut..);
                at.line += 1;
            }
            self.starts.insert(*source, *at);
        }
        let starts = self.starts.into_iter().map(|(source, next)| LogItem::Passed { source, next });
        starts.chain(self.held)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use everlit_api::agent::log::{Header, Stream};

    use super::*;

    fn place(offset: u64) -> LogPosition {
        LogPosition { segment: 1, offset, line: 0 }
    }

    fn item(source: usize, offset: u64, text: &str) -> LogItem {
        let header = Header { len: text.len() as u32, rank: 0, attempt: 1, stream: Stream::Stdout, flags: 0, time_us: 0 };
        let data = Bytes::copy_from_slice(text.as_bytes());
        LogItem::Record { source, header, data, at: place(offset), next: place(offset + 1) }
    }

    fn told(tail: Tail) -> Vec<String> {
        let tell = |item| match item {
            LogItem::Record { source, data, at, .. } => format!("{source} {at} {}", String::from_utf8_lossy(&data).replace('\n', "/")),
            LogItem::Passed { source, next } => format!("{source} from {next}"),
            other => format!("{other:?}"),
        };
        tail.trimmed().map(tell).collect()
    }

    fn tail_of(lines: u64, records: &[&str]) -> Vec<String> {
        let mut tail = Tail::new(lines);
        records.iter().zip(0..).for_each(|(record, offset)| tail.hold(item(0, offset, record)));
        told(tail)
    }

    #[test]
    fn a_tail_is_cut_to_the_line() {
        assert_eq!(tail_of(3, &["a\nb\n", "c\n", "d\ne\n"]), ["0 from 1-1-0", "0 1-1-0 c/", "0 1-2-0 d/e/"]);
        assert_eq!(tail_of(2, &["a\nb\nc\nd\n"]), ["0 from 1-0-2", "0 1-0-2 c/d/"]);
        assert_eq!(tail_of(9, &["a\n", "b"]), ["0 from 1-0-0", "0 1-0-0 a/", "0 1-1-0 b"]);
        assert_eq!(tail_of(1, &["a\nb"]), ["0 from 1-0-1", "0 1-0-1 b"]);
        assert_eq!(tail_of(0, &["a\n"]), ["0 from 1-1-0"]);
    }

    #[test]
    fn every_source_s_place_is_told_before_the_first_line() {
        let mut tail = Tail::new(2);
        tail.hold(LogItem::Passed { source: 2, next: place(70) });
        tail.hold(item(0, 1, "a\n"));
        tail.hold(item(1, 5, "b\nc\n"));
        tail.hold(LogItem::Gap { source: 0, bytes: 7, next: place(9) });
        tail.hold(item(0, 9, "d\n"));
        assert_eq!(
            told(tail),
            [
                "0 from 1-2-0",
                "1 from 1-5-1",
                "2 from 1-70-0",
                "1 1-5-1 c/",
                "Gap { source: 0, bytes: 7, next: LogPosition { segment: 1, offset: 9, line: 0 } }",
                "0 1-9-0 d/"
            ]
        );
    }
}
