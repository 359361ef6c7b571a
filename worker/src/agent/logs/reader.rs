//! Reading a job's segments from a place on, in chunks of whole records.
//!
//! Whether a segment is sealed is asked *before* its end is looked for: what was sealed then has no more after it. A segment that was removed
//! while it is open is read to its end. Bytes that are gone are estimated by the size of a neighbour, since nobody measured them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use everlit_api::agent::LOG_FRAME_BYTES_MAX;
use everlit_api::agent::log::{HEADER_BYTES, Records};

use super::life;
use crate::shim::segments::{is_sealed, segment_name, segment_numbers};

/// What one read found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// The segment.
    pub segment: u64,
    /// Offset of the first byte.
    pub offset: u64,
    /// Whole records; empty at the end.
    pub bytes: Vec<u8>,
    /// Bytes before them that are gone.
    pub skipped: u64,
    /// There was no more.
    pub at_end: bool,
    /// A record was begun and not finished: it is being written, or its writer was killed.
    pub unfinished: bool,
}

/// A place in a job's log.
#[derive(Debug)]
pub(crate) struct Reader {
    dir: PathBuf,
    segment: u64,
    offset: u64,
    open: Option<File>,
    skipped: u64,
    last_size: u64,
}

impl Reader {
    /// From a record on; segment 0 and 1 both mean the beginning.
    pub(crate) fn new(dir: &Path, segment: u64, offset: u64) -> Self {
        Self { dir: dir.to_path_buf(), segment: segment.max(1), offset, open: None, skipped: 0, last_size: 0 }
    }

    /// The folder that is read.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The segment that comes next, and the offset in it.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.segment, self.offset)
    }

    /// Opens the segment, or the next that is there. `false`: there is none yet.
    fn open(&mut self) -> io::Result<bool> {
        while self.open.is_none() {
            let numbers = segment_numbers(&self.dir);
            let Some(number) = numbers.into_iter().find(|number| *number >= self.segment) else { return Ok(false) };
            let file = match File::open(self.dir.join(segment_name(number))) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            if number > self.segment {
                let size = self.last_size.max(file.metadata()?.len()).max(1);
                // A life that begins now had nothing before it.
                let first = self.segment.max(life(number));
                let begun = if first == self.segment { self.offset } else { 0 };
                self.skipped += (number - first).saturating_mul(size).saturating_sub(begun);
                (self.segment, self.offset) = (number, 0);
            }
            self.open = Some(file);
        }
        Ok(true)
    }

    /// Reads on. `to_the_end`: what looks unfinished at the end is given out too, since nobody will wait for the rest.
    pub(crate) fn read(&mut self, buffer: &mut Vec<u8>, to_the_end: bool) -> io::Result<Chunk> {
        loop {
            if !self.open()? {
                return Ok(self.nothing(false));
            }
            let Some(file) = &self.open else { return Ok(self.nothing(false)) };
            let about = file.metadata()?;
            let sealed = is_sealed(&about);
            buffer.resize(LOG_FRAME_BYTES_MAX, 0);
            let count = file.read_at(buffer, self.offset)?;
            let reached = self.offset + count as u64 >= about.len();
            if count == 0 && sealed {
                self.last_size = about.len();
                (self.open, self.segment, self.offset) = (None, self.segment + 1, 0);
                continue;
            }
            let mut records = Records::new(&buffer[..count], reached && (sealed || to_the_end));
            // The first record's start: what stands before it is the rest of one that was torn.
            let start = records.by_ref().fold(None, |first: Option<usize>, record| Some(first.unwrap_or(record.at)));
            let consumed = records.consumed();
            let Some(start) = start else {
                if count < LOG_FRAME_BYTES_MAX && consumed == 0 {
                    return Ok(self.nothing(count > 0));
                }
                // No record in a whole buffer: not a log.
                let passed = if consumed > 0 { consumed } else { count - HEADER_BYTES } as u64;
                self.skipped += passed;
                self.offset += passed;
                continue;
            };
            let chunk = Chunk {
                segment: self.segment,
                offset: self.offset + start as u64,
                bytes: buffer[start..consumed].to_vec(),
                skipped: std::mem::take(&mut self.skipped) + start as u64,
                at_end: reached && consumed == count && !sealed,
                unfinished: false,
            };
            self.offset += consumed as u64;
            return Ok(chunk);
        }
    }

    fn nothing(&mut self, unfinished: bool) -> Chunk {
        let skipped = std::mem::take(&mut self.skipped);
        Chunk { segment: self.segment, offset: self.offset, bytes: Vec::new(), skipped, at_end: true, unfinished }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use everlit_api::agent::log::{Header, Stream};
    use std::os::unix::fs::PermissionsExt;

    fn record(rank: u32, data: &str) -> Vec<u8> {
        let header = Header { len: data.len() as u32, rank, attempt: 1, stream: Stream::Stdout, flags: 0, time_us: 0 };
        [&header.encode(data.as_bytes())[..], data.as_bytes()].concat()
    }

    fn segment(dir: &Path, number: u64, bytes: &[u8], sealed: bool) {
        let path = dir.join(segment_name(number));
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(if sealed { 0o440 } else { 0o640 })).unwrap();
    }

    fn text(reader: &mut Reader) -> (String, u64, bool) {
        let chunk = reader.read(&mut Vec::new(), false).unwrap();
        let records = Records::new(&chunk.bytes, true);
        (records.map(|r| String::from_utf8_lossy(r.data).into_owned()).collect(), chunk.skipped, chunk.at_end)
    }

    #[test]
    fn segments_are_read_in_order_and_the_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        segment(dir.path(), 1, &[record(0, "a\n"), record(1, "b\n")].concat(), true);
        segment(dir.path(), 2, &record(0, "c\n"), false);
        let mut reader = Reader::new(dir.path(), 0, 0);
        assert_eq!(text(&mut reader), ("a\nb\n".into(), 0, false));
        assert_eq!(text(&mut reader), ("c\n".into(), 0, true));
        assert_eq!(text(&mut reader), (String::new(), 0, true));
        segment(dir.path(), 2, &[record(0, "c\n"), record(0, "d\n")].concat(), true);
        assert_eq!(text(&mut reader), ("d\n".into(), 0, false));
        assert_eq!(text(&mut reader), (String::new(), 0, true));
    }

    #[test]
    fn a_record_under_way_is_waited_for_unless_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let whole = [record(0, "a\n"), record(0, "hello\n")].concat();
        segment(dir.path(), 1, &whole[..whole.len() - 3], false);
        let mut reader = Reader::new(dir.path(), 1, 0);
        assert_eq!(text(&mut reader), ("a\n".into(), 0, false));
        assert_eq!(text(&mut reader), (String::new(), 0, true));
        segment(dir.path(), 1, &whole, false);
        assert_eq!(text(&mut reader), ("hello\n".into(), 0, true));
        segment(dir.path(), 1, &whole[..whole.len() - 3], false);
        let chunk = Reader::new(dir.path(), 1, record(0, "a\n").len() as u64).read(&mut Vec::new(), true).unwrap();
        assert_eq!(chunk.bytes.len(), record(0, "hello\n").len() - 3);
    }

    #[test]
    fn what_is_gone_is_said() {
        let dir = tempfile::tempdir().unwrap();
        segment(dir.path(), 4, &record(0, "late\n"), false);
        let size = record(0, "late\n").len() as u64;
        assert_eq!(text(&mut Reader::new(dir.path(), 0, 0)), ("late\n".into(), 3 * size, true));
        assert_eq!(text(&mut Reader::new(dir.path(), 4, 0)), ("late\n".into(), 0, true));
    }

    #[test]
    fn a_job_without_a_log_is_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(text(&mut Reader::new(&dir.path().join("none"), 0, 0)), (String::new(), 0, true));
    }
}
