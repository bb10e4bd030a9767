//! What can be wrong, as data.

use shipway_fault::{Class, Code, Fault};
use std::io;

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a layer has no spans, or why they cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The blob cannot be resumed often enough; usually it is one large zstd frame.
    #[error(
        "the layer cannot be read from the middle: {bytes} bytes from {start} on are in one piece, \
         at most {limit} may be"
    )]
    LongSpan {
        /// Where in the tar the span begins.
        start: u64,
        /// Its bytes as far as they were read, compressed or not.
        bytes: u64,
        /// See [`crate::MAX_SPAN`] and [`crate::MAX_COMPRESSED`].
        limit: u64,
    },
    /// See [`crate::MAX_SPANS`].
    #[error("the layer has more than {limit} spans")]
    ManySpans {
        /// The most.
        limit: usize,
    },
    /// A file has holes that the tar does not store.
    #[error("{0:?} is stored as a sparse file")]
    Sparse(String),
    /// The tar has no table of contents: names or kinds that no layer has.
    #[error(transparent)]
    Toc(#[from] shipway_estargz::Error),
    /// A file of spans is not as it was written, or is not of this blob.
    #[error("the spans are damaged: {0}")]
    Damaged(&'static str),
    /// A zTOC is not valid, or is of a kind that is not read.
    #[error("the zTOC is not valid: {0}")]
    Ztoc(&'static str),
    /// The blob cannot be read or decompressed.
    #[error("read the layer: {0}")]
    Io(#[from] io::Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let fault = |code| Fault::new(code, error.to_string()).with_class(Class::Environment);
        match error {
            Error::Io(source) => Fault::io("read a layer", source),
            Error::Toc(error) => error.into(),
            Error::Damaged(_) | Error::Ztoc(_) => fault(Code::DataLoss),
            Error::LongSpan { .. } => fault(Code::FailedPrecondition).hint(
                "compress the layer with gzip, or with zstd in several frames, to have it lazy",
            ),
            Error::ManySpans { .. } | Error::Sparse(_) => fault(Code::FailedPrecondition),
        }
    }
}
