//! The blob of a layer without a table of contents, and what is in it.

use super::{Cut, options, sorted};
use shipway_layerstore::{Error, Layer, LayerKey, LayerStore, State};
use shipway_testkit::Dice;
use std::{io::Write as _, ops::Range, sync::Arc};

pub fn gzip(level: u32, tar: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    gzip.write_all(tar).unwrap();
    gzip.finish().unwrap()
}

pub struct Blob {
    pub bytes: Vec<u8>,
    /// The layer's data when all of it is there.
    pub data: Vec<u8>,
}

impl Blob {
    pub fn all(&self) -> Range<u64> {
        0..self.data.len() as u64 / 4096
    }

    /// Fetches what is missing of some blocks; in how many pieces.
    pub fn fetch(&self, layer: &Layer, blocks: Range<u64>) -> Result<usize, Error> {
        drop(layer.verify_blocks(blocks.clone())?);
        let mut fetched = 0;
        for extent in layer.extents(blocks)?.collect::<Result<Vec<_>, _>>()? {
            let bytes = &self.bytes[extent.offset as usize..extent.end() as usize];
            for frame in &extent.frames {
                layer.write_frame(frame, extent.bytes_of(frame, bytes), drop)?;
                fetched += 1;
            }
        }
        Ok(fetched)
    }

    /// Whatever is good is right.
    #[track_caller]
    pub fn check(&self, layer: &Layer) -> Vec<Range<u64>> {
        use std::os::unix::fs::FileExt as _;
        let (good, data) = (layer.good().unwrap(), layer.data().unwrap());
        for blocks in good.ranges() {
            let mut found = vec![1; ((blocks.end - blocks.start) * 4096) as usize];
            data.read_exact_at(&mut found, blocks.start * 4096).unwrap();
            assert!(found == self.data[blocks.start as usize * 4096..blocks.end as usize * 4096]);
        }
        good.ranges().to_vec()
    }

    /// The right blob makes the layer with `key` whole, and wrong ones do not.
    #[track_caller]
    pub fn makes_whole(
        &self,
        key: &LayerKey,
        (directory, store, stored): (tempfile::TempDir, LayerStore, Arc<Layer>),
        seed: u64,
    ) {
        let mut dice = Dice::new(seed);
        // Some of it was fetched before.
        let part = dice.next() % (self.all().end + 1);
        self.fetch(&stored, 0..part).unwrap();
        // Wrong bytes are no verdict.
        let mut flipped = self.bytes.clone();
        let at = dice.below(flipped.len());
        flipped[at] ^= 1 << dice.below(8);
        for wrong in [&flipped[..], &self.bytes[..at], &[&self.bytes[..], b"x"].concat()] {
            let refused = stored.finish_plain(wrong, &mut drop);
            assert!(matches!(refused, Err(Error::Blob { .. })), "{refused:?}");
            assert_eq!(stored.state(), State::Lazy);
            self.check(&stored);
        }
        let dead = stored.finish_plain(Cut(&self.bytes[..at]), &mut drop);
        assert!(matches!(dead, Err(Error::Io { .. })), "{dead:?}");
        stored.finish_plain(&self.bytes[..], &mut drop).unwrap();
        assert_eq!(stored.state(), State::Whole);
        assert_eq!(sorted(self.check(&stored)), sorted(vec![self.all()]));
        // It is believed after the next boot.
        drop((stored, store));
        let store = LayerStore::open(directory.path(), options("boot 2")).unwrap();
        let stored = store.find(key).unwrap();
        assert_eq!(stored.state(), State::Whole);
        assert_eq!(sorted(self.check(&stored)), sorted(vec![self.all()]));
    }
}
