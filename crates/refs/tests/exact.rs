//! What is under a chain ID is what unpacking gives, whatever steps leave; over the fake. As root,
//! as the daemon is.

#![allow(clippy::unwrap_used)]

use shipway_refs::*;
use shipway_storage::{GC_FLAT, Labels, LeaseId, Mount, SnapshotKey, fake::FakeStorage};
use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, chown},
        net::UnixListener,
    },
    path::Path,
};

struct Lab {
    fake: FakeStorage,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { fake: FakeStorage::new().unwrap(), dir: tempfile::tempdir().unwrap() }
    }

    async fn open(&self) -> RefStore {
        RefStore::open(self.fake.storage(), self.dir.path().to_owned()).await.unwrap()
    }
}

/// The directory that a mount of the fake shows.
#[track_caller]
fn dir_of(mounts: &[Mount]) -> &Path {
    let [Mount::Bind(bind)] = mounts else { panic!("not mounts of the fake: {mounts:?}") };
    &bind.source
}

async fn step(
    store: &RefStore,
    parent: Option<&ImmutableRef>,
    change: impl FnOnce(&Path),
) -> ImmutableRef {
    let state = store.mutable(parent, "step", RecordType::Regular, None).await.unwrap();
    let mount = state.mount().await.unwrap();
    change(mount.path());
    mount.unmount().await.unwrap();
    state.commit("step").await.unwrap()
}

/// A file of a whole second, the same always.
fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    let time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
}

async fn chain(state: &ImmutableRef) -> SnapshotKey {
    state.chain_id().await.unwrap().unwrap().into()
}

/// The directory of a committed snapshot.
async fn look<T>(store: &RefStore, name: &SnapshotKey, look: impl FnOnce(&Path) -> T) -> T {
    let lease = LeaseId("look".into());
    let storage = store.storage();
    storage.leases.create(&lease, &Labels::from([(GC_FLAT.into(), "true".into())])).await.unwrap();
    let view = SnapshotKey("look".into());
    let mounts = storage.snapshots.view(&lease, &view, Some(name), &Labels::new()).await.unwrap();
    let seen = look(dir_of(&mounts));
    storage.snapshots.remove(&view).await.unwrap();
    storage.leases.delete(&lease, true).await.unwrap();
    seen
}

fn owner(root: &Path) -> u32 {
    fs::metadata(root).unwrap().uid()
}

async fn shown<T>(state: &ImmutableRef, look: impl FnOnce(&Path) -> T) -> T {
    look(state.mount().await.unwrap().path())
}

#[tokio::test]
async fn steps_with_equal_tars_and_other_roots_do_not_meet() {
    for true_first in [true, false] {
        let lab = Lab::new();
        let store = lab.open().await;
        let base = step(&store, None, |root| write(&root.join("f"), "f")).await;
        let nothing = async || step(&store, Some(&base), |_| {}).await;
        let chown_root =
            async || step(&store, Some(&base), |root| chown(root, Some(1000), None).unwrap()).await;
        let (plain, owned) = if true_first {
            let plain = nothing().await;
            (plain, chown_root().await)
        } else {
            let owned = chown_root().await;
            (nothing().await, owned)
        };
        assert_eq!(
            (shown(&plain, owner).await, shown(&owned, owner).await),
            (0, 1000),
            "true first: {true_first}"
        );
        assert_eq!(look(&store, &chain(&plain).await, owner).await, 0);
        // The image has what a layer can tell, and others find under its name what they would
        // unpack.
        assert_ne!(chain(&plain).await, chain(&owned).await);
        assert!(store.storage().snapshots.stat(&chain(&owned).await).await.is_err());
        let top = step(&store, Some(&owned), |root| {
            assert_eq!(owner(root), 1000, "steps go on from what was left");
            write(&root.join("x"), "x");
        })
        .await;
        assert_eq!(top.layers().await.unwrap().len(), 3);
        top.unpack(Compression::default(), None).await.unwrap();
        for state in [&owned, &top] {
            assert_eq!(
                look(&store, &chain(state).await, owner).await,
                0,
                "true first: {true_first}"
            );
        }
        assert_eq!(
            look(&store, &chain(&top).await, |r| fs::read_to_string(r.join("x")).unwrap()).await,
            "x"
        );
        assert_eq!(shown(&top, owner).await, 1000);
    }
}

#[tokio::test]
async fn what_no_layer_tells_survives_a_restart_and_leaves_nothing_when_pruned() {
    let lab = Lab::new();
    let store = lab.open().await;
    let before = lab.fake.count();
    let has_socket = |root: &Path| root.join("socket").exists();
    let base =
        step(&store, None, |root| drop(UnixListener::bind(root.join("socket")).unwrap())).await;
    let top = step(&store, Some(&base), |root| write(&root.join("x"), "x")).await;
    let (id, layers, name) = (top.id().clone(), top.layers().await.unwrap(), chain(&top).await);
    top.unpack(Compression::default(), None).await.unwrap();
    drop((base, top));
    store.drained().await;
    drop(store);

    let store = lab.open().await;
    lab.fake.gc();
    let top = store.get(&id).await.expect("the record survives");
    assert!(shown(&top, has_socket).await);
    assert_eq!(
        top.layers().await.unwrap().iter().map(|l| l.diff_id).collect::<Vec<_>>(),
        layers.iter().map(|l| l.diff_id).collect::<Vec<_>>()
    );
    assert!(!look(&store, &name, has_socket).await);
    let more = step(&store, Some(&top), |root| write(&root.join("y"), "y")).await;
    assert!(shown(&more, has_socket).await);
    let du = store.usage().await.unwrap();
    assert_eq!(du.len(), 4, "two steps, what was unpacked, and one step more: {du:?}");
    drop((top, more));
    store.drained().await;
    store.prune(PruneOptions { all: true, ..Default::default() }, &|_| {}).await.unwrap();
    lab.fake.gc();
    let after = lab.fake.count();
    assert_eq!(
        (after.snapshots, after.blobs, after.leases),
        (before.snapshots, before.blobs, before.leases)
    );
}

#[tokio::test]
async fn equal_steps_on_what_no_layer_tells_are_one() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base =
        step(&store, None, |root| drop(UnixListener::bind(root.join("socket")).unwrap())).await;
    let one = step(&store, Some(&base), |root| write(&root.join("x"), "x")).await;
    let count = lab.fake.count().snapshots;
    let other = step(&store, Some(&base), |root| write(&root.join("x"), "x")).await;
    assert_eq!(chain(&one).await, chain(&other).await);
    store.drained().await;
    assert_eq!(lab.fake.count().snapshots, count);
    // The same layers as an image are another thing.
    let blobs = one.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
    let lazy = blobs.iter().map(|b| LazyLayer {
        diff_id: b.diff_id,
        descriptor: b.descriptor.clone(),
        source: None,
        created: None,
    });
    let image = store.image(lazy.collect(), "image", RecordType::Regular).await.unwrap();
    assert!(
        !shown(&image, |root| root.join("socket").exists()).await
            && shown(&one, |root| root.join("socket").exists()).await
    );
}

#[tokio::test]
async fn contents_are_compared_where_nothing_else_differs() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, |root| write(&root.join("f"), "good")).await;
    let same = step(&store, Some(&base), |_| {}).await;
    let other = step(&store, Some(&base), |root| write(&root.join("f"), "evil")).await;
    assert_ne!(chain(&same).await, chain(&other).await);
    assert_eq!(shown(&same, |root| fs::read_to_string(root.join("f")).unwrap()).await, "good");
    assert_eq!(shown(&other, |root| fs::read_to_string(root.join("f")).unwrap()).await, "evil");
}

#[tokio::test]
async fn what_another_version_committed_is_not_taken_for_a_step() {
    for before_start in [true, false] {
        let (probe, lab) = (Lab::new(), Lab::new());
        let write_x = |root: &Path| write(&root.join("x"), "x");
        let name = chain(&step(&probe.open().await, None, write_x).await).await;

        let poison = async |labels: Labels| {
            let storage = lab.fake.storage();
            let (lease, key) = (LeaseId("theirs".into()), SnapshotKey("theirs".into()));
            storage.leases.create(&lease, &Labels::new()).await.unwrap();
            let mounts =
                storage.snapshots.prepare(&lease, &key, None, &Labels::new()).await.unwrap();
            write_x(dir_of(&mounts));
            chown(dir_of(&mounts), Some(1000), None).unwrap();
            storage.snapshots.commit(&lease, &name, &key, &labels).await.unwrap();
        };
        let old = Labels::from([("shipway/exact".to_owned(), "0".to_owned())]);
        let store = if before_start {
            poison(old).await;
            lab.open().await
        } else {
            let store = lab.open().await;
            poison(old).await;
            store
        };
        let state = step(&store, None, write_x).await;
        assert_eq!(
            (shown(&state, owner).await, chain(&state).await),
            (0, name.clone()),
            "before the start: {before_start}"
        );
        let top = step(&store, Some(&state), |root| write(&root.join("y"), "y")).await;
        assert_eq!(shown(&top, owner).await, 0);
        // An image of the same layer is unpacked anew.
        let blobs = state.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
        let layer = LazyLayer {
            diff_id: blobs[0].diff_id,
            descriptor: blobs[0].descriptor.clone(),
            source: None,
            created: None,
        };
        let image = store.image(vec![layer], "image", RecordType::Regular).await.unwrap();
        assert_eq!(shown(&image, owner).await, 0);
        let ids = [state.id().clone(), top.id().clone()];
        drop((state, top, image));
        store.drained().await;
        drop(store);
        let store = lab.open().await;
        for id in ids {
            assert_eq!(shown(&store.get(&id).await.expect("the record survives"), owner).await, 0);
        }
    }
}

#[tokio::test]
async fn what_was_unpacked_by_others_is_as_good() {
    let (probe, lab) = (Lab::new(), Lab::new());
    let name =
        chain(&step(&probe.open().await, None, |root| write(&root.join("x"), "x")).await).await;
    let storage = lab.fake.storage();
    let (lease, key) = (LeaseId("theirs".into()), SnapshotKey("theirs".into()));
    storage.leases.create(&lease, &Labels::new()).await.unwrap();
    let mounts = storage.snapshots.prepare(&lease, &key, None, &Labels::new()).await.unwrap();
    write(&dir_of(&mounts).join("x"), "x");
    storage
        .snapshots
        .commit(
            &lease,
            &name,
            &key,
            &Labels::from([("containerd.io/snapshot.ref".into(), "x".into())]),
        )
        .await
        .unwrap();
    let store = lab.open().await;
    let before = lab.fake.count().snapshots;
    let state = step(&store, None, |root| write(&root.join("x"), "x")).await;
    store.drained().await;
    assert_eq!((lab.fake.count().snapshots, chain(&state).await), (before, name));
}

#[tokio::test]
async fn merges_take_what_layers_tell() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, |root| {
        write(&root.join("b"), "b");
        chown(root, Some(1000), None).unwrap();
    })
    .await;
    let added = step(&store, None, |root| {
        write(&root.join("a"), "a");
        drop(UnixListener::bind(root.join("socket")).unwrap());
        fs::hard_link(root.join("a"), root.join("again")).unwrap();
    })
    .await;
    let merged = store.merge(&[base.clone(), added.clone()], "merge").await.unwrap();
    let seen = shown(&merged, |root| {
        assert_eq!(fs::metadata(root.join("a")).unwrap().nlink(), 2);
        (owner(root), root.join("b").exists(), root.join("socket").exists())
    });
    assert_eq!(
        seen.await,
        (1000, true, false),
        "the base is what it was, and of the other its layer is added"
    );
    // On something else it is as if it had been unpacked there, under the chain ID.
    let other = step(&store, None, |root| write(&root.join("o"), "o")).await;
    let onto = store.merge(&[other, added], "merge").await.unwrap();
    onto.materialize(None).await.unwrap();
    let seen = look(&store, &chain(&onto).await, |root| {
        (owner(root), root.join("a").exists(), root.join("socket").exists())
    })
    .await;
    assert_eq!(seen, (0, true, false));
    // A file that whoever unpacks takes for a whiteout.
    let named = step(&store, None, |root| write(&root.join(".wh.b"), "")).await;
    let gone = store.merge(&[base, named], "merge").await.unwrap();
    assert_eq!(
        shown(&gone, |root| (root.join("b").exists(), root.join(".wh.b").exists())).await,
        (false, false)
    );
}
