//! The debug listener (rows `ob.debug`, `ob.prom`): metrics, health, and what is being built. It is
//! closed unless the configuration says where it is.

mod page;

use crate::drain::Drain;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use shipway_engine::Engine;
use shipway_fault::{Fault, Result};
use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::{
    StreamExt as _,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tokio_util::task::AbortOnDropHandle;

/// What is answered to requests for profiles.
const NO_PROFILER: &str = "there is no profiler in this program: use `perf record -g -p PID` for \
    where time goes, and /metrics for memory\n";

/// Where the listener is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DebugAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address of this machine.
    Tcp(SocketAddr),
}

impl FromStr for DebugAddress {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix://") {
            return match path.starts_with('/') {
                true => Ok(Self::Unix(path.into())),
                false => Err(Fault::invalid(format!("{path:?} is not an absolute path"))),
            };
        }
        let text = text.strip_prefix("tcp://").unwrap_or(text);
        // As Go has it: all addresses of the machine.
        let all = text.strip_prefix(':').map(|port| format!("[::]:{port}"));
        let number = all.as_deref().unwrap_or(text).replace("localhost:", "127.0.0.1:");
        number.parse().map(Self::Tcp).map_err(|_| {
            Fault::invalid(format!("{text:?} is not an address to listen on"))
                .hint("want 127.0.0.1:6060 or unix:///path")
        })
    }
}

impl fmt::Display for DebugAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Listens at `address` until the handle is dropped.
pub async fn start(
    address: &DebugAddress,
    engine: Engine,
    drain: Drain,
) -> Result<AbortOnDropHandle<()>> {
    let failed = |e| Fault::io(format!("listen on {address}"), e);
    let answer = move |request| {
        let (engine, drain) = (engine.clone(), drain.clone());
        async move { answer(&request, &engine, &drain) }
    };
    const NAME: &str = "serve metrics";
    tracing::info!(%address, "metrics");
    let task = match address {
        DebugAddress::Tcp(to) => {
            if !to.ip().is_loopback() {
                tracing::warn!(%address, "other machines can see metrics and ids of builds here");
            }
            let accepted = TcpListenerStream::new(TcpListener::bind(to).await.map_err(failed)?);
            let accepted = accepted.filter_map(std::io::Result::ok);
            shipway_task::spawn(NAME, shipway_daemon::debug::serve(accepted, answer))
        }
        DebugAddress::Unix(path) => {
            let _ = std::fs::remove_file(path);
            let accepted = UnixListenerStream::new(UnixListener::bind(path).map_err(failed)?);
            let accepted = accepted.filter_map(std::io::Result::ok);
            shipway_task::spawn(NAME, shipway_daemon::debug::serve(accepted, answer))
        }
    };
    Ok(AbortOnDropHandle::new(task))
}

fn answer(request: &Request<Incoming>, engine: &Engine, drain: &Drain) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let path = request.uri().path();
    let (status, format, text) = match (request.method(), path) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, shipway_daemon::metrics::FORMAT, page::metrics(engine))
        }
        (&Method::GET | &Method::HEAD, "/healthz") if drain.is_begun() => {
            (StatusCode::SERVICE_UNAVAILABLE, TEXT, "stopping\n".to_owned())
        }
        (&Method::GET | &Method::HEAD, "/healthz") => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        (&Method::GET | &Method::HEAD, "/debug/requests") => {
            (StatusCode::OK, TEXT, page::requests(engine))
        }
        (&Method::GET | &Method::HEAD, "/debug/vars") => {
            (StatusCode::OK, "application/json", page::variables(engine))
        }
        (_, path) if path.starts_with("/debug/pprof") || path.starts_with("/debug/flight") => {
            (StatusCode::NOT_IMPLEMENTED, TEXT, NO_PROFILER.to_owned())
        }
        (_, "/metrics" | "/healthz" | "/debug/requests" | "/debug/vars") => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".to_owned())
        }
        _ => (
            StatusCode::NOT_FOUND,
            TEXT,
            "there are /metrics, /healthz, /debug/requests and /debug/vars\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(format));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_that_buildkitd_takes_and_sockets() {
        let read = |text: &str| text.parse::<DebugAddress>().map(|a| a.to_string());
        for (text, expected) in [
            ("127.0.0.1:6060", "127.0.0.1:6060"),
            ("localhost:6060", "127.0.0.1:6060"),
            ("tcp://0.0.0.0:1", "0.0.0.0:1"),
            (":6060", "[::]:6060"),
            ("unix:///run/x.sock", "unix:///run/x.sock"),
        ] {
            assert_eq!(read(text).unwrap(), expected);
        }
        for (text, says) in
            [("nowhere", "not an address"), ("6060", "not an address"), ("unix://x", "absolute")]
        {
            assert!(read(text).unwrap_err().to_string().contains(says), "{text}");
        }
    }
}
