//! The lease port: what protects objects from garbage collection.

use crate::{
    Labels,
    names::{LeaseId, SnapshotKey},
};
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_oci::Digest;
use std::time::SystemTime;

/// A lease as stored. Labels cannot change after creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Name.
    pub id: LeaseId,
    /// Labels, `containerd.io/gc.expire` (RFC 3339) and `containerd.io/gc.flat` among them.
    pub labels: Labels,
    /// Creation time.
    pub created: Option<SystemTime>,
}

/// An object a lease keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseResource {
    /// A blob.
    Content(Digest),
    /// A snapshot of the named snapshotter.
    Snapshot(String, SnapshotKey),
    /// An ingest.
    Ingest(String),
    /// An image record.
    Image(String),
}

/// Leases of one namespace.
#[async_trait]
pub trait Leases: Send + Sync {
    /// Makes a lease; `AlreadyExists` if the name is taken.
    async fn create(&self, id: &LeaseId, labels: &Labels) -> Result<()>;

    /// Ends a lease; `sync` waits for a garbage collection. A lease that is gone is not an error.
    async fn delete(&self, id: &LeaseId, sync: bool) -> Result<()>;

    /// All leases, or those that match any of the containerd filters.
    async fn list(&self, filters: &[String]) -> Result<Vec<Lease>>;

    /// Adds an object, which need not exist yet.
    async fn add(&self, id: &LeaseId, resource: LeaseResource) -> Result<()>;

    /// Takes an object out.
    async fn remove(&self, id: &LeaseId, resource: LeaseResource) -> Result<()>;

    /// The objects of a lease.
    async fn resources(&self, id: &LeaseId) -> Result<Vec<LeaseResource>>;
}
