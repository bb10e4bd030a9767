//! Reading a cache: its manifest, or the manifests of an image whose configs hold caches.

use crate::{
    CacheAt, CacheSource,
    format::{
        CONFIG, CacheConfig, CacheInput, CacheLayer, CacheRecord, INLINE_FIELD, MAX_DEPTH,
        MAX_ENTRIES,
    },
};
use async_trait::async_trait;
use base64::Engine as _;
use bytes::Bytes;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use shipway_buildcache::CacheIndex;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest, ImageConfig, Index, Manifest, media, timestamp};
use shipway_refs::{ImmutableRef, LayerSource, LazyLayer, RecordType, RefStore};
use shipway_solver::{CacheKey, ImportedCache};
use shipway_sources::{Remote, Sources};
use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::SystemTime,
};

/// Annotation on an index entry that is not an image but describes one.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// Images of an index that are looked into.
const MAX_IMAGES: usize = 64;
/// Layers of all results together, each counted with every result that has it.
const MAX_PLACES: usize = 2_000_000;

/// A layer that an imported cache can give.
struct ImportedLayer {
    diff_id: DiffId,
    descriptor: Descriptor,
    created: Option<SystemTime>,
}

/// A config, and what is known of its layers.
struct Found {
    config: CacheConfig,
    /// The config's layers; `None` where the cache does not say enough to get one.
    layers: Vec<Option<ImportedLayer>>,
}

/// A record of an imported cache: the number of its config, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordNo(u32, u32);

/// What was read of a cache. Records share their layers: a small config may name one stack of
/// layers in very many records.
#[derive(Default)]
pub(crate) struct Contents {
    found: Vec<Found>,
    /// Every key of every record, and whether the record has a result.
    keys: HashMap<CacheKey, (RecordNo, bool)>,
    /// How many records there are, and how many layers all results have together.
    records: usize,
    places: usize,
    source: Option<Arc<dyn LayerSource>>,
}

/// A cache that one build imports. It is read beside the build, and only that build looks into it.
pub struct Import {
    refs: RefStore,
    contents: Arc<OnceLock<Contents>>,
    reading: Shared<BoxFuture<'static, ()>>,
}

impl Import {
    /// The cache that `reading` gives; `None` stands for one that cannot be read. Nothing happens
    /// before it is waited for.
    pub fn new(
        index: &CacheIndex,
        reading: impl Future<Output = Option<ReadCache>> + Send + 'static,
    ) -> Arc<Self> {
        let contents = Arc::<OnceLock<Contents>>::default();
        let read = contents.clone();
        let reading = async move {
            if let Some(ReadCache(contents)) = reading.await {
                let _ = read.set(contents);
            }
        };
        Arc::new(Self { refs: index.refs().clone(), contents, reading: reading.boxed().shared() })
    }

    fn contents(&self) -> &Contents {
        static NOTHING: OnceLock<Contents> = OnceLock::new();
        self.contents.get().unwrap_or_else(|| NOTHING.get_or_init(Contents::default))
    }

    /// The record with this key.
    pub(crate) fn find(&self, key: &CacheKey) -> Option<RecordNo> {
        self.contents().keys.get(key).map(|(record, _)| *record)
    }

    pub(crate) fn record(&self, no: RecordNo) -> Option<&CacheRecord> {
        self.contents().found.get(no.0 as usize)?.config.records.get(no.1 as usize)
    }

    /// For each input of a record, the keys that it may have, and the selector.
    pub(crate) fn inputs(&self, no: RecordNo) -> Vec<(Vec<CacheKey>, Option<Digest>)> {
        let Some(record) = self.record(no) else { return Vec::new() };
        let key = |input: &CacheInput| {
            self.record(RecordNo(no.0, u32::try_from(input.link).ok()?)).map(|r| CacheKey(r.digest))
        };
        let keys = |input: &Vec<CacheInput>| {
            (input.iter().filter_map(key).collect(), input.first().and_then(|i| i.selector))
        };
        record.inputs.iter().map(keys).collect()
    }

    /// Every key of the cache with the primary that it leads to.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (CacheKey, CacheKey)> {
        self.contents()
            .keys
            .iter()
            .filter_map(|(key, (no, _))| Some((*key, CacheKey(self.record(*no)?.digest))))
    }

    /// The diffIDs of a record's result; `None` if it has none.
    pub(crate) fn diff_ids(&self, no: RecordNo) -> Option<Vec<DiffId>> {
        let layers = self.contents().found.get(no.0 as usize)?.result(self.record(no)?)?;
        Some(layers.into_iter().map(|l| l.diff_id).collect())
    }

    /// The state of a record's result, of lazy layers.
    pub(crate) async fn state(&self, no: RecordNo) -> Result<Option<ImmutableRef>> {
        let contents = self.contents();
        let (Some(record), Some(source)) = (self.record(no), &contents.source) else {
            return Ok(None);
        };
        let Some(layers) = contents.found.get(no.0 as usize).and_then(|found| found.result(record))
        else {
            return Ok(None);
        };
        let lazy = |l: &ImportedLayer| LazyLayer {
            diff_id: l.diff_id,
            descriptor: l.descriptor.clone(),
            source: Some(source.clone()),
            created: l.created,
        };
        let layers = layers.into_iter().map(lazy).collect();
        // It is the history of an image, too, which must not depend on where the layer came from.
        let description = if record.description.is_empty() {
            format!("imported from {}", source.describe())
        } else {
            record.description.clone()
        };
        self.refs.image(layers, description, RecordType::Regular).await.map(Some)
    }
}

#[async_trait]
impl ImportedCache<ImmutableRef> for Import {
    async fn ready(&self) {
        self.reading.clone().await;
    }

    fn primary(&self, key: &CacheKey) -> Option<CacheKey> {
        self.find(key).and_then(|no| self.record(no)).map(|r| CacheKey(r.digest))
    }

    fn has_result(&self, key: &CacheKey) -> bool {
        self.contents().keys.get(key).is_some_and(|(_, result)| *result)
    }

    async fn load(&self, key: &CacheKey) -> Result<Option<ImmutableRef>> {
        match self.find(key) {
            Some(no) => self.state(no).await,
            None => Ok(None),
        }
    }
}

/// What a cache holds, as it was read.
pub struct ReadCache(pub(crate) Contents);

/// Reads the cache at `source`; one without records is an image without a cache.
pub async fn read(sources: &Sources, source: &CacheSource) -> Result<ReadCache> {
    let remote = &source.remote;
    let found = match &source.at {
        CacheAt::Reference(reference) => {
            documents(&**remote, &remote.resolve(reference).await?).await?
        }
        CacheAt::Configs(configs) => {
            let read = |bytes: &Bytes| CacheConfig::read(bytes).map(Found::of_config);
            configs.iter().map(read).collect::<Result<_>>()?
        }
    };
    let mut contents =
        Contents { source: Some(sources.layers_of(remote.clone())), ..Contents::default() };
    for found in found {
        contents.add(found)?;
    }
    Ok(ReadCache(contents))
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Fault::invalid(format!("a cache's {what} cannot be read: {e}")))
}

async fn documents(remote: &dyn Remote, root: &Descriptor) -> Result<Vec<Found>> {
    let bytes = remote.manifest(root).await?;
    if !media::is_index(&root.media_type) {
        return Ok(of_manifest(remote, parse(&bytes, "manifest")?).await?.into_iter().collect());
    }
    let list: Index = parse(&bytes, "index")?;
    if let Some(config) = list.manifests.iter().find(|m| m.media_type == CONFIG) {
        let config = CacheConfig::read(&remote.small_blob(config).await?)?;
        return Ok(vec![Found::new(config, &list.manifests, &HashMap::new())]);
    }
    let mut all = Vec::new();
    for image in list
        .manifests
        .iter()
        .filter(|m| {
            media::is_manifest(&m.media_type) && !m.annotations.contains_key(REFERENCE_TYPE)
        })
        .take(MAX_IMAGES)
    {
        all.extend(of_manifest(remote, parse(&remote.manifest(image).await?, "manifest")?).await?);
    }
    Ok(all)
}

async fn of_manifest(remote: &dyn Remote, manifest: Manifest) -> Result<Option<Found>> {
    let bytes = remote.small_blob(&manifest.config).await?;
    if manifest.config.media_type == CONFIG {
        return Ok(Some(Found::new(CacheConfig::read(&bytes)?, &manifest.layers, &HashMap::new())));
    }
    of_image(&bytes, &manifest.layers)
}

/// The cache inside an image's config, if there is one.
fn of_image(config: &[u8], layers: &[Descriptor]) -> Result<Option<Found>> {
    let fields: serde_json::Value = parse(config, "image config")?;
    let Some(inline) = fields.get(INLINE_FIELD).and_then(|v| v.as_str()) else { return Ok(None) };
    let inline = base64::engine::general_purpose::STANDARD.decode(inline);
    let inline = inline
        .map_err(|e| Fault::invalid(format!("the cache in an image's config is damaged: {e}")))?;
    let image: ImageConfig = parse(config, "image config")?;
    if image.rootfs.diff_ids.len() != layers.len() {
        return Err(Fault::invalid(
            "an image with a cache has another number of layers in its manifest than in its config",
        ));
    }
    let mut times = image.history.iter().filter(|h| !h.empty_layer).map(|h| h.created.as_deref());
    let times: Vec<Option<&str>> = layers.iter().map(|_| times.next().flatten()).collect();
    let diffs: HashMap<Digest, (DiffId, Option<&str>)> = layers
        .iter()
        .zip(image.rootfs.diff_ids)
        .zip(times)
        .map(|((l, diff_id), time)| (l.digest, (diff_id, time)))
        .collect();
    let blobs: Vec<Digest> = layers.iter().map(|l| l.digest).collect();
    Ok(Some(Found::new(CacheConfig::read_inline(&inline, &blobs)?, layers, &diffs)))
}

impl Found {
    /// `config` alone, which says what its layers are.
    fn of_config(config: CacheConfig) -> Self {
        let blob = |layer: &CacheLayer| {
            let note = layer.annotations.as_ref()?;
            let size = u64::try_from(note.size).ok()?;
            Some(Descriptor::new(note.media_type.as_str(), layer.blob, size))
        };
        let blobs: Vec<Descriptor> = config.layers.iter().filter_map(blob).collect();
        Self::new(config, &blobs, &HashMap::new())
    }

    /// `config` with the blobs that its layers may be, and what an image's config says of them.
    fn new(
        config: CacheConfig,
        blobs: &[Descriptor],
        image: &HashMap<Digest, (DiffId, Option<&str>)>,
    ) -> Self {
        let blobs: HashMap<Digest, &Descriptor> = blobs.iter().map(|b| (b.digest, b)).collect();
        let layer = |layer: &CacheLayer| {
            let (note, said) = (layer.annotations.as_ref(), image.get(&layer.blob));
            let blob = blobs.get(&layer.blob)?;
            let annotated =
                || blob.annotations.get(shipway_storage::UNCOMPRESSED).and_then(|d| d.parse().ok());
            let diff_id = note
                .and_then(|n| n.diff_id)
                .or(said.map(|(diff_id, _)| *diff_id))
                .or_else(annotated)?;
            // A manifest list of blobs may say nothing but the digest.
            let media_type = Some(blob.media_type.as_str())
                .filter(|t| !t.is_empty())
                .or(note.map(|n| n.media_type.as_str()))?;
            let mut descriptor = Descriptor::new(media_type, layer.blob, blob.size);
            descriptor.annotations.clone_from(&blob.annotations);
            let created =
                note.map(|n| n.created_at.as_str()).or_else(|| said.and_then(|(_, time)| *time));
            // Go writes a time that it does not know as the year one.
            let created =
                created.and_then(timestamp::parse).filter(|t| *t > SystemTime::UNIX_EPOCH);
            Some(ImportedLayer { diff_id, descriptor, created })
        };
        let layers = config.layers.iter().map(layer).collect();
        Self { config, layers }
    }

    /// The layers of a record's result, lowest first; `None` if it has none that can be had.
    fn result(&self, record: &CacheRecord) -> Option<Vec<&ImportedLayer>> {
        let layers = |numbers: Vec<usize>| {
            numbers.into_iter().map(|n| self.layers.get(n)?.as_ref()).collect::<Option<Vec<_>>>()
        };
        self.config.results_of(record).find_map(layers)
    }

    /// How many layers each layer of the config has with those below it; `None` where one of them
    /// cannot be had, or they are too many.
    fn depths(&self) -> Vec<Option<usize>> {
        let mut depths: Vec<Option<Option<usize>>> = vec![None; self.layers.len()];
        for start in 0..self.layers.len() {
            let (mut path, mut next, mut depth) = (Vec::new(), Some(start), Some(0));
            while let Some(i) = next {
                if let Some(known) = depths[i] {
                    depth = known;
                    break;
                }
                // Met again on this path, it lies on itself.
                depths[i] = Some(None);
                path.push(i);
                next = usize::try_from(self.config.layers[i].parent).ok();
            }
            for i in path.into_iter().rev() {
                depth =
                    depth.map(|d| d + 1).filter(|d| self.layers[i].is_some() && *d <= MAX_DEPTH);
                depths[i] = Some(depth);
            }
        }
        depths.into_iter().map(Option::flatten).collect()
    }
}

impl Contents {
    /// Takes in one config, unless all are too many.
    fn add(&mut self, found: Found) -> Result<()> {
        let depths = found.depths();
        let number = u32::try_from(self.found.len())
            .map_err(|_| Fault::invalid("a cache has too many configs"))?;
        self.records += found.config.records.len();
        if self.records > MAX_ENTRIES {
            return Err(Fault::invalid(format!("a cache has more than {MAX_ENTRIES} records")));
        }
        let mut results = vec![false; found.config.records.len()];
        for (i, record) in found.config.records.iter().enumerate() {
            if record.alias_of.is_some() {
                continue;
            }
            let no = RecordNo(number, i as u32);
            let chains = record.chains.iter().filter(|c| {
                c.layers.iter().all(|l| found.layers.get(*l).is_some_and(Option::is_some))
            });
            let stacks =
                record.results.iter().filter_map(|r| depths.get(r.layer).copied().flatten());
            let depth = chains.map(|c| c.layers.len()).chain(stacks).max();
            self.places += depth.unwrap_or(0);
            if self.places > MAX_PLACES {
                return Err(Fault::invalid(format!(
                    "the results of a cache have more than {MAX_PLACES} layers together"
                )));
            }
            results[i] = depth.is_some();
            self.key(record, no, depth.is_some());
        }
        for record in &found.config.records {
            if let Some(of) = record.alias_of {
                self.key(record, RecordNo(number, of as u32), results[of]);
            }
        }
        self.found.push(found);
        Ok(())
    }

    /// A record's own key leads to record `no`. One that several images have leads to the first one
    /// with a result.
    fn key(&mut self, record: &CacheRecord, no: RecordNo, has_result: bool) {
        let known = self.keys.entry(CacheKey(record.digest)).or_insert((no, has_result));
        if !known.1 && has_result {
            *known = (no, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{CacheResult, CachedLayerMeta, ChainedResult};

    const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn blob(name: &str) -> Descriptor {
        Descriptor::new(GZIP, Digest::of(name), 10)
    }

    fn image(diff_ids: &[&str], inline: &str) -> Vec<u8> {
        let diff_ids: Vec<String> = diff_ids.iter().map(|d| Digest::of(d).to_string()).collect();
        let history =
            serde_json::json!([{ "created": "2024-05-06T07:08:09Z" }, { "empty_layer": true }, {}]);
        let inline = base64::engine::general_purpose::STANDARD.encode(inline);
        serde_json::to_vec(
            &serde_json::json!({ "rootfs": { "type": "layers", "diff_ids": diff_ids }, "history": history, INLINE_FIELD: inline }),
        )
        .unwrap()
    }

    #[test]
    fn the_inline_cache_of_buildkit_is_read() {
        let (base, step) = (Digest::of("base"), Digest::of("step"));
        let records = format!(
            r#"[{{"layers":[{{"layer":1,"createdAt":"2024-05-06T07:08:09.5Z"}}],"digest":"{step}","inputs":[[{{"selector":"/any","link":1}}],null]}},
                {{"chains":[{{"layers":[1,0],"createdAt":"0001-01-01T00:00:00Z"}}],"digest":"{base}"}}]"#
        );
        let layers = [blob("a"), blob("b")];
        let found = of_image(&image(&["x", "y"], &records), &layers).unwrap().unwrap();
        let mut contents = Contents::default();
        contents.add(found).unwrap();
        let of = |key: &Digest| {
            let (no, has) = contents.keys[&CacheKey(*key)];
            let found = &contents.found[0];
            let layers = found.result(&found.config.records[no.1 as usize]).unwrap();
            (
                has,
                layers.into_iter().map(|l| (l.diff_id.0, l.created.is_some())).collect::<Vec<_>>(),
            )
        };
        assert_eq!(of(&step), (true, vec![(Digest::of("x"), true), (Digest::of("y"), false)]));
        assert_eq!(
            of(&base).1.iter().map(|l| l.0).collect::<Vec<_>>(),
            [Digest::of("y"), Digest::of("x")]
        );
        // An image that says nothing of a cache has none, and one that contradicts itself is no
        // cache.
        assert!(of_image(br#"{"rootfs":{"diff_ids":[]}}"#, &[]).unwrap().is_none());
        assert!(of_image(&image(&["x"], &records), &layers).is_err());
    }

    #[test]
    fn a_config_alone_says_what_its_layers_are() {
        // As BuildKit writes it to a bucket; its own layers always have all fields.
        let (gone, layer) = (Digest::of("gone"), Digest::of("layer"));
        let (diff, key) = (Digest::of("diff"), Digest::of("key"));
        let json = format!(
            r#"{{"layers":[{{"blob":"{layer}","parent":-1,"annotations":{{"mediaType":"{GZIP}","diffID":"{diff}","size":17,"createdAt":"2024-05-06T07:08:09Z"}}}},
                {{"blob":"{gone}"}},{{"blob":"{gone}","parent":-1,"annotations":{{"mediaType":"{GZIP}","diffID":"{diff}","size":-3}}}}],
                "records":[{{"layers":[{{"layer":0,"createdAt":"2024-05-06T07:08:09Z"}}],"digest":"{key}"}}]}}"#
        );
        let found = Found::of_config(CacheConfig::read(json.as_bytes()).unwrap());
        let [Some(first), None, None] = &found.layers[..] else { panic!("layers") };
        assert_eq!(first.descriptor, Descriptor::new(GZIP, layer, 17));
        assert_eq!(first.diff_id, DiffId(diff));
        assert!(first.created.is_some());
        assert_eq!(found.result(&found.config.records[0]).map(|l| l.len()), Some(1));
    }

    #[test]
    fn layers_may_come_in_any_order() {
        // BuildKit sorts them by digest.
        let layer =
            |name: &str, parent| CacheLayer { blob: Digest::of(name), parent, annotations: None };
        let layers =
            vec![layer("c", 1), layer("b", 2), layer("a", -1), layer("x", 4), layer("y", 3)];
        let blobs: Vec<Descriptor> =
            layers.iter().map(|l| Descriptor::new(GZIP, l.blob, 1)).collect();
        let said = blobs.iter().map(|b| (b.digest, (DiffId(b.digest), None))).collect();
        let config = CacheConfig { layers, records: Vec::new() };
        let config = CacheConfig::read(&config.to_json().unwrap()).unwrap();
        assert_eq!(
            Found::new(config, &blobs, &said).depths(),
            [Some(3), Some(2), Some(1), None, None]
        );
    }

    #[test]
    fn what_we_write_into_an_image_is_read_by_place() {
        let layer = |name: &str, parent| {
            let diff_id = Some(DiffId(Digest::of(name)));
            let note = CachedLayerMeta {
                media_type: GZIP.into(),
                diff_id,
                size: 1,
                created_at: crate::format::time(None),
            };
            CacheLayer { blob: Digest::of(format!("{name}.gz")), parent, annotations: Some(note) }
        };
        let record = |key: &str, results: Vec<usize>, chains: Vec<Vec<usize>>| {
            let time = crate::format::time(None);
            CacheRecord {
                results: results
                    .into_iter()
                    .map(|layer| CacheResult { layer, created_at: time.clone() })
                    .collect(),
                chains: chains
                    .into_iter()
                    .map(|layers| ChainedResult { layers, created_at: time.clone() })
                    .collect(),
                digest: Digest::of(key),
                inputs: Vec::new(),
                alias_of: None,
                output: 0,
                description: String::new(),
            }
        };
        // The image is a and b; another layer lies beside them, and b is part of a merge, too.
        let config = CacheConfig {
            layers: vec![layer("a", -1), layer("else", 0), layer("b", 0), layer("b", -1)],
            records: vec![
                record("a", vec![0], vec![]),
                record("else", vec![1], vec![]),
                record("b", vec![2], vec![]),
                record("part", vec![3], vec![]),
            ],
        };
        let json = config.inline(&["a", "b"].map(|name| DiffId(Digest::of(name)))).unwrap();
        // Other bytes, same places: the image's layers were dated anew.
        let image = [Digest::of("a, dated"), Digest::of("b, dated")];
        let read = CacheConfig::read_inline(&json, &image).unwrap();
        let of = |i: usize| read.results_of(&read.records[i]).collect::<Vec<_>>();
        assert_eq!(
            [of(0), of(1), of(2), of(3)],
            [vec![vec![0]], vec![], vec![vec![0, 1]], vec![vec![1]]]
        );
        assert_eq!(CacheConfig::read_inline(&config.to_json().unwrap(), &image).unwrap(), config);
    }

    #[test]
    fn further_keys_lead_to_the_record_they_are_aliases_of() {
        let record = |key: &str, alias_of| CacheRecord {
            results: Vec::new(),
            chains: vec![ChainedResult {
                layers: Vec::new(),
                created_at: crate::format::time(None),
            }],
            digest: Digest::of(key),
            inputs: Vec::new(),
            alias_of,
            output: 0,
            description: String::new(),
        };
        let records = vec![record("another", Some(1)), record("one", None)];
        let config = CacheConfig { layers: Vec::new(), records };
        let config = CacheConfig::read(&config.to_json().unwrap()).unwrap();
        let mut contents = Contents::default();
        contents.add(Found::new(config, &[], &HashMap::new())).unwrap();
        let found = |key: &str| contents.keys.get(&CacheKey(Digest::of(key))).copied();
        assert_eq!(found("one"), Some((RecordNo(0, 1), true)));
        assert_eq!(found("another"), found("one"));
    }

    #[test]
    fn results_share_their_layers_and_are_bounded_together() {
        let of = |depth: usize, records: usize| {
            let layers: Vec<CacheLayer> = (0..depth)
                .map(|i| CacheLayer {
                    blob: Digest::of(i.to_string()),
                    parent: i as i64 - 1,
                    annotations: None,
                })
                .collect();
            let record = |i: usize| CacheRecord {
                results: vec![CacheResult { layer: depth - 1, created_at: String::new() }],
                chains: Vec::new(),
                digest: Digest::of(format!("key {i}")),
                inputs: Vec::new(),
                alias_of: None,
                output: 0,
                description: String::new(),
            };
            let blobs: Vec<Descriptor> =
                layers.iter().map(|l| Descriptor::new(GZIP, l.blob, 1)).collect();
            let said = blobs.iter().map(|b| (b.digest, (DiffId(b.digest), None))).collect();
            let mut contents = Contents::default();
            contents
                .add(Found::new(
                    CacheConfig { layers, records: (0..records).map(record).collect() },
                    &blobs,
                    &said,
                ))
                .map(|()| contents)
        };
        assert!(
            of(100, 2_000)
                .is_ok_and(|c| c.places == 200_000 && c.keys.values().all(|(_, result)| *result))
        );
        assert!(of(MAX_DEPTH, MAX_PLACES / MAX_DEPTH + 1).is_err());
        // A stack that is too high, or lies on itself, is not a result, and harmless.
        assert!(
            of(MAX_DEPTH + 1, 10)
                .is_ok_and(|c| c.places == 0 && c.keys.values().all(|(_, result)| !result))
        );
    }
}
