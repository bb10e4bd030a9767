//! Random layers as blobs, and what unpacking them gives. The model of unpacking is that of the
//! crate `erofs`, and the reader of blobs that of `estargz`.

#![allow(dead_code, clippy::unwrap_used)]

pub mod blob;
#[path = "../../../erofs/tests/common/mod.rs"]
pub mod model;

#[path = "../../../estargz/tests/common/mod.rs"]
pub mod blobs;

#[allow(unused_imports, reason = "not every test compares what is mounted")]
pub use model::Is;
pub use model::{Attrs, Model, Thing};
use model::{Maker, Op};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use shipway_estargz::{Dialect, Output, Record, Toc, Writer, WriterOptions};
use shipway_layerstore::{
    Chunk, ChunkId, Description, Extent, Layer, LayerKey, LayerStore, Options, Result,
};
use shipway_oci::Digest;
use shipway_testkit::Dice;
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    io,
    ops::Range,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::FileExt as _},
    },
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

pub const OUTPUTS: [Output; 3] = [Output::Estargz, Output::EstargzExternal, Output::ZstdChunked];

/// A directory on a file system that images can be mounted from, which `/tmp` may not be.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Options for tests, which need not wait for the disk.
pub fn options(boot: &str) -> Options {
    Options { fsync: false, boot_id: Some(boot.to_owned()), ..Options::default() }
}

/// A layer's entries in order, with all parents, no name twice, and links to what is there.
pub fn random_ops(seed: u64, count: usize) -> Vec<Op> {
    // It knows odd seeds only.
    let mut maker = Maker::new(2 * seed + 1);
    let (mut ops, mut directories, mut others) = (Vec::new(), vec![String::new()], Vec::new());
    let attrs = |maker: &mut Maker| {
        let mut attrs = maker.attrs();
        // The table of contents of an eStargz has whole seconds, and the reader of tars nanoseconds
        // since 1970 in 64 bits.
        attrs.mtime.nanoseconds = 0;
        attrs.mtime.seconds %= 1 << 33;
        attrs
    };
    let root = attrs(&mut maker);
    ops.push(Op { path: b"./".to_vec(), attrs: root, thing: Thing::Directory });
    for n in 0..count {
        let dice = &mut maker.dice;
        let directory = dice.pick(&directories).clone();
        let long = if dice.one_in(6) { "n".repeat(dice.below(240)) } else { String::new() };
        let mut path = format!("{directory}{n}ü{long}");
        let content = |dice: &mut Dice| {
            let size = match dice.below(6) {
                0 => 0,
                1 => 4096 * dice.below(4),
                2 => dice.below(60_000),
                _ => dice.below(6000),
            };
            match dice.below(5) {
                0 => vec![0; size],
                1 => (0..size).map(|n| if n < size / 2 { 0 } else { n as u8 | 1 }).collect(),
                _ => dice.bytes(size),
            }
        };
        let thing = match dice.below(16) {
            0..=7 => Thing::File(content(dice).into()),
            8 | 9 => {
                path.push('/');
                directories.push(path.clone());
                Thing::Directory
            }
            10 => Thing::Symlink("l".repeat(1 + dice.below(200)).into()),
            11 | 12 if !others.is_empty() => {
                Thing::HardLink(dice.pick::<String>(&others).clone().into())
            }
            13 => Thing::Char(dice.below(4096) as u32, dice.below(1 << 20) as u32),
            14 if dice.one_in(2) => Thing::Block(8, dice.below(1 << 20) as u32),
            14 => Thing::Fifo,
            _ => {
                path = if dice.one_in(4) {
                    format!("{directory}.wh..wh..opq")
                } else {
                    format!("{directory}.wh.{n}gone")
                };
                if ops.iter().any(|op: &Op| op.path == path.as_bytes()) {
                    continue;
                }
                // Some bear data, which is nowhere to be seen.
                Thing::File(content(dice).into())
            }
        };
        if !matches!(thing, Thing::Directory) && !path.contains(".wh.") {
            others.push(path.clone());
        }
        let attrs = attrs(&mut maker);
        ops.push(Op { path: path.into(), attrs, thing });
    }
    ops
}

/// A tar of the entries.
pub fn tar_of(ops: &[Op]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for op in ops {
        let mut header = tar::Header::new_gnu();
        header.set_mode(op.attrs.mode.into());
        header.set_uid(op.attrs.uid.into());
        header.set_gid(op.attrs.gid.into());
        header.set_mtime(0);
        header.set_size(0);
        let mut records = vec![("mtime".to_owned(), op.attrs.mtime.seconds.to_string().into())];
        for (name, value) in &op.attrs.xattrs {
            let name = std::str::from_utf8(name).unwrap();
            records.push((format!("SCHILY.xattr.{name}"), value.clone()));
        }
        tar.append_pax_extensions(
            records.iter().map(|(k, v): &(String, Vec<u8>)| (k.as_str(), v.as_slice())),
        )
        .unwrap();
        let path = Path::new(OsStr::from_bytes(&op.path));
        let mut put = |kind, header: &mut tar::Header, data: &[u8]| {
            header.set_entry_type(kind);
            header.set_size(data.len() as u64);
            tar.append_data(header, path, data).unwrap();
        };
        match &op.thing {
            Thing::Directory => put(tar::EntryType::Directory, &mut header, &[]),
            Thing::File(data) => put(tar::EntryType::Regular, &mut header, data),
            Thing::Fifo => put(tar::EntryType::Fifo, &mut header, &[]),
            Thing::Char(major, minor) | Thing::Block(major, minor) => {
                header.set_device_major(*major).unwrap();
                header.set_device_minor(*minor).unwrap();
                let is_char = matches!(op.thing, Thing::Char(..));
                let kind = if is_char { tar::EntryType::Char } else { tar::EntryType::Block };
                put(kind, &mut header, &[]);
            }
            Thing::Symlink(target) | Thing::HardLink(target) => {
                let is_symbolic = matches!(op.thing, Thing::Symlink(_));
                header.set_entry_type(if is_symbolic {
                    tar::EntryType::Symlink
                } else {
                    tar::EntryType::Link
                });
                tar.append_link(&mut header, path, OsStr::from_bytes(target)).unwrap();
            }
        }
    }
    tar.into_inner().unwrap()
}

/// A blob with its table of contents, and what is in it.
pub struct Blob {
    pub bytes: Vec<u8>,
    pub toc: Toc,
    pub key: LayerKey,
    pub about: Description,
    /// The data file as it is when all of it is there.
    pub data: Vec<u8>,
    pub records: Vec<Record>,
}

/// How a tar is made a blob.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub output: Output,
    pub chunk_size: u64,
    pub min_chunk_size: u64,
    pub landmark: bool,
}

impl Shape {
    pub fn random(dice: &mut Dice) -> Self {
        Self {
            output: *dice.pick(&OUTPUTS),
            chunk_size: *dice.pick(&[500, 4096, 5000, 20_000, 1 << 20]),
            min_chunk_size: *dice.pick(&[0, 3000, 20_000]),
            landmark: dice.one_in(2),
        }
    }
}

#[track_caller]
pub fn blob_of(ops: &[Op], shape: Shape) -> Blob {
    let mut bytes = Vec::new();
    let options = WriterOptions {
        chunk_size: shape.chunk_size,
        min_chunk_size: shape.min_chunk_size,
        ..WriterOptions::new(shape.output)
    };
    let written = {
        let writer = RefCell::new(
            Writer::new(options, |b: &[u8]| {
                bytes.extend_from_slice(b);
                Ok(())
            })
            .unwrap(),
        );
        let (mut count, half) = (0, ops.len() / 2);
        let end = blobs::each(
            &tar_of(ops)[..],
            |entry, header| {
                let mut writer = writer.borrow_mut();
                // Between what belongs to the file before and this one's header.
                if shape.landmark && count == half {
                    let (padding, header) = header.split_at(header.len() % 512);
                    assert!(padding.is_empty() || header.len() % 512 == 0);
                    writer.raw(padding).unwrap();
                    writer.landmark(true).unwrap();
                    writer.entry(entry, header).unwrap();
                } else {
                    writer.entry(entry, header).unwrap();
                }
                count += 1;
            },
            |b| writer.borrow_mut().data(b).unwrap(),
        )
        .unwrap();
        let mut writer = writer.into_inner();
        writer.raw(&end).unwrap();
        writer.finish().unwrap()
    };
    let external = written.external_toc.as_deref();
    let opened =
        blobs::open(bytes.clone(), &written.annotations(Dialect::Containerd), external).unwrap();
    Blob {
        key: LayerKey { blob: Digest::of(&bytes), toc: written.toc_digest },
        about: Description {
            blob_size: bytes.len() as u64,
            codec: shape.output.codec(),
            repository: "registry.test/name".to_owned(),
        },
        records: opened.toc.records().collect(),
        data: data_of(ops, &opened.toc),
        toc: opened.toc,
        bytes,
    }
}

/// The data file of the entries when all of it is there.
pub fn data_of(ops: &[Op], toc: &Toc) -> Vec<u8> {
    let contents: BTreeMap<&[u8], &Rc<[u8]>> = ops
        .iter()
        .filter_map(|op| match &op.thing {
            Thing::File(data) => Some((&op.path[..], data)),
            _ => None,
        })
        .collect();
    let mut data = Vec::new();
    for (id, start) in toc.data_starts() {
        let path = toc.entry(id).path();
        data.resize(start as usize, 0);
        data.extend_from_slice(contents[path]);
    }
    data.resize(data.len().next_multiple_of(4096), 0);
    data
}

/// What unpacking the entries gives.
pub fn model_of(ops: &[Op]) -> Model {
    let mut model = Model::new(Attrs { mode: 0o755, ..Attrs::default() });
    for op in ops {
        model.apply(op, "trusted.overlay.opaque").unwrap();
    }
    model
}

pub fn random_blob(seed: u64, count: usize) -> Blob {
    let mut dice = Dice::new(seed);
    let shape = Shape::random(&mut dice);
    blob_of(&random_ops(seed, count), shape)
}

impl Blob {
    pub fn create(&self, store: &LayerStore) -> Arc<Layer> {
        store.create(self.key, &self.about, &self.toc).unwrap()
    }

    /// The data of a chunk.
    pub fn bytes_of(&self, chunk: &Chunk) -> &[u8] {
        &self.data[chunk.record.data as usize..][..chunk.record.size as usize]
    }

    /// Fetches what is missing of some blocks; returns what was announced.
    pub fn fetch(&self, layer: &Layer, blocks: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut good = layer.verify_blocks(blocks.clone())?.ranges().to_vec();
        let extents: Vec<Extent> = layer.extents(blocks)?.collect::<Result<_>>()?;
        for extent in extents {
            let bytes = &self.bytes[extent.offset as usize..extent.end() as usize];
            for frame in &extent.frames {
                layer.write_frame(frame, extent.bytes_of(frame, bytes), |more| {
                    good.extend_from_slice(more.ranges())
                })?;
            }
        }
        Ok(good)
    }

    /// Compares blocks of the layer's data file with what they should be.
    pub fn check(&self, layer: &Layer, good: &[Range<u64>]) {
        let data = layer.data().unwrap();
        for blocks in good {
            let mut found = vec![1; ((blocks.end - blocks.start) * 4096) as usize];
            data.read_exact_at(&mut found, blocks.start * 4096).unwrap();
            let want = &self.data[blocks.start as usize * 4096..blocks.end as usize * 4096];
            assert!(found == want, "{blocks:?} of layer {}", layer.number());
        }
    }

    /// Checks that whatever the layer says to be good is right; returns it.
    pub fn check_good(&self, layer: &Layer) -> Vec<Range<u64>> {
        let good = layer.good().unwrap();
        self.check(layer, good.ranges());
        good.ranges().to_vec()
    }

    /// Blocks of which every chunk that touches them is among `there`, found the slow way.
    pub fn good_of(&self, there: &BTreeSet<ChunkId>) -> Vec<Range<u64>> {
        let mut bad = vec![false; self.all().end as usize];
        for (n, record) in self.records.iter().enumerate() {
            if !there.contains(&ChunkId(n as u32)) {
                blocks_of(record).for_each(|block| bad[block as usize] = true);
            }
        }
        sorted(self.all().filter(|block| !bad[*block as usize]).map(|b| b..b + 1).collect())
    }

    /// What can be known to be good if these blocks were: a chunk that reaches into others was not
    /// told as a whole.
    pub fn known_by(&self, told: &[Range<u64>]) -> Vec<Range<u64>> {
        let told: BTreeSet<u64> = told.iter().cloned().flatten().collect();
        let chunks = self.records.iter().enumerate();
        let chunks = chunks.filter(|(_, r)| blocks_of(r).all(|block| told.contains(&block)));
        self.good_of(&chunks.map(|(n, _)| ChunkId(n as u32)).collect())
    }

    pub fn all(&self) -> Range<u64> {
        0..self.data.len() as u64 / 4096
    }
}

fn blocks_of(record: &Record) -> Range<u64> {
    record.data / 4096..(record.data + record.size).div_ceil(4096)
}

/// A bit for each block, as the keeper has them.
pub fn map_of(blocks: u64, good: &[Range<u64>]) -> Vec<u8> {
    let mut map = vec![0; blocks.div_ceil(8) as usize];
    for block in good.iter().cloned().flatten() {
        map[block as usize / 8] |= 1 << (block % 8);
    }
    map
}

pub fn sorted(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|r| r.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().filter(|r| !r.is_empty()) {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// A reader that fails after some bytes.
pub struct Cut<'a>(pub &'a [u8]);

impl io::Read for Cut<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            return Err(io::Error::other("the line is dead"));
        }
        io::Read::read(&mut self.0, buffer)
    }
}

/// A small file system in memory, mounted nowhere: it goes with this.
pub struct Tmpfs(OwnedFd);

impl Tmpfs {
    pub fn new(options: &str) -> Self {
        let (key, value) = options.split_once('=').unwrap();
        Self(mounted("tmpfs", &[(key, Some(Path::new(value)))]))
    }

    pub fn root(&self) -> PathBuf {
        root_of(&self.0)
    }
}

/// Mounts a file system nowhere.
#[track_caller]
pub fn mounted(kind: &str, options: &[(&str, Option<&Path>)]) -> OwnedFd {
    assert!(
        rustix::process::geteuid().is_root(),
        "mounts need root: run as root, as `cargo xtask test` does"
    );
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in options {
        match value {
            Some(value) => fsconfig_set_string(context.as_fd(), *key, *value),
            None => fsconfig_set_flag(context.as_fd(), *key),
        }
        .unwrap_or_else(|e| panic!("{kind} {key}: {e}"));
    }
    fsconfig_create(context.as_fd()).unwrap_or_else(|e| panic!("{kind}: {e}"));
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

/// Mounts a layer from its own files.
#[track_caller]
pub fn mount(layer: &Layer) -> OwnedFd {
    layer.meta().unwrap();
    let options =
        [("source", Some(layer.meta_path())), ("device", Some(layer.data_path())), ("ro", None)];
    mounted("erofs", &options.each_ref().map(|(key, value)| (*key, value.as_deref())))
}

pub fn root_of(mount: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}/.", mount.as_raw_fd()).into()
}
