//! The solver's store: the local index. What a build imports besides is the build's own
//! (`import.rs`).

use async_trait::async_trait;
use shipway_cachedb::CacheDb;
use shipway_fault::Result;
use shipway_refs::{ImmutableRef, PruneOptions, RefId, RefStore, UsageRecord};
use shipway_solver::{CacheKey, CacheStore, RecordMeta};
use std::sync::{Mutex, PoisonError};

/// All that is known of results. Clones share it.
#[derive(Clone)]
pub struct CacheIndex {
    pub(crate) local: CacheDb<ImmutableRef>,
    pub(crate) refs: RefStore,
}

impl CacheIndex {
    /// The store over the local index.
    pub fn new(local: CacheDb<ImmutableRef>, refs: RefStore) -> Self {
        Self { local, refs }
    }

    /// Removes states that may go, telling `on_removed` of each, and forgets whose results they
    /// were: the index would grow for ever otherwise.
    pub async fn prune(
        &self,
        options: PruneOptions,
        on_removed: &(dyn Fn(UsageRecord) + Send + Sync),
    ) -> Result<()> {
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

    /// The state of a local result, if it is there still.
    pub(crate) async fn state(&self, result: &str) -> Option<ImmutableRef> {
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

    async fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        self.local.alias(primary, keys).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Export, ExportOptions, Mode};
    use shipway_cachedb::ResultStore;
    use shipway_oci::Digest;
    use shipway_progress::Reporter;
    use shipway_refs::RecordType;
    use shipway_storage::fake::FakeStorage;
    use std::sync::Arc;

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

    async fn lab() -> (tempfile::TempDir, RefStore, CacheIndex) {
        let dir = tempfile::tempdir().expect("a directory");
        let refs =
            RefStore::open(FakeStorage::new().expect("a store").storage(), dir.path().join("refs"))
                .await
                .expect("states");
        let db = CacheDb::open(&dir.path().join("cache.db"), Arc::new(States(refs.clone())))
            .expect("an index");
        (dir, refs.clone(), CacheIndex::new(db, refs))
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
        let options = ExportOptions { mode: Mode::Max, ..ExportOptions::default() };
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

    #[tokio::test]
    async fn what_is_pruned_leaves_the_index() {
        let (_dir, refs, index) = lab().await;
        let state = refs.mutable(None, "a step", RecordType::Regular, None).await.expect("a state");
        let state = state.commit("a step").await.expect("committed");
        let (key, id) = (CacheKey(Digest::of("key")), state.id().to_string());
        index.save(&[key], &state, &RecordMeta::default()).await.expect("saved");
        drop(state);
        refs.drained().await;
        assert_eq!(index.local.keys_of(&id).expect("keys"), [key]);
        index
            .prune(PruneOptions { all: true, ..PruneOptions::default() }, &|_| {})
            .await
            .expect("pruned");
        assert!(index.local.keys_of(&id).expect("keys").is_empty());
    }
}
