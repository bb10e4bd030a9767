//! Copying of one file's bytes and attributes, with as little work as the file systems allow.

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, SeekFrom, Stat, XattrFlags},
    io::Errno,
};
use std::{cell::RefCell, ffi::OsStr, os::fd::AsRawFd, path::Path};

/// Files up to this size are read and written at once.
const SMALL: u64 = 256 << 10;
/// What one call copies, so that a lost interest is noticed.
const CHUNK: u64 = 64 << 20;
/// The longest value of an extended attribute, and the longest list of their names, that Linux has.
const MAX_XATTR: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SMALL as usize]);
}

/// Copies all bytes of `from`, whose state is `stat`, to the new file `to`. `go_on` is asked between pieces.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat, go_on: &dyn Fn() -> bool) -> rustix::io::Result<()> {
    let size = u64::try_from(stat.st_size).unwrap_or_default();
    if size == 0 {
        return Ok(());
    }
    if size <= SMALL {
        return through_buffer(from, to, size);
    }
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let allocated = u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512);
    if allocated >= size {
        return extent(from, to, 0, size, go_on);
    }
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(_) => return extent(from, to, 0, size, go_on),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data)).unwrap_or(size);
        extent(from, to, data, hole.min(size), go_on)?;
        at = hole;
    }
    rustix::fs::ftruncate(to, size)
}

/// Copies the bytes from `start` to `end`.
fn extent(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64, go_on: &dyn Fn() -> bool) -> rustix::io::Result<()> {
    let (mut read, mut written) = (start, start);
    while read < end {
        if !go_on() {
            return Err(Errno::CANCELED);
        }
        let want = (end - read).min(CHUNK) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), want) {
            // The file became shorter.
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM | Errno::IO | Errno::BADF) => {
                return by_hand(from, to, read, end, go_on);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The same where the kernel cannot do it in one go.
fn by_hand(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64, go_on: &dyn Fn() -> bool) -> rustix::io::Result<()> {
    rustix::fs::seek(to, SeekFrom::Start(start))?;
    let mut read = start;
    while read < end {
        if !go_on() {
            return Err(Errno::CANCELED);
        }
        let want = (end - read).min(CHUNK) as usize;
        match rustix::fs::sendfile(to, from, Some(&mut read), want) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::seek(from, SeekFrom::Start(read))?;
                return through_buffer(from, to, end - read);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Copies `size` bytes from where the files are, or fewer if there are no more.
fn through_buffer(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> rustix::io::Result<()> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut left = size;
        while left > 0 {
            let want = left.min(SMALL) as usize;
            let n = rustix::io::retry_on_intr(|| rustix::io::read(from, &mut buffer[..want]))?;
            if n == 0 {
                return Ok(());
            }
            left -= n as u64;
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                let n = rustix::io::retry_on_intr(|| rustix::io::write(to, rest))?;
                rest = &rest[n..];
            }
        }
        Ok(())
    })
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
    let path = |(dir, name): (BorrowedFd<'_>, &OsStr)| Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
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
        // An overlay's own marks would make no sense in another layer, and a security module labels for itself.
        if name.starts_with(b"trusted.overlay.") || name == b"security.selinux" {
            continue;
        }
        value.resize(MAX_XATTR, 0);
        if let Ok(n) = get(name, &mut value) {
            let _ = set(name, &value[..n]);
        }
    }
}

/// Opens a regular file for reading; `None` if it is something else by now.
pub(super) fn open_regular(dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<Option<(OwnedFd, Stat)>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(file.as_fd())?;
    Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some((file, stat)))
}
