//! Reads server-sent events from bytes as they come, whatever way they are cut.
//!
//! Bounded: a line or an event that grows past [`EVENT_BYTES_MAX`] is an error, not memory.

/// Bytes of one event at most: a line of 64 KiB may take six times that when escaped.
pub(super) const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RawEvent {
    /// To go on from.
    pub(super) id: Option<String>,
    /// Its name; `message` when none was given.
    pub(super) name: String,
    /// Its data; several lines are joined by `\n`.
    pub(super) data: String,
}

/// An event that is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLarge;

/// Bytes in, events out.
#[derive(Debug, Default)]
pub(super) struct Parser {
    line: Vec<u8>,
    event: RawEvent,
    has_data: bool,
    /// Milliseconds to wait before a reconnect, once the server has said so.
    pub(super) retry_ms: Option<u64>,
}

impl Parser {
    /// Takes bytes and gives the events that they complete to `events`.
    pub(super) fn feed(&mut self, mut bytes: &[u8], events: &mut impl Extend<RawEvent>) -> Result<(), TooLarge> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let mut line = std::mem::take(&mut self.line);
            line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let text = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(&line));
            events.extend(self.on_line(&text));
            if self.event.data.len() > EVENT_BYTES_MAX {
                return Err(TooLarge);
            }
            line.clear();
            self.line = line;
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() > EVENT_BYTES_MAX { Err(TooLarge) } else { Ok(()) }
    }

    /// Forgets what came of an event so far: its connection is gone.
    pub(super) fn forget(&mut self) {
        *self = Self { retry_ms: self.retry_ms, ..Self::default() };
    }

    fn on_line(&mut self, line: &str) -> Option<RawEvent> {
        if line.is_empty() {
            let mut event = std::mem::take(&mut self.event);
            if event.name.is_empty() {
                event.name = "message".into();
            }
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" if !value.contains('\0') => self.event.id = Some(value.into()),
            "event" => self.event.name = value.into(),
            "data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
                self.has_data = true;
            }
            "retry" => self.retry_ms = value.parse().ok().or(self.retry_ms),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(chunks: &[&[u8]]) -> Vec<RawEvent> {
        let (mut parser, mut events) = (Parser::default(), Vec::new());
        for chunk in chunks {
            parser.feed(chunk, &mut events).expect("small");
        }
        events
    }

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let text = "retry: 3000\n\n: ping\n\nid: 1-2-3\nevent: log\ndata: {\"line\":\"caf\u{e9}\"}\n\ndata: a\r\ndata: b\r\n\r\nid: 4\nevent: end\ndata\n\n".as_bytes();
        let whole = read(&[text]);
        let event = |id: Option<&str>, name: &str, data: &str| RawEvent { id: id.map(Into::into), name: name.into(), data: data.into() };
        let expected =
            vec![event(Some("1-2-3"), "log", "{\"line\":\"café\"}"), event(None, "message", "a\nb"), event(Some("4"), "end", "")];
        assert_eq!(whole, expected);
        for cut in 0..text.len() {
            assert_eq!(read(&[&text[..cut], &text[cut..]]), expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = Parser::default();
        let mut events: Vec<RawEvent> = Vec::new();
        let fed = (0..100).try_for_each(|_| parser.feed(&[b'x'; 64 * 1024], &mut events));
        assert_eq!(fed, Err(TooLarge));
        let mut parser = Parser::default();
        let line = format!("data: {}\n", "x".repeat(64 * 1024));
        assert_eq!((0..100).try_for_each(|_| parser.feed(line.as_bytes(), &mut events)), Err(TooLarge));
    }
}
