//! The one pass over a blob that finds its spans.

use crate::{
    Error, Result,
    checkpoints::{Checkpoint, Checkpoints},
    engine::{Engine, Entry, Place},
    table::{self, MAX_COMPRESSED, MAX_SPAN, MAX_SPANS, Noted, SPAN},
};
use shipway_estargz::Codec;
use shipway_oci::{Digest, Hasher};
use std::{
    cell::{Cell, RefCell},
    io::{self, Read},
    ops::Range,
    rc::Rc,
};

/// Bytes of the blob that are read at once.
const BUFFER: usize = 64 << 10;

/// How far a [`Scanner`] is, for those who read through something else.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of the tar that were read.
    read: Cell<u64>,
    spans: RefCell<Vec<Noted>>,
}

impl Progress {
    /// Bytes of the tar that were read.
    pub fn read(&self) -> u64 {
        self.read.get()
    }

    /// Of the span that the byte at `at` of the tar is in, which was read: where it begins in the
    /// blob and in the tar, and where in the tar it ends as far as that is known.
    pub(crate) fn span_of(&self, at: u64) -> (u64, Range<u64>) {
        let spans = self.spans.borrow();
        let next = spans.partition_point(|span| span.start <= at);
        let end = spans.get(next).map_or(u64::MAX, |span| span.start);
        spans.get(next.saturating_sub(1)).map_or((0, 0..end), |s| (s.offset, s.start..end))
    }
}

/// Decompresses a blob, and notes where that can be resumed.
pub struct Scanner<R> {
    input: R,
    codec: Codec,
    engine: Engine,
    buffer: Box<[u8]>,
    /// What of the buffer is not decompressed.
    unread: Range<usize>,
    /// What was decompressed and not read.
    ready: Range<usize>,
    /// Compressed bytes that are done with, and what came of them.
    done: (u64, u64),
    /// Bytes of the tar after which a span ends.
    length: u64,
    /// Where the current span begins, likewise.
    span: (u64, u64),
    place: Place,
    blob: Hasher,
    tar: Hasher,
    progress: Rc<Progress>,
    /// Whether to go on where the blob cannot be resumed, and whether it can be so far.
    allow_long: bool,
    resumable: bool,
    checkpoints: Option<Checkpoints>,
    failed: Option<Error>,
}

/// What a whole blob was.
#[derive(Debug)]
pub struct Scan {
    /// Digest of the blob.
    pub blob: Digest,
    /// Its length.
    pub size: u64,
    /// Digest of the tar.
    pub diff_id: Digest,
    /// Length of the tar.
    pub tar_size: u64,
    codec: Codec,
    resumable: bool,
    spans: Vec<Noted>,
    pub(crate) checkpoints: Vec<Checkpoint<'static>>,
    /// Bytes of the tar that their spans have more than.
    pub(crate) checkpoint_length: u64,
}

impl<R: Read> Scanner<R> {
    /// For the whole blob `input`.
    pub fn new(codec: Codec, input: R) -> io::Result<Self> {
        let progress = Rc::<Progress>::default();
        progress.spans.borrow_mut().push(Noted::new(0, 0, Entry::Frame));
        Ok(Self {
            input,
            codec,
            engine: Engine::new(codec)?,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            unread: 0..0,
            ready: 0..0,
            done: (0, 0),
            length: SPAN,
            span: (0, 0),
            place: Place::Frame,
            blob: Hasher::new(),
            tar: Hasher::new(),
            progress,
            allow_long: false,
            resumable: true,
            checkpoints: None,
            failed: None,
        })
    }

    /// With spans of at least `length` bytes of the tar instead of [`SPAN`].
    pub fn spans_of(self, length: u64) -> Self {
        Self { length, ..self }
    }

    /// Goes on where it would fail with [`Error::LongSpan`]: the blob is read to its end, in pieces
    /// of the same length, and [`Scan::is_resumable`] says that they cannot be decompressed alone.
    pub fn allow_long_spans(self) -> Self {
        Self { allow_long: true, ..self }
    }

    /// Notes the checkpoints of a zTOC besides, with spans of more than `length` bytes of the tar:
    /// for [`Scan::ztoc`].
    pub fn with_checkpoints(self, length: u64) -> Self {
        Self { checkpoints: Some(Checkpoints::new(length)), ..self }
    }

    /// How far it is.
    pub fn progress(&self) -> Rc<Progress> {
        self.progress.clone()
    }

    /// Reads the blob to its end, whatever of the tar was read.
    pub fn finish(mut self) -> Result<Scan> {
        let drained = io::copy(&mut self, &mut io::sink());
        if let Some(error) = self.failed {
            return Err(error);
        }
        drained?;
        let mut spans = self.progress.spans.take();
        // One that began where the blob has ended.
        spans.pop_if(|span| span.offset == self.done.0);
        Ok(Scan {
            blob: self.blob.finish(),
            size: self.done.0,
            diff_id: self.tar.finish(),
            tar_size: self.done.1,
            codec: self.codec,
            resumable: self.resumable,
            spans,
            checkpoint_length: self.checkpoints.as_ref().map_or(0, |all| all.length),
            checkpoints: self.checkpoints.map(Checkpoints::finish).unwrap_or_default(),
        })
    }

    /// Why reading failed, if that was not the reader's fault: what [`Read`] says of it is less.
    pub fn take_error(&mut self) -> Option<Error> {
        self.failed.take()
    }

    /// Decompresses some more; whether there was any.
    fn advance(&mut self) -> Result<bool> {
        if self.unread.is_empty() {
            let n = loop {
                match self.input.read(&mut self.buffer) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    read => break read?,
                }
            };
            self.blob.update(&self.buffer[..n]);
            self.unread = 0..n;
            if n == 0 && self.place == Place::Frame {
                return Ok(false);
            }
        }
        let is_end = self.unread.is_empty();
        let step = self.engine.step(&self.buffer[self.unread.clone()])?;
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.consumed(&self.buffer[self.unread.clone()][..step.consumed]);
        }
        if is_end && !step.is_progress() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.unread.start += step.consumed;
        let produced = self.engine.bytes(step.produced.clone());
        self.tar.update(produced);
        self.done.0 += step.consumed as u64;
        self.done.1 += produced.len() as u64;
        (self.ready, self.place) = (step.produced, step.place);
        if let Some(checkpoints) = &mut self.checkpoints
            && matches!(self.place, Place::Block | Place::FirstBlock)
        {
            checkpoints.block(self.done, || self.engine.block_start())?;
        }
        let (compressed, bytes) = (self.done.0 - self.span.0, self.done.1 - self.span.1);
        for (bytes, limit) in [(bytes, MAX_SPAN), (compressed, MAX_COMPRESSED)] {
            if bytes > limit && self.resumable {
                if !self.allow_long {
                    return Err(Error::LongSpan { start: self.span.1, bytes, limit });
                }
                self.resumable = false;
            }
        }
        // Where nothing can be resumed pieces begin anywhere, but not two at the same byte.
        let may_end = match self.resumable {
            true => matches!(self.place, Place::Block | Place::Frame),
            false => compressed > 0,
        };
        if bytes >= self.length && may_end {
            self.span = self.done;
            let mut spans = self.progress.spans.borrow_mut();
            if spans.len() == MAX_SPANS {
                return Err(Error::ManySpans { limit: MAX_SPANS });
            }
            let entry = if self.resumable { self.engine.entry() } else { Entry::Frame };
            spans.push(Noted::new(self.done.0, self.done.1, entry));
        }
        Ok(true)
    }
}

impl<R: Read> Read for Scanner<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while self.ready.is_empty() {
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return Ok(0),
                Err(Error::Io(error)) => return Err(error),
                Err(error) => {
                    let said = io::Error::other(error.to_string());
                    self.failed = Some(error);
                    return Err(said);
                }
            }
        }
        let n = buffer.len().min(self.ready.len());
        buffer[..n].copy_from_slice(self.engine.bytes(self.ready.start..self.ready.start + n));
        self.ready.start += n;
        self.progress.read.set(self.progress.read.get() + n as u64);
        Ok(n)
    }
}

impl Scan {
    /// Whether the blob can be decompressed from each of its spans. It can, unless
    /// [`Scanner::allow_long_spans`] was asked for.
    pub fn is_resumable(&self) -> bool {
        self.resumable
    }

    /// The spans as a file, which is of use if they are [resumable](Scan::is_resumable).
    pub fn encode(&self) -> Vec<u8> {
        table::encode(&self.blob, self.codec, &self.spans, (self.size, self.tar_size))
    }

    /// Where in the blob the span ends that begins at `offset`.
    pub(crate) fn end_of(&self, offset: u64) -> u64 {
        let next = self.spans.partition_point(|span| span.offset <= offset);
        self.spans.get(next).map_or(self.size, |span| span.offset)
    }
}
