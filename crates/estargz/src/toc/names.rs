//! Names of entries: cleaned as data, compared in the order of a tree.

use crate::error::Problem;
use std::cmp::Ordering;

/// Most bytes of a path (Linux' `PATH_MAX` without the zero at its end). Also of a symbolic link's
/// target.
pub const MAX_PATH: usize = 4095;
/// Most bytes of one part of a path (`NAME_MAX`).
pub const MAX_NAME: usize = 255;
/// Most parts of a path.
pub const MAX_DEPTH: usize = 256;

/// Appends to `out` the path that `name` means below a root: absolute names and `..` stay below it,
/// as they do where layers are unpacked (containerd's and stargz-snapshotter's readers clean names
/// alike).
pub fn clean(name: &[u8], out: &mut Vec<u8>) -> Result<(), Problem> {
    if name.contains(&0) {
        return Err(Problem::BadName);
    }
    // A name that is longer is not cleaned for ever.
    if name.len() > 2 * MAX_PATH {
        return Err(Problem::NameTooLong);
    }
    let start = out.len();
    let mut depth = 0;
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                let parent = out[start..].iter().rposition(|b| *b == b'/').unwrap_or(0);
                out.truncate(start + parent);
                depth -= usize::from(depth > 0);
            }
            _ if part.len() > MAX_NAME || depth == MAX_DEPTH => return Err(Problem::NameTooLong),
            _ => {
                if out.len() > start {
                    out.push(b'/');
                }
                out.extend_from_slice(part);
                depth += 1;
            }
        }
    }
    if out.len() - start > MAX_PATH { Err(Problem::NameTooLong) } else { Ok(()) }
}

/// Compares clean paths so that a directory comes before what is in it, and that before everything
/// else.
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    let common = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    match (a.get(common), b.get(common)) {
        (Some(b'/'), Some(_)) => Ordering::Less,
        (Some(_), Some(b'/')) => Ordering::Greater,
        (x, y) => x.cmp(&y),
    }
}

/// The path of the directory that `path` is in; `None` for the root.
pub fn parent(path: &[u8]) -> Option<&[u8]> {
    let at = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
    (!path.is_empty()).then_some(&path[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(name: &str) -> String {
        let mut out = b"before".to_vec();
        clean(name.as_bytes(), &mut out).unwrap();
        String::from_utf8(out).unwrap().strip_prefix("before").unwrap().to_owned()
    }

    #[test]
    fn names_stay_below_the_root() {
        for (name, want) in [
            ("a/b", "a/b"),
            ("./a//b/", "a/b"),
            ("/a", "a"),
            ("../../a", "a"),
            ("a/../../b", "b"),
            ("a/b/../c", "a/c"),
            ("a/b/../../c", "c"),
            ("..", ""),
            ("./", ""),
            ("", ""),
            ("...", "..."),
        ] {
            assert_eq!(cleaned(name), want, "{name}");
        }
    }

    #[test]
    fn names_have_limits() {
        let clean = |name: String| clean(name.as_bytes(), &mut Vec::new());
        let long = "n".repeat(MAX_NAME);
        assert_eq!(clean(long.clone()), Ok(()));
        assert_eq!(clean(long.clone() + "n"), Err(Problem::NameTooLong));
        assert_eq!(clean("d/".repeat(MAX_DEPTH)), Ok(()));
        assert_eq!(clean("d/".repeat(MAX_DEPTH) + "d"), Err(Problem::NameTooLong));
        let path = format!("{long}/").repeat(16);
        assert_eq!(clean(path[..MAX_PATH].to_owned()), Ok(()));
        assert_eq!(clean(path[..MAX_PATH - 1].to_owned() + "/nn"), Err(Problem::NameTooLong));
        assert_eq!(clean("./".repeat(MAX_PATH)), Ok(()));
        assert_eq!(clean("./".repeat(MAX_PATH) + "a"), Err(Problem::NameTooLong));
        assert_eq!(clean("a\0".to_owned()), Err(Problem::BadName));
    }

    #[test]
    fn trees_are_in_order() {
        let want = ["", "a", "a/b", "a/b/c", "a/z", "a-b", "a.", "ab", "b"];
        let mut sorted = want;
        sorted.reverse();
        sorted.sort_by(|a, b| compare(a.as_bytes(), b.as_bytes()));
        assert_eq!(sorted, want);
        assert_eq!(
            (parent(b"a/b"), parent(b"a"), parent(b"")),
            (Some(&b"a"[..]), Some(&b""[..]), None)
        );
    }
}
