//! One other namespace on its way to having an image.
//!
//! Each write there is a transaction of containerd's only database, one after another for all
//! namespaces, and waits for the disk twice; a look costs next to nothing. So what is there already
//! is looked for first. Nothing has to be put into the lease for that: the image's root is in it
//! from the beginning, and from then on garbage collection keeps whatever the root's labels lead
//! to, from the moment that it exists.

use crate::lease::ExportLease;
use parking_lot::Mutex;
use shipway_fault::{Context as _, Result};
use shipway_oci::{ChainId, Digest};
use shipway_storage::{
    BlobInfo, DISTRIBUTION_SOURCE, GC_REF_CONTENT, GC_REF_SNAPSHOT, Ingest, LAYER_ORIGIN, Labels,
    LeaseId, Mount, Namespaces, SNAPSHOT_REF, SnapshotKey, Storage, UNCOMPRESSED,
};
use std::sync::Arc;
use tokio::sync::OnceCell;

/// Labels of blobs that mean the same in each namespace.
const TRAVELING: [&str; 5] =
    [GC_REF_CONTENT, GC_REF_SNAPSHOT, DISTRIBUTION_SOURCE, LAYER_ORIGIN, UNCOMPRESSED];

/// Another namespace, in one export.
pub(crate) struct Target {
    /// Its name.
    pub namespace: String,
    /// Its stores.
    pub to: Storage,
    namespaces: Arc<dyn Namespaces>,
    /// The builder's own stores.
    from: Storage,
    /// Build and index of the export.
    export: (String, usize),
    exists: OnceCell<()>,
    leases: Mutex<Leases>,
}

struct Leases {
    /// Keeps what is written.
    now: Arc<ExportLease>,
    /// Keep what was written before.
    earlier: Vec<Arc<ExportLease>>,
}

impl Target {
    /// `namespace`, whose stores are `to`, for the export number `index` of `build`, which has
    /// everything in `from`. Nothing is asked of containerd yet.
    pub fn new(
        (namespace, to): &(String, Storage),
        namespaces: &Arc<dyn Namespaces>,
        from: &Storage,
        (build, index): (&str, usize),
    ) -> Self {
        let now = Arc::new(ExportLease::new(&to.leases, build, index));
        Self {
            namespace: namespace.clone(),
            to: to.clone(),
            namespaces: namespaces.clone(),
            from: from.clone(),
            export: (build.to_owned(), index),
            exists: OnceCell::new(),
            leases: Mutex::new(Leases { now, earlier: Vec::new() }),
        }
    }

    /// Takes another lease if the one so far may expire before the export ends. What that one kept
    /// and lost is missing then, and made again.
    pub fn renew(&self) {
        let mut leases = self.leases.lock();
        if leases.now.is_old() {
            let (build, index) = &self.export;
            let new = Arc::new(ExportLease::new(&self.to.leases, build, *index));
            let old = std::mem::replace(&mut leases.now, new);
            leases.earlier.push(old);
        }
    }

    /// The lease of what is written now. It exists, as does the namespace.
    pub async fn lease(&self) -> Result<LeaseId> {
        self.exists.get_or_try_init(|| self.namespaces.ensure(&self.namespace)).await?;
        let lease = self.leases.lock().now.clone();
        lease.ensure().await.cloned()
    }

    /// Whether it has the snapshot.
    pub async fn has(&self, chain: ChainId) -> Result<bool> {
        match self.to.snapshots.stat(&chain.into()).await {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// How many of the layers with these chain IDs, lowest first, it has snapshots of.
    pub async fn has_of(&self, chains: &[ChainId]) -> Result<usize> {
        let has = futures::future::try_join_all(chains.iter().map(|c| self.has(*c))).await?;
        Ok(has.iter().rposition(|has| *has).map_or(0, |top| top + 1))
    }

    /// Gives it the snapshot `chain` on `below` that the snapshotter has for another namespace, or
    /// can have by `labels`. A snapshotter that does neither gives an active snapshot `key` to
    /// unpack the layer into.
    pub async fn bind(
        &self,
        key: &SnapshotKey,
        chain: ChainId,
        below: Option<ChainId>,
        mut labels: Labels,
    ) -> Result<Option<Vec<Mount>>> {
        let lease = self.lease().await?;
        labels.insert(SNAPSHOT_REF.to_owned(), chain.to_string());
        let below = below.map(SnapshotKey::from);
        match self.to.snapshots.prepare(&lease, key, below.as_ref(), &labels).await {
            Err(e) if e.is_already_exists() => Ok(None),
            Err(e) => Err(e),
            Ok(mounts) => Ok(Some(mounts)),
        }
    }

    /// Gives it the blob, and the labels by which that keeps others, and keeps it under the lease.
    pub async fn root(&self, digest: Digest) -> Result<()> {
        let shared = async { self.copy(&self.known(digest).await?).await };
        shared.await.context(|| format!("share blob {digest}"))
    }

    /// The same for a blob that something keeps there once it is there: the lease need not.
    pub async fn child(&self, digest: Digest) -> Result<()> {
        let (there, known) = futures::join!(self.to.content.info(digest), self.known(digest));
        let shared = async {
            match (there, known?) {
                (Ok(there), known) => self.relabel(&there, &known.labels).await,
                (Err(e), known) if e.is_not_found() => self.copy(&known).await,
                (Err(e), _) => Err(e),
            }
        };
        shared.await.context(|| format!("share blob {digest}"))
    }

    /// The builder's blob, with the labels that it has in other namespaces as well.
    async fn known(&self, digest: Digest) -> Result<BlobInfo> {
        let mut known = self.from.content.info(digest).await?;
        known.labels.retain(|key, _| TRAVELING.iter().any(|prefix| key.starts_with(prefix)));
        Ok(known)
    }

    /// Sets those of `labels` that a blob does not have.
    async fn relabel(&self, there: &BlobInfo, labels: &Labels) -> Result<()> {
        let mut missing = labels.clone();
        missing.retain(|key, value| there.labels.get(key) != Some(value));
        if !missing.is_empty() {
            self.to.content.update_labels(there.digest, &missing).await?;
        }
        Ok(())
    }

    /// Makes it have the blob under the lease; the bytes travel only where namespaces do not share
    /// them.
    async fn copy(&self, blob: &BlobInfo) -> Result<()> {
        let lease = self.lease().await?;
        let ingest = Ingest {
            reference: format!("shipway-publish-{}", blob.digest.hex()),
            expected: Some(blob.digest),
            size: Some(blob.size),
        };
        let mut writer = match self.to.content.writer(&lease, ingest).await {
            Ok(writer) => writer,
            Err(e) if e.is_already_exists() => {
                // A blob that was there keeps its own labels.
                let there = self.to.content.info(blob.digest).await?;
                return self.relabel(&there, &blob.labels).await;
            }
            Err(e) => return Err(e),
        };
        if !writer.is_complete() {
            let mut reader = self.from.content.reader(blob.digest).await?;
            while let Some(bytes) = reader.next().await? {
                writer.write(bytes).await?;
            }
        }
        writer.commit(Some(blob.digest), &blob.labels).await.map(drop)
    }
}
