//! Mounts on the host for the daemon's own reading and writing.

use crate::background::Background;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use shipway_fault::{Code, Fault, Result};
use shipway_rootfs::mounts_below;
use shipway_storage::{Mount, Overlay, VOLATILE};
use shipway_task::blocking;
use std::{
    any::Any,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::oneshot;

/// What is in a snapshot is there to be read and written by us, never to be run: a program with a
/// set-id bit or a device in an image must be useless to anyone who reaches the mount. Processes of
/// builds get mounts of their own.
const INERT: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Longest option text that mount(2) takes: a page with its ending zero.
const OPTIONS_MAX: usize = 4000;

/// Whether what `mount` shows is there without the snapshot that it was asked for: layers that
/// a remote snapshotter serves are mounted only while there is a snapshot on top of them, and
/// what is mounted without them has no files.
pub(crate) fn is_lasting(mount: &Mount) -> bool {
    let plain = |dir: &PathBuf| is_mount_point(dir) == Some(false);
    match mount {
        Mount::Overlay(overlay) => overlay.lower.iter().all(plain),
        Mount::Bind(bind) => plain(&bind.source),
        Mount::Other(_) => false,
    }
}

/// Whether something is mounted on `dir`; `None` if that cannot be known.
pub(crate) fn is_mount_point(dir: &Path) -> Option<bool> {
    let device = |dir: &Path| fs::metadata(dir).map(|m| m.dev()).ok();
    // A mount point is on another device than the directory that it is in.
    Some(device(dir)? != device(dir.parent()?)?)
}

/// A state as a directory of the host, while this lives.
pub struct LocalMount {
    path: PathBuf,
    /// Held while the mount is used: the mount point, the snapshot's view.
    guard: Option<Arc<dyn Any + Send + Sync>>,
    point: Option<Arc<MountPoint>>,
}

impl LocalMount {
    /// The root of the state. It may hold links that point outside: resolve paths within it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts now, if no other handle has the same mount, and waits for it.
    pub async fn unmount(self) -> Result<()> {
        let Some(point) = self.point else { return Ok(()) };
        drop(self.guard);
        match Arc::try_unwrap(point) {
            Ok(point) => point.ended().await,
            Err(_) => Ok(()),
        }
    }

    /// A directory that is there anyway.
    pub fn of_directory(path: &Path) -> Self {
        Self { path: path.to_owned(), guard: None, point: None }
    }

    /// `mounts` as a directory: a bind is its source, everything else is mounted below `root`.
    /// `guard` is dropped after unmounting.
    pub(crate) async fn new(
        mounts: &[Mount],
        root: &Path,
        background: &Background,
        guard: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self> {
        if let [Mount::Bind(only)] = mounts {
            return Ok(Self { path: only.source.clone(), guard, point: None });
        }
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = root.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        let (mounts, at) = (mounts.to_vec(), path.clone());
        blocking("mount a snapshot", move || mount_all(&mounts, &at)).await?;
        let point = MountPoint {
            path: path.clone(),
            background: background.clone(),
            guard,
            ended: None,
            live: true,
        };
        Ok(Self { path, guard: None, point: Some(Arc::new(point)) })
    }

    /// A handle that does not keep it; `None` for what is not a mount of its own.
    pub(crate) fn downgrade(&self) -> Option<WeakMount> {
        self.point.as_ref().map(|p| WeakMount { path: self.path.clone(), point: Arc::downgrade(p) })
    }
}

/// Finds a mount again while a handle has it.
pub(crate) struct WeakMount {
    path: PathBuf,
    point: Weak<MountPoint>,
}

impl WeakMount {
    pub fn upgrade(&self) -> Option<LocalMount> {
        Some(LocalMount {
            path: self.path.clone(),
            guard: None,
            point: Some(self.point.upgrade()?),
        })
    }
}

/// A directory that something is mounted on.
struct MountPoint {
    path: PathBuf,
    background: Background,
    guard: Option<Arc<dyn Any + Send + Sync>>,
    ended: Option<oneshot::Sender<Result<()>>>,
    live: bool,
}

impl MountPoint {
    async fn ended(mut self) -> Result<()> {
        let (sender, ended) = oneshot::channel();
        self.ended = Some(sender);
        drop(self);
        ended.await.unwrap_or(Ok(()))
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        if !std::mem::take(&mut self.live) {
            return;
        }
        let (path, guard, ended) =
            (std::mem::take(&mut self.path), self.guard.take(), self.ended.take());
        // Unmounting waits for the kernel to forget, which takes milliseconds.
        self.background.blocking("unmount", move || {
            let result = detach(&path);
            if let Err(e) = &result {
                tracing::warn!(path = %path.display(), error = %e, "failed to unmount");
            }
            drop(guard);
            if let Some(ended) = ended {
                let _ = ended.send(result);
            }
        });
    }
}

fn detach(path: &Path) -> Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(e) => return Err(Fault::io(format!("unmount {}", path.display()), e.into())),
    }
    fs::remove_dir(path)
        .map_err(|e| Fault::io(format!("remove the mount point {}", path.display()), e))
}

fn mount_all(mounts: &[Mount], at: &Path) -> Result<()> {
    fs::create_dir_all(at)
        .map_err(|e| Fault::io(format!("make the mount point {}", at.display()), e))?;
    for (done, m) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(m, at) {
            for _ in 0..done {
                let _ = unmount(at, UnmountFlags::DETACH);
            }
            let _ = fs::remove_dir(at);
            let what = format!("mount {} {} on {}", m.kind(), m.raw().source, at.display());
            let fault = Fault::io(what, e);
            return Err(match fault.code() {
                Code::PermissionDenied => {
                    fault.hint("the daemon needs to run as root, or in a user namespace of its own, to mount file systems")
                }
                _ => fault,
            });
        }
    }
    Ok(())
}

fn mount_one(m: &Mount, at: &Path) -> io::Result<()> {
    let raw = m.raw();
    if !raw.target.is_empty() {
        return Err(io::Error::other("mounting at a subdirectory is not supported"));
    }
    let (mut flags, mut options) = (INERT, Vec::new());
    for option in &raw.options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" | "bind" | "rbind" => {}
            "nosuid" | "nodev" | "noexec" => {}
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            _ => options.push(option.clone()),
        }
    }
    let mount = |options: &str| {
        let text = CString::new(options)?;
        Ok(mount(raw.source.as_str(), at, raw.kind.as_str(), flags, text.as_c_str())?)
    };
    let overlay = match m {
        Mount::Bind(bind) => {
            rustix::mount::mount_bind_recursive(&bind.source, at)?;
            return Ok(rustix::mount::mount_remount(at, flags | MountFlags::BIND, "")?);
        }
        Mount::Other(_) => return mount(&options.join(",")),
        Mount::Overlay(overlay) => overlay,
    };
    let (text, _open) = shortened(overlay, &options)?;
    let done: io::Result<()> = mount(&text);
    match done {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput && overlay.is_volatile() => {
            // Linux before 5.10.
            let mut without = overlay.clone();
            without.options.retain(|o| o != VOLATILE);
            mount_one(&Mount::Overlay(without), at)
        }
        Ok(()) if overlay.is_volatile() => {
            overlay.upper.iter().for_each(|upper| unmark(&upper.work));
            Ok(())
        }
        other => other,
    }
}

/// The options as one text. Lower directories are named by descriptors when their paths are too
/// long together.
fn shortened(overlay: &Overlay, options: &[String]) -> io::Result<(String, Vec<OwnedFd>)> {
    use rustix::fs::{Mode, OFlags};
    let text = options.join(",");
    if text.len() <= OPTIONS_MAX {
        return Ok((text, Vec::new()));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = overlay.lower.iter().map(|dir| rustix::fs::open(dir, flags, Mode::empty()));
    let open: Vec<OwnedFd> = open.collect::<Result<_, _>>()?;
    let names = open.iter().map(|fd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())));
    let short = Overlay { lower: names.collect(), ..overlay.clone() };
    Ok((Mount::Overlay(short).raw().options.join(","), open))
}

/// Removes the mark that forbids mounting an overlay again after it was mounted without sync. Only
/// mounting looks at it, so it can go as soon as the mount stands: a process may be given the same
/// file system next.
fn unmark(workdir: &Path) {
    let mark = workdir.join("work/incompat");
    if let Err(e) = fs::remove_dir_all(&mark)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(mark = %mark.display(), error = %e, "failed to remove the mark of a volatile overlay, it cannot be mounted again");
    }
}

/// Unmounts what an earlier run left mounted below `root` and removes the mount points.
pub(crate) fn sweep(root: &Path) -> Result<()> {
    for point in mounts_below(root)?.into_iter().filter(|p| p != root) {
        unmount(&point, UnmountFlags::DETACH).map_err(|e| {
            Fault::io(format!("unmount {}, left by an earlier run", point.display()), e.into())
        })?;
    }
    if let Ok(entries) = fs::read_dir(root) {
        for entry in entries.flatten() {
            let _ = fs::remove_dir(entry.path());
        }
    }
    fs::create_dir_all(root).map_err(|e| Fault::io(format!("make {}", root.display()), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_storage::{Bind, Upper};

    #[test]
    fn what_is_mounted_for_others_does_not_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("a")).unwrap();
        fs::create_dir(path("b")).unwrap();
        let lasting = |lower: &[&str]| {
            let lower = lower.iter().map(|name| path(name)).collect();
            is_lasting(&Mount::Overlay(Overlay { lower, ..Overlay::default() }))
        };
        assert!(lasting(&["a", "b"]) && is_lasting(&Mount::bind(path("b"), true)));
        mount("tmpfs", path("b"), "tmpfs", MountFlags::empty(), c"").unwrap();
        let mounted = (lasting(&["a", "b"]), is_lasting(&Mount::bind(path("b"), true)));
        unmount(path("b"), UnmountFlags::DETACH).unwrap();
        assert_eq!(mounted, (false, false));
        assert!(lasting(&["a", "b"]) && !lasting(&["a", "gone"]));
    }

    #[test]
    fn nothing_in_a_mount_of_ours_is_of_use_to_those_who_reach_it() {
        use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, makedev, mknodat};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["l", "u", "w", "source"] {
            fs::create_dir(path(name)).unwrap();
        }
        let device = |at: PathBuf| {
            mknodat(CWD, at, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3))
        };
        device(path("l/null")).unwrap();
        device(path("source/null")).unwrap();
        let writable = Mount::Overlay(Overlay {
            upper: Some(Upper { dir: path("u"), work: path("w") }),
            lower: vec![path("l")],
            ..Overlay::default()
        });
        let bind = |read_only, options: &[&str]| {
            let options = options.iter().map(|o| (*o).to_owned()).collect();
            Mount::Bind(Bind { source: path("source"), read_only, options })
        };
        for m in
            [writable.unsynced(), bind(false, &["rbind"]), bind(true, &["rbind", "exec", "suid"])]
        {
            let at = path("at");
            mount_all(std::slice::from_ref(&m), &at).unwrap();
            let flags = rustix::fs::statvfs(&at).unwrap().f_flag;
            let opened = fs::File::open(at.join("null"));
            // Devices can be made nevertheless, and looked at.
            let (made, seen) = (device(at.join("new")), fs::symlink_metadata(at.join("null")));
            let read_only = flags.contains(StatVfsMountFlags::RDONLY);
            detach(&at).unwrap();
            let inert =
                StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
            assert!(flags.contains(inert), "{m:?}");
            assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{m:?}");
            assert!(seen.is_ok() && (made.is_ok() || read_only), "{m:?}");
        }
    }
}
