//! What compression is worth, by a sample.

use std::mem;

/// Bytes in the middle of a piece that are looked at.
const SAMPLE: usize = 4 * 1024;
/// A sample with more strings that occurred before is worth compressing: each saves some two bytes,
/// and less than 2 % is not worth the time.
const REPEATS: usize = 40;

/// Whether `piece` hardly shrinks, so that compressing it would be a waste of time. Of short ones
/// nothing is said.
pub fn is_hard(piece: &[u8]) -> bool {
    if piece.len() < 2 * SAMPLE {
        return false;
    }
    let at = (piece.len() - SAMPLE) / 2;
    let sample = &piece[at..at + SAMPLE];
    looks_random(sample) && repeats(sample) <= REPEATS
}

/// Positions of `sample` whose next four bytes, the shortest that deflate and zstd look for, were
/// there before. Some that were overwritten by others of the same hash are missed.
fn repeats(sample: &[u8]) -> usize {
    const BITS: u32 = 12;
    let mut last = [0u32; 1 << BITS];
    let strings = sample.windows(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
    strings
        .filter(|string| {
            let slot = &mut last[(string.wrapping_mul(0x9e37_79b1) >> (32 - BITS)) as usize];
            mem::replace(slot, *string) == *string
        })
        .count()
}

/// Whether bytes occur about equally often. What repeats in longer pieces may look so, too.
fn looks_random(sample: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    for byte in sample {
        counts[usize::from(*byte)] += 1;
    }
    let squares: u64 = counts.iter().map(|c| u64::from(*c) * u64::from(*c)).sum();
    let n = sample.len() as u64;
    // What is expected of random bytes, and a tenth more.
    squares * 2560 < (n * 256 + n * n) * 11
}
