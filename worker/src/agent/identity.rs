//! What a node that joined knows of itself and its coordinator: one private file, replaced as a whole.
//!
//! The node's own clock decides when its certificate is due: it notes when it got it and how long it was to live, so clocks that are apart
//! do no harm. The key is made here and never leaves the folder.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use everlit_api::ids::NodeId;
use everlit_api::join::{JoinToken, NodeCertificate};
use everlit_api::time::{Millis, Timestamp};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Its file in the data folder.
const NAME: &str = "node.json";
/// The key that a join was asked for with, until it is answered: asked again, it is the same node.
const KEY_NAME: &str = "node.key";

/// A node that joined.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Where its coordinator is: `https://host:port`.
    pub coordinator: String,
    /// Its name.
    pub node: NodeId,
    /// Its private key, PEM.
    key: String,
    /// Its certificate, PEM.
    pub certificate: String,
    /// The coordinator's CA, PEM.
    pub ca: String,
    /// When it got the certificate, by its own clock.
    issued_at: Timestamp,
    /// How long the certificate was to live then.
    lives: Millis,
}

impl Identity {
    /// That of a folder; `None` when its node has not joined.
    pub(super) fn load(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(NAME);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.with_context(|| format!("could not read `{}`", path.display()))?,
        };
        let read = serde_json::from_slice(&text);
        read.map(Some).with_context(|| format!("`{}` is damaged: remove it and join again with a new token", path.display()))
    }

    /// What a join has brought.
    pub(super) fn joined(coordinator: &str, key: &KeyPair, ca: &CertificateDer<'_>, made: NodeCertificate) -> Self {
        let NodeCertificate { node, certificate, lives } = made;
        let (key, issued_at) = (key.serialize_pem(), Timestamp::now());
        Self { coordinator: coordinator.into(), node, key, certificate, ca: pem(ca), issued_at, lives }
    }

    /// The same with another certificate.
    pub(super) fn renewed(&self, key: &KeyPair, made: NodeCertificate) -> Self {
        let NodeCertificate { certificate, lives, .. } = made;
        Self { key: key.serialize_pem(), certificate, lives, issued_at: Timestamp::now(), ..self.clone() }
    }

    /// Keeps it.
    pub(super) fn save(&self, dir: &Path) -> anyhow::Result<()> {
        write_private(&dir.join(NAME), &serde_json::to_vec(self)?)?;
        // What it was joined with is in it now.
        let _ = std::fs::remove_file(dir.join(KEY_NAME));
        Ok(())
    }

    /// Its key, as TLS wants it.
    pub(super) fn key(&self) -> anyhow::Result<rustls::pki_types::PrivateKeyDer<'static>> {
        Ok(rustls::pki_types::PrivateKeyDer::from_pem_slice(self.key.as_bytes())?)
    }

    /// So long until its certificate is to be renewed: at two thirds of its life, and at once when the clock went back before it began.
    pub(super) fn due_in(&self, now: Timestamp) -> Millis {
        let age_ms = if now < self.issued_at { self.lives.0 } else { now.0 - self.issued_at.0 };
        Millis((self.lives.0 / 3 * 2).saturating_sub(age_ms))
    }

    /// The hash of its CA, as join tokens have it.
    pub(super) fn is_of(&self, token: &JoinToken) -> bool {
        CertificateDer::from_pem_slice(self.ca.as_bytes()).is_ok_and(|ca| <[u8; 32]>::from(Sha256::digest(&ca)) == token.ca)
    }
}

/// The key to join with: that of a try before this one, or a new one.
pub(super) fn join_key(dir: &Path) -> anyhow::Result<KeyPair> {
    let path = dir.join(KEY_NAME);
    if let Ok(text) = std::fs::read_to_string(&path)
        && let Ok(key) = KeyPair::from_pem(&text)
    {
        return Ok(key);
    }
    let key = KeyPair::generate()?;
    write_private(&path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

/// Where a node's folder is unless told otherwise.
pub(super) fn default_dir() -> anyhow::Result<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = folder("XDG_DATA_HOME").or_else(|| folder("HOME").map(|home| home.join(".local/share")));
    match base {
        Some(base) => Ok(base.join("everlit-agent")),
        None => bail!("there is no home folder: say --data-dir"),
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let draft = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&draft, path)?;
        path.parent().map_or(Ok(()), |dir| std::fs::File::open(dir)?.sync_all())
    };
    write().with_context(|| format!("could not write `{}`", path.display()))
}

/// A certificate as text.
fn pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", certificate.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn made(lives: Millis) -> NodeCertificate {
        NodeCertificate { node: NodeId("gpu-1".into()), certificate: "PEM".into(), lives }
    }

    #[test]
    fn it_is_kept_in_private_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Identity::load(dir.path()).unwrap().is_none());
        let key = join_key(dir.path()).unwrap();
        assert_eq!(join_key(dir.path()).unwrap().serialize_pem(), key.serialize_pem(), "asked again it is the same node");
        let ca: Vec<u8> = (0..=255).cycle().take(400).collect();
        let ca = CertificateDer::from(ca);
        let own = Identity::joined("https://c:8000", &key, &ca, made(Millis::secs(90)));
        own.save(dir.path()).unwrap();
        assert!(Identity::load(dir.path()).unwrap() == Some(own.clone()));
        assert!(!dir.path().join(KEY_NAME).exists());
        assert_eq!(std::fs::metadata(dir.path().join(NAME)).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(CertificateDer::from_pem_slice(own.ca.as_bytes()).unwrap(), ca);
        let token = |ca| JoinToken { ca, id: String::new(), secret: String::new() };
        assert!(own.is_of(&token(Sha256::digest(&ca).into())) && !own.is_of(&token([0; 32])));
        std::fs::write(dir.path().join(NAME), "{").unwrap();
        let told = Identity::load(dir.path()).err().unwrap().to_string();
        assert!(told.contains("join again"), "{told}");
    }

    #[test]
    fn a_certificate_is_due_at_two_thirds_of_its_life_whatever_the_coordinator_s_clock_says() {
        let key = KeyPair::generate().unwrap();
        let own = Identity::joined("https://c", &key, &CertificateDer::from(vec![1]), made(Millis::secs(90)));
        let at = |seconds: u64| own.due_in(Timestamp(own.issued_at.0 + seconds * 1_000));
        assert_eq!((at(0), at(59), at(60), at(500)), (Millis::secs(60), Millis::secs(1), Millis(0), Millis(0)));
        assert_eq!(own.due_in(Timestamp(own.issued_at.0 - 1)), Millis(0), "a clock that was set back tells nothing");
        let next = own.renewed(&KeyPair::generate().unwrap(), made(Millis::secs(30)));
        assert!(next.key != own.key && next.lives == Millis::secs(30) && next.coordinator == own.coordinator);
    }
}
