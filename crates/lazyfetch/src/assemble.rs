//! Frames out of a stream of bytes.

use shipway_layerstore::Frame;
use std::collections::VecDeque;

/// Collects the bytes of frames from those of a blob, which come in order. Frames may overlap a
/// little, for tables of contents do not tell their ends exactly.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    /// By place.
    pending: VecDeque<Frame>,
    /// Bytes from `start` on that pending frames need.
    buffer: Vec<u8>,
    start: u64,
}

impl Assembler {
    /// Waits for more frames, which begin after those before, and not before what has come.
    pub(crate) fn expect(&mut self, frames: impl IntoIterator<Item = Frame>) {
        self.pending.extend(frames);
    }

    /// Takes the bytes at `at`; gives the frames that are whole by them. Bytes before `at` that
    /// have not come never will.
    pub(crate) fn feed(&mut self, at: u64, bytes: &[u8]) -> Vec<(Frame, Vec<u8>)> {
        let Some(first) = self.pending.front() else { return Vec::new() };
        if self.buffer.is_empty() {
            self.start = first.offset.max(at);
        }
        let skip = (self.start + self.buffer.len() as u64).saturating_sub(at);
        self.buffer.extend_from_slice(bytes.get(skip as usize..).unwrap_or_default());
        let mut whole = Vec::new();
        let end = self.start + self.buffer.len() as u64;
        while let Some(frame) = self.pending.pop_front_if(|f| f.offset + f.len <= end) {
            let from = (frame.offset - self.start) as usize;
            let bytes = self.buffer[from..from + frame.len as usize].to_vec();
            whole.push((frame, bytes));
        }
        let keep = self.pending.front().map_or(end, |next| next.offset.clamp(self.start, end));
        self.buffer.drain(..(keep - self.start) as usize);
        self.start = keep;
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(offset: u64, len: u64) -> Frame {
        Frame { offset, len, chunks: Vec::new() }
    }

    /// Frames, whatever the pieces: with gaps, with overlap, one after another.
    #[test]
    fn frames_come_whole_whatever_the_pieces() {
        let blob: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let frames =
            [frame(10, 90), frame(100, 50), frame(140, 60), frame(300, 1), frame(500, 500)];
        for step in [1, 7, 50, 333, 1000] {
            let mut assembler = Assembler::default();
            assembler.expect(frames.clone());
            let (mut got, mut most) = (Vec::new(), 0);
            for (n, piece) in blob.chunks(step).enumerate() {
                got.extend(assembler.feed((n * step) as u64, piece));
                most = most.max(assembler.buffer.len());
            }
            assert!(assembler.pending.is_empty());
            assert_eq!(got.len(), frames.len());
            for ((frame, bytes), want) in got.iter().zip(&frames) {
                assert_eq!(frame, want);
                assert_eq!(*bytes, blob[frame.offset as usize..][..frame.len as usize], "{step}");
            }
            assert!(most < 500 + step, "{most}");
        }
    }
}
