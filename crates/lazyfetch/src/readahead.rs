//! What may be read next: files of the same directory around what was missed, and strides.
//!
//! Measured on real start-ups, a window in the order of the archive that stays in the directory
//! does best at about one bandwidth × delay product; a learned order is far better, so that this is
//! only for layers without one. Where next to nothing of the windows is read they end, and where
//! most is they grow. Strides win where programs read every tenth file and nowhere else, so the
//! predictor turns itself off where it does not hit; where it does there are no windows.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::Arc,
};

/// Gives, for a block, the blocks of the files in the same directory as the file that it is of: in
/// order, without overlap.
pub type Spans = Arc<dyn Fn(u64) -> Vec<Range<u64>> + Send + Sync>;

/// The blocks to fetch with `missed`: up to `length` blocks of `spans`, half of them before and
/// half after it, or more on one side where the other has not enough.
pub(crate) fn window(missed: &Range<u64>, spans: &[Range<u64>], length: u64) -> Vec<Range<u64>> {
    let size = |r: &Range<u64>| r.end - r.start;
    let before: Vec<Range<u64>> = spans
        .iter()
        .map(|s| s.start..s.end.min(missed.start))
        .filter(|s| s.start < s.end)
        .collect();
    let after: Vec<Range<u64>> =
        spans.iter().map(|s| s.start.max(missed.end)..s.end).filter(|s| s.start < s.end).collect();
    let (has_before, has_after) =
        (before.iter().map(size).sum::<u64>(), after.iter().map(size).sum::<u64>());
    let half = length / 2;
    let take_before = has_before.min(half.max(length.saturating_sub(has_after)));
    let take_after = has_after.min(length - take_before);
    let mut ranges = Vec::new();
    // What comes after is likelier to be next.
    let mut left = take_after;
    for span in after {
        let end = span.end.min(span.start + left);
        left -= end - span.start;
        if span.start < end {
            ranges.push(span.start..end);
        }
    }
    let mut left = take_before;
    for span in before.into_iter().rev() {
        let start = span.start.max(span.end.saturating_sub(left));
        left -= span.end - start;
        if start < span.end {
            ranges.push(start..span.end);
        }
    }
    ranges
}

/// Frames that were fetched for windows and are remembered until they are read.
const FETCHED: usize = 1024;
/// After so many of them their use counts.
const USE_TRIAL: f32 = 24.0;
/// Less of them than this part is read: not worth it.
const USELESS: f32 = 0.1;
/// More: worth a larger window.
const USEFUL: f32 = 0.5;
/// Without windows one is tried now and then.
const USE_REST: u32 = 32;

/// What becomes of what windows bring.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    /// Where frames begin in the blob that nobody has read yet, the oldest first.
    fetched: VecDeque<u64>,
    /// Frames, and those that were read, older ones weighing less.
    made: f32,
    used: f32,
    resting: u32,
}

impl Windows {
    /// How long the next window is, in bytes, if it is `usual` without experience.
    pub(crate) fn length(&mut self, usual: u64) -> u64 {
        let used = if self.made < USE_TRIAL { USELESS } else { self.used / self.made };
        if used > USEFUL {
            return usual.saturating_mul(4);
        }
        if used >= USELESS {
            return usual;
        }
        self.resting += 1;
        if self.resting.is_multiple_of(USE_REST) { usual } else { 0 }
    }

    /// Frames were asked for.
    pub(crate) fn fetched(&mut self, frames: impl IntoIterator<Item = u64>) {
        for frame in frames {
            self.fetched.push_back(frame);
            if self.fetched.len() > FETCHED {
                self.fetched.pop_front();
            }
            self.made += 1.0;
            if self.made > 512.0 {
                (self.made, self.used) = (self.made / 2.0, self.used / 2.0);
            }
        }
    }

    /// Something of a frame was read.
    pub(crate) fn read(&mut self, frame: u64) {
        if let Some(at) = self.fetched.iter().position(|fetched| *fetched == frame) {
            self.fetched.remove(at);
            self.used += 1.0;
        }
    }
}

/// Accesses that are remembered.
const HISTORY: usize = 32;
/// Places that are predicted at a time, and how many when it has hit for long.
const DEGREE: usize = 8;
const MAX_DEGREE: usize = 64;
/// After so many hits in a row nothing else is guessed.
const SURE: usize = 4;
/// Predictions after which the hit rate counts.
const TRIAL: f32 = 8.0;
/// After so many accesses without prediction it is tried again.
const REST: u32 = 256;

/// Predicts accesses by delta correlation: where the last two distances occurred before, what
/// followed then is expected again.
#[derive(Debug, Default)]
pub(crate) struct Deltas {
    history: VecDeque<i64>,
    /// Predicted and not seen.
    expected: VecDeque<u64>,
    /// Predictions and hits, older ones weighing less.
    made: f32,
    hit: f32,
    /// Hits since the last access that was not expected.
    row: usize,
    resting: u32,
}

impl Deltas {
    /// The block `at` was read; gives the blocks that are expected next and were not expected
    /// before.
    pub(crate) fn access(&mut self, at: u64) -> Vec<u64> {
        if self.history.back() == Some(&(at as i64)) {
            return Vec::new();
        }
        match self.expected.iter().position(|e| *e == at) {
            Some(found) => {
                self.expected.remove(found);
                self.hit += 1.0;
                self.row += 1;
            }
            None => self.row = 0,
        }
        let at = at as i64;
        self.history.push_back(at);
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
        if self.is_off() {
            self.resting += 1;
            if self.resting > REST {
                *self = Self { history: std::mem::take(&mut self.history), ..Self::default() };
            }
            return Vec::new();
        }
        let predicted = self.predict(at);
        let new: Vec<u64> = predicted.into_iter().filter(|p| !self.expected.contains(p)).collect();
        self.made += new.len() as f32;
        self.expected.extend(&new);
        while self.expected.len() > 2 * self.degree() {
            self.expected.pop_front();
        }
        if self.made > 64.0 {
            (self.made, self.hit) = (self.made / 2.0, self.hit / 2.0);
        }
        new
    }

    /// Whether it hits again and again, so that nothing else need be guessed.
    pub(crate) fn is_sure(&self) -> bool {
        self.row >= SURE
    }

    fn degree(&self) -> usize {
        (DEGREE + self.row / 2).min(MAX_DEGREE)
    }

    /// Whether it hits too seldom.
    fn is_off(&self) -> bool {
        let settled = self.made - self.expected.len() as f32;
        settled >= TRIAL && self.hit < settled / 2.0
    }

    fn predict(&self, at: i64) -> Vec<u64> {
        let deltas: Vec<i64> =
            self.history.iter().zip(self.history.iter().skip(1)).map(|(a, b)| b - a).collect();
        let [.., first, second] = deltas[..] else { return Vec::new() };
        let earlier = deltas[..deltas.len() - 1].windows(2).rposition(|w| w == [first, second]);
        let Some(found) = earlier else { return Vec::new() };
        // What followed then, over and over.
        let followed = &deltas[found + 2..];
        let (mut next, mut seen) = (at, HashSet::new());
        followed
            .iter()
            .cycle()
            .take(self.degree())
            .map_while(|delta| {
                next = next.checked_add(*delta)?;
                u64::try_from(next).ok()
            })
            .filter(|p| *p as i64 != at && seen.insert(*p))
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    #[test]
    fn windows_stay_in_the_directory_and_near_what_was_missed() {
        let spans = [0..100, 200..300, 1000..1001];
        for (missed, length, want) in [
            (240..250, 40, vec![250..270, 220..240]),
            // Not enough on one side.
            (200..210, 20, vec![210..220, 90..100]),
            (0..10, 20, vec![10..30]),
            (1000..1001, 10, vec![290..300]),
            // Across what is of other directories.
            (290..300, 200, vec![1000..1001, 200..290, 0..100]),
            (90..100, 40, vec![200..220, 70..90]),
            (0..10, 0, vec![]),
            // Not of the directory at all.
            (500..510, 4, vec![1000..1001, 297..300]),
        ] {
            assert_eq!(window(&missed, &spans, length), want, "{missed:?} {length}");
            let sum: u64 = want.iter().map(|r| r.end - r.start).sum();
            assert!(sum <= length);
        }
        assert_eq!(window(&(5..6), &[], 100), Vec::<Range<u64>>::new());
    }

    #[test]
    fn windows_end_where_nothing_of_them_is_read_and_grow_where_most_is() {
        let mut windows = Windows::default();
        assert_eq!(windows.length(100), 100);
        windows.fetched(0..20);
        assert_eq!(windows.length(100), 100);
        windows.fetched(20..40);
        let lengths: u64 = (0..64).map(|_| windows.length(100)).sum();
        assert_eq!(lengths, 200, "now and then one is tried");
        for frame in 0..6 {
            windows.read(frame);
            windows.read(frame);
        }
        assert_eq!(windows.length(100), 100);
        (6..30).for_each(|frame| windows.read(frame));
        assert_eq!(windows.length(100), 400);
        // Old experience weighs less, and not all is remembered.
        windows.fetched(1000..100_000);
        assert!(windows.fetched.len() <= FETCHED && windows.made < 600.0);
        assert_eq!(windows.length(100), 0);
    }

    /// Hits and predictions of a sequence.
    fn run(sequence: impl IntoIterator<Item = u64>) -> (usize, usize, usize) {
        let mut deltas = Deltas::default();
        let (mut predicted, mut hits, mut all) = (HashSet::new(), 0, 0);
        for at in sequence {
            all += 1;
            hits += usize::from(predicted.contains(&at));
            predicted.extend(deltas.access(at));
        }
        (all, hits, predicted.len())
    }

    #[test]
    fn strides_and_patterns_are_predicted_and_noise_is_not() {
        let (all, hits, _) = run((0..100).map(|n| n * 250));
        assert!(hits >= all - 5, "{hits} of {all}");
        let (all, hits, _) = run((0..100).map(|n| 1_000_000 - n * 250));
        assert!(hits >= all - 5, "{hits} of {all}");
        // 3, 7, 3, 7, …
        let (all, hits, _) = run((0..100u64).map(|n| n / 2 * 10 + n % 2 * 3));
        assert!(hits >= all - 6, "{hits} of {all}");
        let mut seed = 1u64;
        let noise = (0..2000).map(move |_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % 1000
        });
        let (_, _, predicted) = run(noise);
        assert!(predicted < 300, "{predicted}");
        assert_eq!(run([u64::MAX, 0, u64::MAX, 0, u64::MAX, 0]).0, 6);
        assert_eq!(run([7; 50]).2, 0);
    }

    #[test]
    fn a_predictor_that_misses_is_silent_and_tries_again_later() {
        let mut deltas = Deltas::default();
        // Each time the pattern is met, it goes on otherwise.
        let mut at = 0;
        let mut made = Vec::new();
        for round in 0..400u64 {
            for delta in [5, 9, 100 + round * 17] {
                at += delta;
                made.push(deltas.access(at).len());
            }
        }
        let spoken = |part: &[usize]| part.iter().sum::<usize>();
        assert!(spoken(&made[..60]) > 0);
        assert_eq!(spoken(&made[60..200]), 0);
        assert!(spoken(&made[200..]) > 0 && spoken(&made[200..]) < 200);
    }
}
