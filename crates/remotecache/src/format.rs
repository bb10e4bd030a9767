//! The cache config: BuildKit's JSON (row `rc.fmt`), with fields of our own that others pass over.

use serde::{Deserialize, Deserializer, Serialize};
use shipway_fault::{Fault, Result};
use shipway_oci::{DiffId, Digest};

/// Media type of the config.
pub(crate) const CONFIG: &str = "application/vnd.buildkit.cacheconfig.v0";
/// Field of an image config that holds a cache config in base64 (row `rc.inline`).
pub(crate) const INLINE_FIELD: &str = "moby.buildkit.cache.v0";
/// More of anything is not a cache.
pub(crate) const MAX_ENTRIES: usize = 200_000;
/// Most layers of a result.
pub(crate) const MAX_DEPTH: usize = 512;

/// The time that Go writes, and wants to read, where none is known.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

/// Go writes an empty list as `null`.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn lists<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> std::result::Result<Vec<Vec<T>>, D::Error> {
    let lists: Vec<Option<Vec<T>>> = nullable(from)?;
    Ok(lists.into_iter().map(Option::unwrap_or_default).collect())
}

/// A selector that is not a valid digest selects nothing.
fn selector<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<Digest>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.and_then(|s| s.parse().ok()))
}

fn no_time() -> String {
    NO_TIME.to_owned()
}

/// A time as the config has it.
pub(crate) fn time(of: Option<std::time::SystemTime>) -> String {
    of.map_or_else(no_time, shipway_oci::timestamp::format)
}

/// What a cache holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct CacheConfig {
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<CacheLayer>,
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<CacheRecord>,
}

/// A layer on top of another one of the same list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CacheLayer {
    pub blob: Digest,
    /// -1 for the lowest. Left out when it is 0, as Go does.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub parent: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<CachedLayerMeta>,
}

fn is_zero(n: &i64) -> bool {
    *n == 0
}

/// What a manifest does not have of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CachedLayerMeta {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    #[serde(rename = "diffID", default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<DiffId>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size: i64,
    #[serde(default = "no_time")]
    pub created_at: String,
}

/// One result, or only the fact that there is work with this key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CacheRecord {
    /// The top layers of results.
    #[serde(
        rename = "layers",
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub results: Vec<CacheResult>,
    /// Results by all their layers.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub chains: Vec<ChainedResult>,
    /// The key.
    pub digest: Digest,
    /// For each input, the records it may be.
    #[serde(default, deserialize_with = "lists", skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Vec<CacheInput>>,
    /// The record that this one is another key of, with the same results.
    #[serde(rename = "shipway.aliasOf", default, skip_serializing_if = "Option::is_none")]
    pub alias_of: Option<usize>,
    /// Which output of the work it is.
    #[serde(rename = "shipway.output", default, skip_serializing_if = "is_first")]
    pub output: usize,
    /// What it is, for people.
    #[serde(rename = "shipway.description", default, skip_serializing_if = "String::is_empty")]
    pub description: String,
}

fn is_first(n: &usize) -> bool {
    *n == 0
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CacheResult {
    pub layer: usize,
    #[serde(default = "no_time")]
    pub created_at: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ChainedResult {
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<usize>,
    #[serde(default = "no_time")]
    pub created_at: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CacheInput {
    #[serde(default, deserialize_with = "selector", skip_serializing_if = "Option::is_none")]
    pub selector: Option<Digest>,
    pub link: usize,
}

impl CacheConfig {
    /// Its bytes.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| Fault::internal(format!("encode a cache config: {e}")))
    }

    /// Reads and checks what came from outside: all numbers lead somewhere. Layers may be in any
    /// order, and may lie on themselves.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice::<Self>(bytes)
            .map_err(|e| Fault::invalid(format!("a cache config cannot be read: {e}")))?
            .checked()
    }

    /// The records alone, as they are in the config of an image with these layers (row
    /// `rc.inline`): a layer is named by its place in the image, so that it does not matter how the
    /// image's layers are compressed or dated. Results that are not part of the image are left out.
    pub fn inline(&self, image: &[DiffId]) -> Result<Vec<u8>> {
        let diff_id = |layer: usize| self.layers.get(layer)?.annotations.as_ref()?.diff_id;
        let record = |record: &CacheRecord| {
            let mut inline =
                CacheRecord { results: Vec::new(), chains: Vec::new(), ..record.clone() };
            let times = record
                .results
                .iter()
                .map(|r| &r.created_at)
                .chain(record.chains.iter().map(|c| &c.created_at));
            for (chain, created_at) in self.results_of(record).zip(times.cloned()) {
                let Some(part) = chain.iter().map(|l| diff_id(*l)).collect::<Option<Vec<DiffId>>>()
                else {
                    continue;
                };
                // A part of a merge lies on nothing, and in the image on the parts before it.
                let place = if part.is_empty() {
                    Some(0)
                } else {
                    image.windows(part.len()).position(|layers| layers == part)
                };
                match (place, part.len()) {
                    (Some(0), 1..) => {
                        inline.results.push(CacheResult { layer: part.len() - 1, created_at })
                    }
                    (Some(first), depth) => inline.chains.push(ChainedResult {
                        layers: (first..first + depth).collect(),
                        created_at,
                    }),
                    (None, _) => {}
                }
            }
            inline
        };
        let records: Vec<CacheRecord> = self.records.iter().map(record).collect();
        serde_json::to_vec(&records)
            .map_err(|e| Fault::internal(format!("encode a cache config: {e}")))
    }

    /// Reads what [`CacheConfig::inline`] writes into the config of an image with these layers;
    /// earlier versions wrote a whole config there.
    pub fn read_inline(bytes: &[u8], image: &[Digest]) -> Result<Self> {
        if !bytes.trim_ascii_start().starts_with(b"[") {
            return Self::read(bytes);
        }
        let records = serde_json::from_slice(bytes)
            .map_err(|e| Fault::invalid(format!("a cache config cannot be read: {e}")))?;
        let layer = |(i, blob): (usize, &Digest)| CacheLayer {
            blob: *blob,
            parent: i as i64 - 1,
            annotations: None,
        };
        Self { layers: image.iter().enumerate().map(layer).collect(), records }.checked()
    }

    fn checked(self) -> Result<Self> {
        if self.layers.len() > MAX_ENTRIES || self.records.len() > MAX_ENTRIES {
            return Err(Fault::invalid(format!(
                "a cache config has more than {MAX_ENTRIES} entries"
            )));
        }
        let (layers, records) = (self.layers.len(), self.records.len());
        let sound = self
            .layers
            .iter()
            .all(|l| l.parent == -1 || usize::try_from(l.parent).is_ok_and(|p| p < layers))
            && self.records.iter().all(|r| {
                r.results.iter().all(|l| l.layer < layers)
                    && r.chains.iter().all(|c| {
                        c.layers.len() <= MAX_DEPTH && c.layers.iter().all(|l| *l < layers)
                    })
                    && r.inputs.iter().flatten().all(|l| l.link < records)
                    && r.alias_of
                        .is_none_or(|of| self.records.get(of).is_some_and(|r| r.alias_of.is_none()))
            });
        if sound {
            Ok(self)
        } else {
            Err(Fault::invalid("a cache config names layers or records that it does not have"))
        }
    }

    /// The same of a config of ours, whose layers come after those they lie on, without the layers
    /// that `gone` says are gone, those that lie on one of them, and the results that need any of
    /// these. Besides it, which layers
    /// are left, by number.
    pub fn without(&self, gone: impl Fn(&Digest) -> bool) -> (Self, Vec<usize>) {
        let mut renumbered: Vec<Option<usize>> = Vec::with_capacity(self.layers.len());
        let (mut layers, mut left) = (Vec::new(), Vec::new());
        for (number, layer) in self.layers.iter().enumerate() {
            let parent = match usize::try_from(layer.parent) {
                Ok(below) => renumbered.get(below).copied().flatten().map(|p| p as i64),
                Err(_) => Some(-1),
            };
            let parent = parent.filter(|_| !gone(&layer.blob));
            renumbered.push(parent.map(|parent| {
                layers.push(CacheLayer { parent, ..layer.clone() });
                left.push(number);
                layers.len() - 1
            }));
        }
        let now = |layer: usize| renumbered.get(layer).copied().flatten();
        let record = |record: &CacheRecord| {
            let result = |r: &CacheResult| Some(CacheResult { layer: now(r.layer)?, ..r.clone() });
            let chain = |c: &ChainedResult| {
                let layers = c.layers.iter().map(|l| now(*l)).collect::<Option<_>>()?;
                Some(ChainedResult { layers, ..c.clone() })
            };
            let (results, chains) = (
                record.results.iter().filter_map(result).collect(),
                record.chains.iter().filter_map(chain).collect(),
            );
            CacheRecord { results, chains, ..record.clone() }
        };
        (Self { layers, records: self.records.iter().map(record).collect() }, left)
    }

    /// The layers of a record's results, lowest first; those of too many are left out.
    pub fn results_of(&self, record: &CacheRecord) -> impl Iterator<Item = Vec<usize>> {
        let below = |layer: &CacheResult| {
            let mut chain = Vec::new();
            let mut next = layer.layer as i64;
            while let Some(layer) = usize::try_from(next).ok().and_then(|i| self.layers.get(i)) {
                if chain.len() == MAX_DEPTH {
                    return None;
                }
                chain.push(next as usize);
                next = layer.parent;
            }
            chain.reverse();
            Some(chain)
        };
        record
            .results
            .iter()
            .filter_map(below)
            .chain(record.chains.iter().map(|c| c.layers.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str, parent: i64) -> CacheLayer {
        CacheLayer { blob: Digest::of(name), parent, annotations: None }
    }

    fn record(results: Vec<CacheResult>, inputs: Vec<Vec<CacheInput>>) -> CacheRecord {
        CacheRecord {
            results,
            chains: Vec::new(),
            digest: Digest::of("k"),
            inputs,
            alias_of: None,
            output: 0,
            description: String::new(),
        }
    }

    #[test]
    fn layers_are_followed_down_and_parent_zero_is_left_out() {
        let top = CacheResult { layer: 2, created_at: String::new() };
        let config = CacheConfig {
            layers: vec![layer("a", -1), layer("b", 0), layer("c", 1)],
            records: vec![record(vec![top], vec![])],
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(json.matches("parent").count(), 2, "{json}");
        let read = CacheConfig::read(json.as_bytes()).unwrap();
        assert_eq!(read, config);
        assert_eq!(read.results_of(&read.records[0]).collect::<Vec<_>>(), [[0, 1, 2]]);
    }

    #[test]
    fn what_is_gone_takes_along_what_lies_on_it() {
        let result = |layer| vec![CacheResult { layer, created_at: String::new() }];
        let chain = ChainedResult { layers: vec![0, 3], created_at: String::new() };
        let mut chained = record(vec![], vec![]);
        chained.chains = vec![chain];
        let config = CacheConfig {
            layers: vec![layer("a", -1), layer("b", 0), layer("c", 1), layer("d", 0)],
            records: vec![
                record(result(0), vec![]),
                record(result(2), vec![]),
                record(result(3), vec![]),
                chained,
            ],
        };
        let (rest, left) = config.without(|blob| *blob == Digest::of("b"));
        assert_eq!((rest.layers, left), (vec![layer("a", -1), layer("d", 0)], vec![0, 3]));
        let tops: Vec<_> =
            rest.records.iter().map(|r| r.results.first().map(|r| r.layer)).collect();
        assert_eq!(tops, [Some(0), None, Some(1), None]);
        assert_eq!(rest.records[3].chains[0].layers, [0, 1]);
        assert_eq!(config.without(|_| false), (config.clone(), vec![0, 1, 2, 3]));
    }

    #[test]
    fn what_leads_nowhere_is_refused() {
        let link = |link| vec![vec![CacheInput { selector: None, link }]];
        let result = |layer| vec![CacheResult { layer, created_at: String::new() }];
        for (layers, records) in [
            (vec![layer("a", 1)], vec![]),
            (vec![layer("a", -2)], vec![]),
            (vec![layer("a", -1)], vec![record(result(1), vec![])]),
            (vec![], vec![record(vec![], link(1))]),
            (vec![], vec![CacheRecord { alias_of: Some(1), ..record(vec![], vec![]) }]),
            (vec![], vec![CacheRecord { alias_of: Some(0), ..record(vec![], vec![]) }]),
        ] {
            let json = serde_json::to_vec(&CacheConfig { layers, records }).unwrap();
            assert!(CacheConfig::read(&json).is_err());
        }
    }
}
