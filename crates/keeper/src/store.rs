//! Where file descriptors are kept for a successor.

use crate::message::FdName;
use crate::socket;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{
        AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    },
    pipe::{PipeFlags, pipe_with},
};
use std::{ffi::OsStr, fmt::Write as _, os::unix::ffi::OsStrExt as _};

/// How long the service manager may take to read what it was sent.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// A place that holds file descriptors, by name, while no keeper runs.
pub(crate) trait FdStore {
    /// Holds this one. What the name meant before is forgotten.
    fn keep(&mut self, name: FdName, fd: BorrowedFd<'_>) -> Result<(), Errno>;
    /// Holds it no longer.
    fn forget(&mut self, name: FdName) -> Result<(), Errno>;
    /// Returns when what was kept is kept even if this process ends now.
    fn settle(&mut self) -> Result<(), Errno>;
}

/// The service manager's store, by the protocol of `sd_notify(3)`. What it holds comes back as
/// named file descriptors of the next process (`sd_listen_fds_with_names(3)`).
pub(crate) struct Systemd {
    socket: OwnedFd,
}

impl Systemd {
    /// The service manager at `address`, which is the value of `NOTIFY_SOCKET`: a path, or a name
    /// with `@` in front.
    pub(crate) fn connect(address: &OsStr) -> Result<Self, Errno> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            path => SocketAddrUnix::new(path)?,
        };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &address)?;
        Ok(Self { socket })
    }

    /// Reports a state to it, such as `READY=1`.
    pub(crate) fn notify(&self, state: &str) -> Result<(), Errno> {
        socket::send_with(&self.socket, state.as_bytes(), &[], SendFlags::empty())
    }
}

impl FdStore for Systemd {
    fn keep(&mut self, name: FdName, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // It takes a second one of the same name without a word, so the first has to go. It is
        // asked not to watch the file descriptor: an error on it is no reason to let go of it.
        self.forget(name)?;
        let mut state = String::new();
        let _ = write!(state, "FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        socket::send_with(&self.socket, state.as_bytes(), &[fd], SendFlags::empty())
    }

    fn forget(&mut self, name: FdName) -> Result<(), Errno> {
        self.notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"))
    }

    /// It closes the other end of a pipe when it has come to it.
    fn settle(&mut self) -> Result<(), Errno> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        socket::send_with(&self.socket, b"BARRIER=1", &[write.as_fd()], SendFlags::empty())?;
        drop(write);
        match poll(&mut [PollFd::new(&read, PollFlags::empty())], Some(&PATIENCE))? {
            0 => Err(Errno::TIMEDOUT),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::FDS;
    use rustix::{
        cmsg_space,
        io::{IoSliceMut, pread, pwrite},
        net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, bind, recvmsg},
    };
    use std::mem::MaybeUninit;

    fn received(manager: &OwnedFd) -> (String, Vec<OwnedFd>) {
        let mut bytes = [0; 256];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let length = recvmsg(manager, &mut [IoSliceMut::new(&mut bytes)], &mut beside, flags)
            .expect("a notification")
            .bytes;
        let fds = beside
            .drain()
            .filter_map(|m| match m {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds.collect::<Vec<_>>()),
                _ => None,
            })
            .flatten()
            .collect();
        (String::from_utf8(bytes[..length].to_vec()).expect("text"), fds)
    }

    #[test]
    fn the_service_manager_is_told_in_its_words() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("notify");
        let manager =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .expect("socket");
        bind(&manager, &SocketAddrUnix::new(&path).expect("address")).expect("bind");
        let mut store = Systemd::connect(path.as_os_str()).expect("connect");
        let file =
            rustix::fs::memfd_create("kept", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        store.keep(FdName::Map(7), file.as_fd()).expect("keep");
        assert_eq!(received(&manager).0, "FDSTOREREMOVE=1\nFDNAME=l7.map");
        let (state, fds) = received(&manager);
        assert_eq!(state, "FDSTORE=1\nFDNAME=l7.map\nFDPOLL=0");
        assert_eq!(pwrite(&fds[0], b"x", 5), Ok(1));
        let mut byte = [0];
        assert_eq!((pread(&file, &mut byte, 5), byte), (Ok(1), *b"x"), "it is that file");
        store.forget(FdName::Fuse).expect("forget");
        assert_eq!(received(&manager).0, "FDSTOREREMOVE=1\nFDNAME=fuse");
        std::thread::scope(|scope| {
            let settled = scope.spawn(|| store.settle());
            let mut waiting = [PollFd::new(&manager, PollFlags::IN)];
            poll(&mut waiting, None).expect("poll");
            let (state, fds) = received(&manager);
            assert_eq!((&*state, fds.len()), ("BARRIER=1", 1));
            assert!(!settled.is_finished(), "the pipe is open");
            drop(fds);
            assert_eq!(settled.join().expect("join"), Ok(()));
        });
        store.notify("READY=1").expect("notify");
        assert_eq!(received(&manager).0, "READY=1");
    }
}
