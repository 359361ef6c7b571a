//! Where other nodes fetch checkpoints from: `GET /jobs/<id>/checkpoints/<step>/manifest` and `…/files/<n>`, n counting as the manifest does.
//!
//! TLS with a certificate of this run; a ticket of the coordinator says which job's checkpoints may be read. Connections and what each holds
//! are bounded. What is read may be damaged or go meanwhile: who fetches checks all of it.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use everlit_api::agent::copies::{COPIES_NAME, CopyDoor};
use everlit_api::ids::JobId;
use everlit_api::join::to_hex;
use everlit_api::ports::PortRange;
use futures_util::stream::unfold;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::agent::folders::Folders;
use crate::agent::limits::{COPY_CONNECTIONS_MAX, COPY_PIECE_BYTES, COPY_PIECES_MAX, COPY_SILENCE_MAX};
use crate::checkpoint::{self, Damage};

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The open door; it closes when this is dropped.
#[derive(Debug)]
pub(in crate::agent) struct Door {
    at: IpAddr,
    told: CopyDoor,
    visits: Arc<Visits>,
    _open: oneshot::Sender<()>,
}

impl Door {
    /// Opens it at the node's address, on the first port of the range that is free.
    pub(in crate::agent) fn open(folders: Folders, at: IpAddr, ports: PortRange) -> anyhow::Result<Self> {
        let listener = (ports.first..=ports.last).find_map(|port| TcpListener::bind(SocketAddr::new(at, port)).ok());
        let listener = listener.with_context(|| format!("no port of {ports} is free at {at}"))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        // A key that serves nothing else is as good a source of chance as any.
        let (key, secret) = (KeyPair::generate()?, KeyPair::generate()?);
        let made = CertificateParams::new(vec![COPIES_NAME.into()])?.self_signed(&key)?;
        let told = CopyDoor { port, certificate: made.pem(), secret: to_hex(&Sha256::digest(secret.serialize_der())) };
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|why| anyhow::anyhow!("a key of our own: {why}"))?;
        let config = config.with_no_client_auth().with_single_cert(vec![made.der().clone()], key)?;
        let visits = Arc::new(Visits::default());
        let shared = Arc::new(Shared { folders, told: told.clone(), visits: visits.clone() });
        let (open, closed) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(2 * COPY_CONNECTIONS_MAX)
            .thread_stack_size(256 * 1024)
            .build()?;
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, TlsAcceptor::from(Arc::new(config)), shared) => {}
                    // The sender is only ever dropped.
                    _ = closed => {}
                }
            });
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name("copies".into()).stack_size(512 * 1024).spawn(serve)?;
        Ok(Self { at, told, visits, _open: open })
    }

    /// Where it is.
    pub(in crate::agent) fn address(&self) -> IpAddr {
        self.at
    }

    /// Whether somebody with a ticket is here, or was within that time.
    pub(in crate::agent) fn is_used(&self, within: Duration) -> bool {
        let last = *self.visits.last.lock().unwrap_or_else(PoisonError::into_inner);
        self.visits.now.load(Ordering::Relaxed) > 0 || last.is_some_and(|last| last.elapsed() < within)
    }

    /// What the coordinator is told of it.
    pub(in crate::agent) fn told(&self) -> CopyDoor {
        self.told.clone()
    }
}

/// Who is here with a ticket.
#[derive(Debug, Default)]
struct Visits {
    now: AtomicUsize,
    last: Mutex<Option<Instant>>,
}

/// One answer that is under way.
struct Visit(Arc<Visits>);

impl Visit {
    fn begin(visits: &Arc<Visits>) -> Self {
        visits.now.fetch_add(1, Ordering::Relaxed);
        Self(visits.clone())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Shared {
    folders: Folders,
    told: CopyDoor,
    visits: Arc<Visits>,
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let room = Arc::new(Semaphore::new(COPY_CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, mostly.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (tls, shared) = (tls.clone(), shared.clone());
        tokio::spawn(async move {
            // Who has gone without a word takes no place for long.
            let _ = setsockopt(&stream, TcpUserTimeout, &(COPY_SILENCE_MAX.as_millis() as u32));
            if let Ok(Ok(stream)) = timeout(COPY_SILENCE_MAX, tls.accept(stream)).await {
                let answer = service_fn(move |request| {
                    let shared = shared.clone();
                    async move { Ok::<_, Infallible>(shared.answer(&request).await) }
                });
                let mut http = hyper::server::conn::http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(COPY_SILENCE_MAX).max_buf_size(16 * 1024);
                // How it ends is of interest to who fetches only.
                let _ = http.serve_connection(TokioIo::new(stream), answer).await;
            }
            drop(permit);
        });
    }
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Manifest,
    File(usize),
}

fn parse(path: &str) -> Option<(JobId, u64, Part)> {
    let mut parts = path.strip_prefix("/jobs/")?.split('/');
    let job = parts.next()?.parse().ok()?;
    let step = parts.next().filter(|part| *part == "checkpoints").and_then(|_| parts.next())?.parse().ok()?;
    let part = match (parts.next()?, parts.next(), parts.next()) {
        ("manifest", None, _) => Part::Manifest,
        ("files", Some(index), None) => Part::File(index.parse().ok()?),
        _ => return None,
    };
    Some((job, step, part))
}

impl Shared {
    async fn answer(self: Arc<Self>, request: &Request<Incoming>) -> Response<Body> {
        let Some((job, step, part)) = parse(request.uri().path()).filter(|_| request.method() == Method::GET) else {
            return refuse(StatusCode::NOT_FOUND, "there is nothing here but checkpoints".into());
        };
        let shown =
            request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|text| text.strip_prefix("Bearer "));
        if !shown.is_some_and(|shown| is_same(shown.as_bytes(), self.told.ticket(job).as_bytes())) {
            return refuse(StatusCode::FORBIDDEN, "the ticket is not for this job, or the agent was started again since".into());
        }
        let visit = Visit::begin(&self.visits);
        let path = self.folders.checkpoints(job).join(checkpoint::step_folder(step));
        let opened = spawn_blocking(move || match part {
            Part::Manifest => checkpoint::manifest_bytes(&path).map(|text| Opened::Manifest(text.into())),
            Part::File(index) => checkpoint::open_file(&path, index).map(|(file, bytes)| Opened::File(file, bytes)),
        });
        match opened.await {
            Ok(Ok(Opened::Manifest(text))) => whole(text),
            Ok(Ok(Opened::File(file, bytes))) => stream(file, bytes, visit),
            Ok(Err(Damage::Missing(what))) => refuse(StatusCode::NOT_FOUND, format!("step {step}: {what} is not here")),
            Ok(Err(damage)) => refuse(StatusCode::CONFLICT, format!("step {step}: {damage}")),
            Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

enum Opened {
    Manifest(Bytes),
    File(File, u64),
}

/// The same time for every wrong one of its length.
fn is_same(shown: &[u8], own: &[u8]) -> bool {
    shown.len() == own.len() && shown.iter().zip(own).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

fn refuse(status: StatusCode, why: String) -> Response<Body> {
    let mut answer = whole(why.into());
    *answer.status_mut() = status;
    answer
}

fn whole(bytes: Bytes) -> Response<Body> {
    Response::new(Full::new(bytes).map_err(|never| match never {}).boxed_unsync())
}

fn stream(mut file: File, bytes: u64, visit: Visit) -> Response<Body> {
    let (pieces, taken) = mpsc::channel(COPY_PIECES_MAX);
    drop(spawn_blocking(move || {
        let mut left = bytes;
        while left > 0 {
            let mut piece = vec![0; COPY_PIECE_BYTES.min(usize::try_from(left).unwrap_or(COPY_PIECE_BYTES))];
            let read = file.read_exact(&mut piece).map(|()| Frame::data(Bytes::from(piece)));
            left = left.saturating_sub(COPY_PIECE_BYTES as u64);
            let broken = read.is_err();
            // Nobody takes it any more, or there is no more.
            if pieces.blocking_send(read).is_err() || broken {
                return;
            }
        }
        drop(visit);
    }));
    let body = StreamBody::new(unfold(taken, |mut taken| async move { Some((taken.recv().await?, taken)) }));
    let mut answer = Response::new(body.boxed_unsync());
    answer.headers_mut().insert(CONTENT_LENGTH, bytes.into());
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_manifests_and_files_have_a_path() {
        let job = JobId::from_u128(7);
        let at = |rest: &str| parse(&format!("/jobs/{job}/checkpoints/{rest}"));
        assert_eq!(at("50/manifest"), Some((job, 50, Part::Manifest)));
        assert_eq!(at("50/files/3"), Some((job, 50, Part::File(3))));
        for other in
            ["50", "50/", "50/manifest/x", "50/files", "50/files/", "50/files/a", "50/files/1/2", "x/manifest", "-1/manifest", "50/../etc"]
        {
            assert_eq!(at(other), None, "{other}");
        }
        assert_eq!(parse("/jobs/../checkpoints/1/manifest"), None);
    }
}
