//! Keepers, layers, and daemons for them.

#![allow(dead_code)]

use rustix::{
    cmsg_space,
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    io::{Errno, IoSlice, IoSliceMut},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
        unmount,
    },
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect,
        listen, recvmsg, sendmsg, socket_with,
    },
    thread::{UnshareFlags, unshare_unsafe},
};
use shipway_erofs::{Attributes, Builder, Form, Node, Options};
use shipway_keeper::client::{Files, Holder, Keeper, News};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    mem::MaybeUninit,
    ops::Range,
    os::unix::{fs::FileExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

pub const BLOCK: u64 = 4096;
/// How long anything may take that is to happen: much longer than it does.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A small generator of pseudo-random numbers (xorshift).
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Contents of layers: never zero, as holes are.
fn byte(n: u32, at: u64) -> u8 {
    ((at ^ at >> 8 ^ at >> 16).wrapping_mul(31).wrapping_add(n.into()) % 255 + 1) as u8
}

/// The first place where bytes of a layer are not what they are to be.
pub fn wrong(n: u32, from: u64, bytes: &[u8]) -> Option<u64> {
    (from..).zip(bytes).find(|(at, b)| **b != byte(n, *at)).map(|(at, _)| at)
}

/// Metadata of an image with one file of so many blocks, in both forms.
pub fn image(blocks: u64) -> (Vec<u8>, Vec<u8>) {
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    let mut builder = Builder::new(Options::default(), &attributes).unwrap();
    builder.insert(b"file", &attributes, Node::File { size: blocks * BLOCK }).unwrap();
    let image = builder.finish().unwrap();
    let (mut meta, mut flat) = (Vec::new(), Vec::new());
    image.write(Form::WithDevice, &mut meta).unwrap();
    image.write(Form::Flat, &mut flat).unwrap();
    (meta, flat)
}

/// A layer's files.
pub struct TestLayer {
    pub n: u32,
    pub data: File,
    pub map: File,
    pub meta: File,
    pub meta_path: PathBuf,
}

impl TestLayer {
    /// Its metadata and its data file have all of it; none of it is good.
    pub fn of(lab: &Lab, n: u32, meta: &[u8], data: &[u8]) -> Self {
        let layer = lab.layer(n, data.len() as u64 / BLOCK, meta);
        layer.data.write_all_at(data, 0).unwrap();
        layer
    }

    /// Writes what belongs into these blocks.
    pub fn fill(&self, blocks: Range<u64>) {
        let at = blocks.start * BLOCK;
        let bytes: Vec<u8> = (at..blocks.end * BLOCK).map(|at| byte(self.n, at)).collect();
        self.data.write_all_at(&bytes, at).unwrap();
    }
}

/// A keeper's process, which is killed with the test.
pub struct Process(pub Child);

impl Process {
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A connection to a keeper.
pub struct Daemon {
    pub keeper: Arc<Keeper>,
    pub news: Receiver<News>,
}

impl Daemon {
    pub fn add(&self, layer: &TestLayer) {
        let files =
            Files { data: layer.data.as_fd(), map: layer.map.as_fd(), meta: layer.meta.as_fd() };
        self.keeper.add(layer.n, files).unwrap();
    }

    /// Says it, and returns when that was heard.
    pub fn have(&self, n: u32, blocks: Range<u64>) {
        self.keeper.have(n, blocks).unwrap();
        self.keeper.list().unwrap();
    }

    pub fn news(&self) -> News {
        self.news.recv_timeout(PATIENCE).expect("nothing is said")
    }

    /// Gives whatever is missing, until the server is dropped.
    pub fn serve(self, layers: &[&TestLayer]) -> Server {
        let files: BTreeMap<u32, File> =
            layers.iter().map(|l| (l.n, l.data.try_clone().unwrap())).collect();
        Server::new(self, move |keeper, n, blocks| {
            let at = blocks.start * BLOCK;
            let bytes: Vec<u8> = (at..blocks.end * BLOCK).map(|at| byte(n, at)).collect();
            files[&n].write_all_at(&bytes, at).unwrap();
            keeper.have(n, blocks).unwrap();
        })
    }

    /// Fails whatever is missing, until it is stopped.
    pub fn fail_all(self) -> Server {
        Server::new(self, |keeper, n, blocks| keeper.fail(n, blocks, Errno::IO).unwrap())
    }
}

/// A daemon that does the same with each miss.
pub struct Server {
    stop: std::sync::mpsc::Sender<()>,
    thread: Option<JoinHandle<Daemon>>,
}

impl Server {
    pub fn new(
        daemon: Daemon,
        mut with: impl FnMut(&Keeper, u32, Range<u64>) + Send + 'static,
    ) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                if let Ok(News::Miss { n, blocks }) =
                    daemon.news.recv_timeout(Duration::from_millis(20))
                {
                    with(&daemon.keeper, n, blocks);
                }
            }
            daemon
        });
        Self { stop, thread: Some(thread) }
    }

    pub fn stop(mut self) -> Daemon {
        let _ = self.stop.send(());
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A mount that is nowhere in the tree.
pub struct Mounted(OwnedFd);

impl Mounted {
    pub fn root(&self) -> PathBuf {
        format!("/proc/self/fd/{}/.", self.0.as_raw_fd()).into()
    }
}

/// A directory for keepers, and their socket, which outlives them as with socket activation.
pub struct Lab {
    dir: tempfile::TempDir,
    listener: OwnedFd,
    pub held: Holder,
}

impl Lab {
    /// With mounts that only this thread, what it starts, and threads it makes see.
    #[allow(unsafe_code)]
    pub fn new() -> Self {
        // SAFETY: the file descriptor table stays shared; only this thread's view of mounts and its
        // working directory part from the others'.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }
            .expect("mounts need root: run as root, as `cargo xtask test` does");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        // Not in /tmp, which may be a tmpfs: the kernel cannot read an image from there.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let listener = seqpacket();
        bind(&listener, &SocketAddrUnix::new(dir.path().join("keeper.sock")).unwrap()).unwrap();
        listen(&listener, 16).unwrap();
        Self { dir, listener, held: Holder::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("k").join(name)
    }

    pub fn open(&self, name: &str) -> File {
        File::open(self.path(name)).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("")).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn is_mounted(&self) -> bool {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        mounts.contains(&format!(" {} ", self.dir.path().join("k").display()))
    }

    pub fn start(&self) -> Process {
        self.start_with(&[], 60_000)
    }

    /// With more inherited file descriptors, and a deadline in milliseconds.
    pub fn start_with(&self, more: &[(&str, BorrowedFd<'_>)], deadline: u64) -> Process {
        self.spawn(&[], more, deadline, None)
    }

    /// In a user namespace in which only root is known, with mounts of its own.
    pub fn start_rootless(&self) -> Process {
        let unshare = ["unshare", "--user", "--map-root-user", "--mount", "--propagation=private"];
        self.spawn(&unshare, &[], 60_000, None)
    }

    /// With what the service manager holds, as far as `wanted` says.
    pub fn start_under(&self, manager: &Manager, wanted: impl Fn(&str) -> bool) -> Process {
        let held = manager.held.lock().unwrap();
        let fds: Vec<(&str, BorrowedFd<'_>)> = held
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, fd)| (name.as_str(), fd.as_fd()))
            .collect();
        self.spawn(&[], &fds, 60_000, Some(&manager.path))
    }

    #[allow(unsafe_code)]
    fn spawn(
        &self,
        within: &[&str],
        more: &[(&str, BorrowedFd<'_>)],
        deadline: u64,
        notify: Option<&Path>,
    ) -> Process {
        let mut fds = vec![("keeper.sock", self.listener.as_fd())];
        fds.extend_from_slice(more);
        let names: Vec<&str> = fds.iter().map(|(name, _)| *name).collect();
        let raw: Vec<RawFd> = fds.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let words = [within, &["sh", "-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]].concat();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .arg(env!("CARGO_BIN_EXE_keeper-under-test"))
            .arg(self.dir.path())
            .arg(deadline.to_string())
            .env("LISTEN_FDS", fds.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .env_remove("NOTIFY_SOCKET");
        if let Some(path) = notify {
            command.env("NOTIFY_SOCKET", path);
        }
        // SAFETY: only system calls that are permitted between fork and exec, on file descriptors
        // that are open: first out of the way, then to the numbers that the protocol wants.
        unsafe {
            command.pre_exec(move || {
                const ASIDE: RawFd = 500;
                for (place, fd) in raw.iter().enumerate() {
                    if libc::dup2(*fd, ASIDE + place as RawFd) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                for place in 0..raw.len() as RawFd {
                    libc::dup2(ASIDE + place, 3 + place);
                    libc::close(ASIDE + place);
                }
                Ok(())
            });
        }
        Process(command.spawn().unwrap())
    }

    /// A daemon connects; it has what earlier ones held.
    pub fn connect(&self) -> Daemon {
        let path = self.dir.path().join("keeper.sock");
        loop {
            let (sender, news) = channel();
            let connected = Keeper::connect(&path, &self.held, move |n| drop(sender.send(n)));
            match connected {
                Ok(keeper) => return Daemon { keeper: Arc::new(keeper), news },
                // That keeper was killed just now.
                Err(shipway_keeper::client::ClientError::Gone) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn connect_raw(&self) -> OwnedFd {
        let socket = seqpacket();
        let path = self.dir.path().join("keeper.sock");
        connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        socket
    }

    /// A daemon that comes after this holds nothing.
    pub fn forget_held(&self) {
        self.held.clear();
    }

    /// A layer of so many blocks, none of them there.
    pub fn layer(&self, n: u32, blocks: u64, meta: &[u8]) -> TestLayer {
        let at = |kind: &str| self.dir.path().join(format!("{n}-{kind}"));
        let file = |kind: &str, length: u64| {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(at(kind))
                .unwrap();
            file.set_len(length).unwrap();
            file
        };
        let meta_file = file("meta", meta.len() as u64);
        meta_file.write_all_at(meta, 0).unwrap();
        TestLayer {
            n,
            data: file("data", blocks * BLOCK),
            map: file("map", blocks.div_ceil(8)),
            meta: meta_file,
            meta_path: at("meta"),
        }
    }

    pub fn read_in_thread(
        &self,
        name: &str,
        offset: u64,
        size: usize,
    ) -> JoinHandle<std::io::Result<Vec<u8>>> {
        let file = self.open(name);
        std::thread::spawn(move || {
            let mut bytes = vec![0; size];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        })
    }

    pub fn mount_erofs(&self, options: &[(&str, Option<&Path>)]) -> Mounted {
        let context =
            fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).expect("the kernel has no EROFS");
        for (key, value) in options {
            match value {
                Some(value) => fsconfig_set_string(context.as_fd(), *key, *value).unwrap(),
                None => fsconfig_set_flag(context.as_fd(), *key).unwrap(),
            }
        }
        fsconfig_create(context.as_fd()).expect("this needs Linux 6.12 or newer");
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        Mounted(fsmount(context.as_fd(), flags, MountAttrFlags::empty()).unwrap())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Before the directory is removed, or it would be removed in there.
        let _ = unmount(self.path(""), UnmountFlags::DETACH);
    }
}

fn seqpacket() -> OwnedFd {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

pub fn send_raw(to: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || beside.push(SendAncillaryMessage::ScmRights(fds)));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(to, &[IoSlice::new(bytes)], &mut beside, flags).map(|_| ())
}

/// Takes what was said.
pub fn drain(from: &OwnedFd) {
    let mut bytes = [0; 64];
    while rustix::net::recv(from, &mut bytes, RecvFlags::DONTWAIT).is_ok_and(|(n, _)| n > 0) {}
}

/// Stands in for the service manager: holds file descriptors as it is told.
pub struct Manager {
    pub path: PathBuf,
    pub held: Arc<Mutex<BTreeMap<String, OwnedFd>>>,
}

impl Manager {
    #[track_caller]
    pub fn new(lab: &Lab) -> Self {
        let path = lab.dir.path().join("notify");
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let held: Arc<Mutex<BTreeMap<String, OwnedFd>>> = Arc::default();
        let into = held.clone();
        // It ends with the test's process.
        std::thread::spawn(move || {
            loop {
                let mut bytes = [0; 256];
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
                let mut beside = RecvAncillaryBuffer::new(&mut space);
                let told = {
                    let mut slices = [IoSliceMut::new(&mut bytes)];
                    recvmsg(&socket, &mut slices, &mut beside, RecvFlags::CMSG_CLOEXEC).unwrap()
                };
                let mut fds = Vec::new();
                for message in beside.drain() {
                    if let RecvAncillaryMessage::ScmRights(received) = message {
                        fds.extend(received);
                    }
                }
                let text = std::str::from_utf8(&bytes[..told.bytes]).unwrap();
                let name = text.lines().find_map(|l| l.strip_prefix("FDNAME="));
                match (text.lines().next().unwrap(), name) {
                    ("FDSTORE=1", Some(name)) => {
                        let there = into.lock().unwrap().insert(name.into(), fds.remove(0));
                        assert!(there.is_none(), "{name} is held twice");
                    }
                    ("FDSTOREREMOVE=1", Some(name)) => drop(into.lock().unwrap().remove(name)),
                    // Closing it is the answer.
                    ("BARRIER=1", None) => drop(fds),
                    ("READY=1", None) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        Self { path, held }
    }

    pub fn names(&self) -> Vec<String> {
        self.held.lock().unwrap().keys().cloned().collect()
    }
}
