//! Registries with a certificate of a private authority that want a certificate of their clients,
//! too.

use crate::fake::{Fake, Reply, ok, registry};
use shipway_http::KeyPair;
use shipway_registry::{Anonymous, HostConfig, Mode, RegistryConfig, Repository};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use tokio_rustls::rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

/// Certificates made by openssl: authorities, and what they issue.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    #[track_caller]
    fn openssl(&self, arguments: &[&str]) {
        let out = Command::new("openssl")
            .current_dir(self.0.path())
            .args(arguments)
            .output()
            .expect("openssl is absent");
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn authority(&self, name: &str) {
        let (key, cert, subject) =
            (format!("{name}.key"), format!("{name}.crt"), format!("/CN={name}"));
        let new = [
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ];
        self.openssl(&[&new[..], &["-keyout", &key, "-out", &cert, "-subj", &subject]].concat());
    }

    fn issue(&self, authority: &str, name: &str) -> KeyPair {
        let (key, request, cert) =
            (format!("{name}.key"), format!("{name}.csr"), format!("{name}.cert"));
        let new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        self.openssl(
            &[&new[..], &["-keyout", &key, "-out", &request, "-subj", &format!("/CN={name}")]]
                .concat(),
        );
        std::fs::write(self.file("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        let (ca, ca_key) = (format!("{authority}.crt"), format!("{authority}.key"));
        let sign = ["x509", "-req", "-days", "2", "-extfile", "names", "-CAcreateserial"];
        self.openssl(
            &[&sign[..], &["-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-out", &cert]].concat(),
        );
        KeyPair { key: self.file(&key), cert: self.file(&cert) }
    }

    fn read(&self, name: &str) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_file_iter(self.file(name)).unwrap().collect::<Result<_, _>>().unwrap()
    }

    /// A server with the certificate `name` for clients of `authority`.
    fn server(&self, name: &str, authority: &str) -> ServerConfig {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.read(&format!("{authority}.crt")));
        let provider = Arc::new(ring::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .unwrap();
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap();
        let key = PrivateKeyDer::from_pem_file(self.file(&format!("{name}.key"))).unwrap();
        builder
            .with_client_cert_verifier(clients)
            .with_single_cert(self.read(&format!("{name}.cert")), key)
            .unwrap()
    }
}

fn manifest() -> Reply {
    ok(r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#)
}

fn copy(from: &Path, to: &Path) {
    // As tools that renew certificates do it: another file by the same name.
    let new = to.with_extension("new");
    std::fs::copy(from, &new).unwrap();
    std::fs::rename(new, to).unwrap();
}

#[tokio::test]
async fn all_key_pairs_and_authorities_count_and_renewed_files_do_at_once() {
    let made = Certificates(tempfile::tempdir().unwrap());
    ["servers", "others", "clients"].into_iter().for_each(|a| made.authority(a));
    made.issue("servers", "server");
    let (foreign, right) = (made.issue("others", "foreign"), made.issue("clients", "right"));
    let fake = Fake::start_tls(made.server("server", "clients"), |_| manifest()).await;
    let host = |ca: &[&str], keypair: Vec<KeyPair>| HostConfig {
        ca: ca.iter().map(|name| made.file(name)).collect(),
        keypair,
        ..HostConfig::default()
    };
    let client = |config: HostConfig| {
        registry(RegistryConfig {
            hosts: [(fake.host.clone(), config)].into(),
            ..Default::default()
        })
    };
    let name: shipway_oci::ImageName = format!("{}/a/b:1", fake.host).parse().unwrap();
    let ask = async |r: &shipway_registry::Registry| {
        let repository: Repository = r.repository(&name, Arc::new(Anonymous), Mode::Pull);
        repository.resolve("1").await.map(drop).map_err(|e| e.to_string())
    };
    ask(&client(host(&["others.crt", "servers.crt"], vec![foreign.clone(), right.clone()])))
        .await
        .unwrap();
    for (ca, pairs) in [
        (&["others.crt"][..], vec![right.clone()]),
        (&["servers.crt"], vec![]),
        (&["servers.crt"], vec![foreign.clone()]),
    ] {
        let error = ask(&client(host(ca, pairs.clone()))).await.unwrap_err();
        assert!(error.contains(&fake.host), "{ca:?} {pairs:?}: {error}");
    }

    // The files of one client are renewed while it lives; a certificate that is there before its
    // key changes nothing.
    let current = KeyPair { key: made.file("current.key"), cert: made.file("current.cert") };
    let take = |pair: &KeyPair| {
        copy(&pair.cert, &current.cert);
        copy(&pair.key, &current.key);
    };
    take(&foreign);
    copy(&made.file("others.crt"), &made.file("current.crt"));
    let lasting = client(host(&["current.crt"], vec![current.clone()]));
    ask(&lasting).await.unwrap_err();
    take(&right);
    copy(&made.file("servers.crt"), &made.file("current.crt"));
    ask(&lasting).await.unwrap();
    copy(&foreign.cert, &current.cert);
    ask(&lasting).await.unwrap();
}
