//! One log stream: when it may send, and what.
//!
//! Bytes under way are bounded by the reader's credit. A trickle is sent at once after a pause and at most every [`LOG_SPACING`] otherwise;
//! full frames need no spacing. The end is said once each time it is reached.

use std::time::{Duration, Instant};

use everlit_api::agent::{LOG_CREDIT_BYTES, LOG_FRAME_BYTES_MAX, LogFrame};

use super::reader::Reader;
use super::{FromLogs, Link};
use crate::agent::limits::LOG_SPACING;

/// How long a reader that does not follow waits for a record's end.
const UNFINISHED_MAX: Duration = Duration::from_millis(100);

/// One stream.
pub(super) struct Stream {
    pub(super) id: u64,
    pub(super) link: Link,
    follow: bool,
    reader: Option<Reader>,
    under_way: u64,
    /// There may be more to read.
    pub(super) dirty: bool,
    end_said: bool,
    next_send: Option<Instant>,
    /// A record at the end was found unfinished before.
    unfinished: bool,
}

/// How it goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Sleep until there is news, or until then.
    Wait(Option<Instant>),
    /// Another frame can be sent at once.
    Again,
    /// It has ended.
    Closed(Option<String>),
    /// Its connection has.
    LinkDown,
}

impl Stream {
    pub(super) fn new(id: u64, link: Link, follow: bool, reader: Option<Reader>) -> Self {
        Self { id, link, follow, reader, under_way: 0, dirty: true, end_said: false, next_send: None, unfinished: false }
    }

    pub(super) fn located(&mut self, reader: Reader) {
        self.reader = Some(reader);
        self.dirty = true;
    }

    pub(super) fn credit(&mut self, bytes: u64) {
        self.under_way = self.under_way.saturating_sub(bytes);
    }

    pub(super) fn follows(&self) -> bool {
        self.follow
    }

    /// Sends at most one frame.
    pub(super) fn turn(&mut self, now: Instant, buffer: &mut Vec<u8>) -> Next {
        let Some(reader) = self.reader.as_mut().filter(|_| self.dirty) else { return Next::Wait(None) };
        if self.under_way + LOG_FRAME_BYTES_MAX as u64 > LOG_CREDIT_BYTES {
            return Next::Wait(None);
        }
        if let Some(due) = self.next_send.filter(|due| now < *due) {
            return Next::Wait(Some(due));
        }
        let chunk = match reader.read(buffer, self.unfinished) {
            Ok(chunk) => chunk,
            Err(error) => return Next::Closed(Some(format!("the log can not be read: {error}"))),
        };
        if chunk.unfinished && !self.follow && !self.unfinished {
            // Being written at this moment, most likely; should it be torn it is given out as it is.
            self.unfinished = true;
            self.next_send = Some(now + UNFINISHED_MAX);
            return Next::Wait(self.next_send);
        }
        let size = chunk.bytes.len();
        let caught_up = chunk.at_end;
        self.dirty = !caught_up;
        if size > 0 || chunk.skipped > 0 || (caught_up && !self.end_said) {
            let frame = LogFrame { stream: self.id, segment: chunk.segment, offset: chunk.offset, skipped: chunk.skipped, caught_up };
            self.under_way += size as u64;
            // Waits for room in the link.
            if self.link.logs.blocking_send(FromLogs::Frame(frame.encode(&chunk.bytes))).is_err() {
                return Next::LinkDown;
            }
        }
        self.end_said = caught_up;
        self.next_send = (size < LOG_FRAME_BYTES_MAX / 2).then(|| now + LOG_SPACING);
        match (caught_up, self.follow) {
            (true, false) => Next::Closed(None),
            (true, true) => Next::Wait(None),
            // The rest is there already: spacing is for trickles.
            (false, _) => {
                self.next_send = None;
                Next::Again
            }
        }
    }
}
