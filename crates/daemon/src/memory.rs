//! What the allocator does with memory that is free. Left alone, glibc has an arena for every few
//! threads and learns from large buffers never to give them back, so that a daemon stays as large
//! as its largest hour made it.
//!
//! Both calls are safe at any time and from any thread, but glibc has no safe binding.

#![allow(unsafe_code)]

/// What is kept though it is free, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// Buffers above this size go back as soon as they are free.
    pub largest: i32,
    /// All free memory at the end of the heap above this goes back.
    pub all: i32,
}

/// Sets the allocator up; before threads are started.
pub fn tune(kept: Kept) {
    #[cfg(target_env = "gnu")]
    for (what, value) in [
        (libc::M_ARENA_MAX, 2),
        (libc::M_MMAP_THRESHOLD, kept.largest),
        (libc::M_TRIM_THRESHOLD, kept.all),
    ] {
        // SAFETY: it only sets a number, under the allocator's own lock.
        if unsafe { libc::mallopt(what, value) } == 0 {
            tracing::debug!(what, value, "failed to tune the allocator");
        }
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = kept;
}

/// Gives back what is free.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks and touches free memory only.
    let _ = unsafe { libc::malloc_trim(0) };
}
