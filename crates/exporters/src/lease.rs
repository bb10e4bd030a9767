//! The lease of an export.

use shipway_fault::{Class, Result};
use shipway_oci::timestamp;
use shipway_refs::RUN_KIND;
use shipway_storage::{GC_EXPIRE, Labels, LeaseId, Leases};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{sync::OnceCell, time::Instant};

/// What an export makes is protected this long if we die in the middle.
const LEASE_TIME: Duration = Duration::from_secs(3600);

/// A temporary lease that is made when something is first written, and ends with the export,
/// however that ends. Its end is not waited for: what was exported is held by its name, or was
/// sent.
pub(crate) struct ExportLease {
    id: LeaseId,
    leases: Arc<dyn Leases>,
    /// When it was made.
    made: OnceCell<Instant>,
    /// Whether containerd was asked for it.
    asked: AtomicBool,
}

impl ExportLease {
    /// One for the export number `index` of `build`, beside others that it may have.
    pub fn new(leases: &Arc<dyn Leases>, build: &str, index: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = LeaseId(format!("shipway-export-{build}-{index}-{n}"));
        Self { id, leases: leases.clone(), made: OnceCell::new(), asked: AtomicBool::new(false) }
    }

    /// The lease, which exists from now on.
    pub async fn ensure(&self) -> Result<&LeaseId> {
        let make = async || {
            let now = Instant::now();
            self.asked.store(true, Ordering::Relaxed);
            let expire = timestamp::format(SystemTime::now() + LEASE_TIME);
            let labels = Labels::from([
                (GC_EXPIRE.to_owned(), expire),
                (RUN_KIND.0.to_owned(), RUN_KIND.1.to_owned()),
            ]);
            match self.leases.create(&self.id, &labels).await {
                Err(e) if !e.is_already_exists() => {
                    Err(e.context("protect the export from garbage collection"))
                }
                _ => Ok(now),
            }
        };
        self.made.get_or_try_init(make).await?;
        Ok(&self.id)
    }

    /// Whether half of its time is over.
    pub fn is_old(&self) -> bool {
        self.made.get().is_some_and(|made| made.elapsed() > LEASE_TIME / 2)
    }
}

impl Drop for ExportLease {
    fn drop(&mut self) {
        let (leases, id) = (self.leases.clone(), self.id.clone());
        // A creation that failed may have happened all the same: containerd can go away before it
        // answers.
        if self.asked.load(Ordering::Relaxed)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            shipway_task::spawn_on(&runtime, "delete the lease of an export", end(leases, id));
        }
    }
}

/// Ends a lease, again and again while containerd is away.
async fn end(leases: Arc<dyn Leases>, id: LeaseId) {
    let mut pause = Duration::from_millis(100);
    for _ in 0..10 {
        match leases.delete(&id, false).await {
            Ok(()) => return,
            Err(fault) if fault.class() == Class::Environment => tokio::time::sleep(pause).await,
            Err(fault) => {
                return tracing::debug!(lease = %id, error = %fault, "failed to delete the lease of an export, it will expire");
            }
        }
        pause = (pause * 2).min(Duration::from_secs(10));
    }
    tracing::warn!(lease = %id, "failed to delete the lease of an export, it will expire: containerd is unavailable");
}
