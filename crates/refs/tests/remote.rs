//! States on a snapshotter that serves layers from their registry.

#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_archive::{Compression, LayerTree};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Descriptor, Digest};
use shipway_progress::Reporter;
use shipway_refs::*;
use shipway_storage::{
    BlobReader, ContentStore, Labels, LeaseId, LeaseResource, Mount, REMOTE_SNAPSHOT, SNAPSHOT_REF,
    SnapshotKey, Snapshotter as _,
    fake::{FakeStorage, Overrides, storage_with},
};
use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

const TOC: &str = "containerd.io/snapshot/stargz/toc.digest";
const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
const ORIGIN: &str = "example.org/app:1";

/// A layer of one file with its own name as its contents.
#[derive(Clone)]
struct Sample {
    name: &'static str,
    blob: Bytes,
    layer: LazyLayer,
}

/// An image at a registry, which counts what is asked of it.
struct Image {
    id: LayerSourceId,
    samples: Mutex<Vec<Sample>>,
    fetched: AtomicUsize,
}

#[async_trait]
impl LayerSource for Image {
    fn id(&self) -> LayerSourceId {
        self.id
    }

    async fn fetch(
        &self,
        layer: &Descriptor,
        content: &dyn ContentStore,
        lease: &LeaseId,
        _progress: Option<&Reporter>,
    ) -> Result<()> {
        self.fetched.fetch_add(1, Ordering::SeqCst);
        content.put(lease, self.blob(layer.digest)?, &Labels::new()).await.map(drop)
    }

    async fn open(&self, layer: &Descriptor) -> Result<Box<dyn BlobReader>> {
        Ok(Box::new(Whole(Some(self.blob(layer.digest)?))))
    }

    async fn remote_labels(&self, layer: &Descriptor) -> Option<Labels> {
        Some(Labels::from([(LAYER.into(), layer.digest.to_string())]))
    }

    fn origin(&self) -> Option<String> {
        Some(ORIGIN.into())
    }

    fn describe(&self) -> String {
        ORIGIN.into()
    }
}

impl Image {
    fn blob(&self, digest: Digest) -> Result<Bytes> {
        let samples = self.samples.lock();
        let found = samples.iter().find(|s| s.layer.descriptor.digest == digest);
        Ok(found.ok_or_else(|| Fault::not_found("blob unknown"))?.blob.clone())
    }

    fn fetched(&self) -> usize {
        self.fetched.load(Ordering::SeqCst)
    }
}

struct Whole(Option<Bytes>);

#[async_trait]
impl BlobReader for Whole {
    fn size(&self) -> u64 {
        self.0.as_ref().map_or(0, |b| b.len() as u64)
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(self.0.take())
    }

    async fn seek(&mut self, _offset: u64) -> Result<()> {
        Ok(())
    }
}

/// An image with a layer for each name. The names of layers that are annotated begin with "a".
fn image(names: &[&'static str]) -> (Arc<Image>, Vec<LazyLayer>) {
    let source = Arc::new(Image {
        id: LayerSourceId::next(),
        samples: Mutex::default(),
        fetched: AtomicUsize::new(0),
    });
    for name in names {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(name), name).unwrap();
        let mut blob = Vec::new();
        let packed = shipway_archive::pack(
            &LayerTree::lowest(dir.path()),
            Compression::default(),
            None,
            None,
            &mut |bytes| {
                blob.extend_from_slice(&bytes);
                Ok(())
            },
        )
        .unwrap();
        let mut descriptor =
            Descriptor::new(Compression::default().kind.media_type(), packed.digest, packed.size);
        if name.starts_with('a') {
            descriptor.annotations.insert(TOC.into(), format!("sha256:{name}"));
        }
        let layer = LazyLayer {
            diff_id: packed.tar.diff_id,
            descriptor,
            source: Some(source.clone()),
            created: None,
        };
        source.samples.lock().push(Sample { name, blob: blob.into(), layer });
    }
    let layers = source.samples.lock().iter().map(|s| s.layer.clone()).collect();
    (source, layers)
}

/// The fake's snapshotter, serving layers.
struct Remote {
    fake: FakeStorage,
    /// What it can serve: names by the digest of the blob.
    serves: Mutex<HashMap<String, &'static str>>,
}

#[async_trait]
impl Overrides for Remote {
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
        let mounts = self.fake.prepare(lease, key, parent, labels).await?;
        let Some(layer) = labels.get(LAYER) else { return Ok(mounts) };
        let Some(name) = self.serves.lock().get(layer).copied() else { return Ok(mounts) };
        let [Mount::Bind(bind)] = &mounts[..] else { panic!("{mounts:?}") };
        fs::write(bind.source.join(name), name).unwrap();
        let chain = SnapshotKey(labels[SNAPSHOT_REF].clone());
        let labels = Labels::from([(REMOTE_SNAPSHOT.into(), "remote snapshot".into())]);
        self.fake.commit(lease, &chain, key, &labels).await?;
        Err(Fault::new(Code::AlreadyExists, format!("target snapshot {chain}")))
    }
}

struct Lab {
    fake: FakeStorage,
    remote: Arc<Remote>,
    dir: tempfile::TempDir,
}

struct Known(Arc<Image>);

impl LayerOrigins for Known {
    fn source(&self, origin: &str) -> Option<Arc<dyn LayerSource>> {
        (origin == ORIGIN).then(|| self.0.clone() as Arc<dyn LayerSource>)
    }
}

impl Lab {
    /// One whose snapshotter serves the layers with these names.
    fn new(source: &Image, serves: &[&str]) -> Self {
        let fake = FakeStorage::new().unwrap();
        let samples = source.samples.lock();
        let served = samples.iter().filter(|s| serves.contains(&s.name));
        let serves = served.map(|s| (s.layer.descriptor.digest.to_string(), s.name)).collect();
        let remote = Arc::new(Remote { fake: fake.clone(), serves: Mutex::new(serves) });
        Self { fake, remote, dir: tempfile::tempdir().unwrap() }
    }

    async fn open(&self, source: &Arc<Image>) -> RefStore {
        let (storage, known) = (storage_with(self.remote.clone()), Known(source.clone()));
        RefStore::open_with(storage, self.dir.path().to_owned(), &known).await.unwrap()
    }
}

fn has(dir: &Path, names: &[&str]) -> bool {
    names.iter().all(|name| fs::read_to_string(dir.join(name)).is_ok_and(|text| text == *name))
}

async fn step(store: &RefStore, parent: &ImmutableRef) -> ImmutableRef {
    let state = store.mutable(Some(parent), "step", RecordType::Regular, None).await.unwrap();
    let mount = state.mount().await.unwrap();
    fs::write(mount.path().join("own"), "own").unwrap();
    mount.unmount().await.unwrap();
    state.commit("wrote own").await.unwrap()
}

fn lazy(blobs: &[LayerBlob]) -> Vec<bool> {
    blobs.iter().map(|b| b.lazy.is_some()).collect()
}

#[tokio::test]
async fn what_the_snapshotter_serves_is_not_fetched_by_steps_nor_exports() {
    let names = ["a1", "a2"];
    let (source, layers) = image(&names);
    let lab = Lab::new(&source, &names);
    let store = lab.open(&source).await;
    let base = store.image(layers.clone(), "pulled", RecordType::Regular).await.unwrap();
    let made = step(&store, &base).await;
    assert!(has(made.mount().await.unwrap().path(), &["a1", "a2", "own"]));
    assert_eq!((source.fetched(), lab.fake.count().blobs), (0, 0));
    for fetch in [Fetch::Nothing, Fetch::Unserved] {
        let blobs = made.blobs(Compression::default(), fetch, None).await.unwrap();
        assert_eq!(lazy(&blobs), [true, true, false]);
        assert_eq!(blobs[1].descriptor, layers[1].descriptor, "annotations and all");
    }
    made.unpack(Compression::default(), None).await.unwrap();
    assert_eq!((source.fetched(), lab.fake.count().blobs), (0, 1));
    // Its bytes can be passed on without being stored.
    let mut reader = made.blob_reader(layers[0].descriptor.digest).await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Some(source.samples.lock()[0].blob.clone()));
    let labels = made.remote_labels(layers[0].descriptor.digest).await.unwrap();
    assert_eq!(labels[LAYER], layers[0].descriptor.digest.to_string());
    assert_eq!(lab.fake.count().blobs, 1);

    let id = made.id().clone();
    drop((made, base));
    store.drained().await;
    drop(store);
    lab.fake.gc();
    let store = lab.open(&source).await;
    let made = store.get(&id).await.expect("the record survives");
    let blobs = made.blobs(Compression::default(), Fetch::Unserved, None).await.unwrap();
    assert_eq!(lazy(&blobs), [true, true, false], "after a restart, too");
    assert_eq!(blobs[1].descriptor, layers[1].descriptor);
    let blobs = made.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
    assert_eq!((lazy(&blobs), source.fetched()), (vec![false; 3], 2));
    assert!(made.remote_labels(layers[0].descriptor.digest).await.is_none(), "it is here");

    // Nothing but the records keeps what is served.
    drop(made);
    store.drained().await;
    store.prune(PruneOptions { all: true, ..Default::default() }, &|_| ()).await.unwrap();
    lab.fake.gc();
    assert_eq!((lab.fake.count().snapshots, lab.fake.count().blobs), (0, 0));
}

#[tokio::test]
async fn what_others_had_served_is_not_fetched_either() {
    let names = ["a1", "a2"];
    let (source, layers) = image(&names);
    let lab = Lab::new(&source, &names);
    let store = lab.open(&source).await;
    let base = store.image(layers.clone(), "pulled", RecordType::Regular).await.unwrap();
    base.materialize(None).await.unwrap();
    // Somebody else keeps the snapshots when the record goes.
    let (leases, other) = (&store.storage().leases, LeaseId("other".into()));
    let top = base.chain_id().await.unwrap().unwrap().into();
    leases.create(&other, &Labels::new()).await.unwrap();
    let kept = LeaseResource::Snapshot(store.storage().snapshots.name().into(), top);
    leases.add(&other, kept).await.unwrap();
    drop(base);
    store.drained().await;
    store.prune(PruneOptions { all: true, ..Default::default() }, &|_| ()).await.unwrap();
    assert_eq!(lab.fake.count().snapshots, 2);
    let base = store.image(layers, "pulled", RecordType::Regular).await.unwrap();
    base.materialize(None).await.unwrap();
    let blobs = base.blobs(Compression::default(), Fetch::Unserved, None).await.unwrap();
    assert_eq!((lazy(&blobs), source.fetched()), (vec![true, true], 0));
}

/// Which layers of an image are asked for, and which are fetched, on a snapshotter that serves
/// those of `serves`; first a new one, then one that has served layers before.
async fn check(names: &[&'static str], serves: &[&str], first: &[&str], later: &[&str]) {
    let (source, layers) = image(names);
    let (other, others) = image(&["a other"]);
    for (seen, want) in [(false, first), (true, later)] {
        let lab = Lab::new(&source, serves);
        let store = lab.open(&source).await;
        if seen {
            let digest = others[0].descriptor.digest.to_string();
            lab.remote.serves.lock().insert(digest, "a other");
            let other = store.image(others.clone(), "other", RecordType::Regular).await.unwrap();
            other.materialize(None).await.unwrap();
        }
        let base = store.image(layers.clone(), "pulled", RecordType::Regular).await.unwrap();
        base.materialize(None).await.unwrap();
        assert!(has(base.mount().await.unwrap().path(), names), "{names:?}");
        let blobs = base.blobs(Compression::default(), Fetch::Nothing, None).await.unwrap();
        let here = names.iter().zip(lazy(&blobs)).filter(|(_, lazy)| !lazy).map(|(n, _)| *n);
        assert_eq!(here.collect::<Vec<_>>(), want, "{names:?}, {serves:?}, {seen}");
    }
    assert_eq!(other.fetched(), 0);
}

#[tokio::test]
async fn what_the_snapshotter_may_serve_is_asked_for_first() {
    // An ordinary snapshotter: everything is fetched at once.
    check(&["a1", "a2", "b3"], &[], &["a1", "a2", "b3"], &["a1", "a2", "b3"]).await;
    // One that refuses the lowest layer is not known to serve others until it has.
    check(&["b1", "a2"], &["a2"], &["b1", "a2"], &["b1"]).await;
    check(&["a1", "b2", "a3"], &["a1", "a3"], &["b2"], &["b2"]).await;
    // One that needs no annotations.
    check(&["b1", "b2", "b3"], &["b1", "b3"], &["b2"], &["b2"]).await;
}
