//! When memory goes back to the system. While builds run, buffers of blobs are better kept: new
//! pages for each cost a tenth of an export.

use shipway_daemon::memory::{Kept, trim};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How long it must have been quiet.
const QUIET: Duration = Duration::from_secs(1);

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
    let mine = ENDED.fetch_add(1, Ordering::Relaxed) + 1;
    shipway_task::spawn("give memory back", async move {
        tokio::time::sleep(QUIET).await;
        if ENDED.load(Ordering::Relaxed) == mine {
            let give_back = || {
                trim();
                Ok(())
            };
            let _ = shipway_task::blocking("give memory back", give_back).await;
        }
    });
}
