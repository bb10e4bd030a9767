//! Owns the network of a process that goes out through a proxy only (row `exec.proxynet`): the
//! proxy listens on the loopback of a namespace that has nothing else, and connects from where the
//! process would be without it.

use super::netns::{self, NetNs};
use async_trait::async_trait;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use shipway_executor::{Egress, Proxied, proxy_environment};
use shipway_fault::{Fault, Result};
use shipway_task::{blocking, spawn};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
};

/// Where a proxy's connections go out.
#[derive(Debug)]
pub(super) enum Upstream {
    /// As the host's own.
    Host,
    /// From a namespace.
    Namespace(NetNs),
    /// The configuration gives steps no network.
    NoEgress,
}

/// A proxy at work.
#[derive(Debug)]
pub(super) struct Serving {
    address: SocketAddr,
    task: JoinHandle<()>,
    egress: Option<NetNs>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens on the loopback of `netns`.
pub(super) async fn listen(netns: &NetNs) -> Result<std::net::TcpListener> {
    let path = netns.path().to_owned();
    let listen = move || {
        netns::inside(&path, || {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
    };
    let listen = move || listen().map_err(|e| Fault::io("listen in a step's network namespace", e));
    blocking("listen for a step", listen).await
}

impl Serving {
    pub(super) fn start(
        proxy: &Proxied,
        listener: std::net::TcpListener,
        egress: Upstream,
    ) -> Result<Self> {
        let failed = |e| Fault::io("listen in a step's network namespace", e);
        let address = listener.local_addr().map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let (way, egress): (Arc<dyn Egress>, _) = match egress {
            Upstream::Host => (Arc::new(FromHost), None),
            Upstream::NoEgress => (Arc::new(NoEgress), None),
            Upstream::Namespace(netns) => {
                (Arc::new(FromNamespace(netns.path().to_owned())), Some(netns))
            }
        };
        let proxy = proxy.0.clone();
        let task = spawn("serve a step's proxy", async move { proxy.serve(listener, way).await });
        Ok(Self { address, task, egress })
    }

    /// What the process has to know.
    pub(super) fn variables(&self) -> Vec<String> {
        proxy_environment(self.address)
    }

    /// Ends the proxy and gives back where it went out.
    pub(super) async fn stop(mut self) -> Option<NetNs> {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.egress.take()
    }
}

struct FromHost;

#[async_trait]
impl Egress for FromHost {
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(to).await
    }
}

struct FromNamespace(PathBuf);

/// A socket belongs to the namespace it was made in, wherever it is used.
fn socket_in(netns: &Path, v4: bool) -> io::Result<TcpSocket> {
    let family = if v4 { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = netns::inside(netns, move || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
    })?;
    Ok(TcpSocket::from_std_stream(fd.into()))
}

#[async_trait]
impl Egress for FromNamespace {
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let netns = self.0.clone();
        let open = move || Ok(socket_in(&netns, to.is_ipv4()));
        let socket = blocking("open a socket", open).await.map_err(io::Error::other)??;
        socket.connect(to).await
    }
}

struct NoEgress;

#[async_trait]
impl Egress for NoEgress {
    async fn connect(&self, _: SocketAddr) -> io::Result<TcpStream> {
        Err(io::Error::new(
            io::ErrorKind::NetworkUnreachable,
            "steps have no network in this daemon's configuration",
        ))
    }
}
