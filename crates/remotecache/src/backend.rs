//! The port between builds and the kinds of places that keep caches. A new kind is a file beside
//! `backend/registry.rs` and a line in [`Backends::new`].

mod client;
mod registry;

use crate::{CacheRequest, ExportOptions, LayerBytes};
use async_trait::async_trait;
use bytes::Bytes;
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, ImageName};
use shipway_registry::Registry;
use shipway_session::{SessionGroup, SessionHub, SessionId};
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

/// A place that is read: where its documents and blobs come from, and the tag or digest of the
/// cache there.
pub struct CacheSource {
    /// Where they come from.
    pub remote: Arc<dyn Remote>,
    /// Tag or digest of the manifest.
    pub reference: String,
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
}

/// Writes one cache: its layers, in any order and several at once, then its config, then its
/// manifest.
#[async_trait]
pub trait CacheWriter: Send + Sync {
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
    /// All kinds, on these registries and clients.
    pub fn new(registry: Registry, sessions: SessionHub) -> Self {
        Self(vec![
            Box::new(registry::RegistryBackend(registry)),
            Box::new(client::ClientBackend(sessions)),
            Box::new(Missing("s3")),
            Box::new(Missing("gha")),
            Box::new(Missing("azblob")),
        ])
    }

    /// The one of this kind.
    fn of(&self, kind: &str) -> Option<&dyn CacheBackend> {
        self.0.iter().map(|backend| &**backend).find(|backend| backend.kind() == kind)
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
                .hint("use registry, local or inline")
        };
        self.of(&request.kind).ok_or_else(unknown)
    }

    /// Checks what is asked before anything is built (row `top.13`): the reference finds out after
    /// the build.
    pub fn check_exports(&self, exports: &[CacheRequest]) -> Result<()> {
        let mut seen: HashSet<(&str, String)> = HashSet::new();
        let mut doubles = Vec::new();
        for export in exports.iter().filter(|e| e.kind != INLINE) {
            let place = match self.exporter(export)?.check_export(export) {
                Err(fault) if fault.is_unimplemented() && export.ignores_errors() => continue,
                other => other?,
            };
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

/// A kind of BuildKit's that is not there yet.
struct Missing(&'static str);

#[async_trait]
impl CacheBackend for Missing {
    fn kind(&self) -> &'static str {
        self.0
    }

    fn check_export(&self, _: &CacheRequest) -> Result<String> {
        Err(Fault::unimplemented(format!("exporting a {} cache", self.0)))
    }

    async fn source(&self, _: &CacheRequest, _: &CacheClients) -> Result<CacheSource> {
        Err(Fault::unimplemented(format!("importing a {} cache", self.0)))
    }

    async fn writer(
        &self,
        request: &CacheRequest,
        _: &CacheClients,
    ) -> Result<Box<dyn CacheWriter>> {
        Err(self.check_export(request).expect_err("it is not there"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_and_unknown_kinds_are_refused_before_the_build() {
        let backends = Backends::new(Registry::new(Default::default()), SessionHub::new());
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
        assert_eq!(say(&[request("s3", &[("ignore-error", "true")])]), "");
        assert!(say(&[request("s3", &[])]).contains("exporting a s3 cache"));
    }
}
