//! What a layer holds: the walk over an overlay upper directory, or over a whole tree.

use crate::below::{self, Below};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat},
    io::Errno,
};
use shipway_fault::{Code, Fault, Result};
use std::{
    collections::{BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

/// A directory that is a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTree {
    root: PathBuf,
    base: Base,
    /// The time of all entries, in seconds, instead of their own.
    time: Option<i64>,
}

/// What a tree lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Base {
    Nothing,
    /// Lower directories of the overlay whose upper directory the tree is, topmost first.
    Lowers(Vec<PathBuf>),
    /// The whole tree before the changes; the tree is whole, too.
    Before(PathBuf),
}

/// A directory on the way of the walk.
struct Frame {
    /// The directory; closed while the walk is far below it.
    dir: Option<OwnedFd>,
    /// Names still to visit, last one first.
    names: Vec<OsString>,
    /// The directory's own entry, if it is unchanged and thus told only when something in it is told.
    held: Option<Entry>,
    /// What lies below it.
    below: Below,
    /// Whether nothing of that shows through, so that what is not in the directory is gone.
    bare: bool,
}

/// Something that the walk has come to.
struct Place<'a> {
    /// Path in the tree.
    path: &'a Path,
    /// Path on the host.
    full: &'a Path,
    /// What it is; `None` if it is not in the tree.
    stat: Option<Stat>,
    /// The file or directory, open for reading.
    file: Option<File>,
}

/// What an entry of a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A file with contents.
    File,
    /// Another name of the entry at the path.
    HardLink(Vec<u8>),
    /// A symbolic link to the target.
    Symlink(Vec<u8>),
    /// A character device with major and minor number.
    CharDevice(u32, u32),
    /// A block device with major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A name of a lower layer that is gone.
    Whiteout,
}

/// One entry of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path in the layer, without a slash at either end.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length of a file.
    pub size: u64,
    /// Modification time, whole seconds.
    pub mtime: i64,
    /// Extended attributes that belong into a layer, by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Directories that are open at the same time.
const MAX_OPEN: usize = 64;
const UNREADABLE: [&[u8]; 4] =
    [b"trusted.overlay.redirect", b"user.overlay.redirect", b"trusted.overlay.metacopy", b"user.overlay.metacopy"];

impl LayerTree {
    /// The upper directory of an overlay over `lowers`, topmost first: what differs from them, for the upper directory has also what was only touched.
    pub fn overlay(upper: impl Into<PathBuf>, lowers: Vec<PathBuf>) -> Self {
        Self { root: upper.into(), base: Base::Lowers(lowers), time: None }
    }

    /// A whole tree, on nothing.
    pub fn whole(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), base: Base::Nothing, time: None }
    }

    /// What changed from the whole tree `before` to the whole tree `after`. Files are the same when all but their contents and access times are.
    pub fn compared(before: impl Into<PathBuf>, after: impl Into<PathBuf>) -> Self {
        Self { root: after.into(), base: Base::Before(before.into()), time: None }
    }

    /// The same with one time for all entries (row `ex.tar.sde`).
    #[must_use]
    pub fn at(self, time: Option<i64>) -> Self {
        Self { time, ..self }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the contents of `entry` are.
    pub fn locate(&self, entry: &Entry) -> PathBuf {
        self.root.join(OsStr::from_bytes(&entry.path))
    }

    /// Visits the entries: parents before children, siblings in byte order. The root itself is none.
    pub fn walk(&self, mut visit: impl FnMut(Entry) -> Result<()>) -> Result<()> {
        self.walk_open(|entry, _| visit(entry))
    }

    /// The same, with each file open for reading.
    pub(crate) fn walk_open(&self, mut visit: impl FnMut(Entry, Option<File>) -> Result<()>) -> Result<()> {
        let mut visit = |entry: Entry, file| visit(Entry { mtime: self.time.unwrap_or(entry.mtime), ..entry }, file);
        let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
        let root = open_dir(CWD, &self.root, &self.root)?;
        let (below, bare) = match &self.base {
            Base::Nothing => (Below::default(), false),
            Base::Lowers(lowers) => (Below::layers(lowers.clone()), false),
            Base::Before(before) => (Below::tree(before.clone()), true),
        };
        let mut stack = vec![self.frame(root, Path::new(""), None, below, bare)?];
        let mut path = PathBuf::new();
        loop {
            if let Some(far) = stack.len().checked_sub(MAX_OPEN + 1) {
                stack[far].dir = None;
            }
            let Some(frame) = stack.last_mut() else { return Ok(()) };
            let Some(name) = frame.names.pop() else {
                stack.pop();
                path.pop();
                continue;
            };
            let dir = match &mut frame.dir {
                Some(dir) => dir,
                closed => {
                    let full = self.root.join(&path);
                    closed.insert(open_dir(CWD, &full, &full)?)
                }
            };
            path.push(&name);
            let full = self.root.join(&path);
            let place = Place::look(dir, &name, &path, &full, frame.bare)?;
            let seen = frame.below.look(&name)?;
            let Some(entry) = self.entry(&place, seen.thing.is_some())? else {
                path.pop();
                continue;
            };
            let unchanged = match (&seen.thing, &place.stat) {
                (Some(old), Some(new)) => frame.below.is_same(old, &full, new, place.file.as_ref())?,
                _ => false,
            };
            let bare = frame.bare;
            let directory = entry.kind == EntryKind::Directory;
            let mut held = None;
            if unchanged {
                held = directory.then_some(entry);
            } else {
                for parent in stack.iter_mut().filter_map(|f| f.held.take()) {
                    visit(parent, None)?;
                }
                let entry = place.linked(entry, &mut links);
                if directory {
                    visit(entry, None)?;
                } else {
                    visit(entry, place.file)?;
                    path.pop();
                    continue;
                }
            }
            match place.file {
                Some(dir) if directory => {
                    let bare = bare || matches!(self.base, Base::Lowers(_)) && below::is_opaque(&full);
                    stack.push(self.frame(dir.into(), &path, held, seen.below, bare)?);
                }
                _ => drop(path.pop()),
            }
        }
    }

    fn frame(&self, dir: OwnedFd, path: &Path, held: Option<Entry>, below: Below, bare: bool) -> Result<Frame> {
        let mut names = if bare { below.names()? } else { BTreeSet::new() };
        let mut buffer = Vec::with_capacity(16 << 10);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| broken(&self.root.join(path), e.into()))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.insert(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
            }
        }
        Ok(Frame { dir: Some(dir), names: names.into_iter().rev().collect(), held, below, bare })
    }

    /// What is told of a place; `hides` says whether something of that name lies below.
    fn entry(&self, place: &Place<'_>, hides: bool) -> Result<Option<Entry>> {
        let name = bytes_of(place.path);
        let Some(stat) = &place.stat else { return Ok(Some(Entry::bare(name, EntryKind::Whiteout))) };
        if below::is_whiteout(stat) {
            // Without anything below there is nothing to hide.
            let tells = hides && matches!(self.base, Base::Lowers(_));
            return Ok(tells.then(|| Entry::bare(name, EntryKind::Whiteout)));
        }
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => {
                EntryKind::Symlink(fs::read_link(place.full).map_err(|e| broken(place.full, e))?.into_os_string().into_vec())
            }
            FileType::CharacterDevice => EntryKind::CharDevice(major, minor),
            FileType::BlockDevice => EntryKind::BlockDevice(major, minor),
            FileType::Fifo => EntryKind::Fifo,
            FileType::RegularFile => EntryKind::File,
            // A socket is nothing without its process, and tar has no word for it.
            _ => return Ok(None),
        };
        let mut entry = Entry {
            path: name,
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: 0,
            mtime: stat.st_mtime,
            xattrs: Vec::new(),
        };
        if entry.kind == EntryKind::File {
            entry.size = stat.st_size.cast_unsigned();
        }
        if let Some(file) = &place.file {
            entry.xattrs = xattrs(Attributes::Open(file.as_fd()), place.full)?;
        }
        Ok(Some(entry))
    }
}

impl<'a> Place<'a> {
    /// Looks at `name` in `dir`. What was there `before` may be gone.
    fn look(dir: &OwnedFd, name: &OsStr, path: &'a Path, full: &'a Path, before: bool) -> Result<Self> {
        let failed = |e: Errno| broken(full, e.into());
        let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) if before => return Ok(Self { path, full, stat: None, file: None }),
            Err(e) => return Err(failed(e)),
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Some(rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(failed)?),
            FileType::Directory => Some(open_dir(dir, Path::new(name), full)?),
            _ => None,
        };
        Ok(Self { path, full, stat: Some(stat), file: file.map(File::from) })
    }

    /// Its `entry`, unless that is another name of one told before.
    fn linked(&self, entry: Entry, links: &mut HashMap<(u64, u64), Vec<u8>>) -> Entry {
        // The kernel makes one whiteout and gives it many names.
        let single = matches!(entry.kind, EntryKind::Directory | EntryKind::Whiteout);
        let Some(stat) = self.stat.as_ref().filter(|s| s.st_nlink > 1 && !single) else { return entry };
        match links.get(&(stat.st_dev, stat.st_ino)) {
            Some(first) => Entry { kind: EntryKind::HardLink(first.clone()), size: 0, xattrs: Vec::new(), ..entry },
            None => {
                links.insert((stat.st_dev, stat.st_ino), entry.path.clone());
                entry
            }
        }
    }
}

/// Opens the directory `at` of `dir`.
fn open_dir(dir: impl AsFd, at: &Path, full: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, at, flags, Mode::empty()).map_err(|e| broken(full, e.into()))
}

impl Entry {
    fn bare(path: Vec<u8>, kind: EntryKind) -> Self {
        Self { path, kind, mode: 0, uid: 0, gid: 0, size: 0, mtime: 0, xattrs: Vec::new() }
    }
}

/// Where extended attributes are read.
#[derive(Clone, Copy)]
enum Attributes<'a> {
    At(&'a Path),
    Open(BorrowedFd<'a>),
}

impl Attributes<'_> {
    fn list(self, names: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::At(path) => rustix::fs::llistxattr(path, names),
            Self::Open(file) => rustix::fs::flistxattr(file, names),
        }
    }

    fn get(self, name: &[u8], value: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::At(path) => rustix::fs::lgetxattr(path, name, value),
            Self::Open(file) => rustix::fs::fgetxattr(file, name, value),
        }
    }
}

/// Attributes that make sense on another machine: capabilities, and what users set. `full` is for people.
fn xattrs(of: Attributes<'_>, full: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let (mut short, mut long) = ([0u8; 512], Vec::new());
    let names: &[u8] = loop {
        let buffer = if long.is_empty() { &mut short[..] } else { &mut long[..] };
        match of.list(buffer) {
            Ok(0) | Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
            Ok(n) if long.is_empty() => break &short[..n],
            Ok(n) => break &long[..n],
            Err(rustix::io::Errno::RANGE) if long.len() < 1 << 20 => long.resize((long.len() * 8).max(8192), 0),
            Err(e) => return Err(broken(full, e.into())),
        }
    };
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if UNREADABLE.contains(&name) {
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!("{}: the overlay keeps a part of it elsewhere ({})", full.display(), String::from_utf8_lossy(name)),
            )
            .hint("mount overlays with redirect_dir=off,metacopy=off: see the options of the overlay kernel module"));
        }
        let wanted = name == b"security.capability" || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."));
        if !wanted {
            continue;
        }
        let mut value = vec![0u8; 65536];
        match of.get(name, &mut value) {
            Ok(n) => {
                value.truncate(n);
                found.push((name.to_vec(), value));
            }
            Err(rustix::io::Errno::NODATA) => {}
            Err(e) => return Err(broken(full, e.into())),
        }
    }
    found.sort();
    Ok(found)
}

/// The same of what is at `path`.
pub(crate) fn xattrs_of(path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    xattrs(Attributes::At(path), path)
}

fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

pub(crate) fn broken(path: &Path, error: io::Error) -> Fault {
    Fault::io(format!("read {} of a layer", path.display()), error)
}
