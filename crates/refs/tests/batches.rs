//! Prunes go in batches: over a fake whose collections hold everything up, as containerd's do, for
//! as long as they find something to remove.

#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_oci::{Descriptor, DiffId};
use shipway_refs::*;
use shipway_storage::{
    Labels, Lease, LeaseId, LeaseResource, Leases, Mount, SnapshotInfo, SnapshotKey, Snapshotter,
    Storage, Usage, fake::FakeStorage,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::RwLock, time::Instant};

/// What a collection takes to look at everything.
const MARK: Duration = Duration::from_millis(5);
/// What it takes to remove one inode.
const REMOVE: Duration = Duration::from_micros(10);

/// A containerd that collects only when somebody waits for it. Clones share it.
#[derive(Clone)]
struct Collecting(Arc<Inner>);

struct Inner {
    fake: FakeStorage,
    /// Inodes of each state.
    inodes: u64,
    /// Held by a collection; whoever makes a snapshot waits for it.
    lock: RwLock<()>,
    /// Leases that ended since the last one.
    ended: Mutex<u64>,
    /// The leases that ended with each collection.
    collections: Mutex<Vec<u64>>,
}

impl Collecting {
    fn new(inodes: u64) -> Self {
        Self(Arc::new(Inner {
            fake: FakeStorage::new().unwrap(),
            inodes,
            lock: RwLock::default(),
            ended: Mutex::default(),
            collections: Mutex::default(),
        }))
    }

    fn storage(&self) -> Storage {
        Storage {
            leases: Arc::new(self.clone()),
            snapshots: Arc::new(self.clone()),
            ..self.0.fake.storage()
        }
    }
}

#[async_trait]
impl Leases for Collecting {
    async fn create(&self, id: &LeaseId, labels: &Labels) -> Result<()> {
        Leases::create(&self.0.fake, id, labels).await
    }
    async fn delete(&self, id: &LeaseId, sync: bool) -> Result<()> {
        if sync {
            let _all = self.0.lock.write().await;
            let ended = std::mem::take(&mut *self.0.ended.lock());
            self.0.collections.lock().push(ended);
            tokio::time::sleep(MARK + REMOVE * u32::try_from(ended * self.0.inodes).unwrap()).await;
        } else {
            *self.0.ended.lock() += 1;
        }
        Leases::delete(&self.0.fake, id, sync).await
    }
    async fn list(&self, filters: &[String]) -> Result<Vec<Lease>> {
        Leases::list(&self.0.fake, filters).await
    }
    async fn add(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        self.0.fake.add(id, resource).await
    }
    async fn remove(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        Leases::remove(&self.0.fake, id, resource).await
    }
    async fn resources(&self, id: &LeaseId) -> Result<Vec<LeaseResource>> {
        self.0.fake.resources(id).await
    }
}

#[async_trait]
impl Snapshotter for Collecting {
    fn name(&self) -> &str {
        self.0.fake.name()
    }
    async fn stat(&self, key: &SnapshotKey) -> Result<SnapshotInfo> {
        self.0.fake.stat(key).await
    }
    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        let _one = self.0.lock.read().await;
        self.0.fake.prepare(lease, key, parent, labels).await
    }
    async fn view(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        self.0.fake.view(lease, key, parent, labels).await
    }
    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>> {
        self.0.fake.mounts(key).await
    }
    async fn commit(
        &self,
        lease: &LeaseId,
        name: &SnapshotKey,
        key: &SnapshotKey,
        labels: &Labels,
    ) -> Result<()> {
        self.0.fake.commit(lease, name, key, labels).await
    }
    async fn remove(&self, key: &SnapshotKey) -> Result<()> {
        Snapshotter::remove(&self.0.fake, key).await
    }
    async fn update_labels(&self, key: &SnapshotKey, labels: &Labels) -> Result<()> {
        Snapshotter::update_labels(&self.0.fake, key, labels).await
    }
    async fn usage(&self, key: &SnapshotKey) -> Result<Usage> {
        let usage = self.0.fake.usage(key).await?;
        Ok(Usage { inodes: self.0.inodes, ..usage })
    }
    async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>> {
        Snapshotter::list(&self.0.fake, filters).await
    }
    async fn apply(&self, layer: &Descriptor, mounts: &[Mount]) -> Result<DiffId> {
        self.0.fake.apply(layer, mounts).await
    }
}

/// A store with so many states that differ, each of so many inodes as containerd counts them.
async fn store(states: usize, inodes: u64) -> (Collecting, tempfile::TempDir, RefStore) {
    let (containerd, dir) = (Collecting::new(inodes), tempfile::tempdir().unwrap());
    let store = RefStore::open(containerd.storage(), dir.path().to_owned()).await.unwrap();
    for number in 0..states {
        let state = store.mutable(None, "a step", RecordType::Regular, None).await.unwrap();
        let mount = state.mount().await.unwrap();
        std::fs::write(mount.path().join("file"), number.to_string()).unwrap();
        mount.unmount().await.unwrap();
        drop(state.commit("a step").await.unwrap());
    }
    store.drained().await;
    *containerd.0.ended.lock() = 0;
    (containerd, dir, store)
}

fn everything() -> PruneOptions {
    PruneOptions { all: true, rest: true, ..PruneOptions::default() }
}

#[tokio::test(start_paused = true)]
async fn no_build_waits_long_for_a_prune() {
    let (containerd, _dir, store) = store(150, 100).await;
    let pruning = {
        let store = store.clone();
        shipway_task::spawn("prune", async move { store.prune(everything(), &|_| {}).await })
    };
    let (mut longest, mut steps) = (Duration::ZERO, 0);
    while !pruning.is_finished() {
        let began = Instant::now();
        let state = store.mutable(None, "a step", RecordType::Regular, None).await.unwrap();
        (longest, steps) = (longest.max(began.elapsed()), steps + 1);
        state.release().await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(pruning.await.unwrap().unwrap().states, 150);
    let collections = containerd.0.collections.lock().clone();
    assert!(longest < Duration::from_millis(50), "{longest:?} of {steps}: {collections:?}");
    assert!(longest >= MARK && steps > 10, "nothing was waited for: {steps}, {longest:?}");
    assert!(collections.len() > 3 && collections.iter().all(|n| *n <= 32), "{collections:?}");
}

#[tokio::test(start_paused = true)]
async fn states_of_many_files_go_one_by_one() {
    let (containerd, _dir, store) = store(5, 5000).await;
    store.prune(everything(), &|_| {}).await.unwrap();
    let collections = containerd.0.collections.lock().clone();
    assert!(collections.iter().all(|n| *n <= 1), "{collections:?}");
    assert_eq!(collections.iter().sum::<u64>(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_says_what_would_go_and_removes_nothing() {
    let (containerd, _dir, store) = store(3, 1).await;
    let prune = async |options: PruneOptions| {
        let gone = Mutex::new(Vec::new());
        let note = |record: UsageRecord| gone.lock().push((record.id, record.size));
        (store.prune(options, &note).await.unwrap(), gone.into_inner())
    };
    let dry = prune(PruneOptions { dry_run: true, ..everything() }).await;
    assert_eq!((store.usage().await.unwrap().len(), dry.0.states), (3, 3));
    assert!(containerd.0.collections.lock().is_empty() && *containerd.0.ended.lock() == 0);
    assert_eq!(prune(everything()).await, dry);
    assert!(store.usage().await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_being_written_is_shown_and_stays() {
    let (_containerd, _dir, store) = store(1, 1).await;
    let writing = store.mutable(None, "a step", RecordType::Regular, None).await.unwrap();
    assert_eq!(store.prune(everything(), &|_| {}).await.unwrap().states, 1);
    let left = store.usage().await.unwrap();
    assert_eq!(left.len(), 1);
    assert!(left[0].in_use && left[0].mutable && left[0].id.0 == writing.snapshot_key().0);
    writing.release().await.unwrap();
    assert!(store.usage().await.unwrap().is_empty());
}
