//! Paths of layers as bytes.

use crate::{BuildError, limits};
use std::borrow::Cow;

/// `path` without a `..`, each taken back with the name before it as text alone (and dropped at the
/// root).
pub fn clean(path: &[u8]) -> Result<Cow<'_, [u8]>, BuildError> {
    check(path)?;
    if !components(path).any(|c| c == b"..") {
        return Ok(path.into());
    }
    let mut kept: Vec<&[u8]> = Vec::new();
    for component in components(path) {
        if component == b".." {
            kept.pop();
        } else {
            kept.push(component);
        }
    }
    Ok(kept.join(&b'/').into())
}

/// Whether Linux would take it for a path.
pub fn check(path: &[u8]) -> Result<(), BuildError> {
    if path.len() > limits::PATH_BYTES || path.contains(&0) {
        Err(BuildError::Path)
    } else {
        Ok(())
    }
}

/// What is between the slashes, without nothing and `.`.
pub fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|b| *b == b'/').filter(|c| !matches!(*c, b"" | b"."))
}

/// The path of the parent, and the last component; `None` at the root.
pub fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut rest = path;
    loop {
        let at = rest.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        let (parent, name) = rest.split_at(at);
        if !matches!(name, b"" | b".") {
            return Some((parent, name));
        }
        rest = parent.strip_suffix(b"/")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_of_parents_are_taken_back_as_text() {
        for (path, expected) in
            [("a/../b", "b"), ("../../x", "x"), ("a/b/../../..", ""), ("/a/./b/", "/a/./b/")]
        {
            assert_eq!(&*clean(path.as_bytes()).expect(path), expected.as_bytes(), "{path}");
        }
        assert_eq!(clean(b"a\0"), Err(BuildError::Path));
        assert!(clean(&[b'a'; limits::PATH_BYTES]).is_ok());
        assert_eq!(clean(&[b'a'; limits::PATH_BYTES + 1]), Err(BuildError::Path));
    }

    #[test]
    fn the_last_component_is_split_off() {
        let text =
            |path: &'static str| split(path.as_bytes()).map(|(p, n)| (p.to_vec(), n.to_vec()));
        for root in ["", "/", ".", "./", "//././/"] {
            assert_eq!(text(root), None, "{root}");
        }
        for path in ["a/b", "a/b/", "a/b/.", "a/b//./"] {
            assert_eq!(text(path), Some((b"a/".to_vec(), b"b".to_vec())), "{path}");
        }
        assert_eq!(text("b"), Some((Vec::new(), b"b".to_vec())));
        assert_eq!(text("/b"), Some((b"/".to_vec(), b"b".to_vec())));
    }
}
