//! What is done to a checked out tree on disk. Blocks.

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use shipway_fault::{Fault, Result};
use std::{fs, path::Path};

/// Deepest directory that is walked.
const MAX_DEPTH: usize = 1024;

/// Moves what is in `from`/`subdir` into `to`, which is above `from`, and removes `from`.
pub(super) fn lift(from: &Path, subdir: &str, to: &Path) -> Result<()> {
    let mut dir = from.to_owned();
    for part in subdir.split('/') {
        dir.push(part);
        // A link would lead out of the repository.
        let real = fs::symlink_metadata(&dir).is_ok_and(|m| m.is_dir());
        if !real {
            return Err(Fault::not_found(format!(
                "invalid subdir {subdir}: {part} is not a directory of the repository"
            )));
        }
    }
    let failed = |e| Fault::io(format!("move {subdir} of the repository"), e);
    for entry in fs::read_dir(&dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        fs::rename(entry.path(), to.join(entry.file_name())).map_err(failed)?;
    }
    fs::remove_dir_all(from).map_err(failed)
}

/// Gives everything below `root`, and `root`, the time `seconds`.
pub(super) fn set_times(root: &Path, seconds: i64) -> Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    walk(root, 0, &|path| {
        utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| Fault::io(format!("set the time of {}", path.display()), e.into()))
    })
}

/// Children first, so that a directory's time is set after its entries were touched.
fn walk(path: &Path, depth: usize, visit: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    let failed = |e| Fault::io(format!("read {}", path.display()), e);
    if depth > MAX_DEPTH {
        return Err(Fault::invalid("the repository's directories are nested too deeply"));
    }
    if fs::symlink_metadata(path).map_err(failed)?.is_dir() {
        for entry in fs::read_dir(path).map_err(failed)? {
            walk(&entry.map_err(failed)?.path(), depth + 1, visit)?;
        }
    }
    visit(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_subdirectory_becomes_the_root_and_links_lead_nowhere() {
        let root = tempfile::tempdir().unwrap();
        let from = root.path().join("checkout");
        fs::create_dir_all(from.join("a/b/c")).unwrap();
        fs::write(from.join("a/b/f"), "").unwrap();
        symlink("/etc", from.join("link")).unwrap();
        assert!(lift(&from, "link", root.path()).is_err());
        assert!(lift(&from, "a/none", root.path()).is_err());
        lift(&from, "a/b", root.path()).unwrap();
        assert!(root.path().join("f").exists() && root.path().join("c").is_dir() && !from.exists());
        set_times(root.path(), 1000).unwrap();
        assert_eq!(fs::metadata(root.path().join("c")).unwrap().mtime(), 1000);
    }
}
