//! What an agent before this one left: gangs with ranks that live, ended meanwhile, or were never started. Blocks; runs once, before linking.
//!
//! A job without `runs/` has nothing to adopt, and one marked `ended` is not even looked into, so that a hundred thousand kept jobs cost
//! a moment. An attempt with run folders but without `gang.json` was never started: its folders go, and the coordinator orders it again. With
//! it, ranks that were not started yet when the agent died are started when their order has come again.

use std::fs;

use everlit_api::agent::CheckpointNews;
use everlit_api::ids::{Incarnation, JobId};

use super::checkpoints;
use super::folders::{Folders, GANG_NAME, parse_run};
use super::procs::kill_leftovers;
use super::shim::{Settled, Told, never_started, settle};
use super::start::{GangFile, Node};

/// One gang that is not forgotten.
#[derive(Debug)]
pub(super) struct Found {
    /// Its order and decided start.
    pub file: GangFile,
    /// Its ranks that are not forgotten, and what is true of them.
    pub ranks: Vec<(Incarnation, Settled)>,
}

/// Everything that was left.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Gangs, in no order.
    pub gangs: Vec<Found>,
    /// The newest checkpoint of every job that is not final.
    pub checkpoints: Vec<CheckpointNews>,
}

/// Looks through the data folder.
pub(super) fn look(node: &Node) -> Left {
    let folders = &node.folders;
    let mut left = Left::default();
    let Ok(entries) = fs::read_dir(folders.jobs()) else { return left };
    for job in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<JobId>().ok()) {
        if folders.ended(job).exists() {
            continue;
        }
        left.gangs.extend(look_at_job(node, job));
        left.checkpoints.extend(checkpoints::newest(folders, job));
    }
    left
}

fn look_at_job(node: &Node, job: JobId) -> Vec<Found> {
    let folders = &node.folders;
    let Ok(entries) = fs::read_dir(folders.runs(job)) else { return Vec::new() };
    let mut runs: Vec<(u32, u32)> = entries.flatten().filter_map(|entry| parse_run(entry.file_name().to_str()?)).collect();
    runs.sort_unstable();
    let mut found: Vec<Found> = Vec::new();
    for (attempt, rank) in runs {
        let incarnation = Incarnation { job, attempt, rank };
        if found.last().is_none_or(|last| last.file.spec.attempt != attempt) {
            match gang_file(folders, job, attempt) {
                Some(file) => found.push(Found { file, ranks: Vec::new() }),
                None => {
                    // A folder that stays is looked at again next time.
                    let _ = fs::remove_dir_all(folders.run(incarnation));
                    continue;
                }
            }
        }
        let mut settled = settle(&folders.run(incarnation));
        if let (Settled::Ended { started, lost: true, .. }, Some(last)) = (&settled, found.last()) {
            let same_boot = last.file.boot_id == node.boot_id;
            let shim = started.as_ref().and_then(|told| if let Told::Started { shim, .. } = told { Some(*shim) } else { None });
            if let Some(shim) = shim.filter(|_| same_boot) {
                kill_leftovers(&folders.run(incarnation), Some(shim));
            }
        }
        if let Some(last) = found.last_mut() {
            if matches!(settled, Settled::NeverStarted) && last.file.boot_id != node.boot_id {
                // The others are gone with the boot.
                settled = Settled::Ended { started: None, exit: Box::new(never_started()), lost: true };
            }
            last.ranks.push((incarnation, settled));
        }
    }
    found
}

fn gang_file(folders: &Folders, job: JobId, attempt: u32) -> Option<GangFile> {
    let text = fs::read(folders.attempt(job, attempt).join(GANG_NAME)).ok()?;
    let file: GangFile = serde_json::from_slice(&text).ok()?;
    (file.spec.job == job && file.spec.attempt == attempt).then_some(file)
}
