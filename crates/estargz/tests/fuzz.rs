//! Mutations of footers, annotations, tables of contents and frames: nothing panics, nothing takes
//! long, and a table that is read keeps its promises.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Dice, corpus};
use shipway_estargz::{
    Annotated, Codec, Content, Error, Expected, Kind, LONGEST_FOOTER, Layout, MAX_CHUNK, MAX_DATA,
    MAX_NAME, MAX_PATH, Tail, Toc, TocDigest,
};
use shipway_oci::Digest;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read as _,
    time::{Duration, Instant},
};

/// Rounds that are always done.
const ROUNDS: usize = 4000;
/// A round that takes longer hangs.
const HANG: Duration = Duration::from_secs(10);

const BLOBS: [&str; 5] = [
    "estargz.tgz",
    "estargz-packed.tgz",
    "estargz-lossless.tgz",
    "zstd-stargz.tzst",
    "zstd-podman.tzst",
];

/// A blob with its parts.
struct Sample {
    blob: Vec<u8>,
    annotations: BTreeMap<String, String>,
    layout: Layout,
    compressed: Vec<u8>,
    json: String,
}

fn samples() -> Vec<Sample> {
    let sample = |name: &str| {
        let blob = corpus(name);
        let annotations = serde_json::from_slice(&corpus(&format!("{name}.json"))).unwrap();
        let Tail::Layout(layout) = Tail::read(&blob, blob.len() as u64).unwrap_or_else(|_| {
            let layout = Annotated::read(&annotations).unwrap().unwrap().layout(blob.len() as u64);
            Tail::Layout(layout.unwrap().unwrap())
        }) else {
            panic!()
        };
        let compressed = layout.toc_in(&blob, blob.len() as u64).unwrap().to_vec();
        let mut json = Vec::new();
        match layout.codec {
            Codec::Zstd => json = zstd::stream::decode_all(&compressed[..]).unwrap(),
            Codec::Gzip => {
                _ = flate2::read::GzDecoder::new(&compressed[..]).read_to_end(&mut json).unwrap()
            }
        }
        let json = String::from_utf8(json).unwrap();
        let json = json[json.find('{').unwrap()..=json.rfind('}').unwrap()].to_owned();
        Sample { blob, annotations, layout, compressed, json }
    };
    BLOBS.map(sample).into()
}

/// What everybody may rely on who has a table.
#[track_caller]
fn promises(toc: &Toc, layout: &Layout) {
    let mut sum = 0u64;
    let mut paths = BTreeSet::new();
    for entry in toc.entries() {
        let path = entry.path();
        assert!(path.len() <= MAX_PATH && paths.insert(path));
        let mut parts = path.split(|b| *b == b'/');
        assert!(
            path.is_empty()
                || parts.all(|p| !p.is_empty()
                    && p != b"."
                    && p != b".."
                    && p.len() <= MAX_NAME
                    && !p.contains(&0))
        );
        assert_eq!(toc.find(path).map(|e| e.id()), Some(entry.id()));
        match entry.kind() {
            Kind::File { size, chunks } => {
                sum += size;
                let mut at = 0;
                for chunk in chunks {
                    assert!(chunk.file == entry.id() && chunk.file_offset == at && chunk.size > 0);
                    assert!(chunk.offset < chunk.end && chunk.end <= layout.payload_end);
                    assert!(chunk.size <= MAX_CHUNK || chunk.content == Content::Zeros);
                    at += chunk.size;
                }
                assert_eq!(at, size);
            }
            Kind::HardLink { target } => {
                assert!(target < entry.id());
                assert!(!matches!(
                    toc.entry(target).kind(),
                    Kind::HardLink { .. } | Kind::Directory
                ));
            }
            Kind::Symlink { target } => assert!(!target.is_empty() && target.len() <= MAX_PATH),
            _ => {}
        }
    }
    assert!(sum == toc.data_size() && sum <= MAX_DATA);
    assert!(toc.chunks().iter().map(|c| (c.offset, c.inner)).is_sorted());
    assert!(toc.frames().map(<[_]>::len).sum::<usize>() == toc.chunks().len());
    let mut directories = BTreeSet::from([&b""[..]]);
    for node in toc.tree() {
        let parent =
            node.path.iter().rposition(|b| *b == b'/').map_or(&b""[..], |at| &node.path[..at]);
        assert!(directories.contains(parent), "{}", String::from_utf8_lossy(node.path));
        if node.entry.is_none_or(|e| e.kind() == Kind::Directory) {
            assert!(directories.insert(node.path) || node.path.is_empty());
        }
    }
}

fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice, tokens: &[&[u8]]) {
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = dice.below(bytes.len());
        match dice.below(6) {
            0 => bytes[at] = dice.below(256) as u8,
            1 => bytes[at] ^= 1 << dice.below(8),
            2 => bytes.truncate(at),
            3 if !tokens.is_empty() => {
                let token = tokens[dice.below(tokens.len())];
                let end = (at + dice.below(token.len() + 4)).min(bytes.len());
                bytes.splice(at..end, token.iter().copied());
            }
            4 => {
                let end = (at + dice.below(300)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                let to = dice.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            _ => {
                let end = (at + dice.below(40)).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
}

/// Replaces numbers and words of the JSON by others that may still be right there.
fn mutate_json(json: &mut String, dice: &mut Dice) {
    const VALUES: [&str; 12] = [
        "0",
        "1",
        "-1",
        "511",
        "1000",
        "2500",
        "9223372036854775807",
        "18446744073709551616",
        "4294967296",
        "1e3",
        "null",
        "\"\"",
    ];
    const WORDS: [&str; 16] = [
        "\"reg\"",
        "\"chunk\"",
        "\"dir\"",
        "\"hardlink\"",
        "\"symlink\"",
        "\"char\"",
        "\"fifo\"",
        "\"zeros\"",
        "\"etc/small\"",
        "\"big\"",
        "\"../..\"",
        "\"etc\"",
        "\"a/b/c\"",
        "\"\\u0000\"",
        "\"0001-01-01T00:00:00Z\"",
        "\"sha256:\"",
    ];
    for _ in 0..=dice.below(3) {
        let colons: Vec<usize> = json.match_indices(':').map(|(at, _)| at + 1).collect();
        let at = colons[dice.below(colons.len())];
        let end = json[at..].find([',', '}', '\n']).map_or(json.len(), |n| at + n);
        let value = if dice.below(2) == 0 {
            VALUES[dice.below(VALUES.len())]
        } else {
            WORDS[dice.below(WORDS.len())]
        };
        json.replace_range(at..end, value);
    }
    // Whole entries go, or change places.
    if dice.below(3) == 0 {
        let starts: Vec<usize> = json
            .match_indices("{\"type\"")
            .map(|(at, _)| at)
            .chain(json.match_indices("{\n").map(|(at, _)| at))
            .collect();
        if starts.len() > 3 {
            let at = starts[1 + dice.below(starts.len() - 2)];
            if let Some(n) = json[at..].find("},") {
                let entry: String = json.drain(at..at + n + 2).collect();
                if dice.below(2) == 0 {
                    let to = starts[1 + dice.below(starts.len() / 2)].min(json.len());
                    if json.is_char_boundary(to) {
                        json.insert_str(to, &entry);
                    }
                }
            }
        }
    }
}

fn read_json(json: &str, payload_end: u64) -> Result<Toc, Error> {
    let layout = Layout {
        codec: Codec::Zstd,
        payload_end,
        toc: None,
        toc_size: Some(json.len() as u64),
        tar_split: None,
    };
    let expected = Expected { digest: TocDigest::Json(Digest::of(json)), uncompressed_size: None };
    Toc::read(&zstd::bulk::compress(json.as_bytes(), 1).unwrap(), &layout, &expected)
}

#[track_caller]
fn round(sample: &Sample, dice: &mut Dice) -> bool {
    match dice.below(8) {
        0 => {
            let size = sample.blob.len();
            let mut end = sample.blob[size - LONGEST_FOOTER..].to_vec();
            mutate(
                &mut end,
                dice,
                &[
                    b"STARGZ",
                    b"GNUlInUx",
                    b"GnUlInUx",
                    &[0xff; 8],
                    &[0; 8],
                    b"ffffffffffffffff",
                    b"SG",
                ],
            );
            if let Ok(Tail::Layout(layout)) = Tail::read(&end, size as u64) {
                assert!(layout.payload_end <= size as u64);
                if let Some(toc) = layout.toc {
                    assert!(
                        toc.start < toc.end
                            && toc.end <= size as u64
                            && toc.start >= layout.payload_end
                    );
                }
            }
        }
        1 => {
            let mut notes = sample.annotations.clone();
            for value in notes.values_mut() {
                let mut bytes = value.clone().into_bytes();
                mutate(&mut bytes, dice, &[b":", b"0", b"18446744073709551615", b"-1", b"sha256:"]);
                *value = String::from_utf8_lossy(&bytes).into_owned();
            }
            if let Ok(Some(annotated)) = Annotated::read(&notes) {
                let _ = annotated.layout(sample.blob.len() as u64);
            }
        }
        2 => {
            let mut compressed = sample.compressed.clone();
            mutate(&mut compressed, dice, &[]);
            let expected = Expected {
                digest: TocDigest::Compressed(Digest::of(&compressed)),
                uncompressed_size: None,
            };
            if let Ok(toc) = Toc::read(&compressed, &sample.layout, &expected) {
                promises(&toc, &sample.layout);
            }
        }
        3 => {
            // Frames: whatever comes, it is the right data or an error.
            let expected = Expected {
                digest: TocDigest::Compressed(Digest::of(&sample.compressed)),
                uncompressed_size: None,
            };
            let toc = Toc::read(&sample.compressed, &sample.layout, &expected).unwrap();
            let frames: Vec<_> = toc.frames().collect();
            let chunks = frames[dice.below(frames.len())];
            let last = chunks.last().unwrap();
            let mut bytes = sample.blob[last.offset as usize..last.end as usize].to_vec();
            mutate(&mut bytes, dice, &[]);
            let read = toc.read_frame(sample.layout.codec, chunks, &bytes[..], |chunk, data| {
                assert!(
                    chunk.content == Content::Zeros
                        || chunk.content == Content::Data(Digest::of(data))
                );
                Ok(())
            });
            assert!(matches!(read, Ok(()) | Err(Error::Chunk { .. })), "{read:?}");
        }
        n => {
            let mut json = sample.json.clone();
            if n == 4 {
                let mut bytes = json.into_bytes();
                mutate(
                    &mut bytes,
                    dice,
                    &[
                        b"{", b"}", b"[", b"]", b"\"", b",", b":", b"\\u0000", b"null", b"1e999",
                        b"\xff", b"\\ud800",
                    ],
                );
                json = String::from_utf8_lossy(&bytes).into_owned();
            } else {
                mutate_json(&mut json, dice);
            }
            let layout = Layout { codec: Codec::Zstd, ..sample.layout.clone() };
            if let Ok(toc) = read_json(&json, sample.layout.payload_end) {
                promises(&toc, &layout);
                return true;
            }
        }
    }
    false
}

#[test]
fn mutations_never_break_it() {
    let samples = samples();
    for sample in &samples {
        let expected = Expected {
            digest: TocDigest::Compressed(Digest::of(&sample.compressed)),
            uncompressed_size: None,
        };
        promises(
            &Toc::read(&sample.compressed, &sample.layout, &expected).unwrap(),
            &sample.layout,
        );
    }
    let (mut dice, time) = Dice::seeded(0x0e57_a462);
    let started = Instant::now();
    let mut read = 0;
    for number in 0.. {
        if time.map_or(number >= ROUNDS, |time| started.elapsed() >= time) {
            break;
        }
        let begun = Instant::now();
        read += usize::from(round(&samples[number % samples.len()], &mut dice));
        assert!(begun.elapsed() < HANG, "round {number} took {:?}", begun.elapsed());
    }
    // Mutations that nothing gets through would show nothing.
    assert!(read > 20, "{read}");
}
