//! Slash paths as Go's `path` package treats them: lexical, with no look at any filesystem.

/// The shortest equal path; `.` for an empty one.
pub fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(&last) if last != ".." => {
                    parts.pop();
                }
                _ if rooted => {}
                _ => parts.push(".."),
            },
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".into(),
        (false, false) => joined,
    }
}

/// `clean(a/b)`, where empty parts do not count; empty when both are.
pub fn join(a: &str, b: &str) -> String {
    match (a.is_empty(), b.is_empty()) {
        (true, true) => String::new(),
        (true, false) => clean(b),
        (false, true) => clean(a),
        (false, false) => clean(&format!("{a}/{b}")),
    }
}

/// An absolute form of `path` under `parent`; `keep_slash` keeps a trailing `/` or `/.`, which say something to a copy.
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
    fn paths_clean_as_go_does() {
        for (path, want) in [("", "."), ("/", "/"), ("a//b/./c/..", "a/b"), ("/../a", "/a"), ("../a", "../a"), ("a/..", "."), ("/a/", "/a")]
        {
            assert_eq!(clean(path), want, "{path}");
        }
        for (parent, path, want) in
            [("/w", "a/", "/w/a/"), ("/w", ".", "/w"), ("/w", "./.", "/w/."), ("/", "/", "/"), ("/w", "/a/.", "/a/."), ("", "a", "/a")]
        {
            assert_eq!(normalize(parent, path, true), want, "{path}");
        }
    }
}
