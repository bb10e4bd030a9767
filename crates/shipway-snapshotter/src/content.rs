//! Blobs in containerd's content store, found and read over its socket.
//!
//! Two calls of one service: `hyper` does HTTP/2, as for [`crate::cri`], and `prost` reads the
//! messages.

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Digest;
use std::{collections::HashMap, path::Path};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_util::task::AbortOnDropHandle;

/// Largest message of an answer, in bytes. containerd sends pieces of a mebibyte at most.
const MAX_MESSAGE: usize = 16 << 20;
/// Bytes that containerd may send before they are taken.
const WINDOW: u32 = 1 << 20;
/// Layers of an image that are looked through for one: more cannot be mounted.
const MAX_LAYERS: usize = 128;
/// Label of a manifest with the digest of its layer at this position (containerd,
/// `core/images/annotations.go` and `mediatypes.go`: garbage collection follows it).
const LAYER_OF: &str = "containerd.io/gc.ref.content.l.";
/// Label of a blob with the repositories of a host that it came from, by commas (containerd,
/// `core/remotes/docker/handler.go`).
const SOURCE: &str = "containerd.io/distribution.source.";
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

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ListContentRequest {
        #[prost(string, repeated, tag = "1")]
        pub filters: Vec<String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ListContentResponse {
        #[prost(message, repeated, tag = "1")]
        pub info: Vec<Info>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Info {
        #[prost(string, tag = "1")]
        pub digest: String,
        #[prost(map = "string, string", tag = "5")]
        pub labels: std::collections::HashMap<String, String>,
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

/// A call of the content service whose answer comes.
struct Call {
    /// `None` if all has been said with the headers.
    body: Option<Incoming>,
    messages: Messages,
    _driving: AbortOnDropHandle<()>,
}

impl Call {
    /// Calls a method at `socket`.
    async fn begin(
        socket: &Path,
        namespace: &str,
        method: &str,
        message: impl prost::Message,
    ) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.map_err(away)?;
        let mut http2 = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        http2.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
        let (mut sender, connection) = http2.handshake(TokioIo::new(stream)).await.map_err(away)?;
        let driving = shipway_task::spawn("content of containerd", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to containerd's content store ended");
            }
        });
        let _driving = AbortOnDropHandle::new(driving);
        let message = message.encode_to_vec();
        let length = (message.len() as u32).to_be_bytes();
        let uri = format!("http://localhost/containerd.services.content.v1.Content/{method}");
        let request = Request::post(uri)
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .header(http::header::TE, "trailers")
            .header("containerd-namespace", namespace)
            .body(Full::new(Bytes::from([&[0], &length[..], &message].concat())))
            .map_err(|e| Fault::invalid(e.to_string()))?;
        let answer = sender.send_request(request).await.map_err(away)?;
        let body = match status(answer.headers()) {
            Some(ended) => ended.map(|()| None)?,
            None => Some(answer.into_body()),
        };
        Ok(Self { body, messages: Messages::default(), _driving })
    }

    /// The next message; `None` at the end.
    async fn next<T: prost::Message + Default>(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(message) = self.messages.next()? {
                let parsed = T::decode(message);
                return parsed
                    .map(Some)
                    .map_err(|e| Fault::internal(format!("an answer of containerd: {e}")));
            }
            let Some(body) = &mut self.body else { return Ok(None) };
            let Some(frame) = body.frame().await else {
                return Err(Fault::unavailable("containerd's answer has no end"));
            };
            let frame = frame.map_err(away)?;
            if let Some(ended) = frame.trailers_ref().and_then(status) {
                return ended.map(|()| None);
            }
            if let Ok(piece) = frame.into_data() {
                self.messages.push(&piece);
            }
        }
    }
}

/// Reads the blob `digest` of `namespace` from the containerd at `socket`, from its beginning to
/// its end. It ends early if nobody takes the pieces any more.
pub async fn read(
    socket: &Path,
    namespace: &str,
    digest: Digest,
    pieces: &mpsc::Sender<Bytes>,
) -> Result<()> {
    let read = async {
        let request = wire::ReadContentRequest { digest: digest.to_string() };
        let mut call = Call::begin(socket, namespace, "Read", request).await?;
        while let Some(answer) = call.next::<wire::ReadContentResponse>().await? {
            if pieces.send(answer.data).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    read.await.map_err(|fault: Fault| fault.context(reading(namespace, digest)))
}

/// The whole blob `digest` of `namespace`, no longer than `limit` bytes and with that digest.
pub async fn whole(
    socket: &Path,
    namespace: &str,
    digest: Digest,
    limit: usize,
) -> Result<Vec<u8>> {
    let read = async {
        let request = wire::ReadContentRequest { digest: digest.to_string() };
        let mut call = Call::begin(socket, namespace, "Read", request).await?;
        let mut blob = Vec::new();
        while let Some(answer) = call.next::<wire::ReadContentResponse>().await? {
            if blob.len() + answer.data.len() > limit {
                return Err(Fault::invalid(format!("it is longer than {limit} bytes")));
            }
            blob.extend_from_slice(&answer.data);
        }
        if Digest::of(&blob) != digest {
            return Err(Fault::new(Code::DataLoss, "containerd has other bytes"));
        }
        Ok(blob)
    };
    read.await.map_err(|fault| fault.context(reading(namespace, digest)))
}

fn reading(namespace: &str, digest: Digest) -> String {
    format!("read the blob {digest} of the namespace {namespace}")
}

/// Manifests in `namespace` that have `layer` among their layers, as far as containerd's client
/// labeled them for garbage collection, and that came from `repository` of `host`.
pub async fn manifests_with(
    socket: &Path,
    namespace: &str,
    layer: Digest,
    (host, repository): (&str, &str),
) -> Result<Vec<Digest>> {
    let list = async {
        let filter = |at| format!("labels.\"{LAYER_OF}{at}\"==\"{layer}\"");
        let request = wire::ListContentRequest { filters: (0..MAX_LAYERS).map(filter).collect() };
        let mut call = Call::begin(socket, namespace, "List", request).await?;
        let mut found = Vec::new();
        while let Some(answer) = call.next::<wire::ListContentResponse>().await? {
            let of = answer.info.iter().filter(|info| is_from(&info.labels, host, repository));
            found.extend(of.filter_map(|info| info.digest.parse::<Digest>().ok()));
        }
        Ok(found)
    };
    list.await.map_err(|fault: Fault| {
        fault.context(format!("look for manifests with {layer} in the namespace {namespace}"))
    })
}

/// Whether labels of a blob say that it came from a repository.
fn is_from(labels: &HashMap<String, String>, host: &str, repository: &str) -> bool {
    let sources = labels.get(&format!("{SOURCE}{host}"));
    sources.is_some_and(|all| all.split(',').any(|source| source == repository))
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
    fn a_blob_comes_from_the_repositories_that_its_label_names() {
        let labels: HashMap<String, String> =
            [(format!("{SOURCE}r.example:5000"), "a/b,c".to_owned())].into();
        for (host, repository, from) in [
            ("r.example:5000", "a/b", true),
            ("r.example:5000", "c", true),
            ("r.example:5000", "b", false),
            ("r.example:5000", "a/b,c", false),
            ("r.example", "c", false),
        ] {
            assert_eq!(is_from(&labels, host, repository), from, "{host}/{repository}");
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
