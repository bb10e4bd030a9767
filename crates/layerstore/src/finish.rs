//! Reads a whole blob: stores what is missing, and finds out whether the layer's tar is what its
//! table of contents says.

use crate::{Chunk, ChunkId, Error, Good, Layer, Result, State, layer::Open};
use shipway_archive::TarReader;
use shipway_estargz::{Comparison, Frames, Kind, MAX_TOC, TarEntry, Toc};
use shipway_oci::{Digest, Hasher};
use std::{
    io::{self, BufReader, Read},
    ops::Range,
};

/// Bytes of contents that are read at once.
const BUFFER: usize = 64 << 10;

impl Layer {
    /// Reads the whole `blob`, in one pass, from its first byte to its last. What is missing of the
    /// layer's data is stored on the way, and what is good by that handed to `good`.
    ///
    /// `toc` is the table of contents that the layer was made with. If the blob's digest is right
    /// and the tar says the same as the table, the layer is [`State::Whole`] then, and all of it on
    /// the disk. If the tar says something else, it is [`State::Lying`] from then on, which is an
    /// error as well ([`Error::Lying`]). Every other error changes nothing but that some chunks may
    /// be there.
    pub fn finish(&self, toc: &Toc, blob: impl Read, good: &mut dyn FnMut(Good)) -> Result<()> {
        let layer = self.number();
        if self.is_plain() {
            return Err(Error::Foreign("table of contents"));
        }
        if let State::Lying(difference) = self.state() {
            return Err(Error::Lying { layer, difference });
        }
        let mut blob = BufReader::with_capacity(BUFFER, Blob::new(blob.take(self.blob_size() + 1)));
        let compared = self.compare(toc, &mut blob, good);
        let failed = |error| Error::io(format_args!("read the blob of layer {layer}"), error);
        let compared = match compared {
            // What the reader cannot give says nothing of the layer.
            Err(Failure::Tar(error)) if blob.get_ref().has_failed => return Err(failed(error)),
            Err(Failure::Store(error)) => return Err(error),
            Err(Failure::Tar(error)) => Some(format!("it cannot be unpacked: {error}")),
            Err(Failure::Difference(difference)) => Some(difference),
            Ok(()) => None,
        };
        // Whatever it says of the tar, it counts only if these are the right bytes.
        io::copy(&mut blob, &mut io::sink()).map_err(failed)?;
        let (actual, size) = blob.into_inner().finish();
        let expected = self.key().blob;
        if actual != expected || size != self.blob_size() {
            return Err(Error::Blob { layer, expected, actual });
        }
        if let Some(difference) = compared {
            self.mark_lying(&difference)?;
            return Err(Error::Lying { layer, difference });
        }
        // Nothing in the blob is about chunks of zeros.
        self.verify_zeros(good)?;
        self.mark_whole()
    }

    /// Makes good what has to be no more than zeros.
    pub(crate) fn verify_zeros(&self, good: &mut dyn FnMut(Good)) -> Result<()> {
        let open = self.open()?;
        let mut ids = 0..self.chunks();
        loop {
            ids.start = open.next_unverified(&ids);
            if ids.is_empty() {
                return Ok(());
            }
            let chunk = Chunk { id: ChunkId(ids.start), record: open.index.get(ids.start)? };
            match self.verify_local(&chunk)? {
                Some(blocks) => good(blocks),
                // It was in the tar, and somebody has taken it away again.
                None => return Ok(()),
            }
            ids.start += 1;
        }
    }

    fn compare(
        &self,
        toc: &Toc,
        blob: &mut BufReader<Blob<impl Read>>,
        good: &mut dyn FnMut(Good),
    ) -> Result<(), Failure> {
        let open = self.open()?;
        let first = self.first_chunks(toc, open)?;
        let frames =
            Frames::new(self.codec(), blob).map_err(|e| Failure::Tar(io::Error::other(e)))?;
        let mut tar = TarReader::new(BufReader::with_capacity(BUFFER, frames));
        let mut comparison = Comparison::new(toc, self.codec());
        let mut buffer = vec![0; BUFFER];
        while let Some(member) = tar.next_member()? {
            let known = comparison.entry(&TarEntry::from(&member));
            // The table of contents itself; everything else that is not known is a difference.
            if known.is_none() && comparison.difference().is_none() && member.size > MAX_TOC {
                let difference = "its table of contents is too long".to_owned();
                return Err(Failure::Difference(difference));
            }
            let mut writer = None;
            if let Some(id) = known
                && let Kind::File { chunks: chunks @ [_, ..], .. } = toc.entry(id).kind()
                && let Some(first) = first[id.index()]
            {
                let ids = first..first + chunks.len() as u32;
                writer = Some(Writer { layer: self, open, ids, chunk: None, data: Vec::new() });
            }
            let mut at = 0;
            let mut data = |comparison: &mut Comparison<'_>, bytes: &[u8]| -> Result<()> {
                comparison.data(bytes);
                match &mut writer {
                    Some(writer) => writer.data(bytes, good),
                    None => Ok(()),
                }
            };
            // After a difference nothing is of interest, and of a file that is not known there may
            // be no end.
            while comparison.difference().is_none() {
                let piece = tar.piece(&mut buffer)?;
                let zeros_to = piece.map_or(member.size, |piece| piece.offset);
                if known.is_some() {
                    let zeros = [0; 4096];
                    while at < zeros_to && comparison.difference().is_none() {
                        let now = zeros.len().min((zeros_to - at) as usize);
                        data(&mut comparison, &zeros[..now])?;
                        at += now as u64;
                    }
                }
                let Some(piece) = piece else { break };
                data(&mut comparison, &buffer[..piece.len])?;
                at = piece.offset + piece.len as u64;
            }
            if comparison.difference().is_some() {
                break;
            }
        }
        match comparison.finish() {
            Some(difference) => Err(Failure::Difference(difference.to_string())),
            None => Ok(()),
        }
    }

    /// Where in the index the chunks of each entry begin, if they are there. An error if the index
    /// is not that of `toc`.
    fn first_chunks(&self, toc: &Toc, open: &Open) -> Result<Vec<Option<u32>>> {
        let (mut first, mut next) = (vec![None; toc.len()], 0u32);
        let foreign = || Error::Foreign("table of contents");
        for (id, _) in toc.data_starts() {
            let Kind::File { chunks, .. } = toc.entry(id).kind() else { continue };
            first[id.index()] = Some(next);
            next = u32::try_from(chunks.len())
                .ok()
                .and_then(|n| next.checked_add(n))
                .filter(|next| *next <= open.index.count)
                .ok_or_else(foreign)?;
        }
        if next != open.index.count {
            return Err(foreign());
        }
        for (chunk, record) in open.index.chunks(0..open.index.count).zip(toc.records()) {
            if chunk?.record != record {
                return Err(foreign());
            }
        }
        Ok(first)
    }
}

/// Stores what is missing of a file as its contents come.
struct Writer<'a> {
    layer: &'a Layer,
    open: &'a Open,
    /// Chunks that did not begin.
    ids: Range<u32>,
    /// The chunk that is being read, how much of it came, and whether it is wanted.
    chunk: Option<(Chunk, u64, bool)>,
    data: Vec<u8>,
}

impl Writer<'_> {
    fn data(&mut self, mut bytes: &[u8], good: &mut dyn FnMut(Good)) -> Result<()> {
        while !bytes.is_empty() {
            let (chunk, have, is_wanted) = match &mut self.chunk {
                Some(chunk) => chunk,
                none => {
                    let Some(id) = self.ids.next() else { return Ok(()) };
                    let record = self.open.index.get(id)?;
                    let is_wanted = record.digest.is_some() && !self.open.is_verified(id);
                    self.data.clear();
                    none.insert((Chunk { id: ChunkId(id), record }, 0, is_wanted))
                }
            };
            let left = usize::try_from(chunk.record.size - *have).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            *have += now.len() as u64;
            bytes = later;
            if *is_wanted {
                self.data.extend_from_slice(now);
            }
            if *have == chunk.record.size {
                if *is_wanted {
                    match self.layer.write(chunk, &self.data) {
                        Ok(blocks) => good(blocks),
                        // The comparison finds it as well.
                        Err(Error::Digest { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                self.chunk = None;
            }
        }
        Ok(())
    }
}

/// Why a comparison ended before the tar did.
enum Failure {
    /// The tar cannot be read.
    Tar(io::Error),
    /// It says something else than the table of contents.
    Difference(String),
    /// Nothing that is to be blamed on the blob.
    Store(Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Tar(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

/// Hashes and counts what is read, and notes whether reading failed.
pub(crate) struct Blob<R> {
    inner: R,
    hasher: Hasher,
    size: u64,
    pub(crate) has_failed: bool,
}

impl<R> Blob<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, hasher: Hasher::new(), size: 0, has_failed: false }
    }

    /// Digest and length of what was read.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (self.hasher.finish(), self.size)
    }
}

impl<R: Read> Read for Blob<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer);
        match &read {
            Ok(n) => {
                self.hasher.update(&buffer[..*n]);
                self.size += *n as u64;
            }
            Err(e) => self.has_failed |= e.kind() != io::ErrorKind::Interrupted,
        }
        read
    }
}
