//! Whether anybody else has a file open.

use crate::{Error, Result};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// Which signal tells of a lease that somebody waits for (`asm-generic/fcntl.h`).
const F_SETSIG: libc::c_int = 10;

/// A write lease on a file: as long as it lives nobody else has the file open, and who opens it
/// waits for the lease's end. A mount that reads the file counts, and so does one that is detached.
/// Copies of the same open file, such as one that was sent to another process, are not others.
pub(crate) struct Lease(OwnedFd);

/// Sets a file's lease, or who is told of one. rustix has no call for either.
#[allow(unsafe_code)]
fn control(fd: i32, command: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both commands take a number and touch no memory of this process.
    match unsafe { libc::fcntl(fd, command, value) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Lease {
    /// The lease; `None` if somebody else has the file open.
    pub fn take(file: &File) -> Result<Option<Self>> {
        let fd = file.try_clone().map_err(|e| Error::io("copy a file descriptor", e))?;
        // Who opens the file has a signal sent to us, by default one that ends the process. This
        // one is ignored by default.
        control(fd.as_raw_fd(), F_SETSIG, libc::SIGURG)
            .map_err(|e| Error::io("choose the signal of a lease", e))?;
        match control(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) {
            Ok(()) => Ok(Some(Self(fd.into()))),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
            Err(e) => Err(Error::io("take a lease", e)),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // It is of the open file, which lives on. There is nothing to do if this fails.
        _ = control(self.0.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt as _;

    /// Also after somebody wanted to open the file, for which the kernel sends us a signal.
    #[test]
    fn nobody_opens_the_file_while_it_is_leased() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let open = || File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.expect("a file");
        let other = open().expect("the file");
        assert!(Lease::take(&file).expect("an answer").is_none());
        drop(other);
        let copy = file.try_clone().expect("a copy");
        let lease = Lease::take(&file).expect("an answer").expect("a lease");
        let refused = open().expect_err("the lease");
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(lease);
        assert!(open().is_ok());
        assert!(Lease::take(&copy).expect("an answer").is_some());
    }
}
