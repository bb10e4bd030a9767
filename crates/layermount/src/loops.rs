//! Loop devices: read-only, past the page cache, free when they are no longer open.

use crate::{io_fault, sys};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use shipway_erofs::BLOCK;
use shipway_fault::{Code, Fault, Result};
use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

/// How often another process may take a free number before we do.
const ATTEMPTS: usize = 64;

/// A loop device that stays while this or a mount of it does.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
    device: OwnedFd,
}

fn open(path: &Path) -> Result<OwnedFd, Errno> {
    openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

impl Loop {
    /// A device over the file `backing`. The kernel gives the number: no other way finds one that
    /// is free for sure.
    pub(crate) fn over(backing: &Path) -> Result<Self> {
        let file = open(backing).map_err(|e| io_fault(format!("open {}", backing.display()), e))?;
        let control = Path::new("/dev/loop-control");
        let failed = |error: Errno| {
            io_fault(format!("make a loop device over {}", backing.display()), error)
        };
        let control = open(control).map_err(|e| failed(e).hint("is the module `loop` loaded?"))?;
        for _ in 0..ATTEMPTS {
            let number = sys::loop_free(control.as_fd()).map_err(failed)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path).map_err(failed)?;
            match sys::loop_configure(device.as_fd(), file.as_fd(), BLOCK as u32) {
                Ok(()) => return Ok(Self { path, device }),
                Err(Errno::BUSY) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Err(Fault::new(Code::ResourceExhausted, "every free loop device was taken by others"))
    }

    /// Whether the page cache is passed over.
    pub(crate) fn is_direct(&self) -> bool {
        sys::loop_info(self.device.as_fd()).is_ok_and(|i| i.flags & sys::LO_FLAGS_DIRECT_IO != 0)
    }

    /// The devices that are over the file `backing`.
    pub(crate) fn all_over(backing: &Path) -> Result<Vec<Self>> {
        let wanted = std::fs::metadata(backing)
            .map_err(|e| io_fault(format!("stat {}", backing.display()), e))?;
        let entries =
            std::fs::read_dir("/sys/block").map_err(|e| io_fault("read /sys/block", e))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| io_fault("read /sys/block", e))?;
            // Only loop devices that are in use have this file. Those of others are not opened:
            // they would not become free as long as that lasts.
            let Ok(file) = std::fs::read(entry.path().join("loop/backing_file")) else { continue };
            if file.strip_suffix(b"\n") != Some(backing.as_os_str().as_bytes()) {
                continue;
            }
            let path = Path::new("/dev").join(entry.file_name());
            // Whatever goes away meanwhile is not over the file.
            let Ok(device) = open(&path) else { continue };
            let Ok(info) = sys::loop_info(device.as_fd()) else { continue };
            if (info.device, info.inode) == (encoded(wanted.dev()), wanted.ino()) {
                found.push(Self { path, device });
            }
        }
        Ok(found)
    }

    /// Puts the file `backing`, of the same size, in the place of the one that is there. Reads that
    /// have begun end first.
    pub(crate) fn change(&self, backing: &Path) -> Result<()> {
        let failed = |e: Errno| {
            io_fault(format!("put {} under {}", backing.display(), self.path.display()), e)
        };
        let file = open(backing).map_err(failed)?;
        sys::loop_change(self.device.as_fd(), file.as_fd()).map_err(failed)
    }
}

/// A device number as `LOOP_GET_STATUS64` gives it (the kernel's `huge_encode_dev`, which for
/// numbers of today is `new_encode_dev`).
fn encoded(device: u64) -> u64 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    u64::from((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}
