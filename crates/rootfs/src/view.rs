//! A root filesystem that only the daemon sees.
//!
//! A [`RootView`] is a descriptor of a detached mount (or of a plain directory where the snapshot
//! is one): it belongs to no mount namespace, and it is gone with the descriptor, also after
//! `kill -9`. Every path is resolved by the kernel inside the root (`openat2` with
//! `RESOLVE_IN_ROOT`), so no link leads out of it.

use crate::open::{open_directory, open_in_root, reopen_regular};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, Stat},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};
use shipway_fault::{Fault, Result};
use shipway_storage::{Mount, Overlay};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// Links followed in one path, as the kernel does.
const MAX_LINKS: usize = 40;
/// Longest path whose links are followed; the kernel takes none that is longer than a part of it.
const MAX_PATH: usize = 16 << 10;

/// What a root is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read. An active snapshot's upper directory is shown as one more read-only layer, so
    /// that nothing is locked.
    Read,
    /// To change it; no other mount of the snapshot may exist.
    Write,
}

/// Who uses a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Viewer {
    /// The daemon, to read and to make files.
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

    pub(crate) fn open_for(mounts: &[Mount], access: Access, viewer: Viewer) -> Result<Self> {
        let [mount] = mounts else {
            return Err(Fault::unimplemented(format!(
                "a root filesystem of {} mounts",
                mounts.len()
            )));
        };
        let what = |source: &Path| {
            let kind = mount.kind();
            format!("open a root filesystem ({kind} {})", source.display())
        };
        let (fd, detached) = match mount {
            Mount::Bind(bind) => {
                let opened = open_directory(&bind.source);
                (opened.map_err(|e| Fault::io(what(&bind.source), e.into()))?, false)
            }
            Mount::Overlay(layers) => overlay(layers, access, viewer)
                .map_err(|e| Fault::io(what(Path::new("overlay")), e.into()))?,
            Mount::Other(other) => {
                return Err(Fault::unimplemented(format!(
                    "reading a root filesystem of kind {:?}",
                    other.kind
                ))
                .hint("use a snapshotter whose mounts are overlays or binds: overlayfs, native"));
            }
        };
        Ok(Self { fd, detached })
    }

    /// Whether it is a mount of its own, and not just a directory of the host.
    pub(crate) fn is_detached(&self) -> bool {
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
            // A process that writes in the root may have replaced it by a link.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&dir, part, flags, Mode::empty())?;
            rustix::fs::fchown(&made, Some(uid), Some(gid))?;
            rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }
}

impl AsFd for RootView {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The mount, and whether it is one (a single layer is just its directory).
fn overlay(
    layers: &Overlay,
    access: Access,
    viewer: Viewer,
) -> rustix::io::Result<(OwnedFd, bool)> {
    let frozen = (access == Access::Read).then(|| layers.frozen());
    let layers = frozen.as_ref().unwrap_or(layers);
    if let ([only], None) = (&layers.lower[..], &layers.upper) {
        return Ok((open_directory(only)?, false));
    }
    let fd = match overlay_by_fsconfig(layers, viewer) {
        // Linux before 6.5 takes no lower directories one by one, before 5.2 knows no fsopen, and
        // paths may be too long for it.
        Err(Errno::INVAL | Errno::NOSYS | Errno::TOOBIG) => overlay_by_mount(layers, viewer),
        other => other,
    };
    Ok((fd?, true))
}

fn overlay_by_fsconfig(layers: &Overlay, viewer: Viewer) -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for dir in &layers.lower {
        fsconfig_set_string(context.as_fd(), "lowerdir+", dir)?;
    }
    if let Some(upper) = &layers.upper {
        fsconfig_set_string(context.as_fd(), "upperdir", &upper.dir)?;
        fsconfig_set_string(context.as_fd(), "workdir", &upper.work)?;
    }
    for option in &layers.options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value)?,
            None => fsconfig_set_flag(context.as_fd(), option)?,
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
fn overlay_by_mount(layers: &Overlay, viewer: Viewer) -> rustix::io::Result<OwnedFd> {
    use rustix::{
        mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
        thread::{UnshareFlags, unshare_unsafe},
    };
    // The options have to fit one page, so lower directories are named relative to their common
    // parent.
    let base = common_parent(&layers.lower);
    let relative = |dir: &PathBuf| dir.strip_prefix(&base).unwrap_or(dir).to_owned();
    let layers = Overlay { lower: layers.lower.iter().map(relative).collect(), ..layers.clone() };
    let read_only = layers.upper.is_none();
    let options = Mount::Overlay(Overlay { read_only: false, ..layers }).raw().options.join(",");
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, read_only);
    flags
        .set(MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, viewer == Viewer::Daemon);
    let work = move || -> rustix::io::Result<OwnedFd> {
        // SAFETY: CLONE_NEWNS and CLONE_FS leave the file descriptor table shared; only this
        // thread's view of mounts and its working directory part from the others', and the thread
        // ends below.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::process::chdir(&base)?;
        // Any directory serves: only this thread sees what is mounted on it.
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

/// The longest directory that all of `dirs` are below.
fn common_parent(dirs: &[PathBuf]) -> PathBuf {
    let mut above = dirs.first().into_iter().flat_map(|first| first.ancestors().skip(1));
    let common = above.find(|a| dirs.iter().all(|dir| dir != a && dir.starts_with(a)));
    common.unwrap_or(Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attached;
    use rustix::fs::CWD;
    use shipway_storage::{RawMount, Upper};
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
    fn a_root_that_is_not_understood_is_refused_by_kind() {
        let other = Mount::Other(RawMount { kind: "erofs".into(), ..RawMount::default() });
        let refused = |mounts: &[Mount], want: &str| {
            let fault = RootView::open(mounts, Access::Read).expect_err("refused");
            assert!(fault.is_unimplemented() && fault.to_string().contains(want), "{fault}");
        };
        refused(std::slice::from_ref(&other), "of kind \"erofs\"");
        refused(&[other, Mount::bind("/", true)], "of 2 mounts");
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
    fn a_common_parent_is_a_directory_above_all() {
        let check = |dirs: &[&str], want: &str| {
            let dirs: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
            assert_eq!(common_parent(&dirs), Path::new(want));
        };
        check(&["/s/1/fs", "/s/12/fs"], "/s");
        check(&["/s/1/fs"], "/s/1");
        check(&["/a/fs", "/b/fs"], "/");
        check(&["/a/b", "/a"], "/");
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
        let layers = Overlay {
            upper: Some(Upper { dir: path("up").into(), work: path("work").into() }),
            lower: vec![path("l1").into(), path("l2").into()],
            options: vec!["index=off".into()],
            ..Overlay::default()
        };
        let (frozen, mount) = (layers.frozen(), Mount::Overlay(layers.clone()));
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
