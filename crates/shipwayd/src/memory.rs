//! What the allocator does with memory that is free. Left alone, glibc has an arena for every few
//! threads and learns from large buffers never to give them back, so that a daemon that builds now
//! and then stays as large as its largest build made it. While builds run, buffers of blobs are
//! better kept: new pages for each cost a tenth of an export.
//!
//! The only unsafe code of the daemon: both calls are safe at any time and from any thread, but
//! glibc has no safe binding.

#![allow(unsafe_code)]

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How long it must have been quiet.
const QUIET: Duration = Duration::from_secs(1);

/// Buffers above this size, in bytes, go back as soon as they are free.
const LARGEST_KEPT: i32 = 8 << 20;
/// Free bytes kept while something runs.
const KEPT: i32 = 32 << 20;

/// Builds that ended.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Sets the allocator up; before threads are started.
pub fn tune() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [
        (libc::M_ARENA_MAX, 2),
        (libc::M_MMAP_THRESHOLD, LARGEST_KEPT),
        (libc::M_TRIM_THRESHOLD, KEPT),
    ] {
        // SAFETY: it only sets a number, under the allocator's own lock.
        if unsafe { libc::mallopt(what, value) } == 0 {
            tracing::debug!(what, value, "failed to tune the allocator");
        }
    }
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

fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks and touches free memory only.
    let _ = unsafe { libc::malloc_trim(0) };
}
