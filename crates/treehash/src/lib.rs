//! Checksums of file trees (rows `so.hash*`): names, modes, owners, link targets, extended
//! attributes and contents, never times, so that the same files have the same checksum wherever and
//! whenever they were made.
//!
//! A [`TreeIndex`] belongs to one tree and remembers what it hashed: a file whose size, time of
//! modification, owner and mode are what they were is not read again. Callers
//! that write into the tree otherwise, or keep a file's time while writing, report that to the
//! index. [`Selector`] says which part is meant; patterns are the caller's ([`PathFilter`]). Paths
//! are resolved within the tree, whatever links say. Nothing here knows how a tree came to be.
//!
//! The digest of a file is one of its attributes and of its contents' digest, which is made of
//! digests of pieces: for files of which somebody knows them ([`KnownContents`]) it is the same as
//! for those that are read, and they are not read.
//!
//! What is remembered lasts as long as the process: hashing anew runs at more than a gigabyte a
//! second, and what would be read from a disk could be wrong about files that others changed
//! meanwhile.

mod contents;
mod hash;
mod index;
mod resolve;
mod selector;

pub use contents::{KnownContents, PIECE, TreeFile};
pub use hash::{FileHasher, FileStat};
pub use index::TreeIndex;
pub use resolve::{Resolved, resolve};
pub use selector::{PathFilter, PathVerdict, Selector};
