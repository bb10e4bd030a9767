//! Which layer of a state a path comes from.

use crate::immutable::ImmutableRef;
use shipway_archive::EntryKind;
use shipway_fault::Result;
use shipway_task::blocking;
use std::collections::{HashMap, HashSet};

impl ImmutableRef {
    /// The topmost layer, by number from below, that has each of `paths` (from the root, without a
    /// slash at either end), also where a later layer takes it away again. A path that no layer has
    /// is left out. Layers are read from above, and only until all are found.
    pub async fn layers_with(&self, paths: HashSet<Vec<u8>>) -> Result<HashMap<Vec<u8>, usize>> {
        let layered = self.layered().await?;
        layered.materialize(None).await?;
        let (records, record) = (layered.records(), layered.record());
        let (mut wanted, mut found) = (paths, HashMap::new());
        for (number, stacked) in record.layers.iter().enumerate().rev() {
            if wanted.is_empty() {
                break;
            }
            let (tree, guard) =
                records.layer_tree(&stacked.snapshot, stacked.parent.is_some()).await?;
            let walk = move || {
                let mut here = Vec::new();
                let walked = tree.walk(|entry| {
                    if entry.kind != EntryKind::Whiteout && wanted.remove(&entry.path) {
                        here.push(entry.path);
                    }
                    Ok(())
                });
                drop(guard);
                walked.map(|()| (wanted, here))
            };
            let (left, here) = blocking("read a layer", walk).await?;
            wanted = left;
            found.extend(here.into_iter().map(|path| (path, number)));
        }
        Ok(found)
    }
}
