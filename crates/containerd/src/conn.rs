//! Owns the gRPC channels to one containerd and the way every call is made: headers, a deadline,
//! errors in our words. Knows no service.
//!
//! Channels dial lazily and again after containerd was restarted; a call that was under way then
//! fails at once. HTTP/2 keep-alive is off on purpose: Go's server answers frequent pings with
//! GOAWAY, so deadlines catch a containerd that stopped answering.

use crate::fault;
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::TracedChannel;
use shipway_storage::LeaseId;
use shipway_telemetry::meter;
use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tonic::{Request, Response, Status, metadata::MetadataValue, transport::Endpoint};

/// Largest message in either direction; containerd's own limit.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;
/// Connections that carry blob bytes, so that one HTTP/2 connection's framing does not bound
/// parallel layers.
const BULK_CONNECTIONS: usize = 3;
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// How long a call may take before we say that containerd does not answer.
#[allow(dead_code)]
pub(crate) mod deadline {
    use std::time::Duration;
    /// Reads and writes of metadata.
    pub(crate) const QUICK: Duration = Duration::from_secs(30);
    /// Calls that wait for a disk or a process: commits, mounts, task creation.
    pub(crate) const SLOW: Duration = Duration::from_secs(120);
    /// Calls that wait for a garbage collection.
    pub(crate) const COLLECT: Duration = Duration::from_secs(300);
    /// Unpacking of one layer.
    pub(crate) const UNPACK: Duration = Duration::from_secs(1800);
    /// Silence on a stream of bytes.
    pub(crate) const STALL: Duration = Duration::from_secs(60);
}

struct Channels {
    address: PathBuf,
    control: TracedChannel,
    bulk: Vec<TracedChannel>,
    next: AtomicUsize,
}

/// The channels to one containerd, bound to one namespace. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connection {
    channels: Arc<Channels>,
    namespace: Arc<str>,
}

impl Connection {
    /// Channels to the socket at `address`; nothing is dialed yet.
    pub(crate) fn new(address: &Path, namespace: &str) -> Result<Self> {
        let channels = Channels {
            address: address.to_path_buf(),
            control: dial(address)?,
            bulk: (0..BULK_CONNECTIONS).map(|_| dial(address)).collect::<Result<_>>()?,
            next: AtomicUsize::new(0),
        };
        Self { channels: Arc::new(channels), namespace: "".into() }.in_namespace(namespace)
    }

    /// The same channels in another namespace.
    pub(crate) fn in_namespace(&self, namespace: &str) -> Result<Self> {
        header(namespace, "namespace")?;
        Ok(Self { channels: self.channels.clone(), namespace: namespace.into() })
    }

    /// The namespace of every request.
    #[allow(dead_code)]
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Path of the socket.
    pub(crate) fn address(&self) -> &Path {
        &self.channels.address
    }

    /// The channel for everything but blob bytes.
    pub(crate) fn control(&self) -> TracedChannel {
        self.channels.control.clone()
    }

    /// A channel for blob bytes.
    pub(crate) fn bulk(&self) -> TracedChannel {
        let n = self.channels.next.fetch_add(1, Ordering::Relaxed) % self.channels.bulk.len();
        self.channels.bulk[n].clone()
    }

    /// `message` as a request in this namespace.
    pub(crate) fn request<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("containerd-namespace", header(&self.namespace, "namespace")?);
        Ok(request)
    }

    /// `message` as a request whose objects go into `lease`.
    pub(crate) fn leased<T>(&self, message: T, lease: &LeaseId) -> Result<Request<T>> {
        let mut request = self.request(message)?;
        request.metadata_mut().insert("containerd-lease", header(&lease.0, "lease")?);
        Ok(request)
    }

    /// Runs one call within `limit`. `what` completes "while containerd was to …", for example
    /// `stat snapshot "x"`.
    pub(crate) async fn call<T>(
        &self,
        what: impl FnOnce() -> String,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        let began = tracing::enabled!(tracing::Level::TRACE).then(Instant::now);
        let answer = match tokio::time::timeout(limit, call).await {
            Ok(Ok(response)) if began.is_none() => return Ok(response.into_inner()),
            answer => answer,
        };
        let what = what();
        if let Some(began) = began {
            tracing::trace!(took = ?began.elapsed(), "containerd: {what}");
        }
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.fault(what, status)),
            Err(_) => Err(self.stalled(what, limit)),
        }
    }

    /// `status` in our words.
    pub(crate) fn fault(&self, what: String, status: Status) -> Fault {
        fault::from_status(&what, &self.channels.address, &status)
    }

    /// containerd did not answer within `limit`.
    pub(crate) fn stalled(&self, what: String, limit: Duration) -> Fault {
        Fault::new(
            Code::DeadlineExceeded,
            format!(
                "{what}: containerd at {} did not answer within {} s",
                self.address().display(),
                limit.as_secs()
            ),
        )
        .hint("is containerd overloaded, or its disk very slow? its log may say more")
    }
}

fn dial(address: &Path) -> Result<TracedChannel> {
    let path = address.to_path_buf();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                tokio::net::UnixStream::connect(path).await?,
            ))
        }
    });
    // The authority is never resolved; the connector goes to the socket.
    let endpoint = Endpoint::from_static("http://containerd")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_timeout(Duration::from_secs(10));
    let channel = endpoint.connect_with_connector_lazy(connector);
    Ok(TracedChannel::new(channel, "containerd").timed(&meter::CONTAINERD_CALLS))
}

fn header(value: &str, what: &str) -> Result<MetadataValue<tonic::metadata::Ascii>> {
    value.parse().ok().filter(|_| !value.is_empty()).ok_or_else(|| {
        Fault::invalid(format!(
            "{value:?} is not a valid containerd {what} name: only printable ASCII is allowed"
        ))
    })
}
