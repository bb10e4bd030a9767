//! The form, order and ancestry that every received path must have (row `cb.fsutil.data`).

use shipway_fault::{Fault, Result};
use shipway_gocompat::{FileKind, FileMode};

use crate::{Stat, path::split};

const MAX_PATH: usize = 4095;
const MAX_NAME: usize = 255;
const MAX_DEPTH: usize = 1024;

/// Follows a tree's paths in order.
#[derive(Debug, Default)]
pub(crate) struct Order {
    /// The directories that the last path was in, outermost first, each with the name of its last
    /// entry.
    open: Vec<(String, String)>,
    root_last: String,
}

impl Order {
    /// Checks the next entry.
    pub(crate) fn check(&mut self, stat: &Stat) -> Result<()> {
        let path = &*stat.path;
        if let Some(why) = flaw(path) {
            return Err(refuse(path, why));
        }
        if stat.size < 0 {
            return Err(refuse(path, "negative size"));
        }
        let kind = FileMode(stat.mode).kind();
        if kind == FileKind::Other {
            return Err(refuse(path, "unknown file type"));
        }
        if kind == FileKind::Symlink
            && (stat.linkname.is_empty()
                || stat.linkname.len() > MAX_PATH
                || stat.linkname.contains('\0'))
        {
            return Err(refuse(path, "impossible link target"));
        }
        let (dir, name) = split(path);
        while self.open.last().is_some_and(|(open, _)| open != dir && !below(dir, open)) {
            self.open.pop();
        }
        let last = match self.open.last_mut() {
            Some((open, last)) if open == dir => last,
            None if dir.is_empty() => &mut self.root_last,
            _ => return Err(refuse(path, "its directory was not sent before it")),
        };
        if &**last >= name {
            return Err(refuse(path, &format!("changes out of order: it came after {last:?}")));
        }
        name.clone_into(last);
        if kind == FileKind::Directory {
            self.open.push((path.to_owned(), String::new()));
        }
        Ok(())
    }
}

fn below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

fn flaw(path: &str) -> Option<&'static str> {
    if path.len() > MAX_PATH {
        return Some("path too long");
    }
    if path.starts_with('/') {
        return Some("absolute path");
    }
    for part in path.split('/') {
        match part {
            "" | "." => return Some("unclean path"),
            ".." => return Some("path leaves the tree"),
            _ if part.len() > MAX_NAME => return Some("name too long"),
            _ if part.contains('\0') => return Some("name with a zero byte"),
            _ => {}
        }
    }
    (path.matches('/').count() > MAX_DEPTH).then_some("tree too deep")
}

fn refuse(path: &str, why: &str) -> Fault {
    let shown: String = path.chars().take(200).collect();
    Fault::invalid(format!("refuse {shown:?} from the sender: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ordered_clean_paths_pass() {
        let dir = |p: &str| Stat {
            path: p.into(),
            mode: FileMode::directory(0o755).0,
            ..Default::default()
        };
        let file = |p: &str| Stat { path: p.into(), mode: 0o644, ..Default::default() };
        for (stats, good) in [
            (vec![dir("a"), file("a/b"), dir("a/c"), file("a/c/d"), file("a.x"), file("b")], true),
            (vec![dir("a"), dir("a/b"), dir("a/b/c"), file("ab")], true),
            (vec![file("a"), file("a")], false),
            (vec![file("b"), file("a")], false),
            (vec![file("a/b")], false),
            (vec![file("a"), file("a/b")], false),
            (vec![dir("a"), file("b"), file("a/c")], false),
            (vec![file("../a")], false),
            (vec![file("..")], false),
            (vec![file("/a")], false),
            (vec![file("")], false),
            (vec![file(".")], false),
            (vec![dir("a"), file("a//b")], false),
            (vec![dir("a"), file("a/../b")], false),
            (vec![file("a\0")], false),
            (vec![file(&"x".repeat(300))], false),
            (vec![Stat { size: -1, ..file("a") }], false),
        ] {
            let mut order = Order::default();
            let result: Result<Vec<()>> = stats.iter().map(|s| order.check(s)).collect();
            assert_eq!(
                result.is_ok(),
                good,
                "{:?}",
                stats.iter().map(|s| &s.path).collect::<Vec<_>>()
            );
        }
    }
}
