//! Room on the disk: what is given up for what comes.

use crate::{
    Error, Layer, LayerNumber, LayerStore, Result, SEGMENT, State, index::blocks_of, lease::Lease,
};
use rustix::fs::statvfs;
use std::{ops::Range, sync::Arc};

/// How a layer is used, as only its owner knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// No snapshot needs it, and nobody serves it.
    Nothing,
    /// Its data is served block by block, by somebody who can be told that some are gone.
    Served,
    /// A mount reads its data file.
    Mounted,
}

/// What [`LayerStore::make_room`] did, and what is left to do.
pub struct Room<'a> {
    /// Layers that were removed.
    pub removed: Vec<LayerNumber>,
    /// What else to give up. It ends when there is room, so nothing of it need be done before it is
    /// asked for.
    pub evictions: Evictions<'a>,
}

/// A piece of a layer that is given up.
///
/// Its chunks are not good any more. Whoever serves the layer is told, and nobody reads the blocks
/// there any more when [`LayerStore::punch`] is called. What is fetched again meanwhile stays. If
/// this is dropped instead, nothing is lost but the time to check the data again.
#[derive(Debug)]
pub struct Eviction {
    layer: Arc<Layer>,
    blocks: Range<u64>,
    chunks: Range<u32>,
}

impl Eviction {
    /// The layer.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// The blocks that nobody may be served any more.
    pub fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }
}

/// A piece of a layer that may be given up.
struct Candidate {
    /// When it was used: the segment's time in this life, then the layer's.
    used: (u32, u64),
    layer: Arc<Layer>,
    segment: u64,
}

/// Pieces of layers to give up, the one that was used longest ago first. See [`Room`].
pub struct Evictions<'a> {
    sum: Sum<'a>,
    /// The layer that the last one was of, and what it took before.
    given: Option<(Arc<Layer>, u64)>,
    candidates: std::vec::IntoIter<Candidate>,
}

/// What all layers take, counted once and kept up with what is given up of them: there can be many
/// layers, and many pieces. What comes meanwhile is seen by the next pass.
struct Sum<'a> {
    store: &'a LayerStore,
    /// Bytes that are to be stored.
    bytes: u64,
    total: u64,
}

impl Sum<'_> {
    /// What is to be given up still.
    fn short(&self) -> Result<u64> {
        self.store.short_with(self.total, self.bytes)
    }

    /// A layer took `before` bytes, and takes `now`.
    fn change(&mut self, before: u64, now: u64) {
        self.total = self.total.saturating_sub(before).saturating_add(now);
    }
}

impl LayerStore {
    /// Bytes that all layers take on the disk.
    pub fn total(&self) -> Result<u64> {
        self.layers().iter().try_fold(0, |sum, layer| Ok(sum + layer.usage()?.total()))
    }

    /// Bytes that have to be given up before `bytes` more can be stored.
    pub fn short_of(&self, bytes: u64) -> Result<u64> {
        let total = if self.options.max_bytes.is_some() { self.total()? } else { 0 };
        self.short_with(total, bytes)
    }

    /// The same if all layers take `total`.
    fn short_with(&self, total: u64, bytes: u64) -> Result<u64> {
        let most = self.options.max_bytes.unwrap_or(u64::MAX);
        let over = total.saturating_add(bytes).saturating_sub(most);
        let found = statvfs(self.directory()).map_err(Error::at("stat", self.directory()))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        Ok(over.max(self.options.min_free.saturating_add(bytes).saturating_sub(free)))
    }

    /// Makes room for `bytes`: removes layers that nobody uses, the one that was used longest ago
    /// first, and says which pieces of those that are served come next. Whether there is enough
    /// room then, [`LayerStore::short_of`] says.
    ///
    /// Layers that somebody has (an [`Arc`] of) are not removed. `in_use` is asked while nobody can
    /// find the layer, so it must not call the store.
    pub fn make_room(&self, bytes: u64, in_use: &dyn Fn(LayerNumber) -> Use) -> Result<Room<'_>> {
        let mut removed = Vec::new();
        let mut sum = Sum { store: self, bytes, total: self.total()? };
        if sum.short()? == 0 {
            return Ok(Room { removed, evictions: Evictions::of(sum, Vec::new()) });
        }
        // Those that wait there may be enough.
        self.empty_trash()?;
        let mut unused: Vec<_> = self
            .layers()
            .iter()
            .filter(|layer| in_use(layer.number()) == Use::Nothing)
            .map(|layer| Ok((layer.last_used(), layer.number(), layer.usage()?.total())))
            .collect::<Result<_>>()?;
        unused.sort_unstable();
        for (_, number, took) in unused {
            if sum.short()? == 0 {
                break;
            }
            if self.remove_unused(number, || in_use(number) == Use::Nothing)? {
                removed.push(number);
                self.empty_trash()?;
                sum.change(took, 0);
            }
        }
        let mut candidates = Vec::new();
        if sum.short()? > 0 {
            for layer in self.layers() {
                if in_use(layer.number()) == Use::Served {
                    layer.candidates(&mut candidates)?;
                }
            }
            candidates.sort_by_key(|candidate| candidate.used);
        }
        Ok(Room { removed, evictions: Evictions::of(sum, candidates) })
    }

    /// Takes the data of an eviction off the disk, except what was fetched again. Whoever serves
    /// the layer must have been told before, see [`Eviction`].
    ///
    /// [`Error::Mounted`] if the layer is whole and anybody but its owner has the data file open.
    pub fn punch(&self, eviction: Eviction) -> Result<()> {
        let Eviction { layer, chunks, .. } = eviction;
        layer.punch(chunks)
    }
}

impl<'a> Evictions<'a> {
    fn of(sum: Sum<'a>, candidates: Vec<Candidate>) -> Self {
        Self { sum, given: None, candidates: candidates.into_iter() }
    }

    fn find(&mut self) -> Result<Option<Eviction>> {
        // Its hole was made meanwhile, or was not.
        if let Some((layer, before)) = self.given.take() {
            self.sum.change(before, layer.usage()?.total());
        }
        while self.sum.short()? > 0 {
            let Some(Candidate { layer, segment, .. }) = self.candidates.next() else { break };
            let before = layer.usage()?.total();
            if let Some((chunks, blocks)) = layer.evict(segment)? {
                self.given = Some((layer.clone(), before));
                return Ok(Some(Eviction { layer, blocks, chunks }));
            }
        }
        Ok(None)
    }
}

impl Iterator for Evictions<'_> {
    type Item = Result<Eviction>;

    fn next(&mut self) -> Option<Self::Item> {
        self.find().transpose()
    }
}

impl Layer {
    /// Its segments that have data and can be fetched again.
    fn candidates(self: &Arc<Self>, all: &mut Vec<Candidate>) -> Result<()> {
        if self.is_sealed() {
            return Ok(());
        }
        let open = self.open()?;
        for (segment, used) in open.segments_with_data()? {
            let used = (used, self.last_used());
            all.push(Candidate { used, layer: self.clone(), segment });
        }
        Ok(())
    }

    /// Takes the chunks that begin in a segment back: they are not good any more. `None` if one of
    /// them is in use at the moment, or none is there.
    fn evict(&self, segment: u64) -> Result<Option<(Range<u32>, Range<u64>)>> {
        let open = self.open()?;
        let chunks = open.index.partition_point(|r| r.data < segment * SEGMENT)?
            ..open.index.partition_point(|r| r.data < (segment + 1) * SEGMENT)?;
        if chunks.is_empty() {
            return Ok(None);
        }
        let (first, last) = (open.index.get(chunks.start)?, open.index.get(chunks.end - 1)?);
        let blocks = blocks_of(&first).start..blocks_of(&last).end;
        Ok(open.take_back(&chunks, &blocks).then_some((chunks, blocks)))
    }

    fn punch(&self, chunks: Range<u32>) -> Result<()> {
        let open = self.open()?;
        let mut pieces = Vec::new();
        for chunk in open.index.chunks(chunks) {
            let chunk = chunk?;
            let end = open.padded_end(chunk.id.0, &chunk.record)?;
            pieces.push((chunk.id.0, chunk.record.data..end));
        }
        // Until the holes are made.
        let _lease = match self.state() {
            State::Whole => {
                let lease = Lease::take(&open.data)?.ok_or(Error::Mounted(self.number()))?;
                // On the disk before the first hole is.
                self.mark_lazy()?;
                Some(lease)
            }
            State::Lazy | State::Lying(_) => None,
        };
        open.punch_unverified(&pieces)
    }
}
