//! Clipping of a step's output (row `exec.logclip`): bounded in size and speed, with the end kept for the case that the step fails.

use bytes::Bytes;
use shipway_executor::Stream;
use shipway_progress::{LogStream, Reporter};
use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Bytes of one stream that are passed on.
const MAX_SIZE: u64 = 2 << 20;
/// Bytes per second of the step's life so far.
const MAX_SPEED: u64 = 200 << 10;
/// Bytes of the end that are kept once something was clipped.
const TAIL: usize = 256 << 10;
/// What a program says when the disk is full, in the C library's words.
const NO_SPACE: &[u8] = b"No space left on device";

/// The output of one step on its way to those who watch.
pub(super) struct StepLog {
    reporter: Reporter,
    began: Instant,
    streams: Mutex<[Clip; 2]>,
}

#[derive(Default)]
struct Clip {
    size: u64,
    clipping: bool,
    tail: Option<VecDeque<u8>>,
    no_space: bool,
    /// The end of the last piece, for words that two pieces share.
    seam: Vec<u8>,
}

impl Clip {
    /// What of `bytes` is passed on when the step is `age` seconds old, and the notice of a clipping that begins.
    fn admit(&mut self, bytes: &[u8], age: f64) -> (usize, Option<String>) {
        let before = self.size;
        self.size += bytes.len() as u64;
        let by_speed = (age.ceil() as u64).saturating_mul(MAX_SPEED);
        let (limit, reason) = if by_speed < MAX_SIZE { (by_speed, "200KiB/s") } else { (MAX_SIZE, "2MiB") };
        let admitted = (limit.saturating_sub(before) as usize).min(bytes.len());
        if self.tail.is_none() && admitted < bytes.len() {
            self.tail = Some(VecDeque::new());
        }
        if let Some(tail) = &mut self.tail {
            tail.extend(bytes);
            let over = tail.len().saturating_sub(TAIL);
            tail.drain(..over);
        }
        let clipped = admitted < bytes.len();
        let begins = clipped && !self.clipping;
        self.clipping = clipped;
        (admitted, begins.then(|| format!("\n[output clipped, log limit {reason} reached]\n")))
    }

    fn look(&mut self, bytes: &[u8]) {
        if !self.no_space {
            self.seam.extend_from_slice(bytes);
            self.no_space = self.seam.windows(NO_SPACE.len()).any(|w| w == NO_SPACE);
            let over = self.seam.len().saturating_sub(NO_SPACE.len() - 1);
            self.seam.drain(..over);
        }
    }
}

fn stream_of(index: usize) -> LogStream {
    if index == 0 { LogStream::Stdout } else { LogStream::Stderr }
}

impl StepLog {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self { reporter, began: Instant::now(), streams: Mutex::default() }
    }

    /// Takes output.
    pub(super) fn write(&self, stream: Stream, bytes: &Bytes) {
        let index = usize::from(stream == Stream::Stderr);
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let clip = &mut streams[index];
        clip.look(bytes);
        let (admitted, notice) = clip.admit(bytes, self.began.elapsed().as_secs_f64());
        if admitted > 0 {
            self.reporter.log(stream_of(index), bytes.slice(..admitted));
        }
        if let Some(notice) = notice {
            self.reporter.log(stream_of(index), notice.into());
        }
    }

    /// Passes on the end of what was clipped: the step failed, and the reason is usually there.
    pub(super) fn flush(&self) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, clip) in streams.iter_mut().enumerate() {
            if let Some(tail) = clip.tail.take().filter(|t| !t.is_empty()) {
                self.reporter.log(stream_of(index), Vec::from(tail).into());
            }
        }
    }

    /// Whether the step complained of a full disk.
    pub(super) fn no_space(&self) -> bool {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|c| c.no_space)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_clipped_by_speed_then_by_size_and_its_end_is_kept() {
        let mut clip = Clip::default();
        assert_eq!(clip.admit(&[0; 100], 0.5), (100, None));
        let (admitted, notice) = clip.admit(&[1; 300 << 10], 0.6);
        assert_eq!(admitted, (200 << 10) - 100);
        assert!(notice.is_some_and(|n| n.contains("200KiB/s")));
        assert_eq!(clip.admit(&[2; 10], 0.7), (0, None));
        let (_, notice) = clip.admit(&[3; 3 << 20], 60.0);
        assert!(notice.is_none(), "it was being clipped already");
        assert_eq!(clip.tail.map(|t| t.len()), Some(TAIL));
    }

    #[test]
    fn words_are_found_across_pieces() {
        let mut clip = Clip::default();
        clip.look(b"write: No space left");
        clip.look(b" on device\n");
        assert!(clip.no_space);
    }
}
