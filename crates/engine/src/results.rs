//! How the cache index names states: by their ids in the ref store.

use async_trait::async_trait;
use shipway_cachedb::ResultStore;
use shipway_fault::Result;
use shipway_refs::{ImmutableRef, RefId, RefStore};

/// States by id.
pub struct RefResults(pub RefStore);

#[async_trait]
impl ResultStore<ImmutableRef> for RefResults {
    fn id_of(&self, value: &ImmutableRef) -> Option<String> {
        Some(value.id().to_string())
    }

    async fn load(&self, id: &str) -> Result<Option<ImmutableRef>> {
        Ok(self.0.get(&RefId(id.to_owned())).await)
    }
}
