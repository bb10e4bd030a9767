//! Files from the client and to it (rows `cb.filesync*`, `cb.filesend*`).

use std::collections::BTreeMap;

use bytes::Bytes;
use shipway_fault::{Fault, Result};
use shipway_filesync::{FileSyncRequest, Packet, PacketStream, packets};
use shipway_grpc::{FrameSink, fault_of, frames, headers};
use shipway_proto::moby::filesync::v1::{
    BytesMessage, file_send_client::FileSendClient, file_sync_client::FileSyncClient,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, client::Grpc, metadata::MetadataMap};
use tonic_prost::ProstCodec;

use crate::{
    Session,
    call::{add, client, eager_faults},
};

const SYNC: &str = "/moby.filesync.v1.FileSync/DiffCopy";
const SEND: &str = "/moby.filesync.v1.FileSend/DiffCopy";
/// Clients with Go's defaults take messages up to 4 MiB.
const CHUNK: usize = 3 << 20;

/// What became of a file that was offered to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// The client has it.
    Taken,
    /// The client did not want it, which is not an error (row `cb.filesend.skip`).
    NotNeeded,
}

/// A file on its way to the client. Dropping it before [`FileSink::finish`] cancels it.
pub struct FileSink {
    sink: FrameSink<BytesMessage>,
    call: AbortOnDropHandle<Result<Delivered>>,
}

impl FileSink {
    /// Sends `data`. An error of kind `BrokenPipe` means that the client takes no more;
    /// [`FileSink::finish`] returns why.
    pub async fn write(&mut self, mut data: Bytes) -> std::io::Result<()> {
        while !data.is_empty() {
            let chunk = data.split_to(data.len().min(CHUNK));
            self.sink.send(BytesMessage { data: chunk.into() }).await.map_err(|_| broken())?;
        }
        Ok(())
    }

    /// Sends `data` from a thread that may block; see [`FileSink::write`].
    pub fn blocking_write(&mut self, data: &[u8]) -> std::io::Result<()> {
        for chunk in data.chunks(CHUNK) {
            self.sink.blocking_send(BytesMessage { data: chunk.to_vec() }).map_err(|_| broken())?;
        }
        Ok(())
    }

    /// Ends the file and waits until the client has it.
    pub async fn finish(self) -> Result<Delivered> {
        drop(self.sink);
        self.call.await.map_err(|e| Fault::internal(format!("send a file to the client: {e}")))?
    }
}

/// For writers of tars and the like that run on a blocking thread. Each call is a message, so put a
/// `BufWriter` around it.
impl std::io::Write for FileSink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.blocking_write(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn broken() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::BrokenPipe, "the client takes no more of the file")
}

impl Session {
    /// Asks for a directory; the stream is for a [`shipway_filesync::Receiver`].
    pub fn file_sync(&self, request: &FileSyncRequest) -> Result<PacketStream> {
        if !self.supports(SYNC) {
            return Err(Fault::invalid("no local sources enabled")
                .hint("the client that asked for this build offers no local directories"));
        }
        let (sink, stream) = packets();
        let mut call = Request::new(stream);
        for (key, value) in request.pairs() {
            add(call.metadata_mut(), &key, &value)?;
        }
        let mut client = client!(FileSyncClient, self);
        let name = request.dir_name.clone();
        let answers = eager_faults(async move { client.diff_copy(call).await });
        let answers = futures::StreamExt::map(answers, move |packet: Result<Packet>| {
            packet.map_err(|e| {
                e.context(format!("transfer the local directory {name:?} from the client"))
            })
        });
        Ok(PacketStream::new(answers, sink))
    }

    /// Starts sending one file, such as a tar, to the client's exporter `index`, with the
    /// exporter's metadata.
    pub fn file_send(&self, index: usize, metadata: &BTreeMap<String, String>) -> Result<FileSink> {
        self.check_send()?;
        let (sink, stream) = frames();
        let mut call = Request::new(stream);
        add(call.metadata_mut(), headers::EXPORTER_ID, &index.to_string())?;
        for (key, value) in metadata {
            // Keys come from exporters and frontends; one that a header cannot hold must not fail
            // the whole export.
            if let Err(fault) =
                add(call.metadata_mut(), &format!("{}{key}", headers::EXPORTER_METADATA), value)
            {
                tracing::warn!(error = %fault, "exporter metadata left out");
            }
        }
        let mut client = client!(FileSendClient, self);
        let call = async move {
            let sent = async {
                let mut answers = client.diff_copy(call).await?.into_inner();
                while answers.message().await?.is_some() {}
                Ok::<_, tonic::Status>(())
            };
            match sent.await {
                Ok(()) => Ok(Delivered::Taken),
                Err(status) if status.code() == tonic::Code::AlreadyExists => {
                    Ok(Delivered::NotNeeded)
                }
                Err(status) => Err(fault_of(&status).context("send a file to the client")),
            }
        };
        Ok(FileSink {
            sink,
            call: AbortOnDropHandle::new(shipway_task::spawn("send a file to a client", call)),
        })
    }

    /// Starts sending a directory to the client's exporter `index`; the stream is for a
    /// [`shipway_filesync::Sender`].
    pub fn file_send_dir(&self, index: usize) -> Result<PacketStream> {
        self.check_send()?;
        let mut metadata = MetadataMap::new();
        add(&mut metadata, headers::EXPORTER_ID, &index.to_string())?;
        add(&mut metadata, headers::EXPORTER_MULTI_PLATFORM, "1")?;
        let (sink, stream) = packets();
        let mut call = Request::new(stream);
        *call.metadata_mut() = metadata;
        let limit = shipway_proto::MAX_MESSAGE;
        let mut grpc = Grpc::new(self.channel())
            .max_decoding_message_size(limit)
            .max_encoding_message_size(limit);
        // The generated method has the other of the two payloads that this method carries.
        let answers = eager_faults(async move {
            grpc.ready().await.map_err(|e| tonic::Status::unavailable(e.to_string()))?;
            let codec: ProstCodec<Packet, Packet> = ProstCodec::default();
            grpc.streaming(call, http::uri::PathAndQuery::from_static(SEND), codec).await
        });
        Ok(PacketStream::new(answers, sink))
    }

    fn check_send(&self) -> Result<()> {
        if self.supports(SEND) {
            return Ok(());
        }
        Err(Fault::invalid(format!("method {SEND} not supported by the client"))
            .hint("the client gave no place to export to; use --output"))
    }
}
