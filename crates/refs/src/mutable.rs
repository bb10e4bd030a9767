//! States being written.

use crate::{
    active::Active,
    commit::{hash, name, remember, written},
    early_blob::UnownedBlob,
    immutable::ImmutableRef,
    inherited::Inherited,
    layered::LayeredRef,
    life::RecordStage,
    mount::{LocalMount, WeakMount},
    record::{RecordBody, RecordMeta, RecordType},
    records::Records,
};
use parking_lot::Mutex;
use shipway_archive::{Compression, Hashed, OwnLayer};
use shipway_fault::{Context as _, Fault, Result};
use shipway_host::is_out_of_space;
use shipway_progress::Reporter;
use shipway_storage::{Mount, SnapshotKey};
use std::{fmt, path::PathBuf, sync::Arc, time::SystemTime};

/// A state being written. Dropped without commit it vanishes in the background;
/// [`crate::RefStore::drained`] waits for that.
pub struct MutableRef {
    records: Arc<Records>,
    active: Active,
    parent: Option<LayeredRef>,
    record_type: RecordType,
    description: String,
    mounted: Mutex<Vec<WeakMount>>,
}

impl fmt::Debug for MutableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MutableRef({}, {:?})", self.active.key, self.description)
    }
}

impl MutableRef {
    pub(crate) async fn make(
        records: &Arc<Records>,
        parent: Option<&ImmutableRef>,
        description: String,
        record_type: RecordType,
        progress: Option<&Reporter>,
    ) -> Result<Self> {
        let parent = parent_layers(parent, progress).await?;
        let below = parent.as_ref().and_then(|p| p.record().snapshot());
        let active = Active::prepare(&records.backend, "step", below)
            .await
            .context(|| format!("make a file system for {description:?}"))?;
        Ok(Self {
            records: records.clone(),
            active,
            parent,
            record_type,
            description,
            mounted: Mutex::default(),
        })
    }

    /// The state `key` that an earlier run of the daemon was writing on top of `parent`.
    pub(crate) async fn resume(
        records: &Arc<Records>,
        inherited: &mut Inherited,
        key: &SnapshotKey,
        parent: Option<&ImmutableRef>,
        description: String,
        record_type: RecordType,
    ) -> Result<Self> {
        let parent = parent_layers(parent, None).await?;
        let below = parent.as_ref().and_then(|p| p.record().snapshot());
        let active = inherited.active(key, below)?;
        let (records, mounted) = (records.clone(), Mutex::default());
        Ok(Self { records, active, parent, record_type, description, mounted })
    }

    /// Key of the active snapshot.
    pub fn snapshot_key(&self) -> &SnapshotKey {
        &self.active.key
    }

    /// Mounts for a process that writes.
    pub fn mounts(&self) -> &[Mount] {
        &self.active.mounts
    }

    /// Description shown to users.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The state as a writable directory of the host. Drop it before commit.
    pub async fn mount(&self) -> Result<LocalMount> {
        // The newest is the only one that can live: a second mount of the same upper directory is
        // never made.
        let live = self.mounted.lock().last().and_then(WeakMount::upgrade);
        if let Some(mount) = live {
            return Ok(mount);
        }
        let unsynced: Vec<Mount> = self.active.mounts.iter().map(Mount::unsynced).collect();
        let mount = self.records.backend.mount(&unsynced, None).await?;
        self.mounted.lock().extend(mount.downgrade());
        Ok(mount)
    }

    /// The directory that holds what is written here and nothing else, for writing into it while
    /// the state is not mounted; `None` where the snapshotter has no such directory.
    pub fn layer_dir(&self) -> Result<Option<PathBuf>> {
        Ok(match OwnLayer::of(&self.active.mounts, self.parent.is_some()) {
            Ok(OwnLayer::Tree(own)) => Some(own.root().to_owned()),
            _ => None,
        })
    }

    /// Ends writing: hashes the layer and names the snapshot by its chain id.
    pub async fn commit(self, description: impl Into<String>) -> Result<ImmutableRef> {
        self.committed(description.into(), None).await
    }

    /// [`MutableRef::commit`] with the layer's blob made on the way, so that its files are read
    /// once; for a layer that is exported next.
    pub async fn commit_packed(
        self,
        description: impl Into<String>,
        compression: Compression,
    ) -> Result<ImmutableRef> {
        self.committed(description.into(), Some(compression)).await
    }

    async fn committed(
        self,
        description: String,
        pack: Option<Compression>,
    ) -> Result<ImmutableRef> {
        if self.mounted.lock().iter().any(|m| m.upgrade().is_some()) {
            return Err(Fault::internal(format!(
                "{description:?} is committed while it is still mounted"
            )));
        }
        let Self { records, active, parent, record_type, .. } = self;
        let meta = RecordMeta {
            record_type,
            description,
            created: SystemTime::now(),
            parents: parent.iter().map(|p| p.id().clone()).collect(),
            body: RecordBody::Layers(Vec::new()),
        };
        let what = meta.description.clone();
        commit(&records, active, parent, meta, pack).await.context(|| format!("commit {what:?}"))
    }

    /// Throws the state away and waits for that.
    pub async fn release(self) -> Result<()> {
        self.active.release().await
    }
}

/// The layers to write on top of, which are made to exist.
async fn parent_layers(
    parent: Option<&ImmutableRef>,
    progress: Option<&Reporter>,
) -> Result<Option<LayeredRef>> {
    let Some(parent) = parent else { return Ok(None) };
    let parent = parent.layered().await?;
    parent.materialize(progress).await?;
    Ok(Some(parent).filter(|p| !p.is_scratch()))
}

/// Hashes what was written into `active`, or packs it as `pack` says, and makes it a state on top
/// of `parent`.
async fn commit(
    records: &Arc<Records>,
    active: Active,
    parent: Option<LayeredRef>,
    meta: RecordMeta,
    pack: Option<Compression>,
) -> Result<ImmutableRef> {
    let mounts = active.mounts.clone();
    let over = parent.as_ref().and_then(|p| p.record().snapshot());
    let blob = match pack {
        Some(compression) => {
            let tree = written(records, &mounts, over).await?;
            match UnownedBlob::pack(records, &active.lease, tree, compression).await {
                // The export packs it again, after room was made for that.
                Err(fault) if is_out_of_space(&fault) => None,
                packed => Some(packed?),
            }
        }
        None => None,
    };
    let layer = match &blob {
        Some(blob) => Hashed { tar: blob.tar.clone(), loss: blob.loss.clone() },
        None => hash(records, &mounts, over).await?,
    };
    let (records, background) = (records.clone(), records.backend.background.clone());
    // Cut off in the middle, it would leave an orphaned lease and snapshot.
    let work = async move {
        let below = parent.as_ref().map(|p| &**p.record());
        let (record, made) =
            name(&records, (&active.key, &mounts), below, &layer, &meta, blob.as_ref()).await?;
        if made {
            active.committed();
            remember(&record, &mounts, parent.is_some());
        }
        record.life.reached(RecordStage::Committed);
        Ok(LayeredRef::insert(&records, record).into())
    };
    background.finish("commit a state", work).await
}
