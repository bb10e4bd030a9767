//! The daemon's side.
//!
//! Calls block, and a thread of the connection's own receives: it answers calls and passes
//! [`News`] on to a function of the caller's. So it serves a daemon with an async runtime and one
//! without: the former calls from threads that may block, and has the function send into a channel.
//!
//! A connection that has ended stays so, and everything says [`ClientError::Gone`]. To connect
//! again is the caller's business, with the same [`Holder`]: then a keeper that has lost everything
//! gets back what its predecessor had given into it.

use crate::{
    message::{Command, Event, FdName},
    socket,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, connect, shutdown},
};
use shipway_fault::Fault;
use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
};

/// Why a call did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// There is no keeper, or this connection to it has ended.
    #[error("the keeper is gone")]
    Gone,
    /// The keeper does not want the layer, or does not know it (`ENOENT`).
    #[error("the keeper refuses the layer: {0}")]
    Refused(Errno),
    /// A system call failed.
    #[error("the keeper cannot be reached: {0}")]
    Io(Errno),
}

impl From<ClientError> for Fault {
    #[track_caller]
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Gone => Fault::unavailable(error.to_string()),
            ClientError::Refused(_) | ClientError::Io(_) => Fault::internal(error.to_string()),
        }
    }
}

/// What the keeper says without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A read waits for these blocks. A new connection hears of everything that waits.
    Miss {
        /// The layer.
        n: u32,
        /// From the first that is missing to the last; some between may be there.
        blocks: Range<u64>,
    },
    /// A piece of a layer was read for the first time. May get lost.
    Touched {
        /// The layer.
        n: u32,
        /// The first block of it that was read.
        block: u64,
    },
    /// The connection has ended; the last word on it.
    Gone,
}

/// A layer that the keeper serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// The layer.
    pub n: u32,
    /// Blocks of the data file.
    pub data_blocks: u64,
    /// Bytes of the metadata.
    pub meta_bytes: u64,
}

/// The files of a layer. Their sizes say how large it is: a data file of whole blocks of 4 KiB, a
/// map with a bit for each (open for writing), and metadata as the `erofs` crate writes them, or an
/// empty file if the layer has no flat image and no tree.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// Contents.
    pub data: BorrowedFd<'a>,
    /// Map of good blocks.
    pub map: BorrowedFd<'a>,
    /// Metadata.
    pub meta: BorrowedFd<'a>,
}

/// What is held for a keeper's successor. To be kept over connections.
#[derive(Clone, Debug, Default)]
pub struct Holder(Arc<Mutex<BTreeMap<FdName, OwnedFd>>>);

impl Holder {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<FdName, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds nothing any more.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// What an earlier daemon had the keeper remember ([`Keeper::remember`]). Complete when
    /// [`Keeper::connect`] has returned or a moment later.
    pub fn memory(&self) -> Option<File> {
        self.lock().get(&FdName::Memory).and_then(|fd| fd.try_clone().ok()).map(File::from)
    }

    /// Names of what is held.
    pub fn names(&self) -> Vec<FdName> {
        self.lock().keys().copied().collect()
    }
}

/// An answer that is waited for.
#[derive(Debug, PartialEq)]
enum Awaited {
    Added(u32),
    Dropped(u32, Range<u64>),
    Removed(u32),
    List,
}

#[derive(Default)]
struct Calls {
    gone: bool,
    waiting: Vec<(Awaited, Sender<Event>)>,
}

struct Shared {
    socket: OwnedFd,
    calls: Mutex<Calls>,
}

/// A connection to the keeper. It ends when it is dropped.
pub struct Keeper {
    shared: Arc<Shared>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The thread that receives sees the end.
        let _ = shutdown(&self.shared.socket, Shutdown::Both);
    }
}

fn gone(error: Errno) -> ClientError {
    match error {
        Errno::PIPE | Errno::CONNRESET | Errno::CONNREFUSED | Errno::NOENT | Errno::NOTCONN => {
            ClientError::Gone
        }
        other => ClientError::Io(other),
    }
}

impl Keeper {
    /// Connects to the keeper at `path`, and gives it what is in `held` if it has nothing. Returns
    /// when it serves. `news` is called on the connection's own thread and must not wait for calls
    /// to this connection.
    pub fn connect(
        path: &Path,
        held: &Holder,
        mut news: impl FnMut(News) + Send + 'static,
    ) -> Result<Self, ClientError> {
        let address = socket::address(path).map_err(ClientError::Io)?;
        let socket = socket::new().map_err(ClientError::Io)?;
        connect(&socket, &address).map_err(gone)?;
        let shared = Arc::new(Shared { socket, calls: Mutex::default() });
        let mut serving = false;
        while !serving {
            match shared.receive(held)? {
                Some(Event::Hello { serving: true }) => {
                    // It says anew what is to be held.
                    held.lock().clear();
                    serving = true;
                }
                Some(Event::Hello { serving: false }) => {
                    for (name, fd) in &*held.lock() {
                        shared.send(&Command::Give { name: *name }, &[fd.as_fd()])?;
                    }
                    shared.send(&Command::Begin, &[])?;
                }
                Some(Event::Started) => serving = true,
                Some(event) => shared.dispatch(event, &mut news),
                None => {}
            }
        }
        let (receiver, held) = (shared.clone(), held.clone());
        std::thread::Builder::new()
            .name("keeper".into())
            .spawn(move || {
                loop {
                    match receiver.receive(&held) {
                        Ok(Some(event)) => receiver.dispatch(event, &mut news),
                        Ok(None) => {}
                        Err(_) => break,
                    }
                }
                let mut calls = receiver.calls();
                calls.gone = true;
                // Callers that wait get no answer.
                calls.waiting.clear();
                drop(calls);
                news(News::Gone);
            })
            .map_err(|e| ClientError::Io(Errno::from_io_error(&e).unwrap_or(Errno::AGAIN)))?;
        Ok(Self { shared })
    }

    /// Adds a layer. When it returns the files of the layer can be opened. A layer that is there
    /// already, of the same files, is added once more without effect.
    pub fn add(&self, n: u32, files: Files<'_>) -> Result<(), ClientError> {
        let size = |fd: BorrowedFd<'_>| {
            rustix::fs::fstat(fd).map(|stat| stat.st_size as u64).map_err(ClientError::Io)
        };
        let command = Command::Add {
            n,
            data_blocks: size(files.data)? / crate::layer::BLOCK,
            meta_bytes: size(files.meta)?,
        };
        let fds = [files.data, files.map, files.meta];
        match self.call(Awaited::Added(n), &command, &fds)?.recv() {
            Ok(Event::Refused { errno, .. }) => {
                Err(ClientError::Refused(crate::message::errno(errno)))
            }
            Ok(_) => Ok(()),
            Err(_) => Err(ClientError::Gone),
        }
    }

    /// Blocks were written and are right. Not answered: what the keeper had not heard of when the
    /// connection ended is not in the map, and is to be said again to the next.
    pub fn have(&self, n: u32, blocks: Range<u64>) -> Result<(), ClientError> {
        self.shared.send(&Command::Have { n, blocks }, &[])
    }

    /// Blocks cannot be had now. What waits for them fails with `error`; the next read asks again.
    pub fn fail(&self, n: u32, blocks: Range<u64>, error: Errno) -> Result<(), ClientError> {
        self.shared.send(&Command::Fail { n, blocks, errno: error.raw_os_error() }, &[])
    }

    /// Blocks are no longer valid. When it returns no one reads them, so they can be taken out of
    /// the data file. Refused for a layer that the keeper does not know.
    pub fn drop_blocks(&self, n: u32, blocks: Range<u64>) -> Result<(), ClientError> {
        let awaited = Awaited::Dropped(n, blocks.clone());
        match self.call(awaited, &Command::Drop { n, blocks }, &[])?.recv() {
            Ok(Event::Dropped { .. }) => Ok(()),
            Ok(_) => Err(ClientError::Refused(Errno::NOENT)),
            Err(_) => Err(ClientError::Gone),
        }
    }

    /// Removes a layer, which nothing uses any more.
    pub fn remove(&self, n: u32) -> Result<(), ClientError> {
        let answer = self.call(Awaited::Removed(n), &Command::Remove { n }, &[])?.recv();
        answer.map(|_| ()).map_err(|_| ClientError::Gone)
    }

    /// The layers that it serves, by number.
    pub fn list(&self) -> Result<Vec<Served>, ClientError> {
        let answers = self.call(Awaited::List, &Command::List, &[])?;
        let mut layers = Vec::new();
        loop {
            match answers.recv() {
                Ok(Event::Layer { n, data_blocks, meta_bytes }) => {
                    layers.push(Served { n, data_blocks, meta_bytes });
                }
                Ok(_) => return Ok(layers),
                Err(_) => return Err(ClientError::Gone),
            }
        }
    }

    /// Has it hold a file, such as one in memory, for the next client with a new [`Holder`]. It
    /// takes the place of what was remembered before.
    pub fn remember(&self, memory: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.shared.send(&Command::Give { name: FdName::Memory }, &[memory])
    }

    /// Has it unmount and end for good. The connection ends as well.
    pub fn shut_down(&self) -> Result<(), ClientError> {
        self.shared.send(&Command::Shutdown, &[])
    }

    fn call(
        &self,
        awaited: Awaited,
        command: &Command,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Receiver<Event>, ClientError> {
        let (sender, answers) = channel();
        let mut calls = self.shared.calls();
        if calls.gone {
            return Err(ClientError::Gone);
        }
        // Answers come in the order of commands, so the lock is held over both.
        calls.waiting.push((awaited, sender));
        if let Err(error) = self.shared.send(command, fds) {
            calls.waiting.pop();
            return Err(error);
        }
        Ok(answers)
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        socket::send_with(&self.socket, &command.encode(), fds, SendFlags::empty()).map_err(gone)
    }

    /// The next event; `None` for what is not known. What is to be held is held.
    fn receive(&self, held: &Holder) -> Result<Option<Event>, ClientError> {
        let received = loop {
            match socket::receive(&self.socket, RecvFlags::empty()) {
                Ok(Some(received)) => break received,
                Ok(None) => return Err(ClientError::Gone),
                Err(Errno::INTR) => {}
                Err(error) => return Err(gone(error)),
            }
        };
        let event = Event::decode(received.bytes()).unwrap_or_else(|error| {
            tracing::warn!(%error, "invalid message from the keeper");
            None
        });
        match (&event, received.fds.into_iter().next()) {
            (Some(Event::Keep { name }), Some(fd)) => drop(held.lock().insert(*name, fd)),
            (Some(Event::Forget { name }), _) => drop(held.lock().remove(name)),
            _ => return Ok(event),
        }
        Ok(None)
    }

    fn dispatch(&self, event: Event, news: &mut impl FnMut(News)) {
        let awaited = match &event {
            Event::Miss { n, blocks } => return news(News::Miss { n: *n, blocks: blocks.clone() }),
            Event::Touched { n, block } => return news(News::Touched { n: *n, block: *block }),
            Event::Added { n } | Event::Refused { n, .. } => Awaited::Added(*n),
            Event::Dropped { n, blocks } | Event::NotDropped { n, blocks } => {
                Awaited::Dropped(*n, blocks.clone())
            }
            Event::Removed { n } => Awaited::Removed(*n),
            Event::Layer { .. } | Event::ListEnd => Awaited::List,
            Event::Hello { .. } | Event::Started | Event::Keep { .. } | Event::Forget { .. } => {
                return;
            }
        };
        let mut calls = self.calls();
        let Some(place) = calls.waiting.iter().position(|(waits, _)| *waits == awaited) else {
            return;
        };
        // The caller may not want the answer any more.
        if matches!(event, Event::Layer { .. }) {
            let _ = calls.waiting[place].1.send(event);
        } else {
            let _ = calls.waiting.remove(place).1.send(event);
        }
    }
}
