//! Images in several namespaces of a fake containerd: what is there afterwards, and how many
//! transactions of containerd's database it takes, each of which waits for the disk twice.

#![allow(clippy::unwrap_used)]

use shipway_executor::fake::FakeExecutor;
use shipway_exporters::{
    ExportContext, ExportInput, ExportPlatform, ExportTarget, Exporter, Exporters, LazyBlobs,
    Publishing, StateWatcher,
};
use shipway_fault::Fault;
use shipway_oci::{Digest, Platform};
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, RecordType, RefStore};
use shipway_registry::Registry;
use shipway_session::{SessionGroup, SessionHub, SessionId};
use shipway_storage::{SnapshotKey, fake::FakeNamespaces};
use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

const OTHERS: [&str; 3] = ["default", "k8s.io", "moby"];
const NAME: &str = "docker.io/library/app:1";

struct Lab {
    namespaces: FakeNamespaces,
    refs: RefStore,
    exporters: Exporters,
    hub: SessionHub,
    _dir: tempfile::TempDir,
}

impl Lab {
    async fn new(namespaces: FakeNamespaces) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let own = namespaces.namespace("own").unwrap().storage();
        let refs = RefStore::open(own, dir.path().to_owned()).await.unwrap();
        let publishing = Publishing {
            namespaces: Arc::new(namespaces.clone()),
            own: "own".into(),
            default: OTHERS.map(str::to_owned).to_vec(),
        };
        let hub = SessionHub::new();
        let exporters = Exporters::new(
            refs.clone(),
            Registry::new(Default::default()),
            Vec::new(),
            publishing,
            LazyBlobs::Now,
            Arc::new(FakeExecutor::new(|_, _, _, _| Err(Fault::internal("nothing is to be run")))),
        );
        Self { namespaces, refs, exporters, hub, _dir: dir }
    }

    /// A state of `layers` layers, one file each; all states, lowest first.
    async fn states(&self, layers: usize) -> Vec<ImmutableRef> {
        let mut states: Vec<ImmutableRef> = Vec::new();
        for n in 0..layers {
            let below = states.last();
            let state = self.refs.mutable(below, format!("{n}"), RecordType::Regular, None);
            let state = state.await.unwrap();
            let mount = state.mount().await.unwrap();
            fs::write(mount.path().join(format!("file-{n}")), n.to_string()).unwrap();
            mount.unmount().await.unwrap();
            states.push(state.commit(format!("layer {n}")).await.unwrap());
        }
        states
    }

    fn exporter(&self, more: &[(&str, &str)]) -> Arc<dyn Exporter> {
        let attrs = [("name", NAME)].iter().chain(more);
        let attrs = attrs.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.exporters.resolve("image", &attrs).unwrap()
    }

    /// An exporter that `states` were shown to as they were made, and what shows them.
    fn watching(&self, states: &[ImmutableRef]) -> (Arc<dyn Exporter>, StateWatcher) {
        let exporter = self.exporter(&[]);
        let watch = exporter.watcher("build", 0).unwrap();
        states.iter().for_each(|state| watch(state));
        (exporter, watch)
    }

    async fn export(&self, exporter: &dyn Exporter, build: &str, state: &ImmutableRef) {
        let platform = Platform::host();
        let input = ExportInput {
            platforms: vec![ExportPlatform {
                id: platform.to_string(),
                platform,
                state: state.clone(),
            }],
            is_map: false,
            metadata: BTreeMap::new(),
            attestations: BTreeMap::new(),
        };
        let session = SessionId::new("client");
        let cx = ExportContext {
            build: build.into(),
            compatibility: 0,
            index: 0,
            sessions: SessionGroup::new(self.hub.clone(), [session.clone()]),
            session,
            reporter: Reporter::new(Digest::of("export"), "export".into(), Vec::new(), None),
            finalizers: Default::default(),
        };
        exporter.export(input, &cx).await.unwrap();
    }

    /// Transactions in the other namespaces, of work that has ended: their leases are gone.
    async fn transactions(&self) -> Vec<u64> {
        self.until("the leases are gone", |count| count.leases == 0).await;
        OTHERS.map(|name| self.namespaces.namespace(name).unwrap().transactions()).to_vec()
    }

    /// Waits until it is so in all of the other namespaces.
    async fn until(&self, what: &str, is_so: impl Fn(shipway_storage::fake::Count) -> bool) {
        let count = |name: &&str| is_so(self.namespaces.namespace(name).unwrap().count());
        let all = async {
            while !OTHERS.iter().all(count) {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), all).await;
        waited.unwrap_or_else(|_| panic!("waited in vain until {what}"));
    }

    /// Whether the image is whole in all of the other namespaces after a garbage collection.
    async fn check(&self, state: &ImmutableRef) {
        let layers = state.layers().await.unwrap();
        for name in OTHERS {
            let fake = self.namespaces.namespace(name).unwrap();
            fake.gc();
            let storage = fake.storage();
            let image = storage.images.get(NAME).await.unwrap();
            let manifest = storage.content.read_all(image.target.digest, 1 << 20).await.unwrap();
            let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
            let blobs = manifest["layers"].as_array().unwrap();
            assert_eq!(blobs.len(), layers.len());
            for blob in blobs.iter().chain([&manifest["config"]]) {
                let digest = blob["digest"].as_str().unwrap().parse().unwrap();
                storage.content.info(digest).await.unwrap();
            }
            for layer in &layers {
                let key = SnapshotKey::from(layer.chain_id);
                storage.snapshots.stat(&key).await.unwrap();
            }
        }
    }
}

fn differences(before: &[u64], after: &[u64]) -> Vec<u64> {
    before.iter().zip(after).map(|(a, b)| b - a).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_published_while_the_build_went_on_costs_nothing_at_its_end() {
    let lab = Lab::new(FakeNamespaces::new()).await;
    let states = lab.states(8).await;
    let exporter = lab.exporter(&[]);
    let watch = exporter.watcher("build", 0).expect("it wants to see them");
    states.iter().for_each(|state| watch(state));
    lab.until("all layers are there", |c| c.snapshots == 8 && c.blobs == 8).await;
    let transactions = |lab: &Lab| {
        OTHERS.map(|name| lab.namespaces.namespace(name).unwrap().transactions()).to_vec()
    };
    let before = transactions(&lab);
    // A namespace, a lease, and two for each snapshot and blob.
    assert_eq!(before, [33; 3]);
    let last = states.last().unwrap();
    lab.export(exporter.as_ref(), "build", last).await;
    drop((watch, exporter));
    // Two for the manifest and the config each, the record, and the end of the lease.
    assert_eq!(differences(&before, &lab.transactions().await), [6; 3]);
    lab.check(last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_namespace_has_is_not_written_again() {
    let lab = Lab::new(FakeNamespaces::new()).await;
    let states = lab.states(4).await;
    let (below, last) = (&states[2], &states[3]);
    let zero = lab.transactions().await;
    lab.export(lab.exporter(&[]).as_ref(), "one", below).await;
    let one = lab.transactions().await;
    // The lease, its end, and the record; two for the manifest, the config, each snapshot and blob.
    assert_eq!(differences(&zero, &one), [3 + 2 * 2 + 3 * 2 * 2; 3]);
    lab.check(below).await;
    // With one layer more.
    lab.export(lab.exporter(&[]).as_ref(), "two", last).await;
    let two = lab.transactions().await;
    assert_eq!(differences(&one, &two), [3 + 2 * 2 + 2 * 2; 3]);
    lab.check(last).await;
    // With nothing new.
    lab.export(lab.exporter(&[]).as_ref(), "three", last).await;
    let three = lab.transactions().await;
    assert_eq!(differences(&two, &three), [0; 3]);
    lab.check(last).await;
    // Only the record is another one.
    lab.export(lab.exporter(&[("pinned", "true")]).as_ref(), "four", last).await;
    let four = lab.transactions().await;
    assert!(differences(&three, &four).iter().all(|n| *n <= 4), "{three:?} {four:?}");
    lab.check(last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_fails_leaves_nothing_in_other_namespaces() {
    let lab = Lab::new(FakeNamespaces::new()).await;
    let states = lab.states(3).await;
    let (exporter, watch) = lab.watching(&states);
    lab.until("all layers are there", |c| c.snapshots == 3 && c.blobs == 3).await;
    drop((watch, exporter));
    lab.until("nothing is there", |c| c == Default::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshotter_that_does_not_share_is_asked_once_ahead_and_unpacks_at_the_end() {
    let lab = Lab::new(FakeNamespaces::isolated()).await;
    let states = lab.states(3).await;
    let (exporter, watch) = lab.watching(&states);
    lab.until("all blobs are there", |c| c.blobs == 3 && c.snapshots == 0).await;
    let last = states.last().unwrap();
    lab.export(exporter.as_ref(), "build", last).await;
    drop((watch, exporter));
    lab.transactions().await;
    lab.check(last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_since_it_was_published_ahead_is_made_again() {
    let lab = Lab::new(FakeNamespaces::new()).await;
    let states = lab.states(3).await;
    let (exporter, watch) = lab.watching(&states);
    lab.until("all layers are there", |c| c.snapshots == 3 && c.blobs == 3).await;
    // The build took longer than its lease lasts.
    for name in OTHERS {
        let leases = lab.namespaces.namespace(name).unwrap().storage().leases;
        for lease in leases.list(&[]).await.unwrap() {
            leases.delete(&lease.id, true).await.unwrap();
            leases.create(&lease.id, &lease.labels).await.unwrap();
        }
    }
    let last = states.last().unwrap();
    lab.export(exporter.as_ref(), "build", last).await;
    drop((watch, exporter));
    lab.transactions().await;
    lab.check(last).await;
}

#[tokio::test]
async fn images_that_may_get_no_name_are_not_published_ahead() {
    let lab = Lab::new(FakeNamespaces::new()).await;
    for more in [
        &[("name", "")][..],
        &[("namespaces", "")],
        &[("compression", "estargz")],
        &[("rewrite-timestamp", "true")],
    ] {
        assert!(lab.exporter(more).watcher("build", 0).is_none(), "{more:?}");
    }
    assert!(lab.exporter(&[]).watcher("build", 0).is_some());
}

#[tokio::test]
async fn where_an_export_goes_is_known_before_it_goes_there() {
    use ExportTarget::{Namespace, Push, Store};
    let lab = Lab::new(FakeNamespaces::new()).await;
    let targets = |kind: &str, attrs: &[(&str, &str)], metadata: Option<&[(&str, &str)]>| {
        let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        let exporter = lab.exporters.resolve(kind, &attrs.iter().map(owned).collect()).unwrap();
        let metadata = metadata
            .map(|all| all.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect());
        let mut targets = exporter.targets(metadata.as_ref());
        targets.sort();
        targets
    };
    let store = |name: &str| Store(name.to_owned());
    let push = |name: &str| Push(name.to_owned());
    let none: Option<&[(&str, &str)]> = None;
    assert_eq!(targets("image", &[("name", "a,b")], none), [store("a"), store("b")]);
    assert_eq!(targets("image", &[("name", "a"), ("push", "true")], none), [store("a"), push("a")]);
    let only = [("name", "a"), ("push", "true"), ("store", "false")];
    assert_eq!(targets("image", &only, none), [push("a")]);
    // The frontend's name counts where it is wanted, unless the attributes have one.
    let (frontends, any) = (Some(&[("image.name", "f,g")][..]), [("name", "*")]);
    assert!(targets("image", &any, none).is_empty());
    assert_eq!(targets("image", &any, frontends), [store("f"), store("g")]);
    assert_eq!(targets("image", &[("name", "a")], frontends), [store("a")]);
    let given = [("name", "*"), ("image.name", "own")];
    for metadata in [none, frontends] {
        assert_eq!(targets("image", &given, metadata), [store("own")]);
    }
    assert_eq!(targets("image", &[("dangling-name-prefix", "d")], none), [store("d")]);
    // Namespaces of the configuration are no matter of the build's.
    let spaces = [("name", "a"), ("namespaces", "k8s.io,own,other")];
    assert_eq!(targets("image", &spaces, none), [store("a"), Namespace("other".to_owned())]);
    for kind in ["oci", "docker", "local", "tar"] {
        assert!(targets(kind, &[("name", "a")], frontends).is_empty(), "{kind}");
    }
}
