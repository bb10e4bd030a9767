//! Random tests: numbers that come again with their seed, and how long such a test goes on.

use std::time::{Duration, Instant, SystemTime};

/// The variable with how many seconds random tests have (`cargo xtask test` sets it).
const SECONDS: &str = "SHIPWAY_FUZZ_SECONDS";

/// A small generator of pseudo-random numbers (xorshift).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// One that gives the same numbers whenever it begins with `seed`.
    pub fn new(seed: u64) -> Self {
        // Of nothing it makes nothing.
        Self(seed.max(1))
    }

    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One of `0..limit`, and 0 of nothing.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `list`.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// So many random bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// The rounds of a random test, by their numbers: so many always, and with a seed of its own; where
/// there is time (`SHIPWAY_FUZZ_SECONDS`), as long as that, with another seed each time.
#[derive(Clone, Debug)]
pub struct Rounds {
    seed: u64,
    rounds: usize,
    time: Option<Duration>,
    started: Instant,
    next: usize,
}

impl Rounds {
    /// So many `rounds` from `seed`, or one of `share` equal parts of the time that there is.
    /// Prints the seed, for what fails to come back.
    pub fn new(rounds: usize, share: u32, seed: u64) -> Self {
        let seconds = std::env::var(SECONDS).ok().and_then(|n| n.parse().ok());
        let time = seconds.map(|n| Duration::from_secs(n) / share);
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_secs());
        let seed = if time.is_some() { now | 1 } else { seed };
        println!("seed {seed}");
        Self { seed, rounds, time, started: Instant::now(), next: 0 }
    }

    /// What the numbers of this run are made of.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The numbers of this run.
    pub fn dice(&self) -> Dice {
        Dice::new(self.seed)
    }
}

impl Iterator for Rounds {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let is_over = match self.time {
            Some(time) => self.started.elapsed() >= time,
            None => self.next >= self.rounds,
        };
        if is_over {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }
}
