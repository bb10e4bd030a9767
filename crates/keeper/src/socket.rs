//! Datagrams with file descriptors beside them.

use crate::message::{BYTES, FDS};
use rustix::{
    cmsg_space,
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, IoSlice, IoSliceMut},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
        SocketType, recvmsg, sendmsg, socket_with,
    },
};
use std::{mem::MaybeUninit, path::Path};

/// A datagram.
pub(crate) struct Received {
    pub(crate) bytes: [u8; BYTES],
    pub(crate) length: usize,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Received {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Sends without waiting.
pub(crate) fn send(to: impl AsFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    send_with(to, bytes, fd.as_slice(), SendFlags::DONTWAIT)
}

/// Sends. With `DONTWAIT` among the flags it may be `EAGAIN`.
pub(crate) fn send_with(
    to: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    sendmsg(to, &[IoSlice::new(bytes)], &mut beside, flags | SendFlags::NOSIGNAL).map(|_| ())
}

/// Receives; `None` at the end of the connection. With `DONTWAIT` it may be `EAGAIN`. Bytes behind
/// those of a message are dropped, and so are more file descriptors than a message has.
pub(crate) fn receive(from: impl AsFd, flags: RecvFlags) -> Result<Option<Received>, Errno> {
    let mut bytes = [0; BYTES];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let told = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        recvmsg(from, &mut slices, &mut beside, flags | RecvFlags::CMSG_CLOEXEC)?
    };
    let mut fds = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    // An empty datagram is none of ours, so nothing is the end.
    if told.bytes == 0 && !told.flags.contains(ReturnFlags::TRUNC) {
        return Ok(None);
    }
    Ok(Some(Received { bytes, length: told.bytes.min(BYTES), fds }))
}

/// A socket that keeps datagrams apart, not connected yet.
pub(crate) fn new() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// The address of a path.
pub(crate) fn address(path: &Path) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new(path)
}
