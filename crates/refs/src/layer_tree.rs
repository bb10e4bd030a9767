//! The files of one layer, as its snapshot has them.

use crate::{active::Active, records::Records};
use shipway_archive::{LayerTree, OwnLayer};
use shipway_fault::Result;
use shipway_storage::SnapshotKey;
use std::any::Any;

impl Records {
    /// The tree of a committed layer, and what keeps it readable besides a lease of the caller's.
    pub async fn layer_tree(
        &self,
        name: &SnapshotKey,
        parent: bool,
    ) -> Result<(LayerTree, Box<dyn Any + Send + Sync>)> {
        if let Some(tree) = self.known_layer(name).and_then(|c| c.tree.get().cloned())
            && self.backend.storage.snapshots.stat(name).await.is_ok()
        {
            return Ok((tree, Box::new(())));
        }
        let view = Active::view(&self.backend, Some(name)).await?;
        match OwnLayer::of(&view.mounts, parent)? {
            OwnLayer::Tree(tree) => Ok((tree, Box::new(view))),
            OwnLayer::Whole(after) => {
                let Some(before) = self.backend.storage.snapshots.stat(name).await?.parent else {
                    return Ok((LayerTree::lowest(after), Box::new(view)));
                };
                let below = Active::view(&self.backend, Some(&before)).await?;
                let before = self.backend.mount(&below.mounts, None).await?;
                Ok((LayerTree::compared(before.path(), after), Box::new((before, below, view))))
            }
        }
    }
}
