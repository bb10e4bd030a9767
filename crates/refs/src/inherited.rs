//! Snapshots of an earlier run of the daemon that a process goes on to use: they are taken over
//! into this run's lease before the earlier one's ends.

use crate::{
    active::Active,
    backend::Backend,
    run_lease::{RunLease, forget},
};
use shipway_fault::{Fault, Result};
use shipway_storage::{LeaseResource, SnapshotKey, SnapshotKind};
use std::{collections::HashMap, sync::Arc};

/// The snapshots of one process that an earlier run of the daemon left. Dropped, those it wrote
/// vanish, and those it read are kept by others or not at all.
#[derive(Default)]
pub struct Inherited {
    own: Vec<Own>,
    _names: Vec<Arc<KeptName>>,
}

/// An active snapshot or a view.
struct Own {
    parent: Option<SnapshotKey>,
    is_view: bool,
    active: Active,
}

/// The name of a committed snapshot in the lease of this run.
struct KeptName {
    backend: Arc<Backend>,
    lease: RunLease,
    name: SnapshotKey,
}

impl Drop for KeptName {
    fn drop(&mut self) {
        let (backend, lease, name) = (self.backend.clone(), self.lease.clone(), self.name.clone());
        self.backend.background.spawn("forget a snapshot", async move {
            forget(&backend.storage, &lease, &name).await;
        });
    }
}

impl Inherited {
    /// Takes over the snapshots of each process; `None` for one of which a snapshot is gone.
    pub(crate) async fn take(
        backend: &Arc<Backend>,
        wanted: &[Vec<SnapshotKey>],
    ) -> Result<Vec<Option<Self>>> {
        let mut names = HashMap::new();
        let mut all = Vec::with_capacity(wanted.len());
        for keys in wanted {
            all.push(Self::take_one(backend, keys, &mut names).await?);
        }
        Ok(all)
    }

    async fn take_one(
        backend: &Arc<Backend>,
        keys: &[SnapshotKey],
        names: &mut HashMap<SnapshotKey, Arc<KeptName>>,
    ) -> Result<Option<Self>> {
        let (snapshots, leases) = (&backend.storage.snapshots, &backend.storage.leases);
        let lease = backend.run_leases.lease(&backend.storage).await?;
        let mut inherited = Self::default();
        for key in keys {
            let info = match snapshots.stat(key).await {
                Err(e) if e.is_not_found() => return Ok(None),
                info => info?,
            };
            let resource = LeaseResource::Snapshot(snapshots.name().to_owned(), key.clone());
            leases.add(&lease, resource).await?;
            if info.kind == SnapshotKind::Committed {
                let kept = names.entry(key.clone()).or_insert_with(|| {
                    let (backend, lease) = (backend.clone(), lease.clone());
                    Arc::new(KeptName { backend, lease, name: key.clone() })
                });
                inherited._names.push(kept.clone());
                continue;
            }
            let is_view = info.kind == SnapshotKind::View;
            let active = Active::left(backend, &lease, key, is_view).await?;
            inherited.own.push(Own { parent: info.parent, is_view, active });
        }
        Ok(Some(inherited))
    }

    /// The active snapshot `key`, which has to be on top of `below`.
    pub(crate) fn active(
        &mut self,
        key: &SnapshotKey,
        below: Option<&SnapshotKey>,
    ) -> Result<Active> {
        let at = self.own.iter().position(|own| own.active.key == *key && !own.is_view);
        let at = at.ok_or_else(|| Fault::not_found(format!("no state {key} was left")))?;
        if self.own[at].parent.as_ref() != below {
            return Err(Fault::internal(format!("the state {key} was left on another one")));
        }
        Ok(self.own.swap_remove(at).active)
    }
}
