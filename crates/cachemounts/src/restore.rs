//! From blobs to a directory.

use crate::{
    Archive, Limits,
    archive::blob,
    entry::{Entry, Kind, Tree},
    format::{Blob, PACK},
    pack::unpack,
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use rustix::{
    fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};
use shipway_fault::{Code, Fault, Result};
use shipway_host::Disk;
use shipway_oci::Digest;
use shipway_rootfs::{open_beneath, open_directory};
use std::{
    ffi::OsStr,
    fs::File,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::{Path, PathBuf},
};
use tokio::sync::mpsc;

/// Packs that are fetched at the same time.
const DOWNLOADS: usize = 4;
/// Packs that wait to be written.
const WAITING: usize = 2;

/// What a restore did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Regular files.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// Bytes that were fetched.
    pub fetched: u64,
}

/// Writes what `archive` has of the mount `id` into `dir`, which is empty or has what such mounts
/// begin with; `None` if it has nothing of it. `guard` is what keeps the directory, and is given
/// back. If it fails, or nobody waits for it any more, the directory has a part of it, and `guard`
/// is dropped as soon as nothing is written any more.
pub async fn restore<G: Send + 'static>(
    archive: &Archive,
    id: &str,
    dir: PathBuf,
    guard: G,
    limits: &Limits,
) -> Result<Option<(Restored, G)>> {
    let Some(record) = archive.index.mounts.get(id) else { return Ok(None) };
    if record.bytes > limits.max_size {
        return Err(Fault::new(
            Code::ResourceExhausted,
            format!("it has {} bytes, more than max-size={}", record.bytes, limits.max_size),
        ));
    }
    let tree = archive.tree(record, limits.max_size).await?;
    // The list of packs has nothing to do with what files there are until the latter is read.
    let (files, bytes) = tree.counts();
    let free = Disk::of(&dir)?.free;
    if bytes > free {
        return Err(Fault::new(
            Code::ResourceExhausted,
            format!("it has {bytes} bytes, and {free} are free on the disk"),
        ));
    }
    let mut used = vec![false; record.packs.len()];
    tree.0.iter().flat_map(|e| &e.chunks).for_each(|c| used[c.1 as usize] = true);
    let packs: Vec<(usize, Blob)> =
        record.packs.iter().copied().enumerate().filter(|(n, _)| used[*n]).collect();
    let fetched = packs.iter().map(|(_, pack)| pack.size).sum::<u64>() + record.tree.size;
    let (fetch, arrived) = mpsc::channel(WAITING);
    let count = record.packs.len();
    let known = record.packs.clone();
    let write = shipway_task::blocking("restore a cache mount", move || {
        write(&dir, tree, count, &known, arrived).map(|()| guard)
    });
    let place = archive.place.clone();
    let fetching = async move {
        let mut packs = stream::iter(packs)
            .map(|(number, pack)| {
                let place = &place;
                async move {
                    let bytes = blob(&**place, &pack.descriptor(PACK)).await;
                    bytes.map(|bytes| (number, bytes))
                }
            })
            .buffer_unordered(DOWNLOADS);
        while let Some(pack) = packs.next().await {
            let failed = pack.is_err();
            // A writer that has ended says why.
            if fetch.send(pack).await.is_err() || failed {
                break;
            }
        }
    };
    let (written, ()) = tokio::join!(write, fetching);
    written.map(|guard| Some((Restored { files, bytes, fetched }, guard)))
}

/// A part of a file, and where it is in a pack.
struct Segment {
    entry: usize,
    offset: u64,
    at: usize,
    length: usize,
    digest: Digest,
}

fn fault(what: &str, entry: &Entry, error: Errno) -> Fault {
    Fault::io(format!("{what} {:?} of a cache mount", entry.path.to_string()), error.into())
}

/// Writes `tree` as its packs arrive, in any order.
fn write(
    dir: &Path,
    tree: Tree,
    count: usize,
    packs: &[Blob],
    mut arrived: mpsc::Receiver<Result<(usize, Bytes)>>,
) -> Result<()> {
    let root =
        open_directory(dir).map_err(|e| Fault::io(format!("open {}", dir.display()), e.into()))?;
    let writer = Writer { root, entries: tree.0 };
    let mut segments: Vec<Vec<Segment>> = Vec::new();
    segments.resize_with(count, Vec::new);
    // How many packs a file still waits for.
    let mut waits = vec![0_u32; writer.entries.len()];
    for (number, entry) in writer.entries.iter().enumerate() {
        let mut offset = 0;
        for chunk in &entry.chunks {
            let of_pack = &mut segments[chunk.1 as usize];
            if of_pack.last().is_none_or(|last| last.entry != number) {
                waits[number] += 1;
            }
            of_pack.push(Segment {
                entry: number,
                offset,
                at: chunk.2 as usize,
                length: chunk.3 as usize,
                digest: chunk.0,
            });
            offset += chunk.length();
        }
        writer.make(entry)?;
    }
    let mut left = segments.iter().filter(|s| !s.is_empty()).count();
    while left > 0 {
        let Some(pack) = arrived.blocking_recv() else { return Err(Fault::cancelled()) };
        let (number, bytes) = pack?;
        let bytes = unpack(&packs[number], &bytes)?;
        for part in segments[number].chunk_by(|a, b| a.entry == b.entry) {
            let entry = part[0].entry;
            waits[entry] -= 1;
            writer.fill(&writer.entries[entry], part, &bytes, waits[entry] == 0)?;
        }
        left -= 1;
    }
    writer.finish()
}

struct Writer {
    root: OwnedFd,
    entries: Vec<Entry>,
}

impl Writer {
    /// The directory that an entry is in, and its name there.
    fn parent<'e>(&self, entry: &'e Entry) -> Result<(OwnedFd, &'e OsStr)> {
        let path = &entry.path.0;
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b"."[..], &path[..]),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let dir = open_beneath(&self.root, dir, flags).map_err(|e| fault("write", entry, e))?;
        Ok((dir, OsStr::from_bytes(name)))
    }

    /// Makes a directory, or a file that has no contents yet.
    fn make(&self, entry: &Entry) -> Result<()> {
        let failed = |e| fault("make", entry, e);
        match entry.kind {
            Kind::Dir if entry.path.0.is_empty() => Ok(()),
            Kind::Dir => {
                let (dir, name) = self.parent(entry)?;
                match rustix::fs::mkdirat(&dir, name, Mode::RWXU) {
                    // What a mount begins with. If it is no directory, nothing below it can be
                    // made.
                    Err(Errno::EXIST) => Ok(()),
                    made => made.map_err(failed),
                }
            }
            Kind::File => {
                let (dir, name) = self.parent(entry)?;
                remove(dir.as_fd(), name).map_err(failed)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                let mode = Mode::RUSR | Mode::WUSR;
                let file = rustix::fs::openat(&dir, name, flags | OFlags::CLOEXEC, mode)
                    .map_err(failed)?;
                if entry.chunks.is_empty() { attributes(file.as_fd(), entry) } else { Ok(()) }
            }
            Kind::Link | Kind::Symlink => Ok(()),
        }
    }

    /// Writes parts of a file out of a pack, and its attributes if they are the `last`.
    fn fill(&self, entry: &Entry, parts: &[Segment], pack: &[u8], last: bool) -> Result<()> {
        let failed = |e| fault("write", entry, e);
        let file = File::from(
            open_beneath(&self.root, &entry.path.0, OFlags::WRONLY | OFlags::NOFOLLOW)
                .map_err(failed)?,
        );
        for part in parts {
            // They are inside: the list of files was checked against the lengths of packs.
            let bytes = &pack[part.at..part.at + part.length];
            if Digest::of(bytes) != part.digest {
                return Err(Fault::new(
                    Code::DataLoss,
                    format!("the contents of {:?} are not what was saved", entry.path.to_string()),
                ));
            }
            file.write_all_at(bytes, part.offset)
                .map_err(|e| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        }
        if last { attributes(file.as_fd(), entry) } else { Ok(()) }
    }

    /// Makes links, which nothing is written through any more, and gives directories their
    /// attributes, from below.
    fn finish(&self) -> Result<()> {
        for entry in &self.entries {
            let failed = |e| fault("link", entry, e);
            let (Kind::Link | Kind::Symlink, Some(target)) = (entry.kind, &entry.target) else {
                continue;
            };
            let (dir, name) = self.parent(entry)?;
            remove(dir.as_fd(), name).map_err(failed)?;
            if entry.kind == Kind::Symlink {
                rustix::fs::symlinkat(OsStr::from_bytes(&target.0), &dir, name).map_err(failed)?;
                let (uid, gid, flags) = owner(entry);
                rustix::fs::chownat(&dir, name, uid, gid, flags).map_err(failed)?;
                rustix::fs::utimensat(&dir, name, &times(entry), flags).map_err(failed)?;
                continue;
            }
            let first = open_beneath(&self.root, &target.0, OFlags::PATH | OFlags::NOFOLLOW)
                .map_err(failed)?;
            let first = format!("/proc/self/fd/{}", first.as_raw_fd());
            rustix::fs::linkat(rustix::fs::CWD, first, &dir, name, AtFlags::SYMLINK_FOLLOW)
                .map_err(failed)?;
        }
        for entry in self.entries.iter().rev().filter(|e| e.kind == Kind::Dir) {
            let path: &[u8] = if entry.path.0.is_empty() { b"." } else { &entry.path.0 };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let dir = open_beneath(&self.root, path, flags).map_err(|e| fault("open", entry, e))?;
            attributes(dir.as_fd(), entry)?;
        }
        Ok(())
    }
}

/// Removes what a mount began with, if it is in the way.
fn remove(dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>, AtFlags) {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    (Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec { tv_sec: entry.time.0, tv_nsec: entry.time.1.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Gives a file or directory its owner, then what a change of owner takes away, then its time.
fn attributes(fd: BorrowedFd<'_>, entry: &Entry) -> Result<()> {
    let failed = |e| fault("set the attributes of", entry, e);
    let (uid, gid, _) = owner(entry);
    rustix::fs::fchown(fd, uid, gid).map_err(failed)?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(failed)?;
    for (name, value) in &entry.xattrs {
        // As far as the file system takes them.
        let name = OsStr::from_bytes(&name.0);
        let _ = rustix::fs::fsetxattr(fd, name, &value.0, XattrFlags::empty());
    }
    rustix::fs::futimens(fd, &times(entry)).map_err(failed)
}
