//! The one thread that is not reading requests: what the daemon says, deadlines, signals.

use crate::{
    engine::{Dropping, Engine},
    layer::Layer,
    limits::MAX_READ,
    message::{Command, Event, FdName},
    serve::{self, Kernel},
    socket::{self, Received},
    store::{FdStore, Systemd},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, fcntl_dupfd_cloexec, read},
    net::{RecvFlags, SocketFlags, accept_with, sockopt::socket_peercred},
};
use shipway_fault::{Fault, Result};
use shipway_fusewire::Reply;
use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

/// Messages that the daemon has not taken yet, above which it is not listened to.
const QUEUE: usize = 4096;
/// Commands that are done in a row before deadlines are looked at.
const BURST: usize = 256;
/// How long reads in progress get to end before the process does. They are in shared memory: a
/// successor answers what is not.
const LAST_READS: Duration = Duration::from_secs(1);

/// The daemon, as long as it is connected. It is also a store: it holds what this process has, and
/// gives it to a successor.
pub(crate) struct Connection {
    socket: Arc<OwnedFd>,
    /// What it has not taken yet.
    queue: VecDeque<(Event, Option<OwnedFd>)>,
}

impl Connection {
    /// Takes a connection that waits, if it is of this user or root.
    pub(crate) fn accept(listener: &OwnedFd) -> Option<Self> {
        let socket = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                return None;
            }
        };
        let user = socket_peercred(&socket).map(|peer| peer.uid);
        if !user.is_ok_and(|uid| uid.is_root() || uid == rustix::process::geteuid()) {
            tracing::warn!("refused a connection of another user");
            return None;
        }
        Some(Self { socket: Arc::new(socket), queue: VecDeque::new() })
    }

    pub(crate) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    pub(crate) fn say(&mut self, event: Event) {
        self.queue.push_back((event, None));
    }

    /// Sends what it takes.
    pub(crate) fn flush(&mut self) -> Result<(), Errno> {
        while let Some((event, fd)) = self.queue.front() {
            match socket::send(&*self.socket, &event.encode(), fd.as_ref().map(AsFd::as_fd)) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What it said, `None` if nothing is there. An error is the end of the connection.
    pub(crate) fn receive(&self) -> Result<Option<Received>, Errno> {
        match socket::receive(&*self.socket, RecvFlags::DONTWAIT) {
            Ok(Some(received)) => Ok(Some(received)),
            Ok(None) => Err(Errno::PIPE),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl FdStore for Connection {
    fn keep(&mut self, name: FdName, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let fd = fcntl_dupfd_cloexec(fd, 0)?;
        self.queue.push_back((Event::Keep { name }, Some(fd)));
        Ok(())
    }

    fn forget(&mut self, name: FdName) -> Result<(), Errno> {
        self.say(Event::Forget { name });
        Ok(())
    }

    /// What was sent stays in the socket whatever becomes of this end.
    fn settle(&mut self) -> Result<(), Errno> {
        self.flush()
    }
}

/// A command out of a datagram; what is none is said and passed over.
pub(crate) fn command(received: &Received) -> Option<Command> {
    match Command::decode(received.bytes()) {
        Ok(Some(command)) => Some(command),
        Ok(None) => {
            tracing::debug!(kind = received.bytes[1], "ignored an unknown message of the daemon");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "invalid message from the daemon");
            None
        }
    }
}

/// What the control thread has.
pub(crate) struct Control {
    pub(crate) engine: Arc<Engine<Kernel>>,
    pub(crate) slots: OwnedFd,
    pub(crate) listener: OwnedFd,
    pub(crate) signals: OwnedFd,
    pub(crate) systemd: Option<Systemd>,
    /// Where it is mounted.
    pub(crate) at: PathBuf,
    /// What the daemon wants to have back; it is not looked into here.
    pub(crate) memory: Option<OwnedFd>,
    connection: Option<Connection>,
    drops: Vec<Dropping>,
    reply: Reply,
    /// Not everything that waits could be reported to the daemon.
    unreported: bool,
}

/// Whether there is more to do.
#[derive(PartialEq)]
enum Then {
    GoOn,
    End,
}

impl Control {
    pub(crate) fn new(
        engine: Arc<Engine<Kernel>>,
        slots: OwnedFd,
        listener: OwnedFd,
        signals: OwnedFd,
        systemd: Option<Systemd>,
        at: PathBuf,
    ) -> Self {
        Self {
            engine,
            slots,
            listener,
            signals,
            systemd,
            at,
            memory: None,
            connection: None,
            drops: Vec::new(),
            reply: Reply::with_room_for(MAX_READ),
            unreported: false,
        }
    }

    /// Has the service manager hold the connection and everything that belongs to it.
    pub(crate) fn keep_all(&mut self) {
        let Some(systemd) = &mut self.systemd else { return };
        keep_everything(systemd, &self.engine, &self.slots, self.memory.as_ref());
    }

    /// Until the end: the file system is gone, or a shutdown was requested.
    pub(crate) fn run(&mut self, connection: Option<Connection>) -> Result<()> {
        if let Some(mut connection) = connection {
            connection.say(Event::Started);
            self.connected(connection);
        }
        loop {
            let new = self.wait()?;
            if self.engine.outside.has_ended() {
                tracing::info!("file system unmounted");
                return Ok(());
            }
            self.engine.expire(Instant::now(), &mut self.reply);
            if self.listen() == Then::End {
                self.shut_down();
                return Ok(());
            }
            // After what the daemon said: its end may be the last of that.
            if self.signaled() {
                self.leave();
                return Ok(());
            }
            // The last words of one daemon are heard before the next is.
            if new && let Some(connection) = Connection::accept(&self.listener) {
                self.connected(connection);
            }
            self.finish_drops();
            self.talk();
        }
    }

    /// Waits for anything to happen; whether a daemon wants to connect.
    fn wait(&mut self) -> Result<bool> {
        let socket = self.connection.as_ref().map(|c| c.socket.clone());
        let mut fds = vec![
            PollFd::new(&self.listener, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::from_borrowed_fd(self.engine.outside.waker(), PollFlags::IN),
        ];
        if let (Some(socket), Some(connection)) = (&socket, &self.connection) {
            let mut events = PollFlags::empty();
            if connection.queue.len() < QUEUE {
                events |= PollFlags::IN;
            }
            if self.unreported || !connection.queue.is_empty() {
                events |= PollFlags::OUT;
            }
            fds.push(PollFd::new(&**socket, events));
        }
        let until = self.engine.next_deadline();
        let timeout = until.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            // Rounded up: waking too early would only mean another wait.
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) + 1 }
        });
        match poll(&mut fds, timeout.map(normal).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Fault::io("wait for the daemon", error.into())),
        }
        let ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
        let (new, woken) = (ready(0), ready(2));
        if woken {
            let _ = read(self.engine.outside.waker(), &mut [0; 8]);
        }
        Ok(new)
    }

    fn signaled(&self) -> bool {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        read(&self.signals, &mut info).is_ok_and(|n| n > 0)
    }

    /// There is a daemon. One that was there before is not listened to any more.
    fn connected(&mut self, mut connection: Connection) {
        if connection.queue.is_empty() {
            connection.say(Event::Hello { serving: true });
        }
        keep_everything(&mut connection, &self.engine, &self.slots, self.memory.as_ref());
        // The first word has to be the first.
        if connection.flush().is_err() {
            return;
        }
        tracing::info!("daemon connected");
        self.drops.clear();
        self.engine.all_dropped();
        self.engine.outside.set_daemon(Some(connection.socket.clone()));
        self.engine.forget_reported();
        self.connection = Some(connection);
        self.unreported = true;
    }

    fn disconnected(&mut self) {
        tracing::info!("daemon disconnected, reads of missing blocks wait for the next one");
        self.connection = None;
        self.drops.clear();
        self.engine.all_dropped();
        self.engine.outside.set_daemon(None);
        self.engine.forget_reported();
        self.unreported = false;
    }

    /// Does what the daemon has said.
    fn listen(&mut self) -> Then {
        for _ in 0..BURST {
            let Some(connection) = self.connection.as_ref() else { break };
            if connection.queue.len() >= QUEUE {
                break;
            }
            match connection.receive() {
                Ok(Some(received)) => {
                    if let Some(command) = command(&received)
                        && self.obey(command, received.fds) == Then::End
                    {
                        return Then::End;
                    }
                }
                Ok(None) => break,
                Err(_) => self.disconnected(),
            }
        }
        Then::GoOn
    }

    fn say(&mut self, event: Event) {
        if let Some(connection) = &mut self.connection {
            connection.say(event);
        }
    }

    fn obey(&mut self, command: Command, fds: Vec<OwnedFd>) -> Then {
        let (engine, reply) = (&self.engine, &mut self.reply);
        match command {
            Command::Add { n, data_blocks, meta_bytes } => {
                let answer = match self.add(n, data_blocks, meta_bytes, fds) {
                    Ok(()) => Event::Added { n },
                    Err(error) => {
                        tracing::warn!(layer = n, %error, "refused a layer");
                        Event::Refused { n, errno: error.raw_os_error() }
                    }
                };
                self.say(answer);
            }
            Command::Have { n, blocks } => engine.have(n, &blocks, reply),
            Command::Fail { n, blocks, errno } => engine.fail(n, &blocks, errno, reply),
            Command::Drop { n, blocks } => {
                match engine.drop_blocks(n, blocks.clone()) {
                    Some(dropping) => self.drops.push(dropping),
                    None => self.say(Event::NotDropped { n, blocks }),
                }
                self.unreported = true;
            }
            Command::Remove { n } => {
                if let Some(layer) = engine.remove(n, reply) {
                    for (name, _) in layer.files() {
                        self.in_stores(|store| store.forget(name));
                    }
                    self.in_stores(|store| store.settle());
                }
                self.say(Event::Removed { n });
            }
            Command::List => {
                for layer in engine.layers() {
                    self.say(Event::Layer {
                        n: layer.number(),
                        data_blocks: layer.data_blocks(),
                        meta_bytes: layer.meta_bytes(),
                    });
                }
                self.say(Event::ListEnd);
            }
            Command::Give { name: FdName::Memory } => {
                if let Some(memory) = fds.into_iter().next() {
                    self.in_stores(|store| store.keep(FdName::Memory, memory.as_fd()));
                    self.in_stores(|store| store.settle());
                    self.memory = Some(memory);
                }
            }
            // It serves what it has.
            Command::Give { .. } => {}
            Command::Begin => self.say(Event::Started),
            Command::Shutdown => return Then::End,
        }
        Then::GoOn
    }

    fn add(
        &mut self,
        n: u32,
        data_blocks: u64,
        meta_bytes: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let [data, map, meta] = <[OwnedFd; 3]>::try_from(fds).map_err(|_| Errno::INVAL)?;
        let layer = Layer::new(n, data, map, meta)?;
        if (layer.data_blocks(), layer.meta_bytes()) != (data_blocks, meta_bytes) {
            return Err(Errno::INVAL);
        }
        if self.engine.add(layer, &mut self.reply)?
            && let Some(layer) = self.engine.layer(n)
        {
            for (name, fd) in layer.files() {
                self.in_stores(|store| store.keep(name, fd));
            }
            self.in_stores(|store| store.settle());
        }
        // Reads that waited for this layer were not reported to the daemon.
        self.unreported = true;
        Ok(())
    }

    /// Does something in each store that there is. One that fails costs the next restart, not this
    /// process.
    fn in_stores(&mut self, mut what: impl FnMut(&mut dyn FdStore) -> Result<(), Errno>) {
        let systemd = self.systemd.as_mut().map(|s| s as &mut dyn FdStore);
        let daemon = self.connection.as_mut().map(|c| c as &mut dyn FdStore);
        for store in systemd.into_iter().chain(daemon) {
            if let Err(error) = what(store) {
                tracing::warn!(%error, "failed to store a file descriptor, it may not outlive this process");
            }
        }
    }

    fn finish_drops(&mut self) {
        if self.drops.is_empty() {
            return;
        }
        for drop in std::mem::take(&mut self.drops) {
            if self.engine.is_dropped(&drop) {
                self.say(Event::Dropped { n: drop.n, blocks: drop.blocks });
            } else {
                self.drops.push(drop);
            }
        }
        if self.drops.is_empty() {
            self.engine.all_dropped();
        }
    }

    /// Sends the daemon as much as it takes.
    fn talk(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        if connection.flush().is_err() {
            return self.disconnected();
        }
        self.unreported = !self.engine.report_all();
    }

    /// A signal: a successor goes on, or none is needed.
    fn leave(&mut self) {
        let survives = self.systemd.is_some() || self.connection.is_some();
        if !survives && self.engine.layers().is_empty() {
            return self.shut_down();
        }
        if !survives {
            tracing::warn!(
                "no process holds the file descriptors, layers cannot be read after this"
            );
        }
        let kernel = &self.engine.outside;
        kernel.stop();
        let until = Instant::now() + LAST_READS;
        let _ = self.engine.watch_readers();
        while !self.engine.is_quiet() && Instant::now() < until {
            let mut fds = [PollFd::from_borrowed_fd(kernel.waker(), PollFlags::IN)];
            let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }));
            let _ = read(kernel.waker(), &mut [0; 8]);
        }
        if let Some(connection) = &mut self.connection {
            let _ = connection.flush();
        }
        tracing::info!("stopped, leaving the mount to a successor");
    }

    /// The end of the file system.
    fn shut_down(&mut self) {
        serve::unmount_at(&self.at);
        let layers = self.engine.layers();
        let files = layers.iter().flat_map(|layer| layer.files().map(|(name, _)| name));
        for name in [FdName::Fuse, FdName::Slots, FdName::Memory].into_iter().chain(files) {
            self.in_stores(|store| store.forget(name));
        }
        self.in_stores(|store| store.settle());
        tracing::info!("unmounted");
    }
}

fn normal(time: Timespec) -> Timespec {
    match time.tv_nsec {
        1_000_000_000.. => Timespec { tv_sec: time.tv_sec + 1, tv_nsec: 0 },
        _ => time,
    }
}

fn keep_everything(
    store: &mut dyn FdStore,
    engine: &Engine<Kernel>,
    slots: &OwnedFd,
    memory: Option<&OwnedFd>,
) {
    let layers = engine.layers();
    let files = layers.iter().flat_map(|layer| layer.files());
    let session = [(FdName::Fuse, engine.outside.fuse()), (FdName::Slots, slots.as_fd())];
    let memory = memory.map(|memory| (FdName::Memory, memory.as_fd()));
    for (name, fd) in session.into_iter().chain(memory).chain(files) {
        if let Err(error) = store.keep(name, fd) {
            tracing::warn!(%name, %error, "failed to store a file descriptor, it may not outlive this process");
        }
    }
    if let Err(error) = store.settle() {
        tracing::warn!(%error, "failed to store file descriptors, they may not outlive this process");
    }
}
