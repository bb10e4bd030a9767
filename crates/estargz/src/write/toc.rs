//! The table of contents as JSON, in the words that both stargz-snapshotter and containers/storage
//! read.

use crate::{Codec, Error, MAX_ENTRIES, MAX_TOC, Result, TarEntry, TarKind, toc::Time};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::{Serialize, Serializer, ser::SerializeMap};
use shipway_oci::Digest;
use std::io;

/// An entry that was written.
pub struct Row {
    pub entry: TarEntry,
    pub chunks: Vec<ChunkRow>,
    /// Digest of all data, if there are several chunks.
    pub digest: Option<Digest>,
}

/// A chunk that was written.
pub struct ChunkRow {
    pub unit: usize,
    pub inner: u64,
    pub file_offset: u64,
    pub size: u64,
    pub digest: Option<Digest>,
}

impl Row {
    pub fn new(entry: TarEntry) -> Self {
        Self { entry, chunks: Vec::new(), digest: None }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    version: u32,
    #[serde(serialize_with = "rows")]
    entries: (&'a [Row], &'a [u64], Codec),
    #[serde(skip_serializing_if = "Option::is_none")]
    tar_split_digest: Option<Digest>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Item<'a> {
    r#type: &'static str,
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    link_name: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    mode: u64,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(skip_serializing_if = "is_zero")]
    uid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    gid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    modtime: Option<String>,
    #[serde(skip_serializing_if = "is_zero")]
    dev_major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_minor: u64,
    #[serde(skip_serializing_if = "<[_]>::is_empty", serialize_with = "xattrs")]
    xattrs: &'a [(Vec<u8>, Vec<u8>)],
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_zero")]
    offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    inner_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_digest: Option<Digest>,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

fn xattrs<S: Serializer>(
    xattrs: &[(Vec<u8>, Vec<u8>)],
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(Some(xattrs.len()))?;
    for (name, value) in xattrs {
        map.serialize_entry(&text(name), &BASE64_STANDARD.encode(value))?;
    }
    map.end()
}

/// Names were checked when they came.
fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

fn rows<S: Serializer>(
    &(rows, units, codec): &(&[Row], &[u64], Codec),
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    to.collect_seq(rows.iter().flat_map(|row| items(row, units, codec)))
}

/// The entry of a row, and those of its chunks after the first.
fn items<'a>(row: &'a Row, units: &'a [u64], codec: Codec) -> impl Iterator<Item = Item<'a>> {
    let entry = &row.entry;
    let (mut kind, mut link, mut size, mut device) = ("reg", &[][..], 0, (0, 0));
    match &entry.kind {
        TarKind::Directory => kind = "dir",
        TarKind::File(n) => size = *n,
        TarKind::Symlink(target) => (kind, link) = ("symlink", target),
        TarKind::HardLink(target) => (kind, link) = ("hardlink", target),
        TarKind::CharDevice(major, minor) => (kind, device) = ("char", (*major, *minor)),
        TarKind::BlockDevice(major, minor) => (kind, device) = ("block", (*major, *minor)),
        TarKind::Fifo | TarKind::Other(_) => kind = "fifo",
    }
    let place = move |unit: usize| units.get(unit).copied().unwrap_or_default();
    let is_file = kind == "reg";
    let digest = match &row.chunks[..] {
        [] => is_file.then(|| Digest::of([])),
        [only] => only.digest,
        [_, ..] => row.digest,
    };
    let first = Item {
        r#type: kind,
        name: text(&entry.path),
        link_name: text(link),
        mode: u64::from(entry.mode & 0o7777),
        size,
        uid: entry.uid.into(),
        gid: entry.gid.into(),
        modtime: modtime(entry.mtime),
        dev_major: device.0.into(),
        dev_minor: device.1.into(),
        xattrs: &entry.xattrs,
        digest,
        ..Item::default()
    };
    let several = row.chunks.len() > 1;
    let mut first = Some(first);
    let last = row.chunks.len().checked_sub(1);
    let with = move |mut item: Item<'a>, number: usize, chunk: &ChunkRow| {
        // containers/storage fetches up to here, and takes what the last chunk says; in eStargz
        // nobody looks at it.
        if codec == Codec::Zstd && (number == 0 || Some(number) == last) {
            item.end_offset = row.chunks.last().map_or(0, |last| place(last.unit + 1));
        }
        item.offset = place(chunk.unit);
        item.inner_offset = chunk.inner;
        item.chunk_offset = chunk.file_offset;
        // Where there is one chunk, it is the file.
        item.chunk_size = if several { chunk.size } else { 0 };
        item.chunk_digest = chunk.digest;
        item
    };
    let lone = if row.chunks.is_empty() { first.take() } else { None };
    let chunks = row.chunks.iter().enumerate().map(move |(number, chunk)| {
        let next = || Item { r#type: "chunk", name: text(&entry.path), ..Item::default() };
        with(first.take().unwrap_or_else(next), number, chunk)
    });
    lone.into_iter().chain(chunks)
}

/// Written for 1970, too: for stargz-snapshotter a time that is not there is in the year 1.
fn modtime(Time { seconds, nanoseconds }: Time) -> Option<String> {
    jiff::Timestamp::new(seconds, nanoseconds as i32).ok().map(|time| time.to_string())
}

/// The table of contents of `rows`, whose units begin at `units` (the last is where the data ends).
pub fn json(
    rows: &[Row],
    units: &[u64],
    codec: Codec,
    tar_split_digest: Option<Digest>,
) -> Result<Vec<u8>> {
    let entries: usize = rows.iter().map(|row| row.chunks.len().max(1)).sum();
    if entries > MAX_ENTRIES {
        return Err(Error::TooLarge {
            what: "a table of contents with entries",
            size: entries as u64,
            limit: MAX_ENTRIES as u64,
        });
    }
    let json = serde_json::to_vec(&Document {
        version: 1,
        entries: (rows, units, codec),
        tar_split_digest,
    })
    .map_err(io::Error::from)?;
    match json.len() as u64 {
        size if size > MAX_TOC => {
            Err(Error::TooLarge { what: "a table of contents", size, limit: MAX_TOC })
        }
        _ => Ok(json),
    }
}
