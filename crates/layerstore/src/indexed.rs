//! Layers without a table of contents of which somebody else made an index, a zTOC (crate
//! `plainlayer`): what it says is believed as far as who named its digest is, until the whole blob
//! was read. Then all of it is compared: entries, places, contents, and the digest of the tar.
//!
//! An index has digests of compressed spans only. What comes out of one whose digest is right gets
//! a digest of its own when it is written ([`crate::digests`]): by that it is recognized after a
//! restart of the machine, and compared at last.

use crate::{
    ChunkId, Description, Error, Good, Layer, LayerKey, LayerStore, Result, digests::ENTRIES,
    fetch::Frame, finish::Blob, layer::Open, written::Made,
};
use shipway_archive::{Member, TarReader};
use shipway_estargz::{Codec, DataPlaces, TarEntry, TarKind, Toc};
use shipway_oci::{DiffId, Digest, Hasher};
use shipway_plainlayer::{Scan, Scanner, Ztoc, ZtocEntry};
use std::{
    io::{self, Read},
    sync::Arc,
};

/// Bytes of contents that are read at once.
const BUFFER: usize = 64 << 10;
/// Bytes of a name that a difference repeats.
const MAX_SHOWN: usize = 200;

impl LayerKey {
    /// That of a blob whose index has the digest `ztoc`, in an image that says that its tar has the
    /// digest `diff_id`: one that is wrong about it harms itself alone.
    pub fn indexed(blob: Digest, ztoc: Digest, diff_id: DiffId) -> Self {
        let mut hasher = Hasher::new();
        hasher.update("indexed layer");
        hasher.update(ztoc.as_bytes());
        hasher.update(diff_id.0.as_bytes());
        Self { blob, toc: hasher.finish() }
    }
}

/// What an indexed layer is made of.
#[derive(Debug)]
pub struct Indexed {
    key: LayerKey,
    diff_id: DiffId,
    blob_size: u64,
    toc: Toc,
    spans: Vec<u8>,
    entries: Vec<u8>,
}

impl Indexed {
    /// Reads the zTOC of `blob`, which has `size` bytes and, as the image's config says, a tar with
    /// the digest `diff_id`. The caller has checked that it is the one that is wanted.
    pub fn read(ztoc: &[u8], blob: Digest, size: u64, diff_id: DiffId) -> Result<Self> {
        let read = Ztoc::read(ztoc)?;
        if read.blob_size() != size {
            return Err(shipway_plainlayer::Error::Ztoc("it is of another layer").into());
        }
        let (toc, spans) = read.index(&blob)?;
        let key = LayerKey::indexed(blob, Digest::of(ztoc), diff_id);
        let entries = read.entries_only();
        Ok(Self { key, diff_id, blob_size: size, toc, spans, entries })
    }

    /// What the layer is found by.
    pub fn key(&self) -> LayerKey {
        self.key
    }
}

impl LayerStore {
    /// Makes a layer that was seen in `repository`, `host/name`, of its index. If it is there, this
    /// is that layer.
    ///
    /// [`Error::Refused`] if the layer has to be unpacked.
    pub fn create_indexed(&self, indexed: &Indexed, repository: &str) -> Result<Arc<Layer>> {
        let Indexed { key, diff_id, blob_size, toc, spans, entries } = indexed;
        let about = Description {
            blob_size: *blob_size,
            codec: Codec::Gzip,
            repository: repository.to_owned(),
        };
        let of = Made::Index { diff_id: *diff_id, spans, entries };
        self.create_with(*key, &about, toc, of)
    }
}

/// What was found of a whole blob.
struct Walked {
    /// The first difference between its tar and the index.
    difference: Option<String>,
    /// Digests of the chunks, in their order.
    digests: Vec<Digest>,
    scan: Option<Scan>,
}

impl Layer {
    /// See [`Layer::finish_plain`]. What is missing is taken out of the blob's spans, as when they
    /// are fetched one by one. At the same time the blob is decompressed from its beginning to its
    /// end, without a word of the index, and what comes of that is compared with everything.
    pub(crate) fn finish_indexed(&self, blob: impl Read, good: &mut dyn FnMut(Good)) -> Result<()> {
        let layer = self.number();
        if let crate::State::Lying(difference) = self.state() {
            return Err(Error::Lying { layer, difference });
        }
        let open = self.open()?;
        let known = self.entries()?;
        let mut blob = Blob::new(blob.take(self.blob_size() + 1));
        let frames = self.extents(0..self.data_blocks())?;
        let frames = frames.flat_map(|extent| match extent {
            Ok(extent) => extent.frames.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        });
        let mut spans = SpansOf {
            blob: &mut blob,
            layer: self,
            frames,
            frame: None,
            bytes: Vec::new(),
            at: 0,
            good,
            failed: None,
        };
        spans.next_frame();
        let walked = walk(&mut spans, &known, open);
        // Whatever it says of the tar, it counts only if these are the right bytes.
        let drained = io::copy(&mut spans, &mut io::sink());
        let failed = spans.failed.take();
        let io = |error| Error::io(format_args!("read the blob of layer {layer}"), error);
        drained.map_err(io)?;
        if blob.has_failed {
            return Err(io(io::Error::other("it was not read to its end")));
        }
        let (actual, size) = blob.finish();
        let expected = self.key().blob;
        if actual != expected || size != self.blob_size() {
            return Err(Error::Blob { layer, expected, actual });
        }
        let Walked { difference, digests, scan } = walked?;
        let difference = match (difference, failed, scan) {
            (Some(difference), ..) => Some(difference),
            (None, Some(Error::Span { offset, .. }), _) => {
                Some(format!("the digest of its span at {offset} is another"))
            }
            (None, Some(error), _) => return Err(error),
            (None, None, Some(scan)) if self.diff_id() != Some(DiffId(scan.diff_id)) => {
                Some(format!("the tar has the digest {}", scan.diff_id))
            }
            (None, None, _) => self.differing_data(open, &digests)?,
        };
        if let Some(difference) = difference {
            self.mark_lying(&difference)?;
            return Err(Error::Lying { layer, difference });
        }
        self.mark_whole()
    }

    /// The first data that was written and is not what the tar has.
    fn differing_data(&self, open: &Open, digests: &[Digest]) -> Result<Option<String>> {
        let known = open.digests.as_ref().ok_or(Error::Foreign("index"))?;
        for (id, digest) in (0..self.chunks()).zip(digests) {
            let failed =
                |e| Error::io(format_args!("read what is known of layer {}", self.number()), e);
            if open.is_verified(id) && known.get(ChunkId(id)).map_err(failed)? != *digest {
                return Ok(Some(format!("the data of {} is another", ChunkId(id))));
            }
        }
        Ok(None)
    }

    /// What the index says of the tar.
    fn entries(&self) -> Result<Vec<ZtocEntry>> {
        let damaged = |why| Error::Damaged { layer: self.number(), file: ENTRIES, why };
        let (size, digest) = self.entries_file().ok_or(Error::Foreign("index"))?;
        let path = self.directory().join(ENTRIES);
        let bytes = crate::disk::read(&path, size)?.ok_or_else(|| damaged("it is long"))?;
        if Digest::of(&bytes) != digest {
            return Err(damaged("its digest is another"));
        }
        Ok(Ztoc::read_entries(&bytes)?)
    }
}

/// Reads the tar of `blob` and compares it with what is known of it.
fn walk(blob: &mut dyn Read, known: &[ZtocEntry], open: &Open) -> Result<Walked> {
    let mut walked = Walked { difference: None, digests: Vec::new(), scan: None };
    let scanner = Scanner::new(Codec::Gzip, blob).map_err(shipway_plainlayer::Error::from)?;
    let mut scanner = scanner.allow_long_spans();
    walked.difference = match Walk::new(known, open, &mut walked.digests).all(&mut scanner)? {
        None => match scanner.finish() {
            Ok(scan) => {
                walked.scan = Some(scan);
                None
            }
            Err(error) => Some(format!("it cannot be unpacked: {error}")),
        },
        difference => difference,
    };
    Ok(walked)
}

/// A tar that is compared.
struct Walk<'a> {
    known: std::slice::Iter<'a, ZtocEntry>,
    open: &'a Open,
    places: DataPlaces,
    digests: &'a mut Vec<Digest>,
}

impl<'a> Walk<'a> {
    fn new(known: &'a [ZtocEntry], open: &'a Open, digests: &'a mut Vec<Digest>) -> Self {
        Self { known: known.iter(), open, places: DataPlaces::default(), digests }
    }

    /// The first difference.
    fn all(mut self, scanner: &mut Scanner<impl Read>) -> Result<Option<String>> {
        let progress = scanner.progress();
        // No buffer between: places are those up to which the scanner was read.
        let mut tar = TarReader::new(scanner);
        let mut buffer = vec![0; BUFFER];
        let broken = |error: io::Error| Ok(Some(format!("it cannot be unpacked: {error}")));
        loop {
            let member = match tar.next_member() {
                Ok(Some(member)) => member,
                Ok(None) => break,
                Err(error) => return broken(error),
            };
            let said = self.known.next();
            if let Some(difference) = entry(&member, progress.read(), said) {
                return Ok(Some(difference));
            }
            let mut chunks = Chunks::default();
            if self.places.next(&member.path, member.size).is_none() {
                continue;
            }
            let mut at = 0;
            loop {
                let piece = match tar.piece(&mut buffer) {
                    Ok(Some(piece)) if piece.offset == at => piece,
                    Ok(None) if at == member.size => break,
                    Ok(_) => return Ok(Some(format!("{} is sparse", shown(&member.path)))),
                    Err(error) => return broken(error),
                };
                at += piece.len as u64;
                chunks.data(&buffer[..piece.len], self.open, self.digests)?;
            }
        }
        Ok(self
            .known
            .next()
            .map(|said| format!("{} is in the index and not in the tar", shown(&said.tar.path))))
    }
}

/// The chunk that a file's contents are in.
#[derive(Default)]
struct Chunks {
    hasher: Hasher,
    /// Bytes of it that came.
    have: u64,
}

impl Chunks {
    fn data(&mut self, mut bytes: &[u8], open: &Open, digests: &mut Vec<Digest>) -> Result<()> {
        while !bytes.is_empty() {
            // As many as there are chunks, which have 32 bits.
            let id = digests.len() as u32;
            if id >= open.index.count {
                return Err(Error::Foreign("index"));
            }
            let left = open.index.get(id)?.size - self.have;
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            self.hasher.update(&bytes[..now]);
            self.have += now as u64;
            bytes = &bytes[now..];
            if now as u64 == left {
                digests.push(std::mem::take(&mut self.hasher).finish());
                self.have = 0;
            }
        }
        Ok(())
    }
}

/// What differs between an entry of the tar, after whose header the tar was read up to `at`, and
/// what the index says.
fn entry(member: &Member, at: u64, said: Option<&ZtocEntry>) -> Option<String> {
    let (path, tar) = (shown(&member.path), TarEntry::from(member));
    let Some(said) = said else {
        return Some(format!("{path} is in the tar and not in the index"));
    };
    let (other, has_data) = (&said.tar, matches!(tar.kind, TarKind::File(1..)));
    let what = [
        ("name", tar.path == other.path),
        ("type, size or target", tar.kind == other.kind),
        ("mode", tar.mode & 0o7777 == other.mode & 0o7777),
        ("owner", (tar.uid, tar.gid) == (other.uid, other.gid)),
        ("time", tar.mtime == other.mtime),
        ("set of extended attributes", sorted(&tar.xattrs) == sorted(&other.xattrs)),
        ("place in the tar", !has_data || at == said.offset),
    ];
    let (what, _) = what.into_iter().find(|(_, is_same)| !is_same)?;
    Some(format!("{path} has another {what} in the tar than in the index"))
}

fn sorted(xattrs: &[(Vec<u8>, Vec<u8>)]) -> std::collections::BTreeMap<&[u8], &[u8]> {
    xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect()
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(MAX_SHOWN)]).escape_default().collect()
}

/// A blob from which spans are taken as it is read.
struct SpansOf<'a, R, F> {
    blob: &'a mut Blob<R>,
    layer: &'a Layer,
    /// Those with something missing.
    frames: F,
    frame: Option<Frame>,
    /// What of the current frame came.
    bytes: Vec<u8>,
    /// Bytes of the blob that were read.
    at: u64,
    good: &'a mut dyn FnMut(Good),
    /// The first that went wrong.
    failed: Option<Error>,
}

impl<R, F: Iterator<Item = Result<Frame>>> SpansOf<'_, R, F> {
    fn next_frame(&mut self) {
        self.frame = match self.frames.next().transpose() {
            Ok(frame) => frame.filter(|_| self.failed.is_none()),
            Err(error) => {
                self.failed.get_or_insert(error);
                None
            }
        };
    }

    /// The next bytes, from [`SpansOf::at`] on.
    fn take(&mut self, mut new: &[u8]) {
        while let Some(frame) = &self.frame {
            let from = frame.offset + self.bytes.len() as u64;
            // What is before the frame.
            let skip = from.saturating_sub(self.at).min(new.len() as u64);
            (self.at, new) = (self.at + skip, &new[skip as usize..]);
            let left = frame.len - self.bytes.len() as u64;
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(new.len());
            self.bytes.extend_from_slice(&new[..now]);
            (self.at, new) = (self.at + now as u64, &new[now..]);
            if (self.bytes.len() as u64) < frame.len {
                break;
            }
            if let Err(error) = self.layer.write_frame(frame, &self.bytes[..], &mut *self.good) {
                self.failed.get_or_insert(error);
            }
            // The next span may have its first byte together with this one.
            let (end, last) = (frame.offset + frame.len, self.bytes.last().copied());
            self.bytes.clear();
            self.next_frame();
            if let (Some(frame), Some(last)) = (&self.frame, last)
                && frame.offset + 1 == end
            {
                self.bytes.push(last);
            }
        }
        self.at += new.len() as u64;
    }
}

impl<R: Read, F: Iterator<Item = Result<Frame>>> Read for SpansOf<'_, R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.blob.read(buffer)?;
        self.take(&buffer[..n]);
        Ok(n)
    }
}
