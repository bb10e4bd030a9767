//! What is on the disk (rows `ctl.du`, `ctl.usagerec`): every snapshot and blob once.

use crate::{
    backend::Backend,
    id::RefId,
    named_table::NamedTable,
    record::RecordType,
    records::{Part, PartName, Records},
};
use shipway_fault::Result;
use shipway_oci::{ChainId, Digest, ImageConfig, Index, Manifest, media};
use std::{collections::HashSet, time::SystemTime};

/// Largest manifest or config read to see what images share with us.
const MAX_JSON: u64 = 8 << 20;

/// A state as `du` shows it (row `ctl.usagerec`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRecord {
    /// Identity.
    pub id: RefId,
    /// What it is for.
    pub record_type: RecordType,
    /// Description shown to users.
    pub description: String,
    /// Bytes on disk, without parents, and without what an older state has as well.
    pub size: u64,
    /// Whether a build has it.
    pub in_use: bool,
    /// Whether it may still be written.
    pub mutable: bool,
    /// Creation.
    pub created: SystemTime,
    /// Last use.
    pub last_used: Option<SystemTime>,
    /// How often it was used.
    pub usage_count: u64,
    /// The states it was made from.
    pub parents: Vec<RefId>,
    /// Whether an image in containerd holds the same layers, so that pruning frees nothing.
    pub shared: bool,
}

/// A state with what it has on the disk.
pub(crate) struct ListedState {
    pub usage: UsageRecord,
    pub parts: Vec<Part>,
}

/// All states of a namespace, to be listed and pruned.
#[derive(Clone, Copy)]
pub(crate) struct States<'a> {
    pub backend: &'a Backend,
    pub records: &'a Records,
    pub named: &'a NamedTable,
}

impl States<'_> {
    /// What is on the disk.
    pub async fn usage(&self) -> Result<Vec<UsageRecord>> {
        let shared = self.image_chains().await?;
        Ok(self.list(&shared).await?.into_iter().map(|listed| listed.usage).collect())
    }

    /// Digests of the blobs that are kept for the states there are.
    pub fn blobs_kept(&self) -> HashSet<Digest> {
        let records = self.records.list();
        let blobs = records.iter().flat_map(|r| &r.layers).flat_map(|c| c.blobs());
        blobs.filter(|b| b.is_stored()).map(|b| b.descriptor.digest).collect()
    }

    /// All states, the oldest first; `shared` are the snapshots that images need.
    pub async fn list(&self, shared: &HashSet<ChainId>) -> Result<Vec<ListedState>> {
        let mut all = Vec::new();
        for record in self.records.list() {
            // There can be very many, of which nothing has to be asked.
            tokio::task::consume_budget().await;
            let uses = self.backend.uses.get(&record.id);
            let top = record.layers.last();
            let usage = UsageRecord {
                id: record.id.clone(),
                record_type: record.record_type,
                description: record.description.clone(),
                size: 0,
                in_use: record.life.in_use(),
                mutable: false,
                created: record.created,
                last_used: uses.map(|u| u.last()),
                usage_count: uses.map_or(0, |u| u.count),
                parents: record.parents.clone(),
                shared: top.is_some_and(|c| c.is_exact() && shared.contains(&c.chain_id)),
            };
            all.push(ListedState { usage, parts: self.records.parts_of(&record).await? });
        }
        for entry in self.named.list() {
            let uses = self.backend.uses.get(&entry.id);
            let usage = UsageRecord {
                id: entry.id.clone(),
                record_type: entry.meta.record_type,
                description: entry.meta.description.clone(),
                size: 0,
                in_use: entry.in_use(),
                mutable: true,
                created: entry.meta.created,
                last_used: uses.map(|u| u.last()),
                usage_count: uses.map_or(0, |u| u.count),
                parents: entry.meta.parents.clone(),
                shared: false,
            };
            let part = self.records.snapshot_part(&entry.snapshot).await?;
            all.push(ListedState { usage, parts: part.into_iter().collect() });
        }
        for (key, since) in self.backend.being_written() {
            let usage = UsageRecord {
                id: RefId(key.0.clone()),
                record_type: RecordType::Regular,
                description: "being written".into(),
                size: 0,
                in_use: true,
                mutable: true,
                created: since,
                last_used: None,
                usage_count: 0,
                parents: Vec::new(),
                shared: false,
            };
            let part = self.records.snapshot_part(&key).await?;
            all.push(ListedState { usage, parts: part.into_iter().collect() });
        }
        all.sort_by(|a, b| (a.usage.created, &a.usage.id).cmp(&(b.usage.created, &b.usage.id)));
        let mut seen: HashSet<PartName> = HashSet::new();
        for ListedState { usage, parts } in &mut all {
            let first = parts.iter().filter(|part| seen.insert(part.name.clone()));
            usage.size = first.map(|part| part.usage.bytes).sum();
        }
        Ok(all)
    }

    /// Names of the snapshots that images of this namespace need. Images that are incomplete here
    /// do not count.
    pub async fn image_chains(&self) -> Result<HashSet<ChainId>> {
        let mut chains = HashSet::new();
        for image in self.backend.storage.images.list(&[]).await? {
            let mut queue = vec![image.target];
            let mut budget = 64;
            while let Some(target) = queue.pop().filter(|_| budget > 0) {
                budget -= 1;
                let Ok(bytes) =
                    self.backend.storage.content.read_all(target.digest, MAX_JSON).await
                else {
                    continue;
                };
                if media::is_index(&target.media_type) {
                    queue.extend(
                        serde_json::from_slice::<Index>(&bytes)
                            .map(|i| i.manifests)
                            .unwrap_or_default(),
                    );
                } else if media::is_manifest(&target.media_type) {
                    queue.extend(serde_json::from_slice::<Manifest>(&bytes).map(|m| m.config));
                } else if let Ok(config) = serde_json::from_slice::<ImageConfig>(&bytes) {
                    let mut chain = None;
                    for diff_id in config.rootfs.diff_ids {
                        let next = ChainId::extend(chain, diff_id);
                        chains.insert(next);
                        chain = Some(next);
                    }
                }
            }
        }
        Ok(chains)
    }
}
