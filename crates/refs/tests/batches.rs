//! Prunes go in batches: over a fake whose collections hold everything up, as containerd's do, for
//! as long as they find something to remove.

#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_refs::*;
use shipway_storage::{
    Labels, LeaseId, Leases, Mount, SnapshotKey, Snapshotter as _, Usage,
    fake::{FakeStorage, Overrides, storage_with},
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::RwLock, time::Instant};

/// What a collection takes to look at everything.
const MARK: Duration = Duration::from_millis(5);
/// What it takes to remove one inode.
const REMOVE: Duration = Duration::from_micros(10);

/// A containerd that collects only when somebody waits for it.
struct Collecting {
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

#[async_trait]
impl Overrides for Collecting {
    fn fake(&self) -> &FakeStorage {
        &self.fake
    }

    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        let _one = self.lock.read().await;
        self.fake.prepare(lease, key, parent, labels).await
    }

    async fn usage(&self, key: &SnapshotKey) -> Result<Usage> {
        let usage = self.fake.usage(key).await?;
        Ok(Usage { inodes: self.inodes, ..usage })
    }

    async fn delete_lease(&self, id: &LeaseId, sync: bool) -> Result<()> {
        if sync {
            let _all = self.lock.write().await;
            let ended = std::mem::take(&mut *self.ended.lock());
            self.collections.lock().push(ended);
            tokio::time::sleep(MARK + REMOVE * u32::try_from(ended * self.inodes).unwrap()).await;
        } else {
            *self.ended.lock() += 1;
        }
        Leases::delete(&self.fake, id, sync).await
    }
}

/// A store with so many states that differ, each of so many inodes as containerd counts them.
async fn store(states: usize, inodes: u64) -> (Arc<Collecting>, tempfile::TempDir, RefStore) {
    let containerd = Arc::new(Collecting {
        fake: FakeStorage::new().unwrap(),
        inodes,
        lock: RwLock::default(),
        ended: Mutex::default(),
        collections: Mutex::default(),
    });
    let (storage, dir) = (storage_with(containerd.clone()), tempfile::tempdir().unwrap());
    let store = RefStore::open(storage, dir.path().to_owned()).await.unwrap();
    for number in 0..states {
        let state = store.mutable(None, "a step", RecordType::Regular, None).await.unwrap();
        let mount = state.mount().await.unwrap();
        std::fs::write(mount.path().join("file"), number.to_string()).unwrap();
        mount.unmount().await.unwrap();
        drop(state.commit("a step").await.unwrap());
    }
    store.drained().await;
    *containerd.ended.lock() = 0;
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
    let collections = containerd.collections.lock().clone();
    assert!(longest < Duration::from_millis(50), "{longest:?} of {steps}: {collections:?}");
    assert!(longest >= MARK && steps > 10, "nothing was waited for: {steps}, {longest:?}");
    assert!(collections.len() > 3 && collections.iter().all(|n| *n <= 32), "{collections:?}");
}

#[tokio::test(start_paused = true)]
async fn states_of_many_files_go_one_by_one() {
    let (containerd, _dir, store) = store(5, 5000).await;
    store.prune(everything(), &|_| {}).await.unwrap();
    let collections = containerd.collections.lock().clone();
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
    assert!(containerd.collections.lock().is_empty() && *containerd.ended.lock() == 0);
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
