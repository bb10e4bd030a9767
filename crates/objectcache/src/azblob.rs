//! Containers of Azure's blob storage (row `rc.az`).
//!
//! Blobs are named as BuildKit names them: `<prefix>/<manifests_prefix>/<name>` is a config, and
//! `<prefix>/<blobs_prefix>/sha256:<hex>` a layer. A layer is written only where there is none yet.

use crate::{
    CacheAttributes, LayerContent, MAX_CONFIG, ObjectCache, Service,
    blocks::{self, NewBlob, VERSION},
    calls::{Call, Calls, Patience, StoreReply},
    encoded, encoded_path,
    listing::{Listing, QUESTIONS, present},
    machine::Machine,
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, Uri, header};
use parking_lot::Mutex;
use reqsign_azure_storage::{
    Credential, DefaultCredentialProvider, RequestSigner, StaticCredentialProvider,
};
use reqsign_core::Signer;
use serde::Deserialize;
use shipway_fault::{Class, Code, Fault, Result};
use shipway_gocompat::path;
use shipway_http::{BodyReader, is_loopback};
use shipway_oci::{Descriptor, Digest};
use std::{collections::HashSet, sync::Arc};

/// Longest answer other than a layer or a config: a list of 5000 blobs.
const MAX_ANSWER: u64 = 16 << 20;
/// Layers, and blocks of a layer, on their way at once.
const PARALLEL: usize = 4;
/// Most names of one cache.
const MAX_NAMES: usize = 100;

/// Azure's blob storage as a kind of store.
pub(crate) struct AzBlob {
    machine: Machine,
    /// What signs by the machine's own credentials, so that they are asked for once.
    own: Mutex<Option<Signer<Credential>>>,
}

/// What a request's attributes say.
struct Config {
    /// Address of the container.
    container: String,
    account: String,
    key: Option<String>,
    prefix: String,
    manifests: String,
    blobs: String,
    names: Vec<String>,
    /// Whether what is sent can be read on the way.
    plain: bool,
}

impl Config {
    fn of(attributes: &CacheAttributes, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let text = |key: &str| attributes.get(key).map(String::as_str);
        let or = |key: &str, name: &str| text(key).map(str::to_owned).or_else(|| variable(name));
        let url = or("account_url", "BUILDKIT_AZURE_STORAGE_ACCOUNT_URL").ok_or_else(|| {
            Fault::invalid("either ${BUILDKIT_AZURE_STORAGE_ACCOUNT_URL} or account_url attribute is required for azblob cache")
        })?;
        let url = url.trim_end_matches('/');
        let invalid = || {
            Fault::invalid("azure storage account url provided is not a valid url")
                .hint("it is an address such as https://account.blob.core.windows.net")
        };
        let uri: Uri = url.parse().map_err(|_| invalid())?;
        let (Some(scheme @ ("http" | "https")), Some(host), None) =
            (uri.scheme_str(), uri.host(), uri.query())
        else {
            return Err(invalid());
        };
        if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
            return Err(invalid());
        }
        let account = or("account_name", "BUILDKIT_AZURE_STORAGE_ACCOUNT_NAME")
            .unwrap_or_else(|| host.split('.').next().unwrap_or_default().to_owned());
        if account.is_empty() {
            return Err(Fault::invalid(
                "unable to retrieve account name from account url or ${BUILDKIT_AZURE_STORAGE_ACCOUNT_NAME} or account_name attribute for azblob cache",
            ));
        }
        let container = or("container", "BUILDKIT_AZURE_STORAGE_CONTAINER")
            .unwrap_or_else(|| "buildkit-cache".to_owned());
        if container.is_empty() || container.contains('/') {
            return Err(Fault::invalid(format!("{container:?} is not a name of a container")));
        }
        let names: Vec<String> =
            text("name").unwrap_or("buildkit").split(';').map(str::to_owned).collect();
        if names.len() > MAX_NAMES {
            return Err(Fault::invalid(format!("an azblob cache may have {MAX_NAMES} names")));
        }
        Ok(Self {
            container: format!("{url}/{}", encoded(&container)),
            account,
            key: text("secret_access_key").filter(|k| !k.is_empty()).map(str::to_owned),
            prefix: or("prefix", "BUILDKIT_AZURE_STORAGE_PREFIX").unwrap_or_default(),
            manifests: text("manifests_prefix").unwrap_or("manifests").to_owned(),
            blobs: text("blobs_prefix").unwrap_or("blobs").to_owned(),
            names,
            plain: scheme == "http" && !is_loopback(host),
        })
    }

    fn manifest_key(&self, name: &str) -> String {
        path::join(&path::join(&self.prefix, &self.manifests), name)
    }

    fn blob_key(&self, digest: &Digest) -> String {
        path::join(&path::join(&self.prefix, &self.blobs), &digest.to_string())
    }

    /// The beginning that all layers' names have in common.
    fn blob_prefix(&self) -> String {
        let some = self.blob_key(&Digest::of(""));
        some.rsplit_once("sha256:").map_or(String::new(), |(before, _)| before.to_owned())
    }

    fn uri(&self, key: &str) -> Result<Uri> {
        let text = format!("{}/{}", self.container, encoded_path(key));
        text.parse().map_err(|e| Fault::invalid(format!("the blob {key:?} has no address: {e}")))
    }

    /// The container itself.
    fn container_uri(&self, query: &str) -> Result<Uri> {
        let text = format!("{}?restype=container{query}", self.container);
        text.parse().map_err(|e| Fault::invalid(format!("the container has no address: {e}")))
    }
}

impl AzBlob {
    pub fn new(machine: Machine) -> Self {
        Self { machine, own: Mutex::default() }
    }

    fn config(&self, attributes: &CacheAttributes) -> Result<Config> {
        Config::of(attributes, |name| self.machine.variable(name))
    }

    fn signer(&self, config: &Config) -> Result<Signer<Credential>> {
        let make = |keys| Signer::new(self.machine.context.clone(), keys, RequestSigner::new());
        if let Some(key) = &config.key {
            return Ok(make(StaticCredentialProvider::new_shared_key(&config.account, key)));
        }
        // Tokens are sent as they are.
        if config.plain {
            return Err(Fault::invalid(
                "this machine's credentials are not sent to an azblob cache over plain HTTP",
            )
            .hint("use an https address, or give secret_access_key"));
        }
        let own = || {
            let keys = DefaultCredentialProvider::new();
            Signer::new(self.machine.context.clone(), keys, RequestSigner::new())
        };
        Ok(self.own.lock().get_or_insert_with(own).clone())
    }
}

#[async_trait]
impl Service for AzBlob {
    fn kind(&self) -> &'static str {
        "azblob"
    }

    fn title(&self) -> &'static str {
        "exporting cache to Azure Blob Storage"
    }

    fn places(&self, attributes: &CacheAttributes) -> Result<Vec<String>> {
        let config =
            self.config(attributes).map_err(|f| f.context("failed to create azblob config"))?;
        let place = |name: &String| format!("{}/{}", config.container, config.manifest_key(name));
        Ok(config.names.iter().map(place).collect())
    }

    async fn open(&self, attributes: &CacheAttributes) -> Result<Arc<dyn ObjectCache>> {
        let config = self.config(attributes)?;
        let signer = self.signer(&config)?;
        let client = self.machine.client().await?;
        let calls = Calls::new(client, "Azure", Patience::default(), blocks::error);
        Ok(Arc::new(Container { calls, signer, config }))
    }
}

struct Container {
    calls: Calls,
    signer: Signer<Credential>,
    config: Config,
}

impl Container {
    async fn send(&self, call: Call<'_>) -> Result<StoreReply> {
        self.calls.send(&call.header(VERSION.0, VERSION.1), &self.signer).await
    }

    async fn make(&self) -> Result<()> {
        let call = Call::new(Method::PUT, self.config.container_uri("")?, "make the container");
        match self.send(call).await {
            // Another client was faster.
            Err(fault) if fault.is_already_exists() => Ok(()),
            other => other.map(drop),
        }
    }

    fn new_blob<'a>(&'a self, uri: &'a Uri, only_new: bool, action: String) -> NewBlob<'a> {
        NewBlob {
            calls: &self.calls,
            signer: &self.signer,
            uri,
            only_new,
            action,
            parallelism: PARALLEL,
        }
    }

    /// Sizes of the first blobs below the prefix of layers; of none if the credentials may not
    /// list.
    async fn list(&self) -> Result<Listing<u64>> {
        let query =
            format!("&comp=list&maxresults=5000&prefix={}", encoded(&self.config.blob_prefix()));
        let call = Call::new(Method::GET, self.config.container_uri(&query)?, "list layers");
        let answer = match self.send(call).await {
            Ok(reply) => reply.bytes(MAX_ANSWER).await?,
            // Without the container there is nothing.
            Err(fault) if fault.is_not_found() => return Ok(Listing::page(Vec::new(), false)),
            Err(fault) if matches!(fault.code(), Code::PermissionDenied | Code::Unimplemented) => {
                tracing::debug!(error = %fault, "a container cannot be listed, asking for each layer");
                return Ok(Listing::nothing());
            }
            Err(fault) => return Err(fault),
        };
        let page = Page::read(&answer)?;
        let sizes = page.blobs.blob.into_iter().map(|b| (b.name, b.properties.size));
        Ok(Listing::page(sizes.collect(), !page.next.is_empty()))
    }

    async fn size(&self, layer: &Descriptor) -> Result<Option<u64>> {
        let uri = self.config.uri(&self.config.blob_key(&layer.digest))?;
        let action = format!("look for layer {}", layer.digest);
        match self.send(Call::new(Method::HEAD, uri, action)).await {
            Ok(reply) => {
                let size = reply.header(header::CONTENT_LENGTH).and_then(|l| l.parse().ok());
                Ok(Some(size.unwrap_or(layer.size)))
            }
            Err(fault) if fault.is_not_found() => Ok(None),
            Err(fault) => Err(fault),
        }
    }
}

/// One page of a list.
#[derive(Deserialize)]
struct Page {
    #[serde(rename = "Blobs", default)]
    blobs: Blobs,
    #[serde(rename = "NextMarker", default)]
    next: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Blobs {
    #[serde(default)]
    blob: Vec<Listed>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    name: String,
    properties: Properties,
}

#[derive(Deserialize)]
struct Properties {
    #[serde(rename = "Content-Length")]
    size: u64,
}

impl Page {
    fn read(bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes).unwrap_or_default().trim_start_matches('\u{feff}');
        quick_xml::de::from_str(text).map_err(|e| {
            Fault::unknown(format!("a list of Azure's cannot be read: {e}"))
                .with_class(Class::Environment)
        })
    }
}

#[async_trait]
impl ObjectCache for Container {
    fn name(&self) -> String {
        format!("azblob container {}", self.config.container)
    }

    fn parallelism(&self) -> usize {
        PARALLEL
    }

    /// All names.
    async fn configs(&self) -> Result<Vec<Bytes>> {
        let reads = self.config.names.iter().map(|name| async move {
            let key = self.config.manifest_key(name);
            let action = format!("read the cache {key}");
            match self.send(Call::new(Method::GET, self.config.uri(&key)?, action)).await {
                Ok(reply) => reply.bytes(MAX_CONFIG).await.map(Some),
                Err(fault) if fault.is_not_found() => Ok(None),
                Err(fault) => Err(fault),
            }
        });
        let all: Vec<Option<Bytes>> =
            stream::iter(reads.collect::<Vec<_>>()).buffered(QUESTIONS).try_collect().await?;
        Ok(all.into_iter().flatten().collect())
    }

    /// One list has all layers in a container that is not large; each of the others is asked for.
    async fn present(&self, layers: &[Descriptor]) -> Result<HashSet<Digest>> {
        let listing = &Listing::of(layers, self.list()).await?;
        present(layers, QUESTIONS, |layer| async move {
            let size = match listing.find(&self.config.blob_key(&layer.digest)) {
                Some(listed) => listed,
                None => self.size(&layer).await?,
            };
            Ok(size == Some(layer.size))
        })
        .await
    }

    async fn open(&self, layer: &Descriptor, offset: u64) -> Result<BodyReader> {
        let uri = self.config.uri(&self.config.blob_key(&layer.digest))?;
        let mut call = Call::new(Method::GET, uri, format!("read layer {}", layer.digest));
        if offset > 0 {
            call = call.header("range", format!("bytes={offset}-"));
        }
        self.send(call).await?.body_from(offset)
    }

    /// A blob of another length is not the layer: it is replaced.
    async fn write(&self, layer: &Descriptor, content: &dyn LayerContent) -> Result<()> {
        let uri = self.config.uri(&self.config.blob_key(&layer.digest))?;
        let action = format!("write layer {}", layer.digest);
        let mut only_new = true;
        let mut made = false;
        loop {
            let blob = self.new_blob(&uri, only_new, action.clone());
            match blob.write(content, layer.size).await {
                // The container is made when it is first needed.
                Err(fault) if fault.is_not_found() && !made => {
                    self.make().await?;
                    made = true;
                }
                Err(fault) if fault.is_already_exists() && only_new => {
                    if self.size(layer).await? == Some(layer.size) {
                        return Ok(());
                    }
                    only_new = false;
                }
                other => return other,
            }
        }
    }

    async fn publish(&self, config: Bytes) -> Result<()> {
        for name in &self.config.names {
            let key = self.config.manifest_key(name);
            let uri = self.config.uri(&key)?;
            let blob = self.new_blob(&uri, false, format!("write the cache {key}"));
            match blob.write_bytes(&config).await {
                Err(fault) if fault.is_not_found() => {
                    self.make().await?;
                    blob.write_bytes(&config).await?;
                }
                other => other?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standin::{Held, StandIn, answer, layer};

    fn of(attributes: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Config> {
        let all = attributes.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let variable =
            |name: &str| variables.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        Config::of(&all, variable)
    }

    #[test]
    fn blobs_are_where_buildkit_looks_for_them() {
        let digest = Digest::of("x");
        let plain = of(&[("account_url", "https://me.blob.core.windows.net/")], &[]).unwrap();
        assert_eq!((plain.account.as_str(), plain.prefix.as_str()), ("me", ""));
        assert_eq!(plain.manifest_key("buildkit"), "manifests/buildkit");
        assert_eq!(plain.blob_key(&digest), format!("blobs/{digest}"));
        assert_eq!(plain.blob_prefix(), "blobs/");
        let uri = plain.uri("blobs/a:b").unwrap().to_string();
        assert_eq!(uri, "https://me.blob.core.windows.net/buildkit-cache/blobs/a%3Ab");
        let all = of(
            &[
                ("account_url", "http://127.0.0.1:10000/dev"),
                ("account_name", "dev"),
                ("container", "c"),
                ("prefix", "p//q/"),
                ("manifests_prefix", ""),
                ("blobs_prefix", "b/../x"),
                ("name", "one;two"),
                ("secret_access_key", "k"),
            ],
            &[],
        )
        .unwrap();
        assert_eq!(all.manifest_key(&all.names[1]), "p/q/two");
        assert_eq!(all.blob_key(&digest), format!("p/q/x/{digest}"));
        let list = all.container_uri("&comp=list").unwrap().to_string();
        assert_eq!(list, "http://127.0.0.1:10000/dev/c?restype=container&comp=list");
        let named = of(
            &[],
            &[
                ("BUILDKIT_AZURE_STORAGE_ACCOUNT_URL", "https://a.b"),
                ("BUILDKIT_AZURE_STORAGE_ACCOUNT_NAME", "n"),
                ("BUILDKIT_AZURE_STORAGE_CONTAINER", "d"),
                ("BUILDKIT_AZURE_STORAGE_PREFIX", "e"),
            ],
        )
        .unwrap();
        assert_eq!((named.account.as_str(), named.prefix.as_str()), ("n", "e"));
        assert_eq!(named.container, "https://a.b/d");
    }

    #[test]
    fn mistakes_are_named() {
        let say = |attributes: &[(&str, &str)]| {
            of(attributes, &[]).map(drop).map_err(|f| f.message().to_owned()).unwrap_err()
        };
        assert!(say(&[]).contains("account_url attribute is required for azblob cache"));
        for url in ["", "me", "ftp://me", "http://me?x", "https://u:p@me"] {
            assert!(say(&[("account_url", url)]).contains("is not a valid url"), "{url}");
        }
        let url = ("account_url", "https://me");
        assert!(say(&[url, ("account_name", "")]).contains("unable to retrieve account name"));
        assert!(say(&[url, ("container", "a/b")]).contains("is not a name of a container"));
        let names = vec!["n"; MAX_NAMES + 1].join(";");
        assert!(say(&[url, ("name", &names)]).contains("100 names"));
    }

    #[tokio::test]
    async fn the_machines_own_credentials_are_not_sent_in_the_clear() {
        let stores = StandIn::start(|_| answer(404, "")).await;
        let machine = || {
            Machine::new(Default::default()).with_environment(&[
                ("AZURE_STORAGE_ACCOUNT_NAME", "me"),
                ("AZURE_STORAGE_ACCOUNT_KEY", "a2V5"),
            ])
        };
        let open = async |url: &str| {
            let attributes = [("account_url".to_owned(), url.to_owned())].into();
            AzBlob::new(machine()).open(&attributes).await
        };
        let refused = open("http://me.example.com").await.map(drop).unwrap_err();
        assert!(refused.message().contains("over plain HTTP"), "{refused}");
        // On this machine nothing listens.
        let cache = open(&stores.url()).await.unwrap();
        assert!(cache.configs().await.unwrap().is_empty());
        let asked = stores.take().remove(0);
        assert!(asked.header("authorization").starts_with("SharedKey me:"));
    }

    #[tokio::test]
    async fn a_container_that_cannot_be_listed_or_is_large_is_asked_for_each() {
        let layers: Vec<_> = (0..9_u32).map(|n| layer(&n.to_le_bytes())).collect();
        let mut names: Vec<_> = layers.iter().map(|l| format!("blobs/{}", l.digest)).collect();
        names.sort();
        let first = format!(
            "\u{feff}<?xml version=\"1.0\"?><EnumerationResults><Blobs><Blob><Name>{}</Name><Properties><Content-Length>4</Content-Length></Properties></Blob></Blobs><NextMarker>m</NextMarker></EnumerationResults>",
            names[3]
        );
        let whole = first.replace("<NextMarker>m</NextMarker>", "<NextMarker/>");
        let none = "<EnumerationResults><Blobs/><NextMarker/></EnumerationResults>".to_owned();
        for (status, list, there, heads) in [
            (403, String::new(), 9, 9),
            (200, first, 6, 5),
            (200, whole, 1, 0),
            (200, none, 0, 0),
            (404, String::new(), 0, 0),
        ] {
            let store = StandIn::start(move |seen| match seen.target.contains("comp=list") {
                true => answer(status, list.clone()),
                false => {
                    let mut found = answer(200, "");
                    found.headers_mut().insert("content-length", "4".parse().unwrap());
                    found
                }
            })
            .await;
            let attributes = CacheAttributes::from(
                [("account_url", store.url()), ("secret_access_key", "a2V5".to_owned())]
                    .map(|(k, v)| (k.to_owned(), v)),
            );
            let cache =
                AzBlob::new(Machine::new(Default::default())).open(&attributes).await.unwrap();
            assert_eq!(cache.present(&layers).await.unwrap().len(), there, "{status}");
            let asked = store.take().into_iter().filter(|s| s.method == "HEAD").count();
            assert_eq!(asked, heads, "{status}");
        }
    }

    #[tokio::test]
    async fn what_is_there_is_left_alone_unless_it_is_torn() {
        for (length, puts) in [("5", 1), ("3", 2)] {
            let store = StandIn::start(move |seen| match seen.method.as_str() {
                "PUT" if seen.header("if-none-match") == "*" => {
                    answer(409, "<Error><Code>BlobAlreadyExists</Code></Error>")
                }
                "HEAD" => {
                    let mut found = answer(200, "");
                    found.headers_mut().insert("content-length", length.parse().unwrap());
                    found
                }
                _ => answer(201, ""),
            })
            .await;
            let attributes = CacheAttributes::from(
                [("account_url", store.url()), ("secret_access_key", "a2V5".to_owned())]
                    .map(|(k, v)| (k.to_owned(), v)),
            );
            let cache =
                AzBlob::new(Machine::new(Default::default())).open(&attributes).await.unwrap();
            cache.write(&layer(b"layer"), &Held("layer".into())).await.unwrap();
            assert_eq!(store.take().iter().filter(|s| s.method == "PUT").count(), puts);
        }
    }
}
