//! Lazy layers on the disk.
//!
//! ```text
//! layers/boot                  the machine's life, and the next number
//! layers/<number>/about        what layer it is, where it was seen, how much of it is known
//!                /meta         EROFS image with all names and attributes
//!                /data         contents of all files, with holes where they were not fetched
//!                /index        which chunk of the blob goes where in the data
//!                /claims       a bit for each chunk: it was written once
//!                /spans        of a plain layer: where its blob can be decompressed from
//!                /entries      of an indexed layer: what its index says of the tar
//!                /digests      of an indexed layer: what was found out of each chunk
//!                /whole        is there if all data is, and on the disk
//! layers/new.<number>/         a layer that is being made
//! layers/trash/                what is to be removed
//! ```
//!
//! The kernel reads the image; the data is served by whoever knows which of its blocks are *good*:
//! everything that touches them was checked in this boot ([`Good`]). A hole is never served.
//!
//! - [`LayerStore`] makes, finds and removes layers, and makes room ([`LayerStore::make_room`]).
//! - [`Layer::verify_blocks`], [`Layer::extents`], [`Layer::write_frame`]: what a miss needs.
//! - [`Layer::finish`] reads a whole blob; only then a layer can be used without anybody who
//!   fetches.
//! - [`Plain`] is an ordinary layer, of which somebody has the whole blob for once:
//!   [`LayerStore::create_plain`] keeps what makes it lazy the next time. How the bytes of a frame
//!   are decompressed is all that is different about it.
//! - [`Indexed`] is an ordinary layer that somebody else made an index of, a zTOC: lazy without
//!   having been here. Its spans have digests and its chunks have none, so a span is checked as a
//!   whole before anything is taken out of it.
//! - [`Layer::pieces`] says what digests files' contents have, without reading them.
//! - [`LayerStore::unpack`] writes the data while the blob comes: the layer is whole when it is
//!   made.
//!
//! # A miss
//!
//! 1. [`Layer::verify_blocks`] of what was missed; whoever serves it is told what is good.
//! 2. [`Layer::extents`] of the same, each is fetched.
//! 3. [`Layer::write_frame`] for each frame; whoever serves is told what is good by each chunk.
//!
//! All of it may be done at the same time by several threads, also for the same blocks. Who is told
//! of good blocks that were told before has no harm from it; [`Good`] says why it matters when one
//! is told.
//!
//! # What is believed
//!
//! Data is believed if its digest was computed in this boot, by this process or by an earlier one
//! that told the keeper of the data ([`Layer::restore`]), or if the layer is whole. Everything else
//! that the files say of data is only a hint: claims lead to a check, never to a good block. So
//! data is written without waiting for the disk, in any order, and a kill or a power cut at any
//! point costs no more than fetching again. `about`, `meta`, `index`, `spans` and `entries` have
//! checksums; a digest of `digests` that is damaged is that of no data.
//!
//! # Dependencies
//!
//! `serde_json` is for `about`; `libc` for leases, which rustix has not. The only `unsafe` is
//! there.

mod about;
mod bits;
mod build;
mod digests;
mod disk;
mod error;
mod fetch;
mod finish;
mod index;
mod indexed;
mod layer;
mod lease;
mod pieces;
mod plain;
mod room;
mod spans;
mod store;
mod unpack;
mod written;

pub use about::{
    Description, LayerKey, LayerNumber, MAX_ABOUT, MAX_REPOSITORIES, MAX_REPOSITORY, State,
};
pub use error::{Error, Refused, Result};
pub use fetch::{Extent, Extents, Frame, JOIN_GAP, MAX_EXTENT};
pub use index::{Chunk, ChunkId, Chunks};
pub use indexed::Indexed;
pub use layer::{Good, Layer, SEGMENT, Usage};
pub use plain::Plain;
pub use room::{Eviction, Evictions, Room, Use};
pub use store::{Damage, LayerStore, Options};
pub use unpack::Unpacked;

use parking_lot::{Mutex, MutexGuard};

/// What is under our locks stays right whoever panics with one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}
