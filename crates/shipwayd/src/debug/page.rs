//! What the debug listener shows. Names are BuildKit's where it has the metric.

use shipway_daemon::metrics::{Kind, Page};
use shipway_engine::Engine;
use shipway_telemetry::meter::{self, BOUNDS, Counter, Histogram};
use std::{fmt::Write as _, time::Instant};

/// What the names of our own metrics begin with.
const PREFIX: &str = "shipway_";

/// All metrics.
pub fn metrics(engine: &Engine) -> String {
    let mut page = Page::new("");
    builds(&mut page);
    page.prefix(PREFIX);
    let version = crate::worker::version();
    page.metric("info", Kind::Gauge, "The program that runs.");
    page.sample("info", &[("version", &version.version)], 1.0);
    let running = engine.running().len();
    page.one("builds_running", Kind::Gauge, "Builds that run.", running as f64);
    page.one(
        "steps_running",
        Kind::Gauge,
        "Operations that run.",
        meter::STEPS_RUNNING.get() as f64,
    );
    page.one(
        "steps_queued",
        Kind::Gauge,
        "Operations that wait for their turn.",
        meter::STEPS_QUEUED.get() as f64,
    );
    page.metric("cache_lookups_total", Kind::Counter, "Lookups in the build cache, by outcome.");
    for (outcome, count) in [
        ("local", &meter::CACHE_LOCAL),
        ("imported", &meter::CACHE_IMPORTED),
        ("miss", &meter::CACHE_MISSES),
    ] {
        page.sample("cache_lookups_total", &[("outcome", outcome)], count.get() as f64);
    }
    page.metric("transferred_bytes_total", Kind::Counter, "Bytes that came and went.");
    for (peer, direction, count) in [
        ("registry", "received", &meter::HTTP_RECEIVED),
        ("registry", "sent", &meter::HTTP_SENT),
        ("client", "received", &meter::SESSION_RECEIVED),
        ("client", "sent", &meter::SESSION_SENT),
    ] {
        let labels = [("peer", peer), ("direction", direction)];
        page.sample("transferred_bytes_total", &labels, count.get() as f64);
    }
    for (name, help, count) in [
        ("gc_runs_total", "Garbage collections of the build cache.", &meter::GC_RUNS),
        ("gc_removed_bytes_total", "What garbage collection removed.", &meter::GC_BYTES),
        ("trace_spans_dropped_total", "Spans that were dropped.", &meter::SPANS_DROPPED),
    ] {
        page.one(name, Kind::Counter, help, count.get() as f64);
    }
    page.metric("auth_decisions_total", Kind::Counter, "Requests of callers, by outcome.");
    for (outcome, count) in [
        ("allowed", &meter::AUTH_ALLOWED),
        ("denied", &meter::AUTH_DENIED),
        ("unknown", &meter::AUTH_UNKNOWN),
    ] {
        page.sample("auth_decisions_total", &[("outcome", outcome)], count.get() as f64);
    }
    page.metric("containerd_call_seconds", Kind::Histogram, "How long containerd took to answer.");
    for (method, times) in meter::CONTAINERD_CALLS.all() {
        histogram(&mut page, "containerd_call_seconds", &[("method", &method)], &times);
    }
    page.metric("request_seconds", Kind::Histogram, "How long requests took, by method.");
    for (method, times) in meter::REQUESTS.all() {
        histogram(&mut page, "request_seconds", &[("method", &method)], &times);
    }
    page.prefix("process_");
    process(&mut page);
    page.text()
}

fn builds(page: &mut Page) {
    page.metric("buildkit_builds_total", Kind::Counter, "Builds that ended.");
    for (key, count) in meter::BUILDS.all() {
        let labels =
            [("frontend", &*key.frontend), ("status", key.status), ("error_code", &*key.code)];
        page.sample("buildkit_builds_total", &labels, count as f64);
    }
    page.metric("buildkit_builds_steps_total", Kind::Counter, "Steps of builds that ended.");
    let kinds: [(&str, &Counter); 4] = [
        ("completed", &meter::STEPS_COMPLETED),
        ("cached", &meter::STEPS_CACHED),
        ("total", &meter::STEPS_TOTAL),
        ("warnings", &meter::STEPS_WARNINGS),
    ];
    for (kind, count) in kinds {
        page.sample("buildkit_builds_steps_total", &[("kind", kind)], count.get() as f64);
    }
    page.metric("buildkit_build_duration_seconds", Kind::Histogram, "How long builds took.");
    for (status, times) in meter::BUILD_TIMES.all() {
        histogram(page, "buildkit_build_duration_seconds", &[("status", &status)], &times);
    }
}

fn histogram(page: &mut Page, name: &str, labels: &[(&str, &str)], times: &Histogram) {
    let mut below = 0;
    let buckets = BOUNDS.iter().zip(times.buckets).map(|(bound, count)| {
        below += count;
        (*bound, below)
    });
    page.histogram(name, labels, &buckets.collect::<Vec<_>>(), times.count, times.sum);
}

/// What `/proc` says of this process, under the names that all programs give it.
fn process(page: &mut Page) {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>().ok()
    };
    for (name, help, value) in [
        ("virtual_memory_bytes", "Size of the address space.", kilobytes("VmSize")),
        ("resident_memory_bytes", "Memory in use.", kilobytes("VmRSS")),
    ] {
        if let Some(value) = value {
            page.one(name, Kind::Gauge, help, value * 1024.0);
        }
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        page.one("open_fds", Kind::Gauge, "Open files.", open.count() as f64);
    }
}

/// What is being built: a line each, the oldest first.
pub fn requests(engine: &Engine) -> String {
    let mut running = engine.running();
    running.sort_by_key(|(_, began)| *began);
    let now = Instant::now();
    let mut text = format!("{} builds run\n", running.len());
    for (id, began) in running {
        let _ = writeln!(text, "{:8.1} s  {id:?}", (now - began).as_secs_f64());
    }
    text
}

/// The same as one JSON object, as Go's `expvar` has it: samples by their names.
pub fn variables(engine: &Engine) -> String {
    let page = metrics(engine);
    let samples = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), serde_json::Value::from(value.parse::<f64>().ok()?)))
    });
    let all: serde_json::Map<_, _> = samples.collect();
    format!("{}\n", serde_json::Value::Object(all))
}
