//! Counters of a layer, written without locks that last.

use parking_lot::Mutex;
use shipway_fault::Fault;
use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Two buckets for each doubling, from a microsecond up to some hours.
const BUCKETS: usize = 70;
/// The bucket of the shortest time that counts are told for, and the one after the longest.
const TOLD: std::ops::Range<usize> = 20..56;
/// The shortest time that counts are told for; the longest is a little more than two minutes.
pub const SHORTEST: Duration = Duration::from_micros(1 << (TOLD.start / 2));

/// How long things took, in buckets that are half of a doubling wide.
#[derive(Debug)]
struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; BUCKETS])
    }
}

impl Histogram {
    fn add(&self, time: Duration) {
        let micros = (time.as_micros() as f64).max(1.0);
        let bucket = (micros.log2() * 2.0) as usize;
        self.0[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
    }

    /// How many took less than each time of [`TOLD`].
    fn below(&self) -> Vec<(Duration, u64)> {
        let (mut below, mut told) = (0, Vec::new());
        for (bucket, count) in self.0.iter().enumerate() {
            if TOLD.contains(&bucket) && bucket % 2 == 0 {
                told.push((Duration::from_micros(1 << (bucket / 2)), below));
            }
            below += count.load(Relaxed);
        }
        told
    }

    /// The middle of the bucket that the median is in.
    fn median(&self) -> Option<Duration> {
        let counts: Vec<u64> = self.0.iter().map(|n| n.load(Relaxed)).collect();
        let all: u64 = counts.iter().sum();
        let mut seen = 0;
        let bucket = counts.iter().position(|n| {
            seen += n;
            all > 0 && seen * 2 >= all
        })?;
        Some(Duration::from_micros(2f64.powf((bucket as f64 + 0.5) / 2.0) as u64))
    }
}

/// What happened to a layer. Updated in place; see [`LayerStats::read`].
#[derive(Debug, Default)]
pub struct LayerStats {
    network: AtomicU64,
    background: AtomicU64,
    local: AtomicU64,
    requests: AtomicU64,
    retries: AtomicU64,
    wrong: AtomicU64,
    misses: AtomicU64,
    failed: AtomicU64,
    worst: AtomicU64,
    /// In microseconds.
    waited: AtomicU64,
    times: Histogram,
    last_error: Mutex<Option<Fault>>,
}

/// A reading of [`LayerStats`].
#[derive(Clone, Debug)]
pub struct Counters {
    /// Compressed bytes that came from sources, the background's included.
    pub network: u64,
    /// Those of the background.
    pub background: u64,
    /// Bytes that were on the disk already and right.
    pub local: u64,
    /// Requests to sources.
    pub requests: u64,
    /// Those that repeated earlier ones.
    pub retries: u64,
    /// Frames whose bytes were wrong.
    pub wrong: u64,
    /// Misses that were served.
    pub misses: u64,
    /// Misses that failed.
    pub failed: u64,
    /// How long half of the misses took at the most, within a fifth; `None` if there were none.
    pub median: Option<Duration>,
    /// How long the slowest miss took.
    pub worst: Duration,
    /// How long all misses that were served took together.
    pub waited: Duration,
    /// How many of them took less than so long, from [`SHORTEST`] on by doublings.
    pub times: Vec<(Duration, u64)>,
    /// The last thing that went wrong.
    pub last_error: Option<Fault>,
}

impl LayerStats {
    /// What was counted so far.
    pub fn read(&self) -> Counters {
        let get = |n: &AtomicU64| n.load(Relaxed);
        Counters {
            network: get(&self.network),
            background: get(&self.background),
            local: get(&self.local),
            requests: get(&self.requests),
            retries: get(&self.retries),
            wrong: get(&self.wrong),
            misses: get(&self.misses),
            failed: get(&self.failed),
            median: self.times.median(),
            worst: Duration::from_micros(get(&self.worst)),
            waited: Duration::from_micros(get(&self.waited)),
            times: self.times.below(),
            last_error: self.last_error.lock().clone(),
        }
    }

    pub(crate) fn request(&self, repeated: bool) {
        self.requests.fetch_add(1, Relaxed);
        self.retries.fetch_add(repeated.into(), Relaxed);
    }

    pub(crate) fn received(&self, bytes: u64, background: bool) {
        self.network.fetch_add(bytes, Relaxed);
        self.background.fetch_add(if background { bytes } else { 0 }, Relaxed);
    }

    /// Bytes that somebody waited for were on the disk already and right.
    pub fn found(&self, bytes: u64) {
        self.local.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn served(&self, took: Duration) {
        self.misses.fetch_add(1, Relaxed);
        self.worst.fetch_max(took.as_micros() as u64, Relaxed);
        self.waited.fetch_add(took.as_micros() as u64, Relaxed);
        self.times.add(took);
    }

    pub(crate) fn miss_failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    pub(crate) fn wrong_bytes(&self) {
        self.wrong.fetch_add(1, Relaxed);
    }

    pub(crate) fn error(&self, fault: &Fault) {
        *self.last_error.lock() = Some(fault.clone());
    }

    pub(crate) fn last_error(&self) -> Option<Fault> {
        self.last_error.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_within_a_fifth() {
        let stats = LayerStats::default();
        assert_eq!(stats.read().median, None);
        for ms in [1, 10, 20, 30, 40, 5000, 100_000] {
            stats.served(Duration::from_millis(ms));
        }
        stats.served(Duration::ZERO);
        let read = stats.read();
        let median = read.median.unwrap().as_secs_f64() * 1000.0;
        assert!((20.0 / 1.2..20.0 * 1.2).contains(&median), "{median}");
        assert_eq!((read.misses, read.worst), (8, Duration::from_secs(100)));
        assert_eq!(read.waited, Duration::from_millis(105_101));
        let below: Vec<u64> = read.times.iter().map(|(_, n)| *n).collect();
        assert_eq!(read.times[0].0, SHORTEST);
        // 1 ms and none below 1.024 ms, 10 ms below 16.4 ms, and so on.
        assert_eq!(below, [2, 2, 2, 2, 3, 5, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 8]);
    }
}
