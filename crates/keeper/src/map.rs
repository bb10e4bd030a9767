//! The map of a layer's good blocks: one bit each, in a file that outlives the process.

use crate::sys::Words;
use rustix::{fd::AsFd, io::Errno};
use std::{ops::Range, sync::atomic::Ordering};

/// Bits of good blocks, block 0 in the lowest bit of the first byte. The keeper alone changes them.
///
/// All accesses are sequentially consistent, because readers and the thread that drops blocks use
/// two things in opposite order: a reader says that it reads and then looks at bits, the other
/// clears bits and then looks for readers. One of the two sees the other.
pub(crate) struct BlockMap {
    words: Words,
    blocks: u64,
}

/// The words that hold the bits of `blocks`, and which bits of each.
fn masks(blocks: &Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = *blocks;
    let (first, past) = (start / 64, if start < end { end.div_ceil(64) } else { start / 64 });
    (first..past).map(move |word| {
        let (from, to) = (start.max(word * 64) % 64, (end - word * 64).min(64));
        let mask = (u64::MAX << from) & (u64::MAX >> (64 - to));
        (word as usize, mask.to_le())
    })
}

impl BlockMap {
    /// Bytes of the file for so many blocks.
    pub(crate) fn bytes(blocks: u64) -> u64 {
        blocks.div_ceil(8)
    }

    /// The map in `file`, which has [`BlockMap::bytes`] bytes at least.
    pub(crate) fn open(file: impl AsFd, blocks: u64) -> Result<Self, Errno> {
        if (rustix::fs::fstat(&file)?.st_size as u64) < Self::bytes(blocks) {
            return Err(Errno::INVAL);
        }
        let words = usize::try_from(blocks.div_ceil(64)).map_err(|_| Errno::INVAL)?;
        Ok(Self { words: Words::map(file, words)?, blocks })
    }

    fn clamp(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start.min(self.blocks)..blocks.end.min(self.blocks)
    }

    /// These blocks are good; what is behind the end is nothing.
    pub(crate) fn set(&self, blocks: &Range<u64>) {
        for (word, mask) in masks(&self.clamp(blocks)) {
            self.words.get(word).fetch_or(mask, Ordering::SeqCst);
        }
    }

    /// These blocks are not.
    pub(crate) fn clear(&self, blocks: &Range<u64>) {
        for (word, mask) in masks(&self.clamp(blocks)) {
            self.words.get(word).fetch_and(!mask, Ordering::SeqCst);
        }
    }

    /// From the first of these blocks that is not good to the last; `None` if all are.
    pub(crate) fn missing(&self, blocks: &Range<u64>) -> Option<Range<u64>> {
        let absent = |(word, mask): (usize, u64)| {
            let absent = u64::from_le(mask & !self.words.get(word).load(Ordering::SeqCst));
            (absent != 0).then_some((word as u64 * 64, absent))
        };
        let mut found: Option<Range<u64>> = None;
        for (base, bits) in masks(&self.clamp(blocks)).filter_map(absent) {
            let end = base + 64 - u64::from(bits.leading_zeros());
            let start = found.map_or(base + u64::from(bits.trailing_zeros()), |r| r.start);
            found = Some(start..end);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::pread;

    #[test]
    fn bits_are_as_in_a_simple_model() {
        let blocks = 1000;
        let file = memfd_create("map", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&file, BlockMap::bytes(blocks)).expect("ftruncate");
        let map = BlockMap::open(&file, blocks).expect("map");
        let mut model = [false; 1000];
        let mut state = 0x5eed_u64;
        let mut next = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..20_000 {
            let start = next(blocks);
            let range = start..start + [next(3), next(70), next(1200)][next(3) as usize];
            let inside = start as usize..range.end.min(blocks) as usize;
            match next(3) {
                0 => {
                    map.set(&range);
                    model[inside].fill(true);
                }
                1 => {
                    map.clear(&range);
                    model[inside].fill(false);
                }
                _ => {
                    let mut absent = inside.clone().filter(|b| !model[*b]);
                    let want = absent
                        .next()
                        .map(|first| first as u64..absent.next_back().unwrap_or(first) as u64 + 1);
                    assert_eq!(map.missing(&range), want, "{range:?}");
                }
            }
        }
        let mut bytes = [0; 125];
        assert_eq!(pread(&file, &mut bytes, 0), Ok(125));
        assert!(
            model.iter().enumerate().all(|(b, good)| (bytes[b / 8] >> (b % 8) & 1 == 1) == *good)
        );
        // Another process finds them.
        let again = BlockMap::open(&file, blocks).expect("map");
        assert_eq!(again.missing(&(0..blocks)), map.missing(&(0..blocks)));
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = memfd_create("map", MemfdFlags::CLOEXEC).expect("memfd");
        assert_eq!(BlockMap::open(&file, 1).err(), Some(Errno::INVAL));
        assert!(BlockMap::open(&file, 0).is_ok());
        ftruncate(&file, 8).expect("ftruncate");
        assert!(BlockMap::open(&file, 64).is_ok());
        assert_eq!(BlockMap::open(&file, 65).err(), Some(Errno::INVAL));
        assert_eq!(BlockMap::open(&file, u64::MAX).err(), Some(Errno::INVAL));
    }
}
