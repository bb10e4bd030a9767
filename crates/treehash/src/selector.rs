//! What part of a tree is meant.

use std::{fmt, sync::Arc};

/// What a [`PathFilter`] says of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathVerdict {
    /// It belongs to the selection.
    Take,
    /// It does not, but something below it may: its directory entry is not hashed unless a child
    /// is.
    Descend,
    /// Neither it nor anything below it does.
    Skip,
}

/// Include and exclude patterns, decided by the caller.
pub trait PathFilter: Send + Sync {
    /// Decides about `path`, relative to the selected directory, without a leading slash. Called in
    /// walk order, parents first.
    fn decide(&self, path: &str, is_dir: bool) -> PathVerdict;
}

/// What part of a tree a checksum is about (rows `so.hash*`).
#[derive(Clone, Default)]
pub struct Selector {
    /// Path within the tree; empty or `/` for all of it.
    pub path: String,
    /// Whether a link at the end of `path` is followed.
    pub follow_links: bool,
    /// Whether `path` may hold `*`, `?` and `[…]`, matching several files.
    pub wildcard: bool,
    /// Includes and excludes below `path`.
    pub filter: Option<Arc<dyn PathFilter>>,
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selector")
            .field("path", &self.path)
            .field("follow_links", &self.follow_links)
            .field("wildcard", &self.wildcard)
            .field("filter", &self.filter.is_some())
            .finish()
    }
}

impl Selector {
    /// The tree at `path`, links followed.
    pub fn path(path: impl Into<String>) -> Self {
        Self { path: path.into(), follow_links: true, ..Self::default() }
    }
}
