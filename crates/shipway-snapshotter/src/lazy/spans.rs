//! Which files are beside a file, and which nearly every container reads: from a layer's image,
//! when something of it is missed first or nothing is known of what will be read.

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

/// What nearly every container of a Linux distribution reads before its own program does anything,
/// by how the names of the files begin: who its user is, where libraries are, the dynamic loader
/// and the C library (of glibc before 2.34 and since, and of musl), a shell.
const FIRST: [&str; 12] = [
    "passwd",
    "group",
    "nsswitch.conf",
    "ld.so.cache",
    "ld-linux-",
    "ld-2.",
    "ld-musl-",
    "libc.so.6",
    "libc-2.",
    "dash",
    "busybox",
    "bash",
];
/// Such files are no deeper, as `/usr/lib/x86_64-linux-gnu/libc.so.6`, and no longer, in blocks.
const FIRST_DEPTH: usize = 4;
const FIRST_BLOCKS: u32 = (3 << 20) / BLOCK as u32;
/// Most of them: a layer that has many files with such names is something else.
const MAX_FIRST: usize = 24;
/// A layer whose image is shorter, in bytes, has too few files for a system.
const MIN_SYSTEM: u64 = 16 << 10;

/// The files of a layer, by their first block.
struct Files {
    /// First block, blocks, and the number of the directory.
    all: Vec<(u32, u32, u32)>,
    /// The blocks of those that nearly every container reads, in the order of [`FIRST`].
    first: Vec<Range<u64>>,
}

/// The place of a file in [`FIRST`].
fn place_in_first(name: &[u8]) -> Option<usize> {
    FIRST.iter().position(|first| match first.ends_with(['-', '.']) {
        true => name.starts_with(first.as_bytes()),
        false => name == first.as_bytes(),
    })
}

fn blocks_of(first: u32, blocks: u32) -> Range<u64> {
    u64::from(first)..u64::from(first) + u64::from(blocks)
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

/// The blocks of a layer that nearly every container of its image reads first. The layer is not
/// remembered for that: most layers have none.
pub fn first(layer: &Layer) -> Vec<Range<u64>> {
    if layer.meta_bytes() < MIN_SYSTEM {
        return Vec::new();
    }
    Files::of(layer).map(|files| files.first).unwrap_or_default()
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
        let (mut all, mut first) = (Vec::new(), Vec::new());
        let (mut directories, mut number): (Vec<(Nid, usize)>, u32) = (vec![(reader.root(), 1)], 0);
        while let Some((nid, depth)) = directories.pop() {
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
                    Content::Directory => directories.push((entry.nid, depth + 1)),
                    Content::File(extent) if inode.size > 0 => {
                        let blocks = u32::try_from(inode.size.div_ceil(BLOCK)).unwrap_or(u32::MAX);
                        all.push((extent.block, blocks, number));
                        if let Some(place) = place_in_first(entry.name)
                            && depth <= FIRST_DEPTH
                            && blocks <= FIRST_BLOCKS
                        {
                            first.push((place, extent.block, blocks));
                        }
                    }
                    _ => {}
                }
            }
        }
        all.sort_unstable();
        all.dedup_by_key(|(block, ..)| *block);
        first.sort_unstable();
        first.dedup();
        first.truncate(MAX_FIRST);
        let first = first.into_iter().map(|(_, block, blocks)| blocks_of(block, blocks)).collect();
        Ok(Self { all, first })
    }

    fn beside(&self, block: u64) -> Vec<Range<u64>> {
        let at = self.all.partition_point(|(first, ..)| u64::from(*first) <= block);
        let Some((_, _, directory)) = at.checked_sub(1).and_then(|at| self.all.get(at)) else {
            return Vec::new();
        };
        let same = self.all.iter().filter(|(.., d)| d == directory);
        same.map(|(first, blocks, _)| blocks_of(*first, *blocks)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_nearly_every_container_reads() {
        for (name, place) in [
            ("passwd", Some(0)),
            ("passwd-", None),
            ("ld-linux-x86-64.so.2", Some(4)),
            ("ld-linux", None),
            ("ld-2.31.so", Some(5)),
            ("libc.so.6", Some(7)),
            ("libc.so.60", None),
            ("libcrypto.so.3", None),
            ("bash", Some(11)),
            ("bashrc", None),
        ] {
            assert_eq!(place_in_first(name.as_bytes()), place, "{name}");
        }
    }
}
