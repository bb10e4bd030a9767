//! What goes between a process and whoever started it (rows `gw.exec.*`).

use crate::{Output, OutputSink};
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// What a process is told while it runs.
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
    /// Takes what nobody wants.
    pub fn discard() -> Self {
        Self::Sink(Arc::new(drop))
    }

    /// Hands a piece on; false when nobody takes it any more.
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
    /// What it is told.
    pub control: Option<mpsc::Receiver<Control>>,
    /// Is told when it runs.
    pub started: Option<oneshot::Sender<()>>,
}

impl ProcessIo {
    /// A process that only writes.
    pub fn output(sink: OutputSink) -> Self {
        Self { input: None, output: OutputTarget::Sink(sink), control: None, started: None }
    }
}
