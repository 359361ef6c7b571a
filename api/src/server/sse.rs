//! Server-sent events as bytes: frames are written by hand into big chunks, because a log may bring 100,000 lines a second.
//!
//! An id names the place *after* its event, in the log of each of the job's nodes, so `Last-Event-ID` goes on without a gap or a repeat. The trap is a resume inside a record:
//! the lines that were given out already are skipped by number, for the record is given again as a whole.

use std::fmt::Write as _;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, BytesMut};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::agent::log::{FLAG_DROPPED, FLAG_PARTIAL, Header, LogPlace, LogPosition, Stream};
use crate::control::{EventItem, LogItem};
use crate::problem::Problem;
use crate::status::JobState;
use crate::time::Timestamp;

/// A chunk is sent once it has grown past this.
const CHUNK_BYTES: usize = 64 * 1024;
/// Between pings; the contract allows 15 s.
const PING_EVERY: Duration = Duration::from_secs(10);

/// The place to go on from: `Last-Event-ID`, as a browser sends it when it reconnects.
pub(super) fn last_event_id(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(HeaderName::from_static("last-event-id"))?;
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned()).filter(|text| !text.is_empty())
}

/// Makes frames of items.
pub(super) trait Encode: Send + 'static {
    /// What comes in.
    type Item: Send + 'static;
    /// Writes the item's frames; true when it is the last.
    fn encode(&mut self, item: Self::Item, out: &mut BytesMut) -> bool;
}

/// The answer that gives out a receiver's items until the last.
pub(super) fn respond<E: Encode>(from: mpsc::Receiver<E::Item>, encoder: E) -> Response {
    let mut out = BytesMut::with_capacity(CHUNK_BYTES / 4);
    out.put_slice(b"retry: 3000\n\n");
    let frames = Frames { from, encoder, out, next_ping: Instant::now() + PING_EVERY, ended: false };
    let stream = futures_util::stream::unfold(frames, |mut frames| async move {
        let chunk = frames.next_chunk().await?;
        Some((Ok::<Bytes, std::convert::Infallible>(chunk), frames))
    });
    let headers = [
        (CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

struct Frames<E: Encode> {
    from: mpsc::Receiver<E::Item>,
    encoder: E,
    out: BytesMut,
    next_ping: Instant,
    ended: bool,
}

impl<E: Encode> Frames<E> {
    async fn next_chunk(&mut self) -> Option<Bytes> {
        if self.out.is_empty() {
            if self.ended {
                return None;
            }
            match timeout_at(self.next_ping, self.from.recv()).await {
                Ok(Some(item)) => self.ended = self.encoder.encode(item, &mut self.out),
                // Whoever fed this is gone without a word: close, and the reader comes back.
                Ok(None) => self.ended = true,
                Err(_) => {}
            }
        }
        while !self.ended && self.out.len() < CHUNK_BYTES {
            let Ok(item) = self.from.try_recv() else { break };
            self.ended = self.encoder.encode(item, &mut self.out);
        }
        let now = Instant::now();
        if now >= self.next_ping {
            self.out.put_slice(b": ping\n\n");
            self.next_ping = now + PING_EVERY;
        }
        let chunk = self.out.split().freeze();
        (!chunk.is_empty()).then_some(chunk)
    }
}

fn event(out: &mut BytesMut, id: &str, name: &str, data: &[u8]) {
    let fields = [b"id: ".as_slice(), id.as_bytes(), b"\nevent: ", name.as_bytes(), b"\ndata: ", data, b"\n\n"];
    for field in fields {
        out.put_slice(field);
    }
}

fn end(out: &mut BytesMut, id: &str, state: JobState) {
    event(out, id, "end", format!("{{\"state\":\"{state}\"}}").as_bytes());
}

/// A log as events.
pub(super) struct LogEvents {
    /// Resumed from here: what was given out of those records is skipped.
    after: LogPlace,
    /// After the last thing given out.
    last: LogPlace,
    time: TimeText,
}

impl LogEvents {
    /// Goes on after a place, or begins.
    pub(super) fn new(after: Option<LogPlace>) -> Self {
        let after = after.unwrap_or_default();
        Self { last: after.clone(), after, time: TimeText::default() }
    }

    fn record(&mut self, source: usize, header: &Header, data: &[u8], at: LogPosition, next: LogPosition, out: &mut BytesMut) {
        let skip = lines_to_skip(self.after.of(source), at);
        let stream = if header.stream == Stream::Stdout { "stdout" } else { "stderr" };
        let time = self.time.at(header.time_us);
        let goes_on = header.flags & FLAG_PARTIAL != 0 || header.is_torn(data);
        let mut lines = Lines::new(data, goes_on).zip(at.line + 1..).skip(skip as usize).peekable();
        while let Some((line, number)) = lines.next() {
            out.reserve(line.text.len() + 160);
            self.last.set(source, if lines.peek().is_some() { LogPosition { line: number, ..at } } else { next });
            // Writing to a BytesMut can not fail.
            let _ = write!(
                out,
                "id: {}\nevent: log\ndata: {{\"rank\":{},\"attempt\":{},\"stream\":\"{stream}\",\"time\":\"{time}\",\"line\":\"",
                self.last, header.rank, header.attempt
            );
            escape(&String::from_utf8_lossy(line.text), out);
            out.put_slice(if line.partial { b"\",\"partial\":true}\n\n" } else { b"\"}\n\n" });
        }
        self.last.set(source, next);
    }
}

impl Encode for LogEvents {
    type Item = LogItem;

    fn encode(&mut self, item: LogItem, out: &mut BytesMut) -> bool {
        match item {
            LogItem::Record { source, header, data, at, next } if header.flags & FLAG_DROPPED != 0 => {
                // A torn count is written again as a whole.
                let count = std::str::from_utf8(&data).ok().filter(|_| !header.is_torn(&data)).and_then(|text| text.parse::<u64>().ok());
                self.last.set(source, next);
                if let Some(bytes) = count.filter(|_| lines_to_skip(self.after.of(source), at) == 0) {
                    let gap = format!("{{\"bytes\":{bytes},\"rank\":{},\"attempt\":{}}}", header.rank, header.attempt);
                    event(out, &self.last.to_string(), "gap", gap.as_bytes());
                }
            }
            LogItem::Record { source, header, data, at, next } => self.record(source, &header, &data, at, next, out),
            LogItem::Gap { source, bytes, next } => {
                self.last.set(source, next);
                event(out, &self.last.to_string(), "gap", format!("{{\"bytes\":{bytes}}}").as_bytes());
            }
            LogItem::Passed { source, next } => self.last.set(source, next),
            LogItem::Missing { node, reason } => {
                let gap = serde_json::json!({ "bytes": 0, "node": node, "reason": reason });
                event(out, &self.last.to_string(), "gap", gap.to_string().as_bytes());
            }
            LogItem::End(state) => {
                end(out, &self.last.to_string(), state);
                return true;
            }
            LogItem::CaughtUp => {}
            LogItem::Failed(problem) => {
                failed(out, &self.last.to_string(), &problem);
                return true;
            }
        }
        false
    }
}

fn failed(out: &mut BytesMut, id: &str, problem: &Problem) {
    event(out, id, "error", &serde_json::to_vec(problem).unwrap_or_default());
}

/// Lines of what came from `at` that the reader has already.
fn lines_to_skip(after: LogPosition, at: LogPosition) -> u32 {
    let given = if (after.segment, after.offset) == (at.segment, at.offset) { after.line } else { 0 };
    given.saturating_sub(at.line)
}

/// One line of a record.
pub(super) struct Line<'a> {
    /// Without its end.
    pub(super) text: &'a [u8],
    /// It goes on in the next record of the same stream.
    pub(super) partial: bool,
}

/// The lines of a record; a `\r` before the `\n` belongs to the end.
pub(super) struct Lines<'a> {
    rest: &'a [u8],
    partial: bool,
}

impl<'a> Lines<'a> {
    /// `partial`: what follows the last `\n` goes on in another record.
    pub(super) fn new(data: &'a [u8], partial: bool) -> Self {
        Self { rest: data, partial }
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') else {
            let text = std::mem::take(&mut self.rest);
            return Some(Line { text, partial: self.partial });
        };
        let (line, rest) = self.rest.split_at(end + 1);
        self.rest = rest;
        let text = &line[..end];
        Some(Line { text: text.strip_suffix(b"\r").unwrap_or(text), partial: false })
    }
}

/// Writes text as the inside of a JSON string.
pub(super) fn escape(text: &str, out: &mut BytesMut) {
    let bytes = text.as_bytes();
    let mut from = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[from..at]);
        from = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\t' => out.extend_from_slice(b"\\t"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\n' => out.extend_from_slice(b"\\n"),
            _ => {
                // Writing to a BytesMut can not fail.
                let _ = write!(out, "\\u{byte:04x}");
            }
        }
    }
    out.extend_from_slice(&bytes[from..]);
}

/// The text of the last time that was asked for: many lines share one.
#[derive(Default)]
struct TimeText {
    ms: u64,
    text: String,
}

impl TimeText {
    fn at(&mut self, time_us: u64) -> &str {
        let ms = time_us / 1000;
        if self.text.is_empty() || self.ms != ms {
            self.ms = ms;
            self.text = Timestamp(ms).to_string();
        }
        &self.text
    }
}

/// What happened, as events.
pub(super) struct Happenings {
    last: String,
}

impl Happenings {
    /// Goes on after an id, or begins.
    pub(super) fn new(after: Option<u64>) -> Self {
        Self { last: after.unwrap_or(0).to_string() }
    }
}

impl Encode for Happenings {
    type Item = EventItem;

    fn encode(&mut self, item: EventItem, out: &mut BytesMut) -> bool {
        match item {
            EventItem::Event(view) => {
                event(out, &view.id, &view.event, &serde_json::to_vec(&view).unwrap_or_default());
                self.last = view.id;
                false
            }
            EventItem::End(state) => {
                end(out, &self.last, state);
                true
            }
        }
    }
}
