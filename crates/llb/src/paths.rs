//! Paths that the operations of a graph name.

use shipway_gocompat::path::{clean, join};

/// An absolute form of `path` under `parent`; `keep_slash` keeps a trailing `/` or `/.`, which say
/// something to a copy.
pub fn normalize(parent: &str, path: &str, keep_slash: bool) -> String {
    let mut out = clean(path);
    if !out.starts_with('/') {
        out = join("/", &format!("{parent}/{out}"));
    }
    if keep_slash {
        if path.ends_with('/') && !out.ends_with('/') {
            out.push('/');
        } else if path.ends_with("/.") {
            if out != "/" {
                out.push('/');
            }
            out.push('.');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_trailing_slash_says_is_kept() {
        for (parent, path, want) in [
            ("/w", "a/", "/w/a/"),
            ("/w", ".", "/w"),
            ("/w", "./.", "/w/."),
            ("/", "/", "/"),
            ("/w", "/a/.", "/a/."),
            ("", "a", "/a"),
        ] {
            assert_eq!(normalize(parent, path, true), want, "{path}");
        }
    }
}
