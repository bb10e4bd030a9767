//! The two directions of packets, however they travel.

use std::pin::Pin;

use futures::Stream;
use shipway_fault::Result;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::Packet;

/// Packets that may wait to be sent.
const QUEUE: usize = 256;

/// Packets from and to the peer. Dropping it ends our direction.
pub struct PacketStream {
    pub(crate) incoming: Pin<Box<dyn Stream<Item = Result<Packet>> + Send>>,
    pub(crate) outgoing: mpsc::Sender<Packet>,
}

impl PacketStream {
    /// A stream of these directions.
    pub fn new(
        incoming: impl Stream<Item = Result<Packet>> + Send + 'static,
        outgoing: mpsc::Sender<Packet>,
    ) -> Self {
        Self { incoming: Box::pin(incoming), outgoing }
    }

    /// Two ends connected in memory.
    pub fn pair() -> (Self, Self) {
        use futures::StreamExt;
        let ((a_out, a_in), (b_out, b_in)) = (packets(), packets());
        (Self::new(b_in.map(Ok), a_out), Self::new(a_in.map(Ok), b_out))
    }
}

/// A bounded queue of outgoing packets: the sender for [`PacketStream::new`], the stream for the
/// call.
pub fn packets() -> (mpsc::Sender<Packet>, ReceiverStream<Packet>) {
    let (sink, stream) = mpsc::channel(QUEUE);
    (sink, ReceiverStream::new(stream))
}
