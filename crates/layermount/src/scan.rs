//! What is mounted already.

use crate::{
    Source, io_fault,
    loops::Loop,
    mount::{detach, device_of, is_served, unmount},
    sys,
};
use shipway_fault::Result;
use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufRead, BufReader},
    os::{fd::AsFd as _, unix::ffi::OsStringExt as _},
    path::{Path, PathBuf},
};

/// Something that is mounted at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Where.
    pub at: PathBuf,
    /// The kernel's number of this mount.
    pub id: u64,
    /// The number of the mount that it is mounted on. Of two mounts at one path the upper one has
    /// the lower one's here.
    pub parent: u64,
    /// Type of the file system.
    pub kind: String,
    /// What the file system was made of, in its maker's words.
    pub source: PathBuf,
    /// Which directory of the file system it shows.
    pub root: PathBuf,
    /// Number of the file system's device (`major:minor`), which clones share.
    pub device: String,
    /// Whether it is a clone with mapped ids.
    pub mapped: bool,
    /// Whether times of access are not kept, see [`Mounted::reads`].
    pub noatime: bool,
}

impl Mounted {
    /// Whether this is what [`mount`](crate::mount()) makes of `source`.
    ///
    /// The kernel shows only what the metadata is read from. So mounts of [`Source::Files`] are
    /// `noatime` if no server has the contents, which means nothing else on such a file system;
    /// and of [`Source::Loops`], some loop device is over the contents. Whether a file is the one
    /// of today's server is for the caller to know: after a new FUSE mount, nothing that was
    /// mounted before as [`Source::Files`] or [`Source::File`] reads from it.
    pub fn reads(&self, source: &Source) -> bool {
        if self.kind != if matches!(source, Source::Tree(_)) { "fuse" } else { "erofs" } {
            return false;
        }
        match source {
            Source::Files { meta, data } => self.source == *meta && self.noatime != is_served(data),
            Source::File(image) => self.source == *image,
            Source::Loops { meta, data } => {
                self.is_loop_over(meta) && Loop::all_over(data).is_ok_and(|found| !found.is_empty())
            }
            Source::Loop(image) => self.is_loop_over(image),
            Source::Tree(directory) => {
                let (server, name) = (directory.parent(), directory.file_name());
                name.is_some_and(|name| self.root == Path::new("/").join(name))
                    && server
                        .is_some_and(|at| device_of(at).is_ok_and(|device| device == self.device))
            }
        }
    }

    fn is_loop_over(&self, file: &Path) -> bool {
        Loop::all_over(file)
            .is_ok_and(|found| found.iter().any(|device| device.path == self.source))
    }

    /// The UUID of what is topmost at this path, where the kernel gives it: since Linux 6.9.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        sys::uuid(File::open(&self.at).ok()?.as_fd()).ok()
    }
}

/// All mounts below the directory `below`, in the namespace of this thread. The path has no links.
pub fn scan(below: &Path) -> Result<Vec<Mounted>> {
    let mut all = File::open("/proc/thread-self/mountinfo")
        .and_then(|file| mount_table(BufReader::new(file)))
        .map_err(|e| io_fault("read the table of mounts", e))?;
    all.retain(|m| m.at != below && m.at.starts_with(below));
    Ok(all)
}

/// Leaves at `at` one mount that reads one of `sources`, out of what is `mounted` there, and
/// returns which; or leaves nothing there. What is lowest counts, for whatever is above it would
/// have gone if a swap had not been cut short.
pub fn adopt(at: &Path, mounted: &[Mounted], sources: &[Source]) -> Result<Option<usize>> {
    let here: Vec<_> = mounted.iter().filter(|m| m.at == at).collect();
    let lowest = here.iter().find(|m| here.iter().all(|other| other.id != m.parent));
    let found = lowest.and_then(|m| sources.iter().position(|source| m.reads(source)));
    match found {
        Some(_) => (1..here.len()).try_for_each(|_| detach(at))?,
        None => drop(unmount(at)?),
    }
    Ok(found)
}

/// Reads what `/proc/<pid>/mountinfo` holds; lines that are none are passed over.
pub fn mount_table(mut text: impl BufRead) -> io::Result<Vec<Mounted>> {
    let (mut table, mut line) = (Vec::new(), Vec::new());
    while text.read_until(b'\n', &mut line)? > 0 {
        table.extend(parse(line.trim_ascii_end()));
        line.clear();
    }
    Ok(table)
}

/// `id parent major:minor root at options [optional…] - kind source options`, as proc(5) has it.
fn parse(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|b| *b == b' ');
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let (id, parent) = (number(fields.next()?)?, number(fields.next()?)?);
    let device = text(fields.next()?);
    let (root, at) = (unescaped(fields.next()?), unescaped(fields.next()?));
    let options = fields.next()?;
    let has = |option: &[u8]| options.split(|b| *b == b',').any(|o| o == option);
    let (mapped, noatime) = (has(b"idmapped"), has(b"noatime"));
    fields.find(|f| *f == b"-")?;
    let kind = text(fields.next()?);
    let source = unescaped(fields.next()?);
    Some(Mounted { at, id, parent, kind, source, root, device, mapped, noatime })
}

/// A path in which `\ooo` is the byte of that octal number.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().filter(|digits| {
            *first == b'\\' && digits[0] < b'4' && digits.iter().all(|d| (b'0'..b'8').contains(d))
        });
        match octal {
            Some([a, b, c]) => {
                path.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = &after[3..];
            }
            None => {
                path.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_table_are_read_and_others_passed_over() {
        let text = b"36 35 0:98 / /r/l/7 ro,noatime,idmapped shared:1 master:2 - erofs /r/layers/7/meta ro,user_xattr\n\
            37 36 7:3 /a /with\\040space\\134\\0409\\8 rw - ext4 /dev/a\\012b rw\n\
            nonsense\n\
            38 36 7:3 / /x rw\n\
            39 36 7:3 / /last ro,relatime - tmpfs none rw";
        let table = mount_table(&text[..]).unwrap();
        let paths: Vec<_> = table.iter().map(|m| m.at.to_str().unwrap()).collect();
        assert_eq!(paths, ["/r/l/7", "/with space\\ 9\\8", "/last"]);
        let first = Mounted {
            at: "/r/l/7".into(),
            id: 36,
            parent: 35,
            kind: "erofs".into(),
            source: "/r/layers/7/meta".into(),
            root: "/".into(),
            device: "0:98".into(),
            mapped: true,
            noatime: true,
        };
        assert_eq!(table[0], first);
        assert_eq!(table[1].source, Path::new("/dev/a\nb"));
        assert_eq!(table[1].root, Path::new("/a"));
        assert!(!table[2].mapped && !table[2].noatime);
    }
}
