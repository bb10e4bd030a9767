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
