//! Extended attributes: which ones a layer carries, which are the host's own, and which no
//! unpacking gives back.

use crate::stat::broken;
use rustix::{fd::BorrowedFd, io::Errno};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::is_image_xattr;
use shipway_storage::overlay::Marks;
use std::path::Path;

/// Most bytes of names and values of one file. Go's tar reader, which containerd unpacks with,
/// takes no longer extended header.
const MAX_BYTES: usize = 1 << 20;
/// The longest value that Linux has.
const MAX_VALUE: usize = 64 << 10;

pub(crate) const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
pub(crate) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// Labels that the host's security modules set, and what file systems show of their own in
/// namespaces that no image uses.
const HOST: [&[u8]; 7] = [
    b"security.selinux",
    b"security.SMACK64",
    b"security.apparmor",
    b"security.ima",
    b"security.evm",
    // XFS shows access control lists a second time to root.
    b"trusted.SGI_ACL_FILE",
    b"trusted.SGI_ACL_DEFAULT",
];

/// With these an overlay keeps a part of what it shows elsewhere.
const ELSEWHERE: [&[u8]; 3] = [b"redirect", b"metacopy", b"whiteout"];

/// Whether layers carry the attribute.
fn is_carried(name: &[u8]) -> bool {
    // A PAX record's key ends at the first `=`.
    is_image_xattr(name) && !name.contains(&b'=')
}

/// Whether the attribute is not of the image: it is not in the layer, and is not missed.
fn is_hosts(name: &[u8], marks: Option<Marks>) -> bool {
    let images =
        [&b"user."[..], b"trusted.", b"security."].iter().any(|space| name.starts_with(space));
    let acl = [ACCESS_ACL, DEFAULT_ACL].contains(&name);
    // The kernel keeps what is set like a mark, and is none, under another name:
    // `overlay.overlay.`.
    let mark = marks
        .and_then(|m| name.strip_prefix(m.prefix()))
        .is_some_and(|mark| !mark.starts_with(b"overlay."));
    !images && !acl || HOST.iter().any(|h| name.starts_with(h)) || mark
}

/// Attributes with their values.
pub(crate) type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// The attributes of one file, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FileXattrs {
    /// Those that a layer carries.
    pub carried: Pairs,
    /// Those that are lost when it is unpacked.
    pub lost: Pairs,
}

impl FileXattrs {
    pub fn has(&self, name: &[u8]) -> bool {
        self.carried.iter().any(|(n, _)| n == name)
    }
}

/// Where attributes are read.
#[derive(Clone, Copy)]
pub(crate) enum XattrSource<'a> {
    At(&'a Path),
    Open(BorrowedFd<'a>),
}

impl XattrSource<'_> {
    fn list(self, names: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::At(path) => rustix::fs::llistxattr(path, names),
            Self::Open(file) => rustix::fs::flistxattr(file, names),
        }
    }

    fn get(self, name: &[u8], value: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::At(path) => rustix::fs::lgetxattr(path, name, value),
            Self::Open(file) => rustix::fs::fgetxattr(file, name, value),
        }
    }
}

/// Reads the attributes of what is in a directory with an overlay's `marks`, or in none; `full` is
/// for people.
pub(crate) fn read(of: XattrSource<'_>, marks: Option<Marks>, full: &Path) -> Result<FileXattrs> {
    let (mut short, mut long) = ([0u8; 512], Vec::new());
    let names: &[u8] = loop {
        let buffer = if long.is_empty() { &mut short[..] } else { &mut long[..] };
        match of.list(buffer) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(FileXattrs::default()),
            Ok(n) if long.is_empty() => break &short[..n],
            Ok(n) => break &long[..n],
            // Linux lists no more than this.
            Err(Errno::RANGE) if long.is_empty() => long.resize(64 << 10, 0),
            Err(e) => return Err(broken(full, e.into())),
        }
    };
    let mut found = FileXattrs::default();
    let mut bytes = 0;
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mark = name.strip_prefix(marks.unwrap_or_default().prefix());
        if mark.is_some_and(|m| ELSEWHERE.contains(&m)) {
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!("{}: the overlay keeps a part of it elsewhere ({})", full.display(), String::from_utf8_lossy(name)),
            )
            .hint("mount overlays with redirect_dir=off,metacopy=off: see the options of the overlay kernel module"));
        }
        if is_hosts(name, marks) {
            continue;
        }
        let mut value = vec![0u8; MAX_VALUE];
        match of.get(name, &mut value) {
            Ok(n) => value.truncate(n),
            Err(Errno::NODATA) => continue,
            Err(e) => return Err(broken(full, e.into())),
        }
        bytes += name.len() + value.len();
        if bytes > MAX_BYTES {
            return Err(Fault::invalid(format!(
                "{}: its extended attributes are larger than a layer can hold (1 MiB)",
                full.display()
            )));
        }
        value.shrink_to_fit();
        let kind = if is_carried(name) { &mut found.carried } else { &mut found.lost };
        kind.push((name.to_vec(), value));
    }
    found.carried.sort();
    found.lost.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_has_one_fate() {
        #[derive(Debug, PartialEq)]
        enum Fate {
            Carried,
            Hosts,
            Lost,
        }
        let fate = |name: &str, marks| match (
            is_hosts(name.as_bytes(), marks),
            is_carried(name.as_bytes()),
        ) {
            (true, _) => Fate::Hosts,
            (false, true) => Fate::Carried,
            (false, false) => Fate::Lost,
        };
        let (none, trusted, user) = (None, Some(Marks::Trusted), Some(Marks::User));
        for (name, marks, want) in [
            ("security.capability", trusted, Fate::Carried),
            ("system.posix_acl_access", trusted, Fate::Carried),
            ("system.posix_acl_default", none, Fate::Carried),
            ("user.a", trusted, Fate::Carried),
            ("user.overlay", trusted, Fate::Carried),
            ("user.a=b", trusted, Fate::Lost),
            ("user.overlay.opaque", trusted, Fate::Lost),
            ("user.overlay.opaque", none, Fate::Lost),
            ("user.overlay.opaque", user, Fate::Hosts),
            ("trusted.overlay.origin", trusted, Fate::Hosts),
            ("trusted.overlay.overlay.origin", trusted, Fate::Lost),
            ("trusted.overlay.origin", none, Fate::Lost),
            ("trusted.overlay.origin", user, Fate::Lost),
            ("trusted.mine", trusted, Fate::Lost),
            ("trusted.SGI_ACL_FILE", trusted, Fate::Hosts),
            ("security.selinux", trusted, Fate::Hosts),
            ("security.mine", trusted, Fate::Lost),
            ("system.nfs4_acl", trusted, Fate::Hosts),
            ("btrfs.compression", none, Fate::Hosts),
        ] {
            assert_eq!(fate(name, marks), want, "{name} {marks:?}");
        }
    }
}
