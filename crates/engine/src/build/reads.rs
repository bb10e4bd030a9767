//! Reading files out of a state for a frontend (rows `gw.readfile`, `gw.readdir`, `gw.statfile`).
//! Paths never leave the root.

use bytes::Bytes;
use rustix::fs::{FileType, Mode, OFlags};
use shipway_fault::{Fault, Result};
use shipway_filesync::{DirMatch, PathFilter, Verdict};
use shipway_frontend::FileStat;
use shipway_gocompat::FileMode;
use shipway_rootfs::{open_beneath, open_directory, open_in_root, reopen_regular};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    io::{Read as _, Seek as _, SeekFrom},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::Path,
};

/// The most that is read of a file at once; who sends it on in a message has bounds of its own.
const MAX_FILE: u64 = (1 << 30) + 1;
/// The largest directory listing.
const MAX_ENTRIES: usize = 100_000;
/// Most bytes of extended attributes that a listing has in all.
const MAX_XATTRS: usize = 8 << 20;
/// Names of extended attributes are rarely longer than this in all.
const SHORT_XATTRS: usize = 1024;
/// The longest value of one, and the longest list of names.
const MAX_XATTR: usize = 64 << 10;
/// Most entries that are looked at for a pattern that may match somewhere below.
const MAX_WALK: usize = 1_000_000;

fn open(root: &Path, path: &str, flags: OFlags) -> Result<OwnedFd> {
    let what = |e: rustix::io::Errno| {
        Fault::io(format!("open {path}"), e.into()).with_class(shipway_fault::Class::User)
    };
    let dir = open_directory(root).map_err(what)?;
    open_in_root(dir.as_fd(), path, flags, Mode::empty()).map_err(what)
}

/// A file, or a range of it.
pub(crate) fn read_file(root: &Path, path: &str, range: Option<(u64, u64)>) -> Result<Bytes> {
    let found = open(root, path, OFlags::PATH)?;
    let opened =
        reopen_regular(found.as_fd()).map_err(|e| Fault::io(format!("open {path}"), e.into()))?;
    let Some(mut file) = opened else {
        let is_dir = rustix::fs::fstat(&found)
            .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory);
        return Err(Fault::invalid(format!(
            "read {path}: {}",
            if is_dir { "is a directory" } else { "is not a regular file" }
        )));
    };
    let meta = file.metadata().map_err(|e| Fault::io(format!("stat {path}"), e))?;
    let (offset, length) = range.unwrap_or((0, 0));
    let rest = meta.len().saturating_sub(offset);
    let length = if length == 0 { rest } else { length.min(rest) };
    if length > MAX_FILE {
        return Err(Fault::invalid(format!(
            "read {path}: {length} bytes are more than {MAX_FILE}"
        ))
        .hint("read it in ranges"));
    }
    file.seek(SeekFrom::Start(offset)).map_err(|e| Fault::io(format!("seek {path}"), e))?;
    // Ranges are often as long as they may be, and files short.
    let mut bytes = Vec::with_capacity(length.min(meta.len().saturating_sub(offset)) as usize);
    file.take(length).read_to_end(&mut bytes).map_err(|e| Fault::io(format!("read {path}"), e))?;
    Ok(bytes.into())
}

/// The description of the file behind `fd`, which was opened as a path only.
fn stat_of(fd: OwnedFd, path: String) -> Result<(FileStat, std::fs::Metadata)> {
    let linkname = rustix::fs::readlinkat(&fd, "", Vec::new())
        .map(|l| l.to_string_lossy().into_owned())
        .unwrap_or_default();
    let xattrs = xattrs_of(&fd);
    let meta =
        std::fs::File::from(fd).metadata().map_err(|e| Fault::io(format!("stat {path}"), e))?;
    let is_device = matches!(meta.mode() & 0o170_000, 0o060_000 | 0o020_000);
    let device = |number: fn(u64) -> u32| if is_device { number(meta.rdev()).into() } else { 0 };
    let stat = FileStat {
        path,
        mode: FileMode::from_unix(meta.mode()).0,
        uid: meta.uid(),
        gid: meta.gid(),
        size: if meta.is_dir() { 0 } else { meta.len() as i64 },
        mod_time: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        linkname,
        dev_major: device(rustix::fs::major),
        dev_minor: device(rustix::fs::minor),
        xattrs,
    };
    Ok((stat, meta))
}

/// The extended attributes of the file behind `fd`; those that cannot be read are left out.
fn xattrs_of(fd: &OwnedFd) -> BTreeMap<String, Vec<u8>> {
    // A descriptor of a path only is read through its name in /proc, which leads to the file itself
    // and not further.
    let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut names = vec![0u8; SHORT_XATTRS];
    let mut listed = rustix::fs::listxattr(&*name, &mut names[..]);
    if listed == Err(rustix::io::Errno::RANGE) {
        names.resize(MAX_XATTR, 0);
        listed = rustix::fs::listxattr(&*name, &mut names[..]);
    }
    let Ok(size) = listed else { return BTreeMap::new() };
    let mut found = BTreeMap::new();
    let texts = names[..size].split(|b| *b == 0).filter_map(|n| std::str::from_utf8(n).ok());
    for key in texts.filter(|n| !n.is_empty() && !n.starts_with("com.apple.")) {
        let mut value = vec![0u8; MAX_XATTR];
        if let Ok(size) = rustix::fs::getxattr(&*name, key, &mut value[..]) {
            value.truncate(size);
            found.insert(key.to_owned(), value);
        }
    }
    found
}

/// One entry. A final symbolic link is followed, inside the root; the description is called by the
/// name of what it leads to.
pub(crate) fn stat_file(root: &Path, path: &str) -> Result<FileStat> {
    let fd = open(root, path, OFlags::PATH)?;
    let top = open(root, "", OFlags::PATH | OFlags::DIRECTORY)?;
    let place = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    let name = match (place(&fd), place(&top)) {
        (Some(place), Some(top)) if place != top => {
            place.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
        }
        _ => "/".to_owned(),
    };
    stat_of(fd, name).map(|(stat, _)| stat)
}

/// The entries of a directory by name, hard links among them as such. With `include`, a pattern as
/// in `.dockerignore`, only those that match, or that have something below them which does.
pub(crate) fn read_dir(root: &Path, path: &str, include: Option<&str>) -> Result<Vec<FileStat>> {
    let fd = open(root, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let include: Vec<&str> = include.into_iter().collect();
    let mut filter = Filter { filter: PathFilter::new(&include, &[])?, left: MAX_WALK, path };
    let (mut entries, mut first, mut xattrs) = (Vec::<FileStat>::new(), HashMap::new(), 0);
    for name in names_in(&fd, path)? {
        let what = |e: rustix::io::Errno| Fault::io(format!("read directory {path}"), e.into());
        let one = rustix::fs::openat(
            &fd,
            &name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(what)?;
        let shown = name.to_string_lossy().into_owned();
        if !filter.wants(&fd, &shown)? {
            continue;
        }
        if entries.len() == MAX_ENTRIES {
            return Err(Fault::invalid(format!(
                "read directory {path}: more than {MAX_ENTRIES} entries"
            )));
        }
        let (mut stat, meta) = stat_of(one, shown)?;
        xattrs += stat.xattrs.values().map(Vec::len).sum::<usize>();
        if xattrs > MAX_XATTRS {
            return Err(Fault::invalid(format!(
                "read directory {path}: more than {MAX_XATTRS} bytes of extended attributes"
            )));
        }
        if meta.nlink() > 1 && !meta.is_dir() && !meta.is_symlink() {
            match first.get(&(meta.dev(), meta.ino())) {
                Some(name) => (stat.linkname, stat.size) = (String::clone(name), 0),
                None => _ = first.insert((meta.dev(), meta.ino()), stat.path.clone()),
            }
        }
        entries.push(stat);
    }
    Ok(entries)
}

/// Names in a directory, sorted.
fn names_in(dir: &OwnedFd, path: &str) -> Result<Vec<OsString>> {
    let what = |e: rustix::io::Errno| Fault::io(format!("read directory {path}"), e.into());
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir).map_err(what)? {
        let entry = entry.map_err(what)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        if names.len() == MAX_WALK {
            return Err(Fault::invalid(format!(
                "read directory {path}: more than {MAX_WALK} entries"
            )));
        }
        names.push(name.to_owned());
    }
    names.sort();
    Ok(names)
}

/// Which entries of a directory a pattern means.
struct Filter<'a> {
    filter: PathFilter,
    /// Entries that may still be looked at.
    left: usize,
    path: &'a str,
}

impl Filter<'_> {
    /// Whether `name` in `dir` matches, or something below it.
    fn wants(&mut self, dir: &OwnedFd, name: &str) -> Result<bool> {
        if self.filter.is_empty() {
            return Ok(true);
        }
        let mut waiting = vec![(name.to_owned(), DirMatch::default())];
        while let Some((path, parent)) = waiting.pop() {
            let Some(left) = self.left.checked_sub(1) else {
                let message = format!(
                    "read directory {}: the pattern was looked for in more than {MAX_WALK} entries",
                    self.path
                );
                return Err(Fault::invalid(message)
                    .hint("use a pattern that begins with the name of a directory"));
            };
            self.left = left;
            // Only directories can be opened so; links are not followed, at any depth.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let below = open_beneath(dir, &*path, flags).ok();
            let (verdict, matched) = self.filter.visit(&path, below.is_some(), &parent);
            match (verdict, below) {
                (Verdict::Keep, _) => return Ok(true),
                (Verdict::Pass, Some(below)) => {
                    for name in names_in(&below, self.path)? {
                        waiting
                            .push((format!("{path}/{}", name.to_string_lossy()), matched.clone()));
                    }
                }
                _ => {}
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_cannot_lead_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(dir.path().join("secret"), "no").unwrap();
        std::fs::write(root.join("etc/a"), "inside").unwrap();
        std::os::unix::fs::symlink("../../secret", root.join("up")).unwrap();
        std::os::unix::fs::symlink("/etc/a", root.join("abs")).unwrap();
        assert!(read_file(&root, "/up", None).unwrap_err().is_not_found());
        assert_eq!(read_file(&root, "abs", Some((2, 3))).unwrap(), "sid");
        // A link is followed and what it leads to described; one in a listing is not.
        let stat = stat_file(&root, "/abs").unwrap();
        assert_eq!((&*stat.path, stat.size, &*stat.linkname), ("a", 6, ""));
        assert!(stat_file(&root, "/up").unwrap_err().is_not_found());
        assert_eq!(stat_file(&root, "/").unwrap().path, "/");
        let listed = read_dir(&root, "/", Some("a*")).unwrap();
        assert_eq!((listed.len(), &*listed[0].linkname), (1, "/etc/a"));
    }

    #[test]
    fn listings_tell_links_and_attributes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("one"), "1").unwrap();
        std::fs::hard_link(dir.path().join("one"), dir.path().join("two")).unwrap();
        std::fs::write(dir.path().join("three"), "333").unwrap();
        rustix::fs::setxattr(
            dir.path().join("three"),
            "user.a",
            b"b",
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        let all = read_dir(dir.path(), "", None).unwrap();
        let listed: Vec<_> =
            all.iter().map(|s| (&*s.path, s.size, &*s.linkname, s.xattrs.len())).collect();
        assert_eq!(
            listed,
            [("one", 1, "", 0), ("socket", 0, "", 0), ("three", 3, "", 1), ("two", 0, "one", 0)]
        );
        assert_eq!(all[1].mode & !0o777, 0, "a socket has no type");
        assert_eq!(stat_file(dir.path(), "three").unwrap().xattrs["user.a"], b"b");
        // A single name is not a link.
        assert_eq!(stat_file(dir.path(), "two").unwrap().size, 1);
        let null = stat_file(Path::new("/dev"), "null").unwrap();
        assert_eq!((null.dev_major, null.dev_minor), (1, 3));
    }

    #[test]
    fn patterns_are_about_paths() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["src/deep/a.go", "src/b.rs", "docs/c.md", "a.go", "empty/"] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let made = if path.to_string_lossy().ends_with('/') {
                std::fs::create_dir_all(&path)
            } else {
                std::fs::write(&path, "")
            };
            made.unwrap();
        }
        std::os::unix::fs::symlink("src", dir.path().join("link")).unwrap();
        for (pattern, want) in [
            ("*.go", &["a.go"][..]),
            ("**/*.go", &["a.go", "src"]),
            ("src/deep", &["src"]),
            ("docs", &["docs"]),
            ("link/b.rs", &[]),
            ("*/b.rs", &["src"]),
            ("[^a]*", &["docs", "empty", "link", "src"]),
        ] {
            let names: Vec<String> = read_dir(dir.path(), "", Some(pattern))
                .unwrap()
                .into_iter()
                .map(|s| s.path)
                .collect();
            assert_eq!(names, want, "{pattern}");
        }
    }
}
