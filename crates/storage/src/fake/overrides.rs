//! A fake that does some things otherwise, for tests of what a snapshotter or a collection may do.

use super::FakeStorage;
use crate::{
    Labels, Lease, LeaseId, LeaseResource, Leases, Mount, SnapshotInfo, SnapshotKey, Snapshotter,
    Storage, Usage,
};
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_oci::{Descriptor, DiffId};
use std::sync::Arc;

/// What is done otherwise than [`FakeStorage`] does it. Other calls are the fake's.
#[async_trait]
pub trait Overrides: Send + Sync + 'static {
    /// The fake below.
    fn fake(&self) -> &FakeStorage;

    /// See [`Snapshotter::prepare`].
    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        self.fake().prepare(lease, key, parent, labels).await
    }

    /// See [`Snapshotter::usage`].
    async fn usage(&self, key: &SnapshotKey) -> Result<Usage> {
        self.fake().usage(key).await
    }

    /// See [`Leases::delete`].
    async fn delete_lease(&self, id: &LeaseId, sync: bool) -> Result<()> {
        Leases::delete(self.fake(), id, sync).await
    }
}

/// The four ports of a fake with `overrides`.
pub fn storage_with(overrides: Arc<impl Overrides>) -> Storage {
    let fake = overrides.fake().storage();
    Storage {
        leases: Arc::new(Overridden(overrides.clone())),
        snapshots: Arc::new(Overridden(overrides)),
        ..fake
    }
}

struct Overridden<T>(Arc<T>);

#[async_trait]
impl<T: Overrides> Leases for Overridden<T> {
    async fn create(&self, id: &LeaseId, labels: &Labels) -> Result<()> {
        Leases::create(self.0.fake(), id, labels).await
    }

    async fn delete(&self, id: &LeaseId, sync: bool) -> Result<()> {
        self.0.delete_lease(id, sync).await
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<Lease>> {
        Leases::list(self.0.fake(), filters).await
    }

    async fn add(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        self.0.fake().add(id, resource).await
    }

    async fn remove(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        Leases::remove(self.0.fake(), id, resource).await
    }

    async fn resources(&self, id: &LeaseId) -> Result<Vec<LeaseResource>> {
        self.0.fake().resources(id).await
    }
}

#[async_trait]
impl<T: Overrides> Snapshotter for Overridden<T> {
    fn name(&self) -> &str {
        self.0.fake().name()
    }

    async fn stat(&self, key: &SnapshotKey) -> Result<SnapshotInfo> {
        self.0.fake().stat(key).await
    }

    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        self.0.prepare(lease, key, parent, labels).await
    }

    async fn view(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        self.0.fake().view(lease, key, parent, labels).await
    }

    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>> {
        self.0.fake().mounts(key).await
    }

    async fn commit(
        &self,
        lease: &LeaseId,
        name: &SnapshotKey,
        key: &SnapshotKey,
        labels: &Labels,
    ) -> Result<()> {
        self.0.fake().commit(lease, name, key, labels).await
    }

    async fn remove(&self, key: &SnapshotKey) -> Result<()> {
        Snapshotter::remove(self.0.fake(), key).await
    }

    async fn update_labels(&self, key: &SnapshotKey, labels: &Labels) -> Result<()> {
        Snapshotter::update_labels(self.0.fake(), key, labels).await
    }

    async fn usage(&self, key: &SnapshotKey) -> Result<Usage> {
        self.0.usage(key).await
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>> {
        Snapshotter::list(self.0.fake(), filters).await
    }

    async fn apply(&self, layer: &Descriptor, mounts: &[Mount]) -> Result<DiffId> {
        self.0.fake().apply(layer, mounts).await
    }
}
