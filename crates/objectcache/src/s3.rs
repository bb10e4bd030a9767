//! Buckets of Amazon's S3 and of what speaks like it (rows `rc.s3.loc`, `rc.s3.auth`,
//! `rc.s3.tune`).
//!
//! Objects are named as BuildKit names them: `<prefix><manifests_prefix><name>` is a config, and
//! `<prefix><blobs_prefix>sha256:<hex>` a layer. A layer's own digest is the checksum that its
//! request is signed with, so that a store takes nothing that was damaged on the way.

mod config;
mod xml;

use crate::{
    CacheAttributes, LayerContent, MAX_CONFIG, ObjectCache, Service,
    calls::{Call, Calls, Patience, Payload, StoreReply},
    encoded,
    listing::{Listing, QUESTIONS, present},
    machine::Machine,
};
use async_trait::async_trait;
use bytes::Bytes;
use config::{Config, StaticKeys};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, header};
use parking_lot::Mutex;
use reqsign_aws_v4::{
    Credential, DefaultCredentialProvider, RequestSigner, StaticCredentialProvider,
};
use reqsign_core::Signer;
use shipway_fault::{Fault, Result};
use shipway_http::BodyReader;
use shipway_oci::{Descriptor, Digest, timestamp};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

/// Longest answer other than a layer or a config: a list of 1000 objects.
const MAX_ANSWER: u64 = 4 << 20;
/// Larger layers are uploaded in parts.
const SINGLE: u64 = 64 << 20;
/// Least size of a part.
const PART: u64 = 32 << 20;
/// Most parts of an upload.
const MAX_PARTS: u64 = 10_000;
/// Largest object that can be copied by one request.
const MAX_COPY: u64 = 5 << 30;

const CONTENT_SHA256: &str = "x-amz-content-sha256";

/// S3 as a kind of store.
pub(crate) struct S3 {
    machine: Machine,
    /// What the machine's own credentials sign by, so that they are asked for once.
    own: Mutex<HashMap<String, Signer<Credential>>>,
}

impl S3 {
    pub fn new(machine: Machine) -> Self {
        Self { machine, own: Mutex::default() }
    }

    fn config(&self, attributes: &CacheAttributes) -> Result<Config> {
        Config::of(attributes, |name| self.machine.variable(name))
    }

    fn signer(&self, config: &Config) -> Signer<Credential> {
        let by = RequestSigner::new("s3", &config.region);
        if let Some(StaticKeys { id, secret, token }) = &config.keys {
            let mut keys = StaticCredentialProvider::new(id, secret);
            if let Some(token) = token {
                keys = keys.with_session_token(token);
            }
            return Signer::new(self.machine.context.clone(), keys, by);
        }
        let make =
            || Signer::new(self.machine.context.clone(), DefaultCredentialProvider::new(), by);
        self.own.lock().entry(config.region.clone()).or_insert_with(make).clone()
    }
}

#[async_trait]
impl Service for S3 {
    fn kind(&self) -> &'static str {
        "s3"
    }

    fn title(&self) -> &'static str {
        "exporting cache to Amazon S3"
    }

    fn places(&self, attributes: &CacheAttributes) -> Result<Vec<String>> {
        let config = self.config(attributes)?;
        let place = |name: &String| format!("{}/{}", config.base, config.manifest_key(name));
        Ok(config.names.iter().map(place).collect())
    }

    async fn open(&self, attributes: &CacheAttributes) -> Result<Arc<dyn ObjectCache>> {
        let config = self.config(attributes)?;
        let patience = Patience { tries: config.tries, ..Patience::default() };
        let calls = Calls::new(self.machine.client().await?, "S3", patience, xml::error);
        let signer = self.signer(&config);
        Ok(Arc::new(Bucket { calls, signer, config }))
    }
}

struct Bucket {
    calls: Calls,
    signer: Signer<Credential>,
    config: Config,
}

/// What is known of an object.
#[derive(Clone, Copy)]
struct Object {
    size: u64,
    modified: Option<SystemTime>,
}

impl Bucket {
    async fn send(&self, call: Call<'_>) -> Result<StoreReply> {
        self.calls.send(&call, &self.signer).await
    }

    fn call<'a>(&self, method: Method, key: &str, query: &str, action: String) -> Result<Call<'a>> {
        Ok(Call::new(method, self.config.uri(key, query)?, action))
    }

    /// A call with a small document. Its checksum is part of what is signed.
    fn document<'a>(&self, call: Call<'a>, bytes: &'a Bytes) -> Call<'a> {
        call.header(CONTENT_SHA256, Digest::of(bytes).hex()).payload(Payload::Bytes(bytes))
    }

    /// The first objects whose keys begin with `prefix`; whether there are more.
    async fn first(&self, prefix: &str, what: &str) -> Result<(Vec<(String, Object)>, bool)> {
        let query = format!("list-type=2&max-keys=1000&prefix={}", encoded(prefix));
        let call = self.call(Method::GET, "", &query, format!("list {what}"))?;
        let page = xml::page(&self.send(call).await?.bytes(MAX_ANSWER).await?)?;
        let objects = page
            .objects
            .into_iter()
            .map(|o| (o.key, Object { size: o.size, modified: timestamp::parse(&o.modified) }));
        Ok((objects.collect(), page.truncated))
    }

    /// The first objects below the prefix of layers; none if the credentials may not list.
    async fn list(&self) -> Result<Listing<Object>> {
        match self.first(&self.config.blob_prefix(), "layers").await {
            Ok((objects, more)) => Ok(Listing::page(objects, more)),
            Err(fault) if fault.class() == shipway_fault::Class::Environment && may_not(&fault) => {
                tracing::debug!(error = %fault, "a bucket cannot be listed, asking for each layer");
                Ok(Listing::nothing())
            }
            Err(fault) => Err(fault),
        }
    }

    async fn head(&self, layer: &Descriptor) -> Result<Option<Object>> {
        let key = self.config.blob_key(&layer.digest);
        let call = self.call(Method::HEAD, &key, "", format!("look for layer {}", layer.digest))?;
        match self.send(call).await {
            Ok(reply) => {
                let size = reply.header(header::CONTENT_LENGTH).and_then(|l| l.parse().ok());
                let modified = reply.header(header::LAST_MODIFIED);
                let modified = modified.and_then(|t| httpdate::parse_http_date(t).ok());
                Ok(Some(Object { size: size.unwrap_or(layer.size), modified }))
            }
            Err(fault) if fault.is_not_found() => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Makes an object as new as one that was just written, so that rules which remove old ones
    /// spare it.
    async fn touch(&self, layer: &Descriptor) -> Result<()> {
        let key = self.config.blob_key(&layer.digest);
        let action = format!("refresh layer {}", layer.digest);
        let source = self.config.copy_source(&key);
        if layer.size < MAX_COPY {
            let call = self
                .call(Method::PUT, &key, "", action)?
                .header("x-amz-copy-source", source)
                .header("x-amz-metadata-directive", "REPLACE")
                .header("x-amz-meta-updated-at", timestamp::format(SystemTime::now()));
            return xml::copied(&self.send(call).await?.bytes(MAX_ANSWER).await?).map(drop);
        }
        self.in_parts(&key, layer.size, MAX_COPY, &action, &|call, offset, length| {
            call.header("x-amz-copy-source", source.as_str()).header(
                "x-amz-copy-source-range",
                format!("bytes={offset}-{}", offset + length - 1),
            )
        })
        .await
    }

    /// Makes an object of several parts; `fill` gives each part's call what it needs.
    async fn in_parts<'a>(
        &self,
        key: &str,
        size: u64,
        part: u64,
        action: &str,
        fill: &(dyn Fn(Call<'a>, u64, u64) -> Call<'a> + Send + Sync),
    ) -> Result<()> {
        let begin = self
            .call(Method::POST, key, "uploads=", action.to_owned())?
            .header("content-type", "application/octet-stream");
        let upload = xml::upload(&self.send(begin).await?.bytes(MAX_ANSWER).await?)?;
        let done = self.parts(key, &upload, size, part, action, fill).await;
        if done.is_err() {
            // What is left of it costs money until it is removed.
            let query = format!("uploadId={}", encoded(&upload));
            let call = self.call(Method::DELETE, key, &query, "give up an upload".into())?;
            if let Err(fault) = self.send(call).await {
                tracing::info!(error = %fault, "failed to remove an unfinished upload");
            }
        }
        done
    }

    async fn parts<'a>(
        &self,
        key: &str,
        upload: &str,
        size: u64,
        part: u64,
        action: &str,
        fill: &(dyn Fn(Call<'a>, u64, u64) -> Call<'a> + Send + Sync),
    ) -> Result<()> {
        let id = encoded(upload);
        let parts = (0..size.div_ceil(part)).map(|index| async move {
            let (number, offset) = (index + 1, index * part);
            let length = part.min(size - offset);
            let query = format!("partNumber={number}&uploadId={}", encoded(upload));
            let action = format!("{action}, part {number}");
            let reply = self
                .send(fill(self.call(Method::PUT, key, &query, action)?, offset, length))
                .await?;
            let tag = reply.header(header::ETAG).map(str::to_owned);
            let tag = match tag {
                Some(tag) => tag,
                // A copy's is in the answer.
                None => xml::copied(&reply.bytes(MAX_ANSWER).await?)?,
            };
            Ok::<_, Fault>((number, tag))
        });
        let tags: Vec<(u64, String)> =
            stream::iter(parts).buffered(self.config.parallelism).try_collect().await?;
        let list = Bytes::from(xml::parts(&tags));
        let call = self.call(Method::POST, key, &format!("uploadId={id}"), action.to_owned())?;
        let call = self.document(call, &list).header("content-type", "application/xml");
        xml::finished(&self.send(call).await?.bytes(MAX_ANSWER).await?)
    }
}

/// Whether a fault says that the credentials, or the store, do not allow the request.
fn may_not(fault: &Fault) -> bool {
    use shipway_fault::Code;
    matches!(fault.code(), Code::PermissionDenied | Code::Unimplemented | Code::NotFound)
}

#[async_trait]
impl ObjectCache for Bucket {
    fn name(&self) -> String {
        format!(
            "s3://{}/{}",
            self.config.bucket,
            self.config.manifest_key(self.config.first_name())
        )
    }

    fn parallelism(&self) -> usize {
        self.config.parallelism
    }

    /// Only the first name is read, as by BuildKit.
    async fn configs(&self) -> Result<Vec<Bytes>> {
        let key = self.config.manifest_key(self.config.first_name());
        let call = self.call(Method::GET, &key, "", format!("read the cache {key}"))?;
        match self.send(call).await {
            Ok(reply) => Ok(vec![reply.bytes(MAX_CONFIG).await?]),
            Err(fault) if fault.is_not_found() => Ok(Vec::new()),
            Err(fault) => Err(fault),
        }
    }

    /// One list has all layers in a bucket that is not large; each of the others is asked for. An
    /// object of another size is not the layer.
    async fn present(&self, layers: &[Descriptor]) -> Result<HashSet<Digest>> {
        let listing = &Listing::of(layers, self.list()).await?;
        present(layers, QUESTIONS, |layer| async move {
            let object = match listing.find(&self.config.blob_key(&layer.digest)) {
                Some(listed) => listed,
                None => self.head(&layer).await?,
            };
            let Some(object) = object.filter(|o| o.size == layer.size) else { return Ok(false) };
            let age = object.modified.and_then(|at| at.elapsed().ok()).unwrap_or_default();
            if age > self.config.touch_refresh {
                self.touch(&layer).await?;
            }
            Ok(true)
        })
        .await
    }

    async fn open(&self, layer: &Descriptor, offset: u64) -> Result<BodyReader> {
        let key = self.config.blob_key(&layer.digest);
        let mut call = self.call(Method::GET, &key, "", format!("read layer {}", layer.digest))?;
        if offset > 0 {
            call = call.header("range", format!("bytes={offset}-"));
        }
        self.send(call).await?.body_from(offset)
    }

    async fn write(&self, layer: &Descriptor, content: &dyn LayerContent) -> Result<()> {
        let key = self.config.blob_key(&layer.digest);
        let action = format!("write layer {}", layer.digest);
        if layer.size <= SINGLE {
            let call = self
                .call(Method::PUT, &key, "", action)?
                .header(CONTENT_SHA256, layer.digest.hex())
                .header("content-type", "application/octet-stream")
                .payload(Payload::Layer { content, offset: 0, length: layer.size });
            return self.send(call).await.map(drop);
        }
        let part = PART.max(layer.size.div_ceil(MAX_PARTS));
        self.in_parts(&key, layer.size, part, &action, &|call, offset, length| {
            call.payload(Payload::Layer { content, offset, length })
        })
        .await
    }

    async fn names(&self, prefix: &str) -> Result<Vec<(String, Option<SystemTime>)>> {
        let below = self.config.manifest_key("");
        let (objects, _) = self.first(&format!("{below}{prefix}"), "caches").await?;
        let named = |(key, object): (String, Object)| {
            key.strip_prefix(&below).map(|name| (name.to_owned(), object.modified))
        };
        Ok(objects.into_iter().filter_map(named).collect())
    }

    async fn publish(&self, config: Bytes) -> Result<()> {
        for name in &self.config.names {
            let key = self.config.manifest_key(name);
            let call = self.call(Method::PUT, &key, "", format!("write the cache {key}"))?;
            let call =
                self.document(call, &config).header("content-type", "application/octet-stream");
            self.send(call).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
