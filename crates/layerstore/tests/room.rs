//! Room: what is given up, in which order, and what is not.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    model::{Attrs, Dice, Op, Thing},
    *,
};
use shipway_estargz::Output;
use shipway_layerstore::{
    Error, Eviction, Layer, LayerNumber, LayerStore, Options, Result, SEGMENT, State, Use,
};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

const MIB: u64 = 1 << 20;

/// A layer of some files of a mebibyte and one small file each.
fn blob(seed: u64, mebibytes: usize) -> Blob {
    let mut dice = Dice::new(2 * seed + 1);
    let file = |path: String, data: Vec<u8>| Op {
        path: path.into(),
        attrs: Attrs { mode: 0o644, ..Attrs::default() },
        thing: Thing::File(data.into()),
    };
    let ops: Vec<Op> = (0..mebibytes)
        .flat_map(|n| {
            let big = file(format!("{n}"), dice.bytes(1 << 20));
            [big, file(format!("{n}.small"), dice.bytes(300))]
        })
        .collect();
    let shape =
        Shape { output: Output::Estargz, chunk_size: 300_000, min_chunk_size: 0, landmark: false };
    blob_of(&ops, shape)
}

fn store(directory: &Path, max_bytes: u64) -> LayerStore {
    let options = Options { max_bytes: Some(max_bytes), ..options("boot") };
    LayerStore::open(directory, options).unwrap()
}

/// Sets when a layer was used last, which the store reads when it is opened.
fn used(directory: &Path, layer: u32, minutes_ago: u64) {
    let time = SystemTime::now() - Duration::from_secs(60 * minutes_ago);
    let about = directory.join(format!("layers/{layer}/about"));
    File::open(about).unwrap().set_modified(time).unwrap();
}

#[test]
fn layers_that_nobody_uses_go_first_the_oldest_before() {
    let directory = directory();
    let blobs: Vec<Blob> = (1..=5).map(|seed| blob(seed, 1)).collect();
    let open = || store(directory.path(), 6 * MIB);
    let first = open();
    for blob in &blobs {
        blob.fetch(&blob.create(&first), blob.all()).unwrap();
    }
    drop(first);
    for (layer, ago) in [(1, 5), (2, 90), (3, 30), (4, 80), (5, 70)] {
        used(directory.path(), layer, ago);
    }
    let store = open();
    let total = store.total().unwrap();
    assert!((5 * MIB..6 * MIB).contains(&total), "{total}");
    let numbers = || store.layers().iter().map(|l| l.number().0).collect::<Vec<_>>();
    let unused = |_| Use::Nothing;
    assert_eq!(store.make_room(0, &unused).unwrap().removed, []);
    // Room for 2: one has to go, and it is not the one in use, nor the one that somebody has.
    let held = store.get(LayerNumber(4)).unwrap();
    let in_use = |n: LayerNumber| if n.0 == 2 { Use::Mounted } else { Use::Nothing };
    let room = store.make_room(MIB + MIB / 2, &in_use).unwrap();
    assert_eq!(room.removed, [LayerNumber(5)]);
    assert_eq!(room.evictions.count(), 0);
    assert_eq!(store.short_of(MIB + MIB / 2).unwrap(), 0);
    assert_eq!(numbers(), [1, 2, 3, 4]);
    assert_eq!(fs::read_dir(directory.path().join("layers/trash")).unwrap().count(), 0);
    // Using one makes it young.
    store.get(LayerNumber(3)).unwrap().touch();
    let room = store.make_room(5 * MIB, &in_use).unwrap();
    assert_eq!(room.removed, [LayerNumber(1), LayerNumber(3)]);
    drop(room);
    assert_eq!(numbers(), [2, 4]);
    drop(held);
    // There is no more to be had than there is.
    let room = store.make_room(60 * MIB, &unused).unwrap();
    assert_eq!(room.removed, [LayerNumber(2), LayerNumber(4)]);
    drop(room);
    assert!(store.short_of(60 * MIB).unwrap() > 0 && store.layers().is_empty());
}

#[test]
fn times_of_use_outlive_the_process() {
    let directory = directory();
    let blob = blob(1, 1);
    drop(blob.create(&store(directory.path(), MIB)));
    used(directory.path(), 1, 600);
    let first = store(directory.path(), MIB);
    let layer = first.get(LayerNumber(1)).unwrap();
    let before = layer.last_used();
    layer.touch();
    let after = layer.last_used();
    assert!((590 * 60..610 * 60).contains(&(after - before)), "{before} {after}");
    drop((layer, first));
    let again = store(directory.path(), MIB);
    assert_eq!(again.get(LayerNumber(1)).unwrap().last_used(), after);
}

/// What the keeper knows of each layer, as the daemon tells it.
#[derive(Default)]
struct Keeper(BTreeMap<LayerNumber, Vec<Range<u64>>>);

impl Keeper {
    fn have(&mut self, layer: &Layer, good: &[Range<u64>]) {
        let known = self.0.entry(layer.number()).or_default();
        known.extend_from_slice(good);
        *known = sorted(std::mem::take(known));
    }

    fn drop_blocks(&mut self, layer: &Layer, gone: &Range<u64>) {
        let known = self.0.entry(layer.number()).or_default();
        *known = known
            .iter()
            .flat_map(|r| [r.start..r.end.min(gone.start), r.start.max(gone.end)..r.end])
            .filter(|r| r.start < r.end)
            .collect();
    }

    /// Whatever is served is right.
    fn check(&self, layer: &Layer, blob: &Blob) {
        if let Some(known) = self.0.get(&layer.number()) {
            blob.check(layer, known);
        }
    }

    fn evict(&mut self, store: &LayerStore, eviction: Eviction) {
        self.drop_blocks(eviction.layer(), &eviction.blocks());
        store.punch(eviction).unwrap();
    }
}

#[test]
fn pieces_of_served_layers_go_the_one_that_was_used_longest_ago_first() {
    let directory = directory();
    let (a, b) = (blob(1, 12), blob(2, 12));
    let open = || store(directory.path(), 25 * MIB);
    let first = open();
    for blob in [&a, &b] {
        blob.fetch(&blob.create(&first), blob.all()).unwrap();
    }
    drop(first);
    used(directory.path(), 1, 5);
    used(directory.path(), 2, 50);
    let store = open();
    let layers = [store.find(&a.key).unwrap(), store.find(&b.key).unwrap()];
    let mut keeper = Keeper::default();
    for (layer, blob) in layers.iter().zip([&a, &b]) {
        let good = layer.verify_blocks(blob.all()).unwrap();
        keeper.have(layer, good.ranges());
    }
    // A piece in the middle of the older layer is read.
    layers[1].touch_blocks(&(SEGMENT / 4096 + 5..SEGMENT / 4096 + 6));
    let mut evicted = Vec::new();
    let room = store.make_room(8 * MIB, &|_| Use::Served).unwrap();
    assert!(room.removed.is_empty());
    for eviction in room.evictions {
        let eviction = eviction.unwrap();
        let (layer, blocks) = (eviction.layer().clone(), eviction.blocks());
        evicted.push((layer.number().0, blocks.start * 4096 / SEGMENT));
        let before = layer.usage().unwrap().data;
        keeper.evict(&store, eviction);
        let freed = before - layer.usage().unwrap().data;
        assert!(freed + 2 * 4096 >= (blocks.end - blocks.start) * 4096, "{freed} {blocks:?}");
        let blob = [&a, &b][layer.number().0 as usize - 1];
        keeper.check(&layer, blob);
        blob.check_good(&layer);
    }
    assert_eq!(evicted, [(2, 0), (2, 2)], "the rest of layer 2 was used");
    assert_eq!(store.short_of(8 * MIB).unwrap(), 0);
    // What is gone is fetched again, and nothing else.
    let missing: u64 = layers[1].missing(b.all()).unwrap().map(|c| c.unwrap().record.size).sum();
    assert!((7 * MIB..9 * MIB).contains(&missing), "{missing}");
    assert_eq!(layers[0].missing(a.all()).unwrap().count(), 0);
    b.fetch(&layers[1], b.all()).unwrap();
    assert_eq!(b.check_good(&layers[1]), [b.all()]);
}

/// What is fetched again between the plan and the hole stays, and what somebody is about to serve
/// is not given up.
#[test]
fn what_comes_back_meanwhile_stays() {
    for seed in 1..=8 {
        let mut dice = Dice::new(seed);
        let directory = directory();
        let blob = blob(seed, 6);
        let store = store(directory.path(), MIB);
        let layer = blob.create(&store);
        let mut keeper = Keeper::default();
        keeper.have(&layer, &blob.fetch(&layer, blob.all()).unwrap());
        let plan = || -> Vec<Eviction> {
            let room = store.make_room(MIB, &|_| Use::Served).unwrap();
            room.evictions.collect::<Result<_>>().unwrap()
        };
        // Somebody holds a block of the first piece.
        let block = dice.next() % 900;
        let held = layer.verify_blocks(block..block + 1).unwrap();
        assert!(held.has(&(block..block + 1)));
        let evictions = plan();
        assert_eq!(evictions.len(), 1);
        assert!(evictions[0].blocks().start >= 900);
        // A plan that is not carried out costs nothing but time.
        drop((held, evictions));
        let evictions = plan();
        assert_eq!(evictions.len(), 2);
        assert!(layer.good().unwrap().is_empty());
        for eviction in evictions {
            keeper.drop_blocks(&layer, &eviction.blocks());
            // A miss comes for some of it.
            let blocks = eviction.blocks();
            let from = blocks.start + dice.next() % (blocks.end - blocks.start - 100);
            let again = blob.fetch(&layer, from..from + 100).unwrap();
            keeper.have(&layer, &again);
            store.punch(eviction).unwrap();
            assert!(layer.good().unwrap().has(&(from..from + 100)));
            keeper.check(&layer, &blob);
            blob.check_good(&layer);
        }
        assert!(layer.usage().unwrap().data < 2 * MIB);
    }
}

/// Threads that fetch, serve and give up at the same time, with a keeper that is told of all of it:
/// nothing that it serves is ever wrong.
#[test]
fn nothing_wrong_is_served_while_pieces_come_and_go() {
    let directory = directory();
    let blob = blob(3, 9);
    let store = store(directory.path(), 5 * MIB);
    let layer = blob.create(&store);
    let keeper = parking_lot::Mutex::new(Keeper::default());
    std::thread::scope(|scope| {
        for thread in 1..=4u64 {
            let (blob, layer, keeper) = (&blob, &layer, &keeper);
            scope.spawn(move || {
                let mut dice = Dice::new(thread * 77);
                for _ in 0..150 {
                    let from = dice.next() % (blob.all().end - 300);
                    let blocks = from..from + dice.next() % 300;
                    layer.touch_blocks(&blocks);
                    let local = layer.verify_blocks(blocks.clone()).unwrap();
                    keeper.lock().have(layer, local.ranges());
                    drop(local);
                    let extents: Vec<_> =
                        layer.extents(blocks).unwrap().collect::<Result<_>>().unwrap();
                    for extent in extents {
                        let bytes = &blob.bytes[extent.offset as usize..extent.end() as usize];
                        for frame in &extent.frames {
                            let bytes = extent.bytes_of(frame, bytes);
                            let have = |good: shipway_layerstore::Good| {
                                // As late as can be.
                                std::thread::yield_now();
                                keeper.lock().have(layer, good.ranges());
                            };
                            layer.write_frame(frame, bytes, have).unwrap();
                        }
                    }
                }
            });
        }
        let (store, layer, keeper, blob) = (&store, &layer, &keeper, &blob);
        scope.spawn(move || {
            let mut evictions = 0;
            for _ in 0..400 {
                let room = store.make_room(MIB, &|_| Use::Served).unwrap();
                for eviction in room.evictions {
                    let eviction = eviction.unwrap();
                    // Served until it was dropped.
                    keeper.lock().check(layer, blob);
                    keeper.lock().drop_blocks(layer, &eviction.blocks());
                    store.punch(eviction).unwrap();
                    keeper.lock().check(layer, blob);
                    evictions += 1;
                }
                std::thread::yield_now();
            }
            println!("{evictions} evictions");
        });
    });
    keeper.lock().check(&layer, &blob);
    blob.check_good(&layer);
    blob.fetch(&layer, blob.all()).unwrap();
    assert_eq!(blob.check_good(&layer), [blob.all()]);
}

#[test]
fn others_find_some_of_the_disk_free() {
    let small = Tmpfs::new("size=16m");
    let options = Options { min_free: 2 * MIB, ..options("boot") };
    let store = LayerStore::open(small.root(), options).unwrap();
    let blob = blob(5, 8);
    let layer = blob.create(&store);
    blob.fetch(&layer, blob.all()).unwrap();
    assert_eq!(store.short_of(4 * MIB).unwrap(), 0);
    fs::write(small.root().join("other"), vec![1; 5 << 20]).unwrap();
    let short = store.short_of(2 * MIB).unwrap();
    assert!((MIB / 2..3 * MIB / 2).contains(&short), "{short}");
    let room = store.make_room(2 * MIB, &|_| Use::Served).unwrap();
    for eviction in room.evictions {
        store.punch(eviction.unwrap()).unwrap();
    }
    assert_eq!(store.short_of(2 * MIB).unwrap(), 0);
    assert!(layer.usage().unwrap().data > 3 * MIB, "no more than needed");
    blob.check_good(&layer);
}

/// Who reads the file itself cannot be told, so a hole is made only if nobody does.
#[test]
fn whole_layers_are_given_up_when_nobody_has_the_file() {
    let directory = directory();
    let blob = blob(6, 5);
    let first = store(directory.path(), MIB);
    let layer = blob.create(&first);
    layer.finish(&blob.toc, &blob.bytes[..], &mut drop).unwrap();
    // A hold is enough to keep all of it.
    let whole = layer.hold_whole().unwrap().unwrap();
    assert!(whole.has(&blob.all()));
    let evictions = |store: &LayerStore| -> Vec<Eviction> {
        let room = store.make_room(MIB, &|_| Use::Served).unwrap();
        room.evictions.collect::<Result<_>>().unwrap()
    };
    assert!(evictions(&first).is_empty());
    drop(whole);
    // The keeper's copy of the open file is none of somebody else.
    let keepers = layer.data().unwrap();
    let reader = File::open(layer.data_path()).unwrap();
    for eviction in evictions(&first) {
        let refused = first.punch(eviction);
        assert!(matches!(refused, Err(Error::Mounted(LayerNumber(1)))), "{refused:?}");
    }
    assert_eq!(layer.state(), State::Whole);
    assert!(layer.usage().unwrap().data > 4 * MIB);
    // It is still believed after a boot, for nothing is missing.
    drop((layer, first, reader, keepers));
    let options = Options { max_bytes: Some(MIB), ..options("boot 2") };
    let second = LayerStore::open(directory.path(), options).unwrap();
    let layer: Arc<Layer> = second.find(&blob.key).unwrap();
    assert_eq!(blob.check_good(&layer), [blob.all()]);
    let keepers = layer.data().unwrap();
    let all = evictions(&second);
    assert!(!all.is_empty());
    all.into_iter().for_each(|eviction| second.punch(eviction).unwrap());
    assert_eq!(layer.state(), State::Lazy);
    assert!(layer.hold_whole().unwrap().is_none());
    assert!(layer.usage().unwrap().data < MIB);
    drop((layer, second, keepers));
    let third = LayerStore::open(directory.path(), common::options("boot 3")).unwrap();
    let layer = third.find(&blob.key).unwrap();
    assert_eq!(layer.state(), State::Lazy);
    assert!(layer.good().unwrap().is_empty());
    blob.fetch(&layer, blob.all()).unwrap();
    assert_eq!(blob.check_good(&layer), [blob.all()]);
}
