//! What threads have freed goes back to the system, whichever part of the allocator they used.

#![allow(clippy::unwrap_used)]
#![cfg(target_env = "gnu")]

use shipway_daemon::memory::{Kept, trim, tune};
use std::{fs, hint::black_box, thread};

const MIB: u64 = 1 << 20;

/// Bytes of this process that are in memory and in no file.
#[track_caller]
fn private() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

/// Takes 24 MiB in every arena, and frees them: threads that begin one after another are of one
/// arena after another.
fn work() {
    for _ in 0..4 {
        let work = || drop(black_box((0..24).map(|_| vec![1; 1 << 20]).collect::<Vec<Vec<u8>>>()));
        thread::spawn(work).join().unwrap();
    }
}

#[test]
fn what_is_free_goes_back_from_all_arenas() {
    tune(Kept { largest: 8 << 20, all: 32 << 20 });
    let before = private();
    work();
    let kept = private();
    trim();
    let left = private();
    eprintln!("{before} bytes, {kept} with what is kept, {left} left");
    assert!(kept > before + 16 * MIB, "nothing was kept: {kept}");
    assert!(left < before + 2 * MIB, "{before} before, {kept} kept, {left} left");
    // And is kept again.
    work();
    assert!(private() > left + 16 * MIB, "{} after {left}", private());
}
