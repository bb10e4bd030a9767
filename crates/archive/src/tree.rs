//! What a layer holds: the walk over an overlay upper directory, or over a whole tree.

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat},
    io::Errno,
};
use shipway_fault::{Code, Fault, Result};
use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{FileTypeExt, MetadataExt},
        },
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
    /// The directory's own entry, if it is unchanged and thus told only when something below it is told.
    held: Option<Entry>,
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
    file: Option<OwnedFd>,
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
    /// The directory before hides what lower layers have in it.
    Opaque,
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
const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];
const UNREADABLE: [&[u8]; 4] =
    [b"trusted.overlay.redirect", b"user.overlay.redirect", b"trusted.overlay.metacopy", b"user.overlay.metacopy"];

impl LayerTree {
    /// The upper directory of an overlay over `lowers`, topmost first.
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
    pub(crate) fn walk_open(&self, mut visit: impl FnMut(Entry, Option<OwnedFd>) -> Result<()>) -> Result<()> {
        let mut visit = |entry: Entry, file| visit(Entry { mtime: self.time.unwrap_or(entry.mtime), ..entry }, file);
        let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
        let root = open_dir(CWD, &self.root, &self.root)?;
        let mut stack = vec![Frame { names: self.names(&root, Path::new(""))?, dir: Some(root), held: None }];
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
            let place = Place::look(dir, &name, &path, &full, matches!(self.base, Base::Before(_)))?;
            let Some(entry) = self.entry(&place, &mut links)? else {
                path.pop();
                continue;
            };
            let directory = entry.kind == EntryKind::Directory;
            let mut held = None;
            if self.is_unchanged(&path, &full)? {
                held = directory.then_some(entry);
            } else {
                for parent in stack.iter_mut().filter_map(|f| f.held.take()) {
                    visit(parent, None)?;
                }
                if directory {
                    visit(entry, None)?;
                } else {
                    visit(entry, place.file)?;
                    path.pop();
                    continue;
                }
                if self.is_opaque(&path, place.file.as_ref())? {
                    visit(Entry::bare(bytes_of(&path), EntryKind::Opaque), None)?;
                }
            }
            match place.file {
                Some(dir) if directory => stack.push(Frame { names: self.names(&dir, &path)?, dir: Some(dir), held }),
                _ => drop(path.pop()),
            }
        }
    }

    /// Names to visit in a directory, in reverse order so that the first is popped first.
    fn names(&self, dir: &OwnedFd, path: &Path) -> Result<Vec<OsString>> {
        let mut names = Vec::new();
        let mut buffer = Vec::with_capacity(16 << 10);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| broken(&self.root.join(path), e.into()))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
            }
        }
        if let Base::Before(before) = &self.base {
            let before = before.join(path);
            if fs::symlink_metadata(&before).is_ok_and(|m| m.is_dir()) {
                for entry in fs::read_dir(&before).map_err(|e| broken(&before, e))? {
                    names.push(entry.map_err(|e| broken(&before, e))?.file_name());
                }
            }
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        names.dedup();
        Ok(names)
    }

    /// Whether the tree before had the same thing at `path`. Times of directories change with their names and do not count.
    fn is_unchanged(&self, path: &Path, full: &Path) -> Result<bool> {
        let Base::Before(before) = &self.base else { return Ok(false) };
        let before = before.join(path);
        let (Ok(old), Ok(new)) = (fs::symlink_metadata(&before), fs::symlink_metadata(full)) else { return Ok(false) };
        let same = (old.mode(), old.uid(), old.gid(), old.rdev()) == (new.mode(), new.uid(), new.gid(), new.rdev());
        if !same || new.is_dir() {
            return Ok(same && xattrs(Attributes::At(&before), &before)? == xattrs(Attributes::At(full), full)?);
        }
        if (old.size(), old.mtime(), old.mtime_nsec()) != (new.size(), new.mtime(), new.mtime_nsec()) {
            return Ok(false);
        }
        Ok(if new.is_symlink() {
            fs::read_link(&before).ok() == fs::read_link(full).ok()
        } else {
            !new.is_file() || xattrs(Attributes::At(&before), &before)? == xattrs(Attributes::At(full), full)?
        })
    }

    fn entry(&self, place: &Place<'_>, links: &mut HashMap<(u64, u64), Vec<u8>>) -> Result<Option<Entry>> {
        let name = bytes_of(place.path);
        let Some(stat) = &place.stat else { return Ok(Some(Entry::bare(name, EntryKind::Whiteout))) };
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => {
                EntryKind::Symlink(fs::read_link(place.full).map_err(|e| broken(place.full, e))?.into_os_string().into_vec())
            }
            FileType::CharacterDevice if (major, minor) == (0, 0) => {
                // Without anything below there is nothing to hide.
                return Ok(matches!(self.base, Base::Lowers(_)).then(|| Entry::bare(name, EntryKind::Whiteout)));
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
        if entry.kind != EntryKind::Directory && stat.st_nlink > 1 {
            match links.get(&(stat.st_dev, stat.st_ino)) {
                Some(first) => {
                    entry.kind = EntryKind::HardLink(first.clone());
                    return Ok(Some(entry));
                }
                None => {
                    links.insert((stat.st_dev, stat.st_ino), entry.path.clone());
                }
            }
        }
        if entry.kind == EntryKind::File {
            entry.size = stat.st_size.cast_unsigned();
        }
        if let Some(file) = &place.file {
            entry.xattrs = xattrs(Attributes::Open(file.as_fd()), place.full)?;
        }
        Ok(Some(entry))
    }

    /// Whether the directory hides something that a lower layer has. The kernel marks every directory made below a merged one, mostly for nothing.
    fn is_opaque(&self, path: &Path, dir: Option<&OwnedFd>) -> Result<bool> {
        let (Base::Lowers(lowers), Some(dir)) = (&self.base, dir) else { return Ok(false) };
        let mut value = [0u8; 8];
        let marked = OPAQUE.iter().any(|name| matches!(rustix::fs::fgetxattr(dir, *name, &mut value), Ok(1) if value[0] == b'y'));
        if !marked {
            return Ok(false);
        }
        for lower in lowers {
            match seen_in(lower, path)? {
                Seen::Here => return Ok(true),
                Seen::Hidden => return Ok(false),
                Seen::Nothing => {}
            }
        }
        Ok(false)
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
        Ok(Self { path, full, stat: Some(stat), file })
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

enum Seen {
    Here,
    Hidden,
    Nothing,
}

/// What one lower layer says of `path`: it has it, hides whatever is further down, or says nothing.
fn seen_in(lower: &Path, path: &Path) -> Result<Seen> {
    let mut at = lower.to_path_buf();
    let mut hidden = false;
    let mut value = [0u8; 8];
    for name in path {
        at.push(name);
        let meta = match fs::symlink_metadata(&at) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(if hidden { Seen::Hidden } else { Seen::Nothing }),
            Err(e) => return Err(broken(&at, e)),
        };
        if meta.file_type().is_char_device() && meta.rdev() == 0 {
            return Ok(Seen::Hidden);
        }
        if at.strip_prefix(lower).is_ok_and(|p| p == path) {
            return Ok(Seen::Here);
        }
        if !meta.is_dir() {
            return Ok(Seen::Hidden);
        }
        hidden |= OPAQUE.iter().any(|name| matches!(rustix::fs::lgetxattr(&at, *name, &mut value), Ok(1) if value[0] == b'y'));
    }
    Ok(Seen::Nothing)
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

fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn broken(path: &Path, error: io::Error) -> Fault {
    Fault::io(format!("read {} of a layer", path.display()), error)
}
