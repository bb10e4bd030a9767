//! The process from beginning to end.

use crate::{
    confine::confine,
    control::{Connection, Control, command},
    engine::Engine,
    layer::Layer,
    limits::MAX_READ,
    message::{Command, Event, FdName},
    serve::{self, Kernel},
    socket,
    store::Systemd,
    supervise::{self, HANDED},
    sys,
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fd::OwnedFd,
    fs::{Mode, chmod},
    io::Errno,
    net::{bind, connect, listen},
};
use shipway_fault::{Fault, Result};
use shipway_fusewire::{Reply, SlotError, Slots};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a read waits at most, unless it is set.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Name of the socket among inherited file descriptors.
const SOCKET_NAME: &str = "keeper.sock";
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// What a keeper is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory for what lives until the host restarts; the files of layers are in its `k`.
    pub directory: PathBuf,
    /// Socket for the daemon, unless the service manager passes one named `keeper.sock`.
    pub socket: PathBuf,
    /// How long a read waits for contents at most, before it fails with `EIO`. A third of the
    /// kernel's own limit (`fs.fuse.max_request_timeout`) if that is less: the kernel would break
    /// the whole connection off, and it counts from when a read began, which a keeper that took
    /// over does not know.
    pub deadline: Duration,
}

impl Options {
    /// Everything below `directory`, with the usual deadline.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        let directory = directory.into();
        Self { socket: directory.join(SOCKET_NAME), directory, deadline: DEADLINE }
    }
}

type Held = BTreeMap<FdName, OwnedFd>;

/// Is the keeper: serves until it is asked to end, or the file system is unmounted. To be called
/// once, by a process that has no other threads yet, and to be its end: threads that wait for the
/// kernel end with the process.
///
/// What a predecessor left comes by the service manager (`LISTEN_FDS`) or by the daemon. If neither
/// has anything it mounts anew at once, unless something is mounted already: then a daemon may come
/// that holds that connection, and it is waited for.
pub fn run(options: &Options) -> Result<()> {
    let signals = sys::signals().map_err(|e| Fault::io("block signals", e.into()))?;
    let (listener, mut held) = inherited()?;
    let listener = match listener {
        Some(listener) => listener,
        None => bind_at(&options.socket)?,
    };
    let systemd = std::env::var_os("NOTIFY_SOCKET").and_then(|address| {
        Systemd::connect(&address)
            .inspect_err(|error| tracing::warn!(%error, "failed to notify the service manager"))
            .ok()
    });
    // Ready once it can be connected to: the daemon may be what it waits for.
    if let Some(Err(error)) = systemd.as_ref().map(|s| s.notify("READY=1")) {
        tracing::warn!(%error, "failed to notify the service manager");
    }
    let at = options.directory.join("k");
    let mut connection = None;
    if !held.contains_key(&FdName::Fuse) && serve::is_mounted(&at) {
        match gather(&listener, &signals, &mut held)? {
            Some(begun) => connection = Some(begun),
            None => return Ok(()),
        }
    }
    let taken_over = held.remove(&FdName::Fuse);
    let old = taken_over.is_some();
    let fuse = match taken_over {
        Some(fuse) => fuse,
        None => serve::mount(&at)?,
    };
    let (slots_file, slots) = slots(held.remove(&FdName::Slots).filter(|_| old))?;
    let memory = held.remove(&FdName::Memory);
    let layers = layers(held);
    tracing::info!(at = %at.display(), layers = layers.len(), taken_over = old, "serving");
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| Fault::io("make an event counter", e.into()))?;
    let deadline = clamp(options.deadline, kernel_limit());
    let engine = Arc::new(Engine::new(Kernel::new(fuse, wake), slots, layers, deadline));
    let mut control = Control::new(engine.clone(), slots_file, listener, signals, systemd, at);
    control.memory = memory;
    control.keep_all();
    if old {
        engine.take_over(&mut Reply::with_room_for(MAX_READ), Instant::now());
        engine.outside.resend();
    }
    serve::start(&engine)?;
    confine();
    control.run(connection)
}

/// What the service manager passed: the socket, and what a predecessor had it keep.
fn inherited() -> Result<(Option<OwnedFd>, Held)> {
    let mut listener = None;
    let mut held = Held::new();
    let passed = sys::inherited().map_err(|e| Fault::io("take inherited file descriptors", e))?;
    for (name, fd) in passed {
        match name.parse() {
            Ok(name) => drop(held.insert(name, fd)),
            Err(_) if name == SOCKET_NAME => listener = Some(fd),
            Err(_) => tracing::warn!(name, "ignored an unknown inherited file descriptor"),
        }
    }
    if std::env::var_os(HANDED).is_some() {
        let handed = supervise::handed();
        held.extend(handed.map_err(|e| Fault::io("take what was handed over", e.into()))?);
    }
    Ok((listener, held))
}

/// Waits for a daemon that gives what it holds of a predecessor; `None` if a signal ends it.
fn gather(listener: &OwnedFd, signals: &OwnedFd, held: &mut Held) -> Result<Option<Connection>> {
    let mut connection: Option<Connection> = None;
    loop {
        let socket = connection.as_ref().map(Connection::socket);
        let mut fds =
            vec![PollFd::new(listener, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        fds.extend(socket.as_ref().map(|s| PollFd::new(&**s, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Fault::io("wait for the daemon", error.into())),
        }
        let ready = |n: usize| !fds[n].revents().is_empty();
        let (new, signaled) = (ready(0), ready(1));
        if signaled {
            return Ok(None);
        }
        if new && let Some(mut accepted) = Connection::accept(listener) {
            accepted.say(Event::Hello { serving: false });
            connection = accepted.flush().is_ok().then_some(accepted);
        }
        let Some(from) = &connection else { continue };
        match from.receive() {
            Ok(None) => {}
            Ok(Some(mut received)) => match (command(&received), received.fds.pop()) {
                (Some(Command::Give { name }), Some(fd)) => drop(held.insert(name, fd)),
                (Some(Command::Begin), _) => return Ok(connection),
                _ => {}
            },
            Err(_) => connection = None,
        }
    }
}

/// Shared memory of a predecessor, or new one if there is none or its layout is another.
fn slots(kept: Option<OwnedFd>) -> Result<(OwnedFd, Slots)> {
    if let Some(file) = kept {
        match Slots::open(&file) {
            Ok(slots) => return Ok((file, slots)),
            Err(SlotError::Foreign) => {
                tracing::warn!(
                    "cannot read the requests of the predecessor, waiting for the kernel to send them again"
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Slots::create()?)
}

/// Layers out of their files.
fn layers(mut held: Held) -> Vec<Layer> {
    let mut numbers: Vec<u32> = held.keys().filter_map(|name| name.layer()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut layers = Vec::new();
    for n in numbers {
        let mut part = |name| held.remove(&name);
        let (data, map, meta) =
            (part(FdName::Data(n)), part(FdName::Map(n)), part(FdName::Meta(n)));
        let (Some(data), Some(map), Some(meta)) = (data, map, meta) else {
            tracing::warn!(
                layer = n,
                "layer is incomplete, its reads wait until it is added again"
            );
            continue;
        };
        match Layer::new(n, data, map, meta) {
            Ok(layer) => layers.push(layer),
            Err(error) => tracing::warn!(layer = n, %error, "failed to open layer"),
        }
    }
    layers
}

/// Listens on `path`, for this user only. A socket that no process listens on any more is replaced.
fn bind_at(path: &Path) -> Result<OwnedFd> {
    let failed = |e: std::io::Error| Fault::io(format!("listen on {}", path.display()), e);
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let bound = || {
        let address = socket::address(path)?;
        if path.symlink_metadata().is_ok_and(|m| m.file_type().is_socket()) {
            match connect(socket::new()?, &address) {
                Err(Errno::CONNREFUSED) => rustix::fs::unlink(path)?,
                _ => return Err(Errno::ADDRINUSE),
            }
        }
        let listener = socket::new()?;
        bind(&listener, &address)?;
        chmod(path, Mode::from_raw_mode(0o600))?;
        listen(&listener, BACKLOG)?;
        Ok(listener)
    };
    bound().map_err(|e: Errno| {
        let fault = failed(e.into());
        if e == Errno::ADDRINUSE { fault.hint("another keeper runs; one is enough") } else { fault }
    })
}

/// After how long the kernel breaks the connection off because of one request, if ever.
fn kernel_limit() -> Option<Duration> {
    let seconds = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/sys/fs/fuse/{name}")).ok()?;
        text.trim().parse().ok().filter(|n| *n > 0)
    };
    [seconds("max_request_timeout"), seconds("default_request_timeout")]
        .into_iter()
        .flatten()
        .min()
        .map(Duration::from_secs)
}

fn clamp(deadline: Duration, limit: Option<Duration>) -> Duration {
    limit.map_or(deadline, |limit| deadline.min(limit / 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_well_below_the_kernels_limit() {
        let seconds = Duration::from_secs;
        assert_eq!(clamp(seconds(60), None), seconds(60));
        assert_eq!(clamp(seconds(60), Some(seconds(300))), seconds(60));
        assert_eq!(clamp(seconds(60), Some(seconds(90))), seconds(30));
    }

    #[test]
    fn one_keeper_at_a_time_listens() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("made").join("keeper.sock");
        let first = bind_at(&path).expect("listen");
        assert!(bind_at(&path).expect_err("taken").to_string().contains("keeper.sock"));
        drop(first);
        bind_at(&path).expect("a socket that is left is replaced");
        let other = dir.path().join("file");
        fs::write(&other, "").expect("write");
        assert!(bind_at(&other).is_err(), "what is no socket stays");
    }
}
