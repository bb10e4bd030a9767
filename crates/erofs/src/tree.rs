//! Entries and inodes as the builder collects them and the image writes them.

use crate::{
    Options,
    xattr::{Holder, SetId, Xattrs},
};

/// Index of an inode; the root is the first.
pub type InodeId = u32;
pub const ROOT: InodeId = 0;
/// The inode of entries that are gone, and the end of lists; beyond
/// [`ENTRIES`](crate::limits::ENTRIES).
pub const NONE: u32 = u32::MAX;

/// What an inode is. Of a directory, `first` begins the list of its entries, and in an image it is
/// the place of its first entry in order.
#[derive(Clone, Copy)]
pub enum Payload {
    Directory { parent: InodeId, first: u32, implied: bool },
    File { size: u64, block: u32 },
    Symlink { at: u32, len: u16 },
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
}

#[derive(Clone, Copy)]
pub struct Inode {
    pub payload: Payload,
    pub mtime: i64,
    pub nanoseconds: u32,
    pub uid: u32,
    pub gid: u32,
    /// Names, or two and one for each directory in it; zero if it is gone.
    pub nlink: u32,
    pub xattrs: SetId,
    pub mode: u16,
}

impl Inode {
    pub fn is_directory(&self) -> bool {
        matches!(self.payload, Payload::Directory { .. })
    }

    pub fn holder(&self) -> Holder {
        match self.payload {
            Payload::Directory { .. } => Holder::Directory,
            Payload::File { .. } => Holder::File,
            Payload::Symlink { .. } => Holder::Symlink,
            _ => Holder::Special,
        }
    }
}

/// A name in a directory.
#[derive(Clone, Copy)]
pub struct Entry {
    pub parent: InodeId,
    pub inode: InodeId,
    pub name_at: u32,
    /// The next entry of the same directory.
    pub next: u32,
    pub name_len: u8,
}

/// Entries, inodes and their text, which an image takes over.
pub struct Tree {
    pub options: Options,
    pub text: Vec<u8>,
    pub entries: Vec<Entry>,
    pub inodes: Vec<Inode>,
    pub xattrs: Xattrs,
    /// Blocks of the data file.
    pub data_blocks: u64,
}

impl Tree {
    pub fn name(&self, entry: u32) -> &[u8] {
        let entry = &self.entries[entry as usize];
        &self.text[entry.name_at as usize..][..usize::from(entry.name_len)]
    }

    pub fn text(&self, at: u32, len: u16) -> &[u8] {
        &self.text[at as usize..][..usize::from(len)]
    }

    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id as usize]
    }

    pub fn is_live(&self, entry: u32) -> bool {
        self.entries[entry as usize].inode != NONE
    }
}
