//! The blocks that tar consists of, and the numbers in a header.

use super::{MAX_SPECIAL, broken};
use std::io::{self, ErrorKind, Read};

/// Bytes of a block.
pub const BLOCK: usize = 512;

/// A header block.
#[derive(Clone)]
pub struct Header(pub [u8; BLOCK]);

/// Zeros that fill `size` bytes up to a whole block.
pub fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

/// The next block; none if the input ends before it.
pub fn read(tar: &mut dyn Read) -> io::Result<Option<[u8; BLOCK]>> {
    let mut block = [0; BLOCK];
    let mut have = 0;
    while have < BLOCK {
        match tar.read(&mut block[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(cut()),
            Ok(n) => have += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Some(block))
}

/// The error of an archive that ends too early.
pub fn cut() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "the archive ends too early")
}

/// The content of a special entry, without its padding.
pub fn special(tar: &mut dyn Read, size: u64) -> io::Result<Vec<u8>> {
    if size > MAX_SPECIAL {
        return Err(broken("an extended header is too large"));
    }
    let mut content = vec![0; size as usize + padding(size)];
    tar.read_exact(&mut content)
        .map_err(|e| if e.kind() == ErrorKind::UnexpectedEof { cut() } else { e })?;
    content.truncate(size as usize);
    Ok(content)
}

/// An octal number, or a binary one as GNU tar has it. Empty fields are common and mean zero.
pub fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let start = if negative { i128::from(first as i8) } else { i128::from(first & 0x7f) };
        // What is beyond 64 bits cannot come back from there.
        let all = field[1..]
            .iter()
            .try_fold(start, |n, b| n.checked_mul(256)?.checked_add(i128::from(*b)))?;
        return i64::try_from(all).ok();
    }
    let text = field.split(|b| *b == 0).find(|part| !part.is_empty()).unwrap_or_default();
    let text = std::str::from_utf8(text).ok()?.trim();
    if text.is_empty() { Some(0) } else { i64::from_str_radix(text, 8).ok().filter(|n| *n >= 0) }
}

/// The bytes of a text field up to the first zero.
pub fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

impl Header {
    /// Whether it is one of the zero blocks that end an archive.
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }

    /// The kind of entry.
    pub fn kind(&self) -> u8 {
        self.0[156]
    }

    /// Whether the checksum is right, counted with bytes as they are or, as some old programs did,
    /// with signed ones.
    pub fn is_whole(&self) -> bool {
        let written = number(&self.0[148..156]);
        let byte = |(i, b): (usize, &u8)| if (148..156).contains(&i) { b' ' } else { *b };
        let all = || self.0.iter().enumerate().map(byte);
        let plain: i64 = all().map(i64::from).sum();
        let signed: i64 = all().map(|b| i64::from(b as i8)).sum();
        written == Some(plain) || written == Some(signed)
    }

    /// What the field says the entry's content takes.
    pub fn size(&self) -> io::Result<u64> {
        number(&self.0[124..136])
            .and_then(|n| u64::try_from(n).ok())
            .ok_or_else(|| broken("a size is not a number"))
    }

    /// The time, in seconds.
    pub fn mtime(&self) -> Option<i64> {
        number(&self.0[136..148])
    }

    pub fn is_gnu(&self) -> bool {
        &self.0[257..265] == b"ustar  \0"
    }

    fn is_ustar(&self) -> bool {
        &self.0[257..263] == b"ustar\0"
    }

    /// The name as the header itself has it.
    pub fn name(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        // Schily's tar has times after a shorter prefix.
        let prefix =
            if &self.0[508..512] == b"tar\0" { &self.0[345..476] } else { &self.0[345..500] };
        match text(prefix) {
            prefix if self.is_ustar() && !prefix.is_empty() => [prefix, b"/", name].concat(),
            _ => name.to_vec(),
        }
    }

    /// The target of a link.
    pub fn link_name(&self) -> &[u8] {
        text(&self.0[157..257])
    }

    /// The name of an owner or a group in `field`, which headers of the oldest kind do not have.
    pub fn owner_name(&self, field: std::ops::Range<usize>) -> &[u8] {
        if self.is_ustar() || self.is_gnu() { text(&self.0[field]) } else { &[] }
    }

    /// Sets the time and the checksum with it.
    pub fn set_mtime(&mut self, time: i64) {
        self.0[136..148].copy_from_slice(format!("{:011o}\0", time.max(0)).as_bytes());
        self.sum();
    }

    /// Sets the size, which must fit, and the checksum with it.
    pub fn set_size(&mut self, size: u64) {
        self.0[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        self.sum();
    }

    fn sum(&mut self) {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|b| u32::from(*b)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// Whether entries of a kind have no content, whatever their size says: links, devices,
/// directories.
pub fn is_bare(kind: u8) -> bool {
    matches!(kind, b'1'..=b'6')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        let check =
            |field: &[u8], expected: Option<i64>| assert_eq!(number(field), expected, "{field:?}");
        check(b"0000644\0", Some(0o644));
        check(b"   644 \0", Some(0o644));
        check(b"\0\0\0\0\0\0\0\0", Some(0));
        check(b"9\0", None);
        check(b"-1\0", None);
        check(b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(2 << 32));
        check(&[0xff; 12], Some(-1));
        check(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", None);
        check(b"\xc0\0\0\0\0\0\0\0\0\0\0\0", None);
        check(b"", None);
    }
}
