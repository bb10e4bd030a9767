//! Named states that are only read for now: clients' directories after their transfer.

use crate::{
    commit::{hash, name, remember},
    id::RefId,
    layered::{LayeredRef, View},
    life::RecordStage,
    mount::LocalMount,
    named_table::{EntryReader, NamedEntry, NamedTable},
    record::{RecordBody, RecordMeta, RecordType},
    records::Records,
};
use shipway_fault::{Context as _, Fault, Result};
use shipway_storage::Mount;
use shipway_treehash::TreeIndex;
use std::{sync::Arc, time::SystemTime};
use tokio::sync::OnceCell;

/// A named state that is only read for now.
pub(crate) struct Frozen {
    records: Arc<Records>,
    reader: EntryReader,
    id: RefId,
    description: String,
    mounts: Vec<Mount>,
    layered: OnceCell<LayeredRef>,
}

impl Frozen {
    /// A named state that `reader` holds.
    pub fn new(
        records: Arc<Records>,
        reader: EntryReader,
        id: RefId,
        description: String,
        mounts: Vec<Mount>,
    ) -> Self {
        Self { records, reader, id, description, mounts, layered: OnceCell::new() }
    }

    /// The frozen state with this id, if there was no writer since.
    pub fn find(records: &Arc<Records>, table: &Arc<NamedTable>, id: &RefId) -> Option<Self> {
        let (entry, generation) = id.0.split_once('-')?;
        let (reader, mounts) = table.read(entry, generation)?;
        let description = reader.entry().meta.description.clone();
        Some(Self::new(records.clone(), reader, id.clone(), description, mounts))
    }

    fn entry(&self) -> &Arc<NamedEntry> {
        self.reader.entry()
    }

    /// The records that it becomes one of.
    pub fn records(&self) -> &Arc<Records> {
        &self.records
    }

    /// Its identity.
    pub fn id(&self) -> &RefId {
        &self.id
    }

    /// What it is for.
    pub fn record_type(&self) -> RecordType {
        self.entry().meta.record_type
    }

    /// Description shown to users.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The known digests of its files.
    pub fn index(&self) -> &TreeIndex {
        &self.entry().index
    }

    /// The state for a process that only reads.
    pub fn view(self: &Arc<Self>) -> View {
        let mounts = self.mounts.iter().map(Mount::read_only).collect();
        View { key: None, mounts, guard: self.clone() }
    }

    /// The state as a read-only directory of the host.
    pub async fn mount(self: &Arc<Self>) -> Result<LocalMount> {
        let view = self.view();
        self.records.backend.mount(&view.mounts, Some(view.guard)).await
    }

    /// Bytes on disk, what it was made from not counted.
    pub async fn size(&self) -> Result<u64> {
        let snapshot = match self.layered.get().and_then(|l| l.record().snapshot()) {
            Some(name) => name,
            None => &self.entry().snapshot,
        };
        Ok(self.records.backend.storage.snapshots.usage(snapshot).await?.bytes)
    }

    /// Makes a layer of it: the entry ends, and its snapshot becomes a committed one in the same
    /// place on the disk, so readers of its files go on undisturbed.
    pub async fn layered(&self) -> Result<LayeredRef> {
        self.layered
            .get_or_try_init(|| self.make_layer())
            .await
            .context(|| format!("make a layer of {:?}", self.description))
            .cloned()
    }

    async fn make_layer(&self) -> Result<LayeredRef> {
        let (records, entry) = (&self.records, self.entry());
        let generation = entry.generation();
        let mut layered = entry.layered.lock().await;
        if let Some((of, id)) = &*layered
            && *of == generation
            && let Some(made) = LayeredRef::find(records, id)
        {
            return Ok(made);
        }
        let parent = entry.meta.parents.first().and_then(|p| LayeredRef::find(records, p));
        let over = parent.as_ref().and_then(|p| p.record().snapshot());
        let info = records.backend.storage.snapshots.stat(&entry.snapshot).await?;
        if info.parent.as_ref() != over {
            return Err(Fault::internal(format!(
                "the state that {:?} was made from is gone",
                self.description
            )));
        }
        let layer = hash(records, &self.mounts, over).await?;
        let meta = RecordMeta {
            record_type: entry.meta.record_type,
            description: self.description.clone(),
            created: SystemTime::now(),
            parents: entry.meta.parents.clone(),
            body: RecordBody::Layers(Vec::new()),
        };
        let background = records.backend.background.clone();
        let (records, table) = (records.clone(), self.reader.table().clone());
        let (entry, mounts) = (entry.clone(), self.mounts.clone());
        // Cut off in the middle, it would leave an entry without a snapshot, or a snapshot that
        // has no record.
        let work = async move {
            let below = parent.as_ref().map(|p| &**p.record());
            let (record, made) =
                name(&records, (&entry.snapshot, &mounts), below, &layer, &meta, None).await?;
            // Otherwise the same files were committed before, and the entry stays what it is.
            if made {
                remember(&record, &mounts, below.is_some());
                table.evict(&entry).await;
            }
            record.life.reached(RecordStage::Committed);
            Ok(LayeredRef::insert(&records, record))
        };
        let made = background.finish("commit a frozen state", work).await?;
        *layered = Some((generation, made.id().clone()));
        Ok(made)
    }
}
