//! What all states of a namespace are kept in: containerd's storage, and what this run of the
//! daemon knows of it. Knows no states.

use crate::{
    background::Background,
    durable::Durable,
    exact::Distrusted,
    fill_marks::FillMarks,
    id::fresh_id,
    last_used::LastUsed,
    layer::LayerContents,
    mount::{self, LocalMount},
    record::{KIND, KIND_RUN},
    run_lease::RunLeases,
};
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_storage::{Labels, LeaseId, Mount, SnapshotKey, Storage};
use shipway_task::blocking;
use std::{
    any::Any,
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

/// The storage of one namespace, and what is needed to keep states in it.
pub(crate) struct Backend {
    pub storage: Storage,
    /// Where the daemon's own mounts are made.
    pub mounts: PathBuf,
    /// Which named states are being filled.
    pub filling: FillMarks,
    pub durable: Arc<Durable>,
    pub run_leases: RunLeases,
    pub background: Background,
    pub uses: LastUsed,
    pub distrusted: Distrusted,
    /// Who knows what is in layers that the snapshotter serves.
    pub contents: Option<Arc<dyn LayerContents>>,
    /// Leases whose deletion failed.
    leases_to_retry: Mutex<Vec<LeaseId>>,
    /// Active snapshots that are being written, and since when.
    being_written: Mutex<HashMap<SnapshotKey, SystemTime>>,
}

impl Backend {
    /// Opens the files below `root` in the machine's boot `boot`, and unmounts what an earlier run
    /// left mounted there.
    pub async fn open(
        storage: Storage,
        root: &Path,
        boot: &str,
        contents: Option<Arc<dyn LayerContents>>,
    ) -> Result<Arc<Self>> {
        let mounts = root.join("mnt");
        let points = mounts.clone();
        blocking("sweep mounts", move || mount::sweep(&points)).await?;
        Ok(Arc::new(Self {
            storage,
            mounts,
            filling: FillMarks::new(root.join("filling")),
            durable: Durable::open(root.join("durable.json"), boot)?,
            run_leases: RunLeases::new(),
            background: Background::new(),
            uses: LastUsed::load(root.join("uses.json")),
            distrusted: Distrusted::default(),
            contents,
            leases_to_retry: Mutex::default(),
            being_written: Mutex::default(),
        }))
    }

    /// A key for an active snapshot or a view that `what` describes.
    pub fn fresh_key(&self, what: &str) -> SnapshotKey {
        SnapshotKey(format!("shipway-{what}-{}", fresh_id()))
    }

    /// Mounts a snapshot for the daemon itself; `guard` is dropped after unmounting.
    pub async fn mount(
        &self,
        mounts: &[Mount],
        guard: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<LocalMount> {
        LocalMount::new(mounts, &self.mounts, &self.background, guard).await
    }

    /// Deletes a lease that no record has any more; while containerd is away, with the next retry.
    pub async fn delete_lease(&self, lease: &LeaseId) {
        if let Err(e) = self.storage.leases.delete(lease, false).await {
            tracing::warn!(%lease, error = %e, "failed to delete lease, will retry");
            self.leases_to_retry.lock().push(lease.clone());
        }
    }

    /// [`Backend::delete_lease`] in the background.
    pub fn start_lease_delete(self: &Arc<Self>, lease: &LeaseId) {
        let (backend, lease) = (self.clone(), lease.clone());
        self.background.spawn("delete a lease", async move { backend.delete_lease(&lease).await });
    }

    /// Tries again to delete leases after failures; returns whether there were any.
    pub async fn retry_lease_deletes(&self) -> bool {
        let leases_to_retry = std::mem::take(&mut *self.leases_to_retry.lock());
        for lease in &leases_to_retry {
            self.delete_lease(lease).await;
        }
        !leases_to_retry.is_empty()
    }

    /// An active snapshot is being written from now on.
    pub fn begin_writing(&self, key: &SnapshotKey) {
        self.being_written.lock().insert(key.clone(), SystemTime::now());
    }

    /// It is not any more: it was committed, or thrown away.
    pub fn end_writing(&self, key: &SnapshotKey) {
        self.being_written.lock().remove(key);
    }

    /// The active snapshots that are being written, and since when.
    pub fn being_written(&self) -> Vec<(SnapshotKey, SystemTime)> {
        self.being_written.lock().iter().map(|(key, since)| (key.clone(), *since)).collect()
    }

    /// Waits for a garbage collection in containerd: what nothing keeps is gone then.
    pub async fn collect(&self) -> Result<()> {
        // A lease of nothing: its synchronous end waits for one collection of everything.
        let last = LeaseId(format!("shipway-gc-{}", fresh_id()));
        let labels = Labels::from([(KIND.into(), KIND_RUN.into())]);
        self.storage.leases.create(&last, &labels).await?;
        self.storage.leases.delete(&last, true).await
    }

    /// Waits until everything dropped so far is cleaned up.
    pub async fn drained(&self) {
        self.background.drained().await;
        if let Err(e) = self.run_leases.delete_unused(&self.storage, false).await {
            tracing::debug!(error = %e, "failed to delete unused lease, will retry at the next start");
        }
        self.uses.save().await;
    }
}
