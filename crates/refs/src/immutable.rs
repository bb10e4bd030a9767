//! Immutable states: stacks of layers, and clients' directories that become layers when needed.

use crate::{
    frozen::Frozen,
    id::RefId,
    layer::{Layer, LayerSource},
    layered::{LayeredRef, View},
    lower_files::LowerFiles,
    mount::LocalMount,
    record::RecordType,
    records::Records,
};
use shipway_fault::{Context as _, Fault, Result, nearest};
use shipway_oci::{ChainId, Digest};
use shipway_progress::Reporter;
use shipway_storage::SnapshotKey;
use shipway_task::blocking;
use shipway_treehash::{KnownContents, Selector};
use std::{fmt, path::Path, sync::Arc, time::SystemTime};

/// Most names that are compared with a missing one.
const MAX_NAMES: usize = 1000;

/// A state that does not change: a stack of layers. Clones share it; while one lives, it is in use
/// and not pruned.
#[derive(Clone)]
pub struct ImmutableRef(RefKind);

#[derive(Clone)]
enum RefKind {
    Layers(LayeredRef),
    /// A client's directory, which is no layer yet.
    Frozen(Arc<Frozen>),
}

impl From<LayeredRef> for ImmutableRef {
    fn from(layered: LayeredRef) -> Self {
        Self(RefKind::Layers(layered))
    }
}

impl From<Frozen> for ImmutableRef {
    fn from(frozen: Frozen) -> Self {
        Self(RefKind::Frozen(Arc::new(frozen)))
    }
}

impl fmt::Debug for ImmutableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImmutableRef({}, {:?})", self.id(), self.description())
    }
}

impl ImmutableRef {
    /// The state as layers: itself, or what a client's directory becomes.
    pub(crate) async fn layered(&self) -> Result<LayeredRef> {
        match &self.0 {
            RefKind::Layers(layered) => Ok(layered.clone()),
            RefKind::Frozen(frozen) => frozen.layered().await,
        }
    }

    /// The state as layers, unless it is a client's directory.
    pub(crate) fn as_layered(&self) -> Option<&LayeredRef> {
        match &self.0 {
            RefKind::Layers(layered) => Some(layered),
            RefKind::Frozen(_) => None,
        }
    }

    /// The records that its own is one of.
    pub(crate) fn records(&self) -> &Arc<Records> {
        match &self.0 {
            RefKind::Layers(layered) => layered.records(),
            RefKind::Frozen(frozen) => frozen.records(),
        }
    }

    /// Its identity, for [`crate::RefStore::get`].
    pub fn id(&self) -> &RefId {
        match &self.0 {
            RefKind::Layers(layered) => layered.id(),
            RefKind::Frozen(frozen) => frozen.id(),
        }
    }

    /// What it is for.
    pub fn record_type(&self) -> RecordType {
        match &self.0 {
            RefKind::Layers(layered) => layered.record().record_type,
            RefKind::Frozen(frozen) => frozen.record_type(),
        }
    }

    /// Description shown to users.
    pub fn description(&self) -> &str {
        match &self.0 {
            RefKind::Layers(layered) => &layered.record().description,
            RefKind::Frozen(frozen) => frozen.description(),
        }
    }

    /// The state it was made from, if that is known still.
    pub fn parent(&self) -> Option<ImmutableRef> {
        self.as_layered()?.parent().cloned().map(Into::into)
    }

    /// Whether it has no layers.
    pub fn is_scratch(&self) -> bool {
        self.as_layered().is_some_and(LayeredRef::is_scratch)
    }

    /// Its layers, lowest first. A client's directory becomes a layer by this call.
    pub async fn layers(&self) -> Result<Vec<Layer>> {
        Ok(self.layered().await?.record().layers.iter().map(|c| c.describe()).collect())
    }

    /// Its layers, as [`Self::layers`] gives them, unless it is a client's directory that is no
    /// layer yet.
    pub fn known_layers(&self) -> Option<Vec<Layer>> {
        Some(self.as_layered()?.record().layers.iter().map(|c| c.describe()).collect())
    }

    /// Where its layers would be fetched from, each place once.
    pub fn sources(&self) -> Vec<Arc<dyn LayerSource>> {
        let layers = self.as_layered().map_or(&[][..], |l| &l.record().layers);
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
        Ok(self.layered().await?.layer_times())
    }

    /// Whether its snapshot is the one that the chain ID of its layers names: it is what unpacking
    /// them gives. A client's directory is none yet.
    pub fn is_exact(&self) -> bool {
        self.as_layered().is_some_and(LayeredRef::is_exact)
    }

    /// The name of its snapshot, which need not exist yet; `None` without layers, and for a
    /// client's directory.
    pub fn snapshot_name(&self) -> Option<&SnapshotKey> {
        self.as_layered()?.record().snapshot()
    }

    /// The name of the snapshot that unpacking its layers gives; `None` without layers. A client's
    /// directory becomes a layer by this call.
    pub async fn chain_id(&self) -> Result<Option<ChainId>> {
        Ok(self.layered().await?.record().chain())
    }

    /// Lets `origin`, the vertex that the state comes from, report fetches that other steps cause
    /// later: that is where users look for them. The first one stays.
    pub fn reported_by(&self, origin: &Reporter) {
        if let Some(layered) = self.as_layered() {
            layered.reported_by(origin);
        }
    }

    /// Makes the snapshot exist: lazy layers are fetched in parallel, unpacked and verified against
    /// their diffIDs. `progress` reports it where the state has no origin.
    pub async fn materialize(&self, progress: Option<&Reporter>) -> Result<()> {
        match &self.0 {
            RefKind::Layers(layered) => layered.materialize(progress).await,
            RefKind::Frozen(_) => Ok(()),
        }
    }

    /// Whether it is the very same state, not one that was made again under the same id.
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (RefKind::Layers(a), RefKind::Layers(b)) => a.is_same(b),
            (RefKind::Frozen(a), RefKind::Frozen(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Whether `fault` says that the state can no longer be had: no source has the bytes of one of
    /// its layers.
    pub fn is_lost(&self, fault: &Fault) -> bool {
        self.as_layered().is_some_and(|l| l.is_lost(fault))
    }

    /// The state as a read-only directory of the host. Several callers share one mount.
    pub async fn mount(&self) -> Result<LocalMount> {
        match &self.0 {
            RefKind::Layers(layered) => layered.mount().await,
            RefKind::Frozen(frozen) => frozen.mount().await,
        }
        .context(|| format!("look into {}", self.description()))
    }

    /// The state for a process that only reads.
    pub async fn view(&self) -> Result<View> {
        match &self.0 {
            RefKind::Layers(layered) => layered.view().await,
            RefKind::Frozen(frozen) => Ok(frozen.view()),
        }
    }

    /// Checksum of a part of the state, independent of times (row `so.hash`). Files of layers that
    /// a snapshotter serves are fetched for that only if it does not know what is in them.
    /// `NotFound` names the missing path.
    pub async fn checksum(&self, selector: &Selector) -> Result<Digest> {
        // What a client's directory should have, its frontend explains: it knows the ignore file.
        let (index, suggests, served) = match &self.0 {
            RefKind::Layers(layered) => {
                let contents = layered.records().backend.contents.clone();
                let view = layered.view().await?;
                (layered.record().index.clone(), true, contents.map(|contents| (contents, view)))
            }
            RefKind::Frozen(frozen) => (frozen.index().clone(), false, None),
        };
        let (mount, selector) = (self.mount().await?, selector.clone());
        let work = move || {
            let files = served
                .as_ref()
                .map(|(contents, view)| LowerFiles { mounts: &view.mounts, contents: &**contents });
            let known = files.as_ref().map(|files| files as &dyn KnownContents);
            index.checksum(mount.path(), &selector, known).map_err(|e| {
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
        match &self.0 {
            RefKind::Layers(layered) => layered.records().size_of(layered.record()).await,
            RefKind::Frozen(frozen) => frozen.size().await,
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
