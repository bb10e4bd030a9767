//! How much is answered at once.

/// Pages of a read at most. EROFS asks for 16 of them; more would only cost memory, which each
/// thread has as much of as the largest answer.
pub(crate) const MAX_PAGES: u16 = 64;
/// Bytes of an answer at most, on a connection that began here.
pub(crate) const MAX_READ: usize = MAX_PAGES as usize * 4096;
