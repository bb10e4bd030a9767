//! Over the fake, on a small disk that has room for a hundred states, in virtual time.

#![allow(clippy::unwrap_used)]

use super::*;
use shipway_refs::{ImmutableRef, RecordType, RefStore};
use shipway_storage::fake::FakeStorage;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// States that the disk has room for.
const DISK: u64 = 100;

/// A disk that has the fake's snapshots and what others have.
struct FakeDisk {
    fake: FakeStorage,
    /// Bytes of one state.
    state: u64,
    /// What others have, in states.
    others: AtomicU64,
    counts: AtomicUsize,
}

impl Probe for FakeDisk {
    fn disk(&self) -> Result<Disk> {
        let used = self.fake.count().snapshots as u64 + self.others.load(Ordering::Relaxed);
        let free = DISK.saturating_sub(used) * self.state;
        Ok(Disk { usable: DISK * self.state, free, inodes: 0, free_inodes: 0 })
    }

    fn besides(&self) -> u64 {
        self.counts.fetch_add(1, Ordering::Relaxed);
        0
    }
}

struct Lab {
    refs: RefStore,
    disk: Arc<FakeDisk>,
    quota: Quota,
    _dir: tempfile::TempDir,
}

impl Lab {
    /// One whose rules are made for states of so many bytes.
    async fn new(rules: impl FnOnce(u64) -> Vec<PruneOptions>) -> Self {
        let (dir, fake) = (tempfile::tempdir().unwrap(), FakeStorage::new().unwrap());
        let refs = RefStore::open(fake.storage(), dir.path().join("refs")).await.unwrap();
        let one = make(&refs).await;
        let state = refs.usage().await.unwrap()[0].size;
        drop(one);
        let all = PruneOptions { all: true, ..PruneOptions::default() };
        refs.prune(all, &|_| {}).await.unwrap();
        let caches = CacheIndex::open(&dir.path().join("cache.redb"), refs.clone()).unwrap();
        let disk = Arc::new(FakeDisk { fake, state, others: 0.into(), counts: 0.into() });
        let quota = Quota::with_probe(caches, rules(state), disk.clone());
        Self { refs, disk, quota, _dir: dir }
    }

    /// So many more states.
    async fn states(&self, count: usize) -> Vec<ImmutableRef> {
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(make(&self.refs).await);
        }
        all
    }

    async fn unused(&self, count: usize) {
        drop(self.states(count).await);
        self.refs.drained().await;
    }

    fn left(&self) -> usize {
        self.disk.fake.count().snapshots
    }
}

/// A state like no other, and as large as all.
async fn make(refs: &RefStore) -> ImmutableRef {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let state = refs.mutable(None, "a step", RecordType::Regular, None).await.unwrap();
    let mount = state.mount().await.unwrap();
    let text = format!("{:08}", NEXT.fetch_add(1, Ordering::Relaxed));
    std::fs::write(mount.path().join("file"), text).unwrap();
    mount.unmount().await.unwrap();
    state.commit("a step").await.unwrap()
}

/// As many states stay free.
fn min_free(states: u64) -> impl FnOnce(u64) -> Vec<PruneOptions> {
    move |state| {
        let min_free = states * state;
        vec![PruneOptions { all: true, min_free, ..PruneOptions::default() }]
    }
}

fn full() -> Fault {
    Fault::io("write /x", std::io::ErrorKind::StorageFull.into())
}

#[tokio::test(start_paused = true)]
async fn what_begins_to_write_waits_while_the_disk_has_too_little() {
    let lab = Lab::new(min_free(60)).await;
    lab.unused(38).await;
    drop(lab.quota.enter().await);
    assert_eq!(lab.left(), 38, "there is enough");
    lab.unused(6).await;
    drop(lab.quota.enter().await);
    assert!(lab.left() <= 40, "{} are left", lab.left());
}

#[tokio::test(start_paused = true)]
async fn what_is_used_cannot_go_and_is_not_waited_for_again_and_again() {
    let lab = Lab::new(min_free(DISK)).await;
    let held = lab.states(3).await;
    drop(lab.quota.enter().await);
    let counts = lab.disk.counts.load(Ordering::Relaxed);
    for _ in 0..10 {
        drop(lab.quota.enter().await);
    }
    assert_eq!((lab.left(), lab.disk.counts.load(Ordering::Relaxed)), (3, counts));
    drop(held);
    lab.refs.drained().await;
    tokio::time::sleep(FUTILE).await;
    drop(lab.quota.enter().await);
    // Nobody waits for it.
    tokio::time::sleep(WATCH).await;
    assert_eq!(lab.left(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_reserve_stays_and_is_not_waited_for() {
    let reserved = |state| {
        let mut rules = min_free(DISK)(state);
        rules[0].reserved = 5 * state;
        rules
    };
    let lab = Lab::new(reserved).await;
    lab.unused(3).await;
    lab.quota.apply().await;
    let counts = lab.disk.counts.load(Ordering::Relaxed);
    drop(lab.quota.enter().await);
    assert_eq!((lab.left(), lab.disk.counts.load(Ordering::Relaxed)), (3, counts));
}

#[tokio::test(start_paused = true)]
async fn growth_since_the_last_count_is_taken_for_ours_until_it_is_counted() {
    let rule = |state| PruneOptions { all: true, max_used: 50 * state, ..PruneOptions::default() };
    let lab = Lab::new(|state| vec![rule(state)]).await;
    lab.unused(2).await;
    lab.quota.apply().await;
    let counts = lab.disk.counts.load(Ordering::Relaxed);
    drop(lab.quota.enter().await);
    assert_eq!(lab.disk.counts.load(Ordering::Relaxed), counts, "nothing grew");
    lab.disk.others.store(60, Ordering::Relaxed);
    drop(lab.quota.enter().await);
    assert_eq!(lab.left(), 2, "others grew");
    assert!(lab.disk.counts.load(Ordering::Relaxed) > counts);
}

#[tokio::test(start_paused = true)]
async fn the_disk_is_looked_at_while_something_is_written() {
    let lab = Lab::new(min_free(90)).await;
    let writing = lab.quota.enter().await;
    lab.unused(14).await;
    tokio::time::sleep(4 * WATCH).await;
    assert!(lab.left() <= 10, "{} are left", lab.left());
    drop(writing);
    tokio::time::sleep(2 * WATCH).await;
    lab.unused(14).await;
    let left = lab.left();
    tokio::time::sleep(4 * WATCH).await;
    assert_eq!(lab.left(), left, "nothing is written any more");
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_is_made_free_of_what_is_unused_whatever_the_rules_keep() {
    let keep = PruneOptions { reserved: u64::MAX, max_used: u64::MAX, ..PruneOptions::default() };
    let lab = Lab::new(|_| vec![keep]).await;
    lab.unused(5).await;
    let held = lab.states(1).await;
    lab.disk.others.store(DISK - 6, Ordering::Relaxed);
    let writing = lab.quota.enter().await;
    assert!(writing.made_room(&Fault::unknown("another failure")).await.is_none());
    assert!(writing.made_room(&full()).await.is_some_and(|bytes| bytes > 0));
    assert_eq!(lab.left(), 1);
    // Nothing more can go.
    let writing = lab.quota.enter().await;
    assert!(writing.made_room(&full()).await.is_none());
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn without_rules_nothing_goes_ever() {
    let lab = Lab::new(|_| Vec::new()).await;
    lab.unused(5).await;
    lab.disk.others.store(DISK, Ordering::Relaxed);
    let writing = lab.quota.enter().await;
    assert!(writing.made_room(&full()).await.is_none());
    lab.quota.apply().await;
    assert_eq!(lab.left(), 5);
}
