//! Sockets, ready and stop.

use crate::{
    config::Config,
    control, cri,
    keyring::Keyring,
    lazy::{Lazy, LazyPort},
    metrics::{self, Address},
    rpc,
    status::{self, Observed},
};
use rustix::fs::Mode;
use shipway_daemon::NotifyState;
use shipway_fault::{Fault, Result};
use shipway_snapstore::{LazyLayers, NoLazyLayers, Options, Store};
use std::{
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;

/// Threads that wait for the disk, or for a registry on behalf of a pull: those need others to
/// finish.
pub const MAX_THREADS: usize = 256;
/// Connections accepted but not yet taken by the server.
const BACKLOG: usize = 16;
/// Pause after an accept error such as "too many open files", so that the loop does not spin.
const PAUSE: Duration = Duration::from_millis(50);
/// How long running calls get to end after a signal.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves until SIGTERM or SIGINT. Nothing here needs the network.
pub async fn run(config: &Config) -> Result<()> {
    // The sockets first: who finds somebody listening may wait, who finds nobody fails.
    let listener = match activated()? {
        Some(listener) => listener,
        None => bind(&config.address)?,
    };
    let told = bind(&config.status_address)?;
    let given = bind(&config.control_address)?;
    // Reads that wait since before this process began may need credentials.
    let keyring = Arc::<Keyring>::default();
    let layers = control::Layers::default();
    let controlled = control::serve(accept(given), keyring.clone(), layers.clone());
    let giving = shipway_task::spawn("answer for control", controlled);
    let pulls = bind(&config.cri.address)?;
    let proxy = cri::Proxy::new(config.cri.containerd.clone(), keyring.clone());
    let passing = shipway_task::spawn("pass CRI on", proxy.serve(accept(pulls)));
    let options = Options {
        sharing: config.sharing,
        mount_options: config.mount_options.clone(),
        xino: config.xino,
        remap_ids: config.remap_ids,
        ..Options::default()
    };
    let (lazy, store) = open(config, options, keyring.clone()).await?;
    if let Some(lazy) = &lazy {
        let _ = layers.set(lazy.clone());
    }
    let worker = store.clone();
    std::thread::Builder::new()
        .name("later".into())
        .spawn(move || worker.work())
        .map_err(|e| Fault::io("start a thread", e))?;
    let observed = Arc::new(Observed {
        store: store.clone(),
        lazy: lazy.clone(),
        keyring,
        config: config.clone(),
    });
    let telling =
        shipway_task::spawn("answer for status", status::serve(accept(told), observed.clone()));
    let measured = measure(config, observed).await?;
    tracing::info!(root = %config.root.display(), address = %config.address.display(), "serving snapshots");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async {
        let _ = stopped.await;
    };
    let mut server = shipway_task::spawn(
        "serve containerd",
        rpc::serve(store.clone(), accept(listener), stopped),
    );
    shipway_daemon::notify(NotifyState::Ready);
    let ended = tokio::select! {
        () = shipway_daemon::stop_requested() => None,
        ended = &mut server => Some(ended),
    };
    tracing::info!("stopping");
    shipway_daemon::notify(NotifyState::Stopping);
    let result = match ended {
        Some(ended) => Err(Fault::internal(format!("the server ended by itself: {ended:?}"))),
        None => {
            let _ = stop.send(());
            // containerd keeps its connection, so the server may not end; its calls have by then.
            let _ = tokio::time::timeout(DRAIN, server).await;
            Ok(())
        }
    };
    telling.abort();
    giving.abort();
    passing.abort();
    measured.into_iter().for_each(|task| task.abort());
    store.close();
    if let Some(lazy) = lazy {
        lazy.close();
    }
    result
}

/// Answers for metrics, if that is wanted.
async fn measure(config: &Config, observed: Arc<Observed>) -> Result<Option<JoinHandle<()>>> {
    const NAME: &str = "answer for metrics";
    Ok(match config.metrics.address()? {
        None => None,
        Some(Address::Unix(path)) => {
            let connections = accept(bind(&path)?);
            Some(shipway_task::spawn(NAME, metrics::serve(connections, observed)))
        }
        Some(Address::Loopback(address)) => {
            let connections = metrics::listen(address).await?;
            Some(shipway_task::spawn(NAME, metrics::serve(connections, observed)))
        }
    })
}

/// Opens the store, with lazy layers if they are wanted.
async fn open(
    config: &Config,
    options: Options,
    keyring: Arc<Keyring>,
) -> Result<(Option<Arc<Lazy>>, Arc<Store>)> {
    let (config, runtime) = (config.clone(), tokio::runtime::Handle::current());
    let work = move || {
        let lazy =
            config.lazy.enabled.then(|| Lazy::start(&config, keyring, runtime)).transpose()?;
        let layers: Arc<dyn LazyLayers> = match &lazy {
            Some(lazy) => Arc::new(LazyPort(lazy.clone())),
            None => Arc::new(NoLazyLayers),
        };
        let store = Arc::new(Store::open(&config.root, options, layers)?);
        Ok((lazy, store))
    };
    // The runtime's only thread goes on meanwhile.
    shipway_task::blocking("open the store", work).await
}

/// The socket that systemd passed, if it passed one.
fn activated() -> Result<Option<UnixListener>> {
    let mut passed = listenfd::ListenFd::from_env();
    if passed.len() == 0 {
        return Ok(None);
    }
    let failed = |e| Fault::io("take the socket that systemd passed", e);
    let Some(listener) = passed.take_unix_listener(0).map_err(failed)? else {
        return Err(Fault::invalid("the socket that systemd passed is no unix socket"));
    };
    listener.set_nonblocking(true).map_err(failed)?;
    UnixListener::from_std(listener).map(Some).map_err(failed)
}

/// Listens on `path`, for root only. A socket that nobody listens on any more is replaced.
fn bind(path: &Path) -> Result<UnixListener> {
    let failed = |e: io::Error| Fault::io(format!("listen on {}", path.display()), e);
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    if path.symlink_metadata().is_ok_and(|m| m.file_type().is_socket()) {
        match std::os::unix::net::UnixStream::connect(path) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?
            }
            _ => {
                return Err(failed(ErrorKind::AddrInUse.into()).hint(
                    "another snapshotter runs; stop it, or give this one sockets of its own",
                ));
            }
        }
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    rustix::fs::chmod(path, Mode::from_raw_mode(0o600)).map_err(|e| failed(e.into()))?;
    Ok(listener)
}

/// The connections of a listener, errors passed over.
fn accept(listener: UnixListener) -> ReceiverStream<UnixStream> {
    let (sink, connections) = mpsc::channel(BACKLOG);
    shipway_task::spawn("accept connections", async move {
        loop {
            let connection = tokio::select! {
                connection = listener.accept() => connection,
                () = sink.closed() => return,
            };
            match connection {
                Ok((connection, _)) => {
                    if sink.send(connection).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}
