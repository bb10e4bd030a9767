//! What unpacking the tar of a tree does not give back.
//!
//! A snapshot may be named by its layer's chain ID only if it is what unpacking gives, since
//! every request for the name gets it. So the walk that makes the tar also looks for what the tar
//! cannot say. The measure is what containerd does (1.6 and 2.1 do the same): entries that mean the
//! root are passed over; `trusted.` attributes are not set; a name with the prefix `.wh.` is a
//! whiteout; a directory gives its default access control list to what is made in it; a directory
//! that is there keeps its attributes.

use crate::attributes::Pairs;
use rustix::fs::{FileType, Stat};
use std::{collections::HashMap, fmt};

/// Prefix of the names of whiteouts (OCI image-spec, layer.md).
pub(crate) const WHITEOUT: &[u8] = b".wh.";

/// Something in a tree that unpacking its tar does not give back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Path in the tree; empty for the root.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: LossKind,
}

/// Kinds of what unpacking does not give back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LossKind {
    /// A socket: tar has no word for it.
    Socket,
    /// A file that is named as whiteouts are.
    WhiteoutName,
    /// A device that an overlay takes for a whiteout.
    WhiteoutDevice,
    /// An extended attribute of that name, or its absence.
    Attribute(Vec<u8>),
    /// The absence of the access control list that is inherited from the directory.
    Inherited,
    /// Owner, permissions or attributes of the root.
    Root,
    /// A file with more names, or fewer, than the tar has.
    Links,
    /// A time that could not be set to that of the tar.
    Time,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}: ", String::from_utf8_lossy(&self.path))?;
        match &self.kind {
            LossKind::Socket => f.write_str("a socket"),
            LossKind::WhiteoutName => f.write_str("named like a whiteout"),
            LossKind::WhiteoutDevice => f.write_str("a device like a whiteout"),
            LossKind::Attribute(name) => write!(f, "attribute {}", String::from_utf8_lossy(name)),
            LossKind::Inherited => {
                f.write_str("no access control list in a directory that hands one down")
            }
            LossKind::Root => f.write_str("owner, permissions or attributes of the root"),
            LossKind::Links => f.write_str("linked in a way that layers cannot express"),
            LossKind::Time => f.write_str("its time cannot be set"),
        }
    }
}

/// Keeps the first loss of a walk.
#[derive(Default)]
pub(crate) struct Losses {
    first: Option<Loss>,
    links: Links,
}

impl Losses {
    pub fn note(&mut self, path: &[u8], kind: LossKind) {
        self.first.get_or_insert_with(|| Loss { path: path.to_vec(), kind });
    }

    /// Notes the first attribute that only one of two has.
    pub fn difference(&mut self, path: &[u8], one: &Pairs, other: &Pairs) {
        let only =
            |a: &Pairs, b: &Pairs| a.iter().find(|x| !b.contains(x)).map(|(name, _)| name.clone());
        if let Some(name) = only(one, other).or_else(|| only(other, one)) {
            self.note(path, LossKind::Attribute(name));
        }
    }

    /// Notes a file of the layer; the path at which it occurred first if this is another name of
    /// it.
    pub fn carried(&mut self, path: &[u8], stat: &Stat) -> Option<&[u8]> {
        if stat.st_nlink < 2 || FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return None;
        }
        let names = self.links.carried.entry(inode(stat)).or_insert_with(|| Names::new(path, stat));
        names.count += 1;
        (names.count > 1).then_some(&names.path)
    }

    /// Notes a file that the layer leaves out, for it is the `old` one.
    pub fn same(&mut self, path: &[u8], new: &Stat, old: &Stat) {
        if inode(new) == inode(old) || FileType::from_raw_mode(new.st_mode) == FileType::Directory {
            return;
        }
        if new.st_nlink > 1 || old.st_nlink > 1 {
            let links = &mut self.links;
            links.same.entry(inode(new)).or_insert_with(|| Names::new(path, new)).count += 1;
            // Names of one file that were of one file.
            let one = *links.came.entry(inode(new)).or_insert(inode(old)) == inode(old);
            let became = *links.became.entry(inode(old)).or_insert(inode(new)) == inode(new);
            if !(one && became) {
                self.note(path, LossKind::Links);
            }
        }
    }

    /// Notes a file of an upper directory that is the `old` one, which unpacking leaves as it is in
    /// its lower directory.
    pub fn same_below(&mut self, path: &[u8], new: &Stat, old: &Stat) {
        self.same(path, new, old);
        if FileType::from_raw_mode(new.st_mode) != FileType::Directory
            && new.st_nlink != old.st_nlink
        {
            self.note(path, LossKind::Links);
        }
    }

    /// What was lost first; the walk has ended.
    pub fn first(mut self) -> Option<Loss> {
        let links = std::mem::take(&mut self.links);
        let mut broken: Vec<_> = links
            .carried
            .iter()
            .filter(|(inode, _)| links.same.contains_key(*inode))
            .map(|(_, n)| n)
            .collect();
        broken.extend(
            links.carried.values().chain(links.same.values()).filter(|n| n.count != n.links),
        );
        if let Some(names) = broken.into_iter().min_by(|a, b| a.path.cmp(&b.path)) {
            self.note(&names.path, LossKind::Links);
        }
        self.first
    }
}

/// Files with several names.
#[derive(Default)]
struct Links {
    carried: HashMap<(u64, u64), Names>,
    same: HashMap<(u64, u64), Names>,
    /// The old file of a new one that is the same, and the other way round.
    came: HashMap<(u64, u64), (u64, u64)>,
    became: HashMap<(u64, u64), (u64, u64)>,
}

/// The names of one file.
struct Names {
    /// The first one.
    path: Vec<u8>,
    count: u64,
    /// How many it has.
    links: u64,
}

impl Names {
    #[allow(clippy::unnecessary_cast)]
    fn new(path: &[u8], stat: &Stat) -> Self {
        Self { path: path.to_vec(), count: 0, links: stat.st_nlink as u64 }
    }
}

fn inode(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}
