//! Layers that can be read piece by piece: eStargz and zstd:chunked. Read, verify, write; no
//! network, no files.
//!
//! Both formats are ordinary layers (a tar in gzip members or zstd frames) in which files, or
//! chunks of files, begin a member or frame of their own, and which end with a *table of contents*:
//! JSON with all entries of the tar, where their data is and what digest it has, and a footer that
//! says where the table is. A manifest names the table's digest, so a file can be read from a
//! registry and believed without the rest of the layer.
//!
//! In the order in which a layer is read:
//!
//! - [`Annotated`]: what the manifest says; [`Tail`] and [`Layout`]: where the table is, from the
//!   last bytes of the blob.
//! - [`Toc`]: the table, checked; [`Toc::read_frame`]: data of files, checked.
//! - [`Toc::records`]: where data goes in a file on the disk, and where it comes from.
//! - [`Comparison`]: whether the tar says the same as the table. A table may lie about it:
//!   containers would see other files than those who look at the tar.
//! - [`Writer`] and [`Order`]: the other way round.
//! - [`TocMaker`]: a table of contents for a layer that has none.
//!
//! Everything that is read is hostile. Each bound is a constant (`MAX_…`), and errors name the
//! entry.
//!
//! The crate knows tar only as far as it writes two headers of its own: whoever compares or writes
//! hands over entries ([`TarEntry`]) and bytes, since the workspace has one reader of tars, in
//! `archive`, which stands on a higher floor.
//!
//! Dependencies that need a word: `flate2` (over zlib-rs) inflates streams; `libdeflater`
//! compresses whole chunks, several times faster, and gives their checksums; `zstd` is the
//! reference implementation. `serde_json` reads the table as a stream; `jiff` its times.

mod annotations;
mod chunk;
mod codec;
mod compare;
mod error;
mod footer;
mod index;
mod of_tar;
mod tar;
mod toc;
mod write;

pub use annotations::{
    Annotated, PODMAN_CHECKSUM, PODMAN_POSITION, PODMAN_TAR_SPLIT, STARGZ_CHECKSUM,
    STARGZ_POSITION, TOC_DIGEST, TocDigest, UNCOMPRESSED_SIZE,
};
pub use codec::{Codec, Frames, MAX_WINDOW_LOG};
pub use compare::{Comparison, Difference, Mismatch};
pub use error::{ChunkProblem, Error, Problem, Shown};
pub use footer::{
    ESTARGZ_FOOTER, EXTERNAL_FOOTER, LONGEST_FOOTER, Layout, MAX_COMPRESSED_TOC, MAX_TOC,
    STARGZ_FOOTER, Tail, ZSTD_FOOTER, ZSTD_FOOTER_TAR_SPLIT,
};
pub use index::{DATA_BLOCK, DataPlaces, Record, files_in};
pub use of_tar::{TocMaker, TocPiece};
pub use tar::{TarEntry, TarKind};
pub use toc::{
    Chunk, Content, Entry, EntryId, Expected, Kind, Landmark, MAX_CHUNK, MAX_DATA, MAX_DEPTH,
    MAX_ENTRIES, MAX_INNER, MAX_MAJOR, MAX_MINOR, MAX_NAME, MAX_PATH, MAX_STRING, MAX_XATTR,
    MAX_XATTRS, NO_PREFETCH_LANDMARK, Node, PREFETCH_LANDMARK, TOC_NAME, Time, Toc,
};
pub use write::{Dialect, Order, Output, Writer, WriterOptions, Written, is_hard};

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
