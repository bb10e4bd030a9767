//! What is said of an image and of its entries.

use crate::{BuildError, Xattr, limits};

/// Which attribute says that a directory hides what is below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OpaqueMark {
    /// `trusted.overlay.opaque`, for overlays that root mounts.
    #[default]
    Trusted,
    /// `user.overlay.opaque`, for overlays with `userxattr`.
    User,
}

impl OpaqueMark {
    /// The attribute's name.
    pub fn name(self) -> &'static str {
        match self {
            OpaqueMark::Trusted => "trusted.overlay.opaque",
            OpaqueMark::User => "user.overlay.opaque",
        }
    }
}

/// What is said of an image beside its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The file system's UUID. Overlayfs finds the origin of a copied-up file by it, so layers that
    /// meet in one overlay should differ; zeros are "none".
    pub uuid: [u8; 16],
    /// How opaque directories are marked.
    pub opaque: OpaqueMark,
}

/// A time of modification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds after that, below a second.
    pub nanoseconds: u32,
}

/// What every entry has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes<'a> {
    /// Permissions, up to `07777`. Symbolic links always have `0777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of modification.
    pub mtime: Time,
    /// Extended attributes; of equal names the last counts.
    pub xattrs: &'a [Xattr<'a>],
}

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Up to [`limits::DEVICE_MAJOR`].
    pub major: u32,
    /// Up to [`limits::DEVICE_MINOR`].
    pub minor: u32,
}

impl DeviceNumber {
    /// As the format has it (the kernel's `new_encode_dev`).
    pub fn encoded(self) -> Result<u32, BuildError> {
        if self.major > limits::DEVICE_MAJOR || self.minor > limits::DEVICE_MINOR {
            return Err(BuildError::Device);
        }
        Ok((self.minor & 0xff) | (self.major << 8) | ((self.minor & !0xff) << 12))
    }

    pub(crate) fn decode(encoded: u32) -> Self {
        Self {
            major: (encoded >> 8) & limits::DEVICE_MAJOR,
            minor: (encoded & 0xff) | ((encoded >> 12) & !0xff),
        }
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node<'a> {
    /// A directory; one that is there gets the attributes, and keeps its entries.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where to; any text.
        target: &'a [u8],
    },
    /// Another name of an entry that came before, whose attributes become those of this one.
    HardLink {
        /// Its path in the layer.
        target: &'a [u8],
    },
    /// A character device; `0:0` is a whiteout.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
}

/// Where a regular file's contents belong in the data file, in blocks of [`BLOCK`](crate::BLOCK)
/// bytes. The rest of the last block has to be zeros: programs that map the file see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block.
    pub block: u32,
    /// Number of blocks.
    pub blocks: u32,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// Nothing: the entry is the root, whose attributes layers do not change when containerd
    /// unpacks them.
    Root,
    /// A regular file, and where its contents belong.
    File(Extent),
    /// Anything else, under its own name.
    Entry,
    /// A whiteout: what lower layers have under the name is hidden.
    Whiteout,
    /// The parent directory hides everything below.
    Opaque,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_those_of_linux() {
        for (major, minor, encoded) in
            [(0, 0, 0), (1, 3, 0x103), (4095, 0xfffff, 0xffff_ffff), (8, 256, 0x0010_0800)]
        {
            let number = DeviceNumber { major, minor };
            assert_eq!(number.encoded(), Ok(encoded));
            assert_eq!(DeviceNumber::decode(encoded), number);
        }
        for (major, minor) in [(limits::DEVICE_MAJOR + 1, 0), (0, limits::DEVICE_MINOR + 1)] {
            assert_eq!(DeviceNumber { major, minor }.encoded(), Err(BuildError::Device));
        }
    }
}
