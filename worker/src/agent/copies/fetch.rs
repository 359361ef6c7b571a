//! Fetching a checkpoint from a node that has it: one source after the other until one has given all of it. Blocks.
//!
//! What a broken transfer has brought stays, and the next source goes on from there.

use std::io::{self, Read};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::{Buf, Bytes};
use everlit_api::agent::copies::{COPIES_NAME, Source};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::manifest::MANIFEST_BYTES_MAX;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::agent::limits::{COPY_CONNECT_MAX, COPY_SILENCE_MAX};
use crate::checkpoint::{Copy, CopyError};

/// Bytes of a refusal that are read.
const REFUSAL_BYTES_MAX: usize = 4 * 1024;

/// What is to be fetched.
#[derive(Debug, Clone, Copy)]
pub(in crate::agent) struct Wanted<'a> {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub step: u64,
    /// Its files have no more together.
    pub bytes: u64,
    /// The newest attempt that the order knew of.
    pub attempt: u32,
    /// Who has it.
    pub sources: &'a [Source],
}

/// Brings a checkpoint into `dir`; answers whom it is from. Ends early, with an error, once `is_wanted` says no.
pub(in crate::agent) fn fetch(dir: &Path, wanted: Wanted<'_>, is_wanted: &dyn Fn() -> bool) -> Result<NodeId, String> {
    let mut why = Vec::new();
    for source in wanted.sources {
        match fetch_from(dir, wanted, source, is_wanted) {
            Ok(()) => return Ok(source.node.clone()),
            Err(error) => why.push(format!("{}: {error:#}", source.node)),
        }
        if !is_wanted() {
            break;
        }
    }
    Err(if why.is_empty() { "no node that has it can be reached".into() } else { why.join("; ") })
}

fn fetch_from(dir: &Path, wanted: Wanted<'_>, source: &Source, is_wanted: &dyn Fn() -> bool) -> anyhow::Result<()> {
    let Wanted { job, step, bytes, attempt, .. } = wanted;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut giver = runtime.block_on(async { timeout(COPY_CONNECT_MAX, connect(source)).await.context("it does not answer")? })?;
    let text = runtime.block_on(ask(&mut giver, source, &format!("/jobs/{job}/checkpoints/{step}/manifest")))?;
    let limit = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
    let text = runtime.block_on(async { timeout(COPY_SILENCE_MAX, Limited::new(text.into_body(), limit).collect()).await });
    let text = text.context("it is silent")?.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
    let copy = Copy::begin(dir, step, attempt, &text)?;
    let told = copy.manifest().files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
    if told > bytes {
        copy.abandon();
        bail!("it says that it has {told} bytes, and its node had told of {bytes}");
    }
    for (index, file) in copy.manifest().files.iter().enumerate() {
        if copy.has(file) {
            continue;
        }
        let answer = runtime.block_on(ask(&mut giver, source, &format!("/jobs/{job}/checkpoints/{step}/files/{index}")))?;
        let mut body = Incomings { runtime: &runtime, body: answer.into_body(), left: Bytes::new(), is_wanted };
        match copy.take(file, &mut body) {
            Ok(()) => {}
            Err(CopyError::Broken { source, .. }) if source.kind() == io::ErrorKind::Interrupted => bail!("it is not wanted any more"),
            // Half of it on a disk that is full helps nobody.
            Err(error @ CopyError::Here(_)) => {
                copy.abandon();
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
        // What came beyond the file's length is an answer to nothing.
        if !body.left.is_empty() {
            bail!("{} is longer than its manifest says", file.name);
        }
    }
    copy.commit()?;
    Ok(())
}

async fn connect(source: &Source) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let address: IpAddr = source.address.parse().with_context(|| format!("`{}` is no address", source.address))?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(source.certificate.as_bytes())?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let tcp =
        TcpStream::connect((address, source.port)).await.with_context(|| format!("could not reach {address}, port {}", source.port))?;
    let name = ServerName::try_from(COPIES_NAME).context("a name of our own")?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.context("it is another, or its agent was started again")?;
    let (giver, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(giver)
}

async fn ask(giver: &mut SendRequest<Empty<Bytes>>, source: &Source, path: &str) -> anyhow::Result<Response<Incoming>> {
    let request = Request::get(path).header(HOST, COPIES_NAME).header(AUTHORIZATION, format!("Bearer {}", source.ticket));
    let asked = async {
        giver.ready().await?;
        giver.send_request(request.body(Empty::new())?).await.map_err(anyhow::Error::from)
    };
    let answer = timeout(COPY_SILENCE_MAX, asked).await.context("it is silent")??;
    if answer.status().is_success() {
        return Ok(answer);
    }
    let status = answer.status();
    let why = timeout(COPY_SILENCE_MAX, Limited::new(answer.into_body(), REFUSAL_BYTES_MAX).collect()).await;
    let why = why.ok().and_then(Result::ok).map(|why| String::from_utf8_lossy(&why.to_bytes()).into_owned());
    bail!("{}", why.filter(|why| !why.is_empty()).unwrap_or_else(|| format!("it answered {status}")))
}

/// A body, as something to read from.
struct Incomings<'a> {
    runtime: &'a Runtime,
    body: Incoming,
    left: Bytes,
    is_wanted: &'a dyn Fn() -> bool,
}

impl Read for Incomings<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            if !(self.is_wanted)() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let next = self.runtime.block_on(async { timeout(COPY_SILENCE_MAX, self.body.frame()).await });
            match next {
                Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "it is silent")),
                Ok(None) => return Ok(0),
                Ok(Some(frame)) => self.left = frame.map_err(io::Error::other)?.into_data().unwrap_or_default(),
            }
        }
        let bytes = to.len().min(self.left.len());
        self.left.copy_to_slice(&mut to[..bytes]);
        Ok(bytes)
    }
}
