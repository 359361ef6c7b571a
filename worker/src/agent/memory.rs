//! Where ranks keep snapshots of their state in shared memory, and what becomes of them: resumed from, saved to disk, or freed. Blocks.
//!
//! A job's folder is `/dev/shm/everlit-<uid>/<agent>/<job>`, where `<agent>` tells the data folders of one user apart. Ranks write there
//! and may die at any time; only the agent frees. Shared memory is never needed: whatever fails here is logged and costs steps, no job. The
//! trap: it is memory, so a job that nobody runs any more must not keep its folder.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use everlit_api::agent::{GangSpec, Program};
use everlit_api::ids::JobId;
use everlit_api::manifest::Manifest;

use super::effects::not_found_is_fine;
use super::folders::Folders;
use super::start::newest_attempt;
use crate::checkpoint::{self, CheckpointError, hex_sha256, snapshot};

/// The memory file system that every Linux has; a container may have none, or a small one.
const SHARED_MEMORY: &str = "/dev/shm";
/// Characters of the data folder's hash in a name.
const HASH_CHARS: usize = 16;

/// All snapshots of one agent.
#[derive(Debug, Default)]
pub(super) struct Memory {
    root: Option<PathBuf>,
    /// A job's end, its removal and a resume from it may come at once, on different threads.
    ending: Mutex<()>,
    /// What is to be done on other threads and is not done yet.
    pending: Arc<AtomicUsize>,
}

/// Something that is to be done, while it lives.
#[derive(Debug)]
pub(super) struct Pending(Arc<AtomicUsize>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Memory {
    /// Looks for shared memory; without it there are no snapshots, which is said once.
    pub(super) fn find(data: &Path) -> Self {
        Self::below(Path::new(SHARED_MEMORY), data)
    }

    fn below(shared: &Path, data: &Path) -> Self {
        let user = shared.join(format!("everlit-{}", nix::unistd::geteuid()));
        match make_own(&user) {
            Ok(()) => {
                let hash = hex_sha256(data.as_os_str().as_encoded_bytes());
                Self { root: Some(user.join(&hash[..HASH_CHARS])), ..Self::default() }
            }
            Err(error) => {
                tracing::warn!(path = %user.display(), %error, "there is no shared memory: jobs resume from checkpoints on disk only");
                Self::default()
            }
        }
    }

    /// Counts what another thread is to do, until it is dropped there.
    pub(super) fn pending(&self) -> Pending {
        self.pending.fetch_add(1, Ordering::AcqRel);
        Pending(self.pending.clone())
    }

    /// Something is not done yet, like the save of a last snapshot.
    pub(super) fn is_busy(&self) -> bool {
        self.pending.load(Ordering::Acquire) > 0
    }

    fn folder(&self, job: JobId) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join(job.to_string()))
    }

    /// Makes the folder that the ranks of a gang may use. `None`: they run without.
    pub(super) fn make(&self, spec: &GangSpec) -> Option<PathBuf> {
        let folder = self.folder(spec.job).filter(|_| keeps_snapshots(spec))?;
        match DirBuilder::new().mode(0o700).recursive(true).create(&folder) {
            Ok(()) => Some(folder),
            Err(error) => {
                tracing::warn!(job = %spec.job, %error, "there is no shared memory for snapshots");
                None
            }
        }
    }

    /// A snapshot of the whole gang that is newer than its newest checkpoint, made ready to resume from. What is no use is freed.
    pub(super) fn resume(&self, spec: &GangSpec, committed: Option<u64>) -> Option<(PathBuf, Manifest)> {
        let folder = self.folder(spec.job)?;
        if keeps_snapshots(spec) && spec.count == spec.world_size {
            match newer(&folder, spec.job, committed).and_then(|whole| whole.map(|whole| whole.link(spec.attempt)).transpose()) {
                Ok(Some(linked)) => return Some(linked),
                Ok(None) => {}
                Err(error) => tracing::warn!(job = %spec.job, %error, "a snapshot in shared memory can not be used"),
            }
        }
        self.free(spec.job);
        None
    }

    /// A commit made older snapshots superfluous.
    pub(super) fn free_older(&self, job: JobId, committed: u64, newest_attempt: u32) {
        if let Some(folder) = self.folder(job) {
            snapshot::free_older(&folder, committed, newest_attempt);
        }
    }

    /// The job is final: what only its snapshots hold goes to disk, and the memory is given back.
    pub(super) fn end(&self, folders: &Folders, job: JobId) {
        let Some(folder) = self.folder(job) else { return };
        let _one = self.one_at_a_time();
        if folder.symlink_metadata().is_err() {
            return;
        }
        match save(folders, job, &folder) {
            Ok(Some(path)) => tracing::info!(%job, path = %path.display(), "the last snapshot was saved"),
            Ok(None) => {}
            Err(error) => tracing::warn!(%job, %error, "the last snapshot could not be saved"),
        }
        self.free(job);
    }

    /// The job is removed: its files go to `grave`, in one move. A last snapshot that is being saved comes first, or it would make the
    /// job's folder again.
    pub(super) fn remove(&self, folders: &Folders, job: JobId, grave: &Path) -> io::Result<()> {
        let _one = self.one_at_a_time();
        fs::rename(folders.job(job), grave).or_else(not_found_is_fine)?;
        self.free(job);
        Ok(())
    }

    /// At the agent's start: jobs that ended or were removed meanwhile.
    pub(super) fn free_unwanted(&self, folders: &Folders) {
        let Some(root) = &self.root else { return };
        for job in fs::read_dir(root).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
            if folders.ended(job).exists() {
                self.end(folders, job);
            } else if !folders.job(job).exists() {
                let _one = self.one_at_a_time();
                self.free(job);
            }
        }
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        // It guards no data, so a thread that panicked left nothing half done in it.
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, job: JobId) {
        if let Some(folder) = self.folder(job) {
            snapshot::free(&folder);
        }
        if let Some(root) = &self.root {
            // Only when it was the last.
            let _ = fs::remove_dir(root);
        }
    }
}

/// Only the built-in program writes snapshots, and an evaluation has nothing to keep.
fn keeps_snapshots(spec: &GangSpec) -> bool {
    matches!(spec.program, Program::Worker { evaluate: false, .. })
}

/// A folder of this user's own: in a place where anybody may make one, the name alone is no proof.
fn make_own(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let about = path.symlink_metadata()?;
    if !about.is_dir() || about.uid() != nix::unistd::geteuid().as_raw() || about.mode() & 0o077 != 0 {
        return Err(io::Error::other("it belongs to somebody else, or others may write to it"));
    }
    nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).map_err(io::Error::from)
}

/// The newest snapshot of a job, if it is beyond `committed`.
fn newer(folder: &Path, job: JobId, committed: Option<u64>) -> Result<Option<snapshot::Whole>, CheckpointError> {
    let whole = snapshot::newest_whole(folder).map_err(checkpoint::io_error("look through", folder))?;
    Ok(whole.filter(|whole| whole.manifest().job_id == job.to_string() && committed.is_none_or(|step| whole.step() > step)))
}

fn save(folders: &Folders, job: JobId, folder: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let dir = folders.checkpoints(job);
    let Some(attempt) = newest_attempt(&folders.attempts(job)).filter(|_| dir.exists()) else { return Ok(None) };
    let committed = checkpoint::newest_verified(&dir)?.checkpoint.map(|(_, manifest)| manifest.step);
    newer(folder, job, committed)?.map(|whole| whole.persist(&dir, attempt)).transpose()
}

#[cfg(test)]
mod tests {
    use everlit_api::agent::ResumeFrom;
    use everlit_api::job::WorkerSpec;
    use everlit_api::manifest::MANIFEST_FORMAT;
    use everlit_api::time::Timestamp;

    use super::super::environment::tests::spec as gang_spec;
    use super::super::late::Late;
    use super::super::resume;
    use super::super::start::Node;
    use super::*;
    use crate::checkpoint::snapshot::{Note, seal, slot_path};

    struct Place {
        dir: tempfile::TempDir,
        node: Node,
        spec: GangSpec,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shm");
        fs::create_dir(&shared).unwrap();
        let folders = Folders::new(dir.path().join("agent"));
        let memory = Memory::below(&shared, folders.root());
        let (env, boot_id) = (Default::default(), String::new());
        let node = Node {
            folders,
            memory,
            programs: dir.path().into(),
            env,
            has_gpus: false,
            open_files: None,
            boot_id,
            reach: Mutex::default(),
            data_cache: 0,
            late: Late::default(),
        };
        let mut spec = gang_spec(2);
        spec.attempt = 2;
        spec.program = Program::Worker { worker: Box::new(WorkerSpec::for_world(2)), evaluate: false };
        fs::create_dir_all(node.folders.checkpoints(spec.job)).unwrap();
        fs::create_dir_all(node.folders.attempt(spec.job, 2)).unwrap();
        Place { dir, node, spec }
    }

    fn manifest(job: &str, attempt: u32, step: u64) -> Manifest {
        Manifest {
            format: MANIFEST_FORMAT,
            job_id: job.into(),
            attempt,
            generation: 0,
            step,
            epoch: 0,
            world_size: 2,
            global_batch: 8,
            samples: step * 8,
            seed: 1,
            data: Default::default(),
            model: None,
            created_at: Timestamp(1),
            files: Vec::new(),
            manifest_sha256: None,
        }
    }

    impl Place {
        fn folder(&self) -> PathBuf {
            self.node.memory.folder(self.spec.job).unwrap()
        }

        /// What both ranks of attempt 1 left at a step.
        fn snapshot(&self, step: u64, job: &str) {
            let folder = self.node.memory.make(&self.spec).unwrap();
            for rank in 0..2 {
                let slot = slot_path(&folder, 1, rank, 0);
                let bytes = format!("state of rank {rank} at {step}").into_bytes();
                fs::write(&slot, &bytes).unwrap();
                let name = Some(format!("part-{rank}.safetensors"));
                let note = Note { rank, name, bytes: bytes.len() as u64, crc32: crc32fast::hash(&bytes), manifest: manifest(job, 1, step) };
                seal(&slot, &note).unwrap();
            }
        }

        fn own_snapshot(&self, step: u64) {
            self.snapshot(step, &self.spec.job.to_string());
        }

        fn commit(&self, step: u64) {
            let dir = self.node.folders.checkpoints(self.spec.job);
            let draft = checkpoint::begin(&dir, step, 1, 0).unwrap();
            fs::write(draft.join("w.safetensors"), "weights").unwrap();
            let mut manifest = manifest(&self.spec.job.to_string(), 1, step);
            manifest.files = vec![checkpoint::describe_file(&draft.join("w.safetensors")).unwrap()];
            checkpoint::commit(&dir, &draft, &manifest).unwrap();
        }

        fn decide(&self) -> (Option<u64>, bool, bool) {
            let resumed =
                resume::decide(&self.node, &self.spec, false, Some(self.spec.attempt.saturating_sub(1)), &resume::WANTED).unwrap();
            if let Some(path) = &resumed.path {
                assert_eq!(checkpoint::verify(Path::new(path)).map(|manifest| Some(manifest.step)).unwrap(), resumed.step);
            }
            (resumed.step, resumed.from_memory, self.folder().exists())
        }

        fn steps(&self) -> Vec<u64> {
            checkpoint::list(&self.node.folders.checkpoints(self.spec.job)).unwrap().into_iter().map(|found| found.step).collect()
        }
    }

    #[test]
    fn the_newer_of_snapshot_and_checkpoint_is_resumed_from() {
        let place = place();
        place.own_snapshot(120);
        assert_eq!(place.decide(), (Some(120), true, true), "without any checkpoint");
        place.commit(100);
        assert_eq!(place.decide(), (Some(120), true, true));
        place.commit(120);
        assert_eq!(place.decide(), (Some(120), false, false), "what is on disk is safer, and the memory is given back");
        assert_eq!(place.decide(), (Some(120), false, false));
    }

    #[test]
    fn a_snapshot_that_is_torn_or_not_the_jobs_own_costs_steps_and_no_job() {
        let place = place();
        place.commit(100);
        place.own_snapshot(120);
        fs::write(slot_path(&place.folder(), 1, 1, 0), "state of rank 1 at 12O").unwrap();
        assert_eq!(place.decide(), (Some(100), false, false));
        place.snapshot(130, "another job");
        assert_eq!(place.decide(), (Some(100), false, false));
        place.own_snapshot(140);
        fs::write(place.folder().join("resume-a2"), "in the way").unwrap();
        fs::create_dir(place.folder().join("x")).unwrap();
        assert_eq!(place.decide(), (Some(140), true, true));
    }

    #[test]
    fn only_gangs_that_are_whole_here_and_write_snapshots_use_them() {
        let mut place = place();
        place.own_snapshot(120);
        place.spec.world_size = 4;
        assert_eq!(place.decide(), (None, false, false), "other ranks live elsewhere");
        place.spec.world_size = 2;
        place.spec.program = Program::Command { argv: vec!["x".into()] };
        assert_eq!((place.node.memory.make(&place.spec), place.decide()), (None, (None, false, false)));
        place.spec.program = Program::Worker { worker: Box::default(), evaluate: true };
        assert_eq!(place.node.memory.make(&place.spec), None);
    }

    #[test]
    fn the_end_of_a_job_saves_what_only_memory_holds_and_gives_it_back() {
        let place = place();
        place.commit(100);
        place.own_snapshot(120);
        place.node.memory.end(&place.node.folders, place.spec.job);
        assert_eq!((place.steps(), place.folder().exists()), (vec![120, 100], false));
        let path = place.node.folders.checkpoints(place.spec.job).join(checkpoint::step_folder(120));
        assert_eq!(checkpoint::verify(&path).map(|manifest| (manifest.attempt, manifest.files.len())).unwrap(), (2, 2));
        // Nothing is newer now.
        place.own_snapshot(110);
        place.node.memory.end(&place.node.folders, place.spec.job);
        assert_eq!((place.steps(), place.folder().exists()), (vec![120, 100], false));
    }

    #[test]
    fn work_counts_until_it_is_done_or_never_came_to_run() {
        let place = place();
        let (one, other) = (place.node.memory.pending(), place.node.memory.pending());
        drop(one);
        assert!(place.node.memory.is_busy());
        std::thread::spawn(move || drop(other)).join().unwrap();
        assert!(!place.node.memory.is_busy());
    }

    #[test]
    fn a_new_job_resumes_from_the_last_snapshot_of_one_that_has_just_ended() {
        let place = place();
        place.own_snapshot(120);
        fs::write(place.node.folders.ended(place.spec.job), "").unwrap();
        let mut next = place.spec.clone();
        next.job = JobId::from_parts(7, 7);
        next.attempt = 1;
        next.resume_from = Some(ResumeFrom::Job(place.spec.job));
        let resumed = resume::decide(&place.node, &next, true, None, &resume::WANTED).unwrap();
        assert_eq!((resumed.step, resumed.from_memory), (Some(120), false));
    }

    #[test]
    fn a_job_that_is_removed_as_its_last_snapshot_is_saved_leaves_nothing() {
        for round in 0..30 {
            let place = place();
            place.commit(100);
            place.own_snapshot(120);
            let (folders, memory, job) = (&place.node.folders, &place.node.memory, place.spec.job);
            let grave = place.dir.path().join("grave");
            let together = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    together.wait();
                    memory.end(folders, job);
                });
                together.wait();
                memory.remove(folders, job, &grave).unwrap();
            });
            assert_eq!((folders.job(job).exists(), place.folder().exists(), grave.exists()), (false, false, true), "round {round}");
        }
    }

    #[test]
    fn an_agent_that_starts_gives_back_what_jobs_left_that_ended_meanwhile() {
        let place = place();
        place.own_snapshot(120);
        let gone = JobId::from_parts(8, 8);
        fs::create_dir(place.node.memory.folder(gone).unwrap()).unwrap();
        place.node.memory.free_unwanted(&place.node.folders);
        assert!(place.folder().exists() && !place.node.memory.folder(gone).unwrap().exists());
        fs::write(place.node.folders.ended(place.spec.job), "").unwrap();
        place.node.memory.free_unwanted(&place.node.folders);
        assert_eq!((place.steps(), place.folder().exists()), (vec![120], false));
    }

    #[test]
    fn a_folder_that_somebody_else_could_write_to_is_not_used() {
        let place = place();
        let shared = place.dir.path().join("other");
        let user = shared.join(format!("everlit-{}", nix::unistd::geteuid()));
        fs::create_dir_all(&user).unwrap();
        fs::set_permissions(&user, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(Memory::below(&shared, Path::new("/data")).root.is_none());
        fs::remove_dir(&user).unwrap();
        std::os::unix::fs::symlink(place.dir.path(), &user).unwrap();
        assert!(Memory::below(&shared, Path::new("/data")).root.is_none());
        let none = Memory::below(&place.dir.path().join("nowhere"), Path::new("/data"));
        assert_eq!((none.make(&place.spec), none.resume(&place.spec, None).is_none()), (None, true));
        none.end(&place.node.folders, place.spec.job);
        none.free_unwanted(&place.node.folders);
    }
}
