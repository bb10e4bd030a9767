//! A step's output on its way to the clients that watch (row `exec.logclip`): bounded in size and
//! speed, with the end kept for the case that the step fails, and in pieces that are not as small
//! as the step wrote them.

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use shipway_executor::{OutputSink, Stream};
use shipway_progress::{LogStream, Reporter};
use std::{
    collections::VecDeque,
    convert::Infallible,
    mem,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::Notify;

/// Bytes of the end that are kept once something was clipped.
const TAIL: usize = 256 << 10;
/// What a program says when the disk is full, in the C library's words.
const NO_SPACE: &[u8] = b"No space left on device";
/// What follows a piece of output within this time is gathered before it is passed on.
const WINDOW: Duration = Duration::from_millis(100);
/// Gathered output of this size is passed on at once.
const MAX_GATHERED: usize = 64 << 10;
/// Pieces that are gathered at once. So many times the streams alternate in their order; then each
/// of them is one piece.
const MAX_PIECES: usize = 16;

/// How much of each of a step's streams is passed on (row `env.logclip`). Beyond any limit here, a
/// vertex's whole output is bounded by its reporter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes. As in BuildKit, without this limit there is none of the speed either.
    pub size: Option<u64>,
    /// Bytes per second of the step's life so far.
    pub speed: Option<u64>,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { size: Some(2 << 20), speed: Some(200 << 10) }
    }
}

impl LogLimits {
    /// Reads a limit as BuildKit does: a number of bytes, or -1 for no limit; `None` if it is
    /// neither.
    pub fn parse(text: &str) -> Option<Option<u64>> {
        match text.parse::<i32>().ok()? {
            -1 => Some(None),
            n => Some(Some(u64::try_from(n).unwrap_or(0))),
        }
    }

    /// How many bytes a step of this age may have written, and the limit that says so.
    fn at(&self, age: f64) -> Option<(u64, String)> {
        let size = self.size?;
        let by_speed = self.speed.map(|speed| (speed, (age.ceil() as u64).saturating_mul(speed)));
        Some(match by_speed {
            Some((speed, limit)) if limit <= size => (limit, format!("{}/s", shown(speed))),
            _ => (size, shown(size)),
        })
    }
}

/// A number of bytes in the largest unit that it has one of.
fn shown(bytes: u64) -> String {
    let unit = ["B", "KiB", "MiB", "GiB"]
        .into_iter()
        .enumerate()
        .rev()
        .find(|(n, _)| bytes >= 1 << (10 * n));
    let (n, unit) = unit.unwrap_or((0, "B"));
    format!("{}{unit}", bytes as f64 / f64::from(1 << (10 * n)))
}

/// The output of one step on its way to the clients that watch.
pub(super) struct StepLog {
    reporter: Reporter,
    limits: LogLimits,
    began: Instant,
    state: Mutex<State>,
    /// Wakes [`StepLog::pump`] when something is gathered.
    gathering: Notify,
}

#[derive(Default)]
struct State {
    streams: [Clip; 2],
    gathered: Gathered,
}

/// Output that waits for more.
#[derive(Default)]
struct Gathered {
    pieces: Vec<Piece>,
    size: usize,
    /// When something was last passed on.
    passed: Option<Instant>,
}

#[derive(Debug, PartialEq)]
struct Piece {
    stream: LogStream,
    bytes: Vec<u8>,
    time: SystemTime,
}

impl Gathered {
    /// Takes output; returns what is to be passed on now.
    fn put(&mut self, stream: LogStream, bytes: &[u8], now: Instant) -> Vec<Piece> {
        let full = self.pieces.len() >= MAX_PIECES;
        let last = self.pieces.len().saturating_sub(1);
        let open = self
            .pieces
            .iter_mut()
            .enumerate()
            .rev()
            .find(|(i, p)| p.stream == stream && (full || *i == last));
        match open {
            Some((_, piece)) => piece.bytes.extend_from_slice(bytes),
            None => {
                self.pieces.push(Piece { stream, bytes: bytes.to_vec(), time: SystemTime::now() })
            }
        }
        self.size += bytes.len();
        let quiet =
            self.passed.is_none_or(|passed| now.saturating_duration_since(passed) >= WINDOW);
        if quiet || self.size >= MAX_GATHERED { self.take(now) } else { Vec::new() }
    }

    fn take(&mut self, now: Instant) -> Vec<Piece> {
        self.size = 0;
        self.passed = Some(now);
        mem::take(&mut self.pieces)
    }
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
    /// What of `bytes` is passed on when the step is `age` seconds old, and the notice of a
    /// clipping that begins.
    fn admit(&mut self, bytes: &[u8], age: f64, limits: &LogLimits) -> (usize, Option<String>) {
        let before = self.size;
        self.size += bytes.len() as u64;
        let Some((limit, reason)) = limits.at(age) else { return (bytes.len(), None) };
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

impl StepLog {
    pub(super) fn new(reporter: Reporter, limits: LogLimits) -> Self {
        Self::begun(reporter, limits, SystemTime::now())
    }

    /// The output of a step that began at `began`.
    pub(super) fn begun(reporter: Reporter, limits: LogLimits, began: SystemTime) -> Self {
        let age = began.elapsed().unwrap_or_default();
        Self {
            reporter,
            limits,
            began: Instant::now().checked_sub(age).unwrap_or_else(Instant::now),
            state: Mutex::default(),
            gathering: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn pass_on(&self, pieces: Vec<Piece>) {
        pieces.iter().for_each(|p| self.reporter.log_at(p.stream, &p.bytes, p.time));
    }

    /// Takes output.
    pub(super) fn write(&self, stream: Stream, bytes: &Bytes) {
        let (index, stream) =
            if stream == Stream::Stderr { (1, LogStream::Stderr) } else { (0, LogStream::Stdout) };
        let mut state = self.lock();
        let state = &mut *state;
        let clip = &mut state.streams[index];
        clip.look(bytes);
        let (admitted, notice) =
            clip.admit(bytes, self.began.elapsed().as_secs_f64(), &self.limits);
        for text in [&bytes[..admitted], notice.as_deref().unwrap_or_default().as_bytes()] {
            if !text.is_empty() {
                self.pass_on(state.gathered.put(stream, text, Instant::now()));
            }
        }
        if !state.gathered.pieces.is_empty() {
            self.gathering.notify_one();
        }
    }

    /// Takes output for as long as there is a clone.
    pub(super) fn sink(self: Arc<Self>) -> OutputSink {
        Arc::new(move |output| self.write(output.stream, &output.bytes))
    }

    /// `work`, while gathered output is passed on.
    pub(super) async fn pumped<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            done = work => done,
            never = self.pump() => match never {},
        }
    }

    /// Passes gathered output on in time, as long as it is polled.
    async fn pump(&self) -> Infallible {
        loop {
            self.gathering.notified().await;
            tokio::time::sleep(WINDOW).await;
            self.settle();
        }
    }

    /// Passes on what is gathered.
    pub(super) fn settle(&self) {
        let mut state = self.lock();
        let pieces = state.gathered.take(Instant::now());
        self.pass_on(pieces);
    }

    /// Passes on the end of what was clipped: the step failed, and the reason is usually there.
    pub(super) fn flush(&self) {
        self.settle();
        let mut state = self.lock();
        for (stream, clip) in
            [LogStream::Stdout, LogStream::Stderr].into_iter().zip(&mut state.streams)
        {
            if let Some(tail) = clip.tail.take().filter(|t| !t.is_empty()) {
                self.reporter.log(stream, &Vec::from(tail));
            }
        }
    }

    /// Whether the step complained of a full disk.
    pub(super) fn no_space(&self) -> bool {
        self.lock().streams.iter().any(|c| c.no_space)
    }
}

/// A step that is given up has its last words, too.
impl Drop for StepLog {
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_clipped_by_speed_then_by_size_and_its_end_is_kept() {
        let (mut clip, limits) = (Clip::default(), LogLimits::default());
        assert_eq!(clip.admit(&[0; 100], 0.5, &limits), (100, None));
        let (admitted, notice) = clip.admit(&[1; 300 << 10], 0.6, &limits);
        assert_eq!(admitted, (200 << 10) - 100);
        assert!(notice.is_some_and(|n| n.contains("200KiB/s")));
        assert_eq!(clip.admit(&[2; 10], 0.7, &limits), (0, None));
        let (_, notice) = clip.admit(&[3; 3 << 20], 60.0, &limits);
        assert!(notice.is_none(), "it was being clipped already");
        assert_eq!(clip.tail.map(|t| t.len()), Some(TAIL));
    }

    #[test]
    fn limits_are_the_administrators() {
        let read = |size: &str, speed: &str| LogLimits {
            size: LogLimits::parse(size).unwrap(),
            speed: LogLimits::parse(speed).unwrap(),
        };
        let written = |limits: LogLimits| {
            let (mut clip, mut all) = (Clip::default(), (0, Vec::new()));
            for age in [0.5, 1.5, 100.0] {
                let (admitted, notice) = clip.admit(&[0; 3000], age, &limits);
                all.0 += admitted;
                all.1.extend(notice.map(|n| {
                    n.trim_matches(&['\n', '[', ']'][..]).replace("output clipped, log limit ", "")
                }));
            }
            all
        };
        let no = Vec::<String>::new();
        assert_eq!(
            written(read("-1", "10")),
            (9000, no.clone()),
            "without a limit of the size there is none of the speed"
        );
        assert_eq!(written(read("8500", "-1")), (8500, vec!["8.30078125KiB reached".to_owned()]));
        assert_eq!(
            written(read("1000000", "1024")),
            (1024 + 3000, vec!["1KiB/s reached".to_owned()])
        );
        assert_eq!(written(read("0", "-1")), (0, vec!["0B reached".to_owned()]));
        assert_eq!(written(read("-5", "1000")).0, 0);
        assert_eq!(written(LogLimits::default()), (9000, no));
        for text in ["", "1.5", "2MiB", "3000000000"] {
            assert_eq!(LogLimits::parse(text), None, "{text}");
        }
    }

    #[test]
    fn words_are_found_across_pieces() {
        let mut clip = Clip::default();
        clip.look(b"write: No space left");
        clip.look(b" on device\n");
        assert!(clip.no_space);
    }

    #[test]
    fn small_pieces_are_gathered_and_large_or_lonely_ones_are_not() {
        let (mut gathered, began) = (Gathered::default(), Instant::now());
        let mut passed = Vec::new();
        // 60000 bytes, one by one on both streams, over six seconds.
        for n in 0..60_000_u32 {
            let stream = if n % 2 == 0 { LogStream::Stdout } else { LogStream::Stderr };
            passed.extend(gathered.put(stream, b"x", began + n * Duration::from_micros(100)));
        }
        let end = began + Duration::from_secs(60);
        passed.extend(gathered.take(end));
        assert!(passed.len() <= 61 * MAX_PIECES, "{}", passed.len());
        assert_eq!(passed.iter().map(|p| p.bytes.len()).sum::<usize>(), 60_000);
        assert!(passed.iter().all(|p| p.bytes.capacity() < 2 * MAX_GATHERED));
        assert_eq!(gathered.put(LogStream::Stdout, b"alone", end + WINDOW).len(), 1);
        assert_eq!(gathered.put(LogStream::Stdout, b"soon after", end + WINDOW), []);
        assert_eq!(gathered.put(LogStream::Stdout, &[b'x'; MAX_GATHERED], end + WINDOW).len(), 1);
    }

    #[test]
    fn streams_that_take_turns_keep_their_order() {
        let (mut gathered, now) = (Gathered::default(), Instant::now());
        gathered.take(now);
        for (stream, text) in [
            (LogStream::Stderr, "+ a\n"),
            (LogStream::Stdout, "a\n"),
            (LogStream::Stderr, "+ b\n"),
            (LogStream::Stdout, "b"),
            (LogStream::Stdout, "\n"),
        ] {
            assert_eq!(gathered.put(stream, text.as_bytes(), now), []);
        }
        let texts: Vec<_> = gathered
            .take(now)
            .into_iter()
            .map(|p| String::from_utf8(p.bytes).expect("text"))
            .collect();
        assert_eq!(texts, ["+ a\n", "a\n", "+ b\n", "b\n"]);
    }

    #[tokio::test]
    async fn what_is_gathered_is_passed_on_in_time_and_at_the_end() {
        let journal = shipway_progress::Journal::new();
        let log =
            StepLog::new(journal.reporter(shipway_oci::Digest::of("v"), "v"), LogLimits::default());
        let mut watcher = journal.watch();
        let mut said = String::new();
        let writes = async {
            for text in ["a", "b", "c"] {
                log.write(Stream::Stdout, &text.into());
            }
            while said != "abc" {
                for event in watcher.next().await.expect("the journal is open") {
                    if let shipway_progress::Event::Log(l) = event {
                        said.push_str(&String::from_utf8_lossy(&l.bytes));
                    }
                }
            }
        };
        tokio::select! { never = log.pump() => match never {}, () = writes => {} }
        let before = journal.events().len();
        ["d", "e"].iter().for_each(|text| log.write(Stream::Stderr, &(*text).into()));
        drop(log);
        assert!((1..=2).contains(&(journal.events().len() - before)));
        assert_eq!(before, 3, "the vertex, the first piece, and the rest");
    }
}
