//! Walks one JSON object: remembers where it is, which fields it was asked for, and collects faults instead of stopping.
//!
//! Every field that a caller asks for counts as known; [`Reader::finish`] names the others, with the nearest known name. It decides
//! nothing about values: readers of values say `Err(detail)` and the fault gets its pointer here.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::values::what;
use super::{FAULTS_MAX, Fault, FaultKind};

/// Where fields live that people look for elsewhere: section and its fields. A test compares it with what is really read.
pub(super) const SECTIONS: [(&str, &[&str]); 6] = [
    (
        "worker",
        &[
            "model",
            "data",
            "steps",
            "batch_size",
            "micro_batch_size",
            "sequence_length",
            "learning_rate",
            "warmup_steps",
            "min_learning_rate",
            "weight_decay",
            "max_grad_norm",
            "dropout",
            "precision",
            "activation_checkpointing",
            "on_nan",
            "evaluation",
            "seed",
            "device",
            "deterministic",
        ],
    ),
    ("resources", &["cpus", "memory", "gpus", "gpu_memory"]),
    ("restart", &["max_restarts", "max_start_failures", "backoff", "heal_after", "no_retry_exit_codes"]),
    ("heartbeat", &["startup_timeout", "idle_timeout", "progress_timeout"]),
    ("checkpoint", &["every_steps", "every", "keep", "copies"]),
    ("data", &["shards", "stream", "fallback"]),
];

/// One object under way.
pub(super) struct Reader<'v, 'f> {
    map: Option<&'v Map<String, Value>>,
    at: String,
    known: Vec<&'static str>,
    faults: &'f mut Vec<Fault>,
}

impl<'v, 'f> Reader<'v, 'f> {
    /// The object at the pointer `at`.
    pub(super) fn new(map: &'v Map<String, Value>, at: &str, faults: &'f mut Vec<Fault>) -> Self {
        Self { map: Some(map), at: at.into(), known: Vec::new(), faults }
    }

    fn push(&mut self, pointer: String, detail: String, kind: FaultKind) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(Fault { pointer, detail, kind });
        } else if self.faults.len() == FAULTS_MAX {
            let detail = format!("there are more than {FAULTS_MAX} faults: the rest is not named");
            self.faults.push(Fault { pointer: String::new(), detail, kind: FaultKind::Invalid });
        }
    }

    fn pointer(&self, key: &str) -> String {
        let short: String = key.chars().take(128).collect();
        format!("{}/{}", self.at, short.replace('~', "~0").replace('/', "~1"))
    }

    /// The field's value is wrong.
    pub(super) fn fault(&mut self, key: &str, detail: String) {
        self.push(self.pointer(key), detail, FaultKind::Invalid);
    }

    /// A value inside the field's value is wrong.
    pub(super) fn fault_in(&mut self, key: &str, inner: &str, detail: String) {
        let pointer = format!("{}/{}", self.pointer(key), inner.replace('~', "~0").replace('/', "~1"));
        self.push(pointer, detail, FaultKind::Invalid);
    }

    /// The field's value is right, but this build can not do it.
    pub(super) fn refuse(&mut self, key: &str, detail: String) {
        self.push(self.pointer(key), detail, FaultKind::NotSupported);
    }

    /// The field's value, unless it is missing or null.
    pub(super) fn get(&mut self, key: &'static str) -> Option<&'v Value> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.map?.get(key).filter(|v| !v.is_null())
    }

    /// The field's value through `read`; a fault and `None` when that refuses.
    pub(super) fn read<T>(&mut self, key: &'static str, read: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        match read(self.get(key)?) {
            Ok(value) => Some(value),
            Err(detail) => {
                self.fault(key, detail);
                None
            }
        }
    }

    /// The same with a default.
    pub(super) fn read_or<T>(&mut self, key: &'static str, default: T, read: impl FnOnce(&Value) -> Result<T, String>) -> T {
        self.read(key, read).unwrap_or(default)
    }

    /// The fields of an object, all missing when it is; unknown ones are named.
    pub(super) fn object<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Reader<'_, '_>) -> T) -> T {
        let value = self.get(key);
        let map = value.and_then(Value::as_object);
        if let (Some(value), None) = (value, map) {
            self.fault(key, format!("must be an object, not {}", what(value)));
        }
        let at = self.pointer(key);
        let mut inner = Reader { map, at, known: Vec::new(), faults: self.faults };
        let result = read(&mut inner);
        inner.finish();
        result
    }

    /// A list of values; `None` when missing or not a list.
    pub(super) fn list<T>(&mut self, key: &'static str, most: usize, read: impl Fn(&Value) -> Result<T, String>) -> Option<Vec<T>> {
        self.elements(key, most, |reader, pointer, value| match read(value) {
            Ok(value) => Some(value),
            Err(detail) => {
                reader.push(pointer, detail, FaultKind::Invalid);
                None
            }
        })
    }

    /// A list of objects; `None` when missing or not a list.
    pub(super) fn objects<T>(&mut self, key: &'static str, most: usize, read: impl Fn(&mut Reader<'_, '_>) -> Option<T>) -> Option<Vec<T>> {
        self.elements(key, most, |reader, pointer, value| {
            let Some(map) = value.as_object() else {
                reader.push(pointer, format!("must be an object, not {}", what(value)), FaultKind::Invalid);
                return None;
            };
            let mut inner = Reader::new(map, &pointer, reader.faults);
            let result = read(&mut inner);
            inner.finish();
            result
        })
    }

    fn elements<T>(&mut self, key: &'static str, most: usize, read: impl Fn(&mut Self, String, &Value) -> Option<T>) -> Option<Vec<T>> {
        let value = self.get(key)?;
        let Some(list) = value.as_array() else {
            self.fault(key, format!("must be a list, not {}", what(value)));
            return None;
        };
        if list.len() > most {
            self.fault(key, format!("has {} entries: at most {most} are allowed", list.len()));
            return None;
        }
        let base = self.pointer(key);
        Some(list.iter().enumerate().filter_map(|(i, value)| read(self, format!("{base}/{i}"), value)).collect())
    }

    /// An object of free names.
    pub(super) fn map<T>(
        &mut self,
        key: &'static str,
        most: usize,
        name_is_bad: impl Fn(&str) -> Option<String>,
        read: impl Fn(&Value) -> Result<T, String>,
    ) -> BTreeMap<String, T> {
        let mut found = BTreeMap::new();
        let Some(value) = self.get(key) else { return found };
        let Some(map) = value.as_object() else {
            self.fault(key, format!("must be an object of names and values, not {}", what(value)));
            return found;
        };
        if map.len() > most {
            self.fault(key, format!("has {} entries: at most {most} are allowed", map.len()));
            return found;
        }
        let outer = self.pointer(key);
        let mut inner = Reader { map: Some(map), at: outer, known: Vec::new(), faults: self.faults };
        for (name, value) in map {
            match (name_is_bad(name), read(value)) {
                (Some(detail), _) | (None, Err(detail)) => inner.fault(name, detail),
                (None, Ok(value)) => {
                    found.insert(name.clone(), value);
                }
            }
        }
        found
    }

    /// A field that this build does not have: refused unless its value asks for nothing.
    pub(super) fn not_built(&mut self, key: &'static str, asks_nothing: impl Fn(&Value) -> bool, detail: &str) {
        if self.get(key).is_some_and(|value| !asks_nothing(value)) {
            self.refuse(key, detail.into());
        }
    }

    /// Names every field that nobody asked for.
    pub(super) fn finish(&mut self) {
        let Some(map) = self.map else { return };
        for key in map.keys().filter(|key| !self.known.contains(&key.as_str())).collect::<Vec<_>>() {
            let detail = match self.hint(key) {
                Some(hint) => format!("is not a known field: did you mean `{hint}`?"),
                None => "is not a known field".into(),
            };
            self.fault(key, detail);
            if self.faults.len() > FAULTS_MAX {
                return;
            }
        }
    }

    fn hint(&self, key: &str) -> Option<String> {
        if key.len() > 64 {
            return None;
        }
        let plain = |text: &str| text.chars().filter(|c| c.is_ascii_alphanumeric()).collect::<String>().to_ascii_lowercase();
        if let Some(same) = self.known.iter().find(|known| plain(known) == plain(key)) {
            return Some((*same).into());
        }
        let elsewhere = SECTIONS.iter().find(|(section, fields)| !self.at.ends_with(section) && fields.contains(&key));
        if let Some((section, _)) = elsewhere {
            return Some(format!("{section}.{key}"));
        }
        let near = self.known.iter().map(|known| (edits(key, known), known)).min()?;
        (near.0 <= 2 && near.0 < key.len().div_ceil(2)).then(|| (*near.1).into())
    }
}

/// Letters to change, add or leave out to make one text of the other.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    #[test]
    fn edits_are_counted() {
        for (a, b, count) in [("kind", "kind", 0), ("steps", "step", 1), ("wrold", "world", 2), ("", "abc", 3)] {
            assert_eq!(super::edits(a, b), count, "{a} {b}");
        }
    }
}
