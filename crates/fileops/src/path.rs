//! Paths in a root. File systems take any bytes for names, and so do these: text is only what a
//! graph says and what people are shown.

use std::{
    ffi::OsStr,
    fmt::{self, Display, Formatter},
    os::unix::ffi::OsStrExt,
};

/// An absolute path without `.`, `..` and doubled slashes.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RootPath(Vec<u8>);

impl RootPath {
    /// `path` as seen from the root, made clean: `gocompat`'s `path::rooted`, for any bytes.
    pub(crate) fn new(path: impl AsRef<[u8]>) -> Self {
        let mut clean = Vec::with_capacity(path.as_ref().len() + 1);
        for part in path.as_ref().split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => clean.truncate(clean.iter().rposition(|b| *b == b'/').unwrap_or(0)),
                part => {
                    clean.push(b'/');
                    clean.extend_from_slice(part);
                }
            }
        }
        Self(clean)
    }

    pub(crate) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory it is in; the root is in itself.
    pub(crate) fn parent(&self) -> Self {
        Self(self.0[..self.0.iter().rposition(|b| *b == b'/').unwrap_or(0)].to_vec())
    }

    /// The last name; `.` for the root.
    pub(crate) fn name(&self) -> &OsStr {
        OsStr::from_bytes(match self.0.iter().rposition(|b| *b == b'/') {
            Some(slash) => &self.0[slash + 1..],
            None => b".",
        })
    }

    /// The names on the way, outermost first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &OsStr> {
        self.0.split(|b| *b == b'/').filter(|p| !p.is_empty()).map(OsStr::from_bytes)
    }

    /// What is called `below` in this directory: a name, or names with slashes between.
    pub(crate) fn join(&self, below: impl AsRef<OsStr>) -> Self {
        match below.as_ref().as_bytes() {
            b"" | b"." => self.clone(),
            below => Self([&self.0, &b"/"[..], below].concat()),
        }
    }

    /// The path less that of the directory `above`; empty for `above` itself. `None` if it is not
    /// below it.
    pub(crate) fn below<'a>(&'a self, above: &Self) -> Option<&'a OsStr> {
        let rest = self.0.strip_prefix(&above.0[..])?;
        match rest.split_first() {
            None => Some(OsStr::new("")),
            Some((b'/', rest)) => Some(OsStr::from_bytes(rest)),
            Some(_) => None,
        }
    }
}

impl AsRef<[u8]> for RootPath {
    fn as_ref(&self) -> &[u8] {
        if self.0.is_empty() { b"/" } else { &self.0 }
    }
}

impl From<&str> for RootPath {
    fn from(path: &str) -> Self {
        Self::new(path)
    }
}

impl Display for RootPath {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expected: [&str; 3]) {
        let path = RootPath::new(path);
        let name = path.name().to_string_lossy().into_owned();
        assert_eq!([path.to_string(), path.parent().to_string(), name], expected);
    }

    #[test]
    fn paths_are_clean_and_know_their_parts() {
        check("a//b/./c/", ["/a/b/c", "/a/b", "c"]);
        check("/a/../../b", ["/b", "/", "b"]);
        for root in ["", "/", ".", "/..", "a/.."] {
            check(root, ["/", "/", "."]);
        }
    }

    #[test]
    fn what_is_below_is_told_by_whole_names() {
        let at = |above: &str, path: &str| {
            RootPath::new(path).below(&above.into()).map(|p| p.to_string_lossy().into_owned())
        };
        assert_eq!(at("/a", "/a/b/c").as_deref(), Some("b/c"));
        assert_eq!(at("/", "/a").as_deref(), Some("a"));
        assert_eq!(at("/a", "/a").as_deref(), Some(""));
        assert_eq!(at("/a", "/ab"), None);
    }
}
