//! The ports to where images are.

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use shipway_archive::{
    Compression, CompressionKind, FirstFiles, Packed, ReadFirst, recompress, recompress_in_order,
};
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName};
use shipway_registry::BodyStream;
use shipway_task::blocking;
use std::{collections::HashMap, fs::File, ops::Range, os::unix::fs::FileExt as _, sync::Arc};
use tokio::{sync::mpsc, task::AbortHandle};

pub use bytes::Bytes;

/// Pieces of a layer on their way to the thread that packs.
const IN_FLIGHT: usize = 8;
/// Bytes of a file that are read at once.
const PIECE: u64 = 256 << 10;

/// The `len` bytes of `file` from `start`.
pub fn file_stream(file: &Arc<File>, start: u64, len: u64) -> BodyStream {
    let next = |(file, at, end): (Arc<File>, u64, u64)| async move {
        let want = PIECE.min(end - at);
        if want == 0 {
            return Ok(None);
        }
        let (file, piece) = blocking("read a file of layers", move || {
            let mut piece = vec![0; want as usize];
            file.read_exact_at(&mut piece, at)
                .map_err(|e| Fault::io("read a file of layers", e))?;
            Ok((file, Bytes::from(piece)))
        })
        .await?;
        Ok(Some((piece, (file, at + want, end))))
    };
    stream::try_unfold((file.clone(), start, start.saturating_add(len)), next).boxed()
}

/// How far a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The blob as it was.
    pub digest: Digest,
    /// Whether it is compressed anew, or only copied.
    pub converts: bool,
    /// Bytes of it that were read.
    pub done: u64,
    /// Bytes that it has.
    pub size: u64,
}

/// Hears how far layers are.
pub type Progress = Arc<dyn Fn(Step) + Send + Sync>;

/// An image to be read.
#[async_trait]
pub trait Source: Send + Sync {
    /// What its name leads to.
    async fn root(&self) -> Result<Descriptor>;

    /// A manifest or index, checked.
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes>;

    /// A config, checked.
    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes>;

    /// The bytes of a blob, which fail at the end if they are not what the digest says.
    async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream>;

    /// What refers to the manifest `subject` beside it, such as signatures.
    async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>> {
        let _ = subject;
        Ok(Vec::new())
    }

    /// A repository that has `blob`, if one is known: registries copy among their own.
    fn origin(&self, blob: &Descriptor) -> Option<ImageName> {
        let _ = blob;
        None
    }
}

/// Where an image is written with other layers.
#[async_trait]
pub trait LayerTarget: Target {
    /// Makes a layer of `input`, which is compressed as `from` says.
    async fn layer(&self, input: Input, from: CompressionKind, packing: &Packing)
    -> Result<Packed>;
}

/// Where an image is written.
#[async_trait]
pub trait Target: Send + Sync {
    /// Copies a blob as it is.
    async fn copy(
        &self,
        descriptor: &Descriptor,
        source: &Arc<dyn Source>,
        progress: &Progress,
    ) -> Result<()>;

    /// Writes a config.
    async fn config(&self, descriptor: &Descriptor, bytes: Bytes) -> Result<()>;

    /// Writes a manifest or index over `children`, which are there.
    async fn manifest(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        children: &[Digest],
    ) -> Result<()>;

    /// Points the image's name at `root`, when everything is there.
    async fn finish(&self, root: &Descriptor) -> Result<()>;
}

/// How layers are made.
#[derive(Clone, Debug, Default)]
pub struct Packing {
    /// How they are compressed.
    pub compression: Compression,
    /// What is read first of the image, if that is known: it comes first in each layer, and a
    /// landmark behind it.
    pub first: Option<First>,
}

/// What is read first of an image.
#[derive(Clone, Debug)]
pub enum First {
    /// Paths of its files in the order in which they are read.
    Paths(Arc<[Vec<u8>]>),
    /// By blob, pieces of the file of data that a snapshotter has of the layer, in that order.
    Pieces(Arc<HashMap<Digest, Vec<Range<u64>>>>),
}

impl First {
    /// What is read first of the layer with the blob `layer`.
    fn of(&self, layer: Digest) -> FirstFiles<'_> {
        match self {
            Self::Paths(paths) => FirstFiles::Paths(paths),
            Self::Pieces(all) => FirstFiles::Pieces(all.get(&layer).map_or(&[], Vec::as_slice)),
        }
    }
}

impl Packing {
    /// Makes a layer of `input`, which is compressed as `from` says, on a thread that may block.
    pub fn pack(
        &self,
        mut input: Input,
        from: CompressionKind,
        sink: &mut dyn FnMut(Bytes) -> Result<()>,
    ) -> Result<Packed> {
        let layer = input.digest;
        let input = &mut || input.next_piece();
        let first = self.first.as_ref().filter(|_| self.compression.kind.is_indexed());
        let Some(first) = first else {
            return recompress(input, from, self.compression, None, sink);
        };
        let spool =
            tempfile::tempfile().map_err(|e| Fault::io("make a temporary file for a layer", e))?;
        let first = ReadFirst { files: first.of(layer), spool };
        recompress_in_order(input, from, self.compression, first, None, sink)
    }
}

/// The bytes of a layer for a thread that packs; reading them ends with this.
pub struct Input {
    digest: Digest,
    pieces: mpsc::Receiver<Result<Bytes>>,
    reading: AbortHandle,
}

impl Input {
    pub(crate) fn new(
        mut stream: BodyStream,
        descriptor: &Descriptor,
        progress: &Progress,
    ) -> Self {
        let (send, pieces) = mpsc::channel(IN_FLIGHT);
        let (digest, size, progress) = (descriptor.digest, descriptor.size, progress.clone());
        let reading = shipway_task::spawn("read a layer", async move {
            let mut done = 0;
            while let Some(piece) = stream.next().await {
                let failed = piece.is_err();
                done += piece.as_ref().map_or(0, |piece| piece.len() as u64);
                progress(Step { digest, converts: true, done, size });
                if send.send(piece).await.is_err() || failed {
                    return;
                }
            }
        });
        Self { digest, pieces, reading: reading.abort_handle() }
    }

    /// The next bytes. Blocks: not for async threads.
    pub fn next_piece(&mut self) -> Result<Option<Bytes>> {
        self.pieces.blocking_recv().transpose()
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.reading.abort();
    }
}
