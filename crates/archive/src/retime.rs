//! A layer with no time later than a given one (row `ex.c.rewrite`): its headers are written anew, its files are not touched.

use crate::{Compression, CompressionKind, Packed, block::BLOCK, decompress, pack::flow};
use bytes::Bytes;
use shipway_fault::{Code, Fault, Result};
use std::{
    io::{ErrorKind, Read},
    num::NonZero,
};

const RECORD: usize = 512;
/// No extended header is larger.
const MAX_EXTENDED: u64 = 1 << 20;

/// Packs the layer that `input` gives piece by piece and that is compressed as `from` says, with every time later than `latest` (seconds since the
/// epoch) set to it. Otherwise as [`crate::pack()`].
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
        out.flush()
    };
    flow(compression, None, threads, produce, sink)
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

fn broken(why: &str) -> Fault {
    Fault::new(Code::DataLoss, format!("a layer's tar is broken: {why}"))
}

/// A record, unless the tar has ended.
fn record(tar: &mut dyn Read) -> Result<Option<[u8; RECORD]>> {
    let mut header = [0; RECORD];
    let mut have = 0;
    while have < RECORD {
        match tar.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(broken("it ends within a header")),
            Ok(n) => have += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(decompress::fault(e)),
        }
    }
    Ok(Some(header))
}

fn rewrite(tar: &mut dyn Read, latest: i64, out: &mut Out<'_>) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while let Some(mut header) = record(tar)? {
        if header.iter().all(|b| *b == 0) {
            out.put(&header)?;
            continue;
        }
        let size = number(&header[124..136]).and_then(|n| u64::try_from(n).ok()).ok_or_else(|| broken("a size is no number"))?;
        let kind = header[156];
        clamp(&mut header, latest);
        if matches!(kind, b'x' | b'g') {
            let old = exactly(tar, size)?;
            let records = times(&old, latest);
            if records != old {
                set_size(&mut header, records.len() as u64);
            }
            out.put(&header)?;
            out.put(&records)?;
            out.put(&[0; RECORD][..padding(records.len() as u64)])?;
            continue;
        }
        out.put(&header)?;
        // Links, devices and directories have no content, whatever their size says.
        let size = if matches!(kind, b'1'..=b'6') { 0 } else { size };
        let mut left = size + padding(size) as u64;
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
            tar.read_exact(&mut buffer[..n]).map_err(cut)?;
            out.put(&buffer[..n])?;
            left -= n as u64;
        }
    }
    Ok(())
}

fn cut(error: std::io::Error) -> Fault {
    if error.kind() == ErrorKind::UnexpectedEof { broken("it ends within a file") } else { decompress::fault(error) }
}

fn padding(size: u64) -> usize {
    (RECORD - (size % RECORD as u64) as usize) % RECORD
}

/// The content of an extended header, without its padding.
fn exactly(tar: &mut dyn Read, size: u64) -> Result<Vec<u8>> {
    if size > MAX_EXTENDED {
        return Err(broken("an extended header is too large"));
    }
    let mut content = vec![0; size as usize + padding(size)];
    tar.read_exact(&mut content).map_err(cut)?;
    content.truncate(size as usize);
    Ok(content)
}

/// An octal number, or a binary one as GNU tar has it.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let first = if negative { i128::from(field[0] as i8) } else { i128::from(field[0] & 0x7f) };
        let all = field[1..].iter().fold(first, |n, b| (n << 8) | i128::from(*b));
        return i64::try_from(all).ok();
    }
    let text: &[u8] = field.split(|b| *b == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).ok()?.trim();
    if text.is_empty() { Some(0) } else { i64::from_str_radix(text, 8).ok() }
}

fn clamp(header: &mut [u8; RECORD], latest: i64) {
    if number(&header[136..148]).is_some_and(|time| time > latest) {
        let text = format!("{:011o}\0", latest.max(0));
        header[136..148].copy_from_slice(text.as_bytes());
        sum(header);
    }
}

fn set_size(header: &mut [u8; RECORD], size: u64) {
    header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    sum(header);
}

fn sum(header: &mut [u8; RECORD]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Extended records with their times clamped. What is no record stays as it is.
fn times(records: &[u8], latest: i64) -> Vec<u8> {
    let mut out = Vec::with_capacity(records.len());
    let mut rest = records;
    while let Some((one, more)) = take(rest) {
        let text = &one[one.iter().position(|b| *b == b' ').map_or(0, |at| at + 1)..];
        let key = text.split(|b| *b == b'=').next().unwrap_or_default();
        let value = text.get(key.len() + 1..text.len() - 1).and_then(|v| std::str::from_utf8(v).ok());
        let seconds = value.and_then(|v| v.split('.').next()?.parse::<i64>().ok());
        let late = matches!(key, b"mtime" | b"atime" | b"ctime") && seconds.is_some_and(|s| s >= latest);
        if late {
            out.extend(one_record(key, &latest.to_string()));
        } else {
            out.extend_from_slice(one);
        }
        rest = more;
    }
    out.extend_from_slice(rest);
    out
}

/// The first record, `length key=value\n`, and what follows it.
fn take(records: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = records.iter().position(|b| *b == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let whole = length > space + 1 && records.get(length.checked_sub(1)?) == Some(&b'\n');
    whole.then(|| records.split_at(length))
}

fn one_record(key: &[u8], value: &str) -> Vec<u8> {
    // The length counts its own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    let mut out = format!("{length} ").into_bytes();
    out.extend_from_slice(key);
    out.extend_from_slice(format!("={value}\n").as_bytes());
    out
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
        let mut pieces = tar.chunks(700).map(Bytes::copy_from_slice).collect::<Vec<_>>().into_iter();
        let mut out = Vec::new();
        let plain = Compression { kind: CompressionKind::Uncompressed, ..Compression::default() };
        retime(&mut || Ok(pieces.next()), CompressionKind::Uncompressed, latest, plain, None, &mut |b| {
            out.extend_from_slice(&b);
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn later_times_become_the_latest_and_nothing_else_changes() {
        let out = retimed(&layer(), 1000).unwrap();
        let mut seen = Vec::new();
        for entry in tar::Archive::new(&out[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let pax = entry.pax_extensions().unwrap().map(|p| p.map(|p| p.unwrap().value().unwrap().to_owned()).collect::<Vec<_>>());
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            seen.push((entry.path().unwrap().display().to_string(), entry.header().mtime().unwrap(), text, pax));
        }
        let want =
            [("old", 100, "abc", None), ("new", 1000, "abc", None), ("extended", 1000, "", Some(vec!["1000".to_owned(), "x".to_owned()]))];
        assert_eq!(seen, want.map(|(n, t, c, p)| (n.to_owned(), t, c.to_owned(), p)));
        assert!(retimed(&layer(), i64::MAX).unwrap() == layer());
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
    }
}
