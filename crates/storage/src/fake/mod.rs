//! An in-memory storage for tests, stricter than containerd: *every* deletion of a lease or image
//! collects garbage at once, so what nothing keeps is gone before the caller can forget to keep it;
//! and a call under an unknown lease fails.
//!
//! Snapshots are real directories below a temporary one (a child starts as a copy of its parent)
//! and their mounts are binds of them, so file operations work without containerd, given root.
//! Expiry of leases is not modeled.
//!
//! [`FakeNamespaces`] are several of them that share blobs and snapshots, and each counts the
//! transactions that containerd would commit for its calls: what a call costs on a slow disk.

mod content;
mod filter;
mod names;
mod namespaces;
mod overrides;
mod snapshots;

pub use namespaces::FakeNamespaces;
pub use overrides::{Overrides, storage_with};

use self::{namespaces::Peers, snapshots::SnapshotDir};
use crate::{LeaseId, LeaseResource, SnapshotKey, SnapshotKind, Storage};
use parking_lot::{Mutex, MutexGuard};
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::SystemTime,
};

/// Name of the fake's only snapshotter.
pub const SNAPSHOTTER: &str = "fake";

/// The in-memory containerd of one namespace. Cheap to clone.
#[derive(Clone)]
pub struct FakeStorage(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    root: tempfile::TempDir,
    /// The namespaces that it shares blobs and snapshots with.
    peers: Peers,
}

#[derive(Default)]
struct State {
    blobs: BTreeMap<Digest, Blob>,
    /// References of running ingests.
    ingests: BTreeSet<String>,
    leases: BTreeMap<LeaseId, LeaseState>,
    snapshots: BTreeMap<SnapshotKey, SnapshotState>,
    images: BTreeMap<String, ImageState>,
    next: u64,
    transactions: u64,
}

struct Blob {
    bytes: bytes::Bytes,
    labels: crate::Labels,
}

struct LeaseState {
    labels: crate::Labels,
    created: SystemTime,
    resources: Vec<LeaseResource>,
}

struct SnapshotState {
    parent: Option<SnapshotKey>,
    kind: SnapshotKind,
    labels: crate::Labels,
    dir: Arc<SnapshotDir>,
}

struct ImageState {
    target: Descriptor,
    labels: crate::Labels,
    updated: SystemTime,
}

/// How much of each kind there is, to compare before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Count {
    pub blobs: usize,
    pub ingests: usize,
    pub leases: usize,
    pub snapshots: usize,
    pub images: usize,
}

impl FakeStorage {
    /// An empty storage; its directory goes with the last clone.
    pub fn new() -> Result<Self> {
        Self::among(Peers::default())
    }

    /// An empty storage that shares with `peers`.
    fn among(peers: Peers) -> Result<Self> {
        let root = tempfile::Builder::new()
            .prefix("shipway-fake-")
            .tempdir()
            .map_err(|e| Fault::io("make the fake's directory", e))?;
        Ok(Self(Arc::new(Shared { state: Mutex::default(), root, peers })))
    }

    /// The four ports.
    pub fn storage(&self) -> Storage {
        Storage {
            content: Arc::new(self.clone()),
            snapshots: Arc::new(self.clone()),
            leases: Arc::new(self.clone()),
            images: Arc::new(self.clone()),
        }
    }

    /// What is there.
    pub fn count(&self) -> Count {
        let state = self.state();
        Count {
            blobs: state.blobs.len(),
            ingests: state.ingests.len(),
            leases: state.leases.len(),
            snapshots: state.snapshots.len(),
            images: state.images.len(),
        }
    }

    /// How many transactions containerd would have committed to its database for the calls so far.
    /// They come one after another, and each waits for the disk twice.
    pub fn transactions(&self) -> u64 {
        self.state().transactions
    }

    /// Removes everything that neither a lease nor an image keeps, as containerd's garbage
    /// collector does.
    pub fn gc(&self) {
        let mut state = self.state();
        let mut kept = Reached::default();
        kept.mark(&state);
        state.blobs.retain(|digest, _| kept.blobs.contains(digest));
        state.snapshots.retain(|key, _| kept.snapshots.contains(key));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }
}

impl State {
    /// Counts `n` transactions.
    fn committed(&mut self, n: u64) {
        self.transactions += n;
    }

    /// Puts `resource` into `lease`.
    fn keep(&mut self, lease: &LeaseId, resource: LeaseResource) -> Result<()> {
        let lease = self
            .leases
            .get_mut(lease)
            .ok_or_else(|| Fault::not_found(format!("lease {:?} does not exist", lease.0)))?;
        if !lease.resources.contains(&resource) {
            lease.resources.push(resource);
        }
        Ok(())
    }

    fn known(&self, lease: &LeaseId) -> Result<()> {
        match self.leases.contains_key(lease) {
            true => Ok(()),
            false => Err(Fault::not_found(format!("lease {:?} does not exist", lease.0))),
        }
    }
}

/// What a collection reached.
#[derive(Default)]
struct Reached {
    blobs: HashSet<Digest>,
    snapshots: HashSet<SnapshotKey>,
    /// Reached with their labels' references; the others only for themselves.
    followed: HashSet<Digest>,
}

impl Reached {
    fn mark(&mut self, state: &State) {
        for lease in state.leases.values() {
            let flat = lease.labels.contains_key(crate::GC_FLAT);
            for resource in &lease.resources {
                match resource {
                    LeaseResource::Content(digest) if flat => {
                        self.blobs.insert(*digest);
                    }
                    LeaseResource::Content(digest) => self.blob(state, *digest),
                    LeaseResource::Snapshot(_, key) => self.snapshot(state, key),
                    LeaseResource::Image(name) => {
                        if let Some(image) = state.images.get(name) {
                            self.blob(state, image.target.digest);
                        }
                    }
                    LeaseResource::Ingest(_) => {}
                }
            }
        }
        for image in state.images.values() {
            self.blob(state, image.target.digest);
        }
    }

    fn blob(&mut self, state: &State, digest: Digest) {
        let mut queue = vec![digest];
        while let Some(digest) = queue.pop() {
            self.blobs.insert(digest);
            if !self.followed.insert(digest) {
                continue;
            }
            for (key, value) in state.blobs.get(&digest).iter().flat_map(|b| &b.labels) {
                if key.starts_with(crate::GC_REF_CONTENT) {
                    queue.extend(value.parse::<Digest>().ok());
                } else if key.starts_with(crate::GC_REF_SNAPSHOT) {
                    self.snapshot(state, &SnapshotKey(value.clone()));
                }
            }
        }
    }

    fn snapshot(&mut self, state: &State, key: &SnapshotKey) {
        let mut next = Some(key.clone());
        while let Some(key) = next {
            next = state.snapshots.get(&key).and_then(|s| s.parent.clone());
            if !self.snapshots.insert(key) {
                break;
            }
        }
    }
}

/// `changes` onto `labels`: an empty value removes.
fn relabel(labels: &mut crate::Labels, changes: &crate::Labels) {
    for (key, value) in changes {
        match value.is_empty() {
            true => labels.remove(key),
            false => labels.insert(key.clone(), value.clone()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_fake_passes_the_suite_and_keeps_nothing() {
        let fake = FakeStorage::new().unwrap();
        crate::suite::all(&fake.storage()).await;
        fake.gc();
        assert_eq!(fake.count(), Count::default());
    }

    #[tokio::test]
    async fn what_no_lease_keeps_goes_with_any_deletion() {
        let fake = FakeStorage::new().unwrap();
        let storage = fake.storage();
        let (a, b) = (LeaseId("a".into()), LeaseId("b".into()));
        storage.leases.create(&a, &Default::default()).await.unwrap();
        storage.leases.create(&b, &Default::default()).await.unwrap();
        let digest = storage.content.put(&a, "x".into(), &Default::default()).await.unwrap();
        storage.leases.remove(&a, LeaseResource::Content(digest)).await.unwrap();
        storage.leases.delete(&b, false).await.unwrap();
        assert!(storage.content.info(digest).await.unwrap_err().is_not_found());
        let unknown = storage.content.put(&b, "y".into(), &Default::default()).await.unwrap_err();
        assert!(unknown.to_string().contains("lease \"b\""), "{unknown}");
    }
}
