//! zTOCs: the tables of contents of SOCI indexes, one for a layer.
//!
//! A zTOC has the entries of the layer's tar with the places of their contents in it, and
//! *checkpoints*: deflate blocks where decompression can begin, each with the [`WINDOW`] bytes
//! before it. The compressed bytes from one checkpoint to the next are a span, and have a digest.
//! The byte that a block shares with the one before it is in both spans.
//!
//! Source: awslabs/soci-snapshotter, `ztoc/fbs/ztoc.fbs`, `ztoc/compression/gzip_zinfo.c`.

use crate::{
    Error, MAX_COMPRESSED, MAX_SPAN, Result, Scan,
    checkpoints::{CHECKPOINT, Checkpoint, MAX_ZTOC},
    engine::WINDOW,
    flat::{Place, Table, Value, Writer},
    table::{self, Noted},
};
use jiff::Timestamp;
use shipway_estargz::{Codec, Content, TarEntry, TarKind, Time, Toc, TocMaker, TocPiece};
use shipway_oci::Digest;
use std::{borrow::Cow, ops::Range};

/// Bytes of the tar after which a span ends, as soci has it.
pub const ZTOC_SPAN: u64 = 4 << 20;

/// The one version that there is.
const VERSION: &[u8] = b"0.9";
/// Number of checkpoints and length of spans come before the checkpoints.
const HEADER: usize = 4 + 8;
/// Bytes of a gzip header without fields: where early zTOCs have their first checkpoint, which is
/// not written there.
const BARE_HEADER: u64 = 10;
/// Bytes that an entry and a record take in a zTOC at least.
const LEAST_ENTRY: usize = 64;
const LEAST_RECORD: usize = 16;
const BLOCK: u64 = 512;
/// Prefix of the records of extended attributes, and of those of sparse files.
const XATTR: &[u8] = b"SCHILY.xattr.";
const SPARSE: &[u8] = b"GNU.sparse.";
/// The algorithm gzip, which is the default.
const GZIP: i8 = 1;

/// An entry of the tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZtocEntry {
    /// What the tar says.
    pub tar: TarEntry,
    /// Where its contents begin in the tar, or would if it had any.
    pub offset: u64,
    /// Name of the owner.
    pub user: Vec<u8>,
    /// Name of the group.
    pub group: Vec<u8>,
    /// All its extended records (pax), those of attributes included.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl ZtocEntry {
    fn size(&self) -> u64 {
        match self.tar.kind {
            TarKind::File(size) => size,
            _ => 0,
        }
    }
}

/// A zTOC that was read and checked. What it says of the blob is still a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ztoc<'a> {
    blob_size: u64,
    tar_size: u64,
    entries: Vec<ZtocEntry>,
    checkpoints: Vec<Checkpoint<'a>>,
}

/// Counts what is made of a zTOC: things in it may be named many times.
struct Budget(usize);

impl Budget {
    fn spend(&mut self, bytes: usize) -> Result<()> {
        let left = self.0.checked_sub(bytes).ok_or(Error::Ztoc("it says things many times"))?;
        self.0 = left;
        Ok(())
    }

    fn text(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.spend(bytes.len())?;
        Ok(bytes.to_vec())
    }
}

fn unsigned(number: i64, what: &'static str) -> Result<u64> {
    u64::try_from(number).map_err(|_| Error::Ztoc(what))
}

impl<'a> Ztoc<'a> {
    /// Reads a zTOC of a layer that is compressed with gzip.
    pub fn read(bytes: &'a [u8]) -> Result<Self> {
        if bytes.len() > MAX_ZTOC {
            return Err(Error::Ztoc("it is too large"));
        }
        let root = Table::root(bytes)?;
        if root.bytes(0)? != VERSION {
            return Err(Error::Ztoc("it is not of a version that is known"));
        }
        let blob_size = unsigned(root.i64(2)?, "the size of the layer is negative")?;
        let tar_size = unsigned(root.i64(3)?, "the size of the tar is negative")?;
        let info = root.table(5)?.ok_or(Error::Ztoc("it has no checkpoints"))?;
        let checkpoints = checkpoints(&info, blob_size)?;
        // The writer's reader of tars ends at the second zero block, and there may be more.
        let tar_size = checkpoints.last().map_or(tar_size, |last| last.start.max(tar_size));
        let entries = match root.table(4)? {
            Some(toc) => entries(&toc, tar_size, Budget(bytes.len()))?,
            None => Vec::new(),
        };
        Ok(Self { blob_size, tar_size, entries, checkpoints })
    }

    /// What a zTOC says of the tar, from one without checkpoints ([`Ztoc::entries_only`]).
    pub fn read_entries(bytes: &[u8]) -> Result<Vec<ZtocEntry>> {
        match Table::root(bytes)?.table(4)? {
            Some(toc) => entries(&toc, i64::MAX as u64, Budget(bytes.len())),
            None => Ok(Vec::new()),
        }
    }

    /// A zTOC with the entries of this one and nothing else.
    pub fn entries_only(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let toc = write_entries(&mut writer, &self.entries);
        let root = writer.table(&[(4, Value::Place(toc))]);
        writer.finish(root)
    }

    /// The entries of the tar, in its order.
    pub fn entries(&self) -> &[ZtocEntry] {
        &self.entries
    }

    /// Length of the layer's blob.
    pub fn blob_size(&self) -> u64 {
        self.blob_size
    }

    /// Number of spans.
    pub fn spans(&self) -> usize {
        self.checkpoints.len()
    }

    /// Digests of the spans' compressed bytes, and where these are in the blob.
    pub fn span_digests(&self) -> impl Iterator<Item = (Range<u64>, Digest)> {
        let all = &self.checkpoints;
        let ends = all.iter().skip(1).map(|next| next.offset).chain([self.blob_size]);
        all.iter().zip(ends).map(|(span, end)| (span.begin()..end, span.digest))
    }

    /// The table of contents of `blob` and the file of its spans, as far as they have contents.
    /// Each chunk has the digest of the compressed bytes of its span.
    pub fn index(&self, blob: &Digest) -> Result<(Toc, Vec<u8>)> {
        // A block without output makes a second checkpoint at the beginning of the tar.
        let empty = self.checkpoints.iter().take_while(|c| c.start == 0).count();
        let mut all = &self.checkpoints[empty.saturating_sub(1)..];
        let mut ends = (self.blob_size, self.tar_size);
        if let Some((last, before)) = all.split_last()
            && last.start == self.tar_size
        {
            (all, ends.0) = (before, last.offset);
        }
        let end = |n: usize| all.get(n + 1).map_or(ends, |next| (next.offset, next.start));
        for (n, span) in all.iter().enumerate() {
            let (compressed, tar) = (end(n).0 - span.begin(), end(n).1 - span.start);
            for (bytes, limit) in [(tar, MAX_SPAN), (compressed, MAX_COMPRESSED)] {
                if bytes > limit {
                    return Err(Error::LongSpan { start: span.start, bytes, limit });
                }
            }
        }
        let mut maker = TocMaker::new(Codec::Gzip);
        for entry in &self.entries {
            maker.entry(&entry.tar)?;
            let (mut at, last) = (entry.offset, entry.offset + entry.size());
            while at < last {
                let n = all.partition_point(|span| span.start <= at).saturating_sub(1);
                let span = all.get(n).ok_or(Error::Ztoc("a file is in no span"))?;
                let size = end(n).1.min(last).checked_sub(at).filter(|size| *size > 0);
                let size = size.ok_or(Error::Ztoc("a file is in no span"))?;
                let (offset, inner) = (span.begin(), at - span.start);
                let content = Content::Data(span.digest);
                maker.piece(&TocPiece { offset, inner, size, content })?;
                at += size;
            }
        }
        let toc = maker.finish(|offset| {
            end(all.partition_point(|span| span.begin() <= offset).saturating_sub(1)).0
        })?;
        let noted: Vec<Noted> = all
            .iter()
            .map(|span| Noted::shared(span.begin(), span.start, span.bits, &span.window))
            .collect();
        Ok((toc, table::encode(blob, Codec::Gzip, &noted, ends)))
    }
}

fn checkpoints<'a>(info: &Table<'a>, blob_size: u64) -> Result<Vec<Checkpoint<'a>>> {
    if info.i8(0)?.unwrap_or(GZIP) != GZIP {
        return Err(Error::Ztoc("the layer is not compressed with gzip"));
    }
    let packed = info.bytes(3)?;
    let (count, _) = packed.split_first_chunk().ok_or(Error::Ztoc("it has no checkpoints"))?;
    let count = u32::from_le_bytes(*count) as usize;
    let packed = packed.get(HEADER..).unwrap_or_default();
    let (packed, rest) = packed.as_chunks::<CHECKPOINT>();
    // Early ones leave out the first checkpoint.
    let is_early = packed.len() + 1 == count;
    if !rest.is_empty() || (packed.len() != count && !is_early) || count == 0 {
        return Err(Error::Ztoc("the checkpoints are not as many as it says"));
    }
    if usize::try_from(info.i32(1)?) != Ok(count - 1) || info.vector(2)?.len() != count {
        return Err(Error::Ztoc("it has not as many spans as checkpoints"));
    }
    static NOTHING: [u8; WINDOW] = [0; WINDOW];
    let first = is_early.then_some((BARE_HEADER, 0, 0, &NOTHING[..]));
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
    let packed = packed.iter().map(|c| (word(c, 0), word(c, 8), c[16], &c[HEADER + 5..]));
    let mut all: Vec<Checkpoint<'a>> = Vec::with_capacity(count);
    for ((offset, start, bits, window), digest) in
        first.into_iter().chain(packed).zip(info.vector(2)?.texts())
    {
        let digest = std::str::from_utf8(digest?).ok().and_then(|text| text.parse().ok());
        let digest = digest.ok_or(Error::Ztoc("the digest of a span is not valid"))?;
        let window = Cow::Borrowed(window);
        let next = Checkpoint { offset, start, bits, window, digest };
        let follows = match all.last() {
            None => start == 0,
            Some(last) => last.start < start || (last.start == 0 && start == 0),
        };
        let begins = all.last().map_or(0, |last| last.begin() + 1);
        if !follows || bits > 7 || offset == 0 || next.begin() < begins || offset >= blob_size {
            return Err(Error::Ztoc("its checkpoints do not follow each other"));
        }
        all.push(next);
    }
    Ok(all)
}

fn entries(toc: &Table<'_>, tar_size: u64, mut budget: Budget) -> Result<Vec<ZtocEntry>> {
    let all = toc.vector(0)?;
    // By that there are never more than a table of contents may have.
    budget.spend(all.len().saturating_mul(LEAST_ENTRY))?;
    let (mut entries, mut end) = (Vec::with_capacity(all.len()), 0);
    for table in all.tables() {
        let entry = entry(&table?, &mut budget)?;
        // Before its contents is a header, and they are padded.
        let least = end + BLOCK;
        let after = entry.offset.checked_add(entry.size()).filter(|end| *end <= tar_size);
        let after = after.and_then(|end| end.checked_next_multiple_of(BLOCK));
        end = after
            .filter(|_| entry.offset >= least)
            .ok_or(Error::Ztoc("its entries do not follow each other in the tar"))?;
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(table: &Table<'_>, budget: &mut Budget) -> Result<ZtocEntry> {
    let path = budget.text(table.bytes(0)?)?;
    let link = table.bytes(4)?;
    let device = || {
        let number = |field| {
            let number = u32::try_from(table.i64(field)?);
            number.map_err(|_| Error::Ztoc("the number of a device is too large"))
        };
        Ok::<_, Error>((number(11)?, number(12)?))
    };
    let kind = match table.bytes(1)? {
        b"reg" => TarKind::File(unsigned(table.i64(3)?, "the size of a file is negative")?),
        b"dir" => TarKind::Directory,
        b"symlink" => TarKind::Symlink(budget.text(link)?),
        b"hardlink" => TarKind::HardLink(budget.text(link)?),
        b"char" => device().map(|(major, minor)| TarKind::CharDevice(major, minor))?,
        b"block" => device().map(|(major, minor)| TarKind::BlockDevice(major, minor))?,
        b"fifo" => TarKind::Fifo,
        _ => return Err(Error::Ztoc("an entry is of a kind that is not known")),
    };
    let (mut records, mut xattrs) = (Vec::new(), Vec::new());
    for record in table.vector(13)?.tables() {
        let record = record?;
        budget.spend(LEAST_RECORD)?;
        let (key, value) = (budget.text(record.bytes(0)?)?, budget.text(record.bytes(1)?)?);
        if key.starts_with(SPARSE) {
            return Err(Error::Sparse(String::from_utf8_lossy(&path).chars().take(200).collect()));
        }
        if let Some(name) = key.strip_prefix(XATTR) {
            xattrs.push((name.to_vec(), value.clone()));
        }
        records.push((key, value));
    }
    let tar = TarEntry {
        path,
        kind,
        mode: (table.i64(5)? & 0o7777) as u32,
        uid: table.i32(6)? as u32,
        gid: table.i32(7)? as u32,
        mtime: time(table.bytes(10)?)?,
        xattrs,
    };
    Ok(ZtocEntry {
        tar,
        offset: unsigned(table.i64(2)?, "the place of an entry is negative")?,
        user: budget.text(table.bytes(8)?)?,
        group: budget.text(table.bytes(9)?)?,
        records,
    })
}

/// A time as in RFC 3339.
fn time(text: &[u8]) -> Result<Time> {
    let time = std::str::from_utf8(text).ok().and_then(|text| text.parse::<Timestamp>().ok());
    let time = time.ok_or(Error::Ztoc("the time of an entry is not valid"))?.as_nanosecond();
    let second = 1_000_000_000;
    // Both fit: the years of such times have four digits.
    let (seconds, nanoseconds) = (time.div_euclid(second), time.rem_euclid(second));
    Ok(Time { seconds: seconds as i64, nanoseconds: nanoseconds as u32 })
}

/// The same as Go writes it in UTC. Times that it cannot write are the first it can.
fn time_text(time: Time) -> String {
    Timestamp::new(time.seconds, time.nanoseconds as i32)
        .map_or_else(|_| "0001-01-01T00:00:00Z".to_owned(), |time| time.to_string())
}

fn write_entries(writer: &mut Writer, entries: &[ZtocEntry]) -> Place {
    let mut places: Vec<Place> =
        entries.iter().rev().map(|entry| write_entry(writer, entry)).collect();
    places.reverse();
    let all = writer.vector(&places);
    writer.table(&[(0, Value::Place(all))])
}

fn write_entry(writer: &mut Writer, entry: &ZtocEntry) -> Place {
    let ZtocEntry { tar, user, group, .. } = entry;
    let (kind, link, device) = match &tar.kind {
        TarKind::Directory => ("dir", &[][..], (0, 0)),
        TarKind::Symlink(target) => ("symlink", &target[..], (0, 0)),
        TarKind::HardLink(target) => ("hardlink", &target[..], (0, 0)),
        TarKind::CharDevice(major, minor) => ("char", &[][..], (*major, *minor)),
        TarKind::BlockDevice(major, minor) => ("block", &[][..], (*major, *minor)),
        TarKind::Fifo => ("fifo", &[][..], (0, 0)),
        TarKind::File(_) | TarKind::Other(_) => ("reg", &[][..], (0, 0)),
    };
    let name = writer.string(&tar.path);
    let kind = writer.string(kind.as_bytes());
    let link = writer.string(link);
    let user = writer.string(user);
    let group = writer.string(group);
    let time = writer.string(time_text(tar.mtime).as_bytes());
    // As in a map of Go: sorted, and of several with one key the last.
    let records: std::collections::BTreeMap<_, _> =
        entry.records.iter().map(|(key, value)| (key, value)).collect();
    let records: Vec<Place> = records
        .into_iter()
        .map(|(key, value)| {
            let (key, value) = (writer.string(key), writer.string(value));
            writer.table(&[(0, Value::Place(key)), (1, Value::Place(value))])
        })
        .collect();
    let records = writer.vector(&records);
    writer.table(&[
        (0, Value::Place(name)),
        (1, Value::Place(kind)),
        (2, Value::I64(entry.offset as i64)),
        (3, Value::I64(entry.size() as i64)),
        (4, Value::Place(link)),
        (5, Value::I64(tar.mode.into())),
        (6, Value::I32(tar.uid as i32)),
        (7, Value::I32(tar.gid as i32)),
        (8, Value::Place(user)),
        (9, Value::Place(group)),
        (10, Value::Place(time)),
        (11, Value::I64(device.0.into())),
        (12, Value::I64(device.1.into())),
        (13, Value::Place(records)),
    ])
}

impl Scan {
    /// The zTOC of the blob, which was read by a scanner [with
    /// checkpoints](crate::Scanner::with_checkpoints). `tar_end` is where the reader of the tar
    /// stopped, before its second zero block; `tool` says who made it.
    pub fn ztoc(&self, entries: &[ZtocEntry], tar_end: u64, tool: &str) -> Result<Vec<u8>> {
        let all = &self.checkpoints;
        if all.is_empty() {
            return Err(Error::Ztoc("the layer has no blocks"));
        }
        let mut packed = Vec::with_capacity(HEADER + all.len() * CHECKPOINT);
        packed.extend_from_slice(&(all.len() as u32).to_le_bytes());
        packed.extend_from_slice(&self.checkpoint_length.to_le_bytes());
        for checkpoint in all {
            packed.extend_from_slice(&checkpoint.offset.to_le_bytes());
            packed.extend_from_slice(&checkpoint.start.to_le_bytes());
            packed.push(checkpoint.bits);
            packed.extend_from_slice(&checkpoint.window);
        }
        let mut writer = Writer::default();
        let version = writer.string(VERSION);
        let tool = writer.string(tool.as_bytes());
        let toc = write_entries(&mut writer, entries);
        let packed = writer.bytes(&packed);
        let digests: Vec<Place> = all
            .iter()
            .map(|checkpoint| writer.string(checkpoint.digest.to_string().as_bytes()))
            .collect();
        let digests = writer.vector(&digests);
        let info = writer.table(&[
            (1, Value::I32(all.len() as i32 - 1)),
            (2, Value::Place(digests)),
            (3, Value::Place(packed)),
        ]);
        let tar_size = tar_end.saturating_add(BLOCK).min(self.tar_size);
        let root = writer.table(&[
            (0, Value::Place(version)),
            (1, Value::Place(tool)),
            (4, Value::Place(toc)),
            (2, Value::I64(self.size as i64)),
            (3, Value::I64(tar_size as i64)),
            (5, Value::Place(info)),
        ]);
        let bytes = writer.finish(root);
        if bytes.len() > MAX_ZTOC {
            return Err(Error::Ztoc("it would be too large"));
        }
        Ok(bytes)
    }
}
