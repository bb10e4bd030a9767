//! What a run of the daemon takes over of an earlier one, over the fake that loses at once whatever
//! nothing keeps.

#![allow(clippy::unwrap_used)]

use shipway_refs::*;
use shipway_storage::{LeaseId, SnapshotKey, fake::FakeStorage};
use std::{fs, path::Path};

struct Lab {
    fake: FakeStorage,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { fake: FakeStorage::new().unwrap(), dir: tempfile::tempdir().unwrap() }
    }

    /// A run of the daemon that takes over `left`.
    async fn run(&self, left: &[Vec<SnapshotKey>]) -> (RefStore, Vec<Option<Inherited>>) {
        let (storage, root) = (self.fake.storage(), self.dir.path().to_owned());
        let opened = RefStore::open_inheriting(storage, root, &NoOrigins, left).await.unwrap();
        self.fake.gc();
        opened
    }

    async fn has(&self, key: &SnapshotKey) -> bool {
        self.fake.gc();
        self.fake.storage().snapshots.stat(key).await.is_ok()
    }

    async fn leases(&self) -> Vec<LeaseId> {
        let leases = self.fake.storage().leases.list(&[]).await.unwrap();
        leases.into_iter().map(|lease| lease.id).collect()
    }
}

/// The same file always, times included.
fn write_old(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    let time = fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
    fs::File::open(path).unwrap().set_times(time).unwrap();
}

async fn begin(store: &RefStore, parent: Option<&ImmutableRef>) -> MutableRef {
    store.mutable(parent, "step", RecordType::Regular, None).await.unwrap()
}

async fn write(state: &MutableRef, name: &str) {
    let mount = state.mount().await.unwrap();
    write_old(&mount.path().join(name), name);
    mount.unmount().await.unwrap();
}

async fn resume(
    store: &RefStore,
    from: &mut Inherited,
    key: &SnapshotKey,
    parent: Option<&ImmutableRef>,
) -> shipway_fault::Result<MutableRef> {
    store.resume(from, key, parent, "step", RecordType::Regular).await
}

/// The daemon is killed: nothing is given back.
fn killed<T>(held: T) {
    std::mem::forget(held);
}

#[tokio::test]
async fn a_state_that_was_being_written_is_gone_on_with_and_is_what_it_would_have_been() {
    let lab = Lab::new();
    let (store, _) = lab.run(&[]).await;
    let base = begin(&store, None).await;
    write(&base, "base").await;
    let base = base.commit("base").await.unwrap();
    let whole = begin(&store, Some(&base)).await;
    write(&whole, "one").await;
    write(&whole, "two").await;
    let expected = whole.commit("step").await.unwrap().chain_id().await.unwrap();
    let (base_id, base_name) = (base.id().clone(), base.snapshot_name().unwrap().clone());

    let step = begin(&store, Some(&base)).await;
    write(&step, "one").await;
    let (view, other) = (base.view().await.unwrap(), begin(&store, Some(&base)).await);
    let (key, lost) = (step.snapshot_key().clone(), other.snapshot_key().clone());
    let keys: Vec<SnapshotKey> =
        [key.clone(), base_name].into_iter().chain(view.key.clone()).collect();
    killed((step, view, other, base));
    drop(store);

    // Twice: the second run takes over what the first one took over.
    let (store, inherited) = lab.run(std::slice::from_ref(&keys)).await;
    killed((inherited, store));
    let (store, mut inherited) = lab.run(&[keys]).await;
    let mut inherited = inherited.pop().flatten().expect("all of it is there");
    assert!(lab.has(&key).await && !lab.has(&lost).await);
    let base = store.get(&base_id).await.unwrap();
    let step = resume(&store, &mut inherited, &key, Some(&base)).await.unwrap();
    write(&step, "two").await;
    let made = step.commit("step").await.unwrap();
    assert_eq!(made.chain_id().await.unwrap(), expected);
    drop((made, base, inherited));
    store.drained().await;
    assert!(!lab.has(&key).await);
    let run_leases = lab.leases().await.into_iter().filter(|l| l.0.contains("epoch")).count();
    assert_eq!(run_leases, 0, "nothing is in it");
}

#[tokio::test]
async fn what_nobody_goes_on_with_vanishes() {
    let lab = Lab::new();
    let (store, _) = lab.run(&[]).await;
    let (one, two) = (begin(&store, None).await, begin(&store, None).await);
    let keys = [one.snapshot_key().clone(), two.snapshot_key().clone()];
    killed((one, two));
    drop(store);
    let gone = SnapshotKey("shipway-step-gone".into());
    let left = [vec![keys[0].clone()], vec![keys[1].clone(), gone]];
    let (store, inherited) = lab.run(&left).await;
    assert!(inherited[0].is_some() && inherited[1].is_none(), "one of them is not whole");
    store.drained().await;
    assert!(lab.has(&keys[0]).await && !lab.has(&keys[1]).await);
    drop(inherited);
    store.drained().await;
    assert!(!lab.has(&keys[0]).await);
    assert!(lab.leases().await.is_empty());
}

#[tokio::test]
async fn a_state_is_on_what_it_was_on_or_not_gone_on_with() {
    let lab = Lab::new();
    let (store, _) = lab.run(&[]).await;
    let base = begin(&store, None).await;
    write(&base, "base").await;
    let base = base.commit("base").await.unwrap();
    let id = base.id().clone();
    let step = begin(&store, Some(&base)).await;
    let key = step.snapshot_key().clone();
    killed((step, base));
    drop(store);
    let (store, mut inherited) = lab.run(&[vec![key.clone()]]).await;
    let mut inherited = inherited.pop().flatten().unwrap();
    assert!(resume(&store, &mut inherited, &key, None).await.is_err());
    let base = store.get(&id).await.unwrap();
    assert!(resume(&store, &mut inherited, &key, Some(&base)).await.is_ok());
    // Once.
    assert!(resume(&store, &mut inherited, &key, Some(&base)).await.is_err());
}

#[tokio::test]
async fn a_cache_mount_is_held_as_it_was() {
    let lab = Lab::new();
    let (store, _) = lab.run(&[]).await;
    let request = |sharing| NamedRequest {
        record_type: RecordType::CacheMount,
        key: "cache".into(),
        description: "cache".into(),
        sharing,
        parent: None,
    };
    let id = store.named(request(Sharing::Locked)).await.unwrap().id().clone();
    drop(store);
    let (store, _) = lab.run(&[]).await;
    let held = store.named_again(&id, Sharing::Locked).await.unwrap().expect("it is free");
    assert_eq!(held.id(), &id);
    assert!(store.named_again(&id, Sharing::Shared).await.unwrap().is_none());
    let other = store.named(request(Sharing::Private)).await.unwrap();
    assert_ne!(other.id(), &id);
    drop(held);
    assert!(store.named_again(&id, Sharing::Shared).await.unwrap().is_some());
}
