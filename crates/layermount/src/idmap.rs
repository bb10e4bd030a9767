//! Clones of mounts in which files have other owners, for containers in user namespaces.

use crate::{io_fault, sys};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};
use shipway_fault::{Fault, Result};
use std::{
    fmt::{self, Write as _},
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

/// Most ranges of a mapping: what the kernel takes (user_namespaces(7)).
pub const MAX_RANGES: usize = 340;

/// Ids `inside..inside + size` of a user namespace are `outside..outside + size` of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdRange {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub size: u32,
}

/// Which ids of a user namespace are which of ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappedIds {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl MappedIds {
    /// Parses containerd's labels `containerd.io/snapshot/uidmapping` and `gidmapping`:
    /// `inside:outside:size`, several with commas between.
    pub fn parse(uids: &str, gids: &str) -> Result<Self> {
        Ok(Self { uids: ranges("user", uids)?, gids: ranges("group", gids)? })
    }

    /// The owner and group outside of what root has inside; a namespace without root is refused by
    /// [`MappedIds::parse`].
    pub fn root(&self) -> (u32, u32) {
        let outside = |ranges: &[IdRange]| {
            ranges.iter().find(|r| r.inside == 0).map_or(0, |range| range.outside)
        };
        (outside(&self.uids), outside(&self.gids))
    }
}

/// As the kernel and the labels have them, users and groups.
impl fmt::Display for MappedIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, ranges) in [("users", &self.uids), (", groups", &self.gids)] {
            write!(f, "{kind}")?;
            for IdRange { inside, outside, size } in ranges {
                write!(f, " {inside}:{outside}:{size}")?;
            }
        }
        Ok(())
    }
}

fn ranges(what: &str, text: &str) -> Result<Vec<IdRange>> {
    let wrong = |why: &str| Fault::invalid(format!("the mapping of {what} ids {text:?} {why}"));
    if text.split(',').count() > MAX_RANGES {
        return Err(Fault::invalid(format!(
            "the mapping of {what} ids has more than {MAX_RANGES} ranges"
        )));
    }
    let mut found = Vec::new();
    for part in text.split(',') {
        let mut numbers = part.split(':').map(|n| n.parse::<u32>().ok());
        let (Some(Some(inside)), Some(Some(outside)), Some(Some(size)), None) =
            (numbers.next(), numbers.next(), numbers.next(), numbers.next())
        else {
            return Err(wrong("is not inside:outside:size"));
        };
        // The last number is not a valid id.
        if size == 0 || inside.checked_add(size).is_none() || outside.checked_add(size).is_none() {
            return Err(wrong("has a range that is empty or beyond all ids"));
        }
        found.push(IdRange { inside, outside, size });
    }
    found.sort_unstable();
    if !found.iter().any(|r| r.inside == 0) {
        return Err(wrong("has no root"));
    }
    Ok(found)
}

/// A user namespace that exists for its mapping alone.
#[derive(Debug)]
pub struct UserNamespace(File);

impl UserNamespace {
    /// Makes one; a process lives in it for as long as that takes. For root: others may not map
    /// ids that are not theirs.
    pub fn new(ids: &MappedIds) -> Result<Self> {
        let failed = |what: &str, e: std::io::Error| {
            io_fault(format!("make a user namespace with {ids}: {what}"), e)
        };
        let sleeper = sys::Sleeper::start().map_err(|e| failed("clone", e.into()))?;
        let proc = Path::new("/proc").join(sleeper.pid.as_raw_nonzero().to_string());
        for (file, ranges) in [("uid_map", &ids.uids), ("gid_map", &ids.gids)] {
            let mut text = String::new();
            for IdRange { inside, outside, size } in ranges {
                let _ = writeln!(text, "{inside} {outside} {size}");
            }
            // In one write, as the kernel demands.
            std::fs::write(proc.join(file), text).map_err(|e| failed(file, e))?;
        }
        File::open(proc.join("ns/user")).map(Self).map_err(|e| failed("open", e))
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Mounts at the directory `at` a clone of what is at `from`, a directory or a mount, in which
/// files have the owners of `namespace`: an id of the file is taken as one inside.
///
/// Mounts below `from` are not in it: a clone of a directory with mount points in it shows them
/// empty. Fails where the file system cannot do it; EROFS can since Linux 5.19.
pub fn clone_mapped(from: &Path, namespace: &UserNamespace, at: &Path) -> Result<()> {
    let failed = |what: &str, e: rustix::io::Errno| {
        io_fault(format!("clone {} with mapped ids: {what}", from.display()), e)
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, from, flags).map_err(|e| failed("open_tree", e))?;
    sys::map_ids(tree.as_fd(), namespace.as_fd()).map_err(|e| failed("mount_setattr", e))?;
    move_mount(tree.as_fd(), "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| failed(&format!("mount at {}", at.display()), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_and_wrong_ones_refused() {
        let ids = MappedIds::parse("1000:5:1,0:100000:1000", "0:7:1").unwrap();
        assert_eq!(ids.root(), (100_000, 7));
        assert_eq!(ids.to_string(), "users 0:100000:1000 1000:5:1, groups 0:7:1");
        for wrong in [
            "",
            "0:1",
            "0:1:2:3",
            "0:1:-1",
            "a:b:c",
            "0:1:0",
            "1:0:5",
            "0:4294967295:1",
            "4294967295:0:1",
            "0:0:1,",
        ] {
            assert!(MappedIds::parse(wrong, "0:0:1").is_err(), "{wrong}");
            assert!(MappedIds::parse("0:0:1", wrong).is_err(), "{wrong}");
        }
        let many = |n: usize| (0..n).map(|i| format!("{i}:{i}:1")).collect::<Vec<_>>().join(",");
        assert!(MappedIds::parse(&many(MAX_RANGES), "0:0:1").is_ok());
        let error = MappedIds::parse(&many(MAX_RANGES + 1), "0:0:1").unwrap_err();
        assert!(error.to_string().contains("more than 340"), "{error}");
    }
}
