//! Package `path`: slash-separated paths, taken apart and put together as texts. No file system is
//! asked, so a symbolic link is a name like any other.

/// The shortest path equal to `path`, as `path.Clean`: no empty or `.` elements, and `..` only at
/// the beginning of a relative path. `.` for an empty path.
pub fn clean(path: &str) -> String {
    let root = usize::from(path.starts_with('/'));
    let mut out = String::with_capacity(path.len().max(1));
    out.push_str(&path[..root]);
    // What leads out of where a relative path begins, which `..` does not take back.
    let mut fixed = root;
    for name in path.split('/') {
        match name {
            "" | "." => continue,
            ".." if out.len() > fixed => {
                let last = out.rfind('/').unwrap_or(0);
                out.truncate(last.max(fixed));
                continue;
            }
            ".." if root > 0 => continue,
            _ => {}
        }
        if out.len() > root {
            out.push('/');
        }
        out.push_str(name);
        if name == ".." {
            fixed = out.len();
        }
    }
    if out.is_empty() {
        out.push('.');
    }
    out
}

/// `path` as seen from the root: clean, absolute, and never above the root, whatever it says.
/// In Go: `path.Clean("/" + p)`.
pub fn rooted(path: &str) -> String {
    let mut out = String::with_capacity(path.len() + 1);
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => out.truncate(out.rfind('/').unwrap_or(0)),
            name => {
                out.push('/');
                out.push_str(name);
            }
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    out
}

/// [`rooted`], as a path from that root without a leading slash: where `path` leads inside a
/// directory that it cannot leave. Empty for the directory itself.
pub fn inside(path: &str) -> String {
    let mut rooted = rooted(path);
    rooted.remove(0);
    rooted
}

/// `a` and `b` with a slash between, made clean, as `path.Join`: an empty one does not count, and
/// of two empty ones comes an empty path.
pub fn join(a: &str, b: &str) -> String {
    match (a, b) {
        ("", "") => String::new(),
        ("", only) | (only, "") => clean(only),
        _ => clean(&[a, "/", b].concat()),
    }
}

/// The last element of `path`, as `path.Base`: slashes at the end do not count. `.` for an empty
/// path, `/` for one of slashes only.
pub fn base(path: &str) -> &str {
    match path.trim_end_matches('/').rsplit('/').next() {
        Some("") | None if path.is_empty() => ".",
        Some("") | None => "/",
        Some(name) => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that remain of `path`, on a stack.
    fn model(path: &str) -> String {
        let root = path.starts_with('/');
        let mut names: Vec<&str> = Vec::new();
        for name in path.split('/').filter(|name| !["", "."].contains(name)) {
            match names.last() {
                Some(&last) if name == ".." && last != ".." => drop(names.pop()),
                None if name == ".." && root => {}
                _ => names.push(name),
            }
        }
        match (root, names.join("/")) {
            (false, names) if names.is_empty() => ".".to_owned(),
            (root, names) => format!("{}{names}", if root { "/" } else { "" }),
        }
    }

    #[test]
    fn all_short_paths_become_clean() {
        let mut paths = vec![String::new()];
        for _ in 0..6 {
            let longer =
                |path: &String| ["", ".", "..", "a", "é"].map(|name| format!("{path}/{name}"));
            paths = paths.iter().flat_map(longer).collect();
        }
        for path in paths.iter().flat_map(|path| [path.as_str(), &path[1..]]) {
            let cleaned = clean(path);
            assert_eq!(cleaned, model(path), "{path:?}");
            assert_eq!(clean(&cleaned), cleaned, "{path:?}");
            let rooted = rooted(path);
            assert_eq!(rooted, clean(&format!("/{path}")), "{path:?}");
            assert_eq!(inside(path), rooted[1..], "{path:?}");
        }
    }
}
