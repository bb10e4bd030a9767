//! Lives of states, over the fake that loses at once whatever nothing keeps.

#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use shipway_fault::{Fault, Result};
use shipway_oci::{DiffId, Digest};
use shipway_progress::{Event, Journal, Reporter};
use shipway_refs::*;
use shipway_storage::{BlobReader, ContentStore, LeaseId, fake::FakeStorage};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
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

impl Lab {
    /// Opens the store in the life of the machine that is called `boot`.
    async fn boot(&self, boot: &str) -> RefStore {
        RefStore::open_in_boot(self.fake.storage(), self.dir.path().to_owned(), boot).await.unwrap()
    }

    async fn names(&self) -> Vec<String> {
        self.fake.gc();
        self.fake
            .storage()
            .snapshots
            .list(&[])
            .await
            .unwrap()
            .into_iter()
            .map(|s| s.key.0)
            .collect()
    }
}

/// A state with one file on top of `parent`.
async fn step(
    store: &RefStore,
    parent: Option<&ImmutableRef>,
    name: &str,
    text: &str,
) -> ImmutableRef {
    let state =
        store.mutable(parent, format!("step {name}"), RecordType::Regular, None).await.unwrap();
    let mount = state.mount().await.unwrap();
    write_old(&mount.path().join(name), text);
    mount.unmount().await.unwrap();
    state.commit(format!("wrote {name}")).await.unwrap()
}

/// The same file always, times included.
fn write_old(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    let time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
}

async fn read(state: &ImmutableRef, name: &str) -> Option<String> {
    let mount = state.mount().await.unwrap();
    fs::read_to_string(mount.path().join(name)).ok()
}

#[tokio::test]
async fn a_commit_has_the_chain_id_as_its_name_and_outlives_the_store() {
    let lab = Lab::new();
    let store = lab.open().await;
    let one = step(&store, None, "one", "1").await;
    let two = step(&store, Some(&one), "two", "2").await;
    let layers = two.layers().await.unwrap();
    assert_eq!(
        two.chain_id().await.unwrap(),
        shipway_oci::ChainId::of(layers.iter().map(|l| l.diff_id))
    );
    let name = two.chain_id().await.unwrap().unwrap().into();
    assert!(store.storage().snapshots.stat(&name).await.is_ok());
    let again = step(&store, Some(&one), "two", "2").await;
    assert_eq!(again.chain_id().await.unwrap(), two.chain_id().await.unwrap());
    assert_eq!(two.parent().unwrap().id(), one.id());
    let id = two.id().clone();
    drop((one, two, again));
    store.drained().await;
    let after = lab.fake.count();
    drop(store);

    let store = lab.open().await;
    lab.fake.gc();
    let two = store.get(&id).await.expect("the record survives");
    assert_eq!(read(&two, "one").await.as_deref(), Some("1"));
    assert_eq!(two.layers().await.unwrap(), layers);
    drop(two);
    store.drained().await;
    let now = lab.fake.count();
    assert_eq!((now.snapshots, now.blobs), (after.snapshots, after.blobs));
}

#[tokio::test]
async fn what_is_dropped_leaves_nothing_behind() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, "one", "1").await;
    store.drained().await;
    let before = lab.fake.count();
    let state = store.mutable(Some(&base), "never", RecordType::Regular, None).await.unwrap();
    drop(state);
    drop(base.view().await.unwrap());
    base.checksum(&Selector::path("/")).await.unwrap();
    let released = store.mutable(None, "never", RecordType::Regular, None).await.unwrap();
    released.release().await.unwrap();
    store.drained().await;
    assert_eq!(lab.fake.count(), before);
}

struct Registry {
    id: LayerSourceId,
    blobs: Vec<bytes::Bytes>,
    fetched: AtomicUsize,
}

#[async_trait]
impl LayerSource for Registry {
    fn id(&self) -> LayerSourceId {
        self.id
    }

    async fn fetch(
        &self,
        layer: &shipway_oci::Descriptor,
        content: &dyn ContentStore,
        lease: &LeaseId,
        _progress: Option<&Reporter>,
    ) -> Result<()> {
        self.fetched.fetch_add(1, Ordering::SeqCst);
        let blob = self
            .blobs
            .iter()
            .find(|b| Digest::of(b) == layer.digest)
            .ok_or_else(|| Fault::not_found("blob unknown"))?;
        content.put(lease, blob.clone(), &Default::default()).await.map(drop)
    }

    async fn open(&self, layer: &shipway_oci::Descriptor) -> Result<Box<dyn BlobReader>> {
        Err(Fault::unimplemented(format!("passing {} on", layer.digest)))
    }

    fn describe(&self) -> String {
        "example.org/app:1".into()
    }
}

/// Layers of a state as an image in a registry would have them.
async fn published(state: &ImmutableRef, store: &RefStore) -> (Vec<LayerBlob>, Arc<Registry>) {
    let layers = state.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
    let mut blobs = Vec::new();
    for layer in &layers {
        blobs.push(
            store.storage().content.read_all(layer.descriptor.digest, 1 << 20).await.unwrap(),
        );
    }
    (layers, Arc::new(Registry { id: LayerSourceId::next(), blobs, fetched: AtomicUsize::new(0) }))
}

fn lazy(layers: &[LayerBlob], source: &Arc<Registry>) -> Vec<LazyLayer> {
    layers
        .iter()
        .map(|l| LazyLayer {
            diff_id: l.diff_id,
            descriptor: l.descriptor.clone(),
            source: Some(source.clone()),
            created: None,
        })
        .collect()
}

#[tokio::test]
async fn an_image_is_fetched_when_somebody_needs_it_and_once() {
    let there = Lab::new();
    let origin = there.open().await;
    let one = step(&origin, None, "one", "1").await;
    let (layers, source) = published(&step(&origin, Some(&one), "two", "2").await, &origin).await;

    let lab = Lab::new();
    let store = lab.open().await;
    let image = store
        .image(lazy(&layers, &source), "pulled from example", RecordType::Regular)
        .await
        .unwrap();
    let same =
        store.image(lazy(&layers, &source), "pulled again", RecordType::Regular).await.unwrap();
    assert_eq!(image.id(), same.id());
    assert!(image.layers().await.unwrap().iter().all(|l| l.lazy));
    let from = Some("example.org/app:1".to_owned());
    let unfetched: Vec<LayerBlob> =
        layers.iter().map(|l| LayerBlob { lazy: from.clone(), ..l.clone() }).collect();
    assert_eq!(image.blobs(Compression::default(), Fetch::Nothing, None).await.unwrap(), unfetched);
    assert_eq!(source.fetched.load(Ordering::SeqCst), 0);
    let (a, b) = tokio::join!(image.materialize(None), same.materialize(None));
    a.and(b).unwrap();
    assert_eq!(source.fetched.load(Ordering::SeqCst), 2);
    assert_eq!(read(&image, "one").await.as_deref(), Some("1"));
    let child = step(&store, Some(&image), "three", "3").await;
    assert_eq!(
        child.blobs(Compression::default(), Fetch::Everything, None).await.unwrap()[..2],
        layers
    );
    lab.fake.gc();
    assert_eq!(read(&child, "two").await.as_deref(), Some("2"));
}

#[tokio::test]
async fn a_fetch_is_told_of_by_the_vertex_that_the_image_comes_from() {
    let there = Lab::new();
    let origin = there.open().await;
    let (layers, source) = published(&step(&origin, None, "one", "1").await, &origin).await;
    let store = Lab::new().open().await;
    let image = store
        .image(lazy(&layers, &source), "pulled from example", RecordType::Regular)
        .await
        .unwrap();
    let journal = Journal::new();
    let (from, run) =
        (journal.reporter(Digest::of("from"), "FROM"), journal.reporter(Digest::of("run"), "RUN"));
    from.started();
    from.completed(None);
    image.reported_by(&from);
    image.clone().materialize(Some(&run)).await.unwrap();
    let starts: Vec<bool> = journal
        .events()
        .iter()
        .filter_map(|e| match e {
            Event::Vertex(v) if v.digest == from.digest() => {
                v.started.map(|_| v.completed.is_some())
            }
            _ => None,
        })
        .collect();
    assert_eq!(starts, [false, true, false, true], "it works twice");
    let spoke = |r: &Reporter| {
        journal.events().iter().any(|e| matches!(e, Event::Status(s) if s.vertex == r.digest()))
    };
    assert!(spoke(&from) && !spoke(&run));
}

#[tokio::test]
async fn a_layer_that_is_not_what_the_config_says_is_refused() {
    let there = Lab::new();
    let origin = there.open().await;
    let (mut layers, source) = published(&step(&origin, None, "one", "1").await, &origin).await;
    layers[0].diff_id = DiffId(Digest::of("something else"));
    let lab = Lab::new();
    let store = lab.open().await;
    let image = store
        .image(lazy(&layers, &source), "pulled from example.org/app:1", RecordType::Regular)
        .await
        .unwrap();
    let refused = image.materialize(None).await.unwrap_err().to_string();
    assert!(
        refused.contains("(pulled from example.org/app:1): ") && refused.contains("promises"),
        "{refused}"
    );
    // Another image of the same layers is told by its own name.
    let other = store
        .image(lazy(&layers, &source), "pulled from example.org/other:2", RecordType::Regular)
        .await
        .unwrap();
    let refused = other.materialize(None).await.unwrap_err().to_string();
    assert!(refused.contains("other:2") && !refused.contains("app:1"), "{refused}");
    drop((image, other));
    store.drained().await;
    assert_eq!(lab.fake.count().snapshots, 0);
}

#[tokio::test]
async fn blobs_are_made_once_found_again_and_changed_on_demand() {
    let lab = Lab::new();
    let store = lab.open().await;
    let state = step(&store, None, "one", "1").await;
    state.start_compression(Compression::default(), std::future::pending());
    let gzip = state.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
    let zstd = Compression { kind: CompressionKind::Zstd, ..Default::default() };
    assert_eq!(
        state.blobs(zstd, Fetch::Everything, None).await.unwrap(),
        gzip,
        "what is there is used"
    );
    let forced =
        state.blobs(Compression { force: true, ..zstd }, Fetch::Everything, None).await.unwrap();
    assert_eq!(
        CompressionKind::of_media_type(&forced[0].descriptor.media_type),
        Some(CompressionKind::Zstd)
    );
    // What nobody wants any more is not made.
    let unwanted = step(&store, None, "two", "2").await;
    let before = lab.fake.count().blobs;
    unwanted.start_compression(Compression::default(), std::future::ready(()));
    drop(unwanted);
    let id = state.id().clone();
    drop(state);
    store.drained().await;
    assert_eq!(lab.fake.count().blobs, before);
    drop(store);
    let store = lab.open().await;
    lab.fake.gc();
    let state = store.get(&id).await.unwrap();
    let blobs = lab.fake.count().blobs;
    assert_eq!(state.blobs(Compression::default(), Fetch::Everything, None).await.unwrap(), gzip);
    assert_eq!(lab.fake.count().blobs, blobs);
}

#[tokio::test]
async fn a_layer_packed_at_its_commit_is_the_one_packed_later() {
    let lab = Lab::new();
    let store = lab.open().await;
    let later = step(&store, None, "one", "1")
        .await
        .blobs(Compression::default(), Fetch::Everything, None)
        .await
        .unwrap();
    store.drained().await;

    let lab = Lab::new();
    let store = lab.open().await;
    let write = async |name: &str| {
        let state = store.mutable(None, "step", RecordType::Regular, None).await.unwrap();
        let mount = state.mount().await.unwrap();
        write_old(&mount.path().join(name), "1");
        mount.unmount().await.unwrap();
        state
    };
    let state = write("one").await.commit_packed("wrote", Compression::default()).await.unwrap();
    let blobs = lab.fake.count().blobs;
    assert_eq!(blobs, 1);
    // Only the state keeps it: the lease that outlives states has nothing left.
    store.drained().await;
    lab.fake.gc();
    assert_eq!(state.blobs(Compression::default(), Fetch::Everything, None).await.unwrap(), later);
    assert_eq!(lab.fake.count().blobs, blobs, "nothing was packed again");
    assert_eq!(lab.fake.count().leases, 1);

    // Cut off in the middle, it leaves a whole state or nothing.
    let open = write("two").await;
    drop(
        tokio::time::timeout(
            std::time::Duration::ZERO,
            open.commit_packed("cut off", Compression::default()),
        )
        .await,
    );
    store.drained().await;
    lab.fake.gc();
    let count = lab.fake.count();
    assert_eq!((count.blobs, count.snapshots), (count.leases, count.leases));
    let (id, text) = (state.id().clone(), read(&state, "one").await);
    assert_eq!(text.as_deref(), Some("1"));
    drop(state);
    store.drained().await;
    drop(store);
    let store = lab.open().await;
    lab.fake.gc();
    assert_eq!(
        store
            .get(&id)
            .await
            .unwrap()
            .blobs(Compression::default(), Fetch::Everything, None)
            .await
            .unwrap(),
        later
    );
}

#[tokio::test]
async fn merged_layers_keep_their_digests() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, "base", "b").await;
    let added = step(&store, None, "added", "a").await;
    let merged = store.merge(&[base.clone(), added.clone()], "merge").await.unwrap();
    assert_eq!(
        (read(&merged, "base").await.as_deref(), read(&merged, "added").await.as_deref()),
        (Some("b"), Some("a"))
    );
    let layers = merged.layers().await.unwrap();
    assert_eq!(layers[1].diff_id, added.layers().await.unwrap()[0].diff_id);
    let blobs = merged.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
    assert_eq!(
        blobs[1],
        added.blobs(Compression::default(), Fetch::Everything, None).await.unwrap()[0]
    );
    let diff = store.diff(Some(&base), Some(&merged), "diff").await.unwrap();
    assert_eq!(
        (read(&diff, "base").await, read(&diff, "added").await.as_deref()),
        (None, Some("a"))
    );
    let other = step(&store, None, "other", "o").await;
    let diff = store.diff(Some(&other), Some(&base), "diff").await.unwrap();
    assert_eq!(read(&diff, "base").await.as_deref(), Some("b"));
    let onto = store.merge(&[other, diff], "merge").await.unwrap();
    assert_eq!(
        (read(&onto, "other").await, read(&onto, "base").await.as_deref()),
        (None, Some("b"))
    );
}

#[tokio::test]
async fn a_merge_that_nobody_needed_yet_is_whole() {
    let lab = Lab::new();
    let store = lab.open().await;
    let base = step(&store, None, "base", "b").await;
    let added = step(&store, None, "added", "a").await;
    let merged = store.merge(&[base.clone(), added], "merge").await.unwrap();
    assert!(store.get(merged.id()).await.is_some());

    // Somebody takes its parts away; what those who have it do then is no reason to keep anything.
    for lease in store.storage().leases.list(&[]).await.unwrap() {
        store.storage().leases.delete(&lease.id, false).await.unwrap();
    }
    assert!(store.get(merged.id()).await.is_none());
    assert!(merged.blobs(Compression::default(), Fetch::Everything, None).await.is_err());
    drop((base, merged));
    store.drained().await;
    let left = store.storage().leases.list(&[]).await.unwrap();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn differences_of_unrelated_states_leave_nothing_behind() {
    let lab = Lab::new();
    let store = lab.open().await;
    // In use all the time: the daemon's own lease is not ended with everything in it.
    let _kept = step(&store, None, "kept", "k").await;
    store.drained().await;
    let before = lab.fake.count();
    let one = step(&store, None, "one", "1").await;
    let two = step(&store, None, "two", "2").await;
    let (first, second) = tokio::try_join!(
        store.diff(Some(&one), Some(&two), "diff"),
        store.diff(Some(&one), Some(&two), "diff")
    )
    .unwrap();
    let whole = store.merge(&[one.clone(), second.clone()], "merge").await.unwrap();
    drop((one, two, first, second));
    store.drained().await;
    lab.fake.gc();
    assert_eq!(
        (read(&whole, "one").await, read(&whole, "two").await.as_deref()),
        (None, Some("2"))
    );
    drop(whole);
    store.drained().await;
    store.prune(PruneOptions { all: true, ..Default::default() }, &|_| {}).await.unwrap();
    assert_eq!(lab.fake.count(), before);
}

#[tokio::test]
async fn blobs_of_merged_layers_need_nothing_of_what_lies_below() {
    let there = Lab::new();
    let origin = there.open().await;
    let (layers, source) = published(&step(&origin, None, "base", "b").await, &origin).await;
    let lab = Lab::new();
    let store = lab.open().await;
    let base = store
        .image(lazy(&layers, &source), "pulled from example.org/app:1", RecordType::Regular)
        .await
        .unwrap();
    let added = step(&store, None, "added", "a").await;
    let merged = store.merge(&[base, added], "merge").await.unwrap();
    let blobs = merged.blobs(Compression::default(), Fetch::Nothing, None).await.unwrap();
    assert_eq!(blobs.iter().map(|b| b.lazy.is_some()).collect::<Vec<_>>(), [true, false]);
    assert!(
        store.storage().content.info(blobs[0].descriptor.digest).await.is_err(),
        "it was fetched"
    );
}

fn named(key: &str, sharing: Sharing) -> NamedRequest {
    NamedRequest {
        record_type: RecordType::LocalSource,
        key: key.into(),
        description: "local source".into(),
        sharing,
        parent: None,
    }
}

#[tokio::test]
async fn a_clients_directory_is_read_in_place_and_kept() {
    let lab = Lab::new();
    let store = lab.open().await;
    let dir = store.named(named("k", Sharing::Private)).await.unwrap();
    assert!(dir.is_fresh());
    let mount = dir.mount().await.unwrap();
    fs::write(mount.path().join("file"), "v1").unwrap();
    let inode = fs::metadata(mount.path().join("file")).unwrap().ino();
    drop(mount);
    let slot = dir.id().clone();
    let frozen = dir.freeze("local src").await.unwrap();
    let first = frozen.checksum(&Selector::path("/")).await.unwrap();
    assert_eq!(
        fs::metadata(frozen.mount().await.unwrap().path().join("file")).unwrap().ino(),
        inode
    );
    let other = store.named(named("k", Sharing::Private)).await.unwrap();
    assert_ne!(*other.id(), slot, "somebody reads the first one");
    other.discard().await.unwrap();
    let id = frozen.id().clone();
    drop(frozen);
    assert!(store.get(&id).await.is_some());
    let dir = store.named(named("k", Sharing::Private)).await.unwrap();
    assert_eq!((dir.id(), dir.is_fresh()), (&slot, false));
    assert!(store.get(&id).await.is_none(), "it may have changed");
    fs::write(dir.mount().await.unwrap().path().join("file"), "v2").unwrap();
    let frozen = dir.freeze("local src").await.unwrap();
    assert_ne!(frozen.checksum(&Selector::path("/")).await.unwrap(), first);
    let top = step(&store, Some(&frozen), "more", "m").await;
    assert_eq!(read(&top, "file").await.as_deref(), Some("v2"));
    assert_eq!(read(&frozen, "file").await.as_deref(), Some("v2"));
    assert_eq!(top.layers().await.unwrap().len(), 2);
}

#[tokio::test]
async fn cache_mounts_are_shared_private_or_locked() {
    let lab = Lab::new();
    let store = lab.open().await;
    let a = store.named(named("c", Sharing::Shared)).await.unwrap();
    let b = store.named(named("c", Sharing::Shared)).await.unwrap();
    assert_eq!(a.id(), b.id());
    let p = store.named(named("c", Sharing::Private)).await.unwrap();
    assert_ne!(p.id(), a.id());
    let waiting = shipway_task::spawn("test", {
        let store = store.clone();
        async move { store.named(named("c", Sharing::Locked)).await.unwrap().id().clone() }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    let ids = [a.id().clone(), p.id().clone()];
    drop((a, b));
    assert!(ids.contains(&waiting.await.unwrap()));
    let second = store.named(named("c", Sharing::Private)).await.unwrap();
    let doomed = second.snapshot_key().clone();
    second.discard().await.unwrap();
    drop(p);
    store.drained().await;
    assert!(store.storage().snapshots.stat(&doomed).await.is_err());
    drop(store);
    let store = lab.open().await;
    lab.fake.gc();
    let kept = store.named(named("c", Sharing::Shared)).await.unwrap();
    assert!(ids.contains(kept.id()) && !kept.is_fresh());
}

#[tokio::test]
async fn a_state_that_is_filled_is_had_whole_or_not_at_all() {
    let lab = Lab::new();
    let store = lab.open().await;
    let fill = async |store: &RefStore| {
        let filling = store.fill_named(named("c", Sharing::Shared)).await.unwrap().unwrap();
        fs::write(filling.mount().await.unwrap().path().join("half"), "").unwrap();
        filling
    };
    let files = async |store: &RefStore| {
        let state = store.named(named("c", Sharing::Shared)).await.unwrap();
        fs::read_dir(state.mount().await.unwrap().path()).unwrap().count()
    };
    // One that is given up.
    let filling = fill(&store).await;
    let waiting = shipway_task::spawn("test", {
        let store = store.clone();
        async move { store.named(named("c", Sharing::Shared)).await.unwrap().is_fresh() }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "somebody has half of it");
    assert!(store.fill_named(named("c", Sharing::Shared)).await.unwrap().is_none());
    drop(filling);
    assert!(waiting.await.unwrap());
    assert_eq!(files(&store).await, 0);
    store.discard_named(named("c", Sharing::Shared).record_type, "c");
    store.drained().await;
    // One whose daemon ended meanwhile.
    std::mem::forget(fill(&store).await);
    let store = lab.open().await;
    assert!(!store.has_named(named("c", Sharing::Shared).record_type, "c"));
    assert_eq!(files(&store).await, 0);
    store.discard_named(named("c", Sharing::Shared).record_type, "c");
    store.drained().await;
    // One that is whole.
    fill(&store).await.done().await.unwrap();
    assert_eq!(files(&store).await, 1);
    drop(store);
    assert_eq!(files(&lab.open().await).await, 1);
}

#[tokio::test]
async fn pruning_goes_from_the_leaves_and_keeps_what_is_used() {
    let lab = Lab::new();
    let store = lab.open().await;
    let one = step(&store, None, "one", "1").await;
    let two = step(&store, Some(&one), "two", "2").await;
    let three = step(&store, Some(&two), "three", "3").await;
    drop(store.named(named("c", Sharing::Shared)).await.unwrap());
    let (used, gone) = (two.id().clone(), three.id().clone());
    drop((one, three));
    store.drained().await;
    let removed = parking_lot::Mutex::new(Vec::new());
    let note = |u: UsageRecord| removed.lock().push(u);
    store.prune(PruneOptions { all: true, ..Default::default() }, &note).await.unwrap();
    let removed: Vec<_> = removed.into_inner().into_iter().map(|u| u.id).collect();
    assert!(removed.len() == 2 && removed.contains(&gone), "{removed:?}");
    assert!(store.get(&gone).await.is_none());
    let left = store.usage().await.unwrap();
    assert_eq!(left.len(), 2);
    assert!(left.iter().find(|u| u.id == used).unwrap().in_use);
    drop(two);
    let document = LeaseId("document".into());
    let labels = [(DOCUMENT_KIND.0.to_owned(), DOCUMENT_KIND.1.to_owned())].into();
    store.storage().leases.create(&document, &labels).await.unwrap();
    store.drained().await;
    store.prune(PruneOptions { all: true, ..Default::default() }, &|_| {}).await.unwrap();
    assert_eq!(lab.fake.count().snapshots, 0);
    assert!(store.storage().leases.list(&[]).await.unwrap().iter().all(|l| l.id != document));
}

#[tokio::test]
async fn a_record_whose_snapshot_others_removed_is_noticed() {
    let lab = Lab::new();
    let store = lab.open().await;
    let one = step(&store, None, "one", "1").await;
    let id = one.id().clone();
    drop(one);
    for lease in store.storage().leases.list(&[]).await.unwrap() {
        store.storage().leases.delete(&lease.id, true).await.unwrap();
    }
    assert!(store.get(&id).await.is_none());
    assert!(store.usage().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_path_is_from_the_topmost_layer_that_has_it() {
    let lab = Lab::new();
    let store = lab.open().await;
    let one = step(&store, None, "one", "1").await;
    let two = step(&store, Some(&one), "two", "2").await;
    let gone = store.mutable(Some(&two), "gone", RecordType::Regular, None).await.unwrap();
    let mount = gone.mount().await.unwrap();
    fs::remove_file(mount.path().join("one")).unwrap();
    write_old(&mount.path().join("two"), "another");
    mount.unmount().await.unwrap();
    let top = gone.commit("took one away").await.unwrap();
    let found = top
        .layers_with(["one", "two", "three"].map(|p| p.as_bytes().to_vec()).into())
        .await
        .unwrap();
    assert_eq!(found, [(b"one".to_vec(), 0), (b"two".to_vec(), 2)].into());
}

#[tokio::test]
async fn after_a_power_cut_what_was_not_on_the_disk_is_gone() {
    let lab = Lab::new();
    let store = lab.boot("one").await;
    let below = step(&store, None, "below", "1").await;
    store.sync().await.unwrap();
    let above = step(&store, Some(&below), "above", "2").await;
    let top = step(&store, Some(&above), "top", "3").await;
    let ids = [below.id().clone(), above.id().clone(), top.id().clone()];
    drop((below, above, top));
    store.drained().await;
    drop(store);
    let present = async |store: &RefStore| {
        let mut there = Vec::new();
        for id in &ids {
            there.push(store.get(id).await.is_some());
        }
        there
    };

    // The daemon was killed, no more: the kernel still has everything.
    let store = lab.boot("one").await;
    assert_eq!(present(&store).await, [true; 3]);
    drop(store);

    let store = lab.boot("two").await;
    assert_eq!(present(&store).await, [true, false, false]);
    assert_eq!(lab.names().await.len(), 1, "the snapshots went with the states");
    // The work is done again.
    let below = store.get(&ids[0]).await.unwrap();
    let again = step(&store, Some(&below), "above", "2").await;
    assert_eq!(read(&again, "above").await.as_deref(), Some("2"));
    let kept = again.id().clone();
    drop((below, again));
    store.close().await.unwrap();
    drop(store);

    // An end in peace leaves nothing to doubt, nor does what an earlier start has looked through.
    for boot in ["three", "four"] {
        let store = lab.boot(boot).await;
        let again = store.get(&kept).await.expect(boot);
        assert_eq!(read(&again, "above").await.as_deref(), Some("2"));
        drop(again);
        store.drained().await;
    }
}

#[tokio::test]
async fn a_mark_that_is_gone_or_damaged_promises_nothing() {
    for damaged in [None, Some("{"), Some("")] {
        let lab = Lab::new();
        let store = lab.boot("one").await;
        let id = step(&store, None, "f", "1").await.id().clone();
        store.close().await.unwrap();
        drop(store);
        let mark = lab.dir.path().join("durable.json");
        match damaged {
            Some(text) => fs::write(&mark, text).unwrap(),
            None => fs::remove_file(&mark).unwrap(),
        }
        assert!(lab.boot("two").await.get(&id).await.is_none(), "{damaged:?}");
    }
}

#[tokio::test]
async fn a_short_snapshot_that_others_use_is_an_error_and_goes_when_they_do() {
    let lab = Lab::new();
    let storage = lab.fake.storage();
    let store = lab.boot("one").await;
    let state = step(&store, None, "f", "1").await;
    let chain = state.layers().await.unwrap()[0].chain_id;
    drop(state);
    store.drained().await;
    let lease = LeaseId("somebody".into());
    storage.leases.create(&lease, &Default::default()).await.unwrap();
    let container = shipway_storage::SnapshotKey("container".into());
    storage
        .snapshots
        .prepare(&lease, &container, Some(&chain.into()), &Default::default())
        .await
        .unwrap();
    drop(store);

    for start in 0..2 {
        let store = lab.boot("two").await;
        let state = store.mutable(None, "step f", RecordType::Regular, None).await.unwrap();
        let mount = state.mount().await.unwrap();
        write_old(&mount.path().join("f"), "1");
        mount.unmount().await.unwrap();
        let fault =
            state.commit("wrote f").await.expect_err("the name is taken by what may be short");
        assert!(
            fault.to_string().contains("lost power")
                && fault.hints().any(|h| h.contains("containers")),
            "{start}: {fault}"
        );
        store.drained().await;
    }
    storage.leases.delete(&lease, true).await.unwrap();
    let store = lab.boot("two").await;
    let again = step(&store, None, "f", "1").await;
    assert_eq!(read(&again, "f").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn what_can_be_fetched_anew_is_after_a_power_cut() {
    let lab = Lab::new();
    let named = async |store: &RefStore, record_type| {
        let request = NamedRequest {
            record_type,
            key: "k".into(),
            description: "d".into(),
            sharing: Sharing::Private,
            parent: None,
        };
        let state = store.named(request).await.unwrap();
        let fresh = state.is_fresh();
        drop(state);
        store.drained().await;
        fresh
    };
    let types = [RecordType::LocalSource, RecordType::GitCheckout, RecordType::CacheMount];
    for (boot, in_peace, fresh) in [
        ("one", false, [true; 3]),
        ("one", false, [false; 3]),
        ("two", true, [true, true, false]),
        ("three", false, [false; 3]),
    ] {
        let store = lab.boot(boot).await;
        for (record_type, fresh) in types.into_iter().zip(fresh) {
            assert_eq!(named(&store, record_type).await, fresh, "{boot} {record_type:?}");
        }
        if in_peace {
            store.close().await.unwrap();
        }
    }
}
