//! A process that makes, fetches, gives up and removes layers is killed at any moment, again and
//! again. What it told to be good is right in the next one's eyes, and everything opens.
//!
//! This program is both.

#![allow(clippy::unwrap_used)]

mod common;

use common::{model::Dice, *};
use shipway_layerstore::{LayerNumber, LayerStore, Options, State, Use};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
};

const ROUNDS: u64 = 40;
/// What the first argument of the one that is killed is.
const CHILD: &str = "to-be-killed";

fn open(directory: &Path) -> LayerStore {
    let options = Options { max_bytes: Some(400 << 10), ..options("boot") };
    LayerStore::open(directory, options).unwrap()
}

fn blobs() -> Vec<Blob> {
    (50..54).map(|seed| random_blob(seed, 30)).collect()
}

/// Says what it does, a line each, in one system call, as it would tell a keeper.
fn tell(line: String) {
    std::io::stdout().write_all(line.as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}

fn child(directory: &Path, seed: u64) {
    let (blobs, store, mut dice) = (blobs(), open(directory), Dice::new(seed * 2 + 1));
    tell("open\n".to_owned());
    loop {
        let blob = dice.pick(&blobs);
        let layer = blob.create(&store);
        let have = |good: &[std::ops::Range<u64>]| {
            for blocks in good {
                tell(format!("have {} {} {}\n", layer.number(), blocks.start, blocks.end));
            }
        };
        match dice.below(12) {
            0 => {
                tell(format!("remove {}\n", layer.number()));
                store.remove(layer.number()).unwrap();
                if dice.one_in(2) {
                    store.empty_trash().unwrap();
                }
            }
            1 => layer.finish(&blob.toc, &blob.bytes[..], &mut |good| have(good.ranges())).unwrap(),
            2 => layer.add_repository(&format!("{}", dice.next() % 100)).unwrap(),
            3 | 4 => {
                let room = store.make_room(50 << 10, &|_| Use::Served).unwrap();
                for eviction in room.evictions.take(3) {
                    let eviction = eviction.unwrap();
                    let (n, blocks) = (eviction.layer().number(), eviction.blocks());
                    tell(format!("drop {n} {} {}\n", blocks.start, blocks.end));
                    store.punch(eviction).unwrap();
                }
            }
            _ => {
                let from = dice.next() % blob.all().end;
                let to = (from + 1 + dice.next() % 10).min(blob.all().end);
                have(&blob.fetch(&layer, from..to).unwrap());
            }
        }
    }
}

fn parent() {
    let (directory, blobs) = (directory(), blobs());
    let mut maps: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
    let (mut lines, mut good) = (0, 0);
    for round in 1..=ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(CHILD)
            .arg(directory.path())
            .arg(round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        // It is killed somewhere after so many lines, while it goes on.
        let (mut line, mut left) = (String::new(), 1 + (round * 7919) % 97);
        while left > 0 && output.read_line(&mut line).unwrap() > 0 {
            left -= 1;
            lines += take(&mut maps, &line);
            line.clear();
        }
        assert_eq!(left, 0, "it ended by itself");
        for _ in 0..(round * 104_729) % 5000 {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died was said.
        while output.read_line(&mut line).unwrap() > 0 {
            lines += take(&mut maps, &line);
            line.clear();
        }
        let store = open(directory.path());
        assert!(store.damaged().is_empty(), "{:?}", store.damaged());
        for (number, map) in &maps {
            let Some(layer) = store.get(LayerNumber(*number)) else {
                panic!("layer {number} was not removed");
            };
            let blob = blobs.iter().find(|blob| blob.key == layer.key()).unwrap();
            let told: Vec<_> = map.iter().map(|b| *b..*b + 1).collect();
            assert!(layer.restore(&map_of(layer.data_blocks(), &told)).unwrap());
            let found = blob.check_good(&layer);
            good += found.iter().map(|r| r.end - r.start).sum::<u64>();
            blob.check(&layer, &sorted(told.clone()));
            if layer.state() != State::Whole {
                assert_eq!(found, blob.known_by(&told), "layer {number}");
            }
            // Whatever else it claims is checked.
            drop(layer.verify_blocks(blob.all()).unwrap());
            blob.check_good(&layer);
        }
    }
    println!("{ROUNDS} kills after {lines} lines, {good} good blocks looked at");
    assert!(lines > 1000 && good > 1000);
}

/// Notes what the child said; a line that was cut by its death says nothing.
#[track_caller]
fn take(maps: &mut BTreeMap<u32, BTreeSet<u64>>, line: &str) -> usize {
    let Some(line) = line.strip_suffix('\n') else { return 0 };
    let words: Vec<&str> = line.split(' ').collect();
    let number = |n: usize| words[n].parse::<u64>().unwrap();
    match words[0] {
        "have" => maps.entry(number(1) as u32).or_default().extend(number(2)..number(3)),
        "drop" => {
            let map = maps.entry(number(1) as u32).or_default();
            (number(2)..number(3)).for_each(|b| _ = map.remove(&b));
        }
        "remove" => _ = maps.remove(&(number(1) as u32)),
        _ => assert_eq!(line, "open"),
    }
    1
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match &words[..] {
        [child_word, directory, seed] if child_word == CHILD => {
            child(Path::new(directory), seed.parse().unwrap())
        }
        _ => parent(),
    }
}
