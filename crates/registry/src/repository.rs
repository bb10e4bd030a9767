//! The client and its repositories: who is asked, names resolved, manifests fetched.

use crate::{
    CredentialSource, Credentials, Error, RegistryConfig, Token,
    auth::{AuthStores, Authorizer, TokenClient, token_server},
    endpoint::{Capability, Endpoint, Scheme},
    error::Kind,
    hosts,
    limit::Limits,
    request::ApiRequest,
};
use bytes::Bytes;
use http::{Method, header};
use parking_lot::Mutex;
use serde::Deserialize;
use shipway_http::{Client, DeniedNetworks, FileStamp, Response, TlsSettings, join};
use shipway_oci::{Descriptor, Digest, ImageName, Index, media};
use shipway_task::blocking;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};
use tokio::sync::OnceCell;

/// Largest manifest or index that is accepted, as in containerd.
const MAX_MANIFEST: u64 = 4 << 20;
/// Most bytes of one page of tags, and most pages.
const MAX_TAG_PAGE: u64 = 4 << 20;
const MAX_TAG_PAGES: usize = 100;

/// Media types that resolving accepts, and anything else rather than nothing.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, */*";

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

    /// The descriptor that `reference` (a tag, or a digest) names. Asks with HEAD, which registries
    /// do not count as a pull, and with GET where the answer to HEAD does not say enough.
    pub async fn resolve(&self, reference: &str) -> Result<Descriptor, Error> {
        self.resolve_with(reference, true).await
    }

    /// The same without trying again what may pass, for callers with a fallback.
    pub async fn resolve_once(&self, reference: &str) -> Result<Descriptor, Error> {
        self.resolve_with(reference, false).await
    }

    async fn resolve_with(&self, reference: &str, retry: bool) -> Result<Descriptor, Error> {
        let pinned = reference.parse::<Digest>().ok();
        let need = if pinned.is_some() { Capability::Pull } else { Capability::Resolve };
        let request = |method| {
            let request =
                ApiRequest::new(method, format!("manifests/{reference}"), need, "resolve")
                    .header(header::ACCEPT, ACCEPT);
            ApiRequest { retry, ..request }
        };
        match self.request(&request(Method::HEAD)).await {
            Ok(reply) => {
                if let Some(found) = described(&reply.response, pinned) {
                    return self.validate(found, pinned, &reply.endpoint);
                }
            }
            // These answers to HEAD may hide what GET would say: words on why not, or a registry
            // that knows no HEAD.
            Err(e)
                if matches!(
                    e.kind(),
                    Kind::Forbidden { .. } | Kind::Status { status: 400 | 405 | 406 | 501, .. }
                ) => {}
            Err(e) => return Err(e),
        }
        let reply = self.request(&request(Method::GET)).await?;
        let media_type = media_type_of(&reply.response);
        let fail = |kind| Error::new(self.name(), &reply.endpoint.authority, "resolve", kind);
        let bytes = reply.response.body.collect(MAX_MANIFEST).await.map_err(|f| fail(f.into()))?;
        let media_type = media_type.or_else(|| declared(&bytes)).unwrap_or_default();
        self.validate(Descriptor::of(media_type, &bytes), pinned, &reply.endpoint)
    }

    fn validate(
        &self,
        found: Descriptor,
        pinned: Option<Digest>,
        endpoint: &Endpoint,
    ) -> Result<Descriptor, Error> {
        let fail = |kind| Err(Error::new(self.name(), &endpoint.authority, "resolve", kind));
        if let Some(expected) = pinned
            && expected != found.digest
        {
            return fail(Kind::Digest { expected, got: found.digest });
        }
        if found.size > MAX_MANIFEST {
            return fail(Kind::TooLarge { what: "the manifest", limit: MAX_MANIFEST });
        }
        if found.media_type.starts_with("application/vnd.docker.distribution.manifest.v1")
            || found.media_type == "text/plain"
        {
            return fail(Kind::Protocol(format!(
                "media type {:?} (schema 1) is no longer supported; rebuild the image as {:?}",
                found.media_type,
                media::OCI_MANIFEST
            )));
        }
        Ok(found)
    }

    /// The bytes of a manifest, index, or another small document that lives with the manifests;
    /// checked.
    pub async fn fetch_manifest(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        let action = format!("fetch manifest {}", descriptor.digest);
        let accept = if descriptor.media_type.is_empty() {
            ACCEPT.to_owned()
        } else {
            format!("{}, */*", descriptor.media_type)
        };
        let request = ApiRequest::new(
            Method::GET,
            format!("manifests/{}", descriptor.digest),
            Capability::Pull,
            &action,
        )
        .header(header::ACCEPT, &accept);
        let reply = self.request(&request).await?;
        self.read_verified(reply.response, &reply.endpoint, descriptor, &action).await
    }

    /// The bytes of a small blob such as an image's config; checked.
    pub async fn fetch_small_blob(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        let action = format!("fetch blob {}", descriptor.digest);
        let reply = self
            .request(&ApiRequest::new(
                Method::GET,
                format!("blobs/{}", descriptor.digest),
                Capability::Pull,
                &action,
            ))
            .await?;
        self.read_verified(reply.response, &reply.endpoint, descriptor, &action).await
    }

    async fn read_verified(
        &self,
        response: Response,
        endpoint: &Endpoint,
        descriptor: &Descriptor,
        action: &str,
    ) -> Result<Bytes, Error> {
        let fail = |kind| Error::new(self.name(), &endpoint.authority, action, kind);
        if descriptor.size > MAX_MANIFEST {
            return Err(fail(Kind::TooLarge { what: "the document", limit: MAX_MANIFEST }));
        }
        let bytes = response.body.collect(MAX_MANIFEST).await.map_err(|f| fail(f.into()))?;
        let got = Digest::of(&bytes);
        if got != descriptor.digest {
            return Err(fail(Kind::Digest { expected: descriptor.digest, got }));
        }
        // Some indexes name a size of zero for what they only mention; the digest has spoken
        // already.
        if descriptor.size != 0 && bytes.len() as u64 != descriptor.size {
            return Err(fail(Kind::Size { expected: descriptor.size, got: bytes.len() as u64 }));
        }
        Ok(bytes)
    }

    /// What refers to the manifest `subject`, such as signatures: by the registry's own list, or,
    /// where it keeps none, by the index whose tag is the digest with a dash (OCI distribution-spec
    /// 1.1, "Listing Referrers").
    pub async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>, Error> {
        let action = format!("list what refers to {subject}");
        let request =
            ApiRequest::new(Method::GET, format!("referrers/{subject}"), Capability::Pull, &action)
                .header(header::ACCEPT, media::OCI_INDEX);
        let (bytes, authority) = match self.request(&request).await {
            Ok(reply) => {
                let fail = |kind| Error::new(self.name(), &reply.endpoint.authority, &action, kind);
                (
                    reply.response.body.collect(MAX_MANIFEST).await.map_err(|f| fail(f.into()))?,
                    reply.endpoint.authority.clone(),
                )
            }
            Err(e) if e.is_not_found() => {
                match self.resolve(&format!("sha256-{}", subject.hex())).await {
                    Ok(index) => {
                        (self.fetch_manifest(&index).await?, self.name().registry().to_owned())
                    }
                    Err(e) if e.is_not_found() => return Ok(Vec::new()),
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        };
        let bad = |e| {
            Error::new(
                self.name(),
                &authority,
                &action,
                Kind::Protocol(format!("the list of referrers is not a valid index: {e}")),
            )
        };
        serde_json::from_slice::<Index>(&bytes).map(|i| i.manifests).map_err(bad)
    }

    /// The repository's tags, in the registry's order.
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let mut all = Vec::new();
        let mut request =
            ApiRequest::new(Method::GET, "tags/list", Capability::Resolve, "list the tags");
        for _ in 0..MAX_TAG_PAGES {
            let reply = self.request(&request).await?;
            let next = next_page(&reply.response);
            let fail =
                |kind| Error::new(self.name(), &reply.endpoint.authority, "list the tags", kind);
            let bytes =
                reply.response.body.collect(MAX_TAG_PAGE).await.map_err(|f| fail(f.into()))?;
            let page: Page = serde_json::from_slice(&bytes).map_err(|e| {
                fail(Kind::Protocol(format!("the list of tags is not valid JSON: {e}")))
            })?;
            all.extend(page.tags.unwrap_or_default());
            match next {
                Some(query) if query != request.query => request.query = query,
                _ => break,
            }
        }
        Ok(all)
    }
}

/// The query of the next page, from `Link: <…>; rel="next"`.
fn next_page(response: &Response) -> Option<String> {
    let link = response.head.headers.get(header::LINK)?.to_str().ok()?;
    let target = link
        .split(',')
        .find(|l| l.contains("next"))?
        .trim()
        .strip_prefix('<')?
        .split('>')
        .next()?;
    join(&response.uri, target).ok()?.query().map(str::to_owned)
}

/// What the headers of a manifest say of it, if they say everything.
fn described(response: &Response, pinned: Option<Digest>) -> Option<Descriptor> {
    let header = |name: &str| response.head.headers.get(name)?.to_str().ok();
    let digest = header("docker-content-digest").and_then(|d| d.parse().ok()).or(pinned)?;
    let size = header("content-length")?.parse().ok()?;
    Some(Descriptor::new(media_type_of(response)?, digest, size))
}

fn media_type_of(response: &Response) -> Option<String> {
    let text = response.head.headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let kind = text.split(';').next().unwrap_or_default().trim();
    // Some file servers say so of everything.
    (!kind.is_empty() && kind != "application/octet-stream" && kind != "application/json")
        .then(|| kind.to_owned())
}

/// The media type that a manifest gives itself, or that its shape gives away.
fn declared(bytes: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    if let Some(t) = json.get("mediaType").and_then(|t| t.as_str()) {
        return Some(t.to_owned());
    }
    match json.get("manifests").is_some() {
        true => Some(media::OCI_INDEX.into()),
        false => json.get("layers").map(|_| media::OCI_MANIFEST.into()),
    }
}
