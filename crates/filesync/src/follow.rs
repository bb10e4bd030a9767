//! Which paths a client must send so that given paths can be followed through symbolic links (row
//! `cb.filesync.md`, `followpaths`).

use std::{
    collections::{BTreeSet, VecDeque},
    fs, io,
    path::Path,
};

use shipway_fault::{Fault, Result};
use shipway_gocompat::{
    Glob, has_wildcards,
    path::{inside, rooted},
};

use crate::{path::join, path::split};

/// More links than this are not followed; a tree with so many is an attack or a mistake.
const MAX_LINKS: usize = 100_000;

/// Resolves `paths` inside `root`: every symbolic link on the way and what it leads to. The answer
/// is sorted and without paths below others; `None` means everything. Blocks.
pub fn follow_paths<S: AsRef<str>>(root: &Path, paths: &[S]) -> Result<Option<Vec<String>>> {
    let mut todo: VecDeque<String> = paths.iter().map(|p| relative(p.as_ref())).collect();
    let mut resolved = BTreeSet::new();
    while let Some(path) = todo.pop_front() {
        if resolved.len() > MAX_LINKS {
            return Err(Fault::invalid(format!(
                "followpaths leads through more than {MAX_LINKS} links"
            )));
        }
        follow(root, &path, &mut resolved, &mut todo)?;
    }
    Ok(without_nested(resolved.into_iter().collect()))
}

/// Drops paths below others from a list; `None` if the root itself is in it.
pub(crate) fn without_nested(paths: Vec<String>) -> Option<Vec<String>> {
    let mut out: Vec<String> = Vec::with_capacity(paths.len());
    for path in paths {
        if path == "." {
            return None;
        }
        let nested = out.last().is_some_and(|last| {
            path.strip_prefix(last.as_str()).is_some_and(|rest| rest.starts_with('/'))
        });
        if !nested {
            out.push(path);
        }
    }
    Some(out)
}

fn follow(
    root: &Path,
    path: &str,
    resolved: &mut BTreeSet<String>,
    todo: &mut VecDeque<String>,
) -> Result<()> {
    let mut current = String::new();
    let mut rest = path;
    loop {
        let (first, after) = rest.split_once('/').unwrap_or((rest, ""));
        current = if current.is_empty() || current == "." {
            first.to_owned()
        } else {
            join(&current, first)
        };
        rest = after;
        let targets = targets(root, &current, true)?;
        if targets.is_empty() && !rest.is_empty() {
            continue;
        }
        let news = resolved.insert(current.clone());
        if news {
            todo.extend(targets.iter().map(|t| relative(&join(t, rest))));
        }
        return Ok(());
    }
}

/// Where the link `path` leads, or the links that match its last name; nothing if there is none.
fn targets(root: &Path, path: &str, wildcards: bool) -> Result<Vec<String>> {
    let failed = |e| Fault::io(format!("follow {}", root.join(path).display()), e);
    let (dir, name) = split(path);
    if wildcards && has_wildcards(name) {
        let Ok(glob) = Glob::new(name) else { return Ok(Vec::new()) };
        let entries = match fs::read_dir(root.join(dir)) {
            Err(e) if absent(&e) => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut out = Vec::new();
        for entry in entries {
            if let Some(name) =
                entry.map_err(failed)?.file_name().to_str().filter(|n| glob.matches(n))
            {
                out.extend(targets(root, &join(dir, name), false)?);
            }
        }
        return Ok(out);
    }
    let meta = match fs::symlink_metadata(root.join(path)) {
        Err(e) if absent(&e) => return Ok(Vec::new()),
        meta => meta.map_err(failed)?,
    };
    if !meta.is_symlink() {
        return Ok(Vec::new());
    }
    let link = fs::read_link(root.join(path)).map_err(failed)?;
    let Some(link) = link.to_str() else { return Ok(Vec::new()) };
    Ok(vec![if link.starts_with('/') { rooted(link) } else { rooted(&format!("{dir}/{link}")) }])
}

fn relative(path: &str) -> String {
    match inside(path) {
        path if path.is_empty() => ".".to_owned(),
        path => path,
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_inside_the_root() {
        let dir = tempfile::tempdir().expect("dir");
        let root = dir.path();
        fs::create_dir_all(root.join("a/b")).expect("dirs");
        fs::write(root.join("a/b/f"), "").expect("file");
        symlink("a/b", root.join("l")).expect("link");
        symlink("/l/f", root.join("m")).expect("link");
        symlink("../../../../a", root.join("a/b/up")).expect("link");
        symlink("loop2", root.join("loop1")).expect("link");
        symlink("loop1", root.join("loop2")).expect("link");
        for (paths, expected) in [
            (&["a/b/f"][..], Some(vec!["a/b/f"])),
            (&["l/f"], Some(vec!["a/b/f", "l"])),
            (&["m"], Some(vec!["a/b/f", "l", "m"])),
            (&["a/b/up/b/f"], Some(vec!["a/b/f", "a/b/up"])),
            (&["loop1"], Some(vec!["loop1", "loop2"])),
            (&["missing/x"], Some(vec!["missing/x"])),
            (&["/"], None),
            (&["a", "a/b"], Some(vec!["a"])),
            (&["[lm]"], Some(vec!["[lm]", "a/b", "l"])),
        ] {
            let got = follow_paths(root, paths).expect("follows");
            assert_eq!(
                got,
                expected.map(|e| e.into_iter().map(str::to_owned).collect()),
                "{paths:?}"
            );
        }
    }
}
