//! A client's content stores: layouts it builds from, caches it keeps, images it receives (rows
//! `cb.content*`).

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::fault_of;
use shipway_oci::{Descriptor, Digest};
use shipway_proto::containerd::services::content::v1::{
    InfoRequest, ReadContentRequest, WriteAction, WriteContentRequest, WriteContentResponse,
    content_client::ContentClient,
};
use shipway_storage::BlobReader;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, metadata::AsciiMetadataValue};

use crate::{
    Session,
    call::{StoreChannel, eager},
};

/// Clients with Go's defaults take messages up to 4 MiB.
const CHUNK: usize = 1 << 20;

/// One content store of a client. Clones share the connection.
#[derive(Clone)]
pub struct ClientStore {
    channel: StoreChannel,
    id: String,
    session: Session,
}

impl Session {
    /// The client's content store `id`: `local:<dir>`, `oci:<name>` or `export`.
    pub fn store(&self, id: &str) -> Result<ClientStore> {
        if AsciiMetadataValue::try_from(id).is_err() || !id.is_ascii() {
            return Err(Fault::invalid(format!("the content store {id:?}: its name contains value with non-printable ASCII characters"))
                .hint("choose a path of plain letters"));
        }
        Ok(ClientStore { channel: self.content(id)?, id: id.to_owned(), session: self.clone() })
    }
}

/// A stream of blob bytes to write: what a [`BlobReader`] gives.
pub type Source<'a> = &'a mut dyn BlobReader;

impl ClientStore {
    /// Whether the client has gone, and its blobs with it.
    pub fn is_gone(&self) -> bool {
        self.session.is_closed()
    }

    fn client(&self) -> ContentClient<StoreChannel> {
        let limit = shipway_proto::MAX_MESSAGE;
        ContentClient::new(self.channel.clone())
            .max_decoding_message_size(limit)
            .max_encoding_message_size(limit)
    }

    fn fault(&self, what: &str, digest: Digest, status: &Status) -> Fault {
        fault_of(status)
            .context(format!("{what} {digest} in the client's content store {:?}", self.id))
    }

    /// Length of a blob; `NotFound` if the client does not have it.
    pub async fn size(&self, digest: Digest) -> Result<u64> {
        let answer = self.client().info(InfoRequest { digest: digest.to_string() }).await;
        let info = answer
            .map_err(|s| self.fault("look up", digest, &s))?
            .into_inner()
            .info
            .unwrap_or_default();
        u64::try_from(info.size).map_err(|_| {
            Fault::invalid(format!("the client says that {digest} has a negative length"))
        })
    }

    /// A reader of a blob.
    pub async fn reader(&self, digest: Digest) -> Result<ClientBlob> {
        let size = self.size(digest).await?;
        Ok(ClientBlob { store: self.clone(), digest, size, offset: 0, stream: None })
    }

    /// A small blob, whole and verified.
    pub async fn read_all(&self, digest: Digest, limit: u64) -> Result<Bytes> {
        let mut reader = self.reader(digest).await?;
        if reader.size > limit {
            return Err(Fault::invalid(format!(
                "blob {digest} has {} bytes, more than the {limit} allowed here",
                reader.size
            )));
        }
        let mut bytes = Vec::with_capacity(reader.size as usize);
        while let Some(chunk) = reader.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        if Digest::of(&bytes) != digest {
            return Err(Fault::new(
                Code::DataLoss,
                format!("blob {digest} is damaged in the client's content store {:?}", self.id),
            ));
        }
        Ok(bytes.into())
    }

    /// Writes a blob, unless the client has it.
    pub async fn write(&self, blob: &Descriptor, from: Source<'_>) -> Result<()> {
        let digest = blob.digest;
        let mut ingest = Ingest::open(self, blob);
        if !ingest.send(WriteAction::Stat, 0, Bytes::new()).await? {
            return Ok(());
        }
        let mut offset = 0;
        while let Some(mut piece) = from.next().await? {
            while !piece.is_empty() {
                let chunk = piece.split_to(piece.len().min(CHUNK));
                let length = chunk.len() as i64;
                if !ingest.send(WriteAction::Write, offset, chunk).await? {
                    return Ok(());
                }
                offset += length;
            }
        }
        if offset != blob.size as i64 {
            return Err(Fault::internal(format!(
                "blob {digest} has {offset} bytes and was announced with {}",
                blob.size
            )));
        }
        ingest.send(WriteAction::Commit, offset, Bytes::new()).await.map(drop)
    }

    /// Writes a small blob.
    pub async fn put(&self, blob: &Descriptor, bytes: Bytes) -> Result<()> {
        self.write(blob, &mut BytesReader(Some(bytes))).await
    }
}

/// Bytes as a reader.
struct BytesReader(Option<Bytes>);

#[async_trait]
impl BlobReader for BytesReader {
    fn size(&self) -> u64 {
        self.0.as_ref().map_or(0, |b| b.len() as u64)
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(self.0.take().filter(|b| !b.is_empty()))
    }

    async fn seek(&mut self, _: u64) -> Result<()> {
        Err(Fault::internal("bytes in memory are read once"))
    }
}

type Answers = futures::stream::BoxStream<'static, Result<WriteContentResponse, Status>>;

/// A blob on its way to the client: each message is answered before the next.
struct Ingest<'a> {
    store: &'a ClientStore,
    blob: &'a Descriptor,
    sink: mpsc::Sender<WriteContentRequest>,
    answers: Answers,
}

impl<'a> Ingest<'a> {
    fn open(store: &'a ClientStore, blob: &'a Descriptor) -> Self {
        // One message at a time is under way.
        let (sink, stream) = mpsc::channel(1);
        let mut client = store.client();
        let answers = eager(async move { client.write(ReceiverStream::new(stream)).await }).boxed();
        Self { store, blob, sink, answers }
    }

    /// Sends one message and waits for its answer; false if the client has the blob already.
    async fn send(&mut self, action: WriteAction, offset: i64, data: Bytes) -> Result<bool> {
        let message = WriteContentRequest {
            action: action as i32,
            r#ref: format!("shipway-{}", self.blob.digest),
            total: self.blob.size as i64,
            expected: self.blob.digest.to_string(),
            offset,
            data: data.into(),
            labels: BTreeMap::new(),
        };
        // A closed stream has its reason in the answers.
        let _ = self.sink.send(message).await;
        match self.answers.next().await {
            Some(Ok(_)) => Ok(true),
            Some(Err(status)) if status.code() == tonic::Code::AlreadyExists => Ok(false),
            Some(Err(status)) => Err(self.store.fault("write", self.blob.digest, &status)),
            None => Err(Fault::unavailable(format!(
                "the client ended the transfer of {} early",
                self.blob.digest
            ))),
        }
    }
}

/// A blob being read from a client.
pub struct ClientBlob {
    store: ClientStore,
    digest: Digest,
    size: u64,
    offset: u64,
    stream: Option<
        tonic::Streaming<shipway_proto::containerd::services::content::v1::ReadContentResponse>,
    >,
}

#[async_trait]
impl BlobReader for ClientBlob {
    fn size(&self) -> u64 {
        self.size
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.offset >= self.size {
                return Ok(None);
            }
            let fault = |status: Status| self.store.fault("read", self.digest, &status);
            let stream = match &mut self.stream {
                Some(stream) => stream,
                None => {
                    let request = ReadContentRequest {
                        digest: self.digest.to_string(),
                        offset: self.offset as i64,
                        size: 0,
                    };
                    let answers =
                        self.store.client().read(request).await.map_err(fault)?.into_inner();
                    self.stream.insert(answers)
                }
            };
            match stream.message().await {
                Ok(Some(piece)) if piece.data.is_empty() => {}
                Ok(Some(piece)) if piece.data.len() as u64 > self.size - self.offset => {
                    let message = format!(
                        "the client sent more than the {} bytes that blob {} has",
                        self.size, self.digest
                    );
                    return Err(Fault::new(Code::DataLoss, message));
                }
                Ok(Some(piece)) => {
                    self.offset += piece.data.len() as u64;
                    return Ok(Some(piece.data.into()));
                }
                Ok(None) => {
                    let message = format!(
                        "the client sent {} of {} bytes of blob {}",
                        self.offset, self.size, self.digest
                    );
                    return Err(Fault::unavailable(message));
                }
                Err(status) => return Err(self.store.fault("read", self.digest, &status)),
            }
        }
    }

    async fn seek(&mut self, offset: u64) -> Result<()> {
        self.stream = None;
        self.offset = offset;
        Ok(())
    }
}
