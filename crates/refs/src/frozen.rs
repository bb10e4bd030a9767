//! Named states that are only read for now: clients' directories after their transfer.

use crate::{
    ImmutableRef, RecordType, RefId,
    immutable::{Held, HeldBody},
    layer::lock,
    mutable::{hash, name, remember},
    named::Slot,
    record::{Body, Note},
    store::Inner,
};
use shipway_fault::{Context as _, Fault, Result};
use shipway_storage::{Mount, SnapshotKey};
use shipway_treehash::TreeIndex;
use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};
use tokio::sync::OnceCell;

impl Inner {
    /// The frozen state with this id, if nobody wrote since.
    pub fn frozen(self: &Arc<Self>, id: &RefId) -> Option<ImmutableRef> {
        let (slot, generation) = id.0.split_once('-')?;
        let slot = self.slots.list().into_iter().find(|s| s.id.0 == slot)?;
        let mounts = slot.mounts.get()?.clone();
        let mut u = lock(&slot.use_);
        if u.dead || u.writers > 0 || u.generation.to_string() != generation {
            return None;
        }
        u.readers += 1;
        drop(u);
        let description = slot.note.description.clone();
        Some(Frozen::held(Reader { store: self.clone(), slot }, id.clone(), description, mounts))
    }
}

/// Has a slot for reading.
pub(crate) struct Reader {
    pub store: Arc<Inner>,
    pub slot: Arc<Slot>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.slot.leave(&self.store, false);
    }
}

/// A named state that is only read for now.
pub(crate) struct Frozen {
    reader: Reader,
    id: RefId,
    description: String,
    mounts: Vec<Mount>,
    layered: OnceCell<ImmutableRef>,
}

impl Frozen {
    pub fn held(
        reader: Reader,
        id: RefId,
        description: String,
        mounts: Vec<Mount>,
    ) -> ImmutableRef {
        let store = reader.store.clone();
        let frozen = Self { reader, id, description, mounts, layered: OnceCell::new() };
        ImmutableRef(Arc::new(Held {
            store,
            body: HeldBody::Frozen(frozen),
            origin: OnceLock::new(),
        }))
    }

    pub fn id(&self) -> &RefId {
        &self.id
    }

    pub fn record_type(&self) -> RecordType {
        self.reader.slot.note.record_type
    }

    pub fn description(&self) -> &str {
        &self.description
    }

    /// Its mounts, for readers.
    pub fn read_only_mounts(&self) -> Vec<Mount> {
        self.mounts.iter().map(Mount::read_only).collect()
    }

    pub fn index(&self) -> &TreeIndex {
        &self.reader.slot.index
    }

    /// The snapshot, for its size.
    pub fn snapshot(&self) -> SnapshotKey {
        match self.layered.get().and_then(ImmutableRef::record).and_then(|r| r.snapshot()) {
            Some(name) => name.clone(),
            None => self.reader.slot.snapshot.clone(),
        }
    }

    /// Makes a layer of it: the slot ends, and its snapshot becomes a committed one in the same
    /// place on the disk, so whoever reads its files goes on undisturbed.
    pub async fn layered(&self) -> Result<ImmutableRef> {
        let make = || async {
            let (store, slot) = (&self.reader.store, &self.reader.slot);
            let generation = lock(&slot.use_).generation;
            let mut layered = slot.layered.lock().await;
            if let Some((of, id)) = &*layered
                && *of == generation
                && let Some(made) = store.held(id)
            {
                return Ok(made);
            }
            let parent = slot.note.parents.first().and_then(|p| store.held(p));
            let below = parent.as_ref().map(ImmutableRef::layered_record).transpose()?;
            let info = store.storage.snapshots.stat(&slot.snapshot).await?;
            let over = below.and_then(|r| r.snapshot());
            if info.parent.as_ref() != over {
                return Err(Fault::internal(format!(
                    "the state that {:?} was made from is gone",
                    self.description
                )));
            }
            let layer = hash(store, &self.mounts, over).await?;
            let note = Note {
                record_type: slot.note.record_type,
                description: self.description.clone(),
                created: SystemTime::now(),
                parents: slot.note.parents.clone(),
                body: Body::Layers(Vec::new()),
            };
            let (store, slot, mounts, below) =
                (store.clone(), slot.clone(), self.mounts.clone(), below.cloned());
            let background = store.background.clone();
            // Cut off in the middle, it would leave a slot without a snapshot, or a snapshot that
            // nobody knows.
            let work = async move {
                let (record, made) =
                    name(&store, (&slot.snapshot, &mounts), below.as_deref(), &layer, &note, None)
                        .await?;
                // Otherwise the same files were committed before, and the slot stays what it is.
                if made {
                    remember(&record, &mounts, below.is_some());
                    store.bury_slot(&slot).await;
                }
                *record.materialized.lock().await = true;
                Ok(store.insert(record))
            };
            let made = background.finish(work).await?;
            *layered = Some((generation, made.id().clone()));
            Ok(made)
        };
        self.layered
            .get_or_try_init(make)
            .await
            .context(|| format!("make a layer of {:?}", self.description))
            .cloned()
    }
}
