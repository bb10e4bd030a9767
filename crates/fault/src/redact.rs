//! Addresses without the names and passwords in them: what is shown, logged or kept goes
//! through here.

const MASK: &str = "xxxxx";

/// The address `url` without user and password.
pub fn redact(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    if holds_another(&rest[..end], &rest[end..]) {
        return format!("{scheme}://{}", redact(rest));
    }
    match masked(&rest[..end]).filter(|_| is_scheme(scheme)) {
        Some(authority) => format!("{scheme}://{authority}{}", &rest[end..]),
        None => url.to_owned(),
    }
}

/// The same for all addresses in a text.
pub fn redact_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let end = after.find(|c: char| {
            matches!(c, '/' | '?' | '#' | '"' | '<' | '>') || c.is_whitespace() || c.is_control()
        });
        let (authority, beyond) = after.split_at(end.unwrap_or(after.len()));
        if holds_another(authority, beyond) {
            rest = after;
            continue;
        }
        out.push_str(masked(authority).as_deref().unwrap_or(authority));
        rest = beyond;
    }
    out + rest
}

/// Whether what looks like an authority is the scheme of an address within the address, as in
/// `git://https://host/repo`.
fn holds_another(authority: &str, beyond: &str) -> bool {
    authority.ends_with(':') && beyond.starts_with("//")
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// `user:password@host` without the first two; `None` if they are not there.
fn masked(authority: &str) -> Option<String> {
    let (user, host) = authority.rsplit_once('@').filter(|(user, _)| !user.is_empty())?;
    let masked = match user.split_once(':') {
        Some(("", _)) => format!(":{MASK}"),
        Some(_) => format!("{MASK}:{MASK}"),
        None => MASK.to_owned(),
    };
    Some(format!("{masked}@{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_masked() {
        for (url, want) in [
            (
                "https://user:pass@example.invalid/repo.git",
                "https://xxxxx:xxxxx@example.invalid/repo.git",
            ),
            (
                "https://token@example.invalid/r.git#main",
                "https://xxxxx@example.invalid/r.git#main",
            ),
            ("https://:p@h/", "https://:xxxxx@h/"),
            ("https://p@ss@h", "https://xxxxx@h"),
            ("https://example.invalid/a@b", "https://example.invalid/a@b"),
            ("git@github.com:a/b", "git@github.com:a/b"),
            ("git://https://token@h/a", "git://https://xxxxx@h/a"),
            ("foo", "foo"),
        ] {
            assert_eq!(redact(url), want);
            assert_eq!(redact_text(url), want);
        }
    }

    #[test]
    fn all_addresses_of_a_text_are_masked() {
        for (text, want) in [
            (
                "fatal: unable to access 'https://t@h/a/': a@b",
                "fatal: unable to access 'https://xxxxx@h/a/': a@b",
            ),
            ("ADD https://a:b@h/x http://c@i /y", "ADD https://xxxxx:xxxxx@h/x http://xxxxx@i /y"),
            ("git://https://t@h/a", "git://https://xxxxx@h/a"),
            ("a://b://c@d", "a://b://xxxxx@d"),
            ("x:// y@z", "x:// y@z"),
        ] {
            assert_eq!(redact_text(text), want);
        }
    }
}
