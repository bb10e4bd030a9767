//! The port between builds and the kinds of places that keep caches. A new kind is a file beside
//! `backend/registry.rs` and a line in [`Backends::new`]; one that keeps objects, without
//! manifests, is a line in crate `objectcache`'s table.

mod client;
mod mounts;
mod objects;
mod registry;

use crate::{CacheRequest, ExportOptions, LayerBytes};
use async_trait::async_trait;
use bytes::Bytes;
use shipway_cachemounts::{Direction, Place, Request};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName};
use shipway_registry::Registry;
use shipway_session::{SessionGroup, SessionId};
use shipway_sources::Remote;
use std::{collections::HashSet, sync::Arc};

/// The kind of cache that an image's own config holds. It is written with the image, not to a place
/// of its own.
pub const INLINE: &str = "inline";

/// The clients of a build that imports or exports caches.
#[derive(Clone)]
pub struct CacheClients {
    /// All of them, for credentials.
    pub all: SessionGroup,
    /// The one that asked, for its directories.
    pub own: SessionId,
}

/// A place that is read: where its documents and blobs come from, and the cache there.
pub struct CacheSource {
    /// Where they come from.
    pub remote: Arc<dyn Remote>,
    /// What to begin with.
    pub at: CacheAt,
}

/// How a place names a cache.
pub enum CacheAt {
    /// By the tag or digest of its manifest.
    Reference(String),
    /// It has no manifest: these are its configs, which say all there is to know of layers.
    Configs(Vec<Bytes>),
}

/// One kind of place that keeps caches (row `rc.types`).
#[async_trait]
pub trait CacheBackend: Send + Sync {
    /// What requests call it: `registry`.
    fn kind(&self) -> &'static str;

    /// What an export is called in progress.
    fn export_title(&self) -> String {
        format!("exporting cache to {}", self.kind())
    }

    /// The places that `request` means, as policies name them; none where it is the client's own.
    /// Secrets are no part of them.
    fn places(&self, request: &CacheRequest) -> Result<Vec<String>>;

    /// Checks a request to export, before anything is built. Gives what no other export of the
    /// build may give, too: the place it goes to.
    fn check_export(&self, request: &CacheRequest) -> Result<String>;

    /// The place that `request` to import names.
    async fn source(&self, request: &CacheRequest, clients: &CacheClients) -> Result<CacheSource>;

    /// A writer to the place that `request` to export names.
    async fn writer(
        &self,
        request: &CacheRequest,
        clients: &CacheClients,
    ) -> Result<Box<dyn CacheWriter>>;

    /// The place that `request` names, for contents of cache mounts.
    async fn mounts(
        &self,
        request: &Request,
        _clients: &CacheClients,
        _direction: Direction,
    ) -> Result<Arc<dyn Place>> {
        Err(Fault::unimplemented(format!("cache mounts in a {} cache", request.kind)))
    }

    /// Whether a build succeeds without an export whose place does not answer or is too busy,
    /// unless the request says otherwise.
    fn is_best_effort(&self) -> bool {
        false
    }
}

/// Layers that are on their way at the same time, unless a place says otherwise.
const PARALLEL: usize = 4;

/// Writes one cache: its layers, in any order and several at once, then its config, then its
/// manifest.
#[async_trait]
pub trait CacheWriter: Send + Sync {
    /// Layers that may be on their way at the same time.
    fn parallelism(&self) -> usize {
        PARALLEL
    }

    /// Which of these layers the place is known to have: nothing is done for them.
    async fn present(&self, _layers: &[Descriptor]) -> Result<HashSet<Digest>> {
        Ok(HashSet::new())
    }

    /// Whether the cache is found by a manifest. If not, [`CacheWriter::config`] is the end.
    fn has_manifest(&self) -> bool {
        true
    }

    /// Writes a layer that is not there yet. `origin` is the image that has it if it is not on this
    /// machine; places that share storage with it need no copy.
    async fn layer(
        &self,
        layer: &Descriptor,
        bytes: LayerBytes,
        origin: Option<ImageName>,
    ) -> Result<()>;

    /// Writes the config.
    async fn config(&self, config: &Descriptor, bytes: Bytes) -> Result<()>;

    /// Writes the manifest, by which the cache is found from now on.
    async fn manifest(&self, manifest: &Descriptor, bytes: Bytes) -> Result<()>;
}

/// The kinds of caches that there are.
pub struct Backends(Vec<Box<dyn CacheBackend>>);

impl Backends {
    /// All kinds, on these registries.
    pub fn new(registry: Registry) -> Self {
        let mut all: Vec<Box<dyn CacheBackend>> = Vec::new();
        for service in shipway_objectcache::services(registry.denied()) {
            all.push(Box::new(objects::ObjectBackend(service.into())));
        }
        all.push(Box::new(registry::RegistryBackend(registry)));
        all.push(Box::new(client::ClientBackend));
        Self(all)
    }

    /// The one of this kind.
    fn of(&self, kind: &str) -> Option<&dyn CacheBackend> {
        self.0.iter().map(|backend| &**backend).find(|backend| backend.kind() == kind)
    }

    /// The place for contents of cache mounts that `request` names.
    pub async fn mounts(
        &self,
        request: &Request,
        clients: &CacheClients,
        direction: Direction,
    ) -> Result<Arc<dyn Place>> {
        let unknown = || Fault::unimplemented(format!("cache mounts in a {} cache", request.kind));
        self.of(&request.kind).ok_or_else(unknown)?.mounts(request, clients, direction).await
    }

    /// The places that `request` means, with their kind in front, as policies name them:
    /// `registry:example.org/cache:main`. A cache in the client's own directory, or in an image,
    /// has none.
    pub fn places(&self, request: &CacheRequest) -> Result<Vec<String>> {
        // Kinds that are not known are refused where they are used.
        let Some(backend) = self.of(&request.kind) else { return Ok(Vec::new()) };
        let places = backend.places(request)?;
        Ok(places.into_iter().map(|place| format!("{}:{place}", request.kind)).collect())
    }

    /// [`places`](Self::places) of the contents of cache mounts: under the key that is written, or
    /// what the names of all that may be read begin with.
    pub fn mount_places(&self, request: &Request, direction: Direction) -> Result<Vec<String>> {
        let name = match direction {
            Direction::Save => request.keys.exact(),
            Direction::Restore => &request.base,
        };
        let mut cache = CacheRequest::from(request);
        if let Some(reference) = cache.attrs.get_mut("ref") {
            let image: ImageName = reference
                .parse()
                .map_err(|e| Fault::invalid(format!("failed to parse {reference}: {e}")))?;
            *reference = format!("{}:{name}", image.locator());
        }
        cache.attrs.insert("name".to_owned(), name.to_owned());
        self.places(&cache)
    }

    /// The one that `request` to import names.
    pub fn importer(&self, request: &CacheRequest) -> Result<&dyn CacheBackend> {
        self.of(&request.kind)
            .ok_or_else(|| Fault::unimplemented(format!("importing a {} cache", request.kind)))
    }

    /// The one that `request` to export names.
    pub fn exporter(&self, request: &CacheRequest) -> Result<&dyn CacheBackend> {
        let unknown = || {
            Fault::invalid(format!("unknown cache exporter: {:?}", request.kind))
                .hint("use registry, local, inline, s3, gha or azblob")
        };
        self.of(&request.kind).ok_or_else(unknown)
    }

    /// Checks what is asked before anything is built (row `top.13`): the reference finds out after
    /// the build.
    pub fn check_exports(&self, exports: &[CacheRequest]) -> Result<()> {
        let mut seen: HashSet<(&str, String)> = HashSet::new();
        let mut doubles = Vec::new();
        for export in exports.iter().filter(|e| e.kind != INLINE) {
            let place = self.exporter(export)?.check_export(export)?;
            if !seen.insert((&export.kind, place)) {
                doubles.push(export.kind.as_str());
            }
        }
        if doubles.is_empty() {
            Ok(())
        } else {
            Err(Fault::invalid(format!("duplicate cache exports [{}]", doubles.join(" "))))
        }
    }
}

/// Checks the options that all kinds have.
fn check_options(request: &CacheRequest) -> Result<()> {
    ExportOptions::of(request)
        .map(drop)
        .context(|| format!("failed to configure {} cache exporter", request.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_and_unknown_kinds_are_refused_before_the_build() {
        let backends = Backends::new(Registry::new(Default::default()));
        let request = |kind: &str, attrs: &[(&str, &str)]| CacheRequest {
            kind: kind.into(),
            attrs: attrs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        };
        let say = |all: &[CacheRequest]| {
            backends.check_exports(all).err().map(|e| e.to_string()).unwrap_or_default()
        };
        let registry = request("registry", &[("ref", "a/b")]);
        assert_eq!(say(&[registry.clone(), request("inline", &[]), request("inline", &[])]), "");
        assert!(
            say(&[registry.clone(), registry.clone()])
                .contains("duplicate cache exports [registry]")
        );
        assert_eq!(say(&[registry, request("registry", &[("ref", "a/c")])]), "");
        let local = |dest: &str| request("local", &[("dest", dest)]);
        assert!(say(&[local("a"), local("a")]).contains("duplicate cache exports [local]"));
        assert_eq!(say(&[local("a"), local("b")]), "");
        assert!(say(&[request("x", &[])]).contains("unknown cache exporter"));
        assert!(say(&[request("local", &[])]).contains("requires dest"));
        assert!(say(&[request("gha", &[])]).contains("token not set"));
        assert!(say(&[request("azblob", &[])]).contains("account_url attribute is required"));
        let s3 = |name| request("s3", &[("bucket", "b"), ("region", "r"), ("name", name)]);
        let places = |r: &CacheRequest| backends.places(r).unwrap();
        assert_eq!(
            places(&s3("a;b")),
            [
                "s3:https://b.s3.r.amazonaws.com/manifests/a",
                "s3:https://b.s3.r.amazonaws.com/manifests/b"
            ]
        );
        let short = request("registry", &[("ref", "a/b")]);
        assert_eq!(places(&short), ["registry:docker.io/a/b:latest"]);
        for own in [local("a"), request("inline", &[])] {
            assert!(places(&own).is_empty(), "{own:?}");
        }
        assert!(say(&[s3("a"), s3("a")]).contains("duplicate cache exports [s3]"));
        assert_eq!(say(&[s3("a"), s3("b")]), "");
        assert!(say(&[request("s3", &[])]).contains("bucket ($AWS_BUCKET) not set"));
    }
}
