//! What an earlier run left is taken over at a start, or removed.

use crate::{
    backend::Backend,
    exact,
    layer::{BlobPlace, KnownBlob, LayerOrigins, LayerSource, StackedLayer},
    life::RecordStage,
    named_table::NamedTable,
    record::{self, KIND, KIND_RUN, RecordBody},
    records::{Record, Records},
};
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest};
use shipway_storage::{REMOTE_SNAPSHOT, SnapshotInfo, SnapshotKey, Storage};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
};

/// Where the blobs are that records name.
struct Origins<'a> {
    origins: &'a dyn LayerOrigins,
    /// The sources that were found; layers of one image share theirs.
    sources: HashMap<String, Option<Arc<dyn LayerSource>>>,
    /// What the content store has, once that was asked.
    stored: Option<HashSet<Digest>>,
}

impl Origins<'_> {
    /// Where a blob is that came from `origin`.
    async fn place(
        &mut self,
        storage: &Storage,
        blob: &Descriptor,
        origin: Option<String>,
    ) -> Result<BlobPlace> {
        let Some(origin) = origin else { return Ok(BlobPlace::Stored(None)) };
        let origins = self.origins;
        let find = |origin: &String| origins.source(origin);
        let source = self.sources.entry(origin).or_insert_with_key(find).clone();
        let Some(source) = source else { return Ok(BlobPlace::Stored(None)) };
        let stored = match &mut self.stored {
            Some(stored) => stored,
            none => {
                let all = storage.content.list(&[]).await?;
                none.insert(all.into_iter().map(|b| b.digest).collect())
            }
        };
        Ok(match stored.contains(&blob.digest) {
            true => BlobPlace::Stored(Some(source)),
            false => BlobPlace::Remote(source),
        })
    }
}

/// The tables that are filled.
pub(crate) struct Load<'a> {
    pub backend: &'a Backend,
    pub records: &'a Records,
    pub named: &'a NamedTable,
}

impl Load<'_> {
    /// Fills the tables from the leases in containerd, and deletes those whose states are gone.
    pub async fn run(&self, origins: &dyn LayerOrigins) -> Result<()> {
        let mut leases = self.backend.storage.leases.list(&[format!("labels.\"{KIND}\"")]).await?;
        let ours = self.backend.run_leases.current().await;
        leases.retain(|lease| Some(&lease.id) != ours.as_ref());
        let all = self.backend.storage.snapshots.list(&[]).await?;
        self.backend.distrusted.load(&all);
        let served: HashSet<SnapshotKey> = all
            .iter()
            .filter(|s| s.labels.contains_key(REMOTE_SNAPSHOT))
            .map(|s| s.key.clone())
            .collect();
        self.records.served.load(!served.is_empty());
        let mut known = Origins { origins, sources: HashMap::new(), stored: None };
        let (lost, whole): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|s| self.backend.durable.is_lost(&s.key, &s.labels));
        let lost: HashMap<SnapshotKey, Option<SnapshotKey>> =
            lost.into_iter().map(|s| (s.key, s.parent)).collect();
        let on_lost = |s: &SnapshotInfo| s.parent.as_ref().is_some_and(|p| lost.contains_key(p));
        let snapshots: HashSet<SnapshotKey> =
            whole.into_iter().filter(|s| !on_lost(s)).map(|s| s.key).collect();
        let half = self.backend.filling.list().await?;
        // What is in the way of a removal has to be gone first.
        let at_once = !lost.is_empty();
        for lease in leases {
            let stale = lease.labels.get(KIND).is_some_and(|k| k == KIND_RUN);
            let Some((id, meta)) = record::read(&lease) else {
                if stale {
                    self.backend.storage.leases.delete(&lease.id, at_once).await?;
                }
                continue;
            };
            match &meta.body {
                RecordBody::Layers(layers) => {
                    let mut stack: Vec<Arc<StackedLayer>> = Vec::new();
                    for layer in layers {
                        let below = stack.last();
                        let stacked = match &layer.own {
                            Some(own) => self.records.own_layer(layer.diff_id, below, own.clone()),
                            None => self.records.stacked_layer(layer.diff_id, below),
                        };
                        if let Some(descriptor) = layer.blob.clone() {
                            let place = known.place(
                                &self.backend.storage,
                                &descriptor,
                                layer.origin.clone(),
                            );
                            stacked.know(KnownBlob { place: place.await?, descriptor });
                        }
                        if let Some(original) = &layer.copy_of {
                            stacked.set_copy_of(original.clone());
                        }
                        stacked.blob_only.store(layer.blob_only, Ordering::Relaxed);
                        stacked.served.store(served.contains(&stacked.snapshot), Ordering::Relaxed);
                        if let Some(created) = layer.created {
                            stacked.set_created(created);
                        }
                        stack.push(stacked);
                    }
                    // What another version recorded may not be what its layers say.
                    let whole = exact::is_ours(&lease.labels)
                        && stack.last().is_some_and(|c| snapshots.contains(&c.snapshot));
                    if whole {
                        self.records.load(Record::new(id, meta, stack, RecordStage::Committed));
                    } else {
                        self.backend.storage.leases.delete(&lease.id, at_once).await?;
                    }
                }
                // What can be fetched anew is: which of its files are truncated is unknown.
                RecordBody::Named { snapshot, .. }
                    if snapshots.contains(snapshot)
                        && !half.contains(&id)
                        && !(self.backend.durable.was_cut() && meta.record_type.is_source()) =>
                {
                    self.named.load(id, meta);
                }
                RecordBody::Named { .. } => {
                    self.backend.storage.leases.delete(&lease.id, at_once).await?
                }
            }
        }
        for id in &half {
            self.backend.filling.remove(id).await?;
        }
        let left = self.remove_lost(lost).await?;
        self.backend.durable.begin(left).await
    }

    /// Removes the snapshots that a power cut may have made short (each with its parent), and names
    /// those that others still use.
    async fn remove_lost(
        &self,
        mut lost: HashMap<SnapshotKey, Option<SnapshotKey>>,
    ) -> Result<HashSet<SnapshotKey>> {
        if !lost.is_empty() {
            tracing::warn!(
                snapshots = lost.len(),
                "the machine lost power: what was not on the disk yet is removed, and built again when it is needed"
            );
        }
        let mut left = HashSet::new();
        // From above: what others are made from cannot be removed.
        while !lost.is_empty() {
            let below: HashSet<SnapshotKey> = lost.values().flatten().cloned().collect();
            let (above, rest): (HashMap<_, _>, HashMap<_, _>) =
                lost.into_iter().partition(|(key, _)| !below.contains(key));
            for key in above.into_keys() {
                match self.backend.storage.snapshots.remove(&key).await {
                    Err(e) if !e.is_not_found() => {
                        tracing::warn!(%key, error = %e, "snapshot may be truncated after a power loss and is still in use");
                        left.insert(key);
                    }
                    _ => {}
                }
            }
            lost = rest;
        }
        Ok(left)
    }
}
