//! Layers, and a server of their files: a thread that answers from local files.

#![allow(dead_code, clippy::unwrap_used)]

use parking_lot::Mutex;
use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{CWD, Mode, OFlags, open},
    io::{Errno, read, write},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
        mount_change, move_mount,
    },
};
use shipway_erofs::{
    Attributes as Owner, BLOCK, Builder, Content, Form, Inserted, Metadata, Nid, Node, Options,
    Reader, first_block,
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

/// Set in nodes of trees, with the number of the layer above that of the inode.
const TREE: u64 = 1 << 62;

/// An inode of a layer.
struct InTree<'a> {
    number: u64,
    reader: Reader<'a>,
    inode: Metadata,
    /// Of the flat image.
    data: &'a [u8],
}

impl<'a> InTree<'a> {
    fn attributes(&self) -> NodeAttributes {
        let kind = match self.inode.content {
            Content::Directory => 0o40_000,
            Content::File(_) => 0o100_000,
            other => panic!("{other:?}"),
        };
        let Metadata { nid, mode, size, nlink, uid, gid, .. } = self.inode;
        let node = NodeId(TREE | self.number << 32 | nid.0);
        NodeAttributes {
            uid,
            gid,
            ..NodeAttributes::new(node, kind | u32::from(mode), size, nlink)
        }
    }

    fn other(&self, nid: Nid) -> Self {
        Self { inode: self.reader.metadata(nid).unwrap(), ..*self }
    }

    fn find(&self, name: &[u8]) -> Option<Self> {
        let found = self.reader.directory(&self.inode).unwrap().lookup(name).unwrap();
        Some(self.other(found?.nid))
    }

    fn contents(&self) -> &'a [u8] {
        let Content::File(extent) = self.inode.content else { panic!("not a file") };
        let at = u64::from(extent.block) * BLOCK;
        &self.data[at as usize..(at + self.inode.size) as usize]
    }
}

impl Files {
    fn tree(&self, number: u64, nid: Option<Nid>) -> Option<InTree<'_>> {
        let Bytes::Memory(flat) = &self.0.get(&(number * 2 + 3))?.2 else { return None };
        let reader = Reader::open(flat).unwrap();
        let inode = reader.metadata(nid.unwrap_or(reader.root())).unwrap();
        let data = &flat[(u64::from(reader.blocks()) * BLOCK) as usize..];
        Some(InTree { number, reader, inode, data })
    }

    fn in_tree(&self, node: u64) -> Option<InTree<'_>> {
        let node = Some(node).filter(|node| node & TREE != 0)? ^ TREE;
        self.tree(node >> 32, Some(Nid(node & u64::from(u32::MAX))))
    }

    fn named(&self, parent: u64, name: &[u8]) -> Option<NodeAttributes> {
        if let Some(parent) = self.in_tree(parent) {
            return Some(parent.find(name)?.attributes());
        }
        if let Ok(number) = std::str::from_utf8(name).unwrap().parse() {
            return Some(self.tree(number, None)?.attributes());
        }
        let (node, _) = self.0.iter().find(|(_, (n, ..))| n.as_bytes() == name)?;
        Some(self.attributes(*node))
    }

    fn attributes(&self, node: u64) -> NodeAttributes {
        if let Some(found) = self.in_tree(node) {
            return found.attributes();
        }
        match self.0.get(&node) {
            Some((_, size, _)) => NodeAttributes::new(NodeId(node), 0o100_444, *size, 1),
            None => NodeAttributes::new(NodeId::ROOT, 0o40_555, 0, 2),
        }
    }
}

/// As many of `bytes` from `offset` as there is room for.
fn part(bytes: &[u8], offset: u64, out: &mut [u8]) -> usize {
    let rest = bytes.get(offset as usize..).unwrap_or_default();
    let count = rest.len().min(out.len());
    out[..count].copy_from_slice(&rest[..count]);
    count
}

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
        for flag in ["default_permissions", "allow_other"] {
            fsconfig_set_flag(context.as_fd(), flag).unwrap();
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
            tree: self.at.join(number.to_string()),
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
            // The connection has ended: the kernel has a word for each way.
            Err(Errno::NODEV | Errno::CONNABORTED) => return,
            Err(error) => panic!("read a request: {error}"),
        };
        let request = Request::parse(&buffer[..length]).unwrap();
        let (unique, node) = (request.header.unique, request.header.node.0);
        let files = files.lock();
        let answer = match request.operation {
            Operation::Init(offer) => {
                let wanted = InitOptions { idmap: true, trees: true, ..InitOptions::default() };
                reply.init(unique, &offer.answer(wanted).unwrap())
            }
            Operation::Lookup { name } => match files.named(node, name) {
                Some(found) => reply.entry(unique, &found),
                None => reply.error(unique, Errno::NOENT),
            },
            Operation::GetAttr => reply.attributes(unique, &files.attributes(node)),
            Operation::Open { .. } if node & TREE != 0 => reply.error(unique, Errno::NOSYS),
            Operation::Open { .. } => {
                reply.opened(unique, Opened { direct: true, ..Opened::default() })
            }
            Operation::OpenDir => reply.opened(unique, Opened::default()),
            Operation::ReadDir { size, .. } | Operation::ReadDirPlus { size, .. } => {
                reply.data(unique, size as usize, |_| Ok(0))
            }
            Operation::GetXattr { name, size } => {
                let found = files.in_tree(node).and_then(|found| {
                    let xattrs = found.reader.xattrs(&found.inode).unwrap();
                    xattrs.into_iter().find(|xattr| xattr.name == name)
                });
                match found {
                    None => reply.error(unique, Errno::NODATA),
                    Some(found) if size == 0 => reply.size(unique, found.value.len() as u32),
                    Some(found) => {
                        reply.data(unique, size as usize, |out| Ok(part(found.value, 0, out)))
                    }
                }
            }
            Operation::Read { offset, size, .. } => {
                reads.fetch_add(1, Ordering::Relaxed);
                reply.data(unique, size as usize, |out| match files.in_tree(node) {
                    Some(found) => Ok(part(found.contents(), offset, out)),
                    None => match &files.0[&node].2 {
                        Bytes::File(file) => file.read_at(out, offset).map_err(|_| Errno::IO),
                        Bytes::Memory(bytes) => Ok(part(bytes, offset, out)),
                    },
                })
            }
            Operation::StatFs => reply.statfs(unique, StatFs { blocks: 1, files: 1 }),
            Operation::Release { .. } | Operation::ReleaseDir { .. } => reply.done(unique),
            Operation::Interrupt { .. }
            | Operation::Forget { .. }
            | Operation::BatchForget(_)
            | Operation::Destroy => continue,
            Operation::ReadLink | Operation::ListXattr { .. } | Operation::Other(_) => {
                reply.error(unique, Errno::NOSYS)
            }
        };
        match write(device, answer) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => panic!("answer: {error}"),
        }
    }
}
