//! Chunks, one after another in packs.

use crate::{
    entry::{Chunk, Entry, Tree},
    format::{Blob, MAX_PACK},
};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Digest;
use std::collections::{HashMap, HashSet};

/// Bytes of chunks from which on a pack is full.
pub(crate) const FULL: usize = 4 << 20;
/// Sizes of chunks: the least (but for a file's last one), the usual, the largest.
pub(crate) const CHUNK: (usize, usize, usize) = (16 << 10, 64 << 10, 256 << 10);
/// Packs with less than this, of which there come to be many when little changes often.
const SMALL: u64 = 1 << 20;
/// How many of them there may be before what is in them is packed together.
const MAX_SMALL: usize = 8;
/// zstd's own default.
const LEVEL: i32 = 3;

/// The bytes of a pack.
pub(crate) fn unpack(pack: &Blob, bytes: &[u8]) -> Result<Vec<u8>> {
    let damaged = |why: String| {
        Fault::new(Code::DataLoss, format!("the pack {} of a cache mount {why}", pack.digest))
    };
    // The length was checked with the list of packs.
    let length = usize::try_from(pack.length).unwrap_or(usize::MAX);
    let bytes = zstd::bulk::decompress(bytes, length).map_err(|e| damaged(e.to_string()))?;
    if bytes.len() == length {
        Ok(bytes)
    } else {
        Err(damaged(format!("has {} bytes instead of {length}", bytes.len())))
    }
}

/// Takes a pack that is full, with its bytes.
pub(crate) type Sink<'a> = dyn FnMut(Blob, Vec<u8>) -> Result<()> + 'a;

/// Puts chunks into packs, each once.
pub(crate) struct Packer<'a> {
    known: HashMap<Digest, Chunk>,
    /// Those of earlier saves, then new ones.
    packs: Vec<Blob>,
    open: Vec<u8>,
    sink: &'a mut Sink<'a>,
}

impl<'a> Packer<'a> {
    /// One that knows the chunks of `tree` in those of `packs` that are `present`, and worth
    /// keeping.
    pub fn new(
        tree: &Tree,
        packs: &[Blob],
        present: &HashSet<Digest>,
        sink: &'a mut Sink<'a>,
    ) -> Self {
        let mut used = vec![0; packs.len()];
        let mut seen = HashSet::new();
        let chunks = || tree.0.iter().flat_map(|e| &e.chunks);
        for chunk in chunks().filter(|c| seen.insert(c.0)) {
            used[chunk.1 as usize] += chunk.length();
        }
        let small = packs.iter().filter(|p| p.length < SMALL).count();
        // A pack of which most is of no use any more is not kept for the rest of it.
        let keep = |(pack, used): (&Blob, &u64)| {
            present.contains(&pack.digest)
                && used * 2 >= pack.length
                && (small <= MAX_SMALL || pack.length >= SMALL)
        };
        let kept: Vec<bool> = packs.iter().zip(&used).map(keep).collect();
        let known = chunks().filter(|c| kept[c.1 as usize]).map(|c| (c.0, *c)).collect();
        Self { known, packs: packs.to_vec(), open: Vec::new(), sink }
    }

    /// Where the chunk `bytes` is, which is not empty and not longer than chunks are.
    pub fn add(&mut self, bytes: &[u8]) -> Result<Chunk> {
        let digest = Digest::of(bytes);
        // An earlier list of files may lie about lengths, as whoever wrote it liked.
        if let Some(known) = self.known.get(&digest).filter(|c| c.3 as usize == bytes.len()) {
            return Ok(*known);
        }
        let (pack, at) = (self.packs.len() as u32, self.open.len() as u32);
        let chunk = Chunk(digest, pack, at, bytes.len() as u32);
        self.open.extend_from_slice(bytes);
        self.known.insert(digest, chunk);
        if self.open.len() >= FULL {
            self.close()?;
        }
        Ok(chunk)
    }

    fn close(&mut self) -> Result<()> {
        let bytes = zstd::bulk::compress(&self.open, LEVEL)
            .map_err(|e| Fault::internal(format!("zstd a pack: {e}")))?;
        let length = self.open.len() as u64;
        debug_assert!(length <= MAX_PACK);
        let pack = Blob { digest: Digest::of(&bytes), size: bytes.len() as u64, length };
        self.open.clear();
        self.packs.push(pack);
        (self.sink)(pack, bytes)
    }

    /// The packs that `entries` use, which get their numbers.
    pub fn finish(mut self, entries: &mut [Entry]) -> Result<Vec<Blob>> {
        if !self.open.is_empty() {
            self.close()?;
        }
        let mut used = vec![false; self.packs.len()];
        entries.iter().flat_map(|e| &e.chunks).for_each(|c| used[c.1 as usize] = true);
        let mut numbers = Vec::with_capacity(used.len());
        let mut next = 0;
        for used in &used {
            numbers.push(next);
            next += u32::from(*used);
        }
        for chunk in entries.iter_mut().flat_map(|e| &mut e.chunks) {
            chunk.1 = numbers[chunk.1 as usize];
        }
        Ok(self.packs.into_iter().zip(used).filter(|(_, used)| *used).map(|(p, _)| p).collect())
    }
}
