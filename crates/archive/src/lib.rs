//! Layer tars: what a step wrote, as a deterministic tar stream, hashed and compressed in parallel.
//!
//! - [`LayerTree`] walks an overlay upper directory (or a whole tree) in path order and says what a
//!   layer holds: entries that differ from what lies below, and whiteouts.
//! - A walk also finds what the tar cannot say, a [`Loss`]: a state that has one is not what
//!   unpacking its layer gives.
//! - [`tar_of`] hashes the stream and keeps nothing; [`pack()`] compresses it too. The bytes depend
//!   on the tree and the [`Compression`] alone, never on the number of threads: the stream is cut
//!   into blocks of fixed size, and every block becomes a gzip member or zstd frame of its own (RFC
//!   1952 2.2, RFC 8878 3; every reader of layers takes several in a row). Kinds with a table of
//!   contents have members and frames for files instead ([`Indexed`], crate `estargz`).
//!
//! Nothing here knows containerd or mounts anything. Dependencies that need a word: `libdeflater`
//! is a deflate several times faster than zlib's for whole blocks, `zstd` the reference
//! implementation; `flate2` (over zlib-rs) inflates streams, which `libdeflater` cannot; `bzip2`
//! and `liblzma` are for archives that builds are given ([`inflate()`]). Those and layers are
//! read by one [`TarReader`]: the crate `tar` has no limit for extended headers, takes their
//! records line by line, and knows only one of the four kinds of sparse files.

mod attributes;
mod below;
mod block;
mod compression;
mod decompress;
mod header;
mod identity;
mod indexed;
mod inflate;
mod loss;
mod newest;
mod own;
mod pack;
mod packed;
mod retime;
mod stat;
mod tar;
mod tree;
pub mod ustar;

pub use self::tar::{Member, MemberKind, Piece, TarReader};
pub use compression::{Compression, CompressionKind};
pub use identity::Tar;
pub use indexed::{FirstFiles, ReadFirst};
pub use inflate::inflate;
pub use loss::{Loss, LossKind};
pub use newest::newest_file;
pub use own::OwnLayer;
pub use pack::{pack, pack_below, recompress, recompress_in_order, tar_of};
pub use packed::{Hashed, Indexed, Packed};
pub use retime::retime;
pub use shipway_estargz::Dialect;
pub use shipway_storage::overlay::Marks;
pub use tree::{EntryKind, LayerEntry, LayerTree};
