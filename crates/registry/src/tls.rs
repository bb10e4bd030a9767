//! TLS settings of a host, and rustls configurations made of them.

use crate::KeyPair;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};

/// Whom to trust and who we are. Equal settings share connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TlsSettings {
    /// Files of root certificates besides the machine's.
    pub ca: Vec<PathBuf>,
    /// Client certificates; the first is used.
    pub keypair: Vec<KeyPair>,
    /// Accept any certificate.
    pub skip_verify: bool,
}

/// The machine's trust store, read once. A certificate that does not parse is passed over, as others do.
fn native_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut store = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "a part of the machine's trust store cannot be read");
        }
        store.add_parsable_certificates(found.certs);
        store
    })
}

/// The rustls configuration for `settings`. Reads files: call it where blocking is allowed.
pub(crate) fn client_config(settings: &TlsSettings) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
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
    match settings.keypair.first() {
        None => Ok(builder.with_no_client_auth()),
        Some(pair) => {
            let key = PrivateKeyDer::from_pem_file(&pair.key).map_err(|e| format!("read the key {}: {e}", pair.key.display()))?;
            let chain = certificates(&pair.cert)?;
            builder.with_client_auth_cert(chain, key).map_err(|e| format!("use the client certificate {}: {e}", pair.cert.display()))
        }
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = |e: rustls::pki_types::pem::Error| format!("read certificates from {}: {e}", file.display());
    CertificateDer::pem_file_iter(file).map_err(read)?.collect::<Result<_, _>>().map_err(read)
}

/// Believes any certificate (`insecure`, `skip_verify`): the administrator asked for it. Signatures are still checked.
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
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
