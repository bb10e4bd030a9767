//! What an operation reads of its inputs, and the checksum of that.

use parking_lot::Mutex;
use shipway_fault::{Code, Fault, Result};
use shipway_fileops::first_missing;
use shipway_filesync::{DirMatch, PathFilter as Patterns, Verdict};
use shipway_gocompat::{path::rooted, quote};
use shipway_oci::Digest;
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, PathFilter, PathVerdict, Selector};
use std::sync::Arc;

/// What is read of an input.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ContentSelector {
    /// Where it is in the input.
    pub(crate) path: String,
    /// Whether a link at its end is followed.
    pub(crate) follow_links: bool,
    /// Whether `path` is a pattern.
    pub(crate) wildcard: bool,
    /// Patterns of what is read below it; all of it if there are none.
    pub(crate) include: Vec<String>,
    /// Patterns of what is not read.
    pub(crate) exclude: Vec<String>,
    /// Paths that have to be there and selected, from the root.
    pub(crate) required: Vec<String>,
}

impl ContentSelector {
    /// The tree at `path`, links followed.
    pub(crate) fn path(path: impl Into<String>) -> Self {
        Self { path: path.into(), follow_links: true, ..Default::default() }
    }

    /// Whether all that is at the path is read.
    pub(crate) fn is_plain(&self) -> bool {
        !self.wildcard && self.include.is_empty() && self.exclude.is_empty()
    }

    fn selector(&self) -> Result<Selector> {
        let filter = (!self.include.is_empty() || !self.exclude.is_empty())
            .then(|| {
                Walk::new(&self.include, &self.exclude).map(|w| Arc::new(w) as Arc<dyn PathFilter>)
            })
            .transpose()?;
        Ok(Selector {
            path: rooted(&self.path),
            follow_links: self.follow_links,
            wildcard: self.wildcard,
            filter,
        })
    }
}

/// Patterns on a walk: remembers what they said of the directories on the way.
struct Walk {
    patterns: Patterns,
    way: Mutex<Vec<(String, DirMatch)>>,
}

impl Walk {
    fn new(include: &[String], exclude: &[String]) -> Result<Self> {
        Ok(Self { patterns: Patterns::new(include, exclude)?, way: Mutex::default() })
    }
}

impl PathFilter for Walk {
    fn decide(&self, path: &str, is_dir: bool) -> PathVerdict {
        let mut way = self.way.lock();
        let parent = path.rsplit_once('/').map_or("", |(dir, _)| dir);
        while way.last().is_some_and(|(dir, _)| dir != parent) {
            way.pop();
        }
        let above = way.last().map(|(_, m)| m.clone()).unwrap_or_default();
        let (judgment, state) = self.patterns.visit(path, is_dir, &above);
        if is_dir {
            way.push((path.to_owned(), state));
        }
        match judgment {
            Verdict::Keep => PathVerdict::Take,
            Verdict::Pass if is_dir => PathVerdict::Descend,
            Verdict::Pass | Verdict::Prune => PathVerdict::Skip,
        }
    }
}

/// The checksum of parts of a state; a missing part is an error in BuildKit's words.
pub(crate) async fn checksum(
    state: &ImmutableRef,
    selectors: &[ContentSelector],
    reporter: &Reporter,
) -> Result<Digest> {
    let fail = |e: Fault| {
        // That the user's file is missing is a failure of the build; nothing that was asked for by
        // the client is `NotFound`.
        let e = if e.is_not_found() { e.with_code(Code::Unknown) } else { e };
        e.context(format!("failed to calculate checksum of ref {}", state.id()))
    };
    if state.is_scratch() {
        return nothing(selectors).map_err(fail);
    }
    state.materialize(Some(reporter)).await?;
    let mut digests = Vec::with_capacity(selectors.len());
    for selector in selectors {
        require(state, selector).await.map_err(fail)?;
        digests.push(state.checksum(&selector.selector()?).await.map_err(fail)?);
    }
    match &digests[..] {
        [one] => Ok(*one),
        all => Ok(Digest::of(
            all.iter().map(ToString::to_string).collect::<Vec<_>>().join("\0").as_bytes(),
        )),
    }
}

/// The checksum of parts of an empty state: there is only the whole.
fn nothing(selectors: &[ContentSelector]) -> Result<Digest> {
    match selectors.iter().map(|s| rooted(&s.path)).find(|p| p != "/") {
        Some(path) => Err(Fault::not_found(format!("{path}: no such file or directory"))),
        None => Ok(Digest::of(b"")),
    }
}

/// Fails if a required path is not there or not selected (row `file.copy.patterns`).
async fn require(state: &ImmutableRef, selector: &ContentSelector) -> Result<()> {
    if selector.required.is_empty() {
        return Ok(());
    }
    let (mount, selector) = (state.mount().await?, selector.clone());
    let look = move || {
        let ContentSelector { path, follow_links, include, exclude, required, .. } = &selector;
        let patterns = Patterns::new(include, exclude)?;
        first_missing(mount.path(), path, *follow_links, &patterns, required)
    };
    match shipway_task::blocking("look for required paths", look).await? {
        Some(path) => Err(Fault::not_found(format!("{}: not found", quote(path.as_str())))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_remembers_its_way() {
        let walk = Walk::new(&["a/**/x".into()], &["a/skip".into()]).expect("patterns");
        assert_eq!(walk.decide("a", true), PathVerdict::Descend);
        assert_eq!(walk.decide("a/b", true), PathVerdict::Descend);
        assert_eq!(walk.decide("a/b/x", false), PathVerdict::Take);
        assert_eq!(walk.decide("a/skip", true), PathVerdict::Skip);
        assert_eq!(walk.decide("c", false), PathVerdict::Skip);
    }
}
