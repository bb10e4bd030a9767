//! Looks into a root filesystem without anybody else seeing a mount.
//!
//! A [`RootView`] is a descriptor of a detached mount (or of a plain directory where the snapshot
//! is one): it belongs to no mount namespace, and it is gone with the descriptor, also after
//! `kill -9`. Every path is resolved by the kernel inside the root (`openat2` with
//! `RESOLVE_IN_ROOT`), so no link leads out of it.

use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags},
};
use shipway_fault::{Fault, Result};
use shipway_storage::Mount;
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// Links followed in one path, as the kernel does.
const MAX_LINKS: usize = 40;
/// Longest path whose links are followed; the kernel takes none that is longer than a part of it.
const MAX_PATH: usize = 16 << 10;
/// How often a path is resolved that others change meanwhile. A step that renames directories all
/// the time must not hold a thread.
const MAX_TRIES: usize = 128;

/// What one wants to do in a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Look only. An active snapshot's upper directory is shown as one more read-only layer, so
    /// that nothing is locked.
    Read,
    /// Change things; nobody else may have the snapshot mounted.
    Write,
}

/// Whom a mount is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Viewer {
    /// Us, to look or to make files.
    Daemon,
    /// A container, which runs what is in it.
    Container,
}

/// A root filesystem that only this descriptor shows.
#[derive(Debug)]
pub struct RootView {
    fd: OwnedFd,
    detached: bool,
}

impl RootView {
    /// Opens the filesystem that `mounts` describe. Nothing in it has set-id bits that count, is a
    /// device that can be opened, or a program.
    pub fn open(mounts: &[Mount], access: Access) -> Result<Self> {
        Self::open_for(mounts, access, Viewer::Daemon)
    }

    fn open_for(mounts: &[Mount], access: Access, viewer: Viewer) -> Result<Self> {
        let [mount] = mounts else {
            return Err(Fault::unimplemented(format!(
                "a root filesystem of {} mounts",
                mounts.len()
            )));
        };
        let what = || format!("look into a root filesystem ({} {})", mount.kind, mount.source);
        let (fd, detached) = match mount.kind.as_str() {
            "bind" | "rbind" => (
                open_directory(Path::new(&mount.source))
                    .map_err(|e| Fault::io(what(), e.into()))?,
                false,
            ),
            "overlay" => overlay(mount, access, viewer).map_err(|e| Fault::io(what(), e.into()))?,
            kind => {
                return Err(Fault::unimplemented(format!(
                    "reading a root filesystem of kind {kind:?}"
                )));
            }
        };
        Ok(Self { fd, detached })
    }

    fn is_detached(&self) -> bool {
        self.detached
    }

    /// The directory at `path` of the host as a root.
    pub fn of_directory(path: &Path) -> Result<Self> {
        let fd = open_directory(path)
            .map_err(|e| Fault::io(format!("open {}", path.display()), e.into()))?;
        Ok(Self { fd, detached: false })
    }

    /// Opens `path` inside the root.
    pub fn open_at(
        &self,
        path: impl AsRef<[u8]>,
        flags: OFlags,
        mode: Mode,
    ) -> rustix::io::Result<OwnedFd> {
        open_in_root(self.fd.as_fd(), path, flags, mode)
    }

    /// Opens the file at `path` for reading, following links; `None` if it is not a regular file.
    /// What images and steps wrote may be anything, and a device does something when it is opened.
    pub fn open_regular(&self, path: impl AsRef<[u8]>) -> rustix::io::Result<Option<File>> {
        reopen_regular(self.open_at(path, OFlags::PATH, Mode::empty())?.as_fd())
    }

    /// What is at `path`, following links but not at the end.
    pub fn lstat(&self, path: impl AsRef<[u8]>) -> rustix::io::Result<Stat> {
        let fd = self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
        rustix::fs::fstat(fd)
    }

    /// What is at `path`, following links.
    pub fn stat(&self, path: impl AsRef<[u8]>) -> rustix::io::Result<Stat> {
        let fd = self.open_at(path, OFlags::PATH, Mode::empty())?;
        rustix::fs::fstat(fd)
    }

    /// The regular file at `path`, up to `limit` bytes; `None` if there is no such file.
    pub fn read_file(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let fail = |e: std::io::Error| Fault::io(format!("read {path} of the root filesystem"), e);
        let file = match self.open_regular(path) {
            Ok(Some(file)) => file,
            Ok(None) => {
                return Err(Fault::invalid(format!(
                    "{path} of the root filesystem is not a regular file"
                )));
            }
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(fail(e.into())),
        };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() as u64 > limit {
            return Err(Fault::invalid(format!(
                "{path} of the root filesystem is larger than {limit} bytes"
            )));
        }
        Ok(Some(bytes))
    }

    /// `path` with every link in it followed inside the root; what does not exist stays as written.
    /// `None` if links lead in circles or to a name that is not UTF-8, or if the path is longer
    /// than any.
    pub fn real_path(&self, path: &str) -> Option<String> {
        String::from_utf8(self.real_path_bytes(path.as_bytes())?).ok()
    }

    /// The same for names that are any bytes.
    pub fn real_path_bytes(&self, path: &[u8]) -> Option<Vec<u8>> {
        // The way is looked at name by name.
        if path.len() > MAX_PATH {
            return None;
        }
        let parts = |path: &[u8]| {
            path.split(|b| *b == b'/').rev().map(<[u8]>::to_owned).collect::<Vec<_>>()
        };
        let mut rest = parts(path);
        let (mut at, mut links) = (Vec::new(), 0);
        while let Some(part) = rest.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at.truncate(at.iter().rposition(|b| *b == b'/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = [&at[..], b"/", &part].concat();
            let is_link = self
                .lstat(&next)
                .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Symlink);
            if !is_link {
                at = next;
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return None;
            }
            let link = self.open_at(&next, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).ok()?;
            let target = rustix::fs::readlinkat(link, "", Vec::new()).ok()?;
            if target.to_bytes().starts_with(b"/") {
                at.clear();
            }
            rest.extend(parts(target.to_bytes()));
        }
        Some(if at.is_empty() { b"/".to_vec() } else { at })
    }

    /// Makes directory `path` with its missing parents, owned by `uid` and `gid`; those that exist
    /// stay as they are.
    pub fn make_dirs(&self, path: &str, mode: u32, uid: u32, gid: u32) -> rustix::io::Result<()> {
        let path = self.real_path(path).ok_or(Errno::LOOP)?;
        let mut at = String::new();
        for part in path.split('/').filter(|p| !p.is_empty()) {
            let parent = if at.is_empty() { "/".to_owned() } else { at.clone() };
            at = format!("{at}/{part}");
            match self.stat(&at) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                    continue;
                }
                Ok(_) => return Err(Errno::NOTDIR),
                Err(Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
            let dir = self.open_at(&parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
            match rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
            let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
            // Somebody who writes in the root may have exchanged it for a link.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&dir, part, flags, Mode::empty())?;
            rustix::fs::fchown(&made, Some(uid), Some(gid))?;
            rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }
}

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
    /// What appears is exactly the file that the path named now: whoever writes in the filesystem
    /// cannot exchange it for a link.
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
            [m] if m.kind == "overlay" && view.is_detached() => {
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
        // Never recursive: what is below would be somebody's files if unmounting failed.
        let _ = std::fs::remove_dir(&self.path).or_else(|_| match std::fs::metadata(&self.path) {
            Ok(m) if m.is_file() && m.len() == 0 => std::fs::remove_file(&self.path),
            _ => Ok(()),
        });
    }
}

impl AsFd for RootView {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens for reading what `fd` was opened to look at (`O_PATH`), if it is a regular file. Between
/// the look and the opening nobody can exchange it.
pub fn reopen_regular(fd: BorrowedFd<'_>) -> rustix::io::Result<Option<File>> {
    if FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(own, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(|fd| Some(fd.into()))
}

/// Opens `path` inside the directory `root`, which no link and no `..` leaves.
pub fn open_in_root(
    root: BorrowedFd<'_>,
    path: impl AsRef<[u8]>,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let path = path.as_ref();
    let path = &path[path.iter().take_while(|b| **b == b'/').count()..];
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    again(|| rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve))
}

/// Does `open` until a rename elsewhere does not race with it: the kernel asks to try again then.
fn again<T>(mut open: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 1..MAX_TRIES {
        match open() {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    open()
}

fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// The directories of an overlay mount.
#[derive(Debug, Default)]
struct Layers<'a> {
    lower: Vec<&'a str>,
    upper: Option<&'a str>,
    work: Option<&'a str>,
    other: Vec<&'a str>,
}

impl<'a> Layers<'a> {
    fn of(mount: &'a Mount) -> Self {
        let mut layers = Self::default();
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", dirs)) => layers.lower = dirs.split(':').collect(),
                Some(("upperdir", dir)) => layers.upper = Some(dir),
                Some(("workdir", dir)) => layers.work = Some(dir),
                _ if matches!(option.as_str(), "rw" | "ro") => {}
                _ => layers.other.push(option),
            }
        }
        layers
    }

    /// The same without a writable layer.
    fn frozen(mut self) -> Self {
        if let Some(upper) = self.upper.take() {
            self.lower.insert(0, upper);
        }
        self.work = None;
        self
    }
}

/// The mount, and whether it is one (a single layer is just its directory).
fn overlay(mount: &Mount, access: Access, viewer: Viewer) -> rustix::io::Result<(OwnedFd, bool)> {
    let layers = Layers::of(mount);
    let layers = if access == Access::Read { layers.frozen() } else { layers };
    if let ([only], None) = (&layers.lower[..], layers.upper) {
        return Ok((open_directory(Path::new(only))?, false));
    }
    let fd = match overlay_by_fsconfig(&layers, viewer) {
        // Linux before 6.5 takes no lower directories one by one, before 5.2 knows no fsopen, and
        // paths may be too long for it.
        Err(Errno::INVAL | Errno::NOSYS | Errno::TOOBIG) => overlay_by_mount(&layers, viewer),
        other => other,
    };
    Ok((fd?, true))
}

fn overlay_by_fsconfig(layers: &Layers<'_>, viewer: Viewer) -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for dir in &layers.lower {
        fsconfig_set_string(context.as_fd(), "lowerdir+", *dir)?;
    }
    if let (Some(upper), Some(work)) = (layers.upper, layers.work) {
        fsconfig_set_string(context.as_fd(), "upperdir", upper)?;
        fsconfig_set_string(context.as_fd(), "workdir", work)?;
    }
    for option in &layers.other {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value)?,
            None => fsconfig_set_flag(context.as_fd(), *option)?,
        }
    }
    fsconfig_create(context.as_fd())?;
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, layers.upper.is_none());
    let inert = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    attributes.set(inert, viewer == Viewer::Daemon);
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The same with `mount(2)`, on a thread with a mount namespace of its own that ends with it: the
/// descriptor keeps the mount alive.
#[allow(unsafe_code)]
fn overlay_by_mount(layers: &Layers<'_>, viewer: Viewer) -> rustix::io::Result<OwnedFd> {
    use rustix::{
        mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
        thread::{UnshareFlags, unshare_unsafe},
    };
    // The options have to fit one page, so lower directories are named relative to their common
    // parent.
    let base = common_parent(&layers.lower);
    let relative = |dir: &&str| {
        dir.get(base.len()..).map_or((*dir).to_owned(), |d| d.trim_start_matches('/').to_owned())
    };
    let mut options = vec![format!(
        "lowerdir={}",
        layers.lower.iter().map(relative).collect::<Vec<_>>().join(":")
    )];
    if let (Some(upper), Some(work)) = (layers.upper, layers.work) {
        options.push(format!("upperdir={upper},workdir={work}"));
    }
    options.extend(layers.other.iter().map(|o| (*o).to_owned()));
    let options = std::ffi::CString::new(options.join(",")).map_err(|_| Errno::INVAL)?;
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, layers.upper.is_none());
    flags
        .set(MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, viewer == Viewer::Daemon);
    let work = move || -> rustix::io::Result<OwnedFd> {
        // SAFETY: CLONE_NEWNS and CLONE_FS leave the file descriptor table shared; only this
        // thread's view of mounts and its working directory part from the others', and the thread
        // ends below.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::process::chdir(if base.is_empty() { "/" } else { base.as_str() })?;
        // Any directory serves: nobody but this thread sees what is mounted on it.
        mount("overlay", "/proc", "overlay", flags, options.as_c_str())?;
        let fd = open_directory(Path::new("/proc"));
        unmount("/proc", UnmountFlags::DETACH)?;
        fd
    };
    match std::thread::Builder::new().name("mount".into()).spawn(work) {
        Ok(thread) => thread.join().unwrap_or(Err(Errno::IO)),
        Err(_) => Err(Errno::AGAIN),
    }
}

/// The longest directory all of `dirs` are below; empty if none.
fn common_parent(dirs: &[&str]) -> String {
    let Some(first) = dirs.first() else { return String::new() };
    let mut parts: Vec<&str> = first.split('/').collect();
    parts.pop();
    for dir in dirs {
        let same = dir.split('/').zip(&parts).take_while(|(a, b)| a == *b).count();
        parts.truncate(same.min(parts.len()));
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn no_link_leads_out_of_the_root() {
        let root = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(root.path().join("etc")).expect("mkdir");
        symlink("/etc/../../../../../etc", root.path().join("out")).expect("symlink");
        fs::write(root.path().join("etc/passwd"), "inside").expect("write");
        let view = RootView::of_directory(root.path()).expect("open");
        assert_eq!(view.read_file("/out/passwd", 100).expect("read"), Some(b"inside".to_vec()));
        assert_eq!(view.read_file("/../../etc/group", 100).expect("read"), None);
        view.make_dirs("/a/b", 0o755, 0, 0).expect("make directories");
        assert!(root.path().join("a/b").is_dir());
    }

    #[test]
    fn only_regular_files_are_opened() {
        use rustix::fs::{makedev, mknodat};
        let root = tempfile::tempdir().expect("a temporary directory");
        fs::write(root.path().join("file"), "text").expect("write");
        symlink("file", root.path().join("link")).expect("symlink");
        // Opened, the FIFO would wait for a writer, and the device (there is none of that number)
        // would be an error.
        mknodat(CWD, root.path().join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("mknod");
        let device = mknodat(
            CWD,
            root.path().join("device"),
            FileType::CharacterDevice,
            Mode::RUSR,
            makedev(4000, 1),
        );
        let view = RootView::of_directory(root.path()).expect("open");
        let is_opened = |path: &str| view.open_regular(path).expect(path).is_some();
        assert!(is_opened("/file") && is_opened("link"));
        assert!(!is_opened("fifo") && !is_opened("/"));
        assert!(device.is_err() || !is_opened("device"));
        assert_eq!(view.open_regular("none").err(), Some(Errno::NOENT));
    }

    #[test]
    fn a_directory_exchanged_for_a_link_is_not_followed() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let outside = tempfile::tempdir().expect("a temporary directory");
        let before = fs::metadata(outside.path()).expect("stat").permissions();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let view = RootView::of_directory(root.path()).expect("open");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::remove_dir(root.path().join("d"));
                    let _ = symlink(outside.path(), root.path().join("d"));
                    let _ = fs::remove_file(root.path().join("d"));
                }
            });
            for _ in 0..2000 {
                let _ = view.make_dirs(
                    "/d",
                    0o777,
                    rustix::process::geteuid().as_raw(),
                    rustix::process::getegid().as_raw(),
                );
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(fs::metadata(outside.path()).expect("stat").permissions(), before);
    }

    #[test]
    fn paths_longer_than_any_are_not_followed() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let view = RootView::of_directory(root.path()).expect("open");
        // Looked at name by name this would take hours.
        assert_eq!(view.real_path(&"a/".repeat(4 << 20)), None);
        let long = "/".to_owned() + &"a/".repeat(1000) + "b";
        assert_eq!(view.real_path(&long), Some(long));
    }

    #[test]
    fn trying_again_has_an_end() {
        let mut tries = 0;
        let result: rustix::io::Result<()> = again(|| {
            tries += 1;
            Err(Errno::AGAIN)
        });
        assert_eq!((result, tries), (Err(Errno::AGAIN), MAX_TRIES));
    }

    #[test]
    fn a_common_parent_is_a_directory_above_all() {
        assert_eq!(common_parent(&["/s/1/fs", "/s/12/fs"]), "/s");
        assert_eq!(common_parent(&["/s/1/fs"]), "/s/1");
        assert_eq!(common_parent(&["/a/fs", "/b/fs"]), "");
    }

    #[test]
    fn both_ways_to_mount_show_the_same() {
        assert!(rustix::process::geteuid().is_root(), "run as root, as `cargo xtask test` does");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |n: &str| dir.path().join(n).display().to_string();
        for name in ["l1", "l2", "up", "work"] {
            fs::create_dir(path(name)).expect("mkdir");
            fs::write(format!("{}/{name}", path(name)), name).expect("write");
        }
        fs::remove_file(path("work/work")).expect("the work directory must be empty");
        let mount = Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                "index=off".into(),
                format!("workdir={}", path("work")),
                format!("upperdir={}", path("up")),
                format!("lowerdir={}:{}", path("l1"), path("l2")),
            ],
        };
        let layers = Layers::of(&mount);
        let frozen = Layers::of(&mount).frozen();
        let ways = [Viewer::Daemon, Viewer::Container].map(|v| {
            let all = [
                overlay_by_mount(&layers, v),
                overlay_by_mount(&frozen, v),
                overlay_by_fsconfig(&frozen, v),
                overlay_by_fsconfig(&layers, v),
            ];
            all.map(|fd| (fd, v))
        });
        use rustix::fs::StatVfsMountFlags;
        let inert =
            StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
        for (fd, viewer) in ways.into_iter().flatten() {
            let view = RootView { fd: fd.expect("mount"), detached: true };
            for name in ["l1", "l2", "up"] {
                assert_eq!(view.read_file(name, 10).expect("read"), Some(name.as_bytes().to_vec()));
            }
            let flags = rustix::fs::fstatvfs(&view).expect("statvfs").f_flag & inert;
            assert_eq!(
                flags,
                if viewer == Viewer::Daemon { inert } else { StatVfsMountFlags::empty() }
            );
        }
        let at = dir.path().join("at");
        let attached =
            Attached::new(std::slice::from_ref(&mount), Access::Write, "up", &at).expect("attach");
        assert_eq!(fs::read(attached.path()).expect("read"), b"up");
        let flags = rustix::fs::statvfs(attached.path()).expect("statvfs").f_flag;
        assert!(!flags.intersects(inert), "a container runs what is mounted for it");
        drop(attached);
        assert!(!at.exists());
        assert!(
            !fs::read_to_string("/proc/self/mountinfo").expect("mountinfo").contains(&path("up"))
        );
    }
}
