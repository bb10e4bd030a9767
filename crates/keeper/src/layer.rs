//! A layer, as far as reads of it go: two files of the directory, and a tree.

use crate::{map::BlockMap, message::FdName};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::fstat,
    io::{Errno, pread},
};
use shipway_erofs::{Bytes, Content, Form, Kind, Layout, Nid, ReadError, Stored, first_block};
use shipway_fusewire::{NodeAttributes, NodeId};
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
/// Blocks of the smallest piece (64 KiB), and of the largest whose touch is worth reporting (4
/// MiB).
const PIECE_BLOCKS: Range<u32> = 4..10;

/// A file of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum File {
    /// `<n>.data`: the contents.
    Data,
    /// `<n>.img`: metadata and contents as one flat image.
    Image,
    /// In the tree below `<n>`: an inode of the image.
    Tree(Nid),
}

/// Set in nodes of trees, whose other bits are those of [`inode_of`].
const TREE: u64 = 1 << 62;
/// Bits of an inode's number, whose unit is 32 bytes of the metadata.
const NID_BITS: u32 = 27;
const _: () = assert!(MAX_META_BYTES / 32 <= 1 << NID_BITS);

/// Number of an inode of a tree, as `stat` shows it: no other of any layer has it.
pub(crate) fn inode_of(n: u32, nid: Nid) -> u64 {
    u64::from(n) << NID_BITS | nid.0 & ((1 << NID_BITS) - 1)
}

/// Which file of which layer a node is.
pub(crate) fn file_of(node: NodeId) -> Option<(u32, File)> {
    if node.0 & TREE != 0 {
        let n = u32::try_from((node.0 ^ TREE) >> NID_BITS).ok()?;
        return Some((n, File::Tree(Nid(node.0 & ((1 << NID_BITS) - 1)))));
    }
    let n = u32::try_from(node.0.checked_sub(2)? / 2).ok()?;
    Some((n, if node.0.is_multiple_of(2) { File::Data } else { File::Image }))
}

/// The node of a file.
pub(crate) fn node_of(n: u32, file: File) -> NodeId {
    match file {
        File::Data => NodeId(2 * u64::from(n) + 2),
        File::Image => NodeId(2 * u64::from(n) + 3),
        File::Tree(nid) => NodeId(TREE | inode_of(n, nid)),
    }
}

/// An entry of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DirEntry {
    Data,
    Image,
    /// `<n>`: the root of the tree.
    Tree,
}

/// The entry of this name.
pub(crate) fn named(name: &[u8]) -> Option<(u32, DirEntry)> {
    let name = std::str::from_utf8(name).ok()?;
    let (n, entry) = match name.split_once('.') {
        None => (name, DirEntry::Tree),
        Some((n, "data")) => (n, DirEntry::Data),
        Some((n, "img")) => (n, DirEntry::Image),
        Some(_) => return None,
    };
    let plain = n == "0" || n.starts_with(|c: char| matches!(c, '1'..='9'));
    Some((n.parse().ok().filter(|_| plain)?, entry))
}

/// The bits of `st_mode` that say what kind of file it is.
pub(crate) fn type_of(kind: Kind) -> u32 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice => 0o020_000,
        Kind::Directory => 0o040_000,
        Kind::BlockDevice => 0o060_000,
        Kind::File => 0o100_000,
        Kind::Symlink => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}

/// What the kernel gets where an image cannot be read.
pub(crate) fn errno(error: ReadError) -> Errno {
    match error {
        ReadError::Kind => Errno::NOTDIR,
        _ => Errno::IO,
    }
}

/// The metadata's file.
struct Meta(OwnedFd);

impl Bytes for Meta {
    fn read(&self, at: u64, out: &mut [u8]) -> std::result::Result<(), ReadError> {
        exact(&self.0, out, at).map_err(|_| ReadError::Io)
    }
}

/// Where the bytes of a file are.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Bytes of metadata that it begins with.
    head: u64,
    /// Where in the data file the rest is.
    start: u64,
    /// Bytes of it in all.
    size: u64,
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
    meta: Meta,
    layout: Option<Layout>,
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
        let (mut head, mut layout) = (None, None);
        if meta_bytes > 0 {
            head = Some(Head::of(&meta, meta_bytes)?);
            let mut first = [0; BLOCK as usize];
            exact(&meta, &mut first, 0)?;
            layout = Some(Layout::of(&first, meta_bytes).map_err(|_| Errno::INVAL)?);
        }
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
            meta: Meta(meta),
            layout,
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
            (FdName::Meta(self.n), self.meta.0.as_fd()),
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

    /// Its image, if it has one.
    pub(crate) fn image(&self) -> Result<Stored<'_, impl Bytes>, Errno> {
        Ok(Stored::new(self.layout.as_ref().ok_or(Errno::NOENT)?, &self.meta))
    }

    /// What an entry of the directory is.
    pub(crate) fn file(&self, entry: DirEntry) -> Result<File, Errno> {
        Ok(match entry {
            DirEntry::Data => File::Data,
            DirEntry::Image => File::Image,
            DirEntry::Tree => File::Tree(self.layout.as_ref().ok_or(Errno::NOENT)?.root()),
        })
    }

    fn place(&self, file: File) -> Result<Place, Errno> {
        let data = self.data_blocks * BLOCK;
        match file {
            File::Data => Ok(Place { head: 0, start: 0, size: data }),
            File::Image if self.meta_bytes == 0 => Err(Errno::NOENT),
            File::Image => {
                Ok(Place { head: self.meta_bytes, start: 0, size: self.meta_bytes + data })
            }
            File::Tree(nid) => {
                let inode = self.image()?.metadata(nid).map_err(errno)?;
                let Content::File(extent) = inode.content else { return Err(Errno::INVAL) };
                Ok(Place { head: 0, start: u64::from(extent.block) * BLOCK, size: inode.size })
            }
        }
    }

    pub(crate) fn attributes(&self, file: File) -> Result<NodeAttributes, Errno> {
        let node = node_of(self.n, file);
        match file {
            File::Data | File::Image => {
                Ok(NodeAttributes::new(node, 0o100_400, self.place(file)?.size, 1))
            }
            File::Tree(nid) => self.attributes_of(nid),
        }
    }

    /// Attributes of an inode of the tree.
    fn attributes_of(&self, nid: Nid) -> Result<NodeAttributes, Errno> {
        let found = self.image()?.metadata(nid).map_err(errno)?;
        let (kind, device) = match found.content {
            Content::File(_) => (Kind::File, None),
            Content::Directory => (Kind::Directory, None),
            Content::Symlink => (Kind::Symlink, None),
            Content::CharDevice(device) => (Kind::CharDevice, Some(device)),
            Content::BlockDevice(device) => (Kind::BlockDevice, Some(device)),
            Content::Fifo => (Kind::Fifo, None),
            Content::Socket => (Kind::Socket, None),
        };
        let device = device.map_or(Ok(0), |device| device.encoded()).map_err(|_| Errno::IO)?;
        Ok(NodeAttributes {
            node: node_of(self.n, File::Tree(nid)),
            inode: inode_of(self.n, nid),
            mode: type_of(kind) | u32::from(found.mode),
            size: found.size,
            nlink: found.nlink,
            uid: found.uid,
            gid: found.gid,
            seconds: found.mtime.seconds,
            nanoseconds: found.mtime.nanoseconds,
            device,
        })
    }

    /// Blocks of the data file that a read touches.
    pub(crate) fn blocks(&self, file: File, offset: u64, size: u32) -> Result<Range<u64>, Errno> {
        let place = self.place(file)?;
        let within = |at: u64| at.clamp(place.head, place.size) - place.head + place.start;
        let (from, to) = (within(offset), within(offset.saturating_add(size.into())));
        let last = if from < to { to.div_ceil(BLOCK) } else { from / BLOCK };
        Ok((from / BLOCK).min(self.data_blocks)..last.min(self.data_blocks))
    }

    /// What a read has to wait for; `None` if it can be answered.
    pub(crate) fn missing(
        &self,
        file: File,
        offset: u64,
        size: u32,
    ) -> Result<Option<Range<u64>>, Errno> {
        Ok(self.good.missing(&self.blocks(file, offset, size)?))
    }

    /// Fills `out` from `offset`, up to the end of the file. Only for what [`Layer::missing`] has
    /// nothing of.
    pub(crate) fn read(&self, file: File, offset: u64, out: &mut [u8]) -> Result<usize, Errno> {
        let Place { head, start, size } = self.place(file)?;
        let count = size.saturating_sub(offset).min(out.len() as u64) as usize;
        let of_head = head.saturating_sub(offset).min(count as u64) as usize;
        let (meta, data) = out[..count].split_at_mut(of_head);
        exact(&self.meta.0, meta, offset)?;
        if let Some(patch) = &self.head {
            patch.patch(offset, meta);
        }
        exact(&self.data, data, start + offset.saturating_sub(head))?;
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
    use shipway_erofs::{Attributes as Attrs, Builder, Node, Options, Xattr};

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

    /// An image of a directory, in which there are files of these sizes and a link; metadata, flat
    /// image, and the inodes of the files.
    pub(crate) fn tree_image(sizes: &[u64]) -> (Vec<u8>, Vec<u8>, Vec<Nid>) {
        let attributes = Attrs { mode: 0o755, ..Attrs::default() };
        let mut builder = Builder::new(Options::default(), &attributes).expect("builder");
        let name = |n: usize| format!("directory/{n}").into_bytes();
        for (n, size) in sizes.iter().enumerate() {
            let xattrs = [Xattr { name: b"user.number", value: &name(n) }];
            let attributes = Attrs { xattrs: &xattrs, ..attributes };
            builder.insert(&name(n), &attributes, Node::File { size: *size }).expect("insert");
        }
        builder
            .insert(b"link", &attributes, Node::Symlink { target: b"directory" })
            .expect("insert");
        let image = builder.finish().expect("image");
        let (mut meta, mut flat) = (Vec::new(), Vec::new());
        image.write(Form::WithDevice, &mut meta).expect("write");
        image.write(Form::Flat, &mut flat).expect("write");
        let layout = Layout::of(&meta, meta.len() as u64).expect("layout");
        let stored = Stored::new(&layout, &meta[..]);
        let find = |directory, name: &[u8]| {
            let directory = stored.metadata(directory).expect("metadata");
            stored.lookup(&directory, name).expect("lookup").expect("an entry")
        };
        let directory = find(layout.root(), b"directory");
        let nids = (0..sizes.len()).map(|n| find(directory, n.to_string().as_bytes())).collect();
        (meta, flat, nids)
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
            assert_eq!(layer.attributes(file).expect("attributes").size, want.len() as u64);
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
        let blocks = |file, offset, size| layer.blocks(file, offset, size).expect("blocks");
        assert_eq!(blocks(File::Data, 0, 1), 0..1);
        assert_eq!(blocks(File::Data, 4095, 2), 0..2);
        assert_eq!(blocks(File::Data, 8192, u32::MAX), 2..3);
        assert!(blocks(File::Data, 3 * BLOCK, 4096).is_empty());
        assert!(blocks(File::Data, u64::MAX, u32::MAX).is_empty());
        assert!(blocks(File::Image, 0, head as u32).is_empty());
        assert_eq!(blocks(File::Image, head - 1, 2), 0..1);
        layer.good().set(&(0..1));
        assert_eq!(layer.missing(File::Image, 0, u32::MAX), Ok(Some(1..3)));
        assert_eq!(layer.missing(File::Data, 0, 4096), Ok(None));
    }

    /// Two files of which neither ends with a block.
    #[test]
    fn files_of_the_tree_are_parts_of_the_data_file() {
        let (meta, _, nids) = tree_image(&[BLOCK + 10, 2 * BLOCK - 1, 0]);
        let data: Vec<u8> = (0..4 * BLOCK).map(|n| (n ^ n >> 8) as u8).collect();
        let layer = layer(7, &data, &meta);
        for (nid, start, size) in [(nids[0], 0, BLOCK + 10), (nids[1], 2 * BLOCK, 2 * BLOCK - 1)] {
            let file = File::Tree(nid);
            assert_eq!(layer.attributes(file).expect("attributes").size, size);
            let last = (start + size - 1) / BLOCK;
            assert_eq!(layer.blocks(file, 0, u32::MAX), Ok(start / BLOCK..last + 1));
            assert_eq!(layer.blocks(file, size - 1, 9), Ok(last..last + 1));
            assert!(layer.blocks(file, size, 9).expect("blocks").is_empty());
            let mut out = vec![0; 3 * BLOCK as usize];
            let count = layer.read(file, 7, &mut out).expect("read");
            assert_eq!(out[..count], data[start as usize + 7..(start + size) as usize]);
            assert_eq!(layer.read(file, size, &mut out), Ok(0));
        }
        let empty = File::Tree(nids[2]);
        assert!(layer.blocks(empty, 0, 4096).expect("blocks").is_empty());
        assert_eq!(layer.read(empty, 0, &mut [0; 9]), Ok(0));
        // What is no file, and what is no inode.
        let root = layer.file(DirEntry::Tree).expect("a tree");
        assert_eq!(layer.blocks(root, 0, 9), Err(Errno::INVAL));
        assert_eq!(layer.blocks(File::Tree(Nid(1 << 26)), 0, 9), Err(Errno::IO));
    }

    #[test]
    fn names_and_nodes_belong_together() {
        for (name, n, entry) in [
            (&b"0.data"[..], 0, DirEntry::Data),
            (b"17.img", 17, DirEntry::Image),
            (b"4294967295.img", u32::MAX, DirEntry::Image),
            (b"17", 17, DirEntry::Tree),
        ] {
            assert_eq!(named(name), Some((n, entry)));
        }
        for n in [0, 17, u32::MAX] {
            for file in [
                File::Data,
                File::Image,
                File::Tree(Nid(0)),
                File::Tree(Nid(40)),
                File::Tree(Nid((1 << NID_BITS) - 1)),
            ] {
                assert_eq!(file_of(node_of(n, file)), Some((n, file)));
            }
        }
        for name in [
            &b""[..],
            b"01",
            b"-1",
            b"01.data",
            b"+1.data",
            b".data",
            b"1.dat",
            b"4294967296.img",
            b"4294967296",
            b"\xff.img",
        ] {
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
