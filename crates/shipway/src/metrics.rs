//! What came from the cache, in numbers (`--debug-json-cache-metrics`).

use std::{collections::BTreeMap, io::Write, path::Path, time::Instant};

use serde::Serialize;
use shipway_client::Status;
use shipway_fault::{Fault, Result};

/// Steps that are not the user's begin with one of these.
const OURS: [&str; 4] = ["[internal]", "[auth]", "importing cache", "exporting "];

/// The steps of a build, as its events report them.
pub(crate) struct Metrics {
    started: Instant,
    steps: BTreeMap<String, Step>,
    out: Box<dyn Write + Send>,
}

#[derive(Default)]
struct Step {
    name: String,
    cached: bool,
    completed: bool,
    from: bool,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Numbers {
    total: u64,
    completed: u64,
    user_total: u64,
    user_cached: u64,
    user_completed: u64,
    user_cacheable: u64,
    from: u64,
    miss: u64,
    client_duration_ms: u64,
}

impl Metrics {
    /// For a build that begins now; written to `out`: `stdout`, `stderr`, or a file.
    pub(crate) fn start(out: &str) -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let out: Box<dyn Write + Send> =
            match out {
                "stdout" => Box::new(std::io::stdout()),
                "stderr" => Box::new(std::io::stderr()),
                path => {
                    let file = std::fs::File::options()
                        .create(true)
                        .write(true)
                        .truncate(true)
                        .mode(0o600)
                        .open(Path::new(path));
                    Box::new(file.map_err(|e| {
                        Fault::io(format!("open the file {path} for cache metrics"), e)
                    })?)
                }
            };
        Ok(Self { started: Instant::now(), steps: BTreeMap::new(), out })
    }

    /// Counts what is reported.
    pub(crate) fn note(&mut self, status: &Status) {
        for vertex in &status.vertexes {
            let step = self.steps.entry(vertex.digest.clone()).or_default();
            if step.name.is_empty() {
                step.name.clone_from(&vertex.name);
            }
            step.from |= vertex.name.starts_with('[') && vertex.name.contains("] FROM");
            step.cached |= vertex.cached;
            step.completed |= vertex.completed.is_some();
        }
    }

    /// The numbers, and the names of what was not in the cache.
    fn count(&self) -> (Numbers, Vec<&str>) {
        let (mut n, mut missed) = (Numbers::default(), Vec::new());
        for step in self.steps.values() {
            n.total += 1;
            n.completed += u64::from(step.completed);
            if OURS.iter().any(|prefix| step.name.starts_with(prefix)) {
                continue;
            }
            n.user_total += 1;
            n.user_cached += u64::from(step.cached);
            n.user_completed += u64::from(step.completed);
            n.user_cacheable += u64::from(!step.from);
            n.from += u64::from(step.from);
            if !step.cached && !step.from {
                n.miss += 1;
                missed.push(step.name.as_str());
            }
        }
        (n, missed)
    }

    /// Tells them.
    pub(crate) fn write(mut self) -> Result<()> {
        let (mut numbers, missed) = self.count();
        numbers.client_duration_ms =
            u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut text: String =
            missed.into_iter().map(|name| format!("cache miss: {name}\n")).collect();
        text.push_str(
            &serde_json::to_string(&numbers)
                .map_err(|e| Fault::internal(format!("write cache metrics: {e}")))?,
        );
        writeln!(self.out, "{text}").map_err(|e| Fault::io("write cache metrics", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_the_user_are_counted() {
        let mut metrics = Metrics::start("stderr").expect("starts");
        for (digest, name, more) in [
            ("1", "[internal] load x", r#""completed":"2026-01-01T00:00:00Z""#),
            ("2", "[1/3] FROM busybox", r#""completed":"2026-01-01T00:00:00Z""#),
            ("3", "[2/3] RUN a", r#""cached":true,"completed":"2026-01-01T00:00:00Z""#),
            ("4", "[3/3] RUN b", r#""started":"2026-01-01T00:00:00Z""#),
            ("4", "[3/3] RUN b", r#""completed":"2026-01-01T00:00:00Z""#),
            ("5", "exporting to image", r#""started":"2026-01-01T00:00:00Z""#),
        ] {
            let event = format!(
                r#"{{"vertexes":[{{"digest":"sha256:{digest}","name":"{name}",{more}}}]}}"#
            );
            metrics.note(&serde_json::from_str(&event).expect("an event"));
        }
        let (numbers, missed) = metrics.count();
        let expected = Numbers {
            total: 5,
            completed: 4,
            user_total: 3,
            user_cached: 1,
            user_completed: 3,
            user_cacheable: 2,
            from: 1,
            miss: 1,
            client_duration_ms: 0,
        };
        assert_eq!((numbers, missed), (expected, vec!["[3/3] RUN b"]));
    }
}
