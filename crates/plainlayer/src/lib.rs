//! Ordinary layers, read from the middle: a gzip or zstd blob that was read once can be
//! decompressed again from any of its *spans* on, and its files have a table of contents.
//!
//! A span is a piece of the decompressed tar, of about [`SPAN`] bytes, that begins where
//! decompression can be resumed: at a gzip member or zstd frame, or at a deflate block, with the
//! [`WINDOW`] bytes before it. A zstd stream can be resumed at frames only, so a blob with a frame
//! longer than [`MAX_SPAN`] has no spans ([`Error::LongSpan`]).
//!
//! - [`Scanner`] decompresses a blob from its first byte to its last, and notes spans on the way.
//! - [`Maker`] takes the entries of the tar that comes out of it, and makes the table of contents.
//!   Its chunks end where files or spans do, and have digests, so everything that is read later is
//!   verified before it is used.
//! - [`Scan::encode`] is the spans as a file, for which the caller has the room, and [`Spans`] the
//!   same read again: [`Spans::reader`] resumes.
//!
//! - [`Ztoc`] is the same knowledge as others publish it: the zTOC of a SOCI index. It is read into
//!   a table of contents and a file of spans ([`Ztoc::index`]), and written ([`Scan::ztoc`]). A
//!   zTOC has digests of compressed spans and none of contents: a chunk's digest is that of its
//!   span.
//!
//! In terms of crate `estargz` a span is a frame: layers of both kinds differ in nothing else but
//! how a frame's bytes are decompressed. As there, the caller reads the tar, by the workspace's one
//! reader.
//!
//! Blobs, files of spans and zTOCs are hostile: each bound is a constant, and a file that is
//! damaged or of another blob is an error.
//!
//! Dependencies that need a word: `miniz_oxide` is the inflater that can stop at block boundaries
//! and resume at a bit (feature `block-boundary`), in safe Rust; zlib-rs has it (`inflatePrime`)
//! behind its C interface only, and `flate2` not at all. `flate2` gives the checksum of members,
//! `zstd` is the reference implementation, `jiff` has the times of zTOCs. zTOCs are FlatBuffers;
//! the few shapes that they have are read and written here, for the accessors of the crate
//! `flatbuffers` are `unsafe` and its verifier is generated code's.

mod checkpoints;
mod engine;
mod error;
mod flat;
mod make;
mod scan;
mod table;
mod ztoc;

pub use checkpoints::MAX_ZTOC;
pub use engine::WINDOW;
pub use error::{Error, Result};
pub use make::Maker;
pub use scan::{Progress, Scan, Scanner};
pub use table::{
    HEADER, MAX_COMPRESSED, MAX_SPAN, MAX_SPANS, MAX_WINDOW, SPAN, Span, SpanReader, Spans,
};
pub use ztoc::{ZTOC_SPAN, Ztoc, ZtocEntry};
