//! When and by which rules the daemon prunes by itself (rows `so.gc.*`, `toml.w.gc*`); how, and
//! what happens between two runs, is [`Quota`]'s.

use crate::{config::DiskSpace, filter, prune, settings::GcSettings};
use shipway_buildcache::Quota;
use shipway_fault::Result;
use shipway_proto::moby::buildkit::v1::types::GcPolicy;
use shipway_refs::{PruneOptions, UsageRecord};
use std::{sync::Arc, time::Duration};
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

    /// What it lets go.
    pub fn options(&self) -> Result<PruneOptions> {
        let filters = filter::parse_all(&self.filters, prune::FIELDS)?;
        Ok(PruneOptions {
            all: self.all,
            keep_duration: self.keep_duration,
            reserved: self.reserved,
            max_used: self.max_used,
            min_free: self.min_free,
            filter: (!filters.is_empty()).then(|| {
                Arc::new(move |r: &UsageRecord| {
                    filter::any(&filters, &|name| prune::field(r, name))
                }) as _
            }),
            ..PruneOptions::default()
        })
    }
}

/// Rules from the settings, or BuildKit's four defaults, for a disk of `total` bytes.
pub fn rules(settings: &GcSettings, total: u64) -> Vec<Rule> {
    const GB: u64 = 1_000_000_000;
    let size = |s: Option<DiskSpace>| s.map_or(0, |s| s.of(total));
    let capped = |percent: u8, most: u64| DiskSpace::Percent(percent).of(total).min(most);
    let bounded = match settings {
        GcSettings::Off => return Vec::new(),
        GcSettings::Rules(rules) => {
            let rule = |p: &crate::config::GcPolicy| Rule {
                all: p.all,
                filters: p.filters.clone(),
                keep_duration: p.keep_duration.map(|s| s.0).unwrap_or_default(),
                reserved: size(p.reserved_space.or(p.keep_bytes)),
                max_used: size(p.max_used_space),
                min_free: size(p.min_free_space),
            };
            return rules.iter().map(rule).collect();
        }
        GcSettings::Limits { reserved: None, max_used: None, min_free: None } => Rule {
            reserved: capped(10, 10 * GB),
            max_used: capped(80, 100 * GB),
            min_free: DiskSpace::Percent(20).of(total),
            ..Rule::default()
        },
        // One that is given leaves the others unset.
        GcSettings::Limits { reserved, max_used, min_free } => Rule {
            reserved: size(*reserved),
            max_used: size(*max_used),
            min_free: size(*min_free),
            ..Rule::default()
        },
    };
    let day = Duration::from_secs(24 * 3600);
    let volatile =
        ["source.local", "exec.cachemount", "source.git.checkout"].map(|t| format!("type=={t}"));
    vec![
        Rule {
            filters: volatile.to_vec(),
            keep_duration: 2 * day,
            max_used: 512_000_000,
            ..Rule::default()
        },
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

/// Prunes by the rules of `quota` a moment after each wake-up, at most once a minute, until
/// dropped.
pub async fn run(quota: Quota, trigger: Trigger) {
    at_times(&trigger, || quota.apply()).await;
}

async fn at_times<F: Future<Output = ()> + Send>(trigger: &Trigger, apply: impl Fn() -> F) {
    trigger.wake();
    loop {
        trigger.0.notified().await;
        tokio::time::sleep(DELAY).await;
        apply().await;
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    const DISK: u64 = 1 << 40;

    fn limits(
        reserved: Option<DiskSpace>,
        max_used: Option<DiskSpace>,
        min_free: Option<DiskSpace>,
    ) -> Vec<Rule> {
        rules(&GcSettings::Limits { reserved, max_used, min_free }, DISK)
    }

    #[tokio::test(start_paused = true)]
    async fn it_runs_a_moment_after_the_start_and_after_builds_once_a_minute_at_most() {
        let (trigger, times) = (Trigger::default(), Mutex::new(Vec::new()));
        let began = tokio::time::Instant::now();
        let run = at_times(&trigger, async || times.lock().push(began.elapsed().as_secs()));
        let builds = async {
            for pause in [10, 10, 300] {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                trigger.wake();
            }
            tokio::time::sleep(2 * INTERVAL).await;
        };
        tokio::select! {
            () = run => {}
            () = builds => {}
        }
        // The two builds of the first minute cause one run.
        assert_eq!(*times.lock(), [1, 62, 321]);
    }

    #[test]
    fn the_defaults_are_four_rules_and_off_means_none() {
        let all = limits(None, None, None);
        assert_eq!((all.len(), all[0].keep_duration.as_secs()), (4, 48 * 3600));
        assert_eq!(
            (all[3].reserved, all[3].max_used, all[3].min_free),
            (10_000_000_000, 100_000_000_000, 205_000_000_000)
        );
        assert!(rules(&GcSettings::Off, DISK).is_empty());
    }

    #[test]
    fn a_limit_that_is_set_leaves_the_others_unset() {
        let last = limits(None, Some(DiskSpace::Bytes(7)), None).pop().unwrap();
        assert_eq!((last.reserved, last.max_used, last.min_free), (0, 7, 0));
    }

    #[test]
    fn rules_of_the_file_replace_all() {
        let rule = crate::config::GcPolicy {
            all: true,
            keep_bytes: Some(DiskSpace::Bytes(9)),
            ..Default::default()
        };
        let made = rules(&GcSettings::Rules(vec![rule]), DISK);
        assert_eq!(made, [Rule { all: true, reserved: 9, ..Rule::default() }]);
    }
}
