//! The key of file actions and what they read of their inputs (row `file.key`).

use super::{
    path::RootPath,
    place::{self, Root},
};
use crate::key::KeyWriter;
use shipway_fault::{Code, Fault, Result};
use shipway_filesync::{DirMatch, PathFilter as Patterns, Verdict as Judgement};
use shipway_gocompat::{has_wildcards, path::rooted, quote};
use shipway_llb::{Chown, FileAction, FileActionKind, FileCopy, FileOp, Owner, Vertex};
use shipway_oci::Digest;
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, PathFilter, Selector, Verdict};
use shipway_solver::{CacheMap, InputMap};
use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStrExt,
    sync::{Arc, Mutex, PoisonError},
};

/// What is read of an input.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ContentSelector {
    path: String,
    follow_links: bool,
    wildcard: bool,
    include: Vec<String>,
    exclude: Vec<String>,
    required: Vec<String>,
}

impl ContentSelector {
    /// The tree at `path`, links followed.
    pub(crate) fn path(path: impl Into<String>) -> Self {
        Self { path: path.into(), follow_links: true, ..Default::default() }
    }

    fn is_plain(&self) -> bool {
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
    fn decide(&self, path: &str, is_dir: bool) -> Verdict {
        let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
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
            Judgement::Keep => Verdict::Take,
            Judgement::Pass if is_dir => Verdict::Descend,
            Judgement::Pass | Judgement::Prune => Verdict::Skip,
        }
    }
}

/// The name of what is at `path` in its root; empty for the root itself.
fn base(path: &str) -> String {
    rooted(path).rsplit('/').next().unwrap_or_default().to_owned()
}

fn write_owner(key: &mut KeyWriter, owner: Option<&Chown>) {
    let Some(owner) = owner else { return };
    for (what, one) in [("user", &owner.user), ("group", &owner.group)] {
        match one {
            Some(Owner::Id(id)) => key.value(what, id),
            Some(Owner::Name { name, input }) => key.text(what, name).value("in", input),
            None => key,
        };
    }
}

fn write_copy(key: &mut KeyWriter, copy: &FileCopy, from_input: bool) {
    // What the copied files are called matters only by their last name: the rest is in the content.
    let src = if from_input { base(&copy.src) } else { copy.src.clone() };
    key.text("copy", &src)
        .text("dest", &copy.dest)
        .value("mode", copy.mode)
        .text("modestr", &copy.mode_str)
        .value("time", copy.timestamp)
        .flag("follow", copy.follow_symlink)
        .flag("contents", copy.dir_copy_contents)
        .flag("unpack", copy.attempt_unpack)
        .flag("create", copy.create_dest_path)
        .flag("wildcard", copy.allow_wildcard)
        .flag("emptywildcard", copy.allow_empty_wildcard)
        .flag("replace", copy.always_replace_existing_dest_paths)
        .list("include", &copy.include_patterns)
        .list("exclude", &copy.exclude_patterns)
        .list("required", &copy.required_paths);
}

fn write_action(key: &mut KeyWriter, action: &FileAction, inputs: usize) {
    match &action.kind {
        FileActionKind::Copy(a) => write_copy(key, a, action.secondary.is_some_and(|s| s < inputs)),
        FileActionKind::Mkfile(a) => {
            key.text("mkfile", &a.path)
                .value("mode", a.mode)
                .value("data", Digest::of(&a.data))
                .value("time", a.timestamp);
        }
        FileActionKind::Mkdir(a) => {
            key.text("mkdir", &a.path)
                .value("mode", a.mode)
                .flag("parents", a.make_parents)
                .value("time", a.timestamp);
        }
        FileActionKind::Rm(a) => {
            key.text("rm", &a.path)
                .flag("maybe", a.allow_not_found)
                .flag("wildcard", a.allow_wildcard);
        }
        FileActionKind::Symlink(a) => {
            key.text("symlink", &a.newpath).text("to", &a.oldpath).value("time", a.timestamp);
        }
    }
    write_owner(key, super::owner_of(&action.kind));
    key.value("indexes", (action.input, action.secondary, action.output));
}

/// What each input is read for; inputs that an action changes are not among them.
fn reads(op: &FileOp, inputs: usize) -> BTreeMap<usize, Vec<ContentSelector>> {
    let mut all: BTreeMap<usize, Vec<ContentSelector>> = BTreeMap::new();
    for action in &op.actions {
        if let FileActionKind::Copy(copy) = &action.kind
            && let Some(input) = action.secondary.filter(|s| *s < inputs)
        {
            all.entry(input).or_default().push(ContentSelector {
                path: copy.src.clone(),
                follow_links: copy.follow_symlink,
                wildcard: copy.allow_wildcard && has_wildcards(&copy.src),
                include: copy.include_patterns.clone(),
                exclude: copy.exclude_patterns.clone(),
                required: copy.required_paths.clone(),
            });
        }
        for (input, file) in
            super::lookups(&action.kind).into_iter().zip(["/etc/passwd", "/etc/group"])
        {
            if let Some(input) = input.filter(|i| *i < inputs) {
                all.entry(input).or_default().push(ContentSelector::path(file));
            }
        }
    }
    for action in &op.actions {
        if let Some(input) = action.input {
            all.remove(&input);
        }
    }
    all
}

/// What the result depends on.
pub(crate) fn cache_map(op: &FileOp, vertex: &Vertex) -> Result<CacheMap> {
    let count = vertex.inputs.len();
    let mut key = KeyWriter::new("shipway.file.v1");
    op.actions.iter().for_each(|a| write_action(&mut key, a, count));
    let mut inputs = vec![InputMap::default(); count];
    for (input, selectors) in reads(op, count) {
        let mut paths: Vec<&str> = selectors.iter().map(|s| s.path.as_str()).collect();
        paths.sort_unstable();
        inputs[input] =
            InputMap { selector: Some(Digest::of(paths.join("\0").as_bytes())), content: true };
    }
    Ok(CacheMap { keys: vec![key.digest()], inputs, ephemeral: false })
}

/// What is read of input number `input`, without what is part of something else that is read.
pub(crate) fn selectors(op: &FileOp, input: usize) -> Result<Option<Vec<ContentSelector>>> {
    let Some(mut all) = reads(op, usize::MAX).remove(&input) else { return Ok(None) };
    all.sort();
    all.dedup();
    let plain: Vec<(String, bool)> =
        all.iter().filter(|s| s.is_plain()).map(|s| (rooted(&s.path), s.follow_links)).collect();
    let is_below = |path: &str, above: &str| {
        path != above
            && (above == "/" || path.strip_prefix(above).is_some_and(|r| r.starts_with('/')))
    };
    all.retain(|s| {
        !s.is_plain()
            || !plain.iter().any(|(above, follow)| {
                *follow == s.follow_links && is_below(&rooted(&s.path), above)
            })
    });
    Ok(Some(all))
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

/// Fails if a required path is not there or not selected (row `file.copy.patterns`). They are
/// written from the root; links below the selected directory lead nowhere, because no walk enters
/// them.
async fn require(state: &ImmutableRef, selector: &ContentSelector) -> Result<()> {
    if selector.required.is_empty() {
        return Ok(());
    }
    let (mount, selector) = (state.mount().await?, selector.clone());
    let looked =
        tokio::task::spawn_blocking(move || missing(&Root::open(mount.path())?, &selector)).await;
    match looked
        .map_err(|e| Fault::internal(format!("a look for required paths failed: {e}")))??
    {
        Some(path) => Err(Fault::not_found(format!("{}: not found", quote(path.as_str())))),
        None => Ok(()),
    }
}

/// The first of the required paths that is not selected in `root`.
fn missing(root: &Root, selector: &ContentSelector) -> Result<Option<String>> {
    let top = RootPath::from(&*selector.path);
    let real = root.real_entry(&top, selector.follow_links)?;
    let patterns = Patterns::new(&selector.include, &selector.exclude)?;
    for required in &selector.required {
        let path = RootPath::from(&**required);
        let found = path.below(&top).is_some_and(|below| {
            let (mut at, mut is_dir) = (real.clone(), true);
            let is_there = RootPath::new(below.as_bytes()).names().all(|name| {
                at = at.join(name);
                let stat = root.lstat(&at).ok().filter(|_| is_dir);
                is_dir = stat.as_ref().is_some_and(place::is_dir);
                stat.is_some()
            });
            let below = below.to_string_lossy();
            let leads_on = || {
                is_dir && patterns.visit(&below, true, &DirMatch::default()).0 != Judgement::Prune
            };
            is_there && (below.is_empty() || patterns.keeps(&below) || leads_on())
        });
        if !found {
            return Ok(Some(required.clone()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(src: &str, secondary: usize) -> FileAction {
        let kind = FileActionKind::Copy(FileCopy {
            src: src.into(),
            dest: "/".into(),
            ..Default::default()
        });
        FileAction { input: Some(0), secondary: Some(secondary), output: Some(0), kind }
    }

    #[test]
    fn what_is_part_of_something_read_is_not_read_again() {
        let op =
            FileOp { actions: vec![copy("/a/b", 1), copy("/a", 1), copy("/ab", 1), copy("/c", 2)] };
        let paths = |input| {
            selectors(&op, input)
                .expect("selectors")
                .map(|s| s.into_iter().map(|s| s.path).collect::<Vec<_>>())
        };
        assert_eq!(paths(1), Some(vec!["/a".into(), "/ab".into()]));
        assert_eq!(paths(2), Some(vec!["/c".into()]));
        assert_eq!(paths(0), None);
    }

    #[test]
    fn the_place_of_copied_files_is_not_in_the_key_but_their_name_is() {
        let key = |src: &str| {
            let mut key = KeyWriter::new("k");
            write_action(&mut key, &copy(src, 1), 2);
            key.digest()
        };
        assert_eq!(key("/x/f"), key("/y/f"));
        assert_ne!(key("/x/f"), key("/x/g"));
    }

    #[test]
    fn required_paths_are_written_from_the_root() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir_all(dir.path().join("a/b/c")).expect("mkdir");
        std::fs::write(dir.path().join("a/b/c/f"), "").expect("write");
        std::os::unix::fs::symlink("b", dir.path().join("a/link")).expect("symlink");
        let root = Root::open(dir.path()).expect("open");
        let check = |path: &str, include: &str, exclude: &[&str], required: &str, found: bool| {
            let selector = ContentSelector {
                include: vec![include.into()],
                exclude: exclude.iter().map(|e| (*e).to_owned()).collect(),
                required: vec![required.into()],
                ..ContentSelector::path(path)
            };
            let expected = if found { None } else { Some(required.to_owned()) };
            assert_eq!(missing(&root, &selector).expect("look"), expected, "{path} {required}");
        };
        check("/a/b", "c/f", &[], "/a/b/c/f", true);
        check("/", "a/b/c/f", &[], "/a/b/c/f", true);
        check("/a", "b", &[], "/a/b", true);
        check("/a/link", "c/f", &[], "/a/link/c/f", true);
        check("/a", "b/*/f", &[], "/a/b", true);
        check("/a", "none", &[], "/a/none", false);
        check("/a", "link/c/f", &[], "/a/link/c/f", false);
        check("/a", "b/c/f/g", &[], "/a/b/c/f/g", false);
        check("/a", "b/c", &["**/c"], "/a/b/c", false);
        check("/none", "x", &[], "/none/x", false);
    }

    #[test]
    fn a_walk_remembers_its_way() {
        let walk = Walk::new(&["a/**/x".into()], &["a/skip".into()]).expect("patterns");
        assert_eq!(walk.decide("a", true), Verdict::Descend);
        assert_eq!(walk.decide("a/b", true), Verdict::Descend);
        assert_eq!(walk.decide("a/b/x", false), Verdict::Take);
        assert_eq!(walk.decide("a/skip", true), Verdict::Skip);
        assert_eq!(walk.decide("c", false), Verdict::Skip);
    }
}
