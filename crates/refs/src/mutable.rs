//! States being written.

use crate::{
    Compression, ImmutableRef, LocalMount, RecordType,
    early_blob::UnownedBlob,
    exact,
    life::Stage,
    materialize::Active,
    mount::{WeakMount, is_lasting},
    record::{Body, RecordMeta, fresh_id},
    store::{Inner, Record},
};
use parking_lot::Mutex;
use shipway_archive::{Hashed, LayerTree, OwnLayer};
use shipway_fault::{Context as _, Fault, Result};
use shipway_progress::Reporter;
use shipway_storage::{Mount, SnapshotKey};
use shipway_task::blocking;
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::SystemTime,
};

/// A state being written. Dropped without commit it vanishes in the background;
/// [`crate::RefStore::drained`] waits for that.
pub struct MutableRef {
    store: Arc<Inner>,
    active: Active,
    parent: Option<ImmutableRef>,
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
        store: &Arc<Inner>,
        parent: Option<&ImmutableRef>,
        description: String,
        record_type: RecordType,
        progress: Option<&Reporter>,
    ) -> Result<Self> {
        let parent = match parent {
            Some(parent) => {
                let parent = parent.layered().await?;
                parent.materialize(progress).await?;
                Some(parent).filter(|p| !p.is_scratch())
            }
            None => None,
        };
        let below = parent
            .as_ref()
            .map(ImmutableRef::layered_record)
            .transpose()?
            .and_then(|r| r.snapshot());
        let active = Active::prepare(store, "step", below)
            .await
            .context(|| format!("make a file system for {description:?}"))?;
        Ok(Self {
            store: store.clone(),
            active,
            parent,
            record_type,
            description,
            mounted: Mutex::default(),
        })
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

    /// What it was made from.
    pub fn parent(&self) -> Option<&ImmutableRef> {
        self.parent.as_ref()
    }

    /// The state as a writable directory of the host. Drop it before commit.
    pub async fn mount(&self) -> Result<LocalMount> {
        // The newest is the only one that can live: a second mount of the same upper directory is
        // never made.
        let live = self.mounted.lock().last().and_then(WeakMount::upgrade);
        if let Some(mount) = live {
            return Ok(mount);
        }
        let mount = LocalMount::new(
            &self.active.mounts.iter().map(Mount::unsynced).collect::<Vec<_>>(),
            &self.store.mounts,
            &self.store.background,
            None,
        )
        .await?;
        self.mounted.lock().extend(mount.downgrade());
        Ok(mount)
    }

    /// The directory that holds what is written here and nothing else, for writing into it while
    /// the state is not mounted; `None` where the snapshotter has no such directory.
    pub fn layer_dir(&self) -> Result<Option<PathBuf>> {
        let has_parent =
            self.parent.as_ref().map(ImmutableRef::layered_record).transpose()?.is_some();
        Ok(match OwnLayer::of(&self.active.mounts, has_parent) {
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
        let Self { store, active, parent, record_type, .. } = self;
        let meta = RecordMeta {
            record_type,
            description,
            created: SystemTime::now(),
            parents: parent.iter().map(|p| p.id().clone()).collect(),
            body: Body::Layers(Vec::new()),
        };
        let what = meta.description.clone();
        commit(&store, active, parent.as_ref(), meta, pack)
            .await
            .context(|| format!("commit {what:?}"))
    }

    /// Throws the state away and waits for that.
    pub async fn release(self) -> Result<()> {
        self.active.release().await
    }
}

/// Hashes what was written into `active`, or packs it as `pack` says, and makes it a state on top
/// of `parent`.
async fn commit(
    store: &Arc<Inner>,
    active: Active,
    parent: Option<&ImmutableRef>,
    meta: RecordMeta,
    pack: Option<Compression>,
) -> Result<ImmutableRef> {
    let below = parent.map(|p| p.layered_record()).transpose()?.cloned();
    let mounts = active.mounts.clone();
    let over = below.as_ref().and_then(|r| r.snapshot());
    let blob = match pack {
        Some(compression) => Some(
            UnownedBlob::pack(
                store,
                &active.lease,
                written(store, &mounts, over).await?,
                compression,
            )
            .await?,
        ),
        None => None,
    };
    let layer = match &blob {
        Some(blob) => Hashed { tar: blob.tar, loss: blob.loss.clone() },
        None => hash(store, &mounts, over).await?,
    };
    let (store, background, parent) = (store.clone(), store.background.clone(), parent.cloned());
    // Cut off in the middle, it would leave an orphaned lease and snapshot.
    let work = async move {
        let (record, made) =
            name(&store, (&active.key, &mounts), below.as_deref(), &layer, &meta, blob.as_ref())
                .await?;
        if made {
            active.committed();
            remember(&record, &mounts, below.is_some());
        }
        record.life.reached(Stage::Committed);
        drop(parent);
        Ok(store.insert(record))
    };
    background.finish("commit a state", work).await
}

/// Commits the active snapshot `key`, which holds `layer` on top of `below`, under the name that it
/// may have, and records that under a lease. Says whether it was this one that got the name;
/// otherwise there is one that is equal.
pub(crate) async fn name(
    store: &Arc<Inner>,
    (key, mounts): (&SnapshotKey, &[Mount]),
    below: Option<&Record>,
    layer: &Hashed,
    meta: &RecordMeta,
    blob: Option<&UnownedBlob>,
) -> Result<(Record, bool)> {
    loop {
        let record = stacked(store, below, layer, meta.clone());
        let Some(stacked) = record.layers.last() else {
            return Err(Fault::internal("a commit without a layer"));
        };
        if let Some(blob) = blob {
            blob.tell(stacked);
        }
        let done = async {
            store.ensure_lease(&record).await?;
            if let Some(blob) = blob {
                blob.give(&record).await?;
            }
            let labels = exact::labels().into_iter().chain(store.durable.labels(mounts)).collect();
            match store
                .storage
                .snapshots
                .commit(&record.lease, &stacked.snapshot, key, &labels)
                .await
            {
                Ok(()) => Ok(Some(true)),
                Err(e) if e.is_already_exists() => {
                    store.durable.check(&stacked.snapshot)?;
                    let there = store.storage.snapshots.stat(&stacked.snapshot).await?;
                    Ok(store.distrusted.accepts(&there).then_some(false))
                }
                Err(e) => Err(e),
            }
        };
        match done.await {
            Ok(Some(made)) => return Ok((record, made)),
            // The name is avoided from now on.
            Ok(None) => store.delete_lease(&record.lease).await,
            Err(e) => {
                store.delete_lease(&record.lease).await;
                return Err(e);
            }
        }
    }
}

/// Remembers where a committed state's files are: in the place where they were written.
pub(crate) fn remember(record: &Record, mounts: &[Mount], has_parent: bool) {
    if let [only @ (Mount::Overlay(_) | Mount::Bind(_))] = mounts {
        if is_lasting(only) {
            let _ = record.shown.set(vec![only.read_only()]);
        }
        if let (Some(stacked), Ok(OwnLayer::Tree(tree))) =
            (record.layers.last(), OwnLayer::of(mounts, has_parent))
        {
            let _ = stacked.tree.set(tree);
        }
    }
}

/// What was written over `below`, and what keeps it readable.
async fn written(
    store: &Arc<Inner>,
    mounts: &[Mount],
    below: Option<&SnapshotKey>,
) -> Result<(LayerTree, impl Send + 'static)> {
    let (tree, guard) = match OwnLayer::of(mounts, below.is_some())? {
        OwnLayer::Tree(tree) => (tree, None),
        OwnLayer::Whole(after) => {
            let view = Active::view(store, below).await?;
            let before =
                LocalMount::new(&view.mounts, &store.mounts, &store.background, None).await?;
            (LayerTree::compared(before.path(), after), Some((before, view)))
        }
    };
    Ok((tree.settled(), guard))
}

/// The tar of what was written over `below`.
pub(crate) async fn hash(
    store: &Arc<Inner>,
    mounts: &[Mount],
    below: Option<&SnapshotKey>,
) -> Result<Hashed> {
    let (tree, guard) = written(store, mounts, below).await?;
    let hashed = blocking("hash a layer", move || shipway_archive::tar_of(&tree)).await;
    drop(guard);
    hashed
}

/// A record of `layer` on top of `below`, which is being committed.
fn stacked(store: &Inner, below: Option<&Record>, layer: &Hashed, meta: RecordMeta) -> Record {
    let under = below.and_then(|r| r.layers.last());
    let stacked = match &layer.loss {
        None => store.stacked_layer(layer.tar.diff_id, under),
        Some(loss) => {
            tracing::debug!(%loss, description = %meta.description, "state has more than its layer, keeping it under a name of its own");
            store.own_layer(layer.tar.diff_id, under, exact::own_name())
        }
    };
    let _ = stacked.tar.set(layer.tar);
    stacked.new.store(true, Ordering::Relaxed);
    let layers =
        below.map(|r| r.layers.clone()).unwrap_or_default().into_iter().chain([stacked]).collect();
    Record::new(fresh_id(), meta, layers, Stage::Lazy)
}
