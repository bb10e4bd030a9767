//! What is known of files in layers that a snapshotter serves, for checksums of states on top of
//! them: a file that no layer above changed need not be fetched to be hashed.

use crate::{layer::LayerContents, mount::is_mount_point};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, FileType, OFlags},
    io::Errno,
};
use shipway_oci::Digest;
use shipway_rootfs::{open_beneath, open_directory};
use shipway_storage::Mount;
use shipway_treehash::{KnownContents, PIECE, TreeFile};
use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
};

/// Files that are asked about at once.
const BATCH: usize = 512;
/// Bits of an inode's number that an overlay leaves as they are in the layer; those above may tell
/// the layer (`xino`).
const INODE_BITS: u64 = (1 << 48) - 1;
/// Extended attributes by which an overlay finds what is below a directory under another name.
const REDIRECTS: [&str; 2] = ["trusted.overlay.redirect", "user.overlay.redirect"];

/// Files of a state that `mounts` show.
pub(crate) struct LowerFiles<'a> {
    pub mounts: &'a [Mount],
    pub contents: &'a dyn LayerContents,
}

/// The layers of a state as an overlay has them, topmost first.
struct Lowers(Vec<Lower>);

struct Lower {
    path: PathBuf,
    directory: OwnedFd,
    /// Whether it may be served: it is a mount point, which no snapshotter makes of what it
    /// unpacked.
    is_served: bool,
}

impl Lowers {
    /// Those of what `mounts` show; `None` if none of them is served, or it is not known how it is
    /// put together.
    fn of(mounts: &[Mount]) -> Option<Self> {
        let paths = match mounts {
            [Mount::Overlay(overlay)] if overlay.upper.is_none() => &overlay.lower[..],
            [Mount::Bind(bind)] => std::slice::from_ref(&bind.source),
            _ => return None,
        };
        let lower = |path: &PathBuf| {
            let directory = open_directory(path).ok()?;
            Some(Lower { path: path.clone(), directory, is_served: is_mount_point(path)? })
        };
        let lowers: Vec<Lower> = paths.iter().map(lower).collect::<Option<_>>()?;
        lowers.iter().any(|lower| lower.is_served).then_some(Self(lowers))
    }

    /// The same directory of each layer that has it. `None` if some of them may be another one
    /// for the overlay.
    fn directories(&self, path: &Path) -> Option<Vec<Option<OwnedFd>>> {
        let directory = |lower: &Lower| {
            // Nobody renamed anything in a layer that is served.
            if !lower.is_served && has_redirect(lower, path)? {
                return None;
            }
            let at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            match open_beneath(&lower.directory, at.as_os_str().as_bytes(), DIRECTORY) {
                Ok(found) => Some(Some(found)),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Some(None),
                Err(_) => None,
            }
        };
        self.0.iter().map(directory).collect()
    }

    /// The layer that the overlay shows `file` of, and its inode there, if that layer is served.
    ///
    /// It is the topmost one that has something at the path: a layer that hides those below shows
    /// the file itself, or is below the one that does.
    fn origin(&self, directories: &[Option<OwnedFd>], file: &TreeFile<'_>) -> Option<(usize, u64)> {
        let name = file.path.file_name()?;
        let layers = directories.iter().enumerate();
        for (n, directory) in layers.filter_map(|(n, found)| Some((n, found.as_ref()?))) {
            let found = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                found => found.ok()?,
            };
            let mtime = found
                .st_mtime
                .saturating_mul(1_000_000_000)
                .saturating_add(found.st_mtime_nsec as i64);
            let is_same = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
                && found.st_ino & INODE_BITS == file.inode & INODE_BITS
                && u64::try_from(found.st_size) == Ok(file.size)
                && mtime == file.mtime;
            return (self.0[n].is_served && is_same).then_some((n, found.st_ino));
        }
        None
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW);

/// Whether the overlay goes on below another name somewhere on the way to `path`; `None` if that
/// cannot be known.
fn has_redirect(lower: &Lower, path: &Path) -> Option<bool> {
    let mut way = PathBuf::new();
    for component in path.components() {
        let Component::Normal(name) = component else { return None };
        way.push(name);
        match open_beneath(&lower.directory, way.as_os_str().as_bytes(), DIRECTORY) {
            Ok(directory) if is_redirect(directory.as_fd())? => return Some(true),
            Ok(_) => {}
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Some(false),
            Err(_) => return None,
        }
    }
    Some(false)
}

fn is_redirect(directory: impl AsFd) -> Option<bool> {
    for name in REDIRECTS {
        match rustix::fs::fgetxattr(&directory, name, &mut [0_u8; 0][..]) {
            Ok(_) => return Some(true),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(_) => return None,
        }
    }
    Some(false)
}

impl KnownContents for LowerFiles<'_> {
    fn pieces(&self, files: &[TreeFile<'_>]) -> Vec<Option<Vec<Digest>>> {
        let mut known = vec![None; files.len()];
        let Some(lowers) = Lowers::of(self.mounts) else { return known };
        let mut wanted: BTreeMap<usize, Vec<(usize, u64)>> = BTreeMap::new();
        // Files of a directory come one after the other.
        let mut at: Option<(&Path, Option<Vec<Option<OwnedFd>>>)> = None;
        for (n, file) in files.iter().enumerate() {
            let Some(parent) = file.path.parent() else { continue };
            if at.as_ref().is_none_or(|(path, _)| *path != parent) {
                at = Some((parent, lowers.directories(parent)));
            }
            let directories = at.as_ref().and_then(|(_, found)| found.as_ref());
            if let Some((layer, inode)) = directories.and_then(|found| lowers.origin(found, file)) {
                wanted.entry(layer).or_default().push((n, inode));
            }
        }
        for (layer, files) in wanted {
            let path = &lowers.0[layer].path;
            for batch in files.chunks(BATCH) {
                let inodes: Vec<u64> = batch.iter().map(|(_, inode)| *inode).collect();
                match self.contents.pieces(path, &inodes, PIECE) {
                    Ok(found) => batch.iter().zip(found).for_each(|((n, _), f)| known[*n] = f),
                    Err(fault) => {
                        tracing::debug!(layer = %path.display(), %fault, "files of a layer are read to be hashed");
                        break;
                    }
                }
            }
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use rustix::{
        fs::{CWD, Mode, XattrFlags, makedev, mknodat, setxattr},
        mount::{MountFlags, UnmountFlags, mount, unmount},
    };
    use shipway_fault::{Fault, Result};
    use shipway_storage::Overlay;
    use shipway_treehash::{Selector, TreeIndex};
    use std::{fs, os::unix::fs::MetadataExt as _};

    /// Serves one layer; knows the contents of its files, whose names it notes.
    struct Served {
        layer: PathBuf,
        asked: Mutex<Vec<String>>,
    }

    impl LayerContents for Served {
        fn pieces(
            &self,
            layer: &Path,
            inodes: &[u64],
            length: u64,
        ) -> Result<Vec<Option<Vec<Digest>>>> {
            assert_eq!(length, PIECE);
            if layer != self.layer {
                return Err(Fault::not_found("not a layer of mine"));
            }
            let mut all = BTreeMap::new();
            walk(layer, &mut |path| {
                all.insert(fs::symlink_metadata(path).unwrap().ino(), path.to_owned());
            });
            let known = |inode: &u64| {
                let path = &all[inode];
                let name = path.strip_prefix(layer).unwrap().display().to_string();
                self.asked.lock().push(name);
                Some(vec![Digest::of(fs::read(path).unwrap())])
            };
            Ok(inodes.iter().map(known).collect())
        }
    }

    fn walk(dir: &Path, each: &mut dyn FnMut(&Path)) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            each(&path);
            if path.is_dir() && !path.is_symlink() {
                walk(&path, each);
            }
        }
    }

    /// What is mounted for a test.
    struct Mounted(Vec<PathBuf>);

    impl Mounted {
        fn mount(&mut self, kind: &str, at: &Path, options: &str) {
            fs::create_dir_all(at).unwrap();
            let options = std::ffi::CString::new(options).unwrap();
            mount(kind, at, kind, MountFlags::empty(), &*options).unwrap();
            self.0.push(at.to_owned());
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            for at in self.0.iter().rev() {
                let _ = unmount(at, UnmountFlags::DETACH);
            }
        }
    }

    fn put(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    /// Layers over each other as the kernel shows them: only what it shows of the served layer is
    /// asked for, and all checksums are those of what is read.
    #[test]
    fn only_files_that_no_layer_above_changed_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let (served, middle, top) =
            (dir.path().join("served"), dir.path().join("middle"), dir.path().join("top"));
        let mut mounted = Mounted(Vec::new());
        mounted.mount("tmpfs", &served, "");
        let all = [
            ("same", "1"),
            ("dir/same", "2"),
            ("dir/changed", "3"),
            ("dir/touched", "3"),
            ("dir/gone", "4"),
            ("hidden/a", "5"),
            ("was/directory", "6"),
            ("moved/a", "7"),
            ("origin/a", "8"),
            ("deep/er/a", "9"),
            ("empty", ""),
        ];
        put(&served, &all);
        fs::hard_link(served.join("same"), served.join("dir/link")).unwrap();
        std::os::unix::fs::symlink("dir", served.join("other")).unwrap();
        // Of the same size as what they hide.
        put(&middle, &[("dir/changed", "x"), ("own", "x"), ("other/same", "x"), ("was", "x")]);
        put(&top, &[("dir/touched", "3"), ("hidden/a", "x"), ("deep/own", "x")]);
        let white = |path: &str| {
            let mode = Mode::from_raw_mode(0o600);
            mknodat(CWD, top.join(path), FileType::CharacterDevice, mode, makedev(0, 0)).unwrap();
        };
        white("dir/gone");
        setxattr(top.join("hidden"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        fs::create_dir(top.join("moved")).unwrap();
        let redirect = "trusted.overlay.redirect";
        setxattr(top.join("moved"), redirect, b"/origin", XattrFlags::empty()).unwrap();
        white("origin");

        let lower = vec![top.clone(), middle.clone(), served.clone()];
        let root = dir.path().join("overlay");
        let names: Vec<_> = lower.iter().map(|path| path.display().to_string()).collect();
        mounted.mount(
            "overlay",
            &root,
            &format!("redirect_dir=follow,lowerdir={}", names.join(":")),
        );
        let overlay = [Mount::Overlay(Overlay { lower, ..Overlay::default() })];
        let contents = Served { layer: served.clone(), asked: Mutex::default() };
        let files = LowerFiles { mounts: &overlay, contents: &contents };
        for (path, want) in [
            ("/", &["deep/er/a", "dir/link", "dir/same", "same"][..]),
            ("dir", &["dir/link", "dir/same"]),
            ("moved", &[]),
            ("hidden", &[]),
            ("other", &[]),
            ("same", &["same"]),
        ] {
            let selector = Selector::path(path);
            let read = TreeIndex::default().checksum(&root, &selector, None).unwrap();
            let known = TreeIndex::default().checksum(&root, &selector, Some(&files)).unwrap();
            assert_eq!(known, read, "{path}");
            let mut asked = std::mem::take(&mut *contents.asked.lock());
            asked.sort();
            // The two names of an inode.
            let asked: Vec<_> = asked.iter().map(|n| n.replace("dir/link", "same")).collect();
            let want: Vec<_> = want.iter().map(|n| n.replace("dir/link", "same")).collect();
            let sorted = |mut all: Vec<String>| {
                all.sort();
                all
            };
            assert_eq!(sorted(asked), sorted(want), "{path}");
        }
        // A state of one layer is that layer.
        let bind = [Mount::bind(&served, true)];
        let files = LowerFiles { mounts: &bind, contents: &contents };
        let selector = Selector::path("/");
        let read = TreeIndex::default().checksum(&served, &selector, None).unwrap();
        let known = TreeIndex::default().checksum(&served, &selector, Some(&files)).unwrap();
        assert_eq!(known, read);
        assert_eq!(contents.asked.lock().len(), all.len(), "all but the empty one, and the link");
        // Nothing is asked for where nothing is served.
        assert!(Lowers::of(&[Mount::bind(&middle, true)]).is_none());
    }

    /// Whoever does not answer has the files read.
    #[test]
    fn an_error_means_that_nothing_is_known() {
        struct Silent;
        impl LayerContents for Silent {
            fn pieces(&self, _: &Path, _: &[u64], _: u64) -> Result<Vec<Option<Vec<Digest>>>> {
                Err(Fault::unavailable("nobody listens"))
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let served = dir.path().join("served");
        let mut mounted = Mounted(Vec::new());
        mounted.mount("tmpfs", &served, "");
        put(&served, &[("a", "1")]);
        let bind = [Mount::bind(&served, true)];
        let files = LowerFiles { mounts: &bind, contents: &Silent };
        let selector = Selector::path("/");
        let read = TreeIndex::default().checksum(&served, &selector, None).unwrap();
        assert_eq!(TreeIndex::default().checksum(&served, &selector, Some(&files)).unwrap(), read);
    }
}
