//! The solver's store: the local index, and the caches that running builds have imported.

use async_trait::async_trait;
use shipway_cachedb::{CacheDb, Record};
use shipway_fault::Result;
use shipway_oci::{Descriptor, DiffId};
use shipway_refs::{ImmutableRef, LayerSource, LazyLayer, PruneOptions, RecordType, RefId, RefStore, UsageRecord};
use shipway_solver::{CacheKey, CacheStore, RecordMeta};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::SystemTime,
};

/// A layer of an imported result.
#[derive(Clone)]
pub(crate) struct ImportedLayer {
    pub diff_id: DiffId,
    pub descriptor: Descriptor,
    pub created: Option<SystemTime>,
}

/// One record of an imported cache.
#[derive(Clone)]
pub(crate) struct ImportedRecord {
    pub primary: CacheKey,
    /// Its result, if the cache holds it.
    pub layers: Option<Vec<ImportedLayer>>,
    pub meta: RecordMeta,
}

/// A cache that was imported.
pub(crate) struct Imported {
    pub records: Vec<ImportedRecord>,
    /// Every key of every record, by index.
    pub keys: HashMap<CacheKey, usize>,
    pub source: Arc<dyn LayerSource>,
}

impl Imported {
    pub fn find(&self, key: &CacheKey) -> Option<&ImportedRecord> {
        self.keys.get(key).and_then(|i| self.records.get(*i))
    }
}

/// What is known of one key, wherever from.
pub(crate) enum Known {
    Local(Record),
    Imported(ImportedRecord, Arc<Imported>),
}

/// All that is known of results. Clones share it.
#[derive(Clone)]
pub struct CacheIndex {
    pub(crate) local: CacheDb<ImmutableRef>,
    pub(crate) refs: RefStore,
    imports: Arc<RwLock<Vec<Arc<Imported>>>>,
}

/// Keeps an imported cache in use; dropping it takes the cache out. What was used of it stays in the local index.
pub struct Attached {
    index: CacheIndex,
    cache: Arc<Imported>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut imports = self.index.imports.write().unwrap_or_else(PoisonError::into_inner);
        imports.retain(|c| !Arc::ptr_eq(c, &self.cache));
    }
}

impl CacheIndex {
    /// The store over the local index.
    pub fn new(local: CacheDb<ImmutableRef>, refs: RefStore) -> Self {
        Self { local, refs, imports: Arc::default() }
    }

    /// Removes states that may go, telling `on_removed` of each, and forgets whose results they were: the index would grow for ever otherwise.
    pub async fn prune(&self, options: PruneOptions, on_removed: &(dyn Fn(UsageRecord) + Send + Sync)) -> Result<()> {
        let gone = Mutex::new(Vec::new());
        let removed = |record: UsageRecord| {
            gone.lock().unwrap_or_else(PoisonError::into_inner).push(record.id.to_string());
            on_removed(record);
        };
        let pruned = self.refs.prune(options, &removed).await;
        let gone = gone.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.local.forget_results(gone).await {
            tracing::warn!(error = %e, "results that were pruned are still in the index; they go when they are looked for");
        }
        pruned
    }

    pub(crate) fn attach(&self, cache: Imported) -> Attached {
        let cache = Arc::new(cache);
        self.imports.write().unwrap_or_else(PoisonError::into_inner).push(cache.clone());
        Attached { index: self.clone(), cache }
    }

    fn imports(&self) -> Vec<Arc<Imported>> {
        self.imports.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is known of the work with this key.
    pub(crate) fn known(&self, key: &CacheKey) -> Result<Option<Known>> {
        if let Some(record) = self.local.record(key)? {
            return Ok(Some(Known::Local(record)));
        }
        Ok(self.imported(key).map(|(record, cache)| Known::Imported(record, cache)))
    }

    /// What an imported cache says of the key.
    pub(crate) fn imported(&self, key: &CacheKey) -> Option<(ImportedRecord, Arc<Imported>)> {
        self.imports().into_iter().find_map(|c| c.find(key).cloned().map(|r| (r, c)))
    }

    /// Every key that leads to one of `primaries`, by primary.
    pub(crate) async fn aliases(&self, primaries: &HashSet<CacheKey>) -> Result<HashMap<CacheKey, Vec<CacheKey>>> {
        let mut all = self.local.aliases_of(primaries.clone()).await?;
        for cache in self.imports() {
            for (key, index) in &cache.keys {
                if let Some(record) = cache.records.get(*index).filter(|r| primaries.contains(&r.primary)) {
                    all.entry(record.primary).or_default().push(*key);
                }
            }
        }
        Ok(all)
    }

    /// The state of a local result, if it is there still.
    pub(crate) async fn state(&self, result: &str) -> Option<ImmutableRef> {
        self.refs.get(&RefId(result.to_owned())).await
    }

    /// The state of an imported result; nothing is fetched.
    pub(crate) async fn lazy(&self, record: &ImportedRecord, cache: &Imported) -> Result<Option<ImmutableRef>> {
        let Some(layers) = &record.layers else { return Ok(None) };
        let lazy = |l: &ImportedLayer| LazyLayer {
            diff_id: l.diff_id,
            descriptor: l.descriptor.clone(),
            source: Some(cache.source.clone()),
            created: l.created,
        };
        let layers = layers.iter().map(lazy).collect();
        self.refs.image(layers, record.meta.description.clone(), RecordType::Regular).await.map(Some)
    }
}

#[async_trait]
impl CacheStore<ImmutableRef> for CacheIndex {
    async fn primaries(&self, keys: &[CacheKey]) -> Result<Vec<CacheKey>> {
        let mut found = self.local.primaries(keys).await?;
        for cache in self.imports() {
            for primary in keys.iter().filter_map(|k| cache.find(k)).map(|r| r.primary) {
                if !found.contains(&primary) {
                    found.push(primary);
                }
            }
        }
        Ok(found)
    }

    async fn load(&self, keys: &[CacheKey]) -> Result<Option<(CacheKey, ImmutableRef)>> {
        if let Some(found) = self.local.load(keys).await? {
            return Ok(Some(found));
        }
        for cache in self.imports() {
            for record in keys.iter().filter_map(|k| cache.find(k)) {
                let Some(state) = self.lazy(record, &cache).await? else { continue };
                let mut lead = vec![record.primary];
                lead.extend(keys.iter().filter(|k| cache.find(k).is_some_and(|r| r.primary == record.primary)));
                let primary = self.local.save(&lead, &state, &record.meta).await?;
                return Ok(Some((primary, state)));
            }
        }
        Ok(None)
    }

    async fn save(&self, keys: &[CacheKey], value: &ImmutableRef, meta: &RecordMeta) -> Result<CacheKey> {
        self.local.save(keys, value, meta).await
    }

    async fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        self.local.alias(primary, keys).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_cachedb::ResultStore;
    use shipway_oci::Digest;
    use shipway_storage::fake::FakeStorage;

    struct States(RefStore);

    #[async_trait]
    impl ResultStore<ImmutableRef> for States {
        fn id_of(&self, value: &ImmutableRef) -> Option<String> {
            Some(value.id().to_string())
        }
        async fn load(&self, id: &str) -> Result<Option<ImmutableRef>> {
            Ok(self.0.get(&RefId(id.to_owned())).await)
        }
    }

    #[tokio::test]
    async fn what_is_pruned_leaves_the_index() {
        let dir = tempfile::tempdir().expect("a directory");
        let refs = RefStore::open(FakeStorage::new().expect("a store").storage(), dir.path().join("refs")).await.expect("states");
        let db = CacheDb::open(&dir.path().join("cache.db"), Arc::new(States(refs.clone()))).expect("an index");
        let index = CacheIndex::new(db, refs.clone());
        let state = refs.mutable(None, "a step", RecordType::Regular, None).await.expect("a state");
        let state = state.commit("a step").await.expect("committed");
        let (key, id) = (CacheKey(Digest::of("key")), state.id().to_string());
        index.save(&[key], &state, &RecordMeta::default()).await.expect("saved");
        drop(state);
        refs.drained().await;
        assert_eq!(index.local.keys_of(&id).expect("keys"), [key]);
        index.prune(PruneOptions { all: true, ..PruneOptions::default() }, &|_| {}).await.expect("pruned");
        assert!(index.local.keys_of(&id).expect("keys").is_empty());
    }
}
