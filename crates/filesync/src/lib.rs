//! File trees over a stream of packets: the fsutil protocol, as sender and as receiver (rows
//! `cb.fsutil.*`).
//!
//! The receiver opens the stream. The sender walks its tree and sends one STAT per entry in path
//! order, then an empty one; the receiver compares each with what it has and sends a REQ, by index,
//! for the files it needs; the sender answers with DATA, an empty one ending a file; FIN from the
//! receiver, echoed, ends the transfer, and ERR from either side fails it.
//!
//! - [`Sender`]: a directory (or several) through a [`PathFilter`], to a [`PacketStream`].
//! - [`Receiver`]: from a [`PacketStream`] into a directory, which may hold an older state of the
//!   same tree; [`KnownTree`] remembers that state so that nothing needs to be walked.
//! - [`PatternMatcher`], [`IgnoreFile`], [`PathFilter`]: the pattern language of `.dockerignore`
//!   and of COPY.
//!
//! Packets come from strangers: paths are checked for form, order and parents, and reach the disk
//! only through directory handles that never follow a symbolic link. There is no gRPC here; crate
//! `session` and the client make streams of calls.

mod budget;
mod content_hash;
mod disk;
mod follow;
mod ignore;
mod known;
mod list;
mod matcher;
mod order;
mod path;
mod receive;
mod request;
mod send;
mod stream;
mod walk;
mod write;

pub use budget::Budget;
pub use content_hash::{ContentHash, HashSink};
pub use disk::chmod_nofollow;
pub use follow::follow_paths;
pub use ignore::{IgnoreFile, IgnoreRule};
pub use known::{KnownEntry, KnownTree};
pub use list::announced;
pub use matcher::{DirMatch, MatchInfo, PathFilter, Pattern, PatternMatcher, Verdict};
pub use path::compare;
pub use receive::{
    Change, ChangeKind, Differ, LISTING, Progress, ReceiveOptions, Received, Receiver, StatFn,
};
pub use request::FileSyncRequest;
pub use send::{MapFn, SendOptions, SendRoot, Sender, Sent};
pub use shipway_proto::fsutil::types::{Packet, Stat};
pub use stream::{PacketStream, packets};
pub use walk::Mapped;
