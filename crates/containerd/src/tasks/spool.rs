//! Owns the file that keeps a process's output while it runs, for a later run of the daemon: pieces
//! in the order in which they were read, each with its stream and its length before it.
//!
//! A piece is in the file before anybody else gets it, and is written by the thread that read it: a
//! daemon that is killed between these two calls loses it. The file is bounded: what a process
//! writes beyond is passed on all the same, and a later run says that it was not kept.

use parking_lot::Mutex;
use shipway_executor::{Output, OutputTarget, Stream};
use shipway_fault::{Fault, Result};
use shipway_task::blocking;
use std::{
    fs::File,
    io::{self, BufReader, ErrorKind, Read, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Bytes of output that are kept.
const MAX_SPOOL: u64 = 16 << 20;
/// Longest piece that is read back.
const MAX_PIECE: usize = 1 << 20;
/// What is before each piece: a byte for the stream, and four for the length.
const HEAD: usize = 5;

/// The output of one process, on its way from its pipes to its caller by the file.
pub(super) struct Spool {
    path: PathBuf,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Opened for the first piece: most processes write nothing.
    file: Option<File>,
    size: u64,
    /// Whether something was not kept.
    cut: bool,
    /// Who gets it; nobody yet in a process that was left.
    target: Option<OutputTarget>,
}

impl State {
    fn keep(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(create(path)?),
        };
        file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

impl Spool {
    /// The spool of a new process, in a file that is not there yet.
    pub(super) fn new(path: PathBuf, target: OutputTarget) -> Arc<Self> {
        let state = State { target: Some(target), ..State::default() };
        Arc::new(Self { path, state: tokio::sync::Mutex::new(state) })
    }

    /// The spool that an earlier run left. Blocks.
    pub(super) fn left(path: PathBuf) -> Result<Arc<Self>> {
        let fail = |e| Fault::io(format!("open {}", path.display()), e);
        let mut state = State::default();
        match File::options().read(true).append(true).open(&path) {
            Ok(file) => {
                state.size = read_all(&file, |_| ()).map_err(fail)?;
                // The last piece may have been cut off.
                file.set_len(state.size).map_err(fail)?;
                state.cut = state.size >= MAX_SPOOL;
                state.file = Some(file);
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(fail(e)),
        }
        Ok(Arc::new(Self { path, state: tokio::sync::Mutex::new(state) }))
    }

    /// Keeps a piece and hands it on.
    pub(super) async fn put(&self, output: Output) {
        let mut state = self.state.lock().await;
        if state.size >= MAX_SPOOL {
            state.cut = true;
        } else {
            // Not on a thread for blocking work: what waits for one is lost by a kill. It is a copy
            // into the page cache.
            if let Err(e) = state.keep(&self.path, &frame(&output)) {
                tracing::debug!("output is not kept any more: {e}");
                state.size = MAX_SPOOL;
                state.cut = true;
            }
        }
        if let Some(target) = &state.target {
            target.put(output).await;
        }
    }

    /// Gives `target` everything from the beginning, and then what comes.
    pub(super) async fn attach(&self, target: OutputTarget) -> Result<()> {
        // What is read meanwhile waits for the lock.
        let mut state = self.state.lock().await;
        if state.file.is_some() {
            let path = self.path.clone();
            let read = move || {
                let pieces = Mutex::new(Vec::new());
                let file = File::open(&path);
                let done = file.and_then(|f| read_all(&f, |piece| pieces.lock().push(piece)));
                done.map_err(|e| Fault::io(format!("read {}", path.display()), e))?;
                Ok(pieces.into_inner())
            };
            for piece in blocking("read kept output", read).await? {
                target.put(piece).await;
            }
        }
        if state.cut {
            let notice = b"\n[output that was written here is not kept]\n";
            let bytes = bytes::Bytes::from_static(notice);
            target.put(Output { stream: Stream::Stderr, bytes }).await;
        }
        state.target = Some(target);
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    File::options().read(true).append(true).create(true).mode(0o600).open(path)
}

fn frame(output: &Output) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + output.bytes.len());
    bytes.push(u8::from(output.stream == Stream::Stderr));
    bytes.extend((output.bytes.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&output.bytes);
    bytes
}

/// Reads the pieces in `file`; returns where the last whole one ends.
fn read_all(file: &File, mut each: impl FnMut(Output)) -> io::Result<u64> {
    let mut from = BufReader::new(file.take(MAX_SPOOL + MAX_PIECE as u64));
    let (mut end, mut head) = (0, [0; HEAD]);
    loop {
        let read = from.read_exact(&mut head).and_then(|()| {
            let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if length > MAX_PIECE {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let mut bytes = vec![0; length];
            from.read_exact(&mut bytes).map(|()| bytes)
        });
        match read {
            Ok(bytes) => {
                end += (HEAD + bytes.len()) as u64;
                let stream = if head[0] == 0 { Stream::Stdout } else { Stream::Stderr };
                each(Output { stream, bytes: bytes.into() });
            }
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(end),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    type Got = Arc<Mutex<Vec<(Stream, Bytes)>>>;

    /// Who takes output, and what it got.
    fn taker() -> (OutputTarget, Got) {
        let got = Got::default();
        let into = got.clone();
        let take = move |o: Output| into.lock().push((o.stream, o.bytes));
        (OutputTarget::Sink(Arc::new(take)), got)
    }

    fn said(stream: Stream, text: &'static str) -> Output {
        Output { stream, bytes: Bytes::from_static(text.as_bytes()) }
    }

    #[tokio::test]
    async fn a_later_run_gets_everything_from_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let (target, got) = taker();
        let spool = Spool::new(path.clone(), target);
        spool.put(said(Stream::Stdout, "one\n")).await;
        spool.put(said(Stream::Stderr, "two\n")).await;
        drop(spool);
        assert_eq!(got.lock().len(), 2);
        // The third was cut off by a kill.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(&frame(&said(Stream::Stdout, "three\n"))[..7]).unwrap();
        for more in ["four\n", "five\n"] {
            let spool = Spool::left(path.clone()).unwrap();
            spool.put(said(Stream::Stdout, more)).await;
        }
        let spool = Spool::left(path).unwrap();
        let (target, got) = taker();
        spool.attach(target).await.unwrap();
        spool.put(said(Stream::Stderr, "six\n")).await;
        let all: Vec<_> = got.lock().iter().map(|(s, b)| (*s, b.to_vec())).collect();
        let expected = [
            (Stream::Stdout, "one\n"),
            (Stream::Stderr, "two\n"),
            (Stream::Stdout, "four\n"),
            (Stream::Stdout, "five\n"),
            (Stream::Stderr, "six\n"),
        ];
        assert_eq!(all, expected.map(|(s, t)| (s, t.as_bytes().to_vec())));
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded_and_the_rest_passes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let (target, got) = taker();
        let spool = Spool::new(path.clone(), target);
        let piece = Bytes::from(vec![b'x'; MAX_PIECE]);
        let pieces = usize::try_from(MAX_SPOOL).unwrap() / MAX_PIECE + 2;
        for _ in 0..pieces {
            spool.put(Output { stream: Stream::Stdout, bytes: piece.clone() }).await;
        }
        assert_eq!(got.lock().len(), pieces);
        let kept = std::fs::metadata(&path).unwrap().len();
        assert!(kept < MAX_SPOOL + (MAX_PIECE + HEAD) as u64, "{kept}");
        let (target, got) = taker();
        Spool::left(path.clone()).unwrap().attach(target).await.unwrap();
        let got = got.lock();
        assert_eq!(got.len(), pieces - 1, "all but two, and a word about them");
        assert!(got.last().is_some_and(|(_, b)| b.ends_with(b"is not kept]\n")));
        // A file that is not a spool counts as empty.
        std::fs::write(&path, [0, 255, 255, 255, 255, 1, 2]).unwrap();
        Spool::left(path.clone()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}
