//! The build cache of this machine: the index from cache keys to states, pruning both, and the
//! limits of what is kept ([`Quota`]).
//!
//! [`CacheIndex`] is the solver's store. What a build imports besides is the build's own (crate
//! `remotecache`).

mod quota;

pub use quota::{Place, Quota, Writing, room_was_made};

use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_cachedb::{CacheDb, Record, ResultStore};
use shipway_fault::Result;
use shipway_refs::{ImmutableRef, PruneOptions, Pruned, RefId, RefStore, UsageRecord};
use shipway_solver::{CacheKey, CacheStore, RecordMeta};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::Arc,
};

/// All that is known of results. Clones share it.
#[derive(Clone)]
pub struct CacheIndex {
    local: CacheDb<ImmutableRef>,
    refs: RefStore,
}

/// The index names states by their ids in the ref store.
struct StatesById(RefStore);

#[async_trait]
impl ResultStore<ImmutableRef> for StatesById {
    fn id_of(&self, value: &ImmutableRef) -> Option<String> {
        Some(value.id().to_string())
    }

    async fn load(&self, id: &str) -> Result<Option<ImmutableRef>> {
        Ok(self.0.get(&RefId(id.to_owned())).await)
    }
}

impl CacheIndex {
    /// The index in the file `path`, which is made if it is not there, over the states of `refs`.
    pub fn open(path: &Path, refs: RefStore) -> Result<Self> {
        let local = CacheDb::open(path, Arc::new(StatesById(refs.clone())))?;
        Ok(Self { local, refs })
    }

    /// The store of the states.
    pub fn refs(&self) -> &RefStore {
        &self.refs
    }

    /// The record of a key, if there is one.
    pub fn record(&self, key: &CacheKey) -> Result<Option<Record>> {
        self.local.record(key)
    }

    /// Every key that leads to one of `primaries`, by primary.
    pub async fn aliases_of(
        &self,
        primaries: HashSet<CacheKey>,
    ) -> Result<HashMap<CacheKey, Vec<CacheKey>>> {
        self.local.aliases_of(primaries).await
    }

    /// The keys of a result.
    pub fn keys_of(&self, result: &str) -> Result<Vec<CacheKey>> {
        self.local.keys_of(result)
    }

    /// Removes states that may go, reporting each to `on_removed`, and forgets whose results they
    /// were: the index would grow for ever otherwise.
    pub async fn prune(
        &self,
        options: PruneOptions,
        on_removed: &(dyn Fn(UsageRecord) + Send + Sync),
    ) -> Result<Pruned> {
        let (gone, dry_run) = (Mutex::new(Vec::new()), options.dry_run);
        let removed = |record: UsageRecord| {
            if !dry_run {
                gone.lock().push(record.id.to_string());
            }
            on_removed(record);
        };
        let pruned = self.refs.prune(options, &removed).await;
        let gone = gone.into_inner();
        if let Err(e) = self.local.forget_results(gone).await {
            tracing::warn!(error = %e, "failed to remove pruned results from the index, will retry when they are next looked up");
        }
        pruned
    }

    /// The state of a local result, if it is there still.
    pub async fn state(&self, result: &str) -> Option<ImmutableRef> {
        self.refs.get(&RefId(result.to_owned())).await
    }
}

#[async_trait]
impl CacheStore<ImmutableRef> for CacheIndex {
    async fn primaries(&self, keys: &[CacheKey]) -> Result<Vec<CacheKey>> {
        self.local.primaries(keys).await
    }

    async fn load(&self, keys: &[CacheKey]) -> Result<Option<(CacheKey, ImmutableRef)>> {
        self.local.load(keys).await
    }

    async fn save(
        &self,
        keys: &[CacheKey],
        value: &ImmutableRef,
        meta: &RecordMeta,
    ) -> Result<CacheKey> {
        self.local.save(keys, value, meta).await
    }

    async fn adopt(
        &self,
        keys: &[CacheKey],
        value: &ImmutableRef,
        meta: &RecordMeta,
    ) -> Result<CacheKey> {
        self.local.adopt(keys, value, meta).await
    }

    async fn forget(&self, value: &ImmutableRef) -> Result<()> {
        self.local.forget(value).await
    }

    async fn similar(&self, meta: &RecordMeta) -> Result<Option<RecordMeta>> {
        self.local.similar(meta).await
    }

    async fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        self.local.alias(primary, keys).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;
    use shipway_refs::RecordType;
    use shipway_storage::fake::FakeStorage;

    async fn lab() -> (tempfile::TempDir, RefStore, CacheIndex) {
        let dir = tempfile::tempdir().expect("a directory");
        let storage = FakeStorage::new().expect("a store").storage();
        let refs = RefStore::open(storage, dir.path().join("refs")).await.expect("states");
        let index = CacheIndex::open(&dir.path().join("cache.db"), refs.clone()).expect("an index");
        (dir, refs, index)
    }

    #[tokio::test]
    async fn what_is_pruned_leaves_the_index() {
        let (_dir, refs, index) = lab().await;
        let state = refs.mutable(None, "a step", RecordType::Regular, None).await.expect("a state");
        let state = state.commit("a step").await.expect("committed");
        let (key, id) = (CacheKey(Digest::of("key")), state.id().to_string());
        index.save(&[key], &state, &RecordMeta::default()).await.expect("saved");
        drop(state);
        refs.drained().await;
        assert_eq!(index.keys_of(&id).expect("keys"), [key]);
        index
            .prune(PruneOptions { all: true, ..PruneOptions::default() }, &|_| {})
            .await
            .expect("pruned");
        assert!(index.keys_of(&id).expect("keys").is_empty());
    }
}
