//! Copying of a file's bytes, with as little work as the file systems allow: shared blocks, holes
//! left out, within the kernel.

use rustix::{
    fd::BorrowedFd,
    fs::{SeekFrom, Stat},
    io::Errno,
};
use std::cell::RefCell;

/// Files up to this size are read and written at once.
const SMALL: u64 = 256 << 10;
/// What one call copies, so that a lost interest is noticed.
const CHUNK: u64 = 64 << 20;
thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SMALL as usize]);
}

/// Copies all bytes of `from`, whose state is `stat`, to the new file `to`. `go_on` is asked
/// between pieces.
pub fn copy_contents(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    stat: &Stat,
    go_on: &dyn Fn() -> bool,
) -> rustix::io::Result<()> {
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
fn extent(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    start: u64,
    end: u64,
    go_on: &dyn Fn() -> bool,
) -> rustix::io::Result<()> {
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
            Err(
                Errno::XDEV
                | Errno::NOSYS
                | Errno::OPNOTSUPP
                | Errno::INVAL
                | Errno::PERM
                | Errno::IO
                | Errno::BADF,
            ) => {
                return by_hand(from, to, read, end, go_on);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The same where the kernel cannot do it in one go.
fn by_hand(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    start: u64,
    end: u64,
    go_on: &dyn Fn() -> bool,
) -> rustix::io::Result<()> {
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
