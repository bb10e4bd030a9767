//! What goes between a process and its caller (rows `gw.exec.*`).

use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Which stream output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output.
#[derive(Clone, Debug)]
pub struct Output {
    /// Where it came from.
    pub stream: Stream,
    /// The bytes, as they came.
    pub bytes: Bytes,
}

/// Takes output as it comes; must not block.
pub type OutputSink = Arc<dyn Fn(Output) + Send + Sync>;

/// A control message for a running process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// A signal by its number.
    Signal(u32),
    /// The terminal has this size now.
    Resize {
        /// Lines.
        rows: u32,
        /// Columns.
        columns: u32,
    },
}

/// Where a process writes to.
#[derive(Clone)]
pub enum OutputTarget {
    /// A function that takes everything as it comes.
    Sink(OutputSink),
    /// A queue: when it is full, the process waits.
    Queue(mpsc::Sender<Output>),
}

impl OutputTarget {
    /// Discards everything.
    pub fn discard() -> Self {
        Self::Sink(Arc::new(drop))
    }

    /// Hands a piece on; false when the receiver is gone.
    pub async fn put(&self, output: Output) -> bool {
        match self {
            Self::Sink(sink) => {
                sink(output);
                true
            }
            Self::Queue(queue) => queue.send(output).await.is_ok(),
        }
    }
}

/// The ends of everything that leads to a process.
pub struct ProcessIo {
    /// What it reads; the channel's end is the end of its input. Without one its input is empty.
    pub input: Option<mpsc::Receiver<Bytes>>,
    /// What it writes.
    pub output: OutputTarget,
    /// Control messages.
    pub control: Option<mpsc::Receiver<Control>>,
    /// Signaled when the process runs.
    pub started: Option<oneshot::Sender<()>>,
}

impl ProcessIo {
    /// A process that only writes.
    pub fn output(sink: OutputSink) -> Self {
        Self { input: None, output: OutputTarget::Sink(sink), control: None, started: None }
    }
}
