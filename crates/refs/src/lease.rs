//! What the lease of a record keeps.

use crate::{
    exact,
    layer::KnownBlob,
    life::RecordStage,
    record,
    records::{Record, Records},
};
use shipway_fault::{Context as _, Result};
use shipway_oci::Digest;
use shipway_storage::{LeaseId, LeaseResource, REMOTE_SNAPSHOT, SnapshotKey};
use std::sync::atomic::Ordering;

impl Records {
    /// Makes the lease of a record; its labels are final from then on.
    pub async fn ensure_lease(&self, record: &Record) -> Result<()> {
        let Some(step) = record.life.step(RecordStage::Leased).await else { return Ok(()) };
        let labels = record::labels_of(&record.meta());
        match self.backend.storage.leases.create(&record.lease, &labels).await {
            Err(e) if !e.is_already_exists() => {
                Err(e).context(|| format!("record {:?}", record.description))
            }
            _ => {
                step.done();
                Ok(())
            }
        }
    }

    /// Whether a record can still give what it promises: its snapshot exists and its lease keeps
    /// it, or every layer can be had.
    pub async fn is_whole(&self, record: &Record) -> bool {
        // A record that is being materialized right now can be materialized.
        if record.life.is_committing() {
            return true;
        }
        let storage = &self.backend.storage;
        if record.life.stage() == RecordStage::Committed {
            let Some(name) = record.snapshot() else { return true };
            let (stat, lease) =
                tokio::join!(storage.snapshots.stat(name), storage.leases.resources(&record.lease));
            // Any other error is containerd's trouble, not the record's.
            let gone = |r: Result<()>| r.is_err_and(|e| e.is_not_found());
            return !gone(stat.map(drop)) && !gone(lease.map(drop));
        }
        // A layer that has neither a blob that can be had nor another place is in its own, with the
        // state that made it.
        let here = record
            .layers
            .iter()
            .filter(|c| c.copy_of().is_none() && !c.blobs().iter().any(KnownBlob::may_be_had));
        for stacked in here {
            if storage.snapshots.stat(&stacked.snapshot).await.is_err_and(|e| e.is_not_found()) {
                return false;
            }
        }
        true
    }

    /// Puts a committed snapshot into a lease; false if it does not exist.
    pub async fn keep_snapshot(&self, lease: &LeaseId, name: &SnapshotKey) -> Result<bool> {
        let (snapshots, leases) = (&self.backend.storage.snapshots, &self.backend.storage.leases);
        match snapshots.stat(name).await {
            Err(e) if e.is_not_found() => return Ok(false),
            Ok(info) if !self.backend.distrusted.accepts(&info) => return Err(exact::taken(name)),
            Ok(info) if info.labels.contains_key(REMOTE_SNAPSHOT) => {
                if let Some(stacked) = self.known_layer(name) {
                    stacked.served.store(true, Ordering::Relaxed);
                }
            }
            other => drop(other?),
        }
        self.backend.durable.check(name)?;
        leases.add(lease, LeaseResource::Snapshot(snapshots.name().into(), name.clone())).await?;
        // It may have gone between the two.
        match snapshots.stat(name).await {
            Err(e) if e.is_not_found() => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// Puts a stored blob into the lease of `record`; false if it is not stored.
    pub async fn keep_blob(&self, digest: Digest, record: &Record) -> Result<bool> {
        let storage = &self.backend.storage;
        match storage.content.info(digest).await {
            // Nothing leaves a lease but with all of it, so once is enough.
            Ok(_) if record.secured.lock().contains(&digest) => return Ok(true),
            Ok(_) => {
                storage.leases.add(&record.lease, LeaseResource::Content(digest)).await?;
                match storage.content.info(digest).await {
                    Err(e) if e.is_not_found() => {}
                    other => {
                        drop(other?);
                        record.secured.lock().insert(digest);
                        return Ok(true);
                    }
                }
            }
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
        Ok(false)
    }
}
