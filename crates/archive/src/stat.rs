//! What `stat` says of files of a layer, and failures to read them.

use rustix::fs::Stat;
use shipway_fault::Fault;
use std::{io, path::Path};

/// Times that Go, and so containerd, can set; it sets others to the epoch.
const TIMES: std::ops::RangeInclusive<i64> = 0..=i64::MAX / 1_000_000_000;

/// Seconds and nanoseconds of the last change.
#[allow(clippy::unnecessary_cast)]
pub(crate) fn time_of(stat: &Stat) -> (i64, i64) {
    (stat.st_mtime as i64, stat.st_mtime_nsec as i64)
}

/// The time that containerd gives to an entry that says `time` as far as a tar can.
pub(crate) fn unpacked((seconds, _): (i64, i64)) -> (i64, i64) {
    (if TIMES.contains(&seconds) { seconds } else { 0 }, 0)
}

pub(crate) fn broken(path: &Path, error: io::Error) -> Fault {
    Fault::io(format!("read {} of a layer", path.display()), error)
}
