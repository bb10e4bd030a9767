//! What the allocator does with memory that is free. Left alone, glibc has an arena for every few
//! threads and learns from large buffers never to give them back, so that a daemon stays as large
//! as its largest hour made it.
//!
//! All calls are safe at any time and from any thread, but glibc has no safe binding.

#![allow(unsafe_code)]

#[cfg(target_env = "gnu")]
use std::{
    hint::black_box,
    sync::atomic::{AtomicI32, Ordering},
    thread,
};

/// What is kept though it is free, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// Buffers above this size go back as soon as they are free.
    pub largest: i32,
    /// All free memory at the end of the heap above this goes back.
    pub all: i32,
}

/// Arenas, and so threads that allocate at once without waiting.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;
/// A piece whose release makes glibc look at the end of its arena: 64 KiB or more
/// (`FASTBIN_CONSOLIDATION_THRESHOLD`).
#[cfg(target_env = "gnu")]
const PIECE: usize = 256 << 10;

/// [`Kept::all`] as it was set.
#[cfg(target_env = "gnu")]
static KEPT_AT_END: AtomicI32 = AtomicI32::new(128 << 10);

/// Sets the allocator up; before threads are started.
pub fn tune(kept: Kept) {
    #[cfg(target_env = "gnu")]
    {
        KEPT_AT_END.store(kept.all, Ordering::Relaxed);
        set("arenas", libc::M_ARENA_MAX, ARENAS);
        set("largest piece", libc::M_MMAP_THRESHOLD, kept.largest);
        set("kept at the end", libc::M_TRIM_THRESHOLD, kept.all);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = kept;
}

#[cfg(target_env = "gnu")]
fn set(what: &str, parameter: libc::c_int, value: i32) {
    // SAFETY: it only sets a number, under the allocator's own lock.
    if unsafe { libc::mallopt(parameter, value) } == 0 {
        tracing::debug!(what, value, "failed to tune the allocator");
    }
}

/// Gives back what is free. Blocks.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it takes the allocator's own locks and touches free memory only.
        let _ = unsafe { libc::malloc_trim(0) };
        // That leaves the end of all arenas but the first: up to `Kept::all` of each. It goes when
        // a thread of the arena frees a large piece, and threads that begin one after another are
        // of one arena after another.
        set("kept at the end", libc::M_TRIM_THRESHOLD, 0);
        for _ in 0..ARENAS {
            let free = || drop(black_box(Vec::<u8>::with_capacity(PIECE)));
            let _ = thread::Builder::new().spawn(free).map(thread::JoinHandle::join);
        }
        set("kept at the end", libc::M_TRIM_THRESHOLD, KEPT_AT_END.load(Ordering::Relaxed));
    }
}
