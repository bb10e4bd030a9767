//! Writes an image's manifests, configs and index into the content store, under a lease.

use crate::{
    config::{self, LayerHistory},
    lease::ExportLease,
    options::{ImageOptions, Level},
    port::{ExportAttestation, ExportInput, ExportPlatform, metadata_of},
    spdx, statements,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use shipway_attest::{PurlKind, Subject, digest_set, image_purl};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{
    ChainId, Descriptor, DiffId, Digest, ImageConfig, ImageName, Index, Manifest, Platform, gojson,
    media, timestamp,
};
use shipway_progress::Reporter;
use shipway_refs::{CompressionKind, Fetch, LayerBlob, REWRITTEN, RefStore, is_for_snapshotters};
use shipway_storage::{
    ContentStore, DISTRIBUTION_SOURCE, GC_REF_CONTENT, GC_REF_SNAPSHOT, LAYER_ORIGIN, Labels,
    UNCOMPRESSED,
};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

/// Type of a manifest of attestations.
const ATTESTATION: &str = "application/vnd.docker.attestation.manifest.v1+json";

/// A written image of one platform, or what is said of it.
#[derive(Clone, Debug)]
pub(crate) struct WrittenManifest {
    pub descriptor: Descriptor,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    /// What each layer unpacks to; empty for what is not an image.
    pub diff_ids: Vec<DiffId>,
    /// Layers that are not in the content store, and where they would be fetched from.
    pub lazy: BTreeMap<Digest, String>,
}

/// A written image: what a name may point at.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    /// Manifest or index.
    pub root: Descriptor,
    pub manifests: Vec<WrittenManifest>,
    /// What was in the content store already, and nothing of ours keeps there.
    found: Vec<Document>,
}

/// A config, manifest or index.
#[derive(Clone, Debug)]
struct Document {
    bytes: Bytes,
    labels: Labels,
}

impl Written {
    /// Every blob, children before parents: the order in which a registry wants them.
    pub fn blobs(&self) -> (Vec<Descriptor>, Vec<Descriptor>) {
        let (mut data, mut manifests): (Vec<Descriptor>, Vec<Descriptor>) =
            (Vec::new(), Vec::new());
        for m in &self.manifests {
            for blob in m.layers.iter().chain([&m.config]) {
                if !data.iter().any(|d| d.digest == blob.digest) {
                    data.push(blob.clone());
                }
            }
            manifests.push(m.descriptor.clone());
        }
        if !manifests.iter().any(|m| m.digest == self.root.digest) {
            manifests.push(self.root.clone());
        }
        (data, manifests)
    }

    /// The root as an archive names it: with the time of the image, `epoch` or now, in whole
    /// seconds.
    pub fn dated(&self, epoch: Option<SystemTime>) -> Descriptor {
        let mut root = self.root.clone();
        let created = || timestamp::format_whole(epoch.unwrap_or_else(SystemTime::now));
        root.annotations.entry("org.opencontainers.image.created".into()).or_insert_with(created);
        root
    }

    /// Keeps everything in the content store under `lease`. An image's name does, too: then there
    /// is no need.
    pub async fn protect(
        &self,
        content: &Arc<dyn ContentStore>,
        lease: &ExportLease,
    ) -> Result<()> {
        if self.found.is_empty() {
            return Ok(());
        }
        let lease = lease.ensure().await?;
        let puts = self.found.iter().map(|d| content.put(lease, d.bytes.clone(), &d.labels));
        futures::future::try_join_all(puts).await.context(|| "keep an image that exists").map(drop)
    }
}

pub(crate) struct Writer<'a> {
    pub refs: &'a RefStore,
    pub lease: &'a ExportLease,
    pub options: &'a ImageOptions,
    pub reporter: &'a Reporter,
    /// Which layers are fetched that are known by descriptor only.
    pub fetch: Fetch,
}

fn json(value: &impl serde::Serialize) -> Result<Bytes> {
    gojson::to_string_pretty(value)
        .map(Bytes::from)
        .map_err(|e| Fault::internal(format!("encode a manifest: {e}")))
}

impl Writer<'_> {
    /// Writes everything for `input` and keeps it under the lease.
    pub async fn write(&self, input: &ExportInput) -> Result<Written> {
        let written = self.draft(input).await?;
        written.protect(&self.refs.storage().content, self.lease).await?;
        Ok(written)
    }

    /// Writes what is not there yet for `input`; see [`Written::protect`] for the rest.
    pub async fn draft(&self, input: &ExportInput) -> Result<Written> {
        let inline = self.options.inline.unwrap_or(false);
        let attested = |id: &String| {
            input.attestations.get(id).into_iter().flatten().any(|a| inline || !a.inline_only())
        };
        let needs_index = input.is_map || input.platforms.iter().any(|p| attested(&p.id));
        self.options.check_annotations(input, needs_index)?;
        if needs_index && !self.options.oci_types && !input.attestations.is_empty() {
            return Err(Fault::invalid("cannot export attestations with \"oci-mediatypes=false\""));
        }
        self.reporter.status("exporting layers", 0, 0, false);
        let blobs = input
            .platforms
            .iter()
            .map(|p| p.state.blobs(self.options.compression, self.fetch, Some(self.reporter)));
        let blobs = futures::future::try_join_all(blobs).await.context(|| "exporting layers")?;
        self.reporter.status("exporting layers", 0, 0, true);
        let mut manifests = Vec::new();
        let mut found = Vec::new();
        if input.platforms.is_empty() {
            let empty = ExportPlatform {
                id: String::new(),
                platform: shipway_oci::Platform::host(),
                state: self.refs.scratch()?,
            };
            manifests.push(self.manifest(input, &empty, Vec::new(), &mut found).await?);
        }
        for (platform, blobs) in input.platforms.iter().zip(blobs) {
            manifests.push(self.manifest(input, platform, blobs, &mut found).await?);
        }
        if !needs_index {
            let mut root = manifests[0].descriptor.clone();
            root.platform = input.platforms.first().map(|p| p.platform.clone());
            return Ok(Written { root, manifests, found });
        }
        let mut entries = Vec::new();
        for (p, m) in input.platforms.iter().zip(&mut manifests) {
            m.descriptor.platform = Some(p.platform.clone());
            entries.push(m.descriptor.clone());
        }
        let subjects = entries.clone();
        for (i, p) in input.platforms.iter().enumerate() {
            if let Some(attestations) = input.attestations.get(&p.id).filter(|a| !a.is_empty()) {
                let written = self
                    .attest(
                        input,
                        attestations,
                        (&subjects[i], p, &manifests[i].layers),
                        &mut found,
                    )
                    .await?;
                entries.push(written.descriptor.clone());
                manifests.push(written);
            }
        }
        let media_type = if self.options.oci_types { media::OCI_INDEX } else { media::DOCKER_LIST };
        let index = Index {
            schema_version: 2,
            media_type: Some(media_type.into()),
            manifests: entries,
            annotations: self.options.annotations(Level::Index, None),
        };
        let labels = children(index.manifests.iter().map(|d| d.digest));
        let bytes = json(&index)?;
        let status = format!("exporting manifest list {}", Digest::of(&bytes));
        let mut root = Descriptor::of(media_type, &bytes);
        self.put(vec![(status, Document { bytes, labels })], &mut found).await?;
        root.annotations = self.options.annotations(Level::IndexDescriptor, None);
        Ok(Written { root, manifests, found })
    }

    async fn manifest(
        &self,
        input: &ExportInput,
        p: &ExportPlatform,
        blobs: Vec<LayerBlob>,
        found: &mut Vec<Document>,
    ) -> Result<WrittenManifest> {
        // The layers' blobs are kept by the states that `input` holds.
        let metadata = |key: &str| metadata_of(&input.metadata, key, &p.id);
        let times = p.state.layer_times().await?;
        let note = |(b, created): (&LayerBlob, SystemTime)| LayerHistory {
            diff_id: b.diff_id,
            created_by: p.state.description().to_owned(),
            created,
        };
        let known = times.into_iter().chain(std::iter::repeat_with(SystemTime::now));
        let notes: Vec<LayerHistory> = blobs.iter().zip(known).map(note).collect();
        let (given, base) =
            (metadata("containerimage.config"), metadata("containerimage.base.config"));
        let epoch = self.options.epoch.of(&input.metadata, &p.id)?;
        let bytes = config::complete(
            given,
            base,
            &p.platform,
            &notes,
            epoch,
            metadata("containerimage.inlinecache"),
        )?;
        let mut config_labels = Labels::new();
        if let Some(chain) = ChainId::of(notes.iter().map(|n: &LayerHistory| n.diff_id)) {
            let snapshots = &self.refs.storage().snapshots;
            // The label keeps the snapshot chain alive with the image; where there is no such
            // snapshot it does nothing.
            config_labels
                .insert(format!("{GC_REF_SNAPSHOT}.{}", snapshots.name()), chain.to_string());
        }
        let oci = self.options.oci_types;
        let config_type = if oci { media::OCI_CONFIG } else { media::DOCKER_CONFIG };
        let config_bytes = Bytes::from(bytes);
        let config_status = format!("exporting config {}", Digest::of(&config_bytes));
        let config = Descriptor::of(config_type, &config_bytes);
        let mut layers: Vec<Descriptor> =
            blobs.iter().map(|b| layer(&b.descriptor, oci, self.options.foreign)).collect();
        if let Some(epoch) = epoch.filter(|_| oci && self.options.rewrite) {
            // Also on layers that had no later time. The base image's were not looked at.
            let base = base
                .and_then(|b| serde_json::from_slice::<ImageConfig>(b).ok())
                .unwrap_or_default()
                .rootfs
                .diff_ids;
            let common =
                blobs.iter().zip(&base).take_while(|(blob, base)| blob.diff_id == **base).count();
            let seconds = epoch
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs()
                .to_string();
            for layer in layers
                .iter_mut()
                .skip(common)
                .filter(|l| CompressionKind::of_media_type(&l.media_type).is_some())
            {
                layer.annotations.insert(REWRITTEN.to_owned(), seconds.clone());
            }
        }
        let lazy: BTreeMap<Digest, String> =
            blobs.iter().filter_map(|b| Some((b.descriptor.digest, b.lazy.clone()?))).collect();
        let media_type = if oci { media::OCI_MANIFEST } else { media::DOCKER_MANIFEST };
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type.into()),
            artifact_type: None,
            config: config.clone(),
            layers: layers.clone(),
            subject: None,
            annotations: self.options.annotations(Level::Manifest, Some(&p.platform)),
        };
        let mut labels =
            children([config.digest].into_iter().chain(layers.iter().map(|l| l.digest)));
        // Builds on top of the image find them there.
        labels.extend(
            lazy.iter().map(|(layer, origin)| (format!("{LAYER_ORIGIN}.{layer}"), origin.clone())),
        );
        let bytes = json(&manifest)?;
        let status = format!("exporting manifest {}", Digest::of(&bytes));
        let mut descriptor = Descriptor::of(media_type, &bytes);
        descriptor.annotations =
            self.options.annotations(Level::ManifestDescriptor, Some(&p.platform));
        let config_document = Document { bytes: config_bytes, labels: config_labels };
        if self
            .put(
                vec![(config_status, config_document), (status, Document { bytes, labels })],
                found,
            )
            .await?
        {
            mark_uncompressed(self.refs.storage().content.as_ref(), &blobs).await;
        }
        let diff_ids = blobs.iter().map(|b| b.diff_id).collect();
        Ok(WrittenManifest { descriptor, config, layers, diff_ids, lazy })
    }

    /// Writes what is said of the manifest `subject`, with `image_layers`, that is written of a
    /// platform (rows `at.store`, `at.layer`, `at.artifact`).
    async fn attest(
        &self,
        input: &ExportInput,
        attestations: &[ExportAttestation],
        (subject, of, image_layers): (&Descriptor, &ExportPlatform, &[Descriptor]),
        found: &mut Vec<Document>,
    ) -> Result<WrittenManifest> {
        let exported = self.options.names(&input.metadata).into_iter().map(|name| {
            let name: ImageName =
                name.parse().map_err(|e| Fault::invalid(format!("failed to parse {name}: {e}")))?;
            Ok(Subject {
                name: image_purl(PurlKind::Docker, &name, Some(&of.platform)),
                digest: digest_set(subject.digest),
            })
        });
        let exported = exported.collect::<Result<Vec<_>>>()?;
        let mut attestations = statements::read(attestations.to_vec()).await?;
        for attestation in &mut attestations {
            spdx::name_layers(attestation, &of.state, image_layers).await?;
        }
        let (mut layers, mut documents) = (Vec::new(), Vec::new());
        for (_, statement) in statements::statements(&attestations, &exported) {
            let bytes = gojson::to_string(&statement)
                .map_err(|e| Fault::internal(format!("encode an attestation: {e}")))?
                .into_bytes();
            let mut layer = Descriptor::of(media::IN_TOTO, &bytes);
            layer.annotations.insert("in-toto.io/predicate-type".into(), statement.predicate_type);
            layers.push(layer);
            documents.push((
                "exporting attestation".to_owned(),
                Document { bytes: bytes.into(), labels: Labels::new() },
            ));
        }
        let (config_type, config_bytes) = match self.options.artifact {
            true => (media::EMPTY_JSON, Bytes::from_static(b"{}")),
            false => {
                let mut config = ImageConfig::empty(&Platform::new("unknown", "unknown", ""));
                config.rootfs.diff_ids = layers.iter().map(|l| DiffId(l.digest)).collect();
                let text = gojson::to_string(&config)
                    .map_err(|e| Fault::internal(format!("encode a config: {e}")))?;
                (media::OCI_CONFIG, Bytes::from(text))
            }
        };
        let mut config = Descriptor::of(config_type, &config_bytes);
        if self.options.artifact {
            config.data = Some(BASE64_STANDARD.encode(&config_bytes));
        }
        let plain = Descriptor::new(subject.media_type.clone(), subject.digest, subject.size);
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: self.options.artifact.then(|| ATTESTATION.into()),
            config: config.clone(),
            layers: layers.clone(),
            subject: self.options.artifact.then_some(plain),
            annotations: BTreeMap::new(),
        };
        let labels = children([config.digest].into_iter().chain(layers.iter().map(|l| l.digest)));
        let bytes = json(&manifest)?;
        let mut descriptor = Descriptor::of(media::OCI_MANIFEST, &bytes);
        descriptor.annotations = BTreeMap::from([
            ("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned()),
            ("vnd.docker.reference.digest".to_owned(), subject.digest.to_string()),
        ]);
        descriptor.platform = Some(Platform::new("unknown", "unknown", ""));
        let status = format!("exporting attestation manifest {}", descriptor.digest);
        documents.push((
            "exporting attestation".to_owned(),
            Document { bytes: config_bytes, labels: Labels::new() },
        ));
        documents.push((status, Document { bytes, labels }));
        self.put(documents, found).await?;
        let (diff_ids, lazy) = (Vec::new(), BTreeMap::new());
        Ok(WrittenManifest { descriptor, config, layers, diff_ids, lazy })
    }

    /// Stores the documents, all at once; says whether there was one to store. Those that are there
    /// go to `found`.
    async fn put(
        &self,
        documents: Vec<(String, Document)>,
        found: &mut Vec<Document>,
    ) -> Result<bool> {
        let content = &self.refs.storage().content;
        let is_there = async |document: &Document| {
            let info = content.info(Digest::of(&document.bytes)).await;
            info.is_ok_and(|info| {
                document.labels.iter().all(|(k, v)| info.labels.get(k) == Some(v))
            })
        };
        let there = futures::future::join_all(documents.iter().map(|(_, d)| is_there(d))).await;
        let one = async |(status, document): &(String, Document), there: bool| {
            self.reporter.status(status, 0, 0, false);
            if !there {
                let lease = self.lease.ensure().await?;
                content
                    .put(lease, document.bytes.clone(), &document.labels)
                    .await
                    .context(|| status.clone())?;
            }
            self.reporter.status(status, 0, 0, true);
            Ok::<_, Fault>(())
        };
        futures::future::try_join_all(
            documents.iter().zip(&there).map(|(d, there)| one(d, *there)),
        )
        .await?;
        let any = there.contains(&false);
        found.extend(
            documents.into_iter().zip(there).filter(|(_, there)| *there).map(|((_, d), _)| d),
        );
        Ok(any)
    }
}

/// Others read a layer's diffID from this label; pulled blobs may lack it. Failing to set it fails
/// nothing.
async fn mark_uncompressed(content: &dyn shipway_storage::ContentStore, blobs: &[LayerBlob]) {
    let mark = async |blob: &LayerBlob| {
        if let Ok(info) = content.info(blob.descriptor.digest).await
            && !info.labels.contains_key(UNCOMPRESSED)
        {
            let label = Labels::from([(UNCOMPRESSED.to_owned(), blob.diff_id.to_string())]);
            if let Err(fault) = content.update_labels(blob.descriptor.digest, &label).await {
                tracing::debug!(error = %fault, digest = %blob.descriptor.digest, "failed to label a layer with its diff ID");
            }
        }
    };
    futures::future::join_all(blobs.iter().map(mark)).await;
}

/// A layer as the manifest names it. Layers that registries do not keep become ordinary ones,
/// unless they have addresses of their own and those are wanted (row `ex.c.nondist`).
fn layer(descriptor: &Descriptor, oci: bool, prefer_foreign: bool) -> Descriptor {
    let foreign = prefer_foreign && !descriptor.urls.is_empty();
    let media_type = media::layer_type(media::foreign_type(&descriptor.media_type, foreign), oci);
    let mut out = Descriptor::new(media_type, descriptor.digest, descriptor.size);
    if foreign {
        out.urls.clone_from(&descriptor.urls);
    }
    // Docker's types have no annotations, but without these the layer could not be lazy any more.
    let public = descriptor
        .annotations
        .iter()
        .filter(|(k, _)| if oci { !is_internal(k) } else { is_for_snapshotters(k) });
    out.annotations = public.map(|(k, v)| (k.clone(), v.clone())).collect();
    out
}

/// Whether an annotation on a layer is for the builder and containerd only. Others of containerd's
/// are not, such as where a lazy snapshotter finds a layer's table of contents.
pub fn is_internal(annotation: &str) -> bool {
    let source =
        annotation.strip_prefix(DISTRIBUTION_SOURCE).is_some_and(|rest| rest.starts_with('.'));
    source || annotation == UNCOMPRESSED || annotation == "buildkit/createdat"
}

/// Labels that keep children with their parent.
fn children(digests: impl Iterator<Item = Digest>) -> Labels {
    digests
        .enumerate()
        .map(|(i, d)| (format!("{GC_REF_CONTENT}.{i}"), d.to_string()))
        .collect::<BTreeMap<_, _>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_of_layers_are_kept_but_for_our_own() {
        let mut given = Descriptor::of(media::OCI_LAYER_GZIP, b"layer");
        let toc = "containerd.io/snapshot/stargz/toc.digest";
        for key in [
            toc,
            "k",
            UNCOMPRESSED,
            "buildkit/createdat",
            "containerd.io/distribution.source.docker.io",
        ] {
            given.annotations.insert(key.to_owned(), "v".to_owned());
        }
        assert_eq!(
            layer(&given, true, false).annotations.into_keys().collect::<Vec<_>>(),
            [toc, "k"]
        );
        assert_eq!(layer(&given, false, false).annotations.into_keys().collect::<Vec<_>>(), [toc]);
    }

    #[test]
    fn layers_that_registries_do_not_keep_are_kept_apart_on_demand_only() {
        let mut given = Descriptor::of(media::DOCKER_FOREIGN_GZIP, b"layer");
        let types = |given: &Descriptor| {
            [(true, false), (true, true), (false, true)]
                .map(|(oci, foreign)| layer(given, oci, foreign))
        };
        assert_eq!(
            types(&given).map(|d| d.media_type),
            [media::OCI_LAYER_GZIP, media::OCI_LAYER_GZIP, media::DOCKER_LAYER_GZIP]
        );
        given.urls = vec!["https://example.com/layer".to_owned()];
        assert_eq!(
            types(&given).map(|d| d.media_type),
            [media::OCI_LAYER_GZIP, media::OCI_FOREIGN_GZIP, media::DOCKER_FOREIGN_GZIP]
        );
        assert_eq!(types(&given).map(|d| d.urls.len()), [0, 1, 1]);
        // What was an ordinary layer on its way here is one that a registry need not keep if it has
        // an address.
        given.media_type = media::OCI_LAYER.to_owned();
        assert_eq!(
            types(&given).map(|d| d.media_type),
            [media::OCI_LAYER, media::OCI_FOREIGN, media::DOCKER_FOREIGN]
        );
    }
}
