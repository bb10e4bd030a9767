//! A cache store in memory: for tests, and the reference for what a store must do.

use crate::{CacheKey, CacheStore, RecordMeta};
use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
use shipway_fault::Result;
use shipway_oci::Digest;
use std::collections::{BTreeMap, HashSet, btree_map::Entry};

/// Keeps results as they are.
pub struct MemoryStore<O>(Mutex<State<O>>);

struct State<O> {
    aliases: BTreeMap<CacheKey, CacheKey>,
    records: BTreeMap<CacheKey, (O, RecordMeta)>,
    /// The primaries of the latest records by what similar ones are found by.
    similar: BTreeMap<Digest, CacheKey>,
}

impl<O> Default for MemoryStore<O> {
    fn default() -> Self {
        Self(Mutex::new(State {
            aliases: BTreeMap::new(),
            records: BTreeMap::new(),
            similar: BTreeMap::new(),
        }))
    }
}

impl<O> MemoryStore<O> {
    fn state(&self) -> MutexGuard<'_, State<O>> {
        self.0.lock()
    }

    /// Drops the records that `drop` names, as pruning does; aliases stay.
    pub fn prune(&self, mut drop: impl FnMut(&CacheKey, &RecordMeta) -> bool) {
        self.state().records.retain(|key, (_, meta)| !drop(key, meta));
    }

    /// How many results are kept.
    pub fn len(&self) -> usize {
        self.state().records.len()
    }

    /// Whether no result is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<O> State<O> {
    fn primary(&self, key: &CacheKey) -> Option<CacheKey> {
        self.aliases.get(key).copied()
    }

    fn note_similar(&mut self, primary: CacheKey, meta: &RecordMeta) {
        self.similar.extend(meta.similar().into_iter().map(|name| (name, primary)));
    }
}

#[async_trait]
impl<O: Clone + PartialEq + Send + Sync> CacheStore<O> for MemoryStore<O> {
    async fn primaries(&self, keys: &[CacheKey]) -> Result<Vec<CacheKey>> {
        let state = self.state();
        let mut seen = HashSet::new();
        Ok(keys.iter().filter_map(|k| state.primary(k)).filter(|k| seen.insert(*k)).collect())
    }

    async fn load(&self, keys: &[CacheKey]) -> Result<Option<(CacheKey, O)>> {
        let state = self.state();
        let mut primaries = keys.iter().filter_map(|k| state.primary(k));
        Ok(primaries.find_map(|p| state.records.get(&p).map(|(value, _)| (p, value.clone()))))
    }

    async fn save(&self, keys: &[CacheKey], value: &O, meta: &RecordMeta) -> Result<CacheKey> {
        let mut state = self.state();
        let Some(first) = keys.first() else {
            return Err(shipway_fault::Fault::internal("a result to store has no key"));
        };
        let primary = state.primary(first).unwrap_or(*first);
        for key in keys.iter().chain([&primary]) {
            state.aliases.insert(*key, primary);
        }
        state.records.insert(primary, (value.clone(), meta.clone()));
        state.note_similar(primary, meta);
        Ok(primary)
    }

    async fn adopt(&self, keys: &[CacheKey], value: &O, meta: &RecordMeta) -> Result<CacheKey> {
        let mut state = self.state();
        let Some(first) = keys.first() else {
            return Err(shipway_fault::Fault::internal("a result to store has no key"));
        };
        let primary = state.primary(first).unwrap_or(*first);
        for key in keys.iter().chain([&primary]) {
            state.aliases.entry(*key).or_insert(primary);
        }
        if let Entry::Vacant(free) = state.records.entry(primary) {
            free.insert((value.clone(), meta.clone()));
            state.note_similar(primary, meta);
        }
        Ok(primary)
    }

    async fn forget(&self, value: &O) -> Result<()> {
        self.state().records.retain(|_, (kept, _)| kept != value);
        Ok(())
    }

    async fn similar(&self, meta: &RecordMeta) -> Result<Option<RecordMeta>> {
        let state = self.state();
        let mut primaries = meta.similar().into_iter().filter_map(|name| state.similar.get(&name));
        Ok(primaries.find_map(|p| state.records.get(p).map(|(_, meta)| meta.clone())))
    }

    async fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        let mut state = self.state();
        for key in keys.iter().chain([&primary]) {
            state.aliases.insert(*key, primary);
        }
        Ok(())
    }
}
