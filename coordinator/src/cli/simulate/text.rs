//! The answer for people: a few facts, the ledger, tables of what was compared, charts.

use crate::cli::{Fail, out};
use crate::simulate::kinds::failures_per_day;
use crate::simulate::scenario::Every;
use crate::simulate::study::{Report, Row};
use crate::simulate::{DAY_MS, HOUR_MS, chart};

/// Writes it.
pub(super) fn print(report: &Report, measured: &[String]) -> Result<(), Fail> {
    out::line(&facts(report, measured))?;
    out::line("")?;
    out::table(&["PART", "HOURS", "SHARE"], ledger(report))?;
    out::line("")?;
    out::table(&["POLICY", "GOODPUT", "WORST", "BEST", "IN PLACE", "SNAPSHOT", "CHECKPOINT", "NODE WAITS", "GIVEN UP"], policies(report))?;
    if let Some(spares) = &report.spares {
        out::line("")?;
        let row = |point: &crate::simulate::study::SparePoint| {
            let mark = if point.spares == spares.worth { "worth having" } else { "" };
            vec![point.spares.to_string(), percent(point.goodput), percent(point.per_owned_node), mark.into()]
        };
        out::table(&["SPARES", "GOODPUT", "PER NODE OWNED", ""], spares.points.iter().map(row).collect())?;
    }
    out::line("")?;
    out::table(
        &["DECIDES", "MESSAGES/S", "KB/S", "BUSY", "PER RESTART", "SEEN LATER", "STOP AFTER", "START AFTER", "GOODPUT"],
        decisions(report),
    )?;
    out::line("")?;
    out::line(chart(report).trim_end())
}

fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

fn time(ms: u64) -> String {
    out::seconds(ms as f64 / 1_000.0)
}

fn facts(report: &Report, measured: &[String]) -> String {
    let (scenario, expected) = (&report.scenario, &report.expected);
    let mut lines = Vec::new();
    let mut add = |name: &str, value: String| lines.push(format!("{name:<12} {value}"));
    let gpus = u64::from(scenario.nodes) * u64::from(scenario.gpus_per_node);
    let days = scenario.duration_ms as f64 / DAY_MS as f64;
    add("cluster", format!("{gpus} GPUs on {} nodes, {} workers, {days:.1} days", scenario.nodes, scenario.workers));
    let per_day = failures_per_day(&scenario.kinds, scenario.nodes);
    let each = report.mean_between_failures_ms.map_or("nothing fails".into(), |ms| format!("{per_day:.2} a day, one each {}", time(ms)));
    let came = expected.counts.failures as f64 / report.runs.len() as f64;
    let planned = expected.counts.planned as f64 / report.runs.len() as f64;
    add("failures", format!("{each}; {came:.0} came in a run, and {planned:.0} planned stops"));
    for line in measured {
        add("measured", line.clone());
    }
    let every = match scenario.policy.every {
        Every::Auto => "auto".into(),
        Every::Ms(ms) => time(ms),
    };
    let (recovery, spares) = (scenario.policy.recovery.as_str(), scenario.policy.spares);
    add("policy", format!("{recovery}, checkpoint each {every}, {spares} spare nodes, {} decisions", scenario.control.decisions.as_str()));
    let range = format!("{} to {}", percent(expected.goodput_min), percent(expected.goodput_max));
    add("goodput", format!("{} expected; {} runs: {range}", percent(expected.goodput), report.runs.len()));
    if let Some(gave_up) = &expected.first_given_up {
        add("given up", format!("in {} of the runs, first after {}: {}", expected.gave_up, time(gave_up.at_ms), gave_up.reason));
    }
    if let Some(intervals) = &report.intervals {
        let span = format!("{} to {} lose less than 0.1 % more", time(intervals.as_good_from_ms), time(intervals.as_good_to_ms));
        add("interval", format!("best {}; {span}; Young/Daly {}", time(intervals.best_ms), time(intervals.young_daly_ms)));
    }
    if let Some(spares) = &report.spares {
        add("spares", format!("worth having {}; {:.1} nodes are in repair on average", spares.worth, spares.mean_in_repair));
    }
    add("engine", format!("{} events, {} ranks in the first run", report.engine.events, report.engine.ranks));
    lines.join("\n")
}

fn ledger(report: &Report) -> Vec<Vec<String>> {
    let account = &report.expected.ledger_ms;
    let runs = report.runs.len() as f64;
    let row = |name: &str, ms: u64| {
        vec![
            name.replace('_', " "),
            format!("{:.2}", ms as f64 / runs / HOUR_MS as f64),
            percent(ms as f64 / account.total().max(1) as f64),
        ]
    };
    let mut rows: Vec<Vec<String>> = account.parts().iter().filter(|(_, ms)| *ms > 0).map(|(name, ms)| row(name, *ms)).collect();
    rows.push(row("all", account.total()));
    rows
}

fn policies(report: &Report) -> Vec<Vec<String>> {
    let runs = report.runs.len() as f64;
    let per_run = |count: u64| format!("{:.0}", count as f64 / runs);
    let row = |row: &Row| {
        vec![
            row.name.clone(),
            percent(row.goodput),
            percent(row.goodput_min),
            percent(row.goodput_max),
            per_run(row.counts.in_place),
            per_run(row.counts.from_snapshot),
            per_run(row.counts.from_checkpoint + row.counts.from_nothing),
            per_run(row.counts.waits),
            row.gave_up.to_string(),
        ]
    };
    std::iter::once(&report.expected).chain(&report.policies).map(row).collect()
}

fn decisions(report: &Report) -> Vec<Vec<String>> {
    let ms = |value: f64| if value < 10_000.0 { format!("{value:.0} ms") } else { format!("{:.1} s", value / 1_000.0) };
    let row = |decided: &crate::simulate::study::Decided| {
        let load = &decided.load;
        vec![
            decided.decisions.as_str().into(),
            format!("{:.0}", load.messages_per_second),
            format!("{:.0}", load.bytes_per_second / 1_000.0),
            format!("{:.1} %", load.coordinator_busy * 100.0),
            format!("{:.0}", load.messages_per_restart),
            ms(load.seen_later_ms),
            ms(load.stop_ms),
            ms(load.start_ms),
            percent(decided.goodput),
        ]
    };
    report.decisions.iter().map(row).collect()
}
