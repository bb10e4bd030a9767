//! Paths with `*`, `?` and `[…]`, as Go's `filepath.Match` has them: no wildcard crosses a slash.

use crate::{
    path::RootPath,
    place::{Root, fault, is_dir, names},
};
use rustix::{fd::AsFd, fs::FileType};
use shipway_fault::Result;
use shipway_gocompat::{Glob, has_wildcards};

/// The paths of `root` that match `pattern`, sorted. Without wildcards that is the path itself,
/// whether it exists or not.
///
/// The directory that the wildcards begin in must exist. If it is a link, only `follow` enters it;
/// links after the first wildcard are never entered.
pub(crate) fn resolve(root: &Root, pattern: &str, follow: bool) -> Result<Vec<RootPath>> {
    let whole = RootPath::from(pattern);
    let mut parts = whole.names().map(|n| n.to_string_lossy()).peekable();
    let mut fixed = RootPath::default();
    while let Some(part) = parts.next_if(|p| !has_wildcards(p)) {
        fixed = fixed.join(&*part);
    }
    if parts.peek().is_none() {
        return Ok(vec![fixed]);
    }
    let start = root.real_entry(&fixed, follow)?;
    let stat = root.source(&start)?;
    let mut found = if is_dir(&stat) { vec![start] } else { Vec::new() };
    while let Some(part) = parts.next() {
        // As in Go, what is not a pattern matches nothing.
        let Ok(glob) = Glob::new(&part) else { return Ok(Vec::new()) };
        let is_last = parts.peek().is_none();
        let mut next = Vec::new();
        for dir in found {
            let open = root.dir(&dir).map_err(|e| fault("open", &dir, e))?;
            for (name, kind) in names(open.as_fd()).map_err(|e| fault("read", &dir, e))? {
                if !glob.matches(&name.to_string_lossy()) {
                    continue;
                }
                let path = dir.join(&name);
                let leads_on = || match kind {
                    FileType::Unknown => root.lstat(&path).is_ok_and(|s| is_dir(&s)),
                    kind => kind == FileType::Directory,
                };
                if is_last || leads_on() {
                    next.push(path);
                }
            }
        }
        found = next;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt};

    fn lab() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for path in ["a/x.txt", "a/y.txt", "ab/x.txt", "c"] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
            fs::write(path, "").expect("write");
        }
        std::os::unix::fs::symlink("a", dir.path().join("link")).expect("symlink");
        let root = Root::open(dir.path()).expect("open");
        (dir, root)
    }

    #[test]
    fn wildcards_match_within_a_directory() {
        let (_dir, root) = lab();
        let check = |pattern: &str, follow: bool, expected: &[&str]| {
            let found: Vec<String> = resolve(&root, pattern, follow)
                .expect(pattern)
                .iter()
                .map(ToString::to_string)
                .collect();
            assert_eq!(found, expected, "{pattern}");
        };
        check("/a*/x.txt", false, &["/a/x.txt", "/ab/x.txt"]);
        check("*", false, &["/a", "/ab", "/c", "/link"]);
        check("link/*.txt", true, &["/a/x.txt", "/a/y.txt"]);
        check("link/*.txt", false, &[]);
        check("*/x.txt", true, &["/a/x.txt", "/ab/x.txt"]);
        check("/none", false, &["/none"]);
        check("/none*", false, &[]);
        check("/c/*", false, &[]);
        check("/[ab]/?.txt", false, &["/a/x.txt", "/a/y.txt"]);
        check("/[", false, &[]);
    }

    #[test]
    fn the_directory_before_the_wildcards_must_exist() {
        let (_dir, root) = lab();
        assert_eq!(
            resolve(&root, "/none/*", true).expect_err("absent").to_string(),
            "lstat /none: no such file or directory"
        );
        let near = resolve(&root, "/lnk/*", true).expect_err("absent");
        assert_eq!(near.hints().collect::<Vec<_>>(), ["did you mean /link?"]);
    }

    #[test]
    fn names_can_be_any_bytes() {
        let (dir, root) = lab();
        let name = OsStr::from_bytes(b"caf\xe9");
        fs::write(dir.path().join(name), "").expect("write");
        assert_eq!(
            resolve(&root, "/caf*", true).expect("resolve"),
            [RootPath::default().join(name)]
        );
    }
}
