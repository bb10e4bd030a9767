//! A listener for those who look at a daemon: one request a connection, by HTTP/1.1.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};
use tokio_stream::{Stream, StreamExt as _};

/// Most connections at once; further ones wait.
const MAX_CLIENTS: usize = 16;
/// How long a connection may be there without the head of a request, and all of it may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers everybody who connects, by `answer`.
pub async fn serve<S, A, F>(connections: impl Stream<Item = S>, answer: A)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut connections = std::pin::pin!(connections);
    while let Some(connection) = connections.next().await {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let answer = answer.clone();
        shipway_task::spawn("answer a request", async move {
            let _place = place;
            let answer = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            // One answer and no more, so that idle scrapers hold no place.
            let serving = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(connection), answer);
            if !matches!(tokio::time::timeout(PATIENCE, serving).await, Ok(Ok(()))) {
                tracing::debug!("a connection of the debug listener ended early");
            }
        });
    }
}
