//! Slash-separated paths in a tree: their order, and how they are taken apart. They are clean and
//! relative, and the root is the empty path, unlike in Go's package.

use std::cmp::Ordering;

/// The order in which a walk meets paths: by components, each compared by bytes, a directory before
/// what is in it.
pub fn compare(a: &str, b: &str) -> Ordering {
    let key = |c: u8| if c == b'/' { 0 } else { c };
    a.bytes().map(key).cmp(b.bytes().map(key))
}

/// The directory and the name of a clean relative path; the directory of a top entry is empty.
pub(crate) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// `name` in the directory `dir`.
pub(crate) fn join(dir: &str, name: &str) -> String {
    match dir {
        "" => name.to_owned(),
        _ => [dir, "/", name].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directorys_content_comes_before_its_longer_siblings() {
        let mut paths = ["a-b", "a/b", "a", "a.txt", "b", "a/b/c", "a0"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(paths, ["a", "a/b", "a/b/c", "a-b", "a.txt", "a0", "b"]);
    }
}
