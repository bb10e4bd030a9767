//! Immutable states: handles, views, mounts, checksums.

use crate::{
    Layer, LayerSource, LocalMount, RecordType, RefId, Selector,
    frozen::Frozen,
    layer,
    life::Stage,
    materialize::Active,
    mount::{WeakMount, is_lasting},
    store::{Inner, Record},
};
use shipway_fault::{Context as _, Fault, Result, nearest};
use shipway_oci::{ChainId, Digest};
use shipway_progress::Reporter;
use shipway_storage::{Mount, SnapshotKey};
use shipway_task::blocking;
use std::{
    any::Any,
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

/// Most names that are compared with a missing one.
const MAX_NAMES: usize = 1000;

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

/// A state that does not change: a stack of layers. Clones share it; while one lives, it is in use
/// and not pruned.
#[derive(Clone)]
pub struct ImmutableRef(pub(crate) Arc<RefInner>);

/// Keeps a state in use.
pub(crate) struct RefInner {
    pub store: Arc<Inner>,
    pub kind: RefKind,
    /// Speaks of fetches, once set.
    pub origin: OnceLock<Reporter>,
}

pub(crate) enum RefKind {
    Layers {
        record: Arc<Record>,
        /// Kept so that the blobs of their layers stay.
        parents: Vec<ImmutableRef>,
    },
    Frozen(Frozen),
}

impl RefInner {
    pub fn layers(store: Arc<Inner>, record: Arc<Record>) -> ImmutableRef {
        record.life.retain();
        let parents = record.parents.iter().filter_map(|p| store.handle(p)).collect();
        ImmutableRef(Arc::new(Self {
            store,
            kind: RefKind::Layers { record, parents },
            origin: OnceLock::new(),
        }))
    }
}

impl Drop for RefInner {
    fn drop(&mut self) {
        if let RefKind::Layers { record, .. } = &self.kind {
            self.store.uses.used(&record.id);
            // Evicted, and nothing in the table has its id, and so its lease, by now.
            if record.life.release() && self.store.peek(&record.id).is_none() {
                let (store, lease) = (self.store.clone(), record.lease.clone());
                self.store
                    .background
                    .spawn("delete a lease", async move { store.delete_lease(&lease).await });
            }
        }
    }
}

impl fmt::Debug for ImmutableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImmutableRef({}, {:?})", self.id(), self.description())
    }
}

impl ImmutableRef {
    pub(crate) fn record(&self) -> Option<&Arc<Record>> {
        match &self.0.kind {
            RefKind::Layers { record, .. } => Some(record),
            RefKind::Frozen(_) => None,
        }
    }

    /// The state as layers: itself, or what a client's directory becomes.
    pub(crate) async fn layered(&self) -> Result<ImmutableRef> {
        match &self.0.kind {
            RefKind::Layers { .. } => Ok(self.clone()),
            RefKind::Frozen(frozen) => frozen.layered().await,
        }
    }

    /// The record of a state that [`ImmutableRef::layered`] returned.
    pub(crate) fn layered_record(&self) -> Result<&Arc<Record>> {
        self.record().ok_or_else(|| Fault::internal("a client's directory was taken for layers"))
    }

    /// Its identity, for [`crate::RefStore::get`].
    pub fn id(&self) -> &RefId {
        match &self.0.kind {
            RefKind::Layers { record, .. } => &record.id,
            RefKind::Frozen(frozen) => frozen.id(),
        }
    }

    /// What it is for.
    pub fn record_type(&self) -> RecordType {
        match &self.0.kind {
            RefKind::Layers { record, .. } => record.record_type,
            RefKind::Frozen(frozen) => frozen.record_type(),
        }
    }

    /// Description shown to users.
    pub fn description(&self) -> &str {
        match &self.0.kind {
            RefKind::Layers { record, .. } => &record.description,
            RefKind::Frozen(frozen) => frozen.description(),
        }
    }

    /// The state it was made from, if that is known still.
    pub fn parent(&self) -> Option<ImmutableRef> {
        match &self.0.kind {
            RefKind::Layers { parents, .. } => parents.first().cloned(),
            RefKind::Frozen(_) => None,
        }
    }

    /// Whether it has no layers.
    pub fn is_scratch(&self) -> bool {
        self.record().is_some_and(|r| r.layers.is_empty())
    }

    /// Its layers, lowest first. A client's directory becomes a layer by this call.
    pub async fn layers(&self) -> Result<Vec<Layer>> {
        let layered = self.layered().await?;
        Ok(layered.layered_record()?.layers.iter().map(|c| c.describe()).collect())
    }

    /// Its layers, as [`Self::layers`] gives them, unless it is a client's directory that is no
    /// layer yet.
    pub fn known_layers(&self) -> Option<Vec<Layer>> {
        Some(self.record()?.layers.iter().map(|c| c.describe()).collect())
    }

    /// Where its layers would be fetched from, each place once.
    pub fn sources(&self) -> Vec<Arc<dyn LayerSource>> {
        let layers = self.record().map_or(&[][..], |r| &r.layers);
        let mut found: Vec<Arc<dyn LayerSource>> = Vec::new();
        for source in
            layers.iter().flat_map(|c| c.blobs()).filter_map(|b| b.place.source().cloned())
        {
            if !found.iter().any(|f| Arc::ptr_eq(f, &source)) {
                found.push(source);
            }
        }
        found
    }

    /// When each of its layers came to be, lowest first, as far as the states below it are known
    /// still. Whole milliseconds, so that a time is the same after a restart.
    pub async fn layer_times(&self) -> Result<Vec<SystemTime>> {
        let mut state = self.layered().await?;
        let record = state.layered_record()?;
        let said: Vec<_> = record.layers.iter().map(|c| c.created()).collect();
        let mut times = vec![record.created; record.layers.len()];
        while let Some(parent) = state.parent() {
            state = parent.layered().await?;
            let record = state.layered_record()?;
            times.iter_mut().take(record.layers.len()).for_each(|t| *t = record.created);
        }
        times.iter_mut().zip(said).for_each(|(time, said)| *time = said.unwrap_or(*time));
        let whole = |t: SystemTime| {
            let since = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            SystemTime::UNIX_EPOCH + Duration::from_millis(since.as_millis() as u64)
        };
        Ok(times.into_iter().map(whole).collect())
    }

    /// Whether its snapshot is the one that the chain ID of its layers names: it is what unpacking
    /// them gives. A client's directory is none yet.
    pub fn is_exact(&self) -> bool {
        self.record().is_some_and(|r| r.layers.iter().all(|c| c.is_exact()))
    }

    /// The name of the snapshot that unpacking its layers gives; `None` without layers. A client's
    /// directory becomes a layer by this call.
    pub async fn chain_id(&self) -> Result<Option<ChainId>> {
        Ok(self.layered().await?.layered_record()?.chain())
    }

    /// Lets `origin`, the vertex that the state comes from, report fetches that other steps cause
    /// later: that is where users look for them. The first one stays.
    pub fn reported_by(&self, origin: &Reporter) {
        let _ = self.0.origin.set(origin.clone());
    }

    /// Makes the snapshot exist: lazy layers are fetched in parallel, unpacked and verified against
    /// their diffIDs. `progress` reports it where the state has no origin.
    pub async fn materialize(&self, progress: Option<&Reporter>) -> Result<()> {
        match &self.0.kind {
            RefKind::Layers { record, .. } => {
                let origin = self.0.origin.get().filter(|o| o.is_heard() && o.is_completed());
                self.0.store.materialize(record, origin, progress).await
            }
            RefKind::Frozen(_) => Ok(()),
        }
    }

    /// Whether it is the very same state, not one that was made again under the same id.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self.record(), other.record()) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => Arc::ptr_eq(&self.0, &other.0),
        }
    }

    /// Whether `fault` says that the state can no longer be had: no source has the bytes of one of
    /// its layers.
    pub fn is_lost(&self, fault: &Fault) -> bool {
        self.record().is_some_and(|r| {
            let committed = r.life.stage() == Stage::Committed;
            r.layers.iter().any(|c| layer::is_lost(c, committed, fault))
        })
    }

    /// The state as a read-only directory of the host. Several callers share one mount.
    pub async fn mount(&self) -> Result<LocalMount> {
        let (store, guard) = (&self.0.store, self.0.clone());
        match &self.0.kind {
            RefKind::Layers { record, .. } => {
                let mut mounted = record.mounted.lock().await;
                if let Some(mount) = mounted.as_ref().and_then(WeakMount::upgrade) {
                    return Ok(mount);
                }
                let view = self.view().await?;
                let both: Arc<dyn Any + Send + Sync> = Arc::new((view.guard, guard));
                let mount =
                    LocalMount::new(&view.mounts, &store.mounts, &store.background, Some(both))
                        .await?;
                *mounted = mount.downgrade();
                Ok(mount)
            }
            RefKind::Frozen(frozen) => {
                LocalMount::new(
                    &frozen.read_only_mounts(),
                    &store.mounts,
                    &store.background,
                    Some(guard),
                )
                .await
            }
        }
        .context(|| format!("look into {}", self.description()))
    }

    /// The state for a process that only reads.
    pub async fn view(&self) -> Result<View> {
        let store = &self.0.store;
        let record = match &self.0.kind {
            RefKind::Layers { record, .. } => record,
            RefKind::Frozen(frozen) => {
                return Ok(View {
                    key: None,
                    mounts: frozen.read_only_mounts(),
                    guard: self.0.clone(),
                });
            }
        };
        self.materialize(None).await?;
        if let Some(mounts) = record.shown.get() {
            return Ok(View { key: None, mounts: mounts.clone(), guard: self.0.clone() });
        }
        let mut shared = record.view.lock().await;
        let view = match shared.upgrade() {
            Some(view) => view,
            None => {
                let view = Arc::new(Active::view(store, record.snapshot()).await?);
                if let [only @ Mount::Overlay(_)] = &view.mounts[..]
                    && is_lasting(only)
                {
                    // Such mounts name committed layers only, so the next view need not ask.
                    let _ = record.shown.set(view.mounts.clone());
                }
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

    /// Checksum of a part of the state, independent of times (row `so.hash`). `NotFound` names the
    /// missing path.
    pub async fn checksum(&self, selector: &Selector) -> Result<Digest> {
        let index = match &self.0.kind {
            RefKind::Layers { record, .. } => record.index.clone(),
            RefKind::Frozen(frozen) => frozen.index().clone(),
        };
        let (mount, selector) = (self.mount().await?, selector.clone());
        // What a client's directory should have, its frontend explains: it knows the ignore file.
        let suggests = self.record().is_some();
        let work = move || {
            index.checksum(mount.path(), &selector).map_err(|e| {
                match near(mount.path(), &selector.path) {
                    Some(near) if suggests && e.is_not_found() => {
                        e.hint(format!("did you mean {near}?"))
                    }
                    _ => e,
                }
            })
        };
        blocking("make a checksum", work).await
    }

    /// Bytes on disk, parents not counted.
    pub async fn size(&self) -> Result<u64> {
        match &self.0.kind {
            RefKind::Layers { record, .. } => self.0.store.size_of(record).await,
            RefKind::Frozen(frozen) => {
                Ok(self.0.store.storage.snapshots.usage(&frozen.snapshot()).await?.bytes)
            }
        }
    }
}

/// A path beside the missing `path` of the tree at `root` that was probably meant.
fn near(root: &Path, path: &str) -> Option<String> {
    let (dir, name) =
        path.trim_matches('/').rsplit_once('/').unwrap_or(("", path.trim_matches('/')));
    let mut at = root.to_owned();
    for part in dir.split('/').filter(|p| !p.is_empty()) {
        at.push(part);
        // A link may lead out of the tree.
        if part == ".." || !at.symlink_metadata().ok()?.is_dir() {
            return None;
        }
    }
    let names = at
        .read_dir()
        .ok()?
        .flatten()
        .take(MAX_NAMES)
        .filter_map(|e| e.file_name().into_string().ok());
    let names: Vec<String> = names.collect();
    let near = nearest(name, names.iter().map(String::as_str)).filter(|n| *n != name)?;
    Some(if dir.is_empty() { format!("/{near}") } else { format!("/{dir}/{near}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_name_is_looked_for_inside_the_tree_only() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        std::fs::write(root.path().join("dir/result.txt"), "").unwrap();
        std::os::unix::fs::symlink("/", root.path().join("out")).unwrap();
        for (path, want) in [
            ("/dir/reslt.txt", Some("/dir/result.txt")),
            ("dirr", Some("/dir")),
            ("/nothing/like/it", None),
            ("/out/ect", None),
            ("/dir/../../ect", None),
            ("", None),
        ] {
            assert_eq!(near(root.path(), path).as_deref(), want, "{path}");
        }
    }
}
