//! TLS to the coordinator: who it is, is told by its CA alone, whatever its address.
//!
//! A node that joined knows that CA. A server that is to join knows its hash, from the join token: the handshake ends before anything is
//! sent when another shows itself. Questions are asked one per connection.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use everlit_api::join::AGENTS_NAME;
use everlit_api::problem::Problem;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::identity::Identity;

/// Bytes of an answer at most.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The port of `https://` without one.
const PORT: u16 = 443;

/// What says who the coordinator is, and who this is.
#[derive(Clone)]
pub(super) struct Dialer {
    connector: TlsConnector,
}

/// Whoever shows a CA of this hash, and a certificate of it for the coordinator.
struct Pinned {
    hash: [u8; 32],
    provider: Arc<CryptoProvider>,
    /// The CA, once it was shown.
    seen: Mutex<Option<CertificateDer<'static>>>,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = chain.iter().find(|shown| <[u8; 32]>::from(Sha256::digest(shown)) == self.hash).ok_or_else(|| {
            Error::General(
                "it shows another CA than the join token names: the token is of another coordinator, or somebody is in between".into(),
            )
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone());
        let verifier = verifier.build().map_err(|error| Error::General(error.to_string()))?;
        let verified = verifier.verify_server_cert(leaf, &[], name, ocsp, now)?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(ca.clone().into_owned());
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The coordinator that a join token names, and where its CA is once it was shown.
pub(super) struct Stranger {
    pinned: Arc<Pinned>,
    /// To it.
    pub dialer: Dialer,
}

impl Stranger {
    /// Knows the coordinator by its CA's hash.
    pub(super) fn new(ca: [u8; 32]) -> anyhow::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let pinned = Arc::new(Pinned { hash: ca, provider: provider.clone(), seen: Mutex::default() });
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = config.dangerous().with_custom_certificate_verifier(pinned.clone()).with_no_client_auth();
        Ok(Self { pinned, dialer: Dialer { connector: TlsConnector::from(Arc::new(config)) } })
    }

    /// The CA that it has shown.
    pub(super) fn ca(&self) -> Option<CertificateDer<'static>> {
        self.pinned.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Dialer {
    /// Knows the coordinator by its CA, and is known by its certificate.
    pub(super) fn of(own: &Identity) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(own.ca.as_bytes())?)?;
        let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes())?];
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
        let config = config.with_root_certificates(roots).with_client_auth_cert(chain, own.key()?)?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)) })
    }

    /// A connection.
    pub(super) async fn connect(&self, url: &str) -> anyhow::Result<TlsStream<TcpStream>> {
        let (host, port) = place(url)?;
        let tcp = TcpStream::connect((host, port)).await.with_context(|| format!("could not reach {host}, port {port}"))?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(AGENTS_NAME).context("a name of our own")?;
        self.connector.connect(name, tcp).await.map_err(|error| in_words(&error, url))
    }

    /// Asks one thing.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        url: &str,
        path: &str,
        bearer: Option<&str>,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        let stream = self.connect(url).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driving = tokio::spawn(connection);
        let mut request = Request::post(path).header(HOST, AGENTS_NAME).header(CONTENT_TYPE, "application/json");
        if let Some(bearer) = bearer {
            request = request.header(AUTHORIZATION, format!("Bearer {bearer}"));
        }
        let request = request.body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?;
        let answer = sender.send_request(request).await.map_err(|error| match std::error::Error::source(&error) {
            Some(source) => in_words(&source, url),
            None => anyhow!(error),
        })?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(|error| anyhow!(error))?.to_bytes();
        driving.abort();
        if status.is_success() {
            return serde_json::from_slice(&body).context("the coordinator's answer can not be read");
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(problem.into()),
            Err(_) => bail!("{url} answered {status}: is it an everlit coordinator?"),
        }
    }
}

/// Host and port of an `https://` URL.
fn place(url: &str) -> anyhow::Result<(&str, u16)> {
    let bad = || anyhow!("`{url}` is no address of a coordinator: it is like https://coordinator.example:8000");
    let rest = url.strip_prefix("https://").ok_or_else(bad)?.trim_end_matches('/');
    let (host, port) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(bad)?;
            (host, port.strip_prefix(':'))
        }
        None => rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Ok(PORT), str::parse).map_err(|_| bad())?;
    if host.is_empty() || host.contains(['/', '@', ' ']) || port == 0 { Err(bad()) } else { Ok((host, port)) }
}

/// What went wrong with TLS and what to do about it.
pub(super) fn in_words(error: &(impl fmt::Display + ?Sized), url: &str) -> anyhow::Error {
    let text = error.to_string();
    let has = |part: &str| text.contains(part);
    if has("received fatal alert: CertificateExpired") {
        anyhow!("this node's certificate has expired: join again with a new token (`everlit node token create`)")
    } else if has("received fatal alert: UnknownCA")
        || has("received fatal alert: BadCertificate")
        || has("received fatal alert: DecryptError")
    {
        anyhow!(
            "{url} does not know this node's certificate: is it another coordinator, or has its CA changed? join again with a new token"
        )
    } else if has("certificate not valid yet")
        || has("NotValidYet")
        || has("certificate expired")
        || has("invalid peer certificate: Expired")
    {
        anyhow!("the certificate of {url} is not valid at this machine's time: is its clock right? ({text})")
    } else if has("invalid peer certificate") {
        anyhow!("{url} is not the coordinator that this node joined: its certificate is of another CA ({text})")
    } else if has("corrupt message") || has("InvalidContentType") {
        anyhow!("{url} does not speak TLS: was the coordinator started with --own-ca or --tls-cert?")
    } else {
        anyhow!("{url}: {}", text.trim_start_matches("unexpected error: "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_s_address_is_a_host_and_a_port() {
        for (url, host, port) in [
            ("https://a.example:8000", "a.example", 8000),
            ("https://10.0.0.5", "10.0.0.5", 443),
            ("https://[fd00::1]:9/", "fd00::1", 9),
            ("https://[::1]", "::1", 443),
        ] {
            assert_eq!(place(url).unwrap(), (host, port));
        }
        for bad in
            ["http://a:1", "https://", "https://:1", "https://a:x", "https://a:0", "https://a/b:1", "https://u@a", "a:8000", "https://[::1"]
        {
            let told = place(bad).expect_err(bad).to_string();
            assert!(told.contains("like https://coordinator.example:8000"), "{told}");
        }
    }
}
