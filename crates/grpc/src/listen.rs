//! Where servers listen and clients dial: unix sockets, TCP with or without TLS, systemd's sockets
//! (row `net.listen`).

use std::{
    fmt, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use shipway_fault::{Context as _, Fault, Result, nearest};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Sleep,
};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, server::Connected};

use crate::{ClientTls, PeerCertificate, ServerTls, tls::ReloadedTls, tuned};

/// Connections accepted but not yet taken by the server.
const BACKLOG: usize = 64;
/// A peer that has not finished its TLS handshake by then, or has not said a word, is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// TLS handshakes of one listener at the same time; who comes then waits in the kernel's queue.
const MAX_HANDSHAKES: usize = 256;
/// Connections of one listener at the same time, those that shake hands included; who comes then
/// waits in the kernel's queue.
const MAX_CONNECTIONS: usize = 4096;
/// Pause after an accept error such as "too many open files", so that the loop does not spin.
const PAUSE: Duration = Duration::from_millis(50);

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// `unix://<path>`
    Unix(PathBuf),
    /// `tcp://<host>:<port>`
    Tcp(String),
    /// `fd://`: the sockets that systemd passed.
    Activated,
}

impl FromStr for Address {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(Fault::invalid(format!(
                "address {text} does not contain proto, you meant unix://{text} ?"
            )));
        };
        match scheme {
            "unix" if rest.is_empty() => Err(Fault::invalid(format!("address {text} has no path"))),
            "unix" => Ok(Self::Unix(rest.into())),
            "tcp" => Ok(Self::Tcp(rest.into())),
            "fd" if rest.is_empty() => Ok(Self::Activated),
            "fd" => Err(Fault::unimplemented(format!(
                "choosing one of systemd's sockets by number ({text}); use fd://"
            ))),
            other => {
                let fault = Fault::invalid(format!("addr {text} not supported"));
                Err(match nearest(other, ["unix", "tcp", "fd"]) {
                    Some(near) => fault.hint(format!("did you mean {near}://{rest}?")),
                    None => fault.hint("use unix://<path>, tcp://<host>:<port> or fd://"),
                })
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(host) => write!(f, "tcp://{host}"),
            Self::Activated => f.write_str("fd://"),
        }
    }
}

/// How to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// Permission bits of a unix socket.
    pub mode: u32,
    /// Owning user of a unix socket.
    pub uid: Option<u32>,
    /// Owning group of a unix socket.
    pub gid: Option<u32>,
    /// TLS for TCP sockets; unix sockets never use it.
    pub tls: Option<ServerTls>,
    /// Whether the server asks callers who they are, so that being reachable gives no rights.
    pub authenticated: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self { mode: 0o660, uid: None, gid: None, tls: None, authenticated: false }
    }
}

enum Socket {
    Unix {
        listener: UnixListener,
        /// Nothing for sockets that are systemd's.
        _unlink: Option<Unlink>,
    },
    Tcp(TcpListener, Option<Arc<ReloadedTls>>),
}

/// Removes the socket file when its listener goes.
struct Unlink(PathBuf);

impl Drop for Unlink {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A bound socket. Connections wait in the kernel until [`Listener::incoming`] runs.
pub struct Listener {
    socket: Socket,
    address: Address,
}

impl Listener {
    /// Binds `address`; only `fd://` may give more than one listener.
    pub async fn bind(address: &Address, options: &ListenOptions) -> Result<Vec<Self>> {
        let tls = || options.tls.clone().map(ReloadedTls::new).transpose();
        let what = || format!("listen on {address}");
        let socket = match address {
            Address::Unix(path) => bind_unix(path, options).await.context(what)?,
            Address::Tcp(host) => {
                let listener = TcpListener::bind(host).await.map_err(|e| Fault::io(what(), e))?;
                if let Some(risk) = risk(options) {
                    tracing::warn!(%address, "{risk}");
                }
                Socket::Tcp(listener, tls()?.map(Arc::new))
            }
            Address::Activated => {
                return activated(options, tls()?.map(Arc::new));
            }
        };
        Ok(vec![Self { socket, address: address.clone() }])
    }

    /// Where it listens, with the port that was chosen for port 0.
    pub fn address(&self) -> Address {
        match &self.socket {
            Socket::Tcp(listener, _) => listener
                .local_addr()
                .map_or_else(|_| self.address.clone(), |address| Address::Tcp(address.to_string())),
            Socket::Unix { .. } => self.address.clone(),
        }
    }

    /// Accepts connections until the stream is dropped; for tonic's `serve_with_incoming`. TLS
    /// handshakes run beside the loop, so that a slow peer holds up no one.
    pub fn incoming(self) -> impl futures::Stream<Item = io::Result<Connection>> + Send + 'static {
        let (sink, stream) = mpsc::channel(BACKLOG);
        let span = tracing::info_span!("accept", address = %self.address);
        shipway_task::spawn_in(span, accept(self.socket, sink));
        ReceiverStream::new(stream)
    }
}

async fn bind_unix(path: &Path, options: &ListenOptions) -> Result<Socket> {
    let failed = |what: &str, e| Fault::io(format!("{what} {}", path.display()), e);
    if let Some(parent) = path.parent() {
        make_public(parent).map_err(|e| failed("create the directory of", e))?;
    }
    match tokio::fs::symlink_metadata(path).await {
        Ok(meta) if meta.file_type().is_socket() => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(Fault::new(
                    shipway_fault::Code::AlreadyExists,
                    "another process is listening there already",
                )
                .with_class(shipway_fault::Class::Environment)
                .hint("stop the other daemon, or choose another address with --addr"));
            }
            tokio::fs::remove_file(path).await.map_err(|e| failed("remove the stale socket", e))?;
        }
        Ok(_) => {
            return Err(Fault::invalid(format!("{} exists and is not a socket", path.display())));
        }
        Err(_) => {}
    }
    // Until its mode is set below, a socket has what the umask leaves: the daemon's umask leaves
    // nothing to others.
    let listener = UnixListener::bind(path).map_err(|e| failed("bind", e))?;
    let unlink = Unlink(path.to_owned());
    if options.uid.is_some() || options.gid.is_some() {
        std::os::unix::fs::chown(path, options.uid, options.gid)
            .map_err(|e| failed("change the owner of", e))?;
    }
    let mode = std::fs::Permissions::from_mode(options.mode);
    tokio::fs::set_permissions(path, mode).await.map_err(|e| failed("change the mode of", e))?;
    Ok(Socket::Unix { listener, _unlink: Some(unlink) })
}

/// Makes the missing directories of `path` such that clients get through to a socket in it,
/// whatever the umask is.
fn make_public(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    path.parent().map_or(Ok(()), make_public)?;
    match std::fs::create_dir(path) {
        Ok(()) => std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

/// What is wrong with a TCP socket under these options: it has no owner and no mode that would keep
/// anybody out.
fn risk(options: &ListenOptions) -> Option<&'static str> {
    match &options.tls {
        _ if options.authenticated => None,
        None => Some("TLS is not enabled: anyone who can reach this address controls the daemon"),
        Some(ServerTls { client_ca: None, .. }) => Some(
            "clients need no certificate (no CA is given): anyone who can reach this address controls the daemon",
        ),
        Some(_) => None,
    }
}

fn activated(options: &ListenOptions, reloaded: Option<Arc<ReloadedTls>>) -> Result<Vec<Listener>> {
    let mut fds = listenfd::ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..fds.len() {
        let failed = |e| Fault::io(format!("take over systemd's socket {index}"), e);
        let socket = match fds.take_unix_listener(index) {
            Ok(Some(unix)) => {
                unix.set_nonblocking(true).map_err(failed)?;
                Socket::Unix {
                    listener: UnixListener::from_std(unix).map_err(failed)?,
                    _unlink: None,
                }
            }
            _ => {
                let Some(tcp) = fds.take_tcp_listener(index).map_err(failed)? else { continue };
                tcp.set_nonblocking(true).map_err(failed)?;
                if let Some(risk) = risk(options) {
                    tracing::warn!(address = ?tcp.local_addr().ok(), "{risk}");
                }
                Socket::Tcp(TcpListener::from_std(tcp).map_err(failed)?, reloaded.clone())
            }
        };
        listeners.push(Listener { socket, address: Address::Activated });
    }
    if listeners.is_empty() {
        return Err(Fault::invalid(
            "no sockets found via socket activation: make sure the service was started by systemd",
        )
        .hint(
            "fd:// works only in a unit that has a .socket beside it; otherwise use unix://<path>",
        ));
    }
    Ok(listeners)
}

async fn accept(socket: Socket, sink: mpsc::Sender<io::Result<Connection>>) {
    accept_some(socket, sink, MAX_CONNECTIONS, MAX_HANDSHAKES).await;
}

async fn accept_some(
    socket: Socket,
    sink: mpsc::Sender<io::Result<Connection>>,
    connections: usize,
    handshakes: usize,
) {
    let (places, handshakes) =
        (Arc::new(Semaphore::new(connections)), Arc::new(Semaphore::new(handshakes)));
    loop {
        let next = async {
            // Neither semaphore is ever closed.
            let (place, handshake) =
                (places.clone().acquire_owned().await, handshakes.clone().acquire_owned().await);
            (accept_one(&socket).await, place.ok(), handshake.ok())
        };
        let (accepted, place, handshake) = tokio::select! {
            () = sink.closed() => return,
            next = next => next,
        };
        match (accepted, &socket) {
            (Ok(Stream::Tcp(tcp)), Socket::Tcp(_, Some(tls))) => {
                let (acceptor, sink) = (tls.acceptor(), sink.clone());
                shipway_task::spawn("TLS handshake", async move {
                    match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
                        Ok(Ok(tls)) => {
                            drop(handshake);
                            _ = sink
                                .send(Ok(Connection::new(Stream::Tls(Box::new(tls)), place)))
                                .await;
                        }
                        Ok(Err(error)) => tracing::warn!(%error, "TLS handshake failed"),
                        Err(_) => tracing::warn!("TLS handshake timed out"),
                    }
                });
            }
            (Ok(stream), _) => {
                if sink.send(Ok(Connection::new(stream, place))).await.is_err() {
                    return;
                }
            }
            (Err(error), _) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn accept_one(socket: &Socket) -> io::Result<Stream> {
    Ok(match socket {
        Socket::Unix { listener, .. } => Stream::Unix(listener.accept().await?.0),
        Socket::Tcp(listener, _) => {
            let stream = listener.accept().await?.0;
            let _ = stream.set_nodelay(true);
            Stream::Tcp(stream)
        }
    })
}

/// An accepted connection. It fails if its peer says nothing at all for a while.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    /// Its place among the listener's connections.
    _place: Option<OwnedSemaphorePermit>,
    /// Until when the first byte must come.
    first: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    fn new(stream: Stream, place: Option<OwnedSemaphorePermit>) -> Self {
        Self { stream, _place: place, first: Some(Box::pin(tokio::time::sleep(HANDSHAKE))) }
    }
}

/// Who is at the other end; tonic puts it in every request's extensions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// User, on a unix socket.
    pub uid: Option<u32>,
    /// Group of the user's process, on a unix socket.
    pub gid: Option<u32>,
    /// Process, on a unix socket.
    pub pid: Option<i32>,
    /// Address, on TCP.
    pub address: Option<SocketAddr>,
    /// Whether nobody between the two can read along: TLS.
    pub encrypted: bool,
    /// The client's certificate, which the authority of the listener has issued.
    pub certificate: Option<Arc<PeerCertificate>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match &self.stream {
            Stream::Unix(stream) => match stream.peer_cred() {
                Ok(cred) => Peer {
                    uid: Some(cred.uid()),
                    gid: Some(cred.gid()),
                    pid: cred.pid(),
                    ..Peer::default()
                },
                Err(_) => Peer::default(),
            },
            Stream::Tcp(stream) => Peer { address: stream.peer_addr().ok(), ..Peer::default() },
            Stream::Tls(stream) => {
                let (tcp, tls) = stream.get_ref();
                let shown = tls.peer_certificates().and_then(|chain| chain.first());
                Peer {
                    address: tcp.peer_addr().ok(),
                    encrypted: true,
                    certificate: shown.and_then(|der| PeerCertificate::of(der)).map(Arc::new),
                    ..Peer::default()
                }
            }
        }
    }
}

macro_rules! each {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.get_mut().stream {
            Stream::Unix($stream) => $call,
            Stream::Tcp($stream) => $call,
            Stream::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = {
            let this = self.as_mut();
            each!(this, stream => Pin::new(stream).poll_read(cx, buf))
        };
        if read.is_ready() {
            self.first = None;
        } else if let Some(first) = &mut self.first
            && first.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the peer says nothing",
            )));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// Connects to the daemon at `address`.
pub async fn dial(address: &Address, tls: Option<&ClientTls>) -> Result<Channel> {
    let failed = |e: tonic::transport::Error| {
        let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), root_cause);
        Fault::unavailable(format!("connect to {address}: {cause}"))
            .with_source(e)
            .hint("is the daemon running, and is this its address?")
    };
    match address {
        Address::Unix(path) => {
            let path = path.clone();
            let connector = tower::service_fn(move |_: http::Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            tuned(Endpoint::from_static("http://localhost"))
                .connect_with_connector(connector)
                .await
                .map_err(failed)
        }
        Address::Tcp(host) => {
            let scheme = if tls.is_some() { "https" } else { "http" };
            let mut endpoint =
                Endpoint::from_shared(format!("{scheme}://{host}")).map_err(|e| {
                    Fault::invalid(format!("address {address} is not a host and port: {e}"))
                })?;
            if let Some(tls) = tls {
                endpoint = endpoint
                    .tls_config(tls.config().await?)
                    .map_err(|e| Fault::invalid(format!("use the TLS files given: {e}")))?;
            }
            tuned(endpoint).connect().await.map_err(failed)
        }
        Address::Activated => {
            Err(Fault::invalid("fd:// is an address to listen on, not one to connect to"))
        }
    }
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn addresses_parse_or_say_what_is_wrong() {
        for (text, expected) in [
            ("unix:///run/x.sock", Ok(Address::Unix("/run/x.sock".into()))),
            ("tcp://0.0.0.0:1234", Ok(Address::Tcp("0.0.0.0:1234".into()))),
            ("fd://", Ok(Address::Activated)),
            ("/run/x", Err("address /run/x does not contain proto, you meant unix:///run/x ?")),
            ("unx:///x", Err("addr unx:///x not supported")),
            ("unix://", Err("address unix:// has no path")),
        ] {
            let got = text.parse::<Address>().map_err(|e| e.to_string());
            assert_eq!(got, expected.map_err(str::to_owned), "{text}");
        }
    }

    #[tokio::test]
    async fn a_unix_socket_has_its_mode_and_is_not_stolen() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("sub/s.sock");
        let address = Address::Unix(path.clone());
        let options = ListenOptions { mode: 0o600, ..Default::default() };
        let listener = Listener::bind(&address, &options).await.expect("bind").remove(0);
        assert_eq!(std::fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o600);
        assert!(
            Listener::bind(&address, &options)
                .await
                .is_err_and(|e| e.to_string().contains("another process"))
        );
        let mut incoming = Box::pin(listener.incoming());
        let mut client = UnixStream::connect(&path).await.expect("connect");
        client.write_all(b"x").await.expect("write");
        // The probe of the second bind was accepted first.
        let mut got = Vec::new();
        while got.is_empty() {
            let mut server = incoming.next().await.expect("open").expect("accepted");
            let mut byte = [0];
            let n = server.read(&mut byte).await.expect("read");
            got.extend_from_slice(&byte[..n]);
            assert!(server.connect_info().uid.is_some());
        }
        drop(incoming);
    }

    #[tokio::test]
    async fn connections_and_handshakes_of_a_listener_are_limited() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("s.sock");
        let listener = Listener::bind(&Address::Unix(path.clone()), &ListenOptions::default())
            .await
            .expect("bind")
            .remove(0);
        let (sink, mut incoming) = mpsc::channel(BACKLOG);
        shipway_task::spawn("test", accept_some(listener.socket, sink, 2, 1));
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(UnixStream::connect(&path).await.expect("connect"));
        }
        let first = incoming.recv().await.expect("open").expect("accepted");
        let _second = incoming.recv().await.expect("open").expect("accepted");
        // The third waits until one of them goes.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(incoming.try_recv().is_err());
        drop(first);
        assert!(incoming.recv().await.expect("open").is_ok());

        // A peer that never shakes hands holds up the next one, not more, and not for long.
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = tcp.local_addr().expect("an address");
        let tls = crate::tls::tests::pair(dir.path(), "server");
        let tls = Arc::new(ReloadedTls::new(tls).expect("good files"));
        let (sink, _incoming) = mpsc::channel(BACKLOG);
        shipway_task::spawn("test", accept_some(Socket::Tcp(tcp, Some(tls)), sink, 9, 1));
        let silent = TcpStream::connect(address).await.expect("connect");
        let mut garbage = TcpStream::connect(address).await.expect("connect");
        garbage.write_all(&[b'x'; 64]).await.expect("write");
        let mut answer = [0; 64];
        let early =
            tokio::time::timeout(Duration::from_millis(200), garbage.read(&mut answer)).await;
        assert!(early.is_err(), "it was answered while another one shakes hands");
        drop(silent);
        assert!(garbage.read(&mut answer).await.is_ok(), "its turn came");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
        Listener::bind(&Address::Unix(path), &ListenOptions::default()).await.expect("bind again");
    }

    #[tokio::test]
    async fn dialling_nobody_names_the_address() {
        let error = dial(&Address::Unix("/nonexistent/s".into()), None).await.expect_err("nobody");
        assert!(
            error.to_string().starts_with("connect to unix:///nonexistent/s: No such file"),
            "{error}"
        );
    }
}
