//! Samples the machine's state from time to time, for provenance that has what a build took (row
//! `at.prov.params`).

use parking_lot::Mutex;
use serde_json::Value;
use shipway_attest::system_sample;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::task::AbortHandle;

/// Time between the first looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// Looks that are kept. When there are more, every other one goes, and the time between them
/// doubles.
const MAX_SAMPLES: usize = 20;

/// Looks until it is dropped.
pub(crate) struct Sampler {
    samples: Arc<Mutex<Vec<Value>>>,
    task: AbortHandle,
}

impl Sampler {
    pub(crate) fn start() -> Self {
        let samples = Arc::<Mutex<Vec<Value>>>::default();
        let kept = samples.clone();
        let task = shipway_task::spawn("sample the machine", async move {
            let mut interval = INTERVAL;
            loop {
                tokio::time::sleep(interval).await;
                let Some(now) = sample() else { return };
                let mut kept = kept.lock();
                kept.push(now);
                if thin(&mut kept) {
                    interval *= 2;
                }
            }
        });
        Self { samples, task: task.abort_handle() }
    }

    /// All looks, and one more now.
    pub(crate) fn samples(&self) -> Vec<Value> {
        let mut all = self.samples.lock().clone();
        all.extend(sample());
        all
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn thin(samples: &mut Vec<Value>) -> bool {
    let too_many = samples.len() > MAX_SAMPLES;
    if too_many {
        let mut number = 0;
        samples.retain(|_| {
            number += 1;
            number % 2 == 1
        });
    }
    too_many
}

/// Files of the kernel's are read at once and never wait.
fn sample() -> Option<Value> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{name}")).ok();
    let pressure = ["cpu", "memory", "io"].map(|what| read(&format!("pressure/{what}")));
    Some(system_sample(
        SystemTime::now(),
        &read("stat")?,
        &read("meminfo")?,
        pressure.each_ref().map(Option::as_deref),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn looks_are_as_many_as_there_may_be() {
        let sampler = Sampler::start();
        assert_eq!(sampler.samples().len(), 1);
        tokio::time::sleep(INTERVAL * 1000).await;
        let samples = sampler.samples();
        assert!((MAX_SAMPLES / 2..=MAX_SAMPLES + 1).contains(&samples.len()), "{}", samples.len());
        assert!(
            samples
                .iter()
                .all(|s| s["cpuStat"]["user"].is_number() && s["memoryStat"]["total"].is_number()),
            "{samples:?}"
        );
    }
}
