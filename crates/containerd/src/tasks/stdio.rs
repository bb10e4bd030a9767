//! Owns the FIFOs that carry a process's input and output.

use super::spool::Spool;
use bytes::Bytes;
use rustix::fs::{FileType, Mode};
use shipway_executor::{Output, OutputTarget, Stream};
use shipway_fault::{Fault, Result};
use shipway_task::named;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

const CHUNK: usize = 64 << 10;

/// Names of one process's FIFOs and what it is given of them; a container's processes share a
/// directory.
#[derive(Clone, Copy)]
pub(super) struct StdioShape<'a> {
    pub(super) prefix: &'a str,
    pub(super) terminal: bool,
    pub(super) input: bool,
}

/// Where output goes.
#[derive(Clone)]
pub(super) enum Destination {
    /// To the caller.
    Direct(OutputTarget),
    /// By way of a file.
    Spooled(Arc<Spool>),
}

impl Destination {
    async fn put(&self, output: Output) {
        match self {
            Self::Direct(target) => drop(target.put(output).await),
            Self::Spooled(spool) => spool.put(output).await,
        }
    }
}

/// One output of a process.
struct Pipe {
    path: PathBuf,
    /// Keeps the reader from seeing an end before the shim has opened the FIFO.
    writer: Option<pipe::Sender>,
}

/// The input of a process.
struct Input {
    path: PathBuf,
    writer: Option<pipe::Sender>,
    /// Lets us open the FIFO for writing before the shim has opened it.
    _reader: pipe::Receiver,
}

/// The input and output of one process; output is read from the moment it is made.
pub(super) struct Stdio {
    input: Option<Input>,
    stdout: Pipe,
    stderr: Option<Pipe>,
    readers: JoinSet<()>,
    /// Ends the readers between two pieces.
    stop: CancellationToken,
}

fn make_fifo(path: &Path) -> Result<()> {
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
        .map_err(|e| broken(path)(e.into()))
}

fn broken(path: &Path) -> impl Fn(std::io::Error) -> Fault {
    move |e| Fault::io(format!("make FIFO {}", path.display()), e)
}

impl Pipe {
    fn open(path: PathBuf) -> Result<(Self, pipe::Receiver)> {
        make_fifo(&path)?;
        let reader = pipe::OpenOptions::new().open_receiver(&path).map_err(broken(&path))?;
        let writer = pipe::OpenOptions::new().open_sender(&path).map_err(broken(&path))?;
        Ok((Self { path, writer: Some(writer) }, reader))
    }

    /// One that the shim has opened already.
    fn reopen(path: PathBuf) -> Result<(Self, pipe::Receiver)> {
        let reader = pipe::OpenOptions::new().open_receiver(&path).map_err(broken(&path))?;
        // A reader sees an end only after a writer that it has seen: the shim's may have gone.
        drop(pipe::OpenOptions::new().open_sender(&path).map_err(broken(&path))?);
        Ok((Self { path, writer: None }, reader))
    }
}

impl Input {
    fn open(path: PathBuf) -> Result<Self> {
        make_fifo(&path)?;
        let reader = pipe::OpenOptions::new().open_receiver(&path).map_err(broken(&path))?;
        let writer = pipe::OpenOptions::new().open_sender(&path).map_err(broken(&path))?;
        Ok(Self { path, writer: Some(writer), _reader: reader })
    }
}

impl Stdio {
    /// Makes the FIFOs in `dir` and begins to read; a terminal has one output.
    pub(super) fn open(dir: &Path, shape: StdioShape<'_>, output: &Destination) -> Result<Self> {
        let path = |name: &str| dir.join(format!("{}{name}", shape.prefix));
        let input = if shape.input { Some(Input::open(path("stdin"))?) } else { None };
        let stdout = Pipe::open(path("stdout"))?;
        let stderr = if shape.terminal { None } else { Some(Pipe::open(path("stderr"))?) };
        Ok(Self::reading(input, stdout, stderr, output))
    }

    /// Begins to read the output of a process that an earlier run of the daemon left, which has no
    /// terminal and no input.
    pub(super) fn reopen(dir: &Path, output: &Destination) -> Result<Self> {
        let (stdout, stderr) =
            (Pipe::reopen(dir.join("stdout"))?, Pipe::reopen(dir.join("stderr"))?);
        Ok(Self::reading(None, stdout, Some(stderr), output))
    }

    fn reading(
        input: Option<Input>,
        (stdout, reader): (Pipe, pipe::Receiver),
        stderr: Option<(Pipe, pipe::Receiver)>,
        output: &Destination,
    ) -> Self {
        let (mut readers, stop) = (JoinSet::new(), CancellationToken::new());
        let stdout_copied = copy(reader, Stream::Stdout, output.clone(), stop.clone());
        readers.spawn(named("read stdout", stdout_copied));
        let stderr = stderr.map(|(stderr, reader)| {
            let stderr_copied = copy(reader, Stream::Stderr, output.clone(), stop.clone());
            readers.spawn(named("read stderr", stderr_copied));
            stderr
        });
        Self { input, stdout, stderr, readers, stop }
    }

    pub(super) fn stdin(&self) -> Option<&Path> {
        self.input.as_ref().map(|p| p.path.as_path())
    }

    pub(super) fn stdout(&self) -> &Path {
        &self.stdout.path
    }

    pub(super) fn stderr(&self) -> Option<&Path> {
        self.stderr.as_ref().map(|p| p.path.as_path())
    }

    /// The shim has the FIFOs open now: from here on their end is the end of the output.
    pub(super) fn opened(&mut self) {
        self.stdout.writer = None;
        if let Some(stderr) = &mut self.stderr {
            stderr.writer = None;
        }
    }

    /// Where the input goes, once.
    pub(super) fn take_writer(&mut self) -> Option<pipe::Sender> {
        self.input.as_mut()?.writer.take()
    }

    /// Stops reading; what was read is handed on.
    pub(super) async fn leave(mut self) {
        self.stop.cancel();
        while self.readers.join_next().await.is_some() {}
    }

    /// Reads to the end, which a process that escaped its container could put off: not longer than
    /// `limit`.
    pub(super) async fn drain(mut self, limit: Duration) {
        self.opened();
        self.input = None;
        let all = async { while self.readers.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(limit, all).await;
    }
}

/// Carries input until there is no more, or no reader.
pub(super) async fn feed(mut from: mpsc::Receiver<Bytes>, mut to: pipe::Sender) {
    while let Some(bytes) = from.recv().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn copy(
    mut from: pipe::Receiver,
    stream: Stream,
    output: Destination,
    stop: CancellationToken,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = stop.cancelled() => return,
        };
        match read {
            Ok(0) | Err(_) => return,
            // Output without a receiver is read all the same: the process must not wait for us. The
            // copy is of the size of what was read, so that its receiver does not keep the whole
            // buffer alive.
            Ok(n) => {
                let bytes = Bytes::copy_from_slice(&buffer[..n]);
                output.put(Output { stream, bytes }).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn input_and_output_go_through() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (queue, mut said) = mpsc::channel(4);
        let shape = StdioShape { prefix: "x-", terminal: true, input: true };
        let mut stdio =
            Stdio::open(dir.path(), shape, &Destination::Direct(OutputTarget::Queue(queue)))
                .expect("FIFOs");
        let writer = stdio.take_writer().expect("an input");
        let (sender, receiver) = mpsc::channel(1);
        let feeding = shipway_task::spawn("feed", feed(receiver, writer));
        // The shim and the process: what is read is written.
        let mut theirs =
            pipe::OpenOptions::new().open_receiver(stdio.stdin().expect("an input")).expect("open");
        let mut out = pipe::OpenOptions::new().open_sender(stdio.stdout()).expect("open");
        sender.send(Bytes::from_static(b"hello")).await.expect("send");
        let mut bytes = [0; 5];
        theirs.read_exact(&mut bytes).await.expect("read");
        out.write_all(&bytes).await.expect("write");
        drop((sender, out));
        feeding.await.expect("feed");
        stdio.drain(Duration::from_secs(5)).await;
        assert_eq!(said.recv().await.map(|o| o.bytes), Some(Bytes::from_static(b"hello")));
        assert!(said.recv().await.is_none());
    }

    #[tokio::test]
    async fn what_is_written_while_nobody_reads_is_read_by_the_next() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (first, mut said) = mpsc::channel(4);
        let first = Destination::Direct(OutputTarget::Queue(first));
        let shape = StdioShape { prefix: "", terminal: false, input: false };
        let stdio = Stdio::open(dir.path(), shape, &first).expect("FIFOs");
        // A shim has both ends, so that the process gets no error.
        let path = stdio.stdout().to_owned();
        let mut out = pipe::OpenOptions::new().open_sender(&path).expect("open");
        let kept = pipe::OpenOptions::new().open_receiver(&path).expect("open");
        out.write_all(b"before").await.expect("write");
        assert_eq!(said.recv().await.map(|o| o.bytes), Some(Bytes::from_static(b"before")));
        stdio.leave().await;
        out.write_all(b"between").await.expect("write");
        let (next, mut said) = mpsc::channel(4);
        let next = Destination::Direct(OutputTarget::Queue(next));
        let stdio = Stdio::reopen(dir.path(), &next).expect("the same FIFOs");
        assert_eq!(said.recv().await.map(|o| o.bytes), Some(Bytes::from_static(b"between")));
        drop((out, kept, next));
        stdio.drain(Duration::from_secs(5)).await;
        assert!(said.recv().await.is_none());
        // With both of its ends closed there is nothing to wait for.
        let (last, mut said) = mpsc::channel(4);
        let last = Destination::Direct(OutputTarget::Queue(last));
        let mut stdio = Stdio::reopen(dir.path(), &last).expect("the same FIFOs");
        while stdio.readers.join_next().await.is_some() {}
        drop((stdio, last));
        assert!(said.recv().await.is_none());
    }
}
