//! Layers, and a server of their files: a thread that answers from local files.

#![allow(dead_code, clippy::unwrap_used)]

use parking_lot::Mutex;
use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{CWD, Mode, OFlags, open},
    io::{Errno, read, write},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change,
        move_mount,
    },
};
use shipway_erofs::{
    Attributes as Owner, BLOCK, Builder, Form, Inserted, Node, Options, first_block,
};
use shipway_fusewire::*;
use shipway_layermount::FuseFiles;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

/// Mounts that only this thread and those that it starts see, and that go with them.
#[allow(unsafe_code)]
pub fn own_mounts() {
    assert!(
        rustix::process::geteuid().is_root(),
        "mounts need root: run as root, as `cargo xtask test` does"
    );
    // SAFETY: descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
}

/// The same mounts as those of the thread that started this one, from now on as well.
#[allow(unsafe_code)]
pub fn following_mounts() {
    // SAFETY: descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
}

/// A directory on the disk: the kernel does not read images from tmpfs, which /tmp may be.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    rustix::mount::mount("tmpfs", at, "tmpfs", MountFlags::empty(), None).unwrap();
}

fn byte(layer: u32, file: u32, at: u64) -> u8 {
    let mixed = (at / 7)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(u64::from(layer) * 131 + u64::from(file) * 17 + at);
    (mixed ^ mixed >> 29) as u8
}

/// What file `file` of layer `layer` holds.
pub fn contents(layer: u32, file: u32) -> Arc<Vec<u8>> {
    type Made = BTreeMap<(u32, u32), Arc<Vec<u8>>>;
    static MADE: Mutex<Made> = Mutex::new(Made::new());
    let make = || (0..SIZES[file as usize]).map(|at| byte(layer, file, at)).collect();
    let mut made = MADE.lock();
    made.entry((layer, file)).or_insert_with(|| Arc::new(make())).clone()
}

/// Sizes of the files of a layer: `f0` to `f3`, owned by 0, 1, 2 and 3.
pub const SIZES: [u64; 4] = [10, 5000, 300_000, 2 << 20];

/// A layer as files of a directory.
#[derive(Clone, Debug)]
pub struct Layer {
    pub number: u32,
    pub meta: PathBuf,
    pub data: PathBuf,
    pub uuid: [u8; 16],
}

impl Layer {
    pub fn write(dir: &Path, number: u32) -> Self {
        let dir = dir.join(number.to_string());
        fs::create_dir_all(&dir).unwrap();
        let uuid = [number as u8 + 1; 16];
        let root = Owner { mode: 0o755, ..Owner::default() };
        let mut builder = Builder::new(Options { uuid, ..Options::default() }, &root).unwrap();
        let mut data = Vec::new();
        for (n, size) in (0..).zip(SIZES) {
            let owner = Owner { mode: 0o644, uid: n, gid: n, ..Owner::default() };
            let name = format!("f{n}");
            let Inserted::File(extent) =
                builder.insert(name.as_bytes(), &owner, Node::File { size }).unwrap()
            else {
                panic!("a file")
            };
            data.resize((u64::from(extent.block) * BLOCK) as usize, 0);
            data.extend(&contents(number, n)[..]);
        }
        data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        let image = builder.finish().unwrap();
        let mut meta = Vec::new();
        image.write(Form::WithDevice, &mut meta).unwrap();
        let layer = Self { number, meta: dir.join("meta"), data: dir.join("data"), uuid };
        fs::write(&layer.meta, meta).unwrap();
        fs::write(&layer.data, data).unwrap();
        layer
    }

    /// One file of metadata and contents.
    pub fn flat(&self) -> PathBuf {
        let path = self.meta.with_file_name("flat");
        fs::write(&path, flat_of(&self.meta, &self.data)).unwrap();
        path
    }
}

pub fn flat_of(meta: &Path, data: &Path) -> Vec<u8> {
    let mut flat = fs::read(meta).unwrap();
    let first = first_block(&flat, Form::Flat).unwrap();
    flat[..first.len()].copy_from_slice(&first);
    flat.extend(fs::read(data).unwrap());
    flat
}

/// Everything in the layer is what it should be.
pub fn check(root: &Path, layer: u32) {
    for n in 0..SIZES.len() as u32 {
        check_file(&root.join(format!("f{n}")), layer, n);
    }
}

#[track_caller]
pub fn check_file(path: &Path, layer: u32, file: u32) {
    assert!(fs::read(path).unwrap() == contents(layer, file)[..], "{} is wrong", path.display());
}

enum Bytes {
    File(File),
    Memory(Vec<u8>),
}

/// What the server has, by number of the node.
#[derive(Default)]
struct Files(BTreeMap<u64, (String, u64, Bytes)>);

/// A FUSE mount and the thread that serves it, until this is dropped.
pub struct Server {
    pub at: PathBuf,
    files: Arc<Mutex<Files>>,
    reads: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves at the directory `at`.
    pub fn start(at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        let device = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .expect("the kernel has no FUSE");
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        let options = [
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", "40000".into()),
            ("user_id", "0".into()),
            ("group_id", "0".into()),
        ];
        for (key, value) in options {
            fsconfig_set_string(context.as_fd(), key, value).unwrap();
        }
        fsconfig_create(context.as_fd()).unwrap();
        let mount =
            fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
                .unwrap();
        move_mount(mount.as_fd(), "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
        let (files, reads) = (Arc::<Mutex<Files>>::default(), Arc::<AtomicU64>::default());
        let (served, counted) = (files.clone(), reads.clone());
        let thread = std::thread::spawn(move || serve(&device, &served, &counted));
        Self { at: at.to_owned(), files, reads, thread: Some(thread) }
    }

    pub fn add(&self, number: u32, meta: &Path, data: &Path) -> FuseFiles {
        let mut files = self.files.lock();
        let flat = flat_of(meta, data);
        let data = File::open(data).unwrap();
        let (size, node) = (data.metadata().unwrap().len(), u64::from(number) * 2 + 2);
        files.0.insert(node, (format!("{number}.data"), size, Bytes::File(data)));
        let size = flat.len() as u64;
        files.0.insert(node + 1, (format!("{number}.img"), size, Bytes::Memory(flat)));
        FuseFiles {
            data: self.at.join(format!("{number}.data")),
            img: self.at.join(format!("{number}.img")),
        }
    }

    pub fn layer(&self, layer: &Layer) -> FuseFiles {
        self.add(layer.number, &layer.meta, &layer.data)
    }

    /// Reads so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        let unmounted = rustix::mount::unmount(&self.at, flags);
        if let (Ok(()), Some(thread)) = (unmounted, self.thread.take())
            && !std::thread::panicking()
        {
            // It ends when the last mount that has a file of it is gone.
            thread.join().unwrap();
        }
    }
}

fn serve(device: &OwnedFd, files: &Mutex<Files>, reads: &AtomicU64) {
    let mut buffer = vec![0; REQUEST_BYTES];
    let mut reply = Reply::with_room_for(1 << 20);
    loop {
        let length = match read(device, &mut buffer[..]) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            Err(Errno::NODEV) => return,
            Err(error) => panic!("read a request: {error}"),
        };
        let request = Request::parse(&buffer[..length]).unwrap();
        let (unique, node) = (request.header.unique, request.header.node.0);
        let files = files.lock();
        let attributes = |node: u64| match files.0.get(&node) {
            Some((_, size, _)) => {
                Attributes { node: NodeId(node), mode: 0o100_444, size: *size, nlink: 1 }
            }
            None => Attributes { node: NodeId::ROOT, mode: 0o40_555, size: 0, nlink: 2 },
        };
        let answer = match request.operation {
            Operation::Init(offer) => reply.init(unique, &offer.answer(Wanted::default()).unwrap()),
            Operation::Lookup { name } => {
                match files.0.iter().find(|(_, (n, ..))| n.as_bytes() == name) {
                    Some((node, _)) => reply.entry(unique, &attributes(*node)),
                    None => reply.error(unique, Errno::NOENT),
                }
            }
            Operation::GetAttr => reply.attributes(unique, &attributes(node)),
            Operation::Open { .. } => {
                reply.opened(unique, Opened { direct: true, ..Opened::default() })
            }
            Operation::OpenDir => reply.opened(unique, Opened::default()),
            Operation::ReadDir { size, .. } => reply.data(unique, size as usize, |_| Ok(0)),
            Operation::Read { offset, size, .. } => {
                reads.fetch_add(1, Ordering::Relaxed);
                let (_, _, bytes) = &files.0[&node];
                reply.data(unique, size as usize, |out| match bytes {
                    Bytes::File(file) => file.read_at(out, offset).map_err(|_| Errno::IO),
                    Bytes::Memory(bytes) => {
                        let rest = bytes.get(offset as usize..).unwrap_or_default();
                        let count = rest.len().min(out.len());
                        out[..count].copy_from_slice(&rest[..count]);
                        Ok(count)
                    }
                })
            }
            Operation::StatFs => reply.statfs(unique, StatFs { blocks: 1, files: 1 }),
            Operation::Release { .. } | Operation::ReleaseDir { .. } => reply.done(unique),
            Operation::Interrupt { .. }
            | Operation::Forget { .. }
            | Operation::BatchForget(_)
            | Operation::Destroy => continue,
            Operation::Other(_) => reply.error(unique, Errno::NOSYS),
        };
        match write(device, answer) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => panic!("answer: {error}"),
        }
    }
}
