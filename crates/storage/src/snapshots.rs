//! The snapshot port: filesystems as layers.

use crate::{
    Labels, Mount,
    names::{LeaseId, SnapshotKey},
};
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_oci::{Descriptor, DiffId};

/// Kind of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// Writable.
    Active,
    /// Read-only mount of a committed one.
    View,
    /// Immutable.
    Committed,
}

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Key or name.
    pub key: SnapshotKey,
    /// Name of the parent.
    pub parent: Option<SnapshotKey>,
    /// Kind.
    pub kind: SnapshotKind,
    /// Labels.
    pub labels: Labels,
}

/// Disk use of one snapshot without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Filesystems of one namespace, in one snapshotter.
#[async_trait]
pub trait Snapshotter: Send + Sync {
    /// The snapshotter's name in containerd, such as `overlayfs`.
    fn name(&self) -> &str;

    /// What is known of `key`; `NotFound` if there is none.
    async fn stat(&self, key: &SnapshotKey) -> Result<SnapshotInfo>;

    /// Makes an active snapshot under `lease`.
    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>>;

    /// Makes a read-only view under `lease`.
    async fn view(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>>;

    /// Mounts of an active snapshot or view.
    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>>;

    /// Makes the active `key` the committed `name` under `lease`. `AlreadyExists` leaves the active
    /// one as it was (and puts the existing `name` into the lease): remove it then.
    async fn commit(
        &self,
        lease: &LeaseId,
        name: &SnapshotKey,
        key: &SnapshotKey,
        labels: &Labels,
    ) -> Result<()>;

    /// Removes an active snapshot or view. Committed ones go with their leases, but for those that
    /// a power cut made short.
    async fn remove(&self, key: &SnapshotKey) -> Result<()>;

    /// Sets labels; an empty value removes one.
    async fn update_labels(&self, key: &SnapshotKey, labels: &Labels) -> Result<()>;

    /// Disk use without parents.
    async fn usage(&self, key: &SnapshotKey) -> Result<Usage>;

    /// All snapshots, or those that match any of the containerd filters.
    async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>>;

    /// Unpacks the layer blob onto `mounts` and returns the digest of the uncompressed tar
    /// (containerd's Diff service).
    async fn apply(&self, layer: &Descriptor, mounts: &[Mount]) -> Result<DiffId>;
}
