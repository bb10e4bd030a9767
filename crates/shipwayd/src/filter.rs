//! containerd's filter language for listing: `field==value`, `field!=value`, `field~=part`, bare `field`; commas are AND, several filters are OR
//! (rows `so.pr.filter`, `so.pr.or`).

use shipway_fault::{Fault, Result};

/// One filter: all of its conditions must hold.
#[derive(Clone, Debug)]
pub struct Filter(Vec<Condition>);

#[derive(Clone, Debug)]
struct Condition {
    field: String,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Contains(String),
}

impl Filter {
    /// Parses one filter.
    pub fn parse(text: &str) -> Result<Self> {
        let mut conditions = Vec::new();
        for part in split(text) {
            let part = part.trim();
            if part.is_empty() {
                continue;
            }
            let found = ["==", "!=", "~="].iter().filter_map(|op| part.find(op).map(|i| (i, *op))).min();
            let (field, test) = match found {
                None => (part.to_owned(), Test::Present),
                Some((i, op)) => {
                    let value = unquote(part[i + 2..].trim());
                    let test = match op {
                        "==" => Test::Equal(value),
                        "!=" => Test::NotEqual(value),
                        _ => Test::Contains(value),
                    };
                    (part[..i].trim().to_owned(), test)
                }
            };
            if field.is_empty() || field.contains(char::is_whitespace) {
                return Err(Fault::invalid(format!("invalid filter {text:?}")).hint("want for example `type==regular` or `id~=abc,inuse`"));
            }
            conditions.push(Condition { field, test });
        }
        Ok(Self(conditions))
    }

    /// Whether all conditions hold; `lookup` gives a field's value, or `None` if it is not there.
    pub fn matches(&self, lookup: &dyn Fn(&str) -> Option<String>) -> bool {
        self.0.iter().all(|c| {
            let value = lookup(&c.field);
            match &c.test {
                Test::Present => value.is_some_and(|v| !v.is_empty() && v != "false"),
                Test::Equal(want) => value.as_ref() == Some(want),
                Test::NotEqual(want) => value.as_ref() != Some(want),
                Test::Contains(want) => value.is_some_and(|v| matches_pattern(want, &v)),
            }
        })
    }
}

/// `~=` is a regular expression in containerd; here a part, with `^` and `$` as anchors and `.*` between parts.
fn matches_pattern(pattern: &str, value: &str) -> bool {
    let (start, end) = (pattern.starts_with('^'), pattern.ends_with('$'));
    let parts: Vec<&str> = pattern.trim_start_matches('^').trim_end_matches('$').split(".*").collect();
    let mut at = 0;
    for (i, part) in parts.iter().enumerate() {
        let Some(found) = value[at..].find(part) else { return false };
        if i == 0 && start && found != 0 {
            return false;
        }
        at += found + part.len();
    }
    !end || parts.last().is_some_and(|p| value.ends_with(p))
}

/// Splits at commas outside quotes.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut quoted) = (Vec::new(), 0, false);
    for (i, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn unquote(text: &str) -> String {
    text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text).to_owned()
}

/// Parses several filters.
pub fn parse_all(texts: &[String]) -> Result<Vec<Filter>> {
    texts.iter().map(|t| Filter::parse(t)).collect()
}

/// Whether any filter matches; none at all matches everything.
pub fn any(filters: &[Filter], lookup: &dyn Fn(&str) -> Option<String>) -> bool {
    filters.is_empty() || filters.iter().any(|f| f.matches(lookup))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_as_containerd_has_them() {
        let lookup = |f: &str| match f {
            "type" => Some("regular".to_owned()),
            "inuse" => Some("false".to_owned()),
            "description" => Some("pulled from docker.io/x".to_owned()),
            _ => None,
        };
        for (text, want) in [
            ("type==regular", true),
            ("type!=regular", false),
            ("inuse", false),
            ("type==regular,inuse==false", true),
            ("description~=docker", true),
            ("description~=^docker", false),
            ("description~=^pulled.*x$", true),
            ("type==\"regular\"", true),
            ("mutable", false),
            ("", true),
        ] {
            assert_eq!(Filter::parse(text).unwrap().matches(&lookup), want, "{text}");
        }
        assert!(Filter::parse("==x").is_err());
    }
}
