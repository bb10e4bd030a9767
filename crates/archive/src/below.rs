//! What lies below a directory of a layer: the lower directories of an overlay as one, or the tree before the changes.

use crate::tree::{broken, xattrs_of};
use rustix::fs::{AtFlags, CWD, FileType, Stat};
use shipway_fault::Result;
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// Directories that merge into one, topmost first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Below {
    dirs: Vec<PathBuf>,
    /// Whether they have an overlay's marks.
    overlay: bool,
}

/// What is seen below under one name.
#[derive(Default)]
pub(crate) struct Seen {
    /// The topmost thing of that name, unless it is hidden.
    pub thing: Option<(PathBuf, Stat)>,
    /// What lies in it, if it is a directory.
    pub below: Below,
}

impl Below {
    pub fn layers(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, overlay: true }
    }

    pub fn tree(dir: PathBuf) -> Self {
        Self { dirs: vec![dir], overlay: false }
    }

    /// What is seen of `name`.
    pub fn look(&self, name: &OsStr) -> Result<Seen> {
        let mut seen = Seen { thing: None, below: Self { dirs: Vec::new(), overlay: self.overlay } };
        for dir in &self.dirs {
            let path = dir.join(name);
            let stat = match rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(broken(&path, e.into())),
            };
            if self.overlay && is_whiteout(&stat) {
                break;
            }
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let ends = !directory || self.overlay && is_opaque(&path);
            if directory {
                seen.below.dirs.push(path.clone());
            }
            seen.thing.get_or_insert((path, stat));
            if ends {
                break;
            }
        }
        Ok(seen)
    }

    /// All names that are seen.
    pub fn names(&self) -> Result<BTreeSet<OsString>> {
        let (mut seen, mut hidden) = (BTreeSet::new(), BTreeSet::new());
        for dir in &self.dirs {
            let failed = |e| broken(dir, e);
            for entry in fs::read_dir(dir).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let name = entry.file_name();
                if seen.contains(&name) || hidden.contains(&name) {
                    continue;
                }
                let device = self.overlay && entry.file_type().map_err(failed)?.is_char_device();
                if device && entry.metadata().map_err(failed)?.rdev() == 0 {
                    hidden.insert(name);
                } else {
                    seen.insert(name);
                }
            }
        }
        Ok(seen)
    }

    /// Whether the thing at `path`, open as `file` if it is a file, is the `old` one: but for the times of a directory, which change with its names, and
    /// for access times. Contents are read where nothing else differs, for what looks unchanged has seldom been written at all; not those of whole
    /// trees, which are mostly unchanged.
    pub fn is_same(&self, (old_path, old): &(PathBuf, Stat), path: &Path, new: &Stat, file: Option<&File>) -> Result<bool> {
        if (old.st_dev, old.st_ino) == (new.st_dev, new.st_ino) {
            return Ok(true);
        }
        if (old.st_mode, old.st_uid, old.st_gid, old.st_rdev) != (new.st_mode, new.st_uid, new.st_gid, new.st_rdev) {
            return Ok(false);
        }
        let kind = FileType::from_raw_mode(new.st_mode);
        let written = |s: &Stat| (s.st_size, s.st_mtime, s.st_mtime_nsec);
        if kind != FileType::Directory && written(old) != written(new) {
            return Ok(false);
        }
        match kind {
            FileType::Symlink => Ok(fs::read_link(old_path).ok() == fs::read_link(path).ok()),
            FileType::Directory => Ok(xattrs_of(old_path)? == xattrs_of(path)?),
            FileType::RegularFile if xattrs_of(old_path)? != xattrs_of(path)? => Ok(false),
            FileType::RegularFile => match file.filter(|_| self.overlay) {
                Some(file) => {
                    let old = File::open(old_path).map_err(|e| broken(old_path, e))?;
                    same_contents(&old, file).map_err(|e| broken(path, e))
                }
                None => Ok(true),
            },
            _ => Ok(true),
        }
    }
}

/// Compares without moving either file's position.
fn same_contents(one: &File, other: &File) -> std::io::Result<bool> {
    let (mut a, mut b) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut at = 0;
    loop {
        let n = one.read_at(&mut a, at)?;
        if n == 0 {
            return Ok(other.read_at(&mut b[..1], at)? == 0);
        }
        match other.read_exact_at(&mut b[..n], at) {
            Ok(()) if a[..n] == b[..n] => at += n as u64,
            Ok(()) => return Ok(false),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(e) => return Err(e),
        }
    }
}

/// The overlay's mark of a name that is gone.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether the overlay hides what lies below the directory.
pub(crate) fn is_opaque(dir: &Path) -> bool {
    let mut value = [0u8; 8];
    OPAQUE.iter().any(|name| matches!(rustix::fs::lgetxattr(dir.as_os_str().as_bytes(), *name, &mut value), Ok(1) if value[0] == b'y'))
}
