//! What can be wrong with a lazy layer, as data.

use shipway_fault::{Class, Code, Fault};
use shipway_oci::Digest;
use std::{fmt, io};

/// Bytes of a name that an error repeats; what comes from strangers may be long.
const MAX_SHOWN: usize = 200;

/// Why a layer cannot be used lazily, or why bytes of it were not what its table of contents says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The blob does not end as an indexed layer does: an ordinary layer.
    #[error("the layer has no table of contents")]
    NotIndexed,
    /// The blob ends as an indexed layer does, but what the footer says cannot be.
    #[error("the footer of the layer is not valid: {0}")]
    Footer(&'static str),
    /// An annotation of the layer's descriptor cannot be read.
    #[error("the annotation {key} is not valid: {value:?}")]
    Annotation {
        /// Its key.
        key: &'static str,
        /// Its value.
        value: Shown,
    },
    /// The table of contents is not the one that the manifest names.
    #[error("the table of contents has the digest {actual}, the manifest says {expected}")]
    TocDigest {
        /// What the manifest says.
        expected: Digest,
        /// What was found.
        actual: Digest,
    },
    /// Something has more bytes, or more items, than we take.
    #[error("{what} of {size} exceeds the limit of {limit}")]
    TooLarge {
        /// What it is, for example "a table of contents".
        what: &'static str,
        /// Its size, as far as it was read.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes of the table of contents cannot be decompressed.
    #[error("the table of contents cannot be decompressed: {0}")]
    Corrupt(String),
    /// The table of contents is no JSON of the form that we know, or is packed wrongly.
    #[error("the table of contents cannot be read: {0}")]
    Syntax(String),
    /// An entry of the table of contents cannot be.
    #[error("entry {index} ({name}): {problem}")]
    Entry {
        /// Its position in the table, from 0, chunks counted.
        index: usize,
        /// Its name.
        name: Shown,
        /// What is wrong.
        problem: Problem,
    },
    /// The bytes of a chunk are not what the table of contents promises.
    #[error("the data of {name} at {file_offset}: {problem}")]
    Chunk {
        /// The file.
        name: Shown,
        /// Where in the file the chunk begins.
        file_offset: u64,
        /// What is wrong.
        problem: ChunkProblem,
    },
    /// Reading or writing failed for reasons that are not in the bytes.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is wrong with an entry of a table of contents.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It has no type.
    #[error("it has no type")]
    NoType,
    /// A name, or a part of one, is too long, or has too many parts.
    #[error("its name is too long or too deep")]
    NameTooLong,
    /// A name or a link's target has a zero byte, or is empty where it must not be.
    #[error("its name or target is empty or has a zero byte")]
    BadName,
    /// Another entry has the same name.
    #[error("another entry has the same name")]
    Duplicate,
    /// The name belongs to the format.
    #[error("the name is reserved")]
    Reserved,
    /// The root, or a directory above another entry, is no directory.
    #[error("what must be a directory is none: {0}")]
    NotADirectory(Shown),
    /// A hard link's target does not come before it, or is a directory.
    #[error("it is a hard link to what is not there before it, or to a directory: {0}")]
    LinkTarget(Shown),
    /// A number has no meaning in its place: a negative size, an owner beyond 32 bits, a device
    /// that Linux cannot have.
    #[error("its {0} is out of range")]
    Range(&'static str),
    /// The time is no RFC 3339 text.
    #[error("its time is not valid")]
    Time,
    /// A digest is missing where data is, or is no sha256.
    #[error("its data has no valid digest")]
    Undigested,
    /// The digest of a file and that of its only chunk differ.
    #[error("its two digests differ")]
    Digests,
    /// A chunk does not belong to the file before it.
    #[error("a chunk does not belong to the file before it")]
    StrayChunk,
    /// Chunks of a file overlap or leave a gap.
    #[error("its chunks overlap or leave a gap")]
    ChunkGap,
    /// The chunks are not as long as the file.
    #[error("its chunks are not as long as the file")]
    ChunkSum,
    /// A chunk lies before the one that precedes it, or within it.
    #[error("its data is not after the data before it")]
    Order,
    /// A chunk lies outside of the blob.
    #[error("its data is outside of the layer")]
    Outside,
    /// A chunk is too large to be kept in memory.
    #[error("a chunk of {0} bytes is too large")]
    ChunkTooLarge(u64),
    /// All files together have more data than is allowed or was declared.
    #[error("the files have more than {0} bytes in all")]
    TooMuchData(u64),
    /// An extended attribute is longer than Linux allows, has no name, or there are too many.
    #[error("its extended attributes are too long or too many")]
    Xattrs,
}

/// What is wrong with the bytes of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkProblem {
    /// They have another digest.
    #[error("digest mismatch: expected {expected}, got {actual}")]
    Digest {
        /// What the table of contents says.
        expected: Digest,
        /// What was found.
        actual: Digest,
    },
    /// There are fewer than the table of contents says.
    #[error("it ends too early")]
    Short,
    /// They cannot be decompressed.
    #[error("it cannot be decompressed: {0}")]
    Corrupt(String),
}

/// Bytes from a stranger, cut and made printable.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown(String);

impl Shown {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let cut = &bytes[..bytes.len().min(MAX_SHOWN)];
        let mut text: String = String::from_utf8_lossy(cut).escape_default().collect();
        if cut.len() < bytes.len() {
            text.push('…');
        }
        Self(if text.is_empty() { "/".to_owned() } else { text })
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Error {
    /// Whether the bytes that were read are not those that the manifest or the table of contents
    /// promises, so that another source may have the right ones. Everything else stays as it is.
    pub fn is_wrong_bytes(&self) -> bool {
        matches!(self, Self::TocDigest { .. } | Self::Corrupt(_) | Self::Chunk { .. })
    }

    pub(crate) fn entry(index: usize, name: &[u8], problem: Problem) -> Self {
        Self::Entry { index, name: Shown::new(name), problem }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let layer = |code| Fault::new(code, message.clone()).with_class(Class::Environment);
        match error {
            Error::Io(e) => Fault::io("read a layer", e),
            Error::NotIndexed => layer(Code::NotFound),
            Error::TooLarge { .. } => layer(Code::ResourceExhausted),
            Error::TocDigest { .. } | Error::Corrupt(_) | Error::Chunk { .. } => {
                layer(Code::DataLoss)
            }
            Error::Footer(_)
            | Error::Annotation { .. }
            | Error::Syntax(_)
            | Error::Entry { .. } => layer(Code::FailedPrecondition).hint(
                "the layer can still be pulled as a whole; convert the image again to have it lazy",
            ),
        }
    }
}
