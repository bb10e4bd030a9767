//! Messages as bytes, for methods whose type depends on their metadata, such as `FileSend/DiffCopy`
//! (rows `cb.filesend.*`).

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut, Bytes};
use futures::Stream;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, StreamingService},
};

type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Leaves messages undecoded.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// Answers of a [`FileSend`] call, undecoded.
pub type RawAnswers = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The client's `FileSend` service, whose one method carries either a file's bytes (as
/// `BytesMessage`) or a directory's packets: the metadata say which.
#[tonic::async_trait]
pub trait FileSend: Send + Sync + 'static {
    /// Takes what a daemon exports.
    async fn diff_copy(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<RawAnswers>, Status>;
}

/// Serves a [`FileSend`].
pub struct FileSendServer<T>(Arc<T>);

impl<T> FileSendServer<T> {
    /// A server of `service`.
    pub fn new(service: T) -> Self {
        Self(Arc::new(service))
    }
}

impl<T> Clone for FileSendServer<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> NamedService for FileSendServer<T> {
    const NAME: &'static str = "moby.filesync.v1.FileSend";
}

struct Method<T>(Arc<T>);

impl<T: FileSend> StreamingService<Bytes> for Method<T> {
    type Response = Bytes;
    type ResponseStream = RawAnswers;
    type Future = Later<Result<Response<RawAnswers>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.diff_copy(request).await })
    }
}

impl<T, B> tower::Service<http::Request<B>> for FileSendServer<T>
where
    T: FileSend,
    B: hyper::body::Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Later<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move {
            if request.uri().path() != "/moby.filesync.v1.FileSend/DiffCopy" {
                return Ok(Status::unimplemented("FileSend has no such method").into_http());
            }
            let limit = shipway_proto::MAX_MESSAGE;
            let mut grpc = Grpc::new(RawCodec)
                .max_decoding_message_size(limit)
                .max_encoding_message_size(limit);
            Ok(grpc.streaming(Method(service), request).await)
        })
    }
}
