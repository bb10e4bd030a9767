//! What is on the disk and what may go (rows `ctl.du`, `ctl.prune`, `so.gc.*`).

use crate::{
    RecordType, RefId, RefStore,
    layer::lock,
    record::{DOCUMENT_KIND, KIND, KIND_EPOCH, fresh_id},
    store::{Inner, Record},
};
use shipway_fault::Result;
use shipway_oci::{ChainId, ImageConfig, Index, Manifest, media};
use shipway_storage::{Labels, LeaseId, SnapshotKey};
use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Largest manifest or config read to see what images share with us.
const MAX_JSON: u64 = 8 << 20;

/// A state as `du` shows it (row `ctl.usagerec`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRecord {
    /// Identity.
    pub id: RefId,
    /// What it is for.
    pub record_type: RecordType,
    /// What it is, for people.
    pub description: String,
    /// Bytes on disk, parents not counted.
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

/// Decides which records a prune or listing is about.
pub type UsageFilter = Arc<dyn Fn(&UsageRecord) -> bool + Send + Sync>;

/// What may go. Zero means no limit. Without any of the byte limits everything that matches and is older than `keep_duration` goes.
#[derive(Clone, Default)]
pub struct PruneOptions {
    /// Also internal, frontend and shared records.
    pub all: bool,
    /// Keep what was used this recently.
    pub keep_duration: Duration,
    /// Never go below this many bytes.
    pub reserved: u64,
    /// Go below this many bytes.
    pub max_used: u64,
    /// Go until this many bytes of the disk are free.
    pub min_free: u64,
    /// Only these.
    pub filter: Option<UsageFilter>,
}

/// A record that may go, with what its rank is made of.
struct Candidate {
    usage: UsageRecord,
    rank: f64,
}

impl RefStore {
    /// What is on the disk.
    pub async fn usage(&self) -> Result<Vec<UsageRecord>> {
        let shared = self.0.image_chains().await?;
        self.0.usage(&shared).await
    }

    /// Removes what may go, telling `on_removed` of each, and returns once containerd has freed the space. One prune runs at a time.
    pub async fn prune(&self, options: PruneOptions, on_removed: &(dyn Fn(UsageRecord) + Send + Sync)) -> Result<()> {
        let _one = self.0.pruning.lock().await;
        let pruned = self.0.prune(&options, on_removed).await;
        self.0.uses.save().await;
        pruned
    }
}

impl Inner {
    /// Bytes of a record's own layers, parents not counted, and of the blobs known for them.
    pub async fn size_of(&self, record: &Record) -> Result<u64> {
        if let Some(size) = *lock(&record.size) {
            return Ok(size);
        }
        let parents: HashSet<SnapshotKey> = record
            .parents
            .iter()
            .filter_map(|p| self.peek(p))
            .flat_map(|p| p.layers.iter().map(|c| c.snapshot.clone()).collect::<Vec<_>>())
            .collect();
        let mut size = 0;
        let mut whole = true;
        for cell in record.layers.iter().filter(|c| !parents.contains(&c.snapshot)) {
            match self.storage.snapshots.usage(&cell.snapshot).await {
                Ok(usage) => size += usage.bytes,
                Err(e) if e.is_not_found() => whole = false,
                Err(e) => return Err(e),
            }
        }
        if whole {
            *lock(&record.size) = Some(size);
        }
        let blobs = record.layers.iter().filter(|c| !parents.contains(&c.snapshot)).flat_map(|c| c.blobs());
        Ok(size + blobs.filter(|b| b.stored).map(|b| b.descriptor.size).sum::<u64>())
    }

    async fn usage(&self, shared: &HashSet<ChainId>) -> Result<Vec<UsageRecord>> {
        let mut all = Vec::new();
        for record in self.records() {
            let uses = self.uses.get(&record.id);
            all.push(UsageRecord {
                id: record.id.clone(),
                record_type: record.record_type,
                description: record.description.clone(),
                size: self.size_of(&record).await?,
                in_use: record.users.load(Ordering::Acquire) > 0,
                mutable: false,
                created: record.created,
                last_used: uses.map(|u| u.last()),
                usage_count: uses.map_or(0, |u| u.count),
                parents: record.parents.clone(),
                shared: record.layers.last().is_some_and(|c| c.is_exact() && shared.contains(&c.chain_id)),
            });
        }
        for slot in self.slots.list() {
            let uses = self.uses.get(&slot.id);
            let size = match self.storage.snapshots.usage(&slot.snapshot).await {
                Ok(usage) => usage.bytes,
                Err(e) if e.is_not_found() => 0,
                Err(e) => return Err(e),
            };
            all.push(UsageRecord {
                id: slot.id.clone(),
                record_type: slot.note.record_type,
                description: slot.note.description.clone(),
                size,
                in_use: slot.in_use(),
                mutable: true,
                created: slot.note.created,
                last_used: uses.map(|u| u.last()),
                usage_count: uses.map_or(0, |u| u.count),
                parents: slot.note.parents.clone(),
                shared: false,
            });
        }
        all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(all)
    }

    /// Names of the snapshots that images of this namespace need. Images that are incomplete here do not count.
    async fn image_chains(&self) -> Result<HashSet<ChainId>> {
        let mut chains = HashSet::new();
        for image in self.storage.images.list(&[]).await? {
            let mut queue = vec![image.target];
            let mut budget = 64;
            while let Some(target) = queue.pop().filter(|_| budget > 0) {
                budget -= 1;
                let Ok(bytes) = self.storage.content.read_all(target.digest, MAX_JSON).await else { continue };
                if media::is_index(&target.media_type) {
                    queue.extend(serde_json::from_slice::<Index>(&bytes).map(|i| i.manifests).unwrap_or_default());
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

    async fn prune(self: &Arc<Self>, options: &PruneOptions, on_removed: &(dyn Fn(UsageRecord) + Send + Sync)) -> Result<()> {
        // Whether images share a layer matters for what may go and for the sum, which nobody asks for when all goes.
        let shared = if options.all && options.filter.is_none() { HashSet::new() } else { self.image_chains().await? };
        let mut all = self.usage(&shared).await?;
        let mut total: u64 = all.iter().filter(|u| !u.shared).map(|u| u.size).sum();
        let keep = options.keep(total, self.free_bytes());
        let mut removed = self.end_doomed().await;
        while keep.is_none_or(|keep| total >= keep) {
            let mut candidates = candidates(&all, options);
            if keep.is_some() {
                rank(&mut candidates);
                candidates.truncate(1);
            }
            if candidates.is_empty() {
                break;
            }
            for Candidate { usage, .. } in candidates {
                all.retain(|u| u.id != usage.id);
                let Some(lease) = self.take(&usage.id) else {
                    // Somebody took it just now; what it was made from stays, too.
                    let busy = UsageRecord { in_use: true, ..usage };
                    all.push(busy);
                    continue;
                };
                self.end_lease(&lease).await;
                self.uses.forget(&usage.id);
                total = total.saturating_sub(usage.size);
                removed = true;
                on_removed(usage);
            }
        }
        if keep.is_none() && options.all && options.filter.is_none() {
            removed |= self.forget_documents(options.keep_duration).await?;
        }
        if all.is_empty() {
            removed |= self.epochs.end_unused(&self.storage, true).await?;
        }
        if removed {
            // A lease of nothing: its synchronous end waits for one collection of everything above.
            let last = LeaseId(format!("shipway-gc-{}", fresh_id()));
            self.storage.leases.create(&last, &Labels::from([(KIND.into(), KIND_EPOCH.into())])).await?;
            self.storage.leases.delete(&last, true).await?;
        }
        Ok(())
    }

    /// Ends the leases of manifests and configs that no build has fetched for `age`.
    async fn forget_documents(&self, age: Duration) -> Result<bool> {
        let (label, value) = DOCUMENT_KIND;
        let mut removed = false;
        for lease in self.storage.leases.list(&[format!("labels.\"{label}\"=={value}")]).await? {
            let recent = lease.created.is_some_and(|c| SystemTime::now().duration_since(c).is_ok_and(|a| a < age));
            if !recent {
                self.storage.leases.delete(&lease.id, false).await?;
                removed = true;
            }
        }
        Ok(removed)
    }

    /// Takes a state out of the tables; its lease is then the caller's to end.
    fn take(&self, id: &RefId) -> Option<LeaseId> {
        if let Some(record) = self.take_unused(id) {
            return Some(record.lease.clone());
        }
        let slot = self.slots.list().into_iter().find(|s| s.id == *id)?;
        slot.kill_unused().then(|| {
            self.slots.drop_slot(&slot);
            slot.lease.clone()
        })
    }

    /// Free bytes of the disk that our own directory is on, which is where containerd usually is, too.
    fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.mounts).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }
}

impl PruneOptions {
    /// How many bytes may stay (row `so.gc.calc`); `None` if bytes do not matter.
    fn keep(&self, total: u64, free: u64) -> Option<u64> {
        if self.max_used == 0 && self.reserved == 0 && self.min_free == 0 {
            return None;
        }
        let excess = self.min_free.saturating_sub(free);
        let keep = match (self.max_used, excess) {
            (0, 0) if self.min_free > 0 => total,
            (max, 0) => max,
            (0, excess) => total.saturating_sub(excess),
            (max, excess) => max.min(total.saturating_sub(excess)),
        };
        Some(keep.max(self.reserved))
    }
}

/// Records that may go now: nobody has them, nothing is made of them, and the options say so.
fn candidates(all: &[UsageRecord], options: &PruneOptions) -> Vec<Candidate> {
    let parents: HashSet<&RefId> = all.iter().flat_map(|u| &u.parents).collect();
    let now = SystemTime::now();
    let goes = |u: &&UsageRecord| {
        let special = matches!(u.record_type, RecordType::Internal | RecordType::Frontend) || u.shared;
        let used = u.last_used.unwrap_or(u.created);
        let recent = now.duration_since(used).map_or(true, |age| age < options.keep_duration);
        !u.in_use
            && !parents.contains(&u.id)
            && (options.all || !special)
            && (options.keep_duration.is_zero() || !recent)
            && options.filter.as_ref().is_none_or(|f| f(u))
    };
    all.iter().filter(goes).map(|u| Candidate { usage: u.clone(), rank: 0.0 }).collect()
}

/// Sorts by age and rarity of use together, first to go first (row `so.gc.order`).
fn rank(candidates: &mut [Candidate]) {
    let places = |values: Vec<u128>| {
        let distinct: Vec<u128> = BTreeSet::from_iter(values.iter().copied()).into_iter().collect();
        let n = distinct.len().max(1) as f64;
        values.into_iter().map(|v| distinct.partition_point(|d| *d < v) as f64 / n).collect::<Vec<_>>()
    };
    let age = |c: &Candidate| c.usage.last_used.map_or(0, |t| t.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis());
    let by_time = places(candidates.iter().map(age).collect());
    let by_count = places(candidates.iter().map(|c| c.usage.usage_count.into()).collect());
    for (candidate, (time, count)) in candidates.iter_mut().zip(by_time.into_iter().zip(by_count)) {
        candidate.rank = time + count;
    }
    candidates.sort_by(|a, b| a.rank.total_cmp(&b.rank));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_stay_follows_the_three_limits() {
        for ((max_used, reserved, min_free), (total, free), want) in [
            ((0, 0, 0), (100, 10), None),
            ((50, 0, 0), (100, 10), Some(50)),
            ((50, 0, 30), (100, 10), Some(50)),
            ((90, 0, 30), (100, 10), Some(80)),
            ((0, 0, 30), (100, 10), Some(80)),
            ((0, 0, 5), (100, 10), Some(100)),
            ((10, 40, 0), (100, 10), Some(40)),
        ] {
            let options = PruneOptions { max_used, reserved, min_free, ..PruneOptions::default() };
            assert_eq!(options.keep(total, free), want, "{max_used} {reserved} {min_free}");
        }
    }
}
