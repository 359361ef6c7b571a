//! Writing for people and for programs: lines, tables, JSON, and short texts for times and sizes.
//!
//! Tables have borders on a terminal only; elsewhere they are plain columns that `awk` and `cut` can read.

use std::io::{IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use everlit_api::time::Timestamp;
use serde::Serialize;

use super::Fail;

/// Writes bytes to stdout.
pub(super) fn bytes(bytes: &[u8]) -> Result<(), Fail> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}

/// Writes a line to stdout.
pub(super) fn line(text: &str) -> Result<(), Fail> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes a value as one JSON document.
pub(super) fn json<T: Serialize>(value: &T) -> Result<(), Fail> {
    let text = if std::io::stdout().is_terminal() { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    line(&text.map_err(|error| Fail::Refused(error.to_string()))?)
}

/// Writes rows under a head.
pub(super) fn table(head: &[&str], rows: Vec<Vec<String>>) -> Result<(), Fail> {
    line(&table_text(head, rows, std::io::stdout().is_terminal()))
}

fn table_text(head: &[&str], rows: Vec<Vec<String>>, terminal: bool) -> String {
    let mut table = Table::new();
    if terminal {
        table.load_style(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    }
    table.set_header(head.iter().map(|text| (*text).to_string()).collect::<Vec<_>>());
    // A name or reason may hold anything: no escape sequence reaches a terminal.
    let clean = |cell: String| cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    for row in rows {
        table.add_row(row.into_iter().map(clean).collect::<Vec<_>>());
    }
    table.to_string().lines().map(|line| if terminal { line } else { line.trim() }).collect::<Vec<_>>().join("\n")
}

/// Like `3m` or `2d`.
pub(super) fn age(since: Timestamp) -> String {
    seconds(Timestamp::now().since_ms(since) as f64 / 1000.0)
}

/// Like `12.3s`, `4m05s`, `3h20m`, `2d04h`.
pub(super) fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    let whole = seconds as u64;
    match whole {
        0..10 => format!("{seconds:.1}s"),
        10..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// Like `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// The text, or a dash.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn tables_are_plain_columns_without_a_terminal() {
        let rows = || vec![vec!["a".into(), "running".into()], vec!["longer".into(), "x\x1b[31m".into()]];
        expect![[r#"
            NAME    STATE
            a       running
            longer  x [31m"#]]
        .assert_eq(&table_text(&["NAME", "STATE"], rows(), false));
        assert!(table_text(&["NAME", "STATE"], rows(), true).contains('─'));
    }

    #[test]
    fn times_and_sizes_are_short() {
        let texts = [0.25, 12.9, 245.0, 12_000.0, 190_000.0, f64::NAN].map(seconds);
        assert_eq!(texts, ["0.2s", "12s", "4m05s", "3h20m", "2d04h", "-"]);
        assert_eq!([0, 1023, 1536, 1 << 31].map(size), ["0 B", "1023 B", "1.5 KiB", "2.0 GiB"]);
    }
}
