//! Broken images and broken layers: nothing panics or hangs, and whatever the builder takes is read
//! back whole. The seed is fixed unless time is given; what fails prints its seed and round.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use shipway_erofs::*;
use shipway_testkit::Rounds;
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

/// Rounds when no time is given.
const ROUNDS: usize = 3_000;
/// No image of these sizes takes this long, however slow the machine.
const HANG: Duration = Duration::from_secs(10);

/// Calls `each` in rounds: some always, and for a share of `SHIPWAY_FUZZ_SECONDS` where that is
/// set, then with another seed each time.
#[track_caller]
fn rounds(mut each: impl FnMut(&mut Dice, usize)) {
    let rounds = Rounds::new(ROUNDS, 4, 0x5eed_e40f);
    let seed = rounds.seed();
    for round in rounds {
        let begun = Instant::now();
        let mut dice = Dice::new(seed ^ (round as u64) << 20);
        if let Err(panic) =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| each(&mut dice, round)))
        {
            println!("seed {seed}, round {round}");
            std::panic::resume_unwind(panic);
        }
        assert!(begun.elapsed() < HANG, "seed {seed}, round {round} took {:?}", begun.elapsed());
    }
}

/// Reads everything that can be reached, each inode once. Returns how many inodes there were, or
/// the first error.
#[track_caller]
fn read_all(bytes: &[u8]) -> Result<usize, ReadError> {
    let reader = &Reader::open(bytes)?;
    let (mut seen, mut stack, mut first) = (HashSet::new(), vec![reader.root()], Ok(()));
    while let Some(nid) = stack.pop() {
        if !seen.insert(nid) {
            continue;
        }
        assert_stored_agrees(bytes, reader, nid);
        let result = read_one(reader, nid, &mut stack);
        first = first.and(result);
    }
    first.map(|()| seen.len())
}

fn read_one(reader: &Reader<'_>, nid: Nid, stack: &mut Vec<Nid>) -> Result<(), ReadError> {
    let found = reader.metadata(nid)?;
    let xattrs = reader.xattrs(&found).map(|_| ());
    let content = match found.content {
        Content::Symlink => reader.target(&found).map(|_| ()),
        Content::Directory => reader.directory(&found).and_then(|directory| {
            let mut result = Ok(());
            for entry in directory.entries(0) {
                match entry {
                    Ok(entry) => {
                        stack.push(entry.nid);
                        let looked_up = directory.lookup(entry.name);
                        result = result.and(looked_up.and_then(|e| {
                            if e == Some(entry) { Ok(()) } else { Err(ReadError::Corrupt) }
                        }));
                    }
                    Err(error) => result = result.and(Err(error)),
                }
            }
            result.and(directory.lookup(b"no such name").map(|_| ()))
        }),
        Content::File(extent)
            if u64::from(extent.block) + u64::from(extent.blocks) > reader.data_blocks().into() =>
        {
            panic!("an extent outside of the data file")
        }
        _ => Ok(()),
    };
    xattrs.and(content)
}

/// Makes the superblock's checksum right again (CRC-32C without inversion at the end, over the
/// first block from the superblock on).
fn seal(image: &mut [u8]) {
    image[1028..1032].fill(0);
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| {
            if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 }
        })
    };
    let sum = image[1024..4096].iter().fold(!0, step);
    image[1028..1032].copy_from_slice(&sum.to_le_bytes());
}

fn mutate(image: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(8) {
        // Most of what means something is after the superblock; zeros at the end of blocks mean
        // nothing.
        let at = 1024 + dice.below(image.len() - 1024);
        match dice.below(8) {
            0 => image.truncate((at & !7).max(4096)),
            1 => {
                let (from, length) = (dice.below(image.len()), dice.below(200));
                for n in 0..length {
                    if from + n < image.len() && at + n < image.len() {
                        image[at + n] = image[from + n];
                    }
                }
            }
            2..=4 => {
                let special = [0, 1, 0x7f, 0x80, 0xff, dice.next() as u8];
                let byte = *dice.pick(&special);
                let end = (at + 1 + dice.below(4)).min(image.len());
                image[at..end].fill(byte);
            }
            _ => image[at] ^= 1 << dice.below(8),
        }
    }
}

#[test]
fn broken_images_are_errors() {
    let corpus: Vec<Vec<u8>> = (1..=12)
        .map(|seed| {
            bytes(
                &Layer::random(seed, 12 * seed as usize).image(),
                if seed % 2 == 0 { Form::Flat } else { Form::WithDevice },
            )
        })
        .collect();
    for image in &corpus {
        assert!(read_all(image).unwrap() > 1);
    }
    let (mut opened, mut broken) = (0, 0);
    rounds(|dice, round| {
        let mut image = corpus[round % corpus.len()].clone();
        mutate(&mut image, dice);
        if !dice.one_in(10) {
            seal(&mut image);
        }
        if Reader::open(&image).is_ok() {
            opened += 1;
            broken += u32::from(read_all(&image).is_err());
        }
    });
    println!("{opened} opened, {broken} of them broken");
    assert!(opened > 100 && broken > 100, "{opened} opened, {broken} of them broken");
}

#[test]
fn any_entries_make_an_image_or_an_error() {
    rounds(|dice, round| {
        let mut maker = Maker::new(dice.next());
        let mut layer = Layer::new(Options::default(), maker.attrs());
        for _ in 0..dice.below(60) {
            let mut op = maker.op(&layer.model);
            if dice.one_in(4) {
                let at = dice.below(op.path.len() + 1);
                let piece = *dice.pick(&[
                    &b"/"[..],
                    b"..",
                    b"/../",
                    b".wh.",
                    b"\0",
                    b"./",
                    b"/./",
                    &[b'x'; 300],
                    b"a/b/c",
                ]);
                op.path.splice(at..at, piece.iter().copied());
            }
            if dice.one_in(10) {
                op.attrs.xattrs.insert(b"security.ima".to_vec(), dice.bytes(20));
                op.attrs.mode = dice.next() as u16;
            }
            // Dropped after an error by those who use it; it must stand what comes next all the
            // same.
            let _ = op.insert(&mut layer.builder);
            let _ = layer.model.apply(&op, layer.options.opaque.name());
        }
        let image = layer.image();
        let (with, flat) = (bytes(&image, Form::WithDevice), bytes(&image, Form::Flat));
        for image_bytes in [&with, &flat] {
            assert_eq!(read_all(image_bytes), Ok(image.inodes()), "round {round}");
        }
    });
}
