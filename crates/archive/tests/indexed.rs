//! Layers with a table of contents: made of trees, read again by who serves them, the same for any
//! number of threads, and made of other layers.

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use shipway_archive::{
    Compression, CompressionKind, FirstFiles, LayerTree, Packed, ReadFirst, pack, recompress,
    recompress_in_order, retime, tar_of,
};
use shipway_estargz::{
    Annotated, Codec, Dialect, Expected, Kind, Landmark, MAX_CHUNK, Tail, Toc, UNCOMPRESSED_SIZE,
};
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest};
use shipway_testkit::Dice;
use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    num::NonZero,
    os::unix::fs::{MetadataExt as _, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

const KINDS: [CompressionKind; 3] = [
    CompressionKind::Estargz,
    CompressionKind::ZstdChunked(Dialect::Containerd),
    CompressionKind::ZstdChunked(Dialect::Podman),
];

fn plain(kind: CompressionKind) -> Compression {
    Compression { kind, ..Compression::default() }
}

/// Fills `root` with a random tree.
fn grow(dice: &mut Dice, root: &Path) {
    let (mut dirs, mut files) = (vec![PathBuf::new()], Vec::<PathBuf>::new());
    for n in 0..5 + dice.below(60) {
        let dir = dirs[dice.below(dirs.len())].clone();
        let name = match dice.below(5) {
            0 => format!("{n}{}", "n".repeat(dice.below(150))),
            1 => format!("ü \"{n}\"\n"),
            _ => n.to_string(),
        };
        let (path, full) = (dir.join(&name), root.join(&dir).join(&name));
        match dice.below(8) {
            0 | 1 => {
                fs::create_dir(&full).unwrap();
                dirs.push(path);
            }
            2 => symlink("l".repeat(1 + dice.below(200)), &full).unwrap(),
            3 if !files.is_empty() => {
                fs::hard_link(root.join(&files[dice.below(files.len())]), &full).unwrap();
            }
            _ => {
                let size =
                    [0, 1, dice.below(600), dice.below(20_000), dice.below(900_000)][dice.below(5)];
                let data: Vec<u8> = match dice.below(3) {
                    0 => vec![0; size],
                    1 => (0..size).map(|_| dice.below(256) as u8).collect(),
                    _ => (0..size).map(|n| (n / 9) as u8).collect(),
                };
                fs::write(&full, data).unwrap();
                let mode = 0o400 | dice.below(0o7777) as u32;
                fs::set_permissions(&full, fs::Permissions::from_mode(mode)).unwrap();
                files.push(path);
            }
        }
    }
}

fn packed(tree: &LayerTree, compression: Compression, threads: usize) -> (Vec<u8>, Packed) {
    let mut blob = Vec::new();
    let packed = pack(tree, compression, None, NonZero::new(threads), &mut |bytes| {
        blob.extend_from_slice(&bytes);
        Ok(())
    })
    .unwrap();
    (blob, packed)
}

/// Compresses `blob` anew.
fn again(blob: &[u8], from: CompressionKind, to: Compression) -> Result<(Vec<u8>, Packed)> {
    let mut pieces = blob.chunks(100_000).map(Bytes::copy_from_slice);
    let mut out = Vec::new();
    let packed = recompress(&mut || Ok(pieces.next()), from, to, None, &mut |bytes| {
        out.extend_from_slice(&bytes);
        Ok(())
    })?;
    Ok((out, packed))
}

fn decompressed(kind: CompressionKind, blob: &[u8]) -> Vec<u8> {
    again(blob, kind, plain(CompressionKind::Uncompressed)).unwrap().0
}

/// What a snapshotter knows of the layer, from its annotations and its last bytes.
#[track_caller]
fn opened(blob: &[u8], packed: &Packed, codec: Codec) -> Toc {
    let annotations = &packed.indexed.as_ref().unwrap().annotations;
    let annotated = Annotated::read(annotations).unwrap().unwrap();
    let size = blob.len() as u64;
    let layout = annotated.layout(size).unwrap_or_else(|| {
        let Tail::Layout(layout) = Tail::read(blob, size)? else { panic!("no footer") };
        Ok(layout)
    });
    let layout = layout.unwrap();
    assert_eq!(layout.codec, codec);
    let toc = layout.toc_in(blob, size).unwrap();
    let expected =
        Expected { digest: annotated.toc_digest, uncompressed_size: annotated.uncompressed_size };
    Toc::read(toc, &layout, &expected).unwrap()
}

/// The data of all files of the tree, links once.
fn files(tree: &LayerTree) -> BTreeMap<Vec<u8>, (u64, u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    tree.walk(|entry| {
        if entry.kind == shipway_archive::EntryKind::File {
            let path = tree.locate(&entry);
            let found = fs::metadata(&path).unwrap();
            all.insert(entry.path, (found.size(), found.mode() & 0o7777, fs::read(path).unwrap()));
        }
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn any_tree_is_read_back_and_threads_do_not_matter() {
    let mut dice = Dice::new(0x1a7e_55ed);
    for round in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        grow(&mut dice, dir.path());
        let tree = LayerTree::whole(dir.path());
        let hashed = tar_of(&tree).unwrap().tar;
        let gzip = packed(&tree, Compression::default(), 2).0;
        for kind in KINDS {
            let compression = Compression {
                chunk_size: NonZero::new([0, 4096, 100_000][dice.below(3)]),
                min_chunk_size: NonZero::new([0, 0, 50_000][dice.below(3)]),
                level: [None, Some(-1), Some(5)][dice.below(3)],
                ..plain(kind)
            };
            let (blob, found) = packed(&tree, compression, 1);
            for threads in [2, 5] {
                let (other, same) = packed(&tree, compression, threads);
                assert!(other == blob && same == found, "{round} {compression} {threads}");
            }
            // The tar is the one that the layer is known by, and no bytes of it are others.
            assert_eq!(found.tar, hashed, "{compression}");
            assert_eq!((found.digest, found.size), (Digest::of(&blob), blob.len() as u64));
            let tar = decompressed(kind, &blob);
            assert_eq!(found.diff_id().0, Digest::of(&tar), "{compression}");
            assert_eq!(Digest::of(&tar[..hashed.size as usize]), hashed.diff_id.0);
            assert_eq!(found.diff_id() == hashed.diff_id, kind != CompressionKind::Estargz);
            // It does not matter what the layer was before.
            let (other, same) = again(&gzip, CompressionKind::Gzip, compression).unwrap();
            assert!(other == blob && same == found, "{compression}");
            let (other, same) = again(&blob, kind, compression).unwrap();
            assert!(other == blob, "a table of contents takes the place of the one before");
            assert_eq!(same.tar.diff_id, found.diff_id());
            // Readers know it by its descriptor, and get every file.
            let annotations = found.indexed.clone().unwrap().annotations;
            assert_eq!(annotations[UNCOMPRESSED_SIZE], tar.len().to_string());
            let packs = compression.min_chunk_size.is_some();
            if kind == CompressionKind::ZstdChunked(Dialect::Podman) && packs {
                assert_eq!(annotations.len(), 1, "it cannot read packed chunks");
                continue;
            }
            let descriptor = Descriptor { annotations, ..Descriptor::of(kind.media_type(), &blob) };
            assert_eq!(CompressionKind::of(&descriptor), Some(kind));
            let codec = match kind {
                CompressionKind::Estargz => Codec::Gzip,
                _ => Codec::Zstd,
            };
            let toc = opened(&blob, &found, codec);
            let mut read = BTreeMap::new();
            for entry in toc.entries() {
                let Kind::File { size, chunks } = entry.kind() else { continue };
                let mut data = Vec::new();
                for chunk in chunks {
                    assert!(
                        chunk.size <= compression.chunk_size.map_or(MAX_CHUNK, |n| n.get().into())
                    );
                    let frame = &blob[chunk.offset as usize..chunk.end as usize];
                    data.extend(toc.read_chunk(codec, chunk, frame).unwrap());
                }
                read.insert(entry.path().to_vec(), (size, u32::from(entry.mode()), data));
            }
            assert!(read == files(&tree), "{compression}");
        }
    }
}

#[test]
fn what_is_read_first_comes_first_and_nothing_is_lost() {
    let mut dice = Dice::new(0x0bad_cafe);
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        grow(&mut dice, dir.path());
        fs::write(dir.path().join("last"), vec![7; 3_000_000]).unwrap();
        let tree = LayerTree::whole(dir.path());
        let all = files(&tree);
        let names: Vec<&Vec<u8>> = all.keys().collect();
        let some = [b"/last".to_vec(), names[dice.below(names.len())].clone(), b"none".to_vec()];
        let gzip = packed(&tree, Compression::default(), 2).0;
        for paths in [&some[..], &some[2..]] {
            let ordered = |threads| {
                let mut pieces = gzip.chunks(100_000).map(Bytes::copy_from_slice);
                let (spool, mut blob) = (tempfile::tempfile().unwrap(), Vec::new());
                let found = recompress_in_order(
                    &mut || Ok(pieces.next()),
                    CompressionKind::Gzip,
                    plain(kind),
                    ReadFirst { files: FirstFiles::Paths(paths), spool },
                    NonZero::new(threads),
                    &mut |bytes| {
                        blob.extend_from_slice(&bytes);
                        Ok(())
                    },
                );
                (blob, found.unwrap())
            };
            let (blob, found) = ordered(1);
            assert!(ordered(4).0 == blob, "{kind}");
            assert_eq!(found.tar, tar_of(&tree).unwrap().tar, "what was given");
            assert_eq!(found.diff_id().0, Digest::of(decompressed(kind, &blob)));
            let codec = if kind == CompressionKind::Estargz { Codec::Gzip } else { Codec::Zstd };
            let toc = opened(&blob, &found, codec);
            let mut read = BTreeMap::new();
            for entry in toc.entries().filter(|entry| !entry.is_landmark()) {
                let Kind::File { size, chunks } = entry.kind() else { continue };
                let data = chunks.iter().flat_map(|chunk| {
                    let frame = &blob[chunk.offset as usize..chunk.end as usize];
                    toc.read_chunk(codec, chunk, frame).unwrap()
                });
                read.insert(entry.path().to_vec(), (size, u32::from(entry.mode()), data.collect()));
            }
            assert!(read == all, "{kind}");
            match (toc.landmark(), paths.len()) {
                (Some(Landmark::Prefetch { end }), 3) => {
                    let Kind::File { chunks, .. } = toc.find(b"last").unwrap().kind() else {
                        panic!()
                    };
                    let first = toc.chunks().iter().map(|chunk| chunk.offset).min();
                    assert_eq!(first, Some(chunks[0].offset));
                    let is_before = |path: &[u8]| match toc.find(path).unwrap().resolved().kind() {
                        Kind::File { chunks: [chunk, ..], .. } => chunk.offset < end,
                        _ => true,
                    };
                    assert!(is_before(b"last") && is_before(&some[1]), "{end}");
                }
                (Some(Landmark::NoPrefetch), 1) => {}
                other => panic!("{kind} {other:?}"),
            }
        }
    }
}

#[test]
fn a_layer_that_changed_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "one").unwrap();
    let tree = LayerTree::whole(dir.path());
    let tar = tar_of(&tree).unwrap().tar;
    let again =
        |known| pack(&tree, plain(CompressionKind::Estargz), Some(known), None, &mut |_| Ok(()));
    assert_eq!(again(tar.clone()).unwrap().tar, tar);
    fs::write(dir.path().join("f"), "two").unwrap();
    assert!(again(tar).unwrap_err().to_string().contains("not what they were"));
}

#[test]
fn a_sink_that_fails_ends_all_threads_with_its_fault() {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> =
        (0..6_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for n in 0..4 {
        fs::write(dir.path().join(n.to_string()), &data).unwrap();
    }
    for kind in KINDS {
        let mut left = 2;
        let failed = pack(&LayerTree::whole(dir.path()), plain(kind), None, None, &mut |_| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(shipway_fault::Fault::invalid("the disk is full")) }
        });
        assert_eq!(failed.unwrap_err().to_string(), "the disk is full", "{kind}");
    }
}

#[test]
fn names_of_the_format_are_refused_in_a_tree_and_left_out_of_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "f").unwrap();
    let clean = packed(
        &LayerTree::whole(dir.path()),
        plain(CompressionKind::ZstdChunked(Dialect::Podman)),
        1,
    )
    .0;
    // As an eStargz layer that was unpacked by somebody who shows the file.
    fs::write(dir.path().join("stargz.index.json"), "{}").unwrap();
    let tree = LayerTree::whole(dir.path());
    let refused =
        pack(&tree, plain(CompressionKind::Estargz), None, None, &mut |_| Ok(())).unwrap_err();
    assert!(refused.to_string().contains("stargz.index.json"), "{refused}");
    assert!(refused.hints().any(|hint| hint.contains("zstdchunked")));
    let gzip = packed(&tree, Compression::default(), 1).0;
    let (blob, found) =
        again(&gzip, CompressionKind::Gzip, plain(CompressionKind::ZstdChunked(Dialect::Podman)))
            .unwrap();
    assert!(blob == clean, "the file, its padding and its header are gone");
    assert_eq!(found.tar, tar_of(&tree).unwrap().tar, "the tar that was given");
    assert_ne!(found.diff_id(), found.tar.diff_id);
}

#[test]
fn what_the_format_has_no_place_for_is_refused_by_name() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9")), "").unwrap();
    for kind in KINDS {
        let tree = LayerTree::whole(dir.path());
        let refused = pack(&tree, plain(kind), None, None, &mut |_| Ok(())).unwrap_err();
        assert!(refused.to_string().contains("caf"), "{refused}");
        assert!(refused.hints().any(|hint| hint.contains("compression=gzip")), "{refused:?}");
    }
}

#[test]
fn broken_and_endless_headers_are_refused() {
    let kind = CompressionKind::Estargz;
    let tar = |header: &tar::Header, data: &[u8]| [&header.as_bytes()[..], data].concat();
    let mut global = tar::Header::new_ustar();
    global.set_entry_type(tar::EntryType::XGlobalHeader);
    global.set_size(1 << 20);
    global.set_cksum();
    let one = tar(&global, &vec![b'\n'; 1 << 20]);
    let refused = again(&one.repeat(9), CompressionKind::Uncompressed, plain(kind)).unwrap_err();
    assert!(refused.to_string().contains("headers of an entry are too large"), "{refused}");
    // A directory with contents, which are passed over.
    let mut dir = tar::Header::new_ustar();
    dir.set_path("dir/").unwrap();
    dir.set_size(9 << 20);
    dir.set_cksum();
    let refused = again(&tar(&dir, &vec![1; 9 << 20]), CompressionKind::Uncompressed, plain(kind))
        .unwrap_err();
    assert!(refused.to_string().contains("headers of an entry are too large"), "{refused}");
    let cut = tar(&global, &[0; 100]);
    assert!(again(&cut, CompressionKind::Uncompressed, plain(kind)).is_err());
}

#[test]
fn times_are_changed_below_a_table_of_contents() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "f").unwrap();
    let tree = LayerTree::whole(dir.path());
    let gzip = packed(&tree, Compression::default(), 1).0;
    let mut pieces = Some(Bytes::from(gzip)).into_iter();
    let mut blob = Vec::new();
    let compression = plain(CompressionKind::Estargz);
    let found = retime(
        &mut || Ok(pieces.next()),
        CompressionKind::Gzip,
        1000,
        compression,
        None,
        &mut |bytes| {
            blob.extend_from_slice(&bytes);
            Ok(())
        },
    )
    .unwrap();
    let want = packed(&tree.at(Some(1000)), compression, 1);
    assert!(blob == want.0);
    assert_eq!(found.diff_id(), want.1.diff_id());
    let mut tar = String::new();
    flate2::read::MultiGzDecoder::new(&blob[..]).read_to_string(&mut tar).unwrap();
    assert!(tar.contains("1970-01-01T00:16:40Z"), "in the table");
}
