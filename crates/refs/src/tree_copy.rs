//! Copies a layer's files under another stack (rows `op.merge`, `op.diff`): whiteouts as the
//! overlay has them, and files that share their blocks where the file system has that. They are
//! never other names of the layer's files: a count of links shows programs how many names a file
//! has in what they see.

use crate::contents::copy_contents;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use shipway_archive::{EntryKind, LayerEntry, LayerTree};
use shipway_fault::{Fault, Result};
use std::{
    ffi::OsStr,
    fs, io,
    os::fd::AsFd,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
};

/// Where the files go.
pub(crate) enum CopyTarget {
    /// The upper directory of an overlay; at the bottom of a stack there is nothing to hide.
    Layer { dir: PathBuf, bottom: bool },
    /// A whole tree, in which removing is removing.
    Merged(PathBuf),
}

/// Copies every entry of `tree`, as unpacking its tar would; false if that is not what it would do.
pub(crate) fn copy(tree: &LayerTree, target: &CopyTarget) -> Result<bool> {
    let root = match target {
        CopyTarget::Layer { dir, .. } | CopyTarget::Merged(dir) => dir,
    };
    // Directories get their times when all is in them.
    let mut times = Vec::new();
    let mut plain = true;
    tree.walk(|entry| {
        let name = entry.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        plain &= entry.kind == EntryKind::Whiteout || !name.starts_with(b".wh.");
        // What unpacks layers leaves the root as it is.
        if !plain || entry.path.is_empty() {
            return Ok(());
        }
        let (from, to) = (tree.locate(&entry), root.join(OsStr::from_bytes(&entry.path)));
        one(&entry, &from, &to, root, target)
            .map_err(|e| Fault::io(format!("copy {} into a layer", from.display()), e))?;
        if entry.kind == EntryKind::Directory {
            times.push((entry.mtime, to));
        }
        Ok(())
    })?;
    for (mtime, to) in times.iter().rev() {
        set_time(*mtime, to)
            .map_err(|e| Fault::io(format!("set the times of {}", to.display()), e))?;
    }
    Ok(plain)
}

fn one(
    entry: &LayerEntry,
    from: &Path,
    to: &Path,
    root: &Path,
    target: &CopyTarget,
) -> io::Result<()> {
    let merged = matches!(target, CopyTarget::Merged(_));
    match &entry.kind {
        EntryKind::Whiteout => match target {
            CopyTarget::Merged(_) => clear(to),
            CopyTarget::Layer { bottom: true, .. } => Ok(()),
            CopyTarget::Layer { .. } => rustix::fs::mknodat(
                CWD,
                to,
                FileType::CharacterDevice,
                Mode::empty(),
                rustix::fs::makedev(0, 0),
            )
            .map_err(Into::into),
        },
        EntryKind::Directory => {
            match fs::symlink_metadata(to) {
                Ok(meta) if meta.is_dir() => {}
                Ok(_) => {
                    clear(to)?;
                    fs::create_dir(to)?;
                }
                Err(_) => fs::create_dir(to)?,
            }
            attributes(entry, to)
        }
        kind => {
            if merged {
                clear(to)?;
            }
            leaf(entry, kind, from, to, root)
        }
    }
}

fn leaf(
    entry: &LayerEntry,
    kind: &EntryKind,
    from: &Path,
    to: &Path,
    root: &Path,
) -> io::Result<()> {
    match kind {
        EntryKind::HardLink(first) => {
            return fs::hard_link(root.join(OsStr::from_bytes(first)), to);
        }
        EntryKind::Symlink(link) => symlink(OsStr::from_bytes(link), to)?,
        EntryKind::File => {
            let (source, made) = (fs::File::open(from)?, fs::File::create_new(to)?);
            copy_contents(source.as_fd(), made.as_fd(), &rustix::fs::fstat(&source)?, &|| true)?;
        }
        EntryKind::CharDevice(major, minor) => {
            rustix::fs::mknodat(
                CWD,
                to,
                FileType::CharacterDevice,
                Mode::empty(),
                rustix::fs::makedev(*major, *minor),
            )?;
        }
        EntryKind::BlockDevice(major, minor) => {
            rustix::fs::mknodat(
                CWD,
                to,
                FileType::BlockDevice,
                Mode::empty(),
                rustix::fs::makedev(*major, *minor),
            )?;
        }
        _ => rustix::fs::mknodat(CWD, to, FileType::Fifo, Mode::empty(), 0)?,
    }
    attributes(entry, to)?;
    set_time(entry.mtime, to)
}

fn attributes(entry: &LayerEntry, to: &Path) -> io::Result<()> {
    lchown(to, Some(entry.uid), Some(entry.gid))?;
    if !matches!(entry.kind, EntryKind::Symlink(_)) {
        fs::set_permissions(to, fs::Permissions::from_mode(entry.mode))?;
    }
    for (name, value) in &entry.xattrs {
        rustix::fs::lsetxattr(to, &name[..], value, XattrFlags::empty())?;
    }
    Ok(())
}

fn set_time(mtime: i64, to: &Path) -> io::Result<()> {
    let time = Timespec { tv_sec: mtime, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(Into::into)
}

fn clear(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}
