//! What is on the disk and what may go (rows `ctl.du`, `ctl.prune`, `so.gc.*`).

use crate::{
    backend::Backend,
    id::{RefId, fresh_id},
    named_table::NamedTable,
    record::{DOCUMENT_KIND, KIND, KIND_RUN, RecordType},
    records::Records,
};
use shipway_fault::Result;
use shipway_oci::{ChainId, Digest, ImageConfig, Index, Manifest, media};
use shipway_storage::{Labels, LeaseId};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
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
    /// Description shown to users.
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

/// What may go. Zero means no limit. Without any of the byte limits everything that matches and is
/// older than `keep_duration` goes.
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
    /// A directory on the disk that `min_free` is about; our own is, if none is given.
    pub disk: Option<PathBuf>,
    /// Only these.
    pub filter: Option<UsageFilter>,
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
        self.usage_with(&shared).await
    }

    /// Digests of the blobs that are kept for the states there are.
    pub fn blobs_kept(&self) -> HashSet<Digest> {
        let records = self.records.list();
        let blobs = records.iter().flat_map(|r| &r.layers).flat_map(|c| c.blobs());
        blobs.filter(|b| b.is_stored()).map(|b| b.descriptor.digest).collect()
    }

    async fn usage_with(&self, shared: &HashSet<ChainId>) -> Result<Vec<UsageRecord>> {
        let mut all = Vec::new();
        for record in self.records.list() {
            let uses = self.backend.uses.get(&record.id);
            all.push(UsageRecord {
                id: record.id.clone(),
                record_type: record.record_type,
                description: record.description.clone(),
                size: self.records.size_of(&record).await?,
                in_use: record.life.in_use(),
                mutable: false,
                created: record.created,
                last_used: uses.map(|u| u.last()),
                usage_count: uses.map_or(0, |u| u.count),
                parents: record.parents.clone(),
                shared: record
                    .layers
                    .last()
                    .is_some_and(|c| c.is_exact() && shared.contains(&c.chain_id)),
            });
        }
        for entry in self.named.list() {
            let uses = self.backend.uses.get(&entry.id);
            let size = match self.backend.storage.snapshots.usage(&entry.snapshot).await {
                Ok(usage) => usage.bytes,
                Err(e) if e.is_not_found() => 0,
                Err(e) => return Err(e),
            };
            all.push(UsageRecord {
                id: entry.id.clone(),
                record_type: entry.meta.record_type,
                description: entry.meta.description.clone(),
                size,
                in_use: entry.in_use(),
                mutable: true,
                created: entry.meta.created,
                last_used: uses.map(|u| u.last()),
                usage_count: uses.map_or(0, |u| u.count),
                parents: entry.meta.parents.clone(),
                shared: false,
            });
        }
        all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(all)
    }

    /// Names of the snapshots that images of this namespace need. Images that are incomplete here
    /// do not count.
    async fn image_chains(&self) -> Result<HashSet<ChainId>> {
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

    /// Removes what may go, reporting each state to `on_removed`, and returns once containerd has
    /// freed the space.
    pub async fn prune(
        &self,
        options: &PruneOptions,
        on_removed: &(dyn Fn(UsageRecord) + Send + Sync),
    ) -> Result<()> {
        // Whether images share a layer matters for what may go and for the sum, which is not asked
        // for when all goes.
        let shared = if options.all && options.filter.is_none() {
            HashSet::new()
        } else {
            self.image_chains().await?
        };
        let all = self.usage_with(&shared).await?;
        let mut total: u64 = all.iter().filter(|u| !u.shared).map(|u| u.size).sum();
        let keep = options.keep(total, self.free_bytes(options));
        let mut removed = self.backend.retry_lease_deletes().await;
        let mut left = all.len();
        let mut order = PruneOrder::new(all, options);
        while keep.is_none_or(|keep| total >= keep) {
            let Some(usage) = order.next() else { break };
            // If a handle was taken just now, what it was made from stays, too.
            let Some(lease) = self.take(&usage.id) else { continue };
            self.backend.delete_lease(&lease).await;
            self.backend.uses.forget(&usage.id);
            order.gone(&usage);
            left -= 1;
            total = total.saturating_sub(usage.size);
            removed = true;
            on_removed(usage);
        }
        if keep.is_none() && options.all && options.filter.is_none() {
            removed |= self.forget_documents(options.keep_duration).await?;
        }
        if left == 0 {
            removed |= self.backend.run_leases.delete_unused(&self.backend.storage, true).await?;
        }
        if removed {
            // A lease of nothing: its synchronous end waits for one collection of everything above.
            let last = LeaseId(format!("shipway-gc-{}", fresh_id()));
            self.backend
                .storage
                .leases
                .create(&last, &Labels::from([(KIND.into(), KIND_RUN.into())]))
                .await?;
            self.backend.storage.leases.delete(&last, true).await?;
        }
        Ok(())
    }

    /// Ends the leases of manifests and configs that no build has fetched for `age`.
    async fn forget_documents(&self, age: Duration) -> Result<bool> {
        let (label, value) = DOCUMENT_KIND;
        let mut removed = false;
        for lease in
            self.backend.storage.leases.list(&[format!("labels.\"{label}\"=={value}")]).await?
        {
            let recent = lease
                .created
                .is_some_and(|c| SystemTime::now().duration_since(c).is_ok_and(|a| a < age));
            if !recent {
                self.backend.storage.leases.delete(&lease.id, false).await?;
                removed = true;
            }
        }
        Ok(removed)
    }

    /// Takes a state out of the tables; its lease is then the caller's to end.
    fn take(&self, id: &RefId) -> Option<LeaseId> {
        if let Some(record) = self.records.take_unused(id) {
            return Some(record.lease.clone());
        }
        self.named.take_unused(id).map(|entry| entry.lease.clone())
    }

    fn free_bytes(&self, options: &PruneOptions) -> u64 {
        rustix::fs::statvfs(options.disk.as_ref().unwrap_or(&self.backend.mounts))
            .map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
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

/// Records in the order in which they go: no handle has them, nothing is made of them, and the
/// options say so. Each is looked at once, however many go.
struct PruneOrder {
    /// Records that may go once nothing is made of them any more, with their rank.
    rest: HashMap<RefId, (u64, UsageRecord)>,
    /// How many of all records are made of one.
    children: HashMap<RefId, usize>,
    /// Those that may go now, the lowest rank first.
    ready: BTreeSet<(u64, RefId)>,
}

impl PruneOrder {
    fn new(all: Vec<UsageRecord>, options: &PruneOptions) -> Self {
        let mut children: HashMap<RefId, usize> = HashMap::new();
        for parent in all.iter().flat_map(|u| &u.parents) {
            *children.entry(parent.clone()).or_default() += 1;
        }
        let now = SystemTime::now();
        let mut wanted: Vec<UsageRecord> =
            all.into_iter().filter(|u| may_go(u, options, now)).collect();
        let ranks = ranks(&wanted);
        let rest: HashMap<_, _> =
            wanted.drain(..).zip(ranks).map(|(u, rank)| (u.id.clone(), (rank, u))).collect();
        let ready = rest
            .values()
            .filter(|(_, u)| !children.contains_key(&u.id))
            .map(|(rank, u)| (*rank, u.id.clone()))
            .collect();
        Self { rest, children, ready }
    }

    /// The record that goes next.
    fn next(&mut self) -> Option<UsageRecord> {
        let (_, id) = self.ready.pop_first()?;
        self.rest.remove(&id).map(|(_, usage)| usage)
    }

    /// `usage` is gone: one record less is made of its parents.
    fn gone(&mut self, usage: &UsageRecord) {
        for parent in &usage.parents {
            let Some(count) = self.children.get_mut(parent) else { continue };
            *count -= 1;
            if *count == 0
                && let Some((rank, _)) = self.rest.get(parent)
            {
                self.ready.insert((*rank, parent.clone()));
            }
        }
    }
}

/// Whether the options let a record go.
fn may_go(u: &UsageRecord, options: &PruneOptions, now: SystemTime) -> bool {
    let special = matches!(u.record_type, RecordType::Internal | RecordType::Frontend) || u.shared;
    let used = u.last_used.unwrap_or(u.created);
    let recent = now.duration_since(used).map_or(true, |age| age < options.keep_duration);
    !u.in_use
        && (options.all || !special)
        && (options.keep_duration.is_zero() || !recent)
        && options.filter.as_ref().is_none_or(|f| f(u))
}

/// Ranks by age and rarity of use together, first to go lowest (row `so.gc.order`).
fn ranks(records: &[UsageRecord]) -> Vec<u64> {
    let places = |values: Vec<u128>| {
        let distinct: Vec<u128> = BTreeSet::from_iter(values.iter().copied()).into_iter().collect();
        let n = distinct.len().max(1) as u64;
        // The place among the distinct values, as a share of them.
        values
            .into_iter()
            .map(|v| (distinct.partition_point(|d| *d < v) as u64).saturating_mul(1 << 32) / n)
            .collect::<Vec<_>>()
    };
    let age = |u: &UsageRecord| {
        u.last_used.map_or(0, |t| t.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis())
    };
    let by_time = places(records.iter().map(age).collect());
    let by_count = places(records.iter().map(|u| u.usage_count.into()).collect());
    by_time.into_iter().zip(by_count).map(|(time, count)| time + count).collect()
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

    fn usage(id: usize, parents: &[usize], last_used: u64, usage_count: u64) -> UsageRecord {
        let name = |n: usize| RefId(n.to_string());
        UsageRecord {
            id: name(id),
            record_type: RecordType::Regular,
            description: String::new(),
            size: 1,
            in_use: false,
            mutable: false,
            created: UNIX_EPOCH,
            last_used: Some(UNIX_EPOCH + Duration::from_secs(last_used)),
            usage_count,
            parents: parents.iter().map(|p| name(*p)).collect(),
            shared: false,
        }
    }

    fn order(all: Vec<UsageRecord>, options: &PruneOptions) -> Vec<String> {
        let mut order = PruneOrder::new(all, options);
        let mut gone = Vec::new();
        while let Some(usage) = order.next() {
            order.gone(&usage);
            gone.push(usage.id.0);
        }
        gone
    }

    #[test]
    fn old_and_rare_records_go_first_and_parents_after_their_children() {
        let all = vec![
            usage(0, &[], 1, 1),
            usage(1, &[0], 9, 9),
            usage(2, &[0], 5, 5),
            usage(3, &[], 7, 7),
        ];
        assert_eq!(order(all, &PruneOptions::default()), ["2", "3", "1", "0"]);
        // What is made of something that stays keeps it.
        let mut all = vec![usage(0, &[], 1, 1), usage(1, &[0], 9, 9), usage(2, &[], 5, 5)];
        all[1].in_use = true;
        assert_eq!(order(all, &PruneOptions::default()), ["2"]);
    }

    #[test]
    fn every_record_is_looked_at_once_however_many_go() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        const RECORDS: usize = 20_000;
        let looks = Arc::new(AtomicUsize::new(0));
        let counted = looks.clone();
        let filter: UsageFilter = Arc::new(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            true
        });
        // Chains of a hundred.
        let all =
            (0..RECORDS).map(|i| usage(i, &[i.wrapping_sub(1)][..usize::from(i % 100 != 0)], 1, 1));
        let gone = order(
            all.collect(),
            &PruneOptions { max_used: 1, filter: Some(filter), ..PruneOptions::default() },
        );
        assert_eq!((gone.len(), looks.load(Ordering::Relaxed)), (RECORDS, RECORDS));
    }
}
