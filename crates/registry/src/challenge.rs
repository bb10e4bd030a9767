//! `WWW-Authenticate` (RFC 9110, section 11.6.1), read defensively.

/// What a server wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Bearer { realm: String, service: String, scope: String, error: String },
    Basic,
}

/// Longest header that is looked at.
const MAX_HEADER: usize = 8 << 10;
const MAX_PARAMETERS: usize = 32;

/// The challenges in `headers`, best first: tokens before passwords. Unknown schemes and nonsense
/// are passed over.
pub(crate) fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = headers
        .into_iter()
        .take(8)
        .flat_map(|h| parse_one(h.get(..MAX_HEADER.min(h.len())).unwrap_or("")))
        .collect();
    found.sort_by_key(|c| matches!(c, Challenge::Basic));
    found
}

fn is_token(c: char) -> bool {
    c.is_ascii_graphic() && !"\"(),/:;<=>?@[]\\{}".contains(c)
}

fn token(s: &str) -> (&str, &str) {
    let end = s.find(|c| !is_token(c)).unwrap_or(s.len());
    s.split_at(end)
}

/// The value after `=`, and the rest; `None` when a quote is never closed.
fn value(s: &str) -> Option<(String, &str)> {
    let Some(quoted) = s.strip_prefix('"') else {
        // Unquoted realms with slashes and colons occur; take all up to a separator.
        let end = s.find([',', ' ', '\t', '"']).unwrap_or(s.len());
        return Some((s[..end].to_owned(), &s[end..]));
    };
    let mut out = String::new();
    let mut chars = quoted.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return Some((out, &quoted[i + 1..])),
            '\\' => out.extend(chars.next().map(|(_, c)| c)),
            c => out.push(c),
        }
    }
    None
}

/// One header may carry several challenges, separated by the same comma as parameters are: a word
/// that no `=` follows starts the next one.
fn parse_one(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut current: Option<(String, Vec<(String, String)>)> = None;
    let mut rest = header;
    let mut budget = MAX_PARAMETERS;
    loop {
        rest = rest.trim_start_matches([',', ' ', '\t']);
        let (word, after) = token(rest);
        if word.is_empty() || budget == 0 {
            break;
        }
        budget -= 1;
        if let Some(after) = after.trim_start().strip_prefix('=') {
            let Some((v, after)) = value(after.trim_start()) else { break };
            if let Some((_, parameters)) = &mut current {
                parameters.push((word.to_ascii_lowercase(), v));
            }
            rest = after;
        } else {
            found.extend(current.take().and_then(finish));
            current = Some((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
        }
    }
    found.extend(current.take().and_then(finish));
    found
}

fn finish((scheme, mut parameters): (String, Vec<(String, String)>)) -> Option<Challenge> {
    let mut take = |name: &str| {
        parameters
            .iter_mut()
            .find(|(n, _)| n == name)
            .map(|(_, v)| std::mem::take(v))
            .unwrap_or_default()
    };
    match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            let realm = take("realm");
            (!realm.is_empty()).then(|| Challenge::Bearer {
                realm,
                service: take("service"),
                scope: take("scope"),
                error: take("error"),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: &str, scope: &str, error: &str) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.into(),
            scope: scope.into(),
            error: error.into(),
        }
    }

    #[test]
    fn challenges_are_read_and_ordered() {
        for (header, want) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull",error="insufficient_scope""#,
                vec![bearer(
                    "https://auth.docker.io/token",
                    "registry.docker.io",
                    "repository:library/x:pull",
                    "insufficient_scope",
                )],
            ),
            (
                r#"Basic realm="r", Bearer realm="https://a/t", service=s"#,
                vec![bearer("https://a/t", "s", "", ""), Challenge::Basic],
            ),
            ("bearer realm=https://a/t,scope=x", vec![bearer("https://a/t", "", "x", "")]),
            (r#"Bearer realm="a\"b""#, vec![bearer("a\"b", "", "", "")]),
            ("Negotiate", vec![]),
            (r#"Bearer service="s""#, vec![]),
            (r#"Bearer realm="never closed"#, vec![]),
            ("", vec![]),
            (",,, = , \u{e9}", vec![]),
        ] {
            assert_eq!(parse([header]), want, "{header}");
        }
    }

    #[test]
    fn long_headers_are_bounded() {
        let header = format!("Bearer realm=\"https://a/t\",{}", "a=b,".repeat(100_000));
        assert!(parse([header.as_str()]).len() <= 1);
    }
}
