//! Readers of single values: each gives the value or says in one phrase what would be right.
//!
//! They know nothing of fields or pointers. The trap: a message never repeats a value in full, for it may be large or secret.

use serde_json::Value;

use super::{ARG_BYTES_MAX, LABEL_KEY_CHARS_MAX, LABEL_VALUE_CHARS_MAX, PATH_BYTES_MAX};
use crate::job::{Device, NAME_CHARS_MAX};
use crate::time::Millis;

/// The kind of a value, for people.
pub(super) fn what(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A text without NUL.
pub(super) fn text(value: &Value, bytes_max: usize) -> Result<&str, String> {
    let text = value.as_str().ok_or_else(|| format!("must be a text in quotes, not {}", what(value)))?;
    if text.len() > bytes_max {
        return Err(format!("is {} bytes long: at most {bytes_max} are allowed", text.len()));
    }
    if text.contains('\0') { Err("must not contain a NUL character".into()) } else { Ok(text) }
}

/// A whole number in a range.
pub(super) fn integer(value: &Value, least: u64, most: u64) -> Result<u64, String> {
    let range = || if most == u64::MAX { format!("at least {least}") } else { format!("from {least} to {most}") };
    match value.as_u64() {
        Some(number) if (least..=most).contains(&number) => Ok(number),
        _ if value.is_number() => Err(format!("must be a whole number {}", range())),
        _ => Err(format!("must be a whole number {}, not {}", range(), what(value))),
    }
}

/// A finite number in a range.
pub(super) fn number(value: &Value, least: f64, most: f64) -> Result<f64, String> {
    let least_text = if least == f64::MIN_POSITIVE { "greater than 0".into() } else { format!("at least {least}") };
    match value.as_f64() {
        Some(number) if number.is_finite() && number >= least && number <= most => Ok(number),
        Some(_) => Err(format!("must be {least_text} and at most {most}")),
        None => Err(format!("must be a number, not {}", what(value))),
    }
}

/// True or false.
pub(super) fn boolean(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| format!("must be true or false, not {}", what(value)))
}

/// One of a few texts.
pub(super) fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Result<T, String> {
    let found = value.as_str().and_then(|text| choices.iter().find(|(name, _)| *name == text));
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        format!("must be one of {}", names.join(", "))
    })
}

/// A duration in a range.
pub(super) fn duration(value: &Value, least: Millis, most: Millis) -> Result<Millis, String> {
    if let Value::Number(number) = value {
        return Err(format!("must be a duration with its unit in quotes: did you mean \"{number}s\" or \"{number}ms\"?"));
    }
    let length: Millis = text(value, 64)?.parse().map_err(|bad: crate::time::BadDuration| bad.to_string())?;
    if length < least || length > most { Err(format!("must be from {least} to {most}")) } else { Ok(length) }
}

const SIZE_UNITS: [(&str, u64); 9] = [
    ("", 1),
    ("K", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
];
/// Bytes of memory per rank at most: what an `f64` still counts exactly.
const SIZE_MAX: u64 = 1 << 50;

/// Bytes: a number, or a text like "2Gi".
pub(super) fn size(value: &Value) -> Result<u64, String> {
    let wrong = || format!("must be a number of bytes up to {SIZE_MAX} or a size like \"2Gi\", \"500Mi\" or \"2G\"");
    if let Some(bytes) = value.as_u64() {
        return if bytes <= SIZE_MAX { Ok(bytes) } else { Err(wrong()) };
    }
    let text = value.as_str().ok_or_else(wrong)?;
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.strip_suffix('B').unwrap_or(unit);
    let (_, scale) = SIZE_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * *scale as f64;
    if bytes.is_finite() && bytes <= SIZE_MAX as f64 { Ok(bytes.round() as u64) } else { Err(wrong()) }
}

/// An absolute path that does not climb.
pub(super) fn path(value: &Value) -> Result<String, String> {
    let text = text(value, PATH_BYTES_MAX)?;
    if !text.starts_with('/') {
        return Err("must be an absolute path, one that starts with `/`".into());
    }
    if text.split('/').any(|part| part == "..") {
        return Err("must be a path without `..`".into());
    }
    Ok(text.into())
}

/// A path in a package.
pub(super) fn path_within(value: &Value) -> Result<String, String> {
    let text = text(value, PATH_BYTES_MAX)?;
    if text.starts_with('/') || text.split('/').any(|part| part == "..") {
        return Err("must be a path in the package, without `/` at its beginning and without `..`".into());
    }
    Ok(text.into())
}

/// A package, by its hash.
pub(super) fn package(value: &Value) -> Result<String, String> {
    let text = text(value, PATH_BYTES_MAX)?;
    if crate::job::is_package(text) {
        return Ok(text.into());
    }
    Err("must be the sha256 of an uploaded package, 64 lower-case hexadecimal digits: `everlit submit --workdir FOLDER` makes one".into())
}

/// A job's name.
pub(super) fn name(value: &Value) -> Result<String, String> {
    let text = text(value, NAME_CHARS_MAX * 4)?;
    let allowed = text.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | ' '));
    if !allowed || text.chars().count() > NAME_CHARS_MAX || text.trim().is_empty() {
        return Err(format!("must be 1 to {NAME_CHARS_MAX} letters, digits, `.`, `_`, `-` and spaces, and not blank"));
    }
    Ok(text.into())
}

/// What is wrong with a label's key.
pub(super) fn label_key(key: &str) -> Option<String> {
    let allowed = key.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '/'));
    let fine = allowed && !key.is_empty() && key.chars().count() <= LABEL_KEY_CHARS_MAX;
    (!fine).then(|| format!("a label's name must be 1 to {LABEL_KEY_CHARS_MAX} letters, digits, `.`, `_`, `-` and `/`"))
}

/// A label's value.
pub(super) fn label_value(value: &Value) -> Result<String, String> {
    let text = text(value, LABEL_VALUE_CHARS_MAX * 4)?;
    if text.chars().count() > LABEL_VALUE_CHARS_MAX || text.chars().any(char::is_control) {
        return Err(format!("a label's value must be at most {LABEL_VALUE_CHARS_MAX} characters without control characters"));
    }
    Ok(text.into())
}

/// Where tensors live.
pub(super) fn device(value: &Value) -> Result<Device, String> {
    choice(value, &[("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda)])
}

/// An argument of a command.
pub(super) fn argument(value: &Value) -> Result<String, String> {
    text(value, ARG_BYTES_MAX).map(Into::into)
}
