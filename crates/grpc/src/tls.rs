//! TLS for TCP listeners and for clients: certificates from files, with or without a client
//! authority. A server's files may be replaced while it runs: the next handshake uses the new ones.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
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
    /// Whether clients may do without a certificate all the same, because callers are asked who
    /// they are.
    pub client_optional: bool,
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
    fn stamps(&self) -> Vec<Stamp> {
        let files = [&self.cert, &self.key].into_iter().chain(&self.client_ca);
        files.map(|path| stamp(path)).collect()
    }

    fn acceptor(&self) -> Result<TlsAcceptor> {
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
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match self.client_optional {
                    true => verifier.allow_unauthenticated(),
                    false => verifier,
                };
                let verifier =
                    verifier.build().map_err(|e| broken("use the TLS client authority", ca, e))?;
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

/// What tells one content of a file from another: device, inode, size and time of modification.
/// Nothing where the file cannot be looked at.
type Stamp = Option<(u64, u64, u64, SystemTime)>;

fn stamp(path: &Path) -> Stamp {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.len(), meta.modified().ok()?))
}

/// TLS of a listener, made of files that are read again when they have changed. Files that cannot
/// be used are reported once, and those from before stay in use; connections that are there go on.
pub(crate) struct ReloadedTls {
    files: ServerTls,
    current: Mutex<(Vec<Stamp>, TlsAcceptor)>,
}

impl ReloadedTls {
    /// Reads the files, which have to be good the first time.
    pub(crate) fn new(files: ServerTls) -> Result<Self> {
        let current = (files.stamps(), files.acceptor()?);
        Ok(Self { files, current: Mutex::new(current) })
    }

    /// What shakes hands with the next client. Looks at three files, so it costs some microseconds.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        // Looked at before they are read: what changes meanwhile is read the next time.
        let stamps = self.files.stamps();
        let mut current = self.current.lock();
        if current.0 != stamps {
            current.0 = stamps;
            match self.files.acceptor() {
                Ok(acceptor) => {
                    current.1 = acceptor;
                    tracing::info!(cert = %self.files.cert.display(), "TLS files were read again");
                }
                Err(error) => tracing::error!(
                    %error,
                    "failed to use the new TLS files: the ones from before stay in use"
                ),
            }
        }
        current.1.clone()
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    /// A certificate for `name` and its key.
    fn made(name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new([name.to_owned()]).expect("parameters");
        (params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
    }

    /// Writes a file that is newer than all before: they follow faster than clocks of file systems
    /// tick.
    fn put(path: &Path, text: &str) {
        static TIME: AtomicU64 = AtomicU64::new(1_700_000_000);
        std::fs::write(path, text).expect("write");
        let time = Duration::from_secs(TIME.fetch_add(1, Ordering::Relaxed));
        let file = std::fs::File::options().write(true).open(path).expect("open");
        file.set_modified(SystemTime::UNIX_EPOCH + time).expect("a time");
    }

    /// Files of a certificate for `name` in `dir`.
    pub(crate) fn pair(dir: &Path, name: &str) -> ServerTls {
        let files = ServerTls {
            cert: dir.join("cert.pem"),
            key: dir.join("key.pem"),
            client_ca: None,
            client_optional: false,
        };
        let (cert, key) = made(name);
        put(&files.cert, &cert);
        put(&files.key, &key);
        files
    }

    #[test]
    fn changed_files_are_used_once_they_are_good() {
        let dir = tempfile::tempdir().expect("dir");
        let files = pair(dir.path(), "one.test");
        let tls = ReloadedTls::new(files.clone()).expect("good files");
        let used = || Arc::as_ptr(tls.acceptor().config());
        let first = used();
        assert_eq!(used(), first, "nothing has changed");
        // A renewal has to begin with one of the two.
        let (cert, key) = made("two.test");
        put(&files.cert, &cert);
        assert_eq!(used(), first, "the key is that of another certificate");
        put(&files.key, &key);
        let second = used();
        assert_ne!(second, first);
        for broken in ["", "no PEM"] {
            put(&files.cert, broken);
            assert_eq!(used(), second, "{broken:?}");
        }
        std::fs::remove_file(&files.cert).expect("remove");
        assert_eq!(used(), second);
        pair(dir.path(), "three.test");
        assert_ne!(used(), second);
        put(&files.cert, "no PEM");
        assert!(ReloadedTls::new(files).is_err(), "the first files have to be good");
    }
}
