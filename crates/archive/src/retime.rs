//! A layer with no time later than a given one (row `ex.c.rewrite`): its headers are written anew,
//! its files are not touched.

use crate::{
    Compression, CompressionKind, Packed,
    block::BLOCK,
    decompress,
    indexed::FormatFiles,
    pack::flow,
    tar::{
        block::{self, Header, padding},
        pax,
    },
};
use bytes::Bytes;
use shipway_fault::{Code, Fault, Result};
use std::{
    io::{self, ErrorKind, Read},
    num::NonZero,
};

/// Packs the layer that `input` gives piece by piece and that is compressed as `from` says, with
/// every time later than `latest` (seconds since the epoch) set to it. Otherwise as
/// [`crate::pack()`].
pub fn retime(
    input: &mut (dyn FnMut() -> Result<Option<Bytes>> + Send),
    from: CompressionKind,
    latest: i64,
    compression: Compression,
    threads: Option<NonZero<usize>>,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let produce = |emit: &mut dyn FnMut(Bytes) -> bool| {
        let mut out = Out { emit, block: Vec::with_capacity(BLOCK) };
        rewrite(&mut *decompress::reader(from, input)?, latest, &mut out)?;
        out.flush().map(|()| None)
    };
    flow(compression, (None, FormatFiles::LeftOut), threads, produce, sink)
}

struct Out<'a> {
    emit: &'a mut dyn FnMut(Bytes) -> bool,
    block: Vec<u8>,
}

impl Out<'_> {
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let n = bytes.len().min(BLOCK - self.block.len());
            self.block.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.block.len() == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(BLOCK));
        if block.is_empty() || (self.emit)(block.into()) { Ok(()) } else { Err(Fault::cancelled()) }
    }
}

/// The fault of a read: the input's own, if that is what failed.
fn fault(error: io::Error) -> Fault {
    match error.kind() {
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => {
            Fault::new(Code::DataLoss, format!("read a layer: {error}"))
        }
        _ => decompress::fault(error),
    }
}

fn rewrite(tar: &mut dyn Read, latest: i64, out: &mut Out<'_>) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    // The size that an extended header gives to the entry after it.
    let mut extended = None;
    while let Some(mut header) = block::read(tar).map_err(fault)?.map(Header) {
        if header.is_zero() {
            out.put(&header.0)?;
            continue;
        }
        let size = header.size().map_err(fault)?;
        if header.mtime().is_some_and(|time| time > latest) {
            header.set_mtime(latest);
        }
        match header.kind() {
            kind @ (b'x' | b'g') => {
                let old = block::special(tar, size).map_err(fault)?;
                let (records, times_set) = times(&old, latest);
                if kind == b'x' {
                    extended = times_set;
                }
                if records != old {
                    header.set_size(records.len() as u64);
                }
                out.put(&header.0)?;
                out.put(&records)?;
                out.put(&[0; block::BLOCK][..padding(records.len() as u64)])?;
                continue;
            }
            // The name of the entry that follows; its size is not meant.
            b'L' | b'K' => {
                out.put(&header.0)?;
                copy(tar, size, &mut buffer, out)?;
                continue;
            }
            _ => out.put(&header.0)?,
        }
        // More of the map of a sparse file.
        let mut more = header.kind() == b'S' && header.is_gnu() && header.0[482] != 0;
        while more {
            let map = block::read(tar).map_err(fault)?.ok_or_else(|| fault(block::cut()))?;
            out.put(&map)?;
            more = map[504] != 0;
        }
        let size = if block::is_bare(header.kind()) { 0 } else { extended.unwrap_or(size) };
        extended = None;
        copy(tar, size, &mut buffer, out)?;
    }
    Ok(())
}

/// Copies content with its padding.
fn copy(tar: &mut dyn Read, size: u64, buffer: &mut [u8], out: &mut Out<'_>) -> Result<()> {
    let mut left = size.saturating_add(padding(size) as u64);
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
        tar.read_exact(&mut buffer[..n]).map_err(|e| {
            if e.kind() == ErrorKind::UnexpectedEof { fault(block::cut()) } else { fault(e) }
        })?;
        out.put(&buffer[..n])?;
        left -= n as u64;
    }
    Ok(())
}

/// Extended records with their times clamped, and the size that they give. What is not a record
/// stays as it is.
fn times(records: &[u8], latest: i64) -> (Vec<u8>, Option<u64>) {
    let mut out = Vec::with_capacity(records.len());
    let (mut rest, mut size) = (records, None);
    while let Some((record, more)) = pax::take(rest) {
        let value = std::str::from_utf8(record.value).ok();
        let seconds = value.and_then(|v| v.split('.').next()?.parse::<i64>().ok());
        let late = matches!(record.key, b"mtime" | b"atime" | b"ctime")
            && seconds.is_some_and(|s| s >= latest);
        if late {
            out.extend(pax::record(record.key, latest.to_string().as_bytes()));
        } else {
            out.extend_from_slice(record.whole);
        }
        if record.key == b"size" {
            size = value.and_then(|v| v.parse().ok());
        }
        rest = more;
    }
    out.extend_from_slice(rest);
    (out, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, time) in [("old", 100), ("new", 5000)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(3);
            header.set_mode(0o644);
            header.set_mtime(time);
            tar.append_data(&mut header, name, &b"abc"[..]).unwrap();
        }
        tar.append_pax_extensions([("mtime", &b"5000.25"[..]), ("comment", &b"x"[..])]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        header.set_mtime(7000);
        tar.append_data(&mut header, "extended", &b""[..]).unwrap();
        tar.into_inner().unwrap()
    }

    fn retimed(tar: &[u8], latest: i64) -> Result<Vec<u8>> {
        let mut pieces =
            tar.chunks(700).map(Bytes::copy_from_slice).collect::<Vec<_>>().into_iter();
        let mut out = Vec::new();
        let plain = Compression { kind: CompressionKind::Uncompressed, ..Compression::default() };
        retime(
            &mut || Ok(pieces.next()),
            CompressionKind::Uncompressed,
            latest,
            plain,
            None,
            &mut |b| {
                out.extend_from_slice(&b);
                Ok(())
            },
        )?;
        Ok(out)
    }

    #[test]
    fn later_times_become_the_latest_and_nothing_else_changes() {
        let out = retimed(&layer(), 1000).unwrap();
        let mut seen = Vec::new();
        for entry in tar::Archive::new(&out[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let pax = entry
                .pax_extensions()
                .unwrap()
                .map(|p| p.map(|p| p.unwrap().value().unwrap().to_owned()).collect::<Vec<_>>());
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            seen.push((
                entry.path().unwrap().display().to_string(),
                entry.header().mtime().unwrap(),
                text,
                pax,
            ));
        }
        let want = [
            ("old", 100, "abc", None),
            ("new", 1000, "abc", None),
            ("extended", 1000, "", Some(vec!["1000".to_owned(), "x".to_owned()])),
        ];
        assert_eq!(seen, want.map(|(n, t, c, p)| (n.to_owned(), t, c.to_owned(), p)));
        assert!(retimed(&layer(), i64::MAX).unwrap() == layer());
    }

    #[test]
    fn the_size_may_be_in_an_extended_header() {
        // As of a file of more than 8 GiB, whose size does not fit into its header.
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_pax_extensions([("size", &b"1030"[..]), ("mtime", b"5000")]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("large").unwrap();
        header.set_size(0);
        header.set_mtime(7000);
        header.set_cksum();
        // Its content looks like a header with a time that is late.
        let mut tar = tar.into_inner().unwrap();
        tar.truncate(1024);
        let content = [header.as_bytes(), header.as_bytes(), &[0; 512][..]].concat();
        tar.extend([&header.as_bytes()[..], &content, &[0; 1024]].concat());
        let out = retimed(&tar, 1000).unwrap();
        let large = out.windows(512).position(|w| w.starts_with(b"large\0")).unwrap();
        assert!(out[large + 512..] == [&content[..], &[0; 1024]].concat()[..]);
        assert!(out[large + 136..].starts_with(b"00000001750\0"));
    }

    #[test]
    fn broken_tars_are_refused() {
        let tar = layer();
        for bad in [&tar[..600], &tar[..300]] {
            assert!(retimed(bad, 1).is_err());
        }
        let mut huge = tar.clone();
        huge[124..136].copy_from_slice(b"zzzzzzzzzzz\0");
        assert!(retimed(&huge, 1).is_err());
        // An extended header larger than any.
        let mut bomb = tar::Header::new_ustar();
        bomb.set_entry_type(tar::EntryType::XHeader);
        bomb.set_size(8 << 30);
        bomb.set_cksum();
        assert!(retimed(bomb.as_bytes(), 1).unwrap_err().to_string().contains("too large"));
    }
}
