//! What a rank's process is started with: command, environment variables, secrets.
//!
//! Names that everlit sets itself (CONTRACT section 2) are refused here, so that no rank ever believes a wrong rank or port.

use std::collections::BTreeMap;

use serde_json::Value;

use super::reader::Reader;
use super::values::{argument, text, what};
use super::{ARG_BYTES_MAX, ARGS_MAX};
use crate::environment::RESERVED;

/// Variables of a job at most.
const VARIABLES_MAX: usize = 1024;
/// What answers show in place of a secret.
const HIDDEN: &str = "***";

/// Program and arguments; `None` when none was given.
pub(super) fn command(top: &mut Reader<'_, '_>) -> Option<Vec<String>> {
    let value = top.get("command")?;
    if value.is_string() {
        top.fault("command", "must be a list like [\"python\", \"train.py\"]; for a shell's line write [\"sh\", \"-c\", \"...\"]".into());
        return Some(Vec::new());
    }
    let command = top.list("command", ARGS_MAX, argument).unwrap_or_default();
    let first = value.get(0).and_then(Value::as_str);
    if value.as_array().is_some_and(Vec::is_empty) {
        top.fault("command", "is empty: name a program, or leave it out to run the built-in one".into());
    } else if first == Some("") {
        top.fault_in("command", "0", "must name a program".into());
    }
    Some(command)
}

/// `env` and `secrets`, which share one space of names.
pub(super) fn variables(top: &mut Reader<'_, '_>) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
    let env = top.map("env", VARIABLES_MAX, name_is_bad, variable);
    let secrets = top.map("secrets", VARIABLES_MAX, name_is_bad, secret);
    let twice: Vec<String> = secrets.keys().filter(|name| env.contains_key(*name)).cloned().collect();
    for name in twice {
        top.fault_in("secrets", &name, "is in env too: give it once".into());
    }
    (env, secrets)
}

fn name_is_bad(name: &str) -> Option<String> {
    if name.is_empty() || name.len() > 256 || !name.chars().all(|c| c.is_ascii_graphic() && c != '=') {
        return Some("a variable's name must be 1 to 256 printable ASCII characters without `=` and spaces".into());
    }
    RESERVED.contains(&name).then(|| "is set by everlit for each rank: leave it out".into())
}

fn variable(value: &Value) -> Result<String, String> {
    match value {
        Value::Number(number) => Err(format!("must be a text: write \"{number}\" in quotes")),
        Value::Bool(truth) => Err(format!("must be a text: write \"{truth}\" in quotes")),
        _ => text(value, ARG_BYTES_MAX).map(Into::into),
    }
}

fn secret(value: &Value) -> Result<String, String> {
    match value.as_str() {
        Some(HIDDEN) => Err(format!("is `{HIDDEN}`, which answers show in place of a secret: give the secret itself")),
        Some(_) => text(value, ARG_BYTES_MAX).map(Into::into),
        None => Err(format!("must be a text in quotes, not {}", what(value))),
    }
}
