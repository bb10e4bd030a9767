//! Layers without a table of contents: made of a blob that was read as a whole, with the places
//! where it can be decompressed from (crate `plainlayer`) in a file of their own.

use crate::{
    Chunk, Description, Error, Good, Layer, LayerKey, LayerStore, Result,
    finish::Blob,
    spans::damaged,
    written::{Data, Made},
};
use shipway_archive::TarReader;
use shipway_estargz::{Codec, TarEntry, TarKind, Toc};
use shipway_oci::{DiffId, Digest};
use shipway_plainlayer::{Maker, SPAN, Scan, Scanner};
use std::{
    io::{self, Read},
    sync::Arc,
};

/// Bytes of contents that are read at once.
const BUFFER: usize = 64 << 10;

impl LayerKey {
    /// That of a blob that has no table of contents. Which one is made of it is our own affair.
    pub fn plain(blob: Digest) -> Self {
        Self { blob, toc: Digest::of("plain layer") }
    }
}

/// What a plain layer is made of.
#[derive(Debug)]
pub struct Plain {
    scan: Scan,
    toc: Toc,
    codec: Codec,
}

impl Plain {
    /// Reads a whole blob, in one pass. Whether it is the one that is wanted says
    /// [`Plain::digest`].
    pub fn read(codec: Codec, blob: impl Read) -> Result<Self> {
        Self::with_spans_of(SPAN, codec, blob)
    }

    /// With spans of at least `length` bytes of the tar.
    pub fn with_spans_of(length: u64, codec: Codec, blob: impl Read) -> Result<Self> {
        let scanner = Scanner::new(codec, blob).map_err(shipway_plainlayer::Error::from)?;
        Self::of(codec, scanner.spans_of(length), None)
    }

    /// Reads all that comes out of `scanner`, and writes the contents of files to `data`.
    pub(crate) fn of(
        codec: Codec,
        mut scanner: Scanner<impl Read>,
        data: Option<&mut Data>,
    ) -> Result<Self> {
        match Self::scan(codec, &mut scanner, data) {
            Ok(maker) => {
                let scan = scanner.finish()?;
                let toc = maker.finish(&scan)?;
                Ok(Self { scan, toc, codec })
            }
            // What the scanner met is more than what the reader of tars says of it.
            Err(error) => Err(scanner.take_error().map_or(error, Error::from)),
        }
    }

    fn scan(
        codec: Codec,
        scanner: &mut Scanner<impl Read>,
        mut data: Option<&mut Data>,
    ) -> Result<Maker> {
        let read = |error| Error::from(shipway_plainlayer::Error::Io(error));
        let mut maker = Maker::new(codec, scanner.progress());
        // No buffer between: the maker goes by what the scanner was asked for.
        let mut tar = TarReader::new(scanner);
        let mut buffer = vec![0; BUFFER];
        while let Some(member) = tar.next_member().map_err(read)? {
            let entry = TarEntry::from(&member);
            maker.entry(&entry)?;
            if let Some(data) = &mut data {
                let size = if let TarKind::File(size) = entry.kind { size } else { 0 };
                data.entry(&entry.path, size);
            }
            let mut at = 0;
            while let Some(piece) = tar.piece(&mut buffer).map_err(read)? {
                if piece.offset != at {
                    break;
                }
                let bytes = &buffer[..piece.len];
                maker.data(bytes)?;
                if let Some(data) = &mut data {
                    data.write(bytes)?;
                }
                at += piece.len as u64;
            }
            if at != member.size {
                let name = String::from_utf8_lossy(&member.path).chars().take(200).collect();
                return Err(shipway_plainlayer::Error::Sparse(name).into());
            }
        }
        Ok(maker)
    }

    /// Digest of the blob that was read.
    pub fn digest(&self) -> Digest {
        self.scan.blob
    }

    /// Digest of its tar.
    pub fn diff_id(&self) -> DiffId {
        DiffId(self.scan.diff_id)
    }

    /// What is in it.
    pub fn toc(&self) -> &Toc {
        &self.toc
    }
}

impl LayerStore {
    /// Makes a layer that was seen in `repository`, `host/name`, of a blob that was read. If it is
    /// there, this is that layer.
    ///
    /// [`Error::Refused`] if the layer has to be unpacked.
    pub fn create_plain(&self, plain: &Plain, repository: &str) -> Result<Arc<Layer>> {
        self.create_of(plain, None, repository)
    }

    /// The same with all of its data, if it was written.
    pub(crate) fn create_of(
        &self,
        plain: &Plain,
        data: Option<&Data>,
        repository: &str,
    ) -> Result<Arc<Layer>> {
        let Plain { scan, toc, codec } = plain;
        let about =
            Description { blob_size: scan.size, codec: *codec, repository: repository.to_owned() };
        let spans = scan.is_resumable().then(|| scan.encode());
        let of = Made::Plain { diff_id: plain.diff_id(), spans: spans.as_deref(), data };
        self.create_with(LayerKey::plain(scan.blob), &about, toc, of)
    }
}

impl Layer {
    /// As [`Layer::finish`], for a plain layer: what its table of contents says was made of the
    /// blob, so that nothing is to be compared. If the layer [is indexed](Layer::is_indexed),
    /// everything is.
    pub fn finish_plain(&self, blob: impl Read, good: &mut dyn FnMut(Good)) -> Result<()> {
        if self.is_indexed() {
            return self.finish_indexed(blob, good);
        }
        let layer = self.number();
        let mut blob = Blob::new(blob.take(self.blob_size() + 1));
        let failed = |error| Error::io(format_args!("read the blob of layer {layer}"), error);
        let (open, mut ids, mut at) = (self.open()?, 0..self.chunks(), 0);
        let (mut wrong, mut bytes) = (None, Vec::new());
        while !ids.is_empty() && wrong.is_none() {
            let mut chunks: Vec<Chunk> = Vec::new();
            let (mut end, first) = (0, open.index.get(ids.start)?.offset);
            for chunk in open.index.chunks(ids.clone()) {
                let chunk = chunk?;
                if chunk.record.offset != first {
                    break;
                }
                ids.start += 1;
                end = end.max(first + u64::from(chunk.record.compressed));
                if chunk.record.digest.is_some() && !open.is_verified(chunk.id.0) {
                    chunks.push(chunk);
                }
            }
            if chunks.is_empty() {
                continue;
            }
            let skip = first.checked_sub(at).ok_or(Error::Foreign("frame"))?;
            io::copy(&mut (&mut blob).take(skip), &mut io::sink()).map_err(failed)?;
            bytes.clear();
            (&mut blob).take(end - first).read_to_end(&mut bytes).map_err(failed)?;
            at = end;
            let frame = crate::Frame { offset: first, len: end - first, chunks };
            match self.write_frame(&frame, &bytes[..], &mut *good) {
                Err(error) if error.is_wrong_bytes() => wrong = Some(()),
                written => written?,
            }
        }
        io::copy(&mut blob, &mut io::sink()).map_err(failed)?;
        let (actual, size) = blob.finish();
        let expected = self.key().blob;
        if actual != expected || size != self.blob_size() {
            return Err(Error::Blob { layer, expected, actual });
        }
        if wrong.is_some() {
            return Err(damaged(layer, "the blob has other contents"));
        }
        self.verify_zeros(good)?;
        self.mark_whole()
    }
}
