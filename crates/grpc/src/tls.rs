//! TLS for TCP listeners and for clients: certificates from files, with or without a client
//! authority.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use shipway_fault::{Fault, Result};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// A server's certificate, and whose clients it trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// PEM file with the certificate chain.
    pub cert: PathBuf,
    /// PEM file with the key.
    pub key: PathBuf,
    /// PEM file with the authorities that clients' certificates must come from.
    pub client_ca: Option<PathBuf>,
}

/// What a client needs for TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// Name to expect in the server's certificate, when it is not the host that was dialed.
    pub server_name: Option<String>,
    /// PEM file with the authorities that the server's certificate must come from.
    pub ca: Option<PathBuf>,
    /// PEM files of the client's certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ServerTls {
    pub(crate) fn acceptor(&self) -> Result<TlsAcceptor> {
        let provider = Arc::new(ring::default_provider());
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|e| broken("read the TLS key", &self.key, e))?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| Fault::internal(format!("set up TLS: {e}")))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let mut roots = RootCertStore::empty();
                for cert in certificates(ca)? {
                    roots.add(cert).map_err(|e| broken("use the TLS client authority", ca, e))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|e| broken("use the TLS client authority", ca, e))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(certificates(&self.cert)?, key)
            .map_err(|e| broken("use the TLS certificate", &self.cert, e))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl ClientTls {
    pub(crate) async fn config(&self) -> Result<ClientTlsConfig> {
        let mut config = ClientTlsConfig::new();
        if let Some(name) = &self.server_name {
            config = config.domain_name(name);
        }
        if let Some(ca) = &self.ca {
            config = config.ca_certificate(Certificate::from_pem(read(ca).await?));
        }
        if let Some((cert, key)) = &self.identity {
            config = config.identity(Identity::from_pem(read(cert).await?, read(key).await?));
        }
        Ok(config)
    }
}

async fn read(path: &Path) -> Result<Vec<u8>> {
    tokio::fs::read(path).await.map_err(|e| Fault::io(format!("read {}", path.display()), e))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certs: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(|certs| certs.collect())
        .map_err(|e| broken("read the TLS certificates", path, e))?;
    if certs.is_empty() {
        return Err(Fault::invalid(format!(
            "read the TLS certificates {}: the file holds none",
            path.display()
        )));
    }
    Ok(certs)
}

fn broken(what: &str, path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::invalid(format!("{what} {}: {error}", path.display()))
}
