//! The certificate authority that steps trust: made at the start of the daemon, kept in memory
//! only.

use bytes::Bytes;
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, Error, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SerialNumber,
};
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// A daemon does not live this long.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Most hosts whose certificates are kept.
pub(crate) const MAX_LEAVES: usize = 1024;

/// The authority, with the certificates it has made. Also has the roots that servers are verified
/// with.
pub struct Authority {
    pem: Bytes,
    issuer: Issuer<'static, KeyPair>,
    /// One key for all hosts: a holder of it has the authority's too.
    key: KeyPair,
    provider: Arc<CryptoProvider>,
    leaves: Mutex<HashMap<String, Leaf>>,
    client: Arc<ClientConfig>,
}

struct Leaf {
    config: Arc<ServerConfig>,
    /// When another is made.
    until: SystemTime,
}

fn failed(error: Error) -> Fault {
    Fault::internal(format!("make a certificate for the proxy network: {error}"))
}

impl Authority {
    /// A new authority that trusts what the system trusts, and the certificates of `more` (PEM).
    /// Reads the system's trust store: call it where blocking is allowed.
    pub fn new(more: &[u8]) -> Result<Self> {
        let mut roots = shipway_http::native_roots().clone();
        for certificate in CertificateDer::pem_slice_iter(more) {
            let added = certificate
                .map_err(|e| e.to_string())
                .and_then(|certificate| roots.add(certificate).map_err(|e| e.to_string()));
            added.map_err(|e| {
                Fault::invalid(format!("a certificate that servers are verified with: {e}"))
            })?;
        }
        Self::with_roots(roots)
    }

    /// The same with `roots` as the certificates that servers are verified by.
    pub(crate) fn with_roots(roots: RootCertStore) -> Result<Self> {
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "BuildKit exec proxy");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.not_before = (now - HOUR).into();
        params.not_after = (now + AUTHORITY_LIFE).into();
        params.serial_number = Some(serial("authority", now));
        let key = KeyPair::generate().map_err(failed)?;
        let pem = params.self_signed(&key).map_err(failed)?.pem().into();
        let provider = Arc::new(ring::default_provider());
        let tls = |e: tokio_rustls::rustls::Error| {
            Fault::internal(format!("set up TLS for the proxy network: {e}"))
        };
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?;
        let mut client = client.with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            pem,
            issuer: Issuer::new(params, key),
            key: KeyPair::generate().map_err(failed)?,
            provider,
            leaves: Mutex::default(),
            client: Arc::new(client),
        })
    }

    /// Its certificate, as PEM.
    pub fn pem(&self) -> &Bytes {
        &self.pem
    }

    /// How to speak TLS to servers.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// How to speak TLS in the place of `host`, a name or an address.
    pub(crate) fn server(&self, host: &str) -> Result<Arc<ServerConfig>> {
        let now = SystemTime::now();
        let mut leaves = self.leaves.lock();
        if let Some(leaf) = leaves.get(host).filter(|l| now < l.until) {
            return Ok(leaf.config.clone());
        }
        let config = Arc::new(self.leaf(host, now)?);
        if leaves.len() >= MAX_LEAVES {
            leaves.clear();
        }
        leaves.insert(host.to_owned(), Leaf { config: config.clone(), until: now + DAY - HOUR });
        Ok(config)
    }

    fn leaf(&self, host: &str, now: SystemTime) -> Result<ServerConfig> {
        // Distinguishes addresses from names.
        let mut params = CertificateParams::new([host.to_owned()]).map_err(failed)?;
        // A common name is at most 64 characters long; what counts is the alternative name.
        params
            .distinguished_name
            .push(DnType::CommonName, host.chars().take(64).collect::<String>());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - HOUR).into();
        params.not_after = (now + DAY).into();
        params.serial_number = Some(serial(host, now));
        let certificate = params.signed_by(&self.key, &self.issuer).map_err(failed)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let tls =
            |e: tokio_rustls::rustls::Error| Fault::internal(format!("speak TLS for {host}: {e}"));
        let builder = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?;
        let mut config = builder
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(tls)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    #[cfg(test)]
    fn kept(&self) -> usize {
        self.leaves.lock().len()
    }
}

/// No two certificates of one authority may have the same.
fn serial(host: &str, now: SystemTime) -> SerialNumber {
    let mut bytes = Digest::of(format!("{host} {now:?}")).as_bytes()[..16].to_vec();
    // Positive, and of full length.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_certificates_are_kept() {
        let authority = Authority::with_roots(RootCertStore::empty()).unwrap();
        let first = authority.server("0.example").unwrap();
        assert!(Arc::ptr_eq(&first, &authority.server("0.example").unwrap()));
        for n in 1..=MAX_LEAVES {
            authority.server(&format!("{n}.example")).unwrap();
        }
        assert!(authority.kept() <= MAX_LEAVES);
        assert!(authority.server("bücher.example").is_err());
    }
}
