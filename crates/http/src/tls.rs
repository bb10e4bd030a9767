//! TLS settings of a host, and rustls configurations made of them.

use serde::Deserialize;
use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};

/// Certificates to trust, and those to show. Equal settings share connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TlsSettings {
    /// Files of root certificates besides the machine's.
    pub ca: Vec<PathBuf>,
    /// Client certificates; a server gets the first that it would accept by its issuer.
    pub keypair: Vec<KeyPair>,
    /// Accept any certificate.
    pub skip_verify: bool,
}

impl TlsSettings {
    /// The state of every file named here: another one means that a file was replaced or
    /// rewritten.
    pub fn stamps(&self) -> Vec<FileStamp> {
        let pairs = self.keypair.iter().flat_map(|pair| [&pair.key, &pair.cert]);
        self.ca.iter().chain(pairs).map(|file| FileStamp::of(file)).collect()
    }
}

/// A client certificate and its key, both PEM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct KeyPair {
    /// File of the key.
    pub key: PathBuf,
    /// File of the certificate chain.
    pub cert: PathBuf,
}

/// The state of a file: `None` while it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStamp(Option<(u64, u64, u64, i64, i64)>);

impl FileStamp {
    fn of(file: &Path) -> Self {
        let facts = std::fs::metadata(file).ok();
        Self(facts.map(|f| (f.dev(), f.ino(), f.size(), f.mtime(), f.mtime_nsec())))
    }
}

/// The machine's trust store, read once: call it first where blocking is allowed. A certificate
/// that does not parse is passed over, as others do.
pub fn native_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut store = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "failed to read a part of the system trust store");
        }
        store.add_parsable_certificates(found.certs);
        store
    })
}

/// The rustls configuration for `settings`. Reads files: call it where blocking is allowed.
pub(crate) fn client_config(settings: &TlsSettings) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = if settings.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
    } else {
        let mut roots = native_roots().clone();
        for file in &settings.ca {
            let certificates = certificates(file)?;
            let (added, _) = roots.add_parsable_certificates(certificates);
            if added == 0 {
                return Err(format!("{} holds no usable root certificate", file.display()));
            }
        }
        builder.with_root_certificates(roots)
    };
    if settings.keypair.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let keys = settings.keypair.iter().map(|pair| {
        let key = PrivateKeyDer::from_pem_file(&pair.key)
            .map_err(|e| format!("read the key {}: {e}", pair.key.display()))?;
        let unfit =
            |e: rustls::Error| format!("use the client certificate {}: {e}", pair.cert.display());
        CertifiedKey::from_der(certificates(&pair.cert)?, key, builder.crypto_provider())
            .map(Arc::new)
            .map_err(unfit)
    });
    let keys = keys.collect::<Result<_, _>>()?;
    Ok(builder.with_client_cert_resolver(Arc::new(ClientKeys(keys))))
}

/// Several client certificates.
#[derive(Debug)]
struct ClientKeys(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientKeys {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || self.0.iter().filter(|key| key.key.choose_scheme(schemes).is_some());
        let accepted = |key: &&Arc<CertifiedKey>| {
            key.cert.iter().any(|c| issuer(c).is_some_and(|i| issuers.contains(&i)))
        };
        // A server need not name all the issuers that it accepts.
        usable().find(accepted).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// The name of the issuer of a certificate, as it is encoded there (RFC 5280, section 4.1).
fn issuer(certificate: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (_, signed, _) = element(certificate)?;
    let (_, mut fields, _) = element(signed)?;
    if fields.first() == Some(&VERSION) {
        fields = element(fields)?.2;
    }
    // Behind the serial number and the signature's algorithm.
    let rest = element(element(fields)?.2)?.2;
    let (tag, _, after) = element(rest)?;
    (tag == SEQUENCE).then(|| &rest[..rest.len() - after.len()])
}

/// The first element of DER: tag, content, and what is behind it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match usize::from(*first) {
        short if short < 0x80 => (short, rest),
        long => {
            let (length, rest) =
                rest.split_at_checked(long - 0x80).filter(|(l, _)| l.len() <= 4)?;
            (length.iter().fold(0, |all, byte| all << 8 | usize::from(*byte)), rest)
        }
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((*tag, content, after))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = |e: rustls::pki_types::pem::Error| {
        format!("read certificates from {}: {e}", file.display())
    };
    CertificateDer::pem_file_iter(file).map_err(read)?.collect::<Result<_, _>>().map_err(read)
}

/// Believes any certificate (`insecure`, `skip_verify`): the administrator asked for it. Signatures
/// are still checked.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
