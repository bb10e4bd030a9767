//! System calls that no safe crate has. The only module with `unsafe`.
//!
//! Numbers and structures are those of the kernel's `include/uapi/linux/{loop,mount,fs,fcntl}.h`.

#![allow(unsafe_code)]

use rustix::io::Errno;
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

const LOOP_CTL_GET_FREE: u64 = 0x4c82;
const LOOP_CONFIGURE: u64 = 0x4c0a;
const LOOP_CHANGE_FD: u64 = 0x4c06;
const LOOP_GET_STATUS64: u64 = 0x4c05;
/// `_IOR(0x15, 0, struct fsuuid2)`, of 17 bytes.
const FS_IOC_GETFSUUID: u64 = 2 << 30 | 17 << 16 | 0x15 << 8;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
pub const LO_FLAGS_DIRECT_IO: u32 = 16;

const F_SETLEASE: i32 = 1024;
const F_SETSIG: i32 = 10;
const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_NOEXEC: u64 = 8;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LoopInfo {
    /// Device and inode of the backing file.
    pub device: u64,
    pub inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    pub flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const NONE: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// What a call of libc's returned.
fn done(returned: i64) -> Result<i64, Errno> {
    match returned {
        -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        n => Ok(n),
    }
}

fn raw(fd: BorrowedFd<'_>) -> i32 {
    fd.as_raw_fd()
}

/// Number of a loop device that is free at the moment.
pub fn loop_free(control: BorrowedFd<'_>) -> Result<u32, Errno> {
    // SAFETY: an ioctl without an argument.
    let number = done(unsafe { libc::ioctl(raw(control), LOOP_CTL_GET_FREE as _) }.into())?;
    u32::try_from(number).map_err(|_| Errno::RANGE)
}

/// Makes `device` a read-only device over `backing`, with blocks of `block_size` bytes, past the
/// page cache where the file can do it, that frees itself when it is no longer open.
pub fn loop_configure(
    device: BorrowedFd<'_>,
    backing: BorrowedFd<'_>,
    block_size: u32,
) -> Result<(), Errno> {
    let config = LoopConfig {
        fd: raw(backing) as u32,
        block_size,
        info: LoopInfo {
            flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            ..LoopInfo::NONE
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one `struct loop_config`, which this is.
    done(unsafe { libc::ioctl(raw(device), LOOP_CONFIGURE as _, &raw const config) }.into())
        .map(drop)
}

/// Puts `backing` under a read-only loop device in the place of a file of the same size.
pub fn loop_change(device: BorrowedFd<'_>, backing: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the argument is a number.
    done(unsafe { libc::ioctl(raw(device), LOOP_CHANGE_FD as _, raw(backing)) }.into()).map(drop)
}

/// What is under a loop device.
pub fn loop_info(device: BorrowedFd<'_>) -> Result<LoopInfo, Errno> {
    let mut info = LoopInfo::NONE;
    // SAFETY: the kernel writes one `struct loop_info64`, which this is.
    done(unsafe { libc::ioctl(raw(device), LOOP_GET_STATUS64 as _, &raw mut info) }.into())?;
    Ok(info)
}

/// The UUID of a mounted file system; since Linux 6.9.
pub fn uuid(root: BorrowedFd<'_>) -> Result<[u8; 16], Errno> {
    let mut reply = [0u8; 17];
    // SAFETY: the kernel writes a `struct fsuuid2`: a length and 16 bytes.
    done(unsafe { libc::ioctl(raw(root), FS_IOC_GETFSUUID as _, reply.as_mut_ptr()) }.into())?;
    match reply {
        [16, uuid @ ..] => Ok(uuid),
        _ => Err(Errno::NOTTY),
    }
}

/// Whether `file` could be had for itself alone, by taking a write lease and giving it back:
/// `false` if another description of the same file is open anywhere, mounts and loop devices
/// included.
pub fn is_alone(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // A process that opens the file while the lease is there makes the kernel signal its holder,
    // and the signal that it takes by default kills; this one is ignored. SAFETY: the arguments are
    // numbers, here and below.
    done(unsafe { libc::fcntl(raw(file), F_SETSIG, libc::SIGURG) }.into())?;
    match done(unsafe { libc::fcntl(raw(file), F_SETLEASE, libc::F_WRLCK) }.into()) {
        Ok(_) => {}
        Err(Errno::AGAIN) => return Ok(false),
        Err(error) => return Err(error),
    }
    done(unsafe { libc::fcntl(raw(file), F_SETLEASE, libc::F_UNLCK) }.into()).map(|_| true)
}

/// `struct mount_attr`.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    namespace: u64,
}

fn set_attributes(tree: BorrowedFd<'_>, attributes: &MountAttributes) -> Result<(), Errno> {
    // SAFETY: a C string, and a structure of the size that is passed.
    done(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            raw(tree),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// Gives the detached mount `tree` the ids of the user namespace `namespace`.
pub fn map_ids(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> Result<(), Errno> {
    let namespace = raw(namespace) as u64;
    let set = MOUNT_ATTR_IDMAP;
    set_attributes(tree, &MountAttributes { set, clear: 0, propagation: 0, namespace })
}

/// Makes the detached mount `tree` what mounts of images are: read-only and nothing else.
pub fn set_image_attributes(tree: BorrowedFd<'_>) -> Result<(), Errno> {
    let clear = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    let set = MOUNT_ATTR_RDONLY;
    set_attributes(tree, &MountAttributes { set, clear, propagation: 0, namespace: 0 })
}

/// Gives this thread a mount namespace of its own.
pub fn own_mounts() -> Result<(), Errno> {
    // SAFETY: the table of open files stays shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
}

/// A process in a new user namespace that does nothing, until this is dropped.
pub struct Sleeper {
    pub pid: rustix::process::Pid,
}

impl Sleeper {
    pub fn start() -> Result<Self, Errno> {
        // SAFETY: like fork, with no stack of its own. The child is a copy of a process that may
        // have other threads, so it makes nothing but system calls that need no memory and no lock.
        let pid = done(unsafe {
            libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0)
        })?;
        if pid == 0 {
            // SAFETY: numbers only. It ends with the thread that made it.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                loop {
                    libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
                }
            }
        }
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        Ok(Self { pid: pid.ok_or(Errno::SRCH)? })
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Nothing else waits for it, so the number is still its own.
        let _ = rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.pid), rustix::process::WaitOptions::empty());
    }
}
