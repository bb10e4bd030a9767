//! What is in a directory that others may change meanwhile, as root: every path is opened below the
//! directory, through no link.

use crate::entry::{Entry, Kind, MAX_ENTRIES, MAX_PATH, MAX_XATTR, MAX_XATTRS, Name, Value};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{Dir, FileType, OFlags, Stat},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_oci::is_image_xattr;
use shipway_rootfs::{open_beneath, open_directory, reopen_regular};
use std::{collections::HashMap, fs::File, path::Path};

/// What was found.
pub(crate) struct Scan {
    root: OwnedFd,
    /// In order of paths. Files have no chunks yet.
    pub entries: Vec<Scanned>,
    /// Devices, sockets, and what cannot be read or is too deep.
    pub left_out: u64,
}

/// An entry as it was found.
pub(crate) struct Scanned {
    pub entry: Entry,
    pub size: u64,
}

fn time(stat: &Stat) -> (i64, u32) {
    (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or_default())
}

fn fault(what: &str, path: &[u8], error: Errno) -> Fault {
    Fault::io(format!("{what} {:?} of a cache mount", String::from_utf8_lossy(path)), error.into())
}

/// The attributes that are kept of what is open.
fn xattrs(fd: impl AsFd) -> Vec<(Name, Value)> {
    let mut names = vec![0; MAX_XATTR];
    let Ok(length) = rustix::fs::flistxattr(&fd, &mut names[..]) else { return Vec::new() };
    let mut value = vec![0; MAX_XATTR];
    let names = names[..length].split(|b| *b == 0).filter(|name| is_image_xattr(name));
    names
        .filter_map(|name| {
            let length = rustix::fs::fgetxattr(&fd, name, &mut value[..]).ok()?;
            Some((Name(name.to_vec()), Value(value[..length].to_vec())))
        })
        .take(MAX_XATTRS)
        .collect()
}

impl Scan {
    /// Lists `dir`. Files are not opened for it; their attributes come with [`Scan::open`].
    pub fn of(dir: &Path, stop: &dyn Fn() -> bool) -> Result<Self> {
        let root = open_directory(dir)
            .map_err(|e| Fault::io(format!("open {}", dir.display()), e.into()))?;
        let mut scan = Self { root, entries: Vec::new(), left_out: 0 };
        let mut links: HashMap<(u64, u64), Vec<Vec<u8>>> = HashMap::new();
        let mut queue: Vec<Vec<u8>> = vec![Vec::new()];
        while let Some(path) = queue.pop() {
            if stop() {
                return Err(Fault::cancelled());
            }
            match scan.directory(&path, &mut queue, &mut links) {
                Ok(()) => {}
                Err(e) if path.is_empty() => return Err(fault("list", &path, e)),
                // It went away, or became something else.
                Err(_) => scan.left_out += 1,
            }
        }
        scan.entries.sort_by(|a, b| a.entry.path.cmp(&b.entry.path));
        scan.link(links);
        Ok(scan)
    }

    /// Adds the directory `path` and what is in it but directories, which come into `queue`.
    fn directory(
        &mut self,
        path: &[u8],
        queue: &mut Vec<Vec<u8>>,
        links: &mut HashMap<(u64, u64), Vec<Vec<u8>>>,
    ) -> Result<(), Errno> {
        let at: &[u8] = if path.is_empty() { b"." } else { path };
        let fd = open_beneath(&self.root, at, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let stat = rustix::fs::fstat(&fd)?;
        self.add(path.to_vec(), Kind::Dir, &stat, xattrs(&fd), None);
        for found in Dir::read_from(&fd)? {
            let found = found?;
            let name = found.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let mut child = path.to_vec();
            if !child.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(name);
            if child.len() > MAX_PATH || self.entries.len() + queue.len() >= MAX_ENTRIES {
                self.left_out += 1;
                continue;
            }
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            let Ok(stat) = rustix::fs::statat(&fd, found.file_name(), flags) else { continue };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => queue.push(child),
                FileType::RegularFile => {
                    if stat.st_nlink > 1 {
                        let inode = (stat.st_dev, stat.st_ino);
                        links.entry(inode).or_default().push(child.clone());
                    }
                    self.add(child, Kind::File, &stat, Vec::new(), None);
                }
                FileType::Symlink => match rustix::fs::readlinkat(&fd, found.file_name(), []) {
                    Ok(target) => {
                        let target = Some(Name(target.into_bytes()));
                        self.add(child, Kind::Symlink, &stat, Vec::new(), target);
                    }
                    Err(_) => self.left_out += 1,
                },
                _ => self.left_out += 1,
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        path: Vec<u8>,
        kind: Kind,
        stat: &Stat,
        xattrs: Vec<(Name, Value)>,
        target: Option<Name>,
    ) {
        let entry = Entry {
            path: Name(path),
            kind,
            mode: if kind == Kind::Symlink { 0 } else { stat.st_mode & 0o7777 },
            uid: stat.st_uid,
            gid: stat.st_gid,
            time: time(stat),
            xattrs,
            target,
            chunks: Vec::new(),
        };
        let size = if kind == Kind::File { stat.st_size.max(0) as u64 } else { 0 };
        self.entries.push(Scanned { entry, size });
    }

    /// Makes links of further names of a file.
    fn link(&mut self, links: HashMap<(u64, u64), Vec<Vec<u8>>>) {
        let mut first_names: HashMap<Vec<u8>, Name> = HashMap::new();
        for mut names in links.into_values().filter(|names| names.len() > 1) {
            names.sort();
            let first = Name(names.swap_remove(0));
            first_names.extend(names.into_iter().map(|name| (name, first.clone())));
        }
        for scanned in &mut self.entries {
            if let Some(first) = first_names.remove(&scanned.entry.path.0) {
                scanned.entry.kind = Kind::Link;
                scanned.entry.target = Some(first);
                scanned.size = 0;
            }
        }
    }

    /// A regular file, if it is there still, and its entry with all attributes as they are now.
    pub fn open(&self, entry: &Entry) -> Option<(File, Entry, u64)> {
        let fd = open_beneath(&self.root, &entry.path.0, OFlags::PATH | OFlags::NOFOLLOW).ok()?;
        let file = reopen_regular(fd.as_fd()).ok()??;
        let stat = rustix::fs::fstat(&file).ok()?;
        let entry = Entry {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            time: time(&stat),
            xattrs: xattrs(&file),
            ..entry.clone()
        };
        Some((file, entry, stat.st_size.max(0) as u64))
    }
}
