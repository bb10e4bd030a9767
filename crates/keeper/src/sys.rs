//! The only `unsafe` of this crate: memory that another process sees, file descriptors that were
//! there before this program, and two system calls that rustix does not have.

#![allow(unsafe_code)]

use rustix::{
    fd::{AsFd, FromRawFd, OwnedFd},
    fs::fstat,
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, munmap},
};
use std::{io, ptr::NonNull, sync::atomic::AtomicU64};

/// A file as shared words of 64 bits.
pub(crate) struct Words {
    at: NonNull<u8>,
    count: usize,
}

// SAFETY: the memory is reached through atomics only.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps the `count` words that the file begins with. Its last word may be a part of one.
    pub(crate) fn map(file: impl AsFd, count: usize) -> Result<Self, Errno> {
        let needed = (count.saturating_sub(1) as u64).saturating_mul(8);
        if count > 0 && fstat(&file)?.st_size as u64 <= needed {
            return Err(Errno::INVAL);
        }
        // Mappings of nothing do not exist.
        let bytes = count.max(1).checked_mul(8).ok_or(Errno::INVAL)?;
        // SAFETY: a fresh mapping, which nothing in this process refers to. The file has a byte of
        // each word, so a byte of each page; a process that shortened it could only be one of our
        // own.
        let at = unsafe {
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
            mmap(std::ptr::null_mut(), bytes, prot, flags, file, 0)
        }?;
        let at = NonNull::new(at.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { at, count })
    }

    /// The word of this index.
    pub(crate) fn get(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count);
        // SAFETY: inside the mapping, and aligned since mappings begin at a page. The words are
        // reached as atomics only.
        unsafe { AtomicU64::from_ptr(self.at.as_ptr().cast::<u64>().add(index)) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: `map` mapped this much, and what borrows from the mapping is gone.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.count.max(1) * 8) };
    }
}

/// File descriptors that the service manager passed, with their names. To be asked once.
pub(crate) fn inherited() -> io::Result<Vec<(String, OwnedFd)>> {
    let named = sd_notify::listen_fds_with_names()?;
    // SAFETY: the environment says that they were passed to this process (`LISTEN_PID`), and
    // nothing else in this program takes them.
    Ok(named.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}

/// Turns SIGTERM and SIGINT into something to read. For the only thread of a process: those that
/// it makes later have them blocked as well.
pub(crate) fn signals() -> Result<OwnedFd, Errno> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` makes it a set; both calls are told valid sets, and the file
    // descriptor is a new one or an error.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        let failed = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        if failed != 0 {
            return Err(Errno::from_raw_os_error(failed));
        }
        match libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(last_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Has the kernel ask `program` about every further system call of all threads of this process.
pub(crate) fn filter_calls(program: &mut [libc::sock_filter]) -> Result<(), Errno> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::INVAL)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the program has as many instructions as it says; the kernel copies and checks it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &program,
        )
    };
    match done {
        0 => Ok(()),
        -1 => Err(last_error()),
        // The thread that could not be made to follow.
        _ => Err(Errno::SRCH),
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
