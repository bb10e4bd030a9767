//! Ports for what containerd keeps: blobs ([`ContentStore`]), filesystems ([`Snapshotter`]), their
//! protection ([`Leases`]) and names ([`Images`]), in the words of containerd's own documentation.
//!
//! *Active* snapshots are writable and have a *key*; *committed* ones are immutable and have a
//! *name*; both live in one key space. Everything made under a lease is kept while the lease
//! exists; nothing is ever deleted directly except active snapshots: releasing a lease is the only
//! delete. One [`Storage`] is bound to one containerd namespace.
//!
//! A snapshot is seen through [`Mount`]s. What their strings mean is known here and nowhere else;
//! what an overlay leaves in its directories is in [`overlay`].
//!
//! Implementations: crate `containerd` over gRPC, and [`fake`] in memory, which is stricter than
//! the real thing. [`suite`] holds the conformance checks that both pass.

mod content;
mod images;
mod leases;
mod mount;
mod names;
mod snapshots;

pub mod fake;
pub mod overlay;
pub mod suite;

pub use content::{BlobInfo, BlobReader, BlobWriter, ContentStore, Ingest};
pub use images::{ImageRecord, Images, built_labels};
pub use leases::{Lease, LeaseResource, Leases};
pub use mount::{Bind, Mount, Overlay, RawMount, Upper, VOLATILE};
pub use names::{LeaseId, SnapshotKey};
pub use snapshots::{SnapshotInfo, SnapshotKind, Snapshotter, Usage};

use shipway_fault::Result;
use std::{collections::BTreeMap, sync::Arc};

/// Labels of an object. containerd bounds key + value to 4096 bytes.
pub type Labels = BTreeMap<String, String>;

/// Label on a manifest or index that keeps the blob with the digest in its value: append
/// `.<anything>`.
pub const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";
/// Label on a config that keeps the snapshot chain whose name is the value: append
/// `.<snapshotter>`.
pub const GC_REF_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot";
/// Label on a lease: it keeps its resources and snapshots' parents, and follows no other label.
pub const GC_FLAT: &str = "containerd.io/gc.flat";
/// Label on a lease: when it ends, as RFC 3339; one without never does.
pub const GC_EXPIRE: &str = "containerd.io/gc.expire";
/// Label of a Prepare: the chain ID that the snapshot is to become. A snapshotter that has it, or
/// can have it without the blob, answers `AlreadyExists`, and the snapshot of that name is there.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// Label of snapshots that a remote snapshotter serves from a registry (stargz-snapshotter).
pub const REMOTE_SNAPSHOT: &str = "containerd.io/snapshot/remote";
/// Label of ours on a manifest, with `.<digest of a layer>` appended: from where the layer would be
/// fetched, which is not here.
pub const LAYER_ORIGIN: &str = "shipway/origin";
/// Label on a layer blob: its diffID.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Label on a blob, with `.<registry>` appended: repositories it can be mounted from.
pub const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source";

/// The namespaces of one containerd. Blobs and, with some snapshotters, snapshots are shared among
/// them; names and leases are not.
#[async_trait::async_trait]
pub trait Namespaces: Send + Sync {
    /// The stores of the namespace `name`, with the snapshotter of the builder's own. Asks nothing
    /// of containerd; a name that cannot be one is an error.
    fn storage(&self, name: &str) -> Result<Storage>;

    /// Makes the namespace if there is none of that name.
    async fn ensure(&self, name: &str) -> Result<()>;
}

/// One containerd namespace: the four stores together.
#[derive(Clone)]
pub struct Storage {
    /// Blobs.
    pub content: Arc<dyn ContentStore>,
    /// Filesystems.
    pub snapshots: Arc<dyn Snapshotter>,
    /// Protection from garbage collection.
    pub leases: Arc<dyn Leases>,
    /// Names.
    pub images: Arc<dyn Images>,
}
