//! Applying entries: everything but the content of files.

use std::{
    collections::{BTreeSet, HashSet},
    io::{self, Write as _},
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
};

use prost::Message as _;
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags},
    io::Errno,
};
use shipway_fault::{Code, Context, Fault, Result};
use shipway_gocompat::{FileKind, FileMode};
use shipway_oci::is_image_xattr;
use tokio::sync::mpsc;

use super::{Change, ChangeKind, Differ, LISTING, ReceiveOptions, Received};
use crate::{
    Budget, KnownEntry, KnownTree, Stat,
    budget::{BudgetShare, ENTRY},
    compare,
    disk::{self, Dirs, chmod_nofollow},
    known::find,
    order::Order,
    path::split,
    walk::IDENTITY,
    write::{self, Expected, Finished, Pending, hash_for, replace, set_time},
};

/// Entries accepted from one sender.
const MAX_ENTRIES: usize = 10_000_000;
/// Bytes of extended attributes of one entry.
const MAX_XATTRS: usize = 1 << 20;
/// What one of them takes besides its name and value.
const XATTR: usize = 64;

pub(super) struct Apply {
    dirs: Dirs,
    options: ReceiveOptions,
    order: Order,
    /// What was there, and how much of it has been compared.
    old: KnownTree,
    position: usize,
    /// Entries below this directory are gone with it; it ends in a slash.
    removed: Option<String>,
    new: Vec<KnownEntry>,
    taken: BudgetShare,
    next_id: u32,
    /// What the sender has, for [`LISTING`].
    listing: Vec<u8>,
    /// The directories that the last entry was in and that nothing was received for yet, outermost
    /// first.
    above: Vec<(u32, Stat)>,
    requested: u64,
    requests: mpsc::UnboundedSender<u32>,
    expected: Vec<Expected>,
    changes: Vec<Change>,
    /// Hard links to make when their targets are there: indices of entries.
    links: Vec<usize>,
    /// Files whose content is replaced, to which unchanged links must be made anew.
    rewritten: HashSet<Arc<str>>,
    /// Directories whose time, and perhaps mode, must be set when everything in them is done.
    touched: BTreeSet<Box<str>>,
}

impl Apply {
    pub(super) fn new(
        dest: &Path,
        mut options: ReceiveOptions,
        expected: Vec<Expected>,
        requests: mpsc::UnboundedSender<u32>,
    ) -> Result<Self> {
        let dirs = Dirs::new(disk::open_root(dest)?);
        let taken = BudgetShare::of(options.budget.clone().unwrap_or_else(Budget::shared));
        let old = match options.known.take() {
            _ if options.merge => KnownTree::default(),
            Some(known) => known,
            None => KnownTree::scan(dest).context(|| "look at the files from the last transfer")?,
        };
        Ok(Self {
            dirs,
            options,
            order: Order::default(),
            old,
            position: 0,
            removed: None,
            new: Vec::new(),
            taken,
            next_id: 0,
            listing: Vec::new(),
            above: Vec::new(),
            requested: 0,
            requests,
            expected,
            changes: Vec::new(),
            links: Vec::new(),
            rewritten: HashSet::new(),
            touched: BTreeSet::new(),
        })
    }

    /// Files asked for.
    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    /// Applies entries until an empty batch ends them, then deletes what was not among them.
    pub(super) fn run(mut self, mut entries: mpsc::Receiver<Vec<Stat>>) -> Result<Self> {
        while let Some(batch) = entries.blocking_recv() {
            if batch.is_empty() {
                self.pass(None)?;
                return Ok(self);
            }
            for stat in batch {
                self.entry(stat)?;
            }
        }
        Err(Fault::cancelled())
    }

    fn entry(&mut self, mut stat: Stat) -> Result<()> {
        self.order.check(&stat)?;
        let refuse = |why: &str| {
            Err(Fault::invalid(format!("refuse {:?} from the sender: {why}", stat.path)))
        };
        if FileMode(stat.mode).kind() == FileKind::CharDevice
            && (stat.devmajor, stat.devminor) == (0, 0)
        {
            return refuse("a character device 0:0 stands for a removed file");
        }
        stat.xattrs.retain(|name, _| name == IDENTITY || is_image_xattr(name));
        let xattrs = stat.xattrs.iter().map(|(k, v)| k.len() + v.len() + XATTR).sum::<usize>();
        if xattrs > MAX_XATTRS {
            return refuse("too many extended attributes");
        }
        let texts = 2 * stat.path.len() + stat.linkname.len();
        let listed = if self.options.listed.is_some() { stat.encoded_len() } else { 0 };
        self.taken.take(ENTRY + texts + xattrs + listed)?;
        if self.next_id as usize >= MAX_ENTRIES {
            return Err(Fault::new(Code::ResourceExhausted, "the sender's tree is too large")
                .hint("exclude what the build does not need in .dockerignore"));
        }
        let id = self.next_id;
        self.next_id += 1;
        let Some(wanted) = self.options.listed.clone() else { return self.take(id, stat) };
        if stat.path == LISTING {
            return Ok(());
        }
        let identity = stat.xattrs.remove(IDENTITY);
        self.listing.extend((stat.encoded_len() as u32).to_le_bytes());
        self.listing.extend(stat.encode_to_vec());
        stat.xattrs.extend(identity.map(|i| (IDENTITY.to_owned(), i)));
        let is_in = |dir: &Stat| {
            stat.path.strip_prefix(&dir.path).is_some_and(|rest| rest.starts_with('/'))
        };
        while self.above.last().is_some_and(|(_, dir)| !is_in(dir)) {
            self.above.pop();
        }
        if wanted.matches(&stat.path) {
            for (id, dir) in std::mem::take(&mut self.above) {
                self.take(id, dir)?;
            }
            return self.take(id, stat);
        }
        if FileMode(stat.mode).is_dir() {
            self.above.push((id, stat));
        }
        Ok(())
    }

    fn take(&mut self, id: u32, mut stat: Stat) -> Result<()> {
        if let Some(map) = &self.options.map {
            map(&mut stat);
        }
        let entry = KnownEntry::of(&stat);
        stat.xattrs.remove(IDENTITY);
        let linked = entry.mode.kind() == FileKind::Regular && !entry.link.is_empty();
        if linked && !find(&self.new, &entry.link).is_some_and(KnownEntry::has_content) {
            return Err(Fault::invalid(format!(
                "invalid link {} to unknown path: {:?}",
                stat.path, stat.linkname
            )));
        }
        let old = self.pass(Some(&entry.path))?;
        let differs_always = self.options.differ == Differ::None && !entry.mode.is_dir();
        let same = !differs_always
            && old.as_ref().is_some_and(|old| old.same(&entry))
            && !(linked && self.rewritten.contains(&*entry.link));
        self.new.push(entry.clone());
        if !same {
            let kind = if old.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
            self.changes.push(Change { path: entry.path.clone(), kind, digest: None });
            self.change(id, stat, &entry, old)
                .map_err(|e| e.context("write the received files"))?;
        }
        Ok(())
    }

    /// Deletes the old entries before `path` (all, if there is none) and gives the one at it.
    fn pass(&mut self, path: Option<&str>) -> Result<Option<KnownEntry>> {
        let old = self.old.entries.clone();
        while let Some(entry) = old.get(self.position) {
            let order = path.map_or(std::cmp::Ordering::Less, |path| compare(&entry.path, path));
            if order.is_gt() {
                break;
            }
            self.position += 1;
            if order.is_eq() {
                return Ok(Some(entry.clone()));
            }
            if self.removed.as_ref().is_some_and(|dir| entry.path.starts_with(dir)) {
                continue;
            }
            self.remove(entry)?;
            self.changes.push(Change {
                path: entry.path.clone(),
                kind: ChangeKind::Deleted,
                digest: None,
            });
        }
        Ok(None)
    }

    fn remove(&mut self, entry: &KnownEntry) -> Result<()> {
        let path = &*entry.path;
        if entry.mode.is_dir() {
            self.dirs.forget(path);
            self.removed = Some(format!("{path}/"));
        }
        self.touch_parent(path);
        let (dir, name) = split(path);
        let gone = self.dirs.get(dir).and_then(|at| disk::remove(at, name));
        gone.map_err(|e| Fault::io(format!("remove {path}"), e))
    }

    fn touch_parent(&mut self, path: &str) {
        let (dir, _) = split(path);
        if !dir.is_empty() && !self.touched.contains(dir) {
            self.touched.insert(dir.into());
        }
    }

    fn change(
        &mut self,
        id: u32,
        stat: Stat,
        entry: &KnownEntry,
        old: Option<KnownEntry>,
    ) -> Result<()> {
        let kind = entry.mode.kind();
        let was_dir = old.as_ref().is_some_and(|o| o.mode.is_dir());
        if let Some(old) = old.filter(|o| o.mode.is_dir() != entry.mode.is_dir()) {
            self.remove(&old)?;
        }
        let failed = |what: &str, e| Fault::io(format!("{what} {}", entry.path), e);
        let (dir, name) = split(&entry.path);
        if !(kind == FileKind::Directory && was_dir) {
            self.touch_parent(&entry.path);
        }
        match kind {
            FileKind::Directory => {
                self.touched.insert((*entry.path).into());
                let at = self.dirs.get(dir).map_err(|e| failed("open the directory of", e))?;
                make_dir(at, name, &stat, was_dir).map_err(|e| failed("create directory", e))
            }
            FileKind::Symlink => {
                let at = self.dirs.get(dir).map_err(|e| failed("open the directory of", e))?;
                let make = || rustix::fs::symlinkat(&stat.linkname, at, name);
                replace(at, name, make)
                    .and_then(|()| own(at, name, &stat))
                    .map_err(|e| failed("create link", e))
            }
            FileKind::Regular if !entry.link.is_empty() => {
                self.links.push(self.new.len() - 1);
                Ok(())
            }
            FileKind::Regular => self.file(id, stat, entry),
            FileKind::Fifo | FileKind::CharDevice | FileKind::BlockDevice | FileKind::Other => {
                let at = self.dirs.get(dir).map_err(|e| failed("open the directory of", e))?;
                make_special(at, name, &stat, kind).map_err(|e| failed("create special file", e))
            }
        }
    }

    fn file(&mut self, id: u32, stat: Stat, entry: &KnownEntry) -> Result<()> {
        self.rewritten.insert(entry.path.clone());
        if stat.size == 0 {
            // Nothing to ask for.
            let file = write::create(&mut self.dirs, &stat.path)?;
            if let (Some(hash), Some(change)) =
                (hash_for(self.options.hash.as_ref(), &stat), self.changes.last_mut())
            {
                change.digest = Some(hash.start(&stat).finish());
            }
            return write::set_metadata(file, &stat)
                .map_err(|e| Fault::io(format!("create {}", stat.path), e));
        }
        let pending = Pending { entry: self.new.len() - 1, change: self.changes.len() - 1, stat };
        let share = &self.expected[(id / super::RUN) as usize % self.expected.len()];
        share.lock().insert(id, pending);
        self.requested += 1;
        // If the sender of requests is gone, the transfer has failed elsewhere.
        let _ = self.requests.send(id);
        Ok(())
    }

    /// What had to wait for the content: hard links, and the directories' own metadata.
    pub(super) fn finish(mut self, finished: Vec<Finished>) -> Result<Received> {
        for file in finished {
            if let Some(change) = self.changes.get_mut(file.change) {
                change.digest = file.digest;
            }
            if let Some(entry) = self.new.get_mut(file.entry).filter(|_| !file.whole) {
                // It changed while it was sent; no time matches this one, so that it is asked for
                // again.
                entry.mtime = i64::MIN;
            }
        }
        for index in std::mem::take(&mut self.links) {
            let (path, link) = (self.new[index].path.clone(), self.new[index].link.clone());
            self.link(&path, &link).map_err(|e| Fault::io(format!("link {path} to {link}"), e))?;
        }
        if self.options.listed.is_some() {
            self.write_listing().map_err(|e| Fault::io(format!("write {LISTING}"), e))?;
        }
        // Children first: a directory's mode may forbid working in it.
        for path in self.touched.iter().rev() {
            let Some(entry) = find(&self.new, path).filter(|e| e.mode.is_dir()) else { continue };
            let (dir, name) = split(path);
            let settle = |at: BorrowedFd<'_>| -> io::Result<()> {
                let mode = entry.mode.permissions();
                if mode & 0o700 != 0o700 {
                    chmod_nofollow(at, name, Mode::from_raw_mode(mode))?;
                }
                set_time(at, name, entry.mtime)
            };
            self.dirs
                .get(dir)
                .and_then(settle)
                .map_err(|e| Fault::io(format!("finish directory {path}"), e))?;
        }
        Ok(Received {
            tree: KnownTree { entries: Arc::new(self.new) },
            changes: self.changes,
            progress: Default::default(),
        })
    }

    /// Always a new file, for the old one may be part of a layer. It is not an entry of the tree:
    /// the sender does not have it.
    fn write_listing(&mut self) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let at = self.dirs.get("")?;
        let file = replace(at, LISTING, || {
            rustix::fs::openat(at, LISTING, flags, Mode::from_raw_mode(0o644))
        })?;
        std::fs::File::from(file).write_all(&self.listing)?;
        self.changes.push(Change {
            path: LISTING.into(),
            kind: ChangeKind::Modified,
            digest: None,
        });
        Ok(())
    }

    fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        let (target_dir, target_name) = split(target);
        let from = self.dirs.get(target_dir)?.try_clone_to_owned()?;
        let (dir, name) = split(path);
        let at = self.dirs.get(dir)?;
        replace(at, name, || rustix::fs::linkat(&from, target_name, at, name, AtFlags::empty()))
    }
}

/// Makes or adjusts a directory; until the end it stays usable by us whatever its mode.
fn make_dir(at: BorrowedFd<'_>, name: &str, stat: &Stat, exists: bool) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if !exists {
        match rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o700)) {
            Err(Errno::EXIST) if rustix::fs::openat(at, name, flags, Mode::empty()).is_err() => {
                disk::remove(at, name)?;
                rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o700))?;
            }
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
    }
    own(at, name, stat)?;
    let dir = rustix::fs::openat(at, name, flags, Mode::empty())?;
    rustix::fs::fchmod(&dir, Mode::from_raw_mode(FileMode(stat.mode).permissions() | 0o700))?;
    for (key, value) in &stat.xattrs {
        let _ = rustix::fs::fsetxattr(&dir, key, value, XattrFlags::empty());
    }
    Ok(())
}

fn make_special(at: BorrowedFd<'_>, name: &str, stat: &Stat, kind: FileKind) -> io::Result<()> {
    let file_type = match kind {
        FileKind::CharDevice => FileType::CharacterDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        _ => FileType::Fifo,
    };
    let number = |n: i64| u32::try_from(n).map_err(|_| io::Error::from(Errno::INVAL));
    let device = rustix::fs::makedev(number(stat.devmajor)?, number(stat.devminor)?);
    let mode = Mode::from_raw_mode(FileMode(stat.mode).permissions());
    replace(at, name, || rustix::fs::mknodat(at, name, file_type, mode, device))?;
    own(at, name, stat)?;
    chmod_nofollow(at, name, mode)?;
    set_time(at, name, stat.mod_time)
}

/// Owner and time of `name` itself.
fn own(at: BorrowedFd<'_>, name: &str, stat: &Stat) -> io::Result<()> {
    rustix::fs::chownat(
        at,
        name,
        Some(Uid::from_raw(stat.uid)),
        Some(Gid::from_raw(stat.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    set_time(at, name, stat.mod_time)
}
