//! The tree of a layer: entries in the order of its tar, with the meaning that unpacking gives
//! them.

use crate::{
    Attributes, BLOCK, BuildError, Extent, Image, Inserted, Node, Options, Xattr, limits,
    path::{check, clean, components, split},
    tree::{Entry, Inode, InodeId, NONE, Payload, ROOT, Tree},
    xattr::{CAPABILITY, SetId, Xattrs},
};
use hashbrown::{HashTable, hash_table::Entry as Slot};
use std::{
    borrow::Cow,
    hash::{BuildHasher, RandomState},
};

/// Prefix of names that stand for something missing below (OCI image specification, layer.md).
const WHITEOUT: &[u8] = b".wh.";
/// The name that makes its directory opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";

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
}
