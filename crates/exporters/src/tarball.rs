//! A tar on its way to the client: plain ustar headers, which are all that an image archive needs.

use bytes::Bytes;
use shipway_archive::ustar::{BLOCK, header};
use shipway_fault::{Fault, Result};
use shipway_session::{Delivered, FileSink};

/// Writes entries one after another.
pub(crate) struct Tarball {
    sink: FileSink,
    size: u64,
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
