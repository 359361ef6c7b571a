//! The lines that a shim writes into `state` and says to its agents: one JSON object each, `started`, `output` or `exit`.
//!
//! Written by hand because the shim carries no JSON library; read by the agent with one. The file is append-only: after kill -9 anywhere a
//! reader sees whole lines, and at most one torn line at the end, which it ignores.

use std::fmt::Write;

use super::TAIL_LINES_MAX;

/// A rank's process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin {
    /// The shim's process id, which is also the session of the rank and of what it leaves behind.
    pub shim: i32,
    /// The rank's process id, which is also its process group.
    pub pid: i32,
    /// The rank's start time in clock ticks since boot: with the pid, which process it is.
    pub ticks: u64,
    /// Wall time in milliseconds since 1970.
    pub at_ms: u64,
}

/// How it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct End {
    /// Exit code.
    pub code: Option<i32>,
    /// Signal number.
    pub signal: Option<i32>,
    /// Why the program could not be started.
    pub error: Option<String>,
    /// Wall time in milliseconds since 1970.
    pub at_ms: u64,
}

/// `{"started":…}`.
pub fn begin_line(begin: &Begin) -> String {
    let Begin { shim, pid, ticks, at_ms } = begin;
    format!("{{\"started\":{{\"protocol\":{},\"shim\":{shim},\"pid\":{pid},\"ticks\":{ticks},\"at_ms\":{at_ms}}}}}\n", super::PROTOCOL)
}

/// `{"output":…}`: there was output; in the file once, to an agent at most once a second.
pub fn output_line(at_ms: u64) -> String {
    format!("{{\"output\":{{\"at_ms\":{at_ms}}}}}\n")
}

/// `{"exit":…}` with the last lines of `tail`.
pub fn end_line(end: &End, tail: &[u8]) -> String {
    let mut out = String::from("{\"exit\":{");
    // Writing to a string does not fail.
    if let Some(code) = end.code {
        let _ = write!(out, "\"code\":{code},");
    }
    if let Some(signal) = end.signal {
        let _ = write!(out, "\"signal\":{signal},");
    }
    if let Some(error) = &end.error {
        out.push_str("\"error\":");
        quote(&mut out, error);
        out.push(',');
    }
    let _ = write!(out, "\"at_ms\":{},\"tail\":[", end.at_ms);
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    for (index, line) in lines[lines.len().saturating_sub(TAIL_LINES_MAX)..].iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        quote(&mut out, line);
    }
    out.push_str("]}}\n");
    out
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json_whatever_the_output_was() {
        let end = End { code: None, signal: Some(9), error: Some("no \"x\"".into()), at_ms: 5 };
        let line = end_line(&end, b"a \\ \"b\"\n\n\x1b[31mred\x00\xff\ttab\r\nlast");
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        let tail = serde_json::json!(["a \\ \"b\"", "\u{1b}[31mred\0\u{fffd}\ttab", "last"]);
        assert_eq!(value, serde_json::json!({"exit": {"signal": 9, "error": "no \"x\"", "at_ms": 5, "tail": tail}}));
        let begin = Begin { shim: 1, pid: 2, ticks: 3, at_ms: 4 };
        let value: serde_json::Value = serde_json::from_str(&begin_line(&begin)).unwrap();
        assert_eq!(value["started"]["ticks"], 3);
        assert!(serde_json::from_str::<serde_json::Value>(&output_line(1)).is_ok());
    }

    #[test]
    fn only_the_last_lines_are_told() {
        let output: String = (0..1000).map(|n| format!("line {n}\n")).collect();
        let line = end_line(&End::default(), output.as_bytes());
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        let tail = value["exit"]["tail"].as_array().unwrap();
        assert_eq!((tail.len(), tail[0].as_str(), tail[199].as_str()), (200, Some("line 800"), Some("line 999")));
    }
}
