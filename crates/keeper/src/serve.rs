//! The connection to the kernel: mounted, read by threads, left.

use crate::{
    engine::{Engine, Outside, READERS},
    limits::MAX_READ,
    message::Event,
    socket,
};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, open, statx},
    io::{Errno, read, write},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
    },
};
use shipway_fault::{Fault, Result};
use shipway_fusewire::{Reply, Request, Unique};
use std::{
    path::Path,
    sync::{
        Arc, Barrier, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// Bytes of a reader's stack, which is locked in memory: its answers are elsewhere.
const STACK: usize = 128 << 10;

/// Mounts a new connection at `at`, and returns it. What is mounted there already is detached:
/// nothing serves it.
pub(crate) fn mount(at: &Path) -> Result<OwnedFd> {
    let failed = |what: &'static str| {
        let what = format!("{what} {}", at.display());
        move |e: Errno| Fault::io(what, e.into())
    };
    while is_mounted(at) {
        unmount(at, UnmountFlags::DETACH).map_err(failed("detach what is mounted at"))?;
    }
    std::fs::create_dir_all(at).map_err(|e| Fault::io(format!("create {}", at.display()), e))?;
    let device = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        Fault::io("open /dev/fuse", e.into()).hint("lazy layers need a kernel with FUSE")
    })?;
    let mounted = || {
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let owner = |id: u32| id.to_string();
        for (key, value) in [
            ("source", "shipway".to_owned()),
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", "40000".to_owned()),
            ("user_id", owner(rustix::process::geteuid().as_raw())),
            ("group_id", owner(rustix::process::getegid().as_raw())),
        ] {
            fsconfig_set_string(context.as_fd(), key, value)?;
        }
        // Clones of the mount with mapped ids want it.
        fsconfig_set_flag(context.as_fd(), "default_permissions")?;
        // Trees are open to all users as their attributes say; only root can reach them.
        fsconfig_set_flag(context.as_fd(), "allow_other")?;
        fsconfig_create(context.as_fd())?;
        let flags = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
        move_mount(&mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    mounted().map_err(failed("mount"))?;
    Ok(device)
}

/// Whether something is mounted at `at`. Does not ask its server, for there may be none.
pub(crate) fn is_mounted(at: &Path) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW;
    statx(CWD, at, flags, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Unmounts, now or as soon as nothing uses it.
pub(crate) fn unmount_at(at: &Path) {
    if let Err(error) = unmount(at, UnmountFlags::DETACH) {
        tracing::warn!(at = %at.display(), %error, "failed to unmount");
    }
}

/// The kernel behind its file descriptor, and the daemon behind its socket.
pub(crate) struct Kernel {
    fuse: OwnedFd,
    daemon: RwLock<Option<Arc<OwnedFd>>>,
    wake: OwnedFd,
    /// No request is begun any more.
    stopping: AtomicBool,
    /// There is nothing to serve any more.
    ended: AtomicBool,
}

impl Kernel {
    /// `wake` is an event counter (`eventfd`).
    pub(crate) fn new(fuse: OwnedFd, wake: OwnedFd) -> Self {
        let (stopping, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { fuse, daemon: RwLock::new(None), wake, stopping, ended }
    }

    pub(crate) fn fuse(&self) -> BorrowedFd<'_> {
        self.fuse.as_fd()
    }

    pub(crate) fn waker(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Sets the connection on which events are reported from now on.
    pub(crate) fn set_daemon(&self, daemon: Option<Arc<OwnedFd>>) {
        *self.daemon.write().unwrap_or_else(PoisonError::into_inner) = daemon;
    }

    /// Asks for everything again that the kernel has no answer to, if it can do that. What was sent
    /// before comes with another number and is answered by that one only.
    pub(crate) fn resend(&self) {
        // `EINVAL` from kernels that cannot.
        let _ = write(&self.fuse, Reply::default().resend());
    }

    /// Requests that are read from now on stay where a successor finds them.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    /// Whether the file system is gone.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

impl Outside for Kernel {
    fn answer(&self, answer: &[u8]) {
        match write(&self.fuse, answer) {
            // The reader may be gone, and so may the file system.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::warn!(%error, "failed to answer a request"),
        }
    }

    fn report(&self, event: &Event) -> bool {
        let daemon = self.daemon.read().unwrap_or_else(PoisonError::into_inner);
        daemon.as_ref().is_some_and(|to| socket::send(&**to, &event.encode(), None).is_ok())
    }

    fn wake(&self) {
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Starts the threads that read requests, and returns when they do. They end with the file system
/// or with the process.
pub(crate) fn start(engine: &Arc<Engine<Kernel>>) -> Result<()> {
    let started = Arc::new(Barrier::new(READERS + 1));
    for number in 0..READERS {
        let (engine, started) = (engine.clone(), started.clone());
        std::thread::Builder::new()
            .name(format!("reads-{number}"))
            .stack_size(STACK)
            .spawn(move || requests(&engine, number, &started))
            .map_err(|e| Fault::io("start a thread", e))?;
    }
    started.wait();
    Ok(())
}

fn requests(engine: &Engine<Kernel>, number: usize, started: &Barrier) {
    let kernel = &engine.outside;
    let mut slot = match engine.slots().reader(number) {
        Ok(slot) => slot,
        Err(error) => {
            started.wait();
            return tracing::error!(%error, "failed to start a reader of requests");
        }
    };
    let mut reply = Reply::with_room_for(MAX_READ);
    // All of it is touched once, so that it is in memory for good.
    let _ = reply.data(Unique(0), MAX_READ, |bytes| {
        bytes.fill(1);
        Ok(MAX_READ)
    });
    started.wait();
    while !kernel.stopping.load(Ordering::SeqCst) {
        slot.clear();
        match read(&kernel.fuse, slot.bytes()) {
            Ok(_) => {}
            // `ENOENT`: the reader was gone before the request was read.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            Err(error) => {
                if error != Errno::NODEV {
                    tracing::error!(%error, "failed to read a request, stopping");
                }
                kernel.ended.store(true, Ordering::SeqCst);
                return kernel.wake();
            }
        }
        let reading = engine.reader(number);
        if kernel.stopping.load(Ordering::SeqCst) {
            return;
        }
        match Request::parse(slot.bytes()) {
            Ok(request) => engine.handle(&request, &mut reply, Instant::now()),
            Err(error) => {
                tracing::warn!(%error, "invalid request");
                let unique = slot.bytes()[8..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
                kernel.answer(reply.error(Unique(unique), Errno::INVAL));
            }
        }
        drop(reading);
    }
}
