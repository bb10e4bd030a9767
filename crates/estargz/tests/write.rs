//! Layers that we write: the tar stays as it is, the number of threads does not matter, and what
//! was written is read back the same.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Dice, corpus, each, open, options, write};
use shipway_estargz::{
    Codec, Dialect, Error, Frames, Kind, Landmark, MAX_CHUNK, Order, Output, PODMAN_TAR_SPLIT,
    Problem, TarEntry, TarKind, Time, Writer, WriterOptions, Written,
};
use shipway_oci::Digest;
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io::{self, Read, Write as _},
    num::NonZero,
    process::{Command, Stdio},
};

const OUTPUTS: [Output; 3] = [Output::Estargz, Output::EstargzExternal, Output::ZstdChunked];

fn open_written(blob: Vec<u8>, written: &Written, dialect: Dialect) -> common::Opened {
    open(blob, &written.annotations(dialect), written.external_toc.as_deref()).unwrap()
}

/// A random tree as a tar, with files of up to `largest` bytes.
fn random_tar(dice: &mut Dice, entries: usize, largest: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let (mut dirs, mut others) = (vec![String::new()], Vec::new());
    for n in 0..entries {
        let dir = &dirs[dice.below(dirs.len())];
        let name = match dice.below(6) {
            0 => format!("{dir}{n}-{}", "n".repeat(dice.below(200))),
            1 => format!("{dir}ü {n}\n\"\\"),
            2 => format!("{dir}none/{n}"),
            _ => format!("{dir}{n}"),
        };
        let mut header = tar::Header::new_gnu();
        header.set_mode(dice.below(0o10000) as u32);
        header.set_uid([0, 1000, 3_000_000][dice.below(3)]);
        header.set_gid([0, 1001, u64::from(u32::MAX)][dice.below(3)]);
        header.set_mtime(dice.below(1 << 33) as u64);
        let mut records = Vec::new();
        for n in 0..dice.below(8).saturating_sub(5) {
            records.push((
                format!("SCHILY.xattr.user.{n}"),
                (0..dice.below(300)).map(|_| dice.below(256) as u8).collect(),
            ));
        }
        if dice.below(4) == 0 {
            records.push((
                "mtime".to_owned(),
                format!("{}.{:09}", dice.below(1 << 31), dice.below(1_000_000_000)).into_bytes(),
            ));
        }
        if !records.is_empty() {
            tar.append_pax_extensions(
                records.iter().map(|(k, v): &(String, Vec<u8>)| (k.as_str(), v.as_slice())),
            )
            .unwrap();
        }
        let kind = dice.below(12);
        header.set_size(0);
        match kind {
            0 | 1 => {
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, format!("{name}/"), io::empty()).unwrap();
                dirs.push(format!("{name}/"));
            }
            2 => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, &name, "l".repeat(1 + dice.below(300))).unwrap();
            }
            3 if !others.is_empty() => {
                header.set_entry_type(tar::EntryType::Link);
                let target: &String = &others[dice.below(others.len())];
                tar.append_link(&mut header, &name, target).unwrap();
                others.push(name);
            }
            4 => {
                let kinds = [tar::EntryType::Char, tar::EntryType::Block, tar::EntryType::Fifo];
                header.set_entry_type(kinds[dice.below(3)]);
                header.set_device_major(dice.below(4096) as u32).unwrap();
                header.set_device_minor(dice.below(1 << 20) as u32).unwrap();
                tar.append_data(&mut header, &name, io::empty()).unwrap();
                others.push(name);
            }
            _ => {
                let size = if dice.below(4) == 0 { 0 } else { dice.below(largest) };
                let data: Vec<u8> = match dice.below(3) {
                    0 => vec![0; size],
                    1 => (0..size).map(|_| dice.below(256) as u8).collect(),
                    _ => (0..size).map(|n| (n / 7) as u8).collect(),
                };
                header.set_size(size as u64);
                tar.append_data(&mut header, &name, &data[..]).unwrap();
                others.push(name);
            }
        }
    }
    tar.into_inner().unwrap()
}

#[track_caller]
fn decompressed(codec: Codec, blob: &[u8]) -> Vec<u8> {
    match codec {
        Codec::Zstd => zstd::stream::decode_all(blob).unwrap(),
        Codec::Gzip => {
            let mut gzip = Command::new("gzip")
                .arg("-dc")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let (mut stdin, blob) = (gzip.stdin.take().unwrap(), blob.to_vec());
            let feed = std::thread::spawn(move || stdin.write_all(&blob).unwrap());
            let mut out = Vec::new();
            gzip.stdout.take().unwrap().read_to_end(&mut out).unwrap();
            feed.join().unwrap();
            assert!(gzip.wait().unwrap().success());
            out
        }
    }
}

/// Everything that can be said of a blob made from `tar`.
#[track_caller]
fn check(tar: &[u8], options: &WriterOptions) {
    let threads = |n| WriterOptions { threads: NonZero::new(n).unwrap(), ..options.clone() };
    let (blob, written) = write(tar, threads(1)).unwrap();
    for n in [2, 5] {
        assert!(write(tar, threads(n)).unwrap().0 == blob, "{n} threads, {options:?}");
    }
    // Any tool gives the tar, with nothing but the table after it where the format has that there.
    let unpacked = decompressed(options.output.codec(), &blob);
    assert!(unpacked.starts_with(tar), "{options:?}");
    assert_eq!(
        (Digest::of(&unpacked), unpacked.len() as u64),
        (written.diff_id.0, written.tar_size),
        "{options:?}"
    );
    assert_eq!(unpacked.len() > tar.len(), options.output == Output::Estargz);
    assert_eq!(written.payload.clone().finish(), Digest::of(tar), "{options:?}");
    for dialect in [Dialect::Containerd, Dialect::Podman] {
        if dialect == Dialect::Podman
            && options.output == Output::ZstdChunked
            && options.min_chunk_size > 0
        {
            // containers/storage would look for packed chunks at the wrong place.
            assert!(
                written
                    .annotations(dialect)
                    .keys()
                    .all(|key| key == shipway_estargz::UNCOMPRESSED_SIZE)
            );
            continue;
        }
        let layer = open_written(blob.clone(), &written, dialect);
        assert_eq!(layer.compare(), None, "{options:?}");
        let data = layer.read_all().unwrap();
        let (files, path) =
            (RefCell::new(BTreeMap::<Vec<u8>, Vec<u8>>::new()), RefCell::new(Vec::new()));
        let add = |bytes: &[u8]| {
            files.borrow_mut().entry(path.borrow().clone()).or_default().extend_from_slice(bytes)
        };
        each(
            tar,
            |entry, _| {
                *path.borrow_mut() = entry.path.strip_prefix(b"./").unwrap_or(&entry.path).to_vec()
            },
            add,
        )
        .unwrap();
        assert!(files.into_inner() == data, "{options:?}");
        for chunk in layer.toc.chunks() {
            assert!(chunk.size <= options.chunk_size);
        }
        // A frame has what was asked for, unless it is the last or a file ended the one before it.
        if options.min_chunk_size == 0 {
            assert!(layer.toc.frames().all(|frame| frame.len() == 1));
        }
    }
}

#[test]
fn random_trees_come_back() {
    let (mut dice, time) = Dice::seeded(0x1a7e_55ed);
    let started = std::time::Instant::now();
    for round in 0.. {
        if time.map_or(round >= 4, |time| started.elapsed() >= time) {
            break;
        }
        let entries = 1 + dice.below(60);
        let tar = random_tar(&mut dice, entries, 3000);
        for output in OUTPUTS {
            let chunk_size =
                [1, 100, 512, 1000, 4 << 20][dice.below(5)].max(if entries > 10 { 64 } else { 1 });
            let min_chunk_size = [0, 0, 1000, 5000][dice.below(4)];
            let level = [None, Some(-1), Some(1), Some(9)][dice.below(4)];
            check(&tar, &WriterOptions { min_chunk_size, level, ..options(output, chunk_size) });
        }
    }
}

#[test]
fn what_others_wrote_is_written_again() {
    for name in ["estargz-lossless.tgz", "zstd-podman.tzst"] {
        let codec = if name.ends_with("tgz") { Codec::Gzip } else { Codec::Zstd };
        let mut tar = Vec::new();
        Frames::new(codec, &corpus(name)[..]).unwrap().read_to_end(&mut tar).unwrap();
        // Without the table, which comes after the end of the archive.
        let end = Cell::new(0);
        let add = |n: usize| end.set(end.get() + n);
        each(&tar[..], |_, header| add(header.len()), |bytes| add(bytes.len())).unwrap();
        tar.truncate(end.get().next_multiple_of(512) + 1024);
        for output in OUTPUTS {
            check(&tar, &options(output, 1000));
            check(&tar, &WriterOptions { min_chunk_size: 2000, ..options(output, 4096) });
        }
    }
}

#[test]
fn small_files_are_packed() {
    let tar = random_tar(&mut Dice(77), 80, 500);
    let sizes: Vec<_> = OUTPUTS
        .into_iter()
        .flat_map(|output| {
            [0, 8000].map(|min_chunk_size| {
                write(&tar, WriterOptions { min_chunk_size, ..options(output, 4096) }).unwrap()
            })
        })
        .collect();
    for pair in sizes.chunks(2) {
        assert!(pair[1].0.len() < pair[0].0.len());
        let packed = open_written(pair[1].0.clone(), &pair[1].1, Dialect::Containerd);
        assert!(packed.toc.frames().any(|frame| frame.len() > 3));
    }
}

/// A frame goes on after a chunk with headers, and compressors do not care where the chunk ends.
#[test]
fn long_headers_follow_a_packed_chunk() {
    let mut dice = Dice(77);
    let mut tar = tar::Builder::new(Vec::new());
    let mut file = |name: &str, data: &[u8], attribute: &[u8]| {
        if !attribute.is_empty() {
            tar.append_pax_extensions([("SCHILY.xattr.user.long", attribute)]).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, data).unwrap();
    };
    let long: Vec<u8> = (0..60_000).map(|_| dice.below(256) as u8).collect();
    file("short", b"short", &[]);
    file("empty", b"", &long);
    file("next", &[1; 5000], &[]);
    let tar = tar.into_inner().unwrap();
    for output in OUTPUTS {
        let packed = WriterOptions { min_chunk_size: 1 << 20, ..WriterOptions::new(output) };
        let (blob, written) = write(&tar, packed).unwrap();
        let layer = open_written(blob, &written, Dialect::Containerd);
        assert_eq!(layer.toc.frames().count(), 1, "{output:?}");
        assert_eq!(layer.read("short").unwrap(), b"short", "{output:?}");
        assert_eq!(layer.read("next").unwrap(), [1; 5000], "{output:?}");
    }
}

/// In the order of what is read first, with a landmark.
#[test]
fn what_is_read_first_comes_first() {
    let tar = random_tar(&mut Dice(4242), 60, 3000);
    /// An entry, its header, its data.
    type Whole = (TarEntry, Vec<u8>, Vec<u8>);
    let all: RefCell<Vec<Whole>> = RefCell::default();
    // Padding goes with the data before it, so that entries can be moved.
    each(
        &tar[..],
        |entry, header| {
            let mut all = all.borrow_mut();
            let padding = all
                .last()
                .map_or(0, |(.., data): &Whole| data.len().next_multiple_of(512) - data.len());
            all.push((entry.clone(), header[padding..].to_vec(), Vec::new()));
        },
        |bytes| all.borrow_mut().last_mut().unwrap().2.extend_from_slice(bytes),
    )
    .unwrap();
    let all = all.into_inner();
    let entries: Vec<_> = all.iter().map(|(entry, ..)| entry).collect();
    let files: Vec<_> = entries
        .iter()
        .filter(|e| matches!(e.kind, TarKind::File(1..) | TarKind::HardLink(_)))
        .map(|e| e.path.clone())
        .collect();
    let prioritized: Vec<_> = [files.len() - 1, 3, files.len() / 2]
        .map(|n| files[n].clone())
        .into_iter()
        .chain([b"not/there".to_vec()])
        .collect();
    let order = Order::new(entries.iter().copied(), &prioritized);
    assert_eq!(order.missing, [3]);
    let mut every: Vec<_> = order.first.iter().chain(&order.rest).copied().collect();
    every.sort_unstable();
    assert!(every.into_iter().eq(0..all.len()));
    for output in OUTPUTS {
        let mut blob = Vec::new();
        let mut writer = Writer::new(options(output, 1000), |bytes: &[u8]| {
            blob.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
        let put = |writer: &mut Writer<_>, at: usize| {
            let (entry, header, data) = &all[at];
            writer.entry(entry, header).unwrap();
            writer.data(data).unwrap();
            writer.raw(&vec![0; data.len().next_multiple_of(512) - data.len()]).unwrap();
        };
        order.first.iter().for_each(|at| put(&mut writer, *at));
        writer.landmark(true).unwrap();
        order.rest.iter().for_each(|at| put(&mut writer, *at));
        writer.raw(&[0; 1024]).unwrap();
        let written = writer.finish().unwrap();
        let layer = open_written(blob, &written, Dialect::Containerd);
        assert_eq!(layer.compare(), None);
        let Some(Landmark::Prefetch { end }) = layer.toc.landmark() else { panic!() };
        assert_eq!(layer.read(".prefetch.landmark").unwrap(), [0x0f]);
        for entry in layer.toc.entries().filter(|e| !e.is_landmark()) {
            let Kind::File { chunks, .. } = entry.kind() else { continue };
            let is_first = order.first.iter().any(|at| all[*at].0.path.as_slice() == entry.path());
            assert!(
                chunks.iter().all(|c| (c.offset < end) == is_first && (!is_first || c.end <= end)),
                "{output:?}"
            );
        }
    }
}

#[test]
fn annotations_are_those_of_the_reader() {
    let tar = random_tar(&mut Dice(5), 10, 1000);
    let (_, written) = write(&tar, options(Output::ZstdChunked, 1000)).unwrap();
    // containers/storage takes no layer that has both digests.
    let podman = written.annotations(Dialect::Podman);
    assert!(
        !podman.contains_key(shipway_estargz::TOC_DIGEST) && podman.contains_key(PODMAN_TAR_SPLIT)
    );
    let containerd = written.annotations(Dialect::Containerd);
    assert_eq!(containerd[shipway_estargz::TOC_DIGEST], written.toc_digest.to_string());
    assert_eq!(containerd[shipway_estargz::UNCOMPRESSED_SIZE], tar.len().to_string());
    let (_, plain) =
        write(&tar, WriterOptions { tar_split: false, ..options(Output::ZstdChunked, 1000) })
            .unwrap();
    assert!(!plain.annotations(Dialect::Podman).contains_key(PODMAN_TAR_SPLIT));
    let (_, gzip) = write(&tar, options(Output::Estargz, 1000)).unwrap();
    assert_eq!(gzip.annotations(Dialect::Podman), gzip.annotations(Dialect::Containerd));
}

/// The tar-split of our layers: segments and files make the tar again.
#[test]
fn the_tar_split_makes_the_tar_again() {
    use base64::prelude::{BASE64_STANDARD, Engine as _};
    let tar = random_tar(&mut Dice(99), 50, 3000);
    let (blob, written) = write(&tar, options(Output::ZstdChunked, 1000)).unwrap();
    let layer = open_written(blob, &written, Dialect::Podman);
    let (place, size) = layer.layout.tar_split.clone().unwrap();
    let packed = &layer.blob[place.start as usize..place.end as usize];
    assert_eq!(layer.toc.tar_split(), Some(Digest::of(packed)));
    let lines = String::from_utf8(zstd::stream::decode_all(packed).unwrap()).unwrap();
    assert_eq!(lines.len() as u64, size);
    let mut again = Vec::new();
    for (position, line) in lines.lines().enumerate() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["position"], position);
        match line["type"].as_u64() {
            Some(2) => {
                again.extend(BASE64_STANDARD.decode(line["payload"].as_str().unwrap()).unwrap())
            }
            Some(1) if line["size"].is_u64() => again
                .extend(layer.read(line["name"].as_str().unwrap().trim_end_matches('/')).unwrap()),
            _ => assert!(line["payload"].is_null()),
        }
    }
    assert!(again == tar);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let entry = |path: &[u8], kind| TarEntry {
        path: path.to_vec(),
        kind,
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: Time::default(),
        xattrs: Vec::new(),
    };
    let writer = |options| Writer::new(options, |_: &[u8]| Ok(()));
    for size in [0, MAX_CHUNK + 1] {
        assert!(matches!(
            writer(options(Output::Estargz, size)),
            Err(Error::TooLarge { limit: MAX_CHUNK, .. })
        ));
    }
    let packed = WriterOptions { min_chunk_size: MAX_CHUNK + 1, ..options(Output::Estargz, 5) };
    assert!(matches!(writer(packed), Err(Error::TooLarge { .. })));
    let mut w = writer(options(Output::Estargz, 5)).unwrap();
    let mut refused = |entry: &TarEntry, want: Problem| match w.entry(entry, &[]) {
        Err(Error::Entry { problem, .. }) => assert_eq!(problem, want),
        other => panic!("{other:?}"),
    };
    refused(&entry(b"a\xff", TarKind::Fifo), Problem::BadName);
    refused(&entry(b"a", TarKind::Symlink(b"\xff".to_vec())), Problem::BadName);
    refused(&entry(b"a", TarKind::HardLink(b"\xff".to_vec())), Problem::BadName);
    refused(&entry(b"a", TarKind::Other(b'V')), Problem::NoType);
    let attribute = TarEntry {
        xattrs: vec![(b"user.\xff".to_vec(), Vec::new())],
        ..entry(b"a", TarKind::Fifo)
    };
    refused(&attribute, Problem::Xattrs);
    // Data that is too short or too long.
    w.entry(&entry(b"short", TarKind::File(5)), &[]).unwrap();
    w.data(b"1234").unwrap();
    assert!(matches!(
        w.entry(&entry(b"next", TarKind::Fifo), &[]),
        Err(Error::Entry { problem: Problem::ChunkSum, .. })
    ));
    assert!(w.data(b"56").is_err());
    // What no reader would take.
    let mut w = writer(options(Output::ZstdChunked, 5)).unwrap();
    w.entry(&entry(b"link", TarKind::HardLink(b"nothing".to_vec())), &[0; 512]).unwrap();
    assert!(matches!(w.finish(), Err(Error::Entry { problem: Problem::LinkTarget(_), .. })));
}

#[test]
fn a_sink_that_fails_ends_it() {
    let tar = random_tar(&mut Dice(3), 40, 3000);
    let writer = RefCell::new(
        Writer::new(options(Output::Estargz, 100), |_: &[u8]| {
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap(),
    );
    let failed = RefCell::new(None);
    let keep = |result: Result<(), Error>| {
        if let Err(e) = result {
            failed.borrow_mut().get_or_insert(e);
        }
    };
    each(
        &tar[..],
        |entry, header| keep(writer.borrow_mut().entry(entry, header)),
        |bytes| keep(writer.borrow_mut().data(bytes)),
    )
    .unwrap();
    // What is written at the end at the latest.
    keep(writer.into_inner().finish().map(drop));
    let failed = failed.into_inner();
    assert!(
        matches!(&failed, Some(Error::Io(e)) if e.kind() == io::ErrorKind::StorageFull),
        "{failed:?}"
    );
}

/// Flipped bytes of our own blobs: wherever they are, nobody reads other data, and the comparison
/// finds what the digests of chunks do not cover.
#[test]
fn flipped_bytes_never_pass() {
    let tar = random_tar(&mut Dice(31), 15, 400);
    for output in OUTPUTS {
        let (blob, written) = write(&tar, options(output, 200)).unwrap();
        let good = open_written(blob.clone(), &written, Dialect::Containerd);
        let want = good.read_all().unwrap();
        let entries = |tar: &[u8]| {
            let all = RefCell::new(Vec::new());
            each(tar, |entry, _| all.borrow_mut().push(entry.clone()), |_| {})
                .map(|_| all.into_inner())
        };
        let tar_entries = entries(&tar).unwrap();
        for at in (0..blob.len()).step_by(7) {
            let mut flipped = blob.clone();
            flipped[at] ^= 1 << (at % 8);
            let Ok(layer) = open(
                flipped,
                &written.annotations(Dialect::Containerd),
                written.external_toc.as_deref(),
            ) else {
                continue;
            };
            match layer.read_all() {
                Ok(data) => assert!(data == want, "{output:?} {at}"),
                Err(e) => assert!(e.is_wrong_bytes(), "{output:?} {at}: {e:?}"),
            }
            // The tar as everybody reads it: if the comparison is content, nothing is other that it
            // looks at.
            let mut unpacked = Vec::new();
            let whole =
                Frames::new(output.codec(), &layer.blob[..]).unwrap().read_to_end(&mut unpacked);
            if whole.is_ok()
                && entries(&unpacked).is_ok_and(|e| e.len() >= tar_entries.len())
                && layer.compare().is_none()
            {
                let again: Vec<_> =
                    entries(&unpacked).unwrap().into_iter().filter(|e| !e.is_of_format()).collect();
                assert!(again == tar_entries, "{output:?} {at}");
            }
        }
    }
}
