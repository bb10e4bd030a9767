//! Owns writing a blob: messages of some hundred KiB, several in flight, the answers drained by a
//! task of their own.
//!
//! containerd answers every message in order and checks each offset against its own, so nothing is
//! lost by not waiting. A blob that another namespace already has (policy `shared`) is announced in
//! the first answer with its full length; then no byte is sent again.

use super::Content;
use crate::conn::deadline;
use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::{
    AbortRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Digest;
use shipway_storage::{BlobInfo, BlobWriter, Ingest, Labels, LeaseId};
use shipway_task::{spawn, spawn_on};
use std::{
    mem,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Bytes gathered before a message is sent; larger pieces are sent without a copy.
const GATHER: usize = 256 << 10;
/// Most bytes in one message. containerd's gRPC library reuses buffers of up to a MiB and allocates
/// larger ones each time.
const LARGEST: usize = (1 << 20) - 4096;
/// Messages waiting for the connection.
const IN_FLIGHT: usize = 4;
/// Blobs up to this size travel in a single message.
const SMALL: usize = 2 << 20;

pub(super) struct Writer {
    content: Content,
    lease: LeaseId,
    /// Reference as containerd knows it.
    reference: String,
    declared: Option<u64>,
    expected: Option<Digest>,
    messages: Option<mpsc::Sender<WriteContentRequest>>,
    /// Ends with the last answer, or with what broke the stream.
    answers: Option<JoinHandle<Result<WriteContentResponse, Status>>>,
    buffer: Vec<u8>,
    /// Bytes sent.
    sent: u64,
    /// The store has all bytes already; ours are only counted.
    shared: bool,
    open: bool,
}

/// Makes `reference` unique: two builds may write the same blob at once, and a killed one may have
/// left its ingest.
fn unique(reference: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos();
    format!("{reference}-{now:x}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Writer {
    pub(super) async fn open(content: Content, lease: &LeaseId, ingest: Ingest) -> Result<Self> {
        let reference = unique(&ingest.reference);
        let (messages, queue) = mpsc::channel(IN_FLIGHT);
        let first = WriteContentRequest {
            action: WriteAction::Stat as i32,
            r#ref: reference.clone(),
            total: ingest.size.unwrap_or(0) as i64,
            expected: ingest.expected.map(|d| d.to_string()).unwrap_or_default(),
            ..Default::default()
        };
        messages.try_send(first).map_err(|_| Fault::internal("a new queue is full"))?;
        let what = || format!("open ingest {reference:?}");
        let request = content.connection.leased(ReceiverStream::new(queue), lease)?;
        let mut client = content.bulk();
        let mut writer = Self {
            content: content.clone(),
            lease: lease.clone(),
            reference: reference.clone(),
            declared: ingest.size,
            expected: ingest.expected,
            messages: Some(messages),
            answers: None,
            buffer: Vec::new(),
            sent: 0,
            shared: false,
            open: true,
        };
        let opened = content.connection.call(what, deadline::SLOW, client.write(request)).await;
        let mut stream = match opened {
            Ok(stream) => stream,
            Err(e) => {
                writer.open = !e.is_already_exists();
                return Err(e);
            }
        };
        let state = match tokio::time::timeout(deadline::SLOW, stream.message()).await {
            Ok(Ok(Some(state))) => state,
            Ok(Ok(None)) => {
                return Err(Fault::internal(format!("{}: containerd closed it at once", what())));
            }
            Ok(Err(status)) => {
                let fault = content.connection.fault(what(), status);
                writer.open = !fault.is_already_exists();
                return Err(fault);
            }
            Err(_) => return Err(content.connection.stalled(what(), deadline::SLOW)),
        };
        // An ingest of a new reference has bytes only if it stands for a blob of another namespace.
        writer.shared = state.offset > 0 && ingest.expected.is_some();
        writer.answers = Some(spawn("receive answers to a write", async move {
            let mut last = WriteContentResponse::default();
            while let Some(answer) = stream.message().await? {
                last = answer;
            }
            Ok(last)
        }));
        Ok(writer)
    }

    fn what(&self) -> String {
        format!(
            "write blob {} ({} bytes so far)",
            self.expected.map_or_else(|| self.reference.clone(), |d| d.to_string()),
            self.sent
        )
    }

    async fn send(&mut self, message: WriteContentRequest) -> Result<()> {
        let sender =
            self.messages.as_ref().ok_or_else(|| Fault::internal("write after an error"))?;
        match tokio::time::timeout(deadline::STALL, sender.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.broken().await),
            Err(_) => Err(self.content.connection.stalled(self.what(), deadline::STALL)),
        }
    }

    /// Why the stream ended early.
    async fn broken(&mut self) -> Fault {
        match self.last_answer().await {
            Err(e) => e,
            Ok(_) => Fault::new(
                Code::Unavailable,
                format!("{}: containerd closed the ingest early", self.what()),
            ),
        }
    }

    async fn last_answer(&mut self) -> Result<WriteContentResponse> {
        self.messages = None;
        let what = self.what();
        let Some(answers) = self.answers.take() else {
            return Err(Fault::internal(format!("{what}: it failed before")));
        };
        let stop = answers.abort_handle();
        match tokio::time::timeout(deadline::SLOW, answers).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(status))) => Err(self.content.connection.fault(what, status)),
            Ok(Err(join)) => Err(Fault::internal(format!("{what}: {join}"))),
            Err(_) => {
                stop.abort();
                Err(self.content.connection.stalled(what, deadline::SLOW))
            }
        }
    }

    fn data(&mut self, action: WriteAction, data: Vec<u8>) -> WriteContentRequest {
        let offset = self.sent;
        self.sent += data.len() as u64;
        WriteContentRequest {
            action: action as i32,
            r#ref: self.reference.clone(),
            offset: offset as i64,
            data,
            ..Default::default()
        }
    }

    async fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let bytes = mem::take(&mut self.buffer);
        let message = self.data(WriteAction::Write, bytes);
        self.send(message).await
    }
}

#[async_trait]
impl BlobWriter for Writer {
    fn is_complete(&self) -> bool {
        self.shared
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        if self.shared {
            self.sent += bytes.len() as u64;
            return Ok(());
        }
        if bytes.len() < GATHER {
            self.buffer.extend_from_slice(&bytes);
            return if self.buffer.len() < GATHER { Ok(()) } else { self.flush().await };
        }
        self.flush().await?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(LARGEST));
            let message = self.data(WriteAction::Write, piece.into());
            self.send(message).await?;
        }
        Ok(())
    }

    async fn commit(
        mut self: Box<Self>,
        expected: Option<Digest>,
        labels: &Labels,
    ) -> Result<BlobInfo> {
        self.expected = expected.or(self.expected);
        if self.shared && self.sent == 0 {
            self.sent = self.declared.unwrap_or_default();
        }
        let tail = mem::take(&mut self.buffer);
        let mut message = self.data(WriteAction::Commit, tail);
        if let Some(declared) = self.declared.filter(|d| *d != self.sent) {
            return Err(Fault::new(
                Code::DataLoss,
                format!("{}: {declared} bytes were announced", self.what()),
            ));
        }
        if self.shared {
            message.offset = self.sent as i64;
        }
        message.total = self.sent as i64;
        message.expected = self.expected.map(|d| d.to_string()).unwrap_or_default();
        message.labels = crate::wire::labels_out(labels);
        let answer = match self.send(message).await {
            Ok(()) => self.last_answer().await,
            Err(e) => Err(e),
        };
        match (answer, self.expected) {
            (Ok(answer), _) => {
                self.open = false;
                Ok(BlobInfo {
                    digest: crate::wire::digest_in(&answer.digest)?,
                    size: self.sent,
                    labels: labels.clone(),
                })
            }
            (Err(e), Some(digest)) if e.is_already_exists() => {
                // containerd neither sets our labels on the blob that is there nor always leases
                // it.
                let blob = self.content.adopt(&self.lease, digest, labels).await?;
                Ok(blob)
            }
            (Err(e), _) => Err(e),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.messages = None;
        if let Some(answers) = self.answers.take() {
            answers.abort();
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !self.open {
            return;
        }
        let (content, reference) = (self.content.clone(), mem::take(&mut self.reference));
        spawn_on(&runtime, "abort an ingest", async move {
            let Ok(request) = content.connection.request(AbortRequest { r#ref: reference.clone() })
            else {
                return;
            };
            let mut client = content.client();
            let aborted = content
                .connection
                .call(
                    || format!("abort ingest {reference:?}"),
                    deadline::QUICK,
                    client.abort(request),
                )
                .await;
            if let Err(e) = aborted.or_else(|e| if e.is_not_found() { Ok(()) } else { Err(e) }) {
                // It goes with its lease at the latest.
                tracing::debug!(error = %e, "failed to abort ingest");
            }
        });
    }
}

/// Stores `bytes`; `AlreadyExists` if it is there.
pub(super) async fn put(
    content: &Content,
    lease: &LeaseId,
    digest: Digest,
    bytes: &Bytes,
    labels: &Labels,
) -> Result<()> {
    if bytes.len() <= SMALL && !bytes.is_empty() {
        return put_small(content, lease, digest, bytes, labels).await;
    }
    let ingest = Ingest {
        reference: reference_of(digest),
        expected: Some(digest),
        size: Some(bytes.len() as u64),
    };
    let mut writer: Box<dyn BlobWriter> =
        Box::new(Writer::open(content.clone(), lease, ingest).await?);
    writer.write(bytes.clone()).await?;
    writer.commit(Some(digest), labels).await.map(drop)
}

fn reference_of(digest: Digest) -> String {
    format!("shipway-put-{}", digest.hex())
}

/// Stores a small blob with one message and one answer.
async fn put_small(
    content: &Content,
    lease: &LeaseId,
    digest: Digest,
    bytes: &Bytes,
    labels: &Labels,
) -> Result<()> {
    let message = WriteContentRequest {
        action: WriteAction::Commit as i32,
        r#ref: unique(&reference_of(digest)),
        total: bytes.len() as i64,
        expected: digest.to_string(),
        data: bytes.to_vec(),
        labels: crate::wire::labels_out(labels),
        ..Default::default()
    };
    let what = || format!("store blob {digest}");
    let request = content.connection.leased(tokio_stream::once(message), lease)?;
    let mut client = content.bulk();
    let mut stream = content.connection.call(what, deadline::SLOW, client.write(request)).await?;
    loop {
        match tokio::time::timeout(deadline::SLOW, stream.message()).await {
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(status)) => return Err(content.connection.fault(what(), status)),
            Err(_) => return Err(content.connection.stalled(what(), deadline::SLOW)),
        }
    }
}
