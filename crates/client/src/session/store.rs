//! OCI layouts that the daemon reads (a named context, a cache to import) and writes (a cache or an
//! image to export), through containerd's content service (rows `cb.content*`).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use futures::{StreamExt, stream::BoxStream};
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::{headers, status_of};
use shipway_oci::{Digest, Hasher};
use shipway_proto::{
    MAX_MESSAGE,
    containerd::services::content::v1::{
        self as wire,
        content_server::{Content, ContentServer},
    },
};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};

const CHUNK: usize = 1 << 20;

/// Layouts by the ids that a solve names: `oci:<name>`, `local:<path>`, `export`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stores(Arc<BTreeMap<String, Layout>>);

#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
    pub(crate) writable: bool,
}

impl Layout {
    fn blob(&self, digest: &str) -> Result<(PathBuf, Digest)> {
        let digest: Digest = digest
            .parse()
            .map_err(|e| Fault::invalid(format!("{digest:?} is not a valid digest: {e}")))?;
        Ok((self.dir.join("blobs/sha256").join(digest.hex()), digest))
    }

    /// Where a blob grows. Writers of the same reference have a file each: one that goes must not
    /// take another's.
    fn ingest(&self) -> Result<PathBuf> {
        Ok(self.dir.join("ingest").join(shipway_host::random_id()?))
    }
}

impl Stores {
    pub(crate) fn new(layouts: BTreeMap<String, Layout>) -> Self {
        Self(Arc::new(layouts))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn methods(&self) -> [&'static str; 9] {
        [
            "/containerd.services.content.v1.Content/Info",
            "/containerd.services.content.v1.Content/Update",
            "/containerd.services.content.v1.Content/List",
            "/containerd.services.content.v1.Content/Delete",
            "/containerd.services.content.v1.Content/Read",
            "/containerd.services.content.v1.Content/Status",
            "/containerd.services.content.v1.Content/ListStatuses",
            "/containerd.services.content.v1.Content/Write",
            "/containerd.services.content.v1.Content/Abort",
        ]
    }

    pub(crate) fn service(self) -> ContentServer<Self> {
        ContentServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn layout(&self, metadata: &MetadataMap) -> Result<Layout, Status> {
        let id = metadata.get(headers::STORE_ID).and_then(|v| v.to_str().ok()).unwrap_or_default();
        self.0.get(id).cloned().ok_or_else(|| Status::not_found(format!("unknown store {id:?}")))
    }
}

fn answer<T>(result: Result<T>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|fault| status_of(&fault))
}

fn stamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).ok()?,
        nanos: since.subsec_nanos().try_into().ok()?,
    })
}

async fn info(path: &Path, digest: Digest) -> Result<wire::Info> {
    let found =
        tokio::fs::metadata(path).await.map_err(|e| Fault::io(format!("content {digest}"), e))?;
    let time = found.modified().ok().and_then(stamp);
    let size = i64::try_from(found.len()).unwrap_or(i64::MAX);
    Ok(wire::Info {
        digest: digest.to_string(),
        size,
        created_at: time,
        updated_at: time,
        labels: BTreeMap::new(),
    })
}

async fn read(
    path: PathBuf,
    request: wire::ReadContentRequest,
    sink: &mpsc::Sender<Result<wire::ReadContentResponse, Status>>,
) -> Result<()> {
    let failed = |e| Fault::io(format!("read content {}", request.digest), e);
    let mut file = File::open(&path).await.map_err(failed)?;
    let size = file.metadata().await.map_err(failed)?.len();
    let start = u64::try_from(request.offset)
        .map_err(|_| Fault::invalid("read content before its beginning"))?;
    if start > size {
        return Err(Fault::new(
            Code::OutOfRange,
            format!("read content {} beyond its {size} bytes", request.digest),
        ));
    }
    file.seek(std::io::SeekFrom::Start(start)).await.map_err(failed)?;
    let mut left =
        if request.size > 0 { (request.size as u64).min(size - start) } else { size - start };
    let mut offset = request.offset;
    while left > 0 {
        let mut data = vec![0; (left as usize).min(CHUNK)];
        file.read_exact(&mut data).await.map_err(failed)?;
        let length = data.len();
        if sink.send(Ok(wire::ReadContentResponse { offset, data })).await.is_err() {
            return Ok(());
        }
        offset += length as i64;
        left -= length as u64;
    }
    Ok(())
}

/// One blob in the making.
struct Ingest {
    layout: Layout,
    path: PathBuf,
    file: File,
    offset: i64,
    total: i64,
    expected: String,
}

impl Ingest {
    async fn open(layout: Layout, first: &wire::WriteContentRequest) -> Result<Self> {
        if !layout.writable {
            return Err(Fault::new(
                Code::PermissionDenied,
                format!("{} is for reading only", layout.dir.display()),
            ));
        }
        if first.r#ref.is_empty() {
            return Err(Fault::invalid("write content without a reference"));
        }
        let path = layout.ingest()?;
        let failed = |e| Fault::io(format!("write {}", path.display()), e);
        for dir in ["ingest", "blobs/sha256"] {
            tokio::fs::create_dir_all(layout.dir.join(dir)).await.map_err(failed)?;
        }
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .await
            .map_err(failed)?;
        Ok(Self { layout, path, file, offset: 0, total: 0, expected: String::new() })
    }

    async fn apply(
        &mut self,
        request: wire::WriteContentRequest,
    ) -> Result<wire::WriteContentResponse> {
        if request.total > 0 {
            self.total = request.total;
        }
        if !request.expected.is_empty() {
            if tokio::fs::try_exists(self.layout.blob(&request.expected)?.0).await.unwrap_or(false)
            {
                return Err(Fault::new(
                    Code::AlreadyExists,
                    format!("content {} already exists", request.expected),
                ));
            }
            self.expected = request.expected.clone();
        }
        let failed = |e| Fault::io("write content", e);
        let mut response = wire::WriteContentResponse {
            action: request.action,
            total: self.total,
            updated_at: stamp(SystemTime::now()),
            ..Default::default()
        };
        if request.action() != wire::WriteAction::Stat {
            if !request.data.is_empty() {
                if request.offset != self.offset {
                    let (at, given) = (self.offset, request.offset);
                    return Err(Fault::new(
                        Code::OutOfRange,
                        format!("write content at {given}, but {at} bytes are there"),
                    ));
                }
                self.file.write_all(&request.data).await.map_err(failed)?;
                self.offset += request.data.len() as i64;
            }
            if request.action() == wire::WriteAction::Commit {
                response.digest = self.commit().await?.to_string();
            }
        }
        response.offset = self.offset;
        Ok(response)
    }

    async fn commit(&mut self) -> Result<Digest> {
        let failed = |e| Fault::io("commit content", e);
        self.file.flush().await.map_err(failed)?;
        if self.total > 0 && self.total != self.offset {
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!("commit content of {} bytes, not {}", self.offset, self.total),
            ));
        }
        self.file.rewind().await.map_err(failed)?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = self.file.read(&mut buffer).await.map_err(failed)?;
            if length == 0 {
                break;
            }
            hasher.update(&buffer[..length]);
        }
        let digest = hasher.finish();
        if !self.expected.is_empty() && self.expected != digest.to_string() {
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!("commit content {digest}, but {} was expected", self.expected),
            ));
        }
        let (blob, _) = self.layout.blob(&digest.to_string())?;
        tokio::fs::rename(&self.path, &blob).await.map_err(failed)?;
        Ok(digest)
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // Gone already if it was committed.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn refused<T>(what: &str) -> Result<T, Status> {
    Err(Status::unimplemented(format!("{what} of content in a session")))
}

#[tonic::async_trait]
impl Content for Stores {
    type ListStream = tokio_stream::Empty<Result<wire::ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<wire::ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<wire::WriteContentResponse, Status>>;

    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        let layout = self.layout(request.metadata())?;
        let found = async {
            let (path, digest) = layout.blob(&request.get_ref().digest)?;
            Ok(wire::InfoResponse { info: Some(info(&path, digest).await?) })
        };
        answer(found.await)
    }

    /// Layouts have no labels; writers set them for the garbage collection of stores that have.
    async fn update(
        &self,
        request: Request<wire::UpdateRequest>,
    ) -> Result<Response<wire::UpdateResponse>, Status> {
        let layout = self.layout(request.metadata())?;
        let asked = request.into_inner().info.unwrap_or_default();
        let found = async {
            let (path, digest) = layout.blob(&asked.digest)?;
            let info = info(&path, digest).await?;
            Ok(wire::UpdateResponse { info: Some(wire::Info { labels: asked.labels, ..info }) })
        };
        answer(found.await)
    }

    async fn list(
        &self,
        _: Request<wire::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        refused("listing")
    }

    async fn delete(&self, _: Request<wire::DeleteContentRequest>) -> Result<Response<()>, Status> {
        refused("deletion")
    }

    async fn read(
        &self,
        request: Request<wire::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let layout = self.layout(request.metadata())?;
        let request = request.into_inner();
        let (path, _) = layout.blob(&request.digest).map_err(|f| status_of(&f))?;
        let (sink, stream) = mpsc::channel(4);
        shipway_task::spawn("send a blob", async move {
            if let Err(fault) = read(path, request, &sink).await {
                let _ = sink.send(Err(status_of(&fault))).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        Err(Status::not_found(format!("no write of {:?} is under way", request.get_ref().r#ref)))
    }

    async fn list_statuses(
        &self,
        _: Request<wire::ListStatusesRequest>,
    ) -> Result<Response<wire::ListStatusesResponse>, Status> {
        Ok(Response::new(wire::ListStatusesResponse::default()))
    }

    async fn write(
        &self,
        request: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let layout = self.layout(request.metadata())?;
        let mut incoming = request.into_inner();
        let (sink, stream) = mpsc::channel(4);
        shipway_task::spawn("receive a blob", async move {
            let mut ingest: Option<Ingest> = None;
            while let Ok(Some(request)) = incoming.message().await {
                let step = async {
                    let ingest = match &mut ingest {
                        Some(ingest) => ingest,
                        none => none.insert(Ingest::open(layout.clone(), &request).await?),
                    };
                    ingest.apply(request).await
                };
                let result = step.await;
                let failed = result.is_err();
                if sink.send(result.map_err(|fault| status_of(&fault))).await.is_err() || failed {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<()>, Status> {
        // What is not committed goes with the call that writes it.
        self.layout(request.metadata()).map(|_| Response::new(()))
    }
}
