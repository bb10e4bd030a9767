//! The same image in further namespaces of the same containerd.
//!
//! Blobs are shared among namespaces by containerd itself, snapshots by snapshotters that answer a
//! Prepare with the label `containerd.io/snapshot.ref` by AlreadyExists (`shipway-snapshotter`
//! does): a namespace then gets names, and no byte is written twice. Other snapshotters unpack the
//! layers once for each namespace. A namespace's record comes last, when everything that it needs
//! is there, and keeps it by labels of its own, so removing the image in one namespace does nothing
//! to the others.

use crate::{
    lease::ExportLease,
    port::ExportContext,
    replace::may_replace,
    writer::{Written, WrittenManifest},
};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::{ChainId, Descriptor, Digest};
use shipway_refs::{Compression, Fetch, ImmutableRef};
use shipway_storage::{
    ContentStore, DISTRIBUTION_SOURCE, GC_REF_CONTENT, GC_REF_SNAPSHOT, Ingest, LAYER_ORIGIN,
    Labels, LeaseId, Namespaces, SNAPSHOT_REF, SnapshotKey, Storage, UNCOMPRESSED, built_labels,
};
use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

/// Label on an image record by which CRI keeps kubelet from removing the image.
pub(crate) const PINNED: (&str, &str) = ("io.cri-containerd.pinned", "pinned");

/// Where images are published besides the builder's own namespace.
pub struct Publishing {
    /// All namespaces.
    pub namespaces: Arc<dyn Namespaces>,
    /// The builder's own.
    pub own: String,
    /// Those that every image in the store is published to, unless a build says otherwise.
    pub default: Vec<String>,
}

impl Publishing {
    /// Whether the configured names can be those of namespaces.
    pub fn check(&self) -> Result<()> {
        self.targets(None).map(drop)
    }

    /// The namespaces that `wanted` (comma-separated) or else the configuration names, but for the
    /// builder's own; names that cannot be ones are errors.
    pub(crate) fn targets(&self, wanted: Option<&str>) -> Result<Vec<(String, Storage)>> {
        let names: BTreeSet<&str> = match wanted {
            Some(list) => list.split(',').map(str::trim).filter(|n| !n.is_empty()).collect(),
            None => self.default.iter().map(String::as_str).collect(),
        };
        let others = names.into_iter().filter(|n| *n != self.own);
        others.map(|n| Ok((n.to_owned(), self.namespaces.storage(n)?))).collect()
    }
}

/// An image on its way to other namespaces.
pub(crate) struct Publication<'a> {
    pub publishing: &'a Publishing,
    /// The builder's own stores.
    pub from: &'a Storage,
    pub written: &'a Written,
    /// The states of the manifests.
    pub states: &'a [ImmutableRef],
    /// Indexes of the manifests whose layers are unpacked.
    pub unpacked: &'a [usize],
    /// Names of the image.
    pub names: &'a [String],
    /// Time of the records.
    pub time: Option<SystemTime>,
    /// Whether kubelet is to keep the image.
    pub pinned: bool,
    /// Names that may be taken from images that CRI manages.
    pub replaceable: &'a [String],
    pub cx: &'a ExportContext,
}

impl Publication<'_> {
    /// Makes the image whole in `to`, and then names it.
    pub async fn publish(&self, namespace: &str, to: &Storage) -> Result<()> {
        let status = format!("publishing to namespace {namespace}");
        self.cx.reporter.status(status.clone(), 0, 0, false);
        self.publish_to(namespace, to).await.context(|| status.clone())?;
        self.cx.reporter.status(status, 0, 0, true);
        Ok(())
    }

    async fn publish_to(&self, namespace: &str, to: &Storage) -> Result<()> {
        self.publishing.namespaces.ensure(namespace).await?;
        for name in self.names {
            match to.images.get(name).await {
                Ok(image) => may_replace(&image, self.replaceable)?,
                Err(e) if e.is_not_found() => {}
                Err(e) => return Err(e),
            }
        }
        let lease = ExportLease::new(&to.leases, self.cx);
        let id = lease.ensure().await?;
        for index in self.unpacked {
            let (image, state) = (&self.written.manifests[*index], &self.states[*index]);
            self.layers(image, state, to, id).await?;
        }
        let (data, manifests) = self.written.blobs();
        let lazy = |d: &&Descriptor| {
            !self.written.manifests.iter().any(|m| m.lazy.contains_key(&d.digest))
        };
        let copies = data.iter().filter(lazy).map(|d| self.blob(d, to, id));
        futures::future::try_join_all(copies).await?;
        for manifest in &manifests {
            self.blob(manifest, to, id).await?;
        }
        let mut labels = built_labels(&self.written.root, SystemTime::now());
        if self.pinned {
            labels.insert(PINNED.0.to_owned(), PINNED.1.to_owned());
        }
        for name in self.names {
            to.images.put_at(name, &self.written.root, &labels, self.time).await?;
        }
        Ok(())
    }

    /// Gives the namespace the snapshots of all layers, from the bottom up.
    async fn layers(
        &self,
        image: &WrittenManifest,
        state: &ImmutableRef,
        to: &Storage,
        lease: &LeaseId,
    ) -> Result<()> {
        let (mut parent, mut fetched): (Option<ChainId>, bool) = (None, false);
        for (n, (diff_id, blob)) in image.diff_ids.iter().zip(&image.layers).enumerate() {
            let chain = ChainId::extend(parent, *diff_id);
            let key =
                SnapshotKey(format!("shipway-publish-{}-{}-{n}", self.cx.build, self.cx.index));
            let lazy = image.lazy.contains_key(&blob.digest);
            let mut labels = match lazy {
                // One that does not share snapshots may serve the layer once more.
                true => state.remote_labels(blob.digest).await.unwrap_or_default(),
                false => Labels::new(),
            };
            labels.insert(SNAPSHOT_REF.to_owned(), chain.to_string());
            let below = parent.map(SnapshotKey::from);
            match to.snapshots.prepare(lease, &key, below.as_ref(), &labels).await {
                Err(e) if e.is_already_exists() => {}
                Err(e) => return Err(e.context(format!("share layer {diff_id}"))),
                Ok(mounts) => {
                    let unpacked = async {
                        if lazy && !fetched {
                            let reporter = Some(&self.cx.reporter);
                            state
                                .blobs(Compression::default(), Fetch::Everything, reporter)
                                .await?;
                            fetched = true;
                        }
                        self.blob(blob, to, lease).await?;
                        let found = to.snapshots.apply(blob, &mounts).await?;
                        if found != *diff_id {
                            return Err(Fault::new(
                                Code::DataLoss,
                                format!("blob {} unpacks to {found}, not {diff_id}", blob.digest),
                            ));
                        }
                        to.snapshots.commit(lease, &chain.into(), &key, &Labels::new()).await
                    };
                    let unpacked = unpacked.await;
                    let exists = unpacked.as_ref().is_err_and(Fault::is_already_exists);
                    if unpacked.is_err() {
                        let _ = to.snapshots.remove(&key).await;
                    }
                    if !exists {
                        unpacked.context(|| format!("unpack layer {diff_id}"))?;
                    }
                }
            }
            parent = Some(chain);
        }
        Ok(())
    }

    /// Gives the namespace the blob with the labels by which it keeps others.
    async fn blob(&self, blob: &Descriptor, to: &Storage, lease: &LeaseId) -> Result<()> {
        let known = self.from.content.info(blob.digest).await?;
        let travels = |label: &str| {
            [GC_REF_CONTENT, GC_REF_SNAPSHOT, DISTRIBUTION_SOURCE, LAYER_ORIGIN, UNCOMPRESSED]
                .iter()
                .any(|prefix| label.starts_with(prefix))
        };
        let labels: Labels = known.labels.into_iter().filter(|(k, _)| travels(k)).collect();
        copy(
            self.from.content.as_ref(),
            to.content.as_ref(),
            lease,
            blob.digest,
            known.size,
            &labels,
        )
        .await
        .context(|| format!("share blob {}", blob.digest))
    }
}

/// Makes `to` have the blob under `lease`, with `labels`; its bytes travel only where namespaces do
/// not share them.
async fn copy(
    from: &dyn ContentStore,
    to: &dyn ContentStore,
    lease: &LeaseId,
    digest: Digest,
    size: u64,
    labels: &Labels,
) -> Result<()> {
    let ingest = Ingest {
        reference: format!("shipway-publish-{}", digest.hex()),
        expected: Some(digest),
        size: Some(size),
    };
    let mut writer = match to.writer(lease, ingest).await {
        Ok(writer) => writer,
        Err(e) if e.is_already_exists() => {
            // A blob that was there keeps its own labels.
            if !labels.is_empty() {
                to.update_labels(digest, labels).await?;
            }
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    if !writer.is_complete() {
        let mut reader = from.reader(digest).await?;
        while let Some(bytes) = reader.next().await? {
            writer.write(bytes).await?;
        }
    }
    writer.commit(Some(digest), labels).await.map(drop)
}
