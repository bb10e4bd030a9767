//! Snapshots that live no longer than their handles: active ones and views.

use crate::{
    backend::Backend,
    exact,
    run_lease::{RunLease, forget, remove},
};
use shipway_fault::Result;
use shipway_storage::{Labels, LeaseId, Mount, SNAPSHOT_REF, SnapshotKey};
use std::sync::Arc;

/// An active snapshot that vanishes unless it is committed, or a view that vanishes.
pub(crate) struct Active {
    backend: Arc<Backend>,
    pub lease: RunLease,
    pub key: SnapshotKey,
    pub mounts: Vec<Mount>,
    /// Whether the snapshot is removed on drop.
    armed: bool,
}

/// What a snapshotter answers when it is asked for a layer.
pub(crate) enum PreparedLayer {
    /// An active snapshot to unpack the layer into.
    Active(Active),
    /// It has the layer's snapshot already, which is in this lease now.
    Exists(RunLease),
}

impl Active {
    /// An active snapshot on top of `parent`, to write into.
    pub async fn prepare(
        backend: &Arc<Backend>,
        what: &str,
        parent: Option<&SnapshotKey>,
    ) -> Result<Self> {
        let mut active = Self::named(backend, what).await?;
        let (lease, key) = (&active.lease, &active.key);
        active.mounts =
            backend.storage.snapshots.prepare(lease, key, parent, &Labels::new()).await?;
        backend.begin_writing(key);
        Ok(active)
    }

    /// One to unpack a layer into over `parent`, unless the snapshotter finds by `labels` that it
    /// has the layer.
    pub async fn prepare_layer(
        backend: &Arc<Backend>,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<PreparedLayer> {
        let mut active = Self::named(backend, "extract").await?;
        let (lease, key) = (&active.lease, &active.key);
        match backend.storage.snapshots.prepare(lease, key, parent, labels).await {
            Ok(mounts) => {
                backend.begin_writing(key);
                active.mounts = mounts;
            }
            Err(e) if e.is_already_exists() && labels.contains_key(SNAPSHOT_REF) => {
                active.armed = false;
                return Ok(PreparedLayer::Exists(active.lease.clone()));
            }
            Err(e) => return Err(e),
        }
        Ok(PreparedLayer::Active(active))
    }

    /// A view of a committed snapshot, which need not belong to a record.
    pub async fn view(backend: &Arc<Backend>, of: Option<&SnapshotKey>) -> Result<Self> {
        let mut view = Self::named(backend, "view").await?;
        view.mounts =
            backend.storage.snapshots.view(&view.lease, &view.key, of, &Labels::new()).await?;
        Ok(view)
    }

    /// One that an earlier run of the daemon left, and that `lease` keeps now.
    pub async fn left(
        backend: &Arc<Backend>,
        lease: &RunLease,
        key: &SnapshotKey,
        is_view: bool,
    ) -> Result<Self> {
        let (lease, key) = (lease.clone(), key.clone());
        let mut active =
            Self { backend: backend.clone(), lease, key, mounts: Vec::new(), armed: true };
        active.mounts = backend.storage.snapshots.mounts(&active.key).await?;
        if !is_view {
            backend.begin_writing(&active.key);
        }
        Ok(active)
    }

    /// The name of one that is made next. From here on a call that is cut off leaves nothing
    /// behind.
    async fn named(backend: &Arc<Backend>, what: &str) -> Result<Self> {
        let lease = backend.run_leases.lease(&backend.storage).await?;
        let key = backend.fresh_key(what);
        Ok(Self { backend: backend.clone(), lease, key, mounts: Vec::new(), armed: true })
    }

    /// What was unpacked into it becomes the snapshot `name` under `lease`. One that exists already
    /// is as good.
    pub async fn commit(self, lease: &LeaseId, name: &SnapshotKey) -> Result<()> {
        let backend = &self.backend;
        let labels = backend.durable.labels(&self.mounts);
        match backend.storage.snapshots.commit(lease, name, &self.key, &labels).await {
            Ok(()) => self.committed(),
            Err(e) if e.is_already_exists() => {
                backend.durable.check(name)?;
                if !backend.distrusted.accepts(&backend.storage.snapshots.stat(name).await?) {
                    return Err(exact::taken(name));
                }
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// It is a committed snapshot now.
    pub fn committed(mut self) {
        self.armed = false;
        self.backend.end_writing(&self.key);
        let (backend, lease, key) = (self.backend.clone(), self.lease.clone(), self.key.clone());
        self.backend.background.spawn("forget a snapshot", async move {
            forget(&backend.storage, &lease, &key).await;
        });
    }

    /// Removes it, and waits for that.
    pub async fn release(mut self) -> Result<()> {
        self.armed = false;
        self.backend.end_writing(&self.key);
        remove(&self.backend.storage, &self.lease, &self.key).await
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        self.backend.end_writing(&self.key);
        let (backend, lease, key) = (self.backend.clone(), self.lease.clone(), self.key.clone());
        self.backend.background.spawn("remove a snapshot", async move {
            if let Err(e) = remove(&backend.storage, &lease, &key).await {
                tracing::warn!(%key, error = %e, "failed to remove snapshot, will retry at the next start");
            }
        });
    }
}
