//! Looking: `ls`, `get`, `metrics`, `status`, and the table of nodes.

use std::collections::BTreeSet;

use clap::Args;
use everlit_api::client::{Client, ListRequest};
use everlit_api::status::{JobState, JobView, Ledger, MetricPoint, NodeView, Page, RankView, Summary};

use super::out::{age, or_dash, seconds, size};
use super::{Fail, Output, find, out};

/// `everlit ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Only these states, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = state)]
    state: Vec<JobState>,
    /// Only jobs of this name
    #[arg(long)]
    name: Option<String>,
    /// Only jobs with this label, like team=vision
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::submit::pair)]
    label: Vec<(String, String)>,
    /// Jobs at most
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
    /// All of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

/// `everlit metrics`.
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// The job's id, the beginning or end of it, its name, or `last`
    #[arg(value_name = "JOB")]
    job: String,
    /// Only points of this step and later ones
    #[arg(long, default_value_t = 0, value_name = "STEP")]
    since_step: u64,
}

/// Prints a time series; a column for every name that occurs.
pub(super) async fn metrics(client: &Client, args: &MetricsArgs, output: Output) -> Result<(), Fail> {
    let id = find::job(client, &args.job).await?;
    let page = client.metrics(id, args.since_step).await?;
    if output == Output::Json {
        return out::json(&page);
    }
    let names: BTreeSet<&str> = page.data.iter().flat_map(|point| point.metrics.keys().map(String::as_str)).collect();
    let row = |point: &MetricPoint| {
        let mut row =
            vec![point.time.to_string(), point.attempt.to_string(), point.step.to_string(), or_dash(point.samples), or_dash(point.loss)];
        row.extend(names.iter().map(|name| or_dash(point.metrics.get(*name))));
        row
    };
    let head: Vec<&str> = ["TIME", "ATTEMPT", "STEP", "SAMPLES", "LOSS"].into_iter().chain(names.iter().copied()).collect();
    out::table(&head, page.data.iter().map(row).collect())
}

/// A job's state as an argument.
pub(super) fn state(text: &str) -> Result<JobState, String> {
    JobState::from_name(text).ok_or_else(|| format!("known are {}", JobState::ALL.map(JobState::as_str).join(", ")))
}

/// Lists jobs.
pub(super) async fn ls(client: &Client, args: &LsArgs, output: Output) -> Result<(), Fail> {
    let mut list = ListRequest {
        limit: Some(if args.all { 500 } else { args.limit }),
        after: None,
        states: args.state.clone(),
        name: args.name.clone(),
        labels: args.label.clone(),
    };
    let mut page = client.jobs(&list).await?;
    while args.all && page.has_more && page.last_id.is_some() {
        list.after = page.last_id.clone();
        let next = client.jobs(&list).await?;
        page.data.extend(next.data);
        page = Page { last_id: next.last_id, has_more: next.has_more, ..page };
    }
    if output == Output::Json {
        return out::json(&page);
    }
    out::table(&["JOB", "NAME", "STATE", "RANKS", "ATTEMPT", "RESTARTS", "AGE", "REASON"], page.data.iter().map(row).collect())?;
    if page.has_more {
        eprintln!("there are more: use --all, or --limit up to 500");
    }
    Ok(())
}

fn row(job: &JobView) -> Vec<String> {
    vec![
        job.job_id.to_string(),
        or_dash(job.name.clone()),
        job.state.to_string(),
        job.world_size.to_string(),
        job.attempt.to_string(),
        job.restarts.to_string(),
        age(job.submitted_at),
        job.reason.clone().unwrap_or_default(),
    ]
}

/// Shows a job.
pub(super) async fn get(client: &Client, job: &str, output: Output) -> Result<(), Fail> {
    let id = find::job(client, job).await?;
    let summary = client.summary(id).await?;
    if output == Output::Json {
        let spec = client.job(id).await?.spec;
        let mut value = serde_json::to_value(&summary).map_err(|error| Fail::Refused(error.to_string()))?;
        value["spec"] = serde_json::to_value(spec).unwrap_or_default();
        return out::json(&value);
    }
    out::line(&summary_text(&summary))?;
    if !summary.ranks.is_empty() {
        out::table(&["RANK", "NODE", "PID", "STATE", "PHASE", "STEP", "HEARTBEAT", "EXIT"], summary.ranks.iter().map(rank_row).collect())?;
    }
    Ok(())
}

/// The summary's facts, one per line.
fn summary_text(job: &Summary) -> String {
    let mut lines = Vec::new();
    let mut add = |name: &str, value: String| lines.push(format!("{name:<12} {value}"));
    add("job", job.job_id.to_string());
    add("name", or_dash(job.name.clone()));
    add("state", job.state.to_string());
    if let Some(reason) = &job.reason {
        add("reason", reason.clone());
    }
    add("ranks", job.world_size.to_string());
    add("attempt", format!("{} ({} restarts, {} steps done again)", job.attempt, job.restarts, job.lost_steps));
    if let Some(step) = job.step {
        let share = job.progress.map_or(String::new(), |progress| format!(" ({:.1} %)", progress * 100.0));
        add("step", format!("{step} of {}{share}", or_dash(job.total_steps)));
    }
    if let Some(loss) = job.loss {
        add("loss", format!("{loss:.4}"));
    }
    if let Some(loss) = job.evaluation_loss {
        add("held-out", format!("{loss:.4}"));
    }
    if let Some(rate) = job.steps_per_second {
        let samples = job.samples_per_second.map_or(String::new(), |rate| format!(", {rate:.1} samples/s"));
        add("speed", format!("{rate:.2} steps/s{samples}"));
    }
    if let Some(eta) = job.eta_seconds {
        add("time left", seconds(eta));
    }
    if let Some(checkpoint) = &job.last_checkpoint {
        let verified = if checkpoint.verified { "verified" } else { "not verified yet" };
        add(
            "checkpoint",
            format!("step {}, {} ago, {verified}, {}", checkpoint.step, seconds(checkpoint.age_seconds), checkpoint.location),
        );
    }
    if let Some(goodput) = job.goodput {
        add("goodput", format!("{:.1} %", goodput * 100.0));
    }
    add("time", ledger_text(&job.ledger));
    add("submitted", job.submitted_at.to_string());
    if let Some(time) = job.started_at {
        add("started", time.to_string());
    }
    if let Some(time) = job.finished_at {
        add("finished", time.to_string());
    }
    lines.join("\n")
}

fn ledger_text(ledger: &Ledger) -> String {
    let parts = [
        ("queued", ledger.queued),
        ("starting", ledger.starting),
        ("restoring", ledger.restoring),
        ("training", ledger.training),
        ("repeated", ledger.repeated),
        ("checkpointing", ledger.checkpointing),
        ("undetected", ledger.undetected),
        ("backoff", ledger.backoff),
        ("stopping", ledger.stopping),
    ];
    let spent: Vec<String> =
        parts.iter().filter(|(_, time)| *time >= 0.05).map(|(name, time)| format!("{name} {}", seconds(*time))).collect();
    if spent.is_empty() { "-".into() } else { spent.join(", ") }
}

fn rank_row(rank: &RankView) -> Vec<String> {
    let name = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let word = |value: serde_json::Value| value.as_str().map(Into::into);
    let slow = rank.slow.map_or(String::new(), |part| format!(", slow: {}", part.name()));
    vec![
        rank.rank.to_string(),
        or_dash(rank.node.clone()),
        or_dash(rank.pid),
        name(word(serde_json::to_value(rank.state).unwrap_or_default())) + &slow,
        name(rank.phase.and_then(|phase| word(serde_json::to_value(phase).unwrap_or_default()))),
        or_dash(rank.step),
        name(rank.heartbeat_age_seconds.map(seconds)),
        name(rank.exit.as_ref().map(|exit| exit.message.clone().unwrap_or_else(|| exit.describe()))),
    ]
}

/// Shows what the coordinator does.
pub(super) async fn status(client: &Client, output: Output) -> Result<(), Fail> {
    let status = client.status().await?;
    if output == Output::Json {
        return out::json(&status);
    }
    let jobs: Vec<String> = status.jobs.iter().filter(|(_, count)| **count > 0).map(|(state, count)| format!("{count} {state}")).collect();
    let facts = [
        ("coordinator", format!("{} at {}, up {}", status.version, client.url(), seconds(status.uptime_seconds))),
        ("nodes", format!("{} ready, {} lost", status.nodes.ready, status.nodes.lost)),
        ("jobs", if jobs.is_empty() { "none".into() } else { jobs.join(", ") }),
        ("queue", status.queue_depth.to_string()),
        ("ranks", status.ranks.to_string()),
        ("gpus", format!("{} of {} used, {:.0} % busy", status.gpus.used, status.gpus.total, status.gpus.utilization * 100.0)),
        ("callers", status.auth.clone()),
    ];
    out::line(&facts.map(|(name, value)| format!("{name:<12} {value}")).join("\n"))
}

/// The table of nodes.
pub(super) fn nodes(nodes: &[NodeView]) -> Result<(), Fail> {
    let gpus_avoided = |node: &NodeView| match node.gpus_avoided.len() {
        0 => String::new(),
        count => format!(", {count} avoided"),
    };
    let row = |node: &NodeView| {
        let state = serde_json::to_value(node.state).unwrap_or_default();
        let cordoned = if node.cordoned { ", cordoned" } else { "" };
        let avoided = if node.avoided { ", avoided" } else { "" };
        vec![
            node.node.to_string(),
            format!("{}{cordoned}{avoided}", state.as_str().unwrap_or_default()),
            format!("{} of {}", node.ranks, node.capacity.slots),
            format!("{:.1} of {:.1}", node.load.cpus, node.capacity.cpus),
            format!("{} of {}", size(node.load.memory), size(node.capacity.memory)),
            format!("{} of {}{}", node.gpus_granted.len(), node.capacity.gpus.len(), gpus_avoided(node)),
            size(node.load.disk_free),
            node.agent_version.clone(),
            node.report_age_seconds.map_or_else(|| "-".into(), seconds),
        ]
    };
    out::table(&["NODE", "STATE", "RANKS", "CPUS", "MEMORY", "GPUS", "DISK FREE", "AGENT", "REPORT"], nodes.iter().map(row).collect())
}
