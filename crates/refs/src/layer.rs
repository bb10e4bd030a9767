//! Layers of a state: what they are, where their bytes come from.

use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_archive::{LayerTree, Tar};
use shipway_fault::{Code, Detail, Fault, Result};
use shipway_oci::{ChainId, Descriptor, DiffId, Digest};
use shipway_progress::Reporter;
use shipway_storage::{BlobReader, ContentStore, Labels, LeaseId, SnapshotKey, Usage};
use std::{
    fmt,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

/// Tells the sources of layers of one process apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerSourceId(u64);

impl LayerSourceId {
    /// An id that no other source has.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Fetches blobs of layers that are not on this machine yet.
#[async_trait]
pub trait LayerSource: Send + Sync {
    /// Which source this is.
    fn id(&self) -> LayerSourceId;

    /// Makes the blob of `layer` exist in `content` under `lease`, whole and verified. A blob that
    /// is there already is success. Counts bytes in `progress`.
    async fn fetch(
        &self,
        layer: &Descriptor,
        content: &dyn ContentStore,
        lease: &LeaseId,
        progress: Option<&Reporter>,
    ) -> Result<()>;

    /// The bytes of `layer` from their beginning, for callers that pass them on and keep nothing.
    /// The end comes as an error if they were not those of its digest.
    async fn open(&self, layer: &Descriptor) -> Result<Box<dyn BlobReader>>;

    /// Gives a remote snapshotter what it needs besides labels to read from this source:
    /// credentials. Called before layers that it serves are used.
    async fn enable_snapshotter(&self) {}

    /// The labels of a Prepare by which a remote snapshotter finds `layer` by itself. `None` where
    /// only this source can give the bytes.
    async fn remote_labels(&self, _layer: &Descriptor) -> Option<Labels> {
        None
    }

    /// By what [`LayerOrigins`] finds it again after a restart, without spaces; `None` for one that
    /// does not outlive the daemon.
    fn origin(&self) -> Option<String> {
        None
    }

    /// What it fetches from, for error messages: an image name.
    fn describe(&self) -> String;

    /// Whether the bytes are a client's, and go with it.
    fn is_clients(&self) -> bool {
        false
    }

    /// Whether it is known to give nothing any more: the client that had the bytes is gone.
    fn is_gone(&self) -> bool {
        false
    }
}

/// Finds sources of layers that an earlier run of the daemon knew.
pub trait LayerOrigins: Send + Sync {
    /// The source whose [`LayerSource::origin`] this was.
    fn source(&self, origin: &str) -> Option<Arc<dyn LayerSource>>;

    /// Who knows what is in layers that the snapshotter serves.
    fn contents(&self) -> Option<Arc<dyn LayerContents>> {
        None
    }
}

/// For each of some files the digests of its pieces, where they are known.
pub type FilePieces = Vec<Option<Vec<Digest>>>;

/// Knows what is in layers that a snapshotter serves, without reading them.
pub trait LayerContents: Send + Sync {
    /// For each of `inodes` of the layer whose files are at `layer`, the digests (SHA-256) of its
    /// contents in pieces of `length` bytes, of which the last one may be shorter; `None` where
    /// they are not known. To read a piece must give bytes with that digest or fail. An error if
    /// nothing is known of the layer. Blocks.
    fn pieces(&self, layer: &Path, inodes: &[u64], length: u64) -> Result<FilePieces>;
}

/// Finds none.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoOrigins;

impl LayerOrigins for NoOrigins {
    fn source(&self, _: &str) -> Option<Arc<dyn LayerSource>> {
        None
    }
}

/// A layer of an image that need not be here.
#[derive(Clone)]
pub struct LazyLayer {
    /// Digest of its tar, from the image's config.
    pub diff_id: DiffId,
    /// Its blob, from the image's manifest.
    pub descriptor: Descriptor,
    /// Where to fetch the blob; `None` if the content store has it.
    pub source: Option<Arc<dyn LayerSource>>,
    /// When it came to be, if that is known.
    pub created: Option<SystemTime>,
}

impl fmt::Debug for LazyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LazyLayer({:?}, {:?})", self.diff_id, self.descriptor.digest)
    }
}

/// What is known of one layer of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Digest of its tar.
    pub diff_id: DiffId,
    /// Name of the snapshot that unpacking the layers gives.
    pub chain_id: ChainId,
    /// A blob of it, stored or fetchable.
    pub blob: Option<Descriptor>,
    /// Whether the blob has to be fetched: it is known by descriptor only.
    pub lazy: bool,
}

/// A compressed layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerBlob {
    /// The blob, with an OCI media type when we made it and the image's own when it was pulled, and
    /// with the annotations by which a table of contents in it is found.
    pub descriptor: Descriptor,
    /// Digest of the tar that it holds: the layer's, unless a table of contents is a part of it.
    pub diff_id: DiffId,
    /// Where the blob would be fetched from, if it is not in the content store: an image name, as
    /// [`LayerSource::origin`] says it where it can.
    pub lazy: Option<String>,
}

/// Says in `fault` that layer `stacked` cannot be had, from `source` if that is where it was
/// looked for, unless it is a fault of ours or of the disk's.
pub(crate) fn lost(
    stacked: &StackedLayer,
    source: Option<&Arc<dyn LayerSource>>,
    fault: Fault,
) -> Fault {
    if fault.is_cancelled() || fault.code() == Code::ResourceExhausted {
        return fault;
    }
    // A source that failed otherwise, such as a registry that does not answer, gives nothing else
    // either.
    let source = source.filter(|_| !fault.is_not_found()).map(|s| s.id().0);
    fault.detail(Detail::LostLayer { diff_id: stacked.diff_id.to_string(), source })
}

/// Whether `fault` says that the layer can no longer be had. What is in a snapshot already needs no
/// source.
pub(crate) fn is_lost(stacked: &StackedLayer, in_snapshot: bool, fault: &Fault) -> bool {
    let only = |source: u64| {
        let blobs = stacked.blobs();
        let its = |b: &KnownBlob| matches!(&b.place, BlobPlace::Remote(s) if s.id().0 == source);
        !in_snapshot && stacked.copy_of().is_none() && !blobs.is_empty() && blobs.iter().all(its)
    };
    fault.details().iter().any(|detail| {
        let Detail::LostLayer { diff_id, source } = detail else { return false };
        *diff_id == stacked.diff_id.to_string() || source.is_some_and(only)
    })
}

/// One layer at its place in a stack; all states with that place share it, so that nothing is
/// fetched, unpacked or compressed twice.
pub(crate) struct StackedLayer {
    pub diff_id: DiffId,
    pub chain_id: ChainId,
    /// Name of the snapshot that has this layer on top.
    pub snapshot: SnapshotKey,
    /// Name of the snapshot below.
    pub parent: Option<SnapshotKey>,
    /// Whether the snapshot has more than the layer, and so cannot be made again.
    pub own: bool,
    origin: Mutex<Origin>,
    /// Its files, where they were committed in this run: a commit leaves them in their place.
    pub tree: OnceLock<LayerTree>,
    /// Its tar, where that was made in this run: what is packed again need not be hashed again.
    pub tar: OnceLock<Tar>,
    /// Committed in this run: no blob of it can exist that we do not know.
    pub new: AtomicBool,
    /// The snapshot does not have the whole layer, because whiteouts at the bottom of a stack
    /// vanish: only a blob does.
    pub blob_only: AtomicBool,
    /// The snapshot is one of a remote snapshotter, which does without the blob.
    pub served: AtomicBool,
    /// What the snapshot takes on the disk, once that was asked and does not change.
    pub usage: OnceLock<Usage>,
    /// Held while the snapshot is made.
    pub applying: tokio::sync::Mutex<()>,
    /// Held while a blob is fetched.
    pub fetching: tokio::sync::Mutex<()>,
    /// Held while a blob is made.
    pub packing: tokio::sync::Mutex<()>,
}

/// Where a layer's bytes can be had.
#[derive(Default)]
struct Origin {
    blobs: Vec<KnownBlob>,
    indexed: Vec<IndexedBlob>,
    copy_of: Option<SnapshotKey>,
    created: Option<SystemTime>,
}

/// A blob of a layer, stored or not.
#[derive(Clone)]
pub(crate) struct KnownBlob {
    pub descriptor: Descriptor,
    pub place: BlobPlace,
}

/// Where a blob is.
#[derive(Clone)]
pub(crate) enum BlobPlace {
    /// It was seen in the content store; should it go from there, this source may have it.
    Stored(Option<Arc<dyn LayerSource>>),
    /// This source has it.
    Remote(Arc<dyn LayerSource>),
}

impl BlobPlace {
    /// The source that has it, or that has it besides the store.
    pub fn source(&self) -> Option<&Arc<dyn LayerSource>> {
        match self {
            Self::Stored(source) => source.as_ref(),
            Self::Remote(source) => Some(source),
        }
    }
}

/// A stored blob that was made of a layer, with a table of contents. The tar in it may be another
/// one than the layer's, so it is for export only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IndexedBlob {
    /// With the annotations that it needs.
    pub descriptor: Descriptor,
    /// Digest of the tar in it.
    pub diff_id: DiffId,
    /// How it was made ([`shipway_archive::Compression`] as a text).
    pub made_as: String,
}

impl KnownBlob {
    /// A blob in the content store.
    pub fn stored(descriptor: Descriptor) -> Self {
        Self { descriptor, place: BlobPlace::Stored(None) }
    }

    pub fn is_stored(&self) -> bool {
        matches!(self.place, BlobPlace::Stored(_))
    }

    /// Whether it is stored, or its source is there.
    pub fn may_be_had(&self) -> bool {
        match &self.place {
            BlobPlace::Stored(_) => true,
            BlobPlace::Remote(source) => !source.is_gone(),
        }
    }
}

impl StackedLayer {
    pub fn new(diff_id: DiffId, below: Option<&Self>, snapshot: SnapshotKey, own: bool) -> Self {
        Self {
            diff_id,
            chain_id: ChainId::extend(below.map(|c| c.chain_id), diff_id),
            snapshot,
            parent: below.map(|c| c.snapshot.clone()),
            own,
            origin: Mutex::default(),
            tree: OnceLock::new(),
            tar: OnceLock::new(),
            new: AtomicBool::new(false),
            blob_only: AtomicBool::new(false),
            served: AtomicBool::new(false),
            usage: OnceLock::new(),
            applying: Default::default(),
            fetching: Default::default(),
            packing: Default::default(),
        }
    }

    /// Whether the snapshot is what unpacking the layers gives, under its name.
    pub fn is_exact(&self) -> bool {
        self.snapshot == self.chain_id.into()
    }

    pub fn blobs(&self) -> Vec<KnownBlob> {
        self.origin.lock().blobs.clone()
    }

    /// Descriptors of all blobs of it in the content store.
    pub fn stored_blobs(&self) -> Vec<Descriptor> {
        let origin = self.origin.lock();
        let stored = origin.blobs.iter().filter(|b| b.is_stored()).map(|b| &b.descriptor);
        stored.chain(origin.indexed.iter().map(|b| &b.descriptor)).cloned().collect()
    }

    /// Remembers a blob. The newest source of one is kept: it has the freshest credentials. But a
    /// registry has it longer than a client, and an image with its digest can be found again.
    pub fn know(&self, blob: KnownBlob) {
        let mut origin = self.origin.lock();
        match origin.blobs.iter_mut().find(|b| b.descriptor.digest == blob.descriptor.digest) {
            Some(known) => {
                let stored = known.is_stored() || blob.is_stored();
                let lasts = |source: &Arc<dyn LayerSource>| {
                    let origin = source.origin();
                    (!source.is_clients(), origin.map(|o| o.contains('@')))
                };
                let (old, new) = (known.place.source(), blob.place.source());
                let better = new.is_some_and(|new| old.is_none_or(|old| lasts(new) >= lasts(old)));
                let source = if better { new } else { old }.cloned();
                known.place = match source {
                    Some(source) if !stored => BlobPlace::Remote(source),
                    source => BlobPlace::Stored(source),
                };
            }
            None => origin.blobs.push(blob),
        }
    }

    /// The blob with a table of contents that was made so.
    pub fn indexed(&self, made_as: &str) -> Option<IndexedBlob> {
        self.origin.lock().indexed.iter().find(|b| b.made_as == made_as).cloned()
    }

    /// Remembers one, instead of another that was made alike.
    pub fn know_indexed(&self, blob: IndexedBlob) {
        let mut origin = self.origin.lock();
        origin.indexed.retain(|b| b.made_as != blob.made_as);
        origin.indexed.push(blob);
    }

    /// Forgets the one that was made so.
    pub fn lost_indexed(&self, made_as: &str) {
        self.origin.lock().indexed.retain(|b| b.made_as != made_as);
    }

    /// Forgets that a blob is stored, and the blob when there is nowhere to fetch it from.
    pub fn lost(&self, blob: &KnownBlob) {
        self.origin.lock().blobs.retain_mut(|known| {
            if known.descriptor.digest != blob.descriptor.digest {
                return true;
            }
            let source = known.place.source().cloned();
            source.is_some_and(|source| {
                known.place = BlobPlace::Remote(source);
                true
            })
        });
    }

    /// Where a blob would be fetched from, if it is known by descriptor only.
    pub fn origin_of(&self, descriptor: &Descriptor) -> Option<String> {
        let origin = self.origin.lock();
        let blob = origin.blobs.iter().find(|b| b.descriptor.digest == descriptor.digest)?;
        match &blob.place {
            BlobPlace::Stored(_) => None,
            BlobPlace::Remote(source) => Some(source.origin().unwrap_or_else(|| source.describe())),
        }
    }

    pub fn copy_of(&self) -> Option<SnapshotKey> {
        self.origin.lock().copy_of.clone()
    }

    pub fn set_copy_of(&self, snapshot: SnapshotKey) {
        if snapshot != self.snapshot {
            self.origin.lock().copy_of.get_or_insert(snapshot);
        }
    }

    /// When the layer came to be, where that is known.
    pub fn created(&self) -> Option<SystemTime> {
        self.origin.lock().created
    }

    pub fn set_created(&self, created: SystemTime) {
        self.origin.lock().created.get_or_insert(created);
    }

    pub fn is_blob_only(&self) -> bool {
        self.blob_only.load(Ordering::Relaxed)
    }

    pub fn is_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }

    /// The blob that a remote snapshotter may be asked for, and its source: one that is not here,
    /// of a layer that no other place has.
    pub fn remote_blob(&self) -> Option<(Descriptor, Arc<dyn LayerSource>)> {
        if !self.is_exact() || self.copy_of().is_some() {
            return None;
        }
        let mut found = None;
        for blob in self.blobs() {
            match blob.place {
                BlobPlace::Stored(_) => return None,
                BlobPlace::Remote(source) if source.is_clients() => {}
                BlobPlace::Remote(source) => found = found.or(Some((blob.descriptor, source))),
            }
        }
        found
    }

    pub fn is_new(&self) -> bool {
        self.new.load(Ordering::Relaxed)
    }

    /// A blob that is stored, if there is one, or else the first one known.
    pub fn best_blob(&self) -> Option<KnownBlob> {
        let blobs = self.blobs();
        blobs.iter().find(|b| b.is_stored()).or(blobs.first()).cloned()
    }

    pub fn describe(&self) -> Layer {
        let best = self.best_blob();
        Layer {
            diff_id: self.diff_id,
            chain_id: self.chain_id,
            lazy: best.as_ref().is_some_and(|b| !b.is_stored()),
            blob: best.map(|b| b.descriptor),
        }
    }
}
