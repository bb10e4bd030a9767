//! containerd's filters on snapshots: `field==value`, `field!=value`, `field~=regular expression`,
//! or a field alone, which has to be there. Commas are AND, several filters are OR. Fields are
//! `name`, `parent`, `kind` and `labels.<key>`, where a key with dots or slashes is in quotes or in
//! parts; another field is never there. (The language of the builder's `prune` and `du` looks alike
//! and is BuildKit's: it refuses fields that do not exist.)

use crate::model::{Name, Row, SNAPSHOT_REF};
use regex::{Regex, RegexBuilder};
use shipway_fault::{Fault, Result};

/// Most bytes of one filter.
const MAX_FILTER: usize = 64 << 10;
/// Most filters of one request.
const MAX_FILTERS: usize = 256;
/// Most bytes that a compiled regular expression may take.
const MAX_REGEX: usize = 1 << 20;

/// The filters of one request.
#[derive(Clone, Debug, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Clone, Debug)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Clone, Debug, PartialEq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
    Unknown,
}

#[derive(Clone, Debug)]
enum Test {
    Present,
    Equal(String),
    Different(String),
    Like(Regex),
}

impl Filters {
    /// Parses the filters of a request; an empty one matches everything.
    pub fn parse(texts: &[String]) -> Result<Self> {
        if texts.len() > MAX_FILTERS {
            return Err(Fault::invalid(format!(
                "there are {} filters; at most {MAX_FILTERS} are understood",
                texts.len()
            )));
        }
        texts.iter().map(|text| Parser::new(text)?.selectors()).collect::<Result<_>>().map(Self)
    }

    /// Whether a snapshot passes.
    pub(crate) fn matches(&self, name: &Name, row: &Row) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|s| s.matches(name, row)))
    }

    /// The chain IDs one of which a snapshot's label must have, if every filter asks for one.
    pub(crate) fn chains(&self) -> Option<Vec<&str>> {
        let chains: Option<Vec<&str>> =
            self.0.iter().map(|all| all.iter().find_map(Selector::chain)).collect();
        chains.filter(|chains| !chains.is_empty())
    }
}

impl Selector {
    fn matches(&self, name: &Name, row: &Row) -> bool {
        let value = match &self.field {
            Field::Name => Some(name.as_str()),
            Field::Parent => Some(row.parent.as_ref().map_or("", Name::as_str)),
            Field::Kind => Some(row.kind.as_str()),
            Field::Label(key) => row.labels.get(key).map(String::as_str),
            Field::Unknown => None,
        };
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(want) => value == Some(want),
            // What is not there is empty to these two.
            Test::Different(want) => value.unwrap_or_default() != want,
            Test::Like(want) => want.is_match(value.unwrap_or_default()),
        }
    }

    fn chain(&self) -> Option<&str> {
        match (&self.field, &self.test) {
            (Field::Label(key), Test::Equal(chain)) if key == SNAPSHOT_REF => Some(chain),
            _ => None,
        }
    }
}

struct Parser<'a> {
    whole: &'a str,
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn new(whole: &'a str) -> Result<Self> {
        match whole.len() {
            0..=MAX_FILTER => Ok(Self { whole, rest: whole }),
            n => Err(Fault::invalid(format!(
                "a filter has {n} bytes; at most {MAX_FILTER} are understood"
            ))),
        }
    }

    fn bad(&self, why: &str) -> Fault {
        let at = self.whole.len() - self.rest.len();
        Fault::invalid(format!("filter {:?}: {why} at byte {at}", self.whole))
            .hint("want for example `kind==active,labels.\"a.b/c\"==x`")
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn selectors(mut self) -> Result<Vec<Selector>> {
        let mut all = Vec::new();
        if self.whole.is_empty() {
            return Ok(all);
        }
        loop {
            all.push(self.selector()?);
            self.space();
            match self.rest.strip_prefix(',') {
                Some(rest) => self.rest = rest,
                None if self.rest.is_empty() => return Ok(all),
                None => return Err(self.bad("unexpected input")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.word()?];
        while let Some(rest) = self.rest.strip_prefix('.') {
            self.rest = rest;
            path.push(self.word()?);
        }
        let field = match path[0].as_str() {
            "name" => Field::Name,
            "parent" => Field::Parent,
            "kind" => Field::Kind,
            "labels" => Field::Label(path[1..].join(".")),
            _ => Field::Unknown,
        };
        self.space();
        let length = self.rest.find(|c| !"=!~".contains(c)).unwrap_or(self.rest.len());
        let (operator, rest) = self.rest.split_at(length);
        let test =
            match operator {
                "" if self.rest.is_empty() || self.rest.starts_with(',') => Test::Present,
                "==" | "!=" | "~=" => {
                    self.rest = rest;
                    let value = self.value(operator == "~=")?;
                    match operator {
                        "==" => Test::Equal(value),
                        "!=" => Test::Different(value),
                        _ => {
                            let regex = RegexBuilder::new(&value).size_limit(MAX_REGEX).build();
                            Test::Like(regex.map_err(|e| {
                                self.bad(&format!("not a regular expression ({e})"))
                            })?)
                        }
                    }
                }
                "" => return Err(self.bad("expected an operator (`==`, `!=`, `~=`)")),
                other => return Err(self.bad(&format!("unsupported operator {other:?}"))),
            };
        Ok(Selector { field, test })
    }

    /// A part of a field's path.
    fn word(&mut self) -> Result<String> {
        self.space();
        if self.rest.starts_with('"') {
            return self.quoted('"');
        }
        let length = self
            .rest
            .find(|c: char| !(c == '_' || c.is_ascii_alphanumeric()))
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(length);
        if word.is_empty() {
            return Err(self.bad("expected a field"));
        }
        self.rest = rest;
        Ok(word.to_owned())
    }

    /// What is compared with; regular expressions may be in `/` or `|` as well.
    fn value(&mut self, regex: bool) -> Result<String> {
        self.space();
        match self.rest.chars().next() {
            Some(quote @ '"') => return self.quoted(quote),
            Some(quote @ ('/' | '|')) if regex => return self.quoted(quote),
            Some('/' | '|') => return Err(self.bad("this quote is for regular expressions only")),
            _ => {}
        }
        let length = self
            .rest
            .find(|c: char| c == ',' || c.is_whitespace() || c.is_control())
            .unwrap_or(self.rest.len());
        let (value, rest) = self.rest.split_at(length);
        if value.is_empty() {
            return Err(self.bad("expected a value"));
        }
        self.rest = rest;
        Ok(value.to_owned())
    }

    /// A text in quotes, with Go's escapes. In other quotes than `"` a backslash stays but before
    /// the quote itself, for the regular expression.
    fn quoted(&mut self, quote: char) -> Result<String> {
        let body = &self.rest[quote.len_utf8()..];
        let mut out = String::new();
        let mut chars = body.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &body[at + quote.len_utf8()..];
                    return Ok(out);
                }
                '\n' => break,
                '\\' if quote == '"' => {
                    let Some((at, c)) = chars.next() else { break };
                    let digits = match c {
                        'x' => Some((at + 1, 2, 16)),
                        'u' => Some((at + 1, 4, 16)),
                        'U' => Some((at + 1, 8, 16)),
                        '0'..='7' => Some((at, 3, 8)),
                        _ => None,
                    };
                    match (c, digits) {
                        (_, Some((from, count, radix))) => {
                            let number = body
                                .get(from..from + count)
                                .and_then(|d| u32::from_str_radix(d, radix).ok());
                            let decoded = number
                                .and_then(char::from_u32)
                                .ok_or_else(|| self.bad("illegal numeric escape"))?;
                            out.push(decoded);
                            let until = from + count;
                            while chars.clone().next().is_some_and(|(at, _)| at < until) {
                                chars.next();
                            }
                        }
                        ('a', _) => out.push('\x07'),
                        ('b', _) => out.push('\x08'),
                        ('f', _) => out.push('\x0c'),
                        ('n', _) => out.push('\n'),
                        ('r', _) => out.push('\r'),
                        ('t', _) => out.push('\t'),
                        ('v', _) => out.push('\x0b'),
                        ('\\' | '"', _) => out.push(c),
                        _ => return Err(self.bad("illegal escape")),
                    }
                }
                '\\' => match chars.next() {
                    Some((_, c)) if c == quote => out.push(c),
                    Some((_, c)) => out.extend(['\\', c]),
                    None => break,
                },
                c => out.push(c),
            }
        }
        Err(self.bad("a quote is not closed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Backing, DirectoryId, Kind, Time};

    fn snapshot() -> (Name, Row) {
        let labels = [(SNAPSHOT_REF, "sha256:ab"), ("l", "2"), ("a.b/c", "x,y"), ("tab", "\t\"")];
        let row = Row {
            backing: Backing::Directory(DirectoryId(1)),
            kind: Kind::Active,
            parent: None,
            labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            created: Time::now(),
            updated: Time::now(),
            usage: None,
        };
        (Name::new("default/1/x").unwrap(), row)
    }

    fn matches(filters: &[&str]) -> bool {
        let (name, row) = snapshot();
        Filters::parse(&filters.iter().map(|f| f.to_string()).collect::<Vec<_>>())
            .unwrap()
            .matches(&name, &row)
    }

    #[test]
    fn filters_match_as_containerd_has_them() {
        for (filter, want) in [
            ("", true),
            ("kind==active", true),
            ("kind == active , labels.l", true),
            ("kind==view", false),
            ("name==default/1/x", true),
            ("name", true),
            ("parent==\"\"", true),
            ("parent", true),
            ("parent!=\"\"", false),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\"", true),
            ("labels.containerd.\"io/snapshot\".ref==sha256:ab", true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:cd,parent==\"\"", false),
            ("labels.nothing", false),
            ("labels.nothing!=x", true),
            ("labels.nothing==\"\"", false),
            ("labels.l~=^[0-9]$", true),
            ("labels.\"a.b/c\"==\"x,y\"", true),
            ("labels.\"a.b/c\"~=/^x,/", true),
            ("labels.\"a.b/c\"~=|x\\|y|", true),
            ("labels.\"a.b/c\"==\"\\x78\\u002c\\171\"", true),
            ("labels.tab==\"\\t\\\"\"", true),
            ("size==1", false),
            ("size", false),
        ] {
            assert_eq!(matches(&[filter]), want, "{filter}");
        }
        assert!(matches(&[]));
        assert!(matches(&["kind==view", "name~=x$"]));
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for filter in [
            "==x",
            "kind=active",
            "kind===active",
            "kind==",
            "kind==a b",
            "kind~=(",
            "labels.",
            ".x",
            "a,",
            "name==\"x",
            "name==\"\\q\"",
            "name==/x/",
            "name==\"\\ud800\"",
            "name==\"\\x7\"",
            "name \u{1}",
            "name~=(a{1000}){1000}",
        ] {
            let error = Filters::parse(&[filter.to_owned()]).unwrap_err();
            assert_eq!(error.code(), shipway_fault::Code::InvalidArgument, "{filter}");
        }
        assert!(Filters::parse(&["x".repeat(MAX_FILTER + 1)]).is_err());
        assert!(Filters::parse(&vec![String::new(); MAX_FILTERS + 1]).is_err());
        // Cut at every byte, nothing panics.
        let long = "labels.\"containerd.io/snapshot.ref\"==\"\\u00e4\\171ä\",kind~=|\\||";
        for (at, _) in long.char_indices() {
            let _ = Filters::parse(&[long[..at].to_owned()]);
        }
    }

    #[test]
    fn a_wanted_chain_is_found_only_if_every_filter_names_one() {
        let chains = |filters: &[&str]| {
            let filters =
                Filters::parse(&filters.iter().map(|f| f.to_string()).collect::<Vec<_>>()).unwrap();
            filters.chains().map(|c| c.into_iter().map(str::to_owned).collect::<Vec<_>>())
        };
        let one = "labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==x";
        assert_eq!(chains(&[one]).unwrap(), ["sha256:ab"]);
        assert_eq!(chains(&[one, "kind==active"]), None);
        assert_eq!(chains(&[]), None);
        assert_eq!(chains(&["labels.\"containerd.io/snapshot.ref\"~=x"]), None);
    }
}
