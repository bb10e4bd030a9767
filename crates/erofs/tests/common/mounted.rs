//! Mounted layers: what is in them, compared with the model, or one with another.

#![allow(dead_code, clippy::unwrap_used)]

use crate::common::{Attrs, Is, Model, Thing};
use shipway_erofs::limits;
use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, OsStr},
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

/// Extended attributes, those that only root sees included.
pub fn xattrs_of(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|b| *b == 0).filter(|n| !n.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; limits::XATTR_VALUE_BYTES + 1];
        let length =
            rustix::fs::lgetxattr(path, CString::new(name).unwrap(), &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// Names in a directory, sorted.
pub fn names_in(path: &Path) -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> =
        fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_vec()).collect();
    names.sort();
    names
}

/// Compares everything below `root` with the model; returns how many inodes that were.
#[track_caller]
pub fn compare(root: &Path, model: &Model) -> usize {
    let links = model.links();
    let mut numbers: HashMap<usize, u64> = HashMap::new();
    let mut stack = vec![(0, root.to_owned())];
    while let Some((inode, path)) = stack.pop() {
        let (attrs, is) = &model.inodes[inode];
        let found = fs::symlink_metadata(&path).unwrap();
        let shown = path.display();
        assert_eq!(
            *numbers.entry(inode).or_insert(found.ino()),
            found.ino(),
            "links share their inode: {shown}"
        );
        let of = |a: &Attrs| {
            (u32::from(a.mode), a.uid, a.gid, a.mtime.seconds, i64::from(a.mtime.nanoseconds))
        };
        assert_eq!(
            (found.mode() & 0o7777, found.uid(), found.gid(), found.mtime(), found.mtime_nsec()),
            of(attrs),
            "{shown}"
        );
        assert_eq!(found.nlink(), u64::from(links[&inode]), "{shown}");
        assert_eq!(xattrs_of(&path), attrs.xattrs, "{shown}");
        let device = |major: &u32, minor: &u32| rustix::fs::makedev(*major, *minor);
        match is {
            Is::Directory(children) => {
                assert!(found.is_dir(), "{shown}");
                assert_eq!(
                    names_in(&path),
                    children.keys().cloned().collect::<Vec<_>>(),
                    "{shown}"
                );
                for name in children.keys() {
                    let missing = [name, &b"\x01"[..]].concat();
                    let there =
                        fs::symlink_metadata(path.join(OsStr::from_bytes(&missing))).is_ok();
                    assert_eq!(there, children.contains_key(&missing), "{shown}");
                }
                stack.extend(
                    children
                        .iter()
                        .map(|(name, child)| (*child, path.join(OsStr::from_bytes(name)))),
                );
            }
            Is::Other(Thing::File(contents)) => {
                assert!(found.is_file() && found.size() == contents.len() as u64, "{shown}");
                assert!(fs::read(&path).unwrap() == contents[..], "contents of {shown}");
            }
            Is::Other(Thing::Symlink(target)) => {
                assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), target, "{shown}")
            }
            Is::Other(Thing::Char(major, minor)) => {
                assert!(
                    found.file_type().is_char_device() && found.rdev() == device(major, minor),
                    "{shown}"
                );
            }
            Is::Other(Thing::Block(major, minor)) => {
                assert!(
                    found.file_type().is_block_device() && found.rdev() == device(major, minor),
                    "{shown}"
                );
            }
            Is::Other(Thing::Fifo) => assert!(found.file_type().is_fifo(), "{shown}"),
            Is::Other(Thing::HardLink(_) | Thing::Directory) => {
                unreachable!("not an inode of the model")
            }
        }
    }
    let mut distinct: Vec<u64> = numbers.values().copied().collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), links.len(), "an inode each");
    links.len()
}

/// Compares everything that programs can see below two directories, except numbers of inodes, of
/// which it only says that the same names are links of one file; returns how many files there are.
#[track_caller]
pub fn assert_same(one: &Path, other: &Path) -> usize {
    let mut numbers: HashMap<(u64, u64), (u64, u64)> = HashMap::new();
    let mut stack = vec![(one.to_owned(), other.to_owned())];
    while let Some((one, other)) = stack.pop() {
        let shown = one.display();
        let found = [&one, &other].map(fs::symlink_metadata);
        let [Ok(a), Ok(b)] = found else {
            // Overlays list a whiteout in a directory that only one layer has, and do not find it.
            let errors = found.map(|found| found.err().map(|e| e.kind()));
            assert_eq!(errors, [Some(std::io::ErrorKind::NotFound); 2], "{shown}");
            continue;
        };
        let of = |m: &fs::Metadata| {
            let size = if m.is_dir() { 0 } else { m.size() };
            (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec(), m.nlink(), m.rdev(), size)
        };
        assert_eq!(of(&a), of(&b), "{shown}");
        let number = |m: &fs::Metadata| (m.dev(), m.ino());
        assert_eq!(*numbers.entry(number(&a)).or_insert(number(&b)), number(&b), "{shown}");
        assert_eq!(xattrs_of(&one), xattrs_of(&other), "{shown}");
        if a.is_dir() {
            let names = names_in(&one);
            assert_eq!(names, names_in(&other), "{shown}");
            stack.extend(names.iter().map(|name| {
                let name = OsStr::from_bytes(name);
                (one.join(name), other.join(name))
            }));
        } else if a.is_symlink() {
            assert_eq!(fs::read_link(&one).unwrap(), fs::read_link(&other).unwrap(), "{shown}");
        } else if a.is_file() {
            assert!(fs::read(&one).unwrap() == fs::read(&other).unwrap(), "contents of {shown}");
        }
    }
    numbers.len()
}
