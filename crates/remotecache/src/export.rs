//! Writing a cache: the config, the layers, and the manifest that names them.

use crate::{
    CacheWriter, ExportOptions, Import, LayerBytes,
    collect::{ExportRecord, collect},
    format::{
        CONFIG, CacheConfig, CacheInput, CacheLayer, CacheRecord, CacheResult, CachedLayerMeta,
        ChainedResult, MAX_ENTRIES, time,
    },
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use shipway_buildcache::CacheIndex;
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest, ImageName, Index, Manifest, media};
use shipway_progress::Reporter;
use shipway_refs::{Compression, Fetch, ImmutableRef, LayerBlob};
use shipway_solver::CacheKey;
use shipway_storage::{ContentStore, DISTRIBUTION_SOURCE, UNCOMPRESSED};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

/// A cache ready to be written. Its layers are in the content store as long as it lives, but for
/// those that are known by descriptor only.
pub struct Export {
    pub(crate) config: CacheConfig,
    compression: Compression,
    /// Blobs of the config's layers, in their order.
    blobs: Vec<Descriptor>,
    /// Those that are not here.
    lazy: HashMap<Digest, Lazy>,
    _states: Vec<ImmutableRef>,
}

/// A layer that is fetched only if the place does not have it.
struct Lazy {
    /// The image that has it.
    origin: String,
    state: ImmutableRef,
}

/// The config in the making.
#[derive(Default)]
struct Table {
    config: CacheConfig,
    blobs: Vec<Descriptor>,
    known: HashMap<(Digest, i64), usize>,
}

impl Table {
    /// The layers of a result, each once.
    fn chain(&mut self, blobs: &[LayerBlob], times: &[SystemTime]) -> Vec<usize> {
        let mut parent = -1;
        let mut chain = Vec::with_capacity(blobs.len());
        for (i, blob) in blobs.iter().enumerate() {
            let descriptor = &blob.descriptor;
            let next = self.config.layers.len();
            let number = *self.known.entry((descriptor.digest, parent)).or_insert(next);
            if number == next {
                let note = CachedLayerMeta {
                    media_type: descriptor.media_type.clone(),
                    diff_id: Some(blob.diff_id),
                    size: descriptor.size as i64,
                    created_at: time(times.get(i).copied()),
                };
                self.config.layers.push(CacheLayer {
                    blob: descriptor.digest,
                    parent,
                    annotations: Some(note),
                });
                self.blobs.push(descriptor.clone());
            }
            chain.push(number);
            parent = number as i64;
        }
        chain
    }

    fn record(&mut self, entry: &ExportRecord, result: Option<(Vec<LayerBlob>, Vec<SystemTime>)>) {
        let (mut results, mut chains) = (Vec::new(), Vec::new());
        if let Some((blobs, times)) = result {
            let created_at = time(times.last().copied());
            match self.chain(&blobs, &times).last() {
                Some(top) => results.push(CacheResult { layer: *top, created_at }),
                None => chains.push(ChainedResult { layers: Vec::new(), created_at }),
            }
        }
        // BuildKit refuses a record with an input that may be nothing; such a record is one without
        // inputs.
        let inputs = if entry.inputs.iter().any(Vec::is_empty) { &[][..] } else { &entry.inputs };
        let link = |(link, selector): &(usize, Option<Digest>)| CacheInput {
            selector: *selector,
            link: *link,
        };
        self.config.records.push(CacheRecord {
            results,
            chains,
            digest: entry.key.0,
            inputs: inputs
                .iter()
                .map(|alternatives| alternatives.iter().map(link).collect())
                .collect(),
            alias_of: None,
            output: entry.output,
            description: entry.description.clone(),
        });
    }

    /// Adds a record for each further key, after those with inputs: each key is a record in this
    /// format. Those beyond the limit of readers are left out.
    fn aliases(&mut self, entries: &[ExportRecord]) {
        for (number, entry) in entries.iter().enumerate() {
            for key in
                entry.aliases.iter().take(MAX_ENTRIES.saturating_sub(self.config.records.len()))
            {
                let record = CacheRecord {
                    digest: key.0,
                    inputs: Vec::new(),
                    alias_of: Some(number),
                    ..self.config.records[number].clone()
                };
                self.config.records.push(record);
            }
        }
    }
}

impl Export {
    /// Collects what `roots` were made from and makes the blobs of all results but those under the
    /// keys `withheld`. Nothing is fetched for it; `None` if there is no layer at all.
    pub async fn prepare(
        index: &CacheIndex,
        imports: &[Arc<Import>],
        roots: &[ImmutableRef],
        withheld: &HashSet<CacheKey>,
        options: &ExportOptions,
        reporter: &Reporter,
    ) -> Result<Option<Self>> {
        let entries = collect(index, imports, roots, options.mode).await?;
        let mut table = Table::default();
        let (mut states, mut lazy) = (Vec::new(), HashMap::new());
        for entry in &entries {
            let kept_back = entry.aliases.iter().chain([&entry.key]).any(|k| withheld.contains(k));
            let result = match entry.state.as_ref().filter(|_| !kept_back) {
                Some(state) => match result(state, options, reporter).await {
                    Ok(result) => {
                        for blob in &result.0 {
                            let Some(origin) = blob.lazy.clone() else { continue };
                            lazy.entry(blob.descriptor.digest)
                                .or_insert_with(|| Lazy { origin, state: state.clone() });
                        }
                        Some(result)
                    }
                    // What cannot be had any more is left out; the rest is still worth having.
                    Err(fault) if fault.is_not_found() || state.is_lost(&fault) => None,
                    Err(fault) => {
                        return Err(
                            fault.context(format!("make the layers of {}", state.description()))
                        );
                    }
                },
                None => None,
            };
            table.record(entry, result);
            states.extend(entry.state.clone());
        }
        table.aliases(&entries);
        let Table { config, blobs, .. } = table;
        let compression = options.compression;
        Ok((!config.layers.is_empty()).then_some(Self {
            config,
            compression,
            blobs,
            lazy,
            _states: states,
        }))
    }

    /// The records alone, for the config of the image of `root` (row `rc.inline`).
    pub async fn inline(&self, root: &ImmutableRef) -> Result<Vec<u8>> {
        let blobs = root.blobs(self.compression, Fetch::Nothing, None).await?;
        let image: Vec<DiffId> = blobs.iter().map(|blob| blob.diff_id).collect();
        self.config.inline(&image)
    }

    /// Writes everything to `writer`; gives the manifest's descriptor, where there is one.
    pub async fn write(
        &self,
        writer: &dyn CacheWriter,
        content: &Arc<dyn ContentStore>,
        options: &ExportOptions,
        reporter: &Reporter,
    ) -> Result<Option<Descriptor>> {
        let mut blobs = self.blobs.clone();
        let mut seen = HashSet::new();
        blobs.retain(|b| seen.insert(b.digest));
        let present =
            writer.present(&blobs).await.context(|| "failed to check which layers are there")?;
        blobs.retain(|b| !present.contains(&b.digest));
        let work = blobs.into_iter().map(|blob| async move {
            let status = format!("writing layer {}", blob.digest);
            reporter.status(status.clone(), 0, 0, false);
            let bytes = self.source(&blob, content);
            let written = writer.layer(&blob, bytes, self.origin(&blob)).await;
            reporter.status(status, 0, 0, true);
            match written {
                // Its source has it no longer; the rest is still useful.
                Err(fault) if self.lazy.get(&blob.digest).is_some_and(|l| fault.is_not_found() || l.state.is_lost(&fault)) => {
                    tracing::info!(error = %fault, digest = %blob.digest, "failed to read a layer, exporting the cache without it");
                    Ok(Some(blob.digest))
                }
                other => other.context(|| "error writing layer blob").map(|()| None),
            }
        });
        let gone: Vec<Option<Digest>> =
            stream::iter(work).buffer_unordered(writer.parallelism()).try_collect().await?;
        let (config, left) = self.config.without(|blob| gone.contains(&Some(*blob)));
        let layers = left
            .iter()
            .filter_map(|number| self.blobs.get(*number))
            .map(|b| self.described(b, options.oci_types))
            .collect();
        let bytes = Bytes::from(config.to_json()?);
        let config = Descriptor::of(CONFIG, &bytes);
        let status = format!("writing config {}", config.digest);
        reporter.status(status.clone(), 0, 0, false);
        writer.config(&config, bytes).await.context(|| "error writing config blob")?;
        reporter.status(status, 0, 0, true);
        if !writer.has_manifest() {
            return Ok(None);
        }
        let (kind, bytes) = manifest(config, layers, options)?;
        let descriptor = Descriptor::of(kind, &bytes);
        let status = format!(
            "writing cache {} {}",
            if options.image_manifest { "image manifest" } else { "manifest list" },
            descriptor.digest
        );
        reporter.status(status.clone(), 0, 0, false);
        writer.manifest(&descriptor, bytes).await.context(|| "error writing manifest blob")?;
        reporter.status(status, 0, 0, true);
        Ok(Some(descriptor))
    }
}

impl Export {
    /// A layer as the manifest names it. BuildKit looks for the diffID there.
    fn described(&self, blob: &Descriptor, oci: bool) -> Descriptor {
        let mut layer =
            Descriptor::new(media::layer_type(&blob.media_type, oci), blob.digest, blob.size);
        let noted = self
            .config
            .layers
            .iter()
            .find(|l| l.blob == blob.digest)
            .and_then(|l| l.annotations.as_ref()?.diff_id);
        // How a table of contents is found in it, for one: a snapshotter serves the layer by that.
        let public = blob.annotations.iter().filter(|(key, _)| !is_private(key));
        layer.annotations.extend(public.map(|(k, v)| (k.clone(), v.clone())));
        layer
            .annotations
            .extend(noted.map(|diff_id| (UNCOMPRESSED.to_owned(), diff_id.to_string())));
        layer
    }

    /// The image that has the blob, if it is not here.
    fn origin(&self, blob: &Descriptor) -> Option<ImageName> {
        self.lazy.get(&blob.digest)?.origin.parse().ok()
    }

    /// How to read the blob.
    fn source(&self, blob: &Descriptor, content: &Arc<dyn ContentStore>) -> LayerBytes {
        let lazy = self.lazy.get(&blob.digest).map(|lazy| lazy.state.clone());
        LayerBytes::new(blob.digest, lazy, content.clone())
    }
}

/// Whether an annotation says something of this builder, or of where the layer came from.
fn is_private(annotation: &str) -> bool {
    annotation.starts_with(DISTRIBUTION_SOURCE) || annotation == "buildkit/createdat"
}

async fn result(
    state: &ImmutableRef,
    options: &ExportOptions,
    reporter: &Reporter,
) -> Result<(Vec<LayerBlob>, Vec<SystemTime>)> {
    let blobs = state.blobs(options.compression, Fetch::Nothing, Some(reporter)).await?;
    Ok((blobs, state.layer_times().await?))
}

/// The manifest of a cache: an image manifest, or an index that names blobs (row `rc.reg`).
fn manifest(
    config: Descriptor,
    layers: Vec<Descriptor>,
    options: &ExportOptions,
) -> Result<(&'static str, Bytes)> {
    let encode = |e: serde_json::Error| Fault::internal(format!("encode a cache manifest: {e}"));
    if options.image_manifest {
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: Default::default(),
        };
        return Ok((media::OCI_MANIFEST, serde_json::to_vec(&manifest).map_err(encode)?.into()));
    }
    let kind = if options.oci_types { media::OCI_INDEX } else { media::DOCKER_LIST };
    let manifests = layers.into_iter().chain([config]).collect();
    let index = Index {
        schema_version: 2,
        media_type: Some(kind.into()),
        manifests,
        annotations: Default::default(),
    };
    Ok((kind, serde_json::to_vec(&index).map_err(encode)?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExportMode;
    use shipway_oci::Digest;
    use shipway_refs::{RecordType, RefStore};
    use shipway_solver::{CacheStore as _, RecordMeta};
    use shipway_storage::fake::FakeStorage;

    async fn lab() -> (tempfile::TempDir, RefStore, CacheIndex) {
        let dir = tempfile::tempdir().expect("a directory");
        let storage = FakeStorage::new().expect("a store").storage();
        let refs = RefStore::open(storage, dir.path().join("refs")).await.expect("states");
        let index = CacheIndex::open(&dir.path().join("cache.db"), refs.clone()).expect("an index");
        (dir, refs, index)
    }

    #[tokio::test]
    async fn what_is_not_to_be_exported_is_a_record_without_a_result() {
        let (_dir, refs, index) = lab().await;
        let make = async |parent: Option<&ImmutableRef>,
                          name: &str,
                          inputs: Vec<(Vec<CacheKey>, Option<Digest>)>| {
            let state =
                refs.mutable(parent, name, RecordType::Regular, None).await.expect("a state");
            let state = state.commit(name).await.expect("committed");
            let key = CacheKey(Digest::of(name));
            index
                .save(&[key], &state, &RecordMeta { inputs, ..RecordMeta::default() })
                .await
                .expect("saved");
            (key, state)
        };
        let (below, first) = make(None, "first", Vec::new()).await;
        let (above, second) = make(Some(&first), "second", vec![(vec![below], None)]).await;
        let options = ExportOptions { mode: ExportMode::Max, ..ExportOptions::default() };
        let reporter = Reporter::new(Digest::of("export"), "export".into(), Vec::new(), None);
        for (withheld, want) in
            [(vec![], [true, true]), (vec![below], [false, true]), (vec![above], [true, false])]
        {
            let withheld = withheld.into_iter().collect();
            let export = Export::prepare(
                &index,
                &[],
                std::slice::from_ref(&second),
                &withheld,
                &options,
                &reporter,
            )
            .await
            .expect("prepared");
            let has = |key: &CacheKey| {
                let records = &export.as_ref().expect("layers").config.records;
                !records.iter().find(|r| r.digest == key.0).expect("a record").results.is_empty()
            };
            assert_eq!([has(&below), has(&above)], want);
        }
    }
}
