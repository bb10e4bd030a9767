//! What is done with requests and commands, with the kernel and the daemon behind a port.
//!
//! Threads that read requests call [`Engine::handle`]; one other thread does what the daemon says
//! and looks after deadlines. They meet in three places:
//!
//! - Bits of good blocks are atomic. A read whose bits are all set is answered at once.
//! - Any other is parked under the lock of [`Waiting`], after a second look at the bits. The
//!   thread that sets bits looks at what waits afterwards, under the same lock. So one of them sees
//!   the other.
//! - A thread says that it handles a request ([`Engine::reader`]) before it looks at bits. The
//!   thread that clears bits waits until each thread has come to the end of the request that it
//!   then had.

use crate::{
    layer::{File, Layer, file_of, named, node_of},
    limits::{MAX_PAGES, MAX_READ},
    message::{self, Event},
    parking::{ParkedRead, Waiting},
    tree,
};
use rustix::io::Errno;
use shipway_fusewire::{
    DirBuffer, InitOptions, InitRequest, NodeAttributes, NodeId, Opened, Operation, Parked, Reply,
    Request, Slots, StatFs, Unique,
};
use std::{
    collections::{BTreeMap, btree_map},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Threads that read requests.
pub(crate) const READERS: usize = 2;
/// Bytes of a read that is answered at all, which a predecessor may have negotiated.
const LARGEST_READ: usize = 16 << 20;
/// Reads in flight that no process waits for. The kernel holds back what is beyond it, reads of
/// what is local included, so it is far above what misses can be.
const MAX_BACKGROUND: u16 = 8192;

/// The kernel and the daemon, as the engine sees them.
pub(crate) trait Outside {
    /// Sends the kernel an answer. It is not an error if the kernel no longer wants it.
    fn answer(&self, answer: &[u8]);
    /// Reports an event to the daemon, without waiting; false if that cannot be done now.
    fn report(&self, event: &Event) -> bool;
    /// Wakes the thread that looks after deadlines.
    fn wake(&self);
}

/// Blocks that are no longer valid, and the requests that may still be reading them.
#[derive(Debug)]
pub(crate) struct Dropping {
    pub(crate) n: u32,
    pub(crate) blocks: Range<u64>,
    readers: [u64; READERS],
}

/// Serves one connection.
pub(crate) struct Engine<O> {
    pub(crate) outside: O,
    slots: Slots,
    layers: RwLock<BTreeMap<u32, Arc<Layer>>>,
    waiting: Mutex<Waiting>,
    /// Odd while the thread of this number handles a request; never the same again.
    readers: [AtomicU64; READERS],
    /// Whether a thread waits for the requests in progress.
    dropping: AtomicBool,
    /// How long a read waits at most.
    deadline: Duration,
}

/// A thread that handles a request, as long as it does.
pub(crate) struct ReaderGuard<'a, O: Outside> {
    engine: &'a Engine<O>,
    number: usize,
}

impl<O: Outside> Drop for ReaderGuard<'_, O> {
    fn drop(&mut self) {
        self.engine.readers[self.number].fetch_add(1, Ordering::SeqCst);
        if self.engine.dropping.load(Ordering::SeqCst) {
            self.engine.outside.wake();
        }
    }
}

impl<O: Outside> Engine<O> {
    pub(crate) fn new(outside: O, slots: Slots, layers: Vec<Layer>, deadline: Duration) -> Self {
        let layers = layers.into_iter().map(|layer| (layer.number(), Arc::new(layer))).collect();
        Self {
            outside,
            slots,
            layers: RwLock::new(layers),
            waiting: Mutex::default(),
            readers: [const { AtomicU64::new(0) }; READERS],
            dropping: AtomicBool::new(false),
            deadline,
        }
    }

    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn layer(&self, n: u32) -> Option<Arc<Layer>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).get(&n).cloned()
    }

    /// All layers, by number.
    pub(crate) fn layers(&self) -> Vec<Arc<Layer>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The thread `number` handles a request from now on.
    pub(crate) fn reader(&self, number: usize) -> ReaderGuard<'_, O> {
        self.readers[number].fetch_add(1, Ordering::SeqCst);
        ReaderGuard { engine: self, number }
    }

    /// Whether no thread handles a request.
    pub(crate) fn is_quiet(&self) -> bool {
        self.readers.iter().all(|r| r.load(Ordering::SeqCst).is_multiple_of(2))
    }

    /// Answers a request, or parks it. Allocates nothing for a read of what is there, if `reply`
    /// has room for [`MAX_READ`].
    pub(crate) fn handle(&self, request: &Request<'_>, reply: &mut Reply, now: Instant) {
        let (unique, node) = (request.header.unique, request.header.node);
        let answer = match request.operation {
            Operation::Read { offset, size, .. } => {
                return self.read(Parked { unique, node, offset, size }, reply, now);
            }
            Operation::Interrupt { unique: of } => return self.interrupt(unique, of, reply),
            Operation::Init(offer) => init(unique, &offer, reply),
            Operation::StatFs => {
                let layers = self.layers();
                let blocks = layers.iter().map(|l| l.data_blocks()).sum();
                reply.statfs(unique, StatFs { blocks, files: layers.len() as u64 })
            }
            Operation::Release { .. } | Operation::ReleaseDir { .. } => reply.done(unique),
            Operation::Forget { .. } | Operation::BatchForget(_) | Operation::Destroy => return,
            Operation::Other(_) => reply.error(unique, Errno::NOSYS),
            about => match file_of(node) {
                Some((n, File::Tree(nid))) => match self.layer(n) {
                    Some(layer) => tree::answer(&layer, nid, &about, unique, reply),
                    None => reply.error(unique, Errno::IO),
                },
                _ => self.of_directory(node, &about, unique, reply),
            },
        };
        self.outside.answer(answer);
    }

    /// Attributes of the directory or a file in it.
    fn attributes(&self, node: NodeId) -> Result<NodeAttributes, Errno> {
        if node == NodeId::ROOT {
            return Ok(NodeAttributes::new(node, 0o40_500, 0, 2));
        }
        let (n, file) = file_of(node).ok_or(Errno::NOENT)?;
        self.layer(n).ok_or(Errno::NOENT)?.attributes(file)
    }

    fn lookup(&self, node: NodeId, name: &[u8]) -> Result<NodeAttributes, Errno> {
        // The kernel finds a file by its number as the entry `.` of it.
        match name {
            b"." => return self.attributes(node),
            b".." => return self.attributes(NodeId::ROOT),
            _ if node != NodeId::ROOT => return Err(Errno::NOTDIR),
            _ => {}
        }
        let (n, entry) = named(name).ok_or(Errno::NOENT)?;
        let layer = self.layer(n).ok_or(Errno::NOENT)?;
        layer.attributes(layer.file(entry)?)
    }

    /// Answers what is asked of the directory or a file in it, except to read it.
    fn of_directory<'r>(
        &self,
        node: NodeId,
        operation: &Operation<'_>,
        unique: Unique,
        reply: &'r mut Reply,
    ) -> &'r [u8] {
        match *operation {
            Operation::Lookup { name } => match self.lookup(node, name) {
                Ok(found) => reply.entry(unique, &found),
                Err(error) => reply.error(unique, error),
            },
            Operation::GetAttr => match self.attributes(node) {
                Ok(found) => reply.attributes(unique, &found),
                Err(error) => reply.error(unique, error),
            },
            Operation::Open { .. } => match self.attributes(node) {
                Ok(_) => reply
                    .opened(unique, Opened { direct: true, no_flush: true, ..Opened::default() }),
                Err(error) => reply.error(unique, error),
            },
            // Layers come and go, so the kernel keeps no listing.
            Operation::OpenDir => reply.opened(unique, Opened::default()),
            Operation::ReadDir { offset, size, .. } => {
                let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
                let size = (size as usize).min(MAX_READ);
                reply.data(unique, size, |bytes| Ok(list(&layers, offset, bytes, false)))
            }
            Operation::ReadDirPlus { offset, size, .. } => {
                let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
                let size = (size as usize).min(MAX_READ);
                reply.data(unique, size, |bytes| Ok(list(&layers, offset, bytes, true)))
            }
            // `ENOSYS` would be the answer for trees as well: the kernel would not ask again.
            Operation::GetXattr { .. } => reply.error(unique, Errno::NODATA),
            Operation::ListXattr { size: 0 } => reply.size(unique, 0),
            Operation::ListXattr { .. } => reply.data(unique, 0, |_| Ok(0)),
            Operation::ReadLink => reply.error(unique, Errno::INVAL),
            _ => reply.error(unique, Errno::NOSYS),
        }
    }

    /// Answers a read if everything that it reads is there.
    fn answer_if_there(&self, read: &Parked, reply: &mut Reply) -> bool {
        let Some((n, file)) = file_of(read.node) else {
            self.outside.answer(reply.error(read.unique, Errno::NOENT));
            return true;
        };
        let Some(layer) = self.layer(n) else { return false };
        match layer.missing(file, read.offset, read.size) {
            Ok(None) => self.answer_from(&layer, file, read, reply),
            Ok(Some(_)) => return false,
            Err(error) => self.outside.answer(reply.error(read.unique, error)),
        }
        true
    }

    fn answer_from(&self, layer: &Layer, file: File, read: &Parked, reply: &mut Reply) {
        let size = read.size as usize;
        if size > LARGEST_READ {
            // A short answer would be the end of the file.
            return self.outside.answer(reply.error(read.unique, Errno::INVAL));
        }
        let answer = reply.data(read.unique, size, |out| layer.read(file, read.offset, out));
        self.outside.answer(answer);
        if let Ok(blocks) = layer.blocks(file, read.offset, read.size)
            && let Some(block) = layer.touch(&blocks)
        {
            self.outside.report(&Event::Touched { n: layer.number(), block });
        }
    }

    fn read(&self, read: Parked, reply: &mut Reply, now: Instant) {
        if self.answer_if_there(&read, reply) {
            return;
        }
        let mut waiting = self.waiting();
        if self.is_there(&read) {
            drop(waiting);
            // It may be gone again, and then this read waits like any other.
            return self.read(read, reply, now);
        }
        // The kernel may have sent it before. Then the number of the second time counts, and the
        // first has no reader any more; it may still be in a slot.
        let resent = read.unique.is_resent();
        if waiting.find(read.unique).is_some_and(|e| !resent || e.read.unique.is_resent()) {
            return;
        }
        let Some(id) = self.slots.park(read) else {
            drop(waiting);
            tracing::warn!("too many reads are waiting, failing another one");
            return self.outside.answer(reply.error(read.unique, Errno::IO));
        };
        match waiting.find(read.unique) {
            Some(entry) => {
                self.slots.unpark(entry.id);
                (entry.id, entry.read) = (id, read);
            }
            None => waiting.push(ParkedRead { id, read, since: now, reported: false }),
        }
        let alone = waiting.len() == 1;
        let reported = match waiting.find(read.unique) {
            Some(entry) if !entry.reported => self.report_read(entry),
            _ => true,
        };
        drop(waiting);
        if alone || !reported {
            self.outside.wake();
        }
    }

    fn is_there(&self, read: &Parked) -> bool {
        self.missing(read) == Some(None)
    }

    /// What a read has to wait for: `Some(None)` for nothing, or for an error; `None` if its layer
    /// is not known.
    #[allow(clippy::option_option)]
    fn missing(&self, read: &Parked) -> Option<Option<Range<u64>>> {
        let (n, file) = file_of(read.node)?;
        Some(self.layer(n)?.missing(file, read.offset, read.size).unwrap_or(None))
    }

    /// Reports a read that waits to the daemon; false if that cannot be done now. What waits for a
    /// layer that is not known yet is reported when the layer comes.
    fn report_read(&self, entry: &mut ParkedRead) -> bool {
        let (Some((n, _)), Some(Some(blocks))) =
            (file_of(entry.read.node), self.missing(&entry.read))
        else {
            return true;
        };
        entry.reported = self.outside.report(&Event::Miss { n, blocks });
        entry.reported
    }

    /// Reports everything that waits and was not reported to the daemon; false if it takes no more
    /// now.
    pub(crate) fn report_all(&self) -> bool {
        self.waiting().iter_mut().filter(|e| !e.reported).all(|entry| self.report_read(entry))
    }

    /// There is another daemon, or none: nothing was reported to it.
    pub(crate) fn forget_reported(&self) {
        self.waiting().iter_mut().for_each(|e| e.reported = false);
    }

    fn interrupt(&self, request: Unique, of: Unique, reply: &mut Reply) {
        let gone = self.waiting().take(|e| e.read.unique.first() == of.first());
        if gone.is_empty() {
            // It was answered, is just being answered, or was not read yet. The kernel forgets the
            // interrupt in the first case and sends it again in the others.
            self.outside.answer(reply.error(request, Errno::AGAIN));
        }
        self.fail_all(gone, Errno::INTR, reply);
    }

    fn fail_all(&self, entries: Vec<ParkedRead>, error: Errno, reply: &mut Reply) {
        for entry in entries {
            self.outside.answer(reply.error(entry.read.unique, error));
            self.slots.unpark(entry.id);
        }
    }

    /// Answers everything that waits and need not.
    fn settle(&self, n: u32, reply: &mut Reply) {
        let of_layer = |e: &ParkedRead| file_of(e.read.node).is_some_and(|(of, _)| of == n);
        let ready = self.waiting().take(|e| of_layer(e) && self.is_there(&e.read));
        for entry in ready {
            if !self.answer_if_there(&entry.read, reply) {
                // Only this thread clears bits, so they are still set.
                self.outside.answer(reply.error(entry.read.unique, Errno::IO));
            }
            self.slots.unpark(entry.id);
        }
    }

    /// A layer comes, or comes again: the same files are the same layer. False if there is another
    /// of its number.
    pub(crate) fn add(&self, layer: Layer, reply: &mut Reply) -> Result<bool, Errno> {
        let n = layer.number();
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        let new = match layers.entry(n) {
            btree_map::Entry::Vacant(place) => {
                place.insert(Arc::new(layer));
                true
            }
            btree_map::Entry::Occupied(there) if there.get().is_same(&layer)? => false,
            btree_map::Entry::Occupied(_) => return Err(Errno::EXIST),
        };
        drop(layers);
        self.settle(n, reply);
        Ok(new)
    }

    /// Blocks are good.
    pub(crate) fn have(&self, n: u32, blocks: &Range<u64>, reply: &mut Reply) {
        if let Some(layer) = self.layer(n) {
            layer.good().set(blocks);
            self.settle(n, reply);
        }
    }

    /// Blocks cannot be had: what waits for one of them fails.
    pub(crate) fn fail(&self, n: u32, blocks: &Range<u64>, errno: i32, reply: &mut Reply) {
        let Some(layer) = self.layer(n) else { return };
        let hit = |e: &ParkedRead| {
            let Some((_, file)) = file_of(e.read.node).filter(|(of, _)| *of == n) else {
                return false;
            };
            let Ok(read) = layer.blocks(file, e.read.offset, e.read.size) else { return false };
            let common = read.start.max(blocks.start)..read.end.min(blocks.end);
            !common.is_empty() && layer.good().missing(&common).is_some()
        };
        let failed = self.waiting().take(hit);
        self.fail_all(failed, message::errno(errno), reply);
    }

    /// Blocks are no longer valid: no read that begins later gets them. [`Engine::is_dropped`] says
    /// whether the reads that had begun are over. `None` if the layer is not known: its map stays
    /// as it is, so these blocks must not be taken away.
    pub(crate) fn drop_blocks(&self, n: u32, blocks: Range<u64>) -> Option<Dropping> {
        let layer = self.layer(n)?;
        layer.good().clear(&blocks);
        // What waits for others of its blocks now waits for these as well.
        let hit = |e: &&mut ParkedRead| {
            file_of(e.read.node).filter(|(of, _)| *of == n).is_some_and(|(_, file)| {
                layer
                    .blocks(file, e.read.offset, e.read.size)
                    .is_ok_and(|read| read.start < blocks.end && blocks.start < read.end)
            })
        };
        self.waiting().iter_mut().filter(hit).for_each(|e| e.reported = false);
        Some(Dropping { n, blocks, readers: self.watch_readers() })
    }

    /// Which requests are in progress. The end of each wakes the other thread from now on, until
    /// [`Engine::all_dropped`].
    pub(crate) fn watch_readers(&self) -> [u64; READERS] {
        self.dropping.store(true, Ordering::SeqCst);
        self.readers.each_ref().map(|r| r.load(Ordering::SeqCst))
    }

    /// Whether no one reads dropped blocks any more.
    pub(crate) fn is_dropped(&self, dropping: &Dropping) -> bool {
        let now = self.readers.each_ref().map(|r| r.load(Ordering::SeqCst));
        now.iter().zip(&dropping.readers).all(|(now, then)| then.is_multiple_of(2) || now != then)
    }

    /// No thread waits for the readers any more.
    pub(crate) fn all_dropped(&self) {
        self.dropping.store(false, Ordering::SeqCst);
    }

    /// A layer goes; what waits for it fails.
    pub(crate) fn remove(&self, n: u32, reply: &mut Reply) -> Option<Arc<Layer>> {
        let gone = self.layers.write().unwrap_or_else(PoisonError::into_inner).remove(&n);
        let of_layer = |e: &ParkedRead| file_of(e.read.node).is_some_and(|(of, _)| of == n);
        let failed = self.waiting().take(of_layer);
        self.fail_all(failed, Errno::IO, reply);
        gone
    }

    /// When the next read has waited for too long.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.waiting().next_deadline(self.deadline)
    }

    /// Fails what has waited for too long.
    pub(crate) fn expire(&self, now: Instant, reply: &mut Reply) {
        let late = self.waiting().take(|e| now.saturating_duration_since(e.since) >= self.deadline);
        for entry in &late {
            let Parked { node, offset, .. } = entry.read;
            tracing::warn!(node = node.0, offset, "read timed out");
        }
        self.fail_all(late, Errno::IO, reply);
    }

    /// Goes on with what a predecessor had read and not answered. Before any thread reads.
    pub(crate) fn take_over(&self, reply: &mut Reply, now: Instant) {
        self.slots.clear_unfinished();
        let left = self.slots.left_in_slots();
        for (id, read) in self.slots.parked() {
            self.waiting().push(ParkedRead { id, read, since: now, reported: false });
        }
        for layer in self.layers() {
            self.settle(layer.number(), reply);
        }
        // Interrupts last: they may be of reads that are left.
        let (interrupts, others): (Vec<_>, Vec<_>) = left
            .iter()
            .filter_map(|bytes| Request::parse(bytes).ok())
            .partition(|request| matches!(request.operation, Operation::Interrupt { .. }));
        for request in others.iter().chain(&interrupts) {
            self.handle(request, reply, now);
        }
    }
}

fn init<'a>(unique: Unique, offer: &InitRequest, reply: &'a mut Reply) -> &'a [u8] {
    let wanted = InitOptions {
        max_pages: MAX_PAGES,
        max_background: MAX_BACKGROUND,
        idmap: true,
        trees: true,
        ..InitOptions::default()
    };
    match offer.answer(wanted) {
        Some(answer) => reply.init(unique, &answer),
        None => reply.error(unique, Errno::PROTO),
    }
}

/// Fills `bytes` with the files whose nodes are above `offset`, so a listing goes on at the right
/// place whatever has come or gone; with room for attributes if `plus`, but without any. Trees are
/// found by name only.
fn list(layers: &BTreeMap<u32, Arc<Layer>>, offset: u64, bytes: &mut [u8], plus: bool) -> usize {
    let mut buffer = DirBuffer::new(bytes);
    let first = file_of(NodeId(offset.max(2))).map_or(u32::MAX, |(n, _)| n);
    for (n, layer) in layers.range(first..) {
        for (file, kind) in [(File::Data, "data"), (File::Image, "img")] {
            let node = node_of(*n, file).0;
            let Ok(found) = layer.attributes(file) else { continue };
            if node <= offset {
                continue;
            }
            let name = format!("{n}.{kind}");
            let added = if plus {
                let found = NodeAttributes { node: NodeId(0), ..found };
                buffer.add_with(&found, name.as_bytes(), node)
            } else {
                buffer.add(node, found.mode, name.as_bytes(), node)
            };
            if !added {
                return buffer.filled();
            }
        }
    }
    buffer.filled()
}

#[cfg(test)]
mod tests;
