//! Blobs in containerd's content store, read over its socket.
//!
//! One call of one service: `hyper` does HTTP/2, as for [`crate::cri`], and `prost` reads the two
//! messages.

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Digest;
use std::path::Path;
use tokio::{net::UnixStream, sync::mpsc};

/// Largest message of an answer, in bytes. containerd sends pieces of a mebibyte at most.
const MAX_MESSAGE: usize = 16 << 20;
/// Bytes that containerd may send before they are taken.
const WINDOW: u32 = 1 << 20;
/// Bytes before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// The parts of containerd's API that are used (`services/content/v1/content.proto`).
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ReadContentRequest {
        #[prost(string, tag = "1")]
        pub digest: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ReadContentResponse {
        #[prost(int64, tag = "1")]
        pub offset: i64,
        #[prost(bytes = "bytes", tag = "2")]
        pub data: bytes::Bytes,
    }
}

/// Messages out of the pieces of a body.
#[derive(Default)]
struct Messages(BytesMut);

impl Messages {
    fn push(&mut self, piece: &[u8]) {
        self.0.extend_from_slice(piece);
    }

    /// The next message, if it is there.
    fn next(&mut self) -> Result<Option<Bytes>> {
        let Some((prefix, rest)) = self.0.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let [compressed, length @ ..] = *prefix;
        let length = u32::from_be_bytes(length) as usize;
        if compressed != 0 || length > MAX_MESSAGE {
            return Err(Fault::internal(
                "containerd sent a message that is compressed or too long",
            ));
        }
        if rest.len() < length {
            return Ok(None);
        }
        self.0.advance(PREFIX);
        Ok(Some(self.0.split_to(length).freeze()))
    }
}

fn away(error: impl std::error::Error + Send + Sync + 'static) -> Fault {
    Fault::unavailable(format!("containerd: {error}")).with_source(error)
}

/// How the call ended, if these headers or trailers say it.
fn status(headers: &HeaderMap) -> Option<Result<()>> {
    let code: i32 = headers.get("grpc-status")?.to_str().ok()?.parse().unwrap_or(2);
    let message = headers.get("grpc-message").and_then(|m| m.to_str().ok()).unwrap_or_default();
    Some(match code {
        0 => Ok(()),
        code => Err(Fault::new(Code::from_number(code), format!("containerd: {message}"))),
    })
}

/// Reads the blob `digest` of `namespace` from the containerd at `socket`, from its beginning to
/// its end. It ends early if nobody takes the pieces any more.
pub async fn read(
    socket: &Path,
    namespace: &str,
    digest: Digest,
    pieces: &mpsc::Sender<Bytes>,
) -> Result<()> {
    let context = || format!("read the blob {digest} of the namespace {namespace}");
    let stream = UnixStream::connect(socket).await.map_err(|e| away(e).context(context()))?;
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| away(e).context(context()))?;
    let driving = shipway_task::spawn("content of containerd", async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection to containerd's content store ended");
        }
    });
    let message = wire::ReadContentRequest { digest: digest.to_string() }.encode_to_vec();
    let length = (message.len() as u32).to_be_bytes();
    let request = Request::post("http://localhost/containerd.services.content.v1.Content/Read")
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers")
        .header("containerd-namespace", namespace)
        .body(Full::new(Bytes::from([&[0], &length[..], &message].concat())))
        .map_err(|e| Fault::invalid(e.to_string()).context(context()))?;
    let work = async {
        let answer = sender.send_request(request).await.map_err(away)?;
        if let Some(ended) = status(answer.headers()) {
            return ended;
        }
        let (mut body, mut messages) = (answer.into_body(), Messages::default());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(away)?;
            if let Some(ended) = frame.trailers_ref().and_then(status) {
                return ended;
            }
            let Ok(piece) = frame.into_data() else { continue };
            messages.push(&piece);
            while let Some(message) = messages.next()? {
                let answer = wire::ReadContentResponse::decode(message)
                    .map_err(|e| Fault::internal(format!("an answer of containerd: {e}")))?;
                if pieces.send(answer.data).await.is_err() {
                    return Ok(());
                }
            }
        }
        Err(Fault::unavailable("containerd's answer has no end"))
    };
    let read = work.await.map_err(|fault| fault.context(context()));
    driving.abort();
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_of_any_pieces() {
        let wanted: Vec<Vec<u8>> =
            [0, 1, 5, 700, 70_000].map(|length| vec![length as u8; length]).to_vec();
        let stream: Vec<u8> = wanted
            .iter()
            .flat_map(|m| [&[0], &(m.len() as u32).to_be_bytes()[..], m].concat())
            .collect();
        for step in [1, 4, 6, 1000, stream.len()] {
            let (mut messages, mut got) = (Messages::default(), Vec::new());
            for piece in stream.chunks(step) {
                messages.push(piece);
                while let Some(message) = messages.next().unwrap() {
                    got.push(message.to_vec());
                }
            }
            assert_eq!(got, wanted, "{step}");
        }
    }

    #[test]
    fn messages_are_bounded() {
        let mut long = Messages::default();
        long.push(&[&[0], &(MAX_MESSAGE as u32).to_be_bytes()[..]].concat());
        assert_eq!(long.next().unwrap(), None);
        let mut longer = Messages::default();
        longer.push(&[&[0], &(MAX_MESSAGE as u32 + 1).to_be_bytes()[..]].concat());
        longer.next().unwrap_err();
        let mut compressed = Messages::default();
        compressed.push(&[1, 0, 0, 0, 0]);
        compressed.next().unwrap_err();
    }
}
