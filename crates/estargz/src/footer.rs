//! Where the table of contents is: footers, and what manifests say.
//!
//! Formats, each at the very end of the blob:
//!
//! - eStargz: an empty gzip member of 51 bytes whose extra field has the subfield `SG`, 16
//!   hexadecimal digits with the offset of the table of contents, and `STARGZ`; without the
//!   subfield's header, 47 bytes, in what came before (stargz-snapshotter, docs/estargz.md). With
//!   `STARGZEXTERNALTOC` instead, 46 bytes, the table of contents is somewhere else.
//! - zstd:chunked: a skippable frame (RFC 8878 3.1.2) of 40 bytes with four numbers (offset,
//!   compressed and uncompressed length of the table of contents, type 1) and a magic text, in two
//!   spellings: `GnUlInUx` by stargz-snapshotter, `GNUlInUx` by containers/storage, whose frames
//!   have 64 bytes today with three numbers more, for the tar-split.

use crate::{Codec, Error, Result};
use std::ops::Range;

/// Bytes of an eStargz footer.
pub const ESTARGZ_FOOTER: usize = 51;
/// Bytes of the footer of stargz, the format that eStargz extends.
pub const STARGZ_FOOTER: usize = 47;
/// Bytes of the footer of a blob whose table of contents is elsewhere.
pub const EXTERNAL_FOOTER: usize = 46;
/// Bytes of a zstd:chunked footer within its frame.
pub const ZSTD_FOOTER: usize = 40;
/// Bytes of a zstd:chunked footer with the tar-split's place.
pub const ZSTD_FOOTER_TAR_SPLIT: usize = 64;
/// Bytes of the end of a blob that show every footer: the longest one with the header of its frame.
pub const LONGEST_FOOTER: usize = ZSTD_FOOTER_TAR_SPLIT + FRAME_HEADER;

/// Most bytes that a compressed table of contents may have: it is held in memory.
pub const MAX_COMPRESSED_TOC: u64 = 128 << 20;
/// Most bytes that a table of contents may have. A million entries take some 400 MB; they are read
/// as a stream.
pub const MAX_TOC: u64 = 512 << 20;

/// Magic number and length of a skippable frame.
pub(crate) const FRAME_HEADER: usize = 8;
pub(crate) const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
pub(crate) const MAGIC_STARGZ: &[u8; 8] = b"GnUlInUx";
pub(crate) const MAGIC_PODMAN: &[u8; 8] = b"GNUlInUx";
/// The only type of table that a zstd:chunked footer names.
pub(crate) const TYPE_CRFS: u64 = 1;
const GZIP_HEADER: [u8; 10] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
/// A last, stored block without bytes, and the checksum and length of nothing.
const GZIP_EMPTY: [u8; 13] = [1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
const EXTERNAL: &[u8] = b"STARGZEXTERNALTOC";

/// Where the parts of an indexed layer are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How chunks and the table of contents are compressed.
    pub codec: Codec,
    /// Where the layer's own data ends, and what is only of use to readers of the index begins.
    pub payload_end: u64,
    /// Where in the blob the table of contents is; `None` if it is not in the blob.
    pub toc: Option<Range<u64>>,
    /// Length of the uncompressed table of contents, where the format tells.
    pub toc_size: Option<u64>,
    /// Where the tar-split is (compressed), and its uncompressed length.
    pub tar_split: Option<(Range<u64>, u64)>,
}

/// What the end of a blob shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tail {
    /// The layout.
    Layout(Layout),
    /// So many bytes of the end are needed to say.
    Need(u64),
}

impl Tail {
    /// Reads the footer of a blob of `size` bytes that ends with `suffix`.
    ///
    /// [`Error::NotIndexed`] if the blob ends otherwise: then it is an ordinary layer.
    pub fn read(suffix: &[u8], size: u64) -> Result<Self> {
        if suffix.len() as u64 > size {
            return Err(Error::Footer("the blob is shorter than its end"));
        }
        let need = size.min(LONGEST_FOOTER as u64);
        if (suffix.len() as u64) < need {
            return Ok(Self::Need(need));
        }
        let last = |n: usize| suffix.split_last_chunk_at(n);
        let layout = if let Some(footer) =
            last(ESTARGZ_FOOTER).and_then(gzip_extra).and_then(|e| subfield(e, 22))
        {
            gzip(footer, size, ESTARGZ_FOOTER)?
        } else if let Some(footer) = last(STARGZ_FOOTER)
            .and_then(gzip_extra)
            .filter(|e| e.len() == 22 && e.ends_with(b"STARGZ"))
        {
            gzip(footer, size, STARGZ_FOOTER)?
        } else if last(EXTERNAL_FOOTER)
            .and_then(gzip_extra)
            .and_then(|e| subfield(e, EXTERNAL.len()))
            == Some(EXTERNAL)
        {
            let payload_end = size - EXTERNAL_FOOTER as u64;
            Layout { codec: Codec::Gzip, payload_end, toc: None, toc_size: None, tar_split: None }
        } else if let Some(footer) = frame(suffix, ZSTD_FOOTER) {
            zstd(footer, size)?
        } else if let Some(footer) =
            frame(suffix, ZSTD_FOOTER_TAR_SPLIT).filter(|f| f.ends_with(MAGIC_PODMAN))
        {
            zstd(footer, size)?
        } else {
            return Err(Error::NotIndexed);
        };
        Ok(Self::Layout(layout))
    }
}

impl Layout {
    /// The part of a blob of `size` bytes that is still to be fetched for the table of contents, if
    /// its last `have` bytes are there; `None` if nothing is.
    pub fn missing(&self, size: u64, have: u64) -> Option<Range<u64>> {
        let toc = self.toc.as_ref()?;
        let from = size.saturating_sub(have);
        (toc.start < from).then(|| toc.start..toc.end.min(from))
    }

    /// The compressed table of contents in `suffix`, the end of a blob of `size` bytes; `None` if
    /// it is not whole there.
    pub fn toc_in<'a>(&self, suffix: &'a [u8], size: u64) -> Option<&'a [u8]> {
        let (toc, from) = (self.toc.as_ref()?, size.checked_sub(suffix.len() as u64)?);
        let within = |at: u64| at.checked_sub(from).and_then(|n| usize::try_from(n).ok());
        suffix.get(within(toc.start)?..within(toc.end)?)
    }

    /// Checks what was read against the size of the blob.
    pub(crate) fn checked(self, size: u64) -> Result<Self> {
        let inside = |part: &Range<u64>| {
            part.start < part.end && part.end <= size && part.start >= self.payload_end
        };
        let Some(toc) = &self.toc else { return Ok(self) };
        if self.payload_end > size || !inside(toc) {
            return Err(Error::Footer("the table of contents is outside of the blob"));
        }
        if self.tar_split.as_ref().is_some_and(|(part, _)| !inside(part)) {
            return Err(Error::Footer("the tar-split is outside of the blob"));
        }
        let lengths = [("a compressed table of contents", toc.end - toc.start, MAX_COMPRESSED_TOC)];
        let lengths =
            lengths.into_iter().chain(self.toc_size.map(|n| ("a table of contents", n, MAX_TOC)));
        for (what, size, limit) in lengths {
            if size > limit {
                return Err(Error::TooLarge { what, size, limit });
            }
        }
        Ok(self)
    }
}

/// The last `n` bytes of something.
trait SplitLast {
    fn split_last_chunk_at(&self, n: usize) -> Option<&[u8]>;
}

impl SplitLast for [u8] {
    fn split_last_chunk_at(&self, n: usize) -> Option<&[u8]> {
        self.len().checked_sub(n).map(|at| &self[at..])
    }
}

/// The extra field of an empty gzip member that is all of `footer`. What the header says of time
/// and system counts for nothing, as for other readers.
fn gzip_extra(footer: &[u8]) -> Option<&[u8]> {
    let rest = footer.strip_prefix(&GZIP_HEADER[..4])?.get(6..)?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (extra, end) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    (end == GZIP_EMPTY).then_some(extra)
}

/// The content of the subfield `SG`, which must be the only one and have `length` bytes (RFC 1952
/// 2.3.1.1).
fn subfield(extra: &[u8], length: usize) -> Option<&[u8]> {
    let (size, content) = extra.strip_prefix(b"SG")?.split_first_chunk::<2>()?;
    (usize::from(u16::from_le_bytes(*size)) == length && content.len() == length).then_some(content)
}

fn gzip(content: &[u8], size: u64, footer: usize) -> Result<Layout> {
    let digits = content.strip_suffix(b"STARGZ").ok_or(Error::NotIndexed)?;
    let digits =
        std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
    let start = digits
        .and_then(|d| u64::from_str_radix(d, 16).ok())
        .ok_or(Error::Footer("its offset is no number"))?;
    let toc = Some(start..size - footer as u64);
    Layout { codec: Codec::Gzip, payload_end: start, toc, toc_size: None, tar_split: None }
        .checked(size)
}

/// The content of a skippable frame of `length` bytes at the end that has a magic text at its own
/// end.
fn frame(suffix: &[u8], length: usize) -> Option<&[u8]> {
    let rest = suffix.split_last_chunk_at(FRAME_HEADER + length)?.strip_prefix(&SKIPPABLE)?;
    let content = rest.strip_prefix(&(length as u32).to_le_bytes())?;
    (content.ends_with(MAGIC_STARGZ) || content.ends_with(MAGIC_PODMAN)).then_some(content)
}

fn zstd(footer: &[u8], size: u64) -> Result<Layout> {
    let numbers: Vec<u64> =
        footer.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n)).collect();
    let tar_split = match numbers[..] {
        [_, _, _, _, offset, length, whole, _] => Some([offset, length, whole]),
        _ => None,
    };
    let [offset, length, whole, kind, ..] = numbers[..] else {
        return Err(Error::Footer("it is too short"));
    };
    zstd_layout([offset, length, whole, kind], tar_split, size)
}

/// The layout from the numbers of a footer or of annotations.
pub(crate) fn zstd_layout(toc: [u64; 4], tar_split: Option<[u64; 3]>, size: u64) -> Result<Layout> {
    let [offset, length, whole, kind] = toc;
    if kind != TYPE_CRFS {
        return Err(Error::Footer("its table of contents has a type that we do not know"));
    }
    let end = |offset: u64, length| {
        offset.checked_add(length).ok_or(Error::Footer("a length is out of range"))
    };
    // The table is in a skippable frame of its own.
    let payload_end = offset
        .checked_sub(FRAME_HEADER as u64)
        .ok_or(Error::Footer("the table of contents is outside of the blob"))?;
    let tar_split = match tar_split {
        Some([offset, length, whole]) if length > 0 => Some((offset..end(offset, length)?, whole)),
        _ => None,
    };
    let toc = Some(offset..end(offset, length)?);
    Layout { codec: Codec::Zstd, payload_end, toc, toc_size: Some(whole), tar_split }.checked(size)
}

/// The footer of an eStargz blob whose table of contents begins at `toc`.
pub(crate) fn write_gzip(toc: u64) -> Vec<u8> {
    let content = format!("{toc:016x}STARGZ");
    gzip_footer(content.as_bytes())
}

/// The footer of a blob whose table of contents is elsewhere.
pub(crate) fn write_external() -> Vec<u8> {
    gzip_footer(EXTERNAL)
}

fn gzip_footer(content: &[u8]) -> Vec<u8> {
    let length = content.len() as u16;
    let (extra, field) = ((length + 4).to_le_bytes(), length.to_le_bytes());
    [&GZIP_HEADER[..], &extra, b"SG", &field, content, &GZIP_EMPTY].concat()
}

/// A skippable frame with `content`, which must be shorter than 4 GiB.
pub(crate) fn skippable(content: &[u8]) -> Vec<u8> {
    [&SKIPPABLE[..], &(content.len() as u32).to_le_bytes(), content].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(blob: &[u8]) -> Result<Layout> {
        match Tail::read(blob, blob.len() as u64)? {
            Tail::Layout(layout) => Ok(layout),
            Tail::Need(n) => panic!("{n} bytes are needed of {}", blob.len()),
        }
    }

    /// A blob of 1000 bytes, then a footer.
    fn with(footer: &[u8]) -> Vec<u8> {
        [&[7; 1000][..], footer].concat()
    }

    fn chunked(numbers: &[u64], magic: &[u8; 8]) -> Vec<u8> {
        let content: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).chain(*magic).collect();
        with(&skippable(&content))
    }

    #[test]
    fn every_footer_is_read() {
        let footer = write_gzip(0x123);
        assert_eq!((footer.len(), write_external().len()), (ESTARGZ_FOOTER, EXTERNAL_FOOTER));
        let read = layout(&with(&footer)).unwrap();
        assert_eq!(
            (read.toc, read.payload_end, read.codec),
            (Some(0x123..1000), 0x123, Codec::Gzip)
        );
        let legacy = [&GZIP_HEADER[..], &[22, 0], b"0000000000000123STARGZ", &GZIP_EMPTY].concat();
        assert_eq!(
            (legacy.len(), layout(&with(&legacy)).unwrap().toc),
            (STARGZ_FOOTER, Some(0x123..1000))
        );
        let external = layout(&with(&write_external())).unwrap();
        assert_eq!((external.toc, external.payload_end), (None, 1000));
        for magic in [MAGIC_STARGZ, MAGIC_PODMAN] {
            let read = layout(&chunked(&[508, 100, 700, 1], magic)).unwrap();
            assert_eq!(
                (read.toc, read.toc_size, read.payload_end, read.codec),
                (Some(508..608), Some(700), 500, Codec::Zstd)
            );
        }
        let read = layout(&chunked(&[508, 100, 700, 1, 616, 20, 90], MAGIC_PODMAN)).unwrap();
        assert_eq!((read.toc, read.tar_split), (Some(508..608), Some((616..636, 90))));
    }

    #[test]
    fn a_short_end_says_how_much_is_needed() {
        let blob = with(&write_gzip(600));
        let size = blob.len() as u64;
        let end = |n: usize| &blob[blob.len() - n..];
        for n in [0, 50, LONGEST_FOOTER - 1] {
            assert_eq!(Tail::read(end(n), size).unwrap(), Tail::Need(LONGEST_FOOTER as u64), "{n}");
        }
        let Tail::Layout(layout) = Tail::read(end(LONGEST_FOOTER), size).unwrap() else { panic!() };
        assert_eq!(layout.missing(size, LONGEST_FOOTER as u64), Some(600..979));
        assert_eq!(layout.missing(size, 20), Some(600..1000));
        assert_eq!(layout.missing(size, size - 600), None);
        assert_eq!(layout.toc_in(end(LONGEST_FOOTER), size), None);
        assert_eq!(layout.toc_in(&blob[600..], size), Some(&blob[600..1000]));
        assert_eq!(layout.toc_in(&blob[601..], size), None);
        // A blob may be shorter than the longest footer.
        assert!(matches!(Tail::read(&write_external(), 46), Ok(Tail::Layout(_))));
        assert!(matches!(Tail::read(&[], 0), Err(Error::NotIndexed)));
        assert!(matches!(Tail::read(&[1, 2], 1), Err(Error::Footer(_))));
    }

    #[test]
    fn footers_that_cannot_be_are_refused() {
        let refused = |blob: &[u8]| match layout(blob) {
            Err(Error::Footer(_)) => {}
            other => panic!("{other:?}"),
        };
        refused(&with(&write_gzip(1000)));
        refused(&with(&write_gzip(u64::MAX)));
        let mut not_hexadecimal = write_gzip(5);
        not_hexadecimal[16] = b'+';
        refused(&with(&not_hexadecimal));
        for numbers in [
            [7, 100, 700, 1],
            [508, 0, 700, 1],
            [508, 600, 700, 1],
            [u64::MAX, 1, 1, 1],
            [508, u64::MAX, 1, 1],
            [508, 100, 1, 2],
        ] {
            refused(&chunked(&numbers, MAGIC_PODMAN));
        }
        refused(&chunked(&[508, 100, 700, 1, 20, 20, 90], MAGIC_PODMAN));
        refused(&chunked(&[508, 100, 700, 1, 616, u64::MAX, 90], MAGIC_PODMAN));
        let other = [&with(&[])[..], &[0; 80]].concat();
        assert!(matches!(layout(&other), Err(Error::NotIndexed)));
    }

    #[test]
    fn tables_of_contents_have_a_largest_size() {
        let read = |size: u64, numbers: [u64; 4]| {
            let end = chunked(&numbers, MAGIC_STARGZ);
            Tail::read(&end[end.len() - LONGEST_FOOTER..], size)
        };
        let size = MAX_COMPRESSED_TOC + 2000;
        assert!(read(size, [508, MAX_COMPRESSED_TOC, MAX_TOC, 1]).is_ok());
        assert!(matches!(
            read(size, [508, MAX_COMPRESSED_TOC + 1, 1, 1]),
            Err(Error::TooLarge { limit: MAX_COMPRESSED_TOC, .. })
        ));
        assert!(matches!(
            read(size, [508, 5, MAX_TOC + 1, 1]),
            Err(Error::TooLarge { limit: MAX_TOC, .. })
        ));
        let blob = with(&write_gzip(10));
        let read = Tail::read(
            &blob[blob.len() - LONGEST_FOOTER..],
            MAX_COMPRESSED_TOC + 10 + ESTARGZ_FOOTER as u64 + 1,
        );
        assert!(matches!(read, Err(Error::TooLarge { .. })));
    }
}
