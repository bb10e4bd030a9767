//! The index: which chunk goes where, on the disk, read page by page.
//!
//! A page has [`PER_PAGE`] records of [`Record::BYTES`] and, in the place of one more, a checksum
//! of them, the layer's key and the page's number. So what is damaged, or in a wrong place, is
//! found when it is read, and nothing has to be read ahead.

use crate::{Error, LayerKey, LayerNumber, Result};
use parking_lot::Mutex;
use shipway_estargz::{DATA_BLOCK, Record};
use shipway_oci::{Digest, Hasher};
use std::{
    collections::{HashMap, VecDeque},
    fmt,
    fs::File,
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::Arc,
};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Records of a page.
pub(crate) const PER_PAGE: u32 = (PAGE / Record::BYTES) as u32 - 1;
const RECORDS: usize = PER_PAGE as usize * Record::BYTES;
/// Pages of all layers that are kept in memory.
const CACHED: usize = 128;

/// A chunk's position in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub u32);

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {}", self.0)
    }
}

/// A chunk of a layer's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its position in the index.
    pub id: ChunkId,
    /// Where it goes, where it comes from and what digest it has.
    pub record: Record,
}

/// The blocks that a record touches.
pub(crate) fn blocks_of(record: &Record) -> Range<u64> {
    record.data / DATA_BLOCK..(record.data + record.size).div_ceil(DATA_BLOCK)
}

impl Chunk {
    /// The blocks of the data file that it touches. It may share the first and the last with its
    /// neighbors.
    pub fn blocks(&self) -> Range<u64> {
        blocks_of(&self.record)
    }
}

fn checksum(key: &LayerKey, page: u32, records: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(key.digest().as_bytes());
    hasher.update(page.to_le_bytes());
    hasher.update(records);
    hasher.finish()
}

/// Bytes of an index of `chunks`.
pub(crate) fn bytes(chunks: u32) -> u64 {
    u64::from(chunks.div_ceil(PER_PAGE)) * PAGE as u64
}

/// Writes an index; returns how many records it has.
pub(crate) fn write(
    key: &LayerKey,
    records: impl Iterator<Item = Record>,
    to: &mut impl Write,
) -> io::Result<u32> {
    let (mut page, mut pages, mut count) = (Vec::with_capacity(PAGE), 0, 0);
    let mut finish = |page: &mut Vec<u8>| {
        page.resize(RECORDS, 0);
        let sum = checksum(key, pages, page);
        page.extend_from_slice(sum.as_bytes());
        page.resize(PAGE, 0);
        pages += 1;
        let written = to.write_all(page);
        page.clear();
        written
    };
    for record in records {
        page.extend_from_slice(&record.to_bytes());
        count += 1;
        if page.len() == RECORDS {
            finish(&mut page)?;
        }
    }
    if !page.is_empty() {
        finish(&mut page)?;
    }
    Ok(count)
}

type Page = Arc<[u8; PAGE]>;

/// Pages that were read lately, of all layers.
#[derive(Default)]
pub(crate) struct PageCache(Mutex<Pages>);

#[derive(Default)]
struct Pages {
    pages: HashMap<(LayerNumber, u32), Page>,
    /// The oldest first.
    order: VecDeque<(LayerNumber, u32)>,
}

impl PageCache {
    fn get(&self, layer: LayerNumber, page: u32) -> Option<Page> {
        crate::lock(&self.0).pages.get(&(layer, page)).cloned()
    }

    fn put(&self, layer: LayerNumber, number: u32, page: &Page) {
        let mut cache = crate::lock(&self.0);
        if cache.pages.insert((layer, number), page.clone()).is_some() {
            return;
        }
        cache.order.push_back((layer, number));
        if cache.order.len() > CACHED
            && let Some(oldest) = cache.order.pop_front()
        {
            cache.pages.remove(&oldest);
        }
    }
}

/// An index that is open.
pub(crate) struct Index {
    pub file: File,
    pub layer: LayerNumber,
    pub key: LayerKey,
    /// Number of records.
    pub count: u32,
    pub cache: Arc<PageCache>,
}

impl Index {
    fn page(&self, number: u32) -> Result<Page> {
        if let Some(page) = self.cache.get(self.layer, number) {
            return Ok(page);
        }
        let damaged = |why| Error::Damaged { layer: self.layer, file: "index", why };
        let mut page = [0; PAGE];
        match self.file.read_exact_at(&mut page, u64::from(number) * PAGE as u64) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(damaged("it is short"));
            }
            read => read.map_err(|e| {
                Error::io(format_args!("read the index of layer {}", self.layer), e)
            })?,
        }
        let (records, sum) = page.split_at(RECORDS);
        let is = checksum(&self.key, number, records);
        if !sum.starts_with(is.as_bytes()) || sum[32..].iter().any(|b| *b != 0) {
            return Err(damaged("a checksum is wrong"));
        }
        let page = Arc::new(page);
        self.cache.put(self.layer, number, &page);
        Ok(page)
    }

    /// The record `id`, which must be below [`Index::count`].
    pub fn get(&self, id: u32) -> Result<Record> {
        self.get_with(id, &mut None)
    }

    /// As [`Index::get`], from the page at hand if it is there.
    fn get_with(&self, id: u32, at_hand: &mut Option<(u32, Page)>) -> Result<Record> {
        debug_assert!(id < self.count);
        let number = id / PER_PAGE;
        let page = match at_hand.take() {
            Some((n, page)) if n == number => page,
            _ => self.page(number)?,
        };
        let (_, page) = at_hand.insert((number, page));
        let (records, _) = page.as_chunks::<{ Record::BYTES }>();
        Ok(Record::from_bytes(&records[(id % PER_PAGE) as usize]))
    }

    /// The first record of which `is_before` is not true, as it is of all that come earlier.
    pub fn partition_point(&self, is_before: impl Fn(&Record) -> bool) -> Result<u32> {
        let (mut from, mut to) = (0, self.count);
        while from < to {
            let middle = from + (to - from) / 2;
            if is_before(&self.get(middle)?) { from = middle + 1 } else { to = middle }
        }
        Ok(from)
    }

    /// The records that touch some of `blocks`: from the first to before the last.
    pub fn touching(&self, blocks: &Range<u64>) -> Result<Range<u32>> {
        if blocks.is_empty() {
            return Ok(0..0);
        }
        let first = self.partition_point(|r| blocks_of(r).end <= blocks.start)?;
        let last = self.partition_point(|r| blocks_of(r).start < blocks.end)?;
        Ok(first..last.max(first))
    }

    /// The records that touch nothing but `blocks`.
    pub fn within(&self, blocks: &Range<u64>) -> Result<Range<u32>> {
        let first = self.partition_point(|r| blocks_of(r).start < blocks.start)?;
        let last = self.partition_point(|r| blocks_of(r).end <= blocks.end)?;
        Ok(first..last.max(first))
    }

    /// The chunks `ids`, in order.
    pub fn chunks(&self, ids: Range<u32>) -> Chunks<'_> {
        Chunks { index: self, ids, page: None }
    }
}

/// Chunks in the order of their places; memory is that of a page.
pub struct Chunks<'a> {
    index: &'a Index,
    ids: Range<u32>,
    page: Option<(u32, Page)>,
}

impl Iterator for Chunks<'_> {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.ids.next()?;
        let record = self.index.get_with(id, &mut self.page);
        Some(record.map(|record| Chunk { id: ChunkId(id), record }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More pages than are kept, found by place, forwards and at random.
    #[test]
    fn records_are_found_by_place() {
        const COUNT: u64 = 3 * CACHED as u64 * PER_PAGE as u64 + 7;
        let key = LayerKey { blob: Digest::of("blob"), toc: Digest::of("toc") };
        // Files of three chunks, of 3000 bytes each and a tail of one.
        let record = |n: u64| Record {
            data: n / 3 * 2 * DATA_BLOCK + n % 3 * 3000,
            size: if n % 3 == 2 { 1 } else { 3000 },
            offset: 100 * n,
            compressed: 99,
            inner: 0,
            digest: Some(Digest::of(n.to_le_bytes())),
        };
        let mut file = tempfile::tempfile().expect("a file");
        let count = write(&key, (0..COUNT).map(record), &mut file).expect("an index");
        assert_eq!(u64::from(count), COUNT);
        assert_eq!(file.metadata().expect("a length").len(), bytes(count));
        let cache = Arc::new(PageCache::default());
        let index = Index { file, layer: LayerNumber(1), key, count, cache };
        for (n, chunk) in index.chunks(0..count).enumerate() {
            let chunk = chunk.expect("a chunk");
            assert_eq!((chunk.id, chunk.record), (ChunkId(n as u32), record(n as u64)));
        }
        for n in (0..count).step_by(1009) {
            let file = n / 3;
            let block = u64::from(file) * 2;
            let of = |blocks| index.touching(&blocks).expect("chunks");
            let ids = 3 * file..(3 * file + 3).min(count);
            assert_eq!(of(block..block + 2), ids);
            // The second chunk is in both blocks, the others in one.
            assert_eq!(of(block..block + 1), ids.start..(ids.start + 2).min(count));
            assert_eq!(of(block + 1..block + 2), (ids.start + 1).min(count)..ids.end);
            assert_eq!(of(block..block), 0..0);
            let within = |blocks| index.within(&blocks).expect("chunks");
            assert_eq!(within(block..block + 2), ids);
            assert_eq!(within(block..block + 1), ids.start..ids.start + 1);
        }
        let cache = crate::lock(&index.cache.0);
        assert_eq!((cache.pages.len(), cache.order.len()), (CACHED, CACHED));
    }
}
