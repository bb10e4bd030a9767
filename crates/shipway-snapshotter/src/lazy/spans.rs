//! Which files are beside a file: read from a layer's image when something of it is missed first.

use parking_lot::Mutex;
use shipway_erofs::{BLOCK, Content, Nid, Reader};
use shipway_fault::{Fault, Result};
use shipway_layerstore::Layer;
use std::{
    collections::VecDeque,
    io::Read as _,
    ops::Range,
    sync::{Arc, Weak},
};

/// Layers whose files are remembered: those that are read at the moment.
const REMEMBERED: usize = 8;
/// Largest image that is looked at, in bytes; beyond, nothing is read ahead by directory.
const MAX_IMAGE: u64 = 64 << 20;

/// The files of a layer, by their first block.
struct Files {
    /// First block, blocks, and the number of the directory.
    all: Vec<(u32, u32, u32)>,
}

/// The files of the layers that are read at the moment.
#[derive(Default)]
pub struct Neighbors {
    known: Mutex<VecDeque<(u32, Arc<Files>)>>,
}

impl Neighbors {
    /// A function that gives the blocks of the files in the directory of the file that a block is
    /// of.
    pub fn spans(self: &Arc<Self>, layer: &Arc<Layer>) -> shipway_lazyfetch::Spans {
        // The function lives in the engine, the layer must not live by it.
        let (all, layer): (Arc<Self>, Weak<Layer>) = (self.clone(), Arc::downgrade(layer));
        Arc::new(move |block| layer.upgrade().map_or_else(Vec::new, |l| all.beside(&l, block)))
    }

    fn beside(&self, layer: &Layer, block: u64) -> Vec<Range<u64>> {
        match self.files(layer) {
            Ok(files) => files.beside(block),
            Err(fault) => {
                tracing::debug!(layer = %layer.number(), %fault, "nothing is read ahead");
                Vec::new()
            }
        }
    }

    fn files(&self, layer: &Layer) -> Result<Arc<Files>> {
        let number = layer.number().0;
        let lock = || self.known.lock();
        if let Some((_, files)) = lock().iter().find(|(n, _)| *n == number) {
            return Ok(files.clone());
        }
        let files = Arc::new(Files::of(layer)?);
        let mut known = lock();
        known.push_front((number, files.clone()));
        known.truncate(REMEMBERED);
        Ok(files)
    }

    /// The layer is gone.
    pub fn forget(&self, number: u32) {
        let mut known = self.known.lock();
        known.retain(|(n, _)| *n != number);
    }
}

impl Files {
    fn of(layer: &Layer) -> Result<Self> {
        if layer.meta_bytes() > MAX_IMAGE {
            return Err(Fault::invalid("the image is too large to be looked at"));
        }
        let mut bytes = Vec::with_capacity(layer.meta_bytes() as usize);
        layer
            .meta()?
            .read_to_end(&mut bytes)
            .map_err(|e| Fault::io("read the image of a layer", e))?;
        let broken = |e| Fault::internal(format!("the image of a layer: {e}"));
        let reader = Reader::open(&bytes).map_err(broken)?;
        let mut all = Vec::new();
        let (mut directories, mut number): (Vec<Nid>, u32) = (vec![reader.root()], 0);
        while let Some(nid) = directories.pop() {
            number += 1;
            let inode = reader.metadata(nid).map_err(broken)?;
            let directory = reader.directory(&inode).map_err(broken)?;
            for entry in directory.entries(0) {
                let entry = entry.map_err(broken)?;
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let inode = reader.metadata(entry.nid).map_err(broken)?;
                match inode.content {
                    Content::Directory => directories.push(entry.nid),
                    Content::File(extent) if inode.size > 0 => {
                        let blocks = u32::try_from(inode.size.div_ceil(BLOCK)).unwrap_or(u32::MAX);
                        all.push((extent.block, blocks, number));
                    }
                    _ => {}
                }
            }
        }
        all.sort_unstable();
        all.dedup_by_key(|(block, ..)| *block);
        Ok(Self { all })
    }

    fn beside(&self, block: u64) -> Vec<Range<u64>> {
        let at = self.all.partition_point(|(first, ..)| u64::from(*first) <= block);
        let Some((_, _, directory)) = at.checked_sub(1).and_then(|at| self.all.get(at)) else {
            return Vec::new();
        };
        let same = self.all.iter().filter(|(.., d)| d == directory);
        same.map(|(first, blocks, _)| u64::from(*first)..u64::from(*first) + u64::from(*blocks))
            .collect()
    }
}
