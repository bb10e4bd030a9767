//! A tar on its way to the client: plain ustar headers, which are all that an image archive needs.

use bytes::Bytes;
use shipway_fault::{Fault, Result};
use shipway_session::{Delivered, FileSink};

const BLOCK: usize = 512;

/// Writes entries one after another.
pub(crate) struct Tarball {
    sink: FileSink,
    size: u64,
}

fn header(name: &str, size: u64, kind: u8, mode: u32) -> [u8; BLOCK] {
    let mut h = [0u8; BLOCK];
    let mut put = |at: usize, text: &[u8]| h[at..at + text.len()].copy_from_slice(text);
    put(0, &name.as_bytes()[..name.len().min(100)]);
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    // Sizes beyond octal's eleven digits are binary, as GNU tar and Go have it.
    if size < 1 << 33 {
        put(124, format!("{size:011o}").as_bytes());
    } else {
        put(124, &[0x80]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    h
}

impl Tarball {
    pub fn new(sink: FileSink) -> Self {
        Self { sink, size: 0 }
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.sink.write(bytes).await.map_err(|e| Fault::io("send a tarball to the client", e))
    }

    pub async fn directory(&mut self, name: &str) -> Result<()> {
        self.write(Bytes::copy_from_slice(&header(name, 0, b'5', 0o755))).await
    }

    pub async fn begin(&mut self, name: &str, size: u64) -> Result<()> {
        self.size = size;
        self.write(Bytes::copy_from_slice(&header(name, size, b'0', 0o644))).await
    }

    pub async fn data(&mut self, bytes: Bytes) -> Result<()> {
        self.write(bytes).await
    }

    /// Pads the entry that was begun.
    pub async fn end(&mut self) -> Result<()> {
        let padding = (BLOCK as u64 - self.size % BLOCK as u64) % BLOCK as u64;
        if padding == 0 { Ok(()) } else { self.write(Bytes::from(vec![0; padding as usize])).await }
    }

    pub async fn file(&mut self, name: &str, bytes: Bytes) -> Result<()> {
        self.begin(name, bytes.len() as u64).await?;
        self.data(bytes).await?;
        self.end().await
    }

    /// Ends the archive and waits for the client.
    pub async fn finish(mut self) -> Result<Delivered> {
        // When the client takes no more, its answer says why.
        let _ = self.write(Bytes::from(vec![0; 2 * BLOCK])).await;
        self.sink.finish().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_a_right_checksum() {
        let h = header("blobs/sha256/x", 1 << 20, b'0', 0o644);
        let mut blank = h;
        blank[148..156].fill(b' ');
        let sum: u32 = blank.iter().map(|b| u32::from(*b)).sum();
        assert_eq!(u32::from_str_radix(std::str::from_utf8(&h[148..154]).unwrap(), 8), Ok(sum));
        assert_eq!(&header("big", 1 << 40, b'0', 0)[124], &0x80);
    }
}
