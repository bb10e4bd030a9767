//! The quota: what is kept stays within its limits, also while builds write.
//!
//! BuildKit prunes by its rules a moment after a build ([`Quota::apply`], rows `so.gc.*`). Until
//! then a build may write more than the disk has, so the limits of the rule that is about
//! everything are looked at while something is written, too, by the size of the disk alone: what
//! more of it is used than at the last count is taken for ours until it is counted again. Near a
//! limit a prune starts; beyond it, what begins to write waits for one. Where a disk got full all
//! the same, [`Writing::made_room`] prunes whatever is not in use, and the work is done once more.

use crate::CacheIndex;
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_host::{Disk, bytes_of, is_out_of_space};
use shipway_refs::{PruneOptions, Pruned, UsageRecord};
use shipway_telemetry::meter;
use std::{
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Between two looks at the disk while something is written.
const WATCH: Duration = Duration::from_millis(500);
/// Between two looks at the disk of those who wait for a prune.
const WAIT: Duration = Duration::from_millis(20);
/// A prune that could not do enough is not tried again for so long, and then nobody waits for it:
/// what it could not remove was in use, or is not ours.
const FUTILE: Duration = Duration::from_secs(10);
/// A prune that a limit caused goes further by this part of the limit, so that the next one is not
/// due at once.
const SPARE: u64 = 20;
/// The part of a full disk that is made free, where so much can go: the work that filled it does
/// not say how much more it needs.
const FREED: u64 = 2;

/// What the quota is of.
#[derive(Clone, Debug)]
pub struct Place {
    /// A directory on the disk that states are on.
    pub disk: PathBuf,
    /// Files and directories that count besides the states: the index, the history, logs.
    pub besides: Vec<PathBuf>,
}

/// Keeps what builds leave within limits. Clones share it.
#[derive(Clone)]
pub struct Quota(Arc<Inner>);

struct Inner {
    caches: CacheIndex,
    rules: Vec<PruneOptions>,
    probe: Arc<dyn Probe>,
    state: Mutex<State>,
    /// Something begins to be written where nothing was.
    begun: Arc<Notify>,
    /// Held by the one prune of a full disk: the next one finds what it freed.
    freeing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// What is being written.
    writers: usize,
    counted: Option<Counted>,
    /// Whether a prune runs that a limit caused.
    pruning: bool,
    /// Until when another one would be futile, as the last one was.
    futile: Option<Instant>,
}

/// What the last prune counted.
#[derive(Clone, Copy)]
struct Counted {
    /// Bytes that we keep.
    kept: u64,
    /// Bytes of the disk that were in use.
    used: u64,
}

/// How the limits are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Pressure {
    None,
    /// A prune should start.
    Near,
    /// What begins to write should wait for it.
    Over,
}

/// What is asked about sizes.
trait Probe: Send + Sync {
    fn disk(&self) -> Result<Disk>;
    /// Bytes that count besides the states. Blocks.
    fn besides(&self) -> u64;
}

impl Probe for Place {
    fn disk(&self) -> Result<Disk> {
        Disk::of(&self.disk)
    }

    fn besides(&self) -> u64 {
        self.besides.iter().map(|path| bytes_of(path)).sum()
    }
}

/// Something that is being written; see [`Quota::enter`].
pub struct Writing {
    quota: Quota,
    /// Free bytes of the disk when it began.
    free: u64,
}

impl Quota {
    /// Applies `rules`, in this order, to `caches`; none means that nothing is ever pruned. Must be
    /// called within a tokio runtime.
    pub fn new(caches: CacheIndex, rules: Vec<PruneOptions>, place: Place) -> Self {
        Self::with_probe(caches, rules, Arc::new(place))
    }

    fn with_probe(caches: CacheIndex, rules: Vec<PruneOptions>, probe: Arc<dyn Probe>) -> Self {
        let inner = Arc::new(Inner {
            caches,
            rules,
            probe,
            state: Mutex::default(),
            begun: Arc::default(),
            freeing: Default::default(),
        });
        let (weak, begun) = (Arc::downgrade(&inner), inner.begun.clone());
        shipway_task::spawn("watch the disk", watch(weak, begun));
        Self(inner)
    }

    /// Prunes by all rules, at a pace that builds hardly notice.
    pub async fn apply(&self) {
        self.0.prune(Pace::Timer).await;
    }

    /// Before something is written: waits while a limit is exceeded and something can go. The
    /// limits are looked at until the guard is dropped.
    pub async fn enter(&self) -> Writing {
        while self.0.start_if_due() == Pressure::Over {
            tokio::time::sleep(WAIT).await;
        }
        let free = self.0.probe.disk().map_or(0, |disk| disk.free);
        let mut state = self.0.state.lock();
        state.writers += 1;
        if state.writers == 1 {
            self.0.begun.notify_one();
        }
        drop(state);
        Writing { quota: self.clone(), free }
    }
}

/// What people read when work is done once more after room was made for it.
pub fn room_was_made(pruned: u64) -> String {
    format!(
        "the disk was full: removed {} MB of unused build cache, trying once more\n",
        pruned.div_ceil(1_000_000)
    )
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.quota.0.state.lock().writers -= 1;
    }
}

impl Writing {
    /// Whether `fault` says that the disk was full and there is more room now than when the work
    /// began, so that it may be tried once more: then the bytes that were pruned for that. Whatever
    /// the work itself left must have been dropped.
    pub async fn made_room(&self, fault: &Fault) -> Option<u64> {
        let inner = &self.quota.0;
        if inner.rules.is_empty() || !is_out_of_space(fault) {
            return None;
        }
        match inner.make_room(self.free).await {
            Ok(room) => room,
            Err(error) => {
                tracing::warn!(%error, "failed to make room on a full disk");
                None
            }
        }
    }
}

/// What causes a prune by the rules.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// It is time for one: nobody waits for it.
    Timer,
    /// A limit was exceeded.
    Limit,
}

/// What a limit is exceeded by sooner.
fn spare(limit: u64) -> u64 {
    limit / SPARE
}

impl Inner {
    /// The rule whose limits are looked at: the last one that is about all that is unused.
    fn limits(&self) -> Option<&PruneOptions> {
        let all = |rule: &&PruneOptions| rule.filter.is_none() && rule.keep_duration.is_zero();
        self.rules.iter().rev().find(all).filter(|r| r.max_used > 0 || r.min_free > 0)
    }

    fn pressure(&self) -> Pressure {
        let (Some(limits), Ok(disk)) = (self.limits(), self.probe.disk()) else {
            return Pressure::None;
        };
        let used = disk.used();
        // What is used more since the count is taken for ours, and what is used less as well.
        let kept = self
            .state
            .lock()
            .counted
            .map(|counted| counted.kept.saturating_add(used).saturating_sub(counted.used));
        if kept.is_some_and(|kept| kept <= limits.reserved) {
            return Pressure::None;
        }
        let beyond = |by: u64| {
            let (max_used, min_free) = (limits.max_used, limits.min_free);
            let much = kept.is_some_and(|kept| kept > max_used - by * spare(max_used) / 2);
            let little = disk.free < min_free.saturating_add(by * spare(min_free) / 2);
            max_used > 0 && much || min_free > 0 && little
        };
        match (beyond(0), beyond(1)) {
            (true, _) => Pressure::Over,
            (_, true) => Pressure::Near,
            _ => Pressure::None,
        }
    }

    /// The pressure, for which a prune runs now. Nobody waits for one that would be futile.
    fn start_if_due(self: &Arc<Self>) -> Pressure {
        let pressure = self.pressure();
        let mut state = self.state.lock();
        if pressure == Pressure::None {
            state.futile = None;
            return pressure;
        }
        let futile = state.futile;
        if futile.is_some_and(|until| Instant::now() < until) {
            return Pressure::None;
        }
        if !std::mem::replace(&mut state.pruning, true) {
            let inner = self.clone();
            shipway_task::spawn("prune at a limit", async move {
                inner.prune(Pace::Limit).await;
                let futile = inner.pressure() != Pressure::None;
                let mut state = inner.state.lock();
                state.pruning = false;
                state.futile = futile.then(|| Instant::now() + FUTILE);
            });
        }
        if futile.is_some() { Pressure::Near } else { pressure }
    }

    /// Prunes by all rules.
    async fn prune(&self, pace: Pace) {
        meter::GC_RUNS.add(1);
        // What is pruned are states: the rest stays as large as it is.
        let besides = self.besides().await;
        for rule in &self.rules {
            let mut options = PruneOptions { besides, ..rule.clone() };
            match pace {
                Pace::Timer => options.rest = true,
                Pace::Limit => {
                    options.max_used -= spare(options.max_used);
                    options.min_free = options.min_free.saturating_add(spare(options.min_free));
                }
            }
            match self.prune_with(options).await {
                Ok(pruned) => {
                    let kept = pruned.left.saturating_add(besides);
                    let used = self.probe.disk().map(|disk| disk.used());
                    self.state.lock().counted = used.ok().map(|used| Counted { kept, used });
                }
                Err(error) => {
                    tracing::warn!(%error, "garbage collection failed, will retry after the next build");
                }
            }
        }
    }

    async fn besides(&self) -> u64 {
        let probe = self.probe.clone();
        shipway_task::blocking("count files", move || Ok(probe.besides())).await.unwrap_or(0)
    }

    async fn prune_with(&self, mut options: PruneOptions) -> Result<Pruned> {
        options.free = Some(self.probe.disk()?.free);
        let removed = |record: UsageRecord| {
            meter::GC_BYTES.add(record.size);
            tracing::debug!(id = %record.id, size = record.size, "pruned");
        };
        self.caches.prune(options, &removed).await
    }

    /// Makes room on a disk that had `before` bytes free when the work began that found it full;
    /// gives the bytes that were pruned if there is more now.
    async fn make_room(&self, before: u64) -> Result<Option<u64>> {
        let _one = self.freeing.lock().await;
        self.caches.refs().collect_garbage().await?;
        let disk = self.probe.disk()?;
        let wanted = (disk.usable / FREED).max(before.saturating_mul(2)).min(disk.usable);
        let mut bytes = 0;
        loop {
            let free = self.probe.disk()?.free;
            if free >= wanted {
                break;
            }
            let options = PruneOptions { all: true, min_free: wanted, ..PruneOptions::default() };
            let pruned = self.prune_with(options).await?;
            bytes += pruned.bytes;
            if pruned.states == 0 {
                break;
            }
        }
        let free = self.probe.disk()?.free;
        tracing::info!(pruned = bytes, free, "the disk was full, removed unused build cache");
        Ok((free > before).then_some(bytes))
    }
}

/// Looks at the limits while something is written, until the quota is gone.
async fn watch(inner: Weak<Inner>, begun: Arc<Notify>) {
    loop {
        begun.notified().await;
        loop {
            tokio::time::sleep(WATCH).await;
            let Some(inner) = inner.upgrade() else { return };
            if inner.state.lock().writers == 0 {
                break;
            }
            inner.start_if_due();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.begun.notify_one();
    }
}

#[cfg(test)]
mod tests;
