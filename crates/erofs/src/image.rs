//! Where everything is in an image, and its bytes.
//!
//! ```text
//!    0  …
//! 1024  superblock
//! 1152  device slot
//! 1280  inodes, each with attributes and what is inline
//!    …  shared attributes
//!    …  blocks of directories and long links
//! ```
//!
//! The inodes of a directory's entries are neighbors, in the order of their names, for whoever
//! lists a directory asks for all of them next.

use crate::{
    BLOCK as BLOCK_BYTES, BuildError, ReadError, Reader,
    format::*,
    limits,
    tree::{Inode, InodeId, Payload, ROOT, Tree},
    xattr::Shared,
};
use std::io::{self, Write};

/// How an image will be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The image by itself, with the data file as `device=`.
    WithDevice,
    /// The image followed by the data file, as one device.
    Flat,
}

/// The laid-out image of a layer.
pub struct Image {
    tree: Tree,
    /// Live entries by directory and name.
    order: Vec<u32>,
    /// Live inodes in the order of their positions.
    sequence: Vec<InodeId>,
    /// Number of each inode, or zero.
    nids: Vec<u32>,
    shared: Shared,
    /// Position of the shared attributes.
    shared_at: u64,
    /// First of the blocks of directories and long links.
    tree_block: u64,
    /// Blocks of the whole image.
    blocks: u64,
}

/// How an inode's contents are cut: whole blocks elsewhere, and what is left.
#[derive(Clone, Copy)]
struct Cut {
    blocks: u64,
    tail: u64,
}

impl Cut {
    const NONE: Cut = Cut { blocks: 0, tail: 0 };

    fn size(self) -> u64 {
        self.blocks * BLOCK_BYTES + self.tail
    }

    /// Blocks that are needed elsewhere.
    fn outside(self, inline: bool) -> u64 {
        self.blocks + u64::from(self.tail > 0 && !inline)
    }
}

/// Where an inode of `body` bytes (attributes included) comes to be, not before `from`, and whether
/// a `tail` fits behind it: an inode and a tail do not cross blocks.
fn position(from: u64, body: u64, tail: u64) -> (u64, bool) {
    let fits = |at: u64, bytes: u64| at % BLOCK_BYTES + bytes <= BLOCK_BYTES;
    let at = from.next_multiple_of(NID_BYTES as u64);
    let at = if fits(at, INODE_BYTES as u64) { at } else { at.next_multiple_of(BLOCK_BYTES) };
    match tail {
        0 => (at, false),
        _ if fits(at + body, tail) => (at, true),
        _ if body + tail <= BLOCK_BYTES => (at.next_multiple_of(BLOCK_BYTES), true),
        _ => (at, false),
    }
}

impl Image {
    /// Lays `tree` out in at most `most` bytes, which are [`limits::IMAGE_BYTES`] except in a test.
    pub(crate) fn of(mut tree: Tree, most: u64) -> Result<Self, BuildError> {
        let order = sort(&mut tree);
        let mut image = Self {
            nids: vec![0; tree.inodes.len()],
            sequence: Vec::with_capacity(order.len() + 1),
            shared: Shared::decide(&tree.xattrs, &[]),
            tree,
            order,
            shared_at: 0,
            tree_block: 0,
            blocks: 0,
        };
        image.arrange();
        let sets = image.sequence.iter().map(|i| image.tree.inode(*i).xattrs);
        image.shared = Shared::decide(&image.tree.xattrs, &Shared::count(&image.tree.xattrs, sets));
        image.lay_out(most)?;
        Ok(image)
    }

    /// Bytes of the image: a multiple of [`BLOCK`](crate::BLOCK).
    pub fn bytes(&self) -> u64 {
        self.blocks * BLOCK_BYTES
    }

    /// Blocks of the image: at this block the data file follows in [`Form::Flat`].
    pub fn blocks(&self) -> u32 {
        self.blocks as u32
    }

    /// Blocks that the data file has to have.
    pub fn data_blocks(&self) -> u32 {
        self.tree.data_blocks as u32
    }

    /// Inodes, the root included.
    pub fn inodes(&self) -> usize {
        self.sequence.len()
    }

    /// Writes the image: [`Image::bytes`] bytes, in pieces of some tens of kilobytes.
    pub fn write(&self, form: Form, to: &mut impl Write) -> io::Result<()> {
        let mut out = Out { to, buffer: Vec::new(), at: 0, given: 0 };
        self.write_head(form, &mut out);
        for (index, id) in self.sequence.iter().enumerate() {
            out.pad(u64::from(self.nids[*id as usize]) * NID_BYTES as u64);
            self.write_inode(index, *id, &mut out)?;
            out.flush(FLUSH)?;
        }
        out.pad(self.shared_at);
        self.shared.write_area(&self.tree.xattrs, &mut out.buffer);
        out.flush(FLUSH)?;
        self.write_blocks(&mut out)?;
        out.pad(self.bytes());
        out.flush(0)
    }

    /// Finds the order of the inodes: a directory's entries, then those of each directory among
    /// them.
    fn arrange(&mut self) {
        let Self { tree, order, sequence, nids, .. } = self;
        // Until they have positions, the numbers say who has had a place.
        nids[ROOT as usize] = 1;
        sequence.push(ROOT);
        let mut directories = vec![ROOT];
        while let Some(directory) = directories.pop() {
            let start = directories.len();
            for entry in entries_of(tree, order, directory) {
                let id = tree.entries[entry as usize].inode;
                if std::mem::replace(&mut nids[id as usize], 1) == 1 {
                    continue;
                }
                sequence.push(id);
                if tree.inode(id).is_directory() {
                    directories.push(id);
                }
            }
            directories[start..].reverse();
        }
    }

    fn lay_out(&mut self, most: u64) -> Result<(), BuildError> {
        let (mut at, mut outside) = (ROOT_AT as u64, 0);
        for index in 0..self.sequence.len() {
            let id = self.sequence[index];
            let (body, cut) = (self.body(id), self.cut(id));
            let (place, inline) = position(at, body, cut.tail);
            outside += cut.outside(inline);
            at = place + body + if inline { cut.tail } else { 0 };
            if at + outside * BLOCK_BYTES > most {
                return Err(BuildError::TooLarge);
            }
            self.nids[id as usize] = (place / NID_BYTES as u64) as u32;
        }
        self.shared_at = at.next_multiple_of(XATTR_ENTRY as u64);
        self.tree_block = (self.shared_at + self.shared.bytes).div_ceil(BLOCK_BYTES);
        self.blocks = self.tree_block + outside;
        if self.bytes() > most {
            return Err(BuildError::TooLarge);
        }
        if self.blocks + self.tree.data_blocks >= limits::BLOCKS {
            Err(BuildError::TooMuchData)
        } else {
            Ok(())
        }
    }

    /// Bytes of an inode and its attributes.
    fn body(&self, id: InodeId) -> u64 {
        (INODE_BYTES + self.shared.body(&self.tree.xattrs, self.tree.inode(id).xattrs)) as u64
    }

    fn cut(&self, id: InodeId) -> Cut {
        match self.tree.inode(id).payload {
            Payload::Directory { .. } => self.cut_directory(id),
            Payload::Symlink { len, .. } => Cut { blocks: 0, tail: len.into() },
            _ => Cut::NONE,
        }
    }

    fn cut_directory(&self, id: InodeId) -> Cut {
        let mut cut = Cut::NONE;
        for (name, _) in self.dirents(id) {
            let bytes = (DIRENT_BYTES + name.len()) as u64;
            if cut.tail + bytes > BLOCK_BYTES {
                cut = Cut { blocks: cut.blocks + 1, tail: 0 };
            }
            cut.tail += bytes;
        }
        if cut.tail == BLOCK_BYTES { Cut { blocks: cut.blocks + 1, tail: 0 } } else { cut }
    }

    /// A directory's entries as they are on disk, with `.` and `..` where they belong.
    fn dirents(&self, directory: InodeId) -> impl Iterator<Item = (&[u8], InodeId)> {
        let Payload::Directory { parent, .. } = self.tree.inode(directory).payload else {
            unreachable!("only directories have entries")
        };
        let mut dots = [(&b"."[..], directory), (&b".."[..], parent)].into_iter().peekable();
        let entries = entries_of(&self.tree, &self.order, directory);
        let mut entries =
            entries.map(|e| (self.tree.name(e), self.tree.entries[e as usize].inode)).peekable();
        std::iter::from_fn(move || match (dots.peek(), entries.peek()) {
            (Some(dot), Some(entry)) if entry.0 < dot.0 => entries.next(),
            (None, _) => entries.next(),
            _ => dots.next(),
        })
    }

    fn write_head(&self, form: Form, out: &mut Out<'_, impl Write>) {
        out.pad(SUPER_AT as u64);
        let head = &mut out.buffer;
        put32(head, MAGIC);
        put32(head, 0); // the checksum: see `Out::flush`
        put32(head, COMPAT_CHECKSUM | COMPAT_MTIME);
        head.extend_from_slice(&[BLOCK_BITS, 0]); // no extension
        put16(head, self.nids[ROOT as usize] as u16);
        put64(head, self.sequence.len() as u64);
        put64(head, 0); // no time of making
        put32(head, 0);
        put32(head, 0); // blocks: see `set_form`
        put32(head, 0); // inodes are counted from the start
        put32(head, (self.shared_at / BLOCK_BYTES) as u32);
        head.extend_from_slice(&self.tree.options.uuid);
        head.extend_from_slice(&[0; 16]); // no name
        out.pad((SUPER_AT + SUPER_BYTES) as u64);
        let head = &mut out.buffer;
        head.extend_from_slice(SLOT_TAG);
        head.resize(SUPER_AT + SUPER_BYTES + 64, 0);
        put32(head, self.tree.data_blocks as u32);
        put32(head, self.blocks as u32);
        set_form(head, form, self.blocks as u32, self.tree.data_blocks as u32);
    }

    /// Everything of an inode that is not in blocks elsewhere. `out` is at its position.
    fn write_inode(
        &self,
        index: usize,
        id: InodeId,
        out: &mut Out<'_, impl Write>,
    ) -> io::Result<()> {
        let inode = self.tree.inode(id);
        let (body, cut) = (self.body(id), self.cut(id));
        let (_, inline) = position(out.position(), body, cut.tail);
        let (kind, size, word) = match inode.payload {
            Payload::Directory { .. } => {
                (S_IFDIR, cut.size(), out.outside(self.tree_block, cut.outside(inline)))
            }
            Payload::Symlink { .. } => {
                (S_IFLNK, cut.size(), out.outside(self.tree_block, cut.outside(inline)))
            }
            Payload::File { size: 0, .. } => (S_IFREG, 0, 0),
            Payload::File { size, block } => (S_IFREG, size, self.blocks as u32 + block),
            Payload::CharDevice(number) => (S_IFCHR, 0, number),
            Payload::BlockDevice(number) => (S_IFBLK, 0, number),
            Payload::Fifo => (S_IFIFO, 0, 0),
        };
        let xattrs = body as usize - INODE_BYTES;
        let words = if xattrs == 0 { 0 } else { (xattrs - XATTR_HEADER) / 4 + 1 };
        let buffer = &mut out.buffer;
        put16(buffer, EXTENDED | (if inline { FLAT_INLINE } else { FLAT_PLAIN }) << 1);
        put16(buffer, words as u16);
        put16(buffer, kind | inode.mode);
        put16(buffer, 0);
        put64(buffer, size);
        put32(buffer, word);
        put32(buffer, index as u32 + 1); // only where `ino_t` has 32 bits
        put32(buffer, inode.uid);
        put32(buffer, inode.gid);
        put64(buffer, inode.mtime as u64);
        put32(buffer, inode.nanoseconds);
        put32(buffer, inode.nlink);
        put64(buffer, 0);
        put64(buffer, 0);
        self.shared.write_body(
            &self.tree.xattrs,
            inode.xattrs,
            self.shared_at % BLOCK_BYTES,
            buffer,
        );
        match inode.payload {
            _ if !inline => Ok(()),
            Payload::Symlink { at, len } => {
                buffer.extend_from_slice(self.tree.text(at, len));
                Ok(())
            }
            _ => self.directory_blocks(id, |number, block| {
                if number == cut.blocks {
                    self.write_dirents(block, buffer);
                }
                Ok(())
            }),
        }
    }

    /// What is in blocks of its own, in the order in which [`Out::outside`] gave them out.
    fn write_blocks(&self, out: &mut Out<'_, impl Write>) -> io::Result<()> {
        out.pad(self.tree_block * BLOCK_BYTES);
        for id in &self.sequence {
            let (body, cut) = (self.body(*id), self.cut(*id));
            let at = u64::from(self.nids[*id as usize]) * NID_BYTES as u64;
            let outside = cut.outside(position(at, body, cut.tail).1);
            if outside == 0 {
                continue;
            }
            if let Payload::Symlink { at, len } = self.tree.inode(*id).payload {
                out.buffer.extend_from_slice(self.tree.text(at, len));
                out.pad_block();
                continue;
            }
            self.directory_blocks(*id, |number, block| {
                if number < outside {
                    self.write_dirents(block, &mut out.buffer);
                    out.pad_block();
                }
                out.flush(FLUSH)
            })?;
        }
        Ok(())
    }

    /// Calls `each` with the number of each block of a directory and the entries in it.
    fn directory_blocks(
        &self,
        directory: InodeId,
        mut each: impl FnMut(u64, &[(&[u8], InodeId)]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut number, mut bytes, mut block) = (0, 0, Vec::new());
        for (name, id) in self.dirents(directory) {
            let more = DIRENT_BYTES + name.len();
            if bytes + more > BLOCK {
                each(number, &block)?;
                (number, bytes) = (number + 1, 0);
                block.clear();
            }
            bytes += more;
            block.push((name, id));
        }
        each(number, &block)
    }

    fn write_dirents(&self, block: &[(&[u8], InodeId)], out: &mut Vec<u8>) {
        let mut name_at = block.len() * DIRENT_BYTES;
        for (name, id) in block {
            put64(out, self.nids[*id as usize].into());
            put16(out, name_at as u16);
            out.extend_from_slice(&[file_type(self.tree.inode(*id)), 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, _)| out.extend_from_slice(name));
    }
}

/// Says in the superblock how the image is mounted.
fn set_form(first: &mut [u8], form: Form, blocks: u32, data_blocks: u32) {
    let (incompat, devices, slot, blocks) = match form {
        Form::WithDevice => (INCOMPAT_DEVICES, 1u16, SLOT, blocks),
        Form::Flat => (0, 0, 0, blocks.saturating_add(data_blocks)),
    };
    let head = &mut first[SUPER_AT..];
    head[36..40].copy_from_slice(&blocks.to_le_bytes());
    head[80..84].copy_from_slice(&incompat.to_le_bytes());
    head[86..88].copy_from_slice(&devices.to_le_bytes());
    head[88..90].copy_from_slice(&slot.to_le_bytes());
}

/// Makes the checksum in the superblock right.
fn seal(first: &mut [u8]) {
    first[SUPER_AT + 4..SUPER_AT + 8].fill(0);
    let sum = checksum(&first[SUPER_AT..BLOCK]);
    first[SUPER_AT + 4..SUPER_AT + 8].copy_from_slice(&sum.to_le_bytes());
}

/// The first block of the image `meta` in the given form. All other blocks are the same, so one
/// file can be served in both.
pub fn first_block(meta: &[u8], form: Form) -> Result<[u8; BLOCK], ReadError> {
    let reader = Reader::open(meta)?;
    let mut first = meta.first_chunk().copied().ok_or(ReadError::NotErofs)?;
    set_form(&mut first, form, reader.blocks(), reader.data_blocks());
    seal(&mut first);
    Ok(first)
}

/// Sorts the live entries by directory and name, and tells each directory where its entries begin.
fn sort(tree: &mut Tree) -> Vec<u32> {
    let mut order: Vec<u32> = Vec::with_capacity(tree.entries.len());
    order.extend((0..tree.entries.len() as u32).filter(|e| tree.is_live(*e)));
    let key = |e: u32| (tree.entries[e as usize].parent, tree.name(e));
    order.sort_unstable_by(|a, b| key(*a).cmp(&key(*b)));
    for inode in &mut tree.inodes {
        if let Payload::Directory { first, .. } = &mut inode.payload {
            *first = order.len() as u32;
        }
    }
    for (place, entry) in order.iter().enumerate().rev() {
        if let Payload::Directory { first, .. } =
            &mut tree.inodes[tree.entries[*entry as usize].parent as usize].payload
        {
            *first = place as u32;
        }
    }
    order
}

/// A directory's entries, sorted.
fn entries_of<'a>(
    tree: &'a Tree,
    order: &'a [u32],
    directory: InodeId,
) -> impl Iterator<Item = u32> + use<'a> {
    let Payload::Directory { first, .. } = tree.inode(directory).payload else {
        unreachable!("only directories have entries")
    };
    order[first as usize..]
        .iter()
        .copied()
        .take_while(move |e| tree.entries[*e as usize].parent == directory)
}

fn file_type(inode: &Inode) -> u8 {
    match inode.payload {
        Payload::Directory { .. } => FT_DIRECTORY,
        Payload::File { .. } => FT_FILE,
        Payload::Symlink { .. } => FT_SYMLINK,
        Payload::CharDevice(_) => FT_CHAR,
        Payload::BlockDevice(_) => FT_BLOCK,
        Payload::Fifo => FT_FIFO,
    }
}

fn put16(out: &mut Vec<u8>, n: u16) {
    out.extend_from_slice(&n.to_le_bytes());
}

fn put32(out: &mut Vec<u8>, n: u32) {
    out.extend_from_slice(&n.to_le_bytes());
}

fn put64(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(&n.to_le_bytes());
}

/// Bytes that are gathered before they are written.
const FLUSH: usize = 64 << 10;

/// What is written, and how far.
struct Out<'a, W> {
    to: &'a mut W,
    buffer: Vec<u8>,
    /// Position of the buffer's first byte.
    at: u64,
    /// Blocks of directories and long links that were given out.
    given: u64,
}

impl<W: Write> Out<'_, W> {
    fn position(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    /// Gives out the next `blocks` of those that begin at the block `from`.
    fn outside(&mut self, from: u64, blocks: u64) -> u32 {
        let block = if blocks == 0 { 0 } else { from + self.given };
        self.given += blocks;
        block as u32
    }

    /// Zeros up to the position `to`.
    fn pad(&mut self, to: u64) {
        let missing = to.saturating_sub(self.position());
        self.buffer.resize(self.buffer.len() + missing as usize, 0);
    }

    fn pad_block(&mut self) {
        self.pad(self.position().next_multiple_of(BLOCK_BYTES));
    }

    /// Passes on what is gathered, once it is `enough`. The first block is complete then, and its
    /// checksum known.
    fn flush(&mut self, enough: usize) -> io::Result<()> {
        if self.buffer.len() < enough {
            return Ok(());
        }
        if self.at == 0 {
            seal(&mut self.buffer);
        }
        self.to.write_all(&self.buffer)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
