//! The doors' own TLS: a certificate from files, or one of a CA of our own; and for agents always one of our own.
//!
//! Agents call the coordinator by a name of its own, whatever its address, and are shown a certificate of our CA then: so they know it by
//! that CA alone, which the join token told them of. They, and nobody else, are asked for a certificate. Certificates are renewed while the
//! coordinator runs: files that changed are read again, and one of our own is made anew at two thirds of its life. What can not be renewed
//! stays in use, and is told of.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use axum::serve::Listener;
use everlit_api::join::AGENTS_NAME;
use everlit_api::server::Peer;
use everlit_api::time::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::bounds::PerAddress;
use super::ca::{Ca, Chain, DOOR_DAYS};

/// Handshakes under way at once; more wait to be accepted.
const HANDSHAKES_MAX: usize = 1_024;
/// Of these from one address; more are hung up on, so that one that floods holds up no other.
const HANDSHAKES_OF_ONE_MAX: usize = 128;
/// Time for one.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at whether the certificate is still the right one.
const RENEW_EVERY: Duration = Duration::from_secs(60);
const DAY_MS: u64 = 24 * 3_600 * 1_000;

/// Where the certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// PEM files: the chain, and its key.
    Files {
        /// The chain, leaf first.
        cert: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
    /// A CA of our own in this folder.
    OwnCa {
        /// `ca.pem` and `ca.key` are here, made if missing.
        dir: PathBuf,
        /// Names and addresses that the doors are called by.
        names: Vec<String>,
    },
}

/// The certificate in use, and where the next one comes from.
pub struct Certificates {
    source: Source,
    current: RwLock<Arc<CertifiedKey>>,
}

/// What TLS needs of the server: for everybody, and for agents.
#[derive(Clone)]
pub struct Acceptor {
    everybody: Arc<ServerConfig>,
    agents: Arc<ServerConfig>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("source", &self.source).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

impl Certificates {
    /// Reads or makes the first one.
    pub fn open(source: Source, now: Timestamp) -> anyhow::Result<Arc<Self>> {
        let first = source.make(now)?;
        Ok(Arc::new(Self { source, current: RwLock::new(first) }))
    }

    /// Renews for ever.
    pub async fn keep(self: Arc<Self>) {
        let (mut made_at, mut seen) = (Timestamp::now(), self.source.changed_at());
        let mut tick = tokio::time::interval(RENEW_EVERY);
        loop {
            tick.tick().await;
            let now = Timestamp::now();
            let changed = self.source.changed_at();
            if !(changed != seen || self.source.is_old(made_at, now)) {
                continue;
            }
            match self.source.make(now) {
                Ok(next) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
                    (made_at, seen) = (now, changed);
                    tracing::info!("the certificate of the doors was renewed");
                }
                Err(error) => tracing::error!("the certificate of the doors can not be renewed, the old one stays in use: {error:#}"),
            }
        }
    }
}

impl Acceptor {
    /// Shows everybody one certificate and agents another, of this CA; who is an agent may show one of the same CA.
    pub fn new(everybody: &Arc<Certificates>, agents: &Arc<Certificates>, ca: &CertificateDer<'static>) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = || ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).context("our own CA")?;
        // Who joins has none yet.
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).allow_unauthenticated().build()?;
        let mut all = builder()?.with_no_client_auth().with_cert_resolver(everybody.clone());
        let mut own = builder()?.with_client_cert_verifier(verifier).with_cert_resolver(agents.clone());
        for config in [&mut all, &mut own] {
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
        }
        Ok(Self { everybody: Arc::new(all), agents: Arc::new(own) })
    }

    async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let begun = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let is_agent = begun.client_hello().server_name() == Some(AGENTS_NAME);
        begun.into_stream(if is_agent { self.agents.clone() } else { self.everybody.clone() }).await
    }
}

/// sha256 of the certificate that the other end proved to have the key of.
fn shown(stream: &TlsStream<TcpStream>) -> Option<[u8; 32]> {
    let chain = stream.get_ref().1.peer_certificates()?;
    chain.first().map(|leaf| Sha256::digest(leaf).into())
}

impl Source {
    fn make(&self, now: Timestamp) -> anyhow::Result<Arc<CertifiedKey>> {
        let (chain, key) = match self {
            Self::Files { cert, key } => read_files(cert, key)?,
            Self::OwnCa { dir, names } => Ca::open(dir, now)?.sign_door(names, now)?,
        };
        let provider = rustls::crypto::ring::default_provider();
        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| self.unfit(&error))?;
        Ok(Arc::new(key))
    }

    fn unfit(&self, error: &rustls::Error) -> anyhow::Error {
        match self {
            Self::Files { cert, key } => {
                anyhow::anyhow!("--tls-cert {} and --tls-key {} can not be used together: {error}", cert.display(), key.display())
            }
            Self::OwnCa { .. } => anyhow::anyhow!("the certificate of our own CA can not be used: {error}"),
        }
    }

    /// When its files changed; nothing where there are none.
    fn changed_at(&self) -> Vec<Option<SystemTime>> {
        let at = |path: &Path| std::fs::metadata(path).and_then(|about| about.modified()).ok();
        match self {
            Self::Files { cert, key } => vec![at(cert), at(key)],
            Self::OwnCa { .. } => Vec::new(),
        }
    }

    fn is_old(&self, made_at: Timestamp, now: Timestamp) -> bool {
        matches!(self, Self::OwnCa { .. }) && now.since_ms(made_at) > DOOR_DAYS * DAY_MS * 2 / 3
    }
}

fn read_files(cert: &Path, key: &Path) -> anyhow::Result<Chain> {
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| anyhow::anyhow!("--tls-cert {} can not be read as PEM: {error}", cert.display()))?;
    if chain.is_empty() {
        bail!("--tls-cert {} has no certificate in it: it must be PEM, the server's own first", cert.display());
    }
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| anyhow::anyhow!("--tls-key {} can not be read as a PEM private key: {error}", key.display()))?;
    Ok((chain, key))
}

/// Connections after their handshake. One that is slow, or wrong, holds up no other.
pub struct TlsListener {
    address: SocketAddr,
    ready: mpsc::Receiver<(TlsStream<TcpStream>, Peer)>,
}

impl TlsListener {
    /// Shakes hands with whoever comes.
    pub fn new(listener: TcpListener, acceptor: Acceptor) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let (to, ready) = mpsc::channel(HANDSHAKES_MAX);
        tokio::spawn(shake_hands(listener, acceptor, to));
        Ok(Self { address, ready })
    }
}

async fn shake_hands(mut listener: TcpListener, acceptor: Acceptor, to: mpsc::Sender<(TlsStream<TcpStream>, Peer)>) {
    let room = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let under_way = PerAddress::new(HANDSHAKES_OF_ONE_MAX);
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let (stream, from) = tokio::select! {
            accepted = Listener::accept(&mut listener) => accepted,
            () = to.closed() => return,
        };
        let Some(own) = under_way.enter(from.ip()) else { continue };
        let _ = stream.set_nodelay(true);
        let (acceptor, to) = (acceptor.clone(), to.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIME_MAX, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let peer = Peer { address: from, certificate: shown(&stream) };
                    drop(to.send((stream, peer)).await);
                }
                Ok(Err(error)) => tracing::debug!(%from, %error, "a TLS handshake failed"),
                Err(_) => tracing::debug!(%from, "a TLS handshake took too long"),
            }
            drop((permit, own));
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // Who shakes hands ends only after this.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Peer> {
        Ok(Peer { address: self.address, certificate: None })
    }
}

/// Connections in the clear.
pub struct PlainListener(pub TcpListener);

impl Listener for PlainListener {
    type Io = TcpStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (TcpStream, Peer) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        // Small answers and events must not wait for the reader's acknowledgement.
        let _ = stream.set_nodelay(true);
        (stream, Peer { address, certificate: None })
    }

    fn local_addr(&self) -> std::io::Result<Peer> {
        Ok(Peer { address: self.0.local_addr()?, certificate: None })
    }
}

/// Names by which this machine may be called when it listens on `ip`: loopback, its own name, and its addresses.
pub fn own_names(ip: IpAddr) -> Vec<String> {
    let mut names = vec!["localhost".to_string(), "127.0.0.1".to_string(), "::1".to_string()];
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    names.extend(Some(own.trim().to_string()).filter(|name| !name.is_empty()));
    if ip.is_unspecified() {
        let all = nix::ifaddrs::getifaddrs().into_iter().flatten().filter_map(|one| one.address);
        let ips = all.filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|own| IpAddr::V4(own.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|own| IpAddr::V6(own.ip())))
        });
        names.extend(ips.map(|ip| ip.to_string()));
    } else {
        names.push(ip.to_string());
    }
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use rcgen::KeyPair;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsConnector;

    use super::*;

    fn connector(ca: &Path) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
    }

    fn source(dir: &Path) -> Source {
        Source::OwnCa { dir: dir.join("ca"), names: vec!["coordinator.example".into(), "127.0.0.1".into()] }
    }

    async fn says(listener: &mut TlsListener, connector: &TlsConnector, name: &str) -> Result<String, String> {
        let tcp = TcpStream::connect(listener.address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from(name.to_string()).unwrap();
        let ask = async {
            let mut tls = connector.connect(name, tcp).await.map_err(|error| error.to_string())?;
            let mut text = String::new();
            tls.read_to_string(&mut text).await.map_err(|error| error.to_string())?;
            Ok(text)
        };
        let answer = async {
            let (mut tls, peer) = listener.accept().await;
            assert_eq!(peer.certificate, None);
            tls.write_all(b"hello").await.unwrap();
            tls.shutdown().await.unwrap();
            std::future::pending::<()>().await
        };
        tokio::select! { said = ask => said, () = answer => unreachable!("pending") }
    }

    #[tokio::test]
    async fn who_has_the_ca_knows_the_coordinator_by_its_names_and_nobody_else_by_them() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let certificates = Certificates::open(source(dir.path()), now).unwrap();
        let own = Source::OwnCa { dir: dir.path().join("ca"), names: vec![AGENTS_NAME.into()] };
        let own = Certificates::open(own, now).unwrap();
        let root = Ca::open(&dir.path().join("ca"), now).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut listener = TlsListener::new(tcp, Acceptor::new(&certificates, &own, root.certificate()).unwrap()).unwrap();
        let ca = dir.path().join("ca/ca.pem");
        for name in ["coordinator.example", "127.0.0.1", AGENTS_NAME] {
            assert_eq!(says(&mut listener, &connector(&ca), name).await, Ok("hello".into()), "{name}");
        }
        // One that never says a word holds up nobody.
        let _silent = TcpStream::connect(listener.address).await.unwrap();
        let wrong = says(&mut listener, &connector(&ca), "other.example").await.expect_err("another name");
        assert!(wrong.contains("not valid for name"), "{wrong}");
        let elsewhere = tempfile::tempdir().unwrap();
        Ca::open(elsewhere.path(), now).unwrap();
        let foreign = says(&mut listener, &connector(&elsewhere.path().join("ca.pem")), "127.0.0.1").await.expect_err("another CA");
        assert!(foreign.contains("BadSignature") || foreign.contains("UnknownIssuer"), "{foreign}");
        assert_eq!(says(&mut listener, &connector(&ca), "127.0.0.1").await, Ok("hello".into()), "still there");
        // The same CA after a restart, and a new certificate of it.
        let again = Certificates::open(source(dir.path()), now).unwrap();
        *certificates.current.write().unwrap() = again.current.read().unwrap().clone();
        assert_eq!(says(&mut listener, &connector(&ca), "127.0.0.1").await, Ok("hello".into()));
    }

    #[test]
    fn files_that_can_not_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("c.pem"), dir.path().join("k.pem"));
        let files = Source::Files { cert: cert.clone(), key: key.clone() };
        let told = |files: &Source| files.make(Timestamp::now()).expect_err("wrong").to_string();
        assert!(told(&files).contains("--tls-cert") && told(&files).contains("c.pem"), "{}", told(&files));
        std::fs::write(&cert, "no PEM").unwrap();
        assert!(told(&files).contains("no certificate"), "{}", told(&files));
        let pair = KeyPair::generate().unwrap();
        std::fs::write(&cert, super::super::ca::ca_params(Timestamp::now()).self_signed(&pair).unwrap().pem()).unwrap();
        assert!(told(&files).contains("--tls-key"), "{}", told(&files));
        std::fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(told(&files).contains("together"), "{}", told(&files));
        std::fs::write(&key, pair.serialize_pem()).unwrap();
        assert!(files.make(Timestamp::now()).is_ok());
    }

    #[test]
    fn own_certificates_are_renewed_at_two_thirds_of_their_life_and_files_when_they_change() {
        let own = Source::OwnCa { dir: "x".into(), names: Vec::new() };
        let at = |days: u64| Timestamp(days * DAY_MS);
        assert!(!own.is_old(at(0), at(60)) && own.is_old(at(0), at(61)));
        let dir = tempfile::tempdir().unwrap();
        let cert = dir.path().join("c.pem");
        let files = Source::Files { cert: cert.clone(), key: dir.path().join("k.pem") };
        assert!(!files.is_old(at(0), at(1_000)));
        let before = files.changed_at();
        std::fs::write(&cert, "x").unwrap();
        assert_ne!(files.changed_at(), before);
    }

    #[test]
    fn a_machine_is_called_by_all_of_its_addresses_when_it_listens_on_all() {
        let all = own_names("0.0.0.0".parse().unwrap());
        assert!(all.contains(&"127.0.0.1".to_string()) && all.contains(&"localhost".to_string()));
        let one = own_names("10.1.2.3".parse().unwrap());
        assert!(one.contains(&"10.1.2.3".to_string()));
    }
}
