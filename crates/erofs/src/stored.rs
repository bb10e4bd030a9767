//! Reads images that are not in memory, a piece at a time into buffers of fixed size: nothing is
//! allocated, and every step is bounded as it is in [`Reader`](crate::Reader).

use crate::{
    DirEntry, Layout, Metadata, Nid, ReadError,
    format::*,
    limits,
    read::{Block, le16},
    xattr::prefix,
};
use std::ops::{ControlFlow, Range};

/// Where the bytes of an image are.
pub trait Bytes {
    /// Fills `out` with what is from `at` on; [`ReadError::Io`] if that cannot be had.
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), ReadError>;
}

impl Bytes for [u8] {
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let at = usize::try_from(at).map_err(|_| ReadError::Io)?;
        let end = at.checked_add(out.len()).ok_or(ReadError::Io)?;
        out.copy_from_slice(self.get(at..end).ok_or(ReadError::Io)?);
        Ok(())
    }
}

/// An image whose bytes are elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a, B: ?Sized> {
    layout: &'a Layout,
    bytes: &'a B,
}

/// What a walk over attributes calls: with the start of the name, the rest of it, and where the
/// value is in the image.
type EachXattr<'e> = &'e mut dyn FnMut(&[u8], &[u8], Range<u64>) -> ControlFlow<()>;

impl<'a, B: Bytes + ?Sized> Stored<'a, B> {
    /// The image with this layout in `bytes`.
    pub fn new(layout: &'a Layout, bytes: &'a B) -> Self {
        Self { layout, bytes }
    }

    /// Reads an inode.
    pub fn metadata(&self, nid: Nid) -> Result<Metadata, ReadError> {
        let mut inode = [0; INODE_BYTES];
        let at = self.layout.range(self.layout.inode_at(nid)?, INODE_BYTES)?;
        self.bytes.read(at.start, &mut inode)?;
        self.layout.metadata(nid, &inode)
    }

    /// Writes where a symbolic link points to at the start of `out`, which has room for
    /// [`limits::PATH_BYTES`]; returns how long that is.
    pub fn target(&self, inode: &Metadata, out: &mut [u8]) -> Result<usize, ReadError> {
        let range = self.layout.target(inode)?;
        let length = (range.end - range.start) as usize;
        self.bytes.read(range.start, out.get_mut(..length).ok_or(ReadError::Corrupt)?)?;
        Ok(length)
    }

    /// The inode of the entry called `name`.
    pub fn lookup(&self, directory: &Metadata, name: &[u8]) -> Result<Option<Nid>, ReadError> {
        let mut buffer = [0; BLOCK];
        let (mut low, mut high) = (0, self.layout.directory(directory)?);
        // The first block that begins beyond the name.
        while low < high {
            let middle = low + (high - low) / 2;
            if self.block(directory, middle, &mut buffer)?.entry(0)?.name <= name {
                low = middle + 1
            } else {
                high = middle
            }
        }
        let Some(number) = low.checked_sub(1) else { return Ok(None) };
        let found = self.block(directory, number, &mut buffer)?.lookup(name)?;
        Ok(found.map(|entry| entry.nid))
    }

    /// Calls `each` with the entries of a directory, in the order of their names, from a position
    /// on: zero, or [`DirEntry::next`].
    pub fn list(
        &self,
        directory: &Metadata,
        from: u64,
        mut each: impl FnMut(&DirEntry<'_>) -> Result<ControlFlow<()>, ReadError>,
    ) -> Result<(), ReadError> {
        let mut buffer = [0; BLOCK];
        let blocks = self.layout.directory(directory)?;
        let (first, mut index) = Block::position(from);
        for number in first..blocks {
            let block = self.block(directory, number, &mut buffer)?;
            for index in index..block.count {
                if each(&block.entry(index)?)?.is_break() {
                    return Ok(());
                }
            }
            index = 0;
        }
        Ok(())
    }

    /// Where the value of the extended attribute `name` is in the image.
    pub fn xattr(&self, inode: &Metadata, name: &[u8]) -> Result<Option<Range<u64>>, ReadError> {
        let mut found = None;
        self.each_xattr(inode, &mut |prefix, rest, value| {
            if name.strip_prefix(prefix) == Some(rest) {
                found = Some(value);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    /// Calls `each` with the name of every extended attribute, in two parts, in no particular
    /// order.
    pub fn xattr_names(
        &self,
        inode: &Metadata,
        mut each: impl FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        self.each_xattr(inode, &mut |prefix, rest, _| each(prefix, rest))
    }

    /// Fills `out` with the value that [`Stored::xattr`] found.
    pub fn value(&self, at: &Range<u64>, out: &mut [u8]) -> Result<(), ReadError> {
        self.bytes.read(at.start, out)
    }

    fn each_xattr(&self, inode: &Metadata, each: EachXattr<'_>) -> Result<(), ReadError> {
        if inode.xattrs == 0 {
            return Ok(());
        }
        let at = self.layout.inode_at(inode.nid)? + INODE_BYTES as u64;
        let body = self.layout.range(at, inode.xattrs)?;
        let mut header = [0; XATTR_HEADER];
        self.bytes.read(body.start, &mut header)?;
        let shared = u64::from(header[4]);
        let ids = body.start + XATTR_HEADER as u64;
        let mut next = ids + 4 * shared;
        if next > body.end {
            return Err(ReadError::Corrupt);
        }
        for n in 0..shared {
            let mut id = [0; 4];
            self.bytes.read(ids + 4 * n, &mut id)?;
            let at = self.layout.shared(u32::from_le_bytes(id));
            if self.attribute(at, self.layout.length, each)?.is_break() {
                return Ok(());
            }
        }
        let mut count = shared;
        while next < body.end {
            count += 1;
            if count > limits::XATTRS as u64 {
                return Err(ReadError::Corrupt);
            }
            match self.attribute(next, body.end, each)? {
                ControlFlow::Continue(end) => next = end,
                ControlFlow::Break(()) => return Ok(()),
            }
        }
        if next > body.end { Err(ReadError::Corrupt) } else { Ok(()) }
    }

    /// The attribute at `at`, which ends before `limit`; returns where the next begins.
    fn attribute(
        &self,
        at: u64,
        limit: u64,
        each: EachXattr<'_>,
    ) -> Result<ControlFlow<(), u64>, ReadError> {
        let rest = limit.checked_sub(at).ok_or(ReadError::Corrupt)?;
        let mut entry = [0; XATTR_ENTRY + limits::XATTR_NAME_BYTES];
        let there = rest.min(entry.len() as u64) as usize;
        if there < XATTR_ENTRY {
            return Err(ReadError::Corrupt);
        }
        self.bytes.read(at, &mut entry[..there])?;
        let (name, length) = (usize::from(entry[0]), u64::from(le16(&entry, 2)?));
        let prefix = prefix(entry[1]).ok_or(ReadError::Unsupported)?;
        let value = at + (XATTR_ENTRY + name) as u64;
        let value = value..value + length;
        if value.end > limit {
            return Err(ReadError::Corrupt);
        }
        let name = &entry[XATTR_ENTRY..XATTR_ENTRY + name];
        let next = value.end.next_multiple_of(XATTR_ENTRY as u64);
        Ok(match each(prefix, name, value) {
            ControlFlow::Continue(()) => ControlFlow::Continue(next),
            ControlFlow::Break(()) => ControlFlow::Break(()),
        })
    }

    fn block<'b>(
        &self,
        directory: &Metadata,
        number: u64,
        buffer: &'b mut [u8; BLOCK],
    ) -> Result<Block<'b>, ReadError> {
        let range = self.layout.part(directory, number)?;
        let bytes = buffer.get_mut(..(range.end - range.start) as usize);
        let bytes = bytes.ok_or(ReadError::Corrupt)?;
        self.bytes.read(range.start, bytes)?;
        Block::new(bytes, number)
    }
}
