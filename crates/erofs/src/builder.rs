//! The tree of a layer: entries in the order of its tar, with the meaning that unpacking gives
//! them.

use crate::{
    BLOCK, BuildError, Image, Xattr, limits,
    path::{check, clean, components, split},
    xattr::{CAPABILITY, Holder, SetId, Xattrs},
};
use hashbrown::{HashTable, hash_table::Entry as Slot};
use std::{
    borrow::Cow,
    hash::{BuildHasher, RandomState},
};

/// Which attribute says that a directory hides what is below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OpaqueMark {
    /// `trusted.overlay.opaque`, for overlays that root mounts.
    #[default]
    Trusted,
    /// `user.overlay.opaque`, for overlays with `userxattr`.
    User,
}

impl OpaqueMark {
    /// The attribute's name.
    pub fn name(self) -> &'static str {
        match self {
            OpaqueMark::Trusted => "trusted.overlay.opaque",
            OpaqueMark::User => "user.overlay.opaque",
        }
    }
}

/// What is said of an image beside its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The file system's UUID. Overlayfs finds the origin of a copied-up file by it, so layers that
    /// meet in one overlay should differ; zeros are "none".
    pub uuid: [u8; 16],
    /// How opaque directories are marked.
    pub opaque: OpaqueMark,
}

/// A time of modification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds after that, below a second.
    pub nanoseconds: u32,
}

/// What every entry has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes<'a> {
    /// Permissions, up to `07777`. Symbolic links always have `0777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of modification.
    pub mtime: Time,
    /// Extended attributes; of equal names the last counts.
    pub xattrs: &'a [Xattr<'a>],
}

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Up to [`limits::DEVICE_MAJOR`].
    pub major: u32,
    /// Up to [`limits::DEVICE_MINOR`].
    pub minor: u32,
}

impl DeviceNumber {
    /// As the format has it (the kernel's `new_encode_dev`).
    pub fn encoded(self) -> Result<u32, BuildError> {
        if self.major > limits::DEVICE_MAJOR || self.minor > limits::DEVICE_MINOR {
            return Err(BuildError::Device);
        }
        Ok((self.minor & 0xff) | (self.major << 8) | ((self.minor & !0xff) << 12))
    }

    pub(crate) fn decode(encoded: u32) -> Self {
        Self {
            major: (encoded >> 8) & limits::DEVICE_MAJOR,
            minor: (encoded & 0xff) | ((encoded >> 12) & !0xff),
        }
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node<'a> {
    /// A directory; one that is there gets the attributes, and keeps its entries.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where to; any text.
        target: &'a [u8],
    },
    /// Another name of an entry that came before, whose attributes become those of this one.
    HardLink {
        /// Its path in the layer.
        target: &'a [u8],
    },
    /// A character device; `0:0` is a whiteout.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
}

/// Where a regular file's contents belong in the data file, in blocks of [`BLOCK`] bytes. The rest
/// of the last block has to be zeros: programs that map the file see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block.
    pub block: u32,
    /// Number of blocks.
    pub blocks: u32,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// Nothing: the entry is the root, whose attributes layers do not change when containerd
    /// unpacks them.
    Root,
    /// A regular file, and where its contents belong.
    File(Extent),
    /// Anything else, under its own name.
    Entry,
    /// A whiteout: what lower layers have under the name is hidden.
    Whiteout,
    /// The parent directory hides everything below.
    Opaque,
}

/// Prefix of names that stand for something missing below (OCI image specification, layer.md).
const WHITEOUT: &[u8] = b".wh.";
/// The name that makes its directory opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Index of an inode; the root is the first.
pub type InodeId = u32;
pub const ROOT: InodeId = 0;
/// The inode of entries that are gone, and the end of lists; beyond [`limits::ENTRIES`].
const NONE: u32 = u32::MAX;

/// What an inode is. Of a directory, `first` begins the list of its entries, and in an [`Image`] it
/// is the place of its first entry in order.
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

    fn holder(&self) -> Holder {
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
    name_at: u32,
    /// The next entry of the same directory.
    next: u32,
    name_len: u8,
}

/// Entries, inodes and their text, which an [`Image`] takes over.
pub struct Tree {
    pub options: Options,
    text: Vec<u8>,
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

/// Collects a layer's entries.
///
/// Paths are bytes, relative to the layer's root, whether they begin with a slash or not. What
/// unpacking does is done here as text, and no file system is asked:
///
/// - `..` takes the name before it back; symbolic links of this layer on the way to a parent are
///   followed inside the root;
/// - a parent that is missing is made, `0755` and root's (containerd takes the attributes of the
///   directory below, if there is one: ask [`Builder::implied`] and insert those);
/// - a directory over a directory changes its attributes and adds to its extended ones; anything
///   else replaces what was there, with all that was in it;
/// - a hard link needs its target before it, and gives it its attributes;
/// - `.wh.name` becomes a whiteout of `name` unless this layer has the name already, and
///   `.wh..wh..opq` makes its directory opaque.
///
/// Contents get blocks of the data file in the order of insertion; those of a file that is replaced
/// later stay unused.
pub struct Builder {
    tree: Tree,
    /// Entries by directory and name.
    table: HashTable<u32>,
    hasher: RandomState,
    linked_bytes: usize,
}

fn hash_of(hasher: &RandomState, parent: InodeId, name: &[u8]) -> u64 {
    hasher.hash_one((parent, name))
}

/// Where a path leads: a directory, and names below it that are not there.
struct Way {
    directory: InodeId,
    missing: Vec<Vec<u8>>,
}

impl Builder {
    /// A tree with nothing but the root, which has the attributes `root`.
    pub fn new(options: Options, root: &Attributes<'_>) -> Result<Self, BuildError> {
        let tree = Tree {
            options,
            text: Vec::new(),
            entries: Vec::new(),
            inodes: Vec::new(),
            xattrs: Xattrs::new(),
            data_blocks: 0,
        };
        let mut builder =
            Self { tree, table: HashTable::new(), hasher: RandomState::new(), linked_bytes: 0 };
        builder
            .add_inode(Payload::Directory { parent: ROOT, first: NONE, implied: false }, root)?;
        Ok(builder)
    }

    /// Inserts an entry.
    pub fn insert(
        &mut self,
        path: &[u8],
        attributes: &Attributes<'_>,
        node: Node<'_>,
    ) -> Result<Inserted, BuildError> {
        let path = clean(path)?;
        let Some((parent, name)) = split(&path) else { return Ok(Inserted::Root) };
        if name.len() > limits::NAME_BYTES {
            return Err(BuildError::Path);
        }
        let parent = self.make_directories(parent)?;
        if name == OPAQUE {
            return self.make_opaque(parent);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(parent, hidden, attributes);
        }
        if let Node::HardLink { target } = node {
            return self.hard_link(parent, name, target, attributes);
        }
        let found = self.find(parent, name);
        if let (Some(entry), Node::Directory) = (found, node) {
            let inode = self.tree.entries[entry as usize].inode;
            if let Payload::Directory { parent, first, .. } = self.tree.inode(inode).payload {
                self.tree.inodes[inode as usize].payload =
                    Payload::Directory { parent, first, implied: false };
                self.set_attributes(inode, attributes)?;
                return Ok(Inserted::Entry);
            }
        }
        let (payload, inserted) = self.payload(parent, node)?;
        let inode = self.add_inode(payload, attributes)?;
        self.place(parent, name, inode, found)?;
        Ok(inserted)
    }

    /// Paths of directories that no entry told, but whose entries were. Parents come before what is
    /// in them. An error if the paths have more bytes together than [`limits::IMPLIED_BYTES`].
    pub fn implied(&self) -> Result<Vec<Vec<u8>>, BuildError> {
        let live = (0..self.tree.entries.len() as u32).filter(|e| self.tree.is_live(*e));
        let implied = live.filter(|e| {
            let inode = self.tree.inode(self.tree.entries[*e as usize].inode);
            matches!(inode.payload, Payload::Directory { implied: true, .. })
        });
        // A directory's own entry, by its inode, to go up.
        let mut own = vec![NONE; self.tree.inodes.len()];
        (0..self.tree.entries.len() as u32).filter(|e| self.tree.is_live(*e)).for_each(|e| {
            own[self.tree.entries[e as usize].inode as usize] = e;
        });
        let path = |entry: u32| {
            let mut names = vec![self.tree.name(entry)];
            let mut up = self.tree.entries[entry as usize].parent;
            while up != ROOT {
                let entry = own[up as usize];
                names.push(self.tree.name(entry));
                up = self.tree.entries[entry as usize].parent;
            }
            names.reverse();
            names.join(&b'/')
        };
        let (mut paths, mut bytes) = (Vec::new(), 0);
        for path in implied.map(path) {
            bytes += path.len();
            if bytes > limits::IMPLIED_BYTES {
                return Err(BuildError::TooMuchText);
            }
            paths.push(path);
        }
        paths.sort_unstable_by(|a, b| a.split(|c| *c == b'/').cmp(b.split(|c| *c == b'/')));
        Ok(paths)
    }

    /// Entries so far, with those that were implied, without those that were replaced; the root
    /// does not count.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is nothing but the root.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The image's layout, and so its size.
    pub fn finish(self) -> Result<Image, BuildError> {
        drop(self.table);
        Image::of(self.tree, limits::IMAGE_BYTES)
    }

    fn payload(
        &mut self,
        parent: InodeId,
        node: Node<'_>,
    ) -> Result<(Payload, Inserted), BuildError> {
        let payload = match node {
            Node::Directory => Payload::Directory { parent, first: NONE, implied: false },
            Node::File { size } => {
                let extent = self.allocate(size)?;
                return Ok((Payload::File { size, block: extent.block }, Inserted::File(extent)));
            }
            Node::Symlink { target } => {
                check(target)?;
                if target.is_empty() {
                    return Err(BuildError::EmptyTarget);
                }
                Payload::Symlink { at: self.add_text(target)?, len: target.len() as u16 }
            }
            Node::CharDevice(number) => Payload::CharDevice(number.encoded()?),
            Node::BlockDevice(number) => Payload::BlockDevice(number.encoded()?),
            Node::Fifo => Payload::Fifo,
            // It has no inode of its own: `insert` never asks for one.
            Node::HardLink { .. } => return Err(BuildError::HardLink),
        };
        Ok((payload, Inserted::Entry))
    }

    fn allocate(&mut self, size: u64) -> Result<Extent, BuildError> {
        let (block, blocks) = (self.tree.data_blocks, size.div_ceil(BLOCK));
        let end = block
            .checked_add(blocks)
            .filter(|end| *end < limits::BLOCKS)
            .ok_or(BuildError::TooMuchData)?;
        self.tree.data_blocks = end;
        Ok(Extent { block: block as u32, blocks: blocks as u32 })
    }

    fn make_opaque(&mut self, directory: InodeId) -> Result<Inserted, BuildError> {
        let mark = Xattr { name: self.tree.options.opaque.name().as_bytes(), value: b"y" };
        let set = self.tree.xattrs.with_mark(self.tree.inode(directory).xattrs, &mark)?;
        self.tree.inodes[directory as usize].xattrs = set;
        Ok(Inserted::Opaque)
    }

    /// A device `0:0` without permissions, as overlayfs makes it. What the layer itself has stays:
    /// whiteouts are for lower layers.
    fn whiteout(
        &mut self,
        parent: InodeId,
        hidden: &[u8],
        attributes: &Attributes<'_>,
    ) -> Result<Inserted, BuildError> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(BuildError::Whiteout);
        }
        if self.find(parent, hidden).is_none() {
            let inode = self.add_inode(
                Payload::CharDevice(0),
                &Attributes { mode: 0, xattrs: &[], ..*attributes },
            )?;
            self.place(parent, hidden, inode, None)?;
        }
        Ok(Inserted::Whiteout)
    }

    fn hard_link(
        &mut self,
        parent: InodeId,
        name: &[u8],
        target: &[u8],
        attributes: &Attributes<'_>,
    ) -> Result<Inserted, BuildError> {
        let target = clean(target)?;
        let (above, base) = split(&target).ok_or(BuildError::HardLink)?;
        // What has the name goes first, so that a link to it, or to something in it, finds nothing.
        let found = self.find(parent, name);
        let nothing = match found {
            Some(_) => {
                let nothing = self.add_inode(Payload::Fifo, &Attributes::default())?;
                self.place(parent, name, nothing, found)?;
                nothing
            }
            None => NONE,
        };
        let way = self.walk(above)?;
        let at = if way.missing.is_empty() { self.find(way.directory, base) } else { None };
        let inode = at
            .map(|e| self.tree.entries[e as usize].inode)
            .filter(|i| *i != nothing)
            .ok_or(BuildError::HardLink)?;
        if self.tree.inode(inode).is_directory() {
            return Err(BuildError::HardLink);
        }
        match found {
            Some(entry) => {
                self.tree.entries[entry as usize].inode = inode;
                self.release(parent, nothing);
            }
            None => self.add_entry(parent, name, inode)?,
        }
        self.tree.inodes[inode as usize].nlink += 1;
        // To set an owner takes capabilities away.
        self.tree.inodes[inode as usize].xattrs =
            self.tree.xattrs.without(self.tree.inode(inode).xattrs, CAPABILITY)?;
        self.set_attributes(inode, attributes)?;
        Ok(Inserted::Entry)
    }

    /// Gives `name` to a new inode; `found` is the entry that has the name.
    fn place(
        &mut self,
        parent: InodeId,
        name: &[u8],
        inode: InodeId,
        found: Option<u32>,
    ) -> Result<(), BuildError> {
        match found {
            Some(entry) => {
                let old = std::mem::replace(&mut self.tree.entries[entry as usize].inode, inode);
                self.release(parent, old);
            }
            None => self.add_entry(parent, name, inode)?,
        }
        let is_directory = self.tree.inode(inode).is_directory();
        self.tree.inodes[inode as usize].nlink = if is_directory { 2 } else { 1 };
        self.tree.inodes[parent as usize].nlink += u32::from(is_directory);
        Ok(())
    }

    /// Takes a name from an inode of the directory `parent`, and all that is in it if it is a
    /// directory.
    fn release(&mut self, parent: InodeId, inode: InodeId) {
        if !self.tree.inode(inode).is_directory() {
            self.tree.inodes[inode as usize].nlink -= 1;
            return;
        }
        self.tree.inodes[parent as usize].nlink -= 1;
        let mut gone = vec![inode];
        while let Some(directory) = gone.pop() {
            self.tree.inodes[directory as usize].nlink = 0;
            let Payload::Directory { mut first, .. } = self.tree.inode(directory).payload else {
                continue;
            };
            while first != NONE {
                let entry = self.tree.entries[first as usize];
                let hash = hash_of(&self.hasher, directory, self.tree.name(first));
                if let Ok(found) = self.table.find_entry(hash, |e| *e == first) {
                    found.remove();
                }
                self.tree.entries[first as usize].inode = NONE;
                let inode = &mut self.tree.inodes[entry.inode as usize];
                if inode.is_directory() {
                    gone.push(entry.inode)
                } else {
                    inode.nlink -= 1
                }
                first = entry.next;
            }
        }
    }

    fn find(&self, parent: InodeId, name: &[u8]) -> Option<u32> {
        let is =
            |e: &u32| self.tree.entries[*e as usize].parent == parent && self.tree.name(*e) == name;
        self.table.find(hash_of(&self.hasher, parent, name), is).copied()
    }

    /// The directory that `path` leads to, with all that is missing.
    fn make_directories(&mut self, path: &[u8]) -> Result<InodeId, BuildError> {
        let way = self.walk(path)?;
        let mut directory = way.directory;
        for name in way.missing {
            if name.len() > limits::NAME_BYTES {
                return Err(BuildError::Path);
            }
            let implied = Attributes { mode: 0o755, ..Attributes::default() };
            let inode = self.add_inode(
                Payload::Directory { parent: directory, first: NONE, implied: true },
                &implied,
            )?;
            self.place(directory, &name, inode, None)?;
            directory = inode;
        }
        Ok(directory)
    }

    /// Follows `path` from the root; what is beyond the first missing name is text.
    fn walk(&mut self, path: &[u8]) -> Result<Way, BuildError> {
        let mut way = Way { directory: ROOT, missing: Vec::new() };
        let (mut path, mut links) = (Cow::Borrowed(path), 0);
        loop {
            let Some(link) = self.walk_to_link(&path, &mut way)? else { return Ok(way) };
            links += 1;
            self.linked_bytes += link.len();
            if links > limits::LINKS
                || link.len() > 2 * limits::PATH_BYTES
                || self.linked_bytes > limits::LINKED_PATH_BYTES
            {
                return Err(BuildError::TooManyLinks);
            }
            path = Cow::Owned(link);
        }
    }

    /// Goes on with `way` along `path` to its end, or to a symbolic link: then what is to be
    /// followed from there.
    fn walk_to_link(&self, path: &[u8], way: &mut Way) -> Result<Option<Vec<u8>>, BuildError> {
        let mut rest = components(path);
        while let Some(name) = rest.next() {
            if name == b".." {
                // The root's parent is the root.
                if way.missing.pop().is_none()
                    && let Payload::Directory { parent, .. } =
                        self.tree.inode(way.directory).payload
                {
                    way.directory = parent;
                }
                continue;
            }
            let found = if way.missing.is_empty() { self.find(way.directory, name) } else { None };
            let inode = found.map(|e| self.tree.entries[e as usize].inode);
            match inode.map(|i| (i, self.tree.inode(i).payload)) {
                None => way.missing.push(name.to_vec()),
                Some((inode, Payload::Directory { .. })) => way.directory = inode,
                Some((_, Payload::Symlink { at, len })) => {
                    let target = self.tree.text(at, len);
                    if target.starts_with(b"/") {
                        way.directory = ROOT;
                    }
                    let mut link = target.to_vec();
                    for name in rest {
                        link.push(b'/');
                        link.extend_from_slice(name);
                    }
                    return Ok(Some(link));
                }
                Some(_) => return Err(BuildError::NotDirectory),
            }
        }
        Ok(None)
    }

    fn add_inode(
        &mut self,
        payload: Payload,
        attributes: &Attributes<'_>,
    ) -> Result<InodeId, BuildError> {
        // The root is one more.
        if self.tree.inodes.len() > limits::ENTRIES {
            return Err(BuildError::TooManyEntries);
        }
        let id = self.tree.inodes.len() as InodeId;
        let none = SetId::default();
        self.tree.inodes.push(Inode {
            payload,
            mtime: 0,
            nanoseconds: 0,
            uid: 0,
            gid: 0,
            nlink: 2,
            xattrs: none,
            mode: 0,
        });
        self.set_attributes(id, attributes)?;
        Ok(id)
    }

    fn set_attributes(
        &mut self,
        id: InodeId,
        attributes: &Attributes<'_>,
    ) -> Result<(), BuildError> {
        if attributes.mode > 0o7777 {
            return Err(BuildError::Mode);
        }
        if attributes.mtime.nanoseconds >= 1_000_000_000 {
            return Err(BuildError::Time);
        }
        let inode = &mut self.tree.inodes[id as usize];
        inode.xattrs = self.tree.xattrs.with(inode.xattrs, attributes.xattrs, inode.holder())?;
        inode.mode =
            if matches!(inode.payload, Payload::Symlink { .. }) { 0o777 } else { attributes.mode };
        (inode.uid, inode.gid) = (attributes.uid, attributes.gid);
        (inode.mtime, inode.nanoseconds) = (attributes.mtime.seconds, attributes.mtime.nanoseconds);
        Ok(())
    }

    /// Adds a name that the directory does not have.
    fn add_entry(
        &mut self,
        parent: InodeId,
        name: &[u8],
        inode: InodeId,
    ) -> Result<(), BuildError> {
        if self.tree.entries.len() >= limits::ENTRIES {
            return Err(BuildError::TooManyEntries);
        }
        let name_at = self.add_text(name)?;
        let id = self.tree.entries.len() as u32;
        let Payload::Directory { first, .. } = &mut self.tree.inodes[parent as usize].payload
        else {
            return Err(BuildError::NotDirectory);
        };
        let next = std::mem::replace(first, id);
        self.tree.entries.push(Entry { parent, inode, name_at, next, name_len: name.len() as u8 });
        let (tree, hasher) = (&self.tree, &self.hasher);
        let rehash = |e: &u32| hash_of(hasher, tree.entries[*e as usize].parent, tree.name(*e));
        if let Slot::Vacant(slot) =
            self.table.entry(hash_of(hasher, parent, name), |e| *e == id, rehash)
        {
            slot.insert(id);
        }
        Ok(())
    }

    fn add_text(&mut self, text: &[u8]) -> Result<u32, BuildError> {
        let at = self.tree.text.len();
        if at + text.len() > limits::TEXT_BYTES {
            return Err(BuildError::TooMuchText);
        }
        self.tree.text.extend_from_slice(text);
        Ok(at as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_not_larger_than_its_bound() {
        let image = |most| {
            let mut builder =
                Builder::new(Options::default(), &Attributes::default()).expect("a builder");
            for n in 0..100 {
                let target = [b't'; 3000];
                builder
                    .insert(
                        format!("{n}").as_bytes(),
                        &Attributes::default(),
                        Node::Symlink { target: &target },
                    )
                    .expect("a link");
            }
            Image::of(builder.tree, most).map(|image| image.bytes())
        };
        let bytes = image(limits::IMAGE_BYTES).expect("an image");
        assert_eq!(image(bytes), Ok(bytes));
        assert_eq!(image(bytes - 1), Err(BuildError::TooLarge));
    }

    #[test]
    fn device_numbers_are_those_of_linux() {
        for (major, minor, encoded) in
            [(0, 0, 0), (1, 3, 0x103), (4095, 0xfffff, 0xffff_ffff), (8, 256, 0x0010_0800)]
        {
            let number = DeviceNumber { major, minor };
            assert_eq!(number.encoded(), Ok(encoded));
            assert_eq!(DeviceNumber::decode(encoded), number);
        }
        for (major, minor) in [(limits::DEVICE_MAJOR + 1, 0), (0, limits::DEVICE_MINOR + 1)] {
            assert_eq!(DeviceNumber { major, minor }.encoded(), Err(BuildError::Device));
        }
    }
}
