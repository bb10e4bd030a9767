//! Random layers, and what unpacking them gives, told a second time and simply.

#![allow(dead_code, clippy::unwrap_used)]

use shipway_erofs::*;
pub use shipway_testkit::Dice;
use std::{collections::BTreeMap, ops::ControlFlow, rc::Rc};

/// [`Attributes`] that own their parts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attrs {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// [`Node`], with contents.
#[derive(Clone, Debug, PartialEq)]
pub enum Thing {
    Directory,
    File(Rc<[u8]>),
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// An entry of a layer.
#[derive(Clone, Debug)]
pub struct Op {
    pub path: Vec<u8>,
    pub attrs: Attrs,
    pub thing: Thing,
}

impl Op {
    pub fn new(path: &str, thing: Thing) -> Self {
        Self { path: path.into(), attrs: Attrs { mode: 0o644, ..Attrs::default() }, thing }
    }

    pub fn insert(&self, builder: &mut Builder) -> Result<Inserted, BuildError> {
        let xattrs: Vec<Xattr<'_>> =
            self.attrs.xattrs.iter().map(|(name, value)| Xattr { name, value }).collect();
        let Attrs { mode, uid, gid, mtime, .. } = self.attrs;
        let node = match &self.thing {
            Thing::Directory => Node::Directory,
            Thing::File(contents) => Node::File { size: contents.len() as u64 },
            Thing::Symlink(target) => Node::Symlink { target },
            Thing::HardLink(target) => Node::HardLink { target },
            Thing::Char(major, minor) => {
                Node::CharDevice(DeviceNumber { major: *major, minor: *minor })
            }
            Thing::Block(major, minor) => {
                Node::BlockDevice(DeviceNumber { major: *major, minor: *minor })
            }
            Thing::Fifo => Node::Fifo,
        };
        builder.insert(&self.path, &Attributes { mode, uid, gid, mtime, xattrs: &xattrs }, node)
    }
}

/// What an inode of the model is.
#[derive(Clone, Debug, PartialEq)]
pub enum Is {
    Directory(BTreeMap<Vec<u8>, usize>),
    Other(Thing),
}

/// The unpacked layer. Inodes that nothing names are still in the list.
#[derive(Clone, Debug)]
pub struct Model {
    pub inodes: Vec<(Attrs, Is)>,
}

type Refused = ();

impl Model {
    pub fn new(root: Attrs) -> Self {
        Self { inodes: vec![(root, Is::Directory(BTreeMap::new()))] }
    }

    pub fn children(&self, inode: usize) -> &BTreeMap<Vec<u8>, usize> {
        match &self.inodes[inode].1 {
            Is::Directory(children) => children,
            Is::Other(_) => panic!("not a directory"),
        }
    }

    /// Names of each inode: links of what is no directory.
    pub fn links(&self) -> BTreeMap<usize, u32> {
        let mut links = BTreeMap::from([(0, 2)]);
        let mut stack = vec![0];
        while let Some(directory) = stack.pop() {
            for child in self.children(directory).values() {
                if matches!(self.inodes[*child].1, Is::Directory(_)) {
                    *links.entry(directory).or_default() += 1;
                    links.insert(*child, 2);
                    stack.push(*child);
                } else {
                    *links.entry(*child).or_default() += 1;
                }
            }
        }
        links
    }

    /// Does what containerd does with an entry when it unpacks a layer for overlayfs.
    pub fn apply(&mut self, op: &Op, opaque: &str) -> Result<(), Refused> {
        let mut names = text_path(&op.path);
        let Some(name) = names.pop() else { return Ok(()) };
        let parents = self.resolve(names)?;
        let parent = *self.make(&parents)?.last().unwrap();
        if name == b".wh..wh..opq" {
            self.inodes[parent].0.xattrs.insert(opaque.into(), b"y".to_vec());
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(());
            }
            if !self.children(parent).contains_key(hidden) {
                let attrs = Attrs { mode: 0, xattrs: BTreeMap::new(), ..op.attrs.clone() };
                self.put(parent, hidden, attrs, Is::Other(Thing::Char(0, 0)));
            }
            return Ok(());
        }
        let there = self.children(parent).get(&name).copied();
        if let (Some(there), Thing::Directory) = (there, &op.thing)
            && matches!(self.inodes[there].1, Is::Directory(_))
        {
            self.set(there, &op.attrs);
            return Ok(());
        }
        self.take(parent, &name);
        match &op.thing {
            Thing::HardLink(target) => {
                let mut names = text_path(target);
                let base = names.pop().ok_or(())?;
                let above = self.resolve(names)?;
                let directory = self.find(&above).ok_or(())?;
                let inode = *self.children(directory).get(&base).ok_or(())?;
                if matches!(self.inodes[inode].1, Is::Directory(_)) {
                    return Err(());
                }
                self.inodes[inode].0.xattrs.remove(&b"security.capability"[..]);
                self.set(inode, &op.attrs);
                self.children_mut(parent).insert(name, inode);
            }
            thing => {
                let is = if *thing == Thing::Directory {
                    Is::Directory(BTreeMap::new())
                } else {
                    Is::Other(thing.clone())
                };
                let inode = self.put(parent, &name, Attrs::default(), is);
                self.set(inode, &op.attrs);
            }
        }
        Ok(())
    }

    fn children_mut(&mut self, inode: usize) -> &mut BTreeMap<Vec<u8>, usize> {
        match &mut self.inodes[inode].1 {
            Is::Directory(children) => children,
            Is::Other(_) => panic!("not a directory"),
        }
    }

    fn take(&mut self, parent: usize, name: &[u8]) {
        self.children_mut(parent).remove(name);
    }

    fn put(&mut self, parent: usize, name: &[u8], attrs: Attrs, is: Is) -> usize {
        self.inodes.push((attrs, is));
        let inode = self.inodes.len() - 1;
        self.children_mut(parent).insert(name.to_vec(), inode);
        inode
    }

    fn set(&mut self, inode: usize, attrs: &Attrs) {
        let (own, is) = &mut self.inodes[inode];
        let symlink = matches!(is, Is::Other(Thing::Symlink(_)));
        let plain = matches!(is, Is::Directory(_) | Is::Other(Thing::File(_)));
        let mut xattrs = std::mem::take(&mut own.xattrs);
        for (name, value) in &attrs.xattrs {
            let refused = match &name[..] {
                b"system.posix_acl_access" => symlink,
                b"system.posix_acl_default" => !matches!(is, Is::Directory(_)),
                name => name.starts_with(b"user.") && !plain,
            };
            if !refused {
                xattrs.insert(name.clone(), value.clone());
            }
        }
        *own = Attrs { mode: if symlink { 0o777 } else { attrs.mode }, xattrs, ..attrs.clone() };
    }

    /// `names` with links followed: a path without links, as far as it exists.
    fn resolve(&self, names: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Refused> {
        let mut todo: Vec<Vec<u8>> = names.into_iter().rev().collect();
        let (mut done, mut links): (Vec<Vec<u8>>, usize) = (Vec::new(), 0);
        while let Some(name) = todo.pop() {
            if name == b".." {
                done.pop();
                continue;
            }
            let parent = self.find(&done);
            let inode = parent.and_then(|p| self.children(p).get(&name)).copied();
            match inode.map(|i| &self.inodes[i].1) {
                Some(Is::Other(Thing::Symlink(target))) => {
                    links += 1;
                    if links > limits::LINKS || todo.len() > limits::PATH_BYTES / 2 {
                        return Err(());
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    let parts = target.split(|b| *b == b'/').filter(|p| !matches!(*p, b"" | b"."));
                    todo.extend(parts.map(<[u8]>::to_vec).collect::<Vec<_>>().into_iter().rev());
                }
                Some(Is::Other(_)) => return Err(()),
                _ => done.push(name),
            }
        }
        Ok(done)
    }

    fn find(&self, path: &[Vec<u8>]) -> Option<usize> {
        path.iter().try_fold(0, |at, name| match &self.inodes[at].1 {
            Is::Directory(children) => children.get(name).copied(),
            Is::Other(_) => None,
        })
    }

    fn make(&mut self, path: &[Vec<u8>]) -> Result<Vec<usize>, Refused> {
        let mut way = vec![0];
        for name in path {
            let parent = *way.last().unwrap();
            if !self.children(parent).contains_key(name) {
                if name.len() > limits::NAME_BYTES {
                    return Err(());
                }
                self.put(
                    parent,
                    name,
                    Attrs { mode: 0o755, ..Attrs::default() },
                    Is::Directory(BTreeMap::new()),
                );
            }
            way.push(self.children(parent)[name]);
        }
        Ok(way)
    }
}

/// The names of a path, `..` taken as text.
fn text_path(path: &[u8]) -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name.to_vec()),
        }
    }
    names
}

/// Makes entries that meet each other often.
pub struct Maker {
    pub dice: Dice,
    names: Vec<Vec<u8>>,
}

impl Maker {
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed | 1);
        (0..10).for_each(|_| _ = dice.next());
        let mut names: Vec<Vec<u8>> =
            ["a", "b", "c", "d", "!", "-x", "..."].iter().map(|n| n.as_bytes().to_vec()).collect();
        for _ in 0..30 {
            let length = if dice.one_in(4) { 200 + dice.below(56) } else { 1 + dice.below(12) };
            let name: Vec<u8> = dice
                .bytes(length)
                .into_iter()
                .map(|b| if matches!(b, 0 | b'/') { b'_' } else { b })
                .collect();
            names.push(if name.iter().all(|b| *b == b'.') { b"dots".to_vec() } else { name });
        }
        Self { dice, names }
    }

    pub fn path(&mut self) -> Vec<u8> {
        let depth = 1 + self.dice.below(4);
        let mut path = Vec::new();
        for _ in 0..depth {
            if !path.is_empty() || self.dice.one_in(8) {
                path.push(b'/');
            }
            let count = if self.dice.one_in(3) { self.names.len() } else { 6 };
            let at = self.dice.below(count);
            path.extend_from_slice(&self.names[at]);
        }
        match self.dice.below(12) {
            0 => [&b"./"[..], &path].concat(),
            1 => [&path[..], b"/"].concat(),
            2 => [&b"x/../"[..], &path].concat(),
            _ => path,
        }
    }

    pub fn attrs(&mut self) -> Attrs {
        let dice = &mut self.dice;
        let seconds = match dice.below(4) {
            0 => -(dice.below(1 << 40) as i64),
            1 => dice.below(1 << 40) as i64,
            _ => 1_700_000_000,
        };
        let id = |dice: &mut Dice| {
            if dice.one_in(3) { dice.next() as u32 >> 1 } else { dice.below(2000) as u32 }
        };
        let (uid, gid) = (id(dice), id(dice));
        let mut xattrs = BTreeMap::new();
        if dice.one_in(3) {
            for _ in 0..=dice.below(4) {
                let (name, value) = Self::xattr(dice);
                xattrs.insert(name, value);
            }
        }
        Attrs {
            mode: dice.below(0o10000) as u16,
            uid,
            gid,
            mtime: Time { seconds, nanoseconds: dice.below(1_000_000_000) as u32 },
            xattrs,
        }
    }

    fn xattr(dice: &mut Dice) -> (Vec<u8>, Vec<u8>) {
        match dice.below(8) {
            0 => (b"security.capability".to_vec(), [&[1, 0, 0, 2][..], &dice.bytes(16)].concat()),
            1 => (b"system.posix_acl_access".to_vec(), acl(1000 + dice.below(4) as u32)),
            2 => (b"system.posix_acl_default".to_vec(), acl(1000 + dice.below(100_000) as u32)),
            3 => (b"trusted.note".to_vec(), b"for root".to_vec()),
            4 => {
                let (name, value) = (1 + dice.below(250), dice.below(9000));
                ([&b"user."[..], &vec![b'n'; name]].concat(), dice.bytes(value))
            }
            _ => (format!("user.{}", dice.below(6)).into_bytes(), vec![b'v'; dice.below(40)]),
        }
    }

    pub fn op(&mut self, model: &Model) -> Op {
        let (mut path, attrs) = (self.path(), self.attrs());
        let thing = match self.dice.below(20) {
            0..=6 => {
                let size = if self.dice.one_in(10) {
                    4096 * self.dice.below(5)
                } else {
                    self.dice.below(10_000)
                };
                Thing::File(self.dice.bytes(size).into())
            }
            7..=9 => Thing::Directory,
            10..=11 => Thing::Symlink(match self.dice.below(4) {
                0 => self.path(),
                1 => [&b"/"[..], &self.path()].concat(),
                2 => [&b"../"[..], &self.path()].concat(),
                _ => vec![b't'; 1 + self.dice.below(limits::PATH_BYTES)],
            }),
            12..=14 => Thing::HardLink(self.file_in(model).unwrap_or_else(|| b"none".to_vec())),
            15 => Thing::Char(self.dice.below(4096) as u32, self.dice.below(1 << 20) as u32),
            16 => Thing::Block(self.dice.below(4096) as u32, self.dice.below(1 << 20) as u32),
            17 => Thing::Fifo,
            marked => {
                while path.ends_with(b"/") {
                    path.pop();
                }
                let at = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
                let base = path.split_off(at);
                path.extend_from_slice(b".wh.");
                path.extend_from_slice(if marked == 18 {
                    b".wh..opq"
                } else {
                    &base[..base.len().min(251)]
                });
                Thing::File(Rc::default())
            }
        };
        Op { path, attrs, thing }
    }

    /// The path of something in the model that can have another link.
    fn file_in(&mut self, model: &Model) -> Option<Vec<u8>> {
        let (mut at, mut path) = (0, Vec::new());
        for _ in 0..8 {
            let children = model.children(at);
            let (name, child) = children.iter().nth(self.dice.below(children.len()))?;
            path.push(b'/');
            path.extend_from_slice(name);
            match &model.inodes[*child].1 {
                Is::Directory(_) => at = *child,
                Is::Other(_) => return Some(path),
            }
        }
        None
    }
}

/// An access control list with one more user.
pub fn acl(user: u32) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries =
        [(1u16, 6u16, NOBODY), (2, 4, user), (4, 4, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY)];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend_from_slice(&tag.to_le_bytes());
        list.extend_from_slice(&permissions.to_le_bytes());
        list.extend_from_slice(&id.to_le_bytes());
    }
    list
}

/// A layer, twice: as a builder and a model, and the data file that belongs to it.
pub struct Layer {
    pub builder: Builder,
    pub model: Model,
    pub data: Vec<u8>,
    pub options: Options,
}

impl Layer {
    pub fn new(options: Options, root: Attrs) -> Self {
        let xattrs: Vec<Xattr<'_>> =
            root.xattrs.iter().map(|(name, value)| Xattr { name, value }).collect();
        let attributes = Attributes {
            mode: root.mode,
            uid: root.uid,
            gid: root.gid,
            mtime: root.mtime,
            xattrs: &xattrs,
        };
        let builder = Builder::new(options, &attributes).unwrap();
        Self { builder, model: Model::new(root), data: Vec::new(), options }
    }

    /// Inserts an entry that the model takes; says whether it did.
    pub fn add(&mut self, op: &Op) -> bool {
        let mut model = self.model.clone();
        if model.apply(op, self.options.opaque.name()).is_err() {
            return false;
        }
        self.model = model;
        let inserted = op.insert(&mut self.builder).unwrap_or_else(|e| panic!("{e}: {op:?}"));
        if let (Inserted::File(extent), Thing::File(contents)) = (inserted, &op.thing) {
            let at = extent.block as usize * BLOCK as usize;
            assert!(
                extent.blocks == 0 || at == self.data.len(),
                "contents are in the order of insertion"
            );
            self.data.extend_from_slice(contents);
            self.data.resize(self.data.len().next_multiple_of(BLOCK as usize), 0);
            assert!(extent.blocks as usize == contents.len().div_ceil(BLOCK as usize));
        }
        true
    }

    /// A layer of about `count` random entries.
    pub fn random(seed: u64, count: usize) -> Self {
        let mut maker = Maker::new(seed);
        let opaque = if maker.dice.one_in(2) { OpaqueMark::Trusted } else { OpaqueMark::User };
        let mut layer = Self::new(Options { uuid: [seed as u8; 16], opaque }, maker.attrs());
        for _ in 0..count {
            let op = maker.op(&layer.model);
            layer.add(&op);
        }
        layer
    }

    pub fn image(&mut self) -> Image {
        let empty = Builder::new(Options::default(), &Attributes::default()).unwrap();
        std::mem::replace(&mut self.builder, empty).finish().unwrap()
    }
}

/// What [`Stored`] says of an inode has to be what [`Reader`] does, errors included. `bytes` are
/// the whole image.
#[track_caller]
pub fn assert_stored_agrees(bytes: &[u8], reader: &Reader<'_>, nid: Nid) {
    let layout = Layout::of(&bytes[..bytes.len().min(4096)], bytes.len() as u64).unwrap();
    let stored = Stored::new(&layout, bytes);
    assert_eq!(layout.root(), reader.root());
    let found = stored.metadata(nid);
    assert_eq!(found, reader.metadata(nid));
    let Ok(found) = found else { return };
    let mut target = vec![0; limits::PATH_BYTES];
    let length = stored.target(&found, &mut target);
    assert_eq!(length.map(|length| &target[..length]), reader.target(&found));

    let names = |listed: &mut Vec<(Vec<u8>, Nid, Kind, u64)>, entry: &DirEntry<'_>| {
        listed.push((entry.name.to_vec(), entry.nid, entry.kind, entry.next));
    };
    let (mut want, mut error) = (Vec::new(), None);
    match reader.directory(&found) {
        Ok(directory) => directory.entries(0).for_each(|entry| match entry {
            Ok(entry) => names(&mut want, &entry),
            Err(e) => error = Some(e),
        }),
        Err(e) => error = Some(e),
    }
    let mut listed = Vec::new();
    let done = stored.list(&found, 0, |entry| {
        names(&mut listed, entry);
        Ok(ControlFlow::Continue(()))
    });
    assert_eq!((listed, done.err()), (want.clone(), error));
    if let Ok(directory) = reader.directory(&found) {
        for (n, (name, _, _, next)) in want.iter().enumerate() {
            let looked_up = stored.lookup(&found, name);
            assert_eq!(looked_up, directory.lookup(name).map(|e| e.map(|e| e.nid)));
            let mut first = None;
            let _ = stored.list(&found, *next, |entry| {
                first = Some(entry.name.to_vec());
                Ok(ControlFlow::Break(()))
            });
            assert_eq!(first.as_ref(), want.get(n + 1).map(|(name, ..)| name));
        }
        let missing = stored.lookup(&found, b"no such name");
        assert_eq!(missing, directory.lookup(b"no such name").map(|e| e.map(|e| e.nid)));
    }

    let (want, mut names) = (reader.xattrs(&found), Vec::new());
    let done = stored.xattr_names(&found, |prefix, rest| {
        names.push([prefix, rest].concat());
        ControlFlow::Continue(())
    });
    assert_eq!(done.err(), want.as_ref().err().copied());
    for xattr in want.iter().flatten() {
        assert!(names.contains(&xattr.name));
        // The first of that name, should there be two in a broken image.
        let first = want.iter().flatten().find(|other| other.name == xattr.name).unwrap();
        let range = stored.xattr(&found, &xattr.name).unwrap().unwrap();
        let mut value = vec![0; (range.end - range.start) as usize];
        stored.value(&range, &mut value).unwrap();
        assert_eq!(value, first.value);
    }
    if want.is_ok() {
        assert_eq!(names.len(), want.iter().flatten().count());
        assert_eq!(stored.xattr(&found, b"user.no such name"), Ok(None));
    }
}

/// The image's bytes.
#[track_caller]
pub fn bytes(image: &Image, form: Form) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write(form, &mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, image.bytes());
    bytes
}
