//! containerd's filter language for listing: `field==value`, `field!=value`,
//! `field~=regular expression`, bare `field`; commas are AND, several filters are OR (rows
//! `so.pr.filter`, `so.pr.or`). What is not understood is an error: a filter that matches nothing
//! by mistake looks like an answer.

use regex::{Regex, RegexBuilder};
use shipway_fault::{Fault, Result, nearest};

/// Most bytes that a compiled regular expression may take.
const MAX_REGEX: usize = 1 << 20;
/// Most bytes of one filter.
const MAX_FILTER: usize = 64 << 10;
/// Most filters of one request.
const MAX_FILTERS: usize = 256;

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
    Matches(Regex),
}

impl Filter {
    /// Parses one filter on `fields`; one that ends in a dot stands for all that begin with it.
    pub fn parse(text: &str, fields: &[&str]) -> Result<Self> {
        let parts = split(text)?;
        let conditions = parts
            .iter()
            .map(|p| p.trim())
            .filter(|p| !p.is_empty())
            .map(|part| Condition::parse(part, fields));
        conditions.collect::<Result<_>>().map(Self)
    }

    /// Whether all conditions hold; `lookup` gives a field's value, or `None` if it is not there.
    pub fn matches(&self, lookup: &dyn Fn(&str) -> Option<String>) -> bool {
        self.0.iter().all(|c| {
            let value = lookup(&c.field);
            match &c.test {
                Test::Present => value.is_some_and(|v| !v.is_empty() && v != "false"),
                Test::Equal(want) => value.as_ref() == Some(want),
                Test::NotEqual(want) => value.as_ref() != Some(want),
                Test::Matches(want) => value.is_some_and(|v| want.is_match(&v)),
            }
        })
    }
}

impl Condition {
    fn parse(part: &str, fields: &[&str]) -> Result<Self> {
        let bad = |why: String| {
            Fault::invalid(format!("invalid filter {part:?}: {why}"))
                .hint("want for example `type==regular` or `id~=^abc,inuse`")
        };
        let end = field_length(part).ok_or_else(|| bad("a quote is not closed".into()))?;
        let (field, rest) = (part[..end].replace('"', ""), part[end..].trim_start());
        let value =
            |rest: &str| unquote(rest.trim()).ok_or_else(|| bad("a quote is not closed".into()));
        let test = match (rest.get(..2), rest) {
            (_, "") => Test::Present,
            (Some("=="), _) => Test::Equal(value(&rest[2..])?),
            (Some("!="), _) => Test::NotEqual(value(&rest[2..])?),
            (Some("~="), _) => {
                let regex = RegexBuilder::new(&value(&rest[2..])?).size_limit(MAX_REGEX).build();
                Test::Matches(regex.map_err(|e| bad(format!("not a regular expression: {e}")))?)
            }
            _ => {
                return Err(bad(format!(
                    "unsupported operator {:?}; there are ==, != and ~=",
                    operator(rest)
                )));
            }
        };
        let known =
            |f: &&&str| if f.ends_with('.') { field.starts_with(**f) } else { field == **f };
        if !fields.iter().any(|f| known(&f)) {
            let fault = Fault::invalid(format!("invalid filter {part:?}: no field {field:?}"));
            return Err(match nearest(&field, fields.iter().copied()) {
                Some(near) => fault.hint(format!("did you mean `{near}`?")),
                None => fault.hint(format!("there are {}", fields.join(", "))),
            });
        }
        Ok(Self { field, test })
    }
}

/// The operator that `rest` begins with.
pub fn operator(rest: &str) -> &str {
    &rest[..rest.find(|c: char| !"=!~<>".contains(c)).unwrap_or(rest.len())]
}

/// Length of the field's name at the beginning of `part`: words with dots between them, in quotes
/// where they have other characters.
pub fn field_length(part: &str) -> Option<usize> {
    let mut quoted = false;
    for (i, c) in part.char_indices() {
        match c {
            '"' => quoted = !quoted,
            c if quoted || c.is_alphanumeric() || "_-./".contains(c) => {}
            _ => return Some(i),
        }
    }
    (!quoted).then_some(part.len())
}

/// Splits at commas outside quotes.
pub fn split(text: &str) -> Result<Vec<&str>> {
    if text.len() > MAX_FILTER {
        return Err(Fault::invalid(format!(
            "a filter has {} bytes; at most {MAX_FILTER} are understood",
            text.len()
        )));
    }
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// A value, without its quotes if it has some; in them a backslash makes the next character plain.
fn unquote(text: &str) -> Option<String> {
    let Some(inner) = text.strip_prefix('"') else { return Some(text.to_owned()) };
    let mut out = String::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => return chars.next().is_none().then_some(out),
            // Other escapes are a regular expression's own.
            '\\' => match chars.next()? {
                c @ ('"' | '\\') => out.push(c),
                c => out.extend(['\\', c]),
            },
            c => out.push(c),
        }
    }
    None
}

/// Parses several filters on `fields`.
pub fn parse_all(texts: &[String], fields: &[&str]) -> Result<Vec<Filter>> {
    check_count(texts)?;
    texts.iter().map(|t| Filter::parse(t, fields)).collect()
}

/// Refuses too many filters.
pub fn check_count(texts: &[String]) -> Result<()> {
    if texts.len() > MAX_FILTERS {
        return Err(Fault::invalid(format!(
            "there are {} filters; at most {MAX_FILTERS} are understood",
            texts.len()
        )));
    }
    Ok(())
}

/// Whether any filter matches; none at all matches everything.
pub fn any(filters: &[Filter], lookup: &dyn Fn(&str) -> Option<String>) -> bool {
    filters.is_empty() || filters.iter().any(|f| f.matches(lookup))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: &[&str] = &["type", "inuse", "description", "mutable", "labels."];

    #[test]
    fn filters_match_as_containerd_has_them() {
        let lookup = |f: &str| match f {
            "type" => Some("regular".to_owned()),
            "inuse" => Some("false".to_owned()),
            "description" => Some("pulled from docker.io/x".to_owned()),
            "labels.a.b/c" => Some("1".to_owned()),
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
            (r"description~=^pulled\sfrom", true),
            ("description~=\"d(o|a)cker.io,?/x\"", true),
            ("type~=^(ab)+$", false),
            ("type~=^(regular|internal)$", true),
            ("type==\"regular\"", true),
            ("labels.\"a.b/c\"==1", true),
            ("mutable", false),
            ("", true),
        ] {
            assert_eq!(Filter::parse(text, FIELDS).unwrap().matches(&lookup), want, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        let said = |text: &str| {
            Filter::parse(text, FIELDS)
                .map(drop)
                .map_err(|f| (f.to_string(), f.hints().collect::<Vec<_>>().join(" ")))
        };
        for (text, says) in [
            ("==x", "no field \"\""),
            ("type=regular", "unsupported operator \"=\""),
            ("inuse>=1", "unsupported operator \">=\""),
            ("nothing==1", "no field \"nothing\""),
            ("type~=(", "not a regular expression"),
            ("type~=(a{1000}){1000}", "not a regular expression"),
            ("type==\"x", "quote is not closed"),
        ] {
            let (fault, _) = said(text).unwrap_err();
            assert!(fault.contains(says), "{text}: {fault}");
        }
        assert!(said("typ==x").unwrap_err().1.contains("did you mean `type`?"));
        assert!(Filter::parse(&"x".repeat(MAX_FILTER + 1), FIELDS).is_err());
        assert!(parse_all(&vec![String::new(); MAX_FILTERS + 1], FIELDS).is_err());
    }
}
