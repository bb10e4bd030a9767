//! What an image is bounded by. A layer beyond a bound is an error, not a smaller image.

/// Entries inserted into one image, implied parents and replaced ones included.
pub const ENTRIES: usize = 2 << 20;
/// Bytes of a path as the layer names it, or of the target of a link (Linux' `PATH_MAX` without its
/// NUL).
pub const PATH_BYTES: usize = 4095;
/// Bytes of one name in a directory (`NAME_MAX`).
pub const NAME_BYTES: usize = 255;
/// Bytes of all names and targets of symbolic links of an image.
pub const TEXT_BYTES: usize = 256 << 20;
/// Bytes of all paths of directories that are only implied, when they are asked for: deep ones have
/// far more than there are bytes of names.
pub const IMPLIED_BYTES: usize = 64 << 20;
/// Bytes of all paths that are looked up because a parent is a symbolic link; a few links could
/// otherwise make each of many paths a long walk.
pub const LINKED_PATH_BYTES: usize = 64 << 20;
/// Symbolic links on the way to one parent directory (as many as containerd follows).
pub const LINKS: usize = 255;
/// Attributes of one inode: the format counts the shared ones in eight bits, and all their names
/// fit what `listxattr` can return.
pub const XATTRS: usize = 255;
/// Bytes of an attribute's name (`XATTR_NAME_MAX`).
pub const XATTR_NAME_BYTES: usize = 255;
/// Bytes of an attribute's value: one less than Linux allows, for the format has 16 bits for it.
pub const XATTR_VALUE_BYTES: usize = 65_535;
/// Bytes of all attributes of an inode as they are on disk (the format counts words in 16 bits).
pub const XATTR_BODY_BYTES: usize = 12 + 4 * (u16::MAX as usize - 1);
/// Bytes of the distinct attributes of an image.
pub const XATTR_TEXT_BYTES: usize = 64 << 20;
/// Members of all distinct sets of attributes of an image.
pub const XATTR_MEMBERS: usize = 4 << 20;
/// Major number of a device (Linux has 12 bits).
pub const DEVICE_MAJOR: u32 = (1 << 12) - 1;
/// Minor number of a device (Linux has 20 bits).
pub const DEVICE_MINOR: u32 = (1 << 20) - 1;
/// Bytes of the image itself, without the data file.
pub const IMAGE_BYTES: u64 = 2 << 30;
/// Blocks of the image and the data file together; block numbers have 32 bits, and the last is the
/// kernel's mark of a hole.
pub const BLOCKS: u64 = u32::MAX as u64;
