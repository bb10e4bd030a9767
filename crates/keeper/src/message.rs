//! What the daemon and the keeper say to each other, one datagram of [`BYTES`] bytes each, over a
//! unix socket that keeps datagrams apart and in order (`SOCK_SEQPACKET`).
//!
//! ```text
//! 0        version    lowest version of this protocol whose readers understand the message
//! 1        kind
//! 2..4     zero
//! 4..8     number of a layer
//! 8..16    first block, or number of blocks
//! 16..24   end of the blocks, or bytes of metadata
//! 24..28   errno, or which file descriptor
//! 28..32   zero
//! ```
//!
//! Integers are little-endian; file descriptors travel beside (`SCM_RIGHTS`). Kinds and versions
//! that are not known are passed over, and so are bytes behind the message: a peer that is one
//! release newer may send more, as long as it needs no answer to that.

use rustix::io::Errno;
use std::{fmt, ops::Range, str::FromStr};

/// Bytes of a message.
pub const BYTES: usize = 32;
/// The version that is spoken here.
pub const VERSION: u8 = 1;
/// File descriptors beside one message, at most.
pub const FDS: usize = 3;

/// The datagram is not a valid message: too short, without version, or with blocks that end before
/// they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a message between daemon and keeper")]
pub struct Malformed;

/// A file descriptor that has to outlive the keeper. Its name is what a store of file descriptors
/// knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FdName {
    /// The connection to the kernel (`fuse`).
    Fuse,
    /// Requests in flight (`slots`).
    Slots,
    /// What the daemon wants to have back after a restart (`memory`).
    Memory,
    /// A layer's contents (`l<n>.data`).
    Data(u32),
    /// A layer's map of good blocks (`l<n>.map`).
    Map(u32),
    /// A layer's metadata (`l<n>.meta`).
    Meta(u32),
}

impl FdName {
    /// The layer that it belongs to.
    pub fn layer(self) -> Option<u32> {
        match self {
            FdName::Fuse | FdName::Slots | FdName::Memory => None,
            FdName::Data(n) | FdName::Map(n) | FdName::Meta(n) => Some(n),
        }
    }

    fn encode(self) -> (u32, u32) {
        match self {
            FdName::Fuse => (0, 0),
            FdName::Slots => (0, 1),
            FdName::Memory => (0, 5),
            FdName::Data(n) => (n, 2),
            FdName::Map(n) => (n, 3),
            FdName::Meta(n) => (n, 4),
        }
    }

    fn decode(n: u32, which: u32) -> Option<Self> {
        Some(match which {
            0 => FdName::Fuse,
            1 => FdName::Slots,
            2 => FdName::Data(n),
            3 => FdName::Map(n),
            4 => FdName::Meta(n),
            5 => FdName::Memory,
            _ => return None,
        })
    }
}

impl fmt::Display for FdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FdName::Fuse => f.write_str("fuse"),
            FdName::Slots => f.write_str("slots"),
            FdName::Memory => f.write_str("memory"),
            FdName::Data(n) => write!(f, "l{n}.data"),
            FdName::Map(n) => write!(f, "l{n}.map"),
            FdName::Meta(n) => write!(f, "l{n}.meta"),
        }
    }
}

impl FromStr for FdName {
    type Err = Malformed;

    fn from_str(name: &str) -> Result<Self, Malformed> {
        let layer = || name.strip_prefix('l')?.split_once('.');
        let known = match (name, layer()) {
            ("fuse", _) => FdName::Fuse,
            ("slots", _) => FdName::Slots,
            ("memory", _) => FdName::Memory,
            (_, Some((n, part))) => {
                let n = n.parse().map_err(|_| Malformed)?;
                match part {
                    "data" => FdName::Data(n),
                    "map" => FdName::Map(n),
                    "meta" => FdName::Meta(n),
                    _ => return Err(Malformed),
                }
            }
            _ => return Err(Malformed),
        };
        // One name for each: no sign, no zeros in front.
        if known.to_string() == name { Ok(known) } else { Err(Malformed) }
    }
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// There is a layer; with its data, map and metadata as file descriptors. Answered by
    /// [`Event::Added`] or [`Event::Refused`].
    Add {
        /// The layer.
        n: u32,
        /// Blocks of the data file.
        data_blocks: u64,
        /// Bytes of the metadata, zero if the layer has no flat image.
        meta_bytes: u64,
    },
    /// These blocks of the data file are good.
    Have {
        /// The layer.
        n: u32,
        /// Of the data file.
        blocks: Range<u64>,
    },
    /// These blocks cannot be had now: what waits for them fails. The next read tries again.
    Fail {
        /// The layer.
        n: u32,
        /// Of the data file.
        blocks: Range<u64>,
        /// What readers get; `EIO` if FUSE does not pass that error on.
        errno: i32,
    },
    /// These blocks are no longer valid. Answered by [`Event::Dropped`] once no one reads them, or
    /// by [`Event::NotDropped`].
    Drop {
        /// The layer.
        n: u32,
        /// Of the data file.
        blocks: Range<u64>,
    },
    /// There is no such layer any more. Answered by [`Event::Removed`].
    Remove {
        /// The layer.
        n: u32,
    },
    /// Which layers there are: answered by [`Event::Layer`]s and [`Event::ListEnd`].
    List,
    /// To a keeper that does not serve yet: a file descriptor that a predecessor had, beside. To
    /// one that serves: the daemon's memory, in place of what it was.
    Give {
        /// What it is.
        name: FdName,
    },
    /// To a keeper that does not serve yet: that was all. Answered by [`Event::Started`].
    Begin,
    /// Unmount, and end for good.
    Shutdown,
}

/// What the keeper says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first word on a connection.
    Hello {
        /// Whether it serves. If not it wants [`Command::Give`] and [`Command::Begin`].
        serving: bool,
    },
    /// It serves from now on.
    Started,
    /// A layer is there, its files can be opened.
    Added {
        /// The layer.
        n: u32,
    },
    /// A layer was not added.
    Refused {
        /// The layer.
        n: u32,
        /// Why.
        errno: i32,
    },
    /// No one reads these blocks any more.
    Dropped {
        /// The layer.
        n: u32,
        /// As in the command.
        blocks: Range<u64>,
    },
    /// The layer is not known, so what its map says is as it was.
    NotDropped {
        /// The layer.
        n: u32,
        /// As in the command.
        blocks: Range<u64>,
    },
    /// A layer is gone.
    Removed {
        /// The layer.
        n: u32,
    },
    /// There is this layer.
    Layer {
        /// The layer.
        n: u32,
        /// Blocks of the data file.
        data_blocks: u64,
        /// Bytes of the metadata.
        meta_bytes: u64,
    },
    /// These were all layers.
    ListEnd,
    /// A read waits for blocks that are not good. Said again of everything that waits to each new
    /// daemon.
    Miss {
        /// The layer.
        n: u32,
        /// From the first that is missing to the last; some between may be there.
        blocks: Range<u64>,
    },
    /// A piece of a layer was read for the first time. May get lost.
    Touched {
        /// The layer.
        n: u32,
        /// The first block of it that was read.
        block: u64,
    },
    /// Hold this file descriptor, which is beside, for a successor.
    Keep {
        /// What it is.
        name: FdName,
    },
    /// Hold it no longer.
    Forget {
        /// What it is.
        name: FdName,
    },
}

/// The fields of a message.
struct Parts {
    kind: u8,
    n: u32,
    a: u64,
    b: u64,
    c: u32,
}

impl Parts {
    fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        (bytes[0], bytes[1]) = (VERSION, self.kind);
        bytes[4..8].copy_from_slice(&self.n.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.a.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.b.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.c.to_le_bytes());
        bytes
    }

    /// `None` for a message of a newer version.
    fn decode(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let bytes: &[u8; BYTES] = bytes.first_chunk().ok_or(Malformed)?;
        let [version, kind, _, _, n0, n1, n2, n3, rest @ ..] = bytes;
        match *version {
            0 => return Err(Malformed),
            1..=VERSION => {}
            _ => return Ok(None),
        }
        let long = |at: usize| rest[at..].first_chunk().copied().map_or(0, u64::from_le_bytes);
        Ok(Some(Self {
            kind: *kind,
            n: u32::from_le_bytes([*n0, *n1, *n2, *n3]),
            a: long(0),
            b: long(8),
            c: long(16) as u32,
        }))
    }

    fn blocks(&self) -> Result<Range<u64>, Malformed> {
        if self.a <= self.b { Ok(self.a..self.b) } else { Err(Malformed) }
    }
}

fn parts(kind: u8, n: u32, a: u64, b: u64, c: u32) -> Parts {
    Parts { kind, n, a, b, c }
}

impl Command {
    /// As bytes.
    pub fn encode(&self) -> [u8; BYTES] {
        let parts = match self {
            Command::Add { n, data_blocks, meta_bytes } => {
                parts(1, *n, *data_blocks, *meta_bytes, 0)
            }
            Command::Have { n, blocks } => parts(2, *n, blocks.start, blocks.end, 0),
            Command::Fail { n, blocks, errno } => {
                parts(3, *n, blocks.start, blocks.end, *errno as u32)
            }
            Command::Drop { n, blocks } => parts(4, *n, blocks.start, blocks.end, 0),
            Command::Remove { n } => parts(5, *n, 0, 0, 0),
            Command::List => parts(6, 0, 0, 0, 0),
            Command::Give { name } => {
                let (n, which) = name.encode();
                parts(7, n, 0, 0, which)
            }
            Command::Begin => parts(8, 0, 0, 0, 0),
            Command::Shutdown => parts(9, 0, 0, 0, 0),
        };
        parts.encode()
    }

    /// Out of bytes; `None` if it is of a kind or version that is not known here.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some(parts) = Parts::decode(bytes)? else { return Ok(None) };
        let n = parts.n;
        Ok(Some(match parts.kind {
            1 => Command::Add { n, data_blocks: parts.a, meta_bytes: parts.b },
            2 => Command::Have { n, blocks: parts.blocks()? },
            3 => Command::Fail { n, blocks: parts.blocks()?, errno: parts.c as i32 },
            4 => Command::Drop { n, blocks: parts.blocks()? },
            5 => Command::Remove { n },
            6 => Command::List,
            7 => match FdName::decode(n, parts.c) {
                Some(name) => Command::Give { name },
                None => return Ok(None),
            },
            8 => Command::Begin,
            9 => Command::Shutdown,
            _ => return Ok(None),
        }))
    }
}

impl Event {
    /// As bytes.
    pub fn encode(&self) -> [u8; BYTES] {
        let parts = match self {
            Event::Hello { serving } => parts(64, 0, u64::from(*serving), 0, 0),
            Event::Started => parts(65, 0, 0, 0, 0),
            Event::Added { n } => parts(66, *n, 0, 0, 0),
            Event::Refused { n, errno } => parts(67, *n, 0, 0, *errno as u32),
            Event::Dropped { n, blocks } => parts(68, *n, blocks.start, blocks.end, 0),
            Event::NotDropped { n, blocks } => parts(76, *n, blocks.start, blocks.end, 0),
            Event::Removed { n } => parts(69, *n, 0, 0, 0),
            Event::Layer { n, data_blocks, meta_bytes } => {
                parts(70, *n, *data_blocks, *meta_bytes, 0)
            }
            Event::ListEnd => parts(71, 0, 0, 0, 0),
            Event::Miss { n, blocks } => parts(72, *n, blocks.start, blocks.end, 0),
            Event::Touched { n, block } => parts(73, *n, *block, 0, 0),
            Event::Keep { name } | Event::Forget { name } => {
                let (n, which) = name.encode();
                parts(if matches!(self, Event::Keep { .. }) { 74 } else { 75 }, n, 0, 0, which)
            }
        };
        parts.encode()
    }

    /// Out of bytes; `None` if it is of a kind or version that is not known here.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some(parts) = Parts::decode(bytes)? else { return Ok(None) };
        let n = parts.n;
        Ok(Some(match parts.kind {
            64 => Event::Hello { serving: parts.a != 0 },
            65 => Event::Started,
            66 => Event::Added { n },
            67 => Event::Refused { n, errno: parts.c as i32 },
            68 => Event::Dropped { n, blocks: parts.blocks()? },
            69 => Event::Removed { n },
            70 => Event::Layer { n, data_blocks: parts.a, meta_bytes: parts.b },
            71 => Event::ListEnd,
            72 => Event::Miss { n, blocks: parts.blocks()? },
            73 => Event::Touched { n, block: parts.a },
            76 => Event::NotDropped { n, blocks: parts.blocks()? },
            74 | 75 => match FdName::decode(n, parts.c) {
                Some(name) if parts.kind == 74 => Event::Keep { name },
                Some(name) => Event::Forget { name },
                None => return Ok(None),
            },
            _ => return Ok(None),
        }))
    }
}

/// The errno of a message as one that FUSE passes on: anything else is `EIO`.
pub(crate) fn errno(raw: i32) -> Errno {
    // The kernel takes numbers below 512 only (`fuse_dev_do_write`).
    if (1..512).contains(&raw) { Errno::from_raw_os_error(raw) } else { Errno::IO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_newer_side_says_is_passed_over() {
        let list = Command::List.encode();
        assert_eq!(Command::decode(&[&list[..], &[7; 9]].concat()), Ok(Some(Command::List)));
        let mut newer = list;
        newer[0] = VERSION + 1;
        assert_eq!(Command::decode(&newer), Ok(None));
        let mut kind = list;
        kind[1] = 200;
        assert_eq!(Command::decode(&kind), Ok(None));
        assert_eq!(Event::decode(&kind), Ok(None));
        let mut which = Command::Give { name: FdName::Fuse }.encode();
        which[24] = 99;
        assert_eq!(Command::decode(&which), Ok(None));
        assert_eq!(Command::decode(&[0; BYTES]), Err(Malformed), "no version");
        assert_eq!(Command::decode(&list[..BYTES - 1]), Err(Malformed));
    }

    #[test]
    fn names_of_file_descriptors_are_read_as_they_are_written() {
        for name in [
            FdName::Fuse,
            FdName::Slots,
            FdName::Memory,
            FdName::Data(0),
            FdName::Map(7),
            FdName::Meta(u32::MAX),
        ] {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        assert_eq!(FdName::Map(7).to_string(), "l7.map");
        for wrong in [
            "",
            "l",
            "l.map",
            "l7.",
            "l07.map",
            "l+7.map",
            "l7.maps",
            "l4294967296.map",
            "keeper.sock",
        ] {
            assert_eq!(wrong.parse::<FdName>(), Err(Malformed), "{wrong}");
        }
    }

    #[test]
    fn only_errors_that_fuse_passes_on_are_passed_on() {
        assert_eq!(errno(28), Errno::NOSPC);
        for raw in [0, -5, 512, i32::MIN, i32::MAX] {
            assert_eq!(errno(raw), Errno::IO, "{raw}");
        }
    }
}
