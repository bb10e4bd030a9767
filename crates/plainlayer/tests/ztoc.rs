//! zTOCs: what is written is read again, and gives what decompressing everything gives; what is
//! damaged or made to harm is an error.

#![allow(clippy::unwrap_used)]

mod common;

use common::{How, Random, decode, read, ztoc};
use shipway_estargz::{Codec, Content, Kind, TarKind};
use shipway_oci::Digest;
use shipway_plainlayer::{Error, MAX_SPAN, MAX_ZTOC, Scanner, Spans, Ztoc};
use std::{
    io::Read as _,
    time::{Duration, Instant},
};

/// Rounds that are always done.
const ROUNDS: u64 = 400;

/// A tar with an entry of each kind, files of many sizes, and extended records.
fn tar(random: &mut Random) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let header = |kind, size: usize, n: u64| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(size as u64);
        header.set_mode(0o4755);
        header.set_uid(n);
        header.set_gid(2 * n);
        header.set_mtime(1_600_000_000 + n);
        header.set_username("somebody").unwrap();
        header
    };
    tar.append_data(&mut header(tar::EntryType::Directory, 0, 0), "d/", &[][..]).unwrap();
    for n in 0..1 + random.below(60) {
        let most = [1, 600, 5000, 100_000][random.below(4) as usize];
        let len = random.below(most) as usize;
        if n % 7 == 3 {
            let records = [("SCHILY.xattr.user.x", &b"\0value\n"[..]), ("mtime", b"12.5")];
            tar.append_pax_extensions(records).unwrap();
        }
        let data = random.bytes(len);
        let mut header = header(tar::EntryType::Regular, data.len(), n);
        tar.append_data(&mut header, format!("d/{n}"), &data[..]).unwrap();
    }
    let link = |kind, n| header(kind, 0, n);
    let (symlink, hard) = (tar::EntryType::Symlink, tar::EntryType::Link);
    tar.append_link(&mut link(symlink, 1), "d/symlink", "../somewhere").unwrap();
    tar.append_link(&mut link(hard, 2), "d/hard", "d/0").unwrap();
    let mut device = header(tar::EntryType::Char, 0, 3);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    tar.append_data(&mut device, "d/null", &[][..]).unwrap();
    tar.append_data(&mut header(tar::EntryType::Fifo, 0, 4), "d/fifo", &[][..]).unwrap();
    tar.into_inner().unwrap()
}

/// A tar in members of many kinds.
fn blob(random: &mut Random, tar: &[u8]) -> (Vec<u8>, Vec<How>) {
    let (mut blob, mut kinds) = (Vec::new(), Vec::new());
    let part = 1 + random.below(tar.len() as u64) as usize;
    for part in tar.chunks(part) {
        let how = match random.below(6) {
            0 => How::Zlib(0, None),
            1 => How::Zlib(1 + random.below(9) as u32, Some(1 + random.below(9000) as usize)),
            2 => How::Deflate(1 + random.below(12) as i32),
            3 => How::Fixed,
            4 => How::Miniz(random.below(10) as u8),
            n => How::Zlib(n as u32, None),
        };
        blob.extend(how.compress(part));
        kinds.push(how);
        if random.below(5) == 0 {
            // A member without output, whose block begins where the tar is not longer.
            blob.extend(How::Zlib(6, None).compress(&[]));
        }
    }
    (blob, kinds)
}

#[test]
fn what_is_written_is_read_and_gives_the_blob() {
    let mut spans = 0;
    for seed in 1..=25 {
        let mut random = Random(seed);
        let tar = tar(&mut random);
        let (blob, kinds) = blob(&mut random, &tar);
        let context = format!("seed {seed}, {kinds:?}");
        let bytes = ztoc(&blob, random.below(60_000)).unwrap();
        let found = Ztoc::read(&bytes).unwrap_or_else(|e| panic!("{context}: {e}"));
        assert_eq!(found.blob_size(), blob.len() as u64);
        for (range, digest) in found.span_digests() {
            let span = &blob[range.start as usize..range.end as usize];
            assert_eq!(Digest::of(span), digest, "{context}");
        }
        // Spans give what the blob has.
        let of = Digest::of(&blob);
        let (toc, file) = found.index(&of).unwrap_or_else(|e| panic!("{context}: {e}"));
        let table = decode(&of, &file).unwrap();
        spans += table.all().len();
        for (n, span) in table.all().iter().enumerate() {
            let got = read(&table, n, &file, &blob).unwrap_or_else(|e| panic!("{context}: {e}"));
            assert!(got == tar[span.tar.start as usize..span.tar.end as usize], "{context}");
        }
        // Files are where the table says, each piece in a span by whose digest it is known.
        for entry in toc.entries() {
            let Kind::File { size, chunks } = entry.kind() else { continue };
            let known = found.entries().iter().find(|known| {
                known.tar.path == entry.path() && known.tar.kind == TarKind::File(size)
            });
            let mut at = known.unwrap().offset;
            for chunk in chunks {
                let span = table.at(chunk.offset).unwrap();
                assert_eq!((span.tar.start + chunk.inner, chunk.end), (at, span.compressed.end));
                let bytes = &blob[chunk.offset as usize..chunk.end as usize];
                assert_eq!(chunk.content, Content::Data(Digest::of(bytes)), "{context}");
                at += chunk.size;
            }
        }
        // All that is said of the tar is kept.
        assert_eq!(Ztoc::read_entries(&found.entries_only()).unwrap(), found.entries());
        let special = found.entries().iter().find(|entry| !entry.records.is_empty());
        if let Some(special) = special {
            assert_eq!(special.tar.xattrs, [(b"user.x".to_vec(), b"\0value\n".to_vec())]);
            assert_eq!(
                (special.tar.mtime.seconds, special.tar.mtime.nanoseconds),
                (12, 500_000_000)
            );
            assert_eq!(special.user, b"somebody");
        }
        let of_kind = |kind: &TarKind| found.entries().iter().any(|e| e.tar.kind == *kind);
        assert!(of_kind(&TarKind::CharDevice(1, 3)) && of_kind(&TarKind::Fifo), "{context}");
        assert!(of_kind(&TarKind::HardLink(b"d/0".to_vec())), "{context}");
        assert_eq!(ztoc(&blob, 5000).unwrap(), ztoc(&blob, 5000).unwrap());
    }
    assert!(spans > 100, "{spans}");
}

/// What everybody may rely on who has read one: it can be made a table, or there is an error.
#[track_caller]
fn promises(bytes: &[u8], blob: &[u8]) -> bool {
    let Ok(found) = Ztoc::read(bytes) else { return false };
    let of = Digest::of(blob);
    let Ok((toc, file)) = found.index(&of) else { return false };
    let table = decode(&of, &file).unwrap();
    for entry in toc.entries() {
        let Kind::File { chunks, .. } = entry.kind() else { continue };
        for chunk in chunks {
            let span = table.at(chunk.offset).unwrap();
            assert!(span.tar.start + chunk.inner + chunk.size <= span.tar.end);
        }
    }
    for span in table.all() {
        let window = &file[span.window.start as usize..span.window.end as usize];
        let end = (span.compressed.end as usize).min(blob.len());
        let bytes = blob.get(span.compressed.start as usize..end).unwrap_or_default();
        let Ok(reader) = table.reader(span, window, bytes) else { continue };
        let mut out = Vec::new();
        let _ = reader.take(MAX_SPAN + 1).read_to_end(&mut out);
        assert!(out.len() as u64 <= MAX_SPAN);
    }
    true
}

/// Lengths, distances and numbers are changed as an attacker would. What is read nevertheless keeps
/// the promises. Some rounds are always done, and more for a share of
/// `SHIPWAY_FUZZ_SECONDS` where that is set.
#[test]
fn hostile_tables_are_errors_and_nothing_worse() {
    let time = std::env::var("SHIPWAY_FUZZ_SECONDS").ok().and_then(|n| n.parse::<u64>().ok());
    let time = Duration::from_secs(time.unwrap_or_default() / 4);
    let (start, mut rounds) = (Instant::now(), 0);
    let mut random = Random(17);
    let tar = tar(&mut random);
    let (blob, _) = blob(&mut random, &tar);
    let good = ztoc(&blob, 60_000).unwrap();
    assert!(promises(&good, &blob));
    // What is not in a window is small; changes in windows are found elsewhere.
    let Ok(found) = Ztoc::read(&good) else { panic!() };
    let least = good.len() - found.spans() * 32768;
    assert!(least < 100_000, "{least}");
    let windows: Vec<usize> = (0..found.spans()).collect();
    let first = {
        // The checkpoints are the longest thing in it: they begin with their number.
        let mut pattern = (windows.len() as u32).to_le_bytes().to_vec();
        pattern.extend_from_slice(&60_000u64.to_le_bytes());
        good.windows(pattern.len()).position(|bytes| bytes == pattern).unwrap()
    };
    let end = first + 12 + windows.len() * 32785;
    let mut accepted = 0;
    while rounds < ROUNDS || start.elapsed() < time {
        rounds += 1;
        let mut hostile = good.clone();
        for _ in 0..1 + random.below(3) {
            // Outside of windows.
            let at = match random.below(4) {
                0 => first + random.below(12) as usize,
                1 => {
                    let n = random.below(windows.len() as u64) as usize;
                    first + 12 + n * 32785 + random.below(17) as usize
                }
                2 => random.below(first as u64) as usize,
                _ => {
                    (end + random.below(1 + (good.len() - end) as u64) as usize).min(good.len() - 1)
                }
            };
            match random.below(5) {
                0 => hostile[at] ^= 1 << random.below(8),
                1 => hostile[at] = 0xff,
                2 => hostile[at] = 0,
                3 => {
                    let value = [0, 1, u32::MAX, i32::MAX as u32, good.len() as u32, at as u32];
                    let value = value[random.below(6) as usize].to_le_bytes();
                    let len = (hostile.len() - at).min(4);
                    hostile[at..at + len].copy_from_slice(&value[..len]);
                }
                _ => hostile.truncate(at.max(1)),
            }
            if hostile.len() < good.len() {
                break;
            }
        }
        accepted += u64::from(promises(&hostile, &blob));
    }
    // Names, owners and times may be anything.
    assert!(accepted > rounds / 50 && accepted < rounds, "{accepted}");
    for len in 0..2000 {
        assert!(!promises(&good[..len], &blob));
    }
}

/// What an error says.
#[track_caller]
fn refused(bytes: &[u8]) -> String {
    Ztoc::read(bytes).unwrap_err().to_string()
}

#[test]
fn limits_hold() {
    assert!(refused(&vec![0; MAX_ZTOC + 1]).contains("too large"));
    let mut random = Random(5);
    let tar = tar(&mut random);
    let (blob, _) = blob(&mut random, &tar);
    // Spans that are so short that there would be more of them than fit.
    let mut blocks = Vec::new();
    for n in 0..3000u32 {
        blocks.extend(How::Zlib(6, None).compress(&n.to_le_bytes()));
    }
    let scanner = Scanner::new(Codec::Gzip, &blocks[..]).unwrap();
    let text = scanner.with_checkpoints(0).finish().unwrap_err().to_string();
    assert!(text.contains("its spans are short"), "{text}");
    let good = ztoc(&blob, 60_000).unwrap();
    assert!(Ztoc::read(&good).is_ok());
    for (found, instead, says) in [
        (&b"0.9"[..], &b"0.8"[..], "version"),
        (b"reg\0", b"rug\0", "kind that is not known"),
        (b"sha256:", b"sha257:", "digest of a span"),
        (b"2020-09-13T", b"2020-99-13T", "time"),
    ] {
        let at = good.windows(found.len()).position(|bytes| bytes == found).unwrap();
        let mut other = good.clone();
        other[at..at + instead.len()].copy_from_slice(instead);
        let text = refused(&other);
        assert!(text.contains(says), "{text}");
    }
    // One with a span that nobody would hold in memory.
    let mut long = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(MAX_SPAN + 1);
    long.append_data(&mut header, "zeros", std::io::repeat(0).take(MAX_SPAN + 1)).unwrap();
    let blob = How::Zlib(6, None).compress(&long.into_inner().unwrap());
    let bytes = ztoc(&blob, MAX_SPAN + 4096).unwrap();
    let error = Ztoc::read(&bytes).unwrap().index(&Digest::of(&blob)).unwrap_err();
    assert!(matches!(error, Error::LongSpan { limit: MAX_SPAN, .. }), "{error}");
}

/// A vector whose entries are all one long record, and tables that lead back to themselves.
#[test]
fn what_is_said_many_times_is_not_read_many_times() {
    const RECORDS: usize = 777;
    let mut tar = tar::Builder::new(Vec::new());
    let long = vec![b'v'; 100_000];
    let keys: Vec<String> = (0..RECORDS).map(|n| format!("k{n:04}")).collect();
    let records = keys.iter().enumerate();
    let records: Vec<(&str, &[u8])> =
        records.map(|(n, key)| (&**key, if n == 0 { &long[..] } else { b"v" })).collect();
    tar.append_pax_extensions(records).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    tar.append_data(&mut header, "file", &b"x"[..]).unwrap();
    let blob = How::Zlib(6, None).compress(&tar.into_inner().unwrap());
    let bytes = ztoc(&blob, 60_000).unwrap();
    assert_eq!(Ztoc::read(&bytes).unwrap().entries()[0].records.len(), RECORDS);
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()) as usize)
    };
    let leads = |at: usize| word(&bytes, at) > 0 && at + word(&bytes, at) < bytes.len();
    let vector = (0..bytes.len())
        .step_by(4)
        .find(|at| word(&bytes, *at) == RECORDS && (1..=RECORDS).all(|n| leads(at + 4 * n)));
    let vector = vector.unwrap();
    let first = vector + 4 + word(&bytes, vector + 4);
    let mut many = bytes.clone();
    for n in 1..=RECORDS {
        let at = vector + 4 * n;
        many[at..at + 4].copy_from_slice(&((first - at) as u32).to_le_bytes());
    }
    assert!(refused(&many).contains("many times"), "{}", refused(&many));
    for back in [0i32, 4, -4, i32::MIN, i32::MAX] {
        let mut circle = bytes.clone();
        circle[first..first + 4].copy_from_slice(&back.to_le_bytes());
        // Whatever it is taken for, it ends.
        let _ = Ztoc::read(&circle);
    }
    let file = bytes.first_chunk().map(Spans::length).unwrap();
    assert!(file.is_err(), "a zTOC is not a file of spans");
}
