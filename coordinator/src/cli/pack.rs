//! `--workdir FOLDER`: packs a folder of this machine, uploads it unless it is there, and names it in the job.
//!
//! What it does is told on standard error: standard output has the job's id.

use std::path::PathBuf;

use everlit_api::client::Client;
use everlit_api::package::{CannotPack, Packed, pack};
use serde_json::Value;

use super::Fail;
use super::out::size;

/// Things that were left out that are told of at most.
const TOLD_MAX: usize = 10;
/// An upload that takes a moment is told of.
const TOLD_BYTES: u64 = 8 << 20;

/// Packs it and tells what is in it.
pub(super) async fn packed(folder: &str) -> Result<Packed, Fail> {
    let path = PathBuf::from(folder);
    let done = tokio::task::spawn_blocking(move || pack(&path)).await.map_err(|error| Fail::Refused(error.to_string()))?;
    let packed = done.map_err(|error| match error {
        CannotPack::Io { ref error, .. } if error.kind() == std::io::ErrorKind::NotFound => Fail::Usage(format!(
            "--workdir {folder}: no such folder here. It packs a folder of this machine; one that is on the nodes already is named with --set workdir=/PATH"
        )),
        other => Fail::Refused(format!("--workdir {folder}: {other}")),
    })?;
    let (files, unpacked) = (packed.contents.files, size(packed.contents.bytes));
    eprintln!("packed {files} files, {unpacked} ({} packed): {}", size(packed.bytes), &packed.package[..12]);
    for one in packed.left_out.iter().take(TOLD_MAX) {
        eprintln!("left out: {one}");
    }
    if packed.left_out.len() > TOLD_MAX {
        eprintln!("left out: {} more", packed.left_out.len() - TOLD_MAX);
    }
    Ok(packed)
}

/// Has it at the coordinator.
pub(super) async fn upload(client: &Client, packed: Packed) -> Result<(), Fail> {
    if client.package(&packed.package).await?.is_some() {
        return Ok(());
    }
    if packed.bytes > TOLD_BYTES {
        eprintln!("uploading {} …", size(packed.bytes));
    }
    client.put_package(packed).await?;
    Ok(())
}

/// For a plan nothing is uploaded: what is not there is left out of the job.
pub(super) async fn planned(client: &Client, packed: &Packed, job: &mut Value) -> Result<(), Fail> {
    if client.package(&packed.package).await?.is_none() {
        eprintln!("it would be uploaded");
        if let Some(map) = job.as_object_mut() {
            map.remove("package");
            map.remove("workdir");
        }
    }
    Ok(())
}

/// Names it in a job: ranks start in it, or in a folder of it that the job names.
pub(super) fn name(job: &mut Value, package: &str) {
    let Some(map) = job.as_object_mut() else { return };
    map.insert("package".into(), package.into());
    // That is a folder of the nodes.
    if map.get("workdir").and_then(Value::as_str).is_some_and(|path| path.starts_with('/')) {
        map.remove("workdir");
    }
}
