//! Where no service manager does it: starts the keeper, holds what it has held, and starts it again
//! with that when it is killed. A process that does nothing else.

use crate::{
    message::{Command as Message, FdName},
    socket,
};
use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, OwnedFd},
    fs::{FlockOperation, flock},
    io::{Errno, IoSliceMut},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags,
        SocketAddrUnix, SocketFlags, SocketType, bind, recvmsg, socket_with, socketpair,
    },
    process::{Pid, PidfdFlags, pidfd_open},
};
use shipway_fault::{Fault, Result};
use std::{
    collections::BTreeMap,
    fs,
    mem::MaybeUninit,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

/// Set for a keeper that gets what its predecessor had through its standard input.
pub(crate) const HANDED: &str = "SHIPWAY_KEEPER_HANDED";
/// Longest state that is sent by `sd_notify(3)`.
const MAX_STATE: usize = 4096;
/// A keeper that ends sooner has not worked; another one is started after as long.
const TOO_SOON: Duration = Duration::from_secs(1);

type Held = BTreeMap<FdName, OwnedFd>;

/// Starts what `command` makes, again and again until it ends by itself with success, and holds its
/// file descriptors meanwhile. If that is done in this directory already it returns at once. File
/// descriptors are passed over the socket `store.sock` in `directory`, which only root may enter.
pub fn supervise(command: impl Fn() -> Command, directory: &Path) -> Result<()> {
    let failed = |e: Errno| Fault::io("supervise the keeper", e.into());
    let path = directory.join("store.sock");
    fs::create_dir_all(directory).map_err(|e| Fault::io("make the keeper's directory", e))?;
    let lock = fs::File::create(directory.join("supervisor.lock"))
        .map_err(|e| Fault::io("make the supervisor's lock", e))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        // Another one is just starting a keeper.
        Err(Errno::WOULDBLOCK) => return Ok(()),
        locked => locked.map_err(failed)?,
    }
    let _ = fs::remove_file(&path);
    let store = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .and_then(|store| bind(&store, &SocketAddrUnix::new(&path)?).map(|()| store))
        .map_err(failed)?;
    let mut held = Held::new();
    loop {
        let started = Instant::now();
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        let mut command = command();
        command.env("NOTIFY_SOCKET", &path).env(HANDED, "1").stdin(theirs);
        let mut child = command.spawn().map_err(|e| Fault::io("start the keeper", e))?;
        // What holds the other end, so that only the child does.
        drop(command);
        if let Err(error) = hand(&ours, &held) {
            // It is dead, or does not take it: then it begins with nothing.
            tracing::error!(%error, "failed to pass the last keeper's file descriptors on, starting without them");
        }
        drop(ours);
        receive_until_end(&store, &mut child, &mut held).map_err(failed)?;
        let status = child.wait().map_err(|e| Fault::io("wait for the keeper", e))?;
        if status.success() {
            let _ = fs::remove_file(&path);
            return Ok(());
        }
        tracing::warn!(%status, held = held.len(), "keeper exited, restarting it");
        if started.elapsed() < TOO_SOON {
            // Nothing wakes it; earlier would do no harm.
            std::thread::park_timeout(TOO_SOON);
        }
    }
}

/// Sends everything that is held.
fn hand(to: &OwnedFd, held: &Held) -> Result<(), Errno> {
    for (name, fd) in held {
        let message = Message::Give { name: *name }.encode();
        socket::send_with(to, &message, &[fd.as_fd()], SendFlags::empty())?;
    }
    socket::send_with(to, &Message::Begin.encode(), &[], SendFlags::empty())
}

/// Takes what was handed over by standard input.
pub(crate) fn handed() -> Result<Held, Errno> {
    let mut held = Held::new();
    loop {
        let Some(received) = socket::receive(std::io::stdin(), RecvFlags::empty())? else {
            return Ok(held);
        };
        match Message::decode(received.bytes()) {
            Ok(Some(Message::Give { name })) => {
                if let Some(fd) = received.fds.into_iter().next() {
                    held.insert(name, fd);
                }
            }
            Ok(Some(Message::Begin)) => return Ok(held),
            _ => {}
        }
    }
}

/// Holds what the child sends until it has ended and everything that it sent was read.
fn receive_until_end(store: &OwnedFd, child: &mut Child, held: &mut Held) -> Result<(), Errno> {
    let pid = Pid::from_child(child);
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let (sent, over) = {
            let mut fds = [PollFd::new(store, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                polled => polled?,
            };
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        if sent {
            receive(store, held)?;
        } else if over {
            return Ok(());
        }
    }
}

/// One state of `sd_notify(3)`: of what systemd understands, the store of file descriptors.
fn receive(store: &OwnedFd, held: &mut Held) -> Result<(), Errno> {
    let mut bytes = [0; MAX_STATE];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let length = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        recvmsg(store, &mut slices, &mut beside, RecvFlags::CMSG_CLOEXEC)?.bytes
    };
    let mut fds = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let text = String::from_utf8_lossy(&bytes[..length.min(MAX_STATE)]).into_owned();
    let is_set = |line: &str| text.lines().any(|l| l == line);
    let name = text.lines().find_map(|l| l.strip_prefix("FDNAME=")).and_then(|n| n.parse().ok());
    // A barrier is kept by closing what came with it.
    match (name, fds.into_iter().next()) {
        (Some(name), Some(fd)) if is_set("FDSTORE=1") => drop(held.insert(name, fd)),
        (Some(name), _) if is_set("FDSTOREREMOVE=1") => drop(held.remove(&name)),
        _ => {}
    }
    Ok(())
}
