//! Layers as the kernel shows them: what containerd would have unpacked. As root, for only root
//! mounts EROFS.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../erofs/tests/common/mounted.rs"]
mod mounted;

use common::{model::Dice, *};
use mounted::compare;
use shipway_layerstore::{Error, LayerNumber, LayerStore, Options, Result, Use};

#[test]
fn a_mounted_layer_is_what_containerd_would_unpack() {
    let mut inodes = 0;
    for seed in 1..=16 {
        let mut dice = Dice::new(seed);
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
    let blob = blob_of(&ops, Shape::random(&mut Dice::new(5)));
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
