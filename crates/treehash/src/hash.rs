//! The digest of one file: a header in the order that Docker's tar sums have it (version 1: without
//! the time), the extended attributes that belong to an image, then the digest of the contents
//! ([`crate::contents`]).

use crate::contents::ContentHasher;
use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_oci::{Digest, Hasher, is_image_xattr};
use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::Read,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::Path,
};

/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;
/// What every digest of a file begins with. Digests are parts of cache keys, so whatever else they
/// are made of needs another version.
const VERSION: &[u8] = b"shipway file 2\0";

/// What a file's digest depends on besides its contents, and what changes with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    size: i64,
    mode: u32,
    uid: u32,
    gid: u32,
    rdev: u64,
    mtime: i64,
}

impl Stamp {
    pub fn of(stat: &Stat) -> Self {
        Self {
            size: stat.st_size,
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev,
            mtime: stat
                .st_mtime
                .saturating_mul(1_000_000_000)
                .saturating_add(stat.st_mtime_nsec as i64),
        }
    }

    /// That of a regular file.
    pub fn of_file(file: &FileStat) -> Self {
        let FileStat { size, mode, uid, gid, mtime } = *file;
        Self {
            size,
            mode: FileType::RegularFile.as_raw_mode() | (mode & 0o7777),
            uid,
            gid,
            rdev: 0,
            mtime,
        }
    }

    /// A number that differs between stamps.
    pub fn number(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size.max(0).unsigned_abs()
    }

    /// Time of modification in nanoseconds.
    pub fn mtime(&self) -> i64 {
        self.mtime
    }
}

/// The digest of the file, link, directory (without its children) or device at `full`. A regular
/// file is read unless the digest of its contents is `known`.
pub fn digest(
    full: &Path,
    stamp: &Stamp,
    known: Option<Digest>,
    buffer: &mut Vec<u8>,
) -> Result<Digest> {
    let failed = |e| Fault::io(format!("hash {}", full.display()), e);
    let kind = stamp.kind();
    let link = match kind {
        FileType::Symlink => fs::read_link(full).map_err(failed)?.into_os_string(),
        _ => Default::default(),
    };
    let (flag, device) = match kind {
        FileType::Directory => ('5', false),
        FileType::Symlink => ('2', false),
        FileType::CharacterDevice => ('3', true),
        FileType::BlockDevice => ('4', true),
        FileType::Fifo => ('6', false),
        // A socket counts as an empty file.
        _ => ('0', false),
    };
    let mode = if kind == FileType::Symlink { 0o777 } else { stamp.mode & 0o7777 };
    let size = if kind == FileType::RegularFile { stamp.size } else { 0 };
    let (major, minor) = if device {
        (rustix::fs::major(stamp.rdev), rustix::fs::minor(stamp.rdev))
    } else {
        (0, 0)
    };
    let mut hasher = Hasher::new();
    header(&mut hasher, (mode, stamp.uid, stamp.gid, size), flag, link.as_bytes(), (major, minor));
    for (name, value) in xattrs(full).map_err(failed)? {
        for part in [name, value] {
            hasher.update((part.len() as u64).to_be_bytes());
            hasher.update(part);
        }
    }
    if kind == FileType::RegularFile {
        let contents = known.map_or_else(|| contents(full, buffer).map_err(failed), Ok)?;
        hasher.update(contents.as_bytes());
    }
    Ok(hasher.finish())
}

/// The longest value of an extended attribute, and the longest list of their names, that Linux has.
const MAX_XATTR: usize = 64 << 10;

/// The attributes that a layer has of the file, sorted.
fn xattrs(full: &Path) -> std::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let (mut short, mut long) = ([0_u8; 512], Vec::new());
    let names = match rustix::fs::llistxattr(full, &mut short[..]) {
        Ok(n) => &short[..n],
        Err(Errno::RANGE) => {
            long.resize(MAX_XATTR, 0);
            let n = rustix::fs::llistxattr(full, &mut long[..])?;
            &long[..n]
        }
        Err(Errno::NOTSUP) => &[],
        Err(e) => return Err(e.into()),
    };
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| is_image_xattr(n)) {
        let mut value = vec![0; MAX_XATTR];
        match rustix::fs::lgetxattr(full, name, &mut value[..]) {
            Ok(n) => value.truncate(n),
            Err(Errno::NODATA) => continue,
            Err(e) => return Err(e.into()),
        }
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}

fn header(
    hasher: &mut Hasher,
    (mode, uid, gid, size): (u32, u32, u32, i64),
    flag: char,
    link: &[u8],
    (major, minor): (u32, u32),
) {
    hasher.update(VERSION);
    hasher.update(format!("namemode{mode}uid{uid}gid{gid}size{size}typeflag{flag}linkname"));
    hasher.update(link);
    hasher.update(format!("unamegnamedevmajor{major}devminor{minor}"));
}

/// A regular file's attributes, as far as they matter.
#[derive(Clone, Copy, Debug)]
pub struct FileStat {
    /// Length.
    pub size: i64,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of modification in nanoseconds.
    pub mtime: i64,
}

/// The digest of a regular file without extended attributes whose contents come piece by piece.
pub struct FileHasher {
    header: Hasher,
    contents: ContentHasher,
}

impl FileHasher {
    /// Starts the digest of a file with these attributes.
    pub fn new(file: &FileStat) -> Self {
        let mut hasher = Hasher::new();
        header(&mut hasher, (file.mode & 0o7777, file.uid, file.gid, file.size), '0', b"", (0, 0));
        Self { header: hasher, contents: ContentHasher::default() }
    }

    /// Adds contents.
    pub fn update(&mut self, bytes: &[u8]) {
        self.contents.update(bytes);
    }

    /// The digest.
    pub fn finish(mut self) -> Digest {
        self.header.update(self.contents.finish().as_bytes());
        self.header.finish()
    }
}

fn contents(full: &Path, buffer: &mut Vec<u8>) -> std::io::Result<Digest> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    let mut file = File::options().read(true).custom_flags(flags).open(full)?;
    let mut hasher = ContentHasher::default();
    buffer.resize(CHUNK, 0);
    loop {
        match file.read(buffer)? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}
