//! Checkpoints of the jobs here as they are committed: tell at once, read back, tell again, and remove what is too much. Blocks.
//!
//! One look at a job's folder answers both: what is newest, and what the coordinator is told about it. The reading back is what finds a disk
//! that lies; a damaged checkpoint is put aside and the next older one becomes the newest.

use std::collections::BTreeMap;
use std::path::Path;

use everlit_api::agent::CheckpointNews;
use everlit_api::ids::JobId;
use everlit_api::manifest::Manifest;

use super::folders::Folders;
use super::late::Late;
use crate::checkpoint::{self, CheckpointError, Quarantined};

/// What was told of each job's newest checkpoint, and which are being read back.
#[derive(Debug, Default)]
pub(super) struct Tracker(BTreeMap<JobId, Tracked>);

#[derive(Debug, Default)]
struct Tracked {
    /// Step and attempt.
    told: Option<(u64, u32)>,
    checking: bool,
    again: bool,
}

impl Tracker {
    /// The newest checkpoint of a job, when it was not told yet.
    pub(super) fn news(&mut self, folders: &Folders, job: JobId) -> Option<CheckpointNews> {
        let news = newest(folders, job)?;
        let own = self.0.entry(job).or_default();
        if own.told == Some((news.step, news.attempt)) {
            return None;
        }
        own.told = Some((news.step, news.attempt));
        Some(news)
    }

    /// Whether to begin a check now; else one follows the check under way.
    pub(super) fn begin(&mut self, job: JobId) -> bool {
        let own = self.0.entry(job).or_default();
        own.again = own.checking;
        !std::mem::replace(&mut own.checking, true)
    }

    /// A check is done. Whether another one must follow.
    pub(super) fn end(&mut self, job: JobId, news: Option<&CheckpointNews>) -> bool {
        let Some(own) = self.0.get_mut(&job) else { return false };
        own.checking = false;
        own.told = news.map_or(own.told, |news| Some((news.step, news.attempt)));
        std::mem::take(&mut own.again)
    }

    /// The job is final.
    pub(super) fn drop_job(&mut self, job: JobId) {
        self.0.remove(&job);
    }
}

/// The outcome of reading back.
#[derive(Debug)]
pub(super) struct Checked {
    /// The newest checkpoint that verifies, with what is kept after pruning.
    pub news: Option<CheckpointNews>,
    /// What was put aside.
    pub quarantined: Vec<Quarantined>,
}

fn news(dir: &Path, job: JobId, path: &Path, manifest: &Manifest, verified: bool) -> CheckpointNews {
    CheckpointNews {
        job,
        attempt: manifest.attempt,
        step: manifest.step,
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        created_at: manifest.created_at,
        verified,
        path: path.display().to_string(),
        kept: checkpoint::list(dir).unwrap_or_default().into_iter().map(|found| found.step).collect(),
    }
}

/// The newest committed checkpoint of a job, not read back.
pub(super) fn newest(folders: &Folders, job: JobId) -> Option<CheckpointNews> {
    let dir = folders.checkpoints(job);
    let found = checkpoint::list(&dir).ok()?;
    found.iter().find_map(|found| Some(news(&dir, job, &found.path, &checkpoint::read_manifest(&found.path).ok()?, false)))
}

/// Reads back the newest checkpoint of a job and removes what is beyond `keep`.
pub(super) fn check(folders: &Folders, job: JobId, keep: u32) -> Result<Checked, CheckpointError> {
    let dir = folders.checkpoints(job);
    let chosen = checkpoint::newest_verified(&dir)?;
    checkpoint::prune(&dir, keep)?;
    let news = chosen.checkpoint.map(|(path, manifest)| news(&dir, job, &path, &manifest, true));
    Ok(Checked { news, quarantined: chosen.quarantined })
}

/// Puts aside what came too late, and looks at what is left.
pub(super) fn put_aside(late: &Late, folders: &Folders, job: JobId) -> Result<Checked, CheckpointError> {
    let dir = folders.checkpoints(job);
    let quarantined = late.put_aside(folders, job)?;
    let chosen = checkpoint::newest_verified(&dir)?;
    let news = chosen.checkpoint.map(|(path, manifest)| news(&dir, job, &path, &manifest, true));
    Ok(Checked { news, quarantined: quarantined.into_iter().chain(chosen.quarantined).collect() })
}
