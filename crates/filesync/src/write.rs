//! Writing received files: a few threads, each with its share of the files and its own directory
//! handles.

use parking_lot::Mutex;
use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_gocompat::FileMode;
use tokio::sync::mpsc;

use crate::{
    ContentHash, HashSink, Stat,
    disk::{self, Dirs},
    path::split,
};

/// Content of files, as it comes: id and bytes, empty at a file's end.
pub(crate) type Batch = Vec<(u32, Bytes)>;

/// Files that may be open in one thread; senders read four at a time.
const MAX_OPEN: usize = 256;

/// A file that was asked for.
pub(crate) struct Pending {
    /// Index of its entry in the new tree.
    pub(crate) entry: usize,
    /// Index of its change.
    pub(crate) change: usize,
    pub(crate) stat: Stat,
}

/// A file that is done.
pub(crate) struct Finished {
    pub(crate) entry: usize,
    pub(crate) change: usize,
    /// Whether it has the size that was announced.
    pub(crate) whole: bool,
    pub(crate) digest: Option<[u8; 32]>,
}

/// The files one thread is to receive.
pub(crate) type Expected = Arc<Mutex<HashMap<u32, Pending>>>;

/// One writing thread.
pub(crate) struct FileWriter {
    dirs: Dirs,
    expected: Expected,
    hash: Option<Arc<dyn ContentHash>>,
    open: HashMap<u32, Open>,
    finished: Vec<Finished>,
}

struct Open {
    file: OwnedFd,
    pending: Pending,
    left: usize,
    sink: Option<Box<dyn HashSink>>,
}

impl FileWriter {
    pub(crate) fn new(
        root: OwnedFd,
        expected: Expected,
        hash: Option<Arc<dyn ContentHash>>,
    ) -> Self {
        Self { dirs: Dirs::new(root), expected, hash, open: HashMap::new(), finished: Vec::new() }
    }

    /// Writes until the batches end.
    pub(crate) fn run(mut self, mut batches: mpsc::Receiver<Batch>) -> Result<Vec<Finished>> {
        while let Some(batch) = batches.blocking_recv() {
            for (id, data) in batch {
                self.take(id, &data)?;
            }
        }
        Ok(self.finished)
    }

    fn take(&mut self, id: u32, data: &[u8]) -> Result<()> {
        let mut open = match self.open.remove(&id) {
            Some(open) => open,
            None => self.start(id)?,
        };
        let failed = |path: &str, e| Fault::io(format!("write {path}"), e);
        if data.is_empty() {
            set_metadata(&open.file, &open.pending.stat)
                .map_err(|e| failed(&open.pending.stat.path, e))?;
            self.finished.push(Finished {
                entry: open.pending.entry,
                change: open.pending.change,
                whole: open.left == 0,
                digest: open.sink.map(HashSink::finish),
            });
            return Ok(());
        }
        // What a file has grown by since it was described is not part of it.
        let mut rest = &data[..data.len().min(open.left)];
        open.left -= rest.len();
        if let Some(sink) = &mut open.sink {
            sink.update(rest);
        }
        while !rest.is_empty() {
            match rustix::io::write(&open.file, rest) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(e) => return Err(failed(&open.pending.stat.path, e.into())),
            }
        }
        self.open.insert(id, open);
        Ok(())
    }

    fn start(&mut self, id: u32) -> Result<Open> {
        let pending = self.expected.lock().remove(&id);
        let pending =
            pending.ok_or_else(|| Fault::invalid(format!("invalid file request {id}")))?;
        if self.open.len() >= MAX_OPEN {
            return Err(Fault::invalid("the sender mixes the content of too many files"));
        }
        let sink = hash_for(self.hash.as_ref(), &pending.stat).map(|h| h.start(&pending.stat));
        let file = create(&mut self.dirs, &pending.stat.path)?;
        Ok(Open { file, left: pending.stat.size.try_into().unwrap_or(0), pending, sink })
    }
}

/// What hashes the file on the way, if it is hashed.
pub(crate) fn hash_for<'a>(
    hash: Option<&'a Arc<dyn ContentHash>>,
    stat: &Stat,
) -> Option<&'a Arc<dyn ContentHash>> {
    hash.filter(|_| stat.xattrs.is_empty())
}

/// Creates the file `path`, instead of whatever is there.
pub(crate) fn create(dirs: &mut Dirs, path: &str) -> Result<OwnedFd> {
    let (dir, name) = split(path);
    let make = |dirs: &mut Dirs| -> io::Result<OwnedFd> {
        let at = dirs.get(dir)?;
        replace(at, name, || {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(at, name, flags, Mode::from_raw_mode(0o600))
        })
    };
    make(dirs).map_err(|e| Fault::io(format!("create {path}"), e))
}

/// Makes `name` in `dir` with `make`, which must not replace anything; what is there is removed
/// first.
pub(crate) fn replace<T>(
    dir: impl AsFd,
    name: &str,
    make: impl Fn() -> rustix::io::Result<T>,
) -> io::Result<T> {
    match make() {
        Err(Errno::EXIST) => {
            disk::remove(&dir, name)?;
            Ok(make()?)
        }
        made => Ok(made?),
    }
}

/// Owner, attributes, permissions and time of an open file.
pub(crate) fn set_metadata(file: impl AsFd, stat: &Stat) -> io::Result<()> {
    // In this order, and after the contents: writing and a change of owner clear set-id bits and
    // capabilities.
    rustix::fs::fchown(&file, Some(Uid::from_raw(stat.uid)), Some(Gid::from_raw(stat.gid)))?;
    for (name, value) in &stat.xattrs {
        // Not every filesystem and user can store every attribute; they are best effort, as
        // everywhere in this protocol.
        let _ = rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty());
    }
    rustix::fs::fchmod(&file, Mode::from_raw_mode(FileMode(stat.mode).permissions()))?;
    Ok(rustix::fs::futimens(&file, &times(stat.mod_time))?)
}

/// The time of `name` in `dir`, of a link itself and not of what it leads to.
pub(crate) fn set_time(dir: impl AsFd, name: &str, mtime: i64) -> io::Result<()> {
    Ok(rustix::fs::utimensat(dir, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn times(mtime: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime.div_euclid(1_000_000_000),
        tv_nsec: mtime.rem_euclid(1_000_000_000) as _,
    };
    Timestamps { last_access: time, last_modification: time }
}
