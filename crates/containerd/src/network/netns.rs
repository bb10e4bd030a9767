//! Owns network namespaces: made on a thread of their own, kept by a bind mount.

use rustix::{
    fd::{AsFd, OwnedFd},
    net::{AddressFamily, SendFlags, SocketType},
};
use shipway_fault::{Fault, Result};
use shipway_task::blocking;
use std::path::{Path, PathBuf};

/// Runs `f` on a thread of its own in the network namespace of `path`. Blocks.
pub(super) fn inside<T: Send + 'static>(
    path: &Path,
    f: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    let file = std::fs::File::open(path)?;
    let thread = std::thread::Builder::new().name("netns".into()).spawn(move || {
        rustix::thread::move_into_link_name_space(
            file.as_fd(),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )?;
        f()
    })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(std::io::Error::other("a thread in a network namespace panicked")))
}

/// What begins the ids by which CNI plug-ins know namespaces.
const ID_PREFIX: &str = "shipway-";

/// A namespace that a file of ours keeps alive.
#[derive(Debug)]
pub(super) struct NetNs {
    path: PathBuf,
    id: String,
}

impl NetNs {
    /// Makes a namespace with its loopback up, at `dir/name`.
    pub(super) async fn new(dir: &Path, name: &str) -> Result<Self> {
        let netns = Self::known(dir, name);
        let path = netns.path.clone();
        blocking("make a network namespace", move || make(&path)).await?;
        Ok(netns)
    }

    /// The one at `dir/name`, which was made before.
    pub(super) fn known(dir: &Path, name: &str) -> Self {
        Self { path: dir.join(name), id: format!("{ID_PREFIX}{name}") }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name that it was made with.
    pub(super) fn name(&self) -> &str {
        self.id.strip_prefix(ID_PREFIX).unwrap_or(&self.id)
    }

    /// The container id that CNI plug-ins know it by.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Those that lie in `dir`.
    pub(super) fn left_in(dir: &Path) -> Result<Vec<Self>> {
        let entries =
            std::fs::read_dir(dir).map_err(|e| Fault::io(format!("list {}", dir.display()), e))?;
        let names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        Ok(names.map(|name| Self::known(dir, &name)).collect())
    }

    /// Lets it go; it ends with the last process in it.
    pub(super) async fn remove(self) {
        let _ = blocking("remove a network namespace", move || {
            let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
            let _ = rustix::mount::unmount(&self.path, flags);
            let _ = std::fs::remove_file(&self.path);
            Ok(())
        })
        .await;
    }
}

#[allow(unsafe_code)]
fn make(path: &Path) -> Result<()> {
    let fail =
        |what: &str, e: std::io::Error| Fault::io(format!("make a network namespace: {what}"), e);
    std::fs::File::create_new(path).map_err(|e| fail("create its file", e))?;
    let (file, made) = (path.to_owned(), path.display().to_string());
    let thread = std::thread::Builder::new().name("netns".into()).spawn(
        move || -> rustix::io::Result<()> {
            // SAFETY: only this thread's network namespace changes, no file descriptor table is
            // unshared, and the thread ends below.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            loopback_up()?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &file)
        },
    );
    let done = thread.map_err(|e| fail("start a thread", e))?.join();
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => {
            let _ = std::fs::remove_file(path);
            Err(fail(&format!("mount it at {made}"), e.into()))
        }
        Err(_) => Err(Fault::internal("make a network namespace: its thread panicked")),
    }
}

/// Sets the loopback interface of this thread's namespace up.
fn loopback_up() -> rustix::io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const IFF_UP: u32 = 1;
    const LOOPBACK: i32 = 1;
    // The flags, and which of them change.
    link_request(RTM_NEWLINK, LOOPBACK, (IFF_UP, IFF_UP), &[])
}

/// Deletes the link `name` of this thread's namespace; one that is not there is as good.
pub(super) fn delete_link(name: &str) -> std::io::Result<()> {
    const RTM_DELLINK: u16 = 17;
    const IFLA_IFNAME: u16 = 3;
    let text = [name.as_bytes(), &[0]].concat();
    let length = u16::try_from(4 + text.len()).map_err(|_| rustix::io::Errno::INVAL)?;
    let mut attribute = [&length.to_ne_bytes()[..], &IFLA_IFNAME.to_ne_bytes(), &text].concat();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    match link_request(RTM_DELLINK, 0, (0, 0), &attribute) {
        Err(rustix::io::Errno::NODEV) => Ok(()),
        done => Ok(done?),
    }
}

/// One route netlink message about a link, answered by an acknowledgement.
fn link_request(
    kind: u16,
    link: i32,
    (flags, change): (u32, u32),
    attributes: &[u8],
) -> rustix::io::Result<()> {
    const REQUEST_AND_ACK: u16 = 1 | 4;
    let socket: OwnedFd = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    let length = u32::try_from(32 + attributes.len()).map_err(|_| rustix::io::Errno::INVAL)?;
    let mut message = Vec::with_capacity(64);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]); // sequence, port
    message.extend([0; 4]); // family, padding, type
    message.extend(link.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(change.to_ne_bytes());
    message.extend_from_slice(attributes);
    rustix::net::send(socket.as_fd(), &message, SendFlags::empty())?;
    let mut reply = [0_u8; 256];
    let (n, _) =
        rustix::net::recv(socket.as_fd(), &mut reply[..], rustix::net::RecvFlags::empty())?;
    let errno = reply
        .get(16..20)
        .filter(|_| n >= 20)
        .and_then(|b| b.try_into().ok())
        .map_or(0, i32::from_ne_bytes);
    if errno == 0 { Ok(()) } else { Err(rustix::io::Errno::from_raw_os_error(-errno)) }
}
