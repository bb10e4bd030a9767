//! Access below a directory that never follows a symbolic link and never leaves it, whatever the
//! paths say.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use shipway_fault::{Fault, Result};

use crate::path::split;

/// Directory handles kept at hand; walks have locality, so few are enough.
const CACHED: usize = 16;

/// Opens the file or directory `path` below `root`.
pub(crate) fn open_below(root: impl AsFd, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
        // Old kernels and some sandboxes lack the call; one step at a time does the same.
        Err(Errno::NOSYS | Errno::PERM) => {
            let (dir, name) = split(path);
            let mut at = rustix::fs::openat(
                &root,
                ".",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            for part in dir.split('/').filter(|p| !p.is_empty()) {
                at = rustix::fs::openat(
                    &at,
                    part,
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
            }
            Ok(rustix::fs::openat(&at, name, flags, Mode::empty())?)
        }
        opened => Ok(opened?),
    }
}

/// Reads the regular file `path` below `root`. A socket, a pipe or a link in its place is an error,
/// never a wait.
pub(crate) fn open_file(root: impl AsFd, path: &str) -> io::Result<File> {
    open_below(root, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).map(File::from)
}

/// Sets the permissions of `name` in `dir`, never of what a link leads to: another process may have
/// put one there.
pub fn chmod_nofollow(
    dir: impl AsFd,
    name: impl rustix::path::Arg,
    mode: Mode,
) -> rustix::io::Result<()> {
    let file = rustix::fs::openat(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) == FileType::Symlink {
        return Err(Errno::LOOP);
    }
    // The one way to change a file through a descriptor that does not open it.
    rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)
}

/// Opens a directory to work in.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(
        CWD,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| Fault::io(format!("open directory {}", path.display()), e.into()))
}

/// Handles of the directories that were used last.
pub(crate) struct Dirs {
    root: OwnedFd,
    cached: Vec<(Box<str>, OwnedFd)>,
}

impl Dirs {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self { root, cached: Vec::new() }
    }

    /// The directory `path`; empty for the root.
    pub(crate) fn get(&mut self, path: &str) -> io::Result<BorrowedFd<'_>> {
        if path.is_empty() {
            return Ok(self.root.as_fd());
        }
        match self.cached.iter().rposition(|(p, _)| &**p == path) {
            Some(i) if i + 1 == self.cached.len() => {}
            Some(i) => {
                let hit = self.cached.remove(i);
                self.cached.push(hit);
            }
            None => {
                let fd = open_below(&self.root, path, OFlags::PATH | OFlags::DIRECTORY)?;
                if self.cached.len() == CACHED {
                    self.cached.remove(0);
                }
                self.cached.push((path.into(), fd));
            }
        }
        Ok(self.cached.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd()))
    }

    /// Forgets the directory `path` and what is below it.
    pub(crate) fn forget(&mut self, path: &str) {
        self.cached.retain(|(p, _)| {
            !p.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
    }
}

/// Removes `name` from `dir` and, if it is a directory, what is in it. What is not there is no
/// error.
pub(crate) fn remove(dir: impl AsFd, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = rustix::fs::openat(&dir, name, flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&inner)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    for (child, kind) in names {
        if kind != FileType::Directory {
            match rustix::fs::unlinkat(&inner, &child, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(e) => return Err(e.into()),
            }
        }
        match child.to_str() {
            Ok(child) => remove(&inner, child)?,
            // Only what we were sent has a name we could not have written.
            Err(_) => {
                return Err(io::Error::other(format!("directory name {child:?} is not UTF-8")));
            }
        }
    }
    Ok(rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR)?)
}
