//! Named states that are only read for now: clients' directories after their transfer.

use crate::{
    ImmutableRef, RecordType, RefId,
    immutable::{RefInner, RefKind},
    life::Stage,
    mutable::{hash, name, remember},
    named::NamedEntry,
    record::{Body, RecordMeta},
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
    /// The frozen state with this id, if there was no writer since.
    pub fn frozen(self: &Arc<Self>, id: &RefId) -> Option<ImmutableRef> {
        let (entry, generation) = id.0.split_once('-')?;
        let entry = self.named.list().into_iter().find(|s| s.id.0 == entry)?;
        let mounts = entry.mounts.get()?.clone();
        let mut u = entry.use_.lock();
        if u.evicted || u.writers > 0 || u.generation.to_string() != generation {
            return None;
        }
        u.readers += 1;
        drop(u);
        let description = entry.meta.description.clone();
        Some(Frozen::held(Reader { store: self.clone(), entry }, id.clone(), description, mounts))
    }
}

/// Holds an entry for reading.
pub(crate) struct Reader {
    pub store: Arc<Inner>,
    pub entry: Arc<NamedEntry>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.entry.leave(&self.store, false);
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
        ImmutableRef(Arc::new(RefInner {
            store,
            kind: RefKind::Frozen(frozen),
            origin: OnceLock::new(),
        }))
    }

    pub fn id(&self) -> &RefId {
        &self.id
    }

    pub fn record_type(&self) -> RecordType {
        self.reader.entry.meta.record_type
    }

    pub fn description(&self) -> &str {
        &self.description
    }

    /// Its mounts, for readers.
    pub fn read_only_mounts(&self) -> Vec<Mount> {
        self.mounts.iter().map(Mount::read_only).collect()
    }

    pub fn index(&self) -> &TreeIndex {
        &self.reader.entry.index
    }

    /// The snapshot, for its size.
    pub fn snapshot(&self) -> SnapshotKey {
        match self.layered.get().and_then(ImmutableRef::record).and_then(|r| r.snapshot()) {
            Some(name) => name.clone(),
            None => self.reader.entry.snapshot.clone(),
        }
    }

    /// Makes a layer of it: the entry ends, and its snapshot becomes a committed one in the same
    /// place on the disk, so readers of its files go on undisturbed.
    pub async fn layered(&self) -> Result<ImmutableRef> {
        let make = || async {
            let (store, entry) = (&self.reader.store, &self.reader.entry);
            let generation = entry.use_.lock().generation;
            let mut layered = entry.layered.lock().await;
            if let Some((of, id)) = &*layered
                && *of == generation
                && let Some(made) = store.handle(id)
            {
                return Ok(made);
            }
            let parent = entry.meta.parents.first().and_then(|p| store.handle(p));
            let below = parent.as_ref().map(ImmutableRef::layered_record).transpose()?;
            let info = store.storage.snapshots.stat(&entry.snapshot).await?;
            let over = below.and_then(|r| r.snapshot());
            if info.parent.as_ref() != over {
                return Err(Fault::internal(format!(
                    "the state that {:?} was made from is gone",
                    self.description
                )));
            }
            let layer = hash(store, &self.mounts, over).await?;
            let meta = RecordMeta {
                record_type: entry.meta.record_type,
                description: self.description.clone(),
                created: SystemTime::now(),
                parents: entry.meta.parents.clone(),
                body: Body::Layers(Vec::new()),
            };
            let (store, entry, mounts, below) =
                (store.clone(), entry.clone(), self.mounts.clone(), below.cloned());
            let background = store.background.clone();
            // Cut off in the middle, it would leave an entry without a snapshot, or a snapshot that
            // has no record.
            let work = async move {
                let (record, made) =
                    name(&store, (&entry.snapshot, &mounts), below.as_deref(), &layer, &meta, None)
                        .await?;
                // Otherwise the same files were committed before, and the entry stays what it is.
                if made {
                    remember(&record, &mounts, below.is_some());
                    store.evict_entry(&entry).await;
                }
                record.life.reached(Stage::Committed);
                Ok(store.insert(record))
            };
            let made = background.finish("commit a frozen state", work).await?;
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
