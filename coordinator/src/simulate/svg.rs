//! The same as a picture: ledgers by policy, goodput over the time between checkpoints, goodput over spares. Plain SVG without scripts.

use std::fmt::Write;

use super::chart::short;
use super::study::{Report, Row};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 22.0;
const PANEL: f64 = 220.0;
/// Characters of a policy's name that find room.
const NAME_CHARS: usize = 25;
/// One colour for each part of the ledger, in the order of `Account::parts`; told apart by colour-blind eyes too (Okabe and Ito).
const COLOURS: [&str; 9] = ["#009e73", "#e69f00", "#56b4e9", "#d55e00", "#cc79a7", "#f0e442", "#999999", "#0072b2", "#000000"];

/// The picture as one document.
pub fn svg(report: &Report) -> String {
    let mut body = String::new();
    let mut top = title(report, &mut body);
    top = ledgers(report, &mut body, top);
    if let Some(intervals) = &report.intervals {
        let points: Vec<(f64, f64)> = intervals.points.iter().map(|point| ((point.every_ms as f64).ln(), point.goodput)).collect();
        let marks = [(intervals.best_ms, "best"), (intervals.young_daly_ms, "Young/Daly")];
        let marks: Vec<(f64, String)> = marks.iter().map(|(ms, name)| ((*ms as f64).ln(), format!("{name} {}", short(*ms)))).collect();
        let ticks: Vec<(f64, String)> =
            intervals.points.iter().step_by(2).map(|point| ((point.every_ms as f64).ln(), short(point.every_ms))).collect();
        top = curve(&mut body, top, "goodput by time between checkpoints", &points, &ticks, &marks);
    }
    if let Some(spares) = &report.spares {
        let place = |spares: u32| f64::from(spares + 1).ln();
        let points: Vec<(f64, f64)> = spares.points.iter().map(|point| (place(point.spares), point.goodput)).collect();
        let ticks: Vec<(f64, String)> = spares.points.iter().map(|point| (place(point.spares), point.spares.to_string())).collect();
        let marks = [(place(spares.worth), format!("worth having: {}", spares.worth))];
        top = curve(&mut body, top, "goodput by spare nodes", &points, &ticks, &marks);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

fn title(report: &Report, body: &mut String) -> f64 {
    let scenario = &report.scenario;
    let days = scenario.duration_ms as f64 / super::DAY_MS as f64;
    let gpus = u64::from(scenario.nodes) * u64::from(scenario.gpus_per_node);
    let text = format!("{gpus} GPUs on {} nodes, {days:.1} days: goodput {:.2} %", scenario.nodes, report.expected.goodput * 100.0);
    label(body, 20.0, 30.0, "start", &format!("everlit simulate: {text}"));
    50.0
}

fn ledgers(report: &Report, body: &mut String, top: f64) -> f64 {
    let rows: Vec<&Row> = std::iter::once(&report.expected).chain(&report.policies).collect();
    let scale = WIDTH - LEFT - RIGHT;
    let mut y = top;
    for row in &rows {
        let short: String = row.name.chars().take(NAME_CHARS).collect();
        let more = if row.name.chars().count() > NAME_CHARS { "…" } else { "" };
        label(body, LEFT - 8.0, y + 15.0, "end", &format!("{short}{more}"));
        let total = row.ledger_ms.total().max(1) as f64;
        let mut x = LEFT;
        for ((name, ms), colour) in row.ledger_ms.parts().iter().zip(COLOURS) {
            let width = *ms as f64 / total * scale;
            if width > 0.0 {
                let share = *ms as f64 / total * 100.0;
                let _ = writeln!(
                    body,
                    "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{BAR}\" fill=\"{colour}\"><title>{name} {share:.2} %</title></rect>"
                );
            }
            x += width;
        }
        label(body, WIDTH - RIGHT + 8.0, y + 15.0, "start", &format!("{:.2} %", row.goodput * 100.0));
        y += BAR + 8.0;
    }
    let mut x = LEFT;
    for ((name, _), colour) in report.expected.ledger_ms.parts().iter().zip(COLOURS) {
        let _ = writeln!(body, "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>");
        let _ = writeln!(body, "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\">{}</text>", x + 13.0, y + 9.0, name.replace('_', " "));
        x += 17.0 + 6.2 * name.len() as f64;
    }
    y + 40.0
}

fn curve(body: &mut String, top: f64, name: &str, points: &[(f64, f64)], ticks: &[(f64, String)], marks: &[(f64, String)]) -> f64 {
    let bounds = |values: &mut dyn Iterator<Item = f64>| values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let (x_least, x_most) = bounds(&mut points.iter().map(|point| point.0));
    let (y_least, y_most) = bounds(&mut points.iter().map(|point| point.1));
    let (base, height) = (top + PANEL - 40.0, PANEL - 80.0);
    let x = |value: f64| LEFT + (value - x_least) / (x_most - x_least).max(1e-9) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| base - (value - y_least) / (y_most - y_least).max(1e-9) * height;
    label(body, 20.0, top + 12.0, "start", name);
    let _ = writeln!(body, "<path d=\"M{LEFT} {:.1}V{base:.1}H{:.1}\" fill=\"none\" stroke=\"#666666\"/>", top + 24.0, WIDTH - RIGHT);
    label(body, LEFT - 8.0, base + 4.0, "end", &format!("{:.2} %", y_least * 100.0));
    label(body, LEFT - 8.0, base - height + 4.0, "end", &format!("{:.2} %", y_most * 100.0));
    for (at, text) in ticks {
        label(body, x(*at), base + 18.0, "middle", text);
    }
    for (number, (at, text)) in marks.iter().enumerate() {
        let at = x(at.clamp(x_least, x_most));
        let _ = writeln!(body, "<path d=\"M{at:.1} {base:.1}V{:.1}\" stroke=\"#0072b2\" stroke-dasharray=\"4 3\"/>", top + 24.0);
        label(body, at + 4.0, top + 34.0 + 16.0 * number as f64, "start", text);
    }
    let line: Vec<String> = points.iter().map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value))).collect();
    let _ = writeln!(body, "<polyline points=\"{}\" fill=\"none\" stroke=\"#009e73\" stroke-width=\"2\"/>", line.join(" "));
    for (at, value) in points {
        let _ = writeln!(body, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"#009e73\"/>", x(*at), y(*value));
    }
    top + PANEL
}

fn label(body: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
}
