//! Streams that a build reads as if from the web, such as a context from standard input (rows
//! `cb.upload*`).

use parking_lot::Mutex;
use std::{collections::HashMap, fmt, pin::Pin, sync::Arc};

use futures::{StreamExt, stream::BoxStream};
use shipway_fault::Result;
use shipway_grpc::headers;
use shipway_proto::moby::upload::v1::{
    BytesMessage,
    upload_server::{Upload, UploadServer},
};
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;
use tonic::{Request, Response, Status, Streaming};

const CHUNK: usize = 1 << 20;

type Reader = Pin<Box<dyn AsyncRead + Send>>;

/// Streams by id; each can be read once. Clones share them.
#[derive(Clone, Default)]
pub struct Uploads(Arc<Mutex<HashMap<String, Reader>>>);

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Uploads").field(&self.lock().len()).finish()
    }
}

impl Uploads {
    /// Offers `reader`; gives the URL by which a build reads it.
    pub fn add(&self, reader: impl AsyncRead + Send + 'static) -> Result<String> {
        let id = shipway_host::random_id()?;
        let url = format!("http://buildkit-session/{id}");
        self.lock().insert(id, Box::pin(reader));
        Ok(url)
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, HashMap<String, Reader>> {
        self.0.lock()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub(crate) fn service(self) -> UploadServer<Self> {
        UploadServer::new(self)
    }
}

#[tonic::async_trait]
impl Upload for Uploads {
    type PullStream = BoxStream<'static, Result<BytesMessage, Status>>;

    async fn pull(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let path = request
            .metadata()
            .get(headers::UPLOAD_PATH)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let id = path.rsplit('/').next().unwrap_or_default();
        let reader = self
            .lock()
            .remove(id)
            .ok_or_else(|| Status::not_found(format!("no http response from session for {id}")))?;
        let chunks = ReaderStream::with_capacity(reader, CHUNK).map(|chunk| match chunk {
            Ok(data) => Ok(BytesMessage { data: data.into() }),
            Err(error) => Err(Status::aborted(format!("read the upload: {error}"))),
        });
        Ok(Response::new(chunks.boxed()))
    }
}
