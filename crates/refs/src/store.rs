//! The store: finds and makes states.

use crate::{
    ImmutableRef, LayerOrigins, LayerSource, LazyLayer, MutableRef, RecordType, RefId,
    background::Background,
    durable::{self, Durable},
    exact::{self, Distrusted},
    immutable::RefInner,
    last_used::LastUsed,
    layer::{KnownBlob, NoOrigins, Place, StackedLayer},
    life::{Life, Stage},
    materialize::{Active, Served},
    mount::{self, WeakMount},
    named::NamedTable,
    record::{self, Body, KIND, KIND_RUN, LayerMeta, RecordMeta, fresh_id, lease_of},
    run_lease::RunLeases,
};
use parking_lot::Mutex;
use shipway_fault::{Context as _, Result};
use shipway_oci::{ChainId, Descriptor, DiffId, Digest};
use shipway_progress::Reporter;
use shipway_storage::{
    LeaseId, LeaseResource, Mount, REMOTE_SNAPSHOT, SnapshotInfo, SnapshotKey, Storage,
};
use shipway_task::blocking;
use shipway_treehash::TreeIndex;
use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    path::PathBuf,
    sync::{Arc, OnceLock, Weak, atomic::Ordering},
    time::SystemTime,
};

/// All states of one namespace. Clones share it.
#[derive(Clone)]
pub struct RefStore(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub storage: Storage,
    pub mounts: PathBuf,
    pub durable: Arc<Durable>,
    pub run_leases: RunLeases,
    pub background: Background,
    pub uses: LastUsed,
    pub named: NamedTable,
    pub distrusted: Distrusted,
    /// Which layers the snapshotter is known to serve.
    pub served: Served,
    pub pruning: tokio::sync::Mutex<()>,
    /// Leases that should have ended.
    leases_to_retry: Mutex<Vec<LeaseId>>,
    records: Mutex<HashMap<RefId, Arc<Record>>>,
    stack: Mutex<HashMap<SnapshotKey, Weak<StackedLayer>>>,
}

/// A state made of layers.
pub(crate) struct Record {
    pub id: RefId,
    pub record_type: RecordType,
    pub description: String,
    /// What it was asked for as since, under another name: images may have all their layers in
    /// common.
    asked: Mutex<Option<String>>,
    pub created: SystemTime,
    pub parents: Vec<RefId>,
    pub layers: Vec<Arc<StackedLayer>>,
    pub lease: LeaseId,
    pub life: Life,
    pub view: tokio::sync::Mutex<Weak<Active>>,
    /// Mounts that show the state without a view, where they are known.
    pub shown: OnceLock<Vec<Mount>>,
    pub mounted: tokio::sync::Mutex<Option<WeakMount>>,
    pub size: Mutex<Option<u64>>,
    pub index: TreeIndex,
    /// Blobs that were put into the lease in this run.
    pub secured: Mutex<HashSet<Digest>>,
}

impl Record {
    pub fn new(id: RefId, meta: RecordMeta, layers: Vec<Arc<StackedLayer>>, stage: Stage) -> Self {
        Self {
            lease: lease_of(&id),
            id,
            record_type: meta.record_type,
            description: meta.description,
            asked: Mutex::default(),
            created: meta.created,
            parents: meta.parents,
            layers,
            life: Life::at(stage),
            view: Default::default(),
            shown: OnceLock::new(),
            mounted: Default::default(),
            size: Mutex::default(),
            index: TreeIndex::default(),
            secured: Mutex::default(),
        }
    }

    pub fn meta(&self) -> RecordMeta {
        let layers = self.layers.iter().map(|c| {
            let best = c.best_blob();
            let origin = best.as_ref().and_then(|b| b.place.source()?.origin());
            let blob = best.map(|b| b.descriptor);
            let own = c.own.then(|| c.snapshot.clone());
            LayerMeta {
                diff_id: c.diff_id,
                blob,
                origin,
                copy_of: c.copy_of(),
                own,
                blob_only: c.is_blob_only(),
                created: c.created(),
            }
        });
        RecordMeta {
            record_type: self.record_type,
            description: self.description.clone(),
            created: self.created,
            parents: self.parents.clone(),
            body: Body::Layers(layers.collect()),
        }
    }

    /// The description given with the latest request for it.
    pub fn latest_description(&self) -> String {
        self.asked.lock().clone().unwrap_or_else(|| self.description.clone())
    }

    /// What unpacking its layers gives.
    pub fn chain(&self) -> Option<ChainId> {
        self.layers.last().map(|c| c.chain_id)
    }

    /// Name of its snapshot.
    pub fn snapshot(&self) -> Option<&SnapshotKey> {
        self.layers.last().map(|c| &c.snapshot)
    }
}

impl RefStore {
    /// Opens the states that leases record, after throwing away what an earlier run left half
    /// done. `root` is a directory of ours for mount points and what may be lost.
    pub async fn open(storage: Storage, root: PathBuf) -> Result<Self> {
        Self::open_in_boot(storage, root, &durable::boot_id()?).await
    }

    /// [`RefStore::open`] where layers that an earlier run had not fetched can still be fetched,
    /// from what `origins` finds.
    pub async fn open_with(
        storage: Storage,
        root: PathBuf,
        origins: &dyn LayerOrigins,
    ) -> Result<Self> {
        Self::opened(storage, root, &durable::boot_id()?, origins).await
    }

    /// [`RefStore::open`] in the life of the machine that is called `boot`: of an earlier one only
    /// what is on the disk is left.
    pub async fn open_in_boot(storage: Storage, root: PathBuf, boot: &str) -> Result<Self> {
        Self::opened(storage, root, boot, &NoOrigins).await
    }

    async fn opened(
        storage: Storage,
        root: PathBuf,
        boot: &str,
        origins: &dyn LayerOrigins,
    ) -> Result<Self> {
        let mounts = root.join("mnt");
        let points = mounts.clone();
        blocking("sweep mounts", move || mount::sweep(&points)).await?;
        let inner = Inner {
            storage,
            mounts,
            durable: Durable::open(root.join("durable.json"), boot)?,
            run_leases: RunLeases::new(),
            background: Background::new(),
            uses: LastUsed::load(root.join("uses.json")),
            named: NamedTable::default(),
            distrusted: Distrusted::default(),
            served: Served::default(),
            pruning: Default::default(),
            leases_to_retry: Mutex::default(),
            records: Mutex::default(),
            stack: Mutex::default(),
        };
        inner.load(origins).await.context(|| "read the build cache's leases in containerd")?;
        Ok(Self(Arc::new(inner)))
    }

    /// The storage beneath.
    pub fn storage(&self) -> &Storage {
        &self.0.storage
    }

    /// The state without layers.
    pub fn scratch(&self) -> Result<ImmutableRef> {
        Ok(self.0.clone().scratch())
    }

    /// The state of an image's layers, lowest first; nothing is fetched. The same layers give the
    /// same id.
    pub async fn image(
        &self,
        layers: Vec<LazyLayer>,
        description: impl Into<String>,
        record_type: RecordType,
    ) -> Result<ImmutableRef> {
        if layers.is_empty() {
            return self.scratch();
        }
        let mut seed = String::from("image");
        let mut stack: Vec<Arc<StackedLayer>> = Vec::with_capacity(layers.len());
        for layer in layers {
            seed += &format!(" {} {}", layer.diff_id, layer.descriptor.digest);
            let stacked = self.0.stacked_layer(layer.diff_id, stack.last());
            let place = layer.source.map_or(Place::Stored(None), Place::Remote);
            stacked.know(KnownBlob { descriptor: layer.descriptor, place });
            if let Some(created) = layer.created {
                stacked.set_created(created);
            }
            stack.push(stacked);
        }
        let meta = RecordMeta {
            record_type,
            description: description.into(),
            created: SystemTime::now(),
            parents: Vec::new(),
            body: Body::Layers(Vec::new()),
        };
        Ok(self.0.insert(Record::new(record::id_of(seed), meta, stack, Stage::Lazy)))
    }

    /// A new writable state on top of `parent` (which is made to exist), or empty.
    pub async fn mutable(
        &self,
        parent: Option<&ImmutableRef>,
        description: impl Into<String>,
        record_type: RecordType,
        progress: Option<&Reporter>,
    ) -> Result<MutableRef> {
        MutableRef::make(&self.0, parent, description.into(), record_type, progress).await
    }

    /// The state with this id, if it exists still, here, whole. Counts as a use.
    pub async fn get(&self, id: &RefId) -> Option<ImmutableRef> {
        if id.0 == SCRATCH {
            return self.scratch().ok();
        }
        if let Some(frozen) = self.0.frozen(id) {
            return Some(frozen);
        }
        let found = self.0.handle(id)?;
        let record = found.record()?;
        if self.0.is_whole(record).await {
            return Some(found);
        }
        tracing::info!(%id, "cached state is gone from containerd, dropping its record");
        self.0.evict(record);
        None
    }

    /// Waits until what was committed is on the disk.
    pub async fn sync(&self) -> Result<()> {
        self.0.durable.sync(false).await
    }

    /// The end: waits until everything is cleaned up, and on the disk. Nothing may be written
    /// afterwards.
    pub async fn close(&self) -> Result<()> {
        self.drained().await;
        self.0.durable.sync(true).await
    }

    /// Waits until everything dropped so far is cleaned up.
    pub async fn drained(&self) {
        self.0.background.drained().await;
        if let Err(e) = self.0.run_leases.delete_unused(&self.0.storage, false).await {
            tracing::debug!(error = %e, "failed to delete unused lease, will retry at the next start");
        }
        self.0.uses.save().await;
    }
}

const SCRATCH: &str = "scratch";

/// Where the blobs are that records name.
struct Origins<'a> {
    origins: &'a dyn LayerOrigins,
    /// The sources that were found; layers of one image share theirs.
    sources: HashMap<String, Option<Arc<dyn LayerSource>>>,
    /// What the content store has, once that was asked.
    stored: Option<HashSet<Digest>>,
}

impl Origins<'_> {
    /// Where a blob is that came from `origin`.
    async fn place(
        &mut self,
        store: &Inner,
        blob: &Descriptor,
        origin: Option<String>,
    ) -> Result<Place> {
        let Some(origin) = origin else { return Ok(Place::Stored(None)) };
        let origins = self.origins;
        let find = |origin: &String| origins.source(origin);
        let source = self.sources.entry(origin).or_insert_with_key(find).clone();
        let Some(source) = source else { return Ok(Place::Stored(None)) };
        let stored = match &mut self.stored {
            Some(stored) => stored,
            none => {
                let all = store.storage.content.list(&[]).await?;
                none.insert(all.into_iter().map(|b| b.digest).collect())
            }
        };
        Ok(match stored.contains(&blob.digest) {
            true => Place::Stored(Some(source)),
            false => Place::Remote(source),
        })
    }
}

impl Inner {
    async fn load(&self, origins: &dyn LayerOrigins) -> Result<()> {
        let leases = self.storage.leases.list(&[format!("labels.\"{KIND}\"")]).await?;
        let all = self.storage.snapshots.list(&[]).await?;
        self.distrusted.learn(&all);
        let served: HashSet<SnapshotKey> = all
            .iter()
            .filter(|s| s.labels.contains_key(REMOTE_SNAPSHOT))
            .map(|s| s.key.clone())
            .collect();
        self.served.learn(!served.is_empty());
        let mut known = Origins { origins, sources: HashMap::new(), stored: None };
        let (lost, whole): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|s| self.durable.is_lost(&s.key, &s.labels));
        let lost: HashMap<SnapshotKey, Option<SnapshotKey>> =
            lost.into_iter().map(|s| (s.key, s.parent)).collect();
        let on_lost = |s: &SnapshotInfo| s.parent.as_ref().is_some_and(|p| lost.contains_key(p));
        let snapshots: HashSet<SnapshotKey> =
            whole.into_iter().filter(|s| !on_lost(s)).map(|s| s.key).collect();
        // What is in the way of a removal has to be gone first.
        let at_once = !lost.is_empty();
        for lease in leases {
            let stale = lease.labels.get(KIND).is_some_and(|k| k == KIND_RUN);
            let Some((id, meta)) = record::read(&lease) else {
                if stale {
                    self.storage.leases.delete(&lease.id, at_once).await?;
                }
                continue;
            };
            match &meta.body {
                Body::Layers(layers) => {
                    let mut stack: Vec<Arc<StackedLayer>> = Vec::new();
                    for layer in layers {
                        let below = stack.last();
                        let stacked = match &layer.own {
                            Some(own) => self.own_layer(layer.diff_id, below, own.clone()),
                            None => self.stacked_layer(layer.diff_id, below),
                        };
                        if let Some(descriptor) = layer.blob.clone() {
                            let place = known.place(self, &descriptor, layer.origin.clone());
                            stacked.know(KnownBlob { place: place.await?, descriptor });
                        }
                        if let Some(original) = &layer.copy_of {
                            stacked.set_copy_of(original.clone());
                        }
                        stacked.blob_only.store(layer.blob_only, Ordering::Relaxed);
                        stacked.served.store(served.contains(&stacked.snapshot), Ordering::Relaxed);
                        if let Some(created) = layer.created {
                            stacked.set_created(created);
                        }
                        stack.push(stacked);
                    }
                    // What another version recorded may not be what its layers say.
                    let whole = exact::is_ours(&lease.labels)
                        && stack.last().is_some_and(|c| snapshots.contains(&c.snapshot));
                    if whole {
                        let record =
                            Arc::new(Record::new(id.clone(), meta, stack, Stage::Committed));
                        self.records.lock().insert(id, record);
                    } else {
                        self.storage.leases.delete(&lease.id, at_once).await?;
                    }
                }
                // What can be fetched anew is: which of its files are truncated is unknown.
                Body::Named { snapshot, .. }
                    if snapshots.contains(snapshot)
                        && !(self.durable.was_cut() && meta.record_type.is_source()) =>
                {
                    self.named.load(id, meta);
                }
                Body::Named { .. } => self.storage.leases.delete(&lease.id, at_once).await?,
            }
        }
        let left = self.remove_lost(lost).await?;
        self.durable.begin(left).await
    }

    /// Removes the snapshots that a power cut may have made short (each with its parent), and names
    /// those that others still use.
    async fn remove_lost(
        &self,
        mut lost: HashMap<SnapshotKey, Option<SnapshotKey>>,
    ) -> Result<HashSet<SnapshotKey>> {
        if !lost.is_empty() {
            tracing::warn!(
                snapshots = lost.len(),
                "the machine lost power: what was not on the disk yet is removed, and built again when it is needed"
            );
        }
        let mut left = HashSet::new();
        // From above: what others are made from cannot be removed.
        while !lost.is_empty() {
            let below: HashSet<SnapshotKey> = lost.values().flatten().cloned().collect();
            let (above, rest): (HashMap<_, _>, HashMap<_, _>) =
                lost.into_iter().partition(|(key, _)| !below.contains(key));
            for key in above.into_keys() {
                match self.storage.snapshots.remove(&key).await {
                    Err(e) if !e.is_not_found() => {
                        tracing::warn!(%key, error = %e, "snapshot may be truncated after a power loss and is still in use");
                        left.insert(key);
                    }
                    _ => {}
                }
            }
            lost = rest;
        }
        Ok(left)
    }

    /// The layer `diff_id` on top of `below`, as unpacking makes it.
    pub fn stacked_layer(
        &self,
        diff_id: DiffId,
        below: Option<&Arc<StackedLayer>>,
    ) -> Arc<StackedLayer> {
        let below = below.map(|c| &**c);
        self.named_layer(diff_id, below, self.name_over(below, diff_id), false)
    }

    /// The layer whose snapshot has more than the layer tells, and so a name of its own.
    pub fn own_layer(
        &self,
        diff_id: DiffId,
        below: Option<&Arc<StackedLayer>>,
        snapshot: SnapshotKey,
    ) -> Arc<StackedLayer> {
        self.named_layer(diff_id, below.map(|c| &**c), snapshot, true)
    }

    fn named_layer(
        &self,
        diff_id: DiffId,
        below: Option<&StackedLayer>,
        snapshot: SnapshotKey,
        own: bool,
    ) -> Arc<StackedLayer> {
        let mut stack = self.stack.lock();
        if let Some(stacked) = stack.get(&snapshot).and_then(Weak::upgrade) {
            return stacked;
        }
        if stack.len() > 256 && stack.len() == stack.capacity() {
            stack.retain(|_, c| c.strong_count() > 0);
        }
        let stacked = Arc::new(StackedLayer::new(diff_id, below, snapshot.clone(), own));
        stack.insert(snapshot, Arc::downgrade(&stacked));
        stacked
    }

    /// The layer on top of a snapshot, if a handle holds it.
    pub fn known_layer(&self, snapshot: &SnapshotKey) -> Option<Arc<StackedLayer>> {
        self.stack.lock().get(snapshot).and_then(Weak::upgrade)
    }

    pub fn scratch(self: Arc<Self>) -> ImmutableRef {
        let meta = RecordMeta {
            record_type: RecordType::Internal,
            description: SCRATCH.into(),
            created: SystemTime::UNIX_EPOCH,
            parents: Vec::new(),
            body: Body::Layers(Vec::new()),
        };
        let record = Record::new(RefId(SCRATCH.into()), meta, Vec::new(), Stage::Committed);
        RefInner::layers(self, Arc::new(record))
    }

    /// A handle on `record`, or on the one that has its id already.
    pub fn insert(self: &Arc<Self>, record: Record) -> ImmutableRef {
        let mut records = self.records.lock();
        let record = match records.entry(record.id.clone()) {
            Entry::Occupied(known) => {
                *known.get().asked.lock() = Some(record.description);
                known.get().clone()
            }
            Entry::Vacant(place) => place.insert(Arc::new(record)).clone(),
        };
        record.life.retain();
        drop(records);
        let handle = RefInner::layers(self.clone(), record.clone());
        record.life.release();
        handle
    }

    /// A handle on the record with this id.
    pub fn handle(self: &Arc<Self>, id: &RefId) -> Option<ImmutableRef> {
        let record = {
            let records = self.records.lock();
            let record = records.get(id)?;
            // Counted before the table is free, so that no prune comes between.
            record.life.retain();
            record.clone()
        };
        let handle = RefInner::layers(self.clone(), record.clone());
        record.life.release();
        Some(handle)
    }

    /// The record with this id, not counted as a use.
    pub fn peek(&self, id: &RefId) -> Option<Arc<Record>> {
        self.records.lock().get(id).cloned()
    }

    pub fn records(&self) -> Vec<Arc<Record>> {
        self.records.lock().values().cloned().collect()
    }

    /// Takes a record out of the table if it is not in use.
    pub fn take_unused(&self, id: &RefId) -> Option<Arc<Record>> {
        let mut records = self.records.lock();
        let record = records.get(id)?;
        if !record.life.evict_unused() {
            return None;
        }
        records.remove(id)
    }

    /// Takes a record that is broken out of the table; existing handles see errors, and the last of
    /// them deletes its lease.
    fn evict(&self, record: &Record) {
        if record.life.evict() {
            self.records.lock().remove(&record.id);
        }
    }

    /// Deletes a lease that no record has any more; while containerd is away, with the next retry.
    pub async fn delete_lease(&self, lease: &LeaseId) {
        if let Err(e) = self.storage.leases.delete(lease, false).await {
            tracing::warn!(%lease, error = %e, "failed to delete lease, will retry");
            self.leases_to_retry.lock().push(lease.clone());
        }
    }

    /// Tries again to delete leases after failures; returns whether there were any.
    pub async fn retry_lease_deletes(&self) -> bool {
        let leases_to_retry = std::mem::take(&mut *self.leases_to_retry.lock());
        for lease in &leases_to_retry {
            self.delete_lease(lease).await;
        }
        !leases_to_retry.is_empty()
    }

    /// Makes the lease of a record; its labels are final from then on.
    pub async fn ensure_lease(&self, record: &Record) -> Result<()> {
        let Some(step) = record.life.step(Stage::Leased).await else { return Ok(()) };
        match self.storage.leases.create(&record.lease, &record::labels_of(&record.meta())).await {
            Err(e) if !e.is_already_exists() => {
                Err(e).context(|| format!("record {:?}", record.description))
            }
            _ => {
                step.done();
                Ok(())
            }
        }
    }

    /// Whether a record can still give what it promises: its snapshot exists and its lease keeps
    /// it, or every layer can be had.
    async fn is_whole(&self, record: &Record) -> bool {
        // A record that is being materialized right now can be materialized.
        if record.life.is_committing() {
            return true;
        }
        if record.life.stage() == Stage::Committed {
            let Some(name) = record.snapshot() else { return true };
            let (stat, lease) = tokio::join!(
                self.storage.snapshots.stat(name),
                self.storage.leases.resources(&record.lease)
            );
            // Any other error is containerd's trouble, not the record's.
            let gone = |r: Result<()>| r.is_err_and(|e| e.is_not_found());
            return !gone(stat.map(drop)) && !gone(lease.map(drop));
        }
        // A layer that has neither a blob that can be had nor another place is in its own, with the
        // state that made it.
        let here = record
            .layers
            .iter()
            .filter(|c| c.copy_of().is_none() && !c.blobs().iter().any(KnownBlob::may_be_had));
        for stacked in here {
            if self.storage.snapshots.stat(&stacked.snapshot).await.is_err_and(|e| e.is_not_found())
            {
                return false;
            }
        }
        true
    }

    /// Puts a committed snapshot into a lease; false if it does not exist.
    pub async fn keep_snapshot(&self, lease: &LeaseId, name: &SnapshotKey) -> Result<bool> {
        match self.storage.snapshots.stat(name).await {
            Err(e) if e.is_not_found() => return Ok(false),
            Ok(info) if !self.distrusted.accepts(&info) => return Err(exact::taken(name)),
            Ok(info) if info.labels.contains_key(REMOTE_SNAPSHOT) => {
                if let Some(stacked) = self.known_layer(name) {
                    stacked.served.store(true, Ordering::Relaxed);
                }
            }
            other => drop(other?),
        }
        self.durable.check(name)?;
        self.storage
            .leases
            .add(lease, LeaseResource::Snapshot(self.storage.snapshots.name().into(), name.clone()))
            .await?;
        // It may have gone between the two.
        match self.storage.snapshots.stat(name).await {
            Err(e) if e.is_not_found() => Ok(false),
            other => other.map(|_| true),
        }
    }

    pub fn fresh_key(&self, what: &str) -> SnapshotKey {
        SnapshotKey(format!("shipway-{what}-{}", fresh_id()))
    }
}
