//! Requests, out of the bytes that the kernel wrote.

use crate::InitRequest;
use shipway_fault::Fault;

/// Number of a request, unique on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unique(pub u64);

impl Unique {
    /// Set in a request that the kernel has sent before and sends again (`FUSE_UNIQUE_RESEND`).
    const RESENT: u64 = 1 << 63;

    /// Whether it was sent before. The answer has the number as it is.
    pub fn is_resent(self) -> bool {
        self.0 & Self::RESENT != 0
    }

    /// The number under which it was sent first.
    pub fn first(self) -> Self {
        Self(self.0 & !Self::RESENT)
    }
}

/// Number of a file; the root has [`NodeId::ROOT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

/// What the server called an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than the request says or its operation has.
    #[error("a FUSE request is too short")]
    Short,
    /// A name without its end, empty, or of an entry and with a slash.
    #[error("a FUSE request has no valid name")]
    Name,
}

impl From<WireError> for Fault {
    #[track_caller]
    fn from(error: WireError) -> Self {
        Fault::internal(error.to_string())
    }
}

/// What every request has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its number.
    pub unique: Unique,
    /// The file it is about.
    pub node: NodeId,
    /// Who asks.
    pub uid: u32,
    /// The asker's group.
    pub gid: u32,
    /// The asker's thread.
    pub pid: u32,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Begins the connection.
    Init(InitRequest),
    /// Ends it; no answer is waited for.
    Destroy,
    /// The entry `name` of a directory.
    Lookup {
        /// Without slash and NUL.
        name: &'a [u8],
    },
    /// Attributes.
    GetAttr,
    /// Where a symbolic link points to.
    ReadLink,
    /// Opens a file.
    Open {
        /// As for `open(2)`.
        flags: u32,
    },
    /// Reads from a file.
    Read {
        /// What it was opened as.
        handle: Handle,
        /// From where.
        offset: u64,
        /// Bytes at most.
        size: u32,
    },
    /// Closes a file.
    Release {
        /// What it was opened as.
        handle: Handle,
    },
    /// Forgets lookups of this node; has no answer.
    Forget {
        /// How many.
        lookups: u64,
    },
    /// Forgets lookups of several nodes; has no answer.
    BatchForget(Forget<'a>),
    /// The asker of another request does not wait any more; has no answer but that of the other.
    Interrupt {
        /// The other.
        unique: Unique,
    },
    /// Opens a directory.
    OpenDir,
    /// Lists a directory.
    ReadDir {
        /// What it was opened as.
        handle: Handle,
        /// Where to go on: zero, or what an entry said.
        offset: u64,
        /// Bytes at most.
        size: u32,
    },
    /// Lists a directory, with the attributes of what is in it.
    ReadDirPlus {
        /// What it was opened as.
        handle: Handle,
        /// Where to go on: zero, or what an entry said.
        offset: u64,
        /// Bytes at most.
        size: u32,
    },
    /// Closes a directory.
    ReleaseDir {
        /// What it was opened as.
        handle: Handle,
    },
    /// The state of the file system.
    StatFs,
    /// The value of an extended attribute.
    GetXattr {
        /// With its namespace, without NUL.
        name: &'a [u8],
        /// Bytes at most; if zero, only how many there are is asked.
        size: u32,
    },
    /// The names of extended attributes, each with a NUL behind it.
    ListXattr {
        /// As for [`Operation::GetXattr`].
        size: u32,
    },
    /// Anything else, by its number. The answer is `ENOSYS`.
    Other(u32),
}

/// The nodes of a [`Operation::BatchForget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forget<'a>(&'a [u8]);

impl Forget<'_> {
    /// Nodes, and how many lookups of each.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, u64)> + '_ {
        self.0.chunks_exact(16).map(|pair| (NodeId(u64_at(pair, 0)), u64_at(pair, 8)))
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Who asks, about what.
    pub header: Header,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// Bytes of a request's header.
const HEADER: usize = 40;

/// The integer at `at`; callers have checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

impl<'a> Request<'a> {
    /// Takes a request apart. `bytes` may be longer than the request: it says its length itself.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, WireError> {
        if bytes.len() < HEADER {
            return Err(WireError::Short);
        }
        let length = usize::try_from(u32_at(bytes, 0)).map_err(|_| WireError::Short)?;
        let body = bytes.get(HEADER..length).ok_or(WireError::Short)?;
        let header = Header {
            unique: Unique(u64_at(bytes, 8)),
            node: NodeId(u64_at(bytes, 16)),
            uid: u32_at(bytes, 24),
            gid: u32_at(bytes, 28),
            pid: u32_at(bytes, 32),
        };
        Ok(Self { header, operation: Operation::parse(u32_at(bytes, 4), body)? })
    }
}

impl<'a> Operation<'a> {
    fn parse(opcode: u32, body: &'a [u8]) -> Result<Self, WireError> {
        let at_least =
            |bytes: usize| if body.len() < bytes { Err(WireError::Short) } else { Ok(()) };
        Ok(match opcode {
            1 => Operation::Lookup { name: name(body)? },
            2 => {
                at_least(8)?;
                Operation::Forget { lookups: u64_at(body, 0) }
            }
            3 => Operation::GetAttr,
            5 => Operation::ReadLink,
            14 => {
                at_least(8)?;
                Operation::Open { flags: u32_at(body, 0) }
            }
            15 => {
                at_least(40)?;
                Operation::Read {
                    handle: Handle(u64_at(body, 0)),
                    offset: u64_at(body, 8),
                    size: u32_at(body, 16),
                }
            }
            17 => Operation::StatFs,
            18 => {
                at_least(24)?;
                Operation::Release { handle: Handle(u64_at(body, 0)) }
            }
            22 => {
                at_least(8)?;
                Operation::GetXattr { name: text(&body[8..])?, size: u32_at(body, 0) }
            }
            23 => {
                at_least(8)?;
                Operation::ListXattr { size: u32_at(body, 0) }
            }
            26 => {
                at_least(16)?;
                // The second word of flags is there if the first says so.
                let flags = u64::from(u32_at(body, 12))
                    | if body.len() >= 20 { u64::from(u32_at(body, 16)) << 32 } else { 0 };
                Operation::Init(InitRequest {
                    major: u32_at(body, 0),
                    minor: u32_at(body, 4),
                    max_readahead: u32_at(body, 8),
                    flags: if flags & crate::init::INIT_EXT == 0 {
                        flags & u64::from(u32::MAX)
                    } else {
                        flags
                    },
                })
            }
            27 => Operation::OpenDir,
            28 => {
                at_least(40)?;
                Operation::ReadDir {
                    handle: Handle(u64_at(body, 0)),
                    offset: u64_at(body, 8),
                    size: u32_at(body, 16),
                }
            }
            29 => {
                at_least(24)?;
                Operation::ReleaseDir { handle: Handle(u64_at(body, 0)) }
            }
            36 => {
                at_least(8)?;
                Operation::Interrupt { unique: Unique(u64_at(body, 0)) }
            }
            38 => Operation::Destroy,
            42 => {
                at_least(8)?;
                let count = u32_at(body, 0) as usize;
                let end =
                    count.checked_mul(16).and_then(|n| n.checked_add(8)).ok_or(WireError::Short)?;
                Operation::BatchForget(Forget(body.get(8..end).ok_or(WireError::Short)?))
            }
            44 => {
                at_least(40)?;
                Operation::ReadDirPlus {
                    handle: Handle(u64_at(body, 0)),
                    offset: u64_at(body, 8),
                    size: u32_at(body, 16),
                }
            }
            other => Operation::Other(other),
        })
    }

    /// Whether the kernel waits for an answer.
    pub fn is_answered(&self) -> bool {
        !matches!(
            self,
            Operation::Forget { .. }
                | Operation::BatchForget(_)
                | Operation::Interrupt { .. }
                | Operation::Destroy
        )
    }
}

/// The text that `body` begins with, up to its NUL.
fn text(body: &[u8]) -> Result<&[u8], WireError> {
    let end = body.iter().position(|b| *b == 0).ok_or(WireError::Name)?;
    if end == 0 { Err(WireError::Name) } else { Ok(&body[..end]) }
}

/// The name of an entry that `body` begins with.
fn name(body: &[u8]) -> Result<&[u8], WireError> {
    let name = text(body)?;
    if name.contains(&b'/') { Err(WireError::Name) } else { Ok(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = (HEADER as u32 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&opcode.to_ne_bytes());
        bytes.extend_from_slice(&7u64.to_ne_bytes());
        bytes.extend_from_slice(&3u64.to_ne_bytes());
        [1000u32, 100, 4242, 0].iter().for_each(|n| bytes.extend_from_slice(&n.to_ne_bytes()));
        bytes.extend_from_slice(body);
        bytes
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[track_caller]
    fn parsed(opcode: u32, body: &[u8]) -> Result<String, WireError> {
        let bytes = request(opcode, body);
        let request = Request::parse(&bytes)?;
        assert_eq!(
            request.header,
            Header { unique: Unique(7), node: NodeId(3), uid: 1000, gid: 100, pid: 4242 }
        );
        Ok(format!("{:?}", request.operation))
    }

    #[test]
    fn requests_are_taken_apart() {
        assert_eq!(parsed(1, b"name\0").as_deref(), Ok("Lookup { name: [110, 97, 109, 101] }"));
        assert_eq!(parsed(2, &words(&[5])).as_deref(), Ok("Forget { lookups: 5 }"));
        assert_eq!(parsed(3, &[]).as_deref(), Ok("GetAttr"));
        assert_eq!(parsed(14, &words(&[0x8000])).as_deref(), Ok("Open { flags: 32768 }"));
        assert_eq!(
            parsed(15, &words(&[9, 4096, 65536, 0, 0])).as_deref(),
            Ok("Read { handle: Handle(9), offset: 4096, size: 65536 }")
        );
        assert_eq!(
            parsed(28, &words(&[9, 2, 4096, 0, 0])).as_deref(),
            Ok("ReadDir { handle: Handle(9), offset: 2, size: 4096 }")
        );
        assert_eq!(
            parsed(44, &words(&[9, 2, 4096, 0, 0])).as_deref(),
            Ok("ReadDirPlus { handle: Handle(9), offset: 2, size: 4096 }")
        );
        assert_eq!(parsed(5, &[]).as_deref(), Ok("ReadLink"));
        assert_eq!(
            parsed(22, &[&words(&[300])[..], b"a/b\0"].concat()).as_deref(),
            Ok("GetXattr { name: [97, 47, 98], size: 300 }")
        );
        assert_eq!(parsed(23, &words(&[7])).as_deref(), Ok("ListXattr { size: 7 }"));
        assert_eq!(parsed(36, &words(&[6])).as_deref(), Ok("Interrupt { unique: Unique(6) }"));
        assert_eq!(parsed(38, &[]).as_deref(), Ok("Destroy"));
        assert_eq!(parsed(16, &[]).as_deref(), Ok("Other(16)"));
        let bytes = request(42, &words(&[2, 3, 1, 4, 2]));
        let Ok(Request { operation: Operation::BatchForget(forget), .. }) = Request::parse(&bytes)
        else {
            panic!("not forgotten")
        };
        assert_eq!(forget.nodes().collect::<Vec<_>>(), [(NodeId(3), 1), (NodeId(4), 2)]);
        assert_eq!(Unique(7 | 1 << 63).first(), Unique(7));
        assert!(Unique(7 | 1 << 63).is_resent() && !Unique(7).is_resent());
    }

    #[test]
    fn what_is_short_is_an_error() {
        for (opcode, bytes) in [
            (2, 8),
            (14, 8),
            (15, 40),
            (18, 24),
            (23, 8),
            (26, 16),
            (28, 40),
            (29, 24),
            (36, 8),
            (42, 8),
            (44, 40),
        ] {
            assert!(parsed(opcode, &vec![0; bytes]).is_ok(), "{opcode}");
            assert_eq!(parsed(opcode, &vec![0; bytes - 1]), Err(WireError::Short), "{opcode}");
        }
        assert_eq!(parsed(42, &words(&[2, 3, 1, 4])), Err(WireError::Short));
        assert_eq!(parsed(42, &words(&[u64::MAX, 3])), Err(WireError::Short));
        for name in [&b""[..], b"\0", b"a/b\0", b"a"] {
            assert_eq!(parsed(1, name), Err(WireError::Name));
        }
        for (xattr, error) in [
            (&[0; 7][..], WireError::Short),
            (&[0; 9], WireError::Name),
            (&[1; 9], WireError::Name),
        ] {
            assert_eq!(parsed(22, xattr), Err(error));
        }
        let whole = request(3, &[]);
        assert!(
            Request::parse(&[&whole[..], &[1; 50]].concat()).is_ok(),
            "what is behind it is none of it"
        );
        assert_eq!(Request::parse(&whole[..HEADER - 1]), Err(WireError::Short));
        for length in [0, 39, 41, u32::MAX] {
            let bytes = [&length.to_ne_bytes()[..], &whole[4..]].concat();
            assert_eq!(Request::parse(&bytes), Err(WireError::Short), "{length}");
        }
    }
}
