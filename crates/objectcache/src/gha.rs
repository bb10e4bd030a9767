//! GitHub's cache for Actions, by both of its protocols (rows `rc.gha`, `rc.gha.keys`).
//!
//! The first is REST (`url`), the second is Twirp with JSON (`url_v2`) whose entries are block
//! blobs behind signed addresses. Entries have keys and cannot be changed; a name that is to
//! change, an index, is a key with a number, and a look-up of its beginning gives the newest. What
//! a job may read and write says its token (`token`).

mod token;

use crate::{
    CacheAttributes, LayerContent, MAX_CONFIG, ObjectCache, Service,
    blocks::{self, NewBlob},
    calls::{Call, Calls, Patience, Payload, Sign, StoreError, StoreReply},
    listing::present,
    machine::Machine,
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, Uri, request::Parts};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shipway_fault::{Class, Code, Fault, Result};
use shipway_gocompat::GoDuration;
use shipway_http::BodyReader;
use shipway_oci::{Descriptor, Digest};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};
use token::Token;

/// What BuildKit's client gives as an entry's version: of a key there may be one per version.
const VERSION_OF: &str = "|go-actionscache-1.0";
/// Longest answer that is not an entry.
const MAX_ANSWER: u64 = 1 << 20;
/// Size of the parts that the first protocol uploads.
const CHUNK: u64 = 32 << 20;
/// Parts of an entry, and layers, on their way at once.
const PARALLEL: usize = 4;
/// Keys of a page of the list of all, and most pages that are read.
const PER_PAGE: usize = 100;
const MAX_PAGES: usize = 100;
/// How often an index is written under the next number because another client took this one.
const MAX_NUMBERS: u32 = 10;
/// How long a busy service is waited for, unless `timeout` says so.
const TIMEOUT: Duration = Duration::from_secs(600);

/// GitHub's cache as a kind of store.
pub(crate) struct Gha {
    machine: Machine,
}

impl Gha {
    pub fn new(machine: Machine) -> Self {
        Self { machine }
    }
}

/// What a request's attributes say.
struct Config {
    scope: String,
    /// Address without a slash at the end.
    url: String,
    second: bool,
    token: String,
    timeout: Duration,
    /// Repository and token for GitHub's own API, which lists keys.
    api: Option<(String, String)>,
}

impl Config {
    fn of(attributes: &CacheAttributes) -> Result<Self> {
        let text = |key: &str| attributes.get(key).map(String::as_str);
        let unset = |what: &str| Fault::invalid(format!("{what} not set for github actions cache"));
        let token = text("token").ok_or_else(|| unset("token"))?.to_owned();
        let mut version = match text("version") {
            None => 0,
            Some(v) => v.parse::<i64>().map_err(|_| {
                Fault::invalid(format!(
                    "failed to parse api version {v:?}, expected positive integer"
                ))
            })?,
        };
        let second = text("url_v2").filter(|_| version != 1);
        if second.is_some() {
            version = 2;
        }
        let url = second.filter(|u| !u.is_empty()).or(text("url")).filter(|u| !u.is_empty());
        let url = url.ok_or_else(|| unset("url"))?.trim_end_matches('/').to_owned();
        let known: std::result::Result<Uri, _> = url.parse();
        if !known
            .is_ok_and(|u| matches!(u.scheme_str(), Some("http" | "https")) && u.query().is_none())
        {
            return Err(Fault::invalid("the url of a github actions cache is not a valid address"));
        }
        // Clients of before the second protocol name its address by the first one's attribute.
        if version == 0 && url.contains("results-receiver.actions.githubusercontent.com") {
            version = 2;
        }
        let timeout = match text("timeout") {
            None => TIMEOUT,
            Some(v) => {
                let parsed = v.parse::<GoDuration>().map_err(|e| {
                    Fault::invalid(format!("failed to parse timeout for github actions cache: {e}"))
                })?;
                parsed.to_std().unwrap_or_default()
            }
        };
        let given = |key: &str| text(key).filter(|v| !v.is_empty()).map(str::to_owned);
        let api = given("repository").zip(given("ghtoken"));
        if let Some((repository, _)) = &api
            && !repository.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        {
            return Err(Fault::invalid(format!("{repository:?} is not a repository of GitHub")));
        }
        Ok(Self {
            scope: text("scope").unwrap_or("buildkit").to_owned(),
            url,
            second: version > 1,
            token,
            timeout,
            api,
        })
    }
}

#[async_trait]
impl Service for Gha {
    fn kind(&self) -> &'static str {
        "gha"
    }

    fn title(&self) -> &'static str {
        "exporting to GitHub Actions Cache"
    }

    fn places(&self, attributes: &CacheAttributes) -> Result<Vec<String>> {
        let config = Config::of(attributes)?;
        let token = Token::parse(&config.token, SystemTime::now())?;
        let (url, key) =
            (config.url.trim_end_matches('/'), index_key(&config.scope, token.writable()));
        Ok(vec![format!("{url}/{key}")])
    }

    async fn open(&self, attributes: &CacheAttributes) -> Result<Arc<dyn ObjectCache>> {
        let config = Config::of(attributes)?;
        let token = Token::parse(&config.token, SystemTime::now())?;
        let patience = Patience { budget: config.timeout, ..Patience::default() };
        let client = self.machine.client().await?;
        let api = self.machine.variable("GITHUB_API_URL");
        Ok(Arc::new(Cache {
            calls: Calls::new(client.clone(), "GitHub's cache", patience, error),
            blobs: Calls::new(client, "GitHub's cache", patience, blocks::error),
            api: api.unwrap_or_else(|| "https://api.github.com".to_owned()),
            entries: Mutex::default(),
            config,
            token,
        }))
    }
}

/// The key of a scope's index, without its number.
fn index_key(name: &str, scope: &str) -> String {
    format!("index-{name}-1-{}", &Digest::of(scope).hex()[..8])
}

fn blob_key(layer: &Digest) -> String {
    format!("buildkit-blob-1-{layer}")
}

/// What an error document says: of the first protocol, or of Twirp.
fn error(bytes: &[u8]) -> StoreError {
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Refusal {
        type_key: String,
        code: String,
        message: String,
        msg: String,
    }
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let said: Refusal = serde_json::from_slice(text).unwrap_or_default();
    let or = |a: String, b: String| if a.is_empty() { b } else { a };
    StoreError { code: or(said.type_key, said.code), message: or(said.message, said.msg) }
}

/// Whether a fault says that there is such an entry already.
fn exists(fault: &Fault) -> bool {
    let text = fault.to_string();
    fault.is_already_exists()
        || ["AlreadyExists", "already_exists", "already exists"].iter().any(|w| text.contains(w))
}

struct Bearer<'a>(&'a str);

#[async_trait]
impl Sign for Bearer<'_> {
    async fn sign(&self, head: &mut Parts) -> Result<()> {
        let invalid = |_| Fault::invalid("a token of GitHub's holds what no header may");
        let mut value: http::HeaderValue =
            format!("Bearer {}", self.0).try_into().map_err(invalid)?;
        value.set_sensitive(true);
        head.headers.insert(http::header::AUTHORIZATION, value);
        Ok(())
    }
}

/// Signed addresses need no more.
struct Unsigned;

#[async_trait]
impl Sign for Unsigned {
    async fn sign(&self, _: &mut Parts) -> Result<()> {
        Ok(())
    }
}

struct Cache {
    calls: Calls,
    /// For entries, which another service may keep.
    blobs: Calls,
    /// Address of GitHub's API.
    api: String,
    /// Addresses of layers.
    entries: Mutex<HashMap<Digest, Uri>>,
    config: Config,
    token: Token,
}

/// An entry that was found.
struct Entry {
    key: String,
    uri: Uri,
}

/// An entry that is being written.
enum Reserved {
    /// By the first protocol, under this number.
    Number(u64),
    /// By the second, at this address.
    At(Uri),
}

#[derive(Serialize)]
struct Reserve<'a> {
    key: &'a str,
    version: &'a str,
}

fn wrong(what: &str) -> Fault {
    Fault::unknown(format!("GitHub's cache answered {what}")).with_class(Class::Environment)
}

fn read<T: for<'de> Deserialize<'de>>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| wrong(&format!("{what} that cannot be read: {e}")))
}

fn address(text: &str) -> Result<Uri> {
    // Its query is a signature, which is not shown.
    let uri: Uri = text.parse().map_err(|_| wrong("with an address that is not valid"))?;
    if matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some() {
        Ok(uri)
    } else {
        Err(wrong("with an address of another kind"))
    }
}

impl Cache {
    fn version() -> String {
        Digest::of(VERSION_OF).hex()
    }

    async fn send(&self, call: Call<'_>) -> Result<StoreReply> {
        self.calls.send(&call, &Bearer(&self.token.text)).await
    }

    /// A call of the first protocol.
    fn rest<'a>(&self, method: Method, tail: &str, action: &str) -> Result<Call<'a>> {
        let uri = address(&format!("{}/_apis/artifactcache/{tail}", self.config.url))?;
        Ok(Call::new(method, uri, action)
            .header("accept", "application/json;api-version=6.0-preview.1"))
    }

    async fn post(&self, call: Call<'_>, body: &impl Serialize) -> Result<Bytes> {
        let body = serde_json::to_vec(body)
            .map_err(|e| Fault::internal(format!("encode a request to GitHub's cache: {e}")))?;
        let body = Bytes::from(body);
        let call = Call { payload: Payload::Bytes(&body), ..call };
        self.send(call.header("content-type", "application/json")).await?.bytes(MAX_ANSWER).await
    }

    /// A call of the second protocol.
    async fn twirp(&self, method: &str, body: &impl Serialize, action: &str) -> Result<Bytes> {
        let base = &self.config.url;
        let uri = format!("{base}/twirp/github.actions.results.api.v1.CacheService/{method}");
        self.post(Call::new(Method::POST, address(&uri)?, action), body).await
    }

    /// The newest entry whose key begins with `key`.
    async fn find(&self, key: &str) -> Result<Option<Entry>> {
        let (action, version) = (format!("look for {key}"), Self::version());
        if self.config.second {
            #[derive(Serialize)]
            struct Wanted<'a> {
                key: &'a str,
                restore_keys: [&'a str; 1],
                version: &'a str,
            }
            #[derive(Deserialize)]
            struct Found {
                #[serde(default)]
                ok: bool,
                #[serde(default)]
                signed_download_url: String,
                #[serde(default)]
                matched_key: String,
            }
            let wanted = Wanted { key, restore_keys: [key], version: &version };
            let answer = self.twirp("GetCacheEntryDownloadURL", &wanted, &action).await?;
            let found: Found = read(&answer, "about an entry")?;
            if !found.ok {
                return Ok(None);
            }
            let uri = address(&found.signed_download_url)?;
            return Ok(Some(Entry { key: found.matched_key, uri }));
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Found {
            #[serde(default)]
            cache_key: String,
            #[serde(default)]
            archive_location: String,
        }
        let tail = format!("cache?keys={}&version={version}", in_query(key));
        let answer = self.send(self.rest(Method::GET, &tail, &action)?).await?;
        let answer = answer.bytes(MAX_ANSWER).await?;
        if answer.is_empty() {
            return Ok(None);
        }
        let found: Found = read(&answer, "about an entry")?;
        if found.cache_key.is_empty() {
            return Ok(None);
        }
        Ok(Some(Entry { key: found.cache_key, uri: address(&found.archive_location)? }))
    }

    /// The entry of exactly this key.
    async fn exact(&self, key: &str) -> Result<Option<Entry>> {
        Ok(self.find(key).await?.filter(|e| e.key == key))
    }

    async fn reserve(&self, key: &str) -> Result<Reserved> {
        let (action, version) = (format!("begin {key}"), Self::version());
        let wanted = Reserve { key, version: &version };
        if self.config.second {
            #[derive(Deserialize)]
            struct Begun {
                #[serde(default)]
                ok: bool,
                #[serde(default)]
                signed_upload_url: String,
            }
            let answer = self.twirp("CreateCacheEntry", &wanted, &action).await?;
            let begun: Begun = read(&answer, "about a new entry")?;
            if !begun.ok {
                return Err(wrong("that it takes no new entry").context(action));
            }
            return Ok(Reserved::At(address(&begun.signed_upload_url)?));
        }
        #[derive(Deserialize)]
        struct Begun {
            #[serde(rename = "cacheId", alias = "cacheID")]
            id: u64,
        }
        let answer = self.post(self.rest(Method::POST, "caches", &action)?, &wanted).await?;
        read(&answer, "about a new entry").map(|begun: Begun| Reserved::Number(begun.id))
    }

    /// Fills an entry, and makes it be there.
    async fn fill(
        &self,
        key: &str,
        place: &Reserved,
        content: &dyn LayerContent,
        size: u64,
    ) -> Result<()> {
        let action = format!("write {key}");
        match place {
            Reserved::At(uri) => {
                let blob = NewBlob {
                    calls: &self.blobs,
                    signer: &Unsigned,
                    uri,
                    only_new: false,
                    action: action.clone(),
                    parallelism: PARALLEL,
                };
                blob.write(content, size).await?;
                #[derive(Serialize)]
                struct Whole<'a> {
                    key: &'a str,
                    size_bytes: u64,
                    version: &'a str,
                }
                #[derive(Deserialize)]
                struct Done {
                    #[serde(default)]
                    ok: bool,
                }
                let whole = Whole { key, size_bytes: size, version: &Self::version() };
                let answer = self.twirp("FinalizeCacheEntryUpload", &whole, &action).await?;
                let done: Done = read(&answer, "about an upload")?;
                if done.ok { Ok(()) } else { Err(wrong("that an upload failed").context(action)) }
            }
            Reserved::Number(number) => {
                let tail = format!("caches/{number}");
                let (tail, action) = (tail.as_str(), action.as_str());
                let chunks = (0..size.div_ceil(CHUNK)).map(|index| async move {
                    let offset = index * CHUNK;
                    let length = CHUNK.min(size - offset);
                    let range = format!("bytes {offset}-{}/*", offset + length - 1);
                    let call = self
                        .rest(Method::PATCH, tail, action)?
                        .header("content-type", "application/octet-stream")
                        .header("content-range", range)
                        .payload(Payload::Layer { content, offset, length });
                    self.send(call).await.map(drop)
                });
                stream::iter(chunks).buffer_unordered(PARALLEL).try_collect::<()>().await?;
                #[derive(Serialize)]
                struct Whole {
                    size: u64,
                }
                self.post(self.rest(Method::POST, tail, action)?, &Whole { size }).await.map(drop)
            }
        }
    }

    async fn download(&self, uri: &Uri, offset: u64, action: String) -> Result<StoreReply> {
        let mut call = Call::new(Method::GET, uri.clone(), action).following();
        if offset > 0 {
            call = call.header("range", format!("bytes={offset}-"));
        }
        self.blobs.send(&call, &Unsigned).await
    }

    /// All keys of layers, as GitHub's own API lists them.
    async fn keys(&self, repository: &str, token: &str) -> Result<HashSet<String>> {
        #[derive(Deserialize)]
        struct Page {
            total_count: usize,
            actions_caches: Vec<Key>,
        }
        #[derive(Deserialize)]
        struct Key {
            key: String,
        }
        let mut keys = HashSet::new();
        for scope in self.token.scopes() {
            for page in 1..=MAX_PAGES {
                let uri = format!(
                    "{}/repos/{repository}/actions/caches?per_page={PER_PAGE}&page={page}&key={}&ref={}",
                    self.api.trim_end_matches('/'),
                    in_query("buildkit-blob-1-"),
                    in_query(scope)
                );
                let call = Call::new(Method::GET, address(&uri)?, "list keys")
                    .header("accept", "application/vnd.github+json")
                    .header("x-github-api-version", "2022-11-28");
                let answer = self.calls.send(&call, &Bearer(token)).await?;
                let answer: Page = read(&answer.bytes(MAX_ANSWER).await?, "a list of keys")?;
                keys.extend(answer.actions_caches.into_iter().map(|k| k.key));
                if answer.total_count <= page * PER_PAGE {
                    break;
                }
            }
        }
        Ok(keys)
    }
}

fn in_query(text: &str) -> String {
    crate::encoded(text)
}

/// A config as an entry.
struct Document(Bytes);

#[async_trait]
impl LayerContent for Document {
    async fn open(
        &self,
        offset: u64,
    ) -> Result<futures::stream::BoxStream<'static, Result<Bytes>>> {
        let rest = self.0.slice(usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len())..);
        Ok(stream::iter([Ok(rest)]).boxed())
    }
}

#[async_trait]
impl ObjectCache for Cache {
    fn name(&self) -> String {
        format!("GitHub's cache, scope {}", self.config.scope)
    }

    fn parallelism(&self) -> usize {
        PARALLEL
    }

    /// One of each scope that the token may read.
    async fn configs(&self) -> Result<Vec<Bytes>> {
        let reads = self.token.scopes().map(|scope| async move {
            let key = index_key(&self.config.scope, scope);
            let Some(entry) = self.find(&key).await? else { return Ok(None) };
            let reply = self.download(&entry.uri, 0, format!("read {}", entry.key)).await?;
            reply.bytes(MAX_CONFIG).await.map(Some)
        });
        let all: Vec<Option<Bytes>> =
            stream::iter(reads.collect::<Vec<_>>()).buffered(PARALLEL).try_collect().await?;
        Ok(all.into_iter().flatten().collect())
    }

    /// GitHub's API lists all at once where there is a token for it. It is not asked again when
    /// it fails: then each layer is asked for.
    async fn present(&self, layers: &[Descriptor]) -> Result<HashSet<Digest>> {
        if let Some((repository, token)) = &self.config.api {
            match self.keys(repository, token).await {
                Ok(keys) => {
                    let there = layers.iter().map(|l| l.digest);
                    return Ok(there.filter(|d| keys.contains(&blob_key(d))).collect());
                }
                Err(fault) => {
                    tracing::info!(error = %fault, "failed to list the keys of GitHub's cache, asking for each layer");
                }
            }
        }
        present(layers, PARALLEL, |layer| async move {
            Ok(self.exact(&blob_key(&layer.digest)).await?.is_some())
        })
        .await
    }

    async fn open(&self, layer: &Descriptor, offset: u64) -> Result<BodyReader> {
        let (digest, action) = (layer.digest, format!("read layer {}", layer.digest));
        let known = self.entries.lock().get(&digest).cloned();
        if let Some(uri) = known {
            match self.download(&uri, offset, action.clone()).await {
                Ok(reply) => return reply.body_from(offset),
                // An address is for a time.
                Err(fault)
                    if matches!(fault.code(), Code::PermissionDenied | Code::Unauthenticated) =>
                {
                    self.entries.lock().remove(&digest);
                }
                Err(fault) => return Err(fault),
            }
        }
        let gone =
            || Fault::not_found(format!("layer {digest} is not in {} any more", self.name()));
        let entry = self.exact(&blob_key(&digest)).await?.ok_or_else(gone)?;
        let reply = self.download(&entry.uri, offset, action).await?;
        self.entries.lock().insert(digest, entry.uri);
        reply.body_from(offset)
    }

    async fn write(&self, layer: &Descriptor, content: &dyn LayerContent) -> Result<()> {
        let key = blob_key(&layer.digest);
        let place = match self.reserve(&key).await {
            Ok(place) => place,
            // Another client writes it, or has.
            Err(fault) if exists(&fault) => return Ok(()),
            Err(fault) => return Err(fault),
        };
        self.fill(&key, &place, content, layer.size).await
    }

    /// An index of the same bytes is left as it is. A number that another client took is passed
    /// over: that client may have stopped before it was whole.
    async fn publish(&self, config: Bytes) -> Result<()> {
        let key = index_key(&self.config.scope, self.token.writable());
        let newest = self.find(&format!("{key}#")).await?;
        let mut number = 0;
        if let Some(newest) = newest {
            let reply = self.download(&newest.uri, 0, format!("read {}", newest.key)).await;
            if let Ok(reply) = reply
                && reply.bytes(config.len() as u64).await.is_ok_and(|old| old == config)
            {
                return Ok(());
            }
            let said = newest.key.strip_prefix(&format!("{key}#")).and_then(|n| n.parse().ok());
            number = said.ok_or_else(|| wrong(&format!("with the key {:?}", newest.key)))?;
        }
        for next in 1..=u64::from(MAX_NUMBERS) {
            let key = format!("{key}#{}", u64::saturating_add(number, next));
            match self.reserve(&key).await {
                Ok(place) => {
                    let size = config.len() as u64;
                    return self.fill(&key, &place, &Document(config), size).await;
                }
                Err(fault) if exists(&fault) => {}
                Err(fault) => return Err(fault),
            }
        }
        let why = format!("the next {MAX_NUMBERS} numbers of {key} are taken");
        Err(Fault::unavailable(why).hint("other builds export the same scope at this moment"))
    }

    fn is_gone(&self) -> bool {
        self.token.expired()
    }
}

#[cfg(test)]
mod tests;
