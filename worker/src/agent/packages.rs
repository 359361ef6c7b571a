//! Folders that came with jobs: got from the coordinator once per node, unpacked once per job.
//!
//! `packages/<sha256>` is a packed folder, whole before it has that name; it is a cache, and what was not used lately goes. `workdir/` of a job is what was
//! unpacked for it: its ranks, of every attempt, share it and may write there, and it goes with the job's files. Nothing that the coordinator
//! sends is trusted: [`everlit_api::package`] says what is taken. The trap: a fetch waits for the network, so it is never done on a blocking thread.

use std::fs::{self, DirBuilder, File, FileTimes};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use bytes::Bytes;
use everlit_api::agent::GangSpec;
use everlit_api::job::is_package;
use everlit_api::join::AGENTS_NAME;
use everlit_api::package::{PACKED_BYTES_MAX, UnpackError, unpack};
use everlit_api::problem::Problem;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::dial::Dialer;
use super::effects::not_found_is_fine;
use super::folders::Folders;
use super::join::current;
use super::limits::{CONNECT_MAX, LINK_SILENCE_MAX, PACKAGES_BYTES_MAX, PACKAGES_UNUSED_MAX};
use super::link::{Coordinator, local};
use super::start::Refused;

/// Ends the name of what is under way.
const DRAFT: &str = "part";
/// Begins the name of what is being unpacked, in a job's folder.
const UNPACKING: &str = "unpacking-";
/// Bytes of a refusal at most.
const PROBLEM_BYTES_MAX: usize = 64 * 1024;

/// Packages of this node.
pub(super) struct Packages {
    folders: Folders,
    coordinator: Coordinator,
    /// Several gangs may want one at once: the second finds it there.
    one_at_a_time: Mutex<()>,
}

impl Packages {
    pub(super) fn new(folders: Folders, coordinator: Coordinator) -> Self {
        Self { folders, coordinator, one_at_a_time: Mutex::default() }
    }

    /// Has a package on this node's disk.
    pub(super) async fn fetch(&self, package: &str) -> Result<(), Refused> {
        if !is_package(package) {
            return Err(Refused::forever("the coordinator names a package by what is no sha256"));
        }
        let _held = self.one_at_a_time.lock().await;
        let place = self.folders.package(package);
        if let Ok(file) = File::options().append(true).open(&place) {
            // A cache: what is thought to be older is got again.
            let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
            return Ok(());
        }
        let draft = place.with_extension(DRAFT);
        let fetched = self.fetch_into(package, &draft).await.and_then(|()| Ok(fs::rename(&draft, &place)?));
        if let Err(error) = fetched {
            // What stays is written over by the next try, or removed at the next start.
            let _ = fs::remove_file(&draft);
            return Err(Refused::now(format!("the job's package could not be got from the coordinator: {error:#}")));
        }
        self.prune(Some(package));
        Ok(())
    }

    async fn fetch_into(&self, package: &str, draft: &Path) -> anyhow::Result<()> {
        let answer = timeout(CONNECT_MAX + LINK_SILENCE_MAX, ask(&self.coordinator, package)).await.context("no answer in time")??;
        let mut body = answer.into_body();
        fs::create_dir_all(self.folders.packages())?;
        let mut file = tokio::fs::File::create(draft).await.with_context(|| format!("could not write `{}`", draft.display()))?;
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        while let Some(frame) = timeout(LINK_SILENCE_MAX, body.frame()).await.context("the coordinator is silent")? {
            let Ok(chunk) = frame.context("the connection broke")?.into_data() else { continue };
            bytes += chunk.len() as u64;
            if bytes > PACKED_BYTES_MAX {
                bail!("it is longer than a package may be");
            }
            hash.update(&chunk);
            file.write_all(&chunk).await?;
        }
        file.flush().await?;
        file.sync_all().await?;
        let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        if found != package {
            bail!("its bytes have the sha256 {found}, and not {package}");
        }
        Ok(())
    }

    /// Removes what an agent before this one was about to get, and what was not used lately.
    pub(super) fn sweep(&self) {
        for entry in fs::read_dir(self.folders.packages()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|end| end == DRAFT) {
                gone(&entry.path(), fs::remove_file(entry.path()));
            }
        }
        self.prune(None);
    }

    fn prune(&self, keep: Option<&str>) {
        let mut all: Vec<(SystemTime, u64, PathBuf)> = fs::read_dir(self.folders.packages())
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_str().is_some_and(|name| is_package(name) && Some(name) != keep))
            .filter_map(|entry| entry.metadata().ok().and_then(|own| Some((own.modified().ok()?, own.len(), entry.path()))))
            .collect();
        all.sort();
        let mut total: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        for (used_at, bytes, path) in all {
            let unused = used_at.elapsed().unwrap_or(Duration::ZERO);
            if total > PACKAGES_BYTES_MAX || unused > PACKAGES_UNUSED_MAX {
                gone(&path, fs::remove_file(&path));
                total -= bytes;
            }
        }
    }
}

fn gone(path: &Path, removed: io::Result<()>) {
    if let Err(error) = removed.or_else(not_found_is_fine) {
        tracing::warn!(path = %path.display(), %error, "could not remove");
    }
}

/// A connection, with TLS or without.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn ask(coordinator: &Coordinator, package: &str) -> anyhow::Result<Response<Incoming>> {
    let request = Request::get(format!("/agent/packages/{package}"));
    let (stream, request): (Box<dyn Stream>, _) = match coordinator {
        Coordinator::Local(file) => {
            let (address, token) = local(file)?;
            let stream = TcpStream::connect(&address).await.context("could not connect")?;
            (Box::new(stream), request.header(HOST, &address).header(AUTHORIZATION, format!("Bearer {token}")))
        }
        Coordinator::Joined(shared) => {
            let own = current(shared);
            (Box::new(Dialer::of(&own)?.connect(&own.coordinator).await?), request.header(HOST, AGENTS_NAME))
        }
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the body.
    drop(tokio::spawn(connection));
    let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    if answer.status().is_success() {
        return Ok(answer);
    }
    let status = answer.status();
    let told = Limited::new(answer.into_body(), PROBLEM_BYTES_MAX).collect().await.ok();
    match told.and_then(|told| serde_json::from_slice::<Problem>(&told.to_bytes()).ok()) {
        Some(problem) => bail!(problem.detail),
        None => bail!("it answered {status}"),
    }
}

/// Unpacks a gang's package, unless that was done for an earlier attempt. Blocks.
pub(super) fn unpack_for(folders: &Folders, spec: &GangSpec) -> Result<(), Refused> {
    let Some(package) = spec.package.as_deref().filter(|_| !folders.workdir(spec.job).exists()) else { return Ok(()) };
    let job = folders.job(spec.job);
    let draft = job.join(format!("{UNPACKING}a{}", spec.attempt));
    let refused = |error: io::Error| Refused::now(format!("the job's package could not be unpacked: {error}"));
    // Of an agent that died in the middle of it.
    fs::remove_dir_all(&draft).or_else(not_found_is_fine).map_err(refused)?;
    DirBuilder::new().recursive(true).mode(0o700).create(&draft).map_err(refused)?;
    let place = folders.package(package);
    let packed = File::open(&place).map_err(refused)?;
    if let Err(error) = unpack(packed, &draft) {
        gone(&draft, fs::remove_dir_all(&draft));
        return Err(match error {
            UnpackError::Bad(bad) => {
                gone(&place, fs::remove_file(&place));
                Refused::forever(format!("the job's package {package} is not taken: {bad}"))
            }
            error @ UnpackError::Io { .. } => Refused::now(format!("the job's package could not be unpacked: {error}")),
        });
    }
    fs::rename(&draft, folders.workdir(spec.job)).and_then(|()| File::open(&job)?.sync_all()).map_err(refused)?;
    for entry in fs::read_dir(&job).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(UNPACKING)) {
            gone(&entry.path(), fs::remove_dir_all(entry.path()));
        }
    }
    Ok(())
}

/// Where a gang's ranks start.
pub(super) fn workdir(folders: &Folders, spec: &GangSpec) -> Option<PathBuf> {
    match (&spec.package, &spec.workdir) {
        (None, given) => given.as_ref().map(PathBuf::from),
        (Some(_), None) => Some(folders.workdir(spec.job)),
        (Some(_), Some(within)) => Some(folders.workdir(spec.job).join(within)),
    }
}
