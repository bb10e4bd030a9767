//! Numbers of the format: the kernel's `fs/erofs/erofs_fs.h`. All integers are little-endian.

/// Bytes of a block; see [`crate::BLOCK`].
pub const BLOCK: usize = crate::BLOCK as usize;
/// Its logarithm.
pub const BLOCK_BITS: u8 = 12;

/// Where the superblock is; its checksum is over the rest of its block.
pub const SUPER_AT: usize = 1024;
/// Bytes of a superblock without extension.
pub const SUPER_BYTES: usize = 128;
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// There is a checksum.
pub const COMPAT_CHECKSUM: u32 = 1;
/// Times are those of modification.
pub const COMPAT_MTIME: u32 = 2;
/// There is a table of devices beside the first.
pub const INCOMPAT_DEVICES: u32 = 8;

/// Bytes of a slot of the device table, which is also the unit of its position.
pub const SLOT_BYTES: usize = 128;
/// Number of the only slot: right behind the superblock.
pub const SLOT: u16 = ((SUPER_AT + SUPER_BYTES) / SLOT_BYTES) as u16;
/// Kernels that are given no `device=` take the tag for a path, or only want one not to be empty.
pub const SLOT_TAG: &[u8] = b"data";

/// An inode's number is its position in units of this.
pub const NID_BYTES: usize = 32;
/// Bytes of an extended inode.
pub const INODE_BYTES: usize = 64;
/// The root comes first: its number has 16 bits in the superblock.
pub const ROOT_AT: usize = SUPER_AT + SUPER_BYTES + SLOT_BYTES;
/// The low bit of `i_format`: an extended inode.
pub const EXTENDED: u16 = 1;
/// Contents in blocks one after the other.
pub const FLAT_PLAIN: u16 = 0;
/// The same, but the last part of a block is behind the inode.
pub const FLAT_INLINE: u16 = 2;

/// Bytes of the header of an inode's attributes.
pub const XATTR_HEADER: usize = 12;
/// Bytes of an attribute's header.
pub const XATTR_ENTRY: usize = 4;

/// Bytes of a directory entry without its name.
pub const DIRENT_BYTES: usize = 12;

/// Kinds of files in directory entries (Linux' `FT_*`).
pub const FT_FILE: u8 = 1;
pub const FT_DIRECTORY: u8 = 2;
pub const FT_CHAR: u8 = 3;
pub const FT_BLOCK: u8 = 4;
pub const FT_FIFO: u8 = 5;
pub const FT_SOCKET: u8 = 6;
pub const FT_SYMLINK: u8 = 7;

/// Kinds of files in modes (Linux' `S_IF*`).
pub const S_IFMT: u16 = 0o170_000;
pub const S_IFIFO: u16 = 0o010_000;
pub const S_IFCHR: u16 = 0o020_000;
pub const S_IFDIR: u16 = 0o040_000;
pub const S_IFBLK: u16 = 0o060_000;
pub const S_IFREG: u16 = 0o100_000;
pub const S_IFLNK: u16 = 0o120_000;
pub const S_IFSOCK: u16 = 0o140_000;

/// CRC-32C of `bytes` as the superblock has it: begun with all ones and not inverted at the end.
pub fn checksum(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    /// The check value of CRC-32C, which is inverted at the end.
    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(!super::checksum(b"123456789"), 0xe306_9283);
    }
}
