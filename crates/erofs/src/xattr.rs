//! Extended attributes: which an image can have, and one copy of each and of each set of them,
//! since layers repeat few.

use crate::{
    BuildError,
    format::{XATTR_ENTRY, XATTR_HEADER},
    limits,
};
use hashbrown::HashTable;
use std::hash::{BuildHasher, RandomState};

/// An extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// Name with its namespace, as in `user.note`.
    pub name: &'a [u8],
    /// Value.
    pub value: &'a [u8],
}

/// Namespaces as the format numbers them, with what comes before the rest of the name. Access
/// control lists have no rest.
const NAMESPACES: &[(u8, &[u8])] = &[
    (1, b"user."),
    (ACL_ACCESS, b"system.posix_acl_access"),
    (ACL_DEFAULT, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;
const USER: u8 = 1;

/// The attribute that a file loses when its owner is set.
pub const CAPABILITY: &[u8] = b"security.capability";

/// What overlayfs itself writes and believes; in a layer it would be a way to deceive it.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The namespace's number and the rest of `name`.
pub fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, rest) = NAMESPACES
        .iter()
        .find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)))?;
    let list = matches!(index, ACL_ACCESS | ACL_DEFAULT);
    (list == rest.is_empty()).then_some((index, rest))
}

/// What comes before the rest of a name in the namespace `index`.
pub fn prefix(index: u8) -> Option<&'static [u8]> {
    NAMESPACES.iter().find(|(i, _)| *i == index).map(|(_, prefix)| *prefix)
}

/// A kind of file, as far as attributes depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    File,
    Directory,
    Symlink,
    Special,
}

/// One attribute in the table.
#[derive(Clone, Copy)]
struct Item {
    index: u8,
    name: u8,
    value: u16,
    /// Where name and value are.
    at: u32,
}

/// A set of attributes; equal sets have equal ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SetId(u32);

/// The distinct attributes of an image, and its distinct sets of them.
pub struct Xattrs {
    text: Vec<u8>,
    items: Vec<Item>,
    item_table: HashTable<u32>,
    /// Members of all sets, sorted by namespace and name within each.
    members: Vec<u32>,
    /// Where each set's members begin and end.
    sets: Vec<(u32, u32)>,
    set_table: HashTable<u32>,
    hasher: RandomState,
}

impl Xattrs {
    /// With the empty set.
    pub fn new() -> Self {
        Self {
            text: Vec::new(),
            items: Vec::new(),
            item_table: HashTable::new(),
            members: Vec::new(),
            sets: vec![(0, 0)],
            set_table: HashTable::new(),
            hasher: RandomState::new(),
        }
    }

    /// `base` with the attributes that a file of the kind `holder` would have after a layer was
    /// unpacked: those that Linux refuses to it are left out, as containerd leaves them out.
    pub fn with(
        &mut self,
        base: SetId,
        xattrs: &[Xattr<'_>],
        holder: Holder,
    ) -> Result<SetId, BuildError> {
        if xattrs.is_empty() {
            return Ok(base);
        }
        let mut members = self.members(base).to_vec();
        for xattr in xattrs {
            if OVERLAY.iter().any(|own| xattr.name.starts_with(own)) {
                return Err(BuildError::XattrName);
            }
            let (index, _) = split_name(xattr.name).ok_or(BuildError::XattrName)?;
            let refused = match index {
                USER => !matches!(holder, Holder::File | Holder::Directory),
                ACL_ACCESS => holder == Holder::Symlink,
                ACL_DEFAULT => holder != Holder::Directory,
                _ => false,
            };
            if !refused {
                check_value(index, xattr)?;
                self.add(&mut members, xattr)?;
            }
        }
        self.set(&members)
    }

    /// `base` with one of overlayfs' own attributes.
    pub fn with_mark(&mut self, base: SetId, xattr: &Xattr<'_>) -> Result<SetId, BuildError> {
        let mut members = self.members(base).to_vec();
        self.add(&mut members, xattr)?;
        self.set(&members)
    }

    /// `base` without the attribute `name`.
    pub fn without(&mut self, base: SetId, name: &[u8]) -> Result<SetId, BuildError> {
        let split = split_name(name);
        let kept: Vec<u32> =
            self.members(base).iter().copied().filter(|i| Some(self.key(*i)) != split).collect();
        if kept.len() == self.members(base).len() { Ok(base) } else { self.set(&kept) }
    }

    fn add(&mut self, members: &mut Vec<u32>, xattr: &Xattr<'_>) -> Result<(), BuildError> {
        let key = split_name(xattr.name)
            .filter(|_| !xattr.name.contains(&0))
            .ok_or(BuildError::XattrName)?;
        if xattr.name.len() > limits::XATTR_NAME_BYTES {
            return Err(BuildError::XattrName);
        }
        let item = self.item(key, xattr.value)?;
        match members.binary_search_by(|other| self.key(*other).cmp(&key)) {
            Ok(at) => members[at] = item,
            Err(at) => members.insert(at, item),
        }
        if members.len() > limits::XATTRS { Err(BuildError::TooManyXattrs) } else { Ok(()) }
    }

    fn item(&mut self, (index, name): (u8, &[u8]), value: &[u8]) -> Result<u32, BuildError> {
        let value_len = u16::try_from(value.len()).map_err(|_| BuildError::XattrValue)?;
        let hash = self.hasher.hash_one((index, name, value));
        if let Some(found) =
            self.item_table.find(hash, |i| self.key(*i) == (index, name) && self.value(*i) == value)
        {
            return Ok(*found);
        }
        if self.text.len() + name.len() + value.len() > limits::XATTR_TEXT_BYTES {
            return Err(BuildError::TooManyXattrs);
        }
        let id = self.items.len() as u32;
        self.items.push(Item {
            index,
            name: name.len() as u8,
            value: value_len,
            at: self.text.len() as u32,
        });
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(value);
        let (items, text, hasher) = (&self.items, &self.text, &self.hasher);
        self.item_table.insert_unique(hash, id, |i| {
            let item = &items[*i as usize];
            let (name, value) = texts(text, item);
            hasher.hash_one((item.index, name, value))
        });
        Ok(id)
    }

    fn set(&mut self, members: &[u32]) -> Result<SetId, BuildError> {
        if members.is_empty() {
            return Ok(SetId::default());
        }
        let hash = self.hasher.hash_one(members);
        if let Some(found) = self.set_table.find(hash, |s| self.members(SetId(*s)) == members) {
            return Ok(SetId(*found));
        }
        let body: usize = members.iter().map(|i| self.bytes(*i)).sum();
        if XATTR_HEADER + body > limits::XATTR_BODY_BYTES
            || self.members.len() + members.len() > limits::XATTR_MEMBERS
        {
            return Err(BuildError::TooManyXattrs);
        }
        let id = self.sets.len() as u32;
        let start = self.members.len() as u32;
        self.members.extend_from_slice(members);
        self.sets.push((start, self.members.len() as u32));
        let (all, sets, hasher) = (&self.members, &self.sets, &self.hasher);
        self.set_table.insert_unique(hash, id, |s| {
            let (from, to) = sets[*s as usize];
            hasher.hash_one(&all[from as usize..to as usize])
        });
        Ok(SetId(id))
    }

    fn members(&self, set: SetId) -> &[u32] {
        let (from, to) = self.sets[set.0 as usize];
        &self.members[from as usize..to as usize]
    }

    fn key(&self, item: u32) -> (u8, &[u8]) {
        let item = &self.items[item as usize];
        (item.index, texts(&self.text, item).0)
    }

    fn value(&self, item: u32) -> &[u8] {
        texts(&self.text, &self.items[item as usize]).1
    }

    /// Bytes of an attribute on disk.
    fn bytes(&self, item: u32) -> usize {
        let item = &self.items[item as usize];
        (XATTR_ENTRY + usize::from(item.name) + usize::from(item.value))
            .next_multiple_of(XATTR_ENTRY)
    }

    fn write(&self, item: u32, out: &mut Vec<u8>) {
        let Item { index, name, value, .. } = self.items[item as usize];
        // It begins at a multiple of its alignment in the image, which `out` need not do.
        let end = out.len() + self.bytes(item);
        out.extend_from_slice(&[name, index]);
        out.extend_from_slice(&value.to_le_bytes());
        out.extend_from_slice(self.key(item).1);
        out.extend_from_slice(self.value(item));
        out.resize(end, 0);
    }
}

fn texts<'a>(text: &'a [u8], item: &Item) -> (&'a [u8], &'a [u8]) {
    let (at, name) = (item.at as usize, usize::from(item.name));
    (&text[at..at + name], &text[at + name..at + name + usize::from(item.value)])
}

/// Refuses what Linux would not have stored: it reads these values itself at every access.
fn check_value(index: u8, xattr: &Xattr<'_>) -> Result<(), BuildError> {
    let valid = match (index, xattr.name) {
        (ACL_ACCESS | ACL_DEFAULT, _) => is_acl(xattr.value),
        (_, CAPABILITY) => is_capability(xattr.value),
        _ => true,
    };
    if valid && xattr.value.len() <= limits::XATTR_VALUE_BYTES {
        Ok(())
    } else {
        Err(BuildError::XattrValue)
    }
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Version 2 and entries of a tag, permissions and an id (`linux/posix_acl_xattr.h`), in the order
/// of the tags that Linux demands.
fn is_acl(value: &[u8]) -> bool {
    const OWNER: u16 = 0x01;
    const USER: u16 = 0x02;
    const GROUP_OF_OWNER: u16 = 0x04;
    const GROUP: u16 = 0x08;
    const MASK: u16 = 0x10;
    const OTHERS: u16 = 0x20;
    let Some(entries) = value.get(4..).filter(|e| le32(value, 0) == Some(2) && e.len() % 8 == 0)
    else {
        return false;
    };
    let fields = entries
        .chunks_exact(8)
        .map(|e| (u16::from_le_bytes([e[0], e[1]]), u16::from_le_bytes([e[2], e[3]])));
    let (mut last, mut count) = (0, [0usize; 6]);
    for (tag, permissions) in fields {
        let known = matches!(tag, OWNER | USER | GROUP_OF_OWNER | GROUP | MASK | OTHERS);
        if !known || tag < last || permissions > 7 {
            return false;
        }
        (last, count[tag.trailing_zeros() as usize]) =
            (tag, count[tag.trailing_zeros() as usize] + 1);
    }
    let [owner, users, group, groups, mask, others] = count;
    (owner, group, others) == (1, 1, 1) && if users + groups > 0 { mask == 1 } else { mask <= 1 }
}

/// A revision and as many words as it has (`linux/capability.h`).
fn is_capability(value: &[u8]) -> bool {
    let revision = le32(value, 0).map(|magic| magic >> 24);
    matches!((revision, value.len()), (Some(1), 12) | (Some(2), 20) | (Some(3), 24))
}

/// Which attributes are kept once for all inodes that have them, and where.
pub struct Shared {
    /// Position of each attribute in the shared area, or `u32::MAX`.
    at: Vec<u32>,
    /// Bytes of the area.
    pub bytes: u64,
}

impl Shared {
    /// Decides by how many inodes use each set. An inode needs four bytes for a shared attribute.
    pub fn decide(xattrs: &Xattrs, users: &[u32]) -> Self {
        let mut uses = vec![0u64; xattrs.items.len()];
        for (set, users) in users.iter().enumerate() {
            xattrs
                .members(SetId(set as u32))
                .iter()
                .for_each(|i| uses[*i as usize] += u64::from(*users));
        }
        let (mut at, mut bytes) = (vec![u32::MAX; uses.len()], 0);
        for (item, uses) in uses.iter().enumerate() {
            let size = xattrs.bytes(item as u32) as u64;
            if uses * size > size + uses * 4 {
                at[item] = bytes as u32;
                bytes += size;
            }
        }
        Self { at, bytes }
    }

    /// Counts the users of each set, for [`Shared::decide`].
    pub fn count(xattrs: &Xattrs, sets: impl Iterator<Item = SetId>) -> Vec<u32> {
        let mut users = vec![0; xattrs.sets.len()];
        sets.for_each(|set| users[set.0 as usize] += 1);
        users
    }

    fn is(&self, item: u32) -> bool {
        self.at[item as usize] != u32::MAX
    }

    /// Bytes of the attributes behind an inode that has `set`.
    pub fn body(&self, xattrs: &Xattrs, set: SetId) -> usize {
        let members = xattrs.members(set);
        let each = members.iter().map(|i| if self.is(*i) { 4 } else { xattrs.bytes(*i) });
        if members.is_empty() { 0 } else { XATTR_HEADER + each.sum::<usize>() }
    }

    /// Writes what is behind such an inode; `area` is where the shared ones begin, from the block
    /// that the superblock names.
    pub fn write_body(&self, xattrs: &Xattrs, set: SetId, area: u64, out: &mut Vec<u8>) {
        let members = xattrs.members(set);
        if members.is_empty() {
            return;
        }
        let shared = || members.iter().filter(|i| self.is(**i));
        // No name filter (zero is no promise), the count, and nothing.
        out.extend_from_slice(&[0, 0, 0, 0, shared().count() as u8, 0, 0, 0, 0, 0, 0, 0]);
        for item in shared() {
            let at = (area + u64::from(self.at[*item as usize])) / XATTR_ENTRY as u64;
            out.extend_from_slice(&(at as u32).to_le_bytes());
        }
        members.iter().filter(|i| !self.is(**i)).for_each(|i| xattrs.write(*i, out));
    }

    /// Writes the shared ones.
    pub fn write_area(&self, xattrs: &Xattrs, out: &mut Vec<u8>) {
        (0..xattrs.items.len() as u32).filter(|i| self.is(*i)).for_each(|i| xattrs.write(i, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr<'a>(name: &'a str, value: &'a [u8]) -> Xattr<'a> {
        Xattr { name: name.as_bytes(), value }
    }

    #[test]
    fn equal_sets_are_one() {
        let mut xattrs = Xattrs::new();
        let (a, b) = (xattr("user.a", b"1"), xattr("user.b", b"2"));
        let mut with =
            |base, list: &[Xattr<'_>]| xattrs.with(base, list, Holder::File).expect("a set");
        let both = with(SetId::default(), &[a, b]);
        assert_eq!(both, with(SetId::default(), &[b, a]));
        let one = with(SetId::default(), &[a]);
        assert_eq!(both, with(one, &[b]));
        assert_ne!(both, with(both, &[xattr("user.a", b"other")]));
        assert_eq!(xattrs.without(both, b"user.b"), Ok(one));
        assert_eq!(xattrs.without(one, b"user.a"), Ok(SetId::default()));
        assert_eq!(xattrs.without(one, b"user.c"), Ok(one));
    }

    #[test]
    fn what_linux_refuses_is_not_in_the_image() {
        let mut xattrs = Xattrs::new();
        let acl = [
            &2u32.to_le_bytes()[..],
            &[
                1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255,
                255, 255, 255,
            ],
        ];
        let acl = acl.concat();
        let (user, access) = (xattr("user.a", b""), xattr("system.posix_acl_access", &acl));
        let default = xattr("system.posix_acl_default", &acl);
        let mut count = |holder| {
            let set =
                xattrs.with(SetId::default(), &[user, access, default], holder).expect("a set");
            xattrs.members(set).len()
        };
        assert_eq!(
            [Holder::Directory, Holder::File, Holder::Special, Holder::Symlink].map(&mut count),
            [3, 2, 1, 0]
        );
        let mut with = |name: &str, value: &[u8]| {
            xattrs.with(SetId::default(), &[xattr(name, value)], Holder::File)
        };
        for name in [
            "user.",
            "security.",
            "trusted.",
            "system.posix_acl_accessory",
            "system.nfs4_acl",
            "btrfs.x",
            "",
            "user.a\0",
        ] {
            assert_eq!(with(name, b""), Err(BuildError::XattrName), "{name}");
        }
        for name in ["trusted.overlay.redirect", "user.overlay.opaque"] {
            assert_eq!(with(name, b"y"), Err(BuildError::XattrName), "{name}");
        }
        for bad in [&acl[..acl.len() - 1], &acl[..12], &[], &[1, 0, 0, 0]] {
            assert_eq!(
                with("system.posix_acl_access", bad),
                Err(BuildError::XattrValue),
                "{bad:?}"
            );
        }
        assert_eq!(with("security.capability", b"x"), Err(BuildError::XattrValue));
        assert!(with("security.capability", &[&[1, 0, 0, 2][..], &[0; 16]].concat()).is_ok());
    }

    #[test]
    fn attributes_are_bounded() {
        let mut xattrs = Xattrs::new();
        let mut with = |list: &[Xattr<'_>]| xattrs.with(SetId::default(), list, Holder::File);
        let name = |n: usize| format!("user.{n:0>250}");
        assert!(with(&[xattr(&name(0), b"")]).is_ok());
        assert_eq!(with(&[xattr(&format!("{}x", name(0)), b"")]), Err(BuildError::XattrName));
        assert!(with(&[xattr("user.a", &[0; limits::XATTR_VALUE_BYTES])]).is_ok());
        assert_eq!(
            with(&[xattr("user.a", &[0; limits::XATTR_VALUE_BYTES + 1])]),
            Err(BuildError::XattrValue)
        );
        let short: Vec<String> = (0..=limits::XATTRS).map(|n| format!("user.{n}")).collect();
        let list: Vec<Xattr<'_>> = short.iter().map(|n| xattr(n, b"")).collect();
        assert!(with(&list[..limits::XATTRS]).is_ok());
        assert_eq!(with(&list), Err(BuildError::TooManyXattrs));
        let large: Vec<Vec<u8>> = (0..5u8).map(|n| vec![n; limits::XATTR_VALUE_BYTES]).collect();
        let list: Vec<Xattr<'_>> = short.iter().zip(&large).map(|(n, v)| xattr(n, v)).collect();
        assert!(with(&list[..3]).is_ok());
        assert_eq!(with(&list[..5]), Err(BuildError::TooManyXattrs));
    }

    #[test]
    fn an_attribute_is_shared_if_that_is_smaller() {
        let mut xattrs = Xattrs::new();
        let once = xattrs
            .with(SetId::default(), &[xattr("user.once", b"v")], Holder::File)
            .expect("a set");
        let twice = xattrs
            .with(SetId::default(), &[xattr("user.twice", b"v")], Holder::File)
            .expect("a set");
        let users = Shared::count(&xattrs, [once, twice, twice, SetId::default()].into_iter());
        let shared = Shared::decide(&xattrs, &users);
        assert_eq!(
            (shared.body(&xattrs, once), shared.body(&xattrs, twice), shared.bytes),
            (12 + 12, 12 + 4, 12)
        );
        assert_eq!(shared.body(&xattrs, SetId::default()), 0);
    }
}
