//! The index as the solver's cache store.

use crate::{
    Record,
    db::{Inner, StoredRecord, blocking, maintain},
};
use async_trait::async_trait;
use shipway_fault::{Context as _, Result};
use shipway_solver::{CacheKey, CacheStore, RecordMeta};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::Arc,
};

/// Where results live: names them and finds them again.
#[async_trait]
pub trait ResultStore<O>: Send + Sync {
    /// A lasting name of `value`; `None` if it has none and cannot be found again.
    fn id_of(&self, value: &O) -> Option<String>;

    /// The result with that name; `None` if it is gone.
    async fn load(&self, id: &str) -> Result<Option<O>>;
}

/// The index: keys in a file, results in a [`ResultStore`]. Clones share both.
pub struct CacheDb<O> {
    inner: Arc<Inner>,
    results: Arc<dyn ResultStore<O>>,
}

impl<O> Clone for CacheDb<O> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), results: self.results.clone() }
    }
}

impl<O> CacheDb<O> {
    /// Opens the file at `path`, or makes it. A damaged one, or one of another format, is moved
    /// aside. Reads files, so call it at the start; must be called within a tokio runtime.
    pub fn open(path: &Path, results: Arc<dyn ResultStore<O>>) -> Result<Self> {
        let inner = Inner::open(path)?;
        shipway_task::spawn(
            "maintain the cache index",
            maintain(Arc::downgrade(&inner), inner.wake.clone()),
        );
        Ok(Self { inner, results })
    }

    /// The record under the primary of `key`.
    pub fn record(&self, key: &CacheKey) -> Result<Option<Record>> {
        let Some(primary) = self.inner.primary(key)? else { return Ok(None) };
        Ok(self.inner.record(&primary)?.map(StoredRecord::into_record))
    }

    /// Primaries of the records of a result.
    pub fn keys_of(&self, result: &str) -> Result<Vec<CacheKey>> {
        self.inner.keys_of(result)
    }

    /// Every key that leads to one of `primaries`, by primary.
    pub async fn aliases_of(
        &self,
        primaries: HashSet<CacheKey>,
    ) -> Result<HashMap<CacheKey, Vec<CacheKey>>> {
        let inner = self.inner.clone();
        blocking(move || inner.aliases_of(&primaries)).await
    }

    /// Drops all records of results that no longer exist, and returns how many; without it they go
    /// when they are next looked for. Keys stay known while they may lead to something.
    pub async fn forget_results(&self, results: Vec<String>) -> Result<usize> {
        let inner = self.inner.clone();
        blocking(move || inner.forget_results(&results))
            .await
            .context(|| "drop results from the build cache index")
    }

    /// Forgets everything.
    pub async fn clear(&self) -> Result<()> {
        let inner = self.inner.clone();
        blocking(move || inner.clear()).await.context(|| "clear the build cache index")
    }

    /// Makes everything written so far durable.
    pub async fn flush(&self) -> Result<()> {
        let inner = self.inner.clone();
        blocking(move || inner.flush()).await
    }
}

// Reading is memory and, rarely, a page of the file; it never waits for a writer. Writing may wait
// for a flush and goes to a blocking thread.
#[async_trait]
impl<O: Send + Sync> CacheStore<O> for CacheDb<O> {
    async fn primaries(&self, keys: &[CacheKey]) -> Result<Vec<CacheKey>> {
        self.inner.primaries(keys)
    }

    async fn load(&self, keys: &[CacheKey]) -> Result<Option<(CacheKey, O)>> {
        for primary in self.inner.primaries(keys)? {
            let Some(id) = self.inner.result_of(&primary)? else { continue };
            match self.results.load(&id).await {
                Ok(Some(value)) => return Ok(Some((primary, value))),
                Ok(None) => {}
                Err(error) => {
                    // It may be there again when what failed works again.
                    tracing::warn!(%error, result = id, "failed to load cached result");
                    continue;
                }
            }
            let inner = self.inner.clone();
            blocking(move || inner.drop_record(&primary, &id)).await?;
        }
        Ok(None)
    }

    async fn save(&self, keys: &[CacheKey], value: &O, meta: &RecordMeta) -> Result<CacheKey> {
        let (inner, keys, id, meta) =
            (self.inner.clone(), keys.to_vec(), self.results.id_of(value), meta.clone());
        blocking(move || inner.save(&keys, id, &meta)).await
    }

    async fn adopt(&self, keys: &[CacheKey], value: &O, meta: &RecordMeta) -> Result<CacheKey> {
        let mut gone = None;
        if let Some(first) = keys.first()
            && let Some(primary) = self.inner.primary(first)?
            && let Some(id) = self.inner.result_of(&primary)?
        {
            match self.results.load(&id).await {
                Ok(None) => gone = Some(id),
                Ok(Some(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, result = id, "failed to load cached result")
                }
            }
        }
        let (inner, keys, id, meta) =
            (self.inner.clone(), keys.to_vec(), self.results.id_of(value), meta.clone());
        blocking(move || inner.adopt(&keys, id, &meta, gone.as_deref())).await
    }

    async fn forget(&self, value: &O) -> Result<()> {
        match self.results.id_of(value) {
            Some(id) => self.forget_results(vec![id]).await.map(drop),
            None => Ok(()),
        }
    }

    async fn similar(&self, meta: &RecordMeta) -> Result<Option<RecordMeta>> {
        for name in meta.similar() {
            if let Some(record) = self.inner.similar(&name)? {
                return Ok(Some(record.into_record().meta));
            }
        }
        Ok(None)
    }

    async fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        let (inner, keys) = (self.inner.clone(), keys.to_vec());
        blocking(move || inner.alias(primary, &keys)).await
    }
}
