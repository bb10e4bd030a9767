//! Directories that the daemon may read (rows `cb.filesync*`).

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use shipway_fault::{Fault, Result};
use shipway_filesync::{
    FileSyncRequest, Mapped, Packet, PacketStream, SendOptions, Sender, packets,
};
use shipway_grpc::{fault_of, status_of};
use shipway_proto::{
    MAX_MESSAGE,
    moby::filesync::v1::file_sync_server::{FileSync, FileSyncServer},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

/// Directories by the names that builds know them by, such as `context`.
#[derive(Clone, Debug, Default)]
pub struct LocalDirs(BTreeMap<String, PathBuf>);

impl LocalDirs {
    /// Offers `dir` as `name`; fails if it is not a directory.
    pub fn add(&mut self, name: impl Into<String>, dir: impl Into<PathBuf>) -> Result<()> {
        let dir = dir.into();
        let found = std::fs::metadata(&dir)
            .map_err(|e| Fault::io(format!("open the directory {}", dir.display()), e))?;
        if !found.is_dir() {
            return Err(Fault::invalid(format!("{} is not a directory", dir.display())));
        }
        self.0.insert(name.into(), dir);
        Ok(())
    }

    /// Names and directories.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &std::path::Path)> {
        self.0.iter().map(|(name, dir)| (name.as_str(), dir.as_path()))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn service(self) -> FileSyncServer<Self> {
        FileSyncServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

/// Owners are the client's business: builds see every file as root's, so that results do not depend
/// on who builds.
fn options(asked: FileSyncRequest) -> SendOptions {
    SendOptions {
        include: asked.include,
        exclude: asked.exclude,
        follow: asked.follow,
        map: Some(Arc::new(|stat| {
            stat.uid = 0;
            stat.gid = 0;
            Mapped::Keep
        })),
        identify: asked.identify,
    }
}

#[tonic::async_trait]
impl FileSync for LocalDirs {
    type DiffCopyStream = BoxStream<'static, Result<Packet, Status>>;
    type TarStreamStream = BoxStream<'static, Result<Packet, Status>>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        let metadata = request.metadata();
        let asked = FileSyncRequest::from_pairs(|key| {
            metadata
                .get_all(key)
                .iter()
                .filter_map(|v| v.to_str().ok())
                .map(str::to_owned)
                .collect()
        });
        let name = asked.dir_name.clone();
        let dir = self
            .0
            .get(&name)
            .ok_or_else(|| Status::not_found(format!("no access allowed to dir {name:?}")))?;
        let sender = Sender::new(dir, options(asked));
        let incoming = request.into_inner().map_err(|s| fault_of(&s));
        let (sink, stream) = packets();
        let stream_of_packets = PacketStream::new(incoming, sink);
        let sending = AbortOnDropHandle::new(shipway_task::spawn("send a directory", async move {
            let sent = sender.run(stream_of_packets).await?;
            tracing::debug!(
                dir = name,
                entries = sent.entries,
                files = sent.files,
                bytes = sent.bytes,
                "directory sent"
            );
            Ok::<_, Fault>(())
        }));
        let end = futures::stream::once(async move {
            match sending.await {
                Ok(Ok(())) => None,
                Ok(Err(fault)) => Some(Err(status_of(&fault))),
                Err(error) => Some(Err(Status::internal(format!("send a directory: {error}")))),
            }
        });
        Ok(Response::new(stream.map(Ok).chain(end.filter_map(std::future::ready)).boxed()))
    }

    async fn tar_stream(
        &self,
        _: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::TarStreamStream>, Status> {
        Err(Status::unimplemented("sending a directory as a tar; use DiffCopy"))
    }
}
