//! Lists of files: one JSON object a line, in order of paths.

use crate::format::Blob;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use shipway_fault::{Fault, Result};
use shipway_oci::{Digest, is_image_xattr};
use std::{
    collections::HashSet,
    io::{BufRead as _, Read as _},
};

/// Most files, links and directories of a cache mount.
pub(crate) const MAX_ENTRIES: usize = 2_000_000;
/// Longest list of files.
pub(crate) const MAX_TREE: u64 = 512 << 20;
/// Longest line of it: a file of the largest size in the smallest chunks has 90 MB.
const MAX_LINE: u64 = 128 << 20;
/// Longest path, without the zero at its end.
pub(crate) const MAX_PATH: usize = 4095;
/// Longest part of a path.
const MAX_NAME: usize = 255;
/// Most extended attributes of a file, and the longest value that Linux has.
pub(crate) const MAX_XATTRS: usize = 64;
pub(crate) const MAX_XATTR: usize = 64 << 10;

/// What is not itself in a path: the escape, and what would be hard to read.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%').add(b'"').add(b'\\');

/// Bytes that are mostly text.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(pub Vec<u8>);

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&percent_encode(&self.0, ESCAPED))
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Ok(Self(percent_decode_str(&text).collect()))
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// The value of an extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Value(pub Vec<u8>);

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        STANDARD.decode(text).map(Self).map_err(D::Error::custom)
    }
}

/// A part of a file: its digest, the pack that has it, where in the pack, and how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Chunk(pub Digest, pub u32, pub u32, pub u32);

impl Chunk {
    pub fn length(&self) -> u64 {
        u64::from(self.3)
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Dir,
    File,
    /// Another name of a file that comes before it.
    Link,
    Symlink,
}

/// A name in a tree, and what is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// Path from the root of the mount, which is itself empty.
    #[serde(rename = "p")]
    pub path: Name,
    #[serde(rename = "k")]
    pub kind: Kind,
    #[serde(rename = "m", default)]
    pub mode: u32,
    #[serde(rename = "u", default)]
    pub uid: u32,
    #[serde(rename = "g", default)]
    pub gid: u32,
    /// Time of the last change: seconds and nanoseconds.
    #[serde(rename = "t", default)]
    pub time: (i64, u32),
    #[serde(rename = "x", default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<(Name, Value)>,
    /// What a link points to, or the first name of the file.
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Name>,
    #[serde(rename = "c", default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<Chunk>,
}

/// The files of a mount, in order of paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tree(pub Vec<Entry>);

/// Checks entries as they come, each with those before it.
struct Checks<'a> {
    packs: &'a [Blob],
    max_size: u64,
    dirs: HashSet<Vec<u8>>,
    files: HashSet<Vec<u8>>,
    last: Option<Vec<u8>>,
    bytes: u64,
}

impl Checks<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<(), String> {
        let path = &entry.path.0;
        if self.last.as_ref().is_some_and(|last| last >= path) {
            return Err("is not in order".to_owned());
        }
        match parent(path)? {
            None if entry.kind != Kind::Dir => return Err("is the root and no directory".into()),
            Some(parent) if !parent.is_empty() && !self.dirs.contains(parent) => {
                return Err("is in no directory".into());
            }
            _ => {}
        }
        if entry.mode > 0o7777 {
            return Err(format!("has the mode {:o}", entry.mode));
        }
        if entry.time.1 >= 1_000_000_000 {
            return Err("has no valid time".into());
        }
        let known = |(name, value): &(Name, Value)| {
            is_image_xattr(&name.0) && !name.0.contains(&0) && value.0.len() <= MAX_XATTR
        };
        if entry.xattrs.len() > MAX_XATTRS || !entry.xattrs.iter().all(known) {
            return Err("has extended attributes that files of cache mounts may not have".into());
        }
        let target = entry.target.as_ref().map(|t| t.0.as_slice());
        match (entry.kind, target) {
            (Kind::Dir | Kind::File, None) => {}
            (Kind::Link, Some(first)) if self.files.contains(first) => {}
            (Kind::Symlink, Some(to)) if (1..=MAX_PATH).contains(&to.len()) && !to.contains(&0) => {
            }
            _ => return Err("has no valid target".into()),
        }
        if entry.kind != Kind::File && !entry.chunks.is_empty() {
            return Err("has contents and is no file".into());
        }
        for chunk in &entry.chunks {
            let pack = self.packs.get(chunk.1 as usize).ok_or("names a pack that is not there")?;
            if chunk.3 == 0 || u64::from(chunk.2) + chunk.length() > pack.length {
                return Err("names a chunk outside of its pack".into());
            }
            self.bytes = self.bytes.saturating_add(chunk.length());
            if self.bytes > self.max_size {
                return Err(format!("is beyond the limit of {} bytes", self.max_size));
            }
        }
        match entry.kind {
            Kind::Dir => _ = self.dirs.insert(path.clone()),
            Kind::File => _ = self.files.insert(path.clone()),
            Kind::Link | Kind::Symlink => {}
        }
        self.last = Some(path.clone());
        Ok(())
    }
}

/// The path of the directory that `path` is in, which is checked; `None` for the root.
fn parent(path: &[u8]) -> Result<Option<&[u8]>, String> {
    if path.is_empty() {
        return Ok(None);
    }
    let valid = |part: &[u8]| {
        !matches!(part, b"" | b"." | b"..") && part.len() <= MAX_NAME && !part.contains(&0)
    };
    if path.len() > MAX_PATH || !path.split(|b| *b == b'/').all(valid) {
        return Err("is not a path below the mount".to_owned());
    }
    Ok(Some(path.iter().rposition(|b| *b == b'/').map_or(&path[..0], |slash| &path[..slash])))
}

impl Tree {
    /// The compressed list, and how long it is without compression.
    pub fn encode(&self) -> Result<(Vec<u8>, u64)> {
        let failed = |e: std::io::Error| Fault::internal(format!("encode a list of files: {e}"));
        let mut out = zstd::Encoder::new(Vec::new(), 3).map_err(failed)?;
        let mut length = 0;
        for entry in &self.0 {
            let mut line = serde_json::to_vec(entry).map_err(|e| failed(e.into()))?;
            line.push(b'\n');
            length += line.len() as u64;
            std::io::Write::write_all(&mut out, &line).map_err(failed)?;
        }
        if length > MAX_TREE {
            return Err(Fault::invalid(format!(
                "the list of files has {length} bytes, more than {MAX_TREE}"
            )));
        }
        Ok((out.finish().map_err(failed)?, length))
    }

    /// Reads and checks a compressed list of files, whose contents are in `packs` and have at most
    /// `max_size` bytes.
    pub fn decode(bytes: &[u8], packs: &[Blob], max_size: u64) -> Result<Self> {
        let invalid = |why: String| {
            Fault::invalid(format!("the list of files of a saved cache mount: {why}"))
        };
        let failed = |e: std::io::Error| invalid(e.to_string());
        let mut checks = Checks {
            packs,
            max_size,
            dirs: HashSet::new(),
            files: HashSet::new(),
            last: None,
            bytes: 0,
        };
        let reader = zstd::Decoder::with_buffer(bytes).map_err(failed)?;
        let mut reader = std::io::BufReader::new(reader.take(MAX_TREE + 1));
        let (mut entries, mut line, mut total) = (Vec::new(), Vec::new(), 0);
        loop {
            line.clear();
            let n = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed)?;
            total += n as u64;
            if n == 0 {
                return Ok(Self(entries));
            }
            if total > MAX_TREE || entries.len() == MAX_ENTRIES || line.last() != Some(&b'\n') {
                return Err(invalid("it is too long, or cut off".to_owned()));
            }
            let entry: Entry = serde_json::from_slice(&line).map_err(|e| invalid(e.to_string()))?;
            let shown = || entry.path.to_string().chars().take(200).collect::<String>();
            checks.entry(&entry).map_err(|why| invalid(format!("{:?} {why}", shown())))?;
            entries.push(entry);
        }
    }

    /// Regular files, and their bytes.
    pub fn counts(&self) -> (u64, u64) {
        let files = self.0.iter().filter(|e| e.kind == Kind::File);
        files.fold((0, 0), |(files, bytes), entry| {
            (files + 1, bytes + entry.chunks.iter().map(Chunk::length).sum::<u64>())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry {
            path: Name(path.into()),
            kind,
            mode: 0o644,
            uid: 1,
            gid: 2,
            time: (3, 4),
            xattrs: Vec::new(),
            target: None,
            chunks: Vec::new(),
        }
    }

    fn packs() -> Vec<Blob> {
        vec![Blob { digest: Digest::of("p"), size: 5, length: 100 }]
    }

    fn chunk(pack: u32, at: u32, length: u32) -> Chunk {
        Chunk(Digest::of("c"), pack, at, length)
    }

    fn read(entries: Vec<Entry>) -> Result<Tree> {
        Tree::decode(&Tree(entries).encode()?.0, &packs(), 150)
    }

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let mut file = entry("a/\u{e4}%\"", Kind::File);
        file.path.0.push(0xff);
        file.chunks = vec![chunk(0, 0, 100), chunk(0, 50, 50)];
        file.xattrs = vec![(Name(b"user.x".to_vec()), Value(vec![0, 255]))];
        let mut link = entry("b", Kind::Link);
        link.target = Some(file.path.clone());
        let mut symlink = entry("c", Kind::Symlink);
        symlink.target = Some(Name(b"../../etc".to_vec()));
        let all = vec![entry("", Kind::Dir), entry("a", Kind::Dir), file, link, symlink];
        let tree = Tree(all.clone());
        assert_eq!(tree.counts(), (1, 150));
        assert_eq!(read(all).expect("reads"), tree);
        assert_eq!(read(Vec::new()).expect("reads"), Tree::default());
    }

    #[track_caller]
    fn refused(entries: Vec<Entry>, why: &str) {
        let said = read(entries).expect_err("it is refused").to_string();
        assert!(said.contains(why), "{said}");
    }

    #[test]
    fn hostile_lists_are_refused() {
        let long = "x".repeat(MAX_NAME + 1);
        let deep = ["x"; MAX_PATH].join("/");
        for path in ["..", "/etc", "a/../b", "./a", "a//b", "a/", "a\0b", &long, &deep] {
            refused(vec![entry(path, Kind::File)], "not a path below the mount");
        }
        refused(vec![entry("a/b", Kind::File)], "in no directory");
        let mut symlink = entry("a", Kind::Symlink);
        symlink.target = Some(Name(b"/etc".to_vec()));
        refused(vec![symlink, entry("a/passwd", Kind::File)], "in no directory");
        refused(vec![entry("a", Kind::File), entry("a/b", Kind::File)], "in no directory");
        refused(vec![entry("b", Kind::File), entry("a", Kind::File)], "not in order");
        refused(vec![entry("a", Kind::File), entry("a", Kind::Dir)], "not in order");
        refused(vec![entry("", Kind::File)], "the root and no directory");
        let with = |change: &dyn Fn(&mut Entry)| {
            let mut entry = entry("a", Kind::File);
            change(&mut entry);
            vec![entry]
        };
        refused(with(&|e| e.mode = 0o20644), "the mode 20644");
        refused(with(&|e| e.time = (0, 1_000_000_000)), "no valid time");
        refused(with(&|e| e.chunks = vec![chunk(1, 0, 1)]), "a pack that is not there");
        refused(with(&|e| e.chunks = vec![chunk(0, 50, 51)]), "outside of its pack");
        refused(with(&|e| e.chunks = vec![chunk(0, 0, 0)]), "outside of its pack");
        // The same chunk a million times is as large as it is.
        refused(with(&|e| e.chunks = vec![chunk(0, 0, 100); 2]), "beyond the limit");
        let attribute = |name: &[u8], size| (Name(name.to_vec()), Value(vec![0; size]));
        for bad in [
            vec![attribute(b"trusted.overlay.opaque", 1)],
            vec![attribute(b"user.a\0b", 1)],
            vec![attribute(b"user.a", MAX_XATTR + 1)],
            vec![attribute(b"user.a", 1); MAX_XATTRS + 1],
        ] {
            refused(with(&|e| e.xattrs.clone_from(&bad)), "extended attributes");
        }
        let target =
            |kind, to: &[u8]| vec![Entry { target: Some(Name(to.to_vec())), ..entry("a", kind) }];
        refused(target(Kind::Link, b"b"), "no valid target");
        refused(target(Kind::Link, b"../b"), "no valid target");
        refused(target(Kind::Symlink, b""), "no valid target");
        refused(target(Kind::Symlink, &vec![b'x'; MAX_PATH + 1]), "no valid target");
        refused(target(Kind::File, b"b"), "no valid target");
        let mut dir = entry("a", Kind::Dir);
        dir.chunks = vec![chunk(0, 0, 1)];
        refused(vec![dir], "is no file");
        for kind in ["fifo", "block", "char", "socket"] {
            let line = format!("{{\"p\":\"a\",\"k\":\"{kind}\"}}\n");
            let bytes = zstd::encode_all(line.as_bytes(), 1).expect("zstd");
            assert!(Tree::decode(&bytes, &[], 0).expect_err("refused").to_string().contains(kind));
        }
    }

    #[test]
    fn lists_without_end_are_not_read_to_it() {
        // A few kilobytes that are a gigabyte of one line.
        let mut bomb = zstd::Encoder::new(Vec::new(), 1).expect("zstd");
        std::io::copy(&mut std::io::repeat(b' ').take(MAX_LINE + 1), &mut bomb).expect("writes");
        let bytes = bomb.finish().expect("zstd");
        assert!(
            Tree::decode(&bytes, &[], 0).expect_err("refused").to_string().contains("too long")
        );
        let line = serde_json::to_string(&entry("a", Kind::File)).expect("JSON");
        let cut = zstd::encode_all(line.as_bytes(), 1).expect("zstd");
        assert!(Tree::decode(&cut, &[], 0).expect_err("refused").to_string().contains("cut off"));
        assert!(Tree::decode(b"garbage", &[], 0).is_err());
    }
}
