//! The same image in further namespaces of the same containerd.
//!
//! Blobs are shared among namespaces by containerd itself, snapshots by snapshotters that answer a
//! Prepare with the label `containerd.io/snapshot.ref` by AlreadyExists (`shipway-snapshotter`
//! does): a namespace then gets names, and no byte is written twice. Other snapshotters unpack the
//! layers once for each namespace. A namespace's record comes last, when everything that it needs
//! is there, and keeps it by labels of its own, so removing the image in one namespace does nothing
//! to the others.
//!
//! [`ahead`] does most of it while the build goes on, [`target`] has what one namespace is asked.

pub(crate) mod ahead;
pub(crate) mod target;

use self::target::Target;
use crate::{
    port::ExportContext,
    replace::may_replace,
    writer::{Written, WrittenManifest},
};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::{ChainId, Descriptor};
use shipway_refs::{Compression, Fetch, ImmutableRef};
use shipway_storage::{Labels, Namespaces, SnapshotKey, Storage, built_labels};
use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

/// How often the snapshots of an image are made in a namespace where something else removes them.
const ATTEMPTS: usize = 3;

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
    /// Makes the image whole in `target`, and then names it.
    pub async fn publish(&self, target: &Target) -> Result<()> {
        let status = format!("publishing to namespace {}", target.namespace);
        self.cx.reporter.status(status.clone(), 0, 0, false);
        self.publish_to(target).await.context(|| status.clone())?;
        self.cx.reporter.status(status, 0, 0, true);
        Ok(())
    }

    async fn publish_to(&self, target: &Target) -> Result<()> {
        target.renew();
        let named = self.names.iter().map(|name| self.is_named(name, target));
        let named = futures::future::try_join_all(named).await?;
        let (data, manifests) = self.written.blobs();
        // From the root down: then all that is there is kept, by the lease or by a name.
        for manifest in manifests.iter().rev().map(|m| m.digest) {
            match manifest == self.written.root.digest && !named.contains(&true) {
                true => target.root(manifest).await?,
                false => target.child(manifest).await?,
            }
        }
        let configs = self.written.manifests.iter().map(|m| target.child(m.config.digest));
        futures::future::try_join_all(configs).await?;
        for index in self.unpacked {
            let (image, state) = (&self.written.manifests[*index], &self.states[*index]);
            self.layers(image, state, target).await?;
        }
        let lazy =
            |d: &&Descriptor| self.written.manifests.iter().any(|m| m.lazy.contains_key(&d.digest));
        let is_config =
            |d: &&Descriptor| self.written.manifests.iter().any(|m| m.config.digest == d.digest);
        let blobs = data.iter().filter(|d| !lazy(d) && !is_config(d));
        futures::future::try_join_all(blobs.map(|d| target.child(d.digest))).await?;
        let mut labels = built_labels(&self.written.root, SystemTime::now());
        if self.pinned {
            labels.insert(PINNED.0.to_owned(), PINNED.1.to_owned());
        }
        for (name, named) in self.names.iter().zip(named) {
            if !named {
                target.to.images.put_at(name, &self.written.root, &labels, self.time).await?;
            }
        }
        Ok(())
    }

    /// Whether `name` leads to the image there, as it is wanted; an error if it may not.
    async fn is_named(&self, name: &str, target: &Target) -> Result<bool> {
        let image = match target.to.images.get(name).await {
            Err(e) if e.is_not_found() => return Ok(false),
            image => image?,
        };
        may_replace(&image, self.replaceable)?;
        let root = &self.written.root;
        let same = image.target.digest == root.digest && image.target.media_type == root.media_type;
        let pinned = image.labels.get(PINNED.0).is_some_and(|v| v == PINNED.1);
        Ok(same && image.built().is_some() && (pinned || !self.pinned))
    }

    /// Gives the namespace the snapshots of all layers. Its config is there, and keeps them from
    /// the moment that the topmost one exists; until then another program may remove those that
    /// were there before.
    async fn layers(
        &self,
        image: &WrittenManifest,
        state: &ImmutableRef,
        target: &Target,
    ) -> Result<()> {
        let extended = image.diff_ids.iter().scan(None, |below, layer| {
            *below = Some(ChainId::extend(*below, *layer));
            *below
        });
        let chains: Vec<ChainId> = extended.collect();
        let Some(top) = chains.last() else { return Ok(()) };
        let mut failed = None;
        for _ in 0..ATTEMPTS {
            match self.missing_layers(image, state, &chains, target).await {
                Ok(()) if target.has(*top).await? => return Ok(()),
                Ok(()) => {}
                Err(e) if e.is_not_found() => failed = Some(e),
                Err(e) => return Err(e),
            }
        }
        Err(failed.unwrap_or_else(|| {
            Fault::new(Code::Aborted, format!("snapshot {top} vanished while it was shared"))
                .hint("something else deletes snapshots in this containerd namespace; build again")
        }))
    }

    /// Makes the snapshots above those that the namespace has, from the bottom up.
    async fn missing_layers(
        &self,
        image: &WrittenManifest,
        state: &ImmutableRef,
        chains: &[ChainId],
        target: &Target,
    ) -> Result<()> {
        let have = target.has_of(chains).await?;
        let mut below = have.checked_sub(1).map(|top| chains[top]);
        let mut fetched = false;
        for (n, chain) in chains.iter().enumerate().skip(have) {
            let (diff_id, blob) = (&image.diff_ids[n], &image.layers[n]);
            let key =
                SnapshotKey(format!("shipway-publish-{}-{}-{n}", self.cx.build, self.cx.index));
            let lazy = image.lazy.contains_key(&blob.digest);
            let labels = match lazy {
                // One that does not share snapshots may serve the layer once more.
                true => state.remote_labels(blob.digest).await.unwrap_or_default(),
                false => Labels::new(),
            };
            let bound = target.bind(&key, *chain, below, labels).await;
            if let Some(mounts) = bound.context(|| format!("share layer {diff_id}"))? {
                let unpacked = async {
                    if lazy && !fetched {
                        let reporter = Some(&self.cx.reporter);
                        state.blobs(Compression::default(), Fetch::Everything, reporter).await?;
                        fetched = true;
                    }
                    target.child(blob.digest).await?;
                    let found = target.to.snapshots.apply(blob, &mounts).await?;
                    if found != *diff_id {
                        return Err(Fault::new(
                            Code::DataLoss,
                            format!("blob {} unpacks to {found}, not {diff_id}", blob.digest),
                        ));
                    }
                    let lease = target.lease().await?;
                    let (name, none) = ((*chain).into(), Labels::new());
                    target.to.snapshots.commit(&lease, &name, &key, &none).await
                };
                let unpacked = unpacked.await;
                let exists = unpacked.as_ref().is_err_and(Fault::is_already_exists);
                if unpacked.is_err() {
                    let _ = target.to.snapshots.remove(&key).await;
                }
                if !exists {
                    unpacked.context(|| format!("unpack layer {diff_id}"))?;
                }
            }
            below = Some(*chain);
        }
        Ok(())
    }
}
