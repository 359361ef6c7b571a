//! What a job reserves, when a rank counts as silent, what follows a failure, and how progress is read from output.
//!
//! Ranges are wide on purpose: they refuse what can not be meant, not what is unusual.

use std::collections::BTreeMap;

use serde_json::Value;

use super::DAY;
use super::reader::Reader;
use super::values::{self, boolean, choice, duration, integer, number, size, text};
use crate::job::{Backoff, FailureAction, HeartbeatPolicy, LogAction, LogMetric, LogPolicy, Resources, RestartPolicy, RestartScope};
use crate::rank::Cause;
use crate::time::Millis;

const CPUS_MAX: f64 = 65_536.0;
const GPUS_MAX: u64 = 1024;
const RESTARTS_MAX: u64 = 1_000_000;
const SPARES_MAX: u64 = 64;
const LOG_METRICS_MAX: usize = 16;
const LOG_POLICIES_MAX: usize = 16;
const PATTERN_BYTES_MAX: usize = 1024;
/// Compiled bytes of one pattern at most.
const PATTERN_SIZE_MAX: usize = 1 << 20;
const SECOND: Millis = Millis::secs(1);
const MONTH: Millis = Millis::secs(30 * 86_400);

pub(super) fn resources(fields: &mut Reader<'_, '_>) -> Resources {
    let gpu_memory = fields.read_or("gpu_memory", 0, size);
    if fields.get("gpus").is_some_and(|v| v.as_f64().is_some_and(|n| n > 0.0 && n.fract() != 0.0)) {
        fields.refuse("gpus", "fractions of a GPU are not built: give gpu_memory, the part of a GPU's memory that a rank takes".into());
        return Resources { cpus: cpus(fields), memory: fields.read_or("memory", 0, size), gpus: 0, gpu_memory };
    }
    Resources {
        cpus: cpus(fields),
        memory: fields.read_or("memory", 0, size),
        gpus: fields.read_or("gpus", 0, |v| integer(v, 0, GPUS_MAX)) as u32,
        gpu_memory,
    }
}

fn cpus(fields: &mut Reader<'_, '_>) -> f64 {
    fields.read_or("cpus", 0.0, |v| number(v, 0.0, CPUS_MAX))
}

/// `in_place`: the job is the built-in program in training, with ranks that hold each other's state; `is_command`: another program.
pub(super) fn restart(fields: &mut Reader<'_, '_>, in_place: bool, is_command: bool) -> RestartPolicy {
    let defaults = RestartPolicy::default();
    let needs = "needs the built-in training program with a world_size of at least 2";
    if !in_place && fields.get("spares").and_then(Value::as_u64).is_some_and(|spares| spares > 0) {
        fields.fault("spares", format!("{needs}: leave it out or set it to 0"));
    }
    if !is_command && fields.get("scope").and_then(Value::as_str) == Some("rank") {
        let why = "rank needs a command whose ranks do not need each other; those of the built-in program do: use \"auto\" or \"gang\"";
        fields.fault("scope", why.into());
    }
    if !in_place && fields.get("scope").and_then(Value::as_str) == Some("in_place") {
        fields.fault("scope", format!("in_place {needs}: use \"auto\" or \"gang\""));
    }
    RestartPolicy {
        max_restarts: fields.read_or("max_restarts", u64::from(defaults.max_restarts), |v| integer(v, 0, RESTARTS_MAX)) as u32,
        max_start_failures: fields.read_or("max_start_failures", u64::from(defaults.max_start_failures), |v| integer(v, 1, RESTARTS_MAX))
            as u32,
        backoff: fields.object("backoff", backoff),
        scope: scope(fields),
        spares: fields.read_or("spares", 0, |v| integer(v, 0, SPARES_MAX)) as u32,
        heal_after: fields.read_or("heal_after", defaults.heal_after, |v| duration(v, SECOND, MONTH)),
        no_retry_exit_codes: fields
            .list("no_retry_exit_codes", 256, |v| integer(v, 0, 255).map(|code| code as i32))
            .unwrap_or(defaults.no_retry_exit_codes),
        on: fields.object("on", actions),
    }
}

fn actions(fields: &mut Reader<'_, '_>) -> BTreeMap<Cause, FailureAction> {
    let ended = [
        ("exit", Cause::Exit),
        ("signal", Cause::Signal),
        ("out_of_memory", Cause::OutOfMemory),
        ("infrastructure", Cause::Infrastructure),
        ("straggler", Cause::Straggler),
        ("gpu", Cause::Gpu),
    ];
    let alive = [("silent", Cause::Silent), ("stuck", Cause::Stuck), ("idle", Cause::Idle), ("no_start", Cause::NoStart)];
    let choices = [("restart", FailureAction::Restart), ("fail", FailureAction::Fail), ("alert", FailureAction::Alert)];
    let mut on = BTreeMap::new();
    for (name, cause) in ended {
        // What has ended can not be left as it is.
        on.extend(fields.read(name, |v| choice(v, &choices[..2])).map(|action| (cause, action)));
    }
    for (name, cause) in alive {
        on.extend(fields.read(name, |v| choice(v, &choices)).map(|action| (cause, action)));
    }
    on
}

fn scope(fields: &mut Reader<'_, '_>) -> RestartScope {
    let scopes =
        [("auto", RestartScope::Auto), ("gang", RestartScope::Gang), ("rank", RestartScope::Rank), ("in_place", RestartScope::InPlace)];
    fields.read_or("scope", RestartScope::Auto, |v| choice(v, &scopes))
}

fn backoff(fields: &mut Reader<'_, '_>) -> Backoff {
    let defaults = Backoff::default();
    let initial = fields.read("initial", |v| duration(v, Millis(0), DAY));
    let max = fields.read("max", |v| duration(v, Millis(0), DAY));
    let backoff = Backoff {
        initial: initial.unwrap_or(defaults.initial),
        factor: fields.read_or("factor", defaults.factor, |v| number(v, 1.0, 100.0)),
        max: max.unwrap_or(defaults.max),
        jitter: fields.read_or("jitter", defaults.jitter, |v| number(v, 0.0, 1.0)),
    };
    if backoff.initial > backoff.max {
        let (at, other, name) = if initial.is_some() { ("initial", backoff.max, "max") } else { ("max", backoff.initial, "initial") };
        let word = if at == "initial" { "longer" } else { "shorter" };
        fields.fault(at, format!("is {word} than restart.backoff.{name} ({other})"));
    }
    backoff
}

pub(super) fn heartbeat(fields: &mut Reader<'_, '_>) -> HeartbeatPolicy {
    let defaults = HeartbeatPolicy::default();
    HeartbeatPolicy {
        timeout: fields.read_or("timeout", defaults.timeout, |v| duration(v, SECOND, DAY)),
        startup_timeout: fields.read_or("startup_timeout", defaults.startup_timeout, |v| duration(v, SECOND, DAY)),
        idle_timeout: fields.read("idle_timeout", |v| duration(v, SECOND, MONTH)),
        progress_timeout: fields.read("progress_timeout", |v| duration(v, SECOND, MONTH)),
        required: fields.read_or("required", defaults.required, boolean),
    }
}

pub(super) fn log_metrics(top: &mut Reader<'_, '_>) -> Vec<LogMetric> {
    let metrics = top.objects("log_metrics", LOG_METRICS_MAX, |fields| {
        for needed in ["pattern", "field"] {
            if fields.get(needed).is_none() {
                fields.fault(needed, "must be given".into());
            }
        }
        let pattern = fields.read("pattern", pattern);
        let field = fields.read("field", metric_name);
        Some(LogMetric { pattern: pattern?, field: field? })
    });
    metrics.unwrap_or_default()
}

fn pattern(value: &Value) -> Result<String, String> {
    let text = text(value, PATTERN_BYTES_MAX)?;
    let regex = regex::RegexBuilder::new(text).size_limit(PATTERN_SIZE_MAX).build().map_err(not_a_pattern)?;
    if regex.captures_len() < 2 {
        return Err("must have a group that holds the number, like `loss=([0-9.]+)`".into());
    }
    Ok(text.into())
}

fn not_a_pattern(bad: regex::Error) -> String {
    let last = bad.to_string().lines().last().unwrap_or_default().trim().to_string();
    format!("is not a regular expression: {}", last.strip_prefix("error: ").unwrap_or(&last))
}

pub(super) fn log_policies(top: &mut Reader<'_, '_>) -> Vec<LogPolicy> {
    let policies = top.objects("log_policies", LOG_POLICIES_MAX, |fields| {
        for needed in ["pattern", "action"] {
            if fields.get(needed).is_none() {
                fields.fault(needed, "must be given".into());
            }
        }
        let name = fields.read("name", values::name);
        let pattern = fields.read("pattern", policy_pattern);
        let actions = [("exclude_node", LogAction::ExcludeNode), ("cancel_retries", LogAction::CancelRetries)];
        let action = fields.read("action", |v| choice(v, &actions));
        Some(LogPolicy { name, pattern: pattern?, action: action? })
    });
    policies.unwrap_or_default()
}

fn policy_pattern(value: &Value) -> Result<String, String> {
    let pattern = text(value, PATTERN_BYTES_MAX)?;
    let regex = LogPolicy::compile(pattern).map_err(not_a_pattern)?;
    if regex.is_match("") {
        return Err("matches an empty line, so it would match any output: write what the line must hold".into());
    }
    Ok(pattern.into())
}

fn metric_name(value: &Value) -> Result<String, String> {
    let text = text(value, 64)?;
    let allowed = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/'));
    if allowed { Ok(text.into()) } else { Err("must be 1 to 64 ASCII letters, digits, `.`, `_`, `-` and `/`".into()) }
}
