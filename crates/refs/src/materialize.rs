//! Making snapshots of layers: fetch, unpack, verify, commit as the chain id; or copy from another
//! stack.
//!
//! Before the blob of a layer is fetched the snapshotter is asked for the layer, from the bottom
//! up, as containerd's own unpacker does: one that serves layers from registries, or has unpacked
//! this one for another namespace, answers that it is there. An ordinary one gives a directory to
//! unpack into, and then all that is left is fetched at once. What a snapshotter has served before
//! is asked for first, and fetched only when it is refused ([`crate::served`]).

use crate::{
    active::{Active, PreparedLayer},
    exact,
    layer::{LayerSource, StackedLayer, lost},
    life::RecordStage,
    records::{Record, Records},
    run_lease::forget,
    served::is_annotated,
    tree_copy,
};
use shipway_archive::{Compression, OwnLayer};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::Descriptor;
use shipway_progress::Reporter;
use shipway_storage::{Labels, REMOTE_SNAPSHOT, SNAPSHOT_REF, SnapshotKey};
use shipway_task::{blocking, spawn};
use std::sync::{Arc, atomic::Ordering::Relaxed};
use tokio::{sync::Semaphore, task::JoinHandle};

/// Layers of one state that are fetched at the same time.
const PARALLEL_FETCHES: usize = 4;

/// The fetches of the layers that a state misses. Each begins as soon as it is known that the layer
/// comes from nowhere else.
struct Fetches<'a> {
    records: &'a Arc<Records>,
    record: &'a Arc<Record>,
    missing: &'a [Arc<StackedLayer>],
    progress: Option<&'a Reporter>,
    slots: Arc<Semaphore>,
    each: Vec<FetchState>,
}

/// How far the fetch of one layer is.
enum FetchState {
    /// The layer may come without it.
    NotNeeded,
    Running(FetchTask),
    Done,
}

impl<'a> Fetches<'a> {
    /// Begins with the layers that no snapshotter can serve.
    fn new(
        records: &'a Arc<Records>,
        record: &'a Arc<Record>,
        missing: &'a [Arc<StackedLayer>],
        progress: Option<&'a Reporter>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(PARALLEL_FETCHES));
        let each = missing.iter().map(|_| FetchState::NotNeeded).collect();
        let mut fetches = Self { records, record, missing, progress, slots, each };
        for (i, stacked) in missing.iter().enumerate() {
            if stacked.remote_blob().is_none() {
                fetches.begin(i);
            }
        }
        fetches
    }

    /// The snapshotter does not have layer `i`: its blob is needed, and the blobs of the layers
    /// above that it has not shown to serve.
    fn needed(&mut self, i: usize) {
        self.begin(i);
        for (j, above) in self.missing.iter().enumerate().skip(i + 1) {
            let served = above.remote_blob();
            if !served.is_some_and(|(blob, _)| self.records.served.expects(&blob)) {
                self.begin(j);
            }
        }
    }

    fn begin(&mut self, i: usize) {
        let begun = !matches!(self.each[i], FetchState::NotNeeded);
        if begun || self.missing[i].copy_of().is_some() {
            return;
        }
        let (records, stacked, record) =
            (self.records.clone(), self.missing[i].clone(), self.record.clone());
        let (slots, progress) = (self.slots.clone(), self.progress.cloned());
        self.each[i] = FetchState::Running(FetchTask(spawn("fetch a blob", async move {
            let _slot = slots.acquire().await;
            records.stored_blob(&stacked, &record, progress.as_ref()).await.map(drop)
        })));
    }

    /// Waits for the blob of layer `i`, if that was begun.
    async fn wait(&mut self, i: usize) -> Result<()> {
        let FetchState::Running(fetch) = &mut self.each[i] else { return Ok(()) };
        let ended = (&mut fetch.0).await;
        self.each[i] = FetchState::Done;
        ended.map_err(|e| Fault::internal(format!("a fetch failed: {e}")))?
    }
}

/// The fault of a snapshot that was there a moment ago.
fn vanished(name: &SnapshotKey) -> Fault {
    Fault::new(Code::Aborted, format!("the snapshot {name} vanished while it was made"))
        .hint("something else deletes snapshots in this containerd namespace; build again")
}

/// Ends a task with its last interest.
struct FetchTask(JoinHandle<Result<()>>);

impl Drop for FetchTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A vertex at work again, until this is dropped. What goes wrong is an error of the vertex that
/// needs the layers.
struct WorkingAgain<'a>(&'a Reporter);

impl<'a> WorkingAgain<'a> {
    fn begin(vertex: &'a Reporter) -> Self {
        vertex.started();
        Self(vertex)
    }
}

impl Drop for WorkingAgain<'_> {
    fn drop(&mut self) {
        self.0.completed(None);
    }
}

impl Record {
    /// Lets the snapshotter read what it serves of the layers.
    async fn enable_snapshotter(&self) {
        let mut sources: Vec<Arc<dyn LayerSource>> = Vec::new();
        for blob in self.layers.iter().filter(|c| c.is_served()).flat_map(|c| c.blobs()) {
            let Some(source) = blob.place.source() else { continue };
            if !sources.iter().any(|known| known.id() == source.id()) {
                sources.push(source.clone());
            }
        }
        for source in sources {
            source.enable_snapshotter().await;
        }
    }
}

impl Records {
    /// Makes the snapshot of `record` exist under its lease. `origin` is a vertex that ended
    /// already: it works again while there is something to do, and reports instead of `progress`.
    pub async fn materialize(
        self: &Arc<Self>,
        record: &Arc<Record>,
        origin: Option<&Reporter>,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        let Some(step) = record.life.step(RecordStage::Committed).await else {
            record.enable_snapshotter().await;
            return Ok(());
        };
        let Some(top) = record.layers.last() else { return Ok(()) };
        self.ensure_lease(record).await?;
        let mut have = 0;
        for (i, stacked) in record.layers.iter().enumerate().rev() {
            if self.keep_snapshot(&record.lease, &stacked.snapshot).await? {
                have = i + 1;
                break;
            }
        }
        for stacked in &record.layers[..have] {
            // Those that others had served: whether a blob is missing depends on it.
            if !stacked.is_served() && stacked.remote_blob().is_some() {
                let labels = self.backend.storage.snapshots.stat(&stacked.snapshot).await?.labels;
                stacked.served.store(labels.contains_key(REMOTE_SNAPSHOT), Relaxed);
            }
        }
        let missing = &record.layers[have..];
        if !missing.is_empty() {
            let _again = origin.map(WorkingAgain::begin);
            self.make_all(missing, record, origin.or(progress)).await?;
        }
        if !missing.is_empty() && !self.keep_snapshot(&record.lease, &top.snapshot).await? {
            return Err(vanished(&top.snapshot));
        }
        step.done();
        Ok(())
    }

    async fn make_all(
        self: &Arc<Self>,
        missing: &[Arc<StackedLayer>],
        record: &Arc<Record>,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        let mut fetches = Fetches::new(self, record, missing, progress);
        for (i, stacked) in missing.iter().enumerate() {
            self.make(i, &mut fetches).await.context(|| {
                format!("make layer {} ({})", stacked.diff_id, record.latest_description())
            })?;
        }
        Ok(())
    }

    /// Makes the snapshot of the missing layer `i` on top of its parent's.
    async fn make(self: &Arc<Self>, i: usize, fetches: &mut Fetches<'_>) -> Result<()> {
        let (stacked, record, progress) = (&fetches.missing[i], fetches.record, fetches.progress);
        fetches.wait(i).await?;
        let _one = stacked.applying.lock().await;
        if self.keep_snapshot(&record.lease, &stacked.snapshot).await? {
            return Ok(());
        }
        if stacked.own {
            let gone = Fault::not_found(format!("the file system {} is gone, and its layer does not have all of it", stacked.snapshot))
                .hint("it was removed by another program: build again without this cache record, for example after `shipway prune`");
            return Err(lost(stacked, None, gone));
        }
        if let Some(original) = stacked.copy_of()
            && self.keep_snapshot(&record.lease, &original).await?
        {
            let active = Active::prepare(&self.backend, "extract", stacked.parent.as_ref()).await?;
            if self.copy_layer(&original, &active, stacked).await? {
                return active.commit(&record.lease, &stacked.snapshot).await;
            }
        }
        let Some(active) = self.ask(stacked, record, progress).await? else { return Ok(()) };
        fetches.needed(i);
        fetches.wait(i).await?;
        let blob = match self.stored_blob(stacked, record, progress).await {
            Err(e) if e.is_not_found() && stacked.copy_of().is_some() => {
                self.pack(stacked, record, Compression::default()).await?.0
            }
            blob => blob?,
        };
        self.apply(stacked, &blob, &active, progress).await?;
        active.commit(&record.lease, &stacked.snapshot).await
    }

    /// Asks the snapshotter for a layer; gives where to unpack it if there is no other way.
    async fn ask(
        self: &Arc<Self>,
        stacked: &Arc<StackedLayer>,
        record: &Record,
        progress: Option<&Reporter>,
    ) -> Result<Option<Active>> {
        let mut labels = Labels::new();
        let remote = stacked.remote_blob();
        if let Some((blob, source)) = &remote {
            source.enable_snapshotter().await;
            labels.extend(source.remote_labels(blob).await.unwrap_or_default());
        }
        if stacked.is_exact() {
            labels.insert(SNAPSHOT_REF.into(), stacked.chain_id.to_string());
        }
        let parent = stacked.parent.as_ref();
        let lease = match Active::prepare_layer(&self.backend, parent, &labels).await? {
            PreparedLayer::Active(active) => return Ok(Some(active)),
            PreparedLayer::Exists(lease) => lease,
        };
        let name = &stacked.snapshot;
        let kept = self.keep_snapshot(&record.lease, name).await?;
        // It stays in the lease of the record alone.
        let (backend, snapshot) = (self.backend.clone(), name.clone());
        self.backend.background.spawn("forget a snapshot", async move {
            forget(&backend.storage, &lease, &snapshot).await;
        });
        if !kept {
            return Err(vanished(name));
        }
        if let Some((blob, _)) = remote {
            let labels = self.backend.storage.snapshots.stat(name).await?.labels;
            if is_annotated(&blob) || labels.contains_key(REMOTE_SNAPSHOT) {
                stacked.served.store(true, Relaxed);
                self.served.seen(&blob);
                if let Some(p) = progress {
                    p.status(format!("mounting {}", blob.digest), 0, 0, true);
                }
            }
        }
        Ok(None)
    }

    async fn apply(
        &self,
        stacked: &StackedLayer,
        blob: &Descriptor,
        active: &Active,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        let id = format!("extracting {}", blob.digest);
        if let Some(p) = progress {
            p.status(&id, 0, 0, false);
        }
        let found = self.backend.storage.snapshots.apply(blob, &active.mounts).await?;
        if let Some(p) = progress {
            p.status(&id, 0, 0, true);
        }
        if found != stacked.diff_id {
            return Err(Fault::new(
                Code::DataLoss,
                format!(
                    "the blob {} unpacks to {found}, but the image's config promises {}",
                    blob.digest, stacked.diff_id
                ),
            )
            .with_class(shipway_fault::Class::User)
            .hint("the image is inconsistent: build or push it again"));
        }
        let label = Labels::from([(shipway_storage::UNCOMPRESSED.into(), found.to_string())]);
        self.backend.storage.content.update_labels(blob.digest, &label).await.map(drop)
    }

    /// Gives `active` the files of the layer on top of `original`; false if they cannot be
    /// taken from the snapshot, because it was unpacked from another program's tar, or because
    /// files in it mean something else when they are unpacked.
    async fn copy_layer(
        self: &Arc<Self>,
        original: &SnapshotKey,
        active: &Active,
        stacked: &StackedLayer,
    ) -> Result<bool> {
        let info = self.backend.storage.snapshots.stat(original).await?;
        if !exact::is_ours(&info.labels) {
            return Ok(false);
        }
        let (tree, guard) = self.layer_tree(original, info.parent.is_some()).await?;
        let target = match OwnLayer::of(&active.mounts, stacked.parent.is_some())? {
            OwnLayer::Tree(target) => tree_copy::CopyTarget::Layer {
                dir: target.root().to_owned(),
                bottom: stacked.parent.is_none(),
            },
            OwnLayer::Whole(dir) => tree_copy::CopyTarget::Merged(dir),
        };
        let copy = move || {
            let copied = tree_copy::copy(&tree, &target);
            drop(guard);
            copied
        };
        blocking("copy a layer", copy).await
    }
}
