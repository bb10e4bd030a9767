//! Reads images that a [`Builder`](crate::Builder) made, from any bytes in memory. Nothing is
//! allocated that the bytes do not have, nothing recurses, and every step is bounded by the size of
//! what it reads. [`Stored`](crate::Stored) reads them from elsewhere.

use crate::{
    BLOCK as BLOCK_BYTES, DeviceNumber, Extent, ReadError, Time, format::*, limits, xattr::prefix,
};
use std::ops::Range;

/// Number of an inode, which is also what `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u64);

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    File,
    Directory,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
    Symlink,
}

/// What an inode has besides attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Entries: see [`Reader::directory`].
    Directory,
    /// Contents in the data file.
    File(Extent),
    /// A target: see [`Reader::target`].
    Symlink,
    /// A character device; `0:0` is a whiteout.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// An inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Its number.
    pub nid: Nid,
    /// Permissions, without the kind.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of links.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// Time of modification.
    pub mtime: Time,
    /// What it is.
    pub content: Content,
    /// Block of what is not inline.
    block: u32,
    inline: bool,
    /// Bytes of the attributes behind the inode.
    pub(crate) xattrs: usize,
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Its name; `.` and `..` are entries like others.
    pub name: &'a [u8],
    /// Its inode.
    pub nid: Nid,
    /// What the directory says of its kind.
    pub kind: Kind,
    /// Where the listing goes on after it: a position for [`Directory::entries`].
    pub next: u64,
}

/// An extended attribute of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundXattr<'a> {
    /// Name with its namespace.
    pub name: Vec<u8>,
    /// Value.
    pub value: &'a [u8],
}

/// Where everything is in an image, as its first block tells.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Bytes of the metadata.
    pub(crate) length: u64,
    root: Nid,
    inodes: u64,
    /// Position of the block from which shared attributes are counted.
    shared_at: u64,
    /// Blocks of the metadata.
    blocks: u32,
    data_blocks: u32,
    uuid: [u8; 16],
}

/// An image in memory, with or without data behind it.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    layout: Layout,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], ReadError> {
    let part = at.checked_add(N).and_then(|end| bytes.get(at..end)).ok_or(ReadError::Corrupt)?;
    part.try_into().map_err(|_| ReadError::Corrupt)
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> Result<u16, ReadError> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> Result<u32, ReadError> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> Result<u64, ReadError> {
    array(bytes, at).map(u64::from_le_bytes)
}

impl Layout {
    /// Of an image of `length` bytes, with or without data behind it, whose first block is the
    /// start of `first`. Checks the superblock; everything else is checked when it is read.
    pub fn of(first: &[u8], length: u64) -> Result<Self, ReadError> {
        let head = first.get(SUPER_AT..BLOCK).ok_or(ReadError::NotErofs)?;
        if le32(head, 0)? != MAGIC {
            return Err(ReadError::NotErofs);
        }
        let plain = head[12] == BLOCK_BITS
            && head[13] == 0
            && le32(head, 40)? == 0
            && le16(head, 84)? == 0
            && head[90..SUPER_BYTES] == [0; 38];
        let compat = COMPAT_CHECKSUM | COMPAT_MTIME;
        let devices = match le32(head, 80)? {
            0 => (0, 0),
            INCOMPAT_DEVICES => (1, SLOT),
            _ => return Err(ReadError::Unsupported),
        };
        if !plain || le32(head, 8)? != compat || (le16(head, 86)?, le16(head, 88)?) != devices {
            return Err(ReadError::Unsupported);
        }
        if checksum(&[&head[..4], &[0; 4], &head[8..]].concat()) != le32(head, 4)? {
            return Err(ReadError::Checksum);
        }
        // The slot of the device is there in both forms.
        let slot = SUPER_AT + SUPER_BYTES;
        let (data_blocks, blocks) = (le32(first, slot + 64)?, le32(first, slot + 68)?);
        let whole = u64::from(blocks) + if devices.0 == 0 { u64::from(data_blocks) } else { 0 };
        let metadata = u64::from(blocks) * BLOCK_BYTES;
        if whole != u64::from(le32(head, 36)?) || metadata > length {
            return Err(ReadError::Corrupt);
        }
        Ok(Self {
            length: metadata,
            root: Nid(le16(head, 14)?.into()),
            inodes: le64(head, 16)?,
            shared_at: u64::from(le32(head, 44)?) * BLOCK_BYTES,
            blocks,
            data_blocks,
            uuid: array(head, 48)?,
        })
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.root
    }

    /// Position of an inode.
    pub(crate) fn inode_at(&self, nid: Nid) -> Result<u64, ReadError> {
        let at = nid.0.checked_mul(NID_BYTES as u64).filter(|at| *at < self.length);
        at.ok_or(ReadError::Corrupt)
    }

    /// What the bytes of an inode say.
    pub(crate) fn metadata(
        &self,
        nid: Nid,
        inode: &[u8; INODE_BYTES],
    ) -> Result<Metadata, ReadError> {
        let (format, mode) = (le16(inode, 0)?, le16(inode, 4)?);
        let inline = match format {
            f if f == EXTENDED | FLAT_PLAIN << 1 => false,
            f if f == EXTENDED | FLAT_INLINE << 1 => true,
            _ => return Err(ReadError::Unsupported),
        };
        let (size, word) = (le64(inode, 8)?, le32(inode, 16)?);
        let content = match mode & S_IFMT {
            S_IFDIR => Content::Directory,
            S_IFREG => Content::File(self.extent(size, word)?),
            S_IFLNK => Content::Symlink,
            S_IFCHR => Content::CharDevice(DeviceNumber::decode(word)),
            S_IFBLK => Content::BlockDevice(DeviceNumber::decode(word)),
            S_IFIFO => Content::Fifo,
            S_IFSOCK => Content::Socket,
            _ => return Err(ReadError::Corrupt),
        };
        if inline && !matches!(content, Content::Directory | Content::Symlink) {
            return Err(ReadError::Unsupported);
        }
        let words = usize::from(le16(inode, 2)?);
        let mtime = Time { seconds: le64(inode, 32)? as i64, nanoseconds: le32(inode, 40)? };
        Ok(Metadata {
            nid,
            mode: mode & !S_IFMT,
            uid: le32(inode, 24)?,
            gid: le32(inode, 28)?,
            nlink: le32(inode, 44)?,
            size,
            mtime,
            content,
            block: word,
            inline,
            xattrs: if words == 0 { 0 } else { XATTR_HEADER + (words - 1) * 4 },
        })
    }

    fn extent(&self, size: u64, word: u32) -> Result<Extent, ReadError> {
        if size == 0 {
            return Ok(Extent { block: 0, blocks: 0 });
        }
        let blocks = u32::try_from(size.div_ceil(BLOCK_BYTES)).map_err(|_| ReadError::Corrupt)?;
        let block = word.checked_sub(self.blocks).ok_or(ReadError::Corrupt)?;
        let end = block.checked_add(blocks).ok_or(ReadError::Corrupt)?;
        if end > self.data_blocks { Err(ReadError::Corrupt) } else { Ok(Extent { block, blocks }) }
    }

    /// `bytes` bytes from `at` on.
    pub(crate) fn range(&self, at: u64, bytes: usize) -> Result<Range<u64>, ReadError> {
        let end = at.checked_add(bytes as u64).filter(|end| *end <= self.length);
        Ok(at..end.ok_or(ReadError::Corrupt)?)
    }

    /// Block `number` of a directory or symbolic link: at most [`BLOCK`] bytes, for the last may be
    /// shorter.
    pub(crate) fn part(&self, inode: &Metadata, number: u64) -> Result<Range<u64>, ReadError> {
        let start = number
            .checked_mul(BLOCK_BYTES)
            .filter(|s| *s < inode.size)
            .ok_or(ReadError::Corrupt)?;
        let bytes = (inode.size - start).min(BLOCK_BYTES);
        let at = if inode.inline && start + bytes == inode.size {
            self.inode_at(inode.nid)? + (INODE_BYTES + inode.xattrs) as u64
        } else {
            (u64::from(inode.block) + number) * BLOCK_BYTES
        };
        if at % BLOCK_BYTES + bytes > BLOCK_BYTES {
            Err(ReadError::Corrupt)
        } else {
            self.range(at, bytes as usize)
        }
    }

    /// Where the target of a symbolic link is.
    pub(crate) fn target(&self, inode: &Metadata) -> Result<Range<u64>, ReadError> {
        if inode.content != Content::Symlink {
            return Err(ReadError::Kind);
        }
        if inode.size == 0 || inode.size > limits::PATH_BYTES as u64 {
            return Err(ReadError::Corrupt);
        }
        self.part(inode, 0)
    }

    /// Blocks of a directory.
    pub(crate) fn directory(&self, inode: &Metadata) -> Result<u64, ReadError> {
        if inode.content != Content::Directory {
            return Err(ReadError::Kind);
        }
        // More blocks than the image has are not worth a search.
        if inode.size > self.length {
            Err(ReadError::Corrupt)
        } else {
            Ok(inode.size.div_ceil(BLOCK_BYTES))
        }
    }

    /// Position of the shared attribute of this number.
    pub(crate) fn shared(&self, id: u32) -> u64 {
        self.shared_at + u64::from(id) * XATTR_ENTRY as u64
    }
}

impl<'a> Reader<'a> {
    /// Checks the superblock; everything else is checked when it is read.
    pub fn open(bytes: &'a [u8]) -> Result<Self, ReadError> {
        let layout = Layout::of(bytes, bytes.len() as u64)?;
        let length = usize::try_from(layout.length).ok();
        let bytes = length.and_then(|length| bytes.get(..length)).ok_or(ReadError::Corrupt)?;
        Ok(Self { bytes, layout })
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.layout.root
    }

    /// Number of inodes.
    pub fn inodes(&self) -> u64 {
        self.layout.inodes
    }

    /// Blocks of the image without data.
    pub fn blocks(&self) -> u32 {
        self.layout.blocks
    }

    /// Blocks of the data file.
    pub fn data_blocks(&self) -> u32 {
        self.layout.data_blocks
    }

    /// See [`Options::uuid`](crate::Options::uuid).
    pub fn uuid(&self) -> [u8; 16] {
        self.layout.uuid
    }

    /// Reads an inode.
    pub fn metadata(&self, nid: Nid) -> Result<Metadata, ReadError> {
        let inode = self.slice(self.layout.range(self.layout.inode_at(nid)?, INODE_BYTES)?)?;
        self.layout.metadata(nid, inode.first_chunk().ok_or(ReadError::Corrupt)?)
    }

    /// Where a symbolic link points to.
    pub fn target(&self, inode: &Metadata) -> Result<&'a [u8], ReadError> {
        self.slice(self.layout.target(inode)?)
    }

    /// The entries of a directory.
    pub fn directory(&self, inode: &Metadata) -> Result<Directory<'a>, ReadError> {
        let blocks = self.layout.directory(inode)?;
        Ok(Directory { reader: *self, inode: *inode, blocks })
    }

    /// Extended attributes, in no particular order.
    pub fn xattrs(&self, inode: &Metadata) -> Result<Vec<FoundXattr<'a>>, ReadError> {
        if inode.xattrs == 0 {
            return Ok(Vec::new());
        }
        let at = self.layout.inode_at(inode.nid)? + INODE_BYTES as u64;
        let body = self.slice(self.layout.range(at, inode.xattrs)?)?;
        let shared = usize::from(*body.get(4).ok_or(ReadError::Corrupt)?);
        let ids = body.get(XATTR_HEADER..XATTR_HEADER + 4 * shared).ok_or(ReadError::Corrupt)?;
        let mut found = Vec::new();
        for n in 0..shared {
            let at = usize::try_from(self.layout.shared(le32(ids, 4 * n)?)).ok();
            let rest = at.and_then(|at| self.bytes.get(at..)).ok_or(ReadError::Corrupt)?;
            found.push(attribute(rest)?.0);
        }
        let mut rest = &body[XATTR_HEADER + 4 * shared..];
        while !rest.is_empty() {
            if found.len() == limits::XATTRS {
                return Err(ReadError::Corrupt);
            }
            let (xattr, bytes) = attribute(rest)?;
            found.push(xattr);
            rest = rest.get(bytes..).ok_or(ReadError::Corrupt)?;
        }
        Ok(found)
    }

    fn slice(&self, range: Range<u64>) -> Result<&'a [u8], ReadError> {
        let index = |at| usize::try_from(at).map_err(|_| ReadError::Corrupt);
        self.bytes.get(index(range.start)?..index(range.end)?).ok_or(ReadError::Corrupt)
    }
}

/// The attribute at the start of `bytes`, and how long it is.
fn attribute(bytes: &[u8]) -> Result<(FoundXattr<'_>, usize), ReadError> {
    let [name, index] = array(bytes, 0)?;
    let (name, value) = (usize::from(name), usize::from(le16(bytes, 2)?));
    let prefix = prefix(index).ok_or(ReadError::Unsupported)?;
    let end = XATTR_ENTRY + name + value;
    let text = bytes.get(XATTR_ENTRY..end).ok_or(ReadError::Corrupt)?;
    let (name, value) = text.split_at(name);
    Ok((FoundXattr { name: [prefix, name].concat(), value }, end.next_multiple_of(XATTR_ENTRY)))
}

/// A directory of an image.
#[derive(Clone, Copy, Debug)]
pub struct Directory<'a> {
    reader: Reader<'a>,
    inode: Metadata,
    blocks: u64,
}

impl<'a> Directory<'a> {
    /// The entry called `name`, found as the kernel finds it: by halving.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<DirEntry<'a>>, ReadError> {
        let (mut low, mut high) = (0, self.blocks);
        // The first block that begins beyond the name.
        while low < high {
            let middle = low + (high - low) / 2;
            if self.block(middle)?.entry(0)?.name <= name {
                low = middle + 1
            } else {
                high = middle
            }
        }
        let Some(number) = low.checked_sub(1) else { return Ok(None) };
        self.block(number)?.lookup(name)
    }

    /// The entries from a position on, in the order of their names: zero, or [`DirEntry::next`].
    /// After an error there is nothing more.
    pub fn entries(
        &self,
        from: u64,
    ) -> impl Iterator<Item = Result<DirEntry<'a>, ReadError>> + use<'a> {
        let directory = *self;
        let (mut number, mut index) = Block::position(from);
        std::iter::from_fn(move || {
            while number < directory.blocks {
                let entry = directory.block(number).and_then(|block| {
                    if index < block.count { block.entry(index).map(Some) } else { Ok(None) }
                });
                match entry {
                    Ok(Some(entry)) => {
                        index += 1;
                        return Some(Ok(entry));
                    }
                    Ok(None) => (number, index) = (number + 1, 0),
                    Err(error) => {
                        number = u64::MAX;
                        return Some(Err(error));
                    }
                }
            }
            None
        })
    }

    fn block(&self, number: u64) -> Result<Block<'a>, ReadError> {
        let bytes = self.reader.slice(self.reader.layout.part(&self.inode, number)?)?;
        Block::new(bytes, number)
    }
}

/// A block of a directory: its entries, then their names.
pub(crate) struct Block<'a> {
    bytes: &'a [u8],
    pub(crate) count: usize,
    /// Its position in the directory.
    at: u64,
}

impl<'a> Block<'a> {
    /// The block `number` of a directory, as it is in the image.
    pub(crate) fn new(bytes: &'a [u8], number: u64) -> Result<Self, ReadError> {
        let names_at = usize::from(le16(bytes, 8)?);
        if names_at == 0 || names_at % DIRENT_BYTES != 0 || names_at >= bytes.len() {
            return Err(ReadError::Corrupt);
        }
        Ok(Self { bytes, count: names_at / DIRENT_BYTES, at: number * BLOCK_BYTES })
    }

    /// In which block, and at which place in it, a listing goes on from [`DirEntry::next`].
    pub(crate) fn position(from: u64) -> (u64, usize) {
        (from / BLOCK_BYTES, (from % BLOCK_BYTES) as usize / DIRENT_BYTES)
    }

    /// The entry called `name`.
    pub(crate) fn lookup(&self, name: &[u8]) -> Result<Option<DirEntry<'a>>, ReadError> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.entry(middle)?;
            match entry.name.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(entry)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    pub(crate) fn entry(&self, index: usize) -> Result<DirEntry<'a>, ReadError> {
        let at = index * DIRENT_BYTES;
        let start = usize::from(le16(self.bytes, at + 8)?);
        let name = if index + 1 < self.count {
            let end = usize::from(le16(self.bytes, at + DIRENT_BYTES + 8)?);
            self.bytes.get(start..end)
        } else {
            let rest = self.bytes.get(start..);
            rest.map(|rest| &rest[..rest.iter().position(|b| *b == 0).unwrap_or(rest.len())])
        };
        let name = name.filter(|n| {
            (1..=limits::NAME_BYTES).contains(&n.len()) && !n.iter().any(|b| matches!(b, 0 | b'/'))
        });
        let kind = match self.bytes[at + 10] {
            FT_FILE => Kind::File,
            FT_DIRECTORY => Kind::Directory,
            FT_CHAR => Kind::CharDevice,
            FT_BLOCK => Kind::BlockDevice,
            FT_FIFO => Kind::Fifo,
            FT_SOCKET => Kind::Socket,
            FT_SYMLINK => Kind::Symlink,
            _ => return Err(ReadError::Corrupt),
        };
        let next = self.at + (at + DIRENT_BYTES) as u64;
        Ok(DirEntry {
            name: name.ok_or(ReadError::Corrupt)?,
            nid: Nid(le64(self.bytes, at)?),
            kind,
            next,
        })
    }
}
