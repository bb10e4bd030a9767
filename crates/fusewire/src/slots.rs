//! Requests in flight, in memory that outlives the process: a file without a name (`memfd`), which
//! a successor or a store of file descriptors holds as well.
//!
//! ```text
//! page 0       head: what this is, and its shape
//! then         one slot for each thread that reads requests: [`REQUEST_BYTES`] that the kernel
//!              writes a request into
//! then         parked requests, 32 bytes each: state, size, number, node, offset
//! ```
//!
//! A request is in at least one of the two from the moment the kernel has handed it over until it
//! was answered:
//!
//! 1. the thread empties its slot and reads into it: from then on the request is there;
//! 2. a read that has to wait is parked, and only then is the slot emptied or used again;
//! 3. the answer is written, and only then is the slot or the parked request given up.
//!
//! So a process that comes after one that was killed answers everything that it finds
//! ([`Slots::left_in_slots`], [`Slots::parked`]). Some of it may have been answered already: the
//! kernel says `ENOENT` to a second answer, which does no harm. Shared words are atomic.

use crate::{NodeId, REQUEST_BYTES, Unique};
use rustix::{
    fd::AsFd,
    fs::{MemfdFlags, fstat, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};
use shipway_fault::Fault;
use std::{
    os::fd::OwnedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

/// Threads that read requests, at most.
pub const READERS: usize = 16;
/// Requests that wait, at most: what the kernel sends beyond is refused with an error by the server
/// that cannot park it.
pub const PARKED: usize = 16 << 10;

const HEAD: usize = 4096;
const ENTRY: usize = 32;
/// "This is that memory", and the version of its layout.
const MAGIC: u64 = u64::from_le_bytes(*b"SHPSLOT1");
const BYTES: usize = HEAD + READERS * REQUEST_BYTES + PARKED * ENTRY;

/// States of a parked request.
const FREE: u32 = 0;
const FILLING: u32 = 1;
const WAITING: u32 = 2;

/// Why there are no slots.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// A system call failed.
    #[error("shared memory of requests: {0}")]
    Io(#[from] rustix::io::Errno),
    /// The memory is another one's, or of another version.
    #[error("not the shared memory of requests, or that of another version")]
    Foreign,
    /// Another thread has it.
    #[error("the slot of this number is in use, or there is none")]
    Taken,
}

impl From<SlotError> for Fault {
    #[track_caller]
    fn from(error: SlotError) -> Self {
        Fault::internal(error.to_string())
    }
}

/// A read that waits for its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parked {
    /// Number of the request.
    pub unique: Unique,
    /// The file.
    pub node: NodeId,
    /// From where.
    pub offset: u64,
    /// Bytes at most.
    pub size: u32,
}

/// Place of a parked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParkedId(u32);

/// The mapping; it ends with the last user.
struct Map(NonNull<u8>);

// SAFETY: the memory is reached through atomics, and through the slots, each of which one
// `SlotReader` has to itself.
#[allow(unsafe_code)]
unsafe impl Send for Map {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Map {}

impl Drop for Map {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: `Slots::open` mapped this much, and what borrows from the mapping is gone.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), BYTES) };
    }
}

/// Shared memory of requests in flight.
pub struct Slots {
    map: Map,
    /// Which slots have a reader in this process.
    taken: [AtomicU8; READERS],
    /// Where to look for a free entry next.
    hint: AtomicU32,
}

impl Slots {
    /// New memory, empty. The descriptor is what a successor opens.
    pub fn create() -> Result<(OwnedFd, Self), SlotError> {
        let fd = memfd_create("shipway-requests", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, BYTES as u64)?;
        let slots = Self::map(&fd)?;
        slots.word64(0).store(MAGIC, Ordering::Release);
        Ok((fd, slots))
    }

    /// The memory of a predecessor.
    pub fn open(fd: impl AsFd) -> Result<Self, SlotError> {
        if fstat(&fd)?.st_size != BYTES as i64 {
            return Err(SlotError::Foreign);
        }
        let slots = Self::map(fd)?;
        if slots.word64(0).load(Ordering::Acquire) == MAGIC {
            Ok(slots)
        } else {
            Err(SlotError::Foreign)
        }
    }

    #[allow(unsafe_code)]
    fn map(fd: impl AsFd) -> Result<Self, SlotError> {
        // SAFETY: a fresh mapping, which nothing in this process refers to. The file has `BYTES`
        // bytes and only this module writes it; a process that shortened it could only be one of
        // our own.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        let map = Map(NonNull::new(at.cast()).ok_or(SlotError::Foreign)?);
        Ok(Self { map, taken: [const { AtomicU8::new(0) }; READERS], hint: AtomicU32::new(0) })
    }

    /// The slot `number`, for one thread.
    pub fn reader(&self, number: usize) -> Result<SlotReader<'_>, SlotError> {
        let free = self.taken.get(number).is_some_and(|t| {
            t.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        });
        if free { Ok(SlotReader { slots: self, number }) } else { Err(SlotError::Taken) }
    }

    /// Requests that a predecessor had read and neither parked nor answered, each copied. To be
    /// asked before this process reads any: the first use of a slot empties it.
    pub fn left_in_slots(&self) -> Vec<Vec<u8>> {
        let mut left = Vec::new();
        for number in 0..READERS {
            let Ok(mut reader) = self.reader(number) else { continue };
            let bytes = reader.bytes();
            let length = bytes.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b)) as usize;
            // One that was parked when its process ended may still be in its slot.
            let unique = bytes[8..].first_chunk().map(|b| Unique(u64::from_ne_bytes(*b)));
            if length != 0 && !self.parked().any(|(_, parked)| Some(parked.unique) == unique) {
                left.push(bytes[..length.min(REQUEST_BYTES)].to_vec());
            }
        }
        left
    }

    /// Notes a request that waits; `None` if too many do.
    pub fn park(&self, request: Parked) -> Option<ParkedId> {
        let start = self.hint.load(Ordering::Relaxed) as usize;
        let id = (0..PARKED).map(|n| (start + n) % PARKED).find(|id| {
            self.state(*id)
                .compare_exchange(FREE, FILLING, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        })?;
        let at = self.entry(id);
        self.word32(at + 4).store(request.size, Ordering::Relaxed);
        self.word64(at + 8).store(request.unique.0, Ordering::Relaxed);
        self.word64(at + 16).store(request.node.0, Ordering::Relaxed);
        self.word64(at + 24).store(request.offset, Ordering::Relaxed);
        self.state(id).store(WAITING, Ordering::Release);
        self.hint.store(((id + 1) % PARKED) as u32, Ordering::Relaxed);
        Some(ParkedId(id as u32))
    }

    /// Requests that wait, those of a predecessor included.
    pub fn parked(&self) -> impl Iterator<Item = (ParkedId, Parked)> + '_ {
        (0..PARKED).filter(|id| self.state(*id).load(Ordering::Acquire) == WAITING).map(|id| {
            let at = self.entry(id);
            let parked = Parked {
                unique: Unique(self.word64(at + 8).load(Ordering::Relaxed)),
                node: NodeId(self.word64(at + 16).load(Ordering::Relaxed)),
                offset: self.word64(at + 24).load(Ordering::Relaxed),
                size: self.word32(at + 4).load(Ordering::Relaxed),
            };
            (ParkedId(id as u32), parked)
        })
    }

    /// Forgets a request that waited; after its answer.
    pub fn unpark(&self, id: ParkedId) {
        self.state(id.0 as usize).store(FREE, Ordering::Release);
    }

    /// Frees entries that a predecessor had begun and not filled: those requests are in its slots.
    /// Before any thread parks.
    pub fn clear_unfinished(&self) {
        for id in 0..PARKED {
            let _ =
                self.state(id).compare_exchange(FILLING, FREE, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    fn entry(&self, id: usize) -> usize {
        HEAD + READERS * REQUEST_BYTES + id * ENTRY
    }

    fn state(&self, id: usize) -> &AtomicU32 {
        self.word32(self.entry(id))
    }

    #[allow(unsafe_code)]
    fn word32(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= BYTES);
        // SAFETY: inside the mapping and aligned, since mappings begin at a page. These words are
        // reached as atomics only: none is in a slot.
        unsafe { AtomicU32::from_ptr(self.map.0.as_ptr().add(at).cast()) }
    }

    #[allow(unsafe_code)]
    fn word64(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= BYTES);
        // SAFETY: as in `word32`.
        unsafe { AtomicU64::from_ptr(self.map.0.as_ptr().add(at).cast()) }
    }
}

/// A slot, as long as one thread has it.
pub struct SlotReader<'a> {
    slots: &'a Slots,
    number: usize,
}

impl SlotReader<'_> {
    /// Empties the slot: its request was answered or parked. To be done before each read into it.
    pub fn clear(&mut self) {
        self.bytes()[..4].fill(0);
    }

    /// The bytes of the slot, to read a request into or to look at the one that is there.
    #[allow(unsafe_code)]
    pub fn bytes(&mut self) -> &mut [u8] {
        let at = HEAD + self.number * REQUEST_BYTES;
        // SAFETY: inside the mapping, and no word that is reached as an atomic. In this process the
        // slot belongs to this reader alone (`taken`); a predecessor that had it is gone, for a
        // connection is handed over by one that has stopped or was killed.
        unsafe { std::slice::from_raw_parts_mut(self.slots.map.0.as_ptr().add(at), REQUEST_BYTES) }
    }
}

impl Drop for SlotReader<'_> {
    fn drop(&mut self) {
        self.slots.taken[self.number].store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(n: u64) -> Parked {
        Parked { unique: Unique(n), node: NodeId(2 * n), offset: n << 12, size: 4096 }
    }

    #[test]
    fn what_was_parked_is_there_for_a_successor() {
        let (fd, slots) = Slots::create().expect("slots");
        let ids: Vec<ParkedId> = (0..10).map(|n| slots.park(request(n)).expect("room")).collect();
        slots.unpark(ids[3]);
        // One that had just begun to park.
        slots.state(100).store(FILLING, Ordering::Release);
        drop(slots);
        let next = Slots::open(&fd).expect("slots");
        next.clear_unfinished();
        assert_eq!(next.state(100).load(Ordering::Relaxed), FREE);
        let found: Vec<Parked> = next.parked().map(|(_, parked)| parked).collect();
        assert_eq!(found, (0..10).filter(|n| *n != 3).map(request).collect::<Vec<_>>());
        next.parked().for_each(|(id, _)| next.unpark(id));
        assert_eq!(next.parked().count(), 0);
    }

    #[test]
    fn a_request_stays_in_its_slot_until_that_is_cleared() {
        let (fd, slots) = Slots::create().expect("slots");
        let mut reader = slots.reader(1).expect("a slot");
        assert!(
            matches!(slots.reader(1), Err(SlotError::Taken))
                && matches!(slots.reader(READERS), Err(SlotError::Taken))
        );
        reader.bytes()[..8].copy_from_slice(&[8, 0, 0, 0, 1, 2, 3, 4]);
        drop(reader);
        let next = Slots::open(&fd).expect("slots");
        assert_eq!(next.left_in_slots(), [[8, 0, 0, 0, 1, 2, 3, 4]]);
        let unique = Unique(0x0102_0304_0506_0708);
        next.reader(1).expect("a slot").bytes()[8..16].copy_from_slice(&unique.0.to_ne_bytes());
        let id = next.park(Parked { unique, ..request(0) }).expect("room");
        assert!(next.left_in_slots().is_empty(), "it is parked already");
        next.unpark(id);
        assert_eq!(next.left_in_slots().len(), 1);
        next.reader(1).expect("a slot").clear();
        assert!(next.left_in_slots().is_empty());
        // A length that is none does not lead out of the slot.
        next.reader(READERS - 1).expect("a slot").bytes().fill(255);
        assert_eq!(next.left_in_slots(), [vec![255; REQUEST_BYTES]]);
    }

    #[test]
    fn no_more_are_parked_than_fit_and_threads_get_places_of_their_own() {
        let (_fd, slots) = Slots::create().expect("slots");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let slots = &slots;
                scope.spawn(move || {
                    (0..PARKED / 4).for_each(|n| {
                        assert!(slots.park(request((n * 4 + thread) as u64)).is_some())
                    })
                });
            }
        });
        assert_eq!(slots.park(request(0)), None);
        let mut numbers: Vec<u64> = slots.parked().map(|(_, parked)| parked.unique.0).collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..PARKED as u64));
        slots.unpark(ParkedId(77));
        assert_eq!(slots.park(request(1)), Some(ParkedId(77)));
    }

    #[test]
    fn foreign_memory_is_refused() {
        let fd = memfd_create("other", MemfdFlags::CLOEXEC).expect("memfd");
        assert!(matches!(Slots::open(&fd), Err(SlotError::Foreign)));
        ftruncate(&fd, BYTES as u64).expect("ftruncate");
        assert!(matches!(Slots::open(&fd), Err(SlotError::Foreign)));
    }
}
