//! Mounting, swapping, unmounting.

use crate::{Source, io_fault, loops::Loop, sys};
use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
        open_tree,
    },
};
use shipway_fault::{Code, Fault, Result};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// Longest path of an image or a device: the kernel takes parameters of 256 bytes, zero included.
pub const MAX_PATH: usize = 255;
/// Most mounts that are taken away from one path.
const MOST_STACKED: usize = 16;

/// A mount that is nowhere yet, and the loop devices that live as long as it.
pub(crate) struct Detached {
    pub(crate) mount: OwnedFd,
    pub(crate) loops: Vec<Loop>,
}

impl Detached {
    pub(crate) fn new(source: &Source) -> Result<Self> {
        let (mount, loops) = match source {
            Source::Files { meta, data } => {
                (erofs(meta, Some(data), !is_served(data))?, Vec::new())
            }
            Source::File(image) => (erofs(image, None, false)?, Vec::new()),
            Source::Loops { meta, data } => {
                let (meta, data) = (Loop::over(meta)?, Loop::over(data)?);
                (erofs(&meta.path, Some(&data.path), false)?, vec![meta, data])
            }
            Source::Loop(image) => {
                let image = Loop::over(image)?;
                (erofs(&image.path, None, false)?, vec![image])
            }
            Source::Tree(directory) => (tree(directory)?, Vec::new()),
        };
        Ok(Self { mount, loops })
    }

    pub(crate) fn attach(&self, at: &Path, beneath: bool) -> Result<()> {
        let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        flags.set(MoveMountFlags::MOVE_MOUNT_BENEATH, beneath);
        move_mount(self.mount.as_fd(), "", CWD, at, flags).map_err(|e| {
            io_fault(
                format!("mount {} {}", if beneath { "beneath" } else { "at" }, at.display()),
                e,
            )
        })
    }
}

/// Whether a FUSE server has `file`. One that does not answer any more is one.
pub(crate) fn is_served(file: &Path) -> bool {
    const FUSE_SUPER_MAGIC: u64 = 0x6573_5546;
    rustix::fs::statfs(file).map_or(true, |found| found.f_type as u64 == FUSE_SUPER_MAGIC)
}

/// A read-only EROFS of `source`, with `device` as its device.
fn erofs(source: &Path, device: Option<&Path>, noatime: bool) -> Result<OwnedFd> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| io_fault("open the file system erofs", e))?;
    let failed = |what: &str, error: Errno| {
        let log = log_of(context.as_fd());
        let mut fault = io_fault(format!("mount {}: {what}", source.display()), error);
        if !log.is_empty() {
            fault = fault.context(format!("the kernel says: {log}"));
        }
        fault
    };
    let set = |key: &str, path: &Path| {
        if path.as_os_str().len() > MAX_PATH {
            let path = path.display();
            return Err(Fault::invalid(format!("mount {path}: longer than {MAX_PATH} bytes"))
                .hint("choose a root directory with a shorter path"));
        }
        fsconfig_set_string(context.as_fd(), key, path).map_err(|e| failed(key, e))
    };
    set("source", source)?;
    if let Some(device) = device {
        set("device", device)?;
    }
    fsconfig_set_flag(context.as_fd(), "ro").map_err(|e| failed("ro", e))?;
    fsconfig_create(context.as_fd()).map_err(|e| failed("create", e))?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOATIME, noatime);
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|e| failed("fsmount", e))
}

/// A clone of the server's mount with `directory` as its root, in which programs and devices are
/// what they are in images.
fn tree(directory: &Path) -> Result<OwnedFd> {
    let failed = |what: &str, error: Errno| {
        io_fault(format!("clone the mount at {}: {what}", directory.display()), error)
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, directory, flags).map_err(|e| failed("open_tree", e))?;
    sys::set_image_attributes(tree.as_fd()).map_err(|e| failed("mount_setattr", e))?;
    Ok(tree)
}

/// Number of the device of the file system at `path`, as mountinfo shows it. Its server is not
/// asked.
pub(crate) fn device_of(path: &Path) -> Result<String, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let found = statx(CWD, path, flags, StatxFlags::empty())?;
    Ok(format!("{}:{}", found.stx_dev_major, found.stx_dev_minor))
}

/// What the kernel has to say about a mount that failed: messages like `e erofs: …`.
fn log_of(context: BorrowedFd<'_>) -> String {
    let mut log = Vec::new();
    let mut message = [0; 512];
    while log.len() < 4096 {
        match rustix::io::read(context, &mut message) {
            Ok(n) if n > 0 => log.extend_from_slice(&message[..n]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&log).trim().replace('\n', "; ")
}

/// Whether something is mounted at `path`, a directory.
pub fn is_mount_point(path: &Path) -> Result<bool> {
    let found =
        statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::empty())
            .map_err(|e| io_fault(format!("stat {}", path.display()), e))?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Mounts `source` at the directory `at`, where nothing is mounted.
pub fn mount(source: &Source, at: &Path) -> Result<()> {
    if is_mount_point(at)? {
        return Err(Fault::new(
            Code::AlreadyExists,
            format!("something is mounted at {} already", at.display()),
        ));
    }
    Detached::new(source)?.attach(at, false)
}

/// Makes what is mounted at `at` and reads `from` read `to`, which has the same contents. The path
/// is never empty.
///
/// Loop devices get another file: all that read them, running containers included, are moved.
/// Otherwise a new mount takes the place of the old one, which stays for its present users;
/// this needs Linux 6.5. A kill in between leaves two mounts, see [`Mounted`](crate::Mounted).
pub fn swap(at: &Path, from: &Source, to: &Source) -> Result<()> {
    match (from, to) {
        (Source::Loops { meta, data: old }, Source::Loops { meta: same, data: new })
            if meta == same =>
        {
            change(old, new)
        }
        (Source::Loop(old), Source::Loop(new)) => change(old, new),
        _ => {
            Detached::new(to)?.attach(at, true)?;
            // The new one is below the old, so this is the old one.
            detach(at)
        }
    }
}

fn change(old: &Path, new: &Path) -> Result<()> {
    let devices = Loop::all_over(old)?;
    if devices.is_empty() {
        return Err(Fault::not_found(format!("no loop device is over {}", old.display())));
    }
    devices.iter().try_for_each(|device| device.change(new))
}

pub(crate) fn detach(at: &Path) -> Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(at, flags).map_err(|e| io_fault(format!("detach {}", at.display()), e))
}

/// What became of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// There was none.
    Nothing,
    /// Gone.
    Gone,
    /// Gone from the path, but files of it are still open: files and devices are free when
    /// that ends.
    InUse,
}

/// Unmounts everything at `at`.
pub fn unmount(at: &Path) -> Result<Unmounted> {
    let mut outcome = Unmounted::Nothing;
    for _ in 0..MOST_STACKED {
        match rustix::mount::unmount(at, UnmountFlags::NOFOLLOW) {
            Ok(()) if outcome == Unmounted::Nothing => outcome = Unmounted::Gone,
            Ok(()) => {}
            // No mount point, or no such directory.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(outcome),
            Err(Errno::BUSY) => {
                detach(at)?;
                outcome = Unmounted::InUse;
            }
            Err(error) => return Err(io_fault(format!("unmount {}", at.display()), error)),
        }
    }
    Err(Fault::internal(format!("more than {MOST_STACKED} mounts at {}", at.display())))
}

/// Whether a file is open elsewhere than through the description of `file`, which has to be open
/// for writing or for reading only; mounts count, detached ones and those that are only in overlays
/// too.
///
/// Descriptors that were duplicated, inherited or sent to another process share one description, so
/// the caller must have the same one as the server of the file. A file whose file system has no
/// leases counts as used. The file's owner or root may ask.
pub fn is_used(file: BorrowedFd<'_>) -> Result<bool> {
    match sys::is_alone(file) {
        Ok(alone) => Ok(!alone),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(true),
        Err(error) => Err(io_fault("ask for a lease on a file", error)),
    }
}
