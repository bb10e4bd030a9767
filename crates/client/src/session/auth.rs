//! Registry credentials and tokens for the daemon (rows `cb.auth.*`). Tokens are fetched here, so
//! that passwords stay here; a daemon gets them only for a registry that takes nothing else, or if
//! `BUILDKIT_NO_CLIENT_TOKEN` says so.

use ring::{
    hmac,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_grpc::status_of;
use shipway_http::KeyPair;
use shipway_proto::moby::filesync::v1::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse,
    GetTokenAuthorityRequest, GetTokenAuthorityResponse, VerifyTokenAuthorityRequest,
    VerifyTokenAuthorityResponse,
    auth_server::{Auth, AuthServer},
};
use shipway_registry::{Credentials, HostConfig, Registry, RegistryConfig};
use std::path::PathBuf;
use tonic::{Request, Response, Status};

use super::seeds::Seeds;
use shipway_dockerconfig::{AuthTls, DockerConfig};

/// The methods that are announced.
pub(crate) const METHODS: [&str; 4] = [
    "/moby.filesync.v1.Auth/Credentials",
    "/moby.filesync.v1.Auth/FetchToken",
    "/moby.filesync.v1.Auth/GetTokenAuthority",
    "/moby.filesync.v1.Auth/VerifyTokenAuthority",
];
/// How we call ourselves to token servers; some know BuildKit's clients by that name.
const CLIENT_ID: &str = "buildkit-client";
/// Life of a token whose issuer does not say, in seconds.
const DEFAULT_LIFE: i64 = 60;

pub(crate) struct AuthService {
    config: DockerConfig,
    seeds: Seeds,
    registry: Registry,
    /// Whether the daemon is to fetch tokens itself.
    no_tokens: bool,
}

pub(crate) fn service(config: DockerConfig) -> AuthServer<AuthService> {
    let set = std::env::var("BUILDKIT_NO_CLIENT_TOKEN").unwrap_or_default();
    let no_tokens = parse_bool(&set) == Some(true);
    AuthServer::new(AuthService::new(config, no_tokens))
}

impl AuthService {
    fn new(config: DockerConfig, no_tokens: bool) -> Self {
        let seeds = Seeds::in_dir(config.dir());
        let pair =
            |(cert, key): &(PathBuf, PathBuf)| KeyPair { cert: cert.clone(), key: key.clone() };
        let host = |tls: &AuthTls| HostConfig {
            insecure: Some(tls.insecure),
            ca: tls.ca.clone(),
            keypair: tls.keypairs.iter().map(pair).collect(),
            ..HostConfig::default()
        };
        let hosts = config.tls().iter().map(|(name, tls)| (name.clone(), host(tls))).collect();
        let registry = Registry::new(RegistryConfig { hosts, ..RegistryConfig::default() });
        Self { config, seeds, registry, no_tokens }
    }

    /// The key that stands for the credentials for `host`. Without any it is the same for
    /// everybody.
    async fn key(&self, host: &str, salt: &[u8]) -> Result<Ed25519KeyPair, Status> {
        if self.no_tokens {
            return Err(Status::unavailable("client side tokens disabled"));
        }
        let found = self.config.lookup(host).await.map_err(|f| status_of(&f))?;
        let has = self.config.registry_token(host).is_some()
            || found.is_some_and(|(_, secret)| !secret.is_empty());
        let seed = if has { self.seeds.of(host).map_err(|f| status_of(&f))? } else { Vec::new() };
        let sum = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), &seed);
        Ed25519KeyPair::from_seed_unchecked(sum.as_ref())
            .map_err(|e| Status::internal(format!("make a key: {e}")))
    }

    async fn token(&self, request: FetchTokenRequest) -> Result<FetchTokenResponse> {
        let FetchTokenRequest { host, realm, service, scopes, .. } = request;
        if let Some(token) = self.config.registry_token(&host) {
            return Ok(FetchTokenResponse { token, expires_in: DEFAULT_LIFE, issued_at: 0 });
        }
        let found = self.config.lookup(&host).await?.filter(|(_, secret)| !secret.is_empty());
        let credentials = found.map(|(username, secret)| Credentials { username, secret });
        let token = self
            .registry
            .fetch_token(CLIENT_ID, &host, &realm, (&service, &scopes), credentials.as_ref())
            .await?;
        let life = token
            .expires_in
            .and_then(|life| i64::try_from(life.as_secs()).ok())
            .unwrap_or(DEFAULT_LIFE);
        Ok(FetchTokenResponse { token: token.token, expires_in: life, issued_at: 0 })
    }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        let host = request.into_inner().host;
        let found = self.config.lookup(&host).await.unwrap_or_else(|fault| {
            // A public image must not be lost to a broken helper; the registry's own answer says
            // what a private one lacks.
            tracing::warn!(error = %fault, host, "no credentials");
            None
        });
        let (username, secret) = found.unwrap_or_default();
        Ok(Response::new(CredentialsResponse { username, secret }))
    }

    async fn fetch_token(
        &self,
        request: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        self.token(request.into_inner())
            .await
            .map(Response::new)
            .map_err(|fault: Fault| status_of(&fault))
    }

    async fn get_token_authority(
        &self,
        request: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        let GetTokenAuthorityRequest { host, salt } = request.into_inner();
        let key = self.key(&host, &salt).await?;
        Ok(Response::new(GetTokenAuthorityResponse {
            public_key: key.public_key().as_ref().to_vec(),
        }))
    }

    async fn verify_token_authority(
        &self,
        request: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        let VerifyTokenAuthorityRequest { host, payload, salt } = request.into_inner();
        let key = self.key(&host, &salt).await?;
        // As NaCl signs: the signature, and then what is signed.
        let signed = [key.sign(&payload).as_ref(), &payload].concat();
        Ok(Response::new(VerifyTokenAuthorityResponse { signed }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::{ED25519, UnparsedPublicKey};

    async fn key_of(service: &AuthService, host: &str) -> Vec<u8> {
        let request = GetTokenAuthorityRequest { host: host.into(), salt: b"salt".to_vec() };
        service
            .get_token_authority(Request::new(request))
            .await
            .expect("a key")
            .into_inner()
            .public_key
    }

    #[tokio::test]
    async fn a_token_is_fetched_here_and_the_password_stays_here() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let host = listener.local_addr().expect("has one").to_string();
        let server = shipway_task::spawn("test", async move {
            let (mut stream, _) = listener.accept().await.expect("accepts");
            let mut asked = vec![0; 4096];
            let n = stream.read(&mut asked).await.expect("reads");
            let body = r#"{"access_token":"tok","expires_in":300}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await.expect("writes");
            String::from_utf8_lossy(&asked[..n]).into_owned()
        });
        let config = format!(
            r#"{{"auths":{{"{host}":{{"auth":"dTpw"}},"given.example":{{"registrytoken":"ready"}}}}}}"#
        );
        let service = AuthService::new(serde_json::from_str(&config).expect("reads"), false);
        let fetch = async |host: &str, realm: &str| {
            let scopes = vec!["repository:a/b:pull".to_owned()];
            let request = FetchTokenRequest {
                host: host.into(),
                realm: realm.into(),
                service: "svc".into(),
                scopes,
                client_id: "d".into(),
            };
            service.fetch_token(Request::new(request)).await.map(Response::into_inner)
        };
        let token = fetch(&host, &format!("http://{host}/token")).await.expect("a token");
        assert_eq!((token.token.as_str(), token.expires_in), ("tok", 300));
        let asked = server.await.expect("serves");
        assert!(
            asked.contains("client_id=buildkit-client&service=svc")
                && asked.contains("username=u&password=p"),
            "{asked}"
        );
        assert_eq!(fetch("given.example", "").await.expect("a token").token, "ready");
        // A daemon cannot have the password sent to anywhere in the open.
        let refused = fetch(&host, "http://203.0.113.1/token").await.expect_err("refused");
        assert!(refused.message().contains("refusing to send credentials"), "{refused}");
    }

    #[tokio::test]
    async fn a_token_server_with_a_root_of_its_own_is_believed_where_that_was_told() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        use tokio_rustls::rustls::{
            ServerConfig, crypto::ring::default_provider, pki_types::PrivatePkcs8KeyDer,
        };
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(["localhost".to_owned()]).expect("parameters");
        let certificate = params.self_signed(&key).expect("a certificate");
        let builder = ServerConfig::builder_with_provider(std::sync::Arc::new(default_provider()))
            .with_safe_default_protocol_versions();
        let der = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let config = builder
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], der)
            .expect("TLS");
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let host = format!("localhost:{}", listener.local_addr().expect("has one").port());
        let _server =
            tokio_util::task::AbortOnDropHandle::new(shipway_task::spawn("test", async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                    let _ = stream.read(&mut [0; 4096]).await;
                    let body = r#"{"token":"tok"}"#;
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let _ = stream.write_all(answer.as_bytes()).await;
                    let _ = stream.shutdown().await;
                }
            }));
        let dir = tempfile::tempdir().expect("a directory");
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, certificate.pem()).expect("writes");
        let fetch = async |tls: AuthTls| {
            let mut config = DockerConfig::default();
            config.set_tls([(host.clone(), tls)].into());
            let request = FetchTokenRequest {
                host: host.clone(),
                realm: format!("https://{host}/token"),
                ..Default::default()
            };
            AuthService::new(config, false)
                .fetch_token(Request::new(request))
                .await
                .map(|r| r.into_inner().token)
        };
        assert_eq!(
            fetch(AuthTls { ca: vec![ca], ..AuthTls::default() }).await.expect("a token"),
            "tok"
        );
        assert_eq!(
            fetch(AuthTls { insecure: true, ..AuthTls::default() }).await.expect("a token"),
            "tok"
        );
        assert!(fetch(AuthTls::default()).await.is_err(), "an unknown root was believed");
    }

    #[tokio::test]
    async fn equal_credentials_have_equal_keys_in_one_home_alone() {
        let config = r#"{"auths":{"r.example":{"auth":"dTpw"}}}"#;
        let home = || {
            let dir = tempfile::tempdir().expect("a directory");
            std::fs::write(dir.path().join("config.json"), config).expect("writes");
            dir
        };
        let at = |dir: &tempfile::TempDir| {
            AuthService::new(
                DockerConfig::load(&dir.path().join("config.json")).expect("loads"),
                false,
            )
        };
        let (mine, yours) = (home(), home());
        let (one, two, other) = (at(&mine), at(&mine), at(&yours));
        assert_eq!(key_of(&one, "r.example").await, key_of(&two, "r.example").await);
        assert_ne!(key_of(&one, "r.example").await, key_of(&other, "r.example").await);
        assert_eq!(key_of(&one, "public.example").await, key_of(&other, "public.example").await);
        let seeds: serde_json::Value =
            serde_json::from_slice(&std::fs::read(mine.path().join(".token_seed")).expect("there"))
                .expect("JSON");
        assert_eq!(seeds["r.example"]["Seed"].as_str().map(str::len), Some(24));

        let payload = b"prove it".to_vec();
        let request = VerifyTokenAuthorityRequest {
            host: "r.example".into(),
            payload: payload.clone(),
            salt: b"salt".to_vec(),
        };
        let signed = one
            .verify_token_authority(Request::new(request))
            .await
            .expect("signs")
            .into_inner()
            .signed;
        assert_eq!(signed[64..], payload);
        UnparsedPublicKey::new(&ED25519, key_of(&two, "r.example").await)
            .verify(&payload, &signed[..64])
            .expect("is ours");

        let silent = AuthService::new(DockerConfig::default(), true);
        let request = GetTokenAuthorityRequest { host: "r.example".into(), salt: Vec::new() };
        let refused =
            silent.get_token_authority(Request::new(request)).await.expect_err("disabled");
        assert_eq!(refused.code(), tonic::Code::Unavailable);
    }
}
