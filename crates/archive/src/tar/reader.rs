//! Reads an archive member by member.

use super::{
    block::{self, Header},
    broken, pax,
    sparse::{self, Extent},
};
use shipway_estargz::{TarEntry, TarKind, Time};
use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read},
};

/// Prefix of the keys of extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";
const SPARSE: &[u8] = b"GNU.sparse.";

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberKind {
    /// A file with contents.
    File,
    /// Another name of the member at the path.
    HardLink(Vec<u8>),
    /// A symbolic link to the target.
    Symlink(Vec<u8>),
    /// A character device with major and minor number.
    CharDevice(u32, u32),
    /// A block device with major and minor number.
    BlockDevice(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A kind that no file system has, by its byte in the header.
    Other(u8),
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Path as the archive has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length of a file, holes included.
    pub size: u64,
    /// Modification time, nanoseconds since the epoch.
    pub mtime: i64,
    /// Extended attributes by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Name of the owner.
    pub user: Vec<u8>,
    /// Name of the group.
    pub group: Vec<u8>,
    /// All extended records (pax) of this member: keys and values, those of attributes included.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl From<&Member> for TarEntry {
    fn from(member: &Member) -> Self {
        let kind = match &member.kind {
            MemberKind::File => TarKind::File(member.size),
            MemberKind::HardLink(target) => TarKind::HardLink(target.clone()),
            MemberKind::Symlink(target) => TarKind::Symlink(target.clone()),
            MemberKind::CharDevice(major, minor) => TarKind::CharDevice(*major, *minor),
            MemberKind::BlockDevice(major, minor) => TarKind::BlockDevice(*major, *minor),
            MemberKind::Directory => TarKind::Directory,
            MemberKind::Fifo => TarKind::Fifo,
            MemberKind::Other(other) => TarKind::Other(*other),
        };
        let mtime = Time {
            seconds: member.mtime.div_euclid(1_000_000_000),
            nanoseconds: member.mtime.rem_euclid(1_000_000_000) as u32,
        };
        let Member { path, mode, uid, gid, xattrs, .. } = member.clone();
        Self { path, kind, mode, uid, gid, mtime, xattrs }
    }
}

/// A piece of a file's contents, which is in the buffer that was given. What is in no piece is
/// zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file it is.
    pub offset: u64,
    /// How long it is.
    pub len: usize,
}

/// Reads an archive.
pub struct TarReader<R> {
    tar: R,
    /// What is left of the current member's contents.
    extents: VecDeque<Extent>,
    /// What is left of it in the archive, with padding.
    left: u64,
    ended: bool,
}

/// What extended headers and long names say of the member that follows.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    user: Option<Vec<u8>>,
    group: Option<Vec<u8>>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: sparse::Records,
}

impl Extended {
    /// Takes the body of an extended header, which stands for all of an earlier one.
    fn records(&mut self, mut body: &[u8]) -> io::Result<()> {
        *self = Self::default();
        while !body.is_empty() {
            let (record, rest) = pax::take(body)
                .ok_or_else(|| broken("an extended header has something that is not a record"))?;
            body = rest;
            let (key, value) = (record.key, record.value);
            self.records.push((key.to_vec(), value.to_vec()));
            let number = || {
                let number = std::str::from_utf8(value).ok().and_then(|v| v.parse::<i64>().ok());
                number.ok_or_else(|| broken("an extended record is not a number"))
            };
            match key {
                // An empty value means that the header's own counts.
                _ if value.is_empty() && !key.starts_with(XATTR) => {}
                b"path" | b"linkpath" if value.contains(&0) => {
                    return Err(broken("a name has a zero byte"));
                }
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => {
                    self.size =
                        Some(u64::try_from(number()?).map_err(|_| broken("a size is negative"))?)
                }
                b"uid" => self.uid = Some(number()? as u32),
                b"gid" => self.gid = Some(number()? as u32),
                b"uname" => self.user = Some(value.to_vec()),
                b"gname" => self.group = Some(value.to_vec()),
                b"mtime" => self.mtime = std::str::from_utf8(value).ok().and_then(pax::nanoseconds),
                _ => {
                    if let Some(name) = key.strip_prefix(XATTR) {
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    } else if let Some(key) = key.strip_prefix(SPARSE) {
                        self.sparse.take(key, value)?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl<R: Read> TarReader<R> {
    /// A reader of `tar`, which is not compressed.
    pub fn new(tar: R) -> Self {
        Self { tar, extents: VecDeque::new(), left: 0, ended: false }
    }

    /// Where it reads from.
    pub(crate) fn input(&mut self) -> &mut R {
        &mut self.tar
    }

    /// The same, when the archive has ended.
    pub(crate) fn into_input(self) -> R {
        self.tar
    }

    /// The next member; what was not read of the one before is passed over.
    pub fn next_member(&mut self) -> io::Result<Option<Member>> {
        self.skip()?;
        let (mut extended, mut long_name, mut long_link) = (Extended::default(), None, None);
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            match header.kind() {
                b'x' => {
                    let size = header.size()?;
                    extended.records(&block::special(&mut self.tar, size)?)?;
                }
                // As in Go, what is said of all members counts for none.
                b'g' => drop(block::special(&mut self.tar, header.size()?)?),
                b'L' => {
                    long_name =
                        Some(block::text(&block::special(&mut self.tar, header.size()?)?).to_vec())
                }
                b'K' => {
                    long_link =
                        Some(block::text(&block::special(&mut self.tar, header.size()?)?).to_vec())
                }
                _ => {
                    extended.path = long_name.or(extended.path);
                    extended.link = long_link.or(extended.link);
                    return self.member(&header, extended).map(Some);
                }
            }
        }
    }

    /// The next header, unless the archive has ended.
    fn header(&mut self) -> io::Result<Option<Header>> {
        if self.ended {
            return Ok(None);
        }
        let header = block::read(&mut self.tar)?.map(Header).filter(|h| !h.is_zero());
        self.ended = header.is_none();
        match header {
            Some(header) if !header.is_whole() => Err(broken("the checksum of a header is wrong")),
            header => Ok(header),
        }
    }

    fn member(&mut self, header: &Header, extended: Extended) -> io::Result<Member> {
        let field =
            |range: std::ops::Range<usize>| block::number(&header.0[range]).unwrap_or_default();
        let is_sparse = extended.sparse.is_sparse();
        let path = extended
            .sparse
            .name
            .clone()
            .filter(|_| is_sparse)
            .or(extended.path)
            .unwrap_or_else(|| header.name());
        let link = extended.link.unwrap_or_else(|| header.link_name().to_vec());
        let device = (field(329..337) as u32, field(337..345) as u32);
        let kind = match header.kind() {
            // Old programs say by the name alone that it is a directory.
            0 | b'0' if path.ends_with(b"/") => MemberKind::Directory,
            0 | b'0' | b'7' | b'S' => MemberKind::File,
            b'1' => MemberKind::HardLink(link),
            b'2' => MemberKind::Symlink(link),
            b'3' => MemberKind::CharDevice(device.0, device.1),
            b'4' => MemberKind::BlockDevice(device.0, device.1),
            b'5' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            other => MemberKind::Other(other),
        };
        let mut stored = if block::is_bare(header.kind()) {
            0
        } else {
            extended.size.map_or_else(|| header.size(), Ok)?
        };
        let (mut extents, mut size) = (vec![Extent { offset: 0, len: stored }], stored);
        let mut padding = block::padding(stored) as u64;
        if header.kind() == b'S' && header.is_gnu() {
            (extents, size) = sparse::old(header, &mut self.tar)?;
            sparse::check(&extents, size, stored)?;
        } else if is_sparse && kind == MemberKind::File {
            size = extended.sparse.size.ok_or_else(|| broken("a sparse file has no size"))?;
            if extended.sparse.in_content {
                let took;
                (extents, took) = sparse::in_content(&mut self.tar, stored)?;
                // The map is padded to whole blocks, too.
                stored = stored
                    .checked_sub(took)
                    .ok_or_else(|| broken("the map of a sparse file is larger than the file"))?;
                padding = block::padding(stored) as u64;
            } else {
                extents = extended.sparse.extents()?;
            }
            sparse::check(&extents, size, stored)?;
        }
        self.left = stored.checked_add(padding).ok_or_else(|| broken("a size is too large"))?;
        self.extents = if kind == MemberKind::File { extents.into() } else { VecDeque::new() };
        Ok(Member {
            size: if kind == MemberKind::File { size } else { 0 },
            path,
            kind,
            mode: field(100..108) as u32 & 0o7777,
            uid: extended.uid.unwrap_or(field(108..116) as u32),
            gid: extended.gid.unwrap_or(field(116..124) as u32),
            mtime: extended.mtime.unwrap_or_else(|| {
                header.mtime().unwrap_or_default().saturating_mul(1_000_000_000)
            }),
            xattrs: extended.xattrs,
            user: extended.user.unwrap_or_else(|| header.owner_name(265..297).to_vec()),
            group: extended.group.unwrap_or_else(|| header.owner_name(297..329).to_vec()),
            records: extended.records,
        })
    }

    /// Reads a piece of the current member's contents into `buffer`, which must not be empty; none
    /// at their end.
    pub fn piece(&mut self, buffer: &mut [u8]) -> io::Result<Option<Piece>> {
        let extent = loop {
            match self.extents.front_mut() {
                None => return Ok(None),
                Some(extent) if extent.len > 0 => break extent,
                Some(_) => drop(self.extents.pop_front()),
            }
        };
        let want = usize::try_from(extent.len).unwrap_or(usize::MAX).min(buffer.len());
        let len = loop {
            match self.tar.read(&mut buffer[..want]) {
                Ok(0) => return Err(block::cut()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        let piece = Piece { offset: extent.offset, len };
        extent.offset += len as u64;
        extent.len -= len as u64;
        self.left -= len as u64;
        Ok(Some(piece))
    }

    /// Passes over what is left of the current member, and its padding.
    pub(crate) fn skip(&mut self) -> io::Result<()> {
        self.extents.clear();
        let skipped = io::copy(&mut (&mut self.tar).take(self.left), &mut io::sink())?;
        self.left -= skipped;
        if self.left == 0 { Ok(()) } else { Err(block::cut()) }
    }
}
