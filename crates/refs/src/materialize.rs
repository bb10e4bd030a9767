//! Making snapshots of layers: fetch, unpack, verify, commit as the chain id; or copy from another
//! stack.

use crate::{
    Compression, exact,
    layer::{KnownBlob, StackedLayer, lost},
    life::Stage,
    mount::LocalMount,
    run_lease::{RunLease, forget, remove},
    store::{Inner, Record},
    tree_copy,
};
use shipway_archive::{LayerTree, OwnLayer};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest};
use shipway_progress::Reporter;
use shipway_storage::{Labels, LeaseId, LeaseResource, Mount, SnapshotKey};
use shipway_task::{blocking, spawn};
use std::{any::Any, sync::Arc};
use tokio::{sync::Semaphore, task::JoinHandle};

/// Layers of one state that are fetched at the same time.
const PARALLEL_FETCHES: usize = 4;

/// An active snapshot that vanishes unless it is committed, or a view that vanishes.
pub(crate) struct Active {
    store: Arc<Inner>,
    pub lease: RunLease,
    pub key: SnapshotKey,
    pub mounts: Vec<Mount>,
    armed: bool,
}

impl Active {
    pub async fn prepare(
        store: &Arc<Inner>,
        what: &str,
        parent: Option<&SnapshotKey>,
    ) -> Result<Self> {
        let mut active = Self::named(store, what).await?;
        active.mounts = store
            .storage
            .snapshots
            .prepare(&active.lease, &active.key, parent, &Labels::new())
            .await?;
        Ok(active)
    }

    /// A view of a committed snapshot, which need not belong to a record.
    pub async fn view(store: &Arc<Inner>, of: Option<&SnapshotKey>) -> Result<Self> {
        let mut view = Self::named(store, "view").await?;
        view.mounts =
            store.storage.snapshots.view(&view.lease, &view.key, of, &Labels::new()).await?;
        Ok(view)
    }

    /// The name of one that is made next. From here on a call that is cut off leaves nothing
    /// behind.
    async fn named(store: &Arc<Inner>, what: &str) -> Result<Self> {
        let (lease, key) = (store.run_leases.lease(&store.storage).await?, store.fresh_key(what));
        Ok(Self { store: store.clone(), lease, key, mounts: Vec::new(), armed: true })
    }

    /// What was unpacked into it becomes the snapshot `name` under `lease`. One that exists already
    /// is as good.
    pub async fn commit(self, lease: &LeaseId, name: &SnapshotKey) -> Result<()> {
        let store = &self.store;
        match store
            .storage
            .snapshots
            .commit(lease, name, &self.key, &store.durable.labels(&self.mounts))
            .await
        {
            Ok(()) => self.committed(),
            Err(e) if e.is_already_exists() => {
                store.durable.check(name)?;
                if !store.distrusted.accepts(&store.storage.snapshots.stat(name).await?) {
                    return Err(exact::taken(name));
                }
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// It is a committed snapshot now.
    pub fn committed(mut self) {
        self.armed = false;
        let (store, lease, key) = (self.store.clone(), self.lease.clone(), self.key.clone());
        self.store
            .background
            .spawn("forget a snapshot", async move { forget(&store.storage, &lease, &key).await });
    }

    pub async fn release(mut self) -> Result<()> {
        self.armed = false;
        remove(&self.store.storage, &self.lease, &self.key).await
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let (store, lease, key) = (self.store.clone(), self.lease.clone(), self.key.clone());
        self.store.background.spawn("remove a snapshot", async move {
            if let Err(e) = remove(&store.storage, &lease, &key).await {
                tracing::warn!(%key, error = %e, "failed to remove snapshot, will retry at the next start");
            }
        });
    }
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

impl Inner {
    /// Makes the snapshot of `record` exist under its lease. `origin` is a vertex that ended
    /// already: it works again while there is something to do, and speaks instead of `progress`.
    pub async fn materialize(
        self: &Arc<Self>,
        record: &Arc<Record>,
        origin: Option<&Reporter>,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        let Some(step) = record.life.step(Stage::Committed).await else { return Ok(()) };
        let Some(top) = record.layers.last() else { return Ok(()) };
        self.ensure_lease(record).await?;
        let mut have = 0;
        for (i, stacked) in record.layers.iter().enumerate().rev() {
            if self.keep_snapshot(&record.lease, &stacked.snapshot).await? {
                have = i + 1;
                break;
            }
        }
        let missing = &record.layers[have..];
        if !missing.is_empty() {
            let _again = origin.map(WorkingAgain::begin);
            self.make_all(missing, record, origin.or(progress)).await?;
        }
        if !missing.is_empty() && !self.keep_snapshot(&record.lease, &top.snapshot).await? {
            return Err(Fault::new(
                Code::Aborted,
                format!("the snapshot {} vanished while it was made", top.snapshot),
            )
            .hint("something else deletes snapshots in this containerd namespace; build again"));
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
        let named = Arc::new(Semaphore::new(PARALLEL_FETCHES));
        let fetches: Vec<Option<FetchTask>> =
            missing.iter().map(|c| self.start_fetch(c, record, &named, progress)).collect();
        for (stacked, fetch) in missing.iter().zip(fetches) {
            self.make(stacked, record, fetch, progress).await.context(|| {
                format!("make layer {} ({})", stacked.diff_id, record.latest_description())
            })?;
        }
        Ok(())
    }

    fn start_fetch(
        self: &Arc<Self>,
        stacked: &Arc<StackedLayer>,
        record: &Arc<Record>,
        named: &Arc<Semaphore>,
        progress: Option<&Reporter>,
    ) -> Option<FetchTask> {
        if stacked.copy_of().is_some() {
            return None;
        }
        let (store, stacked, record, named, progress) =
            (self.clone(), stacked.clone(), record.clone(), named.clone(), progress.cloned());
        Some(FetchTask(spawn("fetch a blob", async move {
            let _slot = named.acquire().await;
            store.stored_blob(&stacked, &record, progress.as_ref()).await.map(drop)
        })))
    }

    /// Makes one layer's snapshot on top of its parent's.
    async fn make(
        self: &Arc<Self>,
        stacked: &Arc<StackedLayer>,
        record: &Record,
        fetch: Option<FetchTask>,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        if let Some(mut fetch) = fetch {
            (&mut fetch.0).await.map_err(|e| Fault::internal(format!("a fetch failed: {e}")))??;
        }
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
            let active = Active::prepare(self, "extract", stacked.parent.as_ref()).await?;
            if self.copy_layer(&original, &active, stacked).await? {
                return active.commit(&record.lease, &stacked.snapshot).await;
            }
        }
        let blob = match self.stored_blob(stacked, record, progress).await {
            Err(e) if e.is_not_found() && stacked.copy_of().is_some() => {
                self.pack(stacked, record, Compression::default()).await?.0
            }
            blob => blob?,
        };
        let active = Active::prepare(self, "extract", stacked.parent.as_ref()).await?;
        self.apply(stacked, &blob, &active, progress).await?;
        active.commit(&record.lease, &stacked.snapshot).await
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
        let found = self.storage.snapshots.apply(blob, &active.mounts).await?;
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
        self.storage.content.update_labels(blob.digest, &label).await.map(drop)
    }

    /// A blob of the layer that is in the content store and in the lease of `record`; fetched if
    /// need be.
    pub async fn stored_blob(
        &self,
        stacked: &StackedLayer,
        record: &Record,
        progress: Option<&Reporter>,
    ) -> Result<Descriptor> {
        let _one = stacked.fetching.lock().await;
        let mut blobs = stacked.blobs();
        blobs.sort_by_key(|b| !b.is_stored());
        let mut failed = None;
        for blob in blobs {
            match self.secure(stacked, &blob, record, progress).await {
                Ok(true) => return Ok(blob.descriptor),
                Ok(false) => {}
                Err(e) => failed = Some(e),
            }
        }
        Err(failed.unwrap_or_else(|| {
            let gone = Fault::not_found(format!("no blob of layer {} is in containerd, and it has no source to fetch it from", stacked.diff_id))
                .hint("it was removed by another program: build again without this cache record, for example after `shipway prune`");
            lost(stacked, None, gone)
        }))
    }

    /// Puts a stored blob into the lease of `record`; false if it is not stored.
    pub async fn hold(&self, digest: Digest, record: &Record) -> Result<bool> {
        match self.storage.content.info(digest).await {
            // Nothing leaves a lease but with all of it, so once is enough.
            Ok(_) if record.secured.lock().contains(&digest) => return Ok(true),
            Ok(_) => {
                self.storage.leases.add(&record.lease, LeaseResource::Content(digest)).await?;
                match self.storage.content.info(digest).await {
                    Err(e) if e.is_not_found() => {}
                    other => {
                        drop(other?);
                        record.secured.lock().insert(digest);
                        return Ok(true);
                    }
                }
            }
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
        Ok(false)
    }

    /// Puts a blob into the lease of `record`, fetching it if it is not stored; false if it cannot
    /// be had.
    pub async fn secure(
        &self,
        stacked: &StackedLayer,
        blob: &KnownBlob,
        record: &Record,
        progress: Option<&Reporter>,
    ) -> Result<bool> {
        let (digest, lease) = (blob.descriptor.digest, &record.lease);
        if self.hold(digest, record).await? {
            stacked.know(KnownBlob::stored(blob.descriptor.clone()));
            return Ok(true);
        }
        let Some(source) = blob.place.source() else {
            stacked.lost(blob);
            return Ok(false);
        };
        let what = || format!("fetch layer {digest} of {}", source.describe());
        source
            .fetch(&blob.descriptor, &*self.storage.content, lease, progress)
            .await
            .context(what)
            .map_err(|e| lost(stacked, Some(source), e))?;
        record.secured.lock().insert(digest);
        stacked.know(KnownBlob::stored(blob.descriptor.clone()));
        Ok(true)
    }

    /// The tree of a committed layer, and what keeps it readable besides a lease of the caller's.
    pub async fn layer_tree(
        self: &Arc<Self>,
        name: &SnapshotKey,
        parent: bool,
    ) -> Result<(LayerTree, Box<dyn Any + Send + Sync>)> {
        if let Some(tree) = self.known_layer(name).and_then(|c| c.tree.get().cloned())
            && self.storage.snapshots.stat(name).await.is_ok()
        {
            return Ok((tree, Box::new(())));
        }
        let view = Active::view(self, Some(name)).await?;
        match OwnLayer::of(&view.mounts, parent)? {
            OwnLayer::Tree(tree) => Ok((tree, Box::new(view))),
            OwnLayer::Whole(after) => {
                let Some(before) = self.storage.snapshots.stat(name).await?.parent else {
                    return Ok((LayerTree::lowest(after), Box::new(view)));
                };
                let below = Active::view(self, Some(&before)).await?;
                let before =
                    LocalMount::new(&below.mounts, &self.mounts, &self.background, None).await?;
                Ok((LayerTree::compared(before.path(), after), Box::new((before, below, view))))
            }
        }
    }

    /// Gives `active` the files of the layer on top of `original`; false if that cannot be told
    /// from the snapshot, because it was unpacked from another program's tar, or because files in
    /// it mean something else when they are unpacked.
    async fn copy_layer(
        self: &Arc<Self>,
        original: &SnapshotKey,
        active: &Active,
        stacked: &StackedLayer,
    ) -> Result<bool> {
        let info = self.storage.snapshots.stat(original).await?;
        if !exact::is_ours(&info.labels) {
            return Ok(false);
        }
        let (tree, guard) = self.layer_tree(original, info.parent.is_some()).await?;
        let target = match OwnLayer::of(&active.mounts, stacked.parent.is_some())? {
            OwnLayer::Tree(target) => tree_copy::Target::Layer {
                dir: target.root().to_owned(),
                bottom: stacked.parent.is_none(),
            },
            OwnLayer::Whole(dir) => tree_copy::Target::Merged(dir),
        };
        let copy = move || {
            let copied = tree_copy::copy(&tree, &target);
            drop(guard);
            copied
        };
        blocking("copy a layer", copy).await
    }
}
