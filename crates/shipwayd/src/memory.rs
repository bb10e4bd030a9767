//! When memory goes back to the system. While builds run, buffers of blobs are better kept: new
//! pages for each cost a tenth of an export.

use shipway_daemon::memory::{Kept, trim};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How long it must have been quiet: at first for the buffers of the build, then for what lives a
/// while longer than it, such as its progress, idle connections and the threads that read files.
const QUIET: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// What is kept while something runs.
const KEPT: Kept = Kept { largest: 8 << 20, all: 32 << 20 };

/// Builds that ended.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Sets the allocator up; before threads are started.
pub fn tune() {
    shipway_daemon::memory::tune(KEPT);
}

/// A build has ended: what it leaves free goes back to the system, unless another one comes first.
pub fn give_back() {
    shipway_task::spawn("give memory back", async {
        let trim = || async {
            let trim = || {
                trim();
                Ok(())
            };
            let _ = shipway_task::blocking("give memory back", trim).await;
        };
        when_quiet(&ENDED, trim).await;
    });
}

/// Counts a build that ended, and does `work` each time that it has been quiet since for long
/// enough.
async fn when_quiet<F: Future<Output = ()> + Send>(ended: &AtomicU64, work: impl Fn() -> F) {
    let mine = ended.fetch_add(1, Ordering::Relaxed) + 1;
    let mut waited = Duration::ZERO;
    for quiet in QUIET {
        tokio::time::sleep(quiet - waited).await;
        waited = quiet;
        if ended.load(Ordering::Relaxed) != mine {
            return;
        }
        work().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn memory_goes_back_after_the_last_build_and_once_more_when_all_of_it_is_over() {
        let (ended, times) = (AtomicU64::new(0), Mutex::new(Vec::new()));
        let began = Instant::now();
        let build = async |at: u64| {
            tokio::time::sleep(Duration::from_millis(at)).await;
            when_quiet(&ended, async || times.lock().push(began.elapsed().as_millis())).await;
        };
        tokio::join!(build(0), build(500), build(3000));
        assert_eq!(*times.lock(), [1500, 4000, 33_000]);
    }
}
