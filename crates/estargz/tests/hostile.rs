//! Tables of contents that cannot be: each is refused, and the error names the entry. Tables that
//! lie about the tar.

#![allow(clippy::unwrap_used)]

mod common;

use common::{corpus, open, options, write};
use shipway_estargz::{
    Codec, Difference, Error, Expected, Kind, Landmark, Layout, MAX_CHUNK, MAX_DATA, MAX_DEPTH,
    MAX_ENTRIES, MAX_INNER, MAX_MAJOR, MAX_MINOR, MAX_NAME, MAX_PATH, MAX_STRING, MAX_TOC,
    MAX_XATTR, MAX_XATTRS, Mismatch, Output, Problem, Toc, TocDigest,
};
use shipway_oci::Digest;
use std::io::Write as _;

/// Where the data of the blobs that these tables are of ends.
const END: u64 = 1_000_000;

fn read_json(json: &str) -> Result<Toc, Error> {
    let layout = Layout {
        codec: Codec::Zstd,
        payload_end: END,
        toc: None,
        toc_size: Some(json.len() as u64),
        tar_split: None,
    };
    let expected = Expected { digest: TocDigest::Json(Digest::of(json)), uncompressed_size: None };
    Toc::read(&zstd::bulk::compress(json.as_bytes(), 1).unwrap(), &layout, &expected)
}

fn document(entries: &str) -> String {
    format!(r#"{{"version":1,"entries":[{entries}]}}"#)
}

fn read(entries: &str) -> Result<Toc, Error> {
    read_json(&document(entries))
}

/// The problem with these entries, and the position and name of the one it is about.
#[track_caller]
fn problem(entries: &str) -> (usize, String, Problem) {
    match read(entries) {
        Err(Error::Entry { index, name, problem }) => (index, name.to_string(), problem),
        other => panic!("{other:?} of {:.200}", entries),
    }
}

#[track_caller]
fn refused(entries: &str, want: (usize, &str, Problem)) {
    assert_eq!(problem(entries), (want.0, want.1.to_owned(), want.2), "{entries:.200}");
}

fn sha(text: &str) -> String {
    Digest::of(text).to_string()
}

/// A file in one chunk.
fn file(name: &str, size: u64, offset: u64) -> String {
    format!(
        r#"{{"type":"reg","name":"{name}","size":{size},"offset":{offset},"chunkDigest":"{}"}}"#,
        sha(name)
    )
}

/// The first chunk of a file, and another.
fn first(name: &str, size: u64, offset: u64, chunk: u64) -> String {
    format!(
        r#"{{"type":"reg","name":"{name}","size":{size},"offset":{offset},"chunkSize":{chunk},"chunkDigest":"{}"}}"#,
        sha(name)
    )
}

fn next(offset: u64, at: u64, chunk: u64) -> String {
    format!(
        r#"{{"type":"chunk","offset":{offset},"chunkOffset":{at},"chunkSize":{chunk},"chunkDigest":"{}"}}"#,
        sha("x")
    )
}

fn entry(kind: &str, name: &str, more: &str) -> String {
    format!(
        r#"{{"type":"{kind}","name":"{name}"{}{more}}}"#,
        if more.is_empty() { "" } else { "," }
    )
}

#[test]
fn what_is_right_is_read() {
    let all = [
        entry("dir", "./", ""),
        entry("dir", "/d/", ""),
        file("../d/f", 5, 100),
        first("d/g", 9, 200, 5),
        next(300, 5, 0),
        entry("hardlink", "d/h", r#""linkName":"/d/f""#),
        entry("hardlink", "i", r#""linkName":"./d/h""#),
        entry("symlink", "j", r#""linkName":"d""#),
        entry("reg", "empty", ""),
        r#"{"type":"fifo","name":"new","somethingNew":{"a":[1,{"b":null}]},"xattrs":null,"chunkDigest":"","modtime":""}"#.to_owned(),
    ];
    let toc = read(&all.join(",")).unwrap();
    assert_eq!(toc.data_size(), 14);
    assert_eq!(toc.find(b"").map(|root| root.id().index()), Some(0));
    assert_eq!(toc.find(b"i").unwrap().resolved().path(), b"d/f");
    let ends: Vec<_> =
        toc.chunks().iter().map(|c| (c.offset, c.end, c.file_offset, c.size)).collect();
    // The last may be followed by anything; so many bytes are enough for any four.
    let end = 300 + 4 + 1 + 4096 + (128 << 10);
    assert_eq!(ends, [(100, 200, 0, 5), (200, 300, 0, 5), (300, end, 5, 4)]);
    assert!(read_json(r#"{"entries":null,"version":1}"#).unwrap().is_empty());
    assert!(read_json("{\"version\":1}\n").unwrap().is_empty());
}

#[test]
fn documents_of_another_form_are_refused() {
    for json in [
        "",
        "{",
        "[]",
        r#"{"entries":[]}"#,
        r#"{"version":2}"#,
        r#"{"version":1,"version":1}"#,
        r#"{"version":1,"Entries":[]}"#,
        r#"{"version":1,"entries":{}}"#,
        r#"{"version":1,"entries":[],"entries":[]}"#,
        r#"{"version":1} x"#,
        r#"{"version":1}{}"#,
        &document(r#"{"type":"reg","name":"a","name":"b"}"#),
        &document(r#"{"type":"reg","Name":"a"}"#),
        &document(r#"{"type":"socket","name":"a"}"#),
        &document(r#"{"type":"reg","name":1}"#),
        &document(r#"{"type":"reg","name":"a","size":1.5}"#),
        &document(r#"{"type":"reg","name":"a","size":99999999999999999999}"#),
        &document(r#"{"type":"reg","name":"\ud800"}"#),
        &document(r#"{"type":"reg","name":"a","chunkType":"ones"}"#),
        &document(r#"{"type":"reg","name":"a","xattrs":{"user.a":"*"}}"#),
        &document(r#"{"type":"reg","name":"a","xattrs":{"user.a":"","user.a":""}}"#),
        &document("[]"),
    ] {
        let refused = read_json(json);
        assert!(matches!(refused, Err(Error::Syntax(_))), "{json}: {refused:?}");
    }
    // Deep nesting in what nobody knows is passed over without recursion.
    let deep = format!(r#"{{"version":1,"new":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert!(read_json(&deep).unwrap().is_empty());
}

#[test]
fn names_that_cannot_be_are_refused() {
    let long = "n".repeat(MAX_NAME + 1);
    let (index, _, found) = problem(&entry("fifo", &long, ""));
    assert_eq!((index, found), (0, Problem::NameTooLong));
    assert_eq!(problem(&entry("fifo", &"d/".repeat(MAX_DEPTH + 1), "")).2, Problem::NameTooLong);
    assert_eq!(
        problem(&entry("fifo", &"nnnnnnn/".repeat(MAX_PATH / 8 + 1), "")).2,
        Problem::NameTooLong
    );
    assert!(read(&entry("fifo", &"d/".repeat(MAX_DEPTH), "")).is_ok());
    refused(&entry("fifo", r"a\u0000b", ""), (0, r"a\u{0}b", Problem::BadName));
    let two = |a: &str, b: &str| [entry("fifo", a, ""), entry("fifo", b, "")].join(",");
    refused(&two("a", "./a"), (1, "a", Problem::Duplicate));
    refused(&two("x/../a", "/a/"), (1, "a", Problem::Duplicate));
    let root = |kind| entry(kind, "./", "");
    refused(&root("fifo"), (0, "./", Problem::NotADirectory(shown("/"))));
    assert!(read(&root("dir")).is_ok());
    // A directory of its own and one that is another's name.
    refused(&two("a/b", "a"), (0, "a/b", Problem::NotADirectory(shown("a"))));
    refused(
        &[entry("symlink", "a", r#""linkName":"b""#), file("a/b/c", 1, 1)].join(","),
        (1, "a/b/c", Problem::NotADirectory(shown("a"))),
    );
    refused(
        &[entry("fifo", "a/b/c", ""), entry("fifo", "a/b", ""), entry("dir", "a", "")].join(","),
        (0, "a/b/c", Problem::NotADirectory(shown("a/b"))),
    );
    refused(r#"{"name":"a"}"#, (0, "a", Problem::NoType));
}

/// How an error shows a name.
fn shown(name: &str) -> shipway_estargz::Shown {
    let Problem::NotADirectory(shown) =
        problem(&[entry("fifo", name, ""), entry("fifo", &format!("{name}/x"), "")].join(",")).2
    else {
        panic!()
    };
    shown
}

#[test]
fn links_to_nothing_and_in_circles_are_refused() {
    let link = |name: &str, to: &str| entry("hardlink", name, &format!(r#""linkName":"{to}""#));
    for (entries, index, name) in [
        (vec![link("a", "b")], 0, "a"),
        (vec![link("a", "a")], 0, "a"),
        (vec![link("a", "b"), link("b", "a")], 0, "a"),
        (vec![link("a", "b"), entry("fifo", "b", "")], 0, "a"),
        (vec![entry("fifo", "f", ""), link("b", "a"), link("a", "f")], 1, "b"),
        (vec![entry("dir", "d", ""), link("a", "d")], 1, "a"),
        (vec![file("d/f", 1, 1), link("a", "d")], 1, "a"),
        (vec![link("a", "")], 0, "a"),
        // The position counts chunks.
        (vec![first("f", 9, 1, 5), next(2, 5, 0), link("a", "b")], 2, "a"),
    ] {
        let (at, of, found) = problem(&entries.join(","));
        assert!(matches!(found, Problem::LinkTarget(_)), "{entries:?}: {found}");
        assert_eq!((at, &*of), (index, name), "{entries:?}");
    }
    assert_eq!(problem(&link("a", r"b\u0000")).2, Problem::BadName);
    let symlink = |to: &str| entry("symlink", "a", &format!(r#""linkName":"{to}""#));
    assert_eq!(problem(&symlink("")).2, Problem::BadName);
    assert_eq!(problem(&symlink(r"b\u0000")).2, Problem::BadName);
    assert_eq!(problem(&symlink(&"b".repeat(MAX_PATH + 1))).2, Problem::NameTooLong);
    assert!(read(&symlink(&"b".repeat(MAX_PATH))).is_ok());
}

#[test]
fn attributes_that_cannot_be_are_refused() {
    let with = |more: &str| problem(&entry("fifo", "a", more)).2;
    for (more, key) in [
        (r#""size":-1"#, "size"),
        (r#""mode":-1"#, "mode"),
        (r#""uid":-1"#, "uid"),
        (r#""uid":4294967296"#, "owner"),
        (r#""gid":4294967296"#, "group"),
        (r#""offset":-1"#, "offset"),
        (r#""innerOffset":-1"#, "innerOffset"),
    ] {
        assert_eq!(with(more), Problem::Range(key), "{more}");
    }
    assert_eq!(with(r#""modtime":"yesterday""#), Problem::Time);
    let device = |major: u32, minor: u32| {
        read(&entry("char", "a", &format!(r#""devMajor":{major},"devMinor":{minor}"#)))
    };
    assert!(device(MAX_MAJOR, MAX_MINOR).is_ok());
    for (major, minor) in [(MAX_MAJOR + 1, 0), (0, MAX_MINOR + 1)] {
        assert!(matches!(
            device(major, minor),
            Err(Error::Entry { problem: Problem::Range("device"), .. })
        ));
    }
    let xattr = |name: &str, size: usize| {
        use base64::prelude::{BASE64_STANDARD, Engine as _};
        read(&entry(
            "fifo",
            "a",
            &format!(r#""xattrs":{{"{name}":"{}"}}"#, BASE64_STANDARD.encode(vec![b'v'; size])),
        ))
    };
    assert!(xattr("user.a", MAX_XATTR).is_ok());
    let n = "n".repeat(MAX_NAME);
    assert!(xattr(&n, 1).is_ok());
    for (name, size) in
        [("user.a", MAX_XATTR + 1), ("", 1), (&*format!("{n}n"), 1), (r"a\u0000", 1)]
    {
        assert!(
            matches!(xattr(name, size), Err(Error::Entry { problem: Problem::Xattrs, .. })),
            "{name}"
        );
    }
    let many = |n: usize| {
        let all: Vec<_> = (0..n).map(|n| format!(r#""user.{n}":"""#)).collect();
        read(&entry("fifo", "a", &format!(r#""xattrs":{{{}}}"#, all.join(","))))
    };
    assert_eq!(many(MAX_XATTRS).unwrap().find(b"a").unwrap().xattrs().len(), MAX_XATTRS);
    assert!(matches!(many(MAX_XATTRS + 1), Err(Error::Entry { problem: Problem::Xattrs, .. })));
    // A parser holds each text as a whole.
    let text = |n: usize| read_json(&format!(r#"{{"version":1,"new":"{}"}}"#, "t".repeat(n)));
    assert!(text(MAX_STRING).is_ok());
    assert!(matches!(text(MAX_STRING + 1), Err(Error::TooLarge { .. })));
}

#[test]
fn chunks_that_cannot_be_are_refused() {
    let a = |problem| (0, "a", problem);
    let b = |problem| (1, "b", problem);
    let two = |x: String, y: String| [x, y].join(",");
    // Order and place.
    refused(&two(file("a", 5, 200), file("b", 5, 100)), b(Problem::Order));
    refused(&two(file("a", 5, 200), file("b", 5, 200)), b(Problem::Order));
    refused(&file("a", 5, 0), a(Problem::Order));
    refused(&file("a", 5, END), a(Problem::Outside));
    assert!(read(&file("a", 5, END - 1)).is_ok());
    // Sums, gaps, overlaps.
    refused(&first("a", 9, 100, 5), a(Problem::ChunkSum));
    refused(&two(first("a", 9, 100, 5), file("b", 5, 200)), a(Problem::ChunkSum));
    refused(&first("a", 9, 100, 10), a(Problem::ChunkSum));
    for (at, size, found) in [
        (4, 5, Problem::ChunkGap),
        (6, 3, Problem::ChunkGap),
        (0, 4, Problem::ChunkGap),
        (5, 5, Problem::ChunkSum),
        (5, 3, Problem::ChunkSum),
        (5, u64::MAX >> 1, Problem::ChunkSum),
    ] {
        assert_eq!(
            problem(&two(first("a", 9, 100, 5), next(200, at, size))).2,
            found,
            "{at} {size}"
        );
    }
    assert_eq!(problem(&two(file("a", 9, 100), next(200, 5, 4))).2, Problem::StrayChunk);
    assert_eq!(problem(&next(200, 0, 4)).2, Problem::StrayChunk);
    assert_eq!(problem(&two(entry("dir", "d", ""), next(200, 0, 4))).2, Problem::StrayChunk);
    let named = |name: &str| {
        next(200, 5, 4).replace(r#""type":"chunk""#, &format!(r#""type":"chunk","name":"{name}""#))
    };
    assert!(read(&two(first("a", 9, 100, 5), named("./a"))).is_ok());
    assert_eq!(problem(&two(first("a", 9, 100, 5), named("b"))).2, Problem::StrayChunk);
    assert_eq!(
        problem(&first("a", 9, 100, 5).replace(r#""chunkSize""#, r#""chunkOffset":1,"chunkSize""#))
            .2,
        Problem::ChunkGap
    );
    // Packed ones.
    let packed = |name: &str, offset: u64, inner: u64| {
        file(name, 5, offset).replace(r#""size""#, &format!(r#""innerOffset":{inner},"size""#))
    };
    assert!(read(&two(packed("a", 0, 512), packed("b", 0, 517))).is_ok());
    refused(&two(packed("a", 9, 0), packed("b", 9, 4)), b(Problem::Order));
    assert!(read(&packed("a", 9, MAX_INNER)).is_ok());
    assert_eq!(problem(&packed("a", 9, MAX_INNER + 1)).2, Problem::Range("place in a frame"));
    // Sizes.
    assert!(read(&file("a", MAX_CHUNK, 9)).is_ok());
    refused(&file("a", MAX_CHUNK + 1, 9), a(Problem::ChunkTooLarge(MAX_CHUNK + 1)));
    let zeros = |name: &str, size: u64, offset: u64| {
        file(name, size, offset).replace(r#""size""#, r#""chunkType":"zeros","size""#)
    };
    assert_eq!(read(&zeros("a", MAX_DATA, 9)).unwrap().data_size(), MAX_DATA);
    // Holes cost nothing until somebody wants the bytes.
    let hole = read(&zeros("a", MAX_CHUNK + 1, 9)).unwrap();
    let bytes = hole.read_chunk(Codec::Zstd, &hole.chunks()[0], &[][..]);
    assert!(matches!(bytes, Err(Error::TooLarge { limit: MAX_CHUNK, .. })));
    refused(&two(zeros("a", MAX_DATA, 9), file("b", 1, 10)), b(Problem::TooMuchData(MAX_DATA)));
    refused(&zeros("a", i64::MAX as u64, 9), a(Problem::TooMuchData(MAX_DATA)));
    let json = document(&file("a", 600, 9));
    let layout = Layout {
        codec: Codec::Zstd,
        payload_end: END,
        toc: None,
        toc_size: Some(json.len() as u64),
        tar_split: None,
    };
    let declared = |size: u64| {
        let expected =
            Expected { digest: TocDigest::Json(Digest::of(&json)), uncompressed_size: Some(size) };
        Toc::read(&zstd::bulk::compress(json.as_bytes(), 1).unwrap(), &layout, &expected)
    };
    assert!(declared(600).is_ok());
    assert!(matches!(declared(599), Err(Error::Entry { problem: Problem::TooMuchData(599), .. })));
    // Digests.
    let digests = |file: &str, chunk: &str| {
        format!(
            r#"{{"type":"reg","name":"a","size":5,"offset":9,"digest":"{file}","chunkDigest":"{chunk}"}}"#
        )
    };
    assert!(read(&digests(&sha("x"), "")).is_ok());
    assert!(read(&digests("", &sha("x"))).is_ok());
    refused(&digests(&sha("x"), &sha("y")), a(Problem::Digests));
    refused(&digests("", ""), a(Problem::Undigested));
    refused(&digests("", &format!("sha512:{}", "0".repeat(128))), a(Problem::Undigested));
    let undigested = next(200, 5, 4).replace("chunkDigest", "other");
    assert_eq!(problem(&two(first("a", 9, 100, 5), undigested)).2, Problem::Undigested);
    // A short chunk does not make anybody fetch what follows it.
    let far = read(&two(file("a", 1, 100), file("b", 1, 999_999))).unwrap();
    assert_eq!(far.chunks()[0].end, 100 + 1 + 4096 + (128 << 10));
}

#[test]
fn tables_are_limited_and_packed_as_they_should_be() {
    let tar = |name: &str, size: u64, json: &str| {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&[&header[..], json.as_bytes(), &[0; 1024]].concat()).unwrap();
        gzip.finish().unwrap()
    };
    let layout =
        Layout { codec: Codec::Gzip, payload_end: END, toc: None, toc_size: None, tar_split: None };
    let json = document(&file("a", 5, 9));
    let gzip = |packed: &[u8]| {
        let expected =
            Expected { digest: TocDigest::Json(Digest::of(&json)), uncompressed_size: None };
        Toc::read(packed, &layout, &expected)
    };
    let size = json.len() as u64;
    assert!(gzip(&tar("stargz.index.json", size, &json)).is_ok());
    assert!(matches!(gzip(&tar("other.json", size, &json)), Err(Error::Syntax(_))));
    assert!(matches!(
        gzip(&tar("stargz.index.json", MAX_TOC + 1, &json)),
        Err(Error::TooLarge { limit: MAX_TOC, .. })
    ));
    assert!(matches!(
        gzip(&tar("stargz.index.json", size - 1, &json)),
        Err(Error::TocDigest { .. })
    ));
    assert!(matches!(
        gzip(&tar("stargz.index.json", 1 << 20, &json)),
        Err(Error::TocDigest { .. } | Error::Corrupt(_))
    ));
    let packed = tar("stargz.index.json", size, &json);
    assert!(matches!(gzip(&packed[..packed.len() / 2]), Err(Error::Corrupt(_))));
    assert!(matches!(gzip(b"nothing"), Err(Error::Corrupt(_))));
    assert!(matches!(gzip(&[]), Err(Error::Corrupt(_))));
    // Where the layer's own tar has the table, no file may take its name.
    let json = document(&file("stargz.index.json", 5, 9));
    let expected = Expected { digest: TocDigest::Json(Digest::of(&json)), uncompressed_size: None };
    let reserved =
        Toc::read(&tar("stargz.index.json", json.len() as u64, &json), &layout, &expected);
    assert!(
        matches!(reserved, Err(Error::Entry { problem: Problem::Reserved, .. })),
        "{reserved:?}"
    );
    assert!(read(&file("stargz.index.json", 5, 9)).is_ok());
    // zstd: longer than the footer says, endless, compressed digest.
    let json = document("");
    let zstd = |told: u64, bytes: &[u8], digest| {
        let layout = Layout {
            codec: Codec::Zstd,
            payload_end: END,
            toc: None,
            toc_size: Some(told),
            tar_split: None,
        };
        Toc::read(
            &zstd::bulk::compress(bytes, 1).unwrap(),
            &layout,
            &Expected { digest, uncompressed_size: None },
        )
    };
    let size = json.len() as u64;
    let padded = [json.as_bytes(), &vec![b' '; 10 << 20]].concat();
    let by_frame = TocDigest::Compressed(Digest::of(zstd::bulk::compress(&padded, 1).unwrap()));
    assert!(matches!(zstd(size, &padded, by_frame), Err(Error::Syntax(_))));
    assert!(zstd(padded.len() as u64, &padded, by_frame).is_ok());
    assert!(matches!(zstd(size, json.as_bytes(), by_frame), Err(Error::TocDigest { .. })));
}

#[test]
fn entries_are_counted() {
    // Chunks of one byte each, of one file, in one frame.
    let mut json = format!(
        r#"{{"version":1,"entries":[{{"type":"reg","name":"a","size":{MAX_ENTRIES},"offset":1,"chunkSize":1,"chunkType":"zeros"}}"#
    );
    for n in 1..=MAX_ENTRIES {
        use std::fmt::Write as _;
        write!(json, r#",{{"type":"chunk","offset":1,"innerOffset":{n},"chunkOffset":{n},"chunkSize":1,"chunkType":"zeros"}}"#).unwrap();
    }
    json.push_str("]}");
    let refused = read_json(&json);
    let limit = MAX_ENTRIES as u64;
    assert!(
        matches!(refused, Err(Error::TooLarge { size, limit: l, .. }) if l == limit && size == limit + 1),
        "{refused:?}"
    );
}

#[test]
fn landmarks_have_an_order() {
    let prefetch = file(".prefetch.landmark", 1, 100);
    let none = file(".no.prefetch.landmark", 1, 200);
    let below = file("d/.no.prefetch.landmark", 1, 300);
    let landmark = |entries: &[&String]| {
        let entries: Vec<_> = entries.iter().map(|e| e.as_str()).collect();
        read(&entries.join(",")).unwrap().landmark()
    };
    assert_eq!(landmark(&[&prefetch, &below]), Some(Landmark::Prefetch { end: 100 }));
    assert_eq!(landmark(&[&prefetch, &none]), Some(Landmark::NoPrefetch));
    assert_eq!(landmark(&[&below]), None);
    assert_eq!(landmark(&[&entry("dir", ".prefetch.landmark", "")]), None);
}

/// A table that is right in itself, of another tar: each lie is found and named.
#[test]
fn a_table_that_lies_about_the_tar_is_found() {
    let name = "zstd-stargz.tzst";
    let notes = serde_json::from_slice(&corpus(&format!("{name}.json"))).unwrap();
    let honest = open(corpus(name), &notes, None).unwrap();
    let toc = honest.layout.toc_in(&honest.blob, honest.blob.len() as u64).unwrap();
    let json = String::from_utf8(zstd::bulk::decompress(toc, 1 << 20).unwrap()).unwrap();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    type Lie = fn(&mut Vec<serde_json::Value>);
    fn at<'a>(entries: &'a mut [serde_json::Value], name: &str) -> &'a mut serde_json::Value {
        entries.iter_mut().find(|e| e["name"] == name).unwrap()
    }
    let lies: [(&str, Mismatch, Lie); 16] = [
        ("etc/small", Mismatch::Mode, |e| at(e, "etc/small")["mode"] = 0o4644.into()),
        ("etc/small", Mismatch::Owner, |e| at(e, "etc/small")["uid"] = 0.into()),
        ("etc/small", Mismatch::Owner, |e| at(e, "etc/small")["gid"] = 0.into()),
        ("etc/small", Mismatch::Time, |e| {
            at(e, "etc/small")["modtime"] = "2023-11-14T22:13:21Z".into()
        }),
        ("etc/small", Mismatch::Time, |e| {
            at(e, "etc/small")["modtime"] = "2023-11-14T22:13:20.5Z".into()
        }),
        ("xattr", Mismatch::Xattrs, |e| {
            at(e, "xattr")["xattrs"] = serde_json::json!({"user.a": "dgD/"})
        }),
        ("etc/link", Mismatch::Target, |e| at(e, "etc/link")["linkName"] = "../xattr".into()),
        ("etc/hard", Mismatch::Target, |e| at(e, "etc/hard")["linkName"] = "xattr".into()),
        ("dev/null", Mismatch::Device, |e| at(e, "dev/null")["devMinor"] = 5.into()),
        ("dev/null", Mismatch::Kind, |e| at(e, "dev/null")["type"] = "block".into()),
        ("etc/small", Mismatch::Data { file_offset: 0 }, |e| {
            at(e, "etc/small")["chunkDigest"] = sha("other").into();
            at(e, "etc/small")["digest"] = sha("other").into();
        }),
        ("big", Mismatch::Digest, |e| at(e, "big")["digest"] = sha("other").into()),
        ("big", Mismatch::Data { file_offset: 1000 }, |e| {
            let chunk =
                e.iter_mut().find(|e| e["type"] == "chunk" && e["chunkOffset"] == 1000).unwrap();
            chunk["chunkType"] = "zeros".into();
        }),
        ("added", Mismatch::NotInTar, |e| {
            e.push(serde_json::json!({"type": "dir", "name": "added"}))
        }),
        ("etc/empty", Mismatch::NotInToc, |e| e.retain(|e| e["name"] != "etc/empty")),
        ("etc/small", Mismatch::Size, |e| {
            at(e, "etc/small")["size"] = 11.into();
            at(e, "etc/small")["chunkSize"] = 11.into();
        }),
    ];
    for (path, mismatch, lie) in lies {
        let mut value = value.clone();
        lie(value["entries"].as_array_mut().unwrap());
        let json = value.to_string();
        let layout = Layout { toc_size: Some(json.len() as u64), ..honest.layout.clone() };
        let expected =
            Expected { digest: TocDigest::Json(Digest::of(&json)), uncompressed_size: None };
        let toc = Toc::read(&zstd::bulk::compress(json.as_bytes(), 1).unwrap(), &layout, &expected)
            .unwrap();
        let found = common::compare(&toc, Codec::Zstd, &honest.blob)
            .unwrap_or_else(|| panic!("{path} {mismatch:?} is not found"));
        let Difference { path: named, mismatch: what } = &found;
        assert_eq!((named.to_string(), *what), (path.to_owned(), mismatch), "{found}");
    }
}

/// A tar that has an entry twice, and one whose data ends early.
#[test]
fn tars_that_say_something_twice_differ() {
    let mut header = tar_header("a", 5);
    let tar = |parts: &[&[u8]]| [parts.concat(), vec![0; 1024]].concat();
    let data = [&b"hello"[..], &[0; 507]].concat();
    let once = tar(&[&header, &data]);
    let (blob, written) = write(&once, options(Output::ZstdChunked, 100)).unwrap();
    let layer =
        open(blob, &written.annotations(shipway_estargz::Dialect::Containerd), None).unwrap();
    assert!(matches!(layer.toc.find(b"a").unwrap().kind(), Kind::File { size: 5, .. }));
    let compare = |tar: &[u8]| {
        common::compare(&layer.toc, Codec::Zstd, &zstd::bulk::compress(tar, 1).unwrap())
            .map(|d| d.mismatch)
    };
    assert_eq!(compare(&once), None);
    assert_eq!(compare(&tar(&[&header, &data, &header, &data])), Some(Mismatch::Twice));
    assert_eq!(compare(&tar(&[])), Some(Mismatch::NotInTar));
    header[0] = b'b';
    resum(&mut header);
    assert_eq!(compare(&tar(&[&header, &data])), Some(Mismatch::NotInToc));
    // The writer does not write what could not be read.
    let twice = write(
        &tar(&[&tar_header("a", 5), &data, &tar_header("a", 5), &data]),
        options(Output::Estargz, 100),
    );
    assert!(
        matches!(twice, Err(Error::Entry { problem: Problem::Duplicate, .. })),
        "{:?}",
        twice.map(|_| ())
    );
}

fn tar_header(name: &str, size: u64) -> [u8; 512] {
    let mut h = [0; 512];
    h[..name.len()].copy_from_slice(name.as_bytes());
    h[100..108].copy_from_slice(b"0000644\0");
    h[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    h[156] = b'0';
    h[257..265].copy_from_slice(b"ustar\x0000");
    resum(&mut h);
    h
}

fn resum(h: &mut [u8; 512]) {
    h[148..156].fill(b' ');
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
