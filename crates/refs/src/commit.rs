//! Committing: what was written into an active snapshot becomes a layer, and the snapshot gets the
//! name that it may have.

use crate::{
    active::Active,
    early_blob::UnownedBlob,
    exact,
    id::fresh_id,
    life::RecordStage,
    mount::is_lasting,
    record::RecordMeta,
    records::{Record, Records},
};
use shipway_archive::{Hashed, LayerTree, OwnLayer};
use shipway_fault::{Fault, Result};
use shipway_storage::{Mount, SnapshotKey};
use shipway_task::blocking;
use std::sync::atomic::Ordering;

/// Commits the active snapshot `key`, which holds `layer` on top of `below`, under the name that it
/// may have, and records that under a lease. Says whether it was this one that got the name;
/// otherwise there is one that is equal.
pub(crate) async fn name(
    records: &Records,
    (key, mounts): (&SnapshotKey, &[Mount]),
    below: Option<&Record>,
    layer: &Hashed,
    meta: &RecordMeta,
    blob: Option<&UnownedBlob>,
) -> Result<(Record, bool)> {
    let backend = &records.backend;
    loop {
        let record = stacked(records, below, layer, meta.clone());
        let Some(stacked) = record.layers.last() else {
            return Err(Fault::internal("a commit without a layer"));
        };
        if let Some(blob) = blob {
            blob.add_to(stacked);
        }
        let done = async {
            records.ensure_lease(&record).await?;
            if let Some(blob) = blob {
                blob.give(&record).await?;
            }
            let labels =
                exact::labels().into_iter().chain(backend.durable.labels(mounts)).collect();
            let snapshots = &backend.storage.snapshots;
            match snapshots.commit(&record.lease, &stacked.snapshot, key, &labels).await {
                Ok(()) => Ok(Some(true)),
                Err(e) if e.is_already_exists() => {
                    backend.durable.check(&stacked.snapshot)?;
                    let there = snapshots.stat(&stacked.snapshot).await?;
                    Ok(backend.distrusted.accepts(&there).then_some(false))
                }
                Err(e) => Err(e),
            }
        };
        match done.await {
            Ok(Some(made)) => return Ok((record, made)),
            // The name is avoided from now on.
            Ok(None) => backend.delete_lease(&record.lease).await,
            Err(e) => {
                backend.delete_lease(&record.lease).await;
                return Err(e);
            }
        }
    }
}

/// Remembers where a committed state's files are: in the place where they were written.
pub(crate) fn remember(record: &Record, mounts: &[Mount], has_parent: bool) {
    if let [only @ (Mount::Overlay(_) | Mount::Bind(_))] = mounts {
        if is_lasting(only) {
            let _ = record.shown.set(vec![only.read_only()]);
        }
        if let (Some(stacked), Ok(OwnLayer::Tree(tree))) =
            (record.layers.last(), OwnLayer::of(mounts, has_parent))
        {
            let _ = stacked.tree.set(tree);
        }
    }
}

/// What was written over `below`, and what keeps it readable.
pub(crate) async fn written(
    records: &Records,
    mounts: &[Mount],
    below: Option<&SnapshotKey>,
) -> Result<(LayerTree, impl Send + 'static)> {
    let (tree, guard) = match OwnLayer::of(mounts, below.is_some())? {
        OwnLayer::Tree(tree) => (tree, None),
        OwnLayer::Whole(after) => {
            let view = Active::view(&records.backend, below).await?;
            let before = records.backend.mount(&view.mounts, None).await?;
            (LayerTree::compared(before.path(), after), Some((before, view)))
        }
    };
    Ok((tree.settled(), guard))
}

/// The tar of what was written over `below`.
pub(crate) async fn hash(
    records: &Records,
    mounts: &[Mount],
    below: Option<&SnapshotKey>,
) -> Result<Hashed> {
    let (tree, guard) = written(records, mounts, below).await?;
    let hashed = blocking("hash a layer", move || shipway_archive::tar_of(&tree)).await;
    drop(guard);
    hashed
}

/// A record of `layer` on top of `below`, which is being committed.
fn stacked(records: &Records, below: Option<&Record>, layer: &Hashed, meta: RecordMeta) -> Record {
    let under = below.and_then(|r| r.layers.last());
    let stacked = match &layer.loss {
        None => records.stacked_layer(layer.tar.diff_id, under),
        Some(loss) => {
            tracing::debug!(%loss, description = %meta.description, "state has more than its layer, keeping it under a name of its own");
            records.own_layer(layer.tar.diff_id, under, exact::own_name())
        }
    };
    let _ = stacked.tar.set(layer.tar.clone());
    stacked.new.store(true, Ordering::Relaxed);
    let layers =
        below.map(|r| r.layers.clone()).unwrap_or_default().into_iter().chain([stacked]).collect();
    Record::new(fresh_id(), meta, layers, RecordStage::Lazy)
}
