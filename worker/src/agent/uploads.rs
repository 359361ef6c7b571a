//! Checkpoints on their way into stores, behind training: on threads of their own that yield to ranks, some at a time, with bounded memory
//! and at most so many bytes a second.
//!
//! Each job has one task that holds the newest order until it is done: a fault is told and tried again after a pause that grows. A newer
//! order is taken up when the one under way is done or has failed. What is being uploaded is held by links of its own, so that ranks and
//! agent may remove older checkpoints meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use everlit_api::agent::stored::{StoreFault, UploadOrder, Uploaded};
use everlit_api::ids::JobId;
use everlit_api::manifest::Manifest;
use everlit_api::store::{CheckedFile, Fault, NotKept, Settings, Shelf, Source, Store, Trouble, digest};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Semaphore, mpsc, watch};

use super::effects::{Done, not_found_is_fine};
use super::folders::Folders;
use super::limits::{UPLOAD_WAIT_MAX, UPLOAD_WAIT_MIN, UPLOADS_AT_ONCE};
use crate::checkpoint;

/// How many bytes a second all uploads of this node take together.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Pace {
    /// `None`: as many as go.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// When so many bytes may be sent.
    pub(super) fn turn(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) else { return now };
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*free_at).max(now);
        *free_at = at + Duration::from_secs_f64(bytes as f64 / rate as f64);
        at
    }
}

/// The uploads of this node.
pub(super) struct Uploads {
    runtime: Option<Runtime>,
    jobs: BTreeMap<JobId, watch::Sender<UploadOrder>>,
    pace: Arc<Pace>,
    room: Arc<Semaphore>,
    busy: Arc<AtomicUsize>,
}

impl Uploads {
    /// None yet.
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            runtime: None,
            jobs: BTreeMap::new(),
            pace: Arc::new(pace),
            room: Arc::new(Semaphore::new(UPLOADS_AT_ONCE)),
            busy: Arc::default(),
        }
    }

    /// Takes an order up; the same one again changes nothing.
    pub(super) fn order(&mut self, order: UploadOrder, folders: &Folders, done: &mpsc::Sender<Done>) {
        if let Some(own) = self.jobs.get(&order.job).filter(|own| !own.is_closed()) {
            own.send_if_modified(|known| {
                let news = *known != order;
                *known = order;
                news
            });
            return;
        }
        let Some(runtime) = self.runtime() else { return };
        let job = order.job;
        let (to, orders) = watch::channel(order);
        let task = Tended {
            job,
            orders,
            folders: folders.clone(),
            pace: self.pace.clone(),
            room: self.room.clone(),
            busy: self.busy.clone(),
            done: done.clone(),
        };
        runtime.spawn(task.run());
        self.jobs.insert(job, to);
    }

    /// Few threads, which yield to ranks: a step must not wait for an upload.
    pub(super) fn runtime(&mut self) -> Option<Handle> {
        if self.runtime.is_none() {
            let built = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .thread_name("upload")
                .on_thread_start(be_nice)
                .enable_all()
                .build();
            match built {
                Ok(runtime) => self.runtime = Some(runtime),
                Err(error) => tracing::warn!(%error, "nothing can be uploaded"),
            }
        }
        self.runtime.as_ref().map(|runtime| runtime.handle().clone())
    }

    /// What all that is sent to stores shares: how fast, and how many at a time.
    pub(super) fn shared(&self) -> (Arc<Pace>, Arc<Semaphore>) {
        (self.pace.clone(), self.room.clone())
    }

    /// The job goes: what is under way of it is given up.
    pub(super) fn drop_job(&mut self, job: JobId) {
        self.jobs.remove(&job);
    }

    /// Whether anything is under way, or waits for its next try.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// This thread comes after all others that want to run.
fn be_nice() {
    const NICE: i32 = 15;
    // SAFETY: the call has no memory to go wrong with; 0 is the calling thread. That it may fail costs only some speed of the ranks.
    let _ = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
}

/// One job's uploads.
struct Tended {
    job: JobId,
    orders: watch::Receiver<UploadOrder>,
    folders: Folders,
    pace: Arc<Pace>,
    room: Arc<Semaphore>,
    busy: Arc<AtomicUsize>,
    done: mpsc::Sender<Done>,
}

impl Tended {
    async fn run(mut self) {
        let mut wait = UPLOAD_WAIT_MIN;
        loop {
            let order = self.orders.borrow_and_update().clone();
            self.busy.fetch_add(1, Ordering::Relaxed);
            let outcome = self.upload(&order).await;
            let again = match &outcome {
                Err(NotKept::Fault(fault)) => fault.trouble != Trouble::Damaged && fault.trouble != Trouble::NotFound,
                _ => false,
            };
            if !again {
                tokio::task::block_in_place(|| self.let_go());
            }
            let news = match outcome {
                Ok(done) => {
                    wait = UPLOAD_WAIT_MIN;
                    Done::Uploaded(done)
                }
                Err(NotKept::Fault(fault)) => Done::StoreFault(StoreFault {
                    job: self.job,
                    step: Some(order.step),
                    trouble: fault.trouble,
                    reason: fault.to_string(),
                }),
                Err(fenced @ NotKept::Fenced { .. }) => Done::StoreFault(StoreFault {
                    job: self.job,
                    step: Some(order.step),
                    trouble: Trouble::Conflict,
                    reason: fenced.to_string(),
                }),
            };
            // The driver is gone only when the agent ends.
            let mut ends = self.done.send(news).await.is_err();
            if again {
                // A newer order does not make a store that fails work.
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(UPLOAD_WAIT_MAX);
            }
            self.busy.fetch_sub(1, Ordering::Relaxed);
            ends |= if again { self.orders.has_changed().is_err() } else { self.orders.changed().await.is_err() };
            if ends {
                break;
            }
        }
        tokio::task::block_in_place(|| self.let_go());
    }

    /// Links of a checkpoint's files, which stay when the checkpoint is removed.
    fn hold(&self, step: u64) -> io::Result<PathBuf> {
        let from = self.folders.checkpoints(self.job).join(checkpoint::step_folder(step));
        let held = self.folders.uploads(self.job).join(checkpoint::step_folder(step));
        if held.join(checkpoint::MANIFEST_NAME).exists() {
            return Ok(held);
        }
        self.let_go();
        fs::create_dir_all(&held)?;
        let mut manifest = None;
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            if entry.file_name() == checkpoint::MANIFEST_NAME {
                manifest = Some(entry.path());
            } else if entry.file_type()?.is_file() {
                fs::hard_link(entry.path(), held.join(entry.file_name()))?;
            }
        }
        // It comes last: what has one is whole.
        fs::hard_link(manifest.unwrap_or(from), held.join(checkpoint::MANIFEST_NAME))?;
        Ok(held)
    }

    fn let_go(&self) {
        let place = self.folders.uploads(self.job);
        if let Err(error) = fs::remove_dir_all(&place).or_else(not_found_is_fine) {
            tracing::warn!(path = %place.display(), %error, "could not remove");
        }
    }

    async fn upload(&self, order: &UploadOrder) -> Result<Uploaded, NotKept> {
        let Ok(_room) = self.room.acquire().await else { return Err(ended().into()) };
        let begun = Instant::now();
        let held = tokio::task::block_in_place(|| self.hold(order.step));
        let path = held.map_err(|error| here(&self.folders.checkpoints(order.job), &format!("step {}: {error}", order.step)))?;
        let text = tokio::task::block_in_place(|| checkpoint::manifest_bytes(&path)).map_err(|damage| here(&path, &damage.to_string()))?;
        let (manifest, text) = (Manifest::parse(&text).map_err(|error| here(&path, &error.to_string()))?, Bytes::from(text));
        let settings = Settings::of_process().with_job(&order.env);
        let base = order.to.parent().ok_or_else(|| here(&path, "its place in the store is none"))?;
        let shelf = Shelf::new(Store::open(&base, &settings)?.at(&order.job.to_string()));
        let counts = shelf.begin(&order.lineage).await?;
        if !counts.counts(manifest.attempt, manifest.step) {
            // It says so in the words of a commit.
            shelf.commit(&manifest, &text).await?;
        }
        let digest = digest(&text);
        let mut bytes = 0;
        for file in shelf.lacking(&manifest, &text).await? {
            let open =
                tokio::task::block_in_place(|| checkpoint::open_named(&path, file)).map_err(|damage| here(&path, &damage.to_string()))?;
            let mut source = FileSource { file: CheckedFile::new(open, &path, file), tended: self };
            shelf.put_file(order.step, &digest, file, &mut source).await?;
            bytes += file.bytes;
        }
        shelf.commit(&manifest, &text).await?;
        let kept = match shelf.prune(order.keep as usize).await {
            Ok(kept) => kept,
            Err(fault) => {
                tracing::warn!(job = %order.job, %fault, "older checkpoints are left in the store");
                vec![order.step]
            }
        };
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Uploaded { job: order.job, step: order.step, bytes, took_ms, kept })
    }
}

fn ended() -> Fault {
    Fault { trouble: Trouble::NotFound, asked: "go on".into(), why: "the job is gone".into() }
}

/// What is to be uploaded is not what it was.
fn here(path: &Path, why: &str) -> Fault {
    Fault { trouble: Trouble::Damaged, asked: format!("read {}", path.display()), why: why.into() }
}

/// A file on its way, as long as its job is there, and at the pace of all.
struct FileSource<'a> {
    file: CheckedFile<'a>,
    tended: &'a Tended,
}

impl Source for FileSource<'_> {
    fn next(&mut self, bytes: usize) -> Result<Vec<u8>, Fault> {
        tokio::task::block_in_place(|| self.file.read(bytes))
    }

    fn wait_for_turn(&mut self, bytes: usize) -> Result<(), Fault> {
        // Looked at between parts: a job that goes is not waited for longer than one part takes.
        if self.tended.orders.has_changed().is_err() {
            return Err(ended());
        }
        let wait = self.tended.pace.turn(bytes).saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            tokio::task::block_in_place(|| std::thread::sleep(wait));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::store::{Lineage, Place};

    use super::*;
    use crate::agent::copies::tests::{Node, job, node};
    use crate::agent::fetch_stored::{self, NotFetched, Wanted};

    /// A node that uploads into a folder.
    struct Scene {
        uploads: Uploads,
        node: Node,
        shared: tempfile::TempDir,
        to: mpsc::Sender<Done>,
        done: mpsc::Receiver<Done>,
    }

    impl Scene {
        fn new() -> Self {
            let (to, done) = mpsc::channel(8);
            Self { uploads: Uploads::new(Pace::new(None)), node: node(), shared: tempfile::tempdir().unwrap(), to, done }
        }

        fn place(&self) -> Place {
            self.shared.path().join(job().to_string()).to_str().unwrap().parse().unwrap()
        }

        fn shelf(&self) -> PathBuf {
            self.shared.path().join(job().to_string())
        }

        fn order(&mut self, step: u64, attempt: u32, from: u64) -> Done {
            let mut lineage = Lineage::default();
            lineage.begin(attempt, from);
            let order = UploadOrder { job: job(), step, to: self.place(), env: BTreeMap::new(), lineage, keep: 2 };
            self.uploads.order(order, &self.node.folders, &self.to);
            self.done.blocking_recv().unwrap()
        }

        fn fetch(&self, into: &Node, above: Option<u64>) -> Result<Option<u64>, NotFetched> {
            let (place, env) = (self.place(), BTreeMap::new());
            let wanted = Wanted { place: &place, env: &env, max: None, above, attempt: 9 };
            fetch_stored::fetch(&into.checkpoints(), wanted, &|| true)
        }

        fn files(&self, step: u64) -> Vec<PathBuf> {
            let folder = self.shelf().join(checkpoint::step_folder(step));
            let inner = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir()).unwrap();
            let mut files: Vec<PathBuf> = fs::read_dir(inner).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            files
        }
    }

    fn kept(done: Done) -> Vec<u64> {
        match done {
            Done::Uploaded(done) => done.kept,
            other => panic!("{other:?}"),
        }
    }

    fn fault(done: Done) -> StoreFault {
        match done {
            Done::StoreFault(fault) => fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_uploaded_comes_back_byte_for_byte_on_a_node_without_anything() {
        let mut scene = Scene::new();
        let path = scene.node.commit(50, 1);
        assert_eq!(kept(scene.order(50, 1, 0)), [50]);
        assert!(!scene.node.folders.uploads(job()).exists(), "nothing is held any more");
        let other = node();
        assert_eq!(scene.fetch(&other, None).unwrap(), Some(50));
        let fetched = other.checkpoints().join(checkpoint::step_folder(50));
        assert_eq!(fs::read(path.join("large ü")).unwrap(), fs::read(fetched.join("large ü")).unwrap());
        assert_eq!(checkpoint::verify(&path).unwrap(), checkpoint::verify(&fetched).unwrap());
        assert_eq!(scene.fetch(&other, Some(50)).unwrap(), None, "nothing newer is there");
        scene.node.commit(60, 1);
        scene.node.commit(70, 1);
        assert_eq!(kept(scene.order(60, 1, 0)), [60, 50]);
        assert_eq!(kept(scene.order(70, 1, 0)), [70, 60], "and what is beyond `keep` goes");
    }

    #[test]
    fn what_has_rotted_here_is_not_spread() {
        let mut scene = Scene::new();
        let path = scene.node.commit(50, 1).join("large ü");
        let mut content = fs::read(&path).unwrap();
        content[5_000] ^= 1;
        fs::write(&path, content).unwrap();
        let told = fault(scene.order(50, 1, 0));
        assert_eq!(told.trouble, Trouble::Damaged);
        assert!(told.reason.contains("chunk 0 has another sha256 than committed"), "{}", told.reason);
        assert!(!scene.shelf().join(checkpoint::step_folder(50)).join(checkpoint::MANIFEST_NAME).exists());
        // The next one is not held up by it.
        scene.node.commit(60, 1);
        assert_eq!(kept(scene.order(60, 1, 0)), [60]);
    }

    #[test]
    fn one_that_was_removed_here_while_it_waits_is_uploaded_all_the_same_and_one_that_never_was_is_told() {
        let mut scene = Scene::new();
        let path = scene.node.commit(50, 1);
        let orders = watch::channel(UploadOrder {
            job: job(),
            step: 50,
            to: scene.place(),
            env: BTreeMap::new(),
            lineage: Lineage::default(),
            keep: 1,
        });
        let tended = Tended {
            job: job(),
            orders: orders.1,
            folders: scene.node.folders.clone(),
            pace: Arc::new(Pace::new(None)),
            room: Arc::new(Semaphore::new(1)),
            busy: Arc::default(),
            done: scene.to.clone(),
        };
        let held = tended.hold(50).unwrap();
        fs::remove_dir_all(&path).unwrap();
        assert!(checkpoint::verify(&held).is_ok());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let order = tended.orders.borrow().clone();
        let done = runtime.block_on(async { tokio::spawn(async move { tended.upload(&order).await }).await });
        assert_eq!(done.unwrap().unwrap().step, 50);
        assert_eq!(fault(scene.order(90, 1, 0)).trouble, Trouble::Damaged);
    }

    #[test]
    fn an_attempt_that_was_left_behind_is_told_so_and_leaves_nothing() {
        let mut scene = Scene::new();
        scene.node.commit(50, 1);
        assert_eq!(kept(scene.order(50, 1, 0)), [50]);
        let mut other = Scene { shared: scene.shared, ..Scene::new() };
        other.node.commit(60, 2);
        assert_eq!(kept(other.order(60, 2, 50)), [60, 50]);
        scene.shared = other.shared;
        scene.node.commit(70, 1);
        let told = fault(scene.order(70, 1, 0));
        assert_eq!(told.trouble, Trouble::Conflict);
        assert!(told.reason.contains("attempt 2 has begun before that step"), "{}", told.reason);
        assert!(!scene.shelf().join(checkpoint::step_folder(70)).exists());
    }

    #[test]
    fn a_damaged_one_in_the_store_is_passed_over_and_a_transfer_that_broke_off_goes_on() {
        let mut scene = Scene::new();
        scene.node.commit(50, 1);
        scene.node.commit(60, 1);
        assert_eq!(kept(scene.order(50, 1, 0)), [50]);
        assert_eq!(kept(scene.order(60, 1, 0)), [60, 50]);
        let large = scene.files(60).pop().unwrap();
        let mut content = fs::read(&large).unwrap();
        content[7] ^= 1;
        fs::write(&large, &content).unwrap();
        let other = node();
        assert_eq!(scene.fetch(&other, None).unwrap(), Some(50));
        // It is right again: what had come of it is not fetched twice.
        content[7] ^= 1;
        fs::write(&large, &content).unwrap();
        let small = scene.files(60).remove(0);
        let third = node();
        let draft = third.checkpoints().join(checkpoint::draft_folder(60, 9, u32::MAX));
        fs::create_dir_all(&draft).unwrap();
        fs::copy(scene.shelf().join(checkpoint::step_folder(60)).join(checkpoint::MANIFEST_NAME), draft.join(checkpoint::MANIFEST_NAME))
            .unwrap();
        fs::copy(&small, draft.join(small.file_name().unwrap())).unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&draft.join(small.file_name().unwrap()));
        assert_eq!(scene.fetch(&third, None).unwrap(), Some(60));
        let place = third.checkpoints().join(checkpoint::step_folder(60));
        assert_eq!(inode(&place.join(small.file_name().unwrap())), before);
        assert!(checkpoint::verify(&place).is_ok());
    }

    #[test]
    fn all_uploads_together_keep_to_the_pace() {
        let pace = Pace::new(Some(1_000_000));
        let begun = Instant::now();
        let turns: Vec<Duration> = (0..4).map(|_| pace.turn(500_000).saturating_duration_since(begun)).collect();
        for (index, turn) in turns.iter().enumerate() {
            assert!(*turn >= Duration::from_millis(500 * index as u64), "{turns:?}");
        }
        assert!(Pace::new(None).turn(usize::MAX) <= Instant::now());
    }
}
