//! The part of containerd's filter language that our own queries use: fields and labels with `==`,
//! `!=`, `~=` and presence, `,` for *and*, several filters for *or*.

use crate::Labels;
use shipway_fault::{Fault, Result};

pub(super) struct Filters(Vec<Vec<Selector>>);

struct Selector {
    path: Vec<String>,
    test: Test,
}

enum Test {
    Present,
    Equal(String),
    Different(String),
    /// `~=`: only prefixes (`^text`) and contained text, which is all we ask for.
    Like(String),
}

impl Filters {
    pub(super) fn parse(filters: &[String]) -> Result<Self> {
        filters.iter().filter(|f| !f.is_empty()).map(|f| parse(f)).collect::<Result<_>>().map(Self)
    }

    /// Whether an object with these fields and labels passes.
    pub(super) fn matches(&self, field: &dyn Fn(&str) -> Option<String>, labels: &Labels) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|s| s.matches(field, labels)))
    }
}

impl Selector {
    fn matches(&self, field: &dyn Fn(&str) -> Option<String>, labels: &Labels) -> bool {
        let value = match self.path.split_first() {
            Some((first, rest)) if first == "labels" => labels.get(&rest.join(".")).cloned(),
            _ => field(&self.path.join(".")),
        };
        match (&self.test, value) {
            (Test::Present, value) => value.is_some_and(|v| !v.is_empty()),
            (Test::Equal(want), Some(value)) => *want == value,
            (Test::Different(want), value) => value.as_ref() != Some(want),
            (Test::Like(pattern), Some(value)) => match pattern.strip_prefix('^') {
                Some(prefix) => value.starts_with(prefix),
                None => value.contains(pattern.as_str()),
            },
            (_, None) => false,
        }
    }
}

fn parse(filter: &str) -> Result<Vec<Selector>> {
    let bad = || Fault::invalid(format!("filter {filter:?} is not understood"));
    let mut rest = filter;
    let mut all = Vec::new();
    loop {
        let mut path = Vec::new();
        loop {
            path.push(word(&mut rest).ok_or_else(bad)?);
            match rest.strip_prefix('.') {
                Some(more) => rest = more,
                None => break,
            }
        }
        let test = if let Some(more) = rest.strip_prefix("==") {
            rest = more;
            Test::Equal(value(&mut rest).ok_or_else(bad)?)
        } else if let Some(more) = rest.strip_prefix("!=") {
            rest = more;
            Test::Different(value(&mut rest).ok_or_else(bad)?)
        } else if let Some(more) = rest.strip_prefix("~=") {
            rest = more;
            Test::Like(value(&mut rest).ok_or_else(bad)?)
        } else {
            Test::Present
        };
        all.push(Selector { path, test });
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None if rest.is_empty() => return Ok(all),
            None => return Err(bad()),
        }
    }
}

fn quoted(rest: &mut &str) -> Option<String> {
    let inner = rest.strip_prefix('"')?;
    let end = inner.find('"')?;
    *rest = &inner[end + 1..];
    Some(inner[..end].to_owned())
}

fn taken(rest: &mut &str, stop: impl Fn(char) -> bool) -> Option<String> {
    let end = rest.find(stop).unwrap_or(rest.len());
    let text = rest[..end].to_owned();
    *rest = &rest[end..];
    (!text.is_empty()).then_some(text)
}

fn word(rest: &mut &str) -> Option<String> {
    if rest.starts_with('"') {
        quoted(rest)
    } else {
        taken(rest, |c| !(c.is_alphanumeric() || c == '_'))
    }
}

fn value(rest: &mut &str) -> Option<String> {
    if rest.starts_with('"') { quoted(rest) } else { taken(rest, |c| c == ',') }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(filters: &[&str], expected: bool) {
        let filters: Vec<_> = filters.iter().map(|f| f.to_string()).collect();
        let labels = Labels::from([("a.b/c".into(), "1".into()), ("plain".into(), "x".into())]);
        let field = |f: &str| (f == "name").then(|| "docker.io/library/app:1".to_owned());
        assert_eq!(
            Filters::parse(&filters).unwrap().matches(&field, &labels),
            expected,
            "{filters:?}"
        );
    }

    #[test]
    fn filters_select_as_in_containerd() {
        check(&[], true);
        check(&["labels.\"a.b/c\"==1"], true);
        check(&["labels.\"a.b/c\"==2"], false);
        check(&["labels.\"a.b/c\""], true);
        check(&["labels.other"], false);
        check(&["labels.plain!=y"], true);
        check(&["labels.plain==x,labels.\"a.b/c\"==2"], false);
        check(&["labels.plain==z", "labels.\"a.b/c\"==1"], true);
        check(&["name==\"docker.io/library/app:1\""], true);
        check(&["name~=^docker.io/"], true);
        check(&["name~=\"^quay.io\""], false);
        assert!(Filters::parse(&["labels.x=>1".into()]).is_err());
    }
}
