//! Whole blobs, compared with their tables of contents.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    model::{Attrs, Dice, Op, Thing},
    *,
};
use shipway_estargz::Output;
use shipway_layerstore::{Error, Layer, LayerKey, LayerStore, State};
use shipway_oci::Digest;
use std::io::Read;

fn fresh(blob: &Blob) -> (tempfile::TempDir, LayerStore, std::sync::Arc<Layer>) {
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let layer = blob.create(&store);
    (directory, store, layer)
}

/// A reader that gives few bytes at a time.
struct Slowly<'a>(&'a [u8], Dice);

impl Read for Slowly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let some = buffer.len().min(1 + self.1.below(3000));
        self.0.read(&mut buffer[..some])
    }
}

#[test]
fn a_blob_that_is_right_makes_a_layer_whole() {
    for seed in 1..=30 {
        let mut dice = Dice::new(seed);
        let blob = random_blob(seed, 60);
        let (directory, store, layer) = fresh(&blob);
        // Some of it was fetched before.
        let part = dice.next() % (blob.all().end + 1);
        let mut told = blob.fetch(&layer, 0..part).unwrap();
        layer
            .finish(&blob.toc, Slowly(&blob.bytes, dice), &mut |good| {
                blob.check(&layer, good.ranges());
                told.extend_from_slice(good.ranges());
            })
            .unwrap();
        assert_eq!(layer.state(), State::Whole);
        assert_eq!(sorted(told), sorted(vec![blob.all()]));
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
        assert!(layer.hold_whole().unwrap().is_some());
        // It is believed after the next boot.
        drop((layer, store));
        let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
        let layer = store.find(&blob.key).unwrap();
        assert_eq!(layer.state(), State::Whole);
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
        assert!(layer.hold_whole().unwrap().is_some());
    }
}

/// Bytes that are not the blob's say nothing of the layer.
#[test]
fn another_blob_is_no_verdict() {
    for seed in 1..=12 {
        let mut dice = Dice::new(seed);
        let blob = random_blob(seed, 40);
        let (_directory, _store, layer) = fresh(&blob);
        let mut flipped = blob.bytes.clone();
        let at = dice.below(flipped.len());
        flipped[at] ^= 1 << dice.below(8);
        let cut = &blob.bytes[..dice.below(blob.bytes.len())];
        let long = [&blob.bytes[..], b"x"].concat();
        for wrong in [&flipped[..], cut, &long] {
            let refused = layer.finish(&blob.toc, wrong, &mut drop);
            assert!(
                matches!(&refused, Err(e @ Error::Blob { .. }) if e.is_wrong_bytes()),
                "{refused:?}"
            );
            assert_eq!(layer.state(), State::Lazy);
        }
        let dead = layer.finish(&blob.toc, Cut(cut), &mut drop);
        assert!(matches!(&dead, Err(e @ Error::Io { .. }) if !e.is_wrong_bytes()), "{dead:?}");
        // What has no end is not read to it.
        let endless = blob.bytes.chain(std::io::repeat(0));
        assert!(matches!(layer.finish(&blob.toc, endless, &mut drop), Err(Error::Blob { .. })));
        blob.check_good(&layer);
        layer.finish(&blob.toc, &blob.bytes[..], &mut drop).unwrap();
        assert_eq!(layer.state(), State::Whole);
    }
}

/// A layer whose table of contents is that of another tar.
fn lying(tar: &Blob, toc: Blob) -> Blob {
    let key = LayerKey { blob: Digest::of(&tar.bytes), toc: toc.key.toc };
    let about =
        shipway_layerstore::Description { blob_size: tar.bytes.len() as u64, ..tar.about.clone() };
    Blob { key, about, bytes: tar.bytes.clone(), ..toc }
}

#[test]
fn a_table_that_says_something_else_is_a_lie_for_ever() {
    let file = |path: &str, text: &str| Op {
        path: path.into(),
        attrs: Attrs { mode: 0o644, ..Attrs::default() },
        thing: Thing::File(text.as_bytes().into()),
    };
    let mut root = file("b", "same");
    root.attrs.uid = 5;
    for output in OUTPUTS {
        let shape = Shape { output, chunk_size: 4, min_chunk_size: 0, landmark: false };
        let blob = |ops: &[Op]| blob_of(ops, shape);
        let honest = [file("a", "first text"), file("b", "same")];
        for (other, want) in [
            (vec![file("a", "other text"), file("b", "same")], "a at 0"),
            (vec![file("a", "first tex!"), file("b", "same")], "a at 8"),
            (vec![file("a", "first text!"), file("b", "same")], "a has another size"),
            (vec![file("a", "first text"), root.clone()], "b has another owner"),
            (vec![file("a", "first text")], "b is in the table"),
            (vec![file("c", ""), file("a", "first text")], "c is in the tar"),
        ] {
            let blob = lying(&blob(&other), blob(&honest));
            let (directory, store, layer) = fresh(&blob);
            let inodes: Vec<u64> = (0..1000).collect();
            let known =
                |layer: &Layer| layer.pieces(&inodes, 4, 100).unwrap().iter().flatten().count();
            assert!(known(&layer) > 0);
            let Err(Error::Lying { difference, .. }) =
                layer.finish(&blob.toc, &blob.bytes[..], &mut drop)
            else {
                panic!("{want}")
            };
            assert!(difference.contains(want), "{difference}: {want}");
            assert_eq!(layer.state(), State::Lying(difference.clone()));
            // What is good is what the table of contents says: its digests are what was asked for.
            blob.check_good(&layer);
            drop((layer, store));
            let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
            let layer = store.find(&blob.key).unwrap();
            assert_eq!(layer.state(), State::Lying(difference));
            assert_eq!(known(&layer), 0, "nothing is known of it any more");
            let again = layer.finish(&blob.toc, &blob.bytes[..], &mut drop);
            assert!(matches!(again, Err(Error::Lying { .. })));
            assert!(layer.hold_whole().unwrap().is_none());
        }
    }
}

/// A blob that is no tar at all is not what its table says, and neither is half a tar.
#[test]
fn a_tar_that_cannot_be_read_is_a_lie() {
    let mut blob = random_blob(3, 20);
    blob.bytes = match blob.about.codec {
        shipway_estargz::Codec::Gzip => b"no gzip".to_vec(),
        shipway_estargz::Codec::Zstd => b"no zstd".to_vec(),
    };
    blob.key.blob = Digest::of(&blob.bytes);
    blob.about.blob_size = blob.bytes.len() as u64;
    let (_directory, _store, layer) = fresh(&blob);
    let refused = layer.finish(&blob.toc, &blob.bytes[..], &mut drop);
    let Err(Error::Lying { difference, .. }) = refused else { panic!("{refused:?}") };
    assert!(difference.starts_with("it cannot be unpacked"), "{difference}");
}

#[test]
fn the_table_must_be_the_layers_own() {
    let (blob, other) = (random_blob(1, 30), random_blob(2, 30));
    let (_directory, _store, layer) = fresh(&blob);
    let refused = layer.finish(&other.toc, &blob.bytes[..], &mut drop);
    assert!(matches!(refused, Err(Error::Foreign(_))), "{refused:?}");
    assert_eq!(layer.state(), State::Lazy);
}

/// Tars have four ways to leave zeros out; the table counts them.
#[test]
fn sparse_files_of_the_tar_are_filled() {
    let directory = directory();
    let data = directory.path().join("data");
    let sparse = std::fs::File::create(&data).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"begin", 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", 200_000).unwrap();
    for format in ["gnu", "posix"] {
        let output = std::process::Command::new("tar")
            .args(["--create", "--sparse", "--format", format, "--mtime=@5", "--directory"])
            .arg(directory.path())
            .arg("data")
            .output()
            .unwrap();
        assert!(output.status.success());
        // The writer of lazy layers refuses such a tar, so the table is that of the tar without
        // holes, and the blob that of the sparse one.
        let mut content = vec![0; 200_003];
        content[..5].copy_from_slice(b"begin");
        content[200_000..].copy_from_slice(b"end");
        let attrs = Attrs { mode: 0o644, ..Attrs::default() };
        let mut op = Op { path: b"data".to_vec(), attrs, thing: Thing::File(content.into()) };
        op.attrs.mtime.seconds = 5;
        let shape = Shape {
            output: Output::Estargz,
            chunk_size: 50_000,
            min_chunk_size: 0,
            landmark: false,
        };
        let mut blob = blob_of(&[op], shape);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &output.stdout).unwrap();
        blob.bytes = gzip.finish().unwrap();
        blob.key.blob = Digest::of(&blob.bytes);
        blob.about.blob_size = blob.bytes.len() as u64;
        let store = LayerStore::open(directory.path().join(format), options("boot")).unwrap();
        let layer = blob.create(&store);
        layer.finish(&blob.toc, &blob.bytes[..], &mut drop).unwrap();
        assert_eq!(layer.state(), State::Whole, "{format}");
        assert_eq!(blob.check_good(&layer), [blob.all()]);
    }
}
