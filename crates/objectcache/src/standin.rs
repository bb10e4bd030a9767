//! A store for tests: answers as a test says, and remembers what it was asked.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::{convert::Infallible, sync::Arc};
use tokio::net::TcpListener;

/// A request that came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    /// Method and target, for comparison.
    pub fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }
}

/// A running one; ends with the runtime.
pub(crate) struct StandIn {
    pub address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// An answer.
pub(crate) fn answer(status: u16, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

impl StandIn {
    /// Answers every request by `respond`.
    pub async fn start(respond: impl Fn(&Seen) -> Response<Bytes> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let (all, respond) = (seen.clone(), Arc::new(respond));
        shipway_task::spawn("accept connections", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (all, respond) = (all.clone(), respond.clone());
                let serve = service_fn(move |request: Request<Incoming>| {
                    let (all, respond) = (all.clone(), respond.clone());
                    async move {
                        let (head, body) = request.into_parts();
                        let seen = Seen {
                            method: head.method.to_string(),
                            target: head.uri.to_string(),
                            headers: head.headers,
                            body: body.collect().await.map(|b| b.to_bytes()).unwrap_or_default(),
                        };
                        all.lock().push(seen.clone());
                        Ok::<_, Infallible>(respond(&seen).map(Full::new))
                    }
                });
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), serve);
                shipway_task::spawn("serve a connection", async move { drop(connection.await) });
            }
        });
        Self { address, seen }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What was asked since the last time.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock())
    }
}

/// A layer of these bytes.
pub(crate) struct Held(pub Bytes);

#[async_trait::async_trait]
impl crate::LayerContent for Held {
    async fn open(
        &self,
        offset: u64,
    ) -> shipway_fault::Result<futures::stream::BoxStream<'static, shipway_fault::Result<Bytes>>>
    {
        let rest = self.0.slice(offset as usize..);
        let pieces: Vec<_> = rest.chunks(1 << 20).map(|c| Ok(rest.slice_ref(c))).collect();
        Ok(Box::pin(futures::stream::iter(pieces)))
    }
}

/// The descriptor of a layer of these bytes.
pub(crate) fn layer(bytes: &[u8]) -> shipway_oci::Descriptor {
    shipway_oci::Descriptor::of("application/vnd.oci.image.layer.v1.tar+gzip", bytes)
}
