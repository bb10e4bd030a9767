//! What may be read next: files of the same directory around what was missed, and strides.
//!
//! Measured on real start-ups, a window in the order of the archive that stays in the directory
//! does best at about one bandwidth × delay product; a learned order is far better, so that this is
//! only for layers without one. Strides win where programs read every tenth file and nowhere else,
//! so the predictor turns itself off where it does not hit.

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

/// Accesses that are remembered.
const HISTORY: usize = 32;
/// Places that are predicted at a time.
const DEGREE: usize = 8;
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
    resting: u32,
}

impl Deltas {
    /// The block `at` was read; gives the blocks that are expected next and were not expected
    /// before.
    pub(crate) fn access(&mut self, at: u64) -> Vec<u64> {
        if let Some(found) = self.expected.iter().position(|e| *e == at) {
            self.expected.remove(found);
            self.hit += 1.0;
        }
        let at = at as i64;
        if self.history.back() == Some(&at) {
            return Vec::new();
        }
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
        while self.expected.len() > 2 * DEGREE {
            self.expected.pop_front();
        }
        if self.made > 64.0 {
            (self.made, self.hit) = (self.made / 2.0, self.hit / 2.0);
        }
        new
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
            .take(DEGREE)
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
