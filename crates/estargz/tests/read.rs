//! Layers that other programs made: stargz-snapshotter's library and containers/storage
//! (`corpus/README.md`).

#![allow(clippy::unwrap_used)]

mod common;

use common::{Opened, corpus, each, open};
use shipway_estargz::{
    Chunk, Codec, Content, DATA_BLOCK, Error, Frames, Kind, Landmark, NO_PREFETCH_LANDMARK,
    PREFETCH_LANDMARK, Record, TOC_DIGEST, Tail, Time,
};
use shipway_oci::Digest;
use std::{collections::BTreeMap, io::Read as _};

const ESTARGZ: [&str; 7] = [
    "estargz.tgz",
    "estargz-dot-chunks.tgz",
    "estargz-up-gnu.tgz",
    "estargz-slash-ustar.tgz",
    "estargz-packed.tgz",
    "estargz-prioritized.tgz",
    "estargz-lossless.tgz",
];
const ZSTD: [&str; 2] = ["zstd-stargz.tzst", "zstd-podman.tzst"];

fn annotations(name: &str) -> BTreeMap<String, String> {
    serde_json::from_slice(&corpus(&format!("{name}.json"))).unwrap()
}

fn opened(name: &str) -> Opened {
    let external = (name == "estargz-external.tgz").then(|| corpus("estargz-external.toc"));
    open(corpus(name), &annotations(name), external.as_deref())
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn all() -> impl Iterator<Item = (&'static str, Opened)> {
    ESTARGZ.into_iter().chain(ZSTD).chain(["estargz-external.tgz"]).map(|name| (name, opened(name)))
}

/// A path as the table has it: the archives have prefixes, which go.
fn kind<'a>(layer: &'a Opened, path: &str) -> Kind<'a> {
    layer.toc.find(path.as_bytes()).unwrap_or_else(|| panic!("no {path}")).kind()
}

#[test]
fn every_attribute_is_read() {
    for (name, layer) in all() {
        let toc = &layer.toc;
        let small = toc.find(b"etc/small").unwrap();
        assert_eq!((small.mode(), small.uid(), small.gid()), (0o644, 1000, 1001), "{name}");
        assert_eq!(small.digest(), Some(Digest::of("hello world\n")), "{name}");
        let nanoseconds = if name.contains("podman") { 123_456_789 } else { 0 };
        assert_eq!(small.mtime(), Time { seconds: 1_700_000_000, nanoseconds }, "{name}");
        assert_eq!(toc.find(b"big").unwrap().mtime(), Time::default(), "{name}");
        assert_eq!(toc.find(b"big").unwrap().mode(), 0o4755, "{name}");
        assert_eq!(toc.find(b"etc/empty").unwrap().digest(), Some(Digest::of("")), "{name}");
        assert!(matches!(kind(&layer, "etc/empty"), Kind::File { size: 0, chunks: [] }), "{name}");
        assert!(matches!(kind(&layer, "etc"), Kind::Directory), "{name}");
        assert_eq!(kind(&layer, "etc/link"), Kind::Symlink { target: b"../big" }, "{name}");
        assert_eq!(kind(&layer, "etc/hard"), Kind::HardLink { target: small.id() }, "{name}");
        assert_eq!(toc.find(b"etc/hard").unwrap().resolved().path(), b"etc/small", "{name}");
        assert_eq!(kind(&layer, "dev/null"), Kind::CharDevice { major: 1, minor: 3 }, "{name}");
        assert_eq!(kind(&layer, "dev/sda"), Kind::BlockDevice { major: 8, minor: 0 }, "{name}");
        assert_eq!(kind(&layer, "dev/fifo"), Kind::Fifo, "{name}");
        assert_eq!(toc.find(b"dev").unwrap().mode(), 0o1777, "{name}");
        assert_eq!(layer.read("no/dir/here").unwrap(), b"implicit", "{name}");
        let implicit: Vec<_> = toc.implicit_directories().collect();
        let mut want: Vec<Vec<u8>> = vec![b"many".to_vec(), b"no".to_vec(), b"no/dir".to_vec()];
        if !name.contains("ustar") {
            assert_eq!(layer.read("naïve \"quoted\"").unwrap(), b"utf-8 and \\ escapes", "{name}");
            let ids = toc.find(b"ids").unwrap();
            assert_eq!((ids.uid(), ids.gid()), (3_000_000, 4_000_000), "{name}");
            want.splice(
                0..0,
                (0..40).map(|n| "long/".repeat(n + 1).trim_end_matches('/').as_bytes().to_vec()),
            );
        }
        assert_eq!(implicit, want, "{name}");
        if !name.contains("gnu") && !name.contains("ustar") {
            let mut xattrs: Vec<_> = toc.find(b"xattr").unwrap().xattrs().collect();
            xattrs.sort();
            assert_eq!(
                xattrs,
                [
                    (&b"security.capability"[..], &b"\x01\0\0\x02\0\0\0\0"[..]),
                    (b"user.a", b"v\0\xff")
                ],
                "{name}"
            );
        }
        // In the order of a tree, parents first, each once.
        let tree: Vec<_> =
            toc.tree().map(|node| (node.path.to_vec(), node.entry.is_some())).collect();
        assert_eq!(tree.len(), toc.len() + implicit.len());
        for (at, (path, _)) in tree.iter().enumerate().filter(|(_, (path, _))| path.contains(&b'/'))
        {
            let parent = &path[..path.iter().rposition(|b| *b == b'/').unwrap()];
            assert!(
                tree[..at].iter().any(|(p, _)| p == parent),
                "{name} {}",
                String::from_utf8_lossy(path)
            );
        }
    }
}

#[test]
fn data_is_read_by_chunk_and_by_frame_and_is_what_the_tar_has() {
    for (name, layer) in all() {
        let mut files: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut path = Vec::new();
        let (all, last) = (std::cell::RefCell::new(&mut files), std::cell::RefCell::new(&mut path));
        let frames = Frames::new(layer.layout.codec, &layer.blob[..]).unwrap();
        each(
            std::io::BufReader::new(frames),
            |entry, _| {
                let path = String::from_utf8(entry.path.clone()).unwrap();
                **last.borrow_mut() = path.trim_start_matches(['.', '/']).as_bytes().to_vec();
            },
            |bytes| {
                all.borrow_mut().entry(last.borrow().to_vec()).or_default().extend_from_slice(bytes)
            },
        )
        .unwrap();
        files.remove(&b"stargz.index.json"[..]);
        // The prefix of a landmark's name is its own dot.
        let by_frame: BTreeMap<_, _> = layer
            .read_all()
            .unwrap()
            .into_iter()
            .map(|(p, d)| (String::from_utf8(p).unwrap().trim_start_matches('.').into(), d))
            .collect();
        assert!(
            files == by_frame,
            "{name}: {:?} {:?}",
            files.keys().map(|p| String::from_utf8_lossy(p)).collect::<Vec<_>>(),
            by_frame.len()
        );
        for entry in layer.toc.entries() {
            if let Kind::File { size: 1.., .. } = entry.kind() {
                let path = std::str::from_utf8(entry.path()).unwrap();
                assert!(
                    layer.read(path).unwrap() == files[path.trim_start_matches('.').as_bytes()],
                    "{name} {path}"
                );
            }
        }
    }
}

#[test]
fn tar_and_table_of_contents_agree() {
    for (name, layer) in all() {
        assert_eq!(layer.compare(), None, "{name}");
    }
}

#[test]
fn landmarks_and_places_are_found() {
    for (name, layer) in all() {
        let toc = &layer.toc;
        let places = toc.chunks().iter().map(|c| (c.offset, c.inner));
        assert!(places.is_sorted(), "{name}");
        match (name, toc.landmark()) {
            ("estargz-prioritized.tgz", Some(Landmark::Prefetch { end })) => {
                let chunks = |path| match kind(&layer, path) {
                    Kind::File { chunks, .. } => chunks,
                    _ => panic!("{path}"),
                };
                assert!(
                    chunks("big").iter().chain(chunks("etc/small")).all(|chunk| chunk.end <= end)
                );
                assert!(chunks("xattr").iter().all(|chunk| chunk.offset > end));
                assert!(toc.find(b".prefetch.landmark").unwrap().is_landmark());
            }
            ("estargz-lossless.tgz" | "zstd-podman.tzst", None) => {}
            (_, Some(Landmark::NoPrefetch)) => {}
            (_, other) => panic!("{name}: {other:?}"),
        }
    }
    let packed = opened("estargz-packed.tgz");
    assert!(
        packed.toc.frames().any(|frame| frame.len() > 2)
            && packed.toc.chunks().iter().any(|c| c.inner > 0)
    );
    let podman = opened("zstd-podman.tzst");
    assert!(
        podman
            .toc
            .chunks()
            .iter()
            .any(|chunk| chunk.content == Content::Zeros && chunk.size == 300_000)
    );
    // The digest of the tar-split is in the table, its place in the annotations.
    let (place, _) = podman.layout.tar_split.clone().unwrap();
    assert_eq!(
        podman.toc.tar_split(),
        Some(Digest::of(&podman.blob[place.start as usize..place.end as usize]))
    );
    // The footer says the same as the annotations.
    for name in ZSTD {
        let layer = opened(name);
        let Tail::Layout(by_footer) = Tail::read(&layer.blob, layer.blob.len() as u64).unwrap()
        else {
            panic!()
        };
        assert_eq!(by_footer.toc, layer.layout.toc, "{name}");
        assert_eq!(by_footer.codec, Codec::Zstd);
    }
}

#[test]
fn every_byte_has_a_place_on_the_disk() {
    let mut hidden = 0;
    for (name, layer) in all() {
        let records: Vec<_> = layer.toc.records().collect();
        // All but those of files that containers do not see.
        let is_hidden = |chunk: &&Chunk| {
            let path = layer.toc.entry(chunk.file).path();
            path.split(|b| *b == b'/').next_back().unwrap().starts_with(b".wh.")
                || path == PREFETCH_LANDMARK.as_bytes()
                || path == NO_PREFETCH_LANDMARK.as_bytes()
        };
        let chunks: Vec<_> = layer.toc.chunks().iter().filter(|c| !is_hidden(c)).collect();
        hidden += layer.toc.chunks().len() - chunks.len();
        assert_eq!(records.len(), chunks.len(), "{name}");
        let starts: BTreeMap<_, _> = layer.toc.data_starts().collect();
        let mut end = 0;
        for (record, chunk) in records.iter().zip(chunks) {
            assert_eq!(&Record::from_bytes(&record.to_bytes()), record, "{name}");
            assert_eq!(record.data, starts[&chunk.file] + chunk.file_offset, "{name}");
            assert_eq!(
                (record.size, record.offset, u64::from(record.inner)),
                (chunk.size, chunk.offset, chunk.inner),
                "{name}"
            );
            // Files begin at blocks, the nearest that is free; their chunks follow each other.
            let from =
                if chunk.file_offset == 0 { u64::next_multiple_of(end, DATA_BLOCK) } else { end };
            assert_eq!(record.data, from, "{name}");
            end = record.data + record.size;
            match chunk.content {
                Content::Data(digest) => {
                    assert_eq!(
                        (record.digest, u64::from(record.compressed)),
                        (Some(digest), chunk.end - chunk.offset),
                        "{name}"
                    );
                }
                Content::Zeros => {
                    assert_eq!((record.digest, record.compressed), (None, 0), "{name}")
                }
            }
        }
    }
    assert!(hidden > 0, "landmarks");
}

#[test]
fn another_digest_is_refused() {
    for name in ESTARGZ.into_iter().chain(ZSTD) {
        let mut annotations = annotations(name);
        for (key, value) in &mut annotations {
            if key == TOC_DIGEST || key.ends_with("manifest-checksum") {
                *value = Digest::of("another").to_string();
            }
        }
        let refused = open(corpus(name), &annotations, None).map(|_| ());
        assert!(
            matches!(&refused, Err(e @ Error::TocDigest { .. }) if e.is_wrong_bytes()),
            "{name}: {refused:?}"
        );
    }
}

/// Every flipped byte of the blob is noticed by somebody: the footer, the table's digest, a chunk's
/// digest, or the comparison with the tar. Those that nobody notices change nothing.
#[test]
fn flipped_bytes_never_pass() {
    for name in ["estargz-packed.tgz", "estargz-dot-chunks.tgz", "zstd-stargz.tzst"] {
        let (good, notes) = (opened(name), annotations(name));
        let want = good.read_all().unwrap();
        let step = if cfg!(debug_assertions) { 61 } else { 1 };
        for at in (0..good.blob.len()).step_by(step) {
            let mut blob = good.blob.clone();
            blob[at] ^= 0x10;
            let Ok(layer) = open(blob, &notes, None) else { continue };
            for (a, b) in layer.toc.entries().zip(good.toc.entries()) {
                assert_eq!((a.path(), a.mode(), a.mtime()), (b.path(), b.mode(), b.mtime()));
            }
            match layer.read_all() {
                Ok(data) => assert!(data == want, "{name} {at}"),
                Err(e) => assert!(matches!(e, Error::Chunk { .. }), "{name} {at}: {e:?}"),
            }
        }
    }
}

#[test]
fn no_more_is_decompressed_than_a_chunk_needs() {
    let layer = opened("estargz.tgz");
    let Kind::File { chunks: [chunk], .. } = kind(&layer, "etc/small") else { panic!() };
    // What follows in the frame is not looked at: an endless one does no harm.
    let endless = std::io::BufReader::new(layer.frame(chunk).chain(std::io::repeat(0)));
    assert_eq!(layer.toc.read_chunk(Codec::Gzip, chunk, endless).unwrap(), b"hello world\n");
    // One that ends early is named.
    let cut = layer.toc.read_chunk(Codec::Gzip, chunk, &layer.frame(chunk)[..15]).unwrap_err();
    assert_eq!(cut.to_string(), "the data of etc/small at 0: it ends too early");
    let other =
        layer.toc.read_chunk(Codec::Gzip, chunk, &b"this is no gzip at all"[..]).unwrap_err();
    assert!(
        other.to_string().starts_with("the data of etc/small at 0: it cannot be decompressed"),
        "{other}"
    );
    // What the reader below says stays an error of its own.
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
        }
    }
    let failed =
        layer.toc.read_chunk(Codec::Gzip, chunk, std::io::BufReader::new(Broken)).unwrap_err();
    assert!(
        matches!(&failed, Error::Io(e) if e.kind() == std::io::ErrorKind::ConnectionReset),
        "{failed:?}"
    );
}
