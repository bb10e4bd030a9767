//! Counters of the whole process, for metrics: cheap enough to be counted whether or not anybody
//! looks. A counter is a `static` because what counts is deep inside of clients and streams, and
//! because a process has one page of metrics.

use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Spans that were dropped, because a queue or a build's trace was full or no collector took them.
pub static SPANS_DROPPED: Counter = Counter::new();
/// Bytes of bodies that came by HTTP: from registries, and what was downloaded.
pub static HTTP_RECEIVED: Counter = Counter::new();
/// Bytes of bodies that were sent by HTTP: to registries.
pub static HTTP_SENT: Counter = Counter::new();
/// Bytes that came from clients through their sessions.
pub static SESSION_RECEIVED: Counter = Counter::new();
/// Bytes that went to clients through their sessions.
pub static SESSION_SENT: Counter = Counter::new();
/// How long containerd took, by method.
pub static CONTAINERD_CALLS: Latencies = Latencies::new();

/// How long calls took that clients made of us, by method; to the first answer of a stream.
pub static REQUESTS: Latencies = Latencies::new();

/// Operations that could run and wait for their turn, as `max-parallelism` has it.
pub static STEPS_QUEUED: Gauge = Gauge::new();
/// Operations that run now.
pub static STEPS_RUNNING: Gauge = Gauge::new();
/// Lookups that the build cache answered with a result of its own.
pub static CACHE_LOCAL: Counter = Counter::new();
/// Lookups that an imported cache answered with a result.
pub static CACHE_IMPORTED: Counter = Counter::new();
/// Lookups without a result.
pub static CACHE_MISSES: Counter = Counter::new();
/// Steps of builds that ended: those that ended well.
pub static STEPS_COMPLETED: Counter = Counter::new();
/// Of them, those that did not run.
pub static STEPS_CACHED: Counter = Counter::new();
/// All steps of builds that ended.
pub static STEPS_TOTAL: Counter = Counter::new();
/// Their warnings.
pub static STEPS_WARNINGS: Counter = Counter::new();
/// Runs of garbage collection.
pub static GC_RUNS: Counter = Counter::new();
/// Bytes that they removed.
pub static GC_BYTES: Counter = Counter::new();
/// What callers were allowed to do.
pub static AUTH_ALLOWED: Counter = Counter::new();
/// What they were not allowed to do.
pub static AUTH_DENIED: Counter = Counter::new();
/// Requests of callers who were not recognized.
pub static AUTH_UNKNOWN: Counter = Counter::new();
/// Builds that ended.
pub static BUILDS: Builds = Builds(Mutex::new(BTreeMap::new()));
/// How long they took, by how they ended.
pub static BUILD_TIMES: Latencies = Latencies::new();

/// Something that grows and shrinks.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

/// One of what a gauge counts; no longer when it is dropped.
#[derive(Debug)]
pub struct Counted(&'static Gauge);

impl Gauge {
    /// Zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more, as long as what is returned lives.
    pub fn enter(&'static self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }

    /// Makes it `n`, for what is counted elsewhere.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// How much it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What builds are counted by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BuildKind {
    /// Name of the frontend; empty for none.
    pub frontend: String,
    /// `completed`, `error` or `canceled`.
    pub status: &'static str,
    /// Name of the error's code; empty without an error.
    pub code: String,
}

/// Builds by their kind.
#[derive(Debug)]
pub struct Builds(Mutex<BTreeMap<BuildKind, u64>>);

impl Builds {
    /// Counts a build. Clients choose the names of frontends, so further ones are `other` once
    /// there are many.
    pub fn add(&self, mut kind: BuildKind) {
        let mut all = self.0.lock();
        if kind.frontend.len() > MAX_FRONTEND
            || (all.len() >= MAX_NAMES && !all.contains_key(&kind))
        {
            kind.frontend = "other".to_owned();
        }
        *all.entry(kind).or_default() += 1;
    }

    /// All of them.
    pub fn all(&self) -> Vec<(BuildKind, u64)> {
        self.0.lock().iter().map(|(kind, count)| (kind.clone(), *count)).collect()
    }
}

/// Longest name of a frontend.
const MAX_FRONTEND: usize = 100;

/// Something that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// How much it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of a histogram's buckets, in seconds.
pub const BOUNDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0];

/// How often something took how long.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Histogram {
    /// How many took at most [`BOUNDS`]`[n]` and more than the bound before that.
    pub buckets: [u64; BOUNDS.len()],
    /// How many there were, those that took longer included.
    pub count: u64,
    /// All together, in seconds.
    pub sum: f64,
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }
}

/// Most names; those of our own calls are far fewer.
const MAX_NAMES: usize = 200;

/// A histogram for each of some names.
#[derive(Debug, Default)]
pub struct Latencies(Mutex<BTreeMap<String, Histogram>>);

impl Latencies {
    /// None yet.
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// Counts one.
    pub fn add(&self, name: &str, took: Duration) {
        let mut all = self.0.lock();
        if let Some(known) = all.get_mut(name) {
            known.add(took);
        } else if all.len() < MAX_NAMES {
            all.entry(name.to_owned()).or_default().add(took);
        }
    }

    /// All of them, in the order of their names.
    pub fn all(&self) -> Vec<(String, Histogram)> {
        self.0.lock().iter().map(|(name, h)| (name.clone(), *h)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_are_counted_by_kind_and_kinds_are_bounded() {
        let builds = Builds(Mutex::new(BTreeMap::new()));
        let kind =
            |frontend: String| BuildKind { frontend, status: "completed", code: String::new() };
        (0..MAX_NAMES * 2).for_each(|n| builds.add(kind(n.to_string())));
        builds.add(kind("0".into()));
        builds.add(kind("x".repeat(MAX_FRONTEND + 1)));
        let all = builds.all();
        assert_eq!(all.len(), MAX_NAMES + 1);
        let of = |name: &str| all.iter().find(|(k, _)| k.frontend == name).map(|(_, n)| *n);
        assert_eq!((of("0"), of("other")), (Some(2), Some(MAX_NAMES as u64 + 1)));
    }

    #[test]
    fn a_gauge_counts_what_lives() {
        static GAUGE: Gauge = Gauge::new();
        let (one, two) = (GAUGE.enter(), GAUGE.enter());
        drop(one);
        assert_eq!(GAUGE.get(), 1);
        drop(two);
        assert_eq!(GAUGE.get(), 0);
        GAUGE.set(7);
        assert_eq!(GAUGE.get(), 7);
    }

    #[test]
    fn times_are_counted_by_name_and_names_are_bounded() {
        let latencies = Latencies::new();
        for milliseconds in [1, 2, 400_000] {
            latencies.add("a", Duration::from_millis(milliseconds));
        }
        (0..MAX_NAMES * 2).for_each(|n| latencies.add(&n.to_string(), Duration::ZERO));
        let all = latencies.all();
        assert_eq!(all.len(), MAX_NAMES);
        let a = all.iter().find(|(name, _)| name == "a").map(|(_, h)| *h).unwrap_or_default();
        assert_eq!((a.count, a.buckets[0], a.buckets[1]), (3, 1, 1));
        assert_eq!(a.buckets.iter().sum::<u64>(), 2);
        assert!((a.sum - 400.003).abs() < 1e-9);
    }
}
