//! The log of a job on one node: numbered segment files of records, appended to by the shims of all its ranks.
//!
//! Every shim appends whole records with one `write` to a file opened `O_APPEND`, so the order in the file *is* the merge order of the
//! ranks, fixed where it is written and the same for every reader for ever (INV-10). A record is a run of whole lines of one stream of one
//! rank; a part of a line is marked [`FLAG_PARTIAL`]. A shim killed in mid-write, or a full disk, leaves a torn record: its data has
//! another checksum than its header says, or no end. [`Records`] finds the next header by its magic and checksum and gives out what there is
//! of the torn one. A segment is sealed by taking away its write permission bits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// First bytes of every record.
pub const MAGIC: [u8; 4] = *b"EVL1";
/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 36;
/// Bytes of a record's data at most.
pub const DATA_BYTES_MAX: usize = 64 * 1024;
/// A segment is sealed when it has grown past this.
pub const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// The record ends in mid-line.
pub const FLAG_PARTIAL: u8 = 1;
/// The record's data is a decimal count of bytes of output that could not be kept (full disk).
pub const FLAG_DROPPED: u8 = 2;
/// Says in a header that the crc32 of the data is there.
const HAS_DATA_SUM: u8 = 1;

/// Which stream of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of data that follow.
    pub len: u32,
    /// The writer's rank.
    pub rank: u32,
    /// The writer's attempt.
    pub attempt: u32,
    /// Which stream.
    pub stream: Stream,
    /// [`FLAG_PARTIAL`], [`FLAG_DROPPED`].
    pub flags: u8,
    /// Wall time in microseconds since 1970.
    pub time_us: u64,
}

impl Header {
    /// As it stands in a segment before `data`: magic, crc32 of what follows in the header, fields, crc32 of the data; little-endian.
    pub fn encode(&self, data: &[u8]) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..16].copy_from_slice(&self.rank.to_le_bytes());
        out[16..20].copy_from_slice(&self.attempt.to_le_bytes());
        out[20] = u8::from(self.stream == Stream::Stderr);
        out[21] = self.flags;
        out[22] = HAS_DATA_SUM;
        out[24..32].copy_from_slice(&self.time_us.to_le_bytes());
        out[32..].copy_from_slice(&crc32fast::hash(data).to_le_bytes());
        let crc = crc32fast::hash(&out[8..]);
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Whether this is only a part of what was to be written: the disk was full, or the writer was killed.
    pub fn is_torn(&self, data: &[u8]) -> bool {
        data.len() < self.len as usize
    }

    /// Reads a header, and the crc32 of its data unless a shim of before that wrote it; `None` when these bytes are not one.
    fn decode(bytes: &[u8]) -> Option<(Self, Option<u32>)> {
        let own = bytes.get(..HEADER_BYTES)?;
        let word = |at: usize| u32::from_le_bytes([own[at], own[at + 1], own[at + 2], own[at + 3]]);
        if own[..4] != MAGIC || word(4) != crc32fast::hash(&own[8..]) || word(8) as usize > DATA_BYTES_MAX {
            return None;
        }
        let time = own[24..32].try_into().ok()?;
        let header = Self {
            len: word(8),
            rank: word(12),
            attempt: word(16),
            stream: if own[20] == 0 { Stream::Stdout } else { Stream::Stderr },
            flags: own[21],
            time_us: u64::from_le_bytes(time),
        };
        Some((header, (own[22] == HAS_DATA_SUM).then(|| word(32))))
    }
}

/// One record of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its header; `len` may be larger than `data` when it is torn.
    pub header: Header,
    /// Its data.
    pub data: &'a [u8],
    /// Offset of its header in `bytes`.
    pub at: usize,
    /// Offset after it in `bytes`.
    pub end: usize,
}

/// Reads records from the bytes of a segment that start at a record's start.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
    complete: bool,
}

impl<'a> Records<'a> {
    /// `complete`: nothing will be appended to these bytes any more, so a record without its end is torn and not merely under way.
    pub fn new(bytes: &'a [u8], complete: bool) -> Self {
        Self { bytes, at: 0, complete }
    }

    /// Bytes that were given out or passed over so far: where to go on with more bytes.
    pub fn consumed(&self) -> usize {
        self.at
    }

    fn next_header(&self, from: usize) -> Option<usize> {
        let mut at = from;
        while let Some(found) = self.bytes.get(at..)?.windows(MAGIC.len()).position(|w| w == MAGIC) {
            at += found;
            if Header::decode(&self.bytes[at..]).is_some() {
                return Some(at);
            }
            at += 1;
        }
        None
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        loop {
            let rest = self.bytes.get(self.at..)?;
            if rest.is_empty() {
                return None;
            }
            let Some((header, sum)) = Header::decode(rest) else {
                // Not at a header: what is here is the tail of a torn record.
                match self.next_header(self.at + 1) {
                    Some(next) => self.at = next,
                    None if self.complete => self.at = self.bytes.len(),
                    None => return None,
                }
                continue;
            };
            let start = self.at + HEADER_BYTES;
            let end = start + header.len as usize;
            // Torn, and then appended to by others, it may have come to its length: only its sum tells.
            let inside = || self.next_header(start).filter(|next| *next < end);
            let end = match (self.bytes.get(start..end), sum) {
                (Some(data), Some(sum)) if crc32fast::hash(data) == sum => end,
                (Some(_), None) if self.bytes.len() == end || Header::decode(&self.bytes[end..]).is_some() => end,
                (data, _) => match inside() {
                    Some(next) => next,
                    // The header that comes next may begin before `end`, and not be here as a whole.
                    None if !self.complete && self.bytes.len() < end + HEADER_BYTES => return None,
                    None => data.map_or(self.bytes.len(), |_| end),
                },
            };
            let record = Record { header, data: &self.bytes[start..end], at: self.at, end };
            self.at = end;
            return Some(record);
        }
    }
}

/// A place in a job's log: go on at the record at `offset` of `segment`, after its first `line` lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct LogPosition {
    /// Number of the segment file.
    pub segment: u64,
    /// Offset of a record in it.
    pub offset: u64,
    /// Lines of that record that were given out already.
    pub line: u32,
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.segment, self.offset, self.line)
    }
}

/// A text that is not a position.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("is not a position in a log")]
pub struct BadPosition;

impl FromStr for LogPosition {
    type Err = BadPosition;

    fn from_str(text: &str) -> Result<Self, BadPosition> {
        let mut parts = text.split('-');
        let mut number = || parts.next().and_then(|p| p.parse::<u64>().ok()).ok_or(BadPosition);
        let (segment, offset, line) = (number()?, number()?, number()?);
        let line = u32::try_from(line).map_err(|_| BadPosition)?;
        if parts.next().is_some() { Err(BadPosition) } else { Ok(Self { segment, offset, line }) }
    }
}

/// A place in the log of a job that is on several nodes: one position each, in the order in which the nodes came to the job.
///
/// A node that is not named yet stands at its beginning; so the id of a job with one node is a position.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogPlace(Vec<LogPosition>);

/// Nodes in a place that somebody shows us.
const PLACE_NODES_MAX: usize = 4096;

impl LogPlace {
    /// Of one node.
    pub fn of(&self, source: usize) -> LogPosition {
        self.0.get(source).copied().unwrap_or_default()
    }

    /// That node is here now.
    pub fn set(&mut self, source: usize, position: LogPosition) {
        if self.0.len() <= source {
            self.0.resize(source + 1, LogPosition::default());
        }
        self.0[source] = position;
    }
}

impl fmt::Display for LogPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.of(0))?;
        self.0.iter().skip(1).try_for_each(|position| write!(f, ",{position}"))
    }
}

impl FromStr for LogPlace {
    type Err = BadPosition;

    fn from_str(text: &str) -> Result<Self, BadPosition> {
        let positions = text.split(',').take(PLACE_NODES_MAX + 1).map(str::parse).collect::<Result<Vec<_>, _>>()?;
        if positions.len() > PLACE_NODES_MAX { Err(BadPosition) } else { Ok(Self(positions)) }
    }
}

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogStart {
    /// The oldest that is kept.
    Beginning,
    /// At a record of a segment; a place that is gone already begins at the oldest, and `skipped` says how much was lost.
    At {
        /// Number of the segment file.
        segment: u64,
        /// Offset of a record.
        offset: u64,
    },
    /// At the record that holds the n-th last line of the job (of `rank`, `attempt`, where given); the reader drops what is too much.
    Tail {
        /// Lines.
        lines: u64,
        /// Of this rank only.
        rank: Option<u32>,
        /// Of this attempt only.
        attempt: Option<u32>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(rank: u32, data: &[u8]) -> Vec<u8> {
        let header = Header { len: data.len() as u32, rank, attempt: 1, stream: Stream::Stderr, flags: 0, time_us: 7 };
        let mut out = header.encode(data).to_vec();
        out.extend_from_slice(data);
        out
    }

    fn read(bytes: &[u8], complete: bool) -> (Vec<(u32, Vec<u8>)>, usize) {
        let mut records = Records::new(bytes, complete);
        let found = records.by_ref().map(|r| (r.header.rank, r.data.to_vec())).collect();
        (found, records.consumed())
    }

    #[test]
    fn records_read_back() {
        let bytes = [record(0, b"a\n"), record(1, b""), record(2, b"EVL1 looks like a header\n")].concat();
        let expected = vec![(0, b"a\n".to_vec()), (1, vec![]), (2, b"EVL1 looks like a header\n".to_vec())];
        assert_eq!(read(&bytes, false), (expected, bytes.len()));
    }

    #[test]
    fn a_record_under_way_is_waited_for() {
        let bytes = [record(0, b"a\n"), record(1, b"hello\n")].concat();
        for cut in record(0, b"a\n").len()..bytes.len() {
            let (found, consumed) = read(&bytes[..cut], false);
            assert_eq!(found, vec![(0, b"a\n".to_vec())], "cut at {cut}");
            assert_eq!(consumed, record(0, b"a\n").len());
        }
    }

    #[test]
    fn a_torn_record_costs_only_its_own_tail() {
        let torn = record(1, b"hello\n");
        for cut in 1..torn.len() {
            let bytes = [record(0, b"a\n"), torn[..cut].to_vec(), record(2, b"after\n")].concat();
            let (found, consumed) = read(&bytes, false);
            assert_eq!(found.first(), Some(&(0, b"a\n".to_vec())), "cut at {cut}");
            assert_eq!(found.last(), Some(&(2, b"after\n".to_vec())), "cut at {cut}");
            assert_eq!(consumed, bytes.len());
        }
    }

    /// Whoever reads while it is written, however often, gets what one gets who reads at once.
    #[test]
    fn a_torn_record_reads_the_same_at_every_moment() {
        let torn = record(1, &[b'x'; 90]);
        let others =
            [record(2, b"one\n"), record(3, b""), record(2, b"three\n"), record(3, b"four, which is longer\n"), record(2, b"five\n")];
        for cut in HEADER_BYTES..torn.len() {
            let bytes = [record(0, b"a\n"), torn[..cut].to_vec(), others.concat()].concat();
            let (at_once, _) = read(&bytes, true);
            assert_eq!(at_once.len(), 2 + others.len(), "cut at {cut}");
            for seen in 0..bytes.len() {
                let (mut found, consumed) = read(&bytes[..seen], false);
                // The chunk that was consumed, read again by itself.
                assert_eq!(read(&bytes[..consumed], true).0, found, "cut at {cut}, read at {seen}");
                found.extend(read(&bytes[consumed..], true).0);
                assert_eq!(found, at_once, "cut at {cut}, read at {seen}");
            }
        }
    }

    #[test]
    fn a_program_may_print_a_log() {
        let printed = record(0, &record(9, b"of another job\n"));
        assert_eq!(read(&printed, false), (vec![(0, record(9, b"of another job\n"))], printed.len()));
    }

    #[test]
    fn records_of_before_there_were_sums_are_read() {
        let without = |record: Vec<u8>| {
            let mut bytes = record;
            bytes[22] = 0;
            bytes[32..HEADER_BYTES].fill(0);
            let crc = crc32fast::hash(&bytes[8..HEADER_BYTES]);
            bytes[4..8].copy_from_slice(&crc.to_le_bytes());
            bytes
        };
        let bytes = [without(record(0, b"a\n")), without(record(1, b"torn\n"))[..HEADER_BYTES + 2].to_vec(), record(2, b"c\n")].concat();
        assert_eq!(read(&bytes, false).0, [(0, b"a\n".to_vec()), (1, b"to".to_vec()), (2, b"c\n".to_vec())]);
        assert_eq!(read(&without(record(0, b"last\n")), false).0, [(0, b"last\n".to_vec())]);
    }

    #[test]
    fn a_torn_end_is_given_out_when_complete() {
        let torn = record(1, b"hello\n");
        let (found, consumed) = read(&torn[..HEADER_BYTES + 3], true);
        assert_eq!(found, vec![(1, b"hel".to_vec())]);
        assert_eq!(consumed, HEADER_BYTES + 3);
    }

    #[test]
    fn positions_read_back() {
        let place = LogPosition { segment: 3, offset: 1 << 40, line: 17 };
        assert_eq!(place.to_string().parse(), Ok(place));
        for text in ["", "1-2", "1-2-3-4", "a-b-c", "1-2-99999999999"] {
            assert_eq!(text.parse::<LogPosition>(), Err(BadPosition), "{text}");
        }
    }

    #[test]
    fn places_read_back_and_one_node_s_is_a_position() {
        let position = LogPosition { segment: 3, offset: 40, line: 1 };
        let mut place = LogPlace::default();
        assert_eq!(place.to_string(), "0-0-0");
        place.set(0, position);
        assert_eq!((place.to_string(), place.to_string().parse()), ("3-40-1".into(), Ok(place.clone())));
        place.set(2, position);
        assert_eq!((place.to_string(), place.to_string().parse()), ("3-40-1,0-0-0,3-40-1".into(), Ok(place.clone())));
        assert_eq!((place.of(2), place.of(7)), (position, LogPosition::default()));
        let too_many = vec!["1-2-3"; PLACE_NODES_MAX + 1].join(",");
        for text in ["", ",", "1-2-3,", ",1-2-3", "1-2-3,,1-2-3", "1-2-3;1-2-3", "1-2-3, 1-2-3", too_many.as_str()] {
            assert_eq!(text.parse::<LogPlace>(), Err(BadPosition), "{text}");
        }
        assert!(too_many[6..].parse::<LogPlace>().is_ok());
    }
}
