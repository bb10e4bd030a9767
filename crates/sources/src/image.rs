//! `docker-image://` and `oci-layout://`: resolved here, fetched when read (rows `src.image*`,
//! `src.oci*`).

mod attested;
mod attrs;
mod resolve;
mod select;

use crate::{
    Pin, SourceContext, SourceSpec,
    flight::Flights,
    keys,
    peers::Peers,
    remote::{ClientRemote, RegistryRemote, Remote, RemoteLayers},
};
pub(crate) use attrs::ImageSpec;
pub use attrs::LocalImages;
pub(crate) use attrs::Mode;
use attrs::Place;
pub(crate) use resolve::Told;
pub use resolve::document_lease;
use resolve::{Asked, Resolved};
use serde::Serialize;
use shipway_fault::{Code, Fault, Result};
use shipway_llb::{ImageFacts, SourceFacts};
use shipway_oci::{ChainId, Descriptor, DiffId, Digest, Platform};
use shipway_refs::{ImmutableRef, LayerSource, LazyLayer, RefStore};
use shipway_registry::{Mode as Access, Registry};
use std::{sync::Arc, time::SystemTime};

/// Images by name.
pub(crate) struct Images {
    pub refs: RefStore,
    pub registry: Registry,
    pub flights: Flights,
    pub prefer: LocalImages,
}

/// What an image's first key is made of (row `src.image.keys`).
#[derive(Serialize)]
struct ManifestKey<'a> {
    digest: Digest,
    platform: &'a Platform,
    limit: Option<usize>,
}

/// A reference with the kind of place it is for.
#[derive(Clone, Copy)]
pub(crate) enum At<'a> {
    Registry(&'a str),
    Layout(&'a str),
}

impl At<'_> {
    pub(crate) fn parse(self, spec: &SourceSpec) -> Result<ImageSpec> {
        match self {
            Self::Registry(reference) => ImageSpec::parse(spec, reference),
            Self::Layout(reference) => ImageSpec::layout(spec, reference),
        }
    }
}

impl Images {
    pub(crate) async fn pin(
        &self,
        spec: &SourceSpec,
        at: At<'_>,
        cx: &SourceContext,
    ) -> Result<Pin> {
        let image = at.parse(spec)?;
        let found = self.find(&image, &spec.platform, cx).await?;
        let (diffs, _) = limited(&image, &found)?;
        let mut keys = vec![keys::digest(
            "image",
            &ManifestKey {
                digest: found.main.digest,
                platform: &spec.platform,
                limit: image.layer_limit,
            },
        )];
        // The second key is the content itself: the same layers under another name, or after a new
        // push, are the same state.
        keys.extend(ChainId::of(diffs.iter().copied()).map(|c| c.0));
        Ok(Pin {
            keys,
            ephemeral: false,
            digest: Some(found.main.digest.to_string()),
            stored: found.stored,
        })
    }

    pub(crate) async fn fetch(
        &self,
        spec: &SourceSpec,
        at: At<'_>,
        pin: &Pin,
        cx: &SourceContext,
    ) -> Result<ImmutableRef> {
        let mut image = at.parse(spec)?;
        // What was pinned is what is used, whatever the tag says by now.
        if let Some(digest) = pin.digest.as_ref().and_then(|d| d.parse().ok()) {
            image.name = image.name.with_digest(digest);
            image.mode = attrs::Mode::Local;
        }
        let found = self.find(&image, &spec.platform, cx).await?;
        let (diffs, blobs) = limited(&image, &found)?;
        if diffs.is_empty() {
            return self.refs.scratch();
        }
        let source = self.layers_of(self.remote(&image, &cx.sessions).await?);
        let mut layers = Vec::with_capacity(diffs.len());
        for (diff_id, descriptor) in diffs.iter().zip(blobs) {
            let here = self.refs.storage().content.has(descriptor).await?;
            let source = (!here).then(|| source.clone());
            layers.push(LazyLayer {
                diff_id: *diff_id,
                descriptor: descriptor.clone(),
                source,
                created: None,
            });
        }
        self.refs.image(layers, format!("pulled from {}", image.name), image.record_type).await
    }

    /// What the name leads to; with `attestations`, also what is said of it, with the statements of
    /// these types.
    pub(crate) async fn resolve(
        &self,
        spec: &SourceSpec,
        at: At<'_>,
        attestations: Option<&[String]>,
        cx: &SourceContext,
    ) -> Result<SourceFacts> {
        let image = at.parse(spec)?;
        let found = self.find(&image, &spec.platform, cx).await?;
        let attestations = match attestations {
            Some(predicates) => {
                let remote = self.remote(&image, &cx.sessions).await?;
                let documents =
                    resolve::Documents { storage: self.refs.storage(), remote: Some(&*remote) };
                attested::chain(&documents, &found.main, &spec.platform, predicates)
                    .await?
                    .map(Box::new)
            }
            None => None,
        };
        let resolved = ImageFacts {
            name: image.name.to_string(),
            digest: found.main.digest,
            config: found.config,
            attestations,
        };
        Ok(SourceFacts { image: Some(resolved), ..Default::default() })
    }

    async fn find(
        &self,
        image: &ImageSpec,
        platform: &Platform,
        cx: &SourceContext,
    ) -> Result<Resolved> {
        let status = format!("resolve {}", image.name);
        cx.reporter.status(status.clone(), 0, 0, false);
        // Several stages often start from one image: one asks the registry, the others find its
        // manifest stored.
        let turn = self.flights.turn(&image.name.to_string()).await;
        let remote = self.remote(image, &cx.sessions).await?;
        let asked =
            Asked { storage: self.refs.storage(), remote: &*remote, prefer: self.prefer, cx };
        let found = asked.resolve(image, platform).await;
        // The registry's errors name the image themselves.
        let name = image.name.to_string();
        let found =
            found.map_err(|e| if e.to_string().contains(&name) { e } else { e.context(name) });
        drop(turn);
        cx.reporter.status(status, 0, 0, true);
        let found = found?;
        if let Some(stored) = found.stored {
            cx.reporter.status(resolve::told(stored, SystemTime::now()), 0, 0, true);
        }
        match image.checksum {
            Some(wanted) if wanted != found.main.digest => Err(Fault::new(
                Code::FailedPrecondition,
                format!(
                    "image digest {} for {} does not match expected checksum {wanted}",
                    found.main.digest, image.name
                ),
            )),
            _ => Ok(found),
        }
    }

    async fn remote(&self, image: &ImageSpec, peers: &dyn Peers) -> Result<Arc<dyn Remote>> {
        Ok(match &image.place {
            Place::Registry => Arc::new(RegistryRemote(self.registry.repository(
                &image.name,
                peers.credentials(),
                Access::Pull,
            ))),
            Place::Layout { session, store } => {
                let session = Some(session.as_str()).filter(|s| !s.is_empty());
                let store = peers.client_store(session, &format!("oci:{store}")).await?;
                Arc::new(ClientRemote { store, name: image.name.to_string() })
            }
        })
    }

    /// The layers of `remote`, each fetched once however many want it.
    pub(crate) fn layers_of(&self, remote: Arc<dyn Remote>) -> Arc<dyn LayerSource> {
        Arc::new(RemoteLayers::new(remote, self.flights.clone()))
    }
}

/// The layers to use.
fn limited<'a>(image: &ImageSpec, found: &'a Resolved) -> Result<(&'a [DiffId], &'a [Descriptor])> {
    let (diffs, blobs) = (&found.parsed.rootfs.diff_ids[..], &found.manifest.layers[..]);
    match image.layer_limit {
        None => Ok((diffs, blobs)),
        Some(limit) if limit <= blobs.len() => Ok((&diffs[..limit], &blobs[..limit])),
        Some(limit) => Err(Fault::invalid(format!(
            "layer limit {limit} is greater than the number of layers in the image {} ({})",
            image.name,
            blobs.len()
        ))),
    }
}
