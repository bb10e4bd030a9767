//! States of layers in memory: their records, and the layers that records share.

use crate::{
    active::Active,
    backend::Backend,
    id::RefId,
    layer::StackedLayer,
    life::{Life, RecordStage},
    mount::WeakMount,
    record::{LayerMeta, ReadOrder, RecordBody, RecordMeta, RecordType, lease_of},
    served::Served,
};
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_oci::{ChainId, DiffId, Digest};
use shipway_storage::{LeaseId, Mount, SnapshotKey, Usage};
use shipway_treehash::TreeIndex;
use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    ops::Deref,
    sync::{Arc, OnceLock, Weak},
    time::SystemTime,
};

/// A state made of layers.
pub(crate) struct Record {
    pub id: RefId,
    pub record_type: RecordType,
    pub description: String,
    /// The description in the latest request for the same state: images may have all their layers
    /// in common.
    latest: Mutex<Option<String>>,
    pub created: SystemTime,
    pub parents: Vec<RefId>,
    pub layers: Vec<Arc<StackedLayer>>,
    pub lease: LeaseId,
    pub life: Life,
    pub view: tokio::sync::Mutex<Weak<Active>>,
    /// Mounts that show the state without a view, where they are known.
    pub shown: OnceLock<Vec<Mount>>,
    pub mounted: tokio::sync::Mutex<Option<WeakMount>>,
    pub index: TreeIndex,
    /// What the step opened that made it, if that was noted.
    pub opened: OnceLock<ReadOrder>,
    /// Blobs that were put into the lease in this run.
    pub secured: Mutex<HashSet<Digest>>,
}

impl Record {
    /// A record of `layers`, whatever the body of `meta` says.
    pub fn new(
        id: RefId,
        meta: RecordMeta,
        layers: Vec<Arc<StackedLayer>>,
        stage: RecordStage,
    ) -> Self {
        Self {
            lease: lease_of(&id),
            id,
            record_type: meta.record_type,
            description: meta.description,
            latest: Mutex::default(),
            created: meta.created,
            parents: meta.parents,
            layers,
            life: Life::at(stage),
            view: Default::default(),
            shown: OnceLock::new(),
            mounted: Default::default(),
            index: TreeIndex::default(),
            opened: OnceLock::new(),
            secured: Mutex::default(),
        }
    }

    /// What its lease's labels have to say.
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
            body: RecordBody::Layers(layers.collect()),
        }
    }

    /// The description given with the latest request for it.
    pub fn latest_description(&self) -> String {
        self.latest.lock().clone().unwrap_or_else(|| self.description.clone())
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

/// Something on the disk that a record has, alone or with others.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub name: PartName,
    pub usage: Usage,
}

/// What it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PartName {
    Snapshot(SnapshotKey),
    Blob(Digest),
}

impl Part {
    fn snapshot(name: &SnapshotKey, usage: Usage) -> Self {
        Self { name: PartName::Snapshot(name.clone()), usage }
    }
}

/// A record in use, which no prune takes. The last use of an evicted record deletes its lease.
pub(crate) struct RecordUse {
    record: Arc<Record>,
    records: Arc<Records>,
}

impl RecordUse {
    /// A use of a record, whether or not the table has it.
    pub fn of(records: &Arc<Records>, record: Arc<Record>) -> Self {
        record.life.retain();
        Self { record, records: records.clone() }
    }

    /// The records that it is one of.
    pub fn records(&self) -> &Arc<Records> {
        &self.records
    }
}

impl Deref for RecordUse {
    type Target = Arc<Record>;

    fn deref(&self) -> &Arc<Record> {
        &self.record
    }
}

impl Drop for RecordUse {
    fn drop(&mut self) {
        let (record, backend) = (&self.record, &self.records.backend);
        backend.uses.used(&record.id);
        // Evicted, and nothing in the table has its id, and so its lease, by now.
        if record.life.release() && self.records.peek(&record.id).is_none() {
            backend.start_lease_delete(&record.lease);
        }
    }
}

/// The records of one namespace, and the layers that they are made of.
pub(crate) struct Records {
    pub backend: Arc<Backend>,
    /// Which layers the snapshotter is known to serve.
    pub served: Served,
    all: Mutex<HashMap<RefId, Arc<Record>>>,
    layers: Mutex<HashMap<SnapshotKey, Weak<StackedLayer>>>,
}

impl Records {
    /// None yet.
    pub fn new(backend: Arc<Backend>) -> Arc<Self> {
        Arc::new(Self {
            backend,
            served: Served::default(),
            all: Mutex::default(),
            layers: Mutex::default(),
        })
    }

    /// The layer `diff_id` on top of `below`, as unpacking makes it.
    pub fn stacked_layer(
        &self,
        diff_id: DiffId,
        below: Option<&Arc<StackedLayer>>,
    ) -> Arc<StackedLayer> {
        let below = below.map(|c| &**c);
        let name = self.backend.distrusted.name_over(below, diff_id);
        self.named_layer(diff_id, below, name, false)
    }

    /// The layer whose snapshot has more than the layer records, and so a name of its own.
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
        let mut layers = self.layers.lock();
        if let Some(stacked) = layers.get(&snapshot).and_then(Weak::upgrade) {
            return stacked;
        }
        if layers.len() > 256 && layers.len() == layers.capacity() {
            layers.retain(|_, c| c.strong_count() > 0);
        }
        let stacked = Arc::new(StackedLayer::new(diff_id, below, snapshot.clone(), own));
        layers.insert(snapshot, Arc::downgrade(&stacked));
        stacked
    }

    /// The layer on top of a snapshot, if a record has it.
    pub fn known_layer(&self, snapshot: &SnapshotKey) -> Option<Arc<StackedLayer>> {
        self.layers.lock().get(snapshot).and_then(Weak::upgrade)
    }

    /// Takes over a record of an earlier run.
    pub fn load(&self, record: Record) {
        self.all.lock().insert(record.id.clone(), Arc::new(record));
    }

    /// A use of `record`, or of the one that has its id already.
    pub fn insert(self: &Arc<Self>, record: Record) -> RecordUse {
        let mut all = self.all.lock();
        let record = match all.entry(record.id.clone()) {
            Entry::Occupied(known) => {
                *known.get().latest.lock() = Some(record.description);
                known.get().clone()
            }
            Entry::Vacant(vacant) => vacant.insert(Arc::new(record)).clone(),
        };
        RecordUse::of(self, record)
    }

    /// A use of the record with this id.
    pub fn find(self: &Arc<Self>, id: &RefId) -> Option<RecordUse> {
        // Counted before the table is free, so that no prune comes between.
        let all = self.all.lock();
        Some(RecordUse::of(self, all.get(id)?.clone()))
    }

    /// The record with this id, not counted as a use.
    pub fn peek(&self, id: &RefId) -> Option<Arc<Record>> {
        self.all.lock().get(id).cloned()
    }

    /// All of them.
    pub fn list(&self) -> Vec<Arc<Record>> {
        self.all.lock().values().cloned().collect()
    }

    /// Takes a record out of the table if it is not in use.
    pub fn take_unused(&self, id: &RefId) -> Option<Arc<Record>> {
        let mut all = self.all.lock();
        let record = all.get(id)?;
        if !record.life.evict_unused() {
            return None;
        }
        all.remove(id)
    }

    /// Takes a record that is broken out of the table; existing handles see errors, and the last of
    /// them deletes its lease.
    pub fn evict(&self, record: &Record) {
        if record.life.evict() {
            self.all.lock().remove(&record.id);
        }
    }

    /// Bytes of a record's own layers, parents not counted, and of the blobs known for them.
    pub async fn size_of(&self, record: &Record) -> Result<u64> {
        Ok(self.parts_of(record).await?.iter().map(|part| part.usage.bytes).sum())
    }

    /// The snapshots of a record's own layers, parents not counted, and the blobs stored for them.
    pub async fn parts_of(&self, record: &Record) -> Result<Vec<Part>> {
        let parents: Vec<Arc<Record>> =
            record.parents.iter().filter_map(|p| self.peek(p)).collect();
        let below: HashSet<&SnapshotKey> =
            parents.iter().flat_map(|p| &p.layers).map(|c| &c.snapshot).collect();
        let mut parts = Vec::new();
        for stacked in record.layers.iter().filter(|c| !below.contains(&c.snapshot)) {
            match stacked.usage.get() {
                Some(usage) => parts.push(Part::snapshot(&stacked.snapshot, *usage)),
                None => {
                    let part = self.snapshot_part(&stacked.snapshot).await?;
                    // Of one that is served, more comes to the disk as it is read.
                    if let Some(part) = part.as_ref().filter(|_| !stacked.is_served()) {
                        let _ = stacked.usage.set(part.usage);
                    }
                    parts.extend(part);
                }
            }
            parts.extend(stacked.stored_blobs().iter().map(|blob| Part {
                name: PartName::Blob(blob.digest),
                usage: Usage { bytes: blob.size, inodes: 1 },
            }));
        }
        Ok(parts)
    }

    /// What a snapshot takes, if there is one of that name.
    pub async fn snapshot_part(&self, snapshot: &SnapshotKey) -> Result<Option<Part>> {
        match self.backend.storage.snapshots.usage(snapshot).await {
            Ok(usage) => Ok(Some(Part::snapshot(snapshot, usage))),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }
}
