//! What lies below a directory of a layer: the lower directories of an overlay as one, or the tree
//! before the changes.

use crate::{
    attributes::{self, Pairs, XattrSource},
    loss::Losses,
    stat::{broken, time_of, unpacked},
};
use rustix::fs::{AtFlags, CWD, FileType, Stat, StatxFlags};
use shipway_fault::Result;
use shipway_storage::overlay::{Marks, is_whiteout};
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Directories that merge into one, topmost first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Below {
    dirs: Vec<PathBuf>,
    /// The marks of the overlay whose layers they are, if they are.
    marks: Option<Marks>,
}

/// What is seen below under one name.
#[derive(Default)]
pub(crate) struct LowerEntry {
    /// The topmost thing of that name, unless it is hidden.
    pub thing: Option<(PathBuf, Stat)>,
    /// What lies in it, if it is a directory.
    pub below: Below,
}

impl Below {
    pub fn layers(dirs: Vec<PathBuf>, marks: Marks) -> Self {
        Self { dirs, marks: Some(marks) }
    }

    pub fn tree(dir: PathBuf) -> Self {
        Self { dirs: vec![dir], marks: None }
    }

    /// What is seen of `name`.
    pub fn look(&self, name: &OsStr) -> Result<LowerEntry> {
        let mut seen =
            LowerEntry { thing: None, below: Self { dirs: Vec::new(), marks: self.marks } };
        for dir in &self.dirs {
            let path = dir.join(name);
            let stat = match rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(broken(&path, e.into())),
            };
            if self.marks.is_some() && is_whiteout(&stat) {
                break;
            }
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let ends = !directory || self.marks.is_some_and(|marks| marks.is_opaque(&path));
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
                let device =
                    self.marks.is_some() && entry.file_type().map_err(failed)?.is_char_device();
                if device && entry.metadata().map_err(failed)?.rdev() == 0 {
                    hidden.insert(name);
                } else {
                    seen.insert(name);
                }
            }
        }
        Ok(seen)
    }

    /// Whether the thing at a path, open as a file if it is a file or directory and with the
    /// `found` attributes (those that a layer carries, and others), is the `old` one: but for
    /// access times, and for times that a directory got because names in it changed. Contents are
    /// read where nothing else differs. Of what is not in the layer then, `losses` notes what
    /// unpacking would not give back.
    pub fn is_same(
        &self,
        (old_path, old): &(PathBuf, Stat),
        (path, new, file): (&Path, &Stat, Option<&File>),
        (carried, others): (&Pairs, &Pairs),
        shown: &[u8],
        losses: &mut Losses,
    ) -> Result<bool> {
        if (old.st_dev, old.st_ino) == (new.st_dev, new.st_ino) {
            return Ok(true);
        }
        if (old.st_mode, old.st_uid, old.st_gid, old.st_rdev)
            != (new.st_mode, new.st_uid, new.st_gid, new.st_rdev)
        {
            return Ok(false);
        }
        let kind = FileType::from_raw_mode(new.st_mode);
        // Times that a tar does not distinguish are one time: the file may have got it, and
        // must look the same before and after.
        let (then, now) = (time_of(old), time_of(new));
        let other_time = now != then && unpacked(now) != then;
        let differs = match kind {
            // Only in upper directories is a set time one that the step has set: copying a tree
            // sets all of them.
            FileType::Directory => {
                other_time && self.marks.is_some() && file.is_some_and(|dir| was_set(dir, new))
            }
            _ => other_time || old.st_size != new.st_size,
        };
        if differs {
            return Ok(false);
        }
        let before = attributes::read(XattrSource::At(old_path), self.marks, old_path)?;
        if before.carried != *carried {
            return Ok(false);
        }
        let same = match (kind, file) {
            (FileType::Symlink, _) => fs::read_link(old_path).ok() == fs::read_link(path).ok(),
            (FileType::RegularFile, Some(file)) => {
                let old = File::open(old_path).map_err(|e| broken(old_path, e))?;
                same_contents(&old, file).map_err(|e| broken(path, e))?
            }
            _ => true,
        };
        if same {
            losses.difference(shown, &before.lost, others);
            match self.marks {
                Some(_) => losses.same_below(shown, new, old),
                None => losses.same(shown, new, old),
            }
        }
        Ok(same)
    }
}

/// Whether the time of a directory was set: one that it got because names in it changed is
/// between its birth in the upper directory and the last change of its status. Where the file
/// system does not know the birth, it is the latter.
fn was_set(dir: &File, stat: &Stat) -> bool {
    let born = rustix::fs::statx(dir, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let born = born
        .filter(|s| s.stx_mask & StatxFlags::BTIME.bits() != 0)
        .map(|s| (s.stx_btime.tv_sec, i64::from(s.stx_btime.tv_nsec)));
    !(born.unwrap_or(changed(stat))..=changed(stat)).contains(&time_of(stat))
}

/// Seconds and nanoseconds of the last change of status.
#[allow(clippy::unnecessary_cast)]
fn changed(stat: &Stat) -> (i64, i64) {
    (stat.st_ctime as i64, stat.st_ctime_nsec as i64)
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
