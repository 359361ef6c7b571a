//! Which nodes a job may go to: the labels that they must have, and the taints that it tolerates.
//!
//! Names and values are of the same kind as those of a node (`--label`, `--taint`), so that what can be asked for can be there.

use std::collections::BTreeMap;

use serde_json::Value;

use super::reader::Reader;
use super::values::{label_key, label_value, text};
use super::{LABEL_VALUE_CHARS_MAX, LABELS_MAX, TOLERATIONS_MAX};
use crate::job::Toleration;

pub(super) fn nodes(top: &mut Reader<'_, '_>) -> (BTreeMap<String, String>, Vec<Toleration>) {
    let selector = top.map("node_selector", LABELS_MAX, label_key, label_value);
    let mut tolerations = top.objects("tolerations", TOLERATIONS_MAX, toleration).unwrap_or_default();
    // The order says nothing, and jobs of the same need share a line in the queue.
    tolerations.sort();
    tolerations.dedup();
    (selector, tolerations)
}

fn toleration(fields: &mut Reader<'_, '_>) -> Option<Toleration> {
    let value = fields.read("value", label_value);
    if fields.get("key").is_none() {
        fields.fault("key", "is missing: the taint's key, like \"reserved-for\"".into());
        return None;
    }
    let key = fields.read("key", key)?;
    Some(Toleration { key, value })
}

fn key(value: &Value) -> Result<String, String> {
    let key = text(value, LABEL_VALUE_CHARS_MAX * 4)?;
    label_key(key).map_or_else(|| Ok(key.into()), |why| Err(why.replace("label", "taint")))
}
