//! Layers without a table of contents.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../erofs/tests/common/mounted.rs"]
mod mounted;

use common::{
    blob::{Blob, gzip},
    model::Dice,
    *,
};
use mounted::compare;
use shipway_estargz::{Codec, Record};
use shipway_layerstore::{Error, Layer, LayerKey, LayerStore, Options, Plain, State, Use};
use shipway_oci::{DiffId, Digest};
use shipway_plainlayer::MAX_SPAN;
use std::{fs, sync::Arc};

/// An ordinary layer, and what is in it.
struct Ordinary {
    codec: Codec,
    blob: Blob,
    plain: Plain,
    records: Vec<Record>,
}

/// A tar of entries in one gzip member, several of them, or several zstd frames.
#[track_caller]
fn ordinary(seed: u64, ops: &[model::Op]) -> Ordinary {
    let mut dice = Dice::new(seed * 2 + 1);
    let tar = tar_of(ops);
    let level = dice.below(10) as u32;
    let part = 1 + dice.below(tar.len());
    let (codec, bytes) = match seed % 3 {
        0 => (Codec::Gzip, gzip(level, &tar)),
        1 => (Codec::Gzip, tar.chunks(part).flat_map(|part| gzip(level, part)).collect()),
        _ => {
            let frames = tar.chunks(30_000);
            (Codec::Zstd, frames.flat_map(|p| zstd::bulk::compress(p, 1).unwrap()).collect())
        }
    };
    let bytes: Vec<u8> = bytes;
    let plain = Plain::with_spans_of(20_000, codec, &bytes[..]).unwrap();
    assert_eq!((plain.digest(), plain.diff_id()), (Digest::of(&bytes), DiffId(Digest::of(&tar))));
    let records = plain.toc().records().collect();
    let blob = Blob { data: data_of(ops, plain.toc()), bytes };
    Ordinary { codec, blob, records, plain }
}

impl Ordinary {
    /// It in a store of its own.
    fn fresh(&self) -> (tempfile::TempDir, LayerStore, Arc<Layer>) {
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = self.create(&store);
        (directory, store, layer)
    }

    fn create(&self, store: &LayerStore) -> Arc<Layer> {
        store.create_plain(&self.plain, "registry.test/name").unwrap()
    }

    fn key(&self) -> LayerKey {
        LayerKey::plain(Digest::of(&self.bytes))
    }
}

impl std::ops::Deref for Ordinary {
    type Target = Blob;

    fn deref(&self) -> &Blob {
        &self.blob
    }
}

#[test]
fn blocks_in_any_order_come_from_their_spans() {
    let mut spans = 0;
    for seed in 1..=30 {
        let layer = ordinary(seed, &random_ops(seed, 60));
        let (_directory, _store, stored) = layer.fresh();
        assert!(stored.is_plain());
        assert_eq!((stored.codec(), stored.blob_size()), (layer.codec, layer.bytes.len() as u64));
        spans += stored.frames();
        let mut dice = Dice::new(seed + 7);
        for _ in 0..40 {
            let at = dice.next() % layer.all().end.max(1);
            let blocks = at..(at + 1 + dice.next() % 4).min(layer.all().end);
            layer.fetch(&stored, blocks.clone()).unwrap();
            assert!(stored.verify_blocks(blocks.clone()).unwrap().has(&blocks));
            layer.check(&stored);
        }
        layer.fetch(&stored, layer.all()).unwrap();
        drop(stored.verify_blocks(layer.all()).unwrap());
        assert_eq!(sorted(layer.check(&stored)), sorted(vec![layer.all()]));
    }
    assert!(spans > 120, "{spans}");
}

/// All of a span comes with any file of it, so that it is fetched once.
#[test]
fn a_span_is_fetched_once() {
    for seed in [3, 6, 8] {
        let layer = ordinary(seed, &random_ops(seed, 80));
        let (_directory, _store, stored) = layer.fresh();
        for (n, record) in layer.records.iter().enumerate().filter(|(_, r)| r.digest.is_some()) {
            let block = record.data / 4096;
            layer.fetch(&stored, block..block + 1).unwrap();
            let same = layer.records.iter().enumerate();
            for (other, _) in same.filter(|(_, r)| r.offset == record.offset) {
                let id = shipway_layerstore::ChunkId(other as u32);
                let zeros = layer.records[other].digest.is_none();
                assert!(zeros || stored.is_verified(id).unwrap(), "{other} with {n}");
            }
        }
    }
}

#[test]
fn a_mounted_layer_is_what_unpacking_gives() {
    let mut inodes = 0;
    for seed in 1..=9 {
        let ops = random_ops(seed, 120);
        let layer = ordinary(seed, &ops);
        let (_directory, _store, stored) = layer.fresh();
        layer.fetch(&stored, layer.all()).unwrap();
        drop(stored.verify_blocks(layer.all()).unwrap());
        let mount = mount(&stored);
        inodes += compare(&root_of(&mount), &model_of(&ops));
    }
    assert!(inodes > 500, "{inodes}");
}

#[test]
fn a_blob_that_is_right_makes_a_plain_layer_whole() {
    for seed in 1..=15 {
        let layer = ordinary(seed, &random_ops(seed, 60));
        layer.makes_whole(&layer.key(), layer.fresh(), seed);
    }
}

#[test]
fn wrong_bytes_of_a_span_are_never_stored() {
    for seed in 1..=12 {
        let layer = ordinary(seed, &random_ops(seed, 60));
        let (_directory, _store, stored) = layer.fresh();
        let mut dice = Dice::new(seed);
        let extents: Vec<_> =
            stored.extents(layer.all()).unwrap().collect::<Result<_, _>>().unwrap();
        for frame in extents.iter().flat_map(|extent| &extent.frames) {
            let right = &layer.bytes[frame.offset as usize..(frame.offset + frame.len) as usize];
            let mut wrong = right.to_vec();
            let at = dice.below(wrong.len());
            wrong[at] ^= 1 << dice.below(8);
            // What is behind the contents does not matter.
            if let Err(error) = stored.write_frame(frame, &wrong[..], drop) {
                assert!(error.is_wrong_bytes(), "{error}");
            }
            layer.check(&stored);
            stored.write_frame(frame, right, drop).unwrap();
        }
        drop(stored.verify_blocks(layer.all()).unwrap());
        assert_eq!(sorted(layer.check(&stored)), sorted(vec![layer.all()]));
    }
}

#[test]
fn damaged_spans_are_found_before_anybody_relies_on_them() {
    let layer = ordinary(3, &random_ops(3, 80));
    let (directory, store, stored) = layer.fresh();
    let path = directory.path().join(format!("layers/{}/spans", stored.number()));
    let right = fs::read(&path).unwrap();
    assert!(stored.usage().unwrap().other >= right.len() as u64);
    stored.check_spans().unwrap();
    let mut dice = Dice::new(1);
    let mut held = Some((stored, store));
    for _ in 0..60 {
        drop(held.take());
        let mut wrong = right.clone();
        let at = dice.below(wrong.len());
        wrong[at] ^= 1 << dice.below(8);
        fs::write(&path, &wrong).unwrap();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let stored = store.find(&layer.key()).unwrap();
        assert!(matches!(stored.check_spans(), Err(Error::Damaged { file: "spans", .. })));
        let failed = layer.fetch(&stored, layer.all()).unwrap_err();
        assert!(matches!(failed, Error::Damaged { .. }) && !failed.is_wrong_bytes(), "{failed}");
        held = Some((stored, store));
    }
    // It can be thrown away, and made again.
    let (stored, store) = held.unwrap();
    store.remove(stored.number()).unwrap();
    assert!(store.find(&layer.key()).is_none());
    let again = layer.create(&store);
    layer.fetch(&again, layer.all()).unwrap();
    // One that is short is not even opened.
    let path = directory.path().join(format!("layers/{}/spans", again.number()));
    drop((stored, again, store));
    fs::write(&path, &right[..right.len() - 1]).unwrap();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    assert!(matches!(store.damaged()[0].error, Error::Damaged { file: "spans", .. }));
    assert!(store.find(&layer.key()).is_none());
}

/// What is being made, or was and is not any more.
fn unfinished(directory: &tempfile::TempDir) -> Vec<String> {
    let names = fs::read_dir(directory.path().join("layers")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("new.")).collect()
}

/// Gives up all that can be given up.
fn give_up(store: &LayerStore, of: Use) -> usize {
    let room = store.make_room(0, &|_| of).unwrap();
    for eviction in room.evictions {
        store.punch(eviction.unwrap()).unwrap();
    }
    room.removed.len()
}

fn without_room(boot: &str) -> Options {
    Options { max_bytes: Some(0), ..options(boot) }
}

#[test]
fn what_is_unpacked_once_is_whole_and_can_be_fetched_again() {
    let mut inodes = 0;
    for seed in 1..=15 {
        let ops = random_ops(seed, 80);
        let layer = ordinary(seed, &ops);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let unpacked = store.unpack_with_spans_of(20_000, layer.codec, &layer.bytes[..]).unwrap();
        assert_eq!(unpacked.digest(), Digest::of(&layer.bytes));
        assert_eq!(unpacked.diff_id(), layer.plain.diff_id());
        assert_eq!(unpacked.bytes().next_multiple_of(4096), layer.data.len() as u64);
        assert_eq!(unfinished(&directory).len(), 1);
        let stored = store.create_unpacked(unpacked, "registry.test/name").unwrap();
        assert_eq!(unfinished(&directory), [""; 0]);
        let check = |stored: &Arc<Layer>| {
            assert_eq!(stored.state(), State::Whole);
            assert!(stored.is_plain() && !stored.is_sealed());
            assert_eq!(stored.diff_id(), Some(layer.plain.diff_id()));
            assert_eq!(sorted(layer.check(stored)), sorted(vec![layer.all()]));
            assert!(stored.hold_whole().unwrap().is_some());
        };
        check(&stored);
        inodes += compare(&root_of(&mount(&stored)), &model_of(&ops));
        // Once more, and it is that one.
        let again = store.unpack_with_spans_of(20_000, layer.codec, &layer.bytes[..]).unwrap();
        let again = store.create_unpacked(again, "registry.test/other").unwrap();
        assert_eq!(again.number(), stored.number());
        assert_eq!(stored.repositories().len(), 2);
        assert_eq!(unfinished(&directory), [""; 0]);
        // It is believed after the next boot.
        drop((stored, again, store));
        let store = LayerStore::open(directory.path(), without_room("boot 2")).unwrap();
        let stored = store.find(&layer.key()).unwrap();
        check(&stored);
        // It is lazy as soon as some of it is given up.
        give_up(&store, Use::Served);
        let has_data = layer.records.iter().any(|record| record.digest.is_some());
        assert_eq!(stored.state() == State::Lazy, has_data);
        layer.fetch(&stored, layer.all()).unwrap();
        drop(stored.verify_blocks(layer.all()).unwrap());
        assert_eq!(sorted(layer.check(&stored)), sorted(vec![layer.all()]));
    }
    assert!(inodes > 500, "{inodes}");
}

#[test]
fn what_cannot_be_resumed_is_all_there_or_not_at_all() {
    let mut ops = random_ops(5, 60);
    let large: Vec<u8> = (0..MAX_SPAN as u32 / 4 + 9).flat_map(|n| (n / 7).to_le_bytes()).collect();
    for (path, data) in [("large", &large[..]), ("behind it", b"here")] {
        let (path, attrs) = (path.into(), ops[0].attrs.clone());
        ops.push(model::Op { path, attrs, thing: Thing::File(data.into()) });
    }
    let tar = tar_of(&ops);
    let blob = zstd::bulk::compress(&tar, 1).unwrap();
    assert!(Plain::read(Codec::Zstd, &blob[..]).is_err());
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let unpacked = store.unpack(Codec::Zstd, &blob[..]).unwrap();
    assert_eq!(unpacked.diff_id(), DiffId(Digest::of(&tar)));
    let stored = store.create_unpacked(unpacked, "registry.test/name").unwrap();
    assert!(stored.is_plain() && stored.is_sealed());
    stored.check_spans().unwrap();
    let mounted = mount(&stored);
    compare(&root_of(&mounted), &model_of(&ops));
    assert!(fs::read(root_of(&mounted).join("large")).unwrap() == large);
    drop((mounted, stored, store));
    // Nothing is taken from it as long as somebody has it, for it cannot come back.
    let store = LayerStore::open(directory.path(), without_room("boot 2")).unwrap();
    let key = LayerKey::plain(Digest::of(&blob));
    assert_eq!(give_up(&store, Use::Served), 0);
    let stored = store.find(&key).unwrap();
    assert_eq!(stored.state(), State::Whole);
    compare(&root_of(&mount(&stored)), &model_of(&ops));
    let number = stored.number();
    drop(stored);
    assert_eq!(give_up(&store, Use::Nothing), 1);
    assert!(store.find(&key).is_none());
    // One that is not whole is not there.
    let unpacked = store.unpack(Codec::Zstd, &blob[..]).unwrap();
    let stored = store.create_unpacked(unpacked, "registry.test/name").unwrap();
    assert_ne!(stored.number(), number);
    let whole = directory.path().join(format!("layers/{}/whole", stored.number()));
    drop((stored, store));
    fs::remove_file(whole).unwrap();
    let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
    assert!(matches!(store.damaged()[0].error, Error::Damaged { file: "whole", .. }));
    assert!(store.find(&key).is_none());
}

#[test]
fn what_is_not_unpacked_leaves_nothing() {
    let layer = ordinary(3, &random_ops(3, 80));
    let directory = directory();
    let open = |options| LayerStore::open(directory.path(), options).unwrap();
    let store = open(options("boot"));
    let dead = store.unpack(layer.codec, Cut(&layer.bytes[..layer.bytes.len() / 2]));
    assert!(matches!(dead.err(), Some(Error::Plain(_))));
    assert!(store.unpack(layer.codec, &layer.bytes[..layer.bytes.len() / 2]).is_err());
    drop(store.unpack(layer.codec, &layer.bytes[..]).unwrap());
    // A directory without an entry.
    let mut implicit = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    implicit.append_data(&mut header, "no/entry", &b"x"[..]).unwrap();
    let implicit = gzip(6, &implicit.into_inner().unwrap());
    let unpacked = store.unpack(Codec::Gzip, &implicit[..]).unwrap();
    let refused = store.create_unpacked(unpacked, "registry.test/name").unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused}");
    assert_eq!(unfinished(&directory), [""; 0]);
    assert!(store.layers().is_empty());
    // A kill.
    std::mem::forget(store.unpack(layer.codec, &layer.bytes[..]).unwrap());
    assert_eq!(unfinished(&directory).len(), 1);
    drop(store);
    let store = open(options("boot"));
    assert_eq!(unfinished(&directory), [""; 0]);
    store.empty_trash().unwrap();
    drop(store);
    // A disk that is to stay free ends it, whatever comes out of the blob.
    let store = open(Options { min_free: u64::MAX, ..options("boot") });
    let mut large = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    let noise: Vec<u8> = (0..20u32 << 20).map(|n| (n.wrapping_mul(n) >> 9) as u8).collect();
    header.set_size(noise.len() as u64);
    large.append_data(&mut header, "large", &noise[..]).unwrap();
    let large = gzip(1, &large.into_inner().unwrap());
    assert!(matches!(store.unpack(Codec::Gzip, &large[..]).err(), Some(Error::NoSpace { .. })));
    assert_eq!(unfinished(&directory), [""; 0]);
}

#[test]
fn what_cannot_be_lazy_is_said() {
    // A file whose holes are not stored, as GNU tar's --sparse makes it.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_path("sparse").unwrap();
    header.set_mode(0o644);
    header.set_size(512);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(b"00000010000\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000001000\0");
    gnu.realsize.copy_from_slice(b"00000011000\0");
    header.set_cksum();
    let tar = [header.as_bytes(), &[7; 512][..], &[0; 1024]].concat();
    let refused = Plain::read(Codec::Gzip, &gzip(6, &tar)[..]).unwrap_err();
    assert!(refused.to_string().contains("sparse"), "{refused}");
    // The same name twice.
    let mut twice = tar::Builder::new(Vec::new());
    for _ in 0..2 {
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        twice.append_data(&mut header, "file", &b"x"[..]).unwrap();
    }
    let twice = twice.into_inner().unwrap();
    assert!(Plain::read(Codec::Gzip, &gzip(6, &twice)[..]).is_err());
    // Too much in one frame, and no tar at all.
    let zeros = vec![0; MAX_SPAN as usize + 1];
    let frame = zstd::bulk::compress(&zeros, 1).unwrap();
    let refused = Plain::read(Codec::Zstd, &frame[..]).unwrap_err();
    assert!(refused.to_string().contains("in one piece"), "{refused}");
    assert!(Plain::read(Codec::Gzip, &gzip(6, &[7; 2000])[..]).is_err());
    assert!(Plain::read(Codec::Gzip, &b"not compressed"[..]).is_err());
}
