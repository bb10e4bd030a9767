//! The store: the states of a namespace, to be found, made, listed and pruned.

use crate::{
    assemble,
    backend::Backend,
    durable::boot_id,
    frozen::Frozen,
    id::RefId,
    immutable::ImmutableRef,
    inherited::Inherited,
    layer::{LayerOrigins, LazyLayer, NoOrigins},
    layered::{LayeredRef, SCRATCH},
    load::Load,
    merge,
    mutable::MutableRef,
    named::{Filling, NamedRef, NamedRequest},
    named_table::{NamedTable, Sharing},
    prune::{PruneOptions, Pruned},
    record::RecordType,
    records::Records,
    usage::{States, UsageRecord},
};
use shipway_fault::{Context as _, Result};
use shipway_oci::Digest;
use shipway_progress::Reporter;
use shipway_storage::{SnapshotKey, Storage};
use std::{collections::HashSet, path::PathBuf, sync::Arc};

/// All states of one namespace. Clones share it.
#[derive(Clone)]
pub struct RefStore(Arc<Inner>);

struct Inner {
    backend: Arc<Backend>,
    records: Arc<Records>,
    named: Arc<NamedTable>,
    /// Held by the one prune that runs.
    pruning: tokio::sync::Mutex<()>,
}

impl RefStore {
    /// Opens the states that leases record, after throwing away what an earlier run left half
    /// done. `root` is a directory of ours for mount points and what may be lost.
    pub async fn open(storage: Storage, root: PathBuf) -> Result<Self> {
        Self::open_in_boot(storage, root, &boot_id()?).await
    }

    /// [`RefStore::open`] where layers that an earlier run had not fetched can still be fetched,
    /// from what `origins` finds, and files that were not fetched can be hashed if `origins` knows
    /// who knows what is in them.
    pub async fn open_with(
        storage: Storage,
        root: PathBuf,
        origins: &dyn LayerOrigins,
    ) -> Result<Self> {
        Ok(Self::opened(storage, root, &boot_id()?, origins, &[]).await?.0)
    }

    /// [`RefStore::open_with`] where processes that an earlier run left go on to use snapshots:
    /// those of each process in `left` are taken over, if all of them are there still.
    pub async fn open_inheriting(
        storage: Storage,
        root: PathBuf,
        origins: &dyn LayerOrigins,
        left: &[Vec<SnapshotKey>],
    ) -> Result<(Self, Vec<Option<Inherited>>)> {
        Self::opened(storage, root, &boot_id()?, origins, left).await
    }

    /// [`RefStore::open`] in the boot of the machine that is called `boot`: of an earlier one only
    /// what is on the disk is left.
    pub async fn open_in_boot(storage: Storage, root: PathBuf, boot: &str) -> Result<Self> {
        Ok(Self::opened(storage, root, boot, &NoOrigins, &[]).await?.0)
    }

    async fn opened(
        storage: Storage,
        root: PathBuf,
        boot: &str,
        origins: &dyn LayerOrigins,
        left: &[Vec<SnapshotKey>],
    ) -> Result<(Self, Vec<Option<Inherited>>)> {
        let backend = Backend::open(storage, &root, boot, origins.contents()).await?;
        // Before the leases end that kept them.
        let inherited = Inherited::take(&backend, left)
            .await
            .context(|| "take over the file systems of running steps")?;
        let records = Records::new(backend.clone());
        let named = NamedTable::new(backend.clone());
        let load = Load { backend: &backend, records: &records, named: &named };
        load.run(origins).await.context(|| "read the build cache's leases in containerd")?;
        let store = Self(Arc::new(Inner { backend, records, named, pruning: Default::default() }));
        Ok((store, inherited))
    }

    /// The storage beneath.
    pub fn storage(&self) -> &Storage {
        &self.0.backend.storage
    }

    /// The state without layers.
    pub fn scratch(&self) -> Result<ImmutableRef> {
        Ok(LayeredRef::scratch(&self.0.records).into())
    }

    /// The state of an image's layers, lowest first; nothing is fetched. The same layers give the
    /// same id.
    pub async fn image(
        &self,
        layers: Vec<LazyLayer>,
        description: impl Into<String>,
        record_type: RecordType,
    ) -> Result<ImmutableRef> {
        Ok(assemble::image(&self.0.records, layers, description.into(), record_type).into())
    }

    /// A new writable state on top of `parent` (which is made to exist), or empty.
    pub async fn mutable(
        &self,
        parent: Option<&ImmutableRef>,
        description: impl Into<String>,
        record_type: RecordType,
        progress: Option<&Reporter>,
    ) -> Result<MutableRef> {
        MutableRef::make(&self.0.records, parent, description.into(), record_type, progress).await
    }

    /// The state `key` among `inherited`, which an earlier run of the daemon was writing on top of
    /// `parent`.
    pub async fn resume(
        &self,
        inherited: &mut Inherited,
        key: &SnapshotKey,
        parent: Option<&ImmutableRef>,
        description: impl Into<String>,
        record_type: RecordType,
    ) -> Result<MutableRef> {
        let records = &self.0.records;
        MutableRef::resume(records, inherited, key, parent, description.into(), record_type).await
    }

    /// The named state with this id, for one who had it in an earlier run of the daemon; `None` if
    /// it is gone or others hold it.
    pub async fn named_again(&self, id: &RefId, sharing: Sharing) -> Result<Option<NamedRef>> {
        NamedRef::again(&self.0.records, &self.0.named, id, sharing).await
    }

    /// The named state, as it was left, or a new one.
    pub async fn named(&self, request: NamedRequest) -> Result<NamedRef> {
        NamedRef::take(&self.0.records, &self.0.named, request).await
    }

    /// A new named state to be filled before anybody gets it; `None` if there is one of that key.
    pub async fn fill_named(&self, request: NamedRequest) -> Result<Option<Filling>> {
        NamedRef::fill(&self.0.records, &self.0.named, request).await
    }

    /// Whether there is a named state of a key.
    pub fn has_named(&self, record_type: RecordType, key: &str) -> bool {
        !self.0.named.with_key(key, record_type).is_empty()
    }

    /// Throws away the named states of a key: no new handle finds them, and each vanishes with its
    /// last handle.
    pub fn discard_named(&self, record_type: RecordType, key: &str) {
        let table = &self.0.named;
        table.with_key(key, record_type).iter().for_each(|entry| table.discard(entry));
        // Requests that wait for one get a new one.
        table.wake();
    }

    /// The layers of all `parts`, one on another (row `op.merge`); no file is copied before the
    /// snapshot is needed.
    pub async fn merge(
        &self,
        parts: &[ImmutableRef],
        description: impl Into<String>,
    ) -> Result<ImmutableRef> {
        Ok(merge::merge(&self.0.records, parts, description.into()).await?.into())
    }

    /// What `upper` adds to `lower` (row `op.diff`). Without `lower` it is all of `upper`.
    pub async fn diff(
        &self,
        lower: Option<&ImmutableRef>,
        upper: Option<&ImmutableRef>,
        description: impl Into<String>,
    ) -> Result<ImmutableRef> {
        Ok(merge::diff(&self.0.records, lower, upper, description.into()).await?.into())
    }

    /// The state with this id, if it exists still, here, whole. Counts as a use.
    pub async fn get(&self, id: &RefId) -> Option<ImmutableRef> {
        let (records, named) = (&self.0.records, &self.0.named);
        if id.0 == SCRATCH {
            return self.scratch().ok();
        }
        if let Some(frozen) = Frozen::find(records, named, id) {
            return Some(frozen.into());
        }
        let found = LayeredRef::find(records, id)?;
        if records.is_whole(found.record()).await {
            return Some(found.into());
        }
        tracing::info!(%id, "cached state is gone from containerd, dropping its record");
        records.evict(found.record());
        None
    }

    /// Forgets when and how often a state was used: a prune that need not take all takes it first.
    pub fn forget_use(&self, id: &RefId) {
        self.0.backend.uses.forget(id);
    }

    fn states(&self) -> States<'_> {
        let Inner { backend, records, named, .. } = &*self.0;
        States { backend, records, named }
    }

    /// What is on the disk.
    pub async fn usage(&self) -> Result<Vec<UsageRecord>> {
        self.states().usage().await
    }

    /// Digests of the blobs that are kept for the states there are.
    pub fn blobs_kept(&self) -> HashSet<Digest> {
        self.states().blobs_kept()
    }

    /// Removes what may go, reporting each state to `on_removed` with the bytes that go with it,
    /// and returns once containerd has freed the space. One prune runs at a time.
    pub async fn prune(
        &self,
        options: PruneOptions,
        on_removed: &(dyn Fn(UsageRecord) + Send + Sync),
    ) -> Result<Pruned> {
        let _one = self.0.pruning.lock().await;
        let pruned = self.states().prune(&options, on_removed).await;
        self.0.backend.uses.save().await;
        pruned
    }

    /// Waits for a garbage collection in containerd, which frees what nothing keeps any more, and
    /// before that until everything dropped so far is cleaned up.
    pub async fn collect_garbage(&self) -> Result<()> {
        self.drained().await;
        self.0.backend.collect().await
    }

    /// Waits until what was committed is on the disk.
    pub async fn sync(&self) -> Result<()> {
        self.0.backend.durable.sync(false).await
    }

    /// The end: waits until everything is cleaned up, and on the disk. Nothing may be written
    /// afterwards.
    pub async fn close(&self) -> Result<()> {
        self.drained().await;
        self.0.backend.durable.sync(true).await
    }

    /// Waits until everything dropped so far is cleaned up.
    pub async fn drained(&self) {
        self.0.backend.drained().await;
    }
}
