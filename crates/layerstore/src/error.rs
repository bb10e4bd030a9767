//! What can go wrong with layers on the disk, as data.

use crate::{ChunkId, LayerNumber};
use shipway_erofs::BuildError;
use shipway_fault::{Class, Code, Fault};
use shipway_oci::Digest;
use std::{fmt, io, path::Path};

/// Bytes of a name that an error repeats.
const MAX_SHOWN: usize = 200;

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a layer has to be unpacked the ordinary way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// A directory has no entry of its own. Unpacking gives it the attributes of the same directory
    /// in the layers below, which a layer by itself does not know.
    #[error("the directory {path} has no entry of its own")]
    ImplicitDirectory {
        /// One of them, made printable.
        path: String,
    },
    /// Unpacking it would fail, or no image can say it.
    #[error("{path}: {error}")]
    Entry {
        /// The entry, made printable.
        path: String,
        /// What is wrong with it.
        error: BuildError,
    },
    /// The layer as a whole has no image.
    #[error(transparent)]
    Image(BuildError),
    /// See [`crate::MAX_REPOSITORY`].
    #[error("the name of the repository is too long")]
    RepositoryName,
}

impl Refused {
    pub(crate) fn implicit(path: &[u8]) -> Error {
        Self::ImplicitDirectory { path: shown(path) }.into()
    }

    pub(crate) fn entry(path: &[u8], error: BuildError) -> Error {
        Self::Entry { path: shown(path), error }.into()
    }
}

/// Bytes from a stranger, cut and made printable.
fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_SHOWN)]).escape_default().collect()
}

/// Why something could not be done with a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The layer cannot be lazy.
    #[error("the layer cannot be lazy: {0}")]
    Refused(#[from] Refused),
    /// The file system, or a quota on it, is full. Nothing was lost by it.
    #[error("{what}: no space left on the disk")]
    NoSpace {
        /// What was being done.
        what: String,
    },
    /// Reading or writing failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// How it failed.
        source: io::Error,
    },
    /// A file of the layer is not as it was written.
    #[error("the {file} of layer {layer} is damaged: {why}")]
    Damaged {
        /// The layer.
        layer: LayerNumber,
        /// The file, by its name.
        file: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// The bytes of a chunk are not what the index promises.
    #[error("{chunk} of layer {layer} has the digest {actual}, expected {expected}")]
    Digest {
        /// The layer.
        layer: LayerNumber,
        /// The chunk.
        chunk: ChunkId,
        /// What the index says.
        expected: Digest,
        /// What was found.
        actual: Digest,
    },
    /// The bytes of a span are not what somebody else's index promises.
    #[error("the span at {offset} of layer {layer} has the digest {actual}, expected {expected}")]
    Span {
        /// The layer.
        layer: LayerNumber,
        /// Where in the blob it begins.
        offset: u64,
        /// What the index says.
        expected: Digest,
        /// What was found.
        actual: Digest,
    },
    /// The bytes of a frame cannot be decompressed or are too few.
    #[error("a frame of layer {layer} cannot be read: {why}")]
    Frame {
        /// The layer.
        layer: LayerNumber,
        /// What is wrong.
        why: String,
    },
    /// An ordinary layer cannot be lazy, or its spans are damaged.
    #[error(transparent)]
    Plain(#[from] shipway_plainlayer::Error),
    /// The whole blob is not the one that the manifest names.
    #[error("the blob of layer {layer} has the digest {actual}, expected {expected}")]
    Blob {
        /// The layer.
        layer: LayerNumber,
        /// What the manifest says.
        expected: Digest,
        /// What was found.
        actual: Digest,
    },
    /// The layer's tar says something else than its table of contents.
    #[error("layer {layer} is not what its table of contents says: {difference}")]
    Lying {
        /// The layer.
        layer: LayerNumber,
        /// The first difference.
        difference: String,
    },
    /// Data that was to be there as a whole was given up for other layers meanwhile.
    #[error("data of layer {0} was given up meanwhile")]
    Evicted(LayerNumber),
    /// A chunk or table of contents of another layer was passed.
    #[error("not a {0} of this layer")]
    Foreign(&'static str),
    /// The layer's data cannot be taken away: a mount reads it directly.
    #[error("the data of layer {0} is mounted")]
    Mounted(LayerNumber),
    /// There is no layer with that number.
    #[error("there is no layer {0}")]
    NoLayer(LayerNumber),
    /// Another process has the store.
    #[error("another process uses the layers in {0}")]
    Locked(String),
    /// The file system cannot hold a store.
    #[error("the file system of {0} cannot make holes in files")]
    NoHoles(String),
}

impl Error {
    pub(crate) fn io(what: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let (what, source) = (what.to_string(), error.into());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { what },
            _ => Self::Io { what, source },
        }
    }

    /// With a verb and the path, for `map_err`.
    pub(crate) fn at<E: Into<io::Error>>(verb: &str, path: &Path) -> impl FnOnce(E) -> Self {
        move |error| Self::io(format_args!("{verb} {}", path.display()), error)
    }

    /// Whether the bytes that were fetched are not the promised ones, so that another source may
    /// have the right ones. Everything else stays as it is.
    pub fn is_wrong_bytes(&self) -> bool {
        matches!(
            self,
            Self::Digest { .. } | Self::Span { .. } | Self::Frame { .. } | Self::Blob { .. }
        )
    }
}

impl From<Error> for Fault {
    #[track_caller]
    fn from(error: Error) -> Self {
        let fault = |code| Fault::new(code, error.to_string()).with_class(Class::Environment);
        match error {
            Error::Io { what, source } => Fault::io(what, source),
            Error::NoSpace { .. } => fault(Code::ResourceExhausted)
                .hint("free some space, or give the snapshotter less of the disk with `max_bytes`"),
            Error::Refused(_) => {
                fault(Code::FailedPrecondition).hint("the layer can still be pulled as a whole")
            }
            Error::Damaged { .. }
            | Error::Digest { .. }
            | Error::Span { .. }
            | Error::Frame { .. }
            | Error::Blob { .. }
            | Error::Lying { .. } => fault(Code::DataLoss),
            Error::Plain(error) => error.into(),
            Error::Foreign(_) => Fault::internal(error.to_string()),
            Error::NoLayer(_) => fault(Code::NotFound),
            Error::Evicted(_) => fault(Code::Aborted),
            Error::Mounted(_) | Error::Locked(_) | Error::NoHoles(_) => {
                fault(Code::FailedPrecondition)
            }
        }
    }
}
