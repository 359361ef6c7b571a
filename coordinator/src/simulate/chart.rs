//! Bars for a terminal: where the time goes by policy, and goodput over the time between checkpoints.

use std::fmt::Write;

use super::account::Account;
use super::study::{Report, Row};

/// Columns of a bar.
const WIDTH: usize = 60;
/// A letter for each part of the ledger but training, in the order of `Account::parts`.
const LETTERS: [char; 9] = ['█', 'r', 'c', 'u', 's', 'b', 'q', 'i', 'x'];

/// The charts as text; every line ends with a line feed.
pub fn chart(report: &Report) -> String {
    let mut text = String::from("time lost by policy, of the worst policy's loss\n");
    let rows: Vec<&Row> = std::iter::once(&report.expected).chain(&report.policies).collect();
    let lost = |account: &Account| 1.0 - account.goodput();
    let most = rows.iter().map(|row| lost(&row.ledger_ms)).fold(f64::MIN_POSITIVE, f64::max);
    let name_width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    for row in &rows {
        let bar = lost_bar(&row.ledger_ms, most);
        let _ = writeln!(text, "  {:<name_width$}  {bar:<WIDTH$}  {:.2} % lost", row.name, lost(&row.ledger_ms) * 100.0);
    }
    text.push_str("  r repeated, c checkpointing, u undetected, s restoring, b backoff, q queued, i starting, x given up\n");
    if let Some(intervals) = &report.intervals {
        let goodputs = || intervals.points.iter().map(|point| point.goodput);
        let (least, most) = (goodputs().fold(f64::INFINITY, f64::min), goodputs().fold(0.0, f64::max));
        let _ = writeln!(text, "goodput by time between checkpoints, from {:.2} % to {:.2} %", least * 100.0, most * 100.0);
        for point in &intervals.points {
            let share = if most > least { (point.goodput - least) / (most - least) } else { 1.0 };
            let bar = "█".repeat(1 + (share * (WIDTH - 1) as f64).round() as usize);
            let mark = if point.every_ms == intervals.best_ms { "  best" } else { "" };
            let _ = writeln!(text, "  {:>8}  {bar:<WIDTH$}  {:.2} %{mark}", short(point.every_ms), point.goodput * 100.0);
        }
    }
    text
}

fn lost_bar(account: &Account, most: f64) -> String {
    let total = account.total().max(1) as f64;
    let mut bar = String::new();
    let mut sum = 0.0;
    for ((_, ms), letter) in account.parts().iter().zip(LETTERS).skip(1) {
        sum += *ms as f64 / total / most * WIDTH as f64;
        while bar.chars().count() < sum.round() as usize {
            bar.push(letter);
        }
    }
    bar
}

/// A time like `90s`, `12m` or `3.5h`.
pub(super) fn short(ms: u64) -> String {
    let seconds = ms as f64 / 1_000.0;
    match seconds {
        s if s < 10.0 => format!("{s:.1}s"),
        s if s < 120.0 => format!("{s:.0}s"),
        s if s < 7_200.0 => format!("{:.1}m", s / 60.0),
        s => format!("{:.1}h", s / 3_600.0),
    }
}
