//! Errors as data: a class, a code, a message, its causes, hints, and typed details.
//!
//! Crates whose callers act on the kind of an error (`dockerfile`, `http`, `registry`, …) have
//! enums of their own and convert them to [`Fault`] with `From`; everything else returns [`Fault`],
//! because results and their errors are shared between builds and must be `Clone`. Nothing here
//! knows gRPC; crate `grpc` turns a fault into a status and back (rows `net.err*`, `err.*`).

mod redact;

pub use redact::{redact, redact_text};

use std::{borrow::Cow, collections::BTreeMap, fmt, panic::Location, sync::Arc};

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The request is wrong: a Dockerfile, an option, a missing file, a failing step.
    User,
    /// The surroundings failed: a registry, the disk, containerd, the network.
    Environment,
    /// We are wrong.
    Internal,
    /// The caller is gone.
    Cancelled,
}

/// The kind of failure, as gRPC names it (the numbers are gRPC's status codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
#[allow(missing_docs)]
pub enum Code {
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl Code {
    /// The code with gRPC's number `n`; unknown numbers are [`Code::Unknown`].
    pub fn from_number(n: i32) -> Self {
        use Code::*;
        match n {
            1 => Cancelled,
            3 => InvalidArgument,
            4 => DeadlineExceeded,
            5 => NotFound,
            6 => AlreadyExists,
            7 => PermissionDenied,
            8 => ResourceExhausted,
            9 => FailedPrecondition,
            10 => Aborted,
            11 => OutOfRange,
            12 => Unimplemented,
            13 => Internal,
            14 => Unavailable,
            15 => DataLoss,
            16 => Unauthenticated,
            _ => Unknown,
        }
    }

    fn class(self) -> Class {
        use Code::*;
        match self {
            Cancelled => Class::Cancelled,
            Internal | DataLoss => Class::Internal,
            DeadlineExceeded | ResourceExhausted | Aborted | Unavailable => Class::Environment,
            _ => Class::User,
        }
    }
}

/// A place in a text: line and character, both counted as the client's source map does (lines from
/// 1, characters from 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// Line, from 1.
    pub line: i32,
    /// Character within the line, from 0.
    pub character: i32,
}

/// A stretch of a text, from `start` to `end` inclusive of the end's line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    /// First position.
    pub start: Position,
    /// Last position.
    pub end: Position,
}

/// A text that spans point into, carried whole so that a client can draw the lines (row
/// `err.source`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceFile {
    /// Name as the user knows it.
    pub filename: String,
    /// Language for highlighting, such as `Dockerfile`.
    pub language: String,
    /// The whole text.
    pub data: Vec<u8>,
    /// Encoded LLB definition that produced the file (`pb.Definition`), when it came out of a
    /// build.
    pub definition: Option<Vec<u8>>,
}

/// Which part of a vertex failed (row `err.solve`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Index of the file action.
    FileAction(i64),
    /// Index of the input whose cache key failed.
    CacheInput(i64),
}

/// Typed facts that travel with a fault to the client (rows `err.*`).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Detail {
    /// Digest (`sha256:…`) of the failing vertex.
    Vertex(String),
    /// The lines to draw.
    Source {
        /// The text.
        file: Arc<SourceFile>,
        /// Where in it.
        spans: Vec<Span>,
    },
    /// The failing operation.
    Solve {
        /// Ids of the inputs' states, usable for debugging.
        input_ids: Vec<String>,
        /// Ids of the mounts' states.
        mount_ids: Vec<String>,
        /// The operation as an encoded `pb.Op`.
        op: Vec<u8>,
        /// The part of it that failed.
        subject: Option<Subject>,
        /// What the graph says of the operation besides.
        description: BTreeMap<String, String>,
    },
    /// The frontend that failed.
    Frontend {
        /// Its name.
        name: String,
        /// The image it came from.
        source: String,
    },
    /// A frontend capability the caller asked for and we lack.
    FrontendCap(String),
    /// A subrequest we do not answer.
    Subrequest(String),
    /// What provenance lacks of the materials that the build wanted all of (row `err.provenance`).
    IncompleteMaterials(Vec<IncompleteMaterial>),
    /// Something that the version of the defaults which the client wants does not have (row
    /// `err.compat`).
    Compatibility {
        /// The version.
        version: i64,
        /// What it lacks.
        feature: String,
    },
    /// Exit code of the process that failed.
    Exit(u32),
    /// A layer that can no longer be had from anywhere.
    LostLayer {
        /// Digest of its tar.
        diff_id: String,
        /// The source that has nothing else either, such as a registry that does not answer: an id
        /// that means something inside this process only.
        source: Option<u64>,
    },
    /// A detail that came from elsewhere and passes through untouched: type URL and value (row
    /// `net.errunknown`).
    Opaque {
        /// Type URL.
        type_url: String,
        /// Encoded value.
        value: Vec<u8>,
    },
}

/// Something that a build took and provenance cannot name. What does not apply is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct IncompleteMaterial {
    pub op: String,
    pub name: String,
    pub method: String,
    pub uri: String,
    /// Where redirections led.
    pub final_uri: String,
    pub reason: String,
}

#[derive(Clone)]
struct Data {
    class: Class,
    code: Code,
    message: Cow<'static, str>,
    /// Where it was made.
    origin: &'static Location<'static>,
    context: Vec<(Cow<'static, str>, &'static Location<'static>)>,
    hints: Vec<Cow<'static, str>>,
    details: Vec<Detail>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// An error as data. Cheap to clone; `Display` gives the contexts, outermost first, then the
/// message.
#[derive(Clone)]
pub struct Fault(Arc<Data>);

/// The usual result above the leaf crates.
pub type Result<T, E = Fault> = std::result::Result<T, E>;

/// An I/O error in the words that BuildKit's users know: `no such file or directory`, without the
/// number behind.
fn words_of(error: &std::io::Error) -> String {
    let text = error.to_string();
    let Some(words) =
        error.raw_os_error().and_then(|n| text.strip_suffix(&format!(" (os error {n})")))
    else {
        return text;
    };
    let mut chars = words.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

impl Fault {
    /// A fault of `code`, in the class that the code implies.
    #[track_caller]
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Arc::new(Data {
            class: code.class(),
            code,
            message: message.into(),
            origin: Location::caller(),
            context: Vec::new(),
            hints: Vec::new(),
            details: Vec::new(),
            source: None,
        }))
    }

    /// Wrong input.
    #[track_caller]
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// Something the request names does not exist.
    #[track_caller]
    pub fn not_found(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// Something that exists in BuildKit's API and not here; `what` names it.
    #[track_caller]
    pub fn unimplemented(what: impl fmt::Display) -> Self {
        Self::new(Code::Unimplemented, format!("{what} is not implemented by this shipwayd"))
    }

    /// A broken promise of our own.
    #[track_caller]
    pub fn internal(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// The surroundings failed for now.
    #[track_caller]
    pub fn unavailable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    /// The caller is gone.
    #[track_caller]
    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "context canceled")
    }

    /// A failure of a step or another thing of the user's that has no finer code.
    #[track_caller]
    pub fn unknown(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Unknown, message)
    }

    /// The fault of an I/O error while doing `what` (for example `"open /x"`).
    #[track_caller]
    pub fn io(what: impl fmt::Display, error: std::io::Error) -> Self {
        use std::io::ErrorKind::*;
        let code = match error.kind() {
            NotFound => Code::NotFound,
            PermissionDenied => Code::PermissionDenied,
            AlreadyExists => Code::AlreadyExists,
            StorageFull | QuotaExceeded => Code::ResourceExhausted,
            TimedOut => Code::DeadlineExceeded,
            _ => Code::Unknown,
        };
        let full = matches!(error.kind(), StorageFull | QuotaExceeded);
        let fault = Self::new(code, format!("{what}: {}", words_of(&error)))
            .with_class(Class::Environment)
            .with_source(error);
        if full {
            fault.hint("the disk is full: free some space, for example with `shipway prune`, and build again")
        } else {
            fault
        }
    }

    fn edit(mut self, f: impl FnOnce(&mut Data)) -> Self {
        f(Arc::make_mut(&mut self.0));
        self
    }

    /// Says what was being done; the newest context prints first.
    #[must_use]
    #[track_caller]
    pub fn context(self, what: impl Into<Cow<'static, str>>) -> Self {
        let place = Location::caller();
        self.edit(|d| d.context.push((what.into(), place)))
    }

    /// Adds advice for the person who reads the error.
    #[must_use]
    pub fn hint(self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.edit(|d| d.hints.push(advice.into()))
    }

    /// Attaches a typed fact.
    #[must_use]
    pub fn detail(self, detail: Detail) -> Self {
        self.edit(|d| d.details.push(detail))
    }

    /// Replaces every typed fact by what `with` makes of it.
    #[must_use]
    pub fn map_details(self, with: impl Fn(&Detail) -> Detail) -> Self {
        self.edit(|d| d.details.iter_mut().for_each(|detail| *detail = with(detail)))
    }

    /// Replaces the class that the code implied.
    #[must_use]
    pub fn with_class(self, class: Class) -> Self {
        self.edit(|d| d.class = class)
    }

    /// Replaces the code, keeping the class.
    #[must_use]
    pub fn with_code(self, code: Code) -> Self {
        self.edit(|d| d.code = code)
    }

    /// Keeps the error that caused this one.
    #[must_use]
    pub fn with_source(self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.edit(|d| d.source = Some(Arc::new(source)))
    }

    /// Who has to act.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// Kind of failure.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// The innermost message, without contexts.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Advice, in the order it was added.
    pub fn hints(&self) -> impl Iterator<Item = &str> {
        self.0.hints.iter().map(|h| &**h)
    }

    /// Typed facts, in the order they were added.
    pub fn details(&self) -> &[Detail] {
        &self.0.details
    }

    /// The places in our source that it came through, innermost first: where it was made, then
    /// where each context was added.
    pub fn trace(&self) -> impl Iterator<Item = &'static Location<'static>> {
        std::iter::once(self.0.origin).chain(self.0.context.iter().map(|(_, place)| *place))
    }

    /// Whether it was cancelled, rather than failed.
    pub fn is_cancelled(&self) -> bool {
        self.0.class == Class::Cancelled
    }

    /// Whether the code is `NotFound`.
    pub fn is_not_found(&self) -> bool {
        self.0.code == Code::NotFound
    }

    /// Whether it is about something that this program does not do.
    pub fn is_unimplemented(&self) -> bool {
        self.code() == Code::Unimplemented
    }

    /// Whether the code is `AlreadyExists`.
    pub fn is_already_exists(&self) -> bool {
        self.0.code == Code::AlreadyExists
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (context, _) in self.0.context.iter().rev() {
            write!(f, "{context}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} ({:?}/{:?})", self.0.class, self.0.code)?;
        for hint in &self.0.hints {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| &**s as _)
    }
}

/// Adds context to the error of a result.
pub trait Context<T> {
    /// See [`Fault::context`]; the closure runs only for errors.
    #[track_caller]
    fn context<C: Into<Cow<'static, str>>>(self, what: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Fault>> Context<T> for std::result::Result<T, E> {
    #[track_caller]
    fn context<C: Into<Cow<'static, str>>>(self, what: impl FnOnce() -> C) -> Result<T> {
        match self {
            Ok(value) => Ok(value),
            Err(e) => Err(e.into().context(what())),
        }
    }
}

/// The candidate nearest to `word` by edit distance, if it is near enough to be a likely typing
/// error.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(1);
    by_distance(word, candidates).filter(|(d, _)| *d <= limit).map(|(_, c)| c)
}

/// The candidate nearest to `word` by edit distance, however far.
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    by_distance(word, candidates).map(|(_, c)| c)
}

/// Longest word, in bytes, that is compared with others: what is longer is not a typing error, and
/// comparing takes the product of the lengths.
const MAX_WORD: usize = 128;
/// Most candidates that one word is compared with.
const MAX_CANDIDATES: usize = 1000;

fn by_distance<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<(usize, &'a str)> {
    if word.len() > MAX_WORD {
        return None;
    }
    let word = word.to_lowercase();
    let candidates = candidates.into_iter().take(MAX_CANDIDATES).filter(|c| c.len() <= MAX_WORD);
    candidates.map(|c| (distance(&word, &c.to_lowercase()), c)).min_by_key(|(d, _)| *d)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_print_outermost_first() {
        let f = Fault::not_found("no such file").context("open /a").context("step 3");
        assert_eq!(f.to_string(), "step 3: open /a: no such file");
        assert_eq!((f.class(), f.code()), (Class::User, Code::NotFound));
    }

    #[test]
    fn io_errors_have_the_words_that_users_know() {
        let check = |error: std::io::Error, want: &str| {
            assert_eq!(Fault::io("open /x", error).to_string(), want)
        };
        check(std::io::Error::from_raw_os_error(2), "open /x: no such file or directory");
        check(std::io::Error::from_raw_os_error(5), "open /x: input/output error");
        check(std::io::Error::other("Strange (os error 2)"), "open /x: Strange (os error 2)");
    }

    #[test]
    fn a_full_disk_is_named_with_advice() {
        let f = Fault::io("write /x", std::io::Error::from(std::io::ErrorKind::StorageFull));
        assert_eq!(f.code(), Code::ResourceExhausted);
        assert_eq!(f.class(), Class::Environment);
        assert!(f.hints().any(|h| h.contains("full")));
    }

    #[test]
    fn nearest_finds_a_typing_error_and_nothing_far() {
        assert_eq!(nearest("FORM", ["FROM", "RUN"]), None);
        assert_eq!(nearest("COPPY", ["COPY", "RUN"]), Some("COPY"));
        assert_eq!(nearest("xyz", ["COPY", "RUN"]), None);
    }

    #[test]
    fn words_that_are_too_long_or_too_many_are_not_compared() {
        // Compared, these would take years.
        let (word, name) = ("b".repeat(1 << 20), "a".repeat(10 << 20));
        assert_eq!(nearest(&word, [name.as_str(), "b"]), None);
        assert_eq!(closest(&name, [word.as_str()]), None);
        assert_eq!(nearest("short", [name.as_str(), "shorts"]), Some("shorts"));
        let limit = "x".repeat(MAX_WORD);
        assert_eq!(nearest(&limit, [limit.as_str()]), Some(limit.as_str()));
        let many = std::iter::repeat_n("other", MAX_CANDIDATES)
            .chain(std::iter::from_fn(|| panic!("one too many")));
        assert_eq!(nearest("short", many), None);
    }
}
