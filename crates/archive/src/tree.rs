//! What a layer holds: the walk over an overlay upper directory, or over a whole tree.

use crate::{
    attributes::{self, ACCESS_ACL, CAPABILITY, DEFAULT_ACL, FileXattrs, Pairs, XattrSource},
    below::Below,
    loss::{Loss, LossKind, Losses, WHITEOUT},
    stat::{broken, time_of, unpacked},
};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat, Timespec, Timestamps, UTIME_OMIT},
    io::Errno,
};
use shipway_fault::Result;
use shipway_storage::overlay::{Marks, is_whiteout};
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
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
    /// Whether the layer has changes of the root itself.
    rooted: bool,
    /// Whether everything gets the time that unpacking gives it.
    settled: bool,
}

/// What a tree lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Base {
    Nothing,
    /// Lower directories of the overlay whose upper directory the tree is, topmost first, and where
    /// the overlay leaves its marks.
    Lowers(Vec<PathBuf>, Marks),
    /// The whole tree before the changes; the tree is whole, too.
    Before(PathBuf),
}

/// A directory on the way of the walk.
struct Frame {
    /// The directory; closed while the walk is far below it.
    dir: Option<OwnedFd>,
    /// Names still to visit, last one first.
    names: Vec<OsString>,
    /// The directory's own entry, if it is unchanged and thus in the layer only when something in
    /// it is.
    held: Option<LayerEntry>,
    /// What lies below it.
    below: Below,
    /// Whether nothing of that shows through, so that what is not in the directory is gone.
    bare: bool,
    /// Whether what is made in it inherits an access control list.
    inherits: bool,
    /// When it was changed, and when what it is compared with was.
    time: (i64, i64),
    below_time: (i64, i64),
}

/// Something that the walk has come to.
struct Visited<'a> {
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
pub struct LayerEntry {
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
/// What snapshotters give to the root of a snapshot on nothing.
const ROOT_MODE: u32 = 0o755;

impl LayerTree {
    fn new(root: PathBuf, base: Base, rooted: bool) -> Self {
        Self { root, base, time: None, rooted, settled: false }
    }

    /// The upper directory of an overlay over `lowers`, topmost first: what differs from them, for
    /// the upper directory has also what was only touched.
    pub fn overlay(upper: impl Into<PathBuf>, lowers: Vec<PathBuf>, marks: Marks) -> Self {
        Self::new(upper.into(), Base::Lowers(lowers, marks), true)
    }

    /// A whole tree, on nothing.
    pub fn whole(root: impl Into<PathBuf>) -> Self {
        Self::new(root.into(), Base::Nothing, false)
    }

    /// The same as the lowest layer of a stack: the root has an entry, too, where it is not as all
    /// roots are.
    pub fn lowest(root: impl Into<PathBuf>) -> Self {
        Self::new(root.into(), Base::Nothing, true)
    }

    /// What changed from the whole tree `before` to the whole tree `after`.
    pub fn compared(before: impl Into<PathBuf>, after: impl Into<PathBuf>) -> Self {
        Self::new(after.into(), Base::Before(before.into()), true)
    }

    /// The same, and walking it gives everything the time that unpacking its tar gives: whole
    /// seconds, and to a directory that the tar leaves out the time of the one below. For trees
    /// that are written, and not committed yet.
    #[must_use]
    pub fn settled(self) -> Self {
        Self { settled: true, ..self }
    }

    /// The same with one time for all entries (row `ex.fs.sde`).
    #[must_use]
    pub fn at(self, time: Option<i64>) -> Self {
        Self { time, ..self }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the contents of `entry` are.
    pub fn locate(&self, entry: &LayerEntry) -> PathBuf {
        self.root.join(OsStr::from_bytes(&entry.path))
    }

    /// Visits the entries: parents before children, siblings in byte order. The root is none, or
    /// the first one, with an empty path.
    pub fn walk(&self, mut visit: impl FnMut(LayerEntry) -> Result<()>) -> Result<()> {
        self.walk_open(|entry, _| visit(entry)).map(drop)
    }

    /// The same, with each file open for reading. Says what unpacking the entries would not give
    /// back, if there is anything.
    pub(crate) fn walk_open(
        &self,
        mut visit: impl FnMut(LayerEntry, Option<File>) -> Result<()>,
    ) -> Result<Option<Loss>> {
        let mut visit = |entry: LayerEntry, file| {
            visit(LayerEntry { mtime: self.time.unwrap_or(entry.mtime), ..entry }, file)
        };
        let mut losses = Losses::default();
        let dir = open_dir(CWD, &self.root, &self.root)?;
        let (below, bare) = match &self.base {
            Base::Nothing => (Below::default(), false),
            Base::Lowers(lowers, marks) => (Below::layers(lowers.clone(), *marks), false),
            Base::Before(before) => (Below::tree(before.clone()), true),
        };
        let (root, inherits) = self.root_entry(&dir, &mut losses)?;
        if let Some(root) = root {
            visit(root, None)?;
        }
        let mut stack = vec![Frame { inherits, ..self.frame(dir, Path::new(""), below, bare)? }];
        let mut path = PathBuf::new();
        loop {
            if let Some(far) = stack.len().checked_sub(MAX_OPEN + 1) {
                stack[far].dir = None;
            }
            let Some(frame) = stack.last_mut() else { return Ok(losses.first()) };
            let Some(name) = frame.names.pop() else {
                if self.settled && stack.len() > 1 {
                    self.settle_dir(stack.pop(), &path, &mut losses)?;
                } else {
                    stack.pop();
                }
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
            let place = Visited::look(dir, &name, &path, &full, frame.bare)?;
            let seen = frame.below.look(&name)?;
            let Some((mut entry, lost)) =
                self.entry(&place, seen.thing.as_ref().map(|(_, old)| old), &mut losses)?
            else {
                path.pop();
                continue;
            };
            let unchanged = match (&seen.thing, &place.stat) {
                (Some(old), Some(new)) => {
                    let found = (&entry.xattrs, &lost);
                    frame.below.is_same(
                        old,
                        (&full, new, place.file.as_ref()),
                        found,
                        &entry.path,
                        &mut losses,
                    )?
                }
                _ => false,
            };
            let (bare, inherits) = (frame.bare, entry.has(DEFAULT_ACL));
            let directory = entry.kind == EntryKind::Directory;
            let times = (
                place.time(),
                seen.thing.as_ref().map(|(_, old)| time_of(old)).unwrap_or_default(),
            );
            if self.settled
                && !directory
                && place.stat.is_some()
                && entry.kind != EntryKind::Whiteout
            {
                let want = if unchanged { times.1 } else { unpacked(times.0) };
                if want != times.0 && place.set_time(dir, &name, want).is_err() {
                    losses.note(&entry.path, LossKind::Time);
                }
            }
            let mut held = None;
            if unchanged {
                held = directory.then_some(entry);
            } else {
                if let Some(stat) = &place.stat
                    && entry.kind != EntryKind::Whiteout
                {
                    let over = seen
                        .thing
                        .as_ref()
                        .filter(|_| directory && matches!(self.base, Base::Before(_)));
                    self.complete(&mut entry, stat, lost, frame.inherits, over, &mut losses)?;
                }
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
            }
            match place.file {
                Some(dir) if directory => {
                    let opaque = |marks: Marks| marks.is_opaque(&full);
                    let bare = bare || matches!(self.base, Base::Lowers(_, marks) if opaque(marks));
                    let frame = self.frame(dir.into(), &path, seen.below, bare)?;
                    stack.push(Frame {
                        held,
                        inherits,
                        time: times.0,
                        below_time: times.1,
                        ..frame
                    });
                }
                _ => drop(path.pop()),
            }
        }
    }

    /// The root's own entry, if it differs from the root below, and whether what is made in it
    /// inherits an access control list.
    fn root_entry(&self, dir: &OwnedFd, losses: &mut Losses) -> Result<(Option<LayerEntry>, bool)> {
        let stat = rustix::fs::fstat(dir).map_err(|e| broken(&self.root, e.into()))?;
        let own = attributes::read(XattrSource::Open(dir.as_fd()), self.marks(), &self.root)?;
        let inherits = own.has(DEFAULT_ACL);
        if !self.rooted {
            return Ok((None, inherits));
        }
        let (below, unpacked) = self.root_below()?;
        let own = Root {
            mode: stat.st_mode & 0o7777,
            owner: (stat.st_uid, stat.st_gid),
            attributes: own,
        };
        if own != unpacked {
            losses.note(b"", LossKind::Root);
        }
        let same = (own.mode, own.owner, &own.attributes.carried)
            == (below.mode, below.owner, &below.attributes.carried);
        let entry = || LayerEntry {
            path: Vec::new(),
            kind: EntryKind::Directory,
            mode: own.mode,
            uid: own.owner.0,
            gid: own.owner.1,
            size: 0,
            mtime: stat.st_mtime,
            xattrs: own.attributes.carried,
        };
        Ok(((!same).then(entry), inherits))
    }

    /// The root below, and the one that unpacking gives: containerd passes over entries of the
    /// root. Its overlay snapshotters make each root anew and keep the owner, snapshotters that
    /// copy keep all.
    fn root_below(&self) -> Result<(Root, Root)> {
        let top = match &self.base {
            Base::Nothing => None,
            Base::Lowers(lowers, _) => lowers.first(),
            Base::Before(before) => Some(before),
        };
        let Some(top) = top else { return Ok((Root::default(), Root::default())) };
        let below = || -> Result<Root> {
            let stat = rustix::fs::stat(top).map_err(|e| broken(top, e.into()))?;
            let attributes = attributes::read(XattrSource::At(top), self.marks(), top)?;
            Ok(Root { mode: stat.st_mode & 0o7777, owner: (stat.st_uid, stat.st_gid), attributes })
        };
        let unpacked = match &self.base {
            Base::Before(_) => below()?,
            _ => Root { owner: below()?.owner, ..Root::default() },
        };
        Ok((below()?, unpacked))
    }

    fn marks(&self) -> Option<Marks> {
        match &self.base {
            Base::Lowers(_, marks) => Some(*marks),
            _ => None,
        }
    }

    /// Completes an entry of the layer, and notes what is lost of it. `over` is the directory that
    /// it is unpacked into, if that is not made anew.
    fn complete(
        &self,
        entry: &mut LayerEntry,
        stat: &Stat,
        lost: Pairs,
        inherits: bool,
        over: Option<&(PathBuf, Stat)>,
        losses: &mut Losses,
    ) -> Result<()> {
        if entry.path.rsplit(|b| *b == b'/').next().is_some_and(|name| name.starts_with(WHITEOUT)) {
            losses.note(&entry.path, LossKind::WhiteoutName);
        }
        if let Some((name, _)) = lost.first() {
            losses.note(&entry.path, LossKind::Attribute(name.clone()));
        }
        if let Some((path, old)) = over
            && FileType::from_raw_mode(old.st_mode) == FileType::Directory
        {
            let old = attributes::read(XattrSource::At(path), None, path)?;
            let kept = |(name, _): &&(Vec<u8>, Vec<u8>)| !entry.has(name);
            if let Some((name, _)) = old.carried.iter().find(kept).or(old.lost.first()) {
                losses.note(&entry.path, LossKind::Attribute(name.clone()));
            }
        }
        if let Some(first) = losses.carried(&entry.path, stat) {
            entry.kind = EntryKind::HardLink(first.to_vec());
            entry.size = 0;
            // Unpacking a link gives its file the owner again, and with that the kernel takes
            // capabilities away.
            entry.xattrs.retain(|(name, _)| name == CAPABILITY);
            return Ok(());
        }
        let linked = matches!(entry.kind, EntryKind::Symlink(_));
        let own =
            entry.has(ACCESS_ACL) && (entry.kind != EntryKind::Directory || entry.has(DEFAULT_ACL));
        if inherits && !linked && !own {
            losses.note(&entry.path, LossKind::Inherited);
        }
        Ok(())
    }

    /// Gives the directory at `path` the time that unpacking gives it, now that no entry in it
    /// follows.
    fn settle_dir(&self, frame: Option<Frame>, path: &Path, losses: &mut Losses) -> Result<()> {
        let Some(Frame { dir, held, time, below_time, .. }) = frame else { return Ok(()) };
        let want = if held.is_some() { below_time } else { unpacked(time) };
        if want == time {
            return Ok(());
        }
        let full = self.root.join(path);
        let dir = match dir {
            Some(dir) => dir,
            None => open_dir(CWD, &full, &full)?,
        };
        if rustix::fs::futimens(&dir, &times(want)).is_err() {
            losses.note(bytes(path), LossKind::Time);
        }
        Ok(())
    }

    fn frame(&self, dir: OwnedFd, path: &Path, below: Below, bare: bool) -> Result<Frame> {
        let mut names = if bare { below.names()? } else { BTreeSet::new() };
        let mut buffer = Vec::with_capacity(16 << 10);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| broken(&self.root.join(path), e.into()))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.insert(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
            }
        }
        let names = names.into_iter().rev().collect();
        Ok(Frame {
            dir: Some(dir),
            names,
            held: None,
            below,
            bare,
            inherits: false,
            time: (0, 0),
            below_time: (0, 0),
        })
    }

    /// What the layer has of a place, and which attributes of it are lost; `old` is what lies
    /// below.
    fn entry(
        &self,
        place: &Visited<'_>,
        old: Option<&Stat>,
        losses: &mut Losses,
    ) -> Result<Option<(LayerEntry, Pairs)>> {
        let name = bytes(place.path).to_vec();
        let whiteout = |name| Some((LayerEntry::bare(name, EntryKind::Whiteout), Vec::new()));
        let Some(stat) = &place.stat else { return Ok(whiteout(name)) };
        // What no layer has stays where the whole tree was copied.
        let looks = |s: &Stat| (s.st_mode, s.st_uid, s.st_gid, s.st_rdev, time_of(s));
        let unless_old = |kind, losses: &mut Losses| {
            if old.is_none_or(|old| {
                matches!(self.base, Base::Lowers(..)) || looks(old) != looks(stat)
            }) {
                losses.note(bytes(place.path), kind);
            }
        };
        if is_whiteout(stat) {
            if !matches!(self.base, Base::Lowers(..)) {
                unless_old(LossKind::WhiteoutDevice, losses);
                return Ok(None);
            }
            // Without anything below there is nothing to hide.
            return Ok(if old.is_some() { whiteout(name) } else { None });
        }
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => EntryKind::Symlink(
                fs::read_link(place.full)
                    .map_err(|e| broken(place.full, e))?
                    .into_os_string()
                    .into_vec(),
            ),
            FileType::CharacterDevice => EntryKind::CharDevice(major, minor),
            FileType::BlockDevice => EntryKind::BlockDevice(major, minor),
            FileType::Fifo => EntryKind::Fifo,
            FileType::RegularFile => EntryKind::File,
            // A socket is nothing without its process, and tar has no word for it.
            _ => {
                unless_old(LossKind::Socket, losses);
                return Ok(None);
            }
        };
        let mut entry = LayerEntry {
            path: name,
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: 0,
            // A layer says no time that it would not get back.
            mtime: if self.rooted { unpacked(place.time()).0 } else { place.time().0 },
            xattrs: Vec::new(),
        };
        if entry.kind == EntryKind::File {
            entry.size = stat.st_size.cast_unsigned();
        }
        let of = place
            .file
            .as_ref()
            .map_or(XattrSource::At(place.full), |file| XattrSource::Open(file.as_fd()));
        let FileXattrs { carried, lost } = attributes::read(of, self.marks(), place.full)?;
        entry.xattrs = carried;
        Ok(Some((entry, lost)))
    }
}

impl<'a> Visited<'a> {
    /// Looks at `name` in `dir`. What was there `before` may be gone.
    fn look(
        dir: &OwnedFd,
        name: &OsStr,
        path: &'a Path,
        full: &'a Path,
        before: bool,
    ) -> Result<Self> {
        let failed = |e: Errno| broken(full, e.into());
        let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) if before => return Ok(Self { path, full, stat: None, file: None }),
            Err(e) => return Err(failed(e)),
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                Some(rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(failed)?)
            }
            FileType::Directory => Some(open_dir(dir, Path::new(name), full)?),
            _ => None,
        };
        Ok(Self { path, full, stat: Some(stat), file: file.map(File::from) })
    }

    fn time(&self) -> (i64, i64) {
        self.stat.as_ref().map(time_of).unwrap_or_default()
    }

    /// Gives it, `name` in `dir`, another time.
    fn set_time(&self, dir: &OwnedFd, name: &OsStr, time: (i64, i64)) -> rustix::io::Result<()> {
        match &self.file {
            Some(file) => rustix::fs::futimens(file, &times(time)),
            None => rustix::fs::utimensat(dir, name, &times(time), AtFlags::SYMLINK_NOFOLLOW),
        }
    }
}

#[allow(clippy::unnecessary_cast)]
fn times((seconds, nanoseconds): (i64, i64)) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds as _ },
    }
}

/// What a root is like.
#[derive(PartialEq, Eq)]
struct Root {
    mode: u32,
    owner: (u32, u32),
    attributes: FileXattrs,
}

impl Default for Root {
    fn default() -> Self {
        Self { mode: ROOT_MODE, owner: (0, 0), attributes: FileXattrs::default() }
    }
}

/// Opens the directory `at` of `dir`.
fn open_dir(dir: impl AsFd, at: &Path, full: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, at, flags, Mode::empty()).map_err(|e| broken(full, e.into()))
}

impl LayerEntry {
    fn bare(path: Vec<u8>, kind: EntryKind) -> Self {
        Self { path, kind, mode: 0, uid: 0, gid: 0, size: 0, mtime: 0, xattrs: Vec::new() }
    }

    fn has(&self, attribute: &[u8]) -> bool {
        self.xattrs.iter().any(|(name, _)| name == attribute)
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}
