//! What a node's flags say of it: labels and taints, by which jobs choose nodes, and GPUs that it only claims to have.
//!
//! Names are of the same kind as those in a job, so that what is there can be asked for.

use std::str::FromStr;

use everlit_api::status::Taint;

/// Characters of a name, and of a value, at most: those of a job's labels.
const KEY_CHARS_MAX: usize = 63;
const VALUE_CHARS_MAX: usize = 256;
/// GPUs that are claimed at most.
const FAKE_GPUS_MAX: u32 = 64;
/// Of each, when nothing else is said: 80 GiB.
const FAKE_MEMORY: u64 = 80 << 30;

fn key(text: &str) -> Result<String, String> {
    let allowed = text.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '/'));
    if allowed && !text.is_empty() && text.chars().count() <= KEY_CHARS_MAX {
        return Ok(text.into());
    }
    Err(format!("a name must be 1 to {KEY_CHARS_MAX} letters, digits, `.`, `_`, `-` and `/`"))
}

fn value(text: &str) -> Result<String, String> {
    if text.chars().count() <= VALUE_CHARS_MAX && !text.chars().any(char::is_control) {
        return Ok(text.into());
    }
    Err(format!("a value must be at most {VALUE_CHARS_MAX} characters without control characters"))
}

/// `KEY=VALUE`.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (name, own) = text.split_once('=').ok_or("must be KEY=VALUE, like zone=a")?;
    Ok((key(name)?, value(own)?))
}

/// `KEY=VALUE` or `KEY`.
pub(super) fn taint(text: &str) -> Result<Taint, String> {
    let (name, own) = text.split_once('=').unwrap_or((text, ""));
    Ok(Taint { key: key(name)?, value: value(own)? })
}

/// GPUs that are not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FakeGpus {
    /// How many.
    pub count: u32,
    /// Bytes of memory of each.
    pub memory: u64,
}

impl FromStr for FakeGpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (count, memory) = text.split_once(':').map_or((text, None), |(count, memory)| (count, Some(memory)));
        let count = count.parse().ok().filter(|count| *count <= FAKE_GPUS_MAX);
        let count =
            count.ok_or_else(|| format!("must be a number of GPUs up to {FAKE_GPUS_MAX}, and may have their memory: 4 or 4:80Gi"))?;
        let gib = |text: &str| text.strip_suffix("Gi")?.parse::<u64>().ok().filter(|gib| (1..=1 << 20).contains(gib));
        let memory = match memory {
            None => FAKE_MEMORY,
            Some(text) => gib(text).ok_or("the memory of each must be like 80Gi")? << 30,
        };
        Ok(Self { count, memory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_taints_and_fake_gpus_are_read_or_refused_with_the_form() {
        assert_eq!(label("zone=a=b"), Ok(("zone".into(), "a=b".into())));
        assert!(label("zone").unwrap_err().contains("KEY=VALUE") && label("a b=c").is_err() && label("=c").is_err());
        assert_eq!(taint("old"), Ok(Taint { key: "old".into(), value: String::new() }));
        assert_eq!(taint("team=vision"), Ok(Taint { key: "team".into(), value: "vision".into() }));
        assert!(taint("a\u{7}").is_err() && taint("a=\n").is_err());
        assert_eq!("4".parse(), Ok(FakeGpus { count: 4, memory: 80 << 30 }));
        assert_eq!("2:24Gi".parse(), Ok(FakeGpus { count: 2, memory: 24 << 30 }));
        for wrong in ["", "x", "65", "2:", "2:24", "2:0Gi", "-1"] {
            assert!(wrong.parse::<FakeGpus>().is_err(), "{wrong}");
        }
    }
}
