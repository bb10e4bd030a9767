//! Checksums of parts of a tree, with a memory.

use crate::{
    KnownContents, PathFilter, PathVerdict, Selector, TreeFile, contents,
    hash::{FileStat, Stamp, digest},
    resolve::{missing, resolve},
};
use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use shipway_fault::{Fault, Result};
use shipway_gocompat::Glob;
use shipway_oci::{Digest, Hasher};
use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// Files to hash that are worth a second thread.
const WORTH_THREADS: usize = 8;

/// Files remembered at most; hashing again is cheaper than growing without end.
const MAX_REMEMBERED: usize = 500_000;

/// Remembers the files of one tree. Clones share the memory.
#[derive(Clone, Default)]
pub struct TreeIndex(Arc<Mutex<Memory>>);

/// Digests of regular files, with the number of the stamp each had. Trees are large and many: paths
/// are remembered by digest, too.
type Memory = HashMap<PathHash, (u64, Digest)>;

/// A path.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct PathHash([u8; 16]);

impl PathHash {
    fn of(path: &Path) -> Self {
        let mut place = [0; 16];
        place.copy_from_slice(&Digest::of(path.as_os_str().as_bytes()).as_bytes()[..16]);
        Self(place)
    }
}

/// A file that belongs to the selection.
struct SelectedFile {
    /// Path from the tree's root.
    path: PathBuf,
    /// Name that goes into the checksum.
    name: Vec<u8>,
    stamp: Stamp,
    inode: u64,
}

impl SelectedFile {
    fn of(path: PathBuf, name: Vec<u8>, inode: Inode) -> Self {
        Self { path, name, stamp: inode.stamp, inode: inode.number }
    }
}

/// What the walk keeps of an inode.
#[derive(Clone, Copy)]
struct Inode {
    number: u64,
    stamp: Stamp,
}

impl Inode {
    fn of(stat: &Stat) -> Self {
        Self { number: stat.st_ino, stamp: Stamp::of(stat) }
    }
}

impl TreeIndex {
    /// The checksum of what `selector` means in the tree at `root`. Files are read, unless they
    /// were before or `known` knows what is in them. Blocks: call it off the async threads.
    pub fn checksum(
        &self,
        root: &Path,
        selector: &Selector,
        known: Option<&dyn KnownContents>,
    ) -> Result<Digest> {
        let asked = Path::new(&selector.path);
        let contents_only = selector.path.len() > 1 && selector.path.ends_with('/');
        let mut found = Vec::new();
        if selector.wildcard && selector.path.contains(['*', '?', '[', '\\']) {
            for path in matches(root, &selector.path)? {
                let name = path.as_os_str().as_bytes().to_vec();
                let resolved = resolve(root, &path, selector.follow_links)?;
                collect(
                    root,
                    &resolved.path,
                    &name,
                    selector.filter.as_deref(),
                    false,
                    &mut found,
                )?;
            }
        } else {
            let resolved = resolve(root, asked, selector.follow_links || contents_only)?;
            if contents_only && !resolved.metadata.is_dir() {
                return Err(missing(asked));
            }
            collect(
                root,
                &resolved.path,
                b"",
                selector.filter.as_deref(),
                contents_only,
                &mut found,
            )?;
        }
        let digests = self.digests(root, &found, known)?;
        if let ([only], [digest]) = (&found[..], &digests[..])
            && only.name.is_empty()
        {
            return Ok(*digest);
        }
        let mut hasher = Hasher::new();
        for (file, digest) in found.iter().zip(digests) {
            hasher.update((file.name.len() as u64).to_be_bytes());
            hasher.update(&file.name);
            hasher.update(digest.as_bytes());
        }
        Ok(hasher.finish())
    }

    /// Remembers the digest of a regular file that was just written at `path`, from the tree's
    /// root.
    pub fn record(&self, path: &Path, file: &FileStat, digest: Digest) {
        let mut memory = self.memory();
        if memory.len() < MAX_REMEMBERED {
            memory.insert(PathHash::of(path), (Stamp::of_file(file).number(), digest));
        }
    }

    /// Forgets the file at `path`.
    pub fn forget(&self, path: &Path) {
        self.memory().remove(&PathHash::of(path));
    }

    /// Forgets all files.
    pub fn clear(&self) {
        *self.memory() = Memory::new();
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock()
    }

    /// The digests of files, from memory, of what is known of them or by reading, several at a
    /// time.
    fn digests(
        &self,
        root: &Path,
        found: &[SelectedFile],
        known: Option<&dyn KnownContents>,
    ) -> Result<Vec<Digest>> {
        // Everything but a file's contents follows from what was read already.
        let is_file = |f: &SelectedFile| f.stamp.kind() == FileType::RegularFile;
        let places: Vec<Option<PathHash>> =
            found.iter().map(|f| is_file(f).then(|| PathHash::of(&f.path))).collect();
        let mut digests: Vec<Option<Digest>> = {
            let memory = self.memory();
            let remembered = |(f, place): (&SelectedFile, &Option<PathHash>)| {
                memory.get(place.as_ref()?).filter(|(n, _)| *n == f.stamp.number())
            };
            found.iter().zip(&places).map(|f| remembered(f).map(|(_, d)| *d)).collect()
        };
        let todo: Vec<usize> = (0..found.len()).filter(|i| digests[*i].is_none()).collect();
        let contents = match known {
            Some(known) => known_contents(found, &todo, known),
            None => HashMap::new(),
        };
        let next = AtomicUsize::new(0);
        let work = || {
            let (mut done, mut buffer) = (Vec::new(), Vec::new());
            while let Some(i) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                let SelectedFile { path, stamp, .. } = &found[*i];
                let known = contents.get(i).copied();
                done.push((*i, digest(&root.join(path), stamp, known, &mut buffer)?));
            }
            Ok::<_, Fault>(done)
        };
        let threads = if todo.len() < WORTH_THREADS {
            1
        } else {
            thread::available_parallelism().map_or(1, |n| n.get()).min(4)
        };
        let parts: Vec<Result<Vec<(usize, Digest)>>> = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let panicked = |_| Fault::internal("a thread that hashes files panicked");
            others.into_iter().map(|t| t.join().map_err(panicked).flatten()).chain([mine]).collect()
        });
        let mut memory = self.memory();
        if memory.len() + todo.len() > MAX_REMEMBERED {
            *memory = Memory::new();
        }
        for part in parts {
            for (i, digest) in part? {
                if let Some(place) = places[i] {
                    memory.insert(place, (found[i].stamp.number(), digest));
                }
                digests[i] = Some(digest);
            }
        }
        Ok(digests.into_iter().flatten().collect())
    }
}

/// Digests of the contents of those of `found` at `todo` that somebody knows them of.
fn known_contents(
    found: &[SelectedFile],
    todo: &[usize],
    known: &dyn KnownContents,
) -> HashMap<usize, Digest> {
    // What is empty costs nothing to read.
    let worth = |i: &usize| {
        let stamp = &found[*i].stamp;
        stamp.kind() == FileType::RegularFile && stamp.size() > 0
    };
    let asked: Vec<usize> = todo.iter().copied().filter(worth).collect();
    let file = |i: &usize| {
        let SelectedFile { path, stamp, inode, .. } = &found[*i];
        TreeFile { path, inode: *inode, size: stamp.size(), mtime: stamp.mtime() }
    };
    let files: Vec<TreeFile<'_>> = asked.iter().map(file).collect();
    let pieces = if files.is_empty() { Vec::new() } else { known.pieces(&files) };
    let whole = |((i, file), pieces): ((usize, &TreeFile<'_>), Option<Vec<Digest>>)| {
        Some((i, contents::of_pieces(file.size, &pieces?)?))
    };
    asked.into_iter().zip(&files).zip(pieces).filter_map(whole).collect()
}

/// Adds what is at `start` (a path without links) and below it, in path order.
fn collect(
    root: &Path,
    start: &Path,
    name: &[u8],
    filter: Option<&dyn PathFilter>,
    contents_only: bool,
    found: &mut Vec<SelectedFile>,
) -> Result<()> {
    let base =
        rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Fault::io(format!("open {}", root.display()), e.into()))?;
    let failed = |path: &Path, e: rustix::io::Errno| {
        Fault::io(format!("look at /{}", path.display()), e.into())
    };
    let at = if start.as_os_str().is_empty() { Path::new(".") } else { start };
    let stat =
        rustix::fs::statat(&base, at, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| failed(start, e))?;
    let first = SelectedFile::of(start.to_owned(), name.to_vec(), Inode::of(&stat));
    if first.stamp.kind() != FileType::Directory {
        found.push(first);
        return Ok(());
    }
    // Patterns choose what is in the directory; it belongs to the selection itself, because a copy
    // of the selection is like it.
    if !contents_only {
        found.push(first);
    }
    let mut stack = vec![Dir {
        path: start.to_owned(),
        relative: Vec::new(),
        children: list(&base, start)?,
        held: None,
    }];
    while let Some(dir) = stack.last_mut() {
        let Some((child, inode)) = dir.children.pop() else {
            stack.pop();
            continue;
        };
        let path = dir.path.join(OsStr::from_bytes(child.as_bytes()));
        let mut relative = dir.relative.clone();
        if !relative.is_empty() {
            relative.push(b'/');
        }
        relative.extend_from_slice(child.as_bytes());
        let is_dir = inode.stamp.kind() == FileType::Directory;
        let verdict = filter
            .map_or(PathVerdict::Take, |f| f.decide(&String::from_utf8_lossy(&relative), is_dir));
        let full_name = [name, b"/", &relative].concat();
        let mut held = None;
        match verdict {
            PathVerdict::Skip => continue,
            PathVerdict::Descend => held = Some(SelectedFile::of(path.clone(), full_name, inode)),
            PathVerdict::Take => {
                found.extend(stack.iter_mut().filter_map(|d| d.held.take()));
                found.push(SelectedFile::of(path.clone(), full_name, inode));
            }
        }
        if is_dir {
            let children = list(&base, &path)?;
            stack.push(Dir { path, relative, children, held });
        }
    }
    Ok(())
}

/// A directory on the way of the walk.
struct Dir {
    path: PathBuf,
    relative: Vec<u8>,
    /// Children still to visit, last one first.
    children: Vec<(CString, Inode)>,
    /// Its own entry, if it counts only with a child.
    held: Option<SelectedFile>,
}

/// The children of a directory, in reverse byte order.
fn list(base: &impl std::os::fd::AsFd, path: &Path) -> Result<Vec<(CString, Inode)>> {
    let failed = |e: rustix::io::Errno| Fault::io(format!("list /{}", path.display()), e.into());
    let at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(base, at, flags, Mode::empty()).map_err(failed)?;
    let mut children = Vec::new();
    for entry in rustix::fs::Dir::read_from(&fd).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name.to_bytes() != b"." && name.to_bytes() != b".." {
            let stat = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
            children.push((name.to_owned(), Inode::of(&stat)));
        }
    }
    children.sort_unstable_by(|a, b| b.0.cmp(&a.0));
    Ok(children)
}

/// Paths that match a pattern, component by component as Go's `path.Match` does, in byte order.
fn matches(root: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let mut at = vec![PathBuf::new()];
    for component in pattern.split('/').filter(|c| !c.is_empty() && *c != ".") {
        // What is malformed matters only where there is something to match.
        let glob = Glob::new(component).map_err(|e| Fault::invalid(format!("{e} {pattern:?}")));
        let mut next = Vec::new();
        for dir in &at {
            if component == ".." {
                next.push(dir.parent().unwrap_or(Path::new("")).to_owned());
                continue;
            }
            let resolved = match resolve(root, dir, true) {
                Ok(resolved) if resolved.metadata.is_dir() => resolved,
                Ok(_) => continue,
                Err(e) if e.is_not_found() => continue,
                Err(e) => return Err(e),
            };
            let base = rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Fault::io(format!("open {}", root.display()), e.into()))?;
            for (name, _) in list(&base, &resolved.path)?.into_iter().rev() {
                if glob.as_ref().map_err(Fault::clone)?.matches(&name.to_string_lossy()) {
                    next.push(dir.join(OsStr::from_bytes(name.as_bytes())));
                }
            }
        }
        at = next;
    }
    Ok(at)
}
