//! Where an attempt starts from: a whole snapshot in shared memory that is newer than every checkpoint, else its job's newest checkpoint that
//! verifies in full, here, on another node or in its store, else what the order says. Blocks.
//!
//! A damaged checkpoint of the job itself is put aside; one of another job, or of a folder that is not ours, is only passed over. What was
//! asked for and does not verify is an error for ever: starting afresh instead would silently be another job.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use everlit_api::agent::copies::Fetch;
use everlit_api::agent::stored::StoreFault;
use everlit_api::agent::{GangSpec, ResumeFrom, Resumed};
use everlit_api::ids::NodeId;
use everlit_api::manifest::{Manifest, folder_step};
use everlit_api::store::Place;

use super::copies;
use super::fetch_stored::{self, NotFetched, Wanted};
use super::limits::{UPLOAD_WAIT_MAX, UPLOAD_WAIT_MIN};
use super::start::{Node, Refused};
use crate::checkpoint::{self, CheckpointError, Quarantined};

/// Between two looks at whether what waits is still wanted.
const STOP_LOOK: Duration = Duration::from_millis(100);

/// Whoever asked for a start, while that takes its time.
pub(super) struct Asked<'a> {
    /// Whether it still wants it.
    pub is_wanted: &'a (dyn Fn() -> bool + Sync),
    /// Hears what a store says instead of giving a checkpoint.
    pub tell: &'a (dyn Fn(StoreFault) + Sync),
}

/// Nobody changes their mind.
#[cfg(test)]
pub(super) const WANTED: Asked<'static> = Asked { is_wanted: &|| true, tell: &|_| {} };

/// Decides. `fresh`: the job's checkpoint folder was made just now. `known`: the newest attempt before this one that was started here: when
/// others came after it elsewhere, they went on from checkpoints, and what is in memory here is older than what they did.
pub(super) fn decide(node: &Node, spec: &GangSpec, fresh: bool, known: Option<u32>, asked: &Asked<'_>) -> Result<Resumed, Refused> {
    let folders = &node.folders;
    let mut resumed = Resumed::from_nothing(spec.job, spec.attempt);
    let mut committed = None;
    if !fresh {
        let dir = folders.checkpoints(spec.job);
        let busy = |error: CheckpointError| Refused { reason: error.to_string(), permanent: !error.is_transient() };
        let rejected = spec.rejected_step.map_or(Ok(None), |step| reject(&dir, step)).map_err(busy)?;
        let chosen = checkpoint::newest_verified(&dir).map_err(busy)?;
        resumed.quarantined = rejected.into_iter().chain(chosen.quarantined).map(|put_aside| (put_aside.step, put_aside.reason)).collect();
        committed = chosen.checkpoint;
    }
    let here = committed.as_ref().map(|(_, manifest)| manifest.step);
    let elsewhere = spec.fetch.as_ref().filter(|fetch| here.is_none_or(|here| fetch.of.is_none() && here < fetch.step));
    let is_next = known.is_some_and(|known| known + 1 >= spec.attempt);
    let near = here.max(elsewhere.filter(|fetch| fetch.of.is_none()).map(|fetch| fetch.step));
    let stored = spec.stored.as_ref().filter(|stored| near.is_none_or(|near| near < stored.step));
    if !spec.skip_memory
        && is_next
        && let Some((path, manifest)) = node.memory.resume(spec, near.max(stored.map(|stored| stored.step)))
    {
        tracing::info!(job = %spec.job, attempt = spec.attempt, step = manifest.step, "resuming from shared memory");
        return Ok(Resumed { from_memory: true, ..found(resumed, &path, &manifest) });
    }
    if let Some(stored) = stored {
        let dir = folders.checkpoints(spec.job);
        let wanted = Wanted { place: &stored.place, env: &spec.env, max: Some(stored.step), above: near, attempt: spec.attempt };
        if let Some((path, manifest)) = from_store(spec, &dir, wanted, stored.required, asked)? {
            return Ok(Resumed { fetched_from_store: Some(stored.place.to_string()), ..found(resumed, &path, &manifest) });
        }
    }
    if let Some(fetch) = elsewhere.filter(|fetch| fetch.of.is_none())
        && let Some((from, path, manifest)) = fetch_newer(node, spec, fetch, asked.is_wanted)?
    {
        return Ok(Resumed { fetched_from: Some(from), ..found(resumed, &path, &manifest) });
    }
    if let Some((path, manifest)) = committed {
        return Ok(found(resumed, &path, &manifest));
    }
    let resume_from = spec.resume_from.as_ref().map(|from| as_store(from).unwrap_or_else(|| from.clone()));
    let (path, manifest) = match &resume_from {
        None => return Ok(resumed),
        Some(ResumeFrom::Job(job)) => {
            let dir = folders.checkpoints(*job);
            if folders.ended(*job).exists() {
                // Its last snapshot may be on its way to the disk.
                node.memory.end(folders, *job);
            }
            let here = newest_without_quarantine(&dir).or_else(|why| newest_without_quarantine(&folders.origin(spec.job)).map_err(|_| why));
            let newer = elsewhere.filter(|fetch| here.as_ref().is_ok_and(|(_, here)| here.step < fetch.step) || here.is_err());
            match newer.map(|fetch| fetch_newer(node, spec, fetch, asked.is_wanted)).transpose()?.flatten() {
                Some((from, path, manifest)) => return Ok(Resumed { fetched_from: Some(from), ..found(resumed, &path, &manifest) }),
                None => here.map_err(|why| Refused::forever(format!("job {job} has no usable checkpoint on this node: {why}")))?,
            }
        }
        Some(ResumeFrom::Store(place)) => {
            let dir = folders.origin(spec.job);
            if let Ok((path, manifest)) = newest_without_quarantine(&dir) {
                return Ok(found(resumed, &path, &manifest));
            }
            // What another job has written counts its attempts.
            let wanted = Wanted { place, env: &spec.env, max: None, above: None, attempt: u32::MAX };
            return match from_store(spec, &dir, wanted, true, asked)? {
                Some((path, manifest)) => Ok(Resumed { fetched_from_store: Some(place.to_string()), ..found(resumed, &path, &manifest) }),
                None => Err(Refused::forever(format!("can not resume from {place}: there is no checkpoint"))),
            };
        }
        Some(ResumeFrom::Path(path)) => {
            let refuse = |why: String| Refused::forever(format!("can not resume from `{path}`: {why}"));
            at_path(Path::new(path)).map_err(refuse)?
        }
    };
    Ok(found(resumed, &path, &manifest))
}

/// Brings a newer checkpoint from another node. `None`: it can not be had, and the gang can do without.
fn fetch_newer(
    node: &Node,
    spec: &GangSpec,
    fetch: &Fetch,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Option<(NodeId, PathBuf, Manifest)>, Refused> {
    let dir = if fetch.of.is_some() { node.folders.origin(spec.job) } else { node.folders.checkpoints(spec.job) };
    // What another job has written counts its attempts.
    let attempt = if fetch.of.is_some() { u32::MAX } else { spec.attempt };
    let (job, step, bytes) = (fetch.of.unwrap_or(spec.job), fetch.step, fetch.bytes);
    let wanted = copies::Wanted { job, step, bytes, attempt, sources: &fetch.sources };
    let fetched = copies::fetch(&dir, wanted, is_wanted).and_then(|from| {
        let path = dir.join(checkpoint::step_folder(fetch.step));
        let manifest = checkpoint::verify(&path).map_err(|damage| damage.to_string())?;
        Ok((from, path, manifest))
    });
    match fetched {
        Ok(fetched) => Ok(Some(fetched)),
        Err(why) if fetch.required => Err(Refused::now(format!("the checkpoint of step {} could not be fetched: {why}", fetch.step))),
        Err(why) => {
            tracing::warn!(job = %spec.job, step = fetch.step, why, "a newer checkpoint could not be fetched; going on with what is here");
            Ok(None)
        }
    }
}

/// Brings a checkpoint from a store. One that is required is waited for as long as the store may come back; else what is here must do.
fn from_store(
    spec: &GangSpec,
    dir: &Path,
    wanted: Wanted<'_>,
    required: bool,
    asked: &Asked<'_>,
) -> Result<Option<(PathBuf, Manifest)>, Refused> {
    let mut wait = UPLOAD_WAIT_MIN;
    loop {
        let fault = match fetch_stored::fetch(dir, wanted, asked.is_wanted) {
            Ok(None) => return Ok(None),
            Ok(Some(step)) => {
                let path = dir.join(checkpoint::step_folder(step));
                let manifest = checkpoint::read_manifest(&path).map_err(|damage| Refused::now(damage.to_string()))?;
                return Ok(Some((path, manifest)));
            }
            Err(NotFetched::Here(why)) => {
                return Err(Refused::now(format!("the checkpoint in {} could not be fetched: {why}", wanted.place)));
            }
            Err(NotFetched::Fault(fault)) => fault,
        };
        let (trouble, reason) = (fault.trouble, fault.to_string());
        (asked.tell)(StoreFault { job: spec.job, step: wanted.max, trouble, reason: reason.clone() });
        if !required {
            tracing::warn!(job = %spec.job, reason, "the store could not be read; going on with what is nearer");
            return Ok(None);
        }
        if !trouble.is_transient() {
            return Err(Refused::forever(reason));
        }
        let until = Instant::now() + wait;
        while Instant::now() < until {
            if !(asked.is_wanted)() {
                return Err(Refused::now(format!("it was stopped while it waited for its store: {reason}")));
            }
            std::thread::sleep(STOP_LOOK);
        }
        wait = (wait * 2).min(UPLOAD_WAIT_MAX);
    }
}

/// A folder that jobs keep their checkpoints in (`checkpoint.to`) is read as a store, however it is named.
fn as_store(from: &ResumeFrom) -> Option<ResumeFrom> {
    let ResumeFrom::Path(path) = from else { return None };
    let place: Place = path.parse().ok()?;
    let of_job = folder_step(place.last()).and_then(|_| place.parent()).unwrap_or_else(|| place.clone());
    Path::new(&of_job.join("attempts").to_string()).is_dir().then_some(ResumeFrom::Store(place))
}

/// Puts a checkpoint aside that verifies and still fails every resume, if there is an older good one to step back to.
fn reject(dir: &Path, step: u64) -> Result<Option<Quarantined>, CheckpointError> {
    let older = checkpoint::list(dir)?.into_iter().filter(|found| found.step < step).any(|found| checkpoint::verify(&found.path).is_ok());
    if older { checkpoint::quarantine(dir, step, "every resume from it failed") } else { Ok(None) }
}

fn found(resumed: Resumed, path: &Path, manifest: &Manifest) -> Resumed {
    Resumed { step: Some(manifest.step), path: Some(path.display().to_string()), ..resumed }
}

/// A checkpoint's folder, or a folder of checkpoints.
fn at_path(path: &Path) -> Result<(PathBuf, Manifest), String> {
    if path.join(checkpoint::MANIFEST_NAME).exists() {
        return checkpoint::verify(path).map(|manifest| (path.to_path_buf(), manifest)).map_err(|damage| damage.to_string());
    }
    if !path.is_dir() {
        return Err("there is no such folder".into());
    }
    newest_without_quarantine(path)
}

fn newest_without_quarantine(dir: &Path) -> Result<(PathBuf, Manifest), String> {
    let mut why = "there is none".to_string();
    for found in checkpoint::list(dir).map_err(|error| error.to_string())? {
        match checkpoint::verify(&found.path) {
            Ok(manifest) => return Ok((found.path, manifest)),
            Err(damage) => why = format!("step {}: {damage}", found.step),
        }
    }
    Err(why)
}
