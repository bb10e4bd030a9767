//! What may go (rows `ctl.prune`, `so.gc.*`), and how: in batches, so that no build waits long for
//! a collection.

use crate::{
    id::RefId,
    record::{DOCUMENT_KIND, RecordType},
    records::PartName,
    usage::{ListedState, States, UsageRecord},
};
use shipway_fault::Result;
use shipway_host::Disk;
use shipway_storage::LeaseId;
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::Instant;

/// States that go between two collections. While containerd collects, nothing else changes what it
/// keeps, builds' snapshots included: it looks at everything there is, and removes the files of
/// what nothing keeps.
const BATCH: usize = 32;
/// And files and directories of theirs, unless one state alone has more.
const BATCH_INODES: u64 = 4096;
/// Batches of one prune, about: to look at everything once more would cost more than smaller
/// batches spare.
const BATCHES: usize = 64;

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
    /// Bytes that are free now on the disk that `min_free` is about; our own directory's, if it is
    /// not given.
    pub free: Option<u64>,
    /// Only these.
    pub filter: Option<UsageFilter>,
    /// Bytes that count besides the states, such as those of the index of them.
    pub besides: u64,
    /// Rest after each batch for as long as it took, so that builds have containerd half of the
    /// time at least.
    pub rest: bool,
    /// Remove nothing: only report what would go.
    pub dry_run: bool,
}

/// What a prune did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// States that went, or would.
    pub states: usize,
    /// Bytes of theirs that nothing else keeps.
    pub bytes: u64,
    /// Bytes that are left, as limits count them: without what images share.
    pub left: u64,
}

impl States<'_> {
    /// Removes what may go, reporting each state to `on_removed` with the bytes that went with it,
    /// and returns once containerd has freed the space.
    pub async fn prune(
        &self,
        options: &PruneOptions,
        on_removed: &(dyn Fn(UsageRecord) + Send + Sync),
    ) -> Result<Pruned> {
        // Whether images share a layer matters for what may go and for the sum, which is not asked
        // for when all goes.
        let shared = if options.all && options.filter.is_none() && !options.has_limits() {
            HashSet::new()
        } else {
            self.image_chains().await?
        };
        let all = self.list(&shared).await?;
        let mut ledger = Ledger::new(&all);
        let total = ledger.total.saturating_add(options.besides);
        let keep = options.keep(total, self.free_bytes(options));
        let mut left = all.len();
        let mut batch = Batch::new(*self, left, options);
        batch.dirty |= !options.dry_run && self.backend.retry_lease_deletes().await;
        let mut done = Pruned::default();
        if keep.is_some_and(|keep| total <= keep) {
            done.left = ledger.total;
            return batch.collect().await.map(|()| done);
        }
        let mut order = PruneOrder::new(all, options);
        while keep.is_none_or(|keep| ledger.total.saturating_add(options.besides) > keep) {
            let Some(mut state) = order.next() else { break };
            if !options.dry_run {
                // If a handle was taken just now, what it was made from stays, too.
                let Some(lease) = self.take(&state.usage.id) else { continue };
                self.backend.delete_lease(&lease).await;
                self.backend.uses.forget(&state.usage.id);
            }
            order.gone(&state.usage);
            left -= 1;
            let freed = ledger.gone(&state);
            (done.states, done.bytes) = (done.states + 1, done.bytes + freed.bytes);
            state.usage.size = freed.bytes;
            on_removed(state.usage);
            batch.went(freed.inodes).await?;
        }
        done.left = ledger.total;
        if options.dry_run {
            return Ok(done);
        }
        if keep.is_none() && options.all && options.filter.is_none() {
            batch.dirty |= self.forget_documents(options.keep_duration).await?;
        }
        if left == 0 {
            batch.dirty |=
                self.backend.run_leases.delete_unused(&self.backend.storage, true).await?;
        }
        batch.collect().await?;
        Ok(done)
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
        let ours = || Disk::of(&self.backend.mounts).map_or(u64::MAX, |disk| disk.free);
        options.free.unwrap_or_else(ours)
    }
}

/// What went since containerd collected last.
struct Batch<'a> {
    states: States<'a>,
    dry_run: bool,
    rest: bool,
    /// States in one batch.
    most: usize,
    count: usize,
    inodes: u64,
    /// Whether there is anything to collect.
    dirty: bool,
    began: Instant,
}

impl<'a> Batch<'a> {
    /// Batches of a prune where there are `all` states.
    fn new(states: States<'a>, all: usize, options: &PruneOptions) -> Self {
        Self {
            states,
            dry_run: options.dry_run,
            rest: options.rest,
            most: BATCH.max(all / BATCHES),
            count: 0,
            inodes: 0,
            dirty: false,
            began: Instant::now(),
        }
    }

    /// A state went, and with it so many files that nothing else keeps.
    async fn went(&mut self, inodes: u64) -> Result<()> {
        if self.dry_run {
            return Ok(());
        }
        self.dirty = true;
        (self.count, self.inodes) = (self.count + 1, self.inodes.saturating_add(inodes));
        if self.count < self.most && self.inodes < BATCH_INODES {
            return Ok(());
        }
        self.collect().await?;
        if self.rest {
            tokio::time::sleep(self.began.elapsed()).await;
        }
        (self.count, self.inodes, self.began) = (0, 0, Instant::now());
        Ok(())
    }

    /// Waits until containerd has removed what went.
    async fn collect(&mut self) -> Result<()> {
        if std::mem::take(&mut self.dirty) { self.states.backend.collect().await } else { Ok(()) }
    }
}

/// Who has what on the disk: what several states have goes with the last of them.
struct Ledger {
    /// How many states have a part, and whether one of them counts.
    holders: HashMap<PartName, Holders>,
    /// Bytes of all states that count: those that images share do not.
    total: u64,
}

#[derive(Clone, Copy, Default)]
struct Holders {
    count: usize,
    private: bool,
}

/// What went with a state.
#[derive(Clone, Copy, Default)]
struct Freed {
    bytes: u64,
    inodes: u64,
}

impl Ledger {
    fn new(all: &[ListedState]) -> Self {
        let mut ledger = Self { holders: HashMap::new(), total: 0 };
        for ListedState { usage, parts } in all {
            for part in parts {
                let holders = ledger.holders.entry(part.name.clone()).or_default();
                holders.count += 1;
                if !usage.shared && !holders.private {
                    holders.private = true;
                    ledger.total += part.usage.bytes;
                }
            }
        }
        ledger
    }

    /// `state` goes.
    fn gone(&mut self, state: &ListedState) -> Freed {
        let mut freed = Freed::default();
        for part in &state.parts {
            let Some(holders) = self.holders.get_mut(&part.name) else { continue };
            holders.count -= 1;
            if holders.count == 0 {
                freed.bytes += part.usage.bytes;
                freed.inodes += part.usage.inodes;
                if holders.private {
                    self.total = self.total.saturating_sub(part.usage.bytes);
                }
            }
        }
        freed
    }
}

impl PruneOptions {
    fn has_limits(&self) -> bool {
        self.max_used != 0 || self.reserved != 0 || self.min_free != 0
    }

    /// How many bytes may stay (row `so.gc.calc`); `None` if bytes do not matter.
    fn keep(&self, total: u64, free: u64) -> Option<u64> {
        if !self.has_limits() {
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
    rest: HashMap<RefId, (u64, ListedState)>,
    /// How many of all records are made of one.
    children: HashMap<RefId, usize>,
    /// Those that may go now, the lowest rank first.
    ready: BTreeSet<(u64, RefId)>,
}

impl PruneOrder {
    fn new(all: Vec<ListedState>, options: &PruneOptions) -> Self {
        let mut children: HashMap<RefId, usize> = HashMap::new();
        for parent in all.iter().flat_map(|s| &s.usage.parents) {
            *children.entry(parent.clone()).or_default() += 1;
        }
        let now = SystemTime::now();
        let wanted: Vec<ListedState> =
            all.into_iter().filter(|s| may_go(&s.usage, options, now)).collect();
        let ranks = ranks(&wanted);
        let rest: HashMap<_, _> = wanted
            .into_iter()
            .zip(ranks)
            .map(|(s, rank)| (s.usage.id.clone(), (rank, s)))
            .collect();
        let ready = rest
            .values()
            .filter(|(_, s)| !children.contains_key(&s.usage.id))
            .map(|(rank, s)| (*rank, s.usage.id.clone()))
            .collect();
        Self { rest, children, ready }
    }

    /// The state that goes next.
    fn next(&mut self) -> Option<ListedState> {
        let (_, id) = self.ready.pop_first()?;
        self.rest.remove(&id).map(|(_, state)| state)
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
fn ranks(states: &[ListedState]) -> Vec<u64> {
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
    let by_time = places(states.iter().map(|s| age(&s.usage)).collect());
    let by_count = places(states.iter().map(|s| s.usage.usage_count.into()).collect());
    by_time.into_iter().zip(by_count).map(|(time, count)| time + count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Part;
    use shipway_storage::{SnapshotKey, Usage};

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

    fn usage(id: usize, parents: &[usize], last_used: u64, usage_count: u64) -> ListedState {
        let name = |n: usize| RefId(n.to_string());
        let usage = UsageRecord {
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
        };
        ListedState { usage, parts: Vec::new() }
    }

    fn order(all: Vec<ListedState>, options: &PruneOptions) -> Vec<String> {
        let mut order = PruneOrder::new(all, options);
        let mut gone = Vec::new();
        while let Some(state) = order.next() {
            order.gone(&state.usage);
            gone.push(state.usage.id.0);
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
        all[1].usage.in_use = true;
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

    #[test]
    fn what_several_states_have_goes_with_the_last_of_them() {
        let part = |name: &str, bytes| Part {
            name: PartName::Snapshot(SnapshotKey(name.into())),
            usage: Usage { bytes, inodes: 1 },
        };
        let mut all = vec![usage(0, &[], 1, 1), usage(1, &[], 1, 1), usage(2, &[], 1, 1)];
        all[0].parts = vec![part("both", 10), part("one", 1)];
        all[1].parts = vec![part("both", 10)];
        all[2].parts = vec![part("an image's", 100)];
        all[2].usage.shared = true;
        let mut ledger = Ledger::new(&all);
        assert_eq!(ledger.total, 11);
        let freed = all.iter().map(|s| ledger.gone(s)).map(|f| (f.bytes, f.inodes));
        assert_eq!(freed.collect::<Vec<_>>(), [(1, 1), (10, 1), (100, 1)]);
        assert_eq!(ledger.total, 0);
    }
}
