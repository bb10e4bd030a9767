//! Data of layers: what is fetched, stored, believed, and what is not.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    model::{Attrs, Dice, Op, Thing},
    *,
};
use parking_lot::Mutex;
use shipway_estargz::{Landmark, Output};
use shipway_layerstore::{Chunk, ChunkId, Error, JOIN_GAP, Layer, LayerStore, MAX_EXTENT, Result};
use shipway_oci::Digest;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

fn chunks(layer: &Layer) -> Vec<Chunk> {
    layer.chunks_touching(0..layer.data_blocks()).unwrap().collect::<Result<_>>().unwrap()
}

/// Flips a byte of `bytes`.
fn flipped(dice: &mut Dice, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = dice.below(bytes.len());
    bytes[at] ^= 1 << dice.below(8);
    bytes
}

#[test]
fn what_is_fetched_is_good() {
    for seed in 1..=30 {
        let blob = random_blob(seed, 60);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        assert_eq!(layer.data_blocks(), blob.all().end);
        assert_eq!(layer.chunks() as usize, blob.records.len());
        assert!(layer.good().unwrap().is_empty());
        let good = blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(sorted(good), sorted(vec![blob.all()]));
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
        assert_eq!(layer.extents(blob.all()).unwrap().count(), 0);
        assert_eq!(layer.missing(blob.all()).unwrap().count(), 0);
    }
}

/// Chunks in any order: a block is good with the last of its chunks, and only then.
#[test]
fn blocks_are_good_when_all_their_chunks_are() {
    for seed in 1..=20 {
        let mut dice = Dice::new(seed);
        // Chunks much smaller than blocks, and such that cross them.
        let shape = Shape {
            output: *dice.pick(&OUTPUTS),
            chunk_size: *dice.pick(&[300, 1500, 5000]),
            min_chunk_size: 0,
            landmark: false,
        };
        let blob = blob_of(&random_ops(seed, 20), shape);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        let (mut left, mut there, mut told) = (chunks(&layer), BTreeSet::new(), Vec::new());
        while !left.is_empty() {
            let chunk = left.swap_remove(dice.below(left.len()));
            if chunk.record.digest.is_some() {
                // Wrong bytes, and bytes of another length, change nothing.
                let right = blob.bytes_of(&chunk);
                for wrong in [flipped(&mut dice, right), right[1..].to_vec()] {
                    let refused = layer.write(&chunk, &wrong);
                    assert!(
                        matches!(&refused, Err(e @ Error::Digest { .. }) if e.is_wrong_bytes())
                    );
                }
                assert!(layer.verify_local(&chunk).unwrap().is_none());
            }
            there.insert(chunk.id);
            let good = layer.write(&chunk, blob.bytes_of(&chunk)).unwrap();
            assert!(layer.is_verified(chunk.id).unwrap());
            told.extend_from_slice(good.ranges());
            drop(good);
            // A second time changes nothing.
            assert!(layer.write(&chunk, blob.bytes_of(&chunk)).unwrap().is_empty());
            let want = blob.good_of(&there);
            assert_eq!(blob.check_good(&layer), want);
            assert_eq!(sorted(told.clone()), want);
            // Parts of it.
            let (a, b) = (dice.next() % (blob.all().end + 1), dice.next() % (blob.all().end + 1));
            let part = a.min(b)..a.max(b);
            let good = layer.verify_blocks(part.clone()).unwrap();
            let zeros = |id: ChunkId| blob.records[id.0 as usize].digest.is_none();
            let mut also = there.clone();
            also.extend((0..layer.chunks()).map(ChunkId).filter(|id| zeros(*id)));
            let want = blob.good_of(&also);
            let within = |r: &Range<u64>| r.start.max(part.start)..r.end.min(part.end);
            assert_eq!(good.ranges(), sorted(want.iter().map(within).collect()));
            told.extend_from_slice(good.ranges());
            there = (0..layer.chunks())
                .map(ChunkId)
                .filter(|id| layer.is_verified(*id).unwrap())
                .collect();
            told.extend_from_slice(layer.good().unwrap().ranges());
        }
        assert!(layer.good().unwrap().has(&blob.all()));
    }
}

/// Against what a look at all chunks gives.
#[test]
fn extents_are_what_is_missing_joined() {
    let (mut joined, mut apart, mut packed) = (0, 0, 0);
    for seed in 1..=60 {
        let mut dice = Dice::new(seed ^ 0x5555);
        let blob = random_blob(seed, 120);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        let all = chunks(&layer);
        // Some here and there, and sometimes all of the middle.
        let (keep, from) = (1 + dice.below(5), dice.below(all.len()));
        let middle = if dice.one_in(2) { all.len() / 4..all.len() * 3 / 4 } else { 0..0 };
        for (n, chunk) in all.iter().enumerate() {
            if middle.contains(&n) || (n >= from && !dice.one_in(keep)) {
                drop(layer.write(chunk, blob.bytes_of(chunk)).unwrap());
            }
        }
        let (a, b) = (dice.next() % (blob.all().end + 1), dice.next() % (blob.all().end + 1));
        let blocks = a.min(b)..a.max(b);
        let is_missing =
            |chunk: &Chunk| chunk.record.digest.is_some() && !layer.is_verified(chunk.id).unwrap();
        let touches = |chunk: &Chunk| {
            chunk.blocks().start < blocks.end
                && blocks.start < chunk.blocks().end
                && !blocks.is_empty()
        };
        let wanted: Vec<&Chunk> = all.iter().filter(|c| is_missing(c) && touches(c)).collect();
        let missing: Vec<Chunk> =
            layer.missing(blocks.clone()).unwrap().collect::<Result<_>>().unwrap();
        assert!(missing.iter().eq(wanted.iter().copied()));
        let frames: BTreeSet<u64> = wanted.iter().map(|c| c.record.offset).collect();
        // All that is missing in the frames that are fetched, once each, in order.
        let told: Vec<&Chunk> =
            all.iter().filter(|c| is_missing(c) && frames.contains(&c.record.offset)).collect();
        packed += told.len() - wanted.len();
        let extents: Vec<_> =
            layer.extents(blocks.clone()).unwrap().collect::<Result<_>>().unwrap();
        assert!(extents.iter().flat_map(|e| e.chunks()).eq(told.iter().copied()));
        for extent in &extents {
            assert_eq!(extent.offset, extent.frames[0].offset);
            let end = extent.frames.iter().map(|f| f.offset + f.len).max().unwrap();
            assert_eq!(end, extent.end());
            assert!(extent.end() <= blob.bytes.len() as u64);
            assert!(extent.len <= MAX_EXTENT || extent.frames.len() == 1);
            joined += extent.frames.len() - 1;
            for pair in extent.frames.windows(2) {
                assert!(pair[1].offset <= pair[0].offset + pair[0].len + JOIN_GAP);
            }
        }
        for pair in extents.windows(2) {
            assert!(
                pair[1].offset > pair[0].end() + JOIN_GAP
                    || pair[1].frames[0].offset + pair[1].frames[0].len - pair[0].offset
                        > MAX_EXTENT
            );
            apart += 1;
        }
        // They are enough.
        blob.fetch(&layer, blocks.clone()).unwrap();
        assert!(
            layer
                .good()
                .unwrap()
                .ranges()
                .iter()
                .any(|r| blocks.is_empty() || (r.start <= blocks.start && blocks.end <= r.end))
        );
        blob.check_good(&layer);
    }
    assert!(joined > 0 && apart > 0 && packed > 0, "{joined} {apart} {packed}");
}

fn file(path: &str, data: Vec<u8>) -> Op {
    let attrs = Attrs { mode: 0o644, ..Attrs::default() };
    Op { path: path.into(), attrs, thing: Thing::File(data.into()) }
}

fn plain(output: Output) -> Shape {
    Shape { output, chunk_size: 1 << 20, min_chunk_size: 0, landmark: false }
}

#[test]
fn extents_have_a_largest_size() {
    let mut dice = Dice::new(3);
    let ops: Vec<Op> = (0..12).map(|n| file(&n.to_string(), dice.bytes(1 << 20))).collect();
    let blob = blob_of(&ops, plain(Output::Estargz));
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let layer = blob.create(&store);
    let extents: Vec<_> = layer.extents(blob.all()).unwrap().collect::<Result<_>>().unwrap();
    assert_eq!(extents.iter().map(|e| e.frames.len()).collect::<Vec<_>>(), [3, 3, 3, 3]);
}

#[test]
fn zeros_stay_holes() {
    let mut dice = Dice::new(5);
    let mut sparse = vec![0; 3 << 20];
    sparse[2 << 20..].copy_from_slice(&dice.bytes(1 << 20));
    let ops = [file("zeros", vec![0; 5 << 20]), file("sparse", sparse), file("tail", vec![7; 10])];
    for output in OUTPUTS {
        let blob = blob_of(&ops, plain(output));
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(blob.check_good(&layer), [blob.all()]);
        let used = layer.usage().unwrap().data;
        assert!((1 << 20..(1 << 20) + (128 << 10)).contains(&used), "{output:?}: {used}");
        // What was garbage becomes zeros again.
        drop((layer, store));
        let path = directory.path().join("layers/1/data");
        let data = File::options().write(true).open(path).unwrap();
        data.write_all_at(&[1; 9000], 4000).unwrap();
        data.write_all_at(&[1; 100], blob.all().end * 4096 - 100).unwrap();
        let store = LayerStore::open(directory.path(), options("another boot")).unwrap();
        let layer = store.find(&blob.key).unwrap();
        assert!(layer.good().unwrap().is_empty());
        blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(blob.check_good(&layer), [blob.all()]);
    }
}

#[test]
fn landmarks_say_which_blocks_come_first() {
    let ops = random_ops(9, 60);
    let shape = Shape { landmark: true, chunk_size: 5000, ..plain(Output::Estargz) };
    let blob = blob_of(&ops, shape);
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let layer = blob.create(&store);
    let Some(Landmark::Prefetch { end }) = layer.landmark() else { panic!("a landmark") };
    let want = blob.records.iter().filter(|r| r.offset < end);
    let want = want.map(|r| (r.data + r.size).div_ceil(4096)).max().unwrap();
    assert_eq!(layer.blocks_before(end).unwrap(), 0..want);
    assert!(want > 0 && want < blob.all().end);
    assert_eq!(layer.blocks_before(0).unwrap(), 0..0);
    assert_eq!(layer.blocks_before(u64::MAX).unwrap(), blob.all());
    // It is the same after a restart.
    drop((layer, store));
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    assert_eq!(store.find(&blob.key).unwrap().landmark(), Some(Landmark::Prefetch { end }));
}

/// A restart of the process takes over what was told to the keeper; a restart of the machine takes
/// over nothing, and finds on the disk what was claimed.
#[test]
fn after_a_restart_only_what_was_told_is_good() {
    for seed in 1..=20 {
        let mut dice = Dice::new(seed);
        let blob = random_blob(seed, 50);
        let directory = directory();
        let boot = |n: u32| options(&format!("boot {n}"));
        let store = LayerStore::open(directory.path(), boot(1)).unwrap();
        assert!(store.is_first_of_boot());
        let layer = blob.create(&store);
        for chunk in chunks(&layer) {
            if dice.one_in(2) {
                drop(layer.write(&chunk, blob.bytes_of(&chunk)).unwrap());
            }
        }
        let there = blob.check_good(&layer);
        // The keeper knows of some of it.
        let told: Vec<Range<u64>> = there
            .iter()
            .cloned()
            .flatten()
            .filter(|_| !dice.one_in(4))
            .map(|block| block..block + 1)
            .collect();
        let map = map_of(blob.all().end, &told);
        drop((layer, store));
        let store = LayerStore::open(directory.path(), boot(1)).unwrap();
        assert!(!store.is_first_of_boot());
        let layer = store.find(&blob.key).unwrap();
        assert!(layer.good().unwrap().is_empty());
        assert!(layer.restore(&map).unwrap());
        // Blocks whose chunks reach into others that were not told are not good either.
        assert_eq!(blob.check_good(&layer), blob.known_by(&told));
        // A short map is one without bits, and a long one has too many.
        assert!(layer.restore(&[]).unwrap() && layer.restore(&[0; 10_000]).unwrap());
        // What the disk has is found without fetching.
        let good = layer.verify_blocks(blob.all()).unwrap().ranges().to_vec();
        assert!(there.iter().all(|r| good.iter().any(|g| g.start <= r.start && r.end <= g.end)));
        blob.check(&layer, &good);
        drop((layer, store));

        let store = LayerStore::open(directory.path(), boot(2)).unwrap();
        assert!(store.is_first_of_boot());
        let layer = store.find(&blob.key).unwrap();
        assert!(!layer.restore(&map).unwrap());
        assert!(layer.good().unwrap().is_empty());
        // A power cut: claims are on the disk, and some of the data is not.
        let data = layer.data().unwrap();
        let mut lost = BTreeSet::new();
        for chunk in &chunks(&layer) {
            if !dice.one_in(3) {
                continue;
            }
            let damage = match dice.below(2) {
                0 => vec![0; chunk.record.size as usize],
                _ => flipped(&mut dice, blob.bytes_of(chunk)),
            };
            if damage != blob.bytes_of(chunk) {
                data.write_all_at(&damage, chunk.record.data).unwrap();
                lost.insert(chunk.id);
            }
        }
        // Garbage behind the end of a file is visible to who maps it.
        for pair in chunks(&layer).windows(2) {
            let (end, next) = (pair[0].record.data + pair[0].record.size, pair[1].record.data);
            if end < next && dice.one_in(4) {
                data.write_all_at(&[0xaa], next - 1).unwrap();
                lost.insert(pair[0].id);
            }
        }
        for chunk in chunks(&layer) {
            let found = layer.verify_local(&chunk).unwrap();
            if chunk.record.digest.is_some() && lost.contains(&chunk.id) {
                assert!(found.is_none(), "{chunk:?}");
            }
        }
        blob.check_good(&layer);
        blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
    }
}

#[test]
fn many_threads_write_the_same_chunks() {
    let blob = random_blob(77, 40);
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let layer = blob.create(&store);
    let told = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 1..=8 {
            let (blob, layer, told) = (&blob, &layer, &told);
            scope.spawn(move || {
                let mut dice = Dice::new(thread * 7919);
                let mut left = chunks(layer);
                while !left.is_empty() {
                    let chunk = left.swap_remove(dice.below(left.len()));
                    let good = layer.write(&chunk, blob.bytes_of(&chunk)).unwrap();
                    blob.check(layer, good.ranges());
                    told.lock().extend_from_slice(good.ranges());
                }
            });
        }
    });
    assert_eq!(sorted(told.into_inner()), sorted(vec![blob.all()]));
    assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
}

#[test]
fn chunks_of_other_layers_are_refused() {
    let (blob, other) = (random_blob(1, 40), random_blob(2, 80));
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let (layer, other) = (blob.create(&store), other.create(&store));
    for chunk in chunks(&other) {
        let bytes = vec![0; chunk.record.size as usize];
        assert!(matches!(layer.write(&chunk, &bytes), Err(Error::Foreign(_))));
        assert!(matches!(layer.verify_local(&chunk), Err(Error::Foreign(_))));
    }
    assert!(layer.good().unwrap().is_empty());
}

/// A frame that is damaged gives what comes before the damage, and the source's own errors are not
/// taken for damage.
#[test]
fn damaged_frames_are_refused() {
    let (mut refused, mut failed) = (0, 0);
    for seed in 1..=10 {
        let mut dice = Dice::new(seed);
        let blob = random_blob(seed, 40);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        let extents: Vec<_> = layer.extents(blob.all()).unwrap().collect::<Result<_>>().unwrap();
        for frame in extents.iter().flat_map(|e| &e.frames) {
            let bytes = &blob.bytes[frame.offset as usize..][..frame.len as usize];
            let cut = &bytes[..dice.below(bytes.len() / 2)];
            // They may be enough: a frame may go on behind its last chunk.
            let mut is_wrong = |result: Result<()>| match result {
                Ok(()) => true,
                Err(error) => {
                    refused += 1;
                    error.is_wrong_bytes()
                }
            };
            assert!(is_wrong(layer.write_frame(frame, cut, drop)));
            match layer.write_frame(frame, std::io::BufReader::new(Cut(cut)), drop) {
                Err(Error::Io { source, .. }) => {
                    assert_eq!(source.to_string(), "the line is dead");
                    failed += 1;
                }
                other => other.unwrap(),
            }
            // Some bytes count for nothing, such as times in headers of gzip.
            assert!(is_wrong(layer.write_frame(frame, &flipped(&mut dice, bytes)[..], drop)));
            blob.check_good(&layer);
        }
        blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
    }
    assert!(refused > 100 && failed > 100, "{refused} {failed}");
}

/// A full disk fails the write and nothing else.
#[test]
fn a_full_disk_is_an_error_of_the_write() {
    let small = Tmpfs::new("size=600k");
    let mut dice = Dice::new(11);
    let ops: Vec<Op> = (0..20).map(|n| file(&n.to_string(), dice.bytes(50_000))).collect();
    let blob = blob_of(&ops, plain(Output::Estargz));
    let store = LayerStore::open(small.root(), options("boot")).unwrap();
    let layer = blob.create(&store);
    let (mut there, mut full) = (BTreeSet::new(), 0);
    for chunk in chunks(&layer) {
        match layer.write(&chunk, blob.bytes_of(&chunk)) {
            Ok(_) => _ = there.insert(chunk.id),
            Err(Error::NoSpace { .. }) => full += 1,
            Err(error) => panic!("{error}"),
        }
        assert_eq!(blob.check_good(&layer), blob.good_of(&there));
    }
    assert!(full > 5 && there.len() > 5);
    // Neither can another layer be made, and nothing of it stays.
    let another = blob_of(&[file("long", dice.bytes(1000))], plain(Output::Estargz));
    fs::write(small.root().join("filler"), vec![1; 600 << 10]).unwrap_err();
    let refused = store.create(another.key, &another.about, &another.toc);
    assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    assert!(store.find(&another.key).is_none());
    fs::remove_file(small.root().join("filler")).unwrap();
    drop((layer, store));
    let store = LayerStore::open(small.root(), options("boot")).unwrap();
    assert_eq!(store.layers().len(), 1);
    assert_eq!(fs::read_dir(small.root().join("layers/trash")).unwrap().count(), 0);
    let layer = store.find(&blob.key).unwrap();
    assert!(layer.data().unwrap().metadata().unwrap().blocks() > 0);
    drop(layer.verify_blocks(blob.all()).unwrap());
    assert_eq!(blob.check_good(&layer), blob.good_of(&there));
}

/// The digests of pieces are those of what is read, and of nothing else.
#[test]
fn digests_of_pieces_are_those_of_the_contents() {
    const PIECE: usize = 4096;
    let mut dice = Dice::new(11);
    let sizes = [1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 5 * PIECE + 7];
    let mut ops: Vec<Op> =
        sizes.iter().map(|size| file(&size.to_string(), dice.bytes(*size))).collect();
    ops.push(file("empty", Vec::new()));
    ops.push(Op {
        path: b"link".to_vec(),
        attrs: Attrs { mode: 0o644, ..Attrs::default() },
        thing: Thing::HardLink(PIECE.to_string().into_bytes()),
    });
    for output in OUTPUTS {
        let blob = blob_of(&ops, Shape { chunk_size: PIECE as u64, ..plain(output) });
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        let image = std::fs::read(layer.meta_path()).unwrap();
        let reader = shipway_erofs::Reader::open(&image).unwrap();
        let mut inodes = vec![0, u64::MAX, reader.root().0];
        let mut want = vec![None; inodes.len()];
        for op in &ops {
            let root = reader.metadata(reader.root()).unwrap();
            let root = reader.directory(&root).unwrap();
            inodes.push(root.lookup(&op.path).unwrap().unwrap().nid.0);
            let data = match &op.thing {
                Thing::File(data) => data.clone(),
                _ => match &ops[2].thing {
                    Thing::File(data) => data.clone(),
                    _ => unreachable!(),
                },
            };
            let pieces: Vec<Digest> = data.chunks(PIECE).map(Digest::of).collect();
            want.push(Some(pieces).filter(|pieces| !pieces.is_empty()));
        }
        let pieces = |length, most| layer.pieces(&inodes, length, most).unwrap();
        assert_eq!(pieces(PIECE as u64, 100), want);
        assert!(layer.good().unwrap().is_empty(), "nothing was read");
        // Chunks that are not pieces of files say nothing of these.
        for (length, known) in [(8192, 4), (2048, 1), (u64::MAX, 4), (0, 0)] {
            let found = pieces(length, 100);
            assert_eq!(found.iter().flatten().count(), known, "{length}");
        }
        // The bound is on all of them.
        let found = pieces(PIECE as u64, 10);
        assert_eq!(found.iter().flatten().flatten().count(), 10, "{found:?}");
    }
}
