//! Packages of jobs on the coordinator's disk: taken in, given out, and removed when nobody needs them.
//!
//! A file named by its hash is whole, and was found good, before it has that name; what is under way has another, and goes at the next start. Who needs
//! one is asked of the engine each time, so nothing is counted that a crash could make wrong. The trap: between an upload and the job that names
//! it, nobody does; what was used lately stays.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, FileTimes};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use everlit_api::control::{PackageBytes, Upload};
use everlit_api::job::{Fault, FaultKind, JobSpec, is_package};
use everlit_api::join::to_hex;
use everlit_api::package::{PACKED_BYTES_MAX, PackageView, UnpackError, check};
use everlit_api::problem::{Code, Problem};
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::control::Coordinator;
use super::disk_free;

/// Uploads under way at once, and how long one may take.
const UPLOADS_MAX: usize = 4;
const UPLOAD_TIME_MAX: Duration = Duration::from_secs(3_600);
/// Bytes of all packages at most.
const KEPT_BYTES_MAX: u64 = 16 << 30;
/// Bytes of the disk that are left to the store, whatever is uploaded; looked at each time so many have come.
const DISK_LEFT_BYTES: u64 = 256 << 20;
const DISK_LOOK_BYTES: u64 = 16 << 20;
/// What no active job names goes after this long without use.
const UNUSED_MAX: Duration = Duration::from_secs(7 * 86_400);
/// Where room is needed, it goes after this long: the job that it was uploaded for may be on its way.
const UNUSED_MIN: Duration = Duration::from_secs(600);
/// Ends the name of what is under way.
const DRAFT: &str = ".part";
const CHUNK_BYTES: usize = 256 * 1024;

/// All packages of a coordinator.
#[derive(Debug)]
pub struct Packages {
    dir: PathBuf,
    uploads: Arc<Semaphore>,
    drafts: AtomicU64,
    /// To say that one is there, and to remove one, is done one at a time.
    one_at_a_time: Mutex<()>,
}

/// A file that goes unless it is given its name.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        // It is gone, too, once it has its name.
        let _ = fs::remove_file(&self.0);
    }
}

/// One that is kept.
struct Kept {
    package: String,
    bytes: u64,
    used_at: SystemTime,
}

fn full() -> Problem {
    let why = "the disk of the coordinator's data folder has no room for the package: free space, or purge final jobs";
    Problem::new(Code::StoreUnavailable, why).retry_after(10)
}

fn missing(package: &str) -> Problem {
    Problem::new(Code::NotFound, format!("there is no package {package}: upload it (PUT /packages/{package})"))
}

fn of_disk(error: &io::Error) -> Problem {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => full(),
        _ => {
            tracing::error!("packages can not be kept: {error}");
            Problem::new(Code::StoreUnavailable, "packages can not be kept; the coordinator's log says why").retry_after(10)
        }
    }
}

fn invalid(why: impl std::fmt::Display) -> Problem {
    Problem::new(Code::Invalid, format!("the package is refused: {why}"))
}

impl Packages {
    /// Those of a data folder; what was under way is gone.
    ///
    /// # Errors
    /// The folder can not be made or read.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let dir = data_dir.join("packages");
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        for entry in fs::read_dir(&dir)?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.ends_with(DRAFT)) {
                fs::remove_file(entry.path())?;
            }
        }
        let (uploads, drafts, one_at_a_time) = (Arc::new(Semaphore::new(UPLOADS_MAX)), AtomicU64::new(0), Mutex::default());
        Ok(Self { dir, uploads, drafts, one_at_a_time })
    }

    fn place(&self, package: &str) -> PathBuf {
        self.dir.join(package)
    }

    /// One that is kept, used from now on.
    pub fn take_up(&self, package: &str) -> Result<PackageView, Problem> {
        let _held = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match File::options().append(true).open(self.place(package)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing(package)),
            Err(error) => return Err(of_disk(&error)),
        };
        if let Err(error) = file.set_times(FileTimes::new().set_modified(SystemTime::now())) {
            tracing::warn!(package, "its use can not be noted: {error}");
        }
        let bytes = file.metadata().map_err(|error| of_disk(&error))?.len();
        Ok(PackageView { package: package.into(), bytes })
    }

    /// What a job names must be there when it is submitted.
    pub fn needed_by(&self, spec: &JobSpec) -> Result<(), Problem> {
        let Some(package) = &spec.package else { return Ok(()) };
        match self.take_up(package) {
            Err(problem) if problem.code == Code::NotFound => {
                let detail =
                    "is not here (or not any more): upload it first, with PUT /packages/{sha256} or `everlit submit --workdir FOLDER`";
                let fault = Fault { pointer: "/package".into(), detail: detail.into(), kind: FaultKind::Invalid };
                Err(Problem { errors: vec![fault], ..Problem::new(Code::Invalid, format!("/package {detail}")) })
            }
            other => other.map(drop),
        }
    }

    /// Writes what comes, and gives it its name if it is what it was said to be. True when it was not there.
    pub async fn keep(&self, mut upload: Upload, wanted: BTreeSet<String>) -> Result<(PackageView, bool), Problem> {
        let Ok(_permit) = self.uploads.clone().try_acquire_owned() else {
            let why = format!("{UPLOADS_MAX} packages are being uploaded: try again when one of them is done");
            return Err(Problem::new(Code::RateLimited, why).retry_after(5));
        };
        if let Ok(kept) = self.take_up(&upload.package) {
            // However it ends, it is there.
            let _ = tokio::time::timeout(UPLOAD_TIME_MAX, read_on(&mut upload.bytes)).await;
            return Ok((kept, false));
        }
        let number = self.drafts.fetch_add(1, Ordering::Relaxed);
        let draft = Draft(self.dir.join(format!("{}-{number}{DRAFT}", upload.package)));
        let written = tokio::time::timeout(UPLOAD_TIME_MAX, self.write(&draft.0, &mut upload.bytes)).await;
        let slow = |_| Problem::new(Code::BadRequest, "the upload took more than an hour and was given up");
        let (bytes, hash) = written.map_err(slow)??;
        if hash != upload.package {
            return Err(invalid(format!("its bytes have the sha256 {hash}, and it was to be kept as {}", upload.package)));
        }
        let place = self.place(&upload.package);
        let checked = tokio::task::spawn_blocking({
            let path = draft.0.clone();
            move || File::open(&path).map(check)
        });
        match checked.await.map_err(|error| Problem::new(Code::Internal, error.to_string()))?.map_err(|error| of_disk(&error))? {
            Ok(contents) => {
                tracing::info!(
                    package = upload.package,
                    bytes,
                    files = contents.files,
                    unpacked = contents.bytes,
                    "a package was uploaded"
                );
            }
            Err(UnpackError::Bad(bad)) => return Err(invalid(bad)),
            Err(UnpackError::Io { error, .. }) => return Err(of_disk(&error)),
        }
        self.make_room(bytes, &wanted)?;
        let named = fs::rename(&draft.0, &place).and_then(|()| File::open(&self.dir)?.sync_all());
        named.map_err(|error| of_disk(&error))?;
        Ok((PackageView { package: upload.package, bytes }, true))
    }

    async fn write(&self, path: &Path, from: &mut PackageBytes) -> Result<(u64, String), Problem> {
        let lost = |error: io::Error| match error.kind() {
            io::ErrorKind::TimedOut => Problem::new(Code::BadRequest, "the upload brought nothing for a minute and was given up"),
            _ => Problem::new(Code::BadRequest, "the connection ended before the package did"),
        };
        let file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(|error| of_disk(&error))?;
        let mut file = tokio::fs::File::from_std(file);
        let (mut bytes, mut look_at, mut hash) = (0, 0, Sha256::new());
        while let Some(chunk) = from.next().await {
            let chunk = chunk.map_err(lost)?;
            if bytes >= look_at {
                look_at = bytes + DISK_LOOK_BYTES;
                if disk_free(&self.dir).is_some_and(|free| free < DISK_LEFT_BYTES) {
                    return Err(full());
                }
            }
            bytes += chunk.len() as u64;
            if bytes > PACKED_BYTES_MAX {
                let most = PACKED_BYTES_MAX >> 20;
                let why = format!("a package may have at most {most} MiB: put data where all nodes can read it");
                return Err(Problem::new(Code::BodyTooLarge, why));
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(|error| of_disk(&error))?;
        }
        file.flush().await.map_err(|error| of_disk(&error))?;
        file.sync_all().await.map_err(|error| of_disk(&error))?;
        Ok((bytes, to_hex(&hash.finalize())))
    }

    /// Every package, the one that was not used for the longest time first.
    fn list(&self) -> io::Result<Vec<Kept>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let Some(package) = entry.file_name().to_str().filter(|name| is_package(name)).map(String::from) else { continue };
            let about = entry.metadata()?;
            all.push(Kept { package, bytes: about.len(), used_at: about.modified()? });
        }
        all.sort_by_key(|kept| kept.used_at);
        Ok(all)
    }

    fn make_room(&self, bytes: u64, wanted: &BTreeSet<String>) -> Result<(), Problem> {
        let _held = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.list().map_err(|error| of_disk(&error))?;
        let go = outdated(&all, bytes, wanted, SystemTime::now()).ok_or_else(|| {
            let why = format!(
                "packages of active jobs, and of the last minutes, take {} GiB already: stop what is not needed, or try again later",
                KEPT_BYTES_MAX >> 30
            );
            Problem::new(Code::StoreUnavailable, why).retry_after(60)
        })?;
        for package in go {
            self.remove(package);
        }
        Ok(())
    }

    /// Removes what nobody has needed for long.
    pub fn sweep(&self, wanted: &BTreeSet<String>) -> io::Result<()> {
        let _held = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let now = SystemTime::now();
        for kept in self.list()?.iter().filter(|kept| !wanted.contains(&kept.package) && kept.unused_for(now) > UNUSED_MAX) {
            self.remove(&kept.package);
        }
        Ok(())
    }

    fn remove(&self, package: &str) {
        match fs::remove_file(self.place(package)) {
            Ok(()) => tracing::info!(package, "a package that no active job needs was removed"),
            Err(error) => tracing::warn!(package, "a package could not be removed: {error}"),
        }
    }

    /// Its length and bytes.
    pub async fn read(&self, package: &str) -> Result<(u64, PackageBytes), Problem> {
        let kept = self.take_up(package)?;
        let file = tokio::fs::File::open(self.place(package)).await.map_err(|error| of_disk(&error))?;
        let chunks = futures_util::stream::unfold(Some(file), |file| async {
            let mut file = file?;
            let mut chunk = bytes::BytesMut::with_capacity(CHUNK_BYTES);
            match file.read_buf(&mut chunk).await {
                Ok(0) => None,
                Ok(_) => Some((Ok(chunk.freeze()), Some(file))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok((kept.bytes, Box::pin(chunks)))
    }
}

impl Kept {
    fn unused_for(&self, now: SystemTime) -> Duration {
        now.duration_since(self.used_at).unwrap_or_default()
    }
}

/// Which go so that there is room for so many bytes, given oldest first; `None`: not enough may go.
fn outdated<'a>(all: &'a [Kept], bytes: u64, wanted: &BTreeSet<String>, now: SystemTime) -> Option<Vec<&'a str>> {
    let mut total = bytes + all.iter().map(|kept| kept.bytes).sum::<u64>();
    let mut go = Vec::new();
    for kept in all.iter().filter(|kept| !wanted.contains(&kept.package) && kept.unused_for(now) > UNUSED_MIN) {
        if total <= KEPT_BYTES_MAX {
            break;
        }
        total -= kept.bytes;
        go.push(kept.package.as_str());
    }
    (total <= KEPT_BYTES_MAX).then_some(go)
}

/// Who sends before it reads an answer must be able to send all of it.
async fn read_on(bytes: &mut PackageBytes) {
    let mut read = 0;
    while let Some(Ok(chunk)) = bytes.next().await {
        read += chunk.len() as u64;
        if read > PACKED_BYTES_MAX {
            return;
        }
    }
}

impl Coordinator {
    /// What jobs that are not final need.
    async fn wanted_packages(&self) -> Result<BTreeSet<String>, Problem> {
        self.look(|engine, _| engine.jobs().filter_map(|job| job.spec.package.clone()).collect()).await
    }

    /// Takes a package in.
    pub(super) async fn take_package(&self, upload: Upload) -> Result<(PackageView, bool), Problem> {
        if self.store.is_low() {
            return Err(full());
        }
        let wanted = self.wanted_packages().await?;
        self.packages.keep(upload, wanted).await
    }

    /// Removes packages that nobody has needed for long.
    pub(super) async fn sweep_packages(&self) {
        let Ok(wanted) = self.wanted_packages().await else { return };
        if let Err(error) = self.packages.sweep(&wanted) {
            tracing::warn!("old packages stay: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use bytes::Bytes;
    use expect_test::{Expect, expect};

    use super::*;

    fn packages() -> (tempfile::TempDir, Packages) {
        let dir = tempfile::tempdir().unwrap();
        let packages = Packages::open(dir.path()).unwrap();
        (dir, packages)
    }

    /// A small package and its name.
    fn good() -> (String, Vec<u8>) {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("train.py"), "print()").unwrap();
        let mut packed = everlit_api::package::pack(from.path()).unwrap();
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut packed.file, &mut bytes).unwrap();
        (packed.package, bytes)
    }

    fn upload(package: &str, chunks: Vec<io::Result<Bytes>>) -> Upload {
        Upload { package: package.into(), bytes: Box::pin(futures_util::stream::iter(chunks)) }
    }

    async fn keep(packages: &Packages, package: &str, bytes: &[u8]) -> Result<bool, Problem> {
        let chunks = bytes.chunks(7).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        packages.keep(upload(package, chunks), BTreeSet::new()).await.map(|(_, is_new)| is_new)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir.join("packages")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn what_is_uploaded_is_given_out_as_it_came() {
        let (dir, packages) = packages();
        let (name, bytes) = good();
        assert_eq!(packages.take_up(&name).unwrap_err().code, Code::NotFound);
        assert!(keep(&packages, &name, &bytes).await.unwrap());
        assert!(!keep(&packages, &name, b"whatever comes when it is there").await.unwrap());
        let (length, chunks) = packages.read(&name).await.unwrap();
        let read = chunks.map(|chunk| chunk.unwrap().to_vec()).concat().await;
        assert_eq!((length, read), (bytes.len() as u64, bytes));
        assert_eq!(names(dir.path()), [name]);
    }

    #[tokio::test]
    async fn what_is_not_what_it_says_leaves_nothing() {
        let (dir, packages) = packages();
        let (name, bytes) = good();
        let told = |problem: Problem, expected: Expect| expected.assert_eq(&format!("{} {}", problem.status, problem.detail));
        let other = format!("{}{}", "00".repeat(31), "ab");
        let wrong = keep(&packages, &other, &bytes).await.unwrap_err();
        assert_eq!((wrong.code, wrong.detail.contains(&name)), (Code::Invalid, true), "{}", wrong.detail);
        let no_tar = to_hex(&Sha256::digest(b"hello"));
        told(
            keep(&packages, &no_tar, b"hello").await.unwrap_err(),
            expect!["422 the package is refused: it is no gzipped tar, or is cut off or damaged (unexpected end of file)"],
        );
        let cut = vec![Ok(Bytes::from_static(b"hel")), Err(io::ErrorKind::ConnectionReset.into())];
        let broken = packages.keep(upload(&name, cut), BTreeSet::new()).await.unwrap_err();
        told(broken, expect!["400 the connection ended before the package did"]);
        let silent = packages.keep(upload(&name, vec![Err(io::ErrorKind::TimedOut.into())]), BTreeSet::new()).await.unwrap_err();
        told(silent, expect!["400 the upload brought nothing for a minute and was given up"]);
        let block = Bytes::from(vec![0; 1 << 20]);
        let long = (0..=512).map(|_| Ok(block.clone())).collect();
        let long = packages.keep(upload(&name, long), BTreeSet::new()).await.unwrap_err();
        told(long, expect!["413 a package may have at most 512 MiB: put data where all nodes can read it"]);
        assert_eq!(names(dir.path()), [""; 0]);
        // Whoever goes away takes what it has sent along.
        let waits = futures_util::stream::iter([Ok(Bytes::from_static(b"x"))]).chain(futures_util::stream::pending());
        let waits = packages.keep(Upload { package: name, bytes: Box::pin(waits) }, BTreeSet::new());
        tokio::select! {
            biased;
            _ = waits => unreachable!("it waits"),
            () = async { while names(dir.path()).is_empty() { tokio::task::yield_now().await } } => {}
        }
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn a_job_names_only_what_is_there() {
        let (dir, packages) = packages();
        let spec = JobSpec { package: Some("ab".repeat(32)), ..JobSpec::default_for(1) };
        let problem = packages.needed_by(&spec).unwrap_err();
        expect![
            "/package is not here (or not any more): upload it first, with PUT /packages/{sha256} or `everlit submit --workdir FOLDER`"
        ]
        .assert_eq(&problem.detail);
        assert_eq!((problem.code, problem.errors[0].pointer.as_str()), (Code::Invalid, "/package"));
        assert!(packages.needed_by(&JobSpec::default_for(1)).is_ok());
        fs::write(dir.path().join("packages").join("ab".repeat(32)), "x").unwrap();
        assert!(packages.needed_by(&spec).is_ok());
    }

    #[test]
    fn what_nobody_needs_goes_oldest_first() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let kept = |name: &str, gib: u64, minutes: u64| Kept {
            package: name.into(),
            bytes: gib << 30,
            used_at: now - Duration::from_secs(minutes * 60),
        };
        let all = [kept("a", 4, 50), kept("b", 6, 40), kept("c", 4, 30), kept("d", 2, 1)];
        let wanted = BTreeSet::from(["a".to_string()]);
        assert_eq!(outdated(&all, 0, &wanted, now), Some(vec![]));
        assert_eq!(outdated(&all, 1, &wanted, now), Some(vec!["b"]));
        assert_eq!(outdated(&all, 7 << 30, &wanted, now), Some(vec!["b", "c"]));
        assert_eq!(outdated(&all, 11 << 30, &wanted, now), None, "what jobs need, and what came just now, stays");
    }

    #[test]
    fn what_was_not_used_for_a_week_goes_unless_a_job_needs_it() {
        let (dir, packages) = packages();
        let put = |name: &str, days: u64| {
            let path = dir.path().join("packages").join(name);
            let mut file = File::create(path).unwrap();
            file.write_all(b"x").unwrap();
            file.set_times(FileTimes::new().set_modified(SystemTime::now() - Duration::from_secs(days * 86_400))).unwrap();
        };
        let [old, needed, used, young] = ["aa", "bb", "cc", "dd"].map(|two| two.repeat(32));
        for (name, days) in [(&old, 8), (&needed, 8), (&used, 8), (&young, 6)] {
            put(name, days);
        }
        put("something-0.part", 0);
        packages.take_up(&used).unwrap();
        packages.sweep(&BTreeSet::from([needed.clone()])).unwrap();
        assert_eq!(names(dir.path()), [needed.as_str(), &used, &young, "something-0.part"]);
        let again = Packages::open(dir.path()).unwrap();
        assert_eq!(again.list().unwrap().len(), 3);
        assert_eq!(names(dir.path()).len(), 3, "what was under way at a crash is gone");
    }
}
