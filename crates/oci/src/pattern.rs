//! Patterns of names, as our configurations have them.

/// Whether `name` is what `pattern` says; `*` stands for anything, slashes included, unlike in Go's
/// `path.Match`: these are patterns of ours.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_patterns() {
        for (pattern, name, want) in [
            ("a/b:1", "a/b:1", true),
            ("a/b:1", "a/b:2", false),
            ("*", "anything", true),
            ("registry.local/*", "registry.local/a/b:1", true),
            ("registry.local/*", "registry.local.evil/a", false),
            ("*/app:*", "h/team/app:1", true),
            ("*/app:*-dev", "h/team/app:1", false),
            ("a*a", "a", false),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }
}
