//! Answers, as the bytes that are written to `/dev/fuse` in one piece.

use crate::{InitAnswer, NodeId, Unique};
use rustix::io::Errno;
use std::time::Duration;

/// Bytes of an answer's header.
const HEADER: usize = 16;
/// How long the kernel may believe what it was sent: it never changes, for numbers of nodes are not
/// used again.
const FOREVER: Duration = Duration::from_secs(1 << 40);

/// Attributes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAttributes {
    /// The number by which it is asked for.
    pub node: NodeId,
    /// The number of the inode, as `stat` shows it.
    pub inode: u64,
    /// Kind and permissions, as in `st_mode`.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds of all times since 1970, or before it.
    pub seconds: i64,
    /// Nanoseconds of all times.
    pub nanoseconds: u32,
    /// Number of a device, as in `new_encode_dev` of the kernel's `include/linux/kdev_t.h`.
    pub device: u32,
}

impl NodeAttributes {
    /// Of a file of root's, with the number of the node as the number of the inode.
    pub fn new(node: NodeId, mode: u32, size: u64, nlink: u32) -> Self {
        Self {
            node,
            inode: node.0,
            mode,
            size,
            nlink,
            uid: 0,
            gid: 0,
            seconds: 0,
            nanoseconds: 0,
            device: 0,
        }
    }
}

/// Bytes of the answer to a lookup.
const ENTRY_ANSWER: usize = 128;

/// How a file is read once it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Every read comes to the server and the kernel keeps nothing.
    pub direct: bool,
    /// The kernel keeps what it had of the file.
    pub keep_cache: bool,
    /// The kernel keeps the directory's entries.
    pub cache_directory: bool,
    /// Closing the file asks nothing of the server (Linux 5.16 and newer). Otherwise a process that
    /// closes it waits for a server that answers, and a process that is about to run another
    /// program holds locks meanwhile that `ps` wants.
    pub no_flush: bool,
}

/// The state of the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Blocks of 4 KiB in all; none are free.
    pub blocks: u64,
    /// Files.
    pub files: u64,
}

/// Writes answers into a buffer that is used again for the next; it grows to the largest and is
/// then allocated no more.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
}

impl Reply {
    /// With room for answers of `bytes` bytes, so that none of those allocates.
    pub fn with_room_for(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(HEADER + bytes) }
    }

    /// Nothing but that it is done.
    pub fn done(&mut self, unique: Unique) -> &[u8] {
        self.finish(unique, 0, |_| {})
    }

    /// An error.
    pub fn error(&mut self, unique: Unique, error: Errno) -> &[u8] {
        self.finish(unique, -error.raw_os_error(), |_| {})
    }

    /// The answer to an INIT.
    pub fn init(&mut self, unique: Unique, answer: &InitAnswer) -> &[u8] {
        self.finish(unique, 0, |out| answer.write(out))
    }

    /// An entry that was looked up.
    pub fn entry(&mut self, unique: Unique, attributes: &NodeAttributes) -> &[u8] {
        self.finish(unique, 0, |out| attributes.write_entry(out))
    }

    /// There is no such entry and never will be.
    pub fn no_entry(&mut self, unique: Unique) -> &[u8] {
        self.finish(unique, 0, |out| {
            for word in [0, 0, FOREVER.as_secs()] {
                out.extend_from_slice(&u64::to_ne_bytes(word));
            }
            out.resize(HEADER + ENTRY_ANSWER, 0);
        })
    }

    /// How many bytes the value or the names of extended attributes have, for requests of none.
    pub fn size(&mut self, unique: Unique, size: u32) -> &[u8] {
        self.finish(unique, 0, |out| {
            for word in [size, 0] {
                out.extend_from_slice(&word.to_ne_bytes());
            }
        })
    }

    /// Attributes.
    pub fn attributes(&mut self, unique: Unique, attributes: &NodeAttributes) -> &[u8] {
        self.finish(unique, 0, |out| {
            for word in [FOREVER.as_secs(), 0] {
                out.put(&word.to_ne_bytes());
            }
            attributes.write(out);
        })
    }

    /// A file or directory was opened; its handle is zero.
    pub fn opened(&mut self, unique: Unique, opened: Opened) -> &[u8] {
        let flags = u32::from(opened.direct)
            | u32::from(opened.keep_cache) << 1
            | u32::from(opened.cache_directory) << 3
            | u32::from(opened.no_flush) << 5;
        self.finish(unique, 0, |out| {
            // The handle (two words), flags, and what is not used.
            for word in [0, 0, flags, 0] {
                out.extend_from_slice(&u32::to_ne_bytes(word));
            }
        })
    }

    /// Contents of a file or directory: as many of `size` bytes as `fill` puts at the start of the
    /// buffer that it gets.
    pub fn data(
        &mut self,
        unique: Unique,
        size: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> &[u8] {
        self.bytes.clear();
        self.bytes.resize(HEADER + size, 0);
        match fill(&mut self.bytes[HEADER..]) {
            Ok(filled) => {
                self.bytes.truncate(HEADER + filled.min(size));
                self.seal(unique, 0)
            }
            Err(error) => self.error(unique, error),
        }
    }

    /// The state of the file system.
    pub fn statfs(&mut self, unique: Unique, state: StatFs) -> &[u8] {
        self.finish(unique, 0, |out| {
            for word in [state.blocks, 0, 0, state.files, 0] {
                out.extend_from_slice(&word.to_ne_bytes());
            }
            // Size of a block, length of names, size of fragments, and what is not used.
            for word in [4096u32, 255, 4096].into_iter().chain([0; 7]) {
                out.extend_from_slice(&word.to_ne_bytes());
            }
        })
    }

    /// Not an answer: asks the kernel to send again what it has no answer to. See
    /// [`InitAnswer::can_resend`].
    pub fn resend(&mut self) -> &[u8] {
        const NOTIFY_RESEND: i32 = 7;
        self.finish(Unique(0), NOTIFY_RESEND, |_| {})
    }

    fn finish(&mut self, unique: Unique, error: i32, body: impl FnOnce(&mut Vec<u8>)) -> &[u8] {
        self.bytes.clear();
        self.bytes.resize(HEADER, 0);
        body(&mut self.bytes);
        self.seal(unique, error)
    }

    fn seal(&mut self, unique: Unique, error: i32) -> &[u8] {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[4..8].copy_from_slice(&error.to_ne_bytes());
        self.bytes[8..HEADER].copy_from_slice(&unique.0.to_ne_bytes());
        &self.bytes
    }
}

/// Where answers are put together.
trait Out {
    fn put(&mut self, bytes: &[u8]);
}

impl Out for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Room that is there already; what it has no room for is left out.
struct Room<'a>(&'a mut [u8]);

impl Out for Room<'_> {
    fn put(&mut self, bytes: &[u8]) {
        if let Some((start, rest)) = std::mem::take(&mut self.0).split_at_mut_checked(bytes.len()) {
            start.copy_from_slice(bytes);
            self.0 = rest;
        }
    }
}

impl NodeAttributes {
    /// As the answer to a lookup.
    fn write_entry(&self, out: &mut impl Out) {
        // Node, generation, how long the entry holds, how long the attributes do.
        for word in [self.node.0, 0, FOREVER.as_secs(), FOREVER.as_secs(), 0] {
            out.put(&word.to_ne_bytes());
        }
        self.write(out);
    }

    fn write(&self, out: &mut impl Out) {
        // Inode number, size, blocks of 512 bytes (as of whole ones of 4 KiB), and the seconds of
        // three times.
        let time = self.seconds as u64;
        let blocks = self.size.div_ceil(4096).saturating_mul(8);
        for word in [self.inode, self.size, blocks, time, time, time] {
            out.put(&word.to_ne_bytes());
        }
        // Nanoseconds of three times, mode, links, owner, group, device, size of a block, flags.
        let nanoseconds = self.nanoseconds;
        for word in [nanoseconds, nanoseconds, nanoseconds, self.mode, self.nlink] {
            out.put(&word.to_ne_bytes());
        }
        for word in [self.uid, self.gid, self.device, 4096, 0] {
            out.put(&u32::to_ne_bytes(word));
        }
    }
}

/// The entries of a directory, as far as a reader has room for them.
#[derive(Debug)]
pub struct DirBuffer<'a> {
    bytes: &'a mut [u8],
    filled: usize,
}

impl<'a> DirBuffer<'a> {
    /// Bytes of an entry without its name.
    const ENTRY: usize = 24;

    /// In `bytes`, which [`Reply::data`] gives.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, filled: 0 }
    }

    /// Adds an entry of the kind that `mode` says, after which the listing goes on at `next`; false
    /// if there is no room.
    pub fn add(&mut self, inode: u64, mode: u32, name: &[u8], next: u64) -> bool {
        let bytes = (Self::ENTRY + name.len()).next_multiple_of(8);
        let Some(entry) = self.bytes.get_mut(self.filled..self.filled + bytes) else {
            return false;
        };
        // The kinds of `d_type` are those of modes.
        let kind = (mode >> 12) & 15;
        entry.fill(0);
        entry[..8].copy_from_slice(&inode.to_ne_bytes());
        entry[8..16].copy_from_slice(&next.to_ne_bytes());
        entry[16..20].copy_from_slice(&(name.len() as u32).to_ne_bytes());
        entry[20..24].copy_from_slice(&kind.to_ne_bytes());
        entry[Self::ENTRY..Self::ENTRY + name.len()].copy_from_slice(name);
        self.filled += bytes;
        true
    }

    /// Adds an entry to an answer to [`Operation::ReadDirPlus`](crate::Operation::ReadDirPlus), as
    /// if it had been looked up, or, if its node is zero, without that; false if there is no room.
    pub fn add_with(&mut self, attributes: &NodeAttributes, name: &[u8], next: u64) -> bool {
        let start = self.filled;
        self.filled += ENTRY_ANSWER;
        if !self.add(attributes.inode, attributes.mode, name, next) {
            self.filled = start;
            return false;
        }
        let answer = &mut self.bytes[start..start + ENTRY_ANSWER];
        if attributes.node.0 == 0 {
            answer.fill(0);
        } else {
            attributes.write_entry(&mut Room(answer));
        }
        true
    }

    /// Bytes of the entries.
    pub fn filled(&self) -> usize {
        self.filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_the_lengths_of_the_protocol() {
        let (mut reply, unique) = (Reply::default(), Unique(5));
        let attributes = NodeAttributes::new(NodeId(2), 0o100_444, 10, 1);
        assert_eq!(reply.done(unique), [16, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reply.error(unique, Errno::IO)[4..8], (-5i32).to_ne_bytes());
        assert_eq!(reply.entry(unique, &attributes).len(), 16 + 128);
        assert_eq!(reply.no_entry(unique).len(), 16 + 128);
        assert_eq!(reply.no_entry(unique)[16..24], [0; 8]);
        assert_eq!(reply.size(unique, 300)[16..], [44, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reply.attributes(unique, &attributes).len(), 16 + 104);
        assert_eq!(reply.opened(unique, Opened::default()).len(), 16 + 16);
        assert_eq!(reply.statfs(unique, StatFs::default()).len(), 16 + 80);
        assert_eq!(reply.resend()[4..8], 7i32.to_ne_bytes());
        let direct =
            Opened { direct: true, keep_cache: false, cache_directory: true, no_flush: true };
        assert_eq!(reply.opened(unique, direct)[24..28], 41u32.to_ne_bytes());
    }

    #[test]
    fn data_is_as_long_as_it_was_filled() {
        let (mut reply, unique) = (Reply::default(), Unique(5));
        let fill = |bytes: &mut [u8]| {
            bytes[..3].copy_from_slice(b"abc");
            Ok(3)
        };
        let answer = reply.data(unique, 10, fill);
        assert_eq!((answer.len(), &answer[16..]), (19, &b"abc"[..]));
        assert_eq!(reply.data(unique, 10, |_| Ok(99)).len(), 26);
        assert_eq!(
            reply.data(unique, 10, |_| Err(Errno::IO)),
            Reply::default().error(unique, Errno::IO)
        );
    }

    #[test]
    fn a_directory_buffer_takes_whole_entries() {
        let mut bytes = [1; 70];
        let mut buffer = DirBuffer::new(&mut bytes);
        assert!(buffer.add(2, 0o100_444, b"12345678", 1));
        assert!(buffer.add(3, 0o40_555, b"123", 2));
        assert!(!buffer.add(4, 0o40_555, b"", 3));
        assert_eq!(buffer.filled(), 32 + 32);
        assert_eq!(bytes[32..64][20..], [4, 0, 0, 0, b'1', b'2', b'3', 0, 0, 0, 0, 0]);
    }

    #[test]
    fn entries_with_attributes_are_lookups_and_entries() {
        let attributes = NodeAttributes {
            inode: 77,
            uid: 5,
            seconds: -2,
            nanoseconds: 3,
            ..NodeAttributes::new(NodeId(9), 0o20_666, 10, 1)
        };
        let mut bytes = [1; 400];
        let mut buffer = DirBuffer::new(&mut bytes);
        assert!(buffer.add_with(&attributes, b"name", 1));
        assert!(buffer.add_with(&NodeAttributes { node: NodeId(0), ..attributes }, b"..", 2));
        assert!(!buffer.add_with(&attributes, b"n", 3), "no room");
        assert_eq!(buffer.filled(), 2 * (128 + 32));
        let mut reply = Reply::default();
        assert_eq!(bytes[..128], reply.entry(Unique(1), &attributes)[16..]);
        assert_eq!(bytes[128..136], 77u64.to_ne_bytes());
        assert_eq!(bytes[148..152], [2, 0, 0, 0], "a character device");
        assert_eq!(bytes[160..288], [0; 128], "not looked up");
    }
}
