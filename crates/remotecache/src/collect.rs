//! From results back through the index: everything that an import needs to find them again.

use crate::{ExportMode, Import, import::RecordNo};
use shipway_buildcache::CacheIndex;
use shipway_fault::Result;
use shipway_oci::{DiffId, Digest};
use shipway_refs::ImmutableRef;
use shipway_solver::{CacheKey, CacheStore as _, ImportedCache as _, RecordMeta};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Most records that one export writes; the oldest are left out.
const MAX_ENTRIES: usize = 100_000;

/// One record to write.
pub(crate) struct ExportRecord {
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

/// What is known of a key, with both places that may have its result.
struct Found {
    meta: RecordMeta,
    result: Option<String>,
    imported: Option<(Arc<Import>, RecordNo)>,
}

struct Walk<'a> {
    index: &'a CacheIndex,
    imports: &'a [Arc<Import>],
    entered: HashSet<CacheKey>,
    /// Primaries in the order in which they are written: inputs first.
    order: Vec<(CacheKey, Option<Found>, Vec<Vec<CacheKey>>)>,
}

impl Walk<'_> {
    /// What the index calls the key, or else an import.
    async fn primary(&self, key: CacheKey) -> Result<CacheKey> {
        let local = self.index.primaries(&[key]).await?.first().copied();
        Ok(local.or_else(|| self.imports.iter().find_map(|i| i.primary(&key))).unwrap_or(key))
    }

    fn find(&self, key: &CacheKey) -> Result<Option<Found>> {
        let imported = self.imports.iter().find_map(|i| Some((i.clone(), i.find(key)?)));
        if let Some(record) = self.index.record(key)? {
            let mut meta = record.meta;
            // What was imported keeps its name, so that a cache made of itself is the same cache.
            let named = imported
                .as_ref()
                .filter(|_| meta.imported)
                .and_then(|(import, no)| import.record(*no));
            if let Some(named) = named {
                meta.description.clone_from(&named.description);
            }
            return Ok(Some(Found { meta, result: Some(record.result), imported }));
        }
        let Some((import, no)) = &imported else { return Ok(None) };
        let Some(record) = import.record(*no) else { return Ok(None) };
        let (inputs, description) = (import.inputs(*no), record.description.clone());
        let meta = RecordMeta {
            output: record.output,
            inputs,
            description,
            imported: true,
            ..RecordMeta::default()
        };
        Ok(Some(Found { meta, result: None, imported }))
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
pub(crate) async fn collect(
    index: &CacheIndex,
    imports: &[Arc<Import>],
    roots: &[ImmutableRef],
    mode: ExportMode,
) -> Result<Vec<ExportRecord>> {
    for import in imports {
        import.ready().await;
    }
    let mut walk = Walk { index, imports, entered: HashSet::new(), order: Vec::new() };
    let mut wanted: Vec<Vec<DiffId>> = Vec::new();
    for root in roots.iter().filter(|r| !r.is_scratch()) {
        let mut keys = made_by(index, index.keys_of(&root.id().to_string())?)?;
        if keys.is_empty() {
            continue;
        }
        wanted.push(diff_ids(root).await?);
        keys.sort();
        for key in keys {
            walk.from(key).await?;
        }
    }
    let mut aliases = index.aliases_of(walk.entered.clone()).await?;
    for (key, primary) in
        imports.iter().flat_map(|i| i.keys()).filter(|(_, primary)| walk.entered.contains(primary))
    {
        aliases.entry(primary).or_default().push(key);
    }
    let mut numbers: HashMap<CacheKey, usize> = HashMap::new();
    let mut entries = Vec::with_capacity(walk.order.len());
    for (key, found, inputs) in walk.order {
        let mut aliases = aliases.remove(&key).unwrap_or_default();
        aliases.retain(|a| *a != key);
        aliases.sort();
        aliases.dedup();
        let selectors: Vec<Option<Digest>> =
            found.iter().flat_map(|f| &f.meta.inputs).map(|(_, s)| *s).collect();
        // A link to what is not written yet would be a loop.
        let links =
            |(keys, selector): (Vec<CacheKey>, Option<Digest>)| -> Vec<(usize, Option<Digest>)> {
                keys.iter().filter_map(|k| numbers.get(k)).map(|n| (*n, selector)).collect()
            };
        let inputs = inputs.into_iter().zip(selectors).map(links).collect();
        let state = match &found {
            Some(found) => state(index, found, mode, &wanted).await?,
            None => None,
        };
        let meta = found.map(|f| f.meta).unwrap_or_default();
        let described =
            state.as_ref().filter(|_| !meta.imported).map(|s| s.description().to_owned());
        let description = described.unwrap_or(meta.description);
        numbers.insert(key, entries.len());
        entries.push(ExportRecord {
            key,
            aliases,
            inputs,
            output: meta.output,
            description,
            state,
        });
    }
    Ok(entries)
}

/// The keys by which a result was made of something, if there are any: what was built here and
/// pulled as an image since is that image's result, too, and a cache must not depend on who looked
/// at it.
fn made_by(index: &CacheIndex, keys: Vec<CacheKey>) -> Result<Vec<CacheKey>> {
    let mut made = Vec::new();
    for key in &keys {
        if index.record(key)?.is_some_and(|r| !r.meta.inputs.is_empty()) {
            made.push(*key);
        }
    }
    Ok(if made.is_empty() { keys } else { made })
}

/// Its result, if that is wanted: with [`ExportMode::Min`], those whose layers lie on one another
/// in a root, too, such as the parts of a merge.
async fn state(
    index: &CacheIndex,
    found: &Found,
    mode: ExportMode,
    wanted: &[Vec<DiffId>],
) -> Result<Option<ImmutableRef>> {
    let within = |layers: &[DiffId]| {
        layers.is_empty()
            || wanted.iter().any(|root| root.windows(layers.len()).any(|part| part == layers))
    };
    let fits = |layers: &[DiffId]| mode == ExportMode::Max || within(layers);
    if let Some(result) = &found.result
        && let Some(state) = index.state(result).await
    {
        return Ok(if fits(&diff_ids(&state).await?) { Some(state) } else { None });
    }
    if let Some((import, no)) = &found.imported
        && import.diff_ids(*no).is_some_and(|layers| fits(&layers))
    {
        return import.state(*no).await;
    }
    Ok(None)
}

async fn diff_ids(state: &ImmutableRef) -> Result<Vec<DiffId>> {
    Ok(state.layers().await?.iter().map(|l| l.diff_id).collect())
}
