//! Removal of what a runtime makes in a root filesystem only to mount on it (row
//! `exec.cleanstubs`).
//!
//! [`Stubs::before`] notes which mount points do not exist; after the process [`Stubs::remove`]
//! takes those that are empty out of the snapshot's writable directory, gives their parents the
//! times they had, and undoes parents that were copied up for nothing. A step that changes nothing
//! then leaves an empty layer. What was noted can be stored (serde), for a process that outlives
//! who started it.

use crate::{
    RootView,
    noted::{Noted, marks, nanos, timestamps},
    open_beneath,
};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use shipway_storage::{
    Mount,
    overlay::{Marks, is_whiteout},
};
use std::{
    collections::HashMap,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

/// Mount points that every container has.
const ALWAYS: [&str; 5] = ["/etc/resolv.conf", "/etc/hosts", "/proc", "/sys", "/dev"];
/// A directory whose time is this close to a stub's was last changed by making the stub.
const TICK_NANOS: i128 = 4_000_000;

/// The mount points of one process that did not exist before it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Stubs {
    upper: PathBuf,
    /// The marks of the overlay, if it is one.
    #[serde(with = "marks")]
    marks: Option<Marks>,
    /// Missing paths, deepest first; and whether the upper directory hides something there.
    missing: Vec<(String, bool)>,
    /// The existing parents of missing paths.
    parents: HashMap<String, Parent>,
    /// When this was noted, in nanoseconds since the epoch.
    noted: i128,
}

#[derive(Debug, Serialize, Deserialize)]
struct Parent {
    stat: Noted,
    in_upper: bool,
}

/// The directory that takes what a process writes through `mounts`, and the marks of the overlay
/// whose upper one it is, if it is.
pub(crate) fn writable(mounts: &[Mount]) -> Option<(PathBuf, Option<Marks>)> {
    let [mount] = mounts else { return None };
    let marks = match mount {
        Mount::Overlay(overlay) => Some(overlay.marks()),
        _ => None,
    };
    Some((mount.writable_dir()?.to_owned(), marks))
}

pub(crate) fn parent_of(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(i) => &path[..i],
    }
}

impl Stubs {
    /// Notes which of `targets` and of every container's mount points are missing in `root`, which
    /// is made of `mounts`. With `recursive` their missing parents count too. `None` if nothing can
    /// be left behind.
    pub fn before<'a>(
        root: &RootView,
        mounts: &[Mount],
        targets: impl IntoIterator<Item = &'a str>,
        recursive: bool,
    ) -> Option<Self> {
        let (upper, marks) = writable(mounts)?;
        let upper_view = RootView::of_directory(&upper).ok()?;
        let mut stubs =
            Self { upper, marks, missing: Vec::new(), parents: HashMap::new(), noted: now() };
        for target in ALWAYS.into_iter().chain(targets) {
            let Some(mut path) = root.real_path(target) else { continue };
            while path != "/" && root.lstat(&path).is_err() {
                if !stubs.missing.iter().any(|(p, _)| *p == path) {
                    let hides =
                        marks.is_some() && upper_view.lstat(&path).is_ok_and(|s| is_whiteout(&s));
                    stubs.missing.push((path.clone(), hides));
                }
                path = parent_of(&path).to_owned();
                if let Ok(stat) = root.lstat(&path) {
                    let in_upper = upper_view.lstat(&path).is_ok();
                    stubs
                        .parents
                        .entry(path.clone())
                        .or_insert(Parent { stat: Noted::of(&stat), in_upper });
                }
                if !recursive {
                    break;
                }
            }
        }
        stubs.missing.sort_by_key(|(p, _)| std::cmp::Reverse(p.matches('/').count()));
        (!stubs.missing.is_empty()).then_some(stubs)
    }

    /// Removes those that are there and empty. Blocks. What cannot be removed stays: it is not
    /// worth failing a step.
    pub fn remove(self) {
        let Ok(upper) = RootView::of_directory(&self.upper) else { return };
        for (path, hides) in &self.missing {
            self.remove_one(&upper, path, *hides);
        }
        let mut parents: Vec<(&String, &Parent)> = self.parents.iter().collect();
        parents.sort_by_key(|(p, _)| std::cmp::Reverse(p.matches('/').count()));
        let Some(marks) = self.marks else { return };
        for (path, parent) in parents.into_iter().filter(|(_, parent)| !parent.in_upper) {
            undo_copy_up(&upper, path, parent, marks);
        }
    }

    fn remove_one(&self, upper: &RootView, path: &str, hides: bool) {
        let (above, name) = (parent_of(path), path.rsplit('/').next().unwrap_or_default());
        let Ok(dir) = open_plain(upper, above, OFlags::RDONLY | OFlags::DIRECTORY) else { return };
        let Ok(stub) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else { return };
        let Ok(dir_stat) = rustix::fs::fstat(&dir) else { return };
        let flags = match FileType::from_raw_mode(stub.st_mode) {
            FileType::Directory => AtFlags::REMOVEDIR,
            FileType::RegularFile if stub.st_size == 0 => AtFlags::empty(),
            _ => return,
        };
        // A directory with something in it refuses.
        if rustix::fs::unlinkat(&dir, name, flags).is_err() {
            return;
        }
        if hides {
            let _ = rustix::fs::mknodat(&dir, name, FileType::CharacterDevice, Mode::empty(), 0);
        }
        // A time from before the process was given to the directory by the process.
        let made_now = (nanos(&dir_stat) - nanos(&stub)).abs() <= TICK_NANOS
            && nanos(&dir_stat) >= self.noted - TICK_NANOS;
        let times = match self.parents.get(above) {
            Some(parent) if made_now => parent.stat,
            _ => Noted::of(&dir_stat),
        };
        let _ = rustix::fs::futimens(&dir, &times.timestamps());
    }
}

/// Removes the copies of unchanged directories that only exist because something was made and
/// removed in them.
fn undo_copy_up(upper: &RootView, path: &str, before: &Parent, marks: Marks) {
    let (mut path, mut first) = (path.to_owned(), true);
    while path != "/" {
        let Ok(dir) = open_plain(upper, &path, OFlags::RDONLY | OFlags::DIRECTORY) else { return };
        let Ok(now) = rustix::fs::fstat(&dir) else { return };
        let same = before.stat.is_same(&now);
        // Further up nothing is known of the state before, but nothing was made there either: an
        // overlay copies directories up as they are.
        if (first && !same) || marks.has_opaque(&dir) {
            return;
        }
        let above = parent_of(&path).to_owned();
        let Ok(parent) = open_plain(upper, &above, OFlags::RDONLY | OFlags::DIRECTORY) else {
            return;
        };
        let Ok(times) = rustix::fs::fstat(&parent) else { return };
        let name = path.rsplit('/').next().unwrap_or_default();
        if rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).is_err() {
            return;
        }
        let _ = rustix::fs::futimens(&parent, &timestamps(&times));
        first = false;
        if above != "/" {
            // A grandparent may have been changed by the process: leave it.
            return;
        }
        path = above;
    }
}

/// Opens `path` without following any link.
pub(crate) fn open_plain(root: &RootView, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = path.trim_start_matches('/');
    open_beneath(root, if path.is_empty() { "." } else { path }, flags)
}

fn now() -> i128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i128::try_from(now.as_nanos()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Access;
    use shipway_storage::{Overlay, Upper};
    use std::{fs, path::Path, time::Duration};

    fn names(dir: &Path) -> Vec<String> {
        let mut all: Vec<String> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        all.sort();
        all
    }

    fn lab() -> (tempfile::TempDir, Vec<Mount>) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |n: &str| dir.path().join(n).display().to_string();
        for name in ["low", "low/etc", "low/real", "up", "work"] {
            fs::create_dir(path(name)).expect("mkdir");
        }
        std::os::unix::fs::symlink("/real", path("low/link")).expect("symlink");
        let old =
            fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1000));
        fs::File::open(path("low/etc")).expect("open").set_times(old).expect("set times");
        let mounts = vec![Mount::Overlay(Overlay {
            upper: Some(Upper { dir: path("up").into(), work: path("work").into() }),
            lower: vec![path("low").into()],
            ..Overlay::default()
        })];
        (dir, mounts)
    }

    #[test]
    fn nothing_is_left_of_mount_points() {
        assert!(rustix::process::geteuid().is_root(), "run as root, as `cargo xtask test` does");
        let (dir, mounts) = lab();
        let before = RootView::open(&mounts, Access::Read).expect("look");
        let stubs = Stubs::before(&before, &mounts, ["/link/a/b", "/used", "/x/y"], true)
            .expect("stubs are missing");
        drop(before);
        // What a runtime and a process do.
        let root = RootView::open(&mounts, Access::Write).expect("mount");
        for path in ["/proc", "/real/a/b", "/used", "/x/y"] {
            root.make_dirs(path, 0o755, 0, 0).expect("make directories");
        }
        for path in ["/etc/hosts", "/etc/resolv.conf", "/used/file"] {
            drop(
                root.open_at(path, OFlags::WRONLY | OFlags::CREATE, Mode::from_raw_mode(0o644))
                    .expect("create"),
            );
        }
        // As one does who did not note them.
        let stored = serde_json::to_string(&stubs).expect("stubs are data");
        serde_json::from_str::<Stubs>(&stored).expect("stubs").remove();
        drop(root);
        assert_eq!(names(&dir.path().join("up")), ["used"]);
        assert_eq!(names(&dir.path().join("up/used")), ["file"]);
    }

    #[test]
    fn a_directory_that_was_changed_keeps_its_change() {
        assert!(rustix::process::geteuid().is_root(), "run as root, as `cargo xtask test` does");
        let (dir, mounts) = lab();
        let before = RootView::open(&mounts, Access::Read).expect("look");
        let stubs = Stubs::before(&before, &mounts, [], false).expect("stubs are missing");
        let root = RootView::open(&mounts, Access::Write).expect("mount");
        drop(
            root.open_at("/etc/hosts", OFlags::WRONLY | OFlags::CREATE, Mode::from_raw_mode(0o644))
                .expect("create"),
        );
        let touched = SystemTime::UNIX_EPOCH + Duration::from_secs(5000);
        let etc = root.open_at("/etc", OFlags::RDONLY, Mode::empty()).expect("open");
        fs::File::from(etc).set_modified(touched).expect("touch");
        stubs.remove();
        let etc = dir.path().join("up/etc");
        assert_eq!(names(&etc), Vec::<String>::new());
        assert_eq!(fs::metadata(&etc).and_then(|m| m.modified()).expect("stat"), touched);
    }

    #[test]
    fn a_time_that_a_process_gave_to_all_directories_stays() {
        assert!(rustix::process::geteuid().is_root(), "run as root, as `cargo xtask test` does");
        let (dir, mounts) = lab();
        let before = RootView::open(&mounts, Access::Read).expect("look");
        let stubs =
            Stubs::before(&before, &mounts, ["/real/a/b"], true).expect("stubs are missing");
        let root = RootView::open(&mounts, Access::Write).expect("mount");
        root.make_dirs("/real/a/b", 0o755, 0, 0).expect("make directories");
        let touched = SystemTime::UNIX_EPOCH + Duration::from_secs(5000);
        for path in ["/real/a", "/real"] {
            fs::File::from(root.open_at(path, OFlags::RDONLY, Mode::empty()).expect("open"))
                .set_modified(touched)
                .expect("touch");
        }
        stubs.remove();
        let real = dir.path().join("up/real");
        assert_eq!(names(&real), Vec::<String>::new());
        assert_eq!(fs::metadata(&real).and_then(|m| m.modified()).expect("stat"), touched);
    }
}
