//! What the typed callers share: limits, metadata, and streams that start at once.

use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt, stream};
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::{TracedChannel, fault_of, headers};
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap},
    service::{Interceptor, interceptor::InterceptedService},
};

use crate::Session;

/// Sets the message limits of a generated client.
macro_rules! client {
    ($client:ident, $session:expr) => {
        $client::new($session.channel())
            .max_decoding_message_size(shipway_proto::MAX_MESSAGE)
            .max_encoding_message_size(shipway_proto::MAX_MESSAGE)
    };
}
pub(crate) use client;

/// Answers of a streaming call that is under way whether or not anybody reads yet: many servers
/// send nothing, not even headers, before they have heard something. Dropping the stream cancels
/// the call.
pub(crate) fn eager<T: Send + 'static>(
    call: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send + 'static {
    let task = AbortOnDropHandle::new(shipway_task::spawn("call a client", call));
    stream::once(async move {
        match task.await {
            Ok(answered) => answered.map(Response::into_inner),
            Err(error) => Err(Status::internal(format!("call the client: {error}"))),
        }
    })
    .try_flatten()
}

/// [`eager`] with faults for statuses.
pub(crate) fn eager_faults<T: Send + 'static>(
    call: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static,
) -> impl Stream<Item = Result<T>> + Send + 'static {
    eager(call).map(|item| item.map_err(|status| fault_of(&status)))
}

/// Adds `value` under `key`; a header cannot hold everything, and what it cannot is an error that
/// says so.
pub(crate) fn add(metadata: &mut MetadataMap, key: &str, value: &str) -> Result<()> {
    let refused = |what| {
        Fault::invalid(format!("send {key:?} to the client: its {what} cannot be sent as metadata"))
    };
    let key =
        AsciiMetadataKey::from_bytes(key.to_lowercase().as_bytes()).map_err(|_| refused("name"))?;
    let value = AsciiMetadataValue::try_from(value).map_err(|_| refused("value"))?;
    metadata.append(key, value);
    Ok(())
}

/// A unary answer, or the fault it carries; `None` if the client does not know the method (rows
/// `cb.auth.fallback`, `cb.secrets`).
pub(crate) async fn optional<T>(
    limit: Duration,
    what: &str,
    tolerated: &[Code],
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Option<T>> {
    let answer = tokio::time::timeout(limit, call).await.map_err(|_| {
        Fault::new(
            Code::DeadlineExceeded,
            format!("{what}: the client has not answered within {} s", limit.as_secs()),
        )
    })?;
    match answer {
        Ok(response) => Ok(Some(response.into_inner())),
        Err(status) => {
            let fault = fault_of(&status);
            if tolerated.contains(&fault.code()) {
                Ok(None)
            } else {
                Err(fault.context(what.to_owned()))
            }
        }
    }
}

/// Calls to one of the client's content stores.
pub type StoreChannel = InterceptedService<TracedChannel, StoreId>;

/// Marks calls as meant for one content store.
#[derive(Clone, Debug)]
pub struct StoreId(AsciiMetadataValue);

impl Interceptor for StoreId {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(headers::STORE_ID, self.0.clone());
        Ok(request)
    }
}

impl Session {
    /// The client's content store `id`, such as `local:<dir>`, for clients of containerd's content
    /// service (row `cb.content`).
    pub fn content(&self, id: &str) -> Result<StoreChannel> {
        let id = AsciiMetadataValue::try_from(id).map_err(|_| {
            Fault::invalid(format!(
                "the content store {id:?} has a name that cannot be sent as metadata"
            ))
        })?;
        Ok(InterceptedService::new(self.channel(), StoreId(id)))
    }
}
