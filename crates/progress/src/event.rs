//! What can be said about a build (rows `ctl.status.*`).

use shipway_fault::{SourceFile, Span};
use shipway_oci::Digest;
use std::{sync::Arc, time::SystemTime};

/// Something that happened. Copies share what they say, however many journals have it.
#[derive(Clone, Debug)]
pub enum Event {
    /// A vertex is known, started, ended.
    Vertex(Arc<VertexUpdate>),
    /// A counter within a vertex.
    Status(Arc<StatusUpdate>),
    /// Output of a vertex.
    Log(Arc<LogUpdate>),
    /// A warning.
    Warning(Arc<WarningUpdate>),
}

/// A piece of a vertex's output.
#[derive(Clone, Debug, PartialEq)]
pub struct LogUpdate {
    /// The vertex.
    pub vertex: Digest,
    /// Which stream.
    pub stream: LogStream,
    /// The bytes, in memory of exactly their size.
    pub bytes: Box<[u8]>,
    /// When.
    pub time: SystemTime,
}

/// Which stream a log line came from (1 and 2 on the wire).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LogStream {
    Stdout = 1,
    Stderr = 2,
}

/// Vertices that a user interface may fold (row `llb.md.progress`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub struct Group {
    pub id: String,
    pub name: String,
    pub weak: bool,
}

/// Why a vertex ran: why the cache had no result for it. Inputs are called by the names of their
/// vertices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheMiss {
    /// The build wants no cache for it; or, if there are `inputs`, for these.
    Ignored {
        /// The inputs that ran although the cache may have had them.
        inputs: Vec<String>,
    },
    /// Nothing tells its result from another, so that it is not stored; or, if there are `inputs`,
    /// theirs are like that.
    Uncacheable {
        /// The inputs whose keys mean nothing beyond the build's session.
        inputs: Vec<String>,
    },
    /// The cache knows the work, and the result is gone: pruned, or lost.
    Gone,
    /// The latest result of the same operation, or of a vertex of this name, was made of something
    /// else.
    Changed(CacheChanges),
    /// The cache knows nothing like it.
    New,
}

impl CacheMiss {
    /// About how much memory it takes.
    pub(crate) fn weight(&self) -> usize {
        let size = |texts: &[String]| texts.iter().map(|t| t.len() + size_of::<String>()).sum();
        match self {
            Self::Ignored { inputs } | Self::Uncacheable { inputs } => size(inputs),
            Self::Changed(CacheChanges { operation, inputs, contents }) => {
                operation.as_deref().map_or(0, size) + size(inputs) + size(contents)
            }
            Self::Gone | Self::New => 0,
        }
    }
}

/// How two runs of a vertex differ; something does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheChanges {
    /// What of the operation itself, such as `env VERSION`; empty where that is not known. `None`
    /// if it is the same.
    pub operation: Option<Vec<String>>,
    /// Inputs that are results of other work.
    pub inputs: Vec<String>,
    /// Inputs in which other files are read.
    pub contents: Vec<String>,
}

/// State of a vertex; each update is whole.
#[derive(Clone, Debug, PartialEq)]
pub struct VertexUpdate {
    /// Its digest.
    pub digest: Digest,
    /// Digests of its inputs.
    pub inputs: Vec<Digest>,
    /// Its name.
    pub name: String,
    /// Whether the result came from the cache.
    pub cached: bool,
    /// When it started.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub completed: Option<SystemTime>,
    /// Why it failed.
    pub error: Option<String>,
    /// Why it ran, once that is known.
    pub miss: Option<Arc<CacheMiss>>,
    /// Group for folding.
    pub group: Option<Group>,
}

/// State of a counter within a vertex.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusUpdate {
    /// The vertex.
    pub vertex: Digest,
    /// Identity within the vertex, and what clients print.
    pub id: String,
    /// Name; usually empty.
    pub name: String,
    /// Done so far, bytes or steps.
    pub current: i64,
    /// To do in all; 0 if unknown.
    pub total: i64,
    /// When this was said.
    pub time: SystemTime,
    /// When it started.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub completed: Option<SystemTime>,
}

/// Lines of a source that a warning is about.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceSpan {
    /// The text.
    pub file: Arc<SourceFile>,
    /// Where in it.
    pub spans: Vec<Span>,
}

/// A warning (row `ctl.status.warn`).
#[derive(Clone, Debug, PartialEq)]
pub struct WarningUpdate {
    /// The vertex it belongs to.
    pub vertex: Digest,
    /// Severity; 1 is usual.
    pub level: i64,
    /// One line.
    pub short: String,
    /// More lines.
    pub detail: Vec<String>,
    /// Where to read more.
    pub url: String,
    /// The lines it is about.
    pub source: Option<SourceSpan>,
}
