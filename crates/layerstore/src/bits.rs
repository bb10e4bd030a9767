//! Sets of small numbers, a bit each.

use std::ops::Range;

/// A set of numbers below a limit.
pub(crate) struct Bits {
    words: Box<[u64]>,
    len: u32,
}

impl Bits {
    pub fn new(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize].into(), len }
    }

    /// With the bits as they are in a file, little endian; what is beyond the limit is ignored.
    pub fn from_bytes(len: u32, bytes: &[u8]) -> Self {
        let mut bits = Self::new(len);
        for (word, bytes) in bits.words.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(whole);
        }
        if let (Some(last), used @ 1..) = (bits.words.last_mut(), len % 64) {
            *last &= (1 << used) - 1;
        }
        bits
    }

    /// Bytes of such a set in a file.
    pub fn bytes(len: u32) -> u64 {
        u64::from(len).div_ceil(8)
    }

    /// The byte of the file that has the bit `n`.
    pub fn byte_of(&self, n: u32) -> u8 {
        self.words[n as usize / 64].to_le_bytes()[n as usize % 64 / 8]
    }

    pub fn get(&self, n: u32) -> bool {
        n < self.len && self.words[n as usize / 64] >> (n % 64) & 1 == 1
    }

    pub fn set(&mut self, n: u32, on: bool) {
        debug_assert!(n < self.len);
        let mask = 1 << (n % 64);
        let word = &mut self.words[n as usize / 64];
        *word = if on { *word | mask } else { *word & !mask };
    }

    pub fn set_all(&mut self, range: Range<u32>, on: bool) {
        // Word by word where the range has whole ones.
        let mut n = range.start;
        while n < range.end {
            if n.is_multiple_of(64) && range.end - n >= 64 {
                self.words[n as usize / 64] = if on { u64::MAX } else { 0 };
                n += 64;
            } else {
                self.set(n, on);
                n += 1;
            }
        }
    }

    /// Whether the set has all of `range`.
    pub fn has_all(&self, range: Range<u32>) -> bool {
        self.next(range.start..range.end, false) == range.end
    }

    /// The first number of `range` that is in the set (or is not, if `on` is false); its end if
    /// there is none.
    pub fn next(&self, range: Range<u32>, on: bool) -> u32 {
        let mut n = range.start;
        while n < range.end {
            let word = self.words[n as usize / 64];
            let found = (if on { word } else { !word }) >> (n % 64);
            if found != 0 {
                return (n + found.trailing_zeros()).min(range.end);
            }
            n = (n / 64 + 1) * 64;
        }
        range.end
    }

    /// The runs of numbers in `range` that are in the set (or are not).
    pub fn runs(&self, range: Range<u32>, on: bool) -> impl Iterator<Item = Range<u32>> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = self.next(at..range.end, on);
            at = self.next(start..range.end, !on);
            (start < at).then_some(start..at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Against a set of the standard library.
    #[test]
    fn it_is_a_set() {
        let mut dice = 88172645463325252u64;
        let mut below = |n: u32| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            (dice % u64::from(n.max(1))) as u32
        };
        for len in [1, 7, 63, 64, 65, 200] {
            let (mut bits, mut model) = (Bits::new(len), BTreeSet::new());
            for _ in 0..300 {
                let (a, b) = (below(len + 1), below(len + 1));
                let (range, on) = (a.min(b)..a.max(b), below(2) == 0);
                bits.set_all(range.clone(), on);
                range.clone().for_each(|n| {
                    _ = if on { model.insert(n) } else { model.remove(&n) };
                });
                let n = below(len);
                bits.set(n, on);
                _ = if on { model.insert(n) } else { model.remove(&n) };
                assert!((0..len).all(|n| bits.get(n) == model.contains(&n)));
                let (a, b) = (below(len + 1), below(len + 1));
                let range = a.min(b)..a.max(b);
                assert_eq!(bits.has_all(range.clone()), range.clone().all(|n| model.contains(&n)));
                for on in [true, false] {
                    let runs: Vec<_> = bits.runs(range.clone(), on).collect();
                    assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
                    let flat: Vec<u32> = runs.into_iter().flatten().collect();
                    let want: Vec<u32> =
                        range.clone().filter(|n| model.contains(n) == on).collect();
                    assert_eq!(flat, want);
                }
                let bytes: Vec<u8> =
                    (0..Bits::bytes(len)).map(|n| bits.byte_of(n as u32 * 8)).collect();
                let again = Bits::from_bytes(len, &bytes);
                assert!((0..len).all(|n| bits.get(n) == again.get(n)));
            }
            let all = Bits::from_bytes(len, &[0xff; 40]);
            assert!(all.has_all(0..len) && !all.get(len) && all.next(0..len, false) == len);
        }
    }
}
