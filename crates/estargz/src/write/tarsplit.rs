//! The tar-split of a layer: everything of the tar but the data of files, so that the tar can be
//! made again from an unpacked layer (vbatts/tar-split, tar/storage: one JSON object a line, with
//! segments as they are and files by name, size and CRC-64).

use super::pool::Compressor;
use crate::{Result, TarEntry, TarKind};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::Serialize;
use shipway_oci::Digest;
use std::io;

const FILE: u8 = 1;
const SEGMENT: u8 = 2;
/// The polynomial of ISO 3309, reversed, as Go's `crc64.ISO` has it.
const CRC64_ISO: u64 = 0xd800_0000_0000_0000;

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    r#type: u8,
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    payload: Option<String>,
    position: usize,
}

/// A tar-split that is being written.
pub struct TarSplit {
    lines: Vec<u8>,
    position: usize,
    /// Bytes of the tar since the last file.
    segment: Vec<u8>,
    file: Option<(String, u64, u64)>,
    crc: Box<Crc64>,
}

/// A checksum, eight bytes at a time: `table[n]` is what a byte does with `n` bytes after it.
struct Crc64([[u64; 256]; 8]);

impl Crc64 {
    fn new() -> Self {
        let step = |crc: u64| if crc & 1 == 1 { crc >> 1 ^ CRC64_ISO } else { crc >> 1 };
        let mut table = [[0; 256]; 8];
        table[0] = std::array::from_fn(|byte| (0..8).fold(byte as u64, |crc, _| step(crc)));
        for n in 1..8 {
            table[n] = std::array::from_fn(|byte| {
                let before = table[n - 1][byte];
                table[0][usize::from(before as u8)] ^ before >> 8
            });
        }
        Self(table)
    }

    fn update(&self, crc: u64, bytes: &[u8]) -> u64 {
        let (words, rest) = bytes.as_chunks::<8>();
        let crc = words.iter().fold(crc, |crc, word| {
            let mixed = (crc ^ u64::from_le_bytes(*word)).to_le_bytes();
            mixed
                .iter()
                .zip(self.0.iter().rev())
                .fold(0, |sum, (byte, table)| sum ^ table[usize::from(*byte)])
        });
        rest.iter().fold(crc, |crc, byte| self.0[0][usize::from(crc as u8 ^ byte)] ^ crc >> 8)
    }
}

/// A finished one.
pub struct Split {
    pub compressed: Vec<u8>,
    /// Of the compressed bytes.
    pub digest: Digest,
    /// Length before compression.
    pub size: u64,
}

impl TarSplit {
    pub fn new() -> Self {
        Self {
            lines: Vec::new(),
            position: 0,
            segment: Vec::new(),
            file: None,
            crc: Box::new(Crc64::new()),
        }
    }

    /// Bytes of the tar that are no file's data.
    pub fn segment(&mut self, bytes: &[u8]) {
        self.segment.extend_from_slice(bytes);
    }

    /// An entry whose header was the last segment.
    pub fn entry(&mut self, entry: &TarEntry) -> Result<()> {
        self.end_segment()?;
        let name = String::from_utf8_lossy(&entry.path).into_owned();
        match entry.kind {
            TarKind::File(size @ 1..) => self.file = Some((name, size, !0)),
            _ => self.line(FILE, &name, None, None)?,
        }
        Ok(())
    }

    /// Data of the entry.
    pub fn data(&mut self, bytes: &[u8]) {
        if let Some((.., crc)) = &mut self.file {
            *crc = self.crc.update(*crc, bytes);
        }
    }

    /// The end of a file's data.
    pub fn end(&mut self) {
        if let Some((name, size, crc)) = self.file.take() {
            let sum = BASE64_STANDARD.encode((!crc).to_be_bytes());
            // Writing to memory cannot fail.
            let _ = self.line(FILE, &name, Some(size), Some(sum));
        }
    }

    fn end_segment(&mut self) -> Result<()> {
        if self.segment.is_empty() {
            return Ok(());
        }
        let payload = BASE64_STANDARD.encode(&self.segment);
        self.segment.clear();
        self.line(SEGMENT, "", None, Some(payload))
    }

    fn line(
        &mut self,
        r#type: u8,
        name: &str,
        size: Option<u64>,
        payload: Option<String>,
    ) -> Result<()> {
        let line = Line { r#type, name, size, payload, position: self.position };
        serde_json::to_writer(&mut self.lines, &line).map_err(io::Error::from)?;
        self.lines.push(b'\n');
        self.position += 1;
        Ok(())
    }

    pub fn finish(mut self, compressor: &mut Compressor) -> Result<Split> {
        self.end_segment()?;
        let compressed = compressor.compress(&self.lines)?.to_vec();
        Ok(Split { digest: Digest::of(&compressed), compressed, size: self.lines.len() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_go() {
        // hash/crc64's own test: ISO of "a", "ab", and of longer texts.
        let crc = Crc64::new();
        for (text, want) in [
            ("", 0),
            ("a", 0x3420_0000_0000_0000),
            ("ab", 0x36c4_2000_0000_0000),
            ("abc", 0x3776_c420_0000_0000),
            ("Discard medicine more than two years old.", 0),
        ] {
            let bytes = text.as_bytes();
            let one_by_one = bytes.iter().fold(!0, |sum, byte| crc.update(sum, &[*byte]));
            assert_eq!(crc.update(!0, bytes), one_by_one, "{text}");
            if text.len() < 4 {
                assert_eq!(!one_by_one, want, "{text}");
            }
        }
    }
}
