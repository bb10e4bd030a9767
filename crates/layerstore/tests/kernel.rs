//! Layers as the kernel shows them: what containerd would have unpacked. As root, for only root
//! mounts EROFS.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    model::{Attrs, Dice, Is, Model, Thing},
    *,
};
use shipway_erofs::limits;
use shipway_layerstore::{Error, Layer, LayerNumber, LayerStore, Options, Result, Use};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, OsStr},
    fs,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::Path,
};

fn mount(layer: &Layer) -> OwnedFd {
    layer.meta().unwrap();
    let options =
        [("source", Some(layer.meta_path())), ("device", Some(layer.data_path())), ("ro", None)];
    mounted("erofs", &options.each_ref().map(|(key, value)| (*key, value.as_deref())))
}

fn xattrs_of(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|b| *b == 0).filter(|n| !n.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; limits::XATTR_VALUE_BYTES + 1];
        let length =
            rustix::fs::lgetxattr(path, CString::new(name).unwrap(), &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

fn names_in(path: &Path) -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> =
        fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_vec()).collect();
    names.sort();
    names
}

/// Compares everything below `root` with the model; returns how many inodes that were.
#[track_caller]
fn compare(root: &Path, model: &Model) -> usize {
    let links = model.links();
    let mut numbers: HashMap<usize, u64> = HashMap::new();
    let mut stack = vec![(0, root.to_owned())];
    while let Some((inode, path)) = stack.pop() {
        let (attrs, is) = &model.inodes[inode];
        let found = fs::symlink_metadata(&path).unwrap();
        let shown = path.display();
        assert_eq!(*numbers.entry(inode).or_insert(found.ino()), found.ino(), "{shown}");
        let Attrs { mode, uid, gid, mtime, xattrs } = attrs;
        assert_eq!(
            (found.mode() & 0o7777, found.uid(), found.gid(), found.mtime(), found.mtime_nsec()),
            (u32::from(*mode), *uid, *gid, mtime.seconds, mtime.nanoseconds.into()),
            "{shown}"
        );
        assert_eq!(found.nlink(), u64::from(links[&inode]), "{shown}");
        assert_eq!(xattrs_of(&path), *xattrs, "{shown}");
        let kind = found.file_type();
        let is_right = match is {
            Is::Directory(children) => {
                assert!(names_in(&path).iter().eq(children.keys()), "{shown}");
                stack.extend(
                    children
                        .iter()
                        .map(|(name, child)| (*child, path.join(OsStr::from_bytes(name)))),
                );
                kind.is_dir()
            }
            Is::Other(Thing::File(contents)) => {
                assert!(fs::read(&path).unwrap() == contents[..], "contents of {shown}");
                kind.is_file()
            }
            Is::Other(Thing::Symlink(target)) => {
                fs::read_link(&path).unwrap().as_os_str().as_bytes() == target
            }
            Is::Other(Thing::Char(a, b)) => {
                kind.is_char_device() && found.rdev() == rustix::fs::makedev(*a, *b)
            }
            Is::Other(Thing::Block(a, b)) => {
                kind.is_block_device() && found.rdev() == rustix::fs::makedev(*a, *b)
            }
            Is::Other(Thing::Fifo) => kind.is_fifo(),
            Is::Other(Thing::HardLink(_) | Thing::Directory) => unreachable!("not an inode"),
        };
        assert!(is_right, "{shown}");
    }
    numbers.len()
}

#[test]
fn a_mounted_layer_is_what_containerd_would_unpack() {
    let mut inodes = 0;
    for seed in 1..=16 {
        let mut dice = Dice(seed);
        let ops = random_ops(seed, 15 * seed as usize);
        let blob = blob_of(&ops, Shape::random(&mut dice));
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        blob.fetch(&layer, blob.all()).unwrap();
        let mount = mount(&layer);
        inodes += compare(&root_of(&mount), &model_of(&ops));
    }
    assert!(inodes > 1000, "{inodes}");
}

/// As long as the file is mounted directly, nothing of it is taken away, even if the mount is in no
/// name space any more.
#[test]
fn nothing_is_taken_away_under_a_mount() {
    let ops = random_ops(5, 60);
    let blob = blob_of(&ops, Shape::random(&mut Dice(5)));
    let directory = directory();
    let options = Options { max_bytes: Some(1), ..options("boot") };
    let store = LayerStore::open(directory.path(), options).unwrap();
    let layer = blob.create(&store);
    layer.finish(&blob.toc, &blob.bytes[..], &mut drop).unwrap();
    let evict = || {
        // An owner who does not know of its own mount.
        let room = store.make_room(0, &|_| Use::Served).unwrap();
        let evictions: Vec<_> = room.evictions.collect::<Result<_>>().unwrap();
        evictions.into_iter().map(|e| store.punch(e)).collect::<Result<Vec<_>>>()
    };
    let mount = mount(&layer);
    assert!(matches!(evict(), Err(Error::Mounted(LayerNumber(1)))));
    compare(&root_of(&mount), &model_of(&ops));
    drop(layer.verify_blocks(blob.all()).unwrap());
    drop(mount);
    // The kernel takes a mount apart after the last user's call has returned.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match evict() {
            Ok(done) => break assert!(!done.is_empty()),
            Err(Error::Mounted(_)) if std::time::Instant::now() < deadline => {
                drop(layer.verify_blocks(blob.all()).unwrap());
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    }
    blob.check_good(&layer);
    assert!(layer.good().unwrap().is_empty());
}
