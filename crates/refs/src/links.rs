//! Layers whose files are files of a client's directory by another name. Copying such a directory then costs neither time nor room, but
//! no stack may have two such layers: what were two files would be one, with two names, for whoever sees the stack.

use crate::{layer::Cell, store::Inner};
use futures::TryStreamExt as _;
use shipway_fault::Result;
use shipway_oci::ChainId;
use shipway_storage::Labels;
use std::sync::Arc;

/// Label of a committed snapshot with such files.
const LINKED: &str = "shipway/linked";

/// The labels of a snapshot that is committed now.
pub(crate) fn labels(linked: bool) -> Labels {
    if linked { Labels::from([(LINKED.into(), "true".into())]) } else { Labels::new() }
}

impl Inner {
    /// Whether any of the layers of an existing stack is one.
    pub async fn any_linked(&self, layers: &[Arc<Cell>]) -> Result<bool> {
        if layers.iter().any(|c| c.linked.get() == Some(&true)) {
            return Ok(true);
        }
        let unknown = layers.iter().filter(|c| c.linked.get().is_none());
        let asked = futures::stream::FuturesUnordered::new();
        for cell in unknown {
            asked.push(async move {
                let linked = self.is_linked(cell.chain_id).await?;
                let _ = cell.linked.set(linked);
                Ok(linked)
            });
        }
        asked.try_any(|linked| async move { linked }).await
    }

    /// Whether the snapshot `chain` is one.
    pub async fn is_linked(&self, chain: ChainId) -> Result<bool> {
        if let Some(known) = self.known_cell(chain).and_then(|c| c.linked.get().copied()) {
            return Ok(known);
        }
        Ok(self.storage.snapshots.stat(&chain.into()).await?.labels.contains_key(LINKED))
    }
}
