//! Layers with a table of contents: made of states whose own layers stay what they are, found
//! again, and unpacked where an image needs them. As root, as the daemon is.

#![allow(clippy::unwrap_used)]

use shipway_oci::{ChainId, Descriptor};
use shipway_refs::*;
use shipway_storage::{Labels, LeaseId, Mount, SnapshotKey, UNCOMPRESSED, fake::FakeStorage};
use std::{fs, num::NonZero, path::Path};

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

fn compression(kind: CompressionKind) -> Compression {
    Compression { kind, ..Compression::default() }
}

fn forced(kind: CompressionKind) -> Compression {
    Compression { force: true, ..compression(kind) }
}

const TOC: &str = "containerd.io/snapshot/stargz/toc.digest";
const ESTARGZ: CompressionKind = CompressionKind::Estargz;
const CHUNKED: CompressionKind = CompressionKind::ZstdChunked(Dialect::Containerd);

async fn written(store: &RefStore, parent: Option<&ImmutableRef>, name: &str) -> MutableRef {
    let state = store.mutable(parent, "step", RecordType::Regular, None).await.unwrap();
    let mount = state.mount().await.unwrap();
    let path = mount.path().join(name);
    fs::write(&path, name.repeat(1000)).unwrap();
    let time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty()).unwrap();
    mount.unmount().await.unwrap();
    state
}

async fn step(store: &RefStore, parent: Option<&ImmutableRef>, name: &str) -> ImmutableRef {
    written(store, parent, name).await.commit("step").await.unwrap()
}

async fn blobs(state: &ImmutableRef, compression: Compression) -> Vec<LayerBlob> {
    state.blobs(compression, Fetch::Everything, None).await.unwrap()
}

fn kinds(blobs: &[LayerBlob]) -> Vec<CompressionKind> {
    blobs.iter().map(|b| CompressionKind::of(&b.descriptor).unwrap()).collect()
}

fn chain(blobs: &[LayerBlob]) -> SnapshotKey {
    ChainId::of(blobs.iter().map(|b| b.diff_id)).unwrap().into()
}

/// The names in a committed snapshot.
async fn names(store: &RefStore, snapshot: &SnapshotKey) -> Vec<String> {
    let lease = LeaseId("look".into());
    let (storage, view) = (store.storage(), SnapshotKey("look".into()));
    storage.leases.create(&lease, &Labels::new()).await.unwrap();
    let mounts =
        storage.snapshots.view(&lease, &view, Some(snapshot), &Labels::new()).await.unwrap();
    let [Mount::Bind(bind)] = &mounts[..] else { panic!("not mounts of the fake: {mounts:?}") };
    let list = |dir: &Path| fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<String> =
        list(&bind.source).map(|name| name.into_string().unwrap()).collect();
    names.sort();
    storage.snapshots.remove(&view).await.unwrap();
    storage.leases.delete(&lease, true).await.unwrap();
    names
}

#[tokio::test]
async fn a_table_of_contents_changes_the_blob_and_not_the_state() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, "one").await;
    let top = step(&store, Some(&base), "two").await;
    let layers = top.layers().await.unwrap();
    let estargz = blobs(&top, compression(ESTARGZ)).await;
    assert_eq!(kinds(&estargz), [ESTARGZ, ESTARGZ]);
    for (blob, layer) in estargz.iter().zip(&layers) {
        assert_ne!(blob.diff_id, layer.diff_id, "the table is behind the tar");
        let info = store.storage().content.info(blob.descriptor.digest).await.unwrap();
        assert_eq!(info.labels[UNCOMPRESSED], blob.diff_id.to_string());
        assert!(blob.descriptor.annotations.contains_key(TOC));
    }
    let same = |a: &[Layer], b: &[Layer]| {
        a.iter().zip(b).all(|(a, b)| (a.diff_id, a.chain_id) == (b.diff_id, b.chain_id))
    };
    assert!(same(&layers, &top.layers().await.unwrap()), "the state is what it was");
    // Asked for again, nothing is made; asked for with other options, it is.
    let count = lab.fake.count().blobs;
    assert_eq!(blobs(&top, compression(ESTARGZ)).await, estargz);
    assert_eq!(blobs(&top, forced(ESTARGZ)).await, estargz);
    assert_eq!(lab.fake.count().blobs, count);
    let small = Compression { chunk_size: NonZero::new(512), ..compression(ESTARGZ) };
    assert_ne!(blobs(&top, small).await, estargz);
    // What has no table yet is not wanted in its place, and an ordinary layer is made beside it.
    let gzip = blobs(&top, Compression::default()).await;
    assert_eq!(kinds(&gzip), [CompressionKind::Gzip; 2]);
    assert!(gzip.iter().zip(&layers).all(|(blob, layer)| blob.diff_id == layer.diff_id));
    // Now there is one, which does unless something else is demanded.
    assert_eq!(kinds(&blobs(&top, compression(CHUNKED)).await), [CompressionKind::Gzip; 2]);
    let chunked = blobs(&top, forced(CHUNKED)).await;
    assert_eq!(kinds(&chunked), [CHUNKED; 2]);
    assert!(chunked.iter().zip(&layers).all(|(blob, layer)| blob.diff_id == layer.diff_id));
    // zstd with an index is zstd.
    assert_eq!(blobs(&top, forced(CompressionKind::Zstd)).await, chunked);
}

#[tokio::test]
async fn what_was_made_is_found_by_the_next_run() {
    let lab = Lab::new();
    let store = lab.open().await;
    let top = step(&store, Some(&step(&store, None, "one").await), "two").await;
    let (estargz, chunked) =
        (blobs(&top, compression(ESTARGZ)).await, blobs(&top, forced(CHUNKED)).await);
    let id = top.id().clone();
    drop(top);
    store.drained().await;
    drop(store);

    let store = lab.open().await;
    lab.fake.gc();
    let top = store.get(&id).await.unwrap();
    let count = lab.fake.count().blobs;
    assert_eq!(count, 4, "each with the lease of its state");
    assert_eq!(blobs(&top, compression(ESTARGZ)).await, estargz);
    assert_eq!(blobs(&top, forced(CHUNKED)).await, chunked);
    assert_eq!(lab.fake.count().blobs, count);
    // And made again when it is gone.
    drop(top);
    store.drained().await;
    store.prune(PruneOptions { all: true, ..Default::default() }, &|_| {}).await.unwrap();
    lab.fake.gc();
    assert_eq!(lab.fake.count().blobs, 0);
    let top = step(&store, Some(&step(&store, None, "one").await), "two").await;
    assert_eq!(blobs(&top, compression(ESTARGZ)).await, estargz);
}

#[tokio::test]
async fn a_layer_gets_its_table_as_it_is_committed() {
    let lab = Lab::new();
    let store = lab.open().await;
    let later = blobs(&step(&store, None, "one").await, compression(ESTARGZ)).await;
    store.drained().await;
    let lab = Lab::new();
    let store = lab.open().await;
    let state = written(&store, None, "one").await;
    let state = state.commit_packed("step", compression(ESTARGZ)).await.unwrap();
    let count = lab.fake.count();
    assert_eq!(count.blobs, 1);
    store.drained().await;
    lab.fake.gc();
    assert_eq!(blobs(&state, compression(ESTARGZ)).await, later);
    assert_eq!(lab.fake.count().blobs, 1, "nothing was packed again");
    state.materialize(None).await.unwrap();
}

#[tokio::test]
async fn an_image_with_other_tars_is_there_under_their_names() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, "one").await;
    let gzip = blobs(&base, Compression::default()).await;
    let top = step(&store, Some(&base), "two").await;
    let want = compression(ESTARGZ);
    // A base that is there already stays plain; what is new on it is not.
    let mixed = blobs(&top, want).await;
    assert_eq!(kinds(&mixed), [CompressionKind::Gzip, ESTARGZ]);
    assert_eq!(mixed[0], gzip[0]);
    let exists = async |name: &SnapshotKey| store.storage().snapshots.stat(name).await.is_ok();
    assert!(!exists(&chain(&mixed)).await);
    top.unpack(want, None).await.unwrap();
    assert_eq!(names(&store, &chain(&mixed)).await, ["one", "two"]);
    let all = blobs(&top, forced(ESTARGZ)).await;
    assert_eq!(kinds(&all), [ESTARGZ; 2]);
    top.unpack(forced(ESTARGZ), None).await.unwrap();
    assert_eq!(names(&store, &chain(&all)).await, ["one", "two"]);
    // zstd:chunked is the layer itself.
    store.drained().await;
    let snapshots = lab.fake.count().snapshots;
    top.unpack(forced(CHUNKED), None).await.unwrap();
    store.drained().await;
    assert_eq!(lab.fake.count().snapshots, snapshots);
}

#[tokio::test]
async fn a_base_that_has_a_table_is_left_alone() {
    let lab = Lab::new();
    let store = lab.open().await;
    let made = blobs(&step(&store, None, "one").await, compression(ESTARGZ)).await;
    let layers = |blobs: &[LayerBlob]| -> Vec<LazyLayer> {
        let lazy = |b: &LayerBlob| LazyLayer {
            diff_id: b.diff_id,
            descriptor: b.descriptor.clone(),
            source: None,
            created: None,
        };
        blobs.iter().map(lazy).collect()
    };
    let image = store.image(layers(&made), "image", RecordType::Regular).await.unwrap();
    for kind in [ESTARGZ, CompressionKind::Gzip] {
        assert_eq!(blobs(&image, forced(kind)).await, made, "{kind}");
    }
    // As something else, its files are there without the table, and in a tar of their own.
    let chunked = blobs(&image, forced(CHUNKED)).await;
    assert_eq!(kinds(&chunked), [CHUNKED]);
    assert_ne!(chunked[0].diff_id, made[0].diff_id);
    image.unpack(forced(CHUNKED), None).await.unwrap();
    assert_eq!(names(&store, &chain(&chunked)).await, ["one"]);
    // Nobody said that it has one.
    let plain = made[0].clone();
    let descriptor = Descriptor { annotations: Default::default(), ..plain.descriptor };
    let plain = [LayerBlob { descriptor, ..plain }];
    let image = store.image(layers(&plain), "other", RecordType::Regular).await.unwrap();
    assert_eq!(
        blobs(&image, Compression::default()).await[0].descriptor.digest,
        made[0].descriptor.digest
    );
}

#[tokio::test]
async fn layers_with_changed_times_get_their_table_at_once() {
    let lab = Lab::new();
    let store = lab.open().await;
    let top = step(&store, Some(&step(&store, None, "one").await), "two").await;
    let base = [top.layers().await.unwrap()[0].diff_id];
    for kind in [ESTARGZ, CHUNKED] {
        let retimed = top.retimed(&base, 1000, compression(kind), None).await.unwrap();
        let found = blobs(&retimed, compression(kind)).await;
        assert_eq!(kinds(&found), [CompressionKind::Gzip, kind]);
        assert_eq!(found[1].diff_id, retimed.layers().await.unwrap()[1].diff_id);
        retimed.materialize(None).await.unwrap();
        assert_eq!(names(&store, &chain(&found)).await, ["one", "two"]);
        assert_eq!(kinds(&blobs(&retimed, forced(kind)).await), [kind; 2]);
    }
}
