//! A whole blob for those who read, where the engine writes.

use crate::{Report, Whole};
use bytes::{Buf as _, Bytes};
use shipway_estargz::Toc;
use shipway_fault::Fault;
use shipway_layerstore::Layer;
use std::{
    io::{self, Read},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

/// Pieces that wait for the reader.
const PIECES: usize = 4;

/// Has a blob read on a thread of its own.
pub struct Finish {
    /// `None` is the end; without it the blob was not read to its end.
    pieces: SyncSender<Option<Bytes>>,
    thread: Option<JoinHandle<Result<(), Fault>>>,
}

impl Finish {
    /// For `layer`, which was made with `toc`, by [`Layer::finish`], or [`Layer::finish_plain`] if
    /// it is a plain one, which needs none.
    pub fn new(layer: Arc<Layer>, toc: Option<Arc<Toc>>, report: Report) -> io::Result<Self> {
        Self::reading(move |blob| {
            let good = &mut |good| report(good);
            let finished = match toc {
                Some(toc) => layer.finish(&toc, blob, good),
                None => layer.finish_plain(blob, good),
            };
            finished.map_err(Fault::from)
        })
    }

    /// For `read`, which is given the blob. Unless its end is read there is an error.
    pub fn reading(
        read: impl FnOnce(&mut dyn Read) -> Result<(), Fault> + Send + 'static,
    ) -> io::Result<Self> {
        let (pieces, receiver) = sync_channel(PIECES);
        let mut blob = Blob { pieces: receiver, piece: Bytes::new(), is_over: false };
        let thread = std::thread::Builder::new().name("whole layer".to_owned());
        Ok(Self { pieces, thread: Some(thread.spawn(move || read(&mut blob))?) })
    }

    fn send(&mut self, piece: Option<Bytes>) -> Result<(), Fault> {
        if self.pieces.send(piece).is_ok() {
            return Ok(());
        }
        // The reader has stopped.
        self.end()?;
        Err(Fault::internal("the blob was not read to its end"))
    }

    fn end(&mut self) -> Result<(), Fault> {
        let panicked = |_| Err(Fault::internal("reading a whole layer panicked"));
        self.thread.take().map_or(Ok(()), |thread| thread.join().unwrap_or_else(panicked))
    }
}

impl Whole for Finish {
    fn bytes(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        self.send(Some(bytes.clone()))
    }

    fn finish(mut self: Box<Self>) -> Result<(), Fault> {
        self.send(None)?;
        self.end()
    }
}

struct Blob {
    pieces: Receiver<Option<Bytes>>,
    piece: Bytes,
    is_over: bool,
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.is_over {
            match self.pieces.recv() {
                Ok(Some(piece)) => self.piece = piece,
                Ok(None) => self.is_over = true,
                Err(_) => return Err(io::Error::other("the rest of the blob was not fetched")),
            }
        }
        let taken = self.piece.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&self.piece[..taken]);
        self.piece.advance(taken);
        Ok(taken)
    }
}
