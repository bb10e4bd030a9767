//! Files and directories that the daemon may write (rows `cb.filesend*`).

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use prost::Message;
use shipway_fault::{Context, Fault, Result};
use shipway_filesync::{Differ, Packet, PacketStream, ReceiveOptions, Receiver, packets};
use shipway_grpc::{FileSend, FileSendServer, RawAnswers, fault_of, headers, status_of};
use shipway_proto::moby::filesync::v1::BytesMessage;
use tokio::{fs::File, io::AsyncWriteExt};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

/// Where a file from the daemon goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileTarget {
    /// Our standard output.
    Stdout,
    /// A path. A regular file appears there only when it is complete.
    Path(PathBuf),
}

/// What is received for one exporter.
#[derive(Clone, Debug)]
pub(crate) enum Receives {
    File(FileTarget),
    /// A directory; with `delete`, what the build did not produce goes.
    Dir {
        path: PathBuf,
        delete: bool,
    },
}

/// By the exporter's index.
#[derive(Clone, Debug, Default)]
pub(crate) struct Targets(pub(crate) BTreeMap<usize, Receives>);

impl Targets {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn service(self) -> FileSendServer<Self> {
        FileSendServer::new(self)
    }
}

#[tonic::async_trait]
impl FileSend for Targets {
    async fn diff_copy(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<RawAnswers>, Status> {
        let text = |key| request.metadata().get(key).and_then(|v| v.to_str().ok());
        let index = text(headers::EXPORTER_ID).and_then(|v| v.parse().ok()).unwrap_or(0);
        let whole = text(headers::EXPORTER_MULTI_PLATFORM) == Some("1");
        let target = self
            .0
            .get(&index)
            .cloned()
            .ok_or_else(|| Status::not_found(format!("exporter {index} not found")))?;
        let incoming = request.into_inner().map_err(|s| fault_of(&s));
        let answers: RawAnswers = match target {
            Receives::File(target) => {
                Box::pin(ending(async move { receive_file(incoming, &target).await }))
            }
            Receives::Dir { delete: true, .. } if !whole => {
                return Err(Status::failed_precondition(
                    "local exporter mode=delete requires a BuildKit daemon with multi-platform local export support",
                ));
            }
            Receives::Dir { path, delete } => receive_dir(incoming, path, delete),
        };
        Ok(Response::new(answers))
    }
}

/// A stream without items that ends as `work` does.
fn ending(
    work: impl Future<Output = Result<()>> + Send,
) -> impl Stream<Item = Result<Bytes, Status>> + Send {
    futures::stream::once(work)
        .filter_map(|done| std::future::ready(done.err().map(|fault| Err(status_of(&fault)))))
}

fn receive_dir(
    incoming: impl Stream<Item = Result<Bytes>> + Send + 'static,
    path: PathBuf,
    delete: bool,
) -> RawAnswers {
    let incoming = incoming.map(|message| {
        Packet::decode(message?).map_err(|e| {
            Fault::invalid(format!("the daemon sent a packet that cannot be read: {e}"))
        })
    });
    let (sink, stream) = packets();
    let receiving = AbortOnDropHandle::new(shipway_task::spawn("receive a result", async move {
        let what = || format!("write the result to {}", path.display());
        tokio::fs::create_dir_all(&path).await.map_err(|e| Fault::io(what(), e))?;
        let (uid, gid) = owner().await;
        let options = ReceiveOptions {
            map: Some(Arc::new(move |stat| {
                stat.uid = uid;
                stat.gid = gid;
            })),
            merge: !delete,
            differ: if delete { Differ::None } else { Differ::Metadata },
            ..Default::default()
        };
        Receiver::new(&path, options)
            .run(PacketStream::new(incoming, sink))
            .await
            .context(what)
            .map(drop)
    }));
    let end = ending(async move {
        receiving.await.map_err(|e| Fault::internal(format!("receive a directory: {e}")))?
    });
    Box::pin(stream.map(|packet| Ok(packet.encode_to_vec().into())).chain(end))
}

/// Results belong to the user who builds.
async fn owner() -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    tokio::fs::metadata("/proc/self").await.map_or((0, 0), |m| (m.uid(), m.gid()))
}

async fn receive_file(
    incoming: impl Stream<Item = Result<Bytes>> + Send,
    target: &FileTarget,
) -> Result<()> {
    let incoming = std::pin::pin!(incoming.map(|message| {
        let message = BytesMessage::decode(message?);
        message.map(|m| m.data).map_err(|e| {
            Fault::invalid(format!("the daemon sent a message that cannot be read: {e}"))
        })
    }));
    match target {
        FileTarget::Stdout => {
            let mut out = tokio::io::stdout();
            copy(incoming, &mut out).await.context(|| "write the result to standard output")
        }
        FileTarget::Path(path) => {
            let what = || format!("write the result to {}", path.display());
            let mut file = NewFile::create(path).await.map_err(|e| Fault::io(what(), e))?;
            copy(incoming, &mut file.file).await.context(what)?;
            file.finish().await.map_err(|e| Fault::io(what(), e))
        }
    }
}

async fn copy<S: Stream<Item = Result<Vec<u8>>>>(
    mut incoming: std::pin::Pin<&mut S>,
    out: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> Result<()> {
    while let Some(data) = incoming.next().await {
        out.write_all(&data?).await.map_err(|e| Fault::io("write", e))?;
    }
    out.flush().await.map_err(|e| Fault::io("write", e))
}

/// A file that takes its name when it is complete; pipes and devices are written directly.
struct NewFile {
    file: File,
    /// Where it is, and where it goes.
    rename: Option<(PathBuf, PathBuf)>,
}

impl NewFile {
    async fn create(path: &Path) -> io::Result<Self> {
        let dest = match tokio::fs::canonicalize(path).await {
            Ok(found) => {
                let kind = tokio::fs::metadata(&found).await?;
                if kind.is_dir() {
                    return Err(io::Error::new(
                        io::ErrorKind::IsADirectory,
                        "destination file is a directory",
                    ));
                }
                if !kind.is_file() {
                    return Ok(Self {
                        file: File::options().write(true).open(&found).await?,
                        rename: None,
                    });
                }
                found
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(e) => return Err(e),
        };
        let name = dest
            .file_name()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
        let id = shipway_host::random_id().map_err(io::Error::other)?;
        let partial = dest.with_file_name(format!(".{}.{}", name.to_string_lossy(), &id[..8]));
        // Not on another thread: a file that is made after its caller has gone would never
        // be removed.
        let file = std::fs::File::options().write(true).create_new(true).open(&partial)?;
        Ok(Self { file: File::from_std(file), rename: Some((partial, dest)) })
    }

    async fn finish(mut self) -> io::Result<()> {
        if let Some((partial, dest)) = &self.rename {
            tokio::fs::rename(partial, dest).await?;
        }
        self.rename = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some((partial, _)) = &self.rename {
            let _ = std::fs::remove_file(partial);
        }
    }
}
