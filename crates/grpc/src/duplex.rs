//! A bidirectional stream of byte messages as a byte stream: `Control.Session`, SSH forwarding,
//! file targets.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use futures::Stream;
use shipway_proto::moby;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSender;
use tonic::Status;

/// Bytes are sent once this many wait, if no flush comes first.
const CHUNK: usize = 256 << 10;
/// Messages that may wait for the peer.
const QUEUE: usize = 16;

/// A message whose only content is bytes.
pub trait Frame: Send + 'static {
    /// The message that carries `data`.
    fn of(data: Bytes) -> Self;
    /// The bytes it carries.
    fn into_bytes(self) -> Bytes;
}

macro_rules! frame {
    ($($message:ty),*) => {$(
        impl Frame for $message {
            fn of(data: Bytes) -> Self {
                Self { data: data.into() }
            }
            fn into_bytes(self) -> Bytes {
                self.data.into()
            }
        }
    )*};
}

frame!(
    moby::buildkit::v1::BytesMessage,
    moby::sshforward::v1::BytesMessage,
    moby::filesync::v1::BytesMessage,
    moby::upload::v1::BytesMessage
);

/// The writing half of a message stream.
pub type FrameSink<M> = mpsc::Sender<M>;

/// A bounded queue of outgoing messages: the sink for [`Duplex::new`], the stream for the call.
pub fn frames<M: Frame>() -> (FrameSink<M>, ReceiverStream<M>) {
    let (sink, stream) = mpsc::channel(QUEUE);
    (sink, ReceiverStream::new(stream))
}

/// Outgoing messages in the form in which a server answers a streaming call.
#[derive(Debug)]
pub struct Answers<M>(ReceiverStream<M>);

impl<M> Stream for Answers<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(cx).map(|m| m.map(Ok))
    }
}

/// Two message streams as one byte stream. Shutting it down ends the outgoing messages; dropping it
/// ends both.
pub struct Duplex<M> {
    incoming: Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>,
    current: Bytes,
    outgoing: PollSender<M>,
    pending: BytesMut,
}

impl<M: Frame> Duplex<M> {
    /// A byte stream that reads `incoming` and writes to `outgoing`.
    pub fn new(
        incoming: impl Stream<Item = Result<M, Status>> + Send + 'static,
        outgoing: FrameSink<M>,
    ) -> Self {
        Self {
            incoming: Box::pin(incoming),
            current: Bytes::new(),
            outgoing: PollSender::new(outgoing),
            pending: BytesMut::new(),
        }
    }

    /// The server's side of a call: the byte stream, and what to answer the call with.
    pub fn answering(
        incoming: impl Stream<Item = Result<M, Status>> + Send + 'static,
    ) -> (Self, Answers<M>) {
        let (sink, stream) = frames();
        (Self::new(incoming, sink), Answers(stream))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.pending.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if ready!(self.outgoing.poll_reserve(cx)).is_err() {
            return Poll::Ready(Err(closed()));
        }
        let data = self.pending.split().freeze();
        Poll::Ready(self.outgoing.send_item(M::of(data)).map_err(|_| closed()))
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the peer has ended the stream")
}

impl<M: Frame> AsyncRead for Duplex<M> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.current.is_empty() {
            match ready!(this.incoming.as_mut().poll_next(cx)) {
                Some(Ok(message)) => this.current = message.into_bytes(),
                Some(Err(status)) => return Poll::Ready(Err(io::Error::other(status))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = this.current.len().min(buf.remaining());
        buf.put_slice(&this.current[..n]);
        this.current.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<M: Frame> AsyncWrite for Duplex<M> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.pending.len() >= CHUNK {
            ready!(this.poll_send(cx))?;
        }
        let mut written = 0;
        for buf in bufs {
            let n = buf.len().min((4 * CHUNK).saturating_sub(this.pending.len()));
            this.pending.extend_from_slice(&buf[..n]);
            written += n;
            if n < buf.len() {
                break;
            }
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.outgoing.is_closed() {
            // A peer that is gone needs no more messages.
            let _ = ready!(this.poll_send(cx));
            this.outgoing.close();
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use shipway_proto::moby::buildkit::v1::BytesMessage;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn bytes_cross_and_shutdown_ends_the_messages() {
        let (sink, incoming) = frames::<BytesMessage>();
        let (mut duplex, mut answers) = Duplex::answering(incoming.map(Ok));
        sink.send(BytesMessage { data: Bytes::from_static(b"hello ") }).await.expect("open");
        sink.send(BytesMessage { data: Bytes::from_static(b"world") }).await.expect("open");
        drop(sink);
        let mut text = String::new();
        duplex.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "hello world");
        duplex.write_all(b"a").await.expect("write");
        duplex.write_all(b"b").await.expect("write");
        duplex.shutdown().await.expect("shutdown");
        assert_eq!(answers.next().await.expect("one message").expect("ok").data, "ab");
        assert!(answers.next().await.is_none());
    }

    #[tokio::test]
    async fn a_status_is_an_io_error_that_keeps_it() {
        let (mut duplex, _answers) =
            Duplex::<BytesMessage>::answering(futures::stream::iter([Err(Status::not_found(
                "gone",
            ))]));
        let error = duplex.read_u8().await.expect_err("status");
        assert!(crate::fault_of_io("read", error).is_not_found());
    }
}
