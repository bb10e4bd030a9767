//! Random operations against a model of what must hold: whatever is good is right, whatever was
//! fetched is good, whoever ends the process or the machine and whenever.

#![allow(clippy::unwrap_used)]

mod common;

use common::{model::Dice, *};
use shipway_layerstore::{
    Chunk, Error, Layer, LayerNumber, LayerStore, Options, Result, State, Use,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::Arc,
};

/// What a keeper has: a bit for each block of each layer that was announced and not dropped.
type Maps = BTreeMap<LayerNumber, BTreeSet<u64>>;

struct World<'a> {
    dice: Dice,
    directory: &'a Path,
    blobs: &'a [Blob],
    store: Option<LayerStore>,
    boot: u32,
    maps: Maps,
    /// Numbers that were given in this boot.
    given: BTreeSet<LayerNumber>,
    /// Layers that the model knows to be there, by blob.
    there: BTreeMap<usize, LayerNumber>,
    done: BTreeMap<&'static str, usize>,
}

impl World<'_> {
    fn store(&self) -> &LayerStore {
        self.store.as_ref().unwrap()
    }

    /// A layer that is there.
    fn any(&mut self) -> Option<(usize, Arc<Layer>)> {
        let all: Vec<_> = self.there.iter().map(|(b, n)| (*b, *n)).collect();
        let (blob, number) = *all.get(self.dice.below(all.len()))?;
        let layer = self.store().get(number).expect("it was not removed");
        assert_eq!(layer.key(), self.blobs[blob].key);
        Some((blob, layer))
    }

    fn blocks(&mut self, blob: usize) -> Range<u64> {
        let all = self.blobs[blob].all().end + 1;
        let (a, b) = (self.dice.next() % all, self.dice.next() % all);
        a.min(b)..a.max(b)
    }

    fn have(&mut self, layer: &Layer, good: &[Range<u64>]) {
        self.maps.entry(layer.number()).or_default().extend(good.iter().cloned().flatten());
    }

    fn step(&mut self) {
        let what = self.dice.below(100);
        let name = match what {
            0..=9 => self.create(),
            10..=44 => self.fetch(),
            45..=54 => self.write_wrong(),
            55..=64 => self.evict(),
            65..=68 => self.remove(),
            69..=76 => self.finish(),
            77..=86 => self.restart(),
            87..=91 => self.reboot(),
            _ => self.verify(),
        };
        *self.done.entry(name).or_default() += 1;
        self.check();
    }

    fn create(&mut self) -> &'static str {
        let blob = self.dice.below(self.blobs.len());
        let layer = self.blobs[blob].create(self.store());
        match self.there.insert(blob, layer.number()) {
            Some(known) => assert_eq!(known, layer.number()),
            None => assert!(self.given.insert(layer.number()), "{} twice", layer.number()),
        }
        "create"
    }

    fn fetch(&mut self) -> &'static str {
        let Some((blob, layer)) = self.any() else { return "nothing" };
        let blocks = self.blocks(blob);
        let good = self.blobs[blob].fetch(&layer, blocks.clone()).unwrap();
        // Sometimes the process ends between writing and telling.
        if self.dice.one_in(4) {
            drop(layer);
            return self.restart();
        }
        self.have(&layer, &good);
        assert!(layer.good().unwrap().has(&blocks));
        let map = &self.maps[&layer.number()];
        assert!(blocks.clone().all(|b| map.contains(&b)), "what was asked for is told");
        "fetch"
    }

    fn write_wrong(&mut self) -> &'static str {
        let Some((blob, layer)) = self.any() else { return "nothing" };
        let blocks = self.blocks(blob);
        let chunks: Vec<Chunk> = layer.missing(blocks).unwrap().collect::<Result<_>>().unwrap();
        let Some(chunk) = chunks.first() else { return "nothing" };
        let mut bytes = self.blobs[blob].bytes_of(chunk).to_vec();
        let at = self.dice.below(bytes.len());
        bytes[at] ^= 0x10;
        assert!(matches!(layer.write(chunk, &bytes), Err(Error::Digest { .. })));
        "write wrong"
    }

    fn verify(&mut self) -> &'static str {
        let Some((blob, layer)) = self.any() else { return "nothing" };
        let blocks = self.blocks(blob);
        let good = layer.verify_blocks(blocks).unwrap();
        self.have(&layer, good.ranges());
        "verify"
    }

    fn evict(&mut self) -> &'static str {
        let served: BTreeSet<LayerNumber> =
            self.there.values().copied().filter(|_| self.dice.one_in(2)).collect();
        let in_use = |n| if served.contains(&n) { Use::Served } else { Use::Mounted };
        let store = self.store.as_ref().unwrap();
        let some = self.dice.next() % (200 << 10);
        let evictions: Vec<_> = store
            .make_room(some, &in_use)
            .unwrap()
            .evictions
            .take(2)
            .collect::<Result<_>>()
            .unwrap();
        for eviction in evictions {
            assert!(served.contains(&eviction.layer().number()));
            if let Some(map) = self.maps.get_mut(&eviction.layer().number()) {
                eviction.blocks().for_each(|b| _ = map.remove(&b));
            }
            match self.dice.below(4) {
                0 => return self.restart(),
                _ => store.punch(eviction).unwrap(),
            }
        }
        "evict"
    }

    fn remove(&mut self) -> &'static str {
        let Some((blob, layer)) = self.any() else { return "nothing" };
        self.store().remove(layer.number()).unwrap();
        self.there.remove(&blob);
        self.maps.remove(&layer.number());
        if self.dice.one_in(2) {
            self.store().empty_trash().unwrap();
        }
        "remove"
    }

    fn finish(&mut self) -> &'static str {
        let Some((blob, layer)) = self.any() else { return "nothing" };
        let (blob, mut told) = (&self.blobs[blob], Vec::new());
        let mut tell = |good: shipway_layerstore::Good| told.extend_from_slice(good.ranges());
        if self.dice.one_in(2) {
            let cut = &blob.bytes[..self.dice.below(blob.bytes.len())];
            assert!(layer.finish(&blob.toc, cut, &mut tell).is_err());
        } else {
            layer.finish(&blob.toc, &blob.bytes[..], &mut tell).unwrap();
            assert!(layer.hold_whole().unwrap().is_some());
        }
        self.have(&layer, &told);
        "finish"
    }

    /// The process ends without a word, and another begins.
    fn restart(&mut self) -> &'static str {
        self.store = None;
        self.open();
        assert!(!self.store().is_first_of_boot());
        for layer in self.store().layers() {
            let Some(map) = self.maps.get(&layer.number()) else { continue };
            let told: Vec<_> = map.iter().map(|b| *b..*b + 1).collect();
            let blob = self.blobs.iter().find(|blob| blob.key == layer.key()).unwrap();
            assert!(layer.restore(&map_of(layer.data_blocks(), &told)).unwrap());
            if layer.state() != State::Whole {
                assert_eq!(layer.good().unwrap().ranges(), blob.known_by(&told));
            }
        }
        "restart"
    }

    /// The machine ends without a word: of the data that nobody waited for, anything may be gone.
    fn reboot(&mut self) -> &'static str {
        self.store = None;
        for (blob, number) in &self.there {
            let path = self.directory.join(format!("layers/{number}"));
            if path.join("whole").exists() {
                continue;
            }
            let data = std::fs::File::options().write(true).open(path.join("data")).unwrap();
            for record in &self.blobs[*blob].records {
                if self.dice.one_in(5) {
                    let at = record.data + self.dice.next() % record.size;
                    let some = (record.data + record.size - at).min(1 + self.dice.next() % 5000);
                    let byte = if self.dice.one_in(2) { 0 } else { 0x77 };
                    data.write_all_at(&vec![byte; some as usize], at).unwrap();
                }
            }
            let claims = std::fs::File::options().write(true).open(path.join("claims")).unwrap();
            let length = claims.metadata().unwrap().len() as usize;
            if self.dice.one_in(2) && length > 0 {
                let at = self.dice.below(length);
                claims.write_all_at(&[self.dice.next() as u8], at as u64).unwrap();
            }
        }
        self.boot += 1;
        self.maps.clear();
        self.given.clear();
        self.open();
        assert!(self.store().is_first_of_boot());
        for layer in self.store().layers() {
            if layer.state() == State::Lazy {
                assert!(layer.good().unwrap().is_empty());
            }
        }
        "reboot"
    }

    fn open(&mut self) {
        let options = Options { max_bytes: Some(150 << 10), ..options(&format!("{}", self.boot)) };
        let store = LayerStore::open(self.directory, options).unwrap();
        assert!(store.damaged().is_empty());
        let known: Vec<LayerNumber> = self.there.values().copied().collect();
        let found: BTreeSet<_> = store.layers().iter().map(|l| l.number()).collect();
        assert_eq!(found, known.into_iter().collect());
        self.store = Some(store);
    }

    fn check(&self) {
        for (blob, number) in &self.there {
            let (blob, layer) = (&self.blobs[*blob], self.store().get(*number).unwrap());
            blob.check_good(&layer);
            // What the keeper serves is right. The store may know less, after a restart.
            if let Some(map) = self.maps.get(number) {
                blob.check(&layer, &sorted(map.iter().map(|b| *b..*b + 1).collect()));
            }
        }
    }
}

#[test]
fn whatever_happens_nothing_wrong_is_good() {
    let time = std::env::var("SHIPWAY_FUZZ_SECONDS").ok().and_then(|n| n.parse::<u64>().ok());
    let (first, deadline) = match time {
        Some(seconds) => {
            let now = std::time::SystemTime::now();
            let seed = now.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_secs();
            let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
            (seed, Some(until))
        }
        None => (1, None),
    };
    let mut done: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in first.. {
        if deadline.map_or(seed > 12, |until| std::time::Instant::now() > until) {
            break;
        }
        println!("seed {seed}");
        let blobs: Vec<Blob> = (0..4).map(|n| random_blob(seed * 4 + n, 20)).collect();
        let directory = directory();
        let mut world = World {
            dice: Dice::new(seed * 2 + 1),
            directory: directory.path(),
            blobs: &blobs,
            store: None,
            boot: 0,
            maps: Maps::new(),
            given: BTreeSet::new(),
            there: BTreeMap::new(),
            done: BTreeMap::new(),
        };
        world.open();
        (0..150).for_each(|_| world.step());
        world.done.into_iter().for_each(|(name, n)| *done.entry(name).or_default() += n);
    }
    println!("{done:?}");
    for name in ["create", "fetch", "write wrong", "evict", "remove", "finish", "restart", "reboot"]
    {
        assert!(done[name] > 5, "{done:?}");
    }
}
