//! From results back through the index: everything that an import needs to find them again.

use crate::{
    Mode,
    index::{CacheIndex, Imported, ImportedRecord, Known},
};
use shipway_fault::Result;
use shipway_oci::{DiffId, Digest};
use shipway_refs::ImmutableRef;
use shipway_solver::{CacheKey, CacheStore as _, RecordMeta};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Most records that one export writes; the oldest are left out.
const MAX_ENTRIES: usize = 100_000;

/// One record to write.
pub(crate) struct Entry {
    pub key: CacheKey,
    /// Its other keys, sorted.
    pub aliases: Vec<CacheKey>,
    /// For each input, the records it may be, by index; they come earlier.
    pub inputs: Vec<Vec<(usize, Option<Digest>)>>,
    pub output: usize,
    pub description: String,
    /// Its result, if that is to be written.
    pub state: Option<ImmutableRef>,
}

/// What the index says of a key, with both places that may have its result.
struct Found {
    meta: RecordMeta,
    result: Option<String>,
    imported: Option<(ImportedRecord, Arc<Imported>)>,
}

struct Walk<'a> {
    index: &'a CacheIndex,
    entered: HashSet<CacheKey>,
    /// Primaries in the order in which they are written: inputs first.
    order: Vec<(CacheKey, Option<Found>, Vec<Vec<CacheKey>>)>,
}

impl Walk<'_> {
    async fn primary(&self, key: CacheKey) -> Result<CacheKey> {
        Ok(self.index.primaries(&[key]).await?.first().copied().unwrap_or(key))
    }

    fn find(&self, key: &CacheKey) -> Result<Option<Found>> {
        Ok(match self.index.known(key)? {
            None => None,
            Some(Known::Imported(record, cache)) => {
                Some(Found { meta: record.meta.clone(), result: None, imported: Some((record, cache)) })
            }
            Some(Known::Local(record)) => {
                let imported = self.index.imported(key);
                Some(Found { meta: record.meta, result: Some(record.result), imported })
            }
        })
    }

    /// Depth first without recursion: a history may be long.
    async fn from(&mut self, root: CacheKey) -> Result<()> {
        enum Step {
            Enter(CacheKey),
            Leave(CacheKey, Option<Box<Found>>, Vec<Vec<CacheKey>>),
        }
        let mut stack = vec![Step::Enter(self.primary(root).await?)];
        while let Some(step) = stack.pop() {
            let key = match step {
                Step::Leave(key, found, inputs) => {
                    self.order.push((key, found.map(|f| *f), inputs));
                    continue;
                }
                Step::Enter(key) => key,
            };
            if self.entered.len() >= MAX_ENTRIES || !self.entered.insert(key) {
                continue;
            }
            let found = self.find(&key)?;
            let mut inputs = Vec::new();
            for (keys, _) in found.iter().flat_map(|f| &f.meta.inputs) {
                let mut primaries: Vec<CacheKey> = Vec::new();
                for key in keys {
                    let primary = self.primary(*key).await?;
                    if !primaries.contains(&primary) {
                        primaries.push(primary);
                    }
                }
                inputs.push(primaries);
            }
            let below: Vec<CacheKey> = inputs.iter().flatten().rev().copied().collect();
            stack.push(Step::Leave(key, found.map(Box::new), inputs));
            stack.extend(below.into_iter().map(Step::Enter));
        }
        Ok(())
    }
}

/// Everything that `roots` were made from, inputs first.
pub(crate) async fn collect(index: &CacheIndex, roots: &[ImmutableRef], mode: Mode) -> Result<Vec<Entry>> {
    let mut walk = Walk { index, entered: HashSet::new(), order: Vec::new() };
    let mut wanted: Vec<Vec<DiffId>> = Vec::new();
    for root in roots.iter().filter(|r| !r.is_scratch()) {
        let mut keys = made_by(index, index.local.keys_of(&root.id().to_string())?)?;
        if keys.is_empty() {
            continue;
        }
        wanted.push(diff_ids(root).await?);
        keys.sort();
        for key in keys {
            walk.from(key).await?;
        }
    }
    let mut aliases = index.aliases(&walk.entered).await?;
    let mut numbers: HashMap<CacheKey, usize> = HashMap::new();
    let mut entries = Vec::with_capacity(walk.order.len());
    for (key, found, inputs) in walk.order {
        let mut aliases = aliases.remove(&key).unwrap_or_default();
        aliases.retain(|a| *a != key);
        aliases.sort();
        aliases.dedup();
        let selectors: Vec<Option<Digest>> = found.iter().flat_map(|f| &f.meta.inputs).map(|(_, s)| *s).collect();
        // A link to what is not written yet would be a loop.
        let links = |(keys, selector): (Vec<CacheKey>, Option<Digest>)| -> Vec<(usize, Option<Digest>)> {
            keys.iter().filter_map(|k| numbers.get(k)).map(|n| (*n, selector)).collect()
        };
        let inputs = inputs.into_iter().zip(selectors).map(links).collect();
        let state = match &found {
            Some(found) => state(index, found, mode, &wanted).await?,
            None => None,
        };
        let meta = found.map(|f| f.meta).unwrap_or_default();
        let description = state.as_ref().map_or(meta.description, |s| s.description().to_owned());
        numbers.insert(key, entries.len());
        entries.push(Entry { key, aliases, inputs, output: meta.output, description, state });
    }
    Ok(entries)
}

/// The keys by which a result was made of something, if there are any: what was built here and pulled as an image since is that image's result, too, and a
/// cache must not depend on who looked at it.
fn made_by(index: &CacheIndex, keys: Vec<CacheKey>) -> Result<Vec<CacheKey>> {
    let mut made = Vec::new();
    for key in &keys {
        if index.local.record(key)?.is_some_and(|r| !r.meta.inputs.is_empty()) {
            made.push(*key);
        }
    }
    Ok(if made.is_empty() { keys } else { made })
}

/// Its result, if that is wanted: with [`Mode::Min`], those whose layers lie on one another in a root, too, such as the parts of a merge.
async fn state(index: &CacheIndex, found: &Found, mode: Mode, wanted: &[Vec<DiffId>]) -> Result<Option<ImmutableRef>> {
    let within = |layers: &[DiffId]| layers.is_empty() || wanted.iter().any(|root| root.windows(layers.len()).any(|part| part == layers));
    let fits = |layers: &[DiffId]| mode == Mode::Max || within(layers);
    if let Some(result) = &found.result
        && let Some(state) = index.state(result).await
    {
        return Ok(if fits(&diff_ids(&state).await?) { Some(state) } else { None });
    }
    if let Some((record, cache)) = &found.imported
        && let Some(layers) = &record.layers
        && fits(&layers.iter().map(|l| l.diff_id).collect::<Vec<_>>())
    {
        return index.lazy(record, cache).await;
    }
    Ok(None)
}

async fn diff_ids(state: &ImmutableRef) -> Result<Vec<DiffId>> {
    Ok(state.layers().await?.iter().map(|l| l.diff_id).collect())
}
