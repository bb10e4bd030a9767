//! The client and its repositories: who is asked, with which connections and credentials.

use crate::{
    CredentialSource, Credentials, Error, RegistryConfig, Token,
    auth::{AuthStores, Authorizer, TokenClient, token_server},
    endpoint::{Capability, Endpoint, Scheme},
    error::Kind,
    hosts,
    limit::Limits,
};
use parking_lot::Mutex;
use shipway_http::{Client, DeniedNetworks, FileStamp, TlsSettings};
use shipway_oci::ImageName;
use shipway_task::blocking;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};
use tokio::sync::OnceCell;

/// Whether a request reads a repository or writes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reads; mirrors are asked first.
    Pull,
    /// Reads and writes; only hosts that take pushes are asked to.
    Push,
}

/// The daemon's distribution client. Cheap to clone.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

pub(crate) struct Shared {
    pub config: RegistryConfig,
    pub limits: Limits,
    clients: Mutex<HashMap<(TlsSettings, Option<std::time::Duration>), Pool>>,
    stores: Arc<AuthStores>,
    /// Hosts found to speak plain HTTP.
    plain: Mutex<HashSet<String>>,
}

/// A pool of connections, and the state of the files that it was made with.
#[derive(Clone)]
struct Pool {
    stamps: Vec<FileStamp>,
    client: Client,
}

impl Shared {
    /// The pool of connections for an endpoint.
    pub(crate) async fn client(&self, endpoint: &Endpoint) -> Result<Client, Kind> {
        let key = (endpoint.tls.clone(), endpoint.dial_timeout);
        // Certificates are renewed while we run.
        let stamps = key.0.stamps();
        let before = self.clients.lock().get(&key).cloned();
        if let Some(pool) = before.as_ref().filter(|pool| pool.stamps == stamps) {
            return Ok(pool.client.clone());
        }
        let mut timeouts = self.config.timing.http;
        timeouts.connect = endpoint.dial_timeout.unwrap_or(timeouts.connect);
        let (tls, denied) = (endpoint.tls.clone(), self.config.denied.clone());
        let make = move || Ok(Client::new(&tls, timeouts, denied));
        let client = blocking("read certificates", make).await;
        let client = match (client.map_err(|e| Kind::Config(e.to_string()))?, before) {
            (Ok(client), _) => client,
            // A certificate may be there before its key is.
            (Err(why), Some(Pool { client, .. })) => {
                tracing::warn!(host = %endpoint.authority, why, "failed to load new certificates, keeping the old ones");
                return Ok(client);
            }
            (Err(why), None) => return Err(Kind::Config(why)),
        };
        self.clients.lock().insert(key, Pool { stamps, client: client.clone() });
        Ok(client)
    }

    pub(crate) fn scheme(&self, endpoint: &Endpoint) -> &'static str {
        match endpoint.scheme {
            Scheme::Https => "https",
            Scheme::Http => "http",
            Scheme::Either if self.plain.lock().contains(&endpoint.authority) => "http",
            Scheme::Either => "https",
        }
    }

    /// Notes that the endpoint does not speak TLS; whether that is allowed.
    pub(crate) fn speak_plain(&self, endpoint: &Endpoint) -> bool {
        let allowed = endpoint.may_be_plain();
        if allowed {
            self.plain.lock().insert(endpoint.authority.clone());
        }
        allowed
    }

    fn authorizer(&self, credentials: Arc<dyn CredentialSource>) -> Authorizer {
        Authorizer {
            stores: self.stores.clone(),
            store: self.stores.of(credentials.identity()),
            credentials,
        }
    }
}

impl Registry {
    /// A client with `config`. Nothing is read or dialed yet.
    pub fn new(config: RegistryConfig) -> Self {
        let limits = Limits::new(config.max_concurrency);
        Self(Arc::new(Shared {
            config,
            limits,
            clients: Mutex::default(),
            stores: Arc::default(),
            plain: Mutex::default(),
        }))
    }

    /// Networks that are not connected to.
    pub fn denied(&self) -> &DeniedNetworks {
        &self.0.config.denied
    }

    /// The repository of `name` as seen with `credentials`.
    pub fn repository(
        &self,
        name: &ImageName,
        credentials: Arc<dyn CredentialSource>,
        mode: Mode,
    ) -> Repository {
        let auth = self.0.authorizer(credentials);
        let view = RepositoryInner {
            shared: self.0.clone(),
            name: name.clone(),
            mode,
            insecure: false,
            auth,
            endpoints: OnceCell::new(),
        };
        Repository(Arc::new(view))
    }

    /// Asks the token server `realm` for a token for the registry `host`, anonymously without
    /// credentials. For callers that fetch tokens for others: requests to repositories fetch
    /// their own.
    ///
    /// Who is asked for a token does not know the registry: credentials go to a server without TLS
    /// only if that is on this machine, or the registry itself.
    pub async fn fetch_token(
        &self,
        client_id: &str,
        host: &str,
        realm: &str,
        (service, scopes): (&str, &[String]),
        credentials: Option<&Credentials>,
    ) -> Result<Token, shipway_fault::Fault> {
        let failed = |kind| Error::new("", host, "fetch a token", kind);
        let uri = token_server(realm).map_err(failed)?;
        let mut endpoint = Endpoint::origin(host);
        if let Some(told) = self.0.config.hosts.get(host) {
            endpoint.tls = TlsSettings {
                ca: told.ca.clone(),
                keypair: told.keypair.clone(),
                skip_verify: told.insecure == Some(true),
            };
        }
        let client = self.0.client(&endpoint).await.map_err(failed)?;
        let tokens = TokenClient { client: &client, uri: &uri, client_id, service, scopes };
        let Some(credentials) = credentials else {
            return tokens
                .get(None, "failed to fetch anonymous token")
                .await
                .map_err(|kind| failed(kind).into());
        };
        let server = uri.authority().map_or("", |a| a.as_str());
        if uri.scheme_str() == Some("http")
            && server != host
            && !shipway_http::is_loopback(uri.host().unwrap_or_default())
        {
            let why = format!("refusing to send credentials to {server} over plain HTTP");
            return Err(failed(Kind::Auth { why, status: None }).into());
        }
        tokens.with(credentials).await.map_err(|kind| failed(kind).into())
    }

    /// A client for other HTTP than registries', sharing this one's pool and timing.
    pub async fn http_client(&self) -> Result<Client, shipway_fault::Fault> {
        let endpoint = Endpoint::origin("");
        self.0
            .client(&endpoint)
            .await
            .map_err(|kind| Error::new("", "", "prepare TLS", kind).into())
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// One image's repository, for one request. Cheap to clone.
#[derive(Clone)]
pub struct Repository(Arc<RepositoryInner>);

struct RepositoryInner {
    shared: Arc<Shared>,
    name: ImageName,
    mode: Mode,
    insecure: bool,
    auth: Authorizer,
    endpoints: OnceCell<Vec<Endpoint>>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Repository({}, {:?})", self.0.name, self.0.mode)
    }
}

impl Repository {
    /// The same repository with certificates unverified and plain HTTP allowed (row
    /// `ex.img.insecure`).
    #[must_use]
    pub fn insecure(&self) -> Self {
        let Authorizer { stores, store, credentials } = &self.0.auth;
        let auth = Authorizer {
            stores: stores.clone(),
            store: store.clone(),
            credentials: credentials.clone(),
        };
        self.view(true, auth, OnceCell::new())
    }

    /// The same repository as seen with other `credentials`.
    #[must_use]
    pub fn with_credentials(&self, credentials: Arc<dyn CredentialSource>) -> Self {
        let auth = self.0.shared.authorizer(credentials);
        self.view(self.0.insecure, auth, self.0.endpoints.clone())
    }

    fn view(&self, insecure: bool, auth: Authorizer, endpoints: OnceCell<Vec<Endpoint>>) -> Self {
        let v = &self.0;
        Self(Arc::new(RepositoryInner {
            shared: v.shared.clone(),
            name: v.name.clone(),
            mode: v.mode,
            insecure,
            auth,
            endpoints,
        }))
    }

    /// The image's name.
    pub fn name(&self) -> &ImageName {
        &self.0.name
    }

    pub(crate) fn registry(&self) -> &Shared {
        &self.0.shared
    }

    pub(crate) fn mode(&self) -> Mode {
        self.0.mode
    }

    pub(crate) fn auth(&self) -> &Authorizer {
        &self.0.auth
    }

    /// The endpoints that can do `need`, in order.
    pub(crate) async fn endpoints(&self, need: Capability) -> Result<Vec<Endpoint>, Error> {
        let view = self.0.clone();
        let load = move || {
            let (config, registry) = (view.shared.config.clone(), view.name.registry().to_owned());
            hosts::endpoints(&config, &registry, view.insecure)
        };
        let all = self
            .0
            .endpoints
            .get_or_try_init(|| async {
                blocking("find the hosts", move || Ok(load())).await.map_err(|e| e.to_string())?
            })
            .await;
        let all = all.map_err(|why| {
            Error::new(self.name(), self.name().registry(), "find the hosts", Kind::Config(why))
        })?;
        // What is to be pushed must be looked for where it will be pushed, not at a mirror.
        let need_push = need == Capability::Push || self.mode() == Mode::Push;
        Ok(all
            .iter()
            .filter(|e| e.can(if need_push { Capability::Push } else { need }))
            .cloned()
            .collect())
    }
}
