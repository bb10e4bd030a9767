//! States made of other states' layers (rows `op.merge`, `op.diff`). Only the list of layers is
//! made here; files are copied when the snapshot is needed, and blobs are those of the
//! original layers.

use crate::{
    assemble::assembled, early_blob::UnownedBlob, id::RefId, immutable::ImmutableRef,
    layer::StackedLayer, layered::LayeredRef, records::Records,
};
use shipway_archive::{Compression, LayerTree};
use shipway_fault::{Code, Context as _, Fault, Result};
use std::sync::{Arc, atomic::Ordering::Relaxed};

/// The layers of all `parts`, one on another.
pub(crate) async fn merge(
    records: &Arc<Records>,
    parts: &[ImmutableRef],
    description: String,
) -> Result<LayeredRef> {
    let mut whole = Vec::with_capacity(parts.len());
    for part in parts {
        let part = part.layered().await?;
        if !part.is_scratch() {
            whole.push(part);
        }
    }
    match &whole[..] {
        [] => return Ok(LayeredRef::scratch(records)),
        [only] => return Ok(only.clone()),
        _ => {}
    }
    let mut layers: Vec<Arc<StackedLayer>> = Vec::new();
    for part in &whole {
        for original in &part.record().layers {
            layers.push(moved(records, original, layers.last()));
        }
    }
    let parents = whole.iter().map(|p| p.id().clone()).collect();
    Ok(assembled(records, "merge", layers, parents, description))
}

/// What `upper` adds to `lower`. Without `lower` it is all of `upper`.
pub(crate) async fn diff(
    records: &Arc<Records>,
    lower: Option<&ImmutableRef>,
    upper: Option<&ImmutableRef>,
    description: String,
) -> Result<LayeredRef> {
    let upper = match upper {
        Some(upper) => upper.layered().await?,
        None => LayeredRef::scratch(records),
    };
    let lower = match lower {
        Some(lower) => lower.layered().await?,
        None => return Ok(upper),
    };
    let (below, above) = (&lower.record().layers, &upper.record().layers);
    let parents =
        [&lower, &upper].into_iter().filter(|r| !r.is_scratch()).map(|r| r.id().clone()).collect();
    if below.last().map(|c| &c.snapshot) == above.last().map(|c| &c.snapshot) {
        return Ok(LayeredRef::scratch(records));
    }
    let prefix =
        above.len() > below.len() && below.iter().zip(above).all(|(b, a)| b.snapshot == a.snapshot);
    if !prefix {
        return compared(records, lower, upper, parents, description)
            .await
            .context(|| "compare two file systems");
    }
    let mut layers = Vec::new();
    for original in &above[below.len()..] {
        layers.push(moved(records, original, layers.last()));
    }
    Ok(assembled(records, "diff", layers, parents, description))
}

/// The layer of `original` at another place.
fn moved(
    records: &Records,
    original: &Arc<StackedLayer>,
    below: Option<&Arc<StackedLayer>>,
) -> Arc<StackedLayer> {
    if original.parent.as_ref() == below.map(|c| &c.snapshot) {
        return original.clone();
    }
    let stacked = records.stacked_layer(original.diff_id, below);
    if !Arc::ptr_eq(&stacked, original) {
        if let Some(tar) = original.tar.get() {
            let _ = stacked.tar.set(tar.clone());
        }
        for blob in original.blobs() {
            stacked.know(blob);
        }
        if let Some(created) = original.created() {
            stacked.set_created(created);
        }
        match original.is_blob_only() {
            true => stacked.blob_only.store(true, Relaxed),
            false => {
                stacked.set_copy_of(original.copy_of().unwrap_or_else(|| original.snapshot.clone()))
            }
        }
    }
    stacked
}

/// The layer that turns `lower` into `upper`, packed from both trees, for states that are not on
/// one lineage. Nothing but its blob has it, so the new state keeps that from the beginning.
async fn compared(
    records: &Arc<Records>,
    lower: LayeredRef,
    upper: LayeredRef,
    parents: Vec<RefId>,
    description: String,
) -> Result<LayeredRef> {
    let (lower, upper) = (ImmutableRef::from(lower), ImmutableRef::from(upper));
    let (before, after) = tokio::try_join!(lower.mount(), upper.mount())?;
    let lease = records.backend.run_leases.lease(&records.backend.storage).await?;
    let tree = LayerTree::compared(before.path(), after.path());
    let blob = UnownedBlob::pack(records, &lease, (tree, (before, after)), Compression::default());
    let blob = blob.await?;
    let stacked = records.stacked_layer(blob.tar.diff_id, None);
    stacked.blob_only.store(true, Relaxed);
    blob.add_to(&stacked);
    let state = assembled(records, "diff", vec![stacked], parents, description);
    records.ensure_lease(state.record()).await?;
    if !blob.give(state.record()).await? {
        return Err(Fault::new(
            Code::Aborted,
            "the blob of the difference vanished while it was made",
        )
        .hint("something else deletes content in this containerd namespace; build again"));
    }
    Ok(state)
}
