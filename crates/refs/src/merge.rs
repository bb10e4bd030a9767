//! States made of other states' layers (rows `op.merge`, `op.diff`). Only the list of layers is
//! made here; files are copied when the snapshot is needed, and blobs are those of the
//! original layers.

use crate::{
    ImmutableRef, RecordType, RefId, RefStore,
    early_blob::UnownedBlob,
    layer::StackedLayer,
    life::Stage,
    record::{Body, RecordMeta, id_of},
    store::{Inner, Record},
};
use shipway_archive::{Compression, LayerTree};
use shipway_fault::{Code, Context as _, Fault, Result};
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::SystemTime,
};

impl RefStore {
    /// The layers of all `parts`, one on another (row `op.merge`); no file is copied before
    /// the snapshot is needed.
    pub async fn merge(
        &self,
        parts: &[ImmutableRef],
        description: impl Into<String>,
    ) -> Result<ImmutableRef> {
        let mut whole = Vec::with_capacity(parts.len());
        for part in parts {
            let part = part.layered().await?;
            if !part.is_scratch() {
                whole.push(part);
            }
        }
        match &whole[..] {
            [] => return self.scratch(),
            [only] => return Ok(only.clone()),
            _ => {}
        }
        let mut layers: Vec<Arc<StackedLayer>> = Vec::new();
        for part in &whole {
            for original in &part.layered_record()?.layers {
                layers.push(self.0.moved(original, layers.last()));
            }
        }
        Ok(self.0.assembled(
            "merge",
            layers,
            whole.iter().map(|p| p.id().clone()).collect(),
            description.into(),
        ))
    }

    /// What `upper` adds to `lower` (row `op.diff`). Without `lower` it is all of `upper`.
    pub async fn diff(
        &self,
        lower: Option<&ImmutableRef>,
        upper: Option<&ImmutableRef>,
        description: impl Into<String>,
    ) -> Result<ImmutableRef> {
        let upper = match upper {
            Some(upper) => upper.layered().await?,
            None => self.scratch()?,
        };
        let lower = match lower {
            Some(lower) => lower.layered().await?,
            None => return Ok(upper),
        };
        let (below, above) = (&lower.layered_record()?.layers, &upper.layered_record()?.layers);
        let parents = [&lower, &upper]
            .into_iter()
            .filter(|r| !r.is_scratch())
            .map(|r| r.id().clone())
            .collect();
        if below.last().map(|c| &c.snapshot) == above.last().map(|c| &c.snapshot) {
            return self.scratch();
        }
        let prefix = above.len() > below.len()
            && below.iter().zip(above).all(|(b, a)| b.snapshot == a.snapshot);
        if !prefix {
            return self
                .0
                .compared(&lower, &upper, parents, description.into())
                .await
                .context(|| "compare two file systems");
        }
        let mut layers = Vec::new();
        for original in &above[below.len()..] {
            layers.push(self.0.moved(original, layers.last()));
        }
        Ok(self.0.assembled("diff", layers, parents, description.into()))
    }
}

impl Inner {
    /// The layer of `original` at another place.
    fn moved(
        &self,
        original: &Arc<StackedLayer>,
        below: Option<&Arc<StackedLayer>>,
    ) -> Arc<StackedLayer> {
        if original.parent.as_ref() == below.map(|c| &c.snapshot) {
            return original.clone();
        }
        let stacked = self.stacked_layer(original.diff_id, below);
        if !Arc::ptr_eq(&stacked, original) {
            if let Some(tar) = original.tar.get() {
                let _ = stacked.tar.set(*tar);
            }
            for blob in original.blobs() {
                stacked.know(blob);
            }
            if let Some(created) = original.created() {
                stacked.set_created(created);
            }
            match original.is_blob_only() {
                true => stacked.blob_only.store(true, Relaxed),
                false => stacked
                    .set_copy_of(original.copy_of().unwrap_or_else(|| original.snapshot.clone())),
            }
        }
        stacked
    }

    pub fn assembled(
        self: &Arc<Self>,
        how: &str,
        layers: Vec<Arc<StackedLayer>>,
        parents: Vec<RefId>,
        description: String,
    ) -> ImmutableRef {
        let seed = layers.iter().fold(how.to_owned(), |s, c| s + " " + &c.snapshot.0);
        let meta = RecordMeta {
            record_type: RecordType::Regular,
            description,
            created: SystemTime::now(),
            parents,
            body: Body::Layers(Vec::new()),
        };
        self.insert(Record::new(id_of(seed), meta, layers, Stage::Lazy))
    }

    /// The layer that turns `lower` into `upper`, packed from both trees, for states that are not
    /// on one lineage. Nothing but its blob has it, so the new state keeps that from the beginning.
    async fn compared(
        self: &Arc<Self>,
        lower: &ImmutableRef,
        upper: &ImmutableRef,
        parents: Vec<RefId>,
        description: String,
    ) -> Result<ImmutableRef> {
        let (before, after) = tokio::try_join!(lower.mount(), upper.mount())?;
        let lease = self.run_leases.lease(&self.storage).await?;
        let tree = LayerTree::compared(before.path(), after.path());
        let blob = UnownedBlob::pack(self, &lease, (tree, (before, after)), Compression::default())
            .await?;
        let stacked = self.stacked_layer(blob.tar.diff_id, None);
        stacked.blob_only.store(true, Relaxed);
        blob.tell(&stacked);
        let state = self.assembled("diff", vec![stacked], parents, description);
        let record = state.layered_record()?;
        self.ensure_lease(record).await?;
        if !blob.give(record).await? {
            return Err(Fault::new(
                Code::Aborted,
                "the blob of the difference vanished while it was made",
            )
            .hint("something else deletes content in this containerd namespace; build again"));
        }
        Ok(state)
    }
}
