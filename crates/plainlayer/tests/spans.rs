//! Spans give the bytes that decompressing everything gives, whoever compressed, and files of spans
//! that are damaged give an error.

#![allow(clippy::unwrap_used)]

mod common;

use common::{How, Random, decode, make, read, scan};
use shipway_estargz::{Codec, Content, Kind, MAX_WINDOW_LOG};
use shipway_oci::Digest;
use shipway_plainlayer::{Error, MAX_SPAN, Scanner};
use std::io::Read as _;

/// Blobs of several members or frames, of random kinds.
fn blob(random: &mut Random, codec: Codec, size: usize) -> (Vec<u8>, Vec<u8>, Vec<How>) {
    let (mut plain, mut blob, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
    while plain.len() < size {
        let how = match (codec, random.below(8)) {
            (Codec::Zstd, _) => How::Zstd,
            (_, 0) => How::Zlib(0, None),
            (_, 1) => How::Zlib(1 + random.below(9) as u32, Some(1 + random.below(9000) as usize)),
            (_, 2) => How::Deflate(1 + random.below(12) as i32),
            (_, 3) => How::Fixed,
            (_, 4) => How::Miniz(random.below(10) as u8),
            (_, n) => How::Zlib(n as u32, None),
        };
        let len = match random.below(4) {
            0 => 0,
            1 => random.below(100) as usize,
            _ => random.below(size as u64) as usize,
        };
        let part = random.bytes(len);
        blob.extend(how.compress(&part));
        plain.extend(part);
        kinds.push(how);
    }
    (plain, blob, kinds)
}

#[test]
fn spans_in_any_order_give_what_the_blob_has() {
    for seed in 1..=40 {
        let mut random = Random(seed);
        let codec = if seed % 5 == 0 { Codec::Zstd } else { Codec::Gzip };
        let size = 1 + random.below(300_000) as usize;
        let (plain, blob, kinds) = blob(&mut random, codec, size);
        let length = 1 + random.below(100_000);
        let context = format!("seed {seed}, {kinds:?}");
        let scanned = scan(codec, &blob, length).unwrap_or_else(|e| panic!("{context}: {e}"));
        assert_eq!(scanned.blob, Digest::of(&blob), "{context}");
        assert_eq!(scanned.diff_id, Digest::of(&plain), "{context}");
        assert_eq!((scanned.size, scanned.tar_size), (blob.len() as u64, plain.len() as u64));
        let file = scanned.encode();
        let spans = decode(&scanned.blob, &file).unwrap();
        assert_eq!(spans.codec(), codec);
        let all = spans.all();
        assert_eq!(all[0].tar.start, 0);
        assert_eq!(all[all.len() - 1].tar.end, plain.len() as u64);
        assert_eq!(all[all.len() - 1].compressed.end, blob.len() as u64);
        assert!(all.windows(2).all(|pair| pair[0].tar.end == pair[1].tar.start));
        for _ in 0..2 * all.len() {
            let n = random.below(all.len() as u64) as usize;
            let span = &all[n];
            assert_eq!(spans.at(span.compressed.start), Some(span));
            let got = read(&spans, n, &file, &blob).unwrap_or_else(|e| panic!("{context}: {e}"));
            let want = &plain[span.tar.start as usize..span.tar.end as usize];
            assert!(got == want, "span {n} of {}: {context}", all.len());
        }
    }
}

/// The reader of a blob may give any number of bytes at a time.
struct Pieces<'a>(&'a [u8], Random);

impl std::io::Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = 1 + self.1.below(7) as usize;
        let n = buffer.len().min(self.0.len()).min(most);
        buffer[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

#[test]
fn spans_do_not_depend_on_how_the_blob_comes() {
    for seed in 1..=20 {
        let mut random = Random(seed + 100);
        let codec = if seed % 5 == 0 { Codec::Zstd } else { Codec::Gzip };
        let (_, blob, kinds) = blob(&mut random, codec, 100_000);
        let whole = scan(codec, &blob, 20_000).unwrap().encode();
        let pieces = Scanner::new(codec, Pieces(&blob, random)).unwrap().spans_of(20_000);
        assert!(pieces.finish().unwrap().encode() == whole, "{seed}: {kinds:?}");
    }
}

#[test]
fn blobs_that_are_cut_or_changed_are_errors() {
    let mut random = Random(7);
    for codec in [Codec::Gzip, Codec::Zstd] {
        let (plain, blob, _) = blob(&mut random, codec, 50_000);
        for _ in 0..200 {
            let cut = random.below(blob.len() as u64) as usize;
            if let Ok(scanned) = scan(codec, &blob[..cut], 10_000) {
                // Between two members.
                assert!(scanned.tar_size <= plain.len() as u64);
                assert_eq!(scanned.diff_id, Digest::of(&plain[..scanned.tar_size as usize]));
            }
            let mut changed = blob.clone();
            changed[cut] ^= 1 << random.below(8);
            if codec == Codec::Gzip
                && let Ok(scanned) = scan(codec, &changed, 10_000)
            {
                // A name or a time in a header.
                assert_eq!(scanned.diff_id, Digest::of(&plain));
            }
        }
    }
    let mut garbage = How::Zlib(6, None).compress(b"data");
    garbage.extend_from_slice(b"more");
    assert!(matches!(scan(Codec::Gzip, &garbage, 1000), Err(Error::Io(_))));
}

#[test]
fn damaged_files_are_found() {
    let mut random = Random(11);
    let (plain, blob, _) = blob(&mut random, Codec::Gzip, 400_000);
    let scanned = scan(Codec::Gzip, &blob, 30_000).unwrap();
    let file = scanned.encode();
    let count = decode(&scanned.blob, &file).unwrap().all().len();
    assert!(count > 5, "{count}");
    assert!(matches!(decode(&Digest::of("another"), &file), Err(Error::Damaged(_))));
    let mut found = 0;
    for round in 0..600 {
        let mut damaged = file.clone();
        match round % 3 {
            0 => damaged.truncate(random.below(file.len() as u64) as usize),
            1 => damaged.extend_from_slice(&random.next().to_le_bytes()),
            _ => {
                let at = random.below(file.len() as u64) as usize;
                damaged[at] ^= 1 << random.below(8);
            }
        }
        let Ok(spans) = decode(&scanned.blob, &damaged) else {
            found += 1;
            continue;
        };
        // A window is damaged, which is found where it is used, and the others are right.
        let mut wrong = 0;
        for n in 0..count {
            match read(&spans, n, &damaged, &blob) {
                Ok(bytes) => {
                    let span = &spans.all()[n];
                    assert!(bytes == plain[span.tar.start as usize..span.tar.end as usize]);
                }
                Err(Error::Damaged(_)) => wrong += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(wrong, 1);
    }
    assert!(found > 390, "{found}");
}

/// Files whose checksum is right and whose content is nonsense, as an attacker would write them.
#[test]
fn hostile_files_are_errors_or_give_wrong_bytes_and_nothing_worse() {
    let mut random = Random(13);
    let (_, blob, _) = blob(&mut random, Codec::Gzip, 200_000);
    let scanned = scan(Codec::Gzip, &blob, 20_000).unwrap();
    let file = scanned.encode();
    let head = shipway_plainlayer::Spans::length(file.first_chunk().unwrap()).unwrap();
    let mut accepted = 0;
    for _ in 0..1500 {
        let mut hostile = file.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(head as u64) as usize;
            hostile[at] = match random.below(3) {
                0 => 0,
                1 => 0xff,
                _ => random.next() as u8,
            };
        }
        let spans = hostile[64..head].to_vec();
        let sum = Digest::of([scanned.blob.as_bytes(), &hostile[..32], &spans[..]].concat());
        hostile[32..64].copy_from_slice(sum.as_bytes());
        let Ok(spans) = decode(&scanned.blob, &hostile) else { continue };
        accepted += 1;
        for span in spans.all() {
            let window = &hostile[span.window.start as usize..span.window.end as usize];
            let end = (span.compressed.end as usize).min(blob.len());
            let bytes = blob.get(span.compressed.start as usize..end).unwrap_or_default();
            let Ok(reader) = spans.reader(span, window, bytes) else { continue };
            let mut out = Vec::new();
            let _ = reader.take(MAX_SPAN + 1).read_to_end(&mut out);
            assert!(out.len() as u64 <= MAX_SPAN);
        }
    }
    assert!(accepted > 10, "{accepted}");
}

#[test]
fn what_cannot_be_resumed_is_said() {
    let zeros = vec![0; MAX_SPAN as usize + 1];
    let one = zstd::bulk::compress(&zeros, 1).unwrap();
    let error = scan(Codec::Zstd, &one, 1000).unwrap_err();
    assert!(matches!(error, Error::LongSpan { start: 0, limit: MAX_SPAN, .. }), "{error}");
    // Unless only the whole of it is wanted.
    let all = Scanner::new(Codec::Zstd, &one[..]).unwrap().allow_long_spans().finish().unwrap();
    assert!(!all.is_resumable());
    assert_eq!((all.blob, all.diff_id), (Digest::of(&one), Digest::of(&zeros)));
    // Just as long as it may be, and several of them.
    let half = zstd::bulk::compress(&zeros[..MAX_SPAN as usize], 1).unwrap();
    let spans = scan(Codec::Zstd, &[&half[..], &half].concat(), 1000).unwrap();
    assert_eq!(decode(&spans.blob, &spans.encode()).unwrap().all().len(), 2);
    // A window that no reader is asked to have.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(MAX_WINDOW_LOG + 1).unwrap();
    std::io::copy(&mut &zeros[..1 << 20], &mut encoder).unwrap();
    assert!(matches!(scan(Codec::Zstd, &encoder.finish().unwrap(), 1000), Err(Error::Io(_))));
}

#[test]
fn a_header_without_end_is_an_error() {
    let mut endless = b"\x1f\x8b\x08\x08\0\0\0\0\0\x03".to_vec();
    endless.resize(1 << 20, b'n');
    assert!(matches!(scan(Codec::Gzip, &endless, 1000), Err(Error::Io(_))));
}

/// A tar with files of many sizes, and what they hold.
fn tar(random: &mut Random) -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut files = Vec::new();
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    tar.append_data(&mut header, "d/", &[][..]).unwrap();
    for n in 0..1 + random.below(80) {
        let name = match n {
            // Names that other formats keep for themselves.
            3 => "stargz.index.json".to_owned(),
            4 => ".prefetch.landmark".to_owned(),
            n => format!("d/{n}"),
        };
        let most = [1, 600, 5000, 100_000][random.below(4) as usize];
        let len = random.below(most) as usize;
        let data = if random.below(6) == 0 { vec![0; len] } else { random.bytes(len) };
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o640);
        header.set_mtime(n);
        header.set_size(len as u64);
        tar.append_data(&mut header, &name, &data[..]).unwrap();
        files.push((name, data));
    }
    (tar.into_inner().unwrap(), files)
}

#[test]
fn every_file_is_in_chunks_of_spans() {
    for seed in 1..=30 {
        let mut random = Random(seed + 500);
        let (tar, files) = tar(&mut random);
        let (codec, blob) = match seed % 3 {
            0 => {
                let frames = tar.chunks(1 + random.below(50_000) as usize);
                (Codec::Zstd, frames.flat_map(|part| How::Zstd.compress(part)).collect())
            }
            1 => (Codec::Gzip, How::Deflate(6).compress(&tar)),
            _ => (Codec::Gzip, How::Zlib(6, None).compress(&tar)),
        };
        let blob: Vec<u8> = blob;
        let (scanned, toc) = make(codec, &blob, 20_000).unwrap();
        let file = scanned.encode();
        let spans = decode(&scanned.blob, &file).unwrap();
        assert_eq!(toc.len(), files.len() + 1);
        assert_eq!(toc.landmark(), None);
        for (name, want) in &files {
            let entry = toc.find(name.as_bytes()).unwrap();
            assert!(!entry.is_landmark());
            let Kind::File { size, chunks } = entry.kind() else { panic!("{name}") };
            assert_eq!(size, want.len() as u64);
            let mut got = Vec::new();
            for chunk in chunks {
                assert_eq!(chunk.file_offset, got.len() as u64);
                let span = spans.at(chunk.offset).unwrap();
                assert_eq!(chunk.end, span.compressed.end);
                let n = spans.all().iter().position(|s| s == span).unwrap();
                let bytes = read(&spans, n, &file, &blob).unwrap();
                let bytes = &bytes[chunk.inner as usize..][..chunk.size as usize];
                match chunk.content {
                    Content::Data(digest) => assert_eq!(Digest::of(bytes), digest),
                    Content::Zeros => assert!(bytes.iter().all(|b| *b == 0)),
                }
                got.extend_from_slice(bytes);
            }
            assert!(got == *want, "{name}");
        }
    }
}

#[test]
fn the_file_is_a_small_part_of_the_blob() {
    // 24 MiB in spans of the usual length.
    let mut random = Random(17);
    let plain = random.bytes(24 << 20);
    let blob = How::Deflate(6).compress(&plain);
    let scanned = scan(Codec::Gzip, &blob, shipway_plainlayer::SPAN).unwrap();
    let file = scanned.encode();
    let spans = decode(&scanned.blob, &file).unwrap().all().len();
    assert!((4..=6).contains(&spans), "{spans}");
    assert!(file.len() * 50 < blob.len(), "{} of {}", file.len(), blob.len());
}
