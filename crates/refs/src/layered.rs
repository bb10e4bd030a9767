//! Handles on states made of layers.

use crate::{
    active::Active,
    id::RefId,
    layer,
    life::RecordStage,
    mount::{LocalMount, WeakMount, is_lasting},
    record::{RecordBody, RecordMeta, RecordType},
    records::{Record, RecordUse, Records},
};
use shipway_fault::{Fault, Result};
use shipway_progress::Reporter;
use shipway_storage::{Mount, SnapshotKey};
use std::{
    any::Any,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

/// The id and the description of the state without layers.
pub(crate) const SCRATCH: &str = "scratch";

/// A read-only view of a state for a process: keep it while the process runs.
#[derive(Clone)]
pub struct View {
    /// The view's key in the snapshotter; `None` where mounts do without one.
    pub key: Option<SnapshotKey>,
    /// Read-only mounts.
    pub mounts: Vec<Mount>,
    /// Removes the view with its last clone.
    pub guard: Arc<dyn Any + Send + Sync>,
}

/// A stack of layers. Clones share it; while one lives, it is in use and not pruned.
#[derive(Clone)]
pub(crate) struct LayeredRef(Arc<LayeredInner>);

struct LayeredInner {
    /// Dropped before the parents: their last use is the later one.
    record: RecordUse,
    /// Kept so that the blobs of their layers stay.
    parents: Vec<LayeredRef>,
    /// Reports fetches, once set.
    origin: OnceLock<Reporter>,
}

impl LayeredRef {
    fn of(record: RecordUse) -> Self {
        let find = |id: &RefId| Self::find(record.records(), id);
        let parents = record.parents.iter().filter_map(find).collect();
        Self(Arc::new(LayeredInner { record, parents, origin: OnceLock::new() }))
    }

    /// A handle on `record`, or on the one that has its id already.
    pub fn insert(records: &Arc<Records>, record: Record) -> Self {
        Self::of(records.insert(record))
    }

    /// A handle on the record with this id.
    pub fn find(records: &Arc<Records>, id: &RefId) -> Option<Self> {
        records.find(id).map(Self::of)
    }

    /// The state without layers, which has no lease and no place in the table.
    pub fn scratch(records: &Arc<Records>) -> Self {
        let meta = RecordMeta {
            record_type: RecordType::Internal,
            description: SCRATCH.into(),
            created: SystemTime::UNIX_EPOCH,
            parents: Vec::new(),
            body: RecordBody::Layers(Vec::new()),
        };
        let record = Record::new(RefId(SCRATCH.into()), meta, Vec::new(), RecordStage::Committed);
        Self::of(RecordUse::of(records, Arc::new(record)))
    }

    /// Its record.
    pub fn record(&self) -> &Arc<Record> {
        &self.0.record
    }

    /// The records that its own is one of.
    pub fn records(&self) -> &Arc<Records> {
        self.0.record.records()
    }

    /// Its identity.
    pub fn id(&self) -> &RefId {
        &self.record().id
    }

    /// The state it was made from, if that is known still.
    pub fn parent(&self) -> Option<&Self> {
        self.0.parents.first()
    }

    /// Whether it has no layers.
    pub fn is_scratch(&self) -> bool {
        self.record().layers.is_empty()
    }

    /// Whether its snapshot is what unpacking its layers gives, under that name.
    pub fn is_exact(&self) -> bool {
        self.record().layers.iter().all(|c| c.is_exact())
    }

    /// Whether it is the very same state, not one that was made again under the same id.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.record(), other.record())
    }

    /// Whether `fault` says that the state can no longer be had.
    pub fn is_lost(&self, fault: &Fault) -> bool {
        let committed = self.record().life.stage() == RecordStage::Committed;
        self.record().layers.iter().any(|c| layer::is_lost(c, committed, fault))
    }

    /// When each of its layers came to be, in whole milliseconds, as far as the states below it are
    /// known still.
    pub fn layer_times(&self) -> Vec<SystemTime> {
        let record = self.record();
        let known = record.layers.iter().map(|c| c.created());
        let mut times = vec![record.created; record.layers.len()];
        let mut state = self;
        while let Some(parent) = state.parent() {
            let below = parent.record();
            times.iter_mut().take(below.layers.len()).for_each(|t| *t = below.created);
            state = parent;
        }
        let whole = |t: SystemTime| {
            let since = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            SystemTime::UNIX_EPOCH + Duration::from_millis(since.as_millis() as u64)
        };
        times.into_iter().zip(known).map(|(time, known)| whole(known.unwrap_or(time))).collect()
    }

    /// Lets `origin` report fetches that other steps cause later. The first one stays.
    pub fn reported_by(&self, origin: &Reporter) {
        let _ = self.0.origin.set(origin.clone());
    }

    /// Makes the snapshot exist. `progress` reports it where the state has no origin.
    pub async fn materialize(&self, progress: Option<&Reporter>) -> Result<()> {
        let origin = self.0.origin.get().filter(|o| o.is_heard() && o.is_completed());
        self.records().materialize(self.record(), origin, progress).await
    }

    /// The state for a process that only reads.
    pub async fn view(&self) -> Result<View> {
        self.materialize(None).await?;
        let record = self.record();
        if let Some(mounts) = record.shown.get() {
            return Ok(View { key: None, mounts: mounts.clone(), guard: self.0.clone() });
        }
        let mut shared = record.view.lock().await;
        let view = match shared.upgrade() {
            Some(view) => view,
            None => {
                let view = Active::view(&self.records().backend, record.snapshot()).await?;
                if let [only @ Mount::Overlay(_)] = &view.mounts[..]
                    && is_lasting(only)
                {
                    // Such mounts name committed layers only, so the next view need not ask.
                    let _ = record.shown.set(view.mounts.clone());
                }
                let view = Arc::new(view);
                *shared = Arc::downgrade(&view);
                view
            }
        };
        Ok(View {
            key: Some(view.key.clone()),
            mounts: view.mounts.clone(),
            guard: Arc::new((view, self.0.clone())),
        })
    }

    /// The state as a read-only directory of the host. Several callers share one mount.
    pub async fn mount(&self) -> Result<LocalMount> {
        let mut mounted = self.record().mounted.lock().await;
        if let Some(mount) = mounted.as_ref().and_then(WeakMount::upgrade) {
            return Ok(mount);
        }
        let view = self.view().await?;
        let guard: Arc<dyn Any + Send + Sync> = Arc::new((view.guard, self.0.clone()));
        let mount = self.records().backend.mount(&view.mounts, Some(guard)).await?;
        *mounted = mount.downgrade();
        Ok(mount)
    }
}
