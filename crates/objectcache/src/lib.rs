//! Build caches that are objects in a store: configs by name, layers by digest, and no manifests
//! (rows `rc.s3*`, `rc.gha*`, `rc.az`).
//!
//! [`services`] is the table of kinds. A [`Service`] reads what a build asks for and opens an
//! [`ObjectCache`] for one import or export. Names of objects, and what is in them, are BuildKit's:
//! a cache that one builder wrote is read by the other. What a config means is crate
//! `remotecache`'s business; here it is bytes.
//!
//! Requests go through `calls`, which signs, limits, and tries again. Answers are foreign bytes:
//! each is bounded, and layers are checked against their digests by the callers that store them.
//!
//! `reqsign-*` (kept by the Apache OpenDAL project) signs requests and knows where a machine has
//! its credentials: environment, profiles, web identity, metadata services. Their network, files
//! and environment are ours (`machine`). The vendors' own SDKs bring a hundred crates and an HTTP
//! client each. `quick-xml` reads the answers of S3 and Azure; it is what `reqsign` uses, too.
//! `httpdate` reads times in headers.

mod azblob;
mod blocks;
mod calls;
mod download;
mod gha;
mod listing;
mod machine;
mod s3;
#[cfg(test)]
mod standin;

pub use download::Download;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use shipway_fault::{Fault, Result};
use shipway_http::DeniedNetworks;
use shipway_oci::{Descriptor, Digest};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

/// Attributes of a request to import or export a cache.
pub type CacheAttributes = BTreeMap<String, String>;

/// Largest config that is read.
pub const MAX_CONFIG: u64 = 64 << 20;

/// Attributes whose values are secrets, of all kinds of caches.
pub const SECRETS: [&str; 5] =
    ["access_key_id", "secret_access_key", "session_token", "token", "ghtoken"];

/// A kind of store.
#[async_trait]
pub trait Service: Send + Sync {
    /// What requests call it: `s3`.
    fn kind(&self) -> &'static str;

    /// What an export is called in progress.
    fn title(&self) -> &'static str;

    /// Checks the attributes of a request. Gives the places that they name, as addresses: equal
    /// places are one cache.
    fn places(&self, attributes: &CacheAttributes) -> Result<Vec<String>>;

    /// The cache that the attributes name, for one import or one export. Nothing is sent yet.
    async fn open(&self, attributes: &CacheAttributes) -> Result<Arc<dyn ObjectCache>>;
}

/// One cache in a store.
#[async_trait]
pub trait ObjectCache: Send + Sync {
    /// Its name for messages.
    fn name(&self) -> String;

    /// Layers that may be on their way at the same time.
    fn parallelism(&self) -> usize;

    /// The configs to import. None where no cache was exported yet.
    async fn configs(&self) -> Result<Vec<Bytes>>;

    /// Which of these layers are there, and will be for a while.
    async fn present(&self, layers: &[Descriptor]) -> Result<HashSet<Digest>>;

    /// The bytes of a layer from `offset` on.
    async fn open(&self, layer: &Descriptor, offset: u64) -> Result<shipway_http::BodyReader>;

    /// Writes a layer that is not there.
    async fn write(&self, layer: &Descriptor, content: &dyn LayerContent) -> Result<()>;

    /// Writes the config, under each name that it is to have. What is exported is found from now
    /// on.
    async fn publish(&self, config: Bytes) -> Result<()>;

    /// The names of configs that begin with `prefix`, in any order, and when each was written.
    async fn names(&self, _prefix: &str) -> Result<Vec<(String, Option<SystemTime>)>> {
        Err(Fault::unimplemented(format!("listing the caches in {}", self.name())))
    }

    /// Whether it can give nothing any more: its credentials were for a time that is over.
    fn is_gone(&self) -> bool {
        false
    }
}

/// The bytes of a layer that is written. It may be opened several times.
#[async_trait]
pub trait LayerContent: Send + Sync {
    /// The bytes from `offset` to the end.
    async fn open(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes>>>;
}

/// All kinds. Nothing is connected to in the networks `denied`, but for this machine's own metadata
/// services.
pub fn services(denied: &DeniedNetworks) -> Vec<Box<dyn Service>> {
    let machine = machine::Machine::new(denied.clone());
    vec![
        Box::new(s3::S3::new(machine.clone())),
        Box::new(gha::Gha::new(machine.clone())),
        Box::new(azblob::AzBlob::new(machine)),
    ]
}

/// What stays as it is in addresses (RFC 3986, "unreserved"): stores sign the rest encoded.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const IN_PATH: &AsciiSet = &UNRESERVED.remove(b'/');

/// `text` as a part of an address: of its query, or of its path between slashes.
pub(crate) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, UNRESERVED).to_string()
}

/// `text` as a path.
pub(crate) fn encoded_path(text: &str) -> String {
    utf8_percent_encode(text, IN_PATH).to_string()
}
