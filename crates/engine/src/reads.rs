//! Reading files out of a state for a frontend (rows `gw.readfile`, `gw.readdir`, `gw.statfile`). Paths never leave the root.

use bytes::Bytes;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use shipway_fault::{Fault, Result};
use shipway_frontend::FileStat;
use std::{
    collections::BTreeMap,
    io::{Read as _, Seek as _, SeekFrom},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
};

/// The most that is read of a file at once; who sends it on in a message has bounds of its own.
const MAX_FILE: u64 = (1 << 30) + 1;
/// The largest directory listing.
const MAX_ENTRIES: usize = 100_000;

fn open(root: &Path, path: &str, flags: OFlags) -> Result<OwnedFd> {
    let what = |e: rustix::io::Errno| Fault::io(format!("open {path}"), e.into()).with_class(shipway_fault::Class::User);
    let dir = rustix::fs::open(root, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(what)?;
    let relative = path.trim_start_matches('/');
    let relative = if relative.is_empty() { "." } else { relative };
    rustix::fs::openat2(&dir, relative, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
        .map_err(what)
}

/// A file, or a range of it.
pub(crate) fn read_file(root: &Path, path: &str, range: Option<(u64, u64)>) -> Result<Bytes> {
    let found = open(root, path, OFlags::PATH)?;
    let opened = shipway_executor::reopen_regular(found.as_fd()).map_err(|e| Fault::io(format!("open {path}"), e.into()))?;
    let Some(mut file) = opened else {
        let is_dir = rustix::fs::fstat(&found).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory);
        return Err(Fault::invalid(format!("read {path}: {}", if is_dir { "is a directory" } else { "is not a regular file" })));
    };
    let meta = file.metadata().map_err(|e| Fault::io(format!("stat {path}"), e))?;
    let (offset, length) = range.unwrap_or((0, 0));
    let rest = meta.len().saturating_sub(offset);
    let length = if length == 0 { rest } else { length.min(rest) };
    if length > MAX_FILE {
        return Err(Fault::invalid(format!("read {path}: {length} bytes are more than {MAX_FILE}")).hint("read it in ranges"));
    }
    file.seek(SeekFrom::Start(offset)).map_err(|e| Fault::io(format!("seek {path}"), e))?;
    // Ranges are often as long as they may be, and files short.
    let mut bytes = Vec::with_capacity(length.min(meta.len().saturating_sub(offset)) as usize);
    file.take(length).read_to_end(&mut bytes).map_err(|e| Fault::io(format!("read {path}"), e))?;
    Ok(bytes.into())
}

/// Go's `FileMode` for a `st_mode`.
fn go_mode(mode: u32) -> u32 {
    let kind = match mode & 0o170_000 {
        0o040_000 => 1 << 31,
        0o120_000 => 1 << 27,
        0o010_000 => 1 << 25,
        0o140_000 => 1 << 24,
        0o060_000 => 1 << 26,
        0o020_000 => 1 << 26 | 1 << 21,
        _ => 0,
    };
    let set = |bit: u32, go: u32| if mode & bit != 0 { 1 << go } else { 0 };
    (mode & 0o777) | kind | set(0o4000, 23) | set(0o2000, 22) | set(0o1000, 20)
}

fn stat_of(meta: &std::fs::Metadata, path: String, linkname: String) -> FileStat {
    FileStat {
        path,
        mode: go_mode(meta.mode()),
        uid: meta.uid(),
        gid: meta.gid(),
        size: if meta.is_dir() { 0 } else { meta.len() as i64 },
        mod_time: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        linkname,
        dev_major: 0,
        dev_minor: 0,
        xattrs: BTreeMap::new(),
    }
}

/// One entry; a final symbolic link is described, not followed.
pub(crate) fn stat_file(root: &Path, path: &str) -> Result<FileStat> {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
    let fd = open(root, path, OFlags::PATH | OFlags::NOFOLLOW)?;
    let link = link_of(&fd);
    let meta = std::fs::File::from(fd).metadata().map_err(|e| Fault::io(format!("stat {path}"), e))?;
    Ok(stat_of(&meta, name, link))
}

fn link_of(fd: &OwnedFd) -> String {
    rustix::fs::readlinkat(fd, "", Vec::new()).map(|l| l.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The entries of a directory by name; `include` is a pattern for names with `*`, `?` and `[]`.
pub(crate) fn read_dir(root: &Path, path: &str, include: Option<&str>) -> Result<Vec<FileStat>> {
    let fd = open(root, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let what = |e: rustix::io::Errno| Fault::io(format!("read directory {path}"), e.into());
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(&fd).map_err(what)? {
        let entry = entry.map_err(what)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "." || name == ".." || include.is_some_and(|p| !name_matches(p, &name)) {
            continue;
        }
        if entries.len() == MAX_ENTRIES {
            return Err(Fault::invalid(format!("read directory {path}: more than {MAX_ENTRIES} entries")));
        }
        let one =
            rustix::fs::openat(&fd, entry.file_name(), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map_err(what)?;
        let link = link_of(&one);
        let meta = std::fs::File::from(one).metadata().map_err(|e| Fault::io(format!("stat {path}/{name}"), e))?;
        entries.push(stat_of(&meta, name, link));
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// Go's `filepath.Match` for one name: `*`, `?`, `[a-z]`, `[^a]`, and backslash. Linear in practice: one backtracking point.
fn name_matches(pattern: &str, name: &str) -> bool {
    let (p, n): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut i, mut j, mut back) = (0, 0, None);
    while j < n.len() {
        let step = match p.get(i) {
            Some('*') => {
                back = Some((i, j));
                i += 1;
                continue;
            }
            Some('?') => Some(i + 1),
            Some('[') => class(&p, i, n[j]),
            Some('\\') if i + 1 < p.len() => (p[i + 1] == n[j]).then_some(i + 2),
            Some(c) => (*c == n[j]).then_some(i + 1),
            None => None,
        };
        match (step, back) {
            (Some(next), _) => {
                i = next;
                j += 1;
            }
            (None, Some((star, at))) => {
                i = star + 1;
                j = at + 1;
                back = Some((star, at + 1));
            }
            (None, None) => return false,
        }
    }
    p[i..].iter().all(|c| *c == '*')
}

/// Where the pattern goes on after the class at `i`, if `c` is in it.
fn class(p: &[char], i: usize, c: char) -> Option<usize> {
    let end = i + 1 + p[i + 1..].iter().skip(1).position(|x| *x == ']')? + 1;
    let (negated, set) = match p[i + 1] {
        '^' => (true, &p[i + 2..end]),
        _ => (false, &p[i + 1..end]),
    };
    let mut k = 0;
    let mut found = false;
    while k < set.len() {
        if k + 2 < set.len() && set[k + 1] == '-' {
            found |= set[k] <= c && c <= set[k + 2];
            k += 3;
        } else {
            found |= set[k] == c;
            k += 1;
        }
    }
    (found != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_as_go_does() {
        for (pattern, name, want) in [
            ("*", "a", true),
            ("a*c", "abbc", true),
            ("a?c", "abc", true),
            ("[a-c]x", "bx", true),
            ("[^a]x", "ax", false),
            ("*.go", "a.rs", false),
            ("\\*", "*", true),
        ] {
            assert_eq!(name_matches(pattern, name), want, "{pattern} {name}");
        }
    }

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
        assert_eq!(stat_file(&root, "/abs").unwrap().linkname, "/etc/a");
        assert_eq!(read_dir(&root, "/", Some("a*")).unwrap().len(), 1);
    }
}
