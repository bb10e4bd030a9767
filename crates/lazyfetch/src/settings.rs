//! What can be set.

use std::time::Duration;

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of answers that are in memory or on their way at once. A frame that is longer goes
    /// alone.
    pub memory: u64,
    /// Connections to each host. How much is asked for at once is limited in bytes, by what the
    /// line holds; this many are needed to fill it with small files over a long way.
    pub connections: usize,
    /// How long somebody waits for blocks before the read fails.
    pub deadline: Duration,
    /// How long to wait for the head of an answer.
    pub first_byte: Duration,
    /// How long an answer may make no progress.
    pub stall: Duration,
    /// How long to look for a table of contents.
    pub index: Duration,
    /// How long after a miss the background begins. Meanwhile the line is idle, so not for long:
    /// who misses something after that finds next to nothing in the way.
    pub quiet: Duration,
    /// Whether files of the same directory are fetched with one that is missed.
    pub window: bool,
    /// Whether strides are followed.
    pub strides: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory: 16 << 20,
            connections: 64,
            deadline: Duration::from_secs(60),
            first_byte: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            index: Duration::from_secs(10),
            quiet: Duration::from_millis(500),
            window: true,
            strides: true,
        }
    }
}

/// Pauses between tries: four times as long each time, by chance up to half shorter or longer, so
/// that many who failed together do not come back together.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    seed: u64,
}

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(4);

impl Backoff {
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, RandomState};
        Self { seed: RandomState::new().hash_one(0) | 1 }
    }

    /// The pause after so many tries.
    pub(crate) fn pause(&mut self, tries: u32) -> Duration {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let pause = (FIRST * 4u32.pow(tries.saturating_sub(1).min(8))).min(LONGEST);
        pause / 2 + pause.mul_f64((self.seed % 1024) as f64 / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_differ() {
        let mut backoff = Backoff::new();
        for (tries, want) in
            [(1, FIRST), (2, FIRST * 4), (3, FIRST * 16), (4, FIRST * 64), (40, LONGEST)]
        {
            let all: Vec<Duration> = (0..100).map(|_| backoff.pause(tries)).collect();
            assert!(all.iter().all(|p| *p >= want / 2 && *p <= want * 3 / 2), "{tries}");
            assert!(all.iter().max() > all.iter().min(), "{tries}");
        }
    }
}
