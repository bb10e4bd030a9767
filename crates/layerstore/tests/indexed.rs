//! Layers that somebody else made an index of: whose data is right by the digests of spans, and who
//! are found out if they are something else than their index says.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    blob::{Blob, gzip},
    model::Dice,
    *,
};
use shipway_archive::{Member, TarReader};
use shipway_estargz::{Codec, TarEntry};
use shipway_layerstore::{ChunkId, Error, Indexed, Layer, LayerKey, LayerStore, State};
use shipway_oci::{DiffId, Digest};
use shipway_plainlayer::{Scanner, ZtocEntry};
use std::{fs, sync::Arc};

/// An ordinary layer with an index, and what is in it.
struct Ordinary {
    blob: Blob,
    diff_id: DiffId,
    ztoc: Vec<u8>,
    index: Indexed,
}

/// The zTOC of a blob, after `change` had its way with what it says.
#[track_caller]
fn ztoc_with(blob: &[u8], span: u64, change: impl Fn(&mut Vec<ZtocEntry>)) -> Vec<u8> {
    let scanner = Scanner::new(Codec::Gzip, blob).unwrap();
    let mut scanner = scanner.with_checkpoints(span).allow_long_spans();
    let progress = scanner.progress();
    let (mut tar, mut entries) = (TarReader::new(&mut scanner), Vec::new());
    while let Some(member) = tar.next_member().unwrap() {
        let (tar, offset) = (TarEntry::from(&member), progress.read());
        let Member { user, group, records, .. } = member;
        entries.push(ZtocEntry { tar, offset, user, group, records });
    }
    let end = progress.read();
    change(&mut entries);
    scanner.finish().unwrap().ztoc(&entries, end, "test").unwrap()
}

/// A tar of entries in one gzip member or several of them.
#[track_caller]
fn ordinary(seed: u64, count: usize) -> Ordinary {
    let ops = random_ops(seed, count);
    let tar = tar_of(&ops);
    let mut dice = Dice::new(seed * 2 + 1);
    let (level, part) = (dice.below(10) as u32, 1 + dice.below(tar.len()));
    let bytes: Vec<u8> = match seed % 2 {
        0 => gzip(level, &tar),
        _ => tar.chunks(part).flat_map(|part| gzip(level, part)).collect(),
    };
    let ztoc = ztoc_with(&bytes, 20_000, |_| {});
    let diff_id = DiffId(Digest::of(&tar));
    let index = Indexed::read(&ztoc, Digest::of(&bytes), bytes.len() as u64, diff_id).unwrap();
    // The same places as of any other layer with these files.
    let plain = shipway_layerstore::Plain::read(Codec::Gzip, &bytes[..]).unwrap();
    let blob = Blob { data: data_of(&ops, plain.toc()), bytes };
    Ordinary { blob, diff_id, ztoc, index }
}

impl Ordinary {
    /// It in a store of its own.
    fn fresh(&self) -> (tempfile::TempDir, LayerStore, Arc<Layer>) {
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = store.create_indexed(&self.index, "registry.test/name").unwrap();
        (directory, store, layer)
    }

    /// The same blob with another index.
    #[track_caller]
    fn lying(&self, ztoc: &[u8], diff_id: DiffId) -> (tempfile::TempDir, LayerStore, Arc<Layer>) {
        let (blob, size) = (Digest::of(&self.bytes), self.bytes.len() as u64);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let index = Indexed::read(ztoc, blob, size, diff_id).unwrap();
        let layer = store.create_indexed(&index, "registry.test/name").unwrap();
        (directory, store, layer)
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
    for seed in 1..=20 {
        let layer = ordinary(seed, 60);
        let (_directory, _store, stored) = layer.fresh();
        assert!(stored.is_indexed() && stored.is_plain() && !stored.is_sealed());
        assert_eq!(stored.diff_id(), Some(layer.diff_id));
        spans += stored.frames();
        let mut dice = Dice::new(seed + 7);
        for _ in 0..30 {
            let at = dice.next() % layer.all().end.max(1);
            let blocks = at..(at + 1 + dice.next() % 4).min(layer.all().end);
            layer.fetch(&stored, blocks.clone()).unwrap();
            assert!(stored.verify_blocks(blocks.clone()).unwrap().has(&blocks));
            layer.check(&stored);
        }
        layer.fetch(&stored, layer.all()).unwrap();
        assert_eq!(sorted(layer.check(&stored)), sorted(vec![layer.all()]));
    }
    assert!(spans > 80, "{spans}");
}

#[test]
fn what_was_fetched_is_recognized_after_a_restart_and_what_was_damaged_is_not() {
    for seed in 1..=8 {
        let layer = ordinary(seed, 60);
        let (directory, store, stored) = layer.fresh();
        layer.fetch(&stored, layer.all()).unwrap();
        let data = stored.data_path();
        let digests = data.with_file_name("digests");
        drop((stored, store));
        // Of some chunks data is lost, of others what is known of them.
        let mut bytes = fs::read(&data).unwrap();
        let Some(at) = bytes.iter().position(|b| *b != 0) else { continue };
        bytes[at] ^= 1;
        fs::write(&data, bytes).unwrap();
        let mut known = fs::read(&digests).unwrap();
        let len = known.len();
        known[len - 32..].fill(0);
        fs::write(&digests, known).unwrap();
        let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
        let stored = store.find(&layer.index.key()).unwrap();
        drop(stored.verify_blocks(layer.all()).unwrap());
        let missing = (0..stored.chunks()).filter(|n| !stored.is_verified(ChunkId(*n)).unwrap());
        let missing = missing.count();
        assert!((1..=2).contains(&missing), "{missing} of {}", stored.chunks());
        layer.check(&stored);
        assert!(layer.fetch(&stored, layer.all()).unwrap() <= 2);
        assert_eq!(sorted(layer.check(&stored)), sorted(vec![layer.all()]));
    }
}

#[test]
fn wrong_bytes_of_a_span_are_never_stored() {
    for seed in 1..=10 {
        let layer = ordinary(seed, 60);
        let (_directory, _store, stored) = layer.fresh();
        let mut dice = Dice::new(seed);
        let extents: Vec<_> =
            stored.extents(layer.all()).unwrap().collect::<Result<_, _>>().unwrap();
        for frame in extents.iter().flat_map(|extent| &extent.frames) {
            let range = frame.offset as usize..(frame.offset + frame.len) as usize;
            let mut wrong = layer.bytes[range].to_vec();
            let at = dice.below(wrong.len());
            match dice.below(2) {
                0 => wrong[at] ^= 1 << dice.below(8),
                _ => wrong.truncate(at),
            }
            let error = stored.write_frame(frame, &wrong[..], drop).unwrap_err();
            assert!(matches!(error, Error::Span { .. }) && error.is_wrong_bytes(), "{error}");
            // No chunk is believed by itself.
            let refused = stored.write(&frame.chunks[0], &wrong);
            assert!(matches!(refused, Err(Error::Foreign(_))), "{refused:?}");
        }
        assert_eq!((stored.good().unwrap().is_empty(), stored.state()), (true, State::Lazy));
    }
}

#[test]
fn a_blob_that_is_right_makes_an_indexed_layer_whole() {
    for seed in 1..=15 {
        let layer = ordinary(seed, 60);
        layer.makes_whole(&layer.index.key(), layer.fresh(), seed);
    }
}

/// An index that says something else than the tar is found out by the whole blob, whatever of it
/// was read before, and stays known for it.
#[test]
fn an_index_that_lies_is_found_out() {
    let layer = ordinary(4, 80);
    let file = |entries: &[ZtocEntry]| {
        let is_file = |e: &ZtocEntry| matches!(e.tar.kind, shipway_estargz::TarKind::File(2..));
        entries.iter().position(is_file).unwrap()
    };
    type Lie = fn(&mut ZtocEntry);
    let lies: [(Lie, &str); 6] = [
        (|e| e.tar.mode ^= 0o4000, "another mode"),
        (|e| e.tar.uid += 1, "another owner"),
        (|e| e.tar.mtime.seconds += 1, "another time"),
        (|e| e.tar.path.push(b'x'), "another name"),
        (
            |e| e.records.push((b"SCHILY.xattr.user.y".to_vec(), b"z".to_vec())),
            "another set of extended attributes",
        ),
        (
            |e| {
                if let shipway_estargz::TarKind::File(size) = &mut e.tar.kind {
                    *size -= 1;
                }
            },
            "another type, size or target",
        ),
    ];
    for (lie, says) in lies {
        let ztoc = ztoc_with(&layer.bytes, 20_000, |entries| {
            let n = file(entries);
            lie(&mut entries[n]);
        });
        let (directory, store, stored) = layer.lying(&ztoc, layer.diff_id);
        let error = stored.finish_plain(&layer.bytes[..], &mut drop).unwrap_err();
        assert!(
            matches!(&error, Error::Lying { .. }) && error.to_string().contains(says),
            "{error}"
        );
        let number = stored.number();
        drop((stored, store));
        let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
        let stored = store.get(number).unwrap();
        assert!(matches!(stored.state(), State::Lying(why) if why.contains(says)));
        let again = stored.finish_plain(&layer.bytes[..], &mut drop);
        assert!(matches!(again, Err(Error::Lying { .. })), "{again:?}");
    }
    // Entries that are not there, and some that are too many.
    let fewer = ztoc_with(&layer.bytes, 20_000, |entries| drop(entries.pop()));
    let (_directory, _store, stored) = layer.lying(&fewer, layer.diff_id);
    let error = stored.finish_plain(&layer.bytes[..], &mut drop).unwrap_err().to_string();
    assert!(error.contains("is in the tar and not in the index"), "{error}");
    // Another tar than the image's config says.
    let other = DiffId(Digest::of("another tar"));
    let (_directory, _store, stored) = layer.lying(&layer.ztoc, other);
    let error = stored.finish_plain(&layer.bytes[..], &mut drop).unwrap_err().to_string();
    assert!(error.contains(&layer.diff_id.to_string()), "{error}");
    assert_ne!(stored.key(), layer.index.key(), "it harms nobody else");
    assert_eq!(LayerKey::indexed(stored.key().blob, Digest::of(&layer.ztoc), other), stored.key());
}

/// A window that is not what the tar has there gives other contents for right bytes.
#[test]
fn a_window_that_lies_is_found_out() {
    let (mut found, mut damaged) = (0, 0);
    for seed in 1..=12 {
        let layer = ordinary(seed, 60);
        let header = layer.ztoc.len();
        // Windows are most of a zTOC, and no checksum is in it.
        let mut dice = Dice::new(seed * 3);
        let mut ztoc = layer.ztoc.clone();
        for _ in 0..400 {
            let at = dice.below(header);
            let run = (header - at).min(64);
            if ztoc[at..at + run].iter().filter(|b| b.is_ascii_lowercase()).count() < 2 {
                continue;
            }
            ztoc[at] ^= 1;
        }
        let (blob, size) = (Digest::of(&layer.bytes), layer.bytes.len() as u64);
        let Ok(index) = Indexed::read(&ztoc, blob, size, layer.diff_id) else {
            damaged += 1;
            continue;
        };
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let Ok(stored) = store.create_indexed(&index, "registry.test/name") else { continue };
        let read = layer.fetch(&stored, 0..stored.data_blocks());
        assert!(matches!(read, Ok(_) | Err(Error::Lying { .. } | Error::Span { .. })), "{read:?}");
        match stored.finish_plain(&layer.bytes[..], &mut drop) {
            // What no byte refers to.
            Ok(()) => assert_eq!(sorted(layer.check(&stored)), sorted(vec![layer.all()])),
            Err(Error::Lying { .. }) => found += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(found + damaged > 6, "{found} {damaged}");
}

#[test]
fn an_index_of_another_layer_is_refused() {
    let layer = ordinary(2, 20);
    let (blob, size) = (Digest::of(&layer.bytes), layer.bytes.len() as u64);
    for (ztoc, size) in [(&layer.ztoc[..], size + 1), (&layer.ztoc[..100], size), (b"", size)] {
        let refused = Indexed::read(ztoc, blob, size, layer.diff_id);
        assert!(matches!(refused, Err(Error::Plain(_))), "{refused:?}");
    }
}

/// A file of entries or of spans that is damaged is found before anything is made of it.
#[test]
fn damaged_files_are_found() {
    let layer = ordinary(6, 40);
    for file in ["entries", "digests", "spans"] {
        let (directory, store, stored) = layer.fresh();
        let path = stored.data_path().with_file_name(file);
        let number = stored.number();
        drop((stored, store));
        let mut bytes = fs::read(&path).unwrap();
        bytes.pop();
        fs::write(&path, &bytes).unwrap();
        let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
        assert!(store.get(number).is_none(), "{file} is short");
        assert!(matches!(store.damaged()[0].error, Error::Damaged { .. }));
    }
    let (directory, store, stored) = layer.fresh();
    let path = stored.data_path().with_file_name("entries");
    drop((stored, store));
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
    let stored = store.find(&layer.index.key()).unwrap();
    let error = stored.finish_plain(&layer.bytes[..], &mut drop).unwrap_err();
    assert!(matches!(error, Error::Damaged { file: "entries", .. }), "{error}");
    assert_eq!(stored.state(), State::Lazy);
}
