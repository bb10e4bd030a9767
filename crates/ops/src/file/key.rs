//! The key of file actions and what they read of their inputs (row `file.key`).

use crate::{content::ContentSelector, key::KeyWriter};
use shipway_fileops::owner_of;
use shipway_gocompat::{has_wildcards, path::rooted};
use shipway_llb::{Chown, FileAction, FileActionKind, FileCopy, FileOp, Owner, Vertex};
use shipway_oci::Digest;
use shipway_solver::{CacheMap, InputMap};
use std::collections::BTreeMap;

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
    write_owner(key, owner_of(&action.kind));
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
pub(crate) fn cache_map(op: &FileOp, vertex: &Vertex) -> CacheMap {
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
    key.map(inputs)
}

/// What is read of input number `input`, without what is part of something else that is read.
pub(crate) fn selectors(op: &FileOp, input: usize) -> Option<Vec<ContentSelector>> {
    let mut all = reads(op, usize::MAX).remove(&input)?;
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
    Some(all)
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
            selectors(&op, input).map(|s| s.into_iter().map(|s| s.path).collect::<Vec<_>>())
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
}
