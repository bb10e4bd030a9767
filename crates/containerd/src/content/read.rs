//! Owns reading a blob: one Read stream, whose flow-control window bounds what is in memory.

use super::Content;
use crate::conn::deadline;
use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::{ReadContentRequest, ReadContentResponse};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Digest;
use shipway_storage::BlobReader;
use tonic::Streaming;

pub(super) struct Reader {
    content: Content,
    digest: Digest,
    size: u64,
    offset: u64,
    stream: Option<Streaming<ReadContentResponse>>,
}

impl Reader {
    pub(super) fn new(content: Content, digest: Digest, size: u64) -> Self {
        Self { content, digest, size, offset: 0, stream: None }
    }

    fn what(&self) -> String {
        format!("read blob {} at byte {}", self.digest, self.offset)
    }

    async fn stream(&mut self) -> Result<&mut Streaming<ReadContentResponse>> {
        if self.stream.is_none() {
            let connection = &self.content.connection;
            let message = ReadContentRequest {
                digest: self.digest.to_string(),
                offset: self.offset as i64,
                size: 0,
            };
            let request = connection.request(message)?;
            let mut client = self.content.bulk();
            self.stream =
                Some(connection.call(|| self.what(), deadline::STALL, client.read(request)).await?);
        }
        self.stream.as_mut().ok_or_else(|| Fault::internal("a read stream vanished"))
    }
}

#[async_trait]
impl BlobReader for Reader {
    fn size(&self) -> u64 {
        self.size
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        if self.offset >= self.size {
            return Ok(None);
        }
        let answer = tokio::time::timeout(deadline::STALL, self.stream().await?.message()).await;
        let chunk = match answer {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => {
                return Err(Fault::new(
                    Code::DataLoss,
                    format!("{}: the blob ends before its {} bytes", self.what(), self.size),
                ));
            }
            Ok(Err(status)) => return Err(self.content.connection.fault(self.what(), status)),
            Err(_) => return Err(self.content.connection.stalled(self.what(), deadline::STALL)),
        };
        // The answers' own offsets count from the start of the stream, not of the blob; they come
        // in order anyway.
        self.offset += chunk.data.len() as u64;
        Ok(Some(chunk.data.into()))
    }

    async fn seek(&mut self, offset: u64) -> Result<()> {
        if offset != self.offset {
            self.stream = None;
            self.offset = offset;
        }
        Ok(())
    }
}
