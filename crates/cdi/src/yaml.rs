//! YAML as a JSON value, within bounds. Scalars mean what YAML 1.1 says, as for the programs for
//! which device files are written: `yes` is true and `0660` is octal. Members that are null are
//! left out.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Collections in collections, at most.
const MAX_DEPTH: usize = 32;
/// Values of a file, with those that aliases stand for.
const MAX_VALUES: usize = 100_000;

/// A collection that is being read.
enum Open {
    List(Vec<Value>),
    /// With the key whose value comes next.
    Table(Map<String, Value>, Option<String>),
}

struct Reader {
    /// The collections that are open, with their anchors.
    open: Vec<(Open, usize)>,
    /// What has an anchor, and of how many values it is made.
    anchors: HashMap<usize, (Value, usize)>,
    values: usize,
    root: Option<Value>,
}

/// The one document of `text`.
pub(crate) fn read(text: &str) -> Result<Value, String> {
    let mut reader = Reader { open: Vec::new(), anchors: HashMap::new(), values: 0, root: None };
    for event in &mut Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| e.to_string())?;
        reader.take(event).map_err(|e| format!("line {}: {e}", span.start.line()))?;
    }
    Ok(reader.root.unwrap_or(Value::Null))
}

impl Reader {
    fn take(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                Err("a file holds one document".into())
            }
            Event::MappingStart(anchor, _) => self.start(Open::Table(Map::new(), None), anchor),
            Event::SequenceStart(anchor, _) => self.start(Open::List(Vec::new()), anchor),
            Event::MappingEnd | Event::SequenceEnd => match self.open.pop() {
                Some((Open::List(list), anchor)) => self.place(Value::Array(list), anchor),
                Some((Open::Table(mut map, _), anchor)) => {
                    map.retain(|_, value| !value.is_null());
                    self.place(Value::Object(map), anchor)
                }
                None => Err("an end without a start".into()),
            },
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain
                    && tag.is_none_or(|t| !t.is_yaml_core_schema() || t.suffix != "str");
                self.place(
                    if plain { scalar(&text) } else { Value::from(text.into_owned()) },
                    anchor,
                )
            }
            Event::Alias(id) => {
                // Inside what it stands for there is nothing yet: that is not finished.
                let (value, size) = self
                    .anchors
                    .get(&id)
                    .cloned()
                    .ok_or("an alias stands for what it is a part of")?;
                self.count(size)?;
                self.place(value, 0)
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, more: usize) -> Result<(), String> {
        self.values = self.values.saturating_add(more);
        if self.values > MAX_VALUES {
            Err(format!("more than {MAX_VALUES} values"))
        } else {
            Ok(())
        }
    }

    fn start(&mut self, collection: Open, anchor: usize) -> Result<(), String> {
        if self.open.len() >= MAX_DEPTH {
            return Err(format!("deeper than {MAX_DEPTH}"));
        }
        self.open.push((collection, anchor));
        Ok(())
    }

    fn place(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        self.count(1)?;
        if anchor != 0 {
            self.anchors.insert(anchor, (value.clone(), size(&value)));
        }
        match self.open.last_mut() {
            None => self.root = Some(value),
            Some((Open::List(list), _)) => list.push(value),
            Some((Open::Table(map, key), _)) => match key.take() {
                None => *key = Some(text(value).ok_or("a key is not a text")?),
                Some(key) if map.contains_key(&key) => {
                    return Err(format!("key {key:?} is there twice"));
                }
                Some(key) => drop(map.insert(key, value)),
            },
        }
        Ok(())
    }
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(all) => all.iter().map(size).sum(),
        Value::Object(all) => all.values().map(size).sum(),
        _ => 0,
    }
}

/// What a scalar says where a text is wanted.
pub(crate) fn text(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A plain scalar.
fn scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            true.into()
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            false.into()
        }
        _ => number(text).unwrap_or_else(|| text.into()),
    }
}

fn number(text: &str) -> Option<Value> {
    let digits = text.replace('_', "");
    let (negative, body) = match digits.strip_prefix(['-', '+']) {
        Some(rest) => (digits.starts_with('-'), rest),
        None => (false, digits.as_str()),
    };
    if !body.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
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
        return Some(if negative { -value } else { value }.into());
    }
    // Of what Rust takes for a number only what is written in digits: `1.5`, `1e3`.
    let written =
        body.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+'));
    let value: f64 = if written { digits.parse().ok()? } else { return None };
    serde_json::Number::from_f64(value).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn documents_are_read_as_the_reference_reads_them() {
        let check = |text: &str, expected: Value| assert_eq!(read(text), Ok(expected), "{text}");
        check("", Value::Null);
        check(
            "a: yes\nb: 'yes'\nc: !!str yes\nd: off\n",
            json!({ "a": true, "b": "yes", "c": "yes", "d": false }),
        );
        check(
            "- 0660\n- 0x1F\n- 0b11\n- 1_000\n- -5\n- 0o17\n- 0\n- 08\n",
            json!([432, 31, 3, 1000, -5, 15, 0, 8.0]),
        );
        check(
            "- 0.6.0\n- 1.5\n- 1e3\n- inf\n- .\n- 1-2\n- '1'\n- 2001-01-02\n",
            json!(["0.6.0", 1.5, 1000.0, "inf", ".", "1-2", "1", "2001-01-02"]),
        );
        check("a: &x\n  b: 1\nc: *x\n", json!({ "a": { "b": 1 }, "c": { "b": 1 } }));
        check("true: 1\n2: 3\n", json!({ "true": 1, "2": 3 }));
        check(
            "{\n\t\"a\":[1,\"\\u00e9\\/\"],\n\t\"b\":{\"c\":null}\n}\n",
            json!({ "a": [1, "é/"], "b": {} }),
        );
    }

    #[test]
    fn hostile_documents_are_refused() {
        let check = |text: &str, why: &str| {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        check("a: 1\na: 2\n", "line 2: key \"a\" is there twice");
        check("a: &x [*x]\n", "an alias stands for what it is a part of");
        check("[a]: 1\n", "a key is not a text");
        check("a: 1\n---\nb: 1\n", "a file holds one document");
        check(&"- ".repeat(40), "deeper than 32");
        check(&"[".repeat(1_000_000), "recursion limit");
        check(&"- 1\n".repeat(100_001), "more than 100000 values");
        let mut laughs = String::from("a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n");
        for i in 1..10 {
            let many = format!("*a{}, ", i - 1).repeat(10);
            laughs.push_str(&format!("a{i}: &a{i} [{many}]\n"));
        }
        check(&laughs, "more than 100000 values");
    }
}
