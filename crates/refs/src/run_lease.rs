//! Run leases: what keeps active snapshots and views of one run of the daemon, and is deleted by
//! the next, which takes over first what is in use still (`inherited`).

use crate::{
    id::fresh_id,
    record::{KIND, KIND_RUN},
};
use shipway_fault::{Context as _, Result};
use shipway_oci::{Digest, timestamp};
use shipway_storage::{GC_EXPIRE, Labels, LeaseId, LeaseResource, SnapshotKey, Storage};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// A run lease takes new snapshots for this long.
const LEASE_AGE: Duration = Duration::from_secs(12 * 3600);
/// And ends this long after it began, should it not be deleted: no build lasts longer than the
/// difference.
const EXPIRY: Duration = Duration::from_secs(7 * 24 * 3600);

/// A hold on a run lease: the lease is kept while there is one.
#[derive(Clone)]
pub(crate) struct RunLease(Arc<RunLeaseInner>);

struct RunLeaseInner {
    lease: LeaseId,
    /// How many want each blob in the lease: equal blobs are one entry.
    blobs: tokio::sync::Mutex<HashMap<Digest, usize>>,
}

impl std::ops::Deref for RunLease {
    type Target = LeaseId;

    fn deref(&self) -> &LeaseId {
        &self.0.lease
    }
}

impl RunLease {
    fn new(lease: LeaseId) -> Self {
        Self(Arc::new(RunLeaseInner { lease, blobs: Default::default() }))
    }

    /// Counts one more user of a blob that is about to be stored under the lease.
    pub async fn retain_blob(&self, blob: Digest) {
        *self.0.blobs.lock().await.entry(blob).or_default() += 1;
    }

    /// Takes a blob out of the lease, unless others want it there.
    pub async fn release_blob(&self, storage: &Storage, blob: Digest) {
        // Locked to the end: storing the blob anew waits for that.
        let mut blobs = self.0.blobs.lock().await;
        let others = blobs.get(&blob).map_or(0, |n| n.saturating_sub(1));
        if others > 0 {
            blobs.insert(blob, others);
            return;
        }
        blobs.remove(&blob);
        if let Err(e) = storage.leases.remove(self, LeaseResource::Content(blob)).await
            && !e.is_not_found()
        {
            tracing::debug!(digest = %blob, error = %e, "failed to remove blob from lease, it stays until the next start");
        }
    }
}

/// Makes and ends what lives no longer than the daemon.
pub(crate) struct RunLeases {
    current: tokio::sync::Mutex<Option<(RunLease, SystemTime)>>,
}

impl RunLeases {
    pub fn new() -> Self {
        Self { current: tokio::sync::Mutex::new(None) }
    }

    /// The lease for new active snapshots and views.
    pub async fn lease(&self, storage: &Storage) -> Result<RunLease> {
        let mut current = self.current.lock().await;
        let now = SystemTime::now();
        if let Some((lease, began)) = &*current
            && now.duration_since(*began).is_ok_and(|age| age < LEASE_AGE)
        {
            return Ok(lease.clone());
        }
        let lease = RunLease::new(LeaseId(format!("shipway-epoch-{}", fresh_id())));
        let labels = Labels::from([
            (KIND.into(), KIND_RUN.into()),
            (GC_EXPIRE.into(), timestamp::format_whole(now + EXPIRY)),
        ]);
        storage
            .leases
            .create(&lease, &labels)
            .await
            .context(|| "make a lease for file systems in use")?;
        *current = Some((lease.clone(), now));
        Ok(lease)
    }

    /// The lease for new active snapshots and views, if there is one.
    pub async fn current(&self) -> Option<LeaseId> {
        self.current.lock().await.as_ref().map(|(lease, _)| (**lease).clone())
    }

    /// Deletes the lease if no handle holds it and it keeps nothing; with `anyway` also if it keeps
    /// something. Returns whether it did.
    pub async fn delete_unused(&self, storage: &Storage, anyway: bool) -> Result<bool> {
        let mut current = self.current.lock().await;
        let Some((lease, _)) = &*current else { return Ok(false) };
        // No other hold can be taken while the table is locked.
        if Arc::strong_count(&lease.0) > 1
            || !(anyway || storage.leases.resources(lease).await?.is_empty())
        {
            return Ok(false);
        }
        storage.leases.delete(lease, false).await?;
        *current = None;
        Ok(true)
    }
}

/// Removes an active snapshot or view and its entry in the lease it was made under. One that is
/// gone is not an error.
pub(crate) async fn remove(storage: &Storage, lease: &LeaseId, key: &SnapshotKey) -> Result<()> {
    let removed = match storage.snapshots.remove(key).await {
        Err(e) if e.is_not_found() => Ok(()),
        other => other,
    };
    forget(storage, lease, key).await;
    removed
}

/// Takes a name that no longer exists out of its lease, so that the lease of a long run does not
/// grow.
pub(crate) async fn forget(storage: &Storage, lease: &LeaseId, key: &SnapshotKey) {
    let resource = LeaseResource::Snapshot(storage.snapshots.name().to_owned(), key.clone());
    if let Err(e) = storage.leases.remove(lease, resource).await
        && !e.is_not_found()
    {
        tracing::debug!(%key, error = %e, "failed to remove name from lease");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_storage::fake::FakeStorage;

    #[tokio::test]
    async fn a_blob_leaves_the_lease_with_the_last_who_wants_it() {
        let fake = FakeStorage::new().unwrap();
        let storage = fake.storage();
        let lease = RunLeases::new().lease(&storage).await.unwrap();
        lease.retain_blob(Digest::of("it")).await;
        lease.retain_blob(Digest::of("it")).await;
        let blob = storage.content.put(&lease, "it".into(), &Labels::new()).await.unwrap();
        lease.release_blob(&storage, blob).await;
        fake.gc();
        assert!(storage.content.info(blob).await.is_ok());
        lease.release_blob(&storage, blob).await;
        fake.gc();
        assert!(storage.content.info(blob).await.unwrap_err().is_not_found());
    }
}
