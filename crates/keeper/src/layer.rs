//! A layer, as far as reads of it go: two files of the directory.

use crate::{map::BlockMap, message::FdName};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::fstat,
    io::{Errno, pread},
};
use shipway_erofs::{Form, first_block};
use shipway_fusewire::{Attributes, NodeId};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// Bytes of a block, in data and metadata.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks of a data file at most: more than EROFS addresses (2³² blocks).
pub(crate) const MAX_DATA_BLOCKS: u64 = u32::MAX as u64;
/// Bytes of a layer's metadata at most.
pub(crate) const MAX_META_BYTES: u64 = 4 << 30;
/// Pieces whose first touch is noted, at most; a piece is a power of two of blocks.
const PIECES: u64 = 4096;
/// Blocks of the smallest piece (64 KiB), and of the largest whose touch is worth telling (4 MiB).
const PIECE_BLOCKS: Range<u32> = 4..10;

/// A file of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum File {
    /// `<n>.data`: the contents.
    Data,
    /// `<n>.img`: metadata and contents as one flat image.
    Image,
}

/// Which file of which layer a node is.
pub(crate) fn file_of(node: NodeId) -> Option<(u32, File)> {
    let n = u32::try_from(node.0.checked_sub(2)? / 2).ok()?;
    Some((n, if node.0.is_multiple_of(2) { File::Data } else { File::Image }))
}

/// The node of a file.
pub(crate) fn node_of(n: u32, file: File) -> NodeId {
    NodeId(2 * u64::from(n) + if file == File::Data { 2 } else { 3 })
}

/// The file of this name.
pub(crate) fn named(name: &[u8]) -> Option<(u32, File)> {
    let (n, kind) = std::str::from_utf8(name).ok()?.split_once('.')?;
    let file = match kind {
        "data" => File::Data,
        "img" => File::Image,
        _ => return None,
    };
    let plain = n == "0" || n.starts_with(|c: char| matches!(c, '1'..='9'));
    Some((n.parse().ok().filter(|_| plain)?, file))
}

/// Contents of the flat image's first block where they differ from those of the metadata.
struct Head {
    at: usize,
    bytes: Box<[u8]>,
}

impl Head {
    fn of(meta: &OwnedFd, meta_bytes: u64) -> Result<Self, Errno> {
        let mut first = [0; BLOCK as usize];
        if pread(meta, &mut first, 0)? < first.len() {
            return Err(Errno::INVAL);
        }
        // The image has to be as long as it says, but only its first block is looked at: the rest
        // is memory that is never touched.
        let length = usize::try_from(meta_bytes).map_err(|_| Errno::INVAL)?;
        let mut image = vec![0; length];
        image.get_mut(..first.len()).ok_or(Errno::INVAL)?.copy_from_slice(&first);
        let flat = first_block(&image, Form::Flat).map_err(|_| Errno::INVAL)?;
        let differs = |at: &usize| first[*at] != flat[*at];
        let at = (0..flat.len()).find(differs).unwrap_or(0);
        let end = (at..flat.len()).rfind(differs).map_or(at, |last| last + 1);
        Ok(Self { at, bytes: flat[at..end].into() })
    }

    /// Puts them over `out`, which has the metadata from `offset` on.
    fn patch(&self, offset: u64, out: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let from = self.at.max(offset);
        let to = (self.at + self.bytes.len()).min(offset + out.len());
        if from < to {
            out[from - offset..to - offset]
                .copy_from_slice(&self.bytes[from - self.at..to - self.at]);
        }
    }
}

/// A layer.
pub(crate) struct Layer {
    n: u32,
    data: OwnedFd,
    map_file: OwnedFd,
    meta: OwnedFd,
    data_blocks: u64,
    meta_bytes: u64,
    good: BlockMap,
    head: Option<Head>,
    /// A bit for each piece.
    touched: Box<[AtomicU64]>,
    /// Blocks of a piece, as a power of two.
    piece: u32,
}

impl Layer {
    /// Of three files whose sizes say the rest, so that a successor which has nothing but them
    /// makes the same of them: a data file of whole blocks, a map of a bit for each, metadata.
    /// `EINVAL` if they do not fit together, or the metadata are no image.
    pub(crate) fn new(n: u32, data: OwnedFd, map: OwnedFd, meta: OwnedFd) -> Result<Self, Errno> {
        let size = |file: &OwnedFd| u64::try_from(fstat(file)?.st_size).map_err(|_| Errno::INVAL);
        let (data_bytes, meta_bytes) = (size(&data)?, size(&meta)?);
        let data_blocks = data_bytes / BLOCK;
        let whole = data_bytes.is_multiple_of(BLOCK) && meta_bytes.is_multiple_of(BLOCK);
        if !whole || data_blocks > MAX_DATA_BLOCKS || meta_bytes > MAX_META_BYTES {
            return Err(Errno::INVAL);
        }
        let good = BlockMap::open(&map, data_blocks)?;
        let head = if meta_bytes > 0 { Some(Head::of(&meta, meta_bytes)?) } else { None };
        let piece = PIECE_BLOCKS
            .clone()
            .find(|piece| data_blocks >> piece < PIECES)
            .unwrap_or(PIECE_BLOCKS.end);
        let pieces = (data_blocks >> piece) + 1;
        let touched = (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            n,
            data,
            map_file: map,
            meta,
            data_blocks,
            meta_bytes,
            good,
            head,
            touched,
            piece,
        })
    }

    pub(crate) fn number(&self) -> u32 {
        self.n
    }

    pub(crate) fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    pub(crate) fn meta_bytes(&self) -> u64 {
        self.meta_bytes
    }

    pub(crate) fn good(&self) -> &BlockMap {
        &self.good
    }

    /// What a successor needs to make the same layer.
    pub(crate) fn files(&self) -> [(FdName, BorrowedFd<'_>); 3] {
        [
            (FdName::Data(self.n), self.data.as_fd()),
            (FdName::Map(self.n), self.map_file.as_fd()),
            (FdName::Meta(self.n), self.meta.as_fd()),
        ]
    }

    /// Whether both are of the same files.
    pub(crate) fn is_same(&self, other: &Layer) -> Result<bool, Errno> {
        for ((_, one), (_, other)) in self.files().into_iter().zip(other.files()) {
            let (one, other) = (fstat(one)?, fstat(other)?);
            if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The files of the directory that it has.
    pub(crate) fn has(&self, file: File) -> bool {
        file == File::Data || self.meta_bytes > 0
    }

    /// Bytes where the data begin.
    fn head_bytes(&self, file: File) -> u64 {
        if file == File::Data { 0 } else { self.meta_bytes }
    }

    pub(crate) fn attributes(&self, file: File) -> Attributes {
        let size = self.head_bytes(file) + self.data_blocks * BLOCK;
        Attributes { node: node_of(self.n, file), mode: 0o100_400, size, nlink: 1 }
    }

    /// Blocks of the data file that a read touches.
    pub(crate) fn blocks(&self, file: File, offset: u64, size: u32) -> Range<u64> {
        let head = self.head_bytes(file);
        let from = offset.saturating_sub(head) / BLOCK;
        let to = offset.saturating_add(size.into()).saturating_sub(head).div_ceil(BLOCK);
        from.min(self.data_blocks)..to.min(self.data_blocks)
    }

    /// What a read has to wait for; `None` if it can be answered.
    pub(crate) fn missing(&self, file: File, offset: u64, size: u32) -> Option<Range<u64>> {
        self.good.missing(&self.blocks(file, offset, size))
    }

    /// Fills `out` from `offset`, up to the end of the file. Only for what [`Layer::missing`] has
    /// nothing of.
    pub(crate) fn read(&self, file: File, offset: u64, out: &mut [u8]) -> Result<usize, Errno> {
        let (head, end) = (self.head_bytes(file), self.attributes(file).size);
        let count = end.saturating_sub(offset).min(out.len() as u64) as usize;
        let of_head = head.saturating_sub(offset).min(count as u64) as usize;
        let (meta, data) = out[..count].split_at_mut(of_head);
        exact(&self.meta, meta, offset)?;
        if let Some(patch) = &self.head {
            patch.patch(offset, meta);
        }
        exact(&self.data, data, offset.saturating_sub(head))?;
        Ok(count)
    }

    /// Notes that blocks were read; the first of them if it is the first time for a piece.
    pub(crate) fn touch(&self, blocks: &Range<u64>) -> Option<u64> {
        let mut first = false;
        for piece in blocks.start >> self.piece..blocks.end.div_ceil(1 << self.piece) {
            let bit = 1 << (piece % 64);
            let Some(word) = self.touched.get((piece / 64) as usize) else { continue };
            first |= word.load(Ordering::Relaxed) & bit == 0
                && word.fetch_or(bit, Ordering::Relaxed) & bit == 0;
        }
        first.then_some(blocks.start)
    }
}

/// Fills `out` from the file; an error if it has less. A hole that reads as zeros is as little
/// wanted as a short answer, which the kernel takes for the end of the file.
fn exact(file: &OwnedFd, out: &mut [u8], offset: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < out.len() {
        match pread(file, &mut out[done..], offset + done as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::{
        fs::{MemfdFlags, ftruncate, memfd_create},
        io::pwrite,
    };
    use shipway_erofs::{Attributes as Attrs, Builder, Node, Options};

    pub(crate) fn memory(bytes: &[u8], length: u64) -> OwnedFd {
        let file = memfd_create("file", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&file, length).expect("ftruncate");
        assert_eq!(pwrite(&file, bytes, 0), Ok(bytes.len()));
        file
    }

    /// An image of one file of so many blocks.
    pub(crate) fn image(blocks: u64) -> (Vec<u8>, Vec<u8>) {
        let attributes = Attrs { mode: 0o755, ..Attrs::default() };
        let mut builder = Builder::new(Options::default(), &attributes).expect("builder");
        builder.insert(b"file", &attributes, Node::File { size: blocks * BLOCK }).expect("insert");
        let image = builder.finish().expect("image");
        let (mut meta, mut flat) = (Vec::new(), Vec::new());
        image.write(Form::WithDevice, &mut meta).expect("write");
        image.write(Form::Flat, &mut flat).expect("write");
        (meta, flat)
    }

    /// A layer whose data file has `data`.
    pub(crate) fn layer(n: u32, data: &[u8], meta: &[u8]) -> Layer {
        let length = (data.len() as u64).next_multiple_of(BLOCK);
        let map = memory(&[], BlockMap::bytes(length / BLOCK));
        Layer::new(n, memory(data, length), map, memory(meta, meta.len() as u64)).expect("layer")
    }

    #[test]
    fn both_files_are_read_at_any_place() {
        let data: Vec<u8> = (0..3 * BLOCK).map(|n| (n ^ n >> 8) as u8).collect();
        let (meta, flat) = image(3);
        let layer = layer(7, &data, &meta);
        let whole = [&flat[..], &data].concat();
        assert_ne!(flat, meta);
        for (file, want) in [(File::Data, &data), (File::Image, &whole)] {
            assert_eq!(layer.attributes(file).size, want.len() as u64);
            for offset in (0..want.len() + 5000).step_by(511) {
                for size in [0, 1, 100, 4096, 9000] {
                    let mut out = vec![7; size];
                    let count = layer.read(file, offset as u64, &mut out).expect("read");
                    let want = want.get(offset..).unwrap_or(&[]);
                    assert_eq!(out[..count], want[..size.min(want.len())], "{offset} {size}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_a_read_are_those_of_the_data_file() {
        let (meta, _) = image(3);
        let layer = layer(7, &[1; 3 * BLOCK as usize], &meta);
        let head = meta.len() as u64;
        assert_eq!(layer.blocks(File::Data, 0, 1), 0..1);
        assert_eq!(layer.blocks(File::Data, 4095, 2), 0..2);
        assert_eq!(layer.blocks(File::Data, 8192, u32::MAX), 2..3);
        assert!(layer.blocks(File::Data, 3 * BLOCK, 4096).is_empty());
        assert!(layer.blocks(File::Data, u64::MAX, u32::MAX).is_empty());
        assert!(layer.blocks(File::Image, 0, head as u32).is_empty());
        assert_eq!(layer.blocks(File::Image, head - 1, 2), 0..1);
        layer.good().set(&(0..1));
        assert_eq!(layer.missing(File::Image, 0, u32::MAX), Some(1..3));
        assert_eq!(layer.missing(File::Data, 0, 4096), None);
    }

    #[test]
    fn names_and_nodes_belong_together() {
        for (name, n, file) in [
            (&b"0.data"[..], 0, File::Data),
            (b"17.img", 17, File::Image),
            (b"4294967295.img", u32::MAX, File::Image),
        ] {
            assert_eq!(named(name), Some((n, file)));
            assert_eq!(file_of(node_of(n, file)), Some((n, file)));
        }
        for name in
            [&b"1"[..], b"01.data", b"+1.data", b".data", b"1.dat", b"4294967296.img", b"\xff.img"]
        {
            assert_eq!(named(name), None);
        }
        assert_eq!(file_of(NodeId::ROOT), None);
        assert_eq!(file_of(NodeId(u64::MAX)), None);
        assert_eq!(node_of(3, File::Data), NodeId(8));
    }

    #[test]
    fn files_that_do_not_fit_together_are_refused() {
        let (meta, _) = image(3);
        let refused = |data: u64, map: u64, meta: OwnedFd| {
            Layer::new(1, memory(&[], data), memory(&[], map), meta).err()
        };
        let image = || memory(&meta, meta.len() as u64);
        assert_eq!(refused(3 * BLOCK, 1, image()), None);
        assert_eq!(refused(0, 0, memory(&[], 0)), None);
        assert_eq!(refused(3 * BLOCK - 1, 1, image()), Some(Errno::INVAL));
        assert_eq!(refused(9 * BLOCK, 1, image()), Some(Errno::INVAL));
        assert_eq!(
            refused(3 * BLOCK, 1, memory(&meta, 100 + meta.len() as u64)),
            Some(Errno::INVAL)
        );
        assert_eq!(refused(3 * BLOCK, 1, memory(&[1; 4096], 4096)), Some(Errno::INVAL));
        assert_eq!(refused((MAX_DATA_BLOCKS + 1) * BLOCK, 1 << 30, image()), Some(Errno::INVAL));
        assert_eq!(
            refused(3 * BLOCK, 1, memory(&meta, MAX_META_BYTES + BLOCK)),
            Some(Errno::INVAL)
        );
    }

    #[test]
    fn a_data_file_that_lacks_its_end_is_an_error_and_no_short_read() {
        let layer = layer(7, &[1; 2 * BLOCK as usize], &[]);
        ftruncate(&layer.data, BLOCK).expect("ftruncate");
        assert_eq!(layer.read(File::Data, 0, &mut [0; 2 * BLOCK as usize]), Err(Errno::IO));
    }

    #[test]
    fn only_first_touches_are_told() {
        let layer = layer(7, &[1; 64 * BLOCK as usize], &[]);
        assert_eq!(layer.touch(&(3..4)), Some(3));
        assert_eq!(layer.touch(&(4..9)), None, "the same 64 KiB");
        assert_eq!(layer.touch(&(15..17)), Some(15), "one of two is new");
        assert_eq!(layer.touch(&(16..17)), None);
        assert_eq!(layer.touch(&(64..64)), None);
    }
}
