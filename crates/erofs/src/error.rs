//! What can be wrong with a layer's entries, and with an image that is read.

use crate::limits;
use shipway_fault::Fault;

/// Why a layer has no image. The builder must be dropped after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// See [`limits::ENTRIES`].
    #[error("the layer has more than {} entries", limits::ENTRIES)]
    TooManyEntries,
    /// A path, target or name is longer than Linux allows, or has a NUL in it.
    #[error("a path is too long or has a NUL in it")]
    Path,
    /// A symbolic link to nowhere.
    #[error("a symbolic link has no target")]
    EmptyTarget,
    /// See [`limits::TEXT_BYTES`] and [`limits::IMPLIED_BYTES`].
    #[error("the names or implied paths of the layer have too many bytes")]
    TooMuchText,
    /// A parent on the path is neither a directory nor a symbolic link to one.
    #[error("a parent is not a directory")]
    NotDirectory,
    /// See [`limits::LINKS`] and [`limits::LINKED_PATH_BYTES`].
    #[error("too many symbolic links on the way to a parent directory")]
    TooManyLinks,
    /// A hard link to what the layer does not have, or to a directory.
    #[error("a hard link to what the layer does not have or to a directory")]
    HardLink,
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("not a valid name of a whiteout")]
    Whiteout,
    /// A number that Linux does not have.
    #[error("not a valid device number")]
    Device,
    /// Permissions beyond `07777`.
    #[error("not valid permissions")]
    Mode,
    /// Nanoseconds of a second or more.
    #[error("not a valid time")]
    Time,
    /// An attribute of a namespace that has no place in images, or without a name.
    #[error("not an extended attribute that an image can have")]
    XattrName,
    /// An access control list or capability that Linux would not have stored, or too long a value.
    #[error("not a valid value of an extended attribute")]
    XattrValue,
    /// See [`limits::XATTRS`], [`limits::XATTR_BODY_BYTES`], [`limits::XATTR_TEXT_BYTES`] and
    /// [`limits::XATTR_MEMBERS`].
    #[error("too many extended attributes")]
    TooManyXattrs,
    /// See [`limits::BLOCKS`].
    #[error(
        "the files of the layer are larger than {} blocks of {} bytes",
        limits::BLOCKS,
        crate::BLOCK
    )]
    TooMuchData,
    /// See [`limits::IMAGE_BYTES`].
    #[error("the image would have more than {} bytes", limits::IMAGE_BYTES)]
    TooLarge,
}

impl From<BuildError> for Fault {
    #[track_caller]
    fn from(error: BuildError) -> Self {
        Fault::invalid(error.to_string())
    }
}

/// Why something could not be read from an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No superblock, or not of this format.
    #[error("not an EROFS image")]
    NotErofs,
    /// The superblock's checksum differs.
    #[error("the checksum of the superblock is wrong")]
    Checksum,
    /// A feature that images of a [`Builder`](crate::Builder) do not use.
    #[error("an EROFS feature that is not supported")]
    Unsupported,
    /// Something points outside of the image or contradicts itself.
    #[error("the image is corrupt")]
    Corrupt,
    /// The bytes of the image cannot be read.
    #[error("the image cannot be read")]
    Io,
    /// The inode is of another kind than the question.
    #[error("an inode of another kind")]
    Kind,
}

impl From<ReadError> for Fault {
    #[track_caller]
    fn from(error: ReadError) -> Self {
        Fault::internal(error.to_string())
    }
}
