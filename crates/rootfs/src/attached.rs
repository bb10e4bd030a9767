//! Mounts at paths of the host, for containers, which need a path.

use crate::{Access, RootView, view::Viewer};
use rustix::{
    fd::AsFd,
    fs::{CWD, FileType, Mode, OFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags},
};
use shipway_fault::{Fault, Result};
use shipway_storage::Mount;
use std::path::{Path, PathBuf};

/// A mount at a directory or file of ours in the host, for containers, which need a path. Dropping
/// it unmounts.
#[derive(Debug)]
pub struct Attached {
    path: PathBuf,
}

impl Attached {
    /// Makes `path` within the filesystem of `mounts` appear at `at`, which is created as a
    /// directory or a file accordingly.
    ///
    /// What appears is exactly the file that the path named now: writers in the filesystem cannot
    /// exchange it for a link.
    pub fn new(mounts: &[Mount], access: Access, path: &str, at: &Path) -> Result<Self> {
        let fail = |e: Errno| {
            Fault::io(format!("mount {path:?} of a snapshot at {}", at.display()), e.into())
        };
        let make = |dir: &Path| {
            std::fs::create_dir_all(dir)
                .map_err(|e| Fault::io(format!("create {}", dir.display()), e))
        };
        let view = RootView::open_for(mounts, access, Viewer::Container)?;
        // A detached mount cannot be cloned by older kernels: attach it first.
        let whole = match mounts {
            [Mount::Overlay(_)] if view.is_detached() => {
                let dir = at.with_extension("whole");
                make(&dir)?;
                rustix::mount::move_mount(
                    view.as_fd(),
                    "",
                    CWD,
                    &dir,
                    MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
                )
                .map_err(fail)?;
                Some(Self { path: dir })
            }
            _ => None,
        };
        let part = match &whole {
            Some(w) => RootView::of_directory(&w.path)?
                .open_at(path, OFlags::PATH, Mode::empty())
                .map_err(fail)?,
            None => view.open_at(path, OFlags::PATH, Mode::empty()).map_err(fail)?,
        };
        let is_dir = FileType::from_raw_mode(rustix::fs::fstat(&part).map_err(fail)?.st_mode)
            == FileType::Directory;
        if is_dir {
            make(at)?;
        } else {
            std::fs::File::create(at)
                .map_err(|e| Fault::io(format!("create {}", at.display()), e))?;
        }
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&part, "", flags).map_err(fail)?;
        rustix::mount::move_mount(&tree, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(fail)?;
        drop(whole);
        Ok(Self { path: at.to_owned() })
    }

    /// A new tmpfs at directory `at` that only root may enter.
    pub fn tmpfs(at: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| Fault::io(format!("mount a tmpfs at {}", at.display()), e);
        std::fs::create_dir_all(at).map_err(fail)?;
        let flags = rustix::mount::MountFlags::NOSUID
            | rustix::mount::MountFlags::NODEV
            | rustix::mount::MountFlags::NOEXEC;
        rustix::mount::mount("tmpfs", at, "tmpfs", flags, c"mode=0700")
            .map_err(|e| fail(e.into()))?;
        Ok(Self { path: at.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
        let _ = rustix::mount::unmount(&self.path, flags);
        // Never recursive: what is below would be files of others if unmounting failed.
        let _ = std::fs::remove_dir(&self.path).or_else(|_| match std::fs::metadata(&self.path) {
            Ok(m) if m.is_file() && m.len() == 0 => std::fs::remove_file(&self.path),
            _ => Ok(()),
        });
    }
}
