//! Opening paths inside a root, which the kernel resolves (`openat2`): the one place that does.

use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{fs::File, path::Path};

/// How often a path is resolved that others change meanwhile. A step that renames directories all
/// the time must not hold a thread.
const MAX_TRIES: usize = 128;

/// Opens for reading what `fd` was opened to look at (`O_PATH`), if it is a regular file. Between
/// the two openings it cannot be exchanged.
pub fn reopen_regular(fd: BorrowedFd<'_>) -> rustix::io::Result<Option<File>> {
    if FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(own, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(|fd| Some(fd.into()))
}

/// Opens `path` inside the directory `root`, which no link and no `..` leaves.
pub fn open_in_root(
    root: BorrowedFd<'_>,
    path: impl AsRef<[u8]>,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let path = path.as_ref();
    let path = &path[path.iter().take_while(|b| **b == b'/').count()..];
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    again(|| rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve))
}

/// Opens `path`, which is relative and has no `..`, below the directory `root`, following no link
/// at all.
pub fn open_beneath(
    root: impl AsFd,
    path: impl AsRef<[u8]>,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC;
    again(|| rustix::fs::openat2(&root, path.as_ref(), flags, Mode::empty(), resolve))
}

/// Opens a directory of the host, to open paths in it.
pub fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Does `open` until a rename elsewhere does not race with it: the kernel asks to try again then.
fn again<T>(mut open: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 1..MAX_TRIES {
        match open() {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    open()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn trying_again_has_an_end() {
        let mut tries = 0;
        let result: rustix::io::Result<()> = again(|| {
            tries += 1;
            Err(Errno::AGAIN)
        });
        assert_eq!((result, tries), (Err(Errno::AGAIN), MAX_TRIES));
    }

    #[test]
    fn beneath_a_root_no_link_is_followed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("a/b")).expect("mkdir");
        symlink("a", dir.path().join("link")).expect("symlink");
        let root = open_directory(dir.path()).expect("open");
        let open = |path: &str| open_beneath(&root, path, OFlags::PATH).map(drop);
        assert_eq!(open("a/b"), Ok(()));
        assert_eq!(open("."), Ok(()));
        assert_eq!(open("link/b"), Err(Errno::LOOP));
        assert_eq!(open("../x"), Err(Errno::XDEV));
        assert_eq!(open("/a"), Err(Errno::XDEV));
    }
}
