//! Directories: made before a row, thrown away after it, counted.
//!
//! What is inside `fs` belongs to containers and may be anything, so it is walked by descriptors
//! only: no symlink is followed, no mount is crossed, and depth is bounded.

use crate::model::{DirectoryId, Usage};
use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RawDir, ResolveFlags},
    io::Errno,
};
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use std::{
    collections::HashSet,
    ffi::{CStr, CString},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

/// Directories within directories that are open at once while counting.
const COUNT_DEPTH: usize = 256;
/// Directories at that depth that wait for their turn; those of further ones are not counted.
const COUNT_LATER: usize = 256;
/// Directories within directories that are removed in one go; what is deeper becomes an entry of
/// the trash itself.
const REMOVE_DEPTH: usize = 64;

pub(crate) struct Disk {
    root: PathBuf,
    /// One at a time empties the trash.
    emptying: Mutex<()>,
}

fn io_fault(what: impl std::fmt::Display, error: impl Into<io::Error>) -> Fault {
    Fault::io(what, error.into())
}

impl Disk {
    /// Makes what is missing below `root`.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let make = |path: &Path, recursive| {
            let made = std::fs::DirBuilder::new().recursive(recursive).mode(0o700).create(path);
            match made {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                made => made.map_err(|e| io_fault(format!("make {}", path.display()), e)),
            }
        };
        make(root, true)?;
        let disk = Self {
            root: root
                .canonicalize()
                .map_err(|e| io_fault(format!("find {}", root.display()), e))?,
            emptying: Mutex::new(()),
        };
        make(&disk.snapshots(), false)?;
        make(&disk.trash(), false)?;
        disk.check_types()?;
        Ok(disk)
    }

    /// Overlays need directory entries that tell types.
    fn check_types(&self) -> Result<()> {
        for entry in walk(open(CWD, &self.root)?)? {
            let entry = entry.map_err(|e| io_fault(format!("read {}", self.root.display()), e))?;
            if entry.file_name() == c"trash" && entry.file_type() == FileType::Unknown {
                let root = self.root.display();
                return Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("the file system of {root} does not tell types of directory entries"),
                )
                .hint("make an xfs anew with ftype=1, or choose another file system for `root`"));
            }
        }
        Ok(())
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Where clones with mapped ids are mounted.
    pub(crate) fn mapped(&self) -> PathBuf {
        self.root.join("m")
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("db.redb")
    }

    fn directory(&self, id: DirectoryId) -> PathBuf {
        self.snapshots().join(id.0.to_string())
    }

    /// The files of a snapshot.
    pub(crate) fn files(&self, id: DirectoryId) -> PathBuf {
        self.directory(id).join("fs")
    }

    /// Where the overlay of an active snapshot works.
    pub(crate) fn work(&self, id: DirectoryId) -> PathBuf {
        self.directory(id).join("work")
    }

    /// The files of a snapshot, or an error if they are gone.
    pub(crate) fn present(&self, id: DirectoryId) -> Result<PathBuf> {
        let path = self.files(id);
        match path.symlink_metadata() {
            Ok(m) if m.is_dir() => Ok(path),
            Ok(_) => Err(lost(&path)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(lost(&path)),
            Err(e) => Err(io_fault(format!("stat {}", path.display()), e)),
        }
    }

    /// Makes the directory of a snapshot whose files, still none, belong to this user and group.
    /// What an earlier life left there goes to the trash.
    pub(crate) fn make(&self, id: DirectoryId, owner: Option<(u32, u32)>) -> Result<()> {
        let path = self.directory(id);
        let attempt = || -> io::Result<()> {
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            let files = self.files(id);
            std::fs::create_dir(&files)?;
            // Whatever the umask.
            rustix::fs::chmod(&files, Mode::from_raw_mode(0o755))?;
            if let Some((user, group)) = owner {
                std::os::unix::fs::lchown(&files, Some(user), Some(group))?;
            }
            let work = self.work(id);
            std::fs::create_dir(&work)?;
            rustix::fs::chmod(&work, Mode::from_raw_mode(0o711))?;
            Ok(())
        };
        let made = match attempt() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.discard(id);
                attempt()
            }
            made => made,
        };
        made.map_err(|e| io_fault(format!("make {}", path.display()), e))
    }

    /// Moves a directory to the trash; one that is gone is as good as moved.
    pub(crate) fn discard(&self, id: DirectoryId) {
        self.throw_away(&self.directory(id), &id.0.to_string());
    }

    fn throw_away(&self, path: &Path, name: &str) {
        for attempt in 0u32.. {
            let target = self.trash().join(format!("{name}.{attempt}"));
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(CWD, path, CWD, &target, flags) {
                Ok(()) | Err(Errno::NOENT) => return,
                Err(Errno::EXIST) => {}
                Err(error) => {
                    // The next start finds it without a row.
                    tracing::warn!(path = %path.display(), %error, "a directory stays until the next start");
                    return;
                }
            }
        }
    }

    /// Moves to the trash what `known` does not know; returns how many directories that were.
    pub(crate) fn discard_unknown(&self, known: impl Fn(DirectoryId) -> bool) -> Result<usize> {
        let snapshots = self.snapshots();
        let mut unknown = Vec::new();
        for entry in std::fs::read_dir(&snapshots)
            .map_err(|e| io_fault(format!("read {}", snapshots.display()), e))?
        {
            let entry = entry.map_err(|e| io_fault(format!("read {}", snapshots.display()), e))?;
            let name = entry.file_name();
            let id = name.to_str().and_then(|n| n.parse().ok()).map(DirectoryId);
            if !id.is_some_and(|id| known(id) && self.directory(id) == entry.path()) {
                unknown.push((entry.path(), name.to_string_lossy().into_owned()));
            }
        }
        unknown.iter().for_each(|(path, name)| self.throw_away(path, name));
        Ok(unknown.len())
    }

    /// Whether there is any directory of a snapshot.
    pub(crate) fn is_empty(&self) -> Result<bool> {
        let snapshots = self.snapshots();
        let mut entries = std::fs::read_dir(&snapshots)
            .map_err(|e| io_fault(format!("read {}", snapshots.display()), e))?;
        Ok(entries.next().is_none())
    }

    /// Removes what is in the trash. What cannot be removed stays, and is the error.
    pub(crate) fn empty_trash(&self) -> Result<()> {
        let _one = self.emptying.lock();
        let trash = open(CWD, self.trash())?;
        let mut failed = HashSet::new();
        let mut last = None;
        loop {
            // Entries are added while it is emptied: those that were too deep inside another.
            let mut entries = Vec::new();
            for entry in walk(open(trash.as_fd(), c".")?)? {
                let entry = entry.map_err(|e| io_fault("read the trash", e))?;
                let name = entry.file_name().to_owned();
                if !is_dots(&name) && !failed.contains(&name) {
                    entries.push(name);
                }
            }
            if entries.is_empty() {
                break;
            }
            for name in entries {
                if let Err(error) = remove(&trash, trash.as_fd(), &name, 0) {
                    let what =
                        format!("remove {}/{}", self.trash().display(), name.to_string_lossy());
                    last = Some(io_fault(what, error));
                    failed.insert(name);
                }
            }
        }
        last.map_or(Ok(()), Err)
    }

    /// What the files of a snapshot take.
    pub(crate) fn usage(&self, id: DirectoryId) -> Result<Usage> {
        let path = self.present(id)?;
        usage(&path).context(|| format!("count {}", path.display()))
    }
}

/// Owner and group of a directory.
pub(crate) fn owner_of(path: &Path) -> Result<(u32, u32)> {
    let found = path.symlink_metadata();
    found.map(|m| (m.uid(), m.gid())).map_err(|e| io_fault(format!("stat {}", path.display()), e))
}

fn lost(path: &Path) -> Fault {
    Fault::new(
        Code::DataLoss,
        format!("the files of a snapshot are gone: there is no directory {}", path.display()),
    )
    .with_class(Class::Environment)
    .hint("remove the image or container that needs them and make it anew")
}

fn is_dots(name: &CStr) -> bool {
    name == c"." || name == c".."
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn open(at: BorrowedFd<'_>, path: impl rustix::path::Arg) -> Result<OwnedFd> {
    rustix::fs::openat(at, path, DIRECTORY, Mode::empty())
        .map_err(|e| io_fault("open a directory", e))
}

fn walk(fd: OwnedFd) -> Result<Dir> {
    Dir::new(fd).map_err(|e| io_fault("read a directory", e))
}

/// Opens the directory `name` of `at`: itself, no symlink, nothing that is mounted there.
fn descend(at: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(at, name, DIRECTORY, Mode::empty(), resolve)
}

/// Removes `name` in `at` and all that is in it.
fn remove(trash: &OwnedFd, at: BorrowedFd<'_>, name: &CStr, depth: usize) -> Result<(), Errno> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    let dir = descend(at, name)?;
    let mut failed = None;
    // Removing entries may make a reader skip others, so it is read until there is nothing left.
    loop {
        let mut names: Vec<CString> = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(descend(dir.as_fd(), c".")?, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            if !is_dots(entry.file_name()) {
                names.push(entry.file_name().to_owned());
            }
            if names.len() >= 1024 {
                break;
            }
        }
        if names.is_empty() || failed.is_some() {
            break;
        }
        for name in &names {
            let done = if depth < REMOVE_DEPTH {
                remove(trash, dir.as_fd(), name, depth + 1)
            } else {
                set_aside(trash, dir.as_fd(), name)
            };
            if let Err(error) = done {
                failed = Some(error);
            }
        }
    }
    match failed {
        Some(error) => Err(error),
        None => rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR),
    }
}

/// Makes `name` in `at` an entry of the trash, or removes it if it is no directory.
fn set_aside(trash: &OwnedFd, at: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        done => return done,
    }
    for attempt in 0u32.. {
        let target = format!("deep.{attempt}");
        match rustix::fs::renameat_with(
            at,
            name,
            trash,
            target.as_str(),
            rustix::fs::RenameFlags::NOREPLACE,
        ) {
            Err(Errno::EXIST) => {}
            done => return done,
        }
    }
    Ok(())
}

/// Blocks and inodes of a tree; a file with several names counts once, what vanishes meanwhile not
/// at all.
fn usage(root: &Path) -> Result<Usage> {
    let fd = open(CWD, root)?;
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut add = |stat: &rustix::fs::Stat| {
        let several =
            stat.st_nlink > 1 && FileType::from_raw_mode(stat.st_mode) != FileType::Directory;
        if !several || linked.insert((stat.st_dev, stat.st_ino)) {
            usage.inodes += 1;
            usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
    };
    add(&rustix::fs::fstat(&fd).map_err(|e| io_fault("stat", e))?);
    let (mut later, mut skipped) = (Vec::new(), 0u64);
    let mut stack = vec![walk(fd)?];
    loop {
        let depth = stack.len();
        let Some(dir) = stack.last_mut() else {
            match later.pop() {
                Some(fd) => stack.push(walk(fd)?),
                None => break,
            }
            continue;
        };
        let Some(entry) = dir.next() else {
            stack.pop();
            continue;
        };
        let entry = entry.map_err(|e| io_fault("read a directory", e))?;
        if is_dots(entry.file_name()) {
            continue;
        }
        let at = dir.fd().map_err(|e| io_fault("read a directory", e))?;
        let stat = match rustix::fs::statat(at, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(io_fault("stat", e)),
        };
        add(&stat);
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            continue;
        }
        match descend(at, entry.file_name()) {
            Ok(below) if depth < COUNT_DEPTH => stack.push(walk(below)?),
            Ok(below) if later.len() < COUNT_LATER => later.push(below),
            Ok(_) => skipped += 1,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
            Err(e) => return Err(io_fault("open a directory", e)),
        }
    }
    if skipped > 0 {
        tracing::warn!(root = %root.display(), directories = skipped, "what is in very deep directories is not counted");
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn disk() -> (tempfile::TempDir, Disk) {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(&dir.path().join("root")).unwrap();
        (dir, disk)
    }

    /// Makes `depth` directories within each other below `at`, which no path could name.
    fn deep(at: &Path, depth: usize) {
        let mut fd = open(CWD, at).unwrap();
        for _ in 0..depth {
            rustix::fs::mkdirat(&fd, "d", Mode::from_raw_mode(0o755)).unwrap();
            fd = open(fd.as_fd(), c"d").unwrap();
        }
        rustix::fs::openat(
            &fd,
            "bottom",
            OFlags::CREATE | OFlags::WRONLY,
            Mode::from_raw_mode(0o644),
        )
        .unwrap();
    }

    #[test]
    fn usage_counts_blocks_and_inodes_once_and_follows_nothing() {
        let (outside, disk) = disk();
        std::fs::write(outside.path().join("big"), vec![1; 1 << 20]).unwrap();
        let id = DirectoryId(1);
        disk.make(id, None).unwrap();
        let fs = disk.files(id);
        let empty = disk.usage(id).unwrap();
        assert_eq!(empty.inodes, 1);
        std::fs::write(fs.join("one"), vec![1; 10_000]).unwrap();
        std::fs::hard_link(fs.join("one"), fs.join("two")).unwrap();
        symlink(outside.path(), fs.join("away")).unwrap();
        std::fs::create_dir(fs.join("sub")).unwrap();
        std::fs::write(fs.join("sub/three"), b"x").unwrap();
        let full = disk.usage(id).unwrap();
        assert_eq!(full.inodes, 5);
        let blocks = |p: &str| fs.join(p).symlink_metadata().unwrap().blocks() * 512;
        let want: u64 = ["", "one", "away", "sub", "sub/three"].into_iter().map(blocks).sum();
        assert_eq!(full.bytes, want);
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_counted_and_removed_whole() {
        let (_dir, disk) = disk();
        let id = DirectoryId(1);
        disk.make(id, None).unwrap();
        let depth = 10 * COUNT_DEPTH;
        deep(&disk.files(id), depth);
        // The root and the file at the bottom besides.
        assert_eq!(disk.usage(id).unwrap().inodes, depth as u64 + 2);
        disk.discard(id);
        disk.empty_trash().unwrap();
        assert_eq!(std::fs::read_dir(disk.trash()).unwrap().count(), 0);
    }

    #[test]
    fn more_very_deep_directories_than_can_wait_are_left_out_of_the_count() {
        let (_dir, disk) = disk();
        let id = DirectoryId(1);
        disk.make(id, None).unwrap();
        let mut fd = open(CWD, disk.files(id)).unwrap();
        for _ in 1..COUNT_DEPTH {
            rustix::fs::mkdirat(&fd, "d", Mode::from_raw_mode(0o755)).unwrap();
            fd = open(fd.as_fd(), c"d").unwrap();
        }
        for i in 0..COUNT_LATER + 10 {
            rustix::fs::mkdirat(&fd, format!("{i}"), Mode::from_raw_mode(0o755)).unwrap();
            rustix::fs::mkdirat(&fd, format!("{i}/in"), Mode::from_raw_mode(0o755)).unwrap();
        }
        let counted = COUNT_DEPTH + COUNT_LATER + 10 + COUNT_LATER;
        assert_eq!(disk.usage(id).unwrap().inodes, counted as u64);
    }

    #[test]
    fn many_entries_and_odd_names_are_removed_and_nothing_outside() {
        let (outside, disk) = disk();
        std::fs::create_dir(outside.path().join("keep")).unwrap();
        std::fs::write(outside.path().join("keep/file"), b"x").unwrap();
        let id = DirectoryId(7);
        disk.make(id, None).unwrap();
        for i in 0..3000 {
            std::fs::write(disk.files(id).join(format!("f{i}")), b"").unwrap();
        }
        symlink(outside.path().join("keep"), disk.files(id).join("link")).unwrap();
        std::fs::create_dir(disk.files(id).join("new\nline")).unwrap();
        disk.discard(id);
        // The number may come again before the trash is emptied.
        disk.make(id, None).unwrap();
        disk.discard(id);
        assert_eq!(std::fs::read_dir(disk.trash()).unwrap().count(), 2);
        disk.empty_trash().unwrap();
        assert_eq!(std::fs::read_dir(disk.trash()).unwrap().count(), 0);
        assert!(outside.path().join("keep/file").exists());
    }

    #[test]
    fn what_no_row_names_goes_to_the_trash() {
        let (_dir, disk) = disk();
        for id in [1, 2, 3] {
            disk.make(DirectoryId(id), None).unwrap();
        }
        std::fs::create_dir(disk.snapshots().join("02")).unwrap();
        std::fs::write(disk.snapshots().join("stray"), b"").unwrap();
        assert_eq!(disk.discard_unknown(|id| id.0 == 2).unwrap(), 4);
        assert_eq!(std::fs::read_dir(disk.snapshots()).unwrap().count(), 1);
        assert!(disk.present(DirectoryId(2)).is_ok());
        assert_eq!(disk.present(DirectoryId(1)).unwrap_err().code(), Code::DataLoss);
    }

    #[test]
    fn files_have_containerds_modes_and_the_owner_that_was_told() {
        let (_dir, disk) = disk();
        let own = owner_of(&disk.snapshots()).unwrap();
        let owner = if rustix::process::geteuid().is_root() { (1234, 77) } else { own };
        disk.make(DirectoryId(2), Some(owner)).unwrap();
        let files = disk.files(DirectoryId(2));
        assert_eq!(owner_of(&files).unwrap(), owner);
        assert_eq!(files.metadata().unwrap().mode() & 0o7777, 0o755);
        assert_eq!(disk.work(DirectoryId(2)).metadata().unwrap().mode() & 0o7777, 0o711);
    }
}
