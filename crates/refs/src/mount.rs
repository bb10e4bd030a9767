//! Mounts on the host for the daemon's own reading and writing, and what a snapshot's mounts tell
//! about its layers.

use crate::life::Background;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use shipway_archive::{LayerTree, Marks};
use shipway_fault::{Code, Fault, Result};
use shipway_storage::Mount;
use std::{
    any::Any,
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::oneshot;

/// What is in a snapshot is there to be read and written by us, never to be run: a program with a
/// set-id bit or a device in an image must be of no use to whoever reaches the mount. Processes of
/// builds get mounts of their own.
const INERT: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Longest option text that mount(2) takes: a page with its ending zero.
const OPTIONS_MAX: usize = 4000;

/// A state as a directory of the host, while this lives.
pub struct LocalMount {
    path: PathBuf,
    /// Kept for as long as somebody reads: the mount point, the snapshot's view.
    guard: Option<Arc<dyn Any + Send + Sync>>,
    point: Option<Arc<Point>>,
}

impl LocalMount {
    /// The root of the state. It may hold links that point outside: resolve paths within it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts now, if nobody else has the same mount, and waits for it.
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
        if let [only] = mounts
            && is_bind(only)
        {
            return Ok(Self {
                path: Path::new(&only.source).join(&only.target),
                guard,
                point: None,
            });
        }
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = root.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        let (mounts, at) = (mounts.to_vec(), path.clone());
        let done = tokio::task::spawn_blocking(move || mount_all(&mounts, &at)).await;
        done.map_err(|e| Fault::internal(format!("a mount failed: {e}")))??;
        let point = Point {
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

/// Finds a mount again while somebody has it.
pub(crate) struct WeakMount {
    path: PathBuf,
    point: Weak<Point>,
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
struct Point {
    path: PathBuf,
    background: Background,
    guard: Option<Arc<dyn Any + Send + Sync>>,
    ended: Option<oneshot::Sender<Result<()>>>,
    live: bool,
}

impl Point {
    async fn ended(mut self) -> Result<()> {
        let (tell, told) = oneshot::channel();
        self.ended = Some(tell);
        drop(self);
        told.await.unwrap_or(Ok(()))
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        if !std::mem::take(&mut self.live) {
            return;
        }
        let (path, guard, ended) =
            (std::mem::take(&mut self.path), self.guard.take(), self.ended.take());
        // Unmounting waits for the kernel to forget, which takes milliseconds.
        self.background.spawn_blocking(move || {
            let result = detach(&path);
            if let Err(e) = &result {
                tracing::warn!(path = %path.display(), error = %e, "a mount stays");
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
            let what = format!("mount {} {} on {}", m.kind, m.source, at.display());
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
    if !m.target.is_empty() {
        return Err(io::Error::other("mounts of a part of a file system are not understood"));
    }
    let bind = is_bind(m);
    let (mut flags, mut options) = (INERT, Vec::new());
    for option in &m.options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" | "bind" | "rbind" => {}
            "nosuid" | "nodev" | "noexec" => {}
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            _ => options.push(option.clone()),
        }
    }
    if bind {
        rustix::mount::mount_bind_recursive(m.source.as_str(), at)?;
        return Ok(rustix::mount::mount_remount(at, flags | MountFlags::BIND, "")?);
    }
    let (text, _open) = shortened(&options)?;
    let text = CString::new(text)?;
    match mount(m.source.as_str(), at, m.kind.as_str(), flags, text.as_c_str()) {
        Err(rustix::io::Errno::INVAL) if options.iter().any(|o| o == VOLATILE) => {
            // Linux before 5.10.
            let mut without = m.clone();
            without.options.retain(|o| o != VOLATILE);
            mount_one(&without, at)
        }
        Ok(()) if options.iter().any(|o| o == VOLATILE) => {
            options
                .iter()
                .filter_map(|o| o.strip_prefix("workdir="))
                .for_each(|dir| unmark(Path::new(dir)));
            Ok(())
        }
        other => Ok(other?),
    }
}

/// The options as one text. Lower directories are named by descriptors when their paths are too
/// long together.
fn shortened(options: &[String]) -> io::Result<(String, Vec<OwnedFd>)> {
    let text = options.join(",");
    if text.len() <= OPTIONS_MAX {
        return Ok((text, Vec::new()));
    }
    let mut open = Vec::new();
    let mut short = Vec::new();
    for option in options {
        let Some(lowers) = option.strip_prefix("lowerdir=") else {
            short.push(option.clone());
            continue;
        };
        let mut names = Vec::new();
        for lower in lowers.split(':') {
            use rustix::fs::{Mode, OFlags};
            let fd = rustix::fs::open(
                lower,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            names.push(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            open.push(fd);
        }
        short.push(format!("lowerdir={}", names.join(":")));
    }
    Ok((short.join(","), open))
}

pub(crate) fn is_bind(m: &Mount) -> bool {
    m.kind == "bind" || m.options.iter().any(|o| o == "bind" || o == "rbind")
}

/// The same file system for those who only read.
pub(crate) fn read_only(mounts: &[Mount]) -> Vec<Mount> {
    let mut mounts = mounts.to_vec();
    for m in &mut mounts {
        if let Some((upper, lowers)) = overlay_dirs(m) {
            m.options.retain(|o| {
                !["upperdir=", "workdir=", "lowerdir=", VOLATILE, "rw"]
                    .iter()
                    .any(|p| o.starts_with(p))
            });
            let all: Vec<String> =
                upper.into_iter().chain(lowers).map(|p| p.to_string_lossy().into_owned()).collect();
            m.options.push(format!("lowerdir={}", all.join(":")));
        } else {
            m.options.retain(|o| o != "rw" && o != "ro");
            m.options.push("ro".into());
        }
    }
    mounts
}

/// The option that keeps an overlay from writing everything to the disk when it is unmounted.
const VOLATILE: &str = "volatile";

/// The same file system, without waiting for the disk when it is unmounted: `durable.rs` sees to
/// that.
pub(crate) fn unsynced(mounts: &[Mount]) -> Vec<Mount> {
    let mut mounts = mounts.to_vec();
    for m in &mut mounts {
        if m.kind == "overlay" && m.options.iter().any(|o| o.starts_with("upperdir=")) {
            m.options.push(VOLATILE.into());
        }
    }
    mounts
}

/// Removes the mark that forbids mounting an overlay again after it was mounted without sync. Only
/// mounting looks at it, so it can go as soon as the mount stands: a process may be given the same
/// file system next.
fn unmark(workdir: &Path) {
    let mark = workdir.join("work/incompat");
    if let Err(e) = fs::remove_dir_all(&mark)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(mark = %mark.display(), error = %e, "an overlay cannot be mounted again");
    }
}

/// The directory that whoever writes through `m` writes into.
pub(crate) fn written_in(m: &Mount) -> Option<PathBuf> {
    match overlay_dirs(m) {
        Some((upper, _)) => upper,
        None => is_bind(m).then(|| Path::new(&m.source).join(&m.target)),
    }
}

/// Upper directory and lower directories, topmost first, of an overlay.
fn overlay_dirs(m: &Mount) -> Option<(Option<PathBuf>, Vec<PathBuf>)> {
    if m.kind != "overlay" {
        return None;
    }
    let option = |name: &str| m.options.iter().find_map(|o| o.strip_prefix(name));
    let lowers =
        option("lowerdir=").map(|l| l.split(':').map(PathBuf::from).collect()).unwrap_or_default();
    Some((option("upperdir=").map(PathBuf::from), lowers))
}

/// The tree of an active snapshot's own layer, or of a committed one's as its view shows it.
/// `parent` is a mount of the parent, asked for only when the snapshotter has no layers of its own
/// to look at.
pub(crate) enum OwnLayer {
    /// It is all there.
    Tree(LayerTree),
    /// It has to be compared with its parent; this is the whole.
    Whole(PathBuf),
}

pub(crate) fn own_layer(mounts: &[Mount], has_parent: bool) -> Result<OwnLayer> {
    let unknown = || {
        let kinds: Vec<&str> = mounts.iter().map(|m| m.kind.as_str()).collect();
        Fault::unimplemented(format!(
            "finding the layer in a snapshot with mounts of kind {kinds:?}"
        ))
        .hint("use a snapshotter whose mounts are overlays or binds: overlayfs, native")
    };
    let [only] = mounts else { return Err(unknown()) };
    if let Some((upper, mut lowers)) = overlay_dirs(only) {
        let top = match upper {
            Some(upper) => upper,
            None if lowers.is_empty() => return Err(unknown()),
            None => lowers.remove(0),
        };
        let marks = if only.options.iter().any(|o| o == "userxattr") {
            Marks::User
        } else {
            Marks::Trusted
        };
        let lowest = lowers.is_empty() && !has_parent;
        return Ok(OwnLayer::Tree(if lowest {
            LayerTree::lowest(top)
        } else {
            LayerTree::overlay(top, lowers, marks)
        }));
    }
    if !is_bind(only) {
        return Err(unknown());
    }
    let source = PathBuf::from(&only.source).join(&only.target);
    Ok(if has_parent { OwnLayer::Whole(source) } else { OwnLayer::Tree(LayerTree::lowest(source)) })
}

/// Unmounts what an earlier life left mounted below `root` and removes the mount points.
pub(crate) fn sweep(root: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Fault::io("read the mount table", e))?;
    let points: Vec<PathBuf> = table
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .map(|p| PathBuf::from(unescaped(p)))
        .collect();
    for point in points.iter().rev().filter(|p| p.starts_with(root) && *p != root) {
        unmount(point, UnmountFlags::DETACH).map_err(|e| {
            Fault::io(format!("unmount {}, left by an earlier life", point.display()), e.into())
        })?;
    }
    if let Ok(entries) = fs::read_dir(root) {
        for entry in entries.flatten() {
            let _ = fs::remove_dir(entry.path());
        }
    }
    fs::create_dir_all(root).map_err(|e| Fault::io(format!("make {}", root.display()), e))
}

/// A path of the mount table: blanks and the like are written in octal.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |t, (from, to)| t.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> Mount {
        Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: options.iter().map(|o| o.to_string()).collect(),
        }
    }

    #[test]
    fn an_overlay_for_readers_has_its_upper_directory_on_top() {
        let m =
            read_only(&[overlay(&["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"])]);
        assert_eq!(m[0].options, ["index=off", "lowerdir=/u:/a:/b"]);
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
        let [l, u, w] = ["l", "u", "w"].map(|n| path(n).display().to_string());
        let writable =
            overlay(&[&format!("lowerdir={l}"), &format!("upperdir={u}"), &format!("workdir={w}")]);
        let bind = |options: &[&str]| Mount {
            kind: "bind".into(),
            source: path("source").display().to_string(),
            ..overlay(options)
        };
        for m in unsynced(&[writable])
            .into_iter()
            .chain([bind(&["rbind", "rw"]), bind(&["rbind", "ro", "exec", "suid"])])
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

    #[test]
    fn the_own_layer_is_the_upper_or_the_topmost_directory() {
        for (options, want) in [
            (
                &["upperdir=/u", "workdir=/w", "lowerdir=/a:/b"][..],
                LayerTree::overlay("/u", vec!["/a".into(), "/b".into()], Marks::Trusted),
            ),
            (
                &["lowerdir=/a:/b", "userxattr"][..],
                LayerTree::overlay("/a", vec!["/b".into()], Marks::User),
            ),
        ] {
            assert!(
                matches!(own_layer(&[overlay(options)], true), Ok(OwnLayer::Tree(t)) if t == want)
            );
        }
    }
}
