//! YAML of Compose files: scalars as YAML 1.2 has them with the octals of 1.1, merge keys, and the
//! tags `!reset` and `!override`.

use std::collections::{BTreeMap, HashMap};

use saphyr_parser::{Event, Parser, ScalarStyle};

/// Collections in collections, at most.
const MAX_DEPTH: usize = 64;
/// Values of a file, with those that aliases stand for.
const MAX_VALUES: usize = 200_000;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Yaml {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Yaml>),
    Map(BTreeMap<String, Yaml>),
}

impl Yaml {
    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_map(&self) -> Option<&BTreeMap<String, Yaml>> {
        match self {
            Self::Map(map) => Some(map),
            _ => None,
        }
    }

    /// What messages call its type.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "boolean",
            Self::Int(_) | Self::Float(_) => "number",
            Self::Text(_) => "string",
            Self::List(_) => "array",
            Self::Map(_) => "mapping",
        }
    }

    /// A scalar as Go prints it; `None` for others and null.
    pub(crate) fn printed(&self) -> Option<String> {
        match self {
            Self::Bool(b) => Some(b.to_string()),
            Self::Int(n) => Some(n.to_string()),
            Self::Text(text) => Some(text.clone()),
            Self::Float(n) if n.is_infinite() => {
                Some(if *n > 0.0 { "+Inf" } else { "-Inf" }.to_owned())
            }
            Self::Float(n) if n.is_nan() => Some("NaN".into()),
            Self::Float(n) if *n == 0.0 || (1e-4..1e21).contains(&n.abs()) => Some(n.to_string()),
            Self::Float(n) => {
                let text = format!("{n:e}");
                let (digits, exponent) = text.split_once('e')?;
                let (sign, exponent) = match exponent.strip_prefix('-') {
                    Some(rest) => ('-', rest),
                    None => ('+', exponent),
                };
                Some(format!("{digits}e{sign}{exponent:0>2}"))
            }
            Self::Null | Self::List(_) | Self::Map(_) => None,
        }
    }
}

/// A document, and where in it something was tagged to take the place of what other files have.
#[derive(Debug, PartialEq)]
pub(crate) struct Document {
    pub(crate) root: Yaml,
    pub(crate) resets: Vec<Vec<String>>,
}

/// A collection that is being read.
enum Open {
    List(Vec<Yaml>),
    Map {
        map: BTreeMap<String, Yaml>,
        /// What `<<` named, which what is written overrides.
        merged: BTreeMap<String, Yaml>,
        key: Option<String>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tag {
    None,
    Reset,
    Override,
    Text,
}

struct Level {
    open: Open,
    anchor: usize,
    tag: Tag,
}

#[derive(Default)]
struct Reader {
    levels: Vec<Level>,
    anchors: HashMap<usize, (Yaml, usize)>,
    values: usize,
    root: Option<Yaml>,
    resets: Vec<Vec<String>>,
    documents: Vec<Document>,
}

/// The documents of `text`.
pub(crate) fn read(text: &str) -> Result<Vec<Document>, String> {
    let mut reader = Reader::default();
    for event in &mut Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| e.to_string())?;
        reader.take(event).map_err(|e| format!("line {}: {e}", span.start.line()))?;
    }
    Ok(reader.documents)
}

impl Reader {
    fn take(&mut self, event: Event<'_>) -> Result<(), String> {
        let tag_of = |tag: Option<std::borrow::Cow<'_, saphyr_parser::Tag>>| match tag {
            Some(t) if t.is_yaml_core_schema() && t.suffix == "str" => Tag::Text,
            Some(t) if t.suffix == "reset" => Tag::Reset,
            Some(t) if t.suffix == "override" => Tag::Override,
            _ => Tag::None,
        };
        match event {
            Event::MappingStart(anchor, tag) => {
                let open = Open::Map { map: BTreeMap::new(), merged: BTreeMap::new(), key: None };
                self.start(open, anchor, tag_of(tag))
            }
            Event::SequenceStart(anchor, tag) => {
                self.start(Open::List(Vec::new()), anchor, tag_of(tag))
            }
            Event::MappingEnd | Event::SequenceEnd => {
                let level = self.levels.pop().ok_or("an end without a start")?;
                let value = match level.open {
                    Open::List(list) => Yaml::List(list),
                    Open::Map { map, mut merged, .. } => {
                        merged.extend(map);
                        Yaml::Map(merged)
                    }
                };
                self.place(value, level.anchor, level.tag)
            }
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag_of(tag);
                let plain = style == ScalarStyle::Plain && tag != Tag::Text;
                let value = if plain { scalar(&text) } else { Yaml::Text(text.into_owned()) };
                self.place(value, anchor, tag)
            }
            Event::Alias(id) => {
                // Inside what it stands for there is nothing yet: that is not finished.
                let (value, size) = self
                    .anchors
                    .get(&id)
                    .cloned()
                    .ok_or("an alias stands for what it is a part of")?;
                self.count(size)?;
                self.place(value, 0, Tag::None)
            }
            Event::DocumentEnd => {
                let root = self.root.take().unwrap_or(Yaml::Null);
                let resets = std::mem::take(&mut self.resets);
                self.documents.push(Document { root, resets });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, more: usize) -> Result<(), String> {
        self.values = self.values.saturating_add(more);
        match self.values > MAX_VALUES {
            true => Err(format!("more than {MAX_VALUES} values")),
            false => Ok(()),
        }
    }

    fn start(&mut self, open: Open, anchor: usize, tag: Tag) -> Result<(), String> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(format!("deeper than {MAX_DEPTH}"));
        }
        self.levels.push(Level { open, anchor, tag });
        Ok(())
    }

    /// The keys that lead to what comes next.
    fn path(&self) -> Vec<String> {
        self.levels
            .iter()
            .map(|level| match &level.open {
                Open::Map { key, .. } => key.clone().unwrap_or_default(),
                Open::List(list) => format!("[{}]", list.len()),
            })
            .filter(|key| key != "<<")
            .collect()
    }

    fn place(&mut self, value: Yaml, anchor: usize, tag: Tag) -> Result<(), String> {
        self.count(1)?;
        if anchor != 0 {
            self.anchors.insert(anchor, (value.clone(), size(&value)));
        }
        let is_key =
            matches!(self.levels.last(), Some(Level { open: Open::Map { key: None, .. }, .. }));
        if !is_key && matches!(tag, Tag::Reset | Tag::Override) {
            let path = self.path();
            self.resets.push(path);
            if tag == Tag::Reset {
                if let Some(Level { open: Open::Map { key, .. }, .. }) = self.levels.last_mut() {
                    *key = None;
                }
                return Ok(());
            }
        }
        match self.levels.last_mut().map(|l| &mut l.open) {
            None => self.root = Some(value),
            Some(Open::List(list)) => list.push(value),
            Some(Open::Map { map, merged, key }) => match key.take() {
                None => match value {
                    Yaml::Text(text) => {
                        if map.contains_key(&text) {
                            return Err(format!("mapping key {text:?} already defined"));
                        }
                        *key = Some(text);
                    }
                    other => return Err(format!("non-string key: {}", other.kind())),
                },
                Some(name) if name == "<<" => {
                    let all = match value {
                        Yaml::List(list) => list,
                        one => vec![one],
                    };
                    for one in all {
                        let Yaml::Map(one) = one else {
                            return Err(
                                "map merge requires map or sequence of maps as the value".into()
                            );
                        };
                        for (k, v) in one {
                            merged.entry(k).or_insert(v);
                        }
                    }
                }
                Some(name) => drop(map.insert(name, value)),
            },
        }
        Ok(())
    }
}

fn size(value: &Yaml) -> usize {
    1 + match value {
        Yaml::List(all) => all.iter().map(size).sum(),
        Yaml::Map(all) => all.values().map(size).sum(),
        _ => 0,
    }
}

/// A plain scalar.
fn scalar(text: &str) -> Yaml {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Yaml::Null,
        "true" | "True" | "TRUE" => Yaml::Bool(true),
        "false" | "False" | "FALSE" => Yaml::Bool(false),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => Yaml::Float(f64::INFINITY),
        "-.inf" | "-.Inf" | "-.INF" => Yaml::Float(f64::NEG_INFINITY),
        ".nan" | ".NaN" | ".NAN" => Yaml::Float(f64::NAN),
        _ => number(text).unwrap_or_else(|| Yaml::Text(text.to_owned())),
    }
}

fn number(text: &str) -> Option<Yaml> {
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '.' | '-' | '+')) {
        return None;
    }
    let digits = text.replace('_', "");
    let (negative, body) = match digits.strip_prefix(['-', '+']) {
        Some(rest) => (digits.starts_with('-'), rest),
        None => (false, digits.as_str()),
    };
    let lower = body.to_ascii_lowercase();
    let (radix, whole) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    if whole.bytes().all(|b| b.is_ascii_alphanumeric())
        && let Ok(value) = i64::from_str_radix(whole, radix)
    {
        return Some(Yaml::Int(if negative { -value } else { value }));
    }
    let written = body.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && body.bytes().any(|b| b.is_ascii_digit())
        && body
            .bytes()
            .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+'));
    let value: f64 = if written { digits.parse().ok()? } else { return None };
    Some(Yaml::Float(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let shown = match read(text) {
            Ok(documents) => documents
                .iter()
                .map(|d| {
                    format!(
                        "{}{}",
                        show(&d.root),
                        d.resets.iter().map(|r| format!(" -{}", r.join("."))).collect::<String>()
                    )
                })
                .collect::<Vec<_>>()
                .join(" --- "),
            Err(why) => format!("error {why}"),
        };
        assert_eq!(shown, expected, "{text}");
    }

    fn show(value: &Yaml) -> String {
        match value {
            Yaml::Null => "null".into(),
            Yaml::Text(text) => format!("{text:?}"),
            Yaml::List(list) => {
                format!("[{}]", list.iter().map(show).collect::<Vec<_>>().join(","))
            }
            Yaml::Map(map) => {
                let members: Vec<String> =
                    map.iter().map(|(k, v)| format!("{k}:{}", show(v))).collect();
                format!("{{{}}}", members.join(","))
            }
            other => other.printed().unwrap_or_default(),
        }
    }

    #[test]
    fn scalars_are_those_of_others() {
        check(
            "[yes, 0123, 0x10, 1_000, 1.50, 1e3, ~, true, 'true', 1.2.3, .5, 1e30, 2020-01-01, -x, +5]",
            r#"["yes",83,16,1000,1.5,1000,null,true,"true","1.2.3",0.5,1e+30,"2020-01-01","-x",5]"#,
        );
    }

    #[test]
    fn merge_keys_give_way_to_what_is_written() {
        check(
            "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {<<: [*x, {c: 4}]}\n",
            "{x:{a:1,b:2},y:{a:1,b:3},z:{a:1,b:2,c:4}}",
        );
        check("<<: 1\n", "error line 1: map merge requires map or sequence of maps as the value");
    }

    #[test]
    fn tags_take_values_away() {
        check(
            "a: !reset null\nb: !override [1]\nc: {d: !reset {e: 1}}\n",
            "{b:[1],c:{}} -a -b -c.d",
        );
    }

    #[test]
    fn what_is_wrong_or_too_much_is_refused() {
        check("a: 1\na: 2\n", "error line 2: mapping key \"a\" already defined");
        check("1: a\n", "error line 1: non-string key: number");
        let deep = "[".repeat(MAX_DEPTH + 1);
        assert!(read(&deep).unwrap_err().contains("deeper than"));
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for n in 1..8 {
            let before = format!("*a{}", n - 1);
            bomb.push_str(&format!("a{n}: &a{n} [{}]\n", vec![before; 10].join(",")));
        }
        assert!(read(&bomb).unwrap_err().contains("more than"));
    }
}
