//! Who waits for which frames, and how long.

use crate::queue::FrameKey;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Range,
    time::Duration,
};
use tracing::Span;

/// A read that waits for blocks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Miss {
    pub layer: u32,
    pub blocks: Range<u64>,
    pub since: Duration,
    /// That in which it was added; it ends with the miss.
    pub span: Span,
    deadline: Duration,
    frames: HashSet<u64>,
}

/// All that wait. Pure; times are since an arbitrary start.
#[derive(Debug, Default)]
pub(crate) struct Misses {
    next: u64,
    all: BTreeMap<u64, Miss>,
    by_frame: HashMap<FrameKey, Vec<u64>>,
    by_blocks: HashMap<(u32, u64, u64), u64>,
    deadlines: BTreeSet<(Duration, u64)>,
}

impl Misses {
    /// Somebody waits for `blocks`, which the frames at `frames` hold. The same again, as after a
    /// restart of who asks, changes nothing.
    pub(crate) fn add(
        &mut self,
        layer: u32,
        blocks: Range<u64>,
        frames: impl IntoIterator<Item = u64>,
        (since, deadline): (Duration, Duration),
    ) {
        let name = (layer, blocks.start, blocks.end);
        if self.by_blocks.contains_key(&name) {
            return;
        }
        self.next += 1;
        let frames: HashSet<u64> = frames.into_iter().collect();
        for frame in &frames {
            self.by_frame.entry((layer, *frame)).or_default().push(self.next);
        }
        self.by_blocks.insert(name, self.next);
        self.deadlines.insert((deadline, self.next));
        self.all.insert(
            self.next,
            Miss { layer, blocks, since, span: Span::current(), deadline, frames },
        );
    }

    /// A frame is there; gives those that wait for nothing more.
    pub(crate) fn done(&mut self, key: FrameKey) -> Vec<Miss> {
        let mut served = Vec::new();
        for no in self.by_frame.remove(&key).unwrap_or_default() {
            if let Some(miss) = self.all.get_mut(&no) {
                miss.frames.remove(&key.1);
                if miss.frames.is_empty() {
                    served.extend(self.take(no).map(|(miss, _)| miss));
                }
            }
        }
        served
    }

    /// A frame will not be there; gives those that waited for it, and frames that nobody waits for
    /// any more.
    pub(crate) fn failed(&mut self, key: FrameKey) -> (Vec<Miss>, Vec<FrameKey>) {
        let numbers = self.by_frame.get(&key).cloned().unwrap_or_default();
        self.take_all(numbers)
    }

    /// Those whose time is over.
    pub(crate) fn expired(&mut self, now: Duration) -> (Vec<Miss>, Vec<FrameKey>) {
        let numbers = self.deadlines.iter().take_while(|(d, _)| *d <= now).map(|(_, n)| *n);
        let numbers = numbers.collect();
        self.take_all(numbers)
    }

    /// Those of a layer.
    pub(crate) fn of_layer(&mut self, layer: u32) -> (Vec<Miss>, Vec<FrameKey>) {
        let numbers = self.all.iter().filter(|(_, m)| m.layer == layer).map(|(n, _)| *n);
        let numbers = numbers.collect();
        self.take_all(numbers)
    }

    /// Where the frames of a layer begin that somebody waits for.
    pub(crate) fn frames(&self, layer: u32) -> impl Iterator<Item = u64> {
        self.by_frame.keys().filter(move |key| key.0 == layer).map(|key| key.1)
    }

    /// Whether somebody waits for a frame.
    pub(crate) fn wait_for(&self, key: FrameKey) -> bool {
        self.by_frame.contains_key(&key)
    }

    /// The first deadline.
    pub(crate) fn next_time(&self) -> Option<Duration> {
        self.deadlines.first().map(|(time, _)| *time)
    }

    fn take_all(&mut self, numbers: Vec<u64>) -> (Vec<Miss>, Vec<FrameKey>) {
        let (mut misses, mut unwanted) = (Vec::new(), Vec::new());
        for (miss, frames) in numbers.into_iter().filter_map(|no| self.take(no)) {
            misses.push(miss);
            unwanted.extend(frames);
        }
        (misses, unwanted)
    }

    fn take(&mut self, no: u64) -> Option<(Miss, Vec<FrameKey>)> {
        let miss = self.all.remove(&no)?;
        self.deadlines.remove(&(miss.deadline, no));
        self.by_blocks.remove(&(miss.layer, miss.blocks.start, miss.blocks.end));
        let mut unwanted = Vec::new();
        for frame in &miss.frames {
            let key = (miss.layer, *frame);
            if let Some(waiting) = self.by_frame.get_mut(&key) {
                waiting.retain(|n| *n != no);
                if waiting.is_empty() {
                    self.by_frame.remove(&key);
                    unwanted.push(key);
                }
            }
        }
        Some((miss, unwanted))
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_miss_is_served_when_its_last_frame_is_there() {
        let mut misses = Misses::default();
        misses.add(1, 0..4, [10, 20], (S, 61 * S));
        misses.add(1, 0..4, [10, 20], (2 * S, 62 * S));
        misses.add(1, 4..8, [20], (3 * S, 63 * S));
        assert_eq!(misses.next_time(), Some(61 * S));
        let served = misses.done((1, 20));
        assert_eq!(served.iter().map(|m| m.blocks.clone()).collect::<Vec<_>>(), [4..8]);
        assert!(misses.wait_for((1, 10)) && !misses.wait_for((1, 20)));
        let served = misses.done((1, 10));
        assert_eq!(
            served.iter().map(|m| (m.blocks.clone(), m.since)).collect::<Vec<_>>(),
            [(0..4, S)]
        );
        assert_eq!(misses.next_time(), None);
        assert!(misses.done((1, 10)).is_empty());
    }

    #[test]
    fn what_fails_leaves_what_others_wait_for() {
        let mut misses = Misses::default();
        misses.add(1, 0..4, [10, 20], (S, 61 * S));
        misses.add(1, 4..8, [20, 30], (S, 50 * S));
        let (failed, unwanted) = misses.failed((1, 10));
        assert_eq!((failed.len(), unwanted), (1, vec![(1, 10)]));
        assert!(misses.expired(49 * S).0.is_empty());
        let (failed, mut unwanted) = misses.expired(50 * S);
        unwanted.sort_unstable();
        assert_eq!((failed.len(), unwanted), (1, vec![(1, 20), (1, 30)]));
        misses.add(2, 0..1, [1], (S, S));
        assert_eq!(misses.of_layer(2).0.len(), 1);
        assert!(misses.all.is_empty() && misses.by_frame.is_empty() && misses.by_blocks.is_empty());
    }
}
