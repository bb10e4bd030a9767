//! A registry on loopback whose answers a test chooses, request by request.

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use shipway_http::Timeouts;
use shipway_registry::{Registry, RegistryConfig, Timing};
use std::{io, sync::Arc, time::Duration};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    /// Path and query.
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}

/// How to answer.
pub enum Reply {
    /// With this.
    Full(u16, Vec<(&'static str, String)>, Bytes),
    /// Never.
    Hang,
    /// With these bytes, and then never more.
    Stall(Vec<(&'static str, String)>, Bytes),
    /// With these bytes, and then the connection breaks.
    Break(u16, Vec<(&'static str, String)>, Bytes),
}

pub fn status(code: u16) -> Reply {
    Reply::Full(code, vec![], Bytes::new())
}

pub fn ok(bytes: impl Into<Bytes>) -> Reply {
    Reply::Full(200, vec![], bytes.into())
}

type Handler = dyn Fn(&Asked) -> Reply + Send + Sync;

/// A running fake.
pub struct Fake {
    pub host: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    pub async fn start(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(None, handler).await
    }

    /// One that speaks TLS.
    pub async fn start_tls(
        config: ServerConfig,
        handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::serve(Some(TlsAcceptor::from(Arc::new(config))), handler).await
    }

    async fn serve(
        tls: Option<TlsAcceptor>,
        handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, handler): (_, Arc<Handler>) = (asked.clone(), Arc::new(handler));
        let task = shipway_task::spawn("test", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (log, handler, tls) = (log.clone(), handler.clone(), tls.clone());
                shipway_task::spawn("test", async move {
                    let service = hyper::service::service_fn(move |r| {
                        answer(r, log.clone(), handler.clone())
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    let Some(tls) = tls else {
                        let _ = http.serve_connection(TokioIo::new(tcp), service).await;
                        return;
                    };
                    // Who is refused in the handshake may come again.
                    if let Ok(stream) = tls.accept(tcp).await {
                        let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    }
                });
            }
        });
        Self { host, asked, task }
    }

    /// What was asked, as `METHOD path`.
    pub fn log(&self) -> Vec<String> {
        self.asked.lock().iter().map(|a| format!("{} {}", a.method, a.path)).collect()
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

fn answer(
    request: Request<Incoming>,
    log: Arc<Mutex<Vec<Asked>>>,
    handler: Arc<Handler>,
) -> BoxFuture<'static, io::Result<Response<Body>>> {
    async move {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        let asked = Asked {
            method: head.method.clone(),
            path: head.uri.path_and_query().unwrap().to_string(),
            headers: head.headers,
            body,
        };
        log.lock().push(asked.clone());
        let (code, headers, bytes, tail) = match handler(&asked) {
            Reply::Full(code, headers, bytes) => (code, headers, bytes, stream::empty().boxed()),
            Reply::Stall(headers, bytes) => (200, headers, bytes, stream::pending().boxed()),
            Reply::Break(code, headers, bytes) => {
                // The server flushes what it has whenever the body has to be waited for.
                let later = async {
                    for _ in 0..100 {
                        tokio::task::yield_now().await;
                    }
                    Err(io::Error::other("cut"))
                };
                (code, headers, bytes, stream::once(later).boxed())
            }
            Reply::Hang => std::future::pending().await,
        };
        let mut response = Response::builder().status(StatusCode::from_u16(code).unwrap());
        let mut known = false;
        for (name, value) in headers {
            known |= name.eq_ignore_ascii_case("content-length");
            response = response.header(name, value);
        }
        if !known && code != 204 {
            response = response.header("content-length", bytes.len());
        }
        let body = if head.method == Method::HEAD { Bytes::new() } else { bytes };
        let body = stream::once(async move { Ok(Frame::data(body)) }).chain(tail);
        Ok(response.body(StreamBody::new(body).boxed_unsync()).unwrap())
    }
    .boxed()
}

/// Timing that makes failures quick.
pub fn quick() -> Timing {
    let ms = Duration::from_millis;
    Timing {
        http: Timeouts { connect: ms(500), response: ms(300), stall: ms(200), stall_bytes: 64 },
        backoff: ms(5),
        max_backoff: ms(20),
        budget: ms(900),
    }
}

pub fn registry(config: RegistryConfig) -> Registry {
    Registry::new(RegistryConfig { timing: quick(), ..config })
}
