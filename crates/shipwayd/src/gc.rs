//! When and by which rules the daemon prunes by itself (rows `so.gc.*`, `toml.w.gc*`).

use crate::{
    config::{DiskSpace, Worker},
    filter, prune,
};
use shipway_fault::Result;
use shipway_proto::moby::buildkit::v1::types::GcPolicy;
use shipway_refs::{PruneOptions, UsageRecord};
use shipway_remotecache::CacheIndex;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::sync::Notify;

/// Between two runs at least (row `so.gc.when`).
const INTERVAL: Duration = Duration::from_secs(60);
/// From a build's end to the run it causes.
const DELAY: Duration = Duration::from_secs(1);

/// One rule, with sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Also internal and shared records.
    pub all: bool,
    /// Which records, in containerd's filter language; none for all.
    pub filters: Vec<String>,
    /// Keep what was used this recently.
    pub keep_duration: Duration,
    /// Never go below.
    pub reserved: u64,
    /// Go below.
    pub max_used: u64,
    /// Go until this much of the disk is free.
    pub min_free: u64,
}

impl Rule {
    /// The rule in a worker record.
    pub fn to_wire(&self) -> GcPolicy {
        GcPolicy {
            all: self.all,
            keep_duration: self.keep_duration.as_nanos() as i64,
            filters: self.filters.clone(),
            reserved_space: self.reserved as i64,
            max_used_space: self.max_used as i64,
            min_free_space: self.min_free as i64,
        }
    }

    fn options(&self) -> Result<PruneOptions> {
        let filters = filter::parse_all(&self.filters)?;
        Ok(PruneOptions {
            all: self.all,
            keep_duration: self.keep_duration,
            reserved: self.reserved,
            max_used: self.max_used,
            min_free: self.min_free,
            filter: (!filters.is_empty())
                .then(|| Arc::new(move |r: &UsageRecord| filter::any(&filters, &|name| prune::field(r, name))) as _),
        })
    }
}

/// Rules from the configuration, or BuildKit's four defaults, for the disk that holds `root`.
pub fn rules(config: &Worker, root: &Path) -> Vec<Rule> {
    if config.gc == Some(false) {
        return Vec::new();
    }
    let total = rustix::fs::statvfs(root).map(|s| s.f_blocks * s.f_frsize).unwrap_or(0);
    let size = |s: Option<DiskSpace>, default: u64| s.map_or(default, |s| s.of(total));
    if !config.gcpolicy.is_empty() {
        let rule = |p: &crate::config::GcPolicy| Rule {
            all: p.all,
            filters: p.filters.clone(),
            keep_duration: p.keep_duration.map(|s| s.0).unwrap_or_default(),
            reserved: size(p.reserved_space.or(p.keep_bytes), 0),
            max_used: size(p.max_used_space, 0),
            min_free: size(p.min_free_space, 0),
        };
        return config.gcpolicy.iter().map(rule).collect();
    }
    const GB: u64 = 1_000_000_000;
    let reserved = size(config.reserved_space.or(config.gckeepstorage), (total / 10).min(10 * GB));
    let max_used = size(config.max_used_space, (total / 10 * 8).min(100 * GB));
    let min_free = size(config.min_free_space, total / 5);
    let day = Duration::from_secs(24 * 3600);
    let volatile = ["source.local", "exec.cachemount", "source.git.checkout"].map(|t| format!("type=={t}"));
    let bounded = Rule { reserved, max_used, min_free, ..Rule::default() };
    vec![
        Rule { filters: volatile.to_vec(), keep_duration: 2 * day, max_used: 512_000_000, ..Rule::default() },
        Rule { keep_duration: 60 * day, ..bounded.clone() },
        bounded.clone(),
        Rule { all: true, ..bounded },
    ]
}

/// Asks for a run.
#[derive(Clone, Default)]
pub struct Trigger(Arc<Notify>);

impl Trigger {
    /// A run may be due.
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

/// Prunes by `rules` a moment after each wake-up, at most once a minute, until dropped.
pub async fn run(caches: CacheIndex, rules: Vec<Rule>, trigger: Trigger) {
    if rules.is_empty() {
        return;
    }
    trigger.wake();
    loop {
        trigger.0.notified().await;
        tokio::time::sleep(DELAY).await;
        for rule in &rules {
            let pruned = match rule.options() {
                Ok(options) => caches.prune(options, &|record| tracing::debug!(id = %record.id, size = record.size, "pruned")).await,
                Err(fault) => Err(fault),
            };
            if let Err(fault) = pruned {
                tracing::warn!(error = %fault, "garbage collection failed; it will be tried again after the next build");
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_four_rules_and_off_means_none() {
        let all = rules(&Worker::default(), Path::new("/"));
        assert_eq!(all.len(), 4);
        assert_eq!(all[0].keep_duration.as_secs(), 48 * 3600);
        assert!(rules(&Worker { gc: Some(false), ..Worker::default() }, Path::new("/")).is_empty());
    }
}
