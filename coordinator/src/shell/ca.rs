//! A CA of our own: made once in the data folder, it signs for the doors of this coordinator and for the nodes that join it.
//!
//! Its key never leaves the data folder. What a node asks for is taken for its key alone: name, use and life are the coordinator's to say.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, bail};
use everlit_api::ids::NodeId;
use everlit_api::time::{Millis, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};

use super::up::write_whole;

const DAY_MS: u64 = 24 * 3_600 * 1_000;
/// Life of a certificate that our CA signs for the doors.
pub(super) const DOOR_DAYS: u64 = 90;
/// Life of our CA.
const CA_DAYS: u64 = 10 * 365;
/// A node's clock may be so far behind.
const CLOCKS_APART_MS: u64 = DAY_MS;

/// A chain, leaf first, and the leaf's key.
pub(super) type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A CA of our own.
pub struct Ca {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

/// A certificate that was made for a node.
#[derive(Debug)]
pub struct Signed {
    /// As it travels.
    pub pem: String,
    /// sha256 of it (DER).
    pub sum: [u8; 32],
    /// When it ends.
    pub expires_at: Timestamp,
}

/// A certificate request that was read, and whose key its sender has.
#[derive(Debug)]
pub struct Request(CertificateSigningRequestParams);

impl Request {
    /// Reads a request and checks that it is signed with the key that it is for.
    pub fn read(pem: &str) -> Result<Self, String> {
        let read = CertificateSigningRequestParams::from_pem(pem);
        read.map(Self).map_err(|error| format!("the certificate request can not be used: {error}"))
    }

    /// sha256 of the key that it is for.
    pub fn key(&self) -> [u8; 32] {
        Sha256::digest(self.0.public_key.der_bytes()).into()
    }
}

impl Ca {
    /// Reads the CA of a folder, or makes it.
    pub fn open(dir: &Path, now: Timestamp) -> anyhow::Result<Self> {
        let (cert, key) = (dir.join("ca.pem"), dir.join("ca.key"));
        if key.exists() && !cert.exists() {
            // Its certificate was not written any more; nobody has it.
            let pair = read_key(&key)?;
            write_whole(&cert, &ca_params(now).self_signed(&pair)?.pem())?;
        }
        if cert.exists() || key.exists() {
            let pair = read_key(&key)?;
            let named = CertificateDer::from_pem_file(&cert)
                .map_err(|error| anyhow::anyhow!("the CA {} can not be read: {error}", cert.display()))?;
            let is_of = named.as_ref().windows(pair.public_key_raw().len()).any(|part| part == pair.public_key_raw());
            if !is_of {
                bail!(
                    "{} is not the certificate of {}: restore both from one backup, or remove both to begin a new CA",
                    cert.display(),
                    key.display()
                );
            }
            return Ok(Self { key: pair, certificate: named.into_owned() });
        }
        std::fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
        let pair = KeyPair::generate()?;
        let made = ca_params(now).self_signed(&pair)?;
        // The key first: a certificate without one would be of no use to anybody.
        write_whole(&key, &pair.serialize_pem())?;
        write_whole(&cert, &made.pem())?;
        tracing::info!(path = %cert.display(), "a CA was made");
        Ok(Self { key: pair, certificate: made.der().clone() })
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// sha256 of its certificate.
    pub fn sum(&self) -> [u8; 32] {
        Sha256::digest(&self.certificate).into()
    }

    /// A certificate for doors that are called by these names, with the CA's own behind it.
    pub(super) fn sign_door(&self, names: &[String], now: Timestamp) -> anyhow::Result<Chain> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("everlit coordinator");
        for name in names {
            let name = match name.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into().with_context(|| format!("`{name}` is no name of a host"))?),
            };
            params.subject_alt_names.push(name);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (day(now.0.saturating_sub(DAY_MS)), day(now.0 + DOOR_DAYS * DAY_MS));
        let signed = params.signed_by(&key, &Issuer::from_params(&ca_params(now), &self.key))?;
        let secret = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow::anyhow!("a key of our own: {error}"))?;
        Ok((vec![signed.der().clone(), self.certificate.clone()], secret))
    }

    /// A certificate for a node: of what it asked only the key counts.
    pub fn sign_node(&self, request: Request, node: &NodeId, life: Millis, now: Timestamp) -> anyhow::Result<Signed> {
        let mut wanted = request.0;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&format!("node/{node}"));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let expires_at = Timestamp((now.0 + life.0) / 1_000 * 1_000);
        (params.not_before, params.not_after) = (second(now.0.saturating_sub(CLOCKS_APART_MS)), second(expires_at.0));
        wanted.params = params;
        let signed = wanted.signed_by(&Issuer::from_params(&ca_params(now), &self.key))?;
        Ok(Signed { pem: signed.pem(), sum: Sha256::digest(signed.der()).into(), expires_at })
    }
}

fn read_key(path: &Path) -> anyhow::Result<KeyPair> {
    let text = std::fs::read_to_string(path).with_context(|| format!("the CA's key {} can not be read", path.display()))?;
    KeyPair::from_pem(&text).with_context(|| format!("the CA's key {} is no key", path.display()))
}

fn named(name: &str) -> rcgen::DistinguishedName {
    let mut own = rcgen::DistinguishedName::new();
    own.push(DnType::CommonName, name);
    own
}

pub(super) fn ca_params(now: Timestamp) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named("everlit CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = (day(now.0.saturating_sub(DAY_MS)), day(now.0 + CA_DAYS * DAY_MS));
    params
}

/// Midnight of the day of a time, as certificates write it.
fn day(ms: u64) -> time::OffsetDateTime {
    second(ms / DAY_MS * DAY_MS)
}

fn second(ms: u64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(i64::try_from(ms / 1_000).unwrap_or(0)).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_is_private_and_is_never_made_over_another() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("ca.pem"), dir.path().join("ca.key"));
        let made = Ca::open(dir.path(), Timestamp::now()).unwrap();
        assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let first = std::fs::read(&cert).unwrap();
        assert_eq!(Ca::open(dir.path(), Timestamp::now()).unwrap().sum(), made.sum());
        assert_eq!(std::fs::read(&cert).unwrap(), first);
        // A start that ended between the two.
        std::fs::remove_file(&cert).unwrap();
        Ca::open(dir.path(), Timestamp::now()).unwrap();
        assert!(CertificateDer::from_pem_file(&cert).is_ok());
        std::fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let told = Ca::open(dir.path(), Timestamp::now()).err().unwrap().to_string();
        assert!(told.contains("is not the certificate of"), "{told}");
        std::fs::remove_file(&key).unwrap();
        assert!(Ca::open(dir.path(), Timestamp::now()).is_err(), "a certificate without its key is not replaced in silence");
    }

    #[test]
    fn of_a_request_only_its_key_counts_and_who_has_not_the_key_gets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let ca = Ca::open(dir.path(), now).unwrap();
        let key = KeyPair::generate().unwrap();
        // It would like to be a CA, and the coordinator.
        let mut greedy = ca_params(now);
        greedy.subject_alt_names = vec![SanType::DnsName("coordinator.everlit.internal".try_into().unwrap())];
        let text = greedy.serialize_request(&key).unwrap().pem().unwrap();
        let request = Request::read(&text).unwrap();
        assert_eq!(request.key(), <[u8; 32]>::from(Sha256::digest(key.der_bytes())));
        let signed = ca.sign_node(request, &NodeId("gpu-1".into()), Millis::secs(90), now).unwrap();
        assert_eq!(signed.expires_at.0, (now.0 + 90_000) / 1_000 * 1_000);
        let der = CertificateDer::from_pem_slice(signed.pem.as_bytes()).unwrap();
        assert_eq!(signed.sum, <[u8; 32]>::from(Sha256::digest(&der)));
        let has = |part: &[u8]| der.as_ref().windows(part.len()).any(|own| own == part);
        assert!(has(b"node/gpu-1") && has(key.public_key_raw()));
        let issued_by = der.as_ref().windows(10).filter(|own| own == b"everlit CA").count();
        assert!(!has(b"coordinator.everlit.internal") && issued_by == 1, "nothing that it asked for");
        // A request whose signature is another's.
        let other = KeyPair::generate().unwrap();
        let mut bytes = CertificateParams::default().serialize_request(&other).unwrap().der().to_vec();
        let at = bytes.len() - 5;
        bytes[at] ^= 1;
        let told = CertificateSigningRequestParams::from_der(&bytes.into()).unwrap_err().to_string();
        assert!(told.to_lowercase().contains("signature"), "{told}");
        assert!(Request::read("-----BEGIN CERTIFICATE REQUEST-----").unwrap_err().contains("can not be used"));
    }
}
