//! Paths that a copy must find and select.

use crate::{
    path::RootPath,
    place::{self, Root},
};
use shipway_fault::Result;
use shipway_filesync::{DirMatch, PathFilter, Verdict};
use std::{os::unix::ffi::OsStrExt as _, path::Path};

/// The first of the `required` paths that is not there, or that `patterns` do not select of what is
/// at `selected` in the directory `root`. All are written from the root; links below the selected
/// directory lead nowhere, because no walk enters them.
pub fn first_missing(
    root: &Path,
    selected: &str,
    follow_links: bool,
    patterns: &PathFilter,
    required: &[String],
) -> Result<Option<String>> {
    let (root, selected) = (Root::open(root)?, RootPath::from(selected));
    let real = root.real_entry(&selected, follow_links)?;
    for required in required {
        let path = RootPath::from(&**required);
        let found = path.below(&selected).is_some_and(|below| {
            let (mut at, mut is_dir) = (real.clone(), true);
            let is_there = RootPath::new(below.as_bytes()).names().all(|name| {
                at = at.join(name);
                let stat = root.lstat(&at).ok().filter(|_| is_dir);
                is_dir = stat.as_ref().is_some_and(place::is_dir);
                stat.is_some()
            });
            let below = below.to_string_lossy();
            let leads_on =
                || is_dir && patterns.visit(&below, true, &DirMatch::default()).0 != Verdict::Prune;
            is_there && (below.is_empty() || patterns.keeps(&below) || leads_on())
        });
        if !found {
            return Ok(Some(required.clone()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_paths_are_written_from_the_root() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir_all(dir.path().join("a/b/c")).expect("mkdir");
        std::fs::write(dir.path().join("a/b/c/f"), "").expect("write");
        std::os::unix::fs::symlink("b", dir.path().join("a/link")).expect("symlink");
        let check = |path: &str, include: &str, exclude: &[&str], required: &str, found: bool| {
            let exclude: Vec<String> = exclude.iter().map(|e| (*e).to_owned()).collect();
            let patterns = PathFilter::new(&[include.to_owned()], &exclude).expect("patterns");
            let missing = first_missing(dir.path(), path, true, &patterns, &[required.to_owned()])
                .expect("look");
            let expected = if found { None } else { Some(required.to_owned()) };
            assert_eq!(missing, expected, "{path} {required}");
        };
        check("/a/b", "c/f", &[], "/a/b/c/f", true);
        check("/", "a/b/c/f", &[], "/a/b/c/f", true);
        check("/a", "b", &[], "/a/b", true);
        check("/a/link", "c/f", &[], "/a/link/c/f", true);
        check("/a", "b/*/f", &[], "/a/b", true);
        check("/a", "none", &[], "/a/none", false);
        check("/a", "link/c/f", &[], "/a/link/c/f", false);
        check("/a", "b/c/f/g", &[], "/a/b/c/f/g", false);
        check("/a", "b/c", &["**/c"], "/a/b/c", false);
        check("/none", "x", &[], "/none/x", false);
    }
}
