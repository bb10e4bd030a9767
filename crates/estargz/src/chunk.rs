//! Data of files, out of frames: decompressed as far as needed, and given out only if its digest is
//! right.

use crate::{
    Chunk, Codec, Content, Error, MAX_CHUNK, Result, Toc,
    codec::Frames,
    error::{ChunkProblem, Shown},
};
use shipway_oci::Digest;
use std::{
    cell::Cell,
    io::{self, BufRead, Read},
};

impl Toc {
    /// Reads the data of `chunks`, which must be of one frame and in order ([`Toc::frames`], or
    /// some of one of its slices), from `compressed`: the bytes of the blob from [`Chunk::offset`],
    /// as far as the last one's [`Chunk::end`]. Each chunk whose digest is right is handed to
    /// `sink`; the first that is wrong ends it.
    ///
    /// No more is decompressed than the chunks need, and no more than one is in memory. Chunks of
    /// zeros are handed over empty.
    pub fn read_frame(
        &self,
        codec: Codec,
        chunks: &[Chunk],
        compressed: impl BufRead,
        mut sink: impl FnMut(&Chunk, &[u8]) -> io::Result<()>,
    ) -> Result<()> {
        let input_failed = Cell::new(false);
        let compressed = Input { input: compressed, failed: &input_failed };
        let failed = |chunk: &Chunk, error: io::Error| match error.kind() {
            _ if input_failed.get() => Error::Io(error),
            io::ErrorKind::UnexpectedEof => self.bad(chunk, ChunkProblem::Short),
            _ => self.bad(chunk, ChunkProblem::Corrupt(error.to_string())),
        };
        let mut frames = None;
        let (mut compressed, mut at, mut data) = (Some(compressed), 0, Vec::new());
        for chunk in chunks {
            let Content::Data(expected) = chunk.content else {
                sink(chunk, &[])?;
                continue;
            };
            let frames = match (&mut frames, compressed.take()) {
                (Some(frames), _) => frames,
                (none, Some(compressed)) => none.insert(Frames::new(codec, compressed)?),
                (None, None) => return Err(self.bad(chunk, ChunkProblem::Short)),
            };
            let skip = chunk
                .inner
                .checked_sub(at)
                .ok_or_else(|| io::Error::other("chunks of a frame are out of order"))?;
            let skipped =
                io::copy(&mut frames.take(skip), &mut io::sink()).map_err(|e| failed(chunk, e))?;
            data.clear();
            // More is reserved only as data comes, for the size is the index's word.
            frames.take(chunk.size).read_to_end(&mut data).map_err(|e| failed(chunk, e))?;
            if skipped < skip || (data.len() as u64) < chunk.size {
                return Err(self.bad(chunk, ChunkProblem::Short));
            }
            at = chunk.inner + chunk.size;
            let actual = Digest::of(&data);
            if actual != expected {
                return Err(self.bad(chunk, ChunkProblem::Digest { expected, actual }));
            }
            sink(chunk, &data)?;
        }
        Ok(())
    }

    /// Reads one chunk, as [`Toc::read_frame`] does; zeros are put in, too, if they are no more
    /// than [`MAX_CHUNK`].
    pub fn read_chunk(
        &self,
        codec: Codec,
        chunk: &Chunk,
        compressed: impl BufRead,
    ) -> Result<Vec<u8>> {
        if chunk.size > MAX_CHUNK {
            return Err(Error::TooLarge { what: "a chunk", size: chunk.size, limit: MAX_CHUNK });
        }
        let mut data = Vec::new();
        self.read_frame(codec, std::slice::from_ref(chunk), compressed, |chunk, bytes| {
            data.extend_from_slice(bytes);
            data.resize(chunk.size as usize, 0);
            Ok(())
        })?;
        Ok(data)
    }

    fn bad(&self, chunk: &Chunk, problem: ChunkProblem) -> Error {
        Error::Chunk {
            name: Shown::new(self.entry(chunk.file).path()),
            file_offset: chunk.file_offset,
            problem,
        }
    }
}

/// Compressed bytes, and whether reading them failed: an error of the reader is none of the bytes.
struct Input<'a, R> {
    input: R,
    failed: &'a Cell<bool>,
}

impl<R> Input<'_, R> {
    fn note<T>(failed: &Cell<bool>, read: io::Result<T>) -> io::Result<T> {
        failed.set(
            failed.get() || read.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted),
        );
        read
    }
}

impl<R: Read> Read for Input<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Self::note(self.failed, self.input.read(buf))
    }
}

impl<R: BufRead> BufRead for Input<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        Self::note(self.failed, self.input.fill_buf())
    }

    fn consume(&mut self, n: usize) {
        self.input.consume(n);
    }
}
