//! Namespaces of the fake, which share blobs always, and snapshots as a snapshotter does that
//! answers to names.

use super::{FakeStorage, SnapshotState};
use crate::{Namespaces, SnapshotKey, SnapshotKind, Storage};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_oci::Digest;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// The namespaces of one fake containerd. Clones share them.
#[derive(Clone, Default)]
pub struct FakeNamespaces(Arc<Inner>);

#[derive(Default)]
struct Inner {
    all: Mutex<BTreeMap<String, FakeStorage>>,
    /// Whether the snapshotter keeps its snapshots to each namespace.
    isolated: AtomicBool,
}

impl FakeNamespaces {
    /// Namespaces whose snapshotter answers a Prepare with a name from another namespace.
    pub fn new() -> Self {
        Self::default()
    }

    /// Namespaces whose snapshotter, as most do, has nothing of one in another.
    pub fn isolated() -> Self {
        let namespaces = Self::default();
        namespaces.0.isolated.store(true, Relaxed);
        namespaces
    }

    /// The namespace `name`, which is made when it is first named.
    pub fn namespace(&self, name: &str) -> Result<FakeStorage> {
        let mut all = self.0.all.lock();
        if let Some(known) = all.get(name) {
            return Ok(known.clone());
        }
        let made = FakeStorage::among(Peers(Arc::downgrade(&self.0)))?;
        all.insert(name.to_owned(), made.clone());
        Ok(made)
    }

    /// Transactions of all of them ([`FakeStorage::transactions`]).
    pub fn transactions(&self) -> u64 {
        self.0.all.lock().values().map(FakeStorage::transactions).sum()
    }
}

#[async_trait]
impl Namespaces for FakeNamespaces {
    fn storage(&self, name: &str) -> Result<Storage> {
        Ok(self.namespace(name)?.storage())
    }

    async fn ensure(&self, name: &str) -> Result<()> {
        self.namespace(name).map(drop)
    }
}

/// The namespaces beside one, itself among them.
#[derive(Default)]
pub(super) struct Peers(Weak<Inner>);

impl Peers {
    fn all(&self) -> Vec<FakeStorage> {
        self.0
            .upgrade()
            .map(|inner| inner.all.lock().values().cloned().collect())
            .unwrap_or_default()
    }

    /// The bytes of a blob that one of them has.
    pub fn blob(&self, digest: Digest) -> Option<Bytes> {
        self.all().iter().find_map(|peer| Some(peer.state().blobs.get(&digest)?.bytes.clone()))
    }

    /// The committed snapshot `name` on `parent`, if the snapshotter has it for one of them.
    pub fn snapshot(
        &self,
        name: &SnapshotKey,
        parent: Option<&SnapshotKey>,
    ) -> Option<(SnapshotKey, SnapshotState)> {
        if self.0.upgrade()?.isolated.load(Relaxed) {
            return None;
        }
        let found = self.all().iter().find_map(|peer| {
            let state = peer.state();
            let found = state.snapshots.get(name)?;
            let fits = found.kind == SnapshotKind::Committed && found.parent.as_ref() == parent;
            fits.then(|| SnapshotState {
                parent: found.parent.clone(),
                kind: found.kind,
                labels: found.labels.clone(),
                dir: found.dir.clone(),
            })
        });
        found.map(|snapshot| (name.clone(), snapshot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Labels, LeaseId, SNAPSHOT_REF};

    #[tokio::test]
    async fn namespaces_share_snapshots_by_name_and_lose_them_alone() {
        for (namespaces, shares) in
            [(FakeNamespaces::new(), true), (FakeNamespaces::isolated(), false)]
        {
            let (a, b) = (namespaces.namespace("a").unwrap(), namespaces.namespace("b").unwrap());
            let lease = LeaseId("l".into());
            for fake in [&a, &b] {
                fake.storage().leases.create(&lease, &Labels::new()).await.unwrap();
            }
            let (key, name) = (SnapshotKey("key".into()), SnapshotKey("name".into()));
            let (from, to) = (a.storage().snapshots, b.storage().snapshots);
            from.prepare(&lease, &key, None, &Labels::new()).await.unwrap();
            from.commit(&lease, &name, &key, &Labels::new()).await.unwrap();
            let labels = Labels::from([(SNAPSHOT_REF.to_owned(), name.0.clone())]);
            let before = namespaces.transactions();
            let prepared = to.prepare(&lease, &key, None, &labels).await;
            assert_eq!(prepared.is_err_and(|e| e.is_already_exists()), shares);
            assert_eq!(namespaces.transactions() - before, 2);
            assert_eq!(to.stat(&name).await.is_ok(), shares);
            a.storage().leases.delete(&lease, false).await.unwrap();
            assert!(from.stat(&name).await.is_err());
            if shares {
                let view = to.view(&lease, &key, Some(&name), &Labels::new()).await;
                view.expect("the directory is still there");
                let again = to.prepare(&lease, &key, None, &labels).await.unwrap_err();
                assert!(again.is_already_exists());
            }
        }
    }

    #[tokio::test]
    async fn a_blob_of_one_namespace_is_complete_in_another() {
        let namespaces = FakeNamespaces::isolated();
        let (a, b) = (namespaces.namespace("a").unwrap(), namespaces.namespace("b").unwrap());
        let lease = LeaseId("l".into());
        for fake in [&a, &b] {
            fake.storage().leases.create(&lease, &Labels::new()).await.unwrap();
        }
        let digest = a.storage().content.put(&lease, "x".into(), &Labels::new()).await.unwrap();
        let content = b.storage().content;
        assert!(content.info(digest).await.unwrap_err().is_not_found());
        let ingest = crate::Ingest { reference: "r".into(), expected: Some(digest), size: Some(1) };
        let writer = content.writer(&lease, ingest).await.unwrap();
        assert!(writer.is_complete());
        writer.commit(Some(digest), &Labels::new()).await.unwrap();
        assert_eq!(content.read_all(digest, 10).await.unwrap(), "x");
    }
}
