//! Tar archives that come from outside, and layers: one reader for all of them.
//!
//! Every length is checked before it is believed, and what must be in memory at once (extended
//! headers, maps of sparse files) has a limit. The reader knows the formats of the tools that
//! people use: ustar, PAX, GNU (with long names, binary numbers and both kinds of sparse files) and
//! what came before them. Extended records are taken by their length, so that values and names may
//! have any bytes.

pub(crate) mod block;
pub(crate) mod pax;
mod reader;
mod sparse;

pub use reader::{Member, MemberKind, Piece, TarReader};

use std::io;

/// An extended header, a long name, or the map of a sparse file is not larger (Go's `archive/tar`
/// has the same limit).
pub(crate) const MAX_SPECIAL: u64 = 1 << 20;

/// The error of an archive that is not what it should be.
pub(crate) fn broken(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the archive is broken: {why}"))
}
