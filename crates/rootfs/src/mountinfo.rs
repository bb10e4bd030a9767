//! The table of mounts of this process (proc(5), `/proc/self/mountinfo`).

use shipway_fault::{Fault, Result};
use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// Mount points at and below `dir`, those mounted last first: the order in which they can be
/// unmounted. A directory with several mounts is named several times.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table =
        fs::read("/proc/self/mountinfo").map_err(|e| Fault::io("read the mount table", e))?;
    let points = table.split(|b| *b == b'\n').filter_map(mount_point);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    Ok(below)
}

/// The mount point in a line of the table.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    line.split(|b| *b == b' ').nth(4).map(|field| OsString::from_vec(unescaped(field)).into())
}

/// A field of the table: blanks, tabs, line ends and backslashes are `\` and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let octal = after.first_chunk::<3>().filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attached;

    #[test]
    fn mount_points_are_unescaped() {
        let check = |field: &str, want: &str| {
            let line = format!("36 35 98:0 /mnt1 {field} rw,noatime master:1 - ext3 /dev/root rw");
            assert_eq!(mount_point(line.as_bytes()), Some(want.into()));
        };
        check(r"/mnt\040two", "/mnt two");
        check(r"/a\011b\012c\134d", "/a\tb\nc\\d");
        check(r"/a\134040", r"/a\040");
        check(r"/a\9\04", r"/a\9\04");
        assert_eq!(mount_point(b""), None);
    }

    #[test]
    fn mounts_are_found_the_last_one_first() {
        assert!(rustix::process::geteuid().is_root(), "run as root, as `cargo xtask test` does");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let outer = Attached::tmpfs(&dir.path().join("a b")).expect("mount");
        let inner = Attached::tmpfs(&dir.path().join("a b/c")).expect("mount");
        let found = mounts_below(dir.path()).expect("the table");
        assert_eq!(found, [inner.path(), outer.path()]);
        drop((inner, outer));
        assert_eq!(mounts_below(dir.path()).expect("the table"), Vec::<PathBuf>::new());
    }
}
