//! containerd's Content service, read-only (row `content.ro`): the worker's blobs, and the logs of finished builds.

use shipway_engine::History;
use shipway_fault::{Fault, Result};
use shipway_grpc::status_of;
use shipway_oci::Digest;
use shipway_proto::containerd::services::content::v1 as wire;
use shipway_storage::ContentStore;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Chunks of a read.
const CHUNK: usize = 1 << 20;

/// The service.
pub struct ContentService {
    /// Blobs.
    pub content: Arc<dyn ContentStore>,
    /// Logs.
    pub history: Arc<History>,
}

type Answer<T> = std::result::Result<Response<T>, Status>;
type Chunks = ReceiverStream<std::result::Result<wire::ReadContentResponse, Status>>;

fn digest(text: &str) -> Result<Digest, Status> {
    text.parse().map_err(|e: shipway_oci::DigestError| Status::invalid_argument(e.to_string()))
}

fn read_only<T>(what: &str) -> Answer<T> {
    Err(status_of(&Fault::unimplemented(format!("{what}: content is read-only on this socket, so {what}"))))
}

impl ContentService {
    async fn size_of_log(&self, digest: Digest) -> Option<u64> {
        let path = self.history.log(digest)?;
        tokio::fs::metadata(path).await.ok().map(|m| m.len())
    }
}

async fn send(tx: &tokio::sync::mpsc::Sender<Result<wire::ReadContentResponse, Status>>, offset: u64, data: Vec<u8>) -> bool {
    tx.send(Ok(wire::ReadContentResponse { offset: offset as i64, data })).await.is_ok()
}

#[tonic::async_trait]
impl wire::content_server::Content for ContentService {
    async fn info(&self, request: Request<wire::InfoRequest>) -> Answer<wire::InfoResponse> {
        let digest = digest(&request.into_inner().digest)?;
        let (size, labels) = match self.size_of_log(digest).await {
            Some(size) => (size, Default::default()),
            None => {
                let info = self.content.info(digest).await.map_err(|f| status_of(&f))?;
                (info.size, info.labels)
            }
        };
        let info = wire::Info { digest: digest.to_string(), size: size as i64, labels, ..Default::default() };
        Ok(Response::new(wire::InfoResponse { info: Some(info) }))
    }

    type ReadStream = Chunks;

    async fn read(&self, request: Request<wire::ReadContentRequest>) -> Answer<Chunks> {
        let request = request.into_inner();
        let digest = digest(&request.digest)?;
        let offset = u64::try_from(request.offset).map_err(|_| Status::out_of_range("negative offset"))?;
        let limit = if request.size > 0 { request.size as u64 } else { u64::MAX };
        let (tx, rx) = tokio::sync::mpsc::channel(4);
        if let Some(path) = self.history.log(digest) {
            let fail = |e| status_of(&Fault::io(format!("read the log {digest}"), e));
            let mut file = tokio::fs::File::open(path).await.map_err(fail)?;
            file.seek(std::io::SeekFrom::Start(offset)).await.map_err(fail)?;
            tokio::spawn(async move {
                let (mut at, mut left) = (offset, limit);
                let mut buffer = vec![0; CHUNK];
                while let Ok(n) = file.read(&mut buffer).await {
                    let n = (n as u64).min(left);
                    if n == 0 || !send(&tx, at, buffer[..n as usize].to_vec()).await {
                        break;
                    }
                    at += n;
                    left -= n;
                }
            });
            return Ok(Response::new(ReceiverStream::new(rx)));
        }
        let mut reader = self.content.reader(digest).await.map_err(|f| status_of(&f))?;
        if offset > reader.size() {
            return Err(Status::out_of_range(format!("offset {offset} is past the end of {digest}")));
        }
        reader.seek(offset).await.map_err(|f| status_of(&f))?;
        tokio::spawn(async move {
            let (mut at, mut left) = (offset, limit);
            loop {
                match reader.next().await {
                    Ok(Some(bytes)) if left > 0 => {
                        let n = (bytes.len() as u64).min(left);
                        if !send(&tx, at, bytes[..n as usize].to_vec()).await {
                            break;
                        }
                        at += n;
                        left -= n;
                    }
                    Ok(_) => break,
                    Err(fault) => {
                        let _ = tx.send(Err(status_of(&fault))).await;
                        break;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    type ListStream = ReceiverStream<std::result::Result<wire::ListContentResponse, Status>>;

    async fn list(&self, request: Request<wire::ListContentRequest>) -> Answer<Self::ListStream> {
        let blobs = self.content.list(&request.into_inner().filters).await.map_err(|f| status_of(&f))?;
        let (tx, rx) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            for part in blobs.chunks(100) {
                let info = part.iter().map(|b| wire::Info {
                    digest: b.digest.to_string(),
                    size: b.size as i64,
                    labels: b.labels.clone(),
                    ..Default::default()
                });
                if tx.send(Ok(wire::ListContentResponse { info: info.collect() })).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn update(&self, _: Request<wire::UpdateRequest>) -> Answer<wire::UpdateResponse> {
        read_only("Update")
    }

    async fn delete(&self, _: Request<wire::DeleteContentRequest>) -> Answer<()> {
        read_only("Delete")
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Answer<wire::StatusResponse> {
        read_only("Status")
    }

    async fn list_statuses(&self, _: Request<wire::ListStatusesRequest>) -> Answer<wire::ListStatusesResponse> {
        read_only("ListStatuses")
    }

    type WriteStream = tokio_stream::Empty<std::result::Result<wire::WriteContentResponse, Status>>;

    async fn write(&self, _: Request<Streaming<wire::WriteContentRequest>>) -> Answer<Self::WriteStream> {
        read_only("Write")
    }

    async fn abort(&self, _: Request<wire::AbortRequest>) -> Answer<()> {
        read_only("Abort")
    }
}
