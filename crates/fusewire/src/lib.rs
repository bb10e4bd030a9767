//! The FUSE protocol of a server of files that never change: of one flat directory, and of trees.
//!
//! - [`Request`] is what a `read(/dev/fuse)` returned: a header and an [`Operation`], borrowed from
//!   the buffer, nothing allocated.
//! - [`Reply`] writes answers into a buffer of the caller's.
//! - [`InitRequest::answer`] negotiates what the server wants.
//! - [`Slots`] is shared memory for requests in flight. The kernel writes a request straight into
//!   it and a request that has to wait is noted in it, so both outlive the process: another one
//!   finds them there and answers them by their numbers.
//!
//! Formats and numbers are those of the kernel's `include/uapi/linux/fuse.h`; integers are in the
//! machine's order. Minor version 31 (Linux 5.4) and newer are served.
//!
//! The crates that exist for FUSE do not fit this one place: they own the buffer that a request is
//! read into, forget the numbers of requests that a predecessor read, or hold a thread for each
//! request that waits. So these few operations are implemented here.
//!
//! `unsafe` is in [`mod@slots`] alone: memory that is shared with another process is not a
//! Rust object.

mod init;
mod reply;
mod request;
pub mod slots;

pub use init::{InitAnswer, InitOptions, InitRequest};
pub use reply::{DirBuffer, NodeAttributes, Opened, Reply, StatFs};
pub use request::{Forget, Handle, Header, NodeId, Operation, Request, Unique, WireError};
pub use slots::{Parked, ParkedId, SlotError, SlotReader, Slots};

/// Bytes that a buffer for requests needs, which is what the kernel demands at least
/// (`FUSE_MIN_READ_BUFFER`); enough as long as `max_write` is small, see [`InitOptions`].
pub const REQUEST_BYTES: usize = 8192;
