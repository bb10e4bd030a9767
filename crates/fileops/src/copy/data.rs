//! Copying of one file's attributes, and opening it.

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Gid, Mode, OFlags, Stat, Uid, XattrFlags},
    io::Errno,
};
use shipway_oci::is_image_xattr;
use std::{ffi::OsStr, os::fd::AsRawFd, path::Path};

/// The longest value of an extended attribute, and the longest list of their names, that Linux has.
const MAX_XATTR: usize = 64 << 10;

/// Gives a new file its owner and permissions. Most have them already, and to look is cheaper than
/// to write.
pub(super) fn adopt(
    file: BorrowedFd<'_>,
    uid: u32,
    gid: u32,
    mode: Mode,
) -> rustix::io::Result<()> {
    let made = rustix::fs::fstat(file)?;
    let owned = (made.st_uid, made.st_gid) == (uid, gid);
    if !owned {
        rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    if !owned || made.st_mode & 0o7777 != mode.as_raw_mode() {
        rustix::fs::fchmod(file, mode)?;
    }
    Ok(())
}

/// Copies extended attributes. Those that the target does not take are left out, as `cp -a` does.
pub(super) fn xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    each_xattr(
        |buffer| rustix::fs::flistxattr(from, buffer),
        |name, buffer| rustix::fs::fgetxattr(from, name, buffer),
        |name, value| rustix::fs::fsetxattr(to, name, value, XattrFlags::empty()),
    );
}

/// The same for what cannot be opened: a name in a directory, not followed if it is a link.
pub(super) fn xattrs_at(from: (BorrowedFd<'_>, &OsStr), to: (BorrowedFd<'_>, &OsStr)) {
    let path = |(dir, name): (BorrowedFd<'_>, &OsStr)| {
        Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name)
    };
    let (from, to) = (path(from), path(to));
    each_xattr(
        |buffer| rustix::fs::llistxattr(&from, buffer),
        |name, buffer| rustix::fs::lgetxattr(&from, name, buffer),
        |name, value| rustix::fs::lsetxattr(&to, name, value, XattrFlags::empty()),
    );
}

fn each_xattr(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> rustix::io::Result<usize>,
    set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>,
) {
    let (mut short, mut long) = ([0_u8; 1024], Vec::new());
    let names = match list(&mut short) {
        Ok(n) => &short[..n],
        Err(Errno::RANGE) => {
            long.resize(MAX_XATTR, 0);
            match list(&mut long) {
                Ok(n) => &long[..n],
                Err(_) => return,
            }
        }
        Err(_) => return,
    };
    let mut value = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        // Others make no sense in another layer: an overlay's own marks, the labels of a security
        // module.
        if !is_image_xattr(name) {
            continue;
        }
        value.resize(MAX_XATTR, 0);
        if let Ok(n) = get(name, &mut value) {
            let _ = set(name, &value[..n]);
        }
    }
}

/// Opens a regular file for reading; `None` if it is something else by now.
pub(super) fn open_regular(
    dir: BorrowedFd<'_>,
    name: &OsStr,
) -> rustix::io::Result<Option<(OwnedFd, Stat)>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(file.as_fd())?;
    Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some((file, stat)))
}
